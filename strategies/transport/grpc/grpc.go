// Package grpc is the transport over gRPC (google.golang.org/grpc): a call for each
// request, or all of them on one stream. Messages are protocol buffers
// (rpc/region.proto), which a codec of ours puts into buffers without a copy.
//
// Source: doc/PROTOCOL-HTTP2.md of the gRPC project.
package grpc

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"

	"memsync/strategies/region"
	"memsync/strategies/transport"
	"memsync/strategies/transport/rpc"
)

const (
	service    = "memsync.Region"
	callMethod = "/" + service + "/Call"
	pipeMethod = "/" + service + "/Calls"
	maxMessage = rpc.MaxData + rpc.MaxHead

	// Flow control. What a source lets a client send before it is read is bounded by
	// a window for each of its calls; the rest of a request waits for its memory.
	serverWindow = rpc.StreamWindow
	clientWindow = 8 << 20
	connWindow   = 64 << 20
	keepAlive    = 30 * time.Second // then a lost peer is known after another of it
)

// Transport is gRPC as a transport.Transport. The zero value is ready, without TLS.
type Transport struct{ TLS transport.TLS }

var _ transport.Transport = (*Transport)(nil)

// Name is "grpc".
func (*Transport) Name() string { return "grpc" }

// Open implements transport.Transport: three round trips, one more with TLS.
func (t *Transport) Open(ctx context.Context, d transport.Dialer, o transport.Options) (region.Store, error) {
	c, err := rpc.Open(ctx, o, rpc.Settings{Name: "gRPC", Connections: 2, Calls: rpc.SessionCalls},
		func(ctx context.Context) (rpc.Conn, error) { return t.dial(ctx, d, o.Stream) })
	if err != nil {
		return nil, err
	}
	return c, nil
}

func (t *Transport) dial(ctx context.Context, d transport.Dialer, stream bool) (rpc.Conn, error) {
	nc, err := rpc.Dial(ctx, d, t.TLS, "h2")
	if err != nil {
		return nil, err
	}
	// The library would dial again by itself. A new connection is a new session, of
	// which the Store's user must know: it has this one connection and no other.
	var given atomic.Bool
	once := func(context.Context, string) (net.Conn, error) {
		if given.Swap(true) {
			return nil, region.ErrPeerGone
		}
		return nc, nil
	}
	cc, err := grpc.NewClient("passthrough:///source", grpc.WithContextDialer(once), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithNoProxy(), grpc.WithDisableRetry(), grpc.WithDisableServiceConfig(), grpc.WithIdleTimeout(0),
		grpc.WithInitialWindowSize(clientWindow), grpc.WithInitialConnWindowSize(connWindow),
		grpc.WithReadBufferSize(128<<10), grpc.WithWriteBufferSize(128<<10),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepAlive, Timeout: keepAlive, PermitWithoutStream: true}),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(codec{}), grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)))
	if err != nil {
		nc.Close()
		return nil, err
	}
	c := &conn{cc: cc, nc: nc, given: &given}
	if !stream {
		return c, nil
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx)) // the stream outlives its opening
	s, err := cc.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, pipeMethod)
	if err != nil {
		cancel()
		return nil, errAndClose(rpc.Gone(ctx, err), c)
	}
	return rpc.NewPipe(&pipe{s, cancel, c}), nil
}

func errAndClose(err error, c *conn) error {
	_ = c.Close()
	return err
}

// conn is one connection, with a call for each request.
type conn struct {
	cc    *grpc.ClientConn
	nc    net.Conn
	given *atomic.Bool
}

// Call implements rpc.Conn.
func (c *conn) Call(ctx context.Context, q *rpc.Request, r *rpc.Reply) error {
	// Without its deadline, of which the source would hear, and answer before it has ended here.
	call, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(ctx, cancel)()
	err := c.cc.Invoke(call, callMethod, q, r)
	switch status.Code(err) {
	case codes.OK:
		return nil
	case codes.ResourceExhausted, codes.Unimplemented, codes.Internal:
		if ctx.Err() == nil {
			return fmt.Errorf("%w: %w", rpc.ErrProtocol, err)
		}
	}
	return rpc.Gone(ctx, err)
}

// Close implements rpc.Conn.
func (c *conn) Close() error {
	err := c.cc.Close()
	if !c.given.Swap(true) {
		_ = c.nc.Close() // the library never took it
	}
	return err
}

// pipe is one connection's stream.
type pipe struct {
	grpc.ClientStream
	cancel context.CancelFunc
	c      *conn
}

// Send implements rpc.Stream.
func (p *pipe) Send(q *rpc.Request) error { return p.SendMsg(q) }

// Recv implements rpc.Stream.
func (p *pipe) Recv(r *rpc.Reply) error { return p.RecvMsg(r) }

// Close implements rpc.Stream.
func (p *pipe) Close() error {
	p.cancel()
	return p.c.Close()
}

