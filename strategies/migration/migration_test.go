package migration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"memsync/strategies"
	"memsync/strategies/chunk"
	"memsync/strategies/device"
	"memsync/strategies/migration/handover"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/replay"
	"memsync/strategies/transport"
	"memsync/strategies/transport/nbd"
)

// verify runs the tests of this process and looks for goroutines that are left.
func verify(m *testing.M) { goleak.VerifyTestMain(m) }

const testSize = 1<<20 + 4096 + 100

// writer is an application in this process, which writes a region that is plain
// memory: it marks what it writes, as a tracker would see it.
type writer struct {
	mem   region.Store
	bytes []byte
	mu    sync.Mutex
	dirty *chunk.Set
	run   atomic.Bool // it may write
	in    sync.RWMutex
	wrote atomic.Int64
	r     *rand.Rand

	suspends, resumes atomic.Int64
	refuse            atomic.Bool
	hang              atomic.Bool
	quiet             chan struct{} // closed: it is at a quiet point
	limit, limits     atomic.Int64  // what it is throttled to, and how often that was said
}

func newWriter(t *testing.T, size int64, s uint64) *writer {
	m, err := chunk.NewMemory(size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	w := &writer{mem: m, bytes: make([]byte, size), dirty: chunk.NewSet(region.Chunks(size, 4096)), r: rand.New(rand.NewPCG(s, 1)), quiet: make(chan struct{})}
	region.Content{Seed: s}.Fill(w.bytes, 0)
	if err := m.WriteAt(t.Context(), w.bytes, 0); err != nil {
		t.Fatal(err)
	}
	w.run.Store(true)
	return w
}

// Collect implements tracker.
func (w *writer) Collect(_ context.Context, found func(off, n int64)) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for {
		lo, hi, ok := w.dirty.Take(0, w.dirty.Len())
		if !ok {
			return nil
		}
		found(lo*4096, (hi-lo)*4096)
	}
}

// store writes somewhere, unless it was suspended.
func (w *writer) store() {
	w.in.RLock()
	defer w.in.RUnlock()
	if !w.run.Load() {
		return
	}
	n := w.wrote.Add(1)
	off := w.r.Int64N(int64(len(w.bytes)) - 8)
	p := w.bytes[off : off+8]
	for i := range p {
		p[i] = byte(n) + byte(i)
	}
	_ = w.mem.WriteAt(context.Background(), p, off)
	w.mu.Lock()
	w.dirty.Mark(off/4096, (off+7)/4096+1)
	w.mu.Unlock()
}

func (w *writer) hooks() strategies.Hooks {
	return strategies.Hooks{
		Suspend: func(ctx context.Context) error {
			w.suspends.Add(1)
			if w.hang.Load() {
				<-ctx.Done()
				return ctx.Err()
			}
			if w.refuse.Load() {
				return errors.New("not now")
			}
			w.in.Lock()
			w.run.Store(false)
			w.in.Unlock()
			return nil
		},
		Resume: func(context.Context) error { w.resumes.Add(1); w.run.Store(true); return nil },
		Quiet: func(ctx context.Context, within time.Duration) (bool, error) {
			select {
			case <-w.quiet:
				return true, nil
			case <-time.After(within):
				return false, nil
			case <-ctx.Done():
				return false, ctx.Err()
			}
		},
		Throttle: func(_ context.Context, rate int64) error { w.limit.Store(rate); w.limits.Add(1); return nil },
	}
}

// start writes in the background until stop is called.
func (w *writer) start(every time.Duration) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			w.store()
			select {
			case <-ctx.Done():
			case <-time.After(every):
			}
		}
	})
	return func() { cancel(); wg.Wait() }
}

// link is a path between a seeder and a leecher, over NBD on a Unix socket pair, which can be cut.
type link struct {
	t     *testing.T
	s     *Seeder
	ctx   context.Context
	wg    sync.WaitGroup
	mu    sync.Mutex
	conns []net.Conn
	cut   bool
	tr    nbd.Transport
}

