package backend

import (
	"context"
	"sync"
	"time"

	"memsync/strategies/region"
)

// Slow is a Store with the latency and the bandwidth of a slow disk or memory:
// each read and write takes Delay, side by side, and its bytes move one after another
// at Rate. It offers no views. Close and Flush cost nothing more than the store's.
type Slow struct {
	region.Store
	Delay time.Duration
	Rate  int64 // bytes per second, both directions together; 0 is any

	mu   sync.Mutex
	free time.Time // when the bytes asked for so far have moved
}

// slowSlack is how far Slow runs behind its rate before it pauses, and how much
// it makes up for a pause that was too long: a timer is no finer.
const slowSlack = time.Millisecond

// wait returns when n more bytes have moved.
func (s *Slow) wait(ctx context.Context, n int) error {
	now := time.Now()
	until := now
	if s.Rate > 0 {
		s.mu.Lock()
		if start := now.Add(-slowSlack); s.free.Before(start) {
			s.free = start
		}
		s.free = s.free.Add(time.Duration(float64(n) / float64(s.Rate) * 1e9))
		until = s.free
		s.mu.Unlock()
	}
	d := max(until.Sub(now), 0) + s.Delay
	if d < slowSlack/4 && s.Delay == 0 {
		return ctx.Err()
	}
	return pause(ctx, d)
}

// ReadAt waits, then reads.
func (s *Slow) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := s.wait(ctx, len(p)); err != nil {
		return err
	}
	return s.Store.ReadAt(ctx, p, off)
}

// WriteAt waits, then writes.
func (s *Slow) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := s.wait(ctx, len(p)); err != nil {
		return err
	}
	return s.Store.WriteAt(ctx, p, off)
}

// Trim implements region.Trimmer where the store below does, at no cost.
func (s *Slow) Trim(ctx context.Context, off, n int64) error {
	if t, ok := s.Store.(region.Trimmer); ok {
		return t.Trim(ctx, off, n)
	}
	return nil
}
