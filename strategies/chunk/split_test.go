package chunk

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"memsync/strategies/param"
	"memsync/strategies/region"
)

// lengths notes the longest read and how many there were.
type lengths struct {
	region.Store
	n, longest atomic.Int64
}

func (l *lengths) ReadAt(ctx context.Context, p []byte, off int64) error {
	l.n.Add(1)
	l.longest.Store(max(l.longest.Load(), int64(len(p))))
	return l.Store.ReadAt(ctx, p, off)
}

// TestSplit: requests are cut on the side that was asked for, and there only.
func TestSplit(t *testing.T) {
	for _, c := range []struct {
		set, side string
		pieces    int64
	}{
		{"none", SplitSource, 1}, {"none", SplitDestination, 1},
		{"source", SplitSource, 16}, {"source", SplitDestination, 1},
		{"destination", SplitSource, 1}, {"destination", SplitDestination, 16},
	} {
		p, err := param.New(SplitParams(), []string{"split=" + c.set, "split_size=4KiB"})
		if err != nil {
			t.Fatal(err)
		}
		l := &lengths{Store: newBytes(64 << 10)}
		if err := Split(l, c.side, p).ReadAt(t.Context(), make([]byte, 64<<10), 0); err != nil {
			t.Fatal(err)
		}
		if l.n.Load() != c.pieces || l.longest.Load() != 64<<10/c.pieces {
			t.Errorf("split=%s, %s's side: %d reads, the longest of %d bytes; want %d", c.set, c.side, l.n.Load(), l.longest.Load(), c.pieces)
		}
	}
	s := newBytes(1)
	if Split(s, SplitSource, param.Values{}) != region.Store(s) {
		t.Error("a strategy without the parameter has its requests cut")
	}
}

// oneByOne lets the first write wait until release, and notes how many writes are there at once.
type oneByOne struct {
	region.Store
	first   atomic.Bool
	begun   chan struct{} // closed at the first write
	release chan struct{}
	now     atomic.Int64
	most    atomic.Int64
}

func (o *oneByOne) WriteAt(ctx context.Context, p []byte, off int64) error {
	if o.first.CompareAndSwap(false, true) {
		close(o.begun)
		select {
		case <-o.release:
		case <-ctx.Done():
			return ctx.Err()
		}
		return o.Store.WriteAt(ctx, p, off)
	}
	n := o.now.Add(1)
	defer o.now.Add(-1)
	for m := o.most.Load(); n > m && !o.most.CompareAndSwap(m, n); m = o.most.Load() {
	}
	time.Sleep(time.Millisecond)
	return o.Store.WriteAt(ctx, p, off)
}

// TestBackgroundPassMakesWay: a Flush does not wait until the only background
// worker has pushed all that is dirty.
func TestBackgroundPassMakesWay(t *testing.T) {
	const chunk, chunks = 4096, 64
	remote := &oneByOne{Store: newBytes(chunk * chunks), begun: make(chan struct{}), release: make(chan struct{})}
	cache, err := NewMemory(chunk * chunks)
	if err != nil {
		t.Fatal(err)
	}
	defer cache.Close()
	s, err := NewSyncer(remote, cache, chunk, chunk)
	if err != nil {
		t.Fatal(err)
	}
	p := StartPusher(s, PushOptions{Workers: 1, Interval: time.Millisecond, SyncWorkers: 16})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := p.WriteAt(ctx, make([]byte, chunk*chunks), 0); err != nil {
		t.Fatal(err)
	}
	<-remote.begun
	flushed := make(chan error, 1)
	go func() { flushed <- p.Flush(ctx) }()
	for p.urgent.Load() == 0 && ctx.Err() == nil {
		time.Sleep(time.Millisecond)
	}
	close(remote.release)
	if err := errors.Join(<-flushed, p.Close()); err != nil {
		t.Fatal(err)
	}
	if most := remote.most.Load(); most < 2 {
		t.Errorf("%d writes at once: the flush waited for the background worker", most)
	}
}
