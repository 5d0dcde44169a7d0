package rpc

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"

	"memsync/strategies/region"
	"memsync/strategies/transport"
	"memsync/strategies/transport/flow"
)

const (
	sessionMemory = 16 << 20 // bytes of data of one connection that are under way
	requestWeight = 64 << 10 // what a request counts for at least
	// SessionCalls is how many requests of one connection a source works at together.
	SessionCalls = 64
)

// Session is the source's side of one connection: a region, once it is open, and
// what its peer may do with it. Its methods may be called concurrently.
type Session struct {
	exports transport.Exports
	memory  *semaphore.Weighted
	buffers flow.Buffers

	silent *time.Timer // closes a connection that opens nothing

	mu    sync.Mutex
	open  atomic.Pointer[opened]
	ended bool
}

type opened struct {
	store  region.Store
	viewer region.Viewer
	grant  *transport.Grant // nil where the exports have no leases
	ro     bool
}

// NewSession begins the source's side of a connection that may open one of e. hangUp
// is called where it has opened none within HandshakeTimeout.
func NewSession(e transport.Exports, hangUp func()) *Session {
	return &Session{exports: e, memory: semaphore.NewWeighted(sessionMemory), silent: time.AfterFunc(HandshakeTimeout, hangUp)}
}

// Close gives up the lease to write. Requests must have ended.
func (s *Session) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
	s.silent.Stop()
	if o := s.open.Load(); o != nil {
		o.grant.End()
	}
}

// Handle carries out one request and returns its reply, which must be released
// once it is sent. It blocks while more than 16 MiB of data are under way.
func (s *Session) Handle(ctx context.Context, q *Request) *Reply {
	r := &Reply{ID: q.ID}
	if err := s.handle(ctx, q, r); err != nil {
		r.Release()
		*r = Reply{ID: q.ID}
		if ctx.Err() != nil { // the source ends, or nobody waits
			err = fmt.Errorf("%w: %w", err, region.ErrPeerGone)
		}
		r.refuse(err)
	}
	return r
}

func (s *Session) handle(ctx context.Context, q *Request, r *Reply) error {
	if q.Op == OpOpen {
		return s.opening(q, r)
	}
	o := s.open.Load()
	if o == nil {
		return fmt.Errorf("%v before a region is open: %w", q.Op, ErrProtocol)
	}
	if err := region.CheckRange(q.Off, q.Length, o.store.Size()); err != nil {
		return err
	}
	if q.Op == OpWrite && q.Length != int64(len(q.Data)) || q.Op != OpWrite && len(q.Data) > 0 {
		return fmt.Errorf("%v of %d bytes with %d bytes of data: %w", q.Op, q.Length, len(q.Data), ErrProtocol)
	}
	if (q.Op == OpRead || q.Op == OpWrite) && q.Length > MaxData {
		return fmt.Errorf("%v of %d bytes, the limit is %d: %w", q.Op, q.Length, MaxData, ErrProtocol)
	}
	if q.Op.writes() {
		if o.ro {
			return region.ErrReadOnly
		}
		end, err := o.grant.Begin()
		if err != nil {
			return err
		}
		defer end()
	}
	switch q.Op {
	case OpRead:
		return s.read(ctx, o, q, r)
	case OpWrite:
		return o.store.WriteAt(ctx, q.Data, q.Off)
	case OpFlush:
		return o.store.Flush(ctx)
	case OpTrim:
		if t, ok := o.store.(region.Trimmer); ok {
			return t.Trim(ctx, q.Off, q.Length)
		}
	case OpZero:
		if z, ok := o.store.(region.Zeroer); ok {
			return z.WriteZeroes(ctx, q.Off, q.Length, q.Hole)
		}
	case OpCache:
		if c, ok := o.store.(region.Cacher); ok {
			return c.Cache(ctx, q.Off, q.Length)
		}
	case OpExtents:
		if e, ok := o.store.(region.Extenter); ok {
			runs, err := e.Extents(ctx, q.Off, q.Length)
			r.Extents = runs[:min(len(runs), maxRuns)]
			return err
		}
	}
	return fmt.Errorf("%v: %w", q.Op, region.ErrNotSupported)
}

