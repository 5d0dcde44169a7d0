package fuse

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

var content = region.Content{Seed: 42}

func TestProbe(t *testing.T) {
	if err := Probe(); err != nil {
		t.Fatal(err)
	}
}

func TestSizes(t *testing.T) {
	for _, size := range []int64{1, 511, 4095, 4096, 4097, 65536, 131073, 1<<20 - 1, 3<<20 + 5} {
		for _, viewer := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d/viewer=%v", size, viewer), func(t *testing.T) {
				m := newMem(size, content)
				var s region.Store = m
				if viewer {
					s = view{m}
				}
				d := open(t, s)
				w := startWorkload(t)
				w.must(op{Do: "open", Path: d.Path(), Flags: unix.O_RDWR})
				if got := string(w.must(op{Do: "stat"})); got != fmt.Sprint(size) {
					t.Errorf("size %s, want %d", got, size)
				}
				w.must(op{Do: "map", N: int(size), Flags: unix.O_RDWR})
				if err := content.Check(w.must(op{Do: "load", N: int(size)}), 0); err != nil {
					t.Error(err)
				}
				// Behind the end the last page is zero, and read ends.
				if got := w.must(op{Do: "pread", Off: size - 1, N: 100}); len(got) != 1 {
					t.Errorf("read %d bytes at the end, want 1", len(got))
				}
				// The last byte reaches the store by msync.
				w.must(op{Do: "store", Off: size - 1, Data: []byte{0xA5}})
				w.must(op{Do: "msync"})
				if b := m.snapshot(); b[size-1] != 0xA5 || content.Check(b[:size-1], 0) != nil {
					t.Error("msync did not bring the last byte to the store, or changed another")
				}
				if d.Stats().Flushes == 0 || d.Err() != nil {
					t.Errorf("flushes %d, err %v", d.Stats().Flushes, d.Err())
				}
				w.must(op{Do: "close"})
				w.must(op{Do: "unmap"})
			})
		}
	}
}

func TestRandomPrograms(t *testing.T) {
	for _, c := range []struct {
		name     string
		flags    int
		settings []string
	}{
		{"mapped and cached", 0, nil},
		{"writeback", 0, []string{"writeback=true"}},
		{"direct", unix.O_DIRECT, nil},
		{"small requests, three readers", 0, []string{"max_read=4KiB", "max_write=8KiB", "fuse_workers=3", "read_ahead=16KiB"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			const size = 1<<20 + 777
			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d", seed)
			rng := rand.New(rand.NewPCG(seed, 0))
			m := newMem(size, content)
			want := m.snapshot()
			d := open(t, m, c.settings...)
			w := startWorkload(t)
			w.must(op{Do: "open", Path: d.Path(), Flags: unix.O_RDWR | c.flags})
			mapped := c.flags == 0
			if mapped {
				w.must(op{Do: "map", N: size, Flags: unix.O_RDWR})
			}
			for i := range 400 {
				off := rng.Int64N(size)
				n := 1 + rng.Int64N(min(size-off, int64(1)<<rng.IntN(18)))
				if c.flags == unix.O_DIRECT && i%2 == 0 {
					off &^= 4095
					n = min(region.RoundUp(n, 4096), size-off)
				}
				data := make([]byte, n)
				for i := range data {
					data[i] = byte(rng.Uint32())
				}
				do := []string{"load", "store", "pread", "pwrite", "msync", "fsync", "drop"}[rng.IntN(7)]
				if !mapped && (do == "load" || do == "store" || do == "msync") {
					continue
				}
				switch do {
				case "load", "pread":
					if got := w.must(op{Do: do, Off: off, N: int(n)}); !bytes.Equal(got, want[off:off+n]) {
						t.Fatalf("step %d: %s off=%d n=%d: %d bytes differ: %v", i, do, off, n, len(got), content.Check(got, off))
					}
				case "store", "pwrite":
					w.must(op{Do: do, Off: off, Data: data})
					copy(want[off:], data)
				default:
					w.must(op{Do: do})
					if do != "drop" && !bytes.Equal(m.snapshot(), want) {
						t.Fatalf("step %d: after %s the store differs", i, do)
					}
				}
			}
			if mapped {
				w.must(op{Do: "unmap"})
			}
			w.must(op{Do: "close"})
			closeDevice(t, d) // writes back
			if !bytes.Equal(m.snapshot(), want) {
				t.Error("after Close the store differs")
			}
		})
	}
}

