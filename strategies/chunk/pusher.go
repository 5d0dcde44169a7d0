package chunk

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"memsync/strategies/region"
)

// PushOptions say how a Pusher pushes.
type PushOptions struct {
	// Workers is how many background requests may be in flight. 0 or less means
	// none: only Flush, Close and writers over DirtyLimit push.
	Workers int
	// Interval is the pause between background passes; a chunk that is written
	// again within it is pushed once. 0 means one second.
	Interval time.Duration
	// SyncWorkers is how many requests Flush and Close may have in flight; it
	// is raised to Workers. 0 means 4.
	SyncWorkers int
	// DirtyLimit is how many bytes may be dirty before a writer has to wait
	// until they are pushed. 0 means any.
	DirtyLimit int64
}

// Pusher writes the dirty chunks of a Syncer back, neighbours in one request,
// and is the store to give to a device: a Syncer whose Flush is a barrier.
//
// Chunks are pushed in passes. A pass goes through the dirty set once, from the
// first chunk to the last, and ends when all its requests have; there is one
// pass at a time, so that no older content can overtake a newer one. A write to
// a chunk that is being pushed makes it dirty again, for the next pass. A
// request that fails leaves its chunks dirty.
type Pusher struct {
	*Syncer
	o      PushOptions
	pass   chan struct{} // one token: whoever has it makes a pass
	lost   atomic.Int64  // how often Lost was called
	cancel context.CancelFunc
	done   chan struct{}
	kick   chan struct{}
	urgent atomic.Int32 // how many wait for a pass with SyncWorkers: a background pass makes way
	once   sync.Once
	err    error // of Close

	requests, bytes, failures atomic.Int64
}

var (
	_ region.Store  = (*Pusher)(nil)
	_ region.Viewer = (*Pusher)(nil)
)

// StartPusher starts pushing what is dirty in s, which it takes over.
func StartPusher(s *Syncer, o PushOptions) *Pusher {
	if o.Interval <= 0 {
		o.Interval = time.Second
	}
	if o.SyncWorkers <= 0 {
		o.SyncWorkers = 4
	}
	o.SyncWorkers = max(o.SyncWorkers, o.Workers)
	ctx, cancel := context.WithCancel(context.Background())
	if b := s.bound; b != nil {
		// Half of the cache stays for reading.
		if half := max(1, b.limit/2) << s.shift; o.DirtyLimit <= 0 || o.DirtyLimit > half {
			o.DirtyLimit = half
		}
	}
	p := &Pusher{Syncer: s, o: o, pass: make(chan struct{}, 1), cancel: cancel,
		done: make(chan struct{}), kick: make(chan struct{}, 1)}
	if b := s.bound; b != nil {
		b.mu.Lock()
		b.clean = p.Flush
		b.mu.Unlock()
	}
	if o.Workers <= 0 {
		close(p.done)
		return p
	}
	go p.run(ctx)
	return p
}

// Pushed returns the requests, the bytes, and how many requests failed.
func (p *Pusher) Pushed() (requests, bytes, failures int64) {
	return p.requests.Load(), p.bytes.Load(), p.failures.Load()
}

// Lost says that what was pushed and not yet flushed may be lost, since the
// connection to the source was: it is dirty again. It may be called at any time.
func (p *Pusher) Lost() {
	p.redirty()
	p.lost.Add(1)
}

func (p *Pusher) run(ctx context.Context) {
	defer close(p.done)
	pause := p.o.Interval
	for {
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-p.kick:
			t.Stop()
		case <-ctx.Done():
			t.Stop()
			return
		}
		pause = p.o.Interval
		makeWay := func() bool { return p.urgent.Load() > 0 }
		if p.dirty.Count() > 0 && p.push(ctx, p.o.Workers, makeWay) != nil {
			pause = max(pause, minBackoff)
			pause = min(2*pause, max(p.o.Interval, maxBackoff))
		}
	}
}

