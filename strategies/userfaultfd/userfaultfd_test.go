package userfaultfd

import (
	"context"
	"errors"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"memsync/strategies"
	"memsync/strategies/device/uffd"
	"memsync/strategies/param"
	"memsync/strategies/region"
)

var content = region.Content{Seed: 42}

type mounted struct {
	strategies.Mount
	t     testing.TB
	w     *child
	guard *os.File
	base  uintptr
}

// mountTo mounts s, starts a workload and attaches it.
func mountTo(t testing.TB, s region.Store, settings ...string) *mounted {
	t.Helper()
	m, err := mountStore(s, settings...)
	if err != nil {
		t.Fatal(err)
	}
	x := &mounted{Mount: m, t: t, w: start(t, "workload", nil)}
	t.Cleanup(func() { _ = m.Close(context.Background()) })
	x.guard, x.base = x.w.attachTo(m.Attachment(), m.(strategies.FaultServer).ServeFaults)
	return x
}

func (x *mounted) close() {
	x.t.Helper()
	for range 2 {
		if err := x.Close(context.Background()); err != nil {
			x.t.Fatal(err)
		}
	}
	if !errors.Is(x.Sync(context.Background()), region.ErrClosed) {
		x.t.Fatal("Sync after Close")
	}
}

// variants are the ways of serving that must all give the same bytes.
var variants = []string{
	"",
	"handlers=4",
	"fault_around=64KiB",
	"fault_around=2MiB handlers=2",
	"fault_around=12KiB",
	"chunk=16KiB fault_around=32KiB",
	"prefetch=sequential",
	"prefetch=sequential handlers=3 fault_around=64KiB prefetch_window=256KiB extent=64KiB copiers=3",
	"prefetch=sequential prefetch_window=64KiB extent=4KiB copiers=1",
	"prefetch=all",
	"prefetch=all copiers=1 extent=4KiB handlers=2",
	"memory=shared",
	"memory=shared resolve=continue",
	"memory=shared resolve=continue prefetch=sequential fault_around=64KiB handlers=4",
	"memory=shared resolve=continue prefetch=all",
	"memory=thp",
	"writes=private poll=0",
	"gc=load handlers=2", "gc=off",
}

// TestBytes: every variant, with and without a store that can be viewed, gives
// the right bytes at odd sizes to readers in order, at random and at once.
func TestBytes(t *testing.T) {
	for _, v := range variants {
		for _, view := range []bool{false, true} {
			name := v
			if view {
				name += " view"
			}
			t.Run(strings.TrimSpace(name), func(t *testing.T) {
				for i, size := range []int64{1, 4095, 4096, 65537, 3<<20 + 4097} {
					s := newStore(content, size).view(view)
					x := mountTo(t, s, strings.Fields(v)...)
					if i%2 == 0 {
						x.w.ask(request{Op: "program", Threads: 4, N: 50, Seed: uint64(i), Content: content})
					}
					x.w.ask(request{Op: "read", Len: size, N: 10000, Content: content})
					x.w.ask(request{Op: "program", Threads: 2, N: 20, Seed: 9, Content: content})
					waitFor(t, "the last fill to be counted", func() bool {
						return x.Stats().Extra["bytes_resident"] == region.RoundUp(size, 4096)
					})
					st := x.Stats()
					if moved := st.DemandBytes + st.LocalBytes + st.PrefetchBytes; moved < size {
						t.Errorf("size %d: only %d bytes were counted: %+v", size, moved, st)
					}
					// A trip page whose reader went elsewhere is the one thing that may be pulled again.
					if len(s.twice) > 0 && !strings.Contains(v, "sequential") {
						t.Errorf("size %d: pages at %v were pulled twice: %+v", size, s.twice, st)
					}
					x.w.ask(request{Op: "detach"})
					x.close()
					if !s.closed.Load() {
						t.Error("the store is still open")
					}
				}
			})
		}
	}
}

// TestHuge: reserved huge pages, or an error that says how to get them.
func TestHuge(t *testing.T) {
	const size = 5<<20 + 17
	s := newStore(content, size)
	if m, err := mountStore(s, "memory=huge"); err != nil {
		if !strings.Contains(err.Error(), "vm.nr_hugepages") {
			t.Fatalf("want to be told of vm.nr_hugepages: %v", err)
		}
		t.Skipf("needs three free huge pages: %v", err)
	} else if err := m.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	for _, v := range []string{"", "handlers=2", "prefetch=all", "prefetch=sequential prefetch_window=4MiB"} {
		x := mountTo(t, newStore(content, size), append(strings.Fields(v), "memory=huge")...)
		x.w.ask(request{Op: "program", Threads: 2, N: 30, Content: content})
		x.w.ask(request{Op: "read", Len: size, N: 4096, Content: content})
		x.w.ask(request{Op: "detach"})
		x.close()
	}
}

