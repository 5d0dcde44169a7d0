package nbdk

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/transport"
	"memsync/strategies/transport/nbd"
)

// The process that serves a device never touches it: a child does.
func TestMain(m *testing.M) {
	if role := os.Getenv("NBDK_ROLE"); role != "" {
		if err := child(role, os.Getenv("NBDK_PATH")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func child(role, path string) error {
	switch role {
	case "read": // to standard output
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(os.Stdout, f)
		return err
	case "read-only":
		return writeReadOnly(path)
	case "several":
		return several()
	case "source":
		return serveFile(path, os.Getenv("NBDK_ADDR"))
	case "dirty":
		return writeCached(path)
	case "store": // through a shared mapping: 1, 2, 3...
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		size, err := f.Seek(0, io.SeekEnd)
		if err != nil {
			return err
		}
		p, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return err
		}
		copy(p, pattern(int(size)))
		if err := unix.Msync(p, unix.MS_SYNC); err != nil {
			return err
		}
		return unix.Munmap(p)
	case "direct": // past the page cache, in blocks of odd sizes and any order
		return storeDirect(path)
	case "claim": // as a foreign client does: no lock, no connection yet
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		a, _, err := socketPair()
		if err != nil {
			return err
		}
		s, err := a.(*net.UnixConn).File()
		if err != nil {
			return err
		}
		if err := blockIoctl(int(f.Fd()), ioctlSetSock, s.Fd()); err != nil {
			return err
		}
		fmt.Println("claimed")
		_, _ = io.Copy(io.Discard, os.Stdin)
		return nil
	case "serve": // until killed
		p, err := param.New(Params(), strings.Fields(os.Getenv("NBDK_SET")))
		if err != nil {
			return err
		}
		m := &memory{b: make([]byte, 1<<20)}
		m.hang.Store(os.Getenv("NBDK_HANG") != "")
		d, err := Open(context.Background(), m, Options{Params: p})
		if err != nil {
			return err
		}
		fmt.Println(d.Path())
		select {}
	}
	return errors.New("no such role: " + role)
}

// storeDirect writes the pattern with O_DIRECT, where the last block and each
// third one go first, and reads it back in the same way.
func storeDirect(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	p, err := unix.Mmap(-1, 0, int(region.RoundUp(size, 4096)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	defer unix.Munmap(p)
	const block = 132 << 10 // more than one request of the kernel's where its limit is 128 KiB
	copy(p[:size], pattern(int(size)))
	n := (int(size) + block - 1) / block
	for k := range 3 {
		for i := n - 1 - k; i >= 0; i -= 3 {
			lo, hi := i*block, min((i+1)*block, int(size))
			if _, err := f.WriteAt(p[lo:hi], int64(lo)); err != nil {
				return err
			}
		}
	}
	clear(p)
	if _, err := f.ReadAt(p[:size], 0); err != nil {
		return err
	}
	if !bytes.Equal(p[:size], pattern(int(size))) {
		return region.ErrMismatch
	}
	return nil
}

// writeReadOnly fails where a read-only device takes a write, also from a root
// who sets the kernel's own flag back.
func writeReadOnly(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil
	}
	defer f.Close()
	if _, err := f.WriteAt(make([]byte, 512), 0); !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("write: %v, want EPERM", err)
	}
	if p, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
		p[0] ^= 0xff
		return errors.New("a writable shared mapping")
	}
	var zero int32
	if err := blockIoctl(int(f.Fd()), unix.BLKROSET, uintptr(unsafe.Pointer(&zero))); err != nil {
		return nil
	}
	_, err = f.WriteAt(make([]byte, 512), 0)
	if err = errors.Join(err, f.Sync()); err == nil {
		return errors.New("after BLKROSET a write went well")
	}
	return nil
}

func role(t *testing.T, name, path string, more ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	c := exec.CommandContext(ctx, "/proc/self/exe")
	c.Env = append(append(os.Environ(), "NBDK_ROLE="+name, "NBDK_PATH="+path), more...)
	c.Stderr = os.Stderr
	c.WaitDelay = time.Second
	return c
}

func pattern(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i*31 + i>>9)
	}
	return p
}

// need is the only skip: the lab kernel has nbd, and there nothing may be skipped.
func need(t *testing.T) {
	t.Helper()
	err := Probe()
	switch {
	case err == nil:
	case os.Getenv("MEMSYNC_LAB") == "1":
		t.Fatalf("in the lab kernel: %v", err)
	default:
		t.Skipf("%v (TestKernelPackages of scenarios/lab runs this test in the lab kernel)", err)
	}
}