func newLink(t *testing.T, s *Seeder) *link {
	ctx, cancel := context.WithCancel(context.Background())
	k := &link{t: t, s: s, ctx: ctx}
	t.Cleanup(func() { cancel(); k.break_(); k.wg.Wait() })
	return k
}

func (k *link) dial(context.Context) (net.Conn, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.cut {
		return nil, fmt.Errorf("the link is cut: %w", region.ErrPeerGone)
	}
	here, there := net.Pipe()
	k.conns = append(k.conns, here)
	k.wg.Go(func() { _ = k.tr.Serve(k.ctx, there, k.s.Exports(regionName)) })
	return here, nil
}

// break_ ends all connections.
func (k *link) break_() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, c := range k.conns {
		c.Close()
	}
	k.conns = nil
}

func (k *link) set(cut bool) {
	k.mu.Lock()
	k.cut = cut
	k.mu.Unlock()
	if cut {
		k.break_()
	}
}

func (k *link) region(ctx context.Context) (region.Store, error) {
	return k.tr.Open(ctx, transport.DialFunc(k.dial), transport.Options{Name: regionName, Connections: 2, ReadOnly: true})
}

func (k *link) control(ctx context.Context) (region.Store, error) {
	return k.tr.Open(ctx, transport.DialFunc(k.dial), transport.Options{Name: regionName + controlSuffix, Connections: 1})
}

