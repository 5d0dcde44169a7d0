// Package drpc is the transport over dRPC (storj.io/drpc): one call at a time on a
// connection, so that requests that are under way together need as many
// connections; or all of them on one stream. Messages are protocol buffers
// (rpc/region.proto), which are written and read by hand.
package drpc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"storj.io/drpc"
	"storj.io/drpc/drpcconn"
	"storj.io/drpc/drpcmanager"
	"storj.io/drpc/drpcserver"
	"storj.io/drpc/drpcstream"
	"storj.io/drpc/drpcwire"

	"memsync/strategies/region"
	"memsync/strategies/transport"
	"memsync/strategies/transport/rpc"
)

const (
	callMethod = "/memsync.Region/Call"
	pipeMethod = "/memsync.Region/Calls"
	maxMessage = rpc.MaxData + rpc.MaxHead
)

// Transport is dRPC as a transport.Transport. The zero value is ready, without TLS.
type Transport struct{ TLS transport.TLS }

var _ transport.Transport = (*Transport)(nil)

// Name is "drpc".
func (*Transport) Name() string { return "drpc" }

// manager are the settings of both sides. A call that is given up does not cost
// the connection.
func manager() drpcmanager.Options {
	return drpcmanager.Options{
		WriterBufferSize: 64 << 10, SoftCancel: true,
		Reader: drpcwire.ReaderOptions{MaximumBufferSize: maxMessage + 64<<10},
		Stream: drpcstream.Options{SplitSize: 64 << 10, MaximumBufferSize: 1 << 20},
	}
}

// Open implements transport.Transport: two round trips, one more with TLS.
func (t *Transport) Open(ctx context.Context, d transport.Dialer, o transport.Options) (region.Store, error) {
	set := rpc.Settings{Name: "dRPC", Connections: 16, Calls: 1, MaxCalls: 1}
	stream := o.Stream || o.Together
	if stream {
		set = rpc.Settings{Name: "dRPC", Connections: 2, Calls: rpc.SessionCalls}
	}
	c, err := rpc.Open(ctx, o, set, func(ctx context.Context) (rpc.Conn, error) { return t.dial(ctx, d, stream) })
	if err != nil {
		return nil, err
	}
	return c, nil
}

func (t *Transport) dial(ctx context.Context, d transport.Dialer, stream bool) (rpc.Conn, error) {
	one := func(ctx context.Context) (*drpcconn.Conn, error) {
		nc, err := rpc.Dial(ctx, d, t.TLS, "memsync-drpc")
		if err != nil {
			return nil, err
		}
		return drpcconn.NewWithOptions(nc, drpcconn.Options{Manager: manager()}), nil
	}
	c, err := one(ctx)
	if err != nil {
		return nil, err
	}
	if !stream {
		return &conn{dial: one, c: c}, nil
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx)) // the stream outlives its opening
	s, err := c.NewStream(ctx, pipeMethod, encoding{})
	if err != nil {
		cancel()
		_ = c.Close()
		return nil, rpc.Gone(ctx, err)
	}
	return rpc.NewPipe(&pipe{s: s, cancel: cancel, c: c}), nil
}

// conn is one connection, with a call for each request. A call that is given up
// in the middle of a message costs the library its connection; the next one makes
// another, and opens the same region there.
type conn struct {
	dial func(ctx context.Context) (*drpcconn.Conn, error)

	mu      sync.Mutex
	c       *drpcconn.Conn
	givenUp bool // a call was, on c
	closed  bool
	open    rpc.Request // the first
	opened  rpc.Reply
}

// current returns the connection to use.
func (c *conn) current(ctx context.Context) (*drpcconn.Conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.c.Closed():
	default:
		return c.c, nil
	}
	if !c.givenUp || c.closed {
		return c.c, nil // which says what happened to it
	}
	next, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	var r rpc.Reply
	q := c.open
	if err = next.Invoke(ctx, callMethod, encoding{}, &q, &r); err == nil {
		err = r.Err()
	}
	if err == nil && (r.Size != c.opened.Size || r.Epoch != c.opened.Epoch) {
		err = fmt.Errorf("the region has changed: %w", region.ErrMismatch)
	}
	if err != nil {
		_ = next.Close()
		return nil, err
	}
	c.c, c.givenUp = next, false
	return next, nil
}