// memory is a store without a view, which can be told to fail or to hang.
type memory struct {
	mu   sync.Mutex
	b    []byte
	fail atomic.Bool
	hang atomic.Bool
	keep atomic.Bool // hang in writes only
}

func (m *memory) Size() int64 { return int64(len(m.b)) }

func (m *memory) gate(ctx context.Context) error {
	if m.hang.Load() {
		<-ctx.Done()
		return ctx.Err()
	}
	if m.fail.Load() {
		return errors.New("told to fail")
	}
	return nil
}

func (m *memory) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := errors.Join(m.gate(ctx), region.CheckRange(off, int64(len(p)), m.Size())); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	copy(p, m.b[off:])
	return nil
}

func (m *memory) WriteAt(ctx context.Context, p []byte, off int64) error {
	if m.keep.Load() {
		<-ctx.Done()
	}
	if err := errors.Join(m.gate(ctx), region.CheckRange(off, int64(len(p)), m.Size())); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	copy(m.b[off:], p)
	return nil
}

func (m *memory) Flush(ctx context.Context) error { return m.gate(ctx) }
func (m *memory) Close() error                    { return nil }

func params(t *testing.T, set ...string) param.Values {
	t.Helper()
	p, err := param.New(Params(), set)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func open(t *testing.T, s region.Store, set ...string) *Device {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	d, err := Open(ctx, s, Options{Params: params(t, set...)})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func shut(t *testing.T, d *Device) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := d.Close(ctx); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(d.sysfs("pid")); err == nil {
		t.Errorf("%s is attached after Close", d.Path())
	}
}

func TestReadAndStore(t *testing.T) {
	need(t)
	for _, set := range []string{"nbd_setup=netlink nbd_ready=poll", "nbd_setup=netlink nbd_ready=uevent nbd_connections=1", "nbd_setup=ioctl nbd_ready=uevent", "nbd_setup=ioctl nbd_connections=16"} {
		t.Run(set, func(t *testing.T) {
			for _, size := range []int{1, 512, 4096, 1<<20 - 1, 3<<20 + 512} {
				m := &memory{b: pattern(size)}
				start := time.Now()
				d := open(t, m, strings.Fields(set)...)
				opened := time.Since(start)
				got, err := role(t, "read", d.Path()).Output()
				if err != nil {
					t.Fatalf("%d bytes: read: %v", size, err)
				}
				whole := int(region.RoundUp(int64(size), 512)) // of the device
				want := append(pattern(size), make([]byte, whole-size)...)
				if !bytes.Equal(got, want) {
					t.Errorf("%d bytes: read %d bytes %x, want %d", size, len(got), sha256.Sum256(got), len(want))
				}
				shut(t, d)
				kinds := []string{"store"}
				if size == whole { // a store has no place for what lies beyond its end
					kinds = append(kinds, "direct")
				}
				for _, kind := range kinds {
					m.b = make([]byte, size)
					d = open(t, m, strings.Fields(set)...)
					if err := role(t, kind, d.Path()).Run(); err != nil {
						t.Fatalf("%d bytes: %s: %v", size, kind, err)
					}
					s := d.Stats()
					m.mu.Lock()
					same := bytes.Equal(m.b, pattern(size))
					m.mu.Unlock()
					if !same {
						t.Errorf("%d bytes: after %s the store differs", size, kind)
					}
					if s.WriteBytes < int64(size) || s.Errors != 0 || d.Err() != nil {
						t.Errorf("%d bytes: %s: %+v, %v", size, kind, s, d.Err())
					}
					start = time.Now()
					shut(t, d)
					t.Logf("%d bytes: %s: open %v, close %v", size, kind, opened, time.Since(start))
				}
			}
		})
	}
}

func TestReadOnly(t *testing.T) {
	need(t)
	for _, setup := range []string{"netlink", "ioctl"} {
		m := &memory{b: pattern(8192)}
		d, err := Open(t.Context(), m, Options{ReadOnly: true, Params: params(t, "nbd_setup="+setup)})
		if err != nil {
			t.Fatal(err)
		}
		// The kernel lets root open a read-only block device for writing, but not
		// write or map it (block/fops.c).
		if err := role(t, "read-only", d.Path()).Run(); err != nil {
			t.Errorf("%s: %v", setup, err)
		}
		if !bytes.Equal(m.b, pattern(8192)) {
			t.Errorf("%s: the store has changed", setup)
		}
		shut(t, d)
	}
}

func TestManyAtOnce(t *testing.T) {
	need(t)
	for _, setup := range []string{"netlink", "ioctl"} {
		var mu sync.Mutex
		seen := map[string]*Device{}
		var group sync.WaitGroup
		for range 6 {
			group.Go(func() {
				d, err := Open(t.Context(), &memory{b: pattern(8192)}, Options{Params: params(t, "nbd_setup="+setup, "nbd_connections=2")})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				defer mu.Unlock()
				if seen[d.Path()] != nil {
					t.Errorf("%s was given twice", d.Path())
				}
				seen[d.Path()] = d
			})
		}
		group.Wait()
		for _, d := range seen {
			shut(t, d)
		}
	}
}

func TestForeignClientAndAllInUse(t *testing.T) {
	need(t)
	index, node, err := free()
	if err != nil {
		t.Fatal(err)
	}
	node.Close()
	path := fmt.Sprintf("/dev/nbd%d", index)
	c := role(t, "claim", path)
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, len("claimed\n"))); err != nil {
		t.Fatal(err)
	}
	d := open(t, &memory{b: pattern(8192)}, "nbd_setup=ioctl")
	if d.Path() == path {
		t.Errorf("took %s, which another client holds", path)
	}
	shut(t, d)
	in.Close()
	if err := c.Wait(); err != nil {
		t.Error(err)
	}

	var all []*os.File
	for {
		_, f, err := free()
		if err != nil {
			break
		}
		all = append(all, f)
	}
	_, err = Open(t.Context(), &memory{b: pattern(8192)}, Options{Params: params(t, "nbd_setup=ioctl")})
	if err == nil || !strings.Contains(err.Error(), "nbds_max") {
		t.Errorf("all %d in use: %v", len(all), err)
	}
	for _, f := range all {
		f.Close()
	}
}