// TestFaultAround: one fault fills the aligned block, no more.
func TestFaultAround(t *testing.T) {
	s := newStore(content, 1<<20)
	x := mountTo(t, s, "fault_around=64KiB")
	x.w.ask(request{Op: "read", Off: 100000, Len: 1, N: 1, Content: content})
	x.w.ask(request{Op: "read", Off: 65536, Len: 65536, N: 4096, Content: content})
	if st := x.Stats(); st.Faults < 1 || st.DemandRequests != 1 || st.DemandBytes != 65536 {
		t.Errorf("%+v", st)
	}
	x.w.ask(request{Op: "read", Off: 131072, Len: 1, N: 1, Content: content})
	if st := x.Stats(); st.DemandRequests != 2 {
		t.Errorf("%+v", st)
	}
}

// still is a store whose reads allocate nothing.
type still struct{ *store }

func (s still) View(int64, int64) ([]byte, bool) { return nil, false }
func (s still) ReadAt(_ context.Context, p []byte, off int64) error {
	s.content.Fill(p, off)
	return nil
}

// TestNoAllocations: a fault allocates nothing (docs/deadlocks.md, case 2).
func TestNoAllocations(t *testing.T) {
	for name, s := range map[string]region.Store{"view": newStore(content, 16<<20).view(true), "copy": still{newStore(content, 16<<20)}} {
		x := mountTo(t, s, "fault_around=8KiB")
		read := func(off, n int64) {
			x.w.ask(request{Op: "read", Off: off, Len: n, N: 4096, Content: content})
		}
		read(0, 1<<20)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		read(1<<20, 15<<20)
		runtime.ReadMemStats(&after)
		if faults, n := x.Stats().Faults-128, after.Mallocs-before.Mallocs; faults < 1900 || n > uint64(faults)/4 {
			t.Errorf("%s: %d allocations in %d faults", name, n, faults)
		}
	}
}

// TestSequential: a prefetch hides the source's delay from a sequential reader,
// and leaves a random reader alone.
func TestSequential(t *testing.T) {
	const size, delay = 8 << 20, 2 * time.Millisecond
	s := newStore(content, size)
	s.delay = delay
	x := mountTo(t, s, "prefetch=sequential", "prefetch_window=1MiB", "extent=64KiB")
	x.w.ask(request{Op: "read", Len: size, N: 4096, Content: content})
	st := x.Stats()
	if st.Faults > 400 || st.PrefetchBytes < size*9/10 {
		t.Errorf("a sequential read of %d pages made %d faults, and %d bytes were prefetched: %+v", size/4096, st.Faults, st.PrefetchBytes, st)
	}
	if s.reads[region.Prefetch] == 0 || s.reads[region.Prefetch] != st.PrefetchRequests {
		t.Errorf("reads of the store by class: %v", s.reads)
	}

	s = newStore(content, size)
	x = mountTo(t, s, "prefetch=sequential")
	for _, page := range []int64{1000, 17, 500, 1800, 300, 900} {
		x.w.ask(request{Op: "read", Off: page * 4096, Len: 10, N: 10, Content: content})
	}
	if st := x.Stats(); st.PrefetchBytes != 0 {
		t.Errorf("a random reader caused a prefetch: %+v", st)
	}
}

// TestWrites: stores are refused or private, never lost in silence.
func TestWrites(t *testing.T) {
	x := mountTo(t, newStore(content, 10000))
	r, _, err := x.w.try(request{Op: "write", Off: 5, Len: 10}, nil)
	if err != nil || !strings.Contains(r.Err, region.ErrReadOnly.Error()) {
		t.Errorf("WriteAt: %v %q", err, r.Err)
	}
	if r, _, err = x.w.try(request{Op: "store", Off: 5000}, nil); err != nil || !r.EIO {
		t.Errorf("a store into the mapping: %v %q", err, r.Err)
	}
	x.w.ask(request{Op: "read", Len: 10000, N: 4096, Content: content})

	for _, memory := range []string{"anonymous", "shared"} {
		x = mountTo(t, newStore(content, 10000), "writes=private", "memory="+memory)
		x.w.ask(request{Op: "write", Off: 4096, Len: 8})
		x.w.ask(request{Op: "read", Len: 4096, N: 4096, Content: content})
		x.w.ask(request{Op: "read", Off: 4104, Len: 10000 - 4104, N: 1000, Content: content})
		if r, _, _ := x.w.try(request{Op: "read", Off: 4096, Len: 8, N: 8, Content: content}, nil); !strings.Contains(r.Err, "never filled") {
			t.Errorf("memory=%s: the private store is not seen: %q", memory, r.Err)
		}
	}
}

