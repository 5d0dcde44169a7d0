package snapshot

import (
	"context"
	"sync"
	"time"

	"memsync/strategies/region"
	"memsync/strategies/snapshot/shm"
)

// exitTaker is mode on-exit: the region as it is when the client has exited. What did not change
// is found by its digest.
type exitTaker struct{ h *Host }

func (t *exitTaker) follow() (bool, error) { return false, nil }

func (t *exitTaker) take(ctx context.Context, last bool, _ func(error), save func(p []byte, off int64) error) (s taken, err error) {
	if !last {
		return s, nil
	}
	if s.sequence, s.blob, err = shm.Noted(t.h.ctl); err != nil {
		return s, err
	}
	s.fresh, s.at = true, time.Now()
	l := t.h.layout
	for off := int64(0); off < l.Size; off += l.Chunk {
		if err := ctx.Err(); err != nil {
			return s, err
		}
		if err := save(t.h.mem[off:min(off+l.Chunk, l.Size)], off); err != nil {
			return s, nil // the caller has the error
		}
	}
	return s, nil
}

func (t *exitTaker) saved(bool)   {}
func (t *exitTaker) close() error { return nil }

// queueTaker is mode queue: a copy of the region that follows the client's stream.
type queueTaker struct {
	l shm.Layout

	mu       sync.Mutex // of all
	reader   *shm.QueueReader
	own      []byte
	dirty    []bool // chunks of own that differ from the last state that was handed over
	inFlight []bool // those of that state, while it is not known whether it was saved
	fresh    bool   // own is another state than that
	whole    bool   // own is a state
	at       time.Time
}

func newQueueTaker(h *Host) (*queueTaker, error) {
	n := region.Chunks(h.layout.Size, h.layout.Chunk)
	t := &queueTaker{l: h.layout, own: make([]byte, h.layout.Size), dirty: make([]bool, n), inFlight: make([]bool, n), whole: true}
	copy(t.own, h.mem)
	var err error
	t.reader, err = shm.NewQueueReader(h.layout, h.ctl, h.mem, t.own, func(off, n int64) {
		for idx := off / t.l.Chunk; idx*t.l.Chunk < off+n; idx++ {
			t.dirty[idx] = true
		}
	})
	return t, err
}

func (t *queueTaker) follow() (starved bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.poll()
}

func (t *queueTaker) poll() (starved bool, err error) {
	moved, starved, err := t.reader.Poll()
	switch {
	case err != nil:
	case starved:
		t.whole = false
	case moved:
		t.whole, t.fresh, t.at = true, true, time.Now()
	}
	return starved, err
}

// resyncs is how often a take tries to get a state of a client that is faster.
const resyncs = 8

func (t *queueTaker) take(ctx context.Context, _ bool, _ func(error), save func(p []byte, off int64) error) (s taken, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for range resyncs {
		starved, err := t.poll()
		if err != nil {
			return s, err
		}
		if starved {
			s.starved++
		}
		if t.whole || ctx.Err() != nil {
			break
		}
	}
	if !t.whole || !t.fresh {
		return s, ctx.Err()
	}
	s.fresh, s.sequence, s.blob, s.at = true, t.reader.Sequence, t.reader.Blob, t.at
	t.fresh = false
	t.dirty, t.inFlight = t.inFlight, t.dirty // the former is clear
	for idx, d := range t.inFlight {
		if lo := int64(idx) * t.l.Chunk; d {
			if err := save(t.own[lo:min(lo+t.l.Chunk, t.l.Size)], lo); err != nil {
				return s, nil // the caller has the error
			}
		}
	}
	return s, nil
}

func (t *queueTaker) saved(ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for idx, d := range t.inFlight {
		if d && !ok {
			t.dirty[idx], t.fresh = true, true
		}
	}
	clear(t.inFlight)
}

func (t *queueTaker) close() error { return nil }

// tripleTaker is mode triple.
type tripleTaker struct {
	reader *shm.TripleReader
	owed   bool // the state in hand was not saved
}

func (t *tripleTaker) follow() (bool, error) { return false, nil }

func (t *tripleTaker) take(_ context.Context, _ bool, _ func(error), save func(p []byte, off int64) error) (s taken, err error) {
	fresh, err := t.reader.Take()
	if err != nil || !fresh && !t.owed {
		return s, err
	}
	t.owed = true
	s.fresh, s.at = true, time.Now()
	if s.sequence, s.blob, err = t.reader.State(); err != nil {
		return s, err
	}
	_ = t.reader.Changed(save) // the caller has the error
	return s, nil
}

func (t *tripleTaker) saved(ok bool) {
	if ok && t.owed {
		t.reader.Saved()
		t.owed = false
	}
}

func (t *tripleTaker) close() error { return nil }
