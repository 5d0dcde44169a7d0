// Package jsonrpc is the transport over JSON-RPC 1.0 of the standard library
// (net/rpc/jsonrpc): methods found by reflection, data in base64. It is the class of
// frameworks that trade speed for interfaces that need no generated code.
//
// Source: JSON-RPC 1.0 specification; documentation of net/rpc.
package jsonrpc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/rpc"
	"net/rpc/jsonrpc"

	"memsync/strategies/region"
	"memsync/strategies/transport"
	own "memsync/strategies/transport/rpc"
)

const (
	method = "Region.Call"
	copies = 4 // of a request's data: base64 as it is read and as a value, with room to grow, and the data
)

// messageOf is the length of a message with so many bytes of data, in base64, and what is around it.
func messageOf(data int64) int64 { return data/3*4 + 2*own.MaxHead }

// Transport is JSON-RPC as a transport.Transport. The zero value is ready, without TLS.
type Transport struct{ TLS transport.TLS }

var _ transport.Transport = (*Transport)(nil)

// Name is "jsonrpc".
func (*Transport) Name() string { return "jsonrpc" }

// Open implements transport.Transport: two round trips, one more with TLS.
func (t *Transport) Open(ctx context.Context, d transport.Dialer, o transport.Options) (region.Store, error) {
	if o.Stream {
		return nil, fmt.Errorf("open JSON-RPC region %q: it has no streams: %w", o.Name, region.ErrNotSupported)
	}
	c, err := own.Open(ctx, o, own.Settings{Name: "JSON-RPC", Connections: 2, Calls: own.SessionCalls}, func(ctx context.Context) (own.Conn, error) { return t.dial(ctx, d) })
	if err != nil {
		return nil, err
	}
	return c, nil
}

func (t *Transport) dial(ctx context.Context, d transport.Dialer) (own.Conn, error) {
	nc, err := own.Dial(ctx, d, t.TLS, "memsync-jsonrpc")
	if err != nil {
		return nil, err
	}
	l := &own.Limited{R: nc, Most: messageOf(own.MaxData)}
	return &conn{rpc.NewClientWithCodec(clientCodec{jsonrpc.NewClientCodec(limitedConn{nc, l}), l})}, nil
}

// limitedConn is a connection that is read through l.
type limitedConn struct {
	net.Conn
	l *own.Limited
}

func (c limitedConn) Read(p []byte) (int, error) { return c.l.Read(p) }

// clientCodec bounds each reply.
type clientCodec struct {
	rpc.ClientCodec
	l *own.Limited
}

func (c clientCodec) ReadResponseHeader(r *rpc.Response) error {
	c.l.Next()
	return c.ClientCodec.ReadResponseHeader(r)
}

// conn is one connection.
type conn struct{ *rpc.Client }

// Call implements rpc.Conn. The library's own reply is copied when it is there, so
// that what comes late goes nowhere.
func (c *conn) Call(ctx context.Context, q *own.Request, r *own.Reply) error {
	mine := *q
	mine.Data = bytes.Clone(q.Data) // may be sent after the caller has left
	got := new(own.Reply)
	sent := make(chan *rpc.Call, 1)
	done := make(chan *rpc.Call, 1)
	go func() { sent <- c.Go(method, &mine, got, done) }() // sending may block as long as the peer does not read
	select {
	case <-sent:
	case <-ctx.Done():
		return ctx.Err()
	}
	var call *rpc.Call
	select {
	case call = <-done:
	case <-ctx.Done():
		return ctx.Err()
	}
	var remote rpc.ServerError
	switch {
	case errors.As(call.Error, &remote):
		return fmt.Errorf("%w: %w", own.ErrProtocol, call.Error)
	case call.Error != nil:
		return own.Gone(ctx, call.Error)
	}
	into := r.Into
	*r = *got
	r.Into = into
	if into != nil && r.Status == own.StatusOK {
		if len(r.Data) != len(into) {
			return fmt.Errorf("%d bytes of data where %d were asked for: %w", len(r.Data), len(into), own.ErrProtocol)
		}
		copy(into, r.Data)
		r.Data = into
	}
	return nil
}

// Close implements rpc.Conn.
func (c *conn) Close() error {
	if err := c.Client.Close(); err != nil && err != rpc.ErrShutdown {
		return err
	}
	return nil
}

// Serve implements transport.Transport.
func (t *Transport) Serve(ctx context.Context, nc net.Conn, e transport.Exports) error {
	nc, err := own.Secure(ctx, nc, t.TLS, "memsync-jsonrpc")
	if err != nil {
		return err
	}
	in := own.NewInbound(nc)
	w := own.Watch(in)
	s := own.NewSession(ctx, e, own.SessionOptions{In: in, Copies: copies, Who: own.Identity(nc)}, func() { _ = w.Close() })
	defer s.Close()
	work, cancel := context.WithCancel(ctx)
	defer cancel()
	srv := rpc.NewServer() // its own for each connection: what it may do is the connection's
	if err := srv.RegisterName("Region", &Region{work, s}); err != nil {
		return errors.Join(err, w.Close())
	}
	defer context.AfterFunc(ctx, func() { _ = w.Close() })()
	l := &own.Limited{R: w, Most: messageOf(own.Most(ctx))}
	c := &serverCodec{ServerCodec: jsonrpc.NewServerCodec(limitedConn{w, l}), l: l, ctx: work, s: s, places: make(chan struct{}, s.Calls()), cancel: cancel}
	srv.ServeCodec(c)
	_ = w.Close()
	return own.Ended(ctx, "JSON-RPC", c.err)
}

// Region is what net/rpc finds by reflection.
type Region struct {
	ctx context.Context // of the connection
	s   *own.Session
}

// Call answers one request. The library writes the reply later (serverCodec.WriteResponse).
func (g *Region) Call(q *own.Request, r *own.Reply) error {
	*r = *g.s.Handle(g.ctx, q)
	r.After(q.Free)
	return nil
}

// serverCodec bounds each request, and their number: the library starts a goroutine
// for each.
type serverCodec struct {
	rpc.ServerCodec
	l      *own.Limited
	ctx    context.Context
	s      *own.Session
	places chan struct{}
	cancel context.CancelFunc // of what the connection's requests do
	err    error
}

func (c *serverCodec) ReadRequestHeader(r *rpc.Request) error {
	c.places <- struct{}{} // given back by WriteResponse, which the library calls for every request it has read
	c.l.Next()
	err := c.ServerCodec.ReadRequestHeader(r)
	if err != nil {
		<-c.places
		c.cancel()
		if err != io.EOF {
			c.err = err
		}
	}
	return err
}

// ReadRequestBody implements rpc.ServerCodec. No more is read until there is memory for the request.
func (c *serverCodec) ReadRequestBody(body any) error {
	if err := c.ServerCodec.ReadRequestBody(body); err != nil {
		return err
	}
	q, ok := body.(*own.Request)
	if !ok {
		return nil // of a method that there is not
	}
	var err error
	q.Free, err = c.s.Admit(c.ctx, q)
	return err
}

func (c *serverCodec) WriteResponse(r *rpc.Response, body any) error {
	defer func() { <-c.places }()
	if reply, ok := body.(*own.Reply); ok {
		defer reply.Release()
	}
	return c.ServerCodec.WriteResponse(r, body)
}