// TestDiscard: what the workload gives back is pulled again.
func TestDiscard(t *testing.T) {
	for _, v := range []string{"fault_around=64KiB", "prefetch=sequential", "prefetch=all"} {
		s := newStore(content, 1<<20)
		x := mountTo(t, s, v)
		for range 3 {
			x.w.ask(request{Op: "read", Len: 1 << 20, N: 8192, Content: content})
			x.w.ask(request{Op: "discard", Off: 8192, Len: 512 << 10})
		}
		x.w.ask(request{Op: "program", Threads: 4, N: 100, Content: content})
	}
}

// TestKernelFaults: a system call that touches the region waits as user code does.
func TestKernelFaults(t *testing.T) {
	if err := uffd.ProbeKernelFaults(); err != nil {
		t.Skipf("needs the right to handle faults of the kernel: %v", err)
	}
	x := mountTo(t, newStore(content, 1<<20))
	x.w.ask(request{Op: "syscall", Off: 1000, Len: 50000})
}

// TestFork: a forked child must not see zeroes (docs/deadlocks.md, case 4).
func TestFork(t *testing.T) {
	x := mountTo(t, newStore(content, 1<<20))
	x.w.ask(request{Op: "fork", Off: 4096})
}

// TestStoreError: a failed read becomes an error of the workload's access, and
// discarding the page tries again.
func TestStoreError(t *testing.T) {
	for _, v := range []string{"", "memory=shared", "memory=shared resolve=continue", "fault_around=64KiB", "prefetch=sequential", "prefetch=all extent=64KiB"} {
		t.Run(v, func(t *testing.T) {
			s := newStore(content, 1<<20)
			s.failAt.Store(300 << 10)
			x := mountTo(t, s, strings.Fields(v)...)
			r, _, err := x.w.try(request{Op: "read", Len: 1 << 20, N: 4096, Content: content}, nil)
			if err != nil || !r.EIO {
				t.Fatalf("want EIO, got %v %q", err, r.Err)
			}
			if r, _, err = x.w.try(request{Op: "syscall", Off: 300 << 10, Len: 10}, nil); err != nil || !r.EIO {
				t.Errorf("a system call: %v %q", err, r.Err)
			}
			s.failAt.Store(-1)
			x.w.ask(request{Op: "discard", Len: 1 << 20})
			x.w.ask(request{Op: "read", Len: 1 << 20, N: 4096, Content: content})
			x.w.ask(request{Op: "detach"})
			if err := x.Close(context.Background()); !errors.Is(err, errInjected) {
				t.Errorf("Close hides the store's error: %v", err)
			}
		})
	}
}

// TestDeadline: a source that does not answer becomes an error in time.
func TestDeadline(t *testing.T) {
	for _, v := range []string{"", "handlers=3", "prefetch=sequential", "prefetch=all"} {
		s := newStore(content, 1<<20)
		s.stallAt.Store(64 << 10)
		x := mountTo(t, s, append(strings.Fields(v), "deadline=100ms")...)
		begin := time.Now()
		r, _, err := x.w.try(request{Op: "read", Len: 1 << 20, N: 4096, Content: content}, nil)
		if took := time.Since(begin); err != nil || !r.EIO || took < 100*time.Millisecond || took > 5*time.Second {
			t.Errorf("%s: after %v: %v %q", v, took, err, r.Err)
		}
		x.w.ask(request{Op: "read", Off: 512 << 10, Len: 512 << 10, N: 4096, Content: content})
		s.stallAt.Store(-1)
		if err := x.Close(context.Background()); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: Close: %v", v, err)
		}
	}
}

