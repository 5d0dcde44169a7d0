// Package flow holds what the clients of all transports share: the window of
// background requests, which follows the path, and buffers that are lent.
package flow

import (
	"context"
	"sync"
	"time"
)

// Piece is the longest piece of a background request, in bytes, so that a demand
// request waits for little.
const Piece = 256 << 10

const (
	step        = 4 << 10   // the window is a multiple of it, or grows by at least it
	windowFirst = 512 << 10 // bytes; the first size of an automatic window
	windowMin   = 128 << 10
	windowMax   = 64 << 20
	queueSlack  = 4 * time.Millisecond // of queue that is always allowed: timers and wake-ups look like it
	baseAge     = 10 * time.Second     // for which the lowest latency is believed
)

// Window bounds the bytes of background requests in flight, first come first served.
//
// An automatic window follows the path. The lowest latency ever seen is that of
// an idle path (base). In each round, a window's worth of replies, the lowest
// latency is base plus the queue that every request met; a single one may be
// slow for other reasons, such as a lost packet. While that queue is short the
// window grows, doubling at first; when it is longer than base/4 + queueSlack the
// window shrinks in proportion. So the path stays full, and a demand request
// waits for little more than its round trip. Every baseAge one round with half
// the window lets the queue drain, to see whether base is still true.
// After TCP Vegas (Brakmo and Peterson, 1995) and BBR's ProbeRTT.
type Window struct {
	mu    sync.Mutex
	limit int64
	used  int64
	queue []*ticket
	auto  bool
	fast  bool // slow start: double each round
	base  time.Duration
	since time.Time     // when base was seen
	round int64         // bytes that make this round: the limit when it began
	acked int64         // of these, how many have come
	low   time.Duration // lowest latency of this round; 0 before the first reply
	probe int64         // the limit to go back to after a round that probes for base; 0 is none
}

type ticket struct {
	n     int64
	ready chan struct{}
}

// New makes a window of limit bytes, automatic where that is 0.
func New(limit int64) *Window {
	if limit == 0 {
		return &Window{limit: windowFirst, round: windowFirst, auto: true, fast: true}
	}
	return &Window{limit: limit}
}

func (w *Window) fits(n int64) bool { return w.used == 0 || w.used+n <= w.limit }

// Try takes n bytes where that needs no wait. A request longer than the window goes alone.
func (w *Window) Try(n int64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.queue) > 0 || !w.fits(n) {
		return false
	}
	w.used += n
	return true
}

// Acquire waits for n bytes, or for the end of ctx.
func (w *Window) Acquire(ctx context.Context, n int64) error {
	if w.Try(n) {
		return nil
	}
	t := &ticket{n, make(chan struct{})}
	w.mu.Lock()
	w.queue = append(w.queue, t)
	w.admit()
	w.mu.Unlock()
	select {
	case <-t.ready:
		return nil
	case <-ctx.Done():
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	select {
	case <-t.ready:
		w.used -= n
	default:
		for i, q := range w.queue {
			if q == t {
				w.queue = append(w.queue[:i], w.queue[i+1:]...)
				break
			}
		}
	}
	w.admit()
	return ctx.Err()
}

// admit lets those at the front of the queue in. Under mu.
func (w *Window) admit() {
	for len(w.queue) > 0 && w.fits(w.queue[0].n) {
		w.used += w.queue[0].n
		close(w.queue[0].ready)
		w.queue = w.queue[1:]
	}
}

// Release gives n bytes back; took is how long the request for them took, 0
// where it failed.
func (w *Window) Release(n int64, took time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.auto && took > 0 {
		w.adapt(n, took, time.Now())
	}
	w.used -= n
	w.admit()
}

// Piece is how long one background request should be at most: short against the
// window, so that what is in flight can follow it closely.
func (w *Window) Piece() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.auto {
		return Piece
	}
	return min(Piece, max(windowMin/4, w.limit/8&^(step-1)))
}

// adapt learns from a reply of n bytes. Under mu.
func (w *Window) adapt(n int64, latency time.Duration, now time.Time) {
	if w.base == 0 || latency <= w.base {
		w.base, w.since = latency, now
	}
	if w.low == 0 || latency < w.low {
		w.low = latency
	}
	target := w.base + w.base/4 + queueSlack
	binds := w.used >= w.limit/2 // else it is not the window that bounds the rate
	if w.fast && binds && latency <= target {
		w.limit = min(windowMax, w.limit+n)
	}
	if w.acked += n; w.acked < w.round {
		return
	}
	low := w.low
	w.acked, w.low = 0, 0
	defer func() { w.round = w.limit }()
	switch {
	case w.probe > 0:
		w.fast = low > 2*w.base // another path
		w.base, w.since = low, now
		w.limit, w.probe = w.probe, 0
	case now.Sub(w.since) > baseAge:
		w.limit, w.probe = max(windowMin, w.limit/2), w.limit
	case low > target:
		w.fast = false
		w.limit = max(windowMin, int64(float64(w.limit)*max(0.5, float64(target)/float64(low))))
	case binds && !w.fast:
		w.limit = min(windowMax, w.limit+max(w.limit/16, step))
	}
}
