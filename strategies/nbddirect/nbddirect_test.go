package nbddirect

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies"
	"memsync/strategies/backend"
	"memsync/strategies/device/nbdk"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/transport"
	"memsync/strategies/transport/nbd"
)

var content = region.Content{Seed: 7}

func TestMain(m *testing.M) {
	if path := os.Getenv("NBDDIRECT_PATH"); path != "" {
		if err := workload(path); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// workload maps the region, checks all bytes and inverts the last one.
func workload(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	var size int
	if _, err := fmt.Sscan(os.Getenv("NBDDIRECT_SIZE"), &size); err != nil {
		return err
	}
	p, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	if err := content.Check(p, 0); err != nil {
		return err
	}
	p[size-1] ^= 0xff
	return unix.Munmap(p) // without msync: Sync has to bring it there
}

type remote struct{ addr string }

func (remote) Open(context.Context) (region.Store, error) { return nil, region.ErrNotSupported }

func (r remote) Dial(ctx context.Context) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "tcp", r.addr)
}

func TestMountAndSync(t *testing.T) {
	if err := nbdk.Probe(); err != nil {
		if os.Getenv("MEMSYNC_LAB") == "1" {
			t.Fatalf("in the lab kernel: %v", err)
		}
		t.Skipf("%v (TestKernelPackages of scenarios/lab runs this test in the lab kernel)", err)
	}
	for _, size := range []int64{1, 4096, 1<<20 - 1, 1<<20 + 512} {
		for _, setup := range []string{"netlink", "ioctl"} {
			t.Run(fmt.Sprintf("%s/%d", setup, size), func(t *testing.T) { mountAndSync(t, size, setup) })
		}
	}
}

func mountAndSync(t *testing.T, size int64, setup string) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	store := source(t, size)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_ = Strategy{}.Serve(ctx, &nbd.Transport{}, c, transport.One{Name: exportName, Store: store}, param.Values{})
			}()
		}
	}()
	p, err := param.New(nbdk.Params(), []string{"nbd_setup=" + setup})
	if err != nil {
		t.Fatal(err)
	}
	m, err := Strategy{}.Mount(ctx, remote{l.Addr().String()}, strategies.Options{Device: "nbd", Params: p})
	if err != nil {
		t.Fatal(err)
	}
	a := m.Attachment()
	if a.Size != size || a.Kind != strategies.AttachPath {
		t.Errorf("attachment %+v", a)
	}
	c := exec.CommandContext(ctx, "/proc/self/exe")
	c.Env = append(os.Environ(), "NBDDIRECT_PATH="+a.Path, fmt.Sprintf("NBDDIRECT_SIZE=%d", size))
	if out, err := c.CombinedOutput(); err != nil {
		t.Errorf("workload: %v: %s", err, out)
	}
	if err := m.Sync(ctx); err != nil {
		t.Error(err)
	}
	want, got := make([]byte, size), make([]byte, size)
	content.Fill(want, 0)
	want[size-1] ^= 0xff
	if err := store.ReadAt(ctx, got, 0); err != nil || string(got) != string(want) {
		t.Errorf("after Sync the source differs, %v", err)
	}
	if s := m.Stats(); s.PushBytes == 0 || s.DemandBytes == 0 {
		t.Errorf("%+v", s)
	}
	if err := errors.Join(m.Close(ctx), m.Close(ctx)); err != nil {
		t.Error(err)
	}
}

func source(t *testing.T, size int64) region.Store {
	t.Helper()
	s, err := backend.Open(context.Background(), backend.Spec{Backend: "memory", Size: size, Content: content}, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}
