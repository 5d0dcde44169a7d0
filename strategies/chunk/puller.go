package chunk

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"

	"memsync/strategies/order"
	"memsync/strategies/region"
)

// PullOptions say how a Puller pulls.
type PullOptions struct {
	// Workers is how many extents may be in flight: one request each, or several
	// shorter ones where the order jumps. 0 or less means none: Start does nothing.
	Workers int
	// Window is how many bytes may be in flight; at least one chunk always is.
	// The link is filled if Window is at least its bandwidth x RTT and Workers
	// extents make up the window. 0 means Workers extents.
	Window int64
	// Order is what to pull first; nil means linear.
	Order order.Order
}

// Puller copies chunks from remote to local in the background, as Prefetch,
// many neighbouring chunks in one request. The first request is for one chunk,
// each further one for twice as much, up to the Syncer's maxExtent: the first
// bytes are there early, and the requests are few. Where the order jumps, a
// worker has several requests in flight that make up an extent together, so
// that scattered chunks come as fast as neighbours.
//
// A request that fails is tried again after a pause (10 ms, doubling to 1 s)
// until Close; it stops nothing else.
type Puller struct {
	s      *Syncer
	window *semaphore.Weighted
	cancel context.CancelFunc
	wg     sync.WaitGroup
	done   chan struct{}

	mu      sync.Mutex
	next    func() (order.Range, bool)
	stop    func()
	lo, hi  int64 // chunks that are left of the range that next gave last
	swept   bool
	drained bool  // nothing more is to be asked for
	grow    int64 // chunks in the next request
	retries atomic.Int64
}

const (
	minBackoff = 10 * time.Millisecond
	maxBackoff = time.Second
)

// StartPuller starts pulling all of s. It does not block.
func StartPuller(s *Syncer, o PullOptions) *Puller {
	if o.Order == nil {
		o.Order = order.Linear()
	}
	workers := max(o.Workers, 0)
	if o.Window <= 0 {
		o.Window = max(int64(workers), 1) * s.maxExtent << s.shift
	}
	p := &Puller{s: s, grow: 1, done: make(chan struct{}), window: semaphore.NewWeighted(max(1, o.Window>>s.shift))}
	p.next, p.stop = iter.Pull(o.Order.Ranges(s.size, s.maxExtent<<s.shift))
	ctx, cancel := context.WithCancel(region.WithClass(context.Background(), region.Prefetch))
	p.cancel = cancel
	p.more(ctx, workers, max(1, o.Window>>s.shift))
	go func() {
		p.wg.Wait()
		p.stop()
		close(p.done)
	}()
	return p
}

// Done is closed when all has been pulled, or all workers have stopped.
func (p *Puller) Done() <-chan struct{} { return p.done }

// Retries returns how many requests failed and were tried again.
func (p *Puller) Retries() int64 { return p.retries.Load() }

// Close stops pulling, requests in flight included, and waits for the workers. It may be called twice.
func (p *Puller) Close() {
	p.cancel()
	<-p.done
}

// Drain asks for nothing more, and returns once what is under way has come.
func (p *Puller) Drain(ctx context.Context) error {
	p.mu.Lock()
	p.drained = true
	p.mu.Unlock()
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for background pulls: %w", ctx.Err())
	}
}

// more starts the given number of workers, each when the one before is about to
// make its first request: thus the first requests leave in order.
func (p *Puller) more(ctx context.Context, workers int, window int64) {
	if workers > 0 {
		p.wg.Go(func() { p.work(ctx, workers-1, window) })
	}
}

func (p *Puller) work(ctx context.Context, rest int, window int64) {
	for {
		n := p.size(window)
		if p.window.Acquire(ctx, n) != nil {
			return
		}
		runs := p.claim(n)
		for _, r := range runs {
			n -= r.hi - r.lo
		}
		p.window.Release(n)
		if len(runs) == 0 {
			return
		}
		p.more(ctx, rest, window)
		rest = 0
		var wg sync.WaitGroup
		for _, r := range runs[1:] {
			wg.Go(func() { p.pull(ctx, r) })
		}
		p.pull(ctx, runs[0])
		wg.Wait()
		if ctx.Err() != nil || p.s.ctx.Err() != nil {
			return
		}
	}
}

// pull fetches a run, again after an error, and gives its part of the window back.
func (p *Puller) pull(ctx context.Context, r run) {
	defer p.window.Release(r.hi - r.lo)
	again := p.fetch(ctx, r)
	for pause := minBackoff; again && sleep(ctx, pause); pause = min(2*pause, maxBackoff) {
		p.retries.Add(1)
		again = p.refetch(ctx, r.lo, r.hi)
	}
}

// size returns the number of chunks that the next request may have, and doubles it.
func (p *Puller) size(window int64) int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := min(p.grow, p.s.maxExtent, window)
	p.grow = min(2*p.grow, p.s.maxExtent)
	return n
}

// run is chunks [lo, hi) that were claimed with stamp.
type run struct {
	lo, hi int64
	stamp  uint32
}

// claim takes the next n chunks that are remote, fewer where there are no more.
func (p *Puller) claim(n int64) (runs []run) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for n > 0 && !p.drained && !p.s.full() { // with a Bound: what is there is of more use than what comes next
		if p.lo < p.hi {
			from, to, stamp := p.s.claim(p.lo, p.hi, n, region.Prefetch)
			if p.lo = to; from < to {
				runs = append(runs, run{from, to, stamp})
				n -= to - from
			}
			continue
		}
		r, ok := p.next()
		if !ok {
			if p.swept {
				break
			}
			// What the order left out, or a demand request claimed and then failed to get.
			p.swept = true
			r = order.Range{Off: 0, End: p.s.size}
		}
		if r.Off, r.End = max(r.Off, 0), min(r.End, p.s.size); r.Off < r.End {
			p.lo, p.hi = p.s.span(r.Off, r.End-r.Off)
		}
	}
	return runs
}

// fetch reports whether the request failed and should be tried again.
func (p *Puller) fetch(ctx context.Context, r run) (again bool) {
	err := p.s.fetch(ctx, r.lo, r.hi, r.stamp)
	return err != nil && ctx.Err() == nil && !errors.Is(err, region.ErrClosed)
}

// refetch fetches what is still remote in [lo, hi).
func (p *Puller) refetch(ctx context.Context, lo, hi int64) (again bool) {
	for lo < hi {
		from, to, stamp := p.s.claim(lo, hi, hi-lo, region.Prefetch)
		if from < to && p.fetch(ctx, run{from, to, stamp}) {
			again = true
		}
		lo = to
	}
	return again
}

// sleep waits and reports whether ctx is still alive.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
