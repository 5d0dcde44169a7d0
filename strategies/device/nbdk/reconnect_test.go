package nbdk

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"memsync/strategies/backend"
	"memsync/strategies/region"
	"memsync/strategies/transport"
	"memsync/strategies/transport/nbd"
)

// serveFile is the role of a source: it serves a file until it is killed.
func serveFile(path, addr string) error {
	s, err := backend.OpenImage(path, false)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	fmt.Println(l.Addr())
	var store region.Store = s
	if os.Getenv("NBDK_STALL") != "" {
		store = stalled{s}
	}
	t := &nbd.Transport{}
	return transport.Accept(context.Background(), l, transport.Limits{}, nil, func(ctx context.Context, c net.Conn) {
		_ = t.Serve(ctx, c, transport.One{Store: store})
	})
}

// stalled is a store that never finishes a write.
type stalled struct{ *backend.Image }

func (stalled) WriteAt(ctx context.Context, _ []byte, _ int64) error {
	<-ctx.Done()
	return ctx.Err()
}

// writeCached is the role of a workload that leaves dirty pages: it stores the
// pattern through a mapping, says so, and calls msync when it reads a line.
func writeCached(path string) error {
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
	fmt.Println("stored")
	_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
	return unix.Msync(p, unix.MS_SYNC)
}

// source is a server in a process of its own, maybe in a network namespace.
type source struct {
	t    *testing.T
	in   *netns
	path string
	addr string
	cmd  *exec.Cmd
}

func newSource(t *testing.T, in *netns, size int) *source {
	s := &source{t: t, in: in, path: filepath.Join(t.TempDir(), "source"), addr: "127.0.0.1:0"}
	if err := os.WriteFile(s.path, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	s.start()
	return s
}

// start starts the server, on the address that it had before.
func (s *source) start(more ...string) {
	s.t.Helper()
	c := role(s.t, "source", s.path, append(more, "NBDK_ADDR="+s.addr)...)
	out, err := c.StdoutPipe()
	if err == nil {
		err = s.in.do(c.Start)
	}
	if err == nil {
		var addr string
		addr, err = bufio.NewReader(out).ReadString('\n')
		if addr = strings.TrimSpace(addr); addr != s.addr { // only at first: later, dial may be reading it
			s.addr = addr
		}
	}
	if err != nil {
		s.t.Fatal(err)
	}
	s.cmd = c
	s.t.Cleanup(func() { s.kill() })
}

func (s *source) kill() {
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

func (s *source) dial(ctx context.Context) (net.Conn, nbd.Export, error) {
	var c net.Conn
	err := s.in.do(func() (err error) {
		c, err = new(net.Dialer).DialContext(ctx, "tcp", s.addr)
		return err
	})
	if err != nil {
		return nil, nbd.Export{}, err
	}
	e, err := (&nbd.Transport{}).Negotiate(ctx, c, "")
	if err != nil {
		_ = c.Close()
		return nil, e, err
	}
	return c, e, nil
}

// connect attaches the source's export.
func (s *source) connect(n int, set ...string) *Device {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 10*time.Second)
	defer cancel()
	var conns []net.Conn
	var e nbd.Export
	for range n {
		c, got, err := s.dial(ctx)
		if err != nil {
			s.t.Fatal(err)
		}
		conns, e = append(conns, c), got
	}
	d, err := Connect(ctx, conns, e, Options{Params: params(s.t, set...), Redial: s.dial})
	if err != nil {
		s.t.Fatal(err)
	}
	return d
}

// holds compares the source's file with the pattern.
func (s *source) holds() error {
	b, err := os.ReadFile(s.path)
	if err == nil && !bytes.Equal(b, pattern(len(b))) {
		err = fmt.Errorf("the source differs: %w", region.ErrMismatch)
	}
	return err
}

// netns is a network namespace with lo; nil is the process's own.
type netns struct{ f *os.File }

func newNetns(t *testing.T) *netns {
	t.Helper()
	made := make(chan error, 1)
	n := &netns{}
	go func() {
		runtime.LockOSThread() // and the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			n.f, err = os.Open("/proc/thread-self/ns/net")
		}
		made <- err
	}()
	if err := <-made; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.f.Close() })
	n.link(t, true)
	return n
}

