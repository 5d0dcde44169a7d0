package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"memsync/strategies/region"
	"memsync/strategies/transport"
	"memsync/strategies/transport/flow"
)

// HandshakeTimeout bounds the opening of a connection, dialling included.
const HandshakeTimeout = 10 * time.Second

// Conn is one connection to a source.
type Conn interface {
	// Call carries out one request. It may be called concurrently, returns ctx's
	// error soon after ctx ends and does not touch q.Data or r.Into after that. A
	// lost connection gives region.ErrPeerGone. The reply's own Status is not looked at.
	Call(ctx context.Context, q *Request, r *Reply) error
	// Close disconnects and joins what the connection started; calls under way end.
	Close() error
}

// Settings are what a transport decides for its clients.
type Settings struct {
	Name        string // of the transport, in errors
	Connections int    // where the user leaves it open
	Calls       int    // requests under way on one connection, where the user leaves it open
	MaxCalls    int    // the most that the library can do; 0 is no limit
}

// Client is a remote region as a region.Store, over one or more connections.
//
// A request longer than a message goes out in messages, in parallel. At most so
// many requests are under way as the connections take; others wait, first come
// first served. Background requests (region.Prefetch, region.Push) keep to the
// window, and off the first connection where there are several.
// Beside Store it offers what the source has of region.Extenter, Zeroer, Trimmer
// and Cacher, and gives region.ErrNotSupported otherwise.
type Client struct {
	set     Settings
	conns   []Conn
	name    string // of the region
	size    int64
	epoch   uint32
	offers  uint32
	ro      bool
	message int64
	bg      *flow.Window
	first   chan Conn // places for requests on the first connection, where others have theirs
	rest    chan Conn // on the others, or on the only one

	closed atomic.Bool
	done   chan struct{}
}

var (
	_ region.Store      = (*Client)(nil)
	_ region.Extenter   = (*Client)(nil)
	_ region.Zeroer     = (*Client)(nil)
	_ region.Trimmer    = (*Client)(nil)
	_ region.Cacher     = (*Client)(nil)
	_ region.ReadOnlyer = (*Client)(nil)
	_ region.Epocher    = (*Client)(nil)
)

const (
	maxConnections = 16
	maxParallel    = 64      // messages of one request under way
	defaultMessage = 1 << 20 // bytes
	minMessage     = 4 << 10
)

// Open dials, opens the region on each connection and returns it.
func Open(ctx context.Context, o transport.Options, set Settings, dial func(context.Context) (Conn, error)) (_ *Client, err error) {
	describe := func(err error) error {
		if o.Name == "" {
			return fmt.Errorf("open the %s source's region: %w", set.Name, err)
		}
		return fmt.Errorf("open %s region %q: %w", set.Name, o.Name, err)
	}
	n, calls, message := o.Connections, o.Calls, o.Message
	if n == 0 {
		n = set.Connections
	}
	if calls == 0 || o.Together {
		calls = set.Calls
	}
	if message == 0 {
		message = defaultMessage
	}
	switch {
	case n < 1 || n > maxConnections:
		return nil, describe(fmt.Errorf("%d connections, want 1 to %d", n, maxConnections))
	case calls < 1 || calls > SessionCalls:
		return nil, describe(fmt.Errorf("%d requests on a connection, want 1 to %d", calls, SessionCalls))
	case set.MaxCalls > 0 && calls > set.MaxCalls:
		return nil, describe(fmt.Errorf("%d requests on a connection, of which it takes %d: %w", calls, set.MaxCalls, region.ErrNotSupported))
	case message < minMessage || message > MaxData:
		return nil, describe(fmt.Errorf("messages of %d bytes, want %d to %d", message, minMessage, MaxData))
	case o.Window < 0:
		return nil, describe(fmt.Errorf("window of %d bytes", o.Window))
	}
	c := &Client{set: set, name: o.Name, message: message, bg: flow.New(o.Window), done: make(chan struct{})}
	c.conns = make([]Conn, n)
	replies := make([]Reply, n)
	g, gctx := errgroup.WithContext(ctx)
	for i := range n {
		g.Go(func() (err error) {
			ctx, cancel := context.WithTimeout(gctx, HandshakeTimeout)
			defer cancel()
			if c.conns[i], err = dial(ctx); err != nil {
				return err
			}
			if err = c.conns[i].Call(ctx, &Request{Op: OpOpen, Name: o.Name, Writer: transport.WriterOf(ctx, o)}, &replies[i]); err != nil {
				return err
			}
			return replies[i].Err()
		})
	}
	err = g.Wait()
	r := &replies[0]
	for i := range replies {
		if a := &replies[i]; err == nil && (a.Size != r.Size || a.ReadOnly != r.ReadOnly || a.Epoch != r.Epoch || a.Offers != r.Offers) {
			err = fmt.Errorf("connections see regions of %d and %d bytes, leases %d and %d: %w", r.Size, a.Size, r.Epoch, a.Epoch, region.ErrMismatch)
		}
	}
	if err != nil {
		for _, conn := range c.conns {
			if conn != nil {
				_ = conn.Close()
			}
		}
		return nil, describe(err)
	}
	c.size, c.epoch, c.offers, c.ro = r.Size, r.Epoch, r.Offers, r.ReadOnly || o.ReadOnly
	others := c.conns
	if n > 1 {
		others = c.conns[1:]
		c.first = make(chan Conn, calls)
		for range calls {
			c.first <- c.conns[0]
		}
	}
	c.rest = make(chan Conn, calls*len(others))
	for range calls {
		for _, conn := range others {
			c.rest <- conn
		}
	}
	return c, nil
}

