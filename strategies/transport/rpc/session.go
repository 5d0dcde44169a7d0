package rpc

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"memsync/strategies/region"
	"memsync/strategies/transport"
	"memsync/strategies/transport/flow"
)

const (
	requestWeight = 64 << 10 // what a request counts for at least
	// SessionCalls is how many requests of one connection a source works at together
	// at most.
	SessionCalls = 64
	// NarrowCalls is how many where the peer has more connections than there is memory for.
	NarrowCalls = 4
	// LaneMemory is what SessionCalls requests that nobody has looked at may take.
	LaneMemory = SessionCalls * 64 << 10

	// StreamWindow is what a library receives of a request that nobody has admitted yet,
	// where its requests are streams of their own with flow control.
	StreamWindow = 72 << 10
)

// Session is the source's side of one connection: a region, once it is open, and
// what its peer may do with it. Its methods may be called concurrently.
type Session struct {
	exports transport.Exports
	who     func() string
	place   *transport.Place
	in      *Inbound // nil where a library has flow control of its own
	most    int64    // bytes of data in one request
	copies  int64    // of a request's data that the library makes
	calls   int
	lane    func() // gives back what calls takes of the memory; nil where that is nothing
	buffers flow.Buffers

	silent *time.Timer // closes a connection that opens nothing
	idle   *time.Timer // closes one that asks for nothing; nil where it may
	busy   atomic.Int64

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

// SessionOptions say how the library of a transport goes about memory.
type SessionOptions struct {
	In     *Inbound // the connection that it reads; nil where each request is a stream with flow control
	Copies int64    // of a request's data that it makes; 0 is 1
	// Who returns the name that the peer's certificate gives it, "" without one. It is
	// asked when the peer opens a region, and so after its part of a handshake.
	Who func() string
}

// NewSession begins the source's side of a connection that may open one of e, with the
// limits of its Place (transport.PlaceOf). hangUp is called, once or more, where it has
// opened no region in time, or asks for nothing for too long.
func NewSession(ctx context.Context, e transport.Exports, o SessionOptions, hangUp func()) *Session {
	p := transport.PlaceOf(ctx)
	l := p.Limits()
	s := &Session{exports: e, who: o.Who, place: p, in: o.In, most: Most(ctx), copies: max(o.Copies, 1), calls: SessionCalls, silent: time.AfterFunc(l.Handshake, hangUp)}
	if l.Idle > 0 {
		s.idle = time.AfterFunc(l.Idle, func() {
			if s.busy.Load() == 0 {
				hangUp()
			}
		})
	}
	if s.in != nil {
		s.Hold(ctx, s.in)
	} else if s.lane = p.TryAhead(LaneMemory); s.lane == nil {
		s.calls = NarrowCalls // the peer has several connections already
	}
	return s
}

// Hold makes the session hold its peer to what there is memory for, by the connection
// that its library reads. From here on requests come one after another.
func (s *Session) Hold(ctx context.Context, in *Inbound) {
	s.in = in
	in.begin(ctx, s.place, s.most*s.copies+MaxHead)
}

// Most is the most bytes of data in one request of a connection that is served with
// ctx: 1 MiB, unless the Limits say more or less.
func Most(ctx context.Context) int64 {
	p := transport.PlaceOf(ctx)
	if p.Limits().Request == 0 {
		return defaultMessage
	}
	return p.Request(MaxData)
}

// Most is the most bytes of data in one request.
func (s *Session) Most() int64 { return s.most }

// Calls is how many requests of the connection may be under way.
func (s *Session) Calls() int { return s.calls }

// Close gives up the lease to write. Requests must have ended.
func (s *Session) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
	s.silent.Stop()
	if s.idle != nil {
		s.idle.Stop()
	}
	if s.lane != nil {
		s.lane()
		s.lane = nil
	}
	if s.in != nil {
		s.in.end()
	}
	if o := s.open.Load(); o != nil {
		o.grant.End()
	}
}

// Handle carries out one request and returns its reply, which must be released
// once it is sent.
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
	if (q.Op == OpRead || q.Op == OpWrite) && q.Length > s.most {
		return fmt.Errorf("%v of %d bytes, the limit is %d: %w", q.Op, q.Length, s.most, ErrProtocol)
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

// Admit waits for the memory of a request that was received, or is about to be, and
// will be answered. free gives it back.
func (s *Session) Admit(ctx context.Context, q *Request) (free func(), err error) {
	n := int64(requestWeight)
	if q.Op == OpRead || q.Op == OpWrite {
		n = max(n, min(max(q.Length, 0), s.most)*s.copies)
	}
	s.busy.Add(1)
	give, err := s.place.Work(ctx, n)
	if s.in != nil {
		s.in.delivered(int64(len(q.Data)) * 3 / 2) // base64 has a third more
	}
	if err != nil {
		s.rest()
		return nil, err
	}
	return func() { give(); s.rest() }, nil
}

// rest ends a request, and begins to count the time without one.
func (s *Session) rest() {
	if s.busy.Add(-1) == 0 && s.idle != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		if !s.ended {
			s.idle.Reset(s.place.Limits().Idle)
		}
	}
}

// Turn waits for the memory of a request that is about to be received whole, however
// long it is, and then for that of Admit. hangUp is called where the request is not
// there in time.
func (s *Session) Turn(ctx context.Context, q *Request, recv func() error, hangUp func()) (free func(), err error) {
	give, err := s.place.Receive(ctx, s.most+MaxHead)
	if err != nil {
		return nil, err
	}
	defer give()
	late := time.AfterFunc(s.place.Limits().Stall, hangUp)
	err = recv()
	late.Stop()
	if err != nil {
		return nil, err
	}
	return s.Admit(ctx, q)
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
	exports := transport.As(s.exports, s.who())
	if o.store, err = exports.Open(q.Name); err != nil {
		return err
	}
	if b, ok := o.store.(region.Blocker); ok && b.Blocks().Minimum > 1 {
		return fmt.Errorf("the region must be read in blocks of %d bytes: %w", b.Blocks().Minimum, region.ErrNotSupported)
	}
	o.viewer, _ = o.store.(region.Viewer)
	if w, ok := o.store.(region.ReadOnlyer); ok {
		o.ro = w.ReadOnly()
	}
	if l, ok := exports.(transport.Leaser); ok {
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

// Stream answers requests that recv gives, Calls at a time, by send, until
// recv fails. Its error is recv's or send's; io.EOF is for the caller to judge.
// recv must fill a Request whose Data stay valid until its reply is sent.
func (s *Session) Stream(ctx context.Context, recv func(*Request) error, send func(*Reply) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var sending sync.Mutex
	var work sync.WaitGroup
	defer work.Wait()
	places := make(chan struct{}, s.calls)
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