func (n *netns) do(f func() error) error {
	if n == nil {
		return f()
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		err := unix.Setns(int(n.f.Fd()), unix.CLONE_NEWNET)
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// link sets lo up or down.
func (n *netns) link(t *testing.T, up bool) {
	t.Helper()
	err := n.do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		if up {
			return netlink.LinkSetUp(lo)
		}
		return netlink.LinkSetDown(lo)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// workload starts a role that prints a line and waits for one.
func workload(t *testing.T, name, path string) (c *exec.Cmd, goOn io.WriteCloser) {
	t.Helper()
	c = role(t, name, path)
	c.Stderr = nil
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
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	return c, in
}

// TestServerRestarted: the source is killed with dirty pages in the workload's
// cache, and comes back: no write is lost and nobody gets an error.
func TestServerRestarted(t *testing.T) {
	need(t)
	for _, connections := range []int{1, 3} {
		s := newSource(t, nil, 4<<20)
		d := s.connect(connections, "nbd_setup=netlink", "nbd_timeout=1s")
		c, goOn := workload(t, "dirty", d.Path())
		s.kill()
		_, _ = io.WriteString(goOn, "\n") // msync meets a dead server
		time.Sleep(300 * time.Millisecond)
		start := time.Now()
		s.start()
		if err := c.Wait(); err != nil {
			t.Errorf("%d connections: msync: %v (%v)", connections, err, d.Err())
		}
		t.Logf("%d connections: msync returned %v after the restart, %d reconnected", connections, time.Since(start), d.Reconnects())
		if err := s.holds(); err != nil {
			t.Errorf("%d connections: %v", connections, err)
		}
		// By and by all connections are back, and reads work.
		for end := time.Now().Add(10 * time.Second); d.Reconnects() < int64(connections); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%d of %d connections are back: %v", d.Reconnects(), connections, d.Err())
			}
		}
		if err := direct(d.Path()); err != nil {
			t.Errorf("%d connections: read after the restart: %v", connections, err)
		}
		shut(t, d)
	}
}

// TestRequestsInFlight: the source is killed while writes are on their way to
// it. They are sent again when their timeout has passed, and none is lost.
func TestRequestsInFlight(t *testing.T) {
	need(t)
	for _, connections := range []int{1, 3} {
		s := newSource(t, nil, 1<<20)
		s.kill()
		s.start("NBDK_STALL=1")
		d := s.connect(connections, "nbd_setup=netlink", "nbd_timeout=1s")
		c, goOn := workload(t, "dirty", d.Path())
		_, _ = io.WriteString(goOn, "\n")
		inFlight(t, d)
		s.kill()
		s.start()
		start := time.Now()
		if err := c.Wait(); err != nil {
			t.Errorf("%d connections: msync: %v (%v)", connections, err, d.Err())
		}
		took := time.Since(start)
		t.Logf("%d connections: msync returned %v after the restart", connections, took)
		if took > 10*time.Second {
			t.Errorf("%d connections: msync took %v", connections, took)
		}
		if err := s.holds(); err != nil {
			t.Errorf("%d connections: %v", connections, err)
		}
		shut(t, d)
	}
}

// inFlight waits until the device has a write under way.
func inFlight(t *testing.T, d *Device) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		b, _ := os.ReadFile(d.sysfs("inflight"))
		if f := strings.Fields(string(b)); len(f) == 2 && f[1] != "0" {
			return
		}
		if time.Now().After(end) {
			t.Fatal("no write is in flight")
		}
	}
}

// direct reads the device past the page cache, which this process may do: it
// does not serve it.
func direct(path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	const n = 1 << 20
	p, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	defer unix.Munmap(p)
	if _, err := io.ReadFull(f, p); err != nil {
		return err
	}
	if !bytes.Equal(p, pattern(n)) {
		return region.ErrMismatch
	}
	return nil
}