func TestStoreFails(t *testing.T) {
	need(t)
	m := &memory{b: pattern(1 << 20)}
	d := open(t, m)
	m.fail.Store(true)
	c := role(t, "read", d.Path())
	c.Stderr = nil
	if err := c.Run(); err == nil {
		t.Error("a read went well though the store failed")
	}
	if d.Err() == nil || d.Stats().Errors == 0 {
		t.Errorf("%v, %+v", d.Err(), d.Stats())
	}
	m.fail.Store(false)
	got, err := role(t, "read", d.Path()).Output()
	if err != nil || !bytes.Equal(got, m.b) {
		t.Errorf("after the failure: %d bytes, %v", len(got), err)
	}
	shut(t, d)
}

// TestServerDies: whoever waits for a device whose server is gone, or does not
// answer, gets an error; the device can be closed. (By netlink, what was in flight
// waits for nbd_timeout.)
func TestServerDies(t *testing.T) {
	need(t)
	for _, setup := range []string{"netlink", "ioctl"} {
		for _, how := range []string{"is gone", "hangs", "goes with a request in flight"} {
			timeout := "nbd_timeout=1s"
			if how != "hangs" && setup == "ioctl" {
				timeout = "nbd_timeout=1m"
			}
			m := &memory{b: pattern(1 << 20)}
			m.hang.Store(how != "is gone")
			serve, kill := context.WithCancel(t.Context())
			defer kill()
			ours, theirs, err := socketPair()
			if err != nil {
				t.Fatal(err)
			}
			var server sync.WaitGroup
			tr := &nbd.Transport{}
			server.Go(func() { _ = tr.Serve(serve, ours, transport.One{Store: m}) })
			e, err := tr.Negotiate(t.Context(), theirs, "")
			if err != nil {
				t.Fatal(err)
			}
			d, err := Connect(t.Context(), []net.Conn{theirs}, e, Options{Params: params(t, "nbd_setup="+setup, timeout)})
			if err != nil {
				t.Fatal(err)
			}
			if how == "is gone" {
				kill()
				server.Wait()
			}
			start := time.Now()
			c := role(t, "read", d.Path())
			var got bytes.Buffer
			c.Stderr, c.Stdout = nil, &got
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			if how == "goes with a request in flight" {
				within(t, "a read is in flight", func() bool {
					b, _ := os.ReadFile(d.sysfs("inflight"))
					return !strings.HasPrefix(strings.TrimSpace(string(b)), "0")
				})
				kill()
				server.Wait()
			}
			// By ioctl, a device whose server left is empty: end of file.
			if err := c.Wait(); err == nil && got.Len() != 0 {
				t.Errorf("%s, the server %s: %d bytes were read", setup, how, got.Len())
			}
			if took := time.Since(start); took > 8*time.Second {
				t.Errorf("%s, the server %s: the reader waited %v", setup, how, took)
			}
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			_ = d.Close(ctx) // may say that nothing could be written back
			cancel()
			if _, err := os.Stat(d.sysfs("pid")); err == nil {
				t.Errorf("%s is attached after Close", d.Path())
			}
			kill()
			server.Wait()
		}
	}
}