func TestRefusals(t *testing.T) {
	for _, writeback := range []string{"false", "true"} {
		m := newMem(5000, content)
		d := open(t, m, "writeback="+writeback)
		w := startWorkload(t)
		w.must(op{Do: "open", Path: d.Path(), Flags: unix.O_RDWR})
		for _, size := range []int64{0, 4999, 5001, 1 << 40} {
			if err := w.try(op{Do: "truncate", Off: size}).err(); err != syscall.EPERM {
				t.Errorf("truncate to %d: %v", size, err)
			}
		}
		if writeback == "false" { // else the kernel thinks it may grow the file
			if err := w.try(op{Do: "pwrite", Off: 4999, Data: []byte{1, 2}}).err(); err != syscall.EFBIG {
				t.Errorf("write past the end: %v", err)
			}
		}
		w.must(op{Do: "close"})
		if err := w.try(op{Do: "open", Path: d.Path(), Flags: unix.O_RDWR | unix.O_TRUNC}).err(); err != syscall.EPERM {
			t.Errorf("open with O_TRUNC: %v", err)
		}
		if content.Check(m.snapshot(), 0) != nil {
			t.Error("a refused request changed the store")
		}
	}
}

func TestReadOnly(t *testing.T) {
	m := newMem(5000, content)
	d, err := Open(context.Background(), m, Options{Dir: t.TempDir(), ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer closeDevice(t, d)
	w := startWorkload(t)
	defer w.stop()
	if err := w.try(op{Do: "open", Path: d.Path(), Flags: unix.O_RDWR}).err(); err != syscall.EROFS {
		t.Errorf("open for writing: %v", err)
	}
	w.must(op{Do: "open", Path: d.Path(), Flags: unix.O_RDONLY})
	w.must(op{Do: "map", N: 5000})
	if err := content.Check(w.must(op{Do: "load", N: 5000}), 0); err != nil {
		t.Error(err)
	}
}

// An error of the store is EIO, SIGBUS in a mapping, and passes.
func TestStoreErrors(t *testing.T) {
	const size = 4 << 20
	m := newMem(size, content)
	d := open(t, m)
	w := startWorkload(t)
	w.must(op{Do: "open", Path: d.Path(), Flags: unix.O_RDWR})
	w.must(op{Do: "map", N: size, Flags: unix.O_RDWR})
	boom := errors.New("boom")
	m.set(func() { m.fail = boom })
	if err := w.try(op{Do: "load", Off: 1 << 20, N: 1}).err(); err != errFault {
		t.Errorf("load: %v, want SIGBUS", err)
	}
	if err := w.try(op{Do: "pread", Off: 2 << 20, N: 1}).err(); err != syscall.EIO {
		t.Errorf("pread: %v, want EIO", err)
	}
	if err := w.try(op{Do: "pwrite", Off: 2 << 20, Data: make([]byte, 4096)}).err(); err != syscall.EIO {
		t.Errorf("pwrite: %v, want EIO", err)
	}
	if err := w.try(op{Do: "fsync"}).err(); err != syscall.EIO {
		t.Errorf("fsync: %v, want EIO", err)
	}
	if !errors.Is(d.Err(), boom) || d.Stats().Errors == 0 {
		t.Errorf("Err %v, %+v", d.Err(), d.Stats())
	}
	m.set(func() { m.fail = nil })
	if err := content.Check(w.must(op{Do: "load", N: size}), 0); err != nil {
		t.Error("after the error: ", err)
	}
	w.must(op{Do: "fsync"})
}

func TestRequestTimeout(t *testing.T) {
	m := newMem(1<<20, content)
	d := open(t, m, "request_timeout=50ms")
	w := startWorkload(t)
	w.must(op{Do: "open", Path: d.Path(), Flags: unix.O_RDONLY})
	m.set(func() { m.block = make(chan struct{}) })
	if err := w.try(op{Do: "pread", N: 1}).err(); err != syscall.EIO {
		t.Errorf("pread of a silent store: %v, want EIO", err)
	}
	if !errors.Is(d.Err(), context.DeadlineExceeded) {
		t.Error(d.Err())
	}
	m.set(func() { m.block = nil })
	w.must(op{Do: "pread", N: 1})
}

// A thread that is killed while it waits in an uninterruptible way (direct I/O) goes at once:
// the request's context ends. Other signals do not end it.
func TestKilledWorkload(t *testing.T) {
	m := newMem(1<<20, content)
	d := open(t, m)
	w := startWorkload(t)
	w.must(op{Do: "open", Path: d.Path(), Flags: unix.O_RDONLY | unix.O_DIRECT})
	block := make(chan struct{})
	m.set(func() { m.block = block })
	if err := w.in.Encode(op{Do: "pread", N: 4096}); err != nil {
		t.Fatal(err)
	}
	wait(t, m.started)
	for range 3 {
		_ = w.cmd.Process.Signal(syscall.SIGURG)
		time.Sleep(5 * time.Millisecond)
	}
	m.set(func() { close(block); m.block = nil })
	var r result
	if err := w.out.Decode(&r); err != nil || r.err() != nil {
		t.Fatalf("read with harmless signals: %v, %v", err, r.err())
	}
	m.set(func() { m.block = make(chan struct{}) })
	if err := w.in.Encode(op{Do: "pread", N: 4096}); err != nil {
		t.Fatal(err)
	}
	wait(t, m.started)
	_ = w.cmd.Process.Kill()
	gone := make(chan struct{})
	go func() { _ = w.cmd.Wait(); close(gone) }()
	select {
	case <-gone:
	case <-time.After(5 * time.Second):
		t.Fatal("a killed workload still waits for the store")
	}
	if n := d.Stats().Interrupts; n == 0 || n > 20 { // each is told once, not asked for in a loop
		t.Errorf("%d interrupts", n)
	}
}

// Close while a request hangs in the store ends with ctx.
func TestCloseWhileBusy(t *testing.T) {
	m := newMem(1<<20, content)
	d := open(t, m)
	w := startWorkload(t)
	w.must(op{Do: "open", Path: d.Path(), Flags: unix.O_RDWR})
	w.must(op{Do: "map", N: 1 << 20, Flags: unix.O_RDWR})
	m.set(func() { m.block = make(chan struct{}) })
	if err := w.in.Encode(op{Do: "load", N: 1}); err != nil {
		t.Fatal(err)
	}
	wait(t, m.started)
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	start := time.Now()
	err := d.Close(ctx)
	if !errors.Is(err, syscall.EBUSY) {
		t.Errorf("Close: %v, want EBUSY", err)
	}
	if took := time.Since(start); took > 3*time.Second {
		t.Errorf("Close took %v", took)
	}
	var r result
	if err := w.out.Decode(&r); err != nil || r.err() != errFault {
		t.Errorf("the waiting load: %v, %v, want SIGBUS", err, r.err())
	}
	if err2 := d.Close(context.Background()); err2 != err {
		t.Errorf("second Close: %v, want the first error", err2)
	}
	if _, err := os.Lstat(d.Path()); !os.IsNotExist(err) {
		t.Errorf("mount point is left over: %v", err)
	}
	d.closeErr = nil // the cleanup closes again
}

// Dirty pages at Close, with a store that never answers: Close ends.
func TestCloseWithHungStore(t *testing.T) {
	m := newMem(1<<20, content)
	d := open(t, m)
	w := startWorkload(t)
	w.must(op{Do: "open", Path: d.Path(), Flags: unix.O_RDWR})
	w.must(op{Do: "map", N: 1 << 20, Flags: unix.O_RDWR})
	w.must(op{Do: "store", Off: 10, Data: []byte("dirty")})
	m.set(func() { m.block = make(chan struct{}) })
	go func() { _, _ = w.cmd.Process.Wait() }()
	_ = w.cmd.Process.Kill()
	ctx, cancel := context.WithTimeout(context.Background(), 700*time.Millisecond)
	defer cancel()
	start := time.Now()
	err := d.Close(ctx)
	if took := time.Since(start); took > 4*time.Second {
		t.Errorf("Close took %v", took)
	}
	t.Logf("Close: %v; store: %v", err, d.Err())
	if d.Err() == nil {
		t.Error("the write that was lost is not reported")
	}
	d.closeErr = nil
}

// What governs the size of requests: max_read each one, read_ahead the window;
// MADV_RANDOM turns the window off.
func TestRequestSizes(t *testing.T) {
	const size = 16 << 20
	for _, c := range []struct {
		settings []string
		advice   int
		window   int64 // all that one touch pulls
		request  int64 // the largest request
	}{
		{[]string{"read_ahead=64KiB"}, unix.MADV_NORMAL, 64 << 10, 64 << 10},
		{[]string{"read_ahead=256KiB", "max_read=64KiB"}, unix.MADV_NORMAL, 256 << 10, 64 << 10},
		{[]string{"read_ahead=2MiB", "max_read=1MiB"}, unix.MADV_NORMAL, 2 << 20, 1 << 20},
		{[]string{"read_ahead=0"}, unix.MADV_NORMAL, 4 << 10, 4 << 10},
		{nil, unix.MADV_RANDOM, 4 << 10, 4 << 10},
	} {
		t.Run(fmt.Sprint(c.settings, c.advice), func(t *testing.T) {
			m := newMem(size, content)
			d := open(t, m, c.settings...)
			w := startWorkload(t)
			w.must(op{Do: "open", Path: d.Path(), Flags: unix.O_RDONLY})
			w.must(op{Do: "map", N: size})
			w.must(op{Do: "advise", Flags: c.advice})
			w.must(op{Do: "load", Off: 8<<20 + 4096, N: 8})
			w.must(op{Do: "close"})
			w.must(op{Do: "unmap"})
			closeDevice(t, d) // all requests have ended
			var sum, largest int64
			for _, e := range m.reads {
				sum, largest = sum+e.n, max(largest, e.n)
			}
			if sum != c.window || largest != c.request {
				t.Errorf("one touch read %d bytes in requests of up to %d, want %d and %d: %v", sum, largest, c.window, c.request, m.reads)
			}
		})
	}
}

func TestStoreAndInvalidate(t *testing.T) {
	const size = 1<<20 + 100
	m := newMem(size, content)
	d := open(t, m)
	w := startWorkload(t)
	w.must(op{Do: "open", Path: d.Path(), Flags: unix.O_RDWR})
	w.must(op{Do: "map", N: size, Flags: unix.O_RDWR})
	if err := d.Store(0, m.snapshot()); err != nil {
		t.Fatal(err)
	}
	if err := content.Check(w.must(op{Do: "load", N: size}), 0); err != nil {
		t.Error(err)
	}
	if n := d.Stats().ReadRequests; n != 0 {
		t.Errorf("%d requests for pages that were stored", n)
	}
	next := region.Content{Seed: 42, Generation: 1}
	m.set(func() { next.Fill(m.b, 0) })
	w.must(op{Do: "store", Off: 5 << 10, Data: []byte{1}}) // dirty: written back first
	if err := d.Invalidate(0, size); err != nil {
		t.Fatal(err)
	}
	got := w.must(op{Do: "load", N: size})
	if err := next.Check(got[8<<10:], 8<<10); err != nil {
		t.Error(err)
	}
	if got[5<<10] != 1 {
		t.Error("Invalidate lost a store")
	}
	if err := errors.Join(d.Invalidate(size, 1), d.Store(-1, got)); !errors.Is(err, region.ErrOutOfRange) {
		t.Error(err)
	}
}

// A daemon that is killed leaves its workload with an error, not waiting.
func TestKilledDaemon(t *testing.T) {
	c := command("hung")
	c.Env = append(c.Env, dirEnv+"="+t.TempDir())
	c.SysProcAttr.Pdeathsig = 0
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	path, err := lines.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	path = strings.TrimSpace(path)
	defer func() { _ = unix.Unmount(path, unix.MNT_DETACH) }()
	var procs []*proc
	// Far apart, so that none finds its page locked by another's read-ahead.
	for _, o := range []op{{Do: "load", N: 1}, {Do: "pread", Off: 512 << 10, N: 1}, {Do: "pwrite", Off: 900 << 10, Data: []byte{1}}} {
		w := startWorkload(t)
		w.must(op{Do: "open", Path: path, Flags: unix.O_RDWR})
		w.must(op{Do: "map", N: 1 << 20, Flags: unix.O_RDWR})
		if err := w.in.Encode(o); err != nil {
			t.Fatal(err)
		}
		if _, err := lines.ReadString('\n'); err != nil { // one line per request in the store
			t.Fatal(err)
		}
		procs = append(procs, w)
	}
	_ = c.Process.Kill()
	_ = c.Wait()
	for i, w := range procs {
		got := make(chan error, 1)
		go func() {
			var r result
			err := w.out.Decode(&r)
			if err == nil {
				err = r.err()
			}
			got <- err
		}()
		select {
		case err := <-got:
			t.Logf("workload %d: %v", i, err)
			if err == nil {
				t.Errorf("workload %d got an answer of nobody", i)
			}
		case <-time.After(5 * time.Second):
			t.Fatalf("workload %d still waits for a daemon that is dead", i)
		}
	}
}

// hung is a daemon whose store says when it is called and never answers.
func hung() error {
	m := newMem(1<<20, content)
	m.block = make(chan struct{})
	d, err := Open(context.Background(), m, Options{Dir: os.Getenv(dirEnv)})
	if err != nil {
		return err
	}
	fmt.Println(d.Path())
	go func() {
		for range m.started {
			fmt.Println("waits")
		}
	}()
	_, _ = io.Copy(io.Discard, os.Stdin)
	return d.Close(context.Background())
}

func FuzzDispatch(f *testing.F) {
	for op := uint32(1); op < 55; op++ {
		b := make([]byte, 200)
		le.PutUint32(b, 200)
		le.PutUint32(b[4:], op)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= 4 && len(b) < 1<<16 { // as the kernel does
			le.PutUint32(b, uint32(len(b)))
		}
		h, body, err := parseHeader(b)
		if err != nil {
			return
		}
		null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer null.Close()
		rc, err := null.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		m := newMem(5000, content)
		d := &Device{store: m, size: 5000, ctx: context.Background(), ready: make(chan error, 1), bufs: pool{keep: 4},
			jobs: make(chan func()), quit: make(chan struct{})}
		d.dispatch(&port{f: null, rc: rc}, h, body, append([]byte(nil), b...))
		close(d.quit)
		d.workers.Wait()
		for _, e := range m.reads {
			if e.n > 5000 {
				t.Fatal(e)
			}
		}
	})
}

func TestPendingKill(t *testing.T) {
	for s, want := range map[string]bool{
		"SigPnd:\t0000000000000100\nShdPnd:\t0000000000000000\n": true,
		"SigPnd:\t0000000000000000\nShdPnd:\t0000000000000100\n": true,
		"SigPnd:\t0000000000400000\nShdPnd:\t0000000000004000\n": false,
		"SigBlk:\t0000000000000100\n":                            false,
		"":                                                       false,
	} {
		if pendingKill(s) != want {
			t.Errorf("pendingKill(%q) = %v", s, !want)
		}
	}
}

func wait(t *testing.T, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(5 * time.Second):
		t.Fatal("no request reached the store")
	}
}