// TestServerRestartedOften: it is killed again and again under a reader.
func TestServerRestartedOften(t *testing.T) {
	need(t)
	s := newSource(t, nil, 1<<20)
	if err := os.WriteFile(s.path, pattern(1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	d := s.connect(2, "nbd_setup=netlink", "nbd_timeout=1s")
	defer shut(t, d)
	stop := make(chan struct{})
	read := make(chan error, 1)
	go func() {
		n := 0
		for ; ; n++ {
			if err := direct(d.Path()); err != nil {
				read <- fmt.Errorf("read %d: %w", n, err)
				return
			}
			select {
			case <-stop:
				read <- nil
				return
			default:
			}
		}
	}()
	for n := range int64(4) {
		time.Sleep(200 * time.Millisecond) // of reads
		s.kill()
		s.start()
		for end := time.Now().Add(10 * time.Second); d.Reconnects() <= n && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
		}
	}
	close(stop)
	if err := <-read; err != nil {
		t.Errorf("%v (%v)", err, d.Err())
	}
	if n := d.Reconnects(); n < 4 {
		t.Errorf("%d reconnected", n)
	}
}

// TestServerStaysAway: a writer with dirty pages gets an error within the dead
// timeout, and the device says why.
func TestServerStaysAway(t *testing.T) {
	need(t)
	for _, setup := range []string{"netlink", "ioctl"} {
		s := newSource(t, nil, 4<<20)
		d := s.connect(2, "nbd_setup="+setup, "nbd_timeout=30s", "nbd_dead_timeout=1s")
		c, goOn := workload(t, "dirty", d.Path())
		s.kill()
		start := time.Now()
		_, _ = io.WriteString(goOn, "\n")
		if err := c.Wait(); err == nil {
			t.Errorf("%s: msync went well without a server", setup)
		}
		if took := time.Since(start); took > 6*time.Second {
			t.Errorf("%s: msync waited %v", setup, took)
		}
		if err := d.Err(); !errors.Is(err, region.ErrPeerGone) {
			t.Errorf("%s: the device says %v", setup, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		start = time.Now()
		_ = d.Close(ctx) // may say that bytes were lost
		cancel()
		if took := time.Since(start); took > 3*time.Second {
			t.Errorf("%s: Close took %v", setup, took)
		}
		if _, err := os.Stat(d.sysfs("pid")); err == nil {
			t.Errorf("%s: %s is attached after Close", setup, d.Path())
		}
	}
}

// TestAnotherServer: what answers after the loss is not the same export.
func TestAnotherServer(t *testing.T) {
	need(t)
	s := newSource(t, nil, 1<<20)
	d := s.connect(2, "nbd_setup=netlink", "nbd_dead_timeout=2s")
	s.kill()
	if err := os.Truncate(s.path, 2<<20); err != nil {
		t.Fatal(err)
	}
	s.start()
	for end := time.Now().Add(5 * time.Second); !errors.Is(d.Err(), region.ErrMismatch); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the device says %v", d.Err())
		}
	}
	if err := direct(d.Path()); err == nil {
		t.Error("an export of another size was taken")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	_ = d.Close(ctx)
}

// TestLinkDown: packets are lost for a while with dirty pages in the cache;
// shorter than nbd_timeout TCP mends it, longer the kernel connects again.
func TestLinkDown(t *testing.T) {
	need(t)
	for _, c := range []struct {
		down       time.Duration
		reconnects bool
	}{{500 * time.Millisecond, false}, {3 * time.Second, true}} {
		ns := newNetns(t)
		s := newSource(t, ns, 4<<20)
		d := s.connect(2, "nbd_setup=netlink", "nbd_timeout=1s")
		w, goOn := workload(t, "dirty", d.Path())
		ns.link(t, false)
		_, _ = io.WriteString(goOn, "\n")
		if c.reconnects { // else it could make the link be down for too long
			inFlight(t, d)
		}
		time.Sleep(c.down)
		ns.link(t, true)
		start := time.Now()
		if err := w.Wait(); err != nil {
			t.Errorf("down for %v: msync: %v (%v)", c.down, err, d.Err())
		}
		t.Logf("down for %v: msync returned %v after the link was back, %d reconnected", c.down, time.Since(start), d.Reconnects())
		if n := d.Reconnects(); (n > 0) != c.reconnects {
			t.Errorf("down for %v: %d reconnected", c.down, n)
		}
		if err := s.holds(); err != nil {
			t.Errorf("down for %v: %v", c.down, err)
		}
		shut(t, d)
	}
}