// WriteAt implements region.Store. Where more than DirtyLimit bytes are dirty
// it waits until they are pushed, and with a Bound flushed, since they can leave
// the cache only then; the bytes are in the cache even if that fails.
func (p *Pusher) WriteAt(ctx context.Context, b []byte, off int64) error {
	if err := p.Syncer.WriteAt(ctx, b, off); err != nil {
		return err
	}
	return p.Throttle(ctx)
}

// Full reports whether more than DirtyLimit bytes are dirty.
func (p *Pusher) Full() bool {
	n := p.waiting()
	if p.o.DirtyLimit <= 0 || n <= p.o.DirtyLimit/2 {
		return false
	}
	select {
	case p.kick <- struct{}{}: // in time, so that writers rarely have to wait
	default:
	}
	return n > p.o.DirtyLimit
}

// Throttle pushes until that is not so.
func (p *Pusher) Throttle(ctx context.Context) error {
	for p.Full() {
		if err := p.drain(ctx); err != nil {
			return fmt.Errorf("%d bytes wait to be pushed, the limit is %d: %w", p.waiting(), p.o.DirtyLimit, err)
		}
	}
	return nil
}

// waiting returns the bytes that DirtyLimit is about.
func (p *Pusher) waiting() int64 {
	if p.bound == nil {
		return p.dirty.Count() << p.shift
	}
	return p.pending() << p.shift
}

// drain brings waiting down.
func (p *Pusher) drain(ctx context.Context) error {
	if p.bound != nil {
		return p.Flush(ctx)
	}
	p.urgent.Add(1)
	defer p.urgent.Add(-1)
	return p.push(ctx, p.o.SyncWorkers, nil)
}

// Flush is a barrier: when it returns nil, all writes that returned before it
// was called are at the source and the source was flushed. It costs nothing
// where nothing was written since the last one.
func (p *Pusher) Flush(ctx context.Context) error {
	p.urgent.Add(1)
	release, err := p.acquire(ctx)
	p.urgent.Add(-1)
	if err != nil {
		return err
	}
	defer release() // nothing may be pushed between the pass and the flush: it would count as flushed
	for {
		lost := p.lost.Load()
		if p.clean() {
			return nil
		}
		if err := p.makePass(ctx, p.o.SyncWorkers, nil); err != nil {
			return err
		}
		if err := p.remote.Flush(ctx); err != nil {
			p.redirty()
			return fmt.Errorf("flush the source: %w", err)
		}
		// If a connection was lost between the two, the flush spoke for the new one only.
		if p.lost.Load() == lost {
			return p.settle()
		}
	}
}

// settle says that the source has, flushed, all that was pushed.
func (p *Pusher) settle() error {
	for at := int64(0); ; {
		lo, hi, ok := p.unflushed.Next(at, p.n)
		if !ok {
			return nil
		}
		if err := p.journal.unmark(lo, hi, p.dirty.Has); err != nil {
			return err // unflushed still: tried again by the next flush
		}
		p.unflushed.Clear(lo, hi)
		at = hi
	}
}

// clean reports whether the source has everything, flushed. It looks at the
// bits, since a count may lag behind them.
func (p *Pusher) clean() bool {
	_, _, dirty := p.dirty.Next(0, 1)
	_, _, unflushed := p.unflushed.Next(0, 1)
	return !dirty && !unflushed
}

// redirty makes all dirty that was pushed since the last flush.
func (p *Pusher) redirty() {
	p.moving.Lock() // so that nothing is evicted while it is on its way from one set to the other
	defer p.moving.Unlock()
	for at := int64(0); ; {
		lo, hi, ok := p.unflushed.Next(at, p.n)
		if !ok {
			return
		}
		p.dirty.Mark(lo, hi) // first, so that Flush sees them in one set or the other
		p.unflushed.Clear(lo, hi)
		at = hi
	}
}

