package direct

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"memsync/strategies"
	"memsync/strategies/param"
	"memsync/strategies/region"
)

const workloadEnv = "MEMSYNC_DIRECT_TEST_PATH"

var content = region.Content{Seed: 7}

func TestMain(m *testing.M) {
	if path := os.Getenv(workloadEnv); path != "" {
		if err := workload(path); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

// workload maps path, checks all bytes, inverts the last one and flushes it.
func workload(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	m, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	if err := content.Check(m, 0); err != nil {
		return err
	}
	m[len(m)-1] ^= 0xff
	return errors.Join(unix.Msync(m, unix.MS_SYNC), unix.Munmap(m))
}

// store is a region in memory that counts flushes and closes.
type store struct {
	mu              sync.Mutex
	b               []byte
	flushed, closed int
}

func (s *store) do(f func()) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	return nil
}

func (s *store) Size() int64 { return int64(len(s.b)) }
func (s *store) ReadAt(_ context.Context, p []byte, off int64) error {
	return s.do(func() { copy(p, s.b[off:]) })
}
func (s *store) WriteAt(_ context.Context, p []byte, off int64) error {
	return s.do(func() { copy(s.b[off:], p) })
}
func (s *store) Flush(context.Context) error { return s.do(func() { s.flushed++ }) }
func (s *store) Close() error                { return s.do(func() { s.closed++ }) }

type remote struct{ s region.Store }

func (r remote) Open(context.Context) (region.Store, error) {
	if r.s == nil {
		return nil, region.ErrPeerGone
	}
	return r.s, nil
}
func (r remote) Dial(context.Context) (net.Conn, error) { return nil, region.ErrNotSupported }

func options(t *testing.T, device string) strategies.Options {
	t.Helper()
	p, err := param.New(Strategy{}.Info().Params, nil)
	if err != nil {
		t.Fatal(err)
	}
	return strategies.Options{Device: device, Chunk: 64 << 10, Dir: t.TempDir(), Params: p}
}

func TestMount(t *testing.T) {
	const size = 1<<20 + 3
	s := &store{b: make([]byte, size)}
	content.Fill(s.b, 0)
	want := bytes.Clone(s.b)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	m, err := Strategy{}.Mount(ctx, remote{s}, options(t, "auto"))
	if err != nil {
		t.Fatal(err)
	}
	a := m.Attachment()
	if a.Kind != strategies.AttachPath || a.Size != size {
		t.Errorf("attachment %+v", a)
	}
	c := exec.CommandContext(ctx, "/proc/self/exe")
	c.Env = append(os.Environ(), workloadEnv+"="+a.Path)
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("workload: %v\n%s", err, out)
	}
	if err := m.Sync(ctx); err != nil || s.flushed == 0 {
		t.Errorf("Sync: %v, %d flushes", err, s.flushed)
	}
	want[size-1] ^= 0xff
	_ = s.do(func() {}) // the kernel ordered us after the write; tell the race detector
	if !bytes.Equal(s.b, want) {
		t.Error("the workload's store is not at the source, or another byte changed")
	}
	if st := m.Stats(); st.DemandBytes < size || st.PushRequests == 0 {
		t.Errorf("stats %+v", st)
	}
	if err := errors.Join(m.Close(ctx), m.Close(ctx)); err != nil {
		t.Error(err)
	}
	if s.closed != 1 {
		t.Errorf("store closed %d times", s.closed)
	}
	if _, err := os.Lstat(a.Path); !os.IsNotExist(err) {
		t.Errorf("left over: %v", err)
	}
}

func TestRefusals(t *testing.T) {
	ctx := context.Background()
	if _, err := (Strategy{}).Mount(ctx, remote{}, options(t, "fuse")); !errors.Is(err, region.ErrPeerGone) {
		t.Error(err)
	}
	s := &store{b: make([]byte, 1)}
	for device, want := range map[string]string{"ublk": "not supported", "uffd": "or strategy userfaultfd", "floppy": "valid: auto, fuse, nbd"} {
		_, err := Strategy{}.Mount(ctx, remote{s}, options(t, device))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("device %s: %v", device, err)
		}
	}
	if s.closed != 3 {
		t.Errorf("store closed %d times, want 3", s.closed)
	}
	bad := options(t, "fuse")
	bad.Dir = "/does/not/exist"
	if _, err := (Strategy{}).Mount(ctx, remote{s}, bad); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}
