package nbd

import (
	"context"
	"sync"
	"time"
)

const (
	windowMin  = 512 << 10 // bytes; also the first size of an automatic window
	windowMax  = 64 << 20
	queueSlack = 5 * time.Millisecond // that background requests may add to a demand request's wait
	baseAge    = 10 * time.Second     // for which the lowest latency is believed
)

// window bounds the bytes of background requests in flight, first come first served.
//
// An automatic window follows the path: a request's latency is what it is on an
// idle path (base) plus the queue in front of it. While the queue is short the
// window grows; when it is longer than base + queueSlack the window shrinks in
// proportion. So the path stays full, and a demand request waits for about one
// more round trip at most. The idea is TCP Vegas' (Brakmo and Peterson, 1995).
type window struct {
	mu    sync.Mutex
	limit int64
	used  int64
	queue []*ticket
	auto  bool
	fast  bool // slow start: double each round
	base  time.Duration
	since time.Time // when base was seen
	acked int64     // bytes since the limit last changed
}

type ticket struct {
	n     int64
	ready chan struct{}
}

// newWindow makes a window of limit bytes, automatic where that is 0.
func newWindow(limit int64) *window {
	if limit == 0 {
		return &window{limit: windowMin, auto: true, fast: true}
	}
	return &window{limit: limit}
}

func (w *window) fits(n int64) bool { return w.used == 0 || w.used+n <= w.limit }

// try takes n bytes where that needs no wait. A request longer than the window goes alone.
func (w *window) try(n int64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.queue) > 0 || !w.fits(n) {
		return false
	}
	w.used += n
	return true
}

// acquire waits for n bytes, or for the end of ctx.
func (w *window) acquire(ctx context.Context, n int64) error {
	if w.try(n) {
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
func (w *window) admit() {
	for len(w.queue) > 0 && w.fits(w.queue[0].n) {
		w.used += w.queue[0].n
		close(w.queue[0].ready)
		w.queue = w.queue[1:]
	}
}

// release gives n bytes back; took is how long the request for them took, 0
// where it failed.
func (w *window) release(n int64, took time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.auto && took > 0 {
		w.adapt(n, took, time.Now())
	}
	w.used -= n
	w.admit()
}

func (w *window) adapt(n int64, latency time.Duration, now time.Time) {
	if w.base == 0 || latency < w.base || now.Sub(w.since) > baseAge {
		w.base, w.since = latency, now
	}
	w.acked += n
	switch target := 2*w.base + queueSlack; {
	case latency > target:
		w.fast = false
		if w.acked >= w.limit {
			w.limit = max(windowMin, int64(float64(w.limit)*max(0.5, float64(target)/float64(latency))))
			w.acked = 0
		}
	case w.used < w.limit-2*backgroundPiece: // not the window that binds
	case w.fast:
		w.limit = min(windowMax, w.limit+n)
	case w.acked >= w.limit:
		w.limit = min(windowMax, w.limit+backgroundPiece)
		w.acked = 0
	}
}
