package watch

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/storetest"
	"memsync/strategies/transport"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// source is a region that others change, behind a link of 10 ms each way.
type source struct {
	mu      sync.Mutex
	content []byte
	version region.Version
	changed time.Time
}

func (s *source) Version(context.Context) (region.Version, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.version
	v.Age = time.Since(s.changed)
	return v, nil
}

func (s *source) change(to byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.content = bytes.Repeat([]byte{to}, len(s.content))
	s.version.Changes++
	s.version.State++
	s.changed = time.Now()
}

func (s *source) Size() int64 { return int64(len(s.content)) }
func (s *source) ReadAt(_ context.Context, p []byte, off int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	copy(p, s.content[off:])
	return nil
}
func (s *source) WriteAt(context.Context, []byte, int64) error { return nil }
func (s *source) Flush(context.Context) error                  { return nil }
func (s *source) Close() error                                 { return nil }

// far puts a store behind the link.
type far struct {
	region.Store
	there, back time.Duration
}

func (f far) ReadAt(ctx context.Context, p []byte, off int64) error {
	time.Sleep(f.there)
	defer time.Sleep(f.back)
	return f.Store.ReadAt(ctx, p, off)
}

// ends is a connection that may be lost.
type ends struct {
	region.Store
	gone *atomic.Bool
}

func (e *ends) ReadAt(ctx context.Context, p []byte, off int64) error {
	if e.gone.Swap(false) {
		return region.ErrPeerGone
	}
	return e.Store.ReadAt(ctx, p, off)
}

type rig struct {
	*source
	exports transport.Exports
	slow    time.Duration // of the version's request more than of others
	opens   int
	gone    atomic.Bool // the connection is lost, once
	region.Store
	*Watch
}

func start(t *testing.T, slow time.Duration, o Options, settings ...string) *rig {
	t.Helper()
	g := &rig{source: &source{content: make([]byte, 8), version: region.Version{State: 5}, changed: time.Now().Add(-time.Hour)}, slow: slow}
	g.exports = transport.NewLeases(transport.One{Name: "r", Store: g.source})
	p, err := param.New(Params(true), settings)
	if err != nil {
		t.Fatal(err)
	}
	g.Watch, err = Open(t.Context(), func(_ context.Context, suffix string, _ bool) (region.Store, error) {
		g.opens++
		s, err := g.exports.Open("r" + suffix)
		return &ends{Store: far{s, 10*time.Millisecond + g.slow, 10 * time.Millisecond}, gone: &g.gone}, err
	}, p)
	if err != nil {
		t.Fatal(err)
	}
	g.Store = g.Wrap(far{g.source, 10 * time.Millisecond, 10 * time.Millisecond})
	g.Start(o)
	return g
}

func (g *rig) read(t *testing.T) (byte, error) {
	t.Helper()
	p := make([]byte, 8)
	err := g.Store.ReadAt(t.Context(), p, 0)
	return p[0], err
}

// TestFirst: the first read and the first version cost one round trip together;
// where the source changes between the two, the read is made again, so that its
// bytes are of the version or later.
func TestFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := start(t, 0, Options{})
		defer g.Watch.Close()
		began := time.Now()
		if _, err := g.read(t); err != nil || time.Since(began) != 20*time.Millisecond {
			t.Errorf("the first read took %v: %v", time.Since(began), err)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		g := start(t, 5*time.Millisecond, Options{})
		defer g.Watch.Close()
		time.AfterFunc(12*time.Millisecond, func() { g.change(7) }) // after the read was answered, before the version was
		if b, err := g.read(t); err != nil || b != 7 {
			t.Errorf("read %d, %v: the bytes are older than the version", b, err)
		}
		time.Sleep(3 * time.Second)
		if err := g.Err(); err != nil {
			t.Errorf("a change before the first version: %v", err)
		}
	})
}