// TestCloseWakes: a workload that waits when the mount is closed gets an error, at once.
func TestCloseWakes(t *testing.T) {
	for _, v := range []string{"", "handlers=4", "prefetch=sequential", "prefetch=all"} {
		s := newStore(content, 1<<20)
		s.stallAt.Store(64 << 10)
		x := mountTo(t, s, strings.Fields(v)...)
		answer := make(chan string, 1)
		go func() {
			r, _, err := x.w.try(request{Op: "read", Len: 1 << 20, N: 4096, Content: content}, nil)
			if err == nil && !r.EIO {
				err = errors.New("no error: " + r.Err)
			}
			if err != nil {
				answer <- err.Error()
			}
			close(answer)
		}()
		waitFor(t, "the stalled fault", func() bool { return s.stalled.Load() > 0 })
		x.close()
		if bad := <-answer; bad != "" {
			t.Errorf("%s: %s", v, bad)
		}
		if r, _, err := x.w.try(request{Op: "read", Off: 1<<20 - 10, Len: 1, N: 1, Content: content}, nil); v != "prefetch=all" && (err != nil || !r.EIO) {
			t.Errorf("%s: after Close a page that was never pulled gave %v %q", v, err, r.Err)
		}
	}
}

func waitFor(t testing.TB, what string, f func() bool) {
	t.Helper()
	end := time.Now().Add(10 * time.Second)
	for !f() {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// TestWorkloadKilled: Close ends quietly, with a read of the store under way or none.
func TestWorkloadKilled(t *testing.T) {
	for _, stall := range []int64{-1, 64 << 10} {
		s := newStore(content, 16<<20)
		s.stallAt.Store(stall)
		x := mountTo(t, s, "handlers=2", "prefetch=sequential")
		answered := make(chan struct{})
		go func() {
			defer close(answered)
			_, _, _ = x.w.try(request{Op: "read", Len: 16 << 20, N: 4096, Content: content}, nil)
		}()
		waitFor(t, "faults", func() bool { return x.Stats().Faults > 2 && (stall < 0 || s.stalled.Load() > 0) })
		x.w.kill()
		<-answered
		begin := time.Now()
		x.close()
		if took := time.Since(begin); took > 2*time.Second {
			t.Errorf("Close took %v", took)
		}
	}
}

// TestDaemonKilled: a SIGKILL of the daemon while the workload waits must give
// an error, neither a hang nor zeroes (docs/deadlocks.md, case 3).
func TestDaemonKilled(t *testing.T) {
	for _, v := range []string{"", "fault_around=64KiB handlers=2", "memory=shared resolve=continue", "prefetch=sequential", "memory=shared"} {
		t.Run(v, func(t *testing.T) {
			const size = 1 << 20
			d, w := start(t, "daemon", nil), start(t, "workload", nil)
			r, file, err := d.try(request{Op: "mount", Content: content, Len: size, StallAt: 512 << 10, Settings: strings.Fields(v)}, nil)
			if err != nil || r.Err != "" {
				t.Fatal(err, r.Err)
			}
			a := r.Attach
			a.File = file
			guard, base := w.attachTo(a, func(f *os.File, base uintptr) error {
				r, _, err := d.try(request{Op: "serve", Base: uint64(base)}, f)
				if r.Err != "" {
					err = errors.New(r.Err)
				}
				return errors.Join(err, f.Close())
			})
			w.ask(request{Op: "read", Len: 256 << 10, N: 4096, Content: content})
			answer := make(chan reply, 1)
			go func() {
				r, _, err := w.try(request{Op: "read", Off: 256 << 10, Len: 768 << 10, N: 4096, Content: content}, nil)
				if err != nil {
					r.Err = err.Error()
				}
				answer <- r
			}()
			waitFor(t, "the stalled fault", func() bool { return d.ask(request{Op: "stalled"}).Base > 0 })
			d.kill()
			<-d.ended
			select {
			case r := <-answer:
				t.Fatalf("the workload went on without guard: %+v", r)
			case <-time.After(50 * time.Millisecond): // it waits: its own descriptor keeps the kernel from zeroes
			}
			if err := uffd.Poison(guard, base, size, 4096); err != nil {
				t.Fatal(err)
			}
			if r := <-answer; !r.EIO {
				t.Errorf("want EIO, got %+v", r)
			}
			w.ask(request{Op: "read", Len: 256 << 10, N: 4096, Content: content}) // what is local stays
			if r, _, err := w.try(request{Op: "read", Off: size - 4096, Len: 1, N: 1, Content: content}, nil); !strings.Contains(v, "prefetch") && (err != nil || !r.EIO) {
				t.Errorf("a page that was never pulled: %v %+v", err, r)
			}
		})
	}
}

func TestMountRefuses(t *testing.T) {
	for _, v := range []string{"resolve=continue", "chunk=64KiB fault_around=96KiB", "chunk=64KiB fault_around=4KiB", "chunk=64KiB extent=96KiB", "memory=thp fault_around=64KiB", "chunk=5000", "memory=huge resolve=continue", "cache=64KiB"} {
		s := newStore(content, 1<<20)
		if m, err := mountStore(s, strings.Fields(v)...); err == nil {
			m.Close(context.Background())
			t.Errorf("%s was accepted", v)
		}
	}
	m, err := mountStore(newStore(content, 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(m.Close(context.Background()), m.Close(context.Background())); err != nil {
		t.Errorf("Close of a mount that nobody attached to: %v", err)
	}
	null, _ := os.Open(os.DevNull)
	if err := m.(strategies.FaultServer).ServeFaults(null, 0); !errors.Is(err, region.ErrClosed) {
		t.Errorf("ServeFaults after Close: %v", err)
	}
}

// TestDefaults: what a cell leaves open, and what it cannot ask for.
func TestDefaults(t *testing.T) {
	for _, c := range []struct {
		settings string
		chunk    int64
		asked    int // pull workers; -1 is the default
		inMemory bool
		pulls    int
		want     string // "" is an error
	}{
		{"", 4096, -1, false, 0, "fault_around=4KiB extent=256KiB copiers=0"},
		{"", 4096, 7, false, 0, "fault_around=4KiB extent=256KiB copiers=0"},
		{"", 1 << 20, -1, false, 0, "fault_around=1MiB extent=1MiB copiers=0"},
		{"fault_around=64KiB", 4096, -1, true, 0, "fault_around=64KiB extent=2MiB copiers=0"},
		{"prefetch=all", 4096, -1, false, 16, "fault_around=4KiB extent=256KiB copiers=16"},
		{"prefetch=sequential", 4096, -1, true, 2, "fault_around=4KiB extent=2MiB copiers=2"},
		{"prefetch=all", 4096, 0, false, 0, "fault_around=4KiB extent=256KiB copiers=0"},
		{"prefetch=all", 4096, 5, true, 5, "fault_around=4KiB extent=2MiB copiers=5"},
		{"prefetch=all copiers=3 extent=64KiB", 4096, 0, false, 3, "fault_around=4KiB extent=64KiB copiers=3"},
		{"memory=huge prefetch=all", 4096, 1, false, 1, "fault_around=2MiB extent=2MiB copiers=1"},
		{"memory=thp", 4096, -1, false, 0, "fault_around=2MiB extent=256KiB copiers=0"},
		{"fault_around=4KiB", 65536, -1, false, 0, ""},
		{"fault_around=6KiB", 4096, -1, false, 0, ""},
		{"extent=4KiB", 65536, -1, false, 0, ""},
		{"memory=thp fault_around=64KiB", 4096, -1, false, 0, ""},
		{"memory=huge extent=64KiB", 4096, -1, false, 0, ""},
	} {
		p, err := param.New(Strategy{}.Info().Params, strings.Fields(c.settings))
		if err != nil {
			t.Fatal(err)
		}
		pulls, got, err := Strategy{}.Defaults(strategies.Options{Chunk: c.chunk, PullWorkers: c.asked, Params: p}, c.inMemory)
		if c.want == "" {
			if !errors.Is(err, region.ErrOutOfRange) {
				t.Errorf("%+v: %v", c, err)
			}
			continue
		}
		if err != nil || pulls != c.pulls || strings.Join(got, " ") != c.want {
			t.Errorf("%+v: %d, %q, %v", c, pulls, got, err)
		}
	}
}

// TestNoPullWorkers: without workers, nothing is pulled ahead.
func TestNoPullWorkers(t *testing.T) {
	for _, prefetch := range []string{"all", "sequential"} {
		for workers, want := range map[int]bool{0: false, 2: true} {
			p, err := param.New(Strategy{}.Info().Params, []string{"prefetch=" + prefetch})
			if err != nil {
				t.Fatal(err)
			}
			const size = 8 << 20
			m, err := Strategy{}.Mount(context.Background(), remote{newStore(content, size)}, strategies.Options{Device: "uffd", PullWorkers: workers, Params: p})
			if err != nil {
				t.Fatal(err)
			}
			x := &mounted{Mount: m, t: t, w: start(t, "workload", nil)}
			x.guard, x.base = x.w.attachTo(m.Attachment(), m.(strategies.FaultServer).ServeFaults)
			x.w.ask(request{Op: "read", Len: size, N: 4096, Content: content})
			if n := m.Stats().PrefetchRequests; n > 0 != want {
				t.Errorf("prefetch=%s, %d workers: %d requests ahead", prefetch, workers, n)
			}
			x.w.ask(request{Op: "detach"})
			x.close()
		}
	}
}