// Call implements rpc.Conn.
func (c *conn) Call(ctx context.Context, q *rpc.Request, r *rpc.Reply) error {
	now, err := c.current(ctx)
	if err == nil {
		err = now.Invoke(ctx, callMethod, encoding{}, q, r)
	}
	switch {
	case err == nil && q.Op == rpc.OpOpen:
		c.mu.Lock()
		c.open, c.opened = *q, *r
		c.mu.Unlock()
		return nil
	case err == nil:
		return nil
	case ctx.Err() != nil:
		c.mu.Lock()
		c.givenUp = true
		c.mu.Unlock()
		return ctx.Err()
	case errors.Is(err, rpc.ErrProtocol), drpc.ProtocolError.Has(err):
		return fmt.Errorf("%w: %w", rpc.ErrProtocol, err)
	}
	return rpc.Gone(ctx, err)
}

// Close implements rpc.Conn. The library's goodbye may meet a broken connection.
func (c *conn) Close() error {
	c.mu.Lock()
	c.closed = true
	now := c.c
	c.mu.Unlock()
	_ = now.Close()
	return nil
}

// pipe is one connection's stream.
type pipe struct {
	s      drpc.Stream
	cancel context.CancelFunc
	c      *drpcconn.Conn
}

// Send implements rpc.Stream.
func (p *pipe) Send(q *rpc.Request) error { return p.s.MsgSend(q, encoding{}) }

// Recv implements rpc.Stream.
func (p *pipe) Recv(r *rpc.Reply) error { return p.s.MsgRecv(r, encoding{}) }

// Close implements rpc.Stream.
func (p *pipe) Close() error {
	_ = p.c.Close() // the library's goodbye may meet a broken connection
	p.cancel()
	return nil
}

// Serve implements transport.Transport.
func (t *Transport) Serve(ctx context.Context, nc net.Conn, e transport.Exports) error {
	nc, err := rpc.Secure(ctx, nc, t.TLS, "memsync-drpc")
	if err != nil {
		return err
	}
	w := rpc.Watch(nc)
	s := rpc.NewSession(e, func() { _ = w.Close() })
	defer s.Close()
	defer context.AfterFunc(ctx, func() { _ = w.Close() })()
	err = drpcserver.NewWithOptions(&server{Session: s}, drpcserver.Options{Manager: manager()}).ServeOne(ctx, w)
	_ = w.Close()
	if drpc.ClosedError.Has(err) {
		err = nil
	}
	return rpc.Ended(ctx, "dRPC", err)
}

// server answers the calls of one connection.
type server struct{ *rpc.Session }

// HandleRPC implements drpc.Handler.
func (s *server) HandleRPC(st drpc.Stream, method string) error {
	switch method {
	case callMethod:
		q := new(rpc.Request)
		if err := st.MsgRecv(q, encoding{}); err != nil {
			return err
		}
		free, err := s.Admit(st.Context(), q)
		if err != nil {
			return err
		}
		defer free()
		r := s.Handle(st.Context(), q)
		defer r.Release()
		return st.MsgSend(r, encoding{})
	case pipeMethod:
		err := s.Stream(st.Context(), func(q *rpc.Request) error {
			return st.MsgRecv(q, encoding{})
		}, func(r *rpc.Reply) error { return st.MsgSend(r, encoding{}) })
		if errors.Is(err, io.EOF) {
			return nil
		}
		return err
	}
	return fmt.Errorf("unknown method %.100q: %w", method, rpc.ErrProtocol)
}

// encoding writes and reads messages by hand (drpc.Encoding). What it marshals the
// library copies.
type encoding struct{}

// Marshal implements drpc.Encoding.
func (e encoding) Marshal(m drpc.Message) ([]byte, error) { return e.MarshalAppend(nil, m) }

// MarshalAppend is what the library looks for to use a buffer again (drpcenc).
func (encoding) MarshalAppend(b []byte, m drpc.Message) ([]byte, error) {
	switch m := m.(type) {
	case *rpc.Request:
		return append(m.AppendHead(b), m.Data...), nil
	case *rpc.Reply:
		return append(m.AppendHead(b), m.Data...), nil
	}
	return nil, fmt.Errorf("dRPC encoding: message of type %T", m)
}

// Unmarshal implements drpc.Encoding. b is the library's, for the next message.
func (encoding) Unmarshal(b []byte, m drpc.Message) error {
	switch m := m.(type) {
	case *rpc.Request:
		err := m.Decode(b)
		m.Data = bytes.Clone(m.Data)
		return err
	case *rpc.Reply:
		err := m.Decode(b)
		if m.Into == nil {
			m.Data = bytes.Clone(m.Data)
		}
		return err
	}
	return fmt.Errorf("dRPC encoding: message of type %T", m)
}
