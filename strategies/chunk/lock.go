package chunk

import (
	"context"
	"sync"
)

// Ranges locks ranges of chunks, shared or exclusive. The zero value is ready.
// It is meant for stages whose work is slow against a mutex (I/O), not for the
// hot path of Syncer, which takes no lock.
type Ranges struct {
	mu   sync.Mutex
	held []*held
}

type held struct {
	lo, hi int64
	shared bool
	done   chan struct{} // closed by unlock
}

// Lock waits until no conflicting lock on [lo, hi) is held and returns the
// function that unlocks it. Two shared locks do not conflict. It returns ctx's
// error when ctx ends first. It is not fair: a stream of shared locks can
// starve an exclusive one on the same chunk.
func (r *Ranges) Lock(ctx context.Context, lo, hi int64, shared bool) (unlock func(), err error) {
	for {
		h, conflict := r.try(lo, hi, shared)
		if conflict == nil {
			return func() { r.unlock(h) }, nil
		}
		select {
		case <-conflict.done:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (r *Ranges) try(lo, hi int64, shared bool) (mine, conflict *held) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, h := range r.held {
		if lo < h.hi && h.lo < hi && !(shared && h.shared) {
			return nil, h
		}
	}
	mine = &held{lo: lo, hi: hi, shared: shared, done: make(chan struct{})}
	r.held = append(r.held, mine)
	return mine, nil
}

func (r *Ranges) unlock(mine *held) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, h := range r.held {
		if h == mine {
			last := len(r.held) - 1
			r.held[i], r.held[last] = r.held[last], nil
			r.held = r.held[:last]
			break
		}
	}
	close(mine.done)
}