// Admit waits for the memory of a request that is about to be received or
// answered. free gives it back.
func (s *Session) Admit(ctx context.Context, q *Request) (free func(), err error) {
	n := int64(requestWeight)
	if q.Op == OpRead || q.Op == OpWrite {
		n = max(n, min(q.Length, MaxData))
	}
	if err := s.memory.Acquire(ctx, n); err != nil {
		return nil, err
	}
	return func() { s.memory.Release(n) }, nil
}

// Buffer lends n bytes, at most MaxData, for the data of a request.
func (s *Session) Buffer(n int) (p []byte, put func()) {
	b := s.buffers.Get(n)
	return *b, func() { s.buffers.Put(b) }
}

func (s *Session) read(ctx context.Context, o *opened, q *Request, r *Reply) error {
	if q.Length == 0 {
		return nil
	}
	if o.viewer != nil {
		if p, ok := o.viewer.View(q.Off, q.Length); ok {
			r.Data = p
			return nil
		}
	}
	r.Data, r.release = s.Buffer(int(q.Length))
	return o.store.ReadAt(ctx, r.Data, q.Off)
}

// opening answers OpOpen, which a connection may ask for once.
func (s *Session) opening(q *Request, r *Reply) (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open.Load() != nil || s.ended {
		return fmt.Errorf("a second open on one connection: %w", ErrProtocol)
	}
	o := &opened{}
	if o.store, err = s.exports.Open(q.Name); err != nil {
		return err
	}
	if b, ok := o.store.(region.Blocker); ok && b.Blocks().Minimum > 1 {
		return fmt.Errorf("the region must be read in blocks of %d bytes: %w", b.Blocks().Minimum, region.ErrNotSupported)
	}
	o.viewer, _ = o.store.(region.Viewer)
	if w, ok := o.store.(region.ReadOnlyer); ok {
		o.ro = w.ReadOnly()
	}
	if l, ok := s.exports.(transport.Leaser); ok {
		if o.grant, err = l.Lease(q.Name, q.Writer); err != nil {
			return err
		}
	}
	r.Size, r.ReadOnly = o.store.Size(), o.ro
	if q.Writer != "" {
		r.Epoch = o.grant.Epoch()
	}
	offer := func(op Op, ok bool) {
		if ok {
			r.Offers |= 1 << op
		}
	}
	_, ok := o.store.(region.Trimmer)
	offer(OpTrim, ok)
	_, ok = o.store.(region.Zeroer)
	offer(OpZero, ok)
	_, ok = o.store.(region.Cacher)
	offer(OpCache, ok)
	_, ok = o.store.(region.Extenter)
	offer(OpExtents, ok)
	s.silent.Stop()
	s.open.Store(o)
	return nil
}

// Stream answers requests that recv gives, SessionCalls at a time, by send, until
// recv fails. Its error is recv's or send's; io.EOF is for the caller to judge.
// recv must fill a Request whose Data stay valid until its reply is sent.
func (s *Session) Stream(ctx context.Context, recv func(*Request) error, send func(*Reply) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var sending sync.Mutex
	var work sync.WaitGroup
	defer work.Wait()
	places := make(chan struct{}, SessionCalls)
	for {
		q := new(Request)
		if err := recv(q); err != nil {
			cancel(err)
			return errors.Join(err, cause(ctx, err))
		}
		select {
		case places <- struct{}{}:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		free, err := s.Admit(ctx, q)
		if err != nil {
			return context.Cause(ctx)
		}
		work.Go(func() {
			defer func() { <-places }()
			defer free()
			r := s.Handle(ctx, q)
			sending.Lock()
			err := send(r)
			sending.Unlock()
			r.Release()
			if err != nil {
				cancel(err)
			}
		})
	}
}

// cause is what ended ctx where that was not err itself.
func cause(ctx context.Context, err error) error {
	if c := context.Cause(ctx); c != nil && c != err {
		return c
	}
	return nil
}
