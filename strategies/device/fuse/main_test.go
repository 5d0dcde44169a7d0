package fuse

import (
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"memsync/strategies/param"
	"memsync/strategies/region"
)

// roleEnv names the role that a copy of the test binary plays.
const roleEnv = "MEMSYNC_FUSE_TEST_ROLE"

func TestMain(m *testing.M) {
	switch role := os.Getenv(roleEnv); role {
	case "":
		// Mounts are made in a namespace of its own, which takes them along.
		os.Exit(rerun("tests"))
	case "tests":
		goleak.VerifyTestMain(m)
	default:
		if err := roles()[role](); err != nil {
			fmt.Fprintln(os.Stderr, role+":", err)
			os.Exit(1)
		}
	}
}

func roles() map[string]func() error {
	return map[string]func() error{"workload": workload, "daemon": daemon, "reader": reader, "hung": hung}
}

func command(role string, args ...string) *exec.Cmd {
	c := exec.Command("/proc/self/exe", args...)
	c.Env = append(os.Environ(), roleEnv+"="+role, "GORACE=atexit_sleep_ms=0")
	c.Stderr = os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return c
}

func rerun(role string) int {
	runtime.LockOSThread() // the parent of Pdeathsig is the thread
	c := command(role, os.Args[1:]...)
	c.Stdin, c.Stdout = os.Stdin, os.Stdout
	c.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS
	err := c.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return max(1, exit.ExitCode())
	} else if err != nil {
		fmt.Fprintln(os.Stderr, "run the tests in a mount namespace:", err)
		return 1
	}
	return 0
}

// op is one operation of the workload process, result what came of it.
type op struct {
	Do      string // open, map, load, store, pread, pwrite, msync, fsync, truncate, advise, close
	Path    string
	Flags   int
	Off     int64
	N       int
	Data    []byte
	Private bool
}

type result struct {
	Data  []byte
	Errno syscall.Errno
	Fault bool // SIGBUS
	Err   string
	Took  time.Duration
}

func (r result) err() error {
	switch {
	case r.Fault:
		return errFault
	case r.Errno != 0:
		return r.Errno
	case r.Err != "":
		return errors.New(r.Err)
	}
	return nil
}

var errFault = errors.New("SIGBUS")

// workload executes ops from stdin, one after another.
func workload() error {
	debug.SetPanicOnFault(true)
	in, out := gob.NewDecoder(os.Stdin), gob.NewEncoder(os.Stdout)
	w := worker{fd: -1}
	for {
		var o op
		if err := in.Decode(&o); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		start := time.Now()
		r := w.do(o)
		r.Took = time.Since(start)
		if err := out.Encode(r); err != nil {
			return err
		}
	}
}

type worker struct {
	fd int
	m  []byte
}

