package hashsync

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"memsync/strategies"
	"memsync/strategies/dirty"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/replay"
	"memsync/strategies/storetest"
)

// Bytes that come in, and bytes that go, move all behind them; what is sent is what
// is new, wherever it is in the region.
func TestMoved(t *testing.T) {
	ctx := within(t)
	const size = 16 << 20
	rng := rand.New(rand.NewPCG(replay.Seed(t), 0))
	m := newMemory(size)
	s := source(t, m, SourceOptions{Chunk: 64 << 10})
	d := follows(t, listen(t, s.Serve), nil)
	if err := d.Wait(ctx, 1); err != nil {
		t.Fatal(err)
	}
	for i := range 12 {
		n, off := 1+rng.IntN(size/2), rng.IntN(size/2) // also more new pieces than the encoder searches in vain
		fresh := make([]byte, n)
		region.Content{Seed: rng.Uint64()}.Fill(fresh, 0)
		old := m.copy()
		now, what := old[:off:off], "insert"
		if now = append(now, fresh...); i%2 == 0 {
			now = append(now, old[off:size-n]...)
		} else {
			what = "remove"
			now = append(append(old[:off:off], old[off+n:]...), fresh...)
		}
		before := s.statistics().SentBytes
		m.write(now, 0)
		round, err := s.Sync(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Wait(ctx, round); err != nil {
			t.Fatal(err)
		}
		equal(t, what, d.content(t), now)
		// Beside what is new: two blocks at its ends, the region's last, and what a piece costs.
		if sent, most := s.statistics().SentBytes-before, int64(n+16_000); sent > most {
			t.Errorf("%s %d bytes at %d: %d bytes sent, want at most %d", what, n, off, sent, most)
		}
	}
}

// tmpfs mounts a file system with room for size.
func tmpfs(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		if errors.Is(err, unix.EPERM) && os.Geteuid() != 0 {
			t.Skipf("mount tmpfs: %v (needs root)", err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// A destination without room says so, and neither crashes nor tries for ever: where
// its file is made, and where the file has holes whose pages are taken only by a round.
func TestDiskFull(t *testing.T) {
	for _, sparse := range []bool{false, true} {
		t.Run(fmt.Sprintf("sparse=%t", sparse), func(t *testing.T) {
			ctx, dir := within(t), tmpfs(t, "1m")
			s := source(t, newMemory(4<<20), SourceOptions{Chunk: 64 << 10})
			var file *os.File
			r := NewReplica("region", 0, func(size int64) (_ *os.File, err error) {
				if file, err = os.Create(filepath.Join(dir, "replica")); err != nil {
					return nil, err
				}
				if err = file.Truncate(size); err == nil && !sparse {
					err = unix.Fallocate(int(file.Fd()), 0, 0, size)
				}
				return file, err
			})
			err := Follow(ctx, listen(t, s.Serve).dial, r)
			want := unix.ENOSPC
			if sparse {
				want = unix.EIO
			}
			if !errors.Is(err, want) || ctx.Err() != nil {
				t.Errorf("no room: %v, want %v", err, want)
			}
			if _, err := s.Sync(ctx); err != nil {
				t.Errorf("the source: %v", err)
			}
			if err := errors.Join(r.Close(), file.Close()); err != nil {
				t.Error(err)
			}
		})
	}
}

// A link that carries nothing for a while, without a word, and then carries again:
// the destination finds out, connects again, and is sent what differs.
func TestLinkDown(t *testing.T) {
	if testing.Short() {
		t.Skip("silence is noticed after 10 s")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	m := newMemory(2 << 20)
	s := source(t, m, SourceOptions{Chunk: 64 << 10})
	up := listen(t, s.Serve)
	// A relay that swallows what comes while it is down.
	var gate atomic.Pointer[chan struct{}] // closed: down
	open := func() {
		c := make(chan struct{})
		gate.Store(&c)
	}
	open()
	down := listen(t, func(ctx context.Context, c net.Conn) error {
		to, err := up.dial(ctx)
		if err != nil {
			return err
		}
		defer to.Close()
		defer c.Close()
		stop := context.AfterFunc(ctx, func() { c.Close(); to.Close() })
		defer stop()
		pipe := func(w, r net.Conn) {
			defer w.Close()
			b := make([]byte, 64<<10)
			for {
				n, err := r.Read(b)
				if err != nil {
					return
				}
				select {
				case <-*gate.Load(): // down: nothing passes, nobody is told
					<-ctx.Done()
					return
				default:
				}
				if _, err := w.Write(b[:n]); err != nil {
					return
				}
			}
		}
		go pipe(to, c)
		pipe(c, to)
		return nil
	})
	d := follows(t, down, nil)
	if err := d.Wait(ctx, 1); err != nil {
		t.Fatal(err)
	}
	close(*gate.Load())
	m.write([]byte("while the link is down"), 100_000)
	begin := time.Now()
	if _, err := s.Sync(ctx); err != nil { // without the one that is silent
		t.Fatal(err)
	}
	if took := time.Since(begin); took > silence+5*time.Second {
		t.Errorf("the source waited %v for a destination that is silent", took)
	}
	filled := s.statistics().FilledBytes
	open()     // up again, for new connections
	down.cut() // and those that lingered in the relay are gone
	round, err := s.Sync(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Wait(ctx, max(round, 2)); err != nil {
		t.Fatal(err)
	}
	for !bytes.Equal(d.content(t), m.copy()) {
		if _, err := s.Sync(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if n := s.statistics().FilledBytes - filled; n > 128<<10 {
		t.Errorf("%d bytes sent again for one chunk", n)
	}
}

const writerRole = "HASHSYNC_TEST_WRITER"

// A writer that dies while its pages are tracked: all that it stored before is at
// the destinations, and the source goes on.
func TestWriterDies(t *testing.T) {
	if os.Getenv(writerRole) != "" {
		dieWriting(t)
		return
	}
	for _, how := range []string{"pagemap", "uffd-wp", "hash"} {
		t.Run(how, func(t *testing.T) {
			ctx := within(t)
			method, err := dirty.ByName(how)
			if err != nil {
				t.Fatal(err)
			}
			if err := method.Probe(); errors.Is(err, region.ErrNotSupported) {
				t.Skip(err)
			} else if err != nil {
				t.Fatal(err)
			}
			p, err := param.New(Strategy{}.Info().Params, []string{"dirty=" + how, "interval=1h"})
			if err != nil {
				t.Fatal(err)
			}
			const size = 1 << 20
			store := storetest.Seeded(region.Content{Seed: 1}, size)
			pub, err := Strategy{}.Publish(ctx, store, strategies.PublishOptions{Chunk: 4096, Dir: t.TempDir(), Params: p})
			if err != nil {
				t.Fatal(err)
			}
			a := pub.Attachment()
			cmd := exec.CommandContext(ctx, "/proc/self/exe", "-test.run", "^TestWriterDies$")
			cmd.Env = append(os.Environ(), writerRole+"=tracked by "+a.Track)
			pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			mine, theirs := os.NewFile(uintptr(pair[0]), "writer"), os.NewFile(uintptr(pair[1]), "test")
			defer mine.Close()
			var words strings.Builder
			cmd.ExtraFiles, cmd.Stderr, cmd.Stdout = []*os.File{theirs, a.File}, &words, &words
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			theirs.Close()
			w, err := receiveWriter(mine)
			if err != nil {
				t.Fatalf("%v: %s", err, words.String())
			}
			w.PID = cmd.Process.Pid
			if a.Track != "" {
				if err := pub.Track(w); err != nil {
					t.Fatal(err)
				}
			}
			l := listen(t, pub.Serve)
			d := follows(t, l, nil)
			if err := d.Wait(ctx, 1); err != nil {
				t.Fatal(err)
			}
			if _, err := mine.Write([]byte{1}); err != nil { // go: it stores to every page, and kills itself
				t.Fatal(err)
			}
			if err := cmd.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
				t.Fatalf("the writer: %v: %s", err, words.String())
			}
			want := make([]byte, size)
			region.Content{Seed: 2}.Fill(want, 0)
			for i := range 2 { // also once there is nothing to look at any more
				if err := pub.Sync(ctx); err != nil {
					t.Fatalf("sync %d: %v", i+1, err)
				}
				equal(t, how, d.content(t), want)
			}
			if err := d.stop(); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
			if err := pub.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// dieWriting maps descriptor 4, hands the armed mapping over, waits for a byte,
// stores to every page and kills itself.
func dieWriting(t *testing.T) {
	fi, err := os.NewFile(4, "region").Stat()
	if err != nil {
		t.Fatal(err)
	}
	mem, err := unix.Mmap(4, 0, int(fi.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	armed, err := dirty.Arm(strings.TrimPrefix(os.Getenv(writerRole), "tracked by "), mem)
	if err != nil {
		t.Fatal(err)
	}
	base := binary.NativeEndian.AppendUint64(nil, uint64(uintptr(unsafe.Pointer(&mem[0]))))
	var rights []byte
	if armed != nil {
		rights = unix.UnixRights(int(armed.Fd()))
	}
	if err := unix.Sendmsg(3, binary.NativeEndian.AppendUint64(base, uint64(len(mem))), rights, nil, 0); err != nil {
		t.Fatal(err)
	}
	if armed != nil {
		armed.Close() // else a source that dies would leave us waiting
	}
	var b [1]byte
	if _, err := unix.Read(3, b[:]); err != nil {
		t.Fatal(err)
	}
	region.Content{Seed: 2}.Fill(mem, 0)
	_ = unix.Kill(os.Getpid(), unix.SIGKILL)
}

// receiveWriter takes what dieWriting hands over.
func receiveWriter(f *os.File) (w strategies.Writer, err error) {
	b, oob := make([]byte, 16), make([]byte, unix.CmsgSpace(4))
	n, k, _, _, err := unix.Recvmsg(int(f.Fd()), b, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil || n != len(b) {
		return w, fmt.Errorf("%d bytes of the writer's mapping: %w", n, errors.Join(err, io.ErrUnexpectedEOF))
	}
	w.Base, w.Length = uintptr(binary.NativeEndian.Uint64(b)), int64(binary.NativeEndian.Uint64(b[8:]))
	msgs, err := unix.ParseSocketControlMessage(oob[:k])
	if err != nil || len(msgs) == 0 {
		return w, err
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err == nil && len(fds) > 0 {
		w.Uffd = os.NewFile(uintptr(fds[0]), "userfaultfd")
	}
	return w, err
}
