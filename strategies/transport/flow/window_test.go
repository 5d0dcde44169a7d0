package flow

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"
)

func TestWindow(t *testing.T) {
	w := New(100)
	ctx := t.Context()
	if !w.Try(60) || w.Try(60) || !w.Try(40) || w.Try(1) {
		t.Fatal("try does not keep to the limit")
	}
	// First come, first served: a small one does not overtake a large one.
	var order []int64
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i, n := range []int64{90, 10, 500} {
		wg.Go(func() {
			if err := w.Acquire(ctx, n); err != nil {
				t.Error(err)
			}
			mu.Lock()
			order = append(order, n)
			mu.Unlock()
			w.Release(n, 0)
		})
		waitFor(t, "queued", func() bool { w.mu.Lock(); defer w.mu.Unlock(); return len(w.queue) == i+1 })
	}
	gone, cancel := context.WithCancel(ctx)
	left := make(chan error)
	go func() { left <- w.Acquire(gone, 5) }()
	waitFor(t, "queued", func() bool { w.mu.Lock(); defer w.mu.Unlock(); return len(w.queue) == 4 })
	cancel()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	w.Release(60, 0)
	if w.Try(1) {
		t.Error("try overtakes the queue")
	}
	w.Release(40, 0)
	wg.Wait()
	if len(order) != 3 || order[2] != 500 || w.used != 0 {
		t.Errorf("order %v, %d bytes used", order, w.used)
	}
}

// On a path with a round trip and a rate, an automatic window settles where the
// path is full and the queue short, whatever single requests meet.
func TestWindowFollowsThePath(t *testing.T) {
	for _, c := range []struct {
		rtt  time.Duration
		rate float64 // B/s
		loss int     // every n-th request is late by two round trips; 0 is none
	}{{time.Millisecond, 125e6, 0}, {20 * time.Millisecond, 125e6, 0}, {100 * time.Millisecond, 125e6, 0}, {20 * time.Millisecond, 12.5e6, 0},
		{100 * time.Millisecond, 12.5e6, 0}, {100 * time.Millisecond, 12.5e6, 7}} {
		w := New(0)
		bdp := c.rate * c.rtt.Seconds()
		now := time.Unix(0, 0)
		reply := func(i int) {
			piece := w.Piece()
			queue := max(0, float64(w.limit)-bdp)
			latency := c.rtt + time.Duration((queue+float64(piece))/c.rate*1e9)
			if c.loss > 0 && i%c.loss == 0 {
				latency += 2 * c.rtt
			}
			w.used = w.limit
			now = now.Add(time.Duration(float64(piece) / min(c.rate, float64(w.limit)/c.rtt.Seconds()) * 1e9))
			w.adapt(piece, latency, now)
		}
		w.adapt(4096, c.rtt, now) // the first finds the path idle
		for i := range 20000 {
			reply(i)
			if i < 2000 || w.probe > 0 {
				continue
			}
			most := max(windowMin, bdp+(c.rtt.Seconds()/4+queueSlack.Seconds())*c.rate)*1.1 + Piece
			if least := 0.9 * min(bdp, windowMax); float64(w.limit) < least || float64(w.limit) > most {
				t.Errorf("%v, %.0f B/s, reply %d: window of %d bytes, BDP %.0f", c.rtt, c.rate, i, w.limit, bdp)
				break
			}
		}
		// The path becomes longer for good: the window finds it within two probes.
		c.rtt *= 3
		bdp *= 3
		for end := now.Add(3 * baseAge); now.Before(end); {
			reply(1)
		}
		if least := 0.8 * min(bdp, windowMax); float64(w.limit) < least && w.probe == 0 {
			t.Errorf("%v, %.0f B/s after the path grew: window of %d bytes, BDP %.0f", c.rtt, c.rate, w.limit, bdp)
		}
	}
}

func waitFor(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !f(); time.Sleep(100 * time.Microsecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within 10 s", what)
		}
	}
}
