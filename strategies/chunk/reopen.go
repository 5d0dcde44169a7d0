package chunk

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"memsync/strategies/region"
)

// Reopen is a remote store that is opened again when its peer is gone: a read
// or write that fails with region.ErrPeerGone is tried once more on a new
// connection (both can be repeated without harm). Flush is not: what was
// written before it may be lost with the connection. Requests fail with the
// error of opening as long as that fails.
//
// A write that is given up, because its context ends, may still reach the source, and
// there after one that is made later. So the store is opened again after it, too, and
// each opening says which one it is (region.Opening): a source that grants leases then
// takes nothing of the earlier ones any more.
type Reopen struct {
	id   string
	nth  uint64 // opening; under lock
	open func(ctx context.Context) (region.Store, error)
	lost func()
	// again, unless nil, is what a store that was opened again gets to do first, with
	// the epoch known that it is done under.
	again func(ctx context.Context, s region.Store) error
	size  int64
	// epoch of the lease to write, with which it was opened last; 0 is without one.
	epoch atomic.Uint32

	lock   chan struct{} // one token, held while opening
	mu     sync.Mutex
	cur    region.Store // nil while there is none
	closed bool
	ctx    context.Context
	cancel context.CancelFunc
}

var _ region.Store = (*Reopen)(nil)

// OpenAgain opens the store with open and returns it, ready to do so again.
// lost, unless nil, is called after each later opening, before any request is
// made on it.
func OpenAgain(ctx context.Context, open func(ctx context.Context) (region.Store, error), lost func()) (*Reopen, error) {
	id := rand.Text()
	cur, err := open(region.WithOpening(ctx, region.Opening{ID: id, N: 1}))
	if err != nil {
		return nil, err
	}
	if lost == nil {
		lost = func() {}
	}
	r := &Reopen{id: id, nth: 1, open: open, lost: lost, size: cur.Size(), lock: make(chan struct{}, 1), cur: cur}
	r.epoch.Store(epochOf(cur))
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r, nil
}

func epochOf(s region.Store) uint32 {
	if e, ok := s.(region.Epocher); ok {
		return e.Epoch()
	}
	return 0
}

// Epoch implements region.Epocher. It stays the same as long as the source does; one
// that is started anew counts from the beginning.
func (r *Reopen) Epoch() uint32 { return r.epoch.Load() }

// Size implements region.Store.
func (r *Reopen) Size() int64 { return r.size }

// ReadAt implements region.Store.
func (r *Reopen) ReadAt(ctx context.Context, p []byte, off int64) error {
	return r.twice(ctx, func(s region.Store) error { return s.ReadAt(ctx, p, off) })
}

// WriteAt implements region.Store.
func (r *Reopen) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := ctx.Err(); err != nil {
		return err // it has not been sent
	}
	var last region.Store
	err := r.twice(ctx, func(s region.Store) error {
		last = s
		return s.WriteAt(ctx, p, off)
	})
	if err != nil && ctx.Err() != nil && last != nil {
		r.drop(last)
	}
	return err
}

// Flush implements region.Store.
func (r *Reopen) Flush(ctx context.Context) error {
	s, err := r.get(ctx)
	if err != nil {
		return err
	}
	err, gone := r.judge(s, s.Flush(ctx))
	if gone {
		r.drop(s)
	}
	return err
}

// judge reports whether err of a request to s says that the peer is gone. It
// is also where another request found that out and s was closed under this one.
func (r *Reopen) judge(s region.Store, err error) (_ error, gone bool) {
	if !errors.Is(err, region.ErrClosed) || errors.Is(err, region.ErrPeerGone) {
		return err, errors.Is(err, region.ErrPeerGone)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.cur == s {
		return err, false
	}
	return fmt.Errorf("remote region: connection lost to another request: %w", region.ErrPeerGone), true
}

func (r *Reopen) twice(ctx context.Context, do func(region.Store) error) error {
	for attempt := 0; ; attempt++ {
		s, err := r.get(ctx)
		if err != nil {
			return err
		}
		err, gone := r.judge(s, do(s))
		if !gone {
			return err
		}
		r.drop(s)
		if attempt > 0 || ctx.Err() != nil {
			return err
		}
	}
}

// drop closes s unless that was done.
func (r *Reopen) drop(s region.Store) {
	r.mu.Lock()
	mine := r.cur == s
	if mine {
		r.cur = nil
	}
	r.mu.Unlock()
	if mine {
		_ = s.Close() // its connection is broken; nothing more to learn
	}
}

func (r *Reopen) current() (region.Store, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, fmt.Errorf("remote region: %w", region.ErrClosed)
	}
	return r.cur, nil
}

// get returns the open store; one caller opens it, the others wait for that.
func (r *Reopen) get(ctx context.Context) (region.Store, error) {
	if s, err := r.current(); s != nil || err != nil {
		return s, err
	}
	select {
	case r.lock <- struct{}{}:
		defer func() { <-r.lock }()
	case <-ctx.Done():
		return nil, fmt.Errorf("open the remote region again: %w", ctx.Err())
	case <-r.ctx.Done():
		return nil, fmt.Errorf("remote region: %w", region.ErrClosed)
	}
	if s, err := r.current(); s != nil || err != nil {
		return s, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(r.ctx, cancel)()
	r.nth++
	s, err := r.open(region.WithOpening(ctx, region.Opening{ID: r.id, N: r.nth}))
	if err != nil {
		return nil, fmt.Errorf("open the remote region again: %w", err)
	}
	if s.Size() != r.size {
		err := fmt.Errorf("the remote region has %d bytes and had %d: %w", s.Size(), r.size, region.ErrMismatch)
		return nil, errors.Join(err, s.Close())
	}
	// A lower epoch is of a source that was started anew and counts from 1: whether
	// its region is the same is for its version to say (package watch).
	e, ours := epochOf(s), r.epoch.Load()
	if e > ours || e != ours && e != min(ours, 1) {
		err := fmt.Errorf("another host had the lease to write the region meanwhile, number %d, ours was %d: %w", e-1, ours, region.ErrMismatch)
		return nil, errors.Join(err, s.Close())
	}
	r.epoch.Store(e)
	if r.again != nil {
		if err := r.again(ctx, s); err != nil {
			return nil, errors.Join(err, s.Close())
		}
	}
	r.lost()
	r.mu.Lock()
	closed := r.closed
	if !closed {
		r.cur = s
	}
	r.mu.Unlock()
	if closed {
		return nil, errors.Join(fmt.Errorf("remote region: %w", region.ErrClosed), s.Close())
	}
	return s, nil
}

// Close implements region.Store.
func (r *Reopen) Close() error {
	r.mu.Lock()
	s := r.cur
	first := !r.closed
	r.closed, r.cur = true, nil
	r.mu.Unlock()
	r.cancel()
	if !first || s == nil {
		return nil
	}
	return s.Close()
}