// TestCloseIsBounded: dirty pages that the store never takes do not hold Close up.
func TestCloseIsBounded(t *testing.T) {
	need(t)
	m := &memory{b: make([]byte, 1<<20)}
	d := open(t, m, "nbd_timeout=60s")
	m.keep.Store(true)
	c := role(t, "store", d.Path()) // waits in msync
	c.Stderr = nil
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	inFlight(t, d)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	start := time.Now()
	if err := d.Close(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Close: %v, want the deadline: bytes were lost", err)
	}
	if took := time.Since(start); took > 4*time.Second {
		t.Errorf("Close took %v", took)
	}
	if err := c.Wait(); err == nil {
		t.Error("msync went well though nothing was stored")
	}
}

// TestSIGKILL: whoever serves a device is killed, idle or with a request in
// flight that is never answered: the kernel lets go (by netlink, in the latter
// case, after nbd_timeout), and the reader gets an error.
func TestSIGKILL(t *testing.T) {
	need(t)
	for _, setup := range []string{"auto", "ioctl", "netlink nbd_timeout=1s nbd_connections=1"} {
		for _, hang := range []string{"", "1"} {
			c := role(t, "serve", "", "NBDK_SET=nbd_setup="+setup, "NBDK_HANG="+hang)
			out, err := c.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			var path string
			if _, err := fmt.Fscanln(out, &path); err != nil {
				t.Fatal(err)
			}
			sys := filepath.Join("/sys/block", filepath.Base(path))
			if _, err := os.Stat(filepath.Join(sys, "pid")); err != nil {
				t.Fatal(err)
			}
			reader := role(t, "read", path)
			reader.Stderr = nil
			if hang != "" {
				if err := reader.Start(); err != nil {
					t.Fatal(err)
				}
				within(t, "a read is in flight", func() bool {
					b, _ := os.ReadFile(filepath.Join(sys, "inflight"))
					return strings.Fields(string(b))[0] != "0"
				})
			}
			_ = c.Process.Kill()
			_ = c.Wait()
			if hang != "" {
				read := make(chan error, 1)
				go func() { read <- reader.Wait() }()
				select {
				case <-read: // with an error, or, by ioctl, at the end of an empty device
				case <-time.After(5 * time.Second):
					t.Fatalf("%s: the reader still waits for a server that was killed", setup)
				}
			}
			within(t, setup+": "+path+" is let go", func() bool {
				_, err := os.Stat(filepath.Join(sys, "pid"))
				return err != nil
			})
		}
	}
}

func within(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 5 s: %s", what)
		}
	}
}

// TestOtherNetworkNamespace: a daemon lives in a namespace of its own.
func TestOtherNetworkNamespace(t *testing.T) {
	need(t)
	for _, setup := range []string{"auto", "netlink", "ioctl"} {
		c := role(t, "serve", "", "NBDK_SET=nbd_setup="+setup)
		c.Path, c.Args = "/usr/bin/unshare", []string{"unshare", "--net", "/proc/self/exe"}
		if p, err := exec.LookPath("unshare"); err == nil {
			self, _ := os.Executable()
			c.Path, c.Args = p, []string{p, "--net", self}
		}
		out, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		var path string
		_, err = fmt.Fscanln(out, &path)
		if err != nil {
			t.Errorf("%s: %v", setup, err)
		}
		_ = c.Process.Kill()
		_ = c.Wait()
	}
}

func TestRefused(t *testing.T) {
	if _, err := Open(t.Context(), &memory{}, Options{}); !errors.Is(err, region.ErrOutOfRange) {
		t.Errorf("an empty region: %v", err)
	}
	a, b, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if _, err := Connect(t.Context(), []net.Conn{b}, nbd.Export{Size: 513}, Options{}); !errors.Is(err, region.ErrOutOfRange) {
		t.Errorf("513 bytes: %v", err)
	}
	if err := module(); err != nil {
		if _, err := Open(t.Context(), &memory{b: make([]byte, 512)}, Options{}); !errors.Is(err, region.ErrNotSupported) {
			t.Errorf("without the driver: %v", err)
		}
	}
}
