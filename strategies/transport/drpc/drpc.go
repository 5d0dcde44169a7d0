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
	"sync/atomic"

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

// manager are the settings of both sides, for messages of at most so many bytes. The
// source learns of a call that is given up.
func manager(message int) drpcmanager.Options {
	return drpcmanager.Options{
		WriterBufferSize: 64 << 10, SoftCancel: true,
		Reader: drpcwire.ReaderOptions{MaximumBufferSize: message + 64<<10},
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
	one := func(ctx context.Context) (*link, error) {
		nc, err := rpc.Dial(ctx, d, t.TLS, "memsync-drpc")
		if err != nil {
			return nil, err
		}
		l := &link{Conn: nc}
		l.rpc = drpcconn.NewWithOptions(l, drpcconn.Options{Manager: manager(maxMessage)})
		return l, nil
	}
	l, err := one(ctx)
	if err != nil {
		return nil, err
	}
	if !stream {
		return newConn(one, l), nil
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx)) // the stream outlives its opening
	s, err := l.rpc.NewStream(ctx, pipeMethod, encoding{})
	if err != nil {
		cancel()
		_ = l.rpc.Close()
		return nil, rpc.Gone(ctx, err)
	}
	return rpc.NewPipe(&pipe{s: s, cancel: cancel, c: l.rpc}), nil
}

// link is a connection to a source, with the library's client on it.
type link struct {
	net.Conn
	rpc  *drpcconn.Conn
	sent atomic.Pointer[chan struct{}] // closed by the next Write
}

// Write implements net.Conn.
func (l *link) Write(p []byte) (int, error) {
	if s := l.sent.Swap(nil); s != nil {
		close(*s)
	}
	return l.Conn.Write(p)
}

// call carries out one request. whole says that ctx did not end meanwhile, so that
// the link may be used again.
//
// The library tells the source of a call that is given up, also where nothing of the
// call was sent yet; after an end without a beginning the source reads nothing more, not
// even the connection's end (v1.0.0, Manager.manageReader). So it hears of ctx once the
// call is on its way, which nothing keeps it from.
func (l *link) call(ctx context.Context, q *rpc.Request, r *rpc.Reply) (whole bool, err error) {
	call, giveUp := context.WithCancel(context.WithoutCancel(ctx))
	defer giveUp()
	sent := make(chan struct{})
	l.sent.Store(&sent)
	stop := context.AfterFunc(ctx, func() {
		select {
		case <-sent:
			giveUp()
		case <-call.Done():
		}
	})
	err = l.rpc.Invoke(call, callMethod, encoding{}, q, r)
	return stop(), err
}

// conn is one connection, with a call for each request. After a call that was given up
// the next one makes another connection and opens the same region there, since the
// library ends the old one, a little later, where it was in the middle of a message. The
// old one is closed when the new one is open, so that a lease to write goes on.
type conn struct {
	dial func(ctx context.Context) (*link, error)
	life context.Context // ends at Close
	end  context.CancelFunc

	// of the one call at a time
	givenUp bool // the one before was
	open    rpc.Request
	opened  rpc.Reply

	mu sync.Mutex
	l  *link
}

func newConn(dial func(ctx context.Context) (*link, error), l *link) *conn {
	c := &conn{dial: dial, l: l}
	c.life, c.end = context.WithCancel(context.Background())
	return c
}

// current returns the connection to use.
func (c *conn) current(ctx context.Context) (*link, error) {
	if !c.givenUp || c.life.Err() != nil {
		return c.l, nil // which says what happened to it
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(c.life, cancel)()
	next, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	var r rpc.Reply
	q := c.open
	whole, err := next.call(ctx, &q, &r)
	if err == nil {
		err = r.Err()
	}
	if err == nil && (r.Size != c.opened.Size || r.Epoch != c.opened.Epoch) {
		err = fmt.Errorf("the region has changed: %w", region.ErrMismatch)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil && c.life.Err() != nil {
		err = region.ErrPeerGone
	}
	if err != nil {
		_ = next.rpc.Close()
		return nil, err
	}
	_ = c.l.rpc.Close()
	c.l, c.givenUp = next, !whole
	return next, nil
}

// Call implements rpc.Conn.
func (c *conn) Call(ctx context.Context, q *rpc.Request, r *rpc.Reply) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	whole := true
	l, err := c.current(ctx)
	if err == nil {
		whole, err = l.call(ctx, q, r)
	}
	if err == nil && q.Op == rpc.OpOpen {
		c.open, c.opened = *q, *r
	}
	c.givenUp = c.givenUp || !whole
	if err != nil && rpc.Over(ctx) == nil && (errors.Is(err, rpc.ErrProtocol) || drpc.ProtocolError.Has(err)) {
		return fmt.Errorf("%w: %w", rpc.ErrProtocol, err)
	}
	if err != nil {
		return rpc.Gone(ctx, err)
	}
	return nil
}

// Close implements rpc.Conn. The library's goodbye may meet a broken connection.
func (c *conn) Close() error {
	c.end()
	c.mu.Lock()
	defer c.mu.Unlock()
	_ = c.l.rpc.Close()
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
	in := rpc.NewInbound(nc)
	w := rpc.Watch(in)
	// The library looks at the context where it does not read (see link.call).
	serving, hangUp := context.WithCancel(ctx)
	defer hangUp()
	s := rpc.NewSession(ctx, e, rpc.SessionOptions{In: in, Copies: 2, Who: rpc.Identity(nc)}, hangUp)
	defer s.Close()
	defer context.AfterFunc(serving, func() { _ = w.Close() })()
	err = drpcserver.NewWithOptions(&server{Session: s}, drpcserver.Options{Manager: manager(int(rpc.Most(ctx) + rpc.MaxHead))}).ServeOne(serving, w)
	_ = w.Close()
	if drpc.ClosedError.Has(err) || serving.Err() != nil {
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