// Serve implements transport.Transport.
func (t *Transport) Serve(ctx context.Context, nc net.Conn, e transport.Exports) error {
	nc, err := rpc.Secure(ctx, nc, t.TLS, "h2")
	if err != nil {
		return err
	}
	in := rpc.NewInbound(nc)
	w := rpc.Watch(in)
	hangUp := func() { _ = w.Close() }
	s := &server{Session: rpc.NewSession(ctx, e, rpc.SessionOptions{Who: rpc.Identity(nc)}, hangUp), in: in, hangUp: hangUp}
	defer s.Close()
	message := int(rpc.Most(ctx) + rpc.MaxHead)
	// Each connection has a server of its own: what it may do is the connection's.
	g := grpc.NewServer(grpc.ForceServerCodecV2(codec{}), grpc.MaxRecvMsgSize(message), grpc.MaxSendMsgSize(maxMessage),
		grpc.MaxConcurrentStreams(uint32(s.Calls())), grpc.InitialWindowSize(serverWindow), grpc.InitialConnWindowSize(connWindow),
		grpc.ReadBufferSize(32<<10), grpc.WriteBufferSize(128<<10), grpc.MaxHeaderListSize(8<<10),
		grpc.ConnectionTimeout(transport.PlaceOf(ctx).Limits().Handshake), grpc.WaitForHandlers(true),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: keepAlive, Timeout: keepAlive}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: keepAlive / 2, PermitWithoutStream: true}))
	g.RegisterService(&description, s)
	defer context.AfterFunc(ctx, hangUp)()
	err = g.Serve(w.Listener())
	g.Stop()
	_ = w.Close()
	return rpc.Ended(ctx, "gRPC", err)
}

// server answers the calls of one connection.
type server struct {
	*rpc.Session
	in     *rpc.Inbound
	hangUp func()
	stream atomic.Bool // it has its one stream of requests
}

// description is the service, as RegisterService wants it; it never changes.
var description = grpc.ServiceDesc{
	ServiceName: service,
	HandlerType: (*any)(nil),
	Streams: []grpc.StreamDesc{
		// A unary call on the wire. As a stream, it is received when there is memory for it.
		{StreamName: "Call", Handler: answer},
		{StreamName: "Calls", Handler: answerStream, ServerStreams: true, ClientStreams: true},
	},
}

func answer(srv any, st grpc.ServerStream) error {
	s, q, ctx := srv.(*server), new(rpc.Request), st.Context()
	free, err := s.Turn(ctx, q, func() error { return st.RecvMsg(q) }, s.hangUp)
	if err != nil {
		return err
	}
	m := &sending{Reply: s.Handle(ctx, q), free: free}
	context.AfterFunc(ctx, m.drop) // the call has ended
	return st.SendMsg(m)
}

func answerStream(srv any, st grpc.ServerStream) error {
	s := srv.(*server)
	if s.stream.Swap(true) {
		return status.Error(codes.ResourceExhausted, "a second stream of requests on one connection")
	}
	s.Hold(st.Context(), s.in)
	err := s.Stream(st.Context(), func(q *rpc.Request) error { return st.RecvMsg(q) },
		func(r *rpc.Reply) error { return st.SendMsg(r) })
	if st.Context().Err() != nil {
		return nil
	}
	return err
}

// sending is a reply whose memory is given back when the library has sent it.
type sending struct {
	*rpc.Reply
	free func() // of what was admitted

	mu    sync.Mutex
	taken bool // the library has it, or nobody will
	over  bool
}

// take reports whether the reply still has its bytes, for the library to send.
func (m *sending) take() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	first := !m.taken
	m.taken = true
	return first
}

// drop ends a reply that the library did not take.
func (m *sending) drop() {
	if m.take() {
		m.end()
	}
}

// end gives the memory back.
func (m *sending) end() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.over {
		m.over = true
		m.Release()
		m.free()
	}
}

// codec writes and reads messages by hand (encoding.CodecV2).
type codec struct{}

// Name is the content's subtype: the wire form is that of protocol buffers.
func (codec) Name() string { return "proto" }

// Marshal implements encoding.CodecV2.
func (codec) Marshal(v any) (mem.BufferSlice, error) {
	switch m := v.(type) {
	case *rpc.Request:
		// Copied: the caller may leave and take its bytes back while they wait to be sent.
		head := m.AppendHead(make([]byte, 0, 64+len(m.Data)))
		return mem.BufferSlice{mem.SliceBuffer(append(head, m.Data...))}, nil
	case *rpc.Reply: // of a stream: released as it is handed over
		head := mem.SliceBuffer(m.AppendHead(make([]byte, 0, 64)))
		return mem.BufferSlice{head, mem.Copy(m.Data, mem.DefaultBufferPool())}, nil
	case *sending:
		if !m.take() {
			return nil, context.Canceled
		}
		head := mem.SliceBuffer(m.AppendHead(make([]byte, 0, 64)))
		if mem.IsBelowBufferPoolingThreshold(cap(m.Data)) { // the library would not give it back
			b := mem.BufferSlice{head, mem.Copy(m.Data, mem.DefaultBufferPool())}
			m.end()
			return b, nil
		}
		return mem.BufferSlice{head, mem.NewBuffer(&m.Data, giveBack{m})}, nil // sent from where they are
	}
	return nil, fmt.Errorf("gRPC codec: message of type %T", v)
}

// giveBack is a mem.BufferPool that ends a reply.
type giveBack struct{ m *sending }

// Get is not used by a Buffer.
func (giveBack) Get(n int) *[]byte { b := make([]byte, n); return &b }

// Put is called when the library has written the bytes, or given up.
func (g giveBack) Put(*[]byte) { g.m.end() }

// Unmarshal implements encoding.CodecV2.
func (codec) Unmarshal(data mem.BufferSlice, v any) error {
	switch m := v.(type) {
	case *rpc.Request:
		return m.Decode(data.Materialize())
	case *rpc.Reply:
		if m.Into == nil {
			return m.Decode(data.Materialize())
		}
		b := data.MaterializeToBuffer(mem.DefaultBufferPool())
		defer b.Free()
		return m.Decode(b.ReadOnlyData())
	}
	return fmt.Errorf("gRPC codec: message of type %T", v)
}