func (w *worker) do(o op) (r result) {
	fail := func(err error) {
		if err != nil && !errors.As(err, &r.Errno) {
			r.Err = err.Error()
		}
	}
	defer func() {
		if e := recover(); e != nil {
			if _, ok := e.(runtime.Error); ok && o.Do == "load" || o.Do == "store" {
				r.Fault = true
				return
			}
			panic(e)
		}
	}()
	var err error
	switch o.Do {
	case "open":
		w.fd, err = unix.Open(o.Path, o.Flags|unix.O_CLOEXEC, 0)
	case "map":
		prot := unix.PROT_READ
		if o.Flags == unix.O_RDWR {
			prot |= unix.PROT_WRITE
		}
		w.m, err = unix.Mmap(w.fd, 0, o.N, prot, unix.MAP_SHARED)
	case "advise":
		err = unix.Madvise(w.m, o.Flags)
	case "drop": // clean pages leave the cache
		err = unix.Fadvise(w.fd, 0, 0, unix.FADV_DONTNEED)
	case "load":
		r.Data = append([]byte(nil), w.m[o.Off:o.Off+int64(o.N)]...)
	case "store":
		copy(w.m[o.Off:], o.Data)
	case "msync":
		err = unix.Msync(w.m, unix.MS_SYNC)
	case "unmap":
		err = unix.Munmap(w.m)
		w.m = nil
	case "pread":
		// Aligned, for O_DIRECT.
		page := int64(4096)
		buf, merr := unix.Mmap(-1, 0, int(region.RoundUp(int64(o.N)+1, page)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
		if merr != nil {
			fail(merr)
			return r
		}
		var n int
		n, err = unix.Pread(w.fd, buf[:o.N], o.Off)
		if n > 0 {
			r.Data = append([]byte(nil), buf[:n]...)
		}
		_ = unix.Munmap(buf)
	case "pwrite":
		buf, merr := unix.Mmap(-1, 0, int(region.RoundUp(int64(len(o.Data))+1, 4096)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
		if merr != nil {
			fail(merr)
			return r
		}
		var n int
		n, err = unix.Pwrite(w.fd, buf[:copy(buf, o.Data)], o.Off)
		if err == nil && n != len(o.Data) {
			err = fmt.Errorf("short write: %d of %d", n, len(o.Data))
		}
		_ = unix.Munmap(buf)
	case "fsync":
		err = unix.Fsync(w.fd)
	case "truncate":
		err = unix.Ftruncate(w.fd, o.Off)
	case "stat":
		var st unix.Stat_t
		err = unix.Fstat(w.fd, &st)
		r.Data = fmt.Append(nil, st.Size)
	case "close":
		err = unix.Close(w.fd)
	default:
		err = fmt.Errorf("unknown op %q", o.Do)
	}
	fail(err)
	return r
}

// proc is a workload process.
type proc struct {
	t    testing.TB
	cmd  *exec.Cmd
	in   *gob.Encoder
	out  *gob.Decoder
	pipe io.Closer
	stop func()
}

func startWorkload(t testing.TB) *proc {
	t.Helper()
	c := command("workload")
	stdin, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.SysProcAttr.Pdeathsig = 0 // goroutines move between threads; the pipe's end stops it
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	p := &proc{t: t, cmd: c, in: gob.NewEncoder(stdin), out: gob.NewDecoder(stdout), pipe: stdin}
	p.stop = sync.OnceFunc(func() {
		stdin.Close()
		timer := time.AfterFunc(10*time.Second, func() { _ = c.Process.Kill() })
		_ = c.Wait()
		timer.Stop()
	})
	t.Cleanup(p.stop)
	return p
}

// try executes o in the workload process and returns its result.
func (p *proc) try(o op) result {
	p.t.Helper()
	var r result
	if err := p.in.Encode(o); err != nil {
		p.t.Fatal(err)
	}
	if err := p.out.Decode(&r); err != nil {
		p.t.Fatalf("workload died in %s: %v", o.Do, err)
	}
	return r
}

// must is try for what has to work.
func (p *proc) must(o op) []byte {
	p.t.Helper()
	r := p.try(o)
	if err := r.err(); err != nil {
		p.t.Fatalf("%s off=%d n=%d len=%d: %v", o.Do, o.Off, o.N, len(o.Data), err)
	}
	return r.Data
}

// mem is a store in memory whose calls can be delayed and failed.
type mem struct {
	mu      sync.Mutex
	b       []byte
	fail    error
	block   chan struct{} // calls wait until it is closed or ctx ends
	started chan struct{} // gets one value per blocked call
	flushes int
	reads   []extent
}

type extent struct{ off, n int64 }

func newMem(size int64, c region.Content) *mem {
	m := &mem{b: make([]byte, size), started: make(chan struct{}, 1024)}
	c.Fill(m.b, 0)
	return m
}

func (m *mem) Size() int64 { return int64(len(m.b)) }

func (m *mem) enter(ctx context.Context) error {
	m.mu.Lock()
	block, fail := m.block, m.fail
	m.mu.Unlock()
	if block != nil {
		m.started <- struct{}{}
		select {
		case <-block:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return fail
}

func (m *mem) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := region.CheckRange(off, int64(len(p)), m.Size()); err != nil {
		return err
	}
	if err := m.enter(ctx); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reads = append(m.reads, extent{off, int64(len(p))})
	copy(p, m.b[off:])
	return nil
}

func (m *mem) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := region.CheckRange(off, int64(len(p)), m.Size()); err != nil {
		return err
	}
	if err := m.enter(ctx); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	copy(m.b[off:], p)
	return nil
}

func (m *mem) Flush(ctx context.Context) error {
	if err := m.enter(ctx); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.flushes++
	return nil
}

func (m *mem) Close() error { return nil }

func (m *mem) set(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f()
}

func (m *mem) snapshot() []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]byte(nil), m.b...)
}

// view is a mem that answers reads without a copy.
type view struct{ *mem }

func (v view) View(off, n int64) ([]byte, bool) { return v.b[off : off+n], true }

func params(t testing.TB, settings ...string) param.Values {
	t.Helper()
	p, err := param.New(Params(), settings)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func open(t testing.TB, s region.Store, settings ...string) *Device {
	t.Helper()
	d, err := Open(context.Background(), s, Options{Dir: t.TempDir(), Params: params(t, settings...)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeDevice(t, d) })
	return d
}

func closeDevice(t testing.TB, d *Device) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := d.Close(ctx); err != nil {
		t.Errorf("close: %v", err)
	}
}
