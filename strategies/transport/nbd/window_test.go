package nbd

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/transport"
)

func TestWindow(t *testing.T) {
	w := newWindow(100)
	ctx := testContext(t)
	if !w.try(60) || w.try(60) || !w.try(40) || w.try(1) {
		t.Fatal("try does not keep to the limit")
	}
	// First come, first served: a small one does not overtake a large one.
	var order []int64
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i, n := range []int64{90, 10, 500} {
		wg.Go(func() {
			if err := w.acquire(ctx, n); err != nil {
				t.Error(err)
			}
			mu.Lock()
			order = append(order, n)
			mu.Unlock()
			w.release(n, 0)
		})
		waitFor(t, "queued", func() bool { w.mu.Lock(); defer w.mu.Unlock(); return len(w.queue) == i+1 })
	}
	gone, cancel := context.WithCancel(ctx)
	left := make(chan error)
	go func() { left <- w.acquire(gone, 5) }()
	waitFor(t, "queued", func() bool { w.mu.Lock(); defer w.mu.Unlock(); return len(w.queue) == 4 })
	cancel()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	w.release(60, 0)
	if w.try(1) {
		t.Error("try overtakes the queue")
	}
	w.release(40, 0)
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
		w := newWindow(0)
		bdp := c.rate * c.rtt.Seconds()
		now := time.Unix(0, 0)
		reply := func(i int) {
			piece := w.piece()
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
			most := max(windowMin, bdp+(c.rtt.Seconds()/4+queueSlack.Seconds())*c.rate)*1.1 + backgroundPiece
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

func TestDemandOvertakes(t *testing.T) {
	const window = 1 << 20
	gate := make(chan struct{})
	store := urgent{gated{newRAM(32<<20, 1), gate, nil}}
	for _, class := range []region.Class{region.Prefetch, region.Push} {
		c := open(t, &Transport{}, serve(t, &Transport{}, transport.One{Store: store}), transport.Options{Window: window, Connections: 2})
		ctx, cancel := context.WithCancel(region.WithClass(testContext(t), class))
		var wg sync.WaitGroup
		load := func() int64 { return c.conns[0].load.Load() + c.conns[1].load.Load() }
		for i := range int64(4) {
			wg.Go(func() {
				p := make([]byte, 8<<20)
				var err error
				if class == region.Prefetch {
					err = c.ReadAt(ctx, p, i*8<<20)
				} else {
					err = c.WriteAt(ctx, p, i*8<<20)
				}
				if !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
			})
		}
		waitFor(t, "window full", func() bool { return load() == window })
		for range 20 {
			if err := c.ReadAt(testContext(t), make([]byte, 4096), 12345); err != nil {
				t.Fatal(err)
			}
			if n := load(); n > window {
				t.Fatalf("%d bytes in the background, the window is %d", n, window)
			}
		}
		if c.conns[0].load.Load() != 0 {
			t.Error("background requests on the connection that is kept for demand")
		}
		cancel()
		wg.Wait()
	}
}

// urgent lets small reads past the gate, and holds writes at it.
type urgent struct{ gated }

func (u urgent) ReadAt(ctx context.Context, p []byte, off int64) error {
	if len(p) <= 4096 {
		return u.ram.ReadAt(ctx, p, off)
	}
	return u.gated.ReadAt(ctx, p, off)
}

func (u urgent) WriteAt(ctx context.Context, p []byte, off int64) error {
	return u.gated.ReadAt(ctx, make([]byte, len(p)), off)
}

func TestParams(t *testing.T) {
	v, err := param.New(Params(), []string{"connections=4", "window=2MiB"})
	if err != nil || v.Int("connections") != 4 || v.Size("window") != 2<<20 {
		t.Errorf("%v, %v", v, err)
	}
	if _, err := param.New(Params(), []string{"connections=17"}); err == nil {
		t.Error("17 connections: no error")
	}
}