// acquire waits for the right to make passes.
func (p *Pusher) acquire(ctx context.Context) (release func(), err error) {
	release = func() { <-p.pass }
	select {
	case p.pass <- struct{}{}: // also where ctx has ended: there may be nothing to push
		return release, nil
	default:
	}
	select {
	case p.pass <- struct{}{}:
		return release, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for the push under way: %w", ctx.Err())
	case <-p.ctx.Done():
		return nil, fmt.Errorf("push: %w", region.ErrClosed)
	}
}

// push makes one pass with that many requests in flight. It ends early, without
// an error, once makeWay, unless nil, is true.
func (p *Pusher) push(ctx context.Context, workers int, makeWay func() bool) error {
	release, err := p.acquire(ctx)
	if err != nil {
		return err
	}
	defer release()
	return p.makePass(ctx, workers, makeWay)
}

func (p *Pusher) makePass(ctx context.Context, workers int, makeWay func() bool) error {
	ctx, cancel := context.WithCancel(region.WithClass(ctx, region.Push))
	defer cancel()
	defer context.AfterFunc(p.ctx, cancel)()
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		at    int64
		first error
	)
	work := func() {
		for {
			mu.Lock()
			lo, hi, ok := p.dirty.Next(at, p.maxExtent)
			if first != nil || !ok || makeWay != nil && makeWay() {
				mu.Unlock()
				return
			}
			at = hi
			p.pushing.Mark(lo, hi)
			p.unflushed.Mark(lo, hi)
			err := p.take(lo, hi)
			mu.Unlock()
			if err == nil {
				err = p.pushOne(ctx, lo, hi)
			}
			if err != nil {
				mu.Lock()
				if first == nil {
					first = err
				}
				mu.Unlock()
			}
		}
	}
	for range min(int64(workers), p.dirty.Count()) - 1 {
		wg.Go(work)
	}
	work()
	wg.Wait()
	return first
}

// take takes chunks out of the dirty set, before their bytes are read: see Set.
func (p *Pusher) take(lo, hi int64) error {
	mapped, ok := p.local.(Mapped)
	if !ok {
		p.dirty.Clear(lo, hi)
		return nil
	}
	err := mapped.Seal(p.at(lo), p.at(hi)-p.at(lo), func() { p.dirty.Clear(lo, hi) })
	if err != nil {
		p.fail(lo, hi)
		return fmt.Errorf("seal chunks %d to %d: %w", lo, hi-1, err)
	}
	return nil
}

// fail makes chunks dirty again whose push failed.
func (p *Pusher) fail(lo, hi int64) {
	p.failures.Add(1)
	p.dirty.Mark(lo, hi)
	p.pushing.Clear(lo, hi)
}

func (p *Pusher) pushOne(ctx context.Context, lo, hi int64) error {
	n := p.at(hi) - p.at(lo)
	buf := p.buffer(n)
	defer p.bufs.Put(buf)
	// A copy, so that the transport sees bytes that do not change under it.
	err := p.local.ReadAt(ctx, (*buf)[:n], p.at(lo))
	if err == nil {
		err = p.remote.WriteAt(ctx, (*buf)[:n], p.at(lo))
	}
	if err != nil {
		p.fail(lo, hi)
		return fmt.Errorf("push chunks %d to %d, %d bytes at %d: %w", lo, hi-1, n, p.at(lo), err)
	}
	p.pushing.Clear(lo, hi)
	p.requests.Add(1)
	p.bytes.Add(n)
	return nil
}

// Close stops background pushing, pushes what is dirty and closes the Syncer.
// Without a deadline of its own it blocks until the source has everything:
// use Shutdown for one. It may be called twice and returns the same error.
func (p *Pusher) Close() error { return p.Shutdown(context.Background()) }

// Shutdown is Close that gives up pushing when ctx ends.
func (p *Pusher) Shutdown(ctx context.Context) error {
	p.once.Do(func() {
		p.cancel()
		<-p.done
		if p.err = p.Flush(ctx); p.err != nil {
			p.err = fmt.Errorf("%d bytes were not pushed: %w", p.DirtyBytes(), p.err)
		}
		p.err = errors.Join(p.err, p.Syncer.Close())
	})
	return p.err
}