// TestFail: a change is noticed within the interval, and at once by Check; from
// then on nothing is read, written or flushed.
func TestFail(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := start(t, 0, Options{})
		defer g.Watch.Close()
		if _, err := g.read(t); err != nil {
			t.Fatal(err)
		}
		g.change(1)
		time.Sleep(1100 * time.Millisecond)
		_, rerr := g.read(t)
		for _, err := range []error{g.Err(), rerr, g.Store.WriteAt(t.Context(), []byte("x"), 0), g.Store.Flush(t.Context()), g.Check(t.Context()), g.Last(t.Context())} {
			if !errors.Is(err, region.ErrMismatch) {
				t.Errorf("%v, want ErrMismatch", err)
			}
		}
		if checks, changes := g.Counts(); checks < 2 || changes == 0 {
			t.Errorf("%d checks, %d changes", checks, changes)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		g := start(t, 0, Options{}, "check_interval=1h")
		defer g.Watch.Close()
		if err := g.Ready(t.Context()); err != nil {
			t.Fatal(err)
		}
		g.change(1)
		if err := g.Check(t.Context()); !errors.Is(err, region.ErrMismatch) {
			t.Errorf("Check: %v", err)
		}
	})
}

// TestInvalidate: a change is dealt with each time, and one that cannot be is reported.
func TestInvalidate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls := 0
		var refuse error
		g := start(t, 0, Options{Invalidate: func(context.Context) error { calls++; return refuse }})
		defer g.Watch.Close()
		for round := range 2 {
			if err := g.Check(t.Context()); err != nil || calls != round {
				t.Errorf("%d calls: %v", calls, err)
			}
			g.change(byte(round))
			if err := g.Check(t.Context()); err != nil || calls != round+1 {
				t.Errorf("%d calls: %v", calls, err)
			}
		}
		refuse = errors.New("dirty")
		g.change(9)
		if err := g.Check(t.Context()); !errors.Is(err, region.ErrMismatch) || !errors.Is(err, refuse) {
			t.Errorf("%v", err)
		}
	})
}

// TestRestart: a source that was started anew is the same where its state says so.
func TestRestart(t *testing.T) {
	for _, same := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			var noted []region.Version
			g := start(t, 0, Options{Noted: func(v region.Version) error { noted = append(noted, v); return nil }})
			defer g.Watch.Close()
			if err := g.Check(t.Context()); err != nil || len(noted) != 1 {
				t.Fatalf("%d noted: %v", len(noted), err)
			}
			g.exports = transport.NewLeases(transport.One{Name: "r", Store: g.source})
			if !same {
				g.change(3)
			}
			g.gone.Store(true) // as the connection is with its server
			if err := g.Check(t.Context()); errors.Is(err, region.ErrMismatch) == same {
				t.Errorf("the same state %t: %v", same, err)
			}
			if g.opens != 2 {
				t.Errorf("%d opens", g.opens)
			}
		})
	}
}

// TestNone: a source without versions, and a user who does not ask, have no Watch, which is fine.
func TestNone(t *testing.T) {
	for _, setting := range []string{"on_change=ignore", "on_change=fail"} {
		p, err := param.New(Params(false), []string{setting})
		if err != nil {
			t.Fatal(err)
		}
		w, err := Open(t.Context(), func(context.Context, string, bool) (region.Store, error) { return nil, region.ErrMissing }, p)
		if w != nil || err != nil {
			t.Errorf("%s: %v, %v", setting, w, err)
		}
		s := storetest.New([]byte("x"))
		if w.Wrap(s) != region.Store(s) {
			t.Error("wrapped for nothing")
		}
		w.Start(Options{})
		w.Kick()
		if err := errors.Join(w.Ready(t.Context()), w.Check(t.Context()), w.Last(t.Context()), w.Err(), w.Close()); err != nil {
			t.Error(err)
		}
	}
	bad := errors.New("bad")
	p, err := param.New(Params(false), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), func(context.Context, string, bool) (region.Store, error) { return nil, bad }, p); !errors.Is(err, bad) {
		t.Error(err)
	}
}