// Size implements region.Store.
func (c *Client) Size() int64 { return c.size }

// Epoch implements region.Epocher.
func (c *Client) Epoch() uint32 { return c.epoch }

// ReadOnly implements region.ReadOnlyer.
func (c *Client) ReadOnly() bool { return c.ro }

// Connections is the number of connections in use.
func (c *Client) Connections() int { return len(c.conns) }

// describe says which request err ended.
func (c *Client) describe(q *Request, err error) error {
	if c.closed.Load() && errors.Is(err, region.ErrPeerGone) {
		err = region.ErrClosed
	}
	if q.Op == OpFlush {
		return fmt.Errorf("%s flush: %w", c.set.Name, err)
	}
	return fmt.Errorf("%s %v [%d, +%d): %w", c.set.Name, q.Op, q.Off, q.Length, err)
}

// check begins every request.
func (c *Client) check(ctx context.Context, q *Request) error {
	var err error
	switch {
	case c.closed.Load():
		err = region.ErrClosed
	case q.Op.writes() && c.ro:
		err = region.ErrReadOnly
	default:
		if err = region.CheckRange(q.Off, q.Length, c.size); err == nil {
			return ctx.Err()
		}
	}
	return c.describe(q, err)
}

// place waits for a place on a connection. back gives it back.
func (c *Client) place(ctx context.Context, class region.Class) (conn Conn, back chan Conn, err error) {
	first := c.first
	if class != region.Demand {
		first = nil
	}
	select {
	case conn = <-first:
		return conn, first, nil
	default:
	}
	select {
	case conn = <-first:
		return conn, first, nil
	case conn = <-c.rest:
		return conn, c.rest, nil
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	case <-c.done:
		return nil, nil, region.ErrClosed
	}
}

// call carries out one request that fits a message.
func (c *Client) call(ctx context.Context, q *Request, r *Reply) error {
	conn, back, err := c.place(ctx, region.ClassOf(ctx))
	if err == nil {
		err = conn.Call(ctx, q, r)
		back <- conn
	}
	if err == nil {
		err = r.Err()
	}
	if err == nil && q.Op == OpRead && len(r.Data) != len(r.Into) {
		err = fmt.Errorf("%d bytes of data: %w", len(r.Data), ErrProtocol)
	}
	if err != nil {
		return c.describe(q, err)
	}
	return nil
}