func newSeeder(t *testing.T, w *writer, o SeederOptions) *Seeder {
	s, err := NewSeeder(w.mem, w, o)
	if err != nil {
		t.Fatal(err)
	}
	s.Control(w.hooks())
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// testOptions are a leecher's whose cache is plain memory behind a device of FUSE that
// nobody opens, so that all can be read in this process.
func testOptions(t *testing.T, mode Mode) leecherOptions {
	v, err := param.New(device.Params("fuse"), nil)
	if err != nil {
		t.Fatal(err)
	}
	return leecherOptions{mode: mode, device: "fuse", chunk: 4096, extent: 64 << 10, workers: 4, around: 4096, interval: 2 * time.Millisecond,
		policy: policy{kind: policyPercent, share: 1}, patience: 5 * time.Second, dev: device.Options{Dir: t.TempDir(), Params: v}}
}

func newLeecher(t *testing.T, k *link, o leecherOptions) *leecher {
	t.Helper()
	l, err := openLeecher(t.Context(), k.region, k.control, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return l
}

func check(t *testing.T, l *leecher, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	if err := (gated{l}).ReadAt(t.Context(), got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		i := 0
		for got[i] == want[i] {
			i++
		}
		t.Fatalf("byte %d is %#x, want %#x", i, got[i], want[i])
	}
}

// TestModes migrates a region that is being written, in every mode, and compares
// what arrives with what the application had stored.
func TestModes(t *testing.T) {
	s := replay.Seed(t)
	for _, mode := range Modes() {
		t.Run(mode, func(t *testing.T) {
			w := newWriter(t, testSize, s)
			src := newSeeder(t, w, SeederOptions{})
			k := newLink(t, src)
			stop := w.start(20 * time.Microsecond)
			defer stop()
			l := newLeecher(t, k, testOptions(t, Mode(mode)))
			early, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			if err := (gated{l}).ReadAt(early, make([]byte, 1), 0); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("an access before the hand-over: %v, want that it waits", err)
			}
			cancel()
			h, err := l.Finalize(t.Context(), strategies.Hooks{})
			if err != nil {
				t.Fatal(err)
			}
			if src.Owns() || w.run.Load() || w.suspends.Load() != 1 {
				t.Errorf("after the hand-over: the source owns %t, its application runs %t, suspended %d times", src.Owns(), w.run.Load(), w.suspends.Load())
			}
			check(t, l, w.bytes)
			h, err = l.Complete(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			select {
			case <-src.Done():
			case <-time.After(5 * time.Second):
				t.Error("the source was not told that it may exit")
			}
			if h.Epoch == 0 || h.Owned == 0 || h.Scanned < h.Flushed || h.Flushed < h.Stopped || len(h.Local) == 0 {
				t.Errorf("handover %+v", h)
			}
			if st := l.Stats(); mode == string(PostCopy) && st.PrefetchBytes+st.DemandBytes > testSize*11/10 {
				t.Errorf("post-copy moved %d bytes of %d", st.PrefetchBytes+st.DemandBytes, testSize)
			}
			t.Logf("%d writes, %d rounds, %d bytes dirtied after they were pulled, %d needed at the end", w.wrote.Load(), h.Rounds, h.DirtiedBytes, h.NeededBytes)
		})
	}
}

// TestBadInput: what must be refused, and how.
func TestBadInput(t *testing.T) {
	w := newWriter(t, testSize, 1)
	src := newSeeder(t, w, SeederOptions{})
	k := newLink(t, src)
	raw := func(r request) reply {
		t.Helper()
		s, err := k.control(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		out, err := ask(t.Context(), s, 1, r)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	of := func(v handover.Verb, from handover.ID, epoch uint64) request {
		return request{Request: handover.Request{Verb: v, From: from, Epoch: epoch}, Session: 1}
	}
	if out := raw(of(handover.Finalize, 9, 1)); out.Result != handover.Early || w.suspends.Load() != 0 {
		t.Errorf("Finalize before Track: %v", out.Result)
	}
	r := of(handover.Track, 9, 0)
	r.Size = testSize + 1
	if out := raw(r); out.Result != 0 || !strings.Contains(out.Text, strconv.Itoa(testSize)) {
		t.Errorf("another size: %v %q", out.Result, out.Text)
	}
	if out := raw(of(77, 9, 0)); out.Result != 0 || out.Text == "" {
		t.Errorf("an unknown request: %v %q", out.Result, out.Text)
	}
	if out := raw(of(handover.Track, 0, 0)); out.Text == "" {
		t.Error("a destination without a name is served")
	}
	if out := raw(of(handover.Commit, 9, 1)); out.Result != handover.Early {
		t.Errorf("Commit before all: %v", out.Result)
	}

	// The same destination twice, and a second one.
	l := newLeecher(t, k, testOptions(t, Hybrid))
	again := of(handover.Track, l.m.ID, 0)
	again.Session = l.session
	if out := raw(again); out.Result != handover.OK {
		t.Errorf("the same destination once more: %v", out.Result)
	}
	if _, err := openLeecher(t.Context(), k.region, k.control, testOptions(t, Hybrid)); !errors.Is(err, region.ErrNotPermitted) {
		t.Errorf("a second destination: %v, want ErrNotPermitted", err)
	}
	if out := raw(of(handover.Commit, l.m.ID, 1)); out.Result != handover.Early {
		t.Errorf("Commit before Finalize: %v", out.Result)
	}
	if out := raw(of(handover.Finalize, l.m.ID, 7)); out.Result != handover.Stale {
		t.Errorf("Finalize of an epoch that is not: %v", out.Result)
	}
	if !src.Owns() || w.suspends.Load() != 0 {
		t.Errorf("the application was suspended %d times", w.suspends.Load())
	}

	// The export is read-only.
	s, err := k.region(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.WriteAt(t.Context(), []byte{1}, 0); err == nil {
		t.Error("the region of the source can be written across the link")
	}
	// A source of something else.
	if _, err := openLeecher(t.Context(), k.region, k.region, testOptions(t, Hybrid)); !errors.Is(err, region.ErrNotSupported) {
		t.Errorf("a control that is none: %v", err)
	}
}

// TestRefuses: an application that does not stop, or takes too long, goes on, and the destination is told.
func TestRefuses(t *testing.T) {
	for _, how := range []string{"refuses", "hangs"} {
		t.Run(how, func(t *testing.T) {
			w := newWriter(t, testSize, 2)
			w.refuse.Store(how == "refuses")
			w.hang.Store(how == "hangs")
			src := newSeeder(t, w, SeederOptions{SuspendTimeout: 50 * time.Millisecond})
			l := newLeecher(t, newLink(t, src), testOptions(t, Hybrid))
			aborted := false
			_, err := l.Finalize(t.Context(), strategies.Hooks{Abort: func(context.Context) error { aborted = true; return nil }})
			if !errors.Is(err, region.ErrNotPermitted) || !aborted {
				t.Errorf("%v, aborted %t", err, aborted)
			}
			if !src.Owns() || !w.run.Load() {
				t.Errorf("the source owns %t, its application runs %t", src.Owns(), w.run.Load())
			}
		})
	}
}

// TestPrepareFails: then nothing is stopped.
func TestPrepareFails(t *testing.T) {
	w := newWriter(t, testSize, 3)
	src := newSeeder(t, w, SeederOptions{})
	l := newLeecher(t, newLink(t, src), testOptions(t, Hybrid))
	bad := errors.New("out of memory")
	if _, err := l.Finalize(t.Context(), strategies.Hooks{Prepare: func(context.Context) error { return bad }}); !errors.Is(err, bad) {
		t.Error(err)
	}
	if w.suspends.Load() != 0 || !src.Owns() {
		t.Error("the application was stopped for a destination that is not ready")
	}
	// The source is free for another one.
	o := newLeecher(t, newLink(t, src), testOptions(t, PostCopy))
	if _, err := o.Finalize(t.Context(), strategies.Hooks{}); err != nil {
		t.Fatal(err)
	}
	check(t, o, w.bytes)
}

// TestLostLink breaks all connections at random moments of a migration, for a short time, in every mode:
// it ends all the same, with the right bytes and one owner.
func TestLostLink(t *testing.T) {
	s := replay.Seed(t)
	for _, mode := range Modes() {
		t.Run(mode, func(t *testing.T) {
			for i := range 6 {
				r := rand.New(rand.NewPCG(s, uint64(i)))
				w := newWriter(t, testSize, s)
				src := newSeeder(t, w, SeederOptions{})
				k := newLink(t, src)
				stop := w.start(50 * time.Microsecond)
				l := newLeecher(t, k, testOptions(t, Mode(mode)))
				done := make(chan struct{})
				var wg sync.WaitGroup
				wg.Go(func() {
					for {
						select {
						case <-done:
							return
						case <-time.After(time.Duration(r.IntN(8000)) * time.Microsecond):
						}
						k.set(true)
						time.Sleep(time.Duration(r.IntN(3000)) * time.Microsecond)
						k.set(false)
						if r.IntN(3) == 0 {
							return
						}
					}
				})
				_, err := l.Finalize(t.Context(), strategies.Hooks{})
				if err == nil {
					_, err = l.Complete(t.Context())
				}
				close(done)
				wg.Wait()
				stop()
				if err != nil {
					t.Fatalf("migration %d: %v", i, err)
				}
				check(t, l, w.bytes)
				if w.suspends.Load() != 1 {
					t.Errorf("migration %d: suspended %d times", i, w.suspends.Load())
				}
			}
		})
	}
}

// TestCommitLost: a source that has suspended its application and is never asked to commit
// lets it go on; the destination, once it is back, takes over in a later epoch, and misses nothing.
func TestCommitLost(t *testing.T) {
	w := newWriter(t, testSize, 4)
	src := newSeeder(t, w, SeederOptions{CommitTimeout: time.Second})
	k := newLink(t, src)
	l := newLeecher(t, k, testOptions(t, PreCopy))
	if err := l.until(t.Context(), testSize); err != nil {
		t.Fatal(err)
	}
	w.store()
	if err := l.stop(t.Context()); err != nil { // Finalize is answered, and then nothing comes
		t.Fatal(err)
	}
	for until := time.Now().Add(5 * time.Second); !w.run.Load(); {
		if time.Now().After(until) {
			t.Fatal("the application never went on")
		}
		time.Sleep(time.Millisecond)
	}
	for range 50 {
		w.store()
	}
	h, err := l.Finalize(t.Context(), strategies.Hooks{})
	if err != nil {
		t.Fatal(err)
	}
	if h.Epoch < 2 || w.suspends.Load() != 2 {
		t.Errorf("epoch %d, suspended %d times", h.Epoch, w.suspends.Load())
	}
	check(t, l, w.bytes)
}

// TestSilence: a destination that is not heard of is forgotten.
func TestSilence(t *testing.T) {
	w := newWriter(t, testSize, 5)
	src := newSeeder(t, w, SeederOptions{Silence: 40 * time.Millisecond})
	k := newLink(t, src)
	s, err := k.control(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if out, err := ask(t.Context(), s, 1, request{Request: handover.Request{Verb: handover.Track, From: 5}, Session: 1}); err != nil || out.Result != handover.OK {
		t.Fatal(out, err)
	}
	for until := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		l, err := openLeecher(t.Context(), k.region, k.control, testOptions(t, Hybrid))
		if err == nil {
			if err := l.Close(t.Context()); err != nil {
				t.Fatal(err)
			}
			return
		}
		if !errors.Is(err, region.ErrNotPermitted) || time.Now().After(until) {
			t.Fatal(err)
		}
	}
}

// TestAdaptive: a downtime that can be met is, and one that cannot is said so.
func TestAdaptive(t *testing.T) {
	w := newWriter(t, testSize, 6)
	src := newSeeder(t, w, SeederOptions{})
	stop := w.start(10 * time.Microsecond)
	defer stop()
	o := testOptions(t, PreCopy)
	o.policy = policy{kind: policyAdaptive, maxDowntime: time.Nanosecond, unmet: unmetAbort}
	l := newLeecher(t, newLink(t, src), o)
	h, err := l.Finalize(t.Context(), strategies.Hooks{})
	if !errors.Is(err, region.ErrNotPermitted) || h.Unmet == "" || w.suspends.Load() != 0 {
		t.Errorf("1 ns: %v, %q, suspended %d times", err, h.Unmet, w.suspends.Load())
	}
	o.policy = policy{kind: policyAdaptive, maxDowntime: 10 * time.Second}
	o.dev.Dir = t.TempDir()
	l = newLeecher(t, newLink(t, src), o)
	h, err = l.Finalize(t.Context(), strategies.Hooks{})
	if err != nil || h.Unmet != "" || h.Promised == 0 {
		t.Errorf("10 s: %v, %+v", err, h)
	}
	check(t, l, w.bytes)
}

// TestQuiet: the application is stopped at the point that it announces, not before; where
// none comes it is stopped all the same, or not, as asked for.
func TestQuiet(t *testing.T) {
	w := newWriter(t, testSize, 7)
	src := newSeeder(t, w, SeederOptions{Silence: time.Second})
	stop := w.start(time.Millisecond)
	defer stop()
	o := testOptions(t, Hybrid)
	o.policy = policy{kind: policyQuiet, share: 1, quietWait: 50 * time.Millisecond, unmet: unmetAbort}
	l := newLeecher(t, newLink(t, src), o)
	h, err := l.Finalize(t.Context(), strategies.Hooks{})
	if !errors.Is(err, region.ErrNotPermitted) || h.Unmet == "" || w.suspends.Load() != 0 {
		t.Errorf("none is announced: %v, %q, suspended %d times", err, h.Unmet, w.suspends.Load())
	}
	o.policy = policy{kind: policyQuiet, share: 1, quietWait: time.Minute}
	o.dev.Dir = t.TempDir()
	l = newLeecher(t, newLink(t, src), o)
	done := make(chan error, 1)
	go func() {
		h, err = l.Finalize(t.Context(), strategies.Hooks{})
		done <- err
	}()
	select { // longer than a destination may be silent
	case err := <-done:
		t.Fatalf("finalised before a quiet point: %v", err)
	case <-time.After(1500 * time.Millisecond):
	}
	if w.suspends.Load() != 0 {
		t.Error("suspended before a quiet point")
	}
	close(w.quiet)
	if err := <-done; err != nil || h.Unmet != "" || h.Postponed < int64(time.Second) {
		t.Fatalf("%v, %q, postponed by %v", err, h.Unmet, time.Duration(h.Postponed))
	}
	check(t, l, w.bytes)
}

// TestCycle: the application is stopped between two bursts of its stores.
func TestCycle(t *testing.T) {
	w := newWriter(t, testSize, 8)
	src := newSeeder(t, w, SeederOptions{})
	var busy atomic.Bool
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() {
		for begun := time.Now(); ctx.Err() == nil; time.Sleep(200 * time.Microsecond) {
			b := time.Since(begun)%(500*time.Millisecond) < 200*time.Millisecond
			if busy.Store(b); b {
				w.store()
			}
		}
	})
	o := testOptions(t, Hybrid)
	o.interval = 20 * time.Millisecond
	o.policy = policy{kind: policyCycle, share: 1, quietWait: time.Minute}
	l := newLeecher(t, newLink(t, src), o)
	h, err := l.Finalize(t.Context(), strategies.Hooks{})
	if err != nil || h.Unmet != "" || h.Postponed == 0 {
		t.Fatalf("%v, %q, postponed by %v", err, h.Unmet, time.Duration(h.Postponed))
	}
	t.Logf("postponed by %v; busy then: %t", time.Duration(h.Postponed), busy.Load())
	check(t, l, w.bytes)
}

// TestThrottle: an application that writes too fast is slowed down until the downtime that is asked
// for can be had, or as far as it goes.
func TestThrottle(t *testing.T) {
	w := newWriter(t, testSize, 9)
	src := newSeeder(t, w, SeederOptions{})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() {
		for ctx.Err() == nil {
			w.store()
			if w.limit.Load() > 0 { // a slow application
				time.Sleep(time.Millisecond)
			}
		}
	})
	o := testOptions(t, PreCopy)
	// Nothing can be had in a nanosecond: it is slowed down as far as it goes.
	o.policy = policy{kind: policyAdaptive, maxDowntime: time.Nanosecond, unmet: unmetThrottle}
	l := newLeecher(t, newLink(t, src), o)
	h, err := l.Finalize(t.Context(), strategies.Hooks{Prepare: func(context.Context) error { return nil }})
	if err != nil || h.Unmet == "" || h.Throttled == 0 || w.limits.Load() < 2 {
		t.Fatalf("%v, %q, throttled to %d in %d steps", err, h.Unmet, h.Throttled, w.limits.Load())
	}
	check(t, l, w.bytes)
}

// TestThrottleEnds: a destination that gives up lets the application go on as before.
func TestThrottleEnds(t *testing.T) {
	w := newWriter(t, testSize, 10)
	src := newSeeder(t, w, SeederOptions{})
	l := newLeecher(t, newLink(t, src), testOptions(t, PreCopy))
	if err := l.until(t.Context(), testSize); err != nil {
		t.Fatal(err)
	}
	l.throttle.Store(1000)
	if _, err := l.look(t.Context(), 0); err != nil || w.limit.Load() != 1000 {
		t.Fatalf("a round: %v, the limit is %d", err, w.limit.Load())
	}
	if err := l.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	for until := time.Now().Add(20 * time.Second); w.limit.Load() != 0; time.Sleep(time.Millisecond) {
		if time.Now().After(until) {
			t.Fatal("the application is still throttled")
		}
	}
}