// transfer carries out a read or a write of p.
func (c *Client) transfer(ctx context.Context, op Op, p []byte, off int64) error {
	q := Request{Op: op, Off: off, Length: int64(len(p))}
	if err := c.check(ctx, &q); err != nil || len(p) == 0 {
		return err
	}
	class := region.ClassOf(ctx)
	piece := c.message
	if class != region.Demand {
		piece = min(piece, c.bg.Piece())
	}
	if q.Length <= piece {
		return c.one(ctx, class, op, p, off)
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(maxParallel)
	with := gctx
	if op == OpWrite {
		with = ctx // parts under way are not given up where one fails: they would be written later
	}
	for len(p) > 0 && gctx.Err() == nil {
		part := p[:min(piece, int64(len(p)))]
		at := off
		g.Go(func() error { return c.one(with, class, op, part, at) })
		p, off = p[len(part):], off+int64(len(part))
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return ctx.Err() // before the last part was begun
}

// one carries out one message of a read or a write, within the window.
func (c *Client) one(ctx context.Context, class region.Class, op Op, p []byte, off int64) error {
	q, r := Request{Op: op, Off: off, Length: int64(len(p))}, Reply{}
	if op == OpWrite {
		q.Data = p
	} else {
		r.Into = p
	}
	if class == region.Demand {
		return c.call(ctx, &q, &r)
	}
	if err := c.bg.Acquire(ctx, q.Length); err != nil {
		return c.describe(&q, err)
	}
	began := time.Now()
	err := c.call(ctx, &q, &r)
	took := time.Since(began)
	if err != nil {
		took = 0
	}
	c.bg.Release(q.Length, took)
	return err
}

// ReadAt implements region.Store; one round trip where p is a message or less.
func (c *Client) ReadAt(ctx context.Context, p []byte, off int64) error {
	return c.transfer(ctx, OpRead, p, off)
}

// WriteAt implements region.Store.
func (c *Client) WriteAt(ctx context.Context, p []byte, off int64) error {
	return c.transfer(ctx, OpWrite, p, off)
}

// Flush implements region.Store.
func (c *Client) Flush(ctx context.Context) error { return c.ask(ctx, &Request{Op: OpFlush}, &Reply{}) }

// Trim implements region.Trimmer.
func (c *Client) Trim(ctx context.Context, off, n int64) error {
	return c.ask(ctx, &Request{Op: OpTrim, Off: off, Length: n}, &Reply{})
}

// WriteZeroes implements region.Zeroer.
func (c *Client) WriteZeroes(ctx context.Context, off, n int64, hole bool) error {
	return c.ask(ctx, &Request{Op: OpZero, Off: off, Length: n, Hole: hole}, &Reply{})
}

// Cache implements region.Cacher.
func (c *Client) Cache(ctx context.Context, off, n int64) error {
	return c.ask(ctx, &Request{Op: OpCache, Off: off, Length: n}, &Reply{})
}

// Extents implements region.Extenter.
func (c *Client) Extents(ctx context.Context, off, n int64) ([]region.Extent, error) {
	q, r := &Request{Op: OpExtents, Off: off, Length: n}, &Reply{}
	if err := c.ask(ctx, q, r); err != nil || n == 0 {
		return nil, err
	}
	left := n
	for i := range r.Extents {
		e := &r.Extents[i]
		if e.Length < 1 {
			return nil, c.describe(q, fmt.Errorf("extent of %d bytes: %w", e.Length, ErrProtocol))
		}
		if e.Length >= left {
			e.Length = left
			return r.Extents[:i+1], nil
		}
		left -= e.Length
	}
	if len(r.Extents) == 0 {
		return nil, c.describe(q, fmt.Errorf("no extents: %w", ErrProtocol))
	}
	return r.Extents, nil
}

// ask carries out a request without data.
func (c *Client) ask(ctx context.Context, q *Request, r *Reply) error {
	if err := c.check(ctx, q); err != nil {
		return err
	}
	if q.Op != OpFlush && c.offers&(1<<q.Op) == 0 {
		return c.describe(q, region.ErrNotSupported)
	}
	return c.call(ctx, q, r)
}

// Close implements region.Store. Requests under way end with region.ErrClosed.
func (c *Client) Close() error {
	if c.closed.Swap(true) {
		return nil
	}
	close(c.done)
	var wg sync.WaitGroup
	errs := make([]error, len(c.conns))
	for i, conn := range c.conns {
		wg.Go(func() {
			// The polite end of a connection that is broken already is no error.
			if err := conn.Close(); err != nil && !broken(err) {
				errs[i] = err
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// broken reports whether err is of a connection that its other end has left.
func broken(err error) bool {
	for _, e := range []error{region.ErrPeerGone, net.ErrClosed, io.ErrClosedPipe, syscall.EPIPE, syscall.ECONNRESET, syscall.ETIMEDOUT} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
