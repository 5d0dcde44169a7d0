// Package quic is the transport over QUIC (github.com/quic-go/quic-go): one stream a
// request, so that a lost packet holds up the requests whose bytes it had and no
// others. It stands for transports over UDP.
//
// QUIC is never without TLS 1.3. Where no certificates are given, the source makes
// one for itself and the daemon takes any: encrypted, but neither side is sure of
// the other. A daemon that comes back resumes its session and asks before the
// handshake has ended (0-RTT); what changes the source waits for its end, since an
// attacker can repeat early data (RFC 8446, 8).
//
// A message is the length of its head (4 bytes, big endian), its head (a protocol
// buffer, rpc/region.proto) and its data; the stream's end is its end.
//
// Source: RFC 9000, 9001, 9002.
package quic

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"sync"
	"time"

	"github.com/quic-go/quic-go"

	"memsync/strategies/region"
	"memsync/strategies/transport"
	"memsync/strategies/transport/rpc"
)

const (
	protocol = "memsync-quic" // of ALPN
	idle     = 2 * time.Minute
	dropped  = quic.StreamErrorCode(1) // nobody wants the rest of a stream

	// Flow control, in bytes. A stream's window at the source is small until there is
	// memory for its request, which is then read as it comes. A connection's is larger
	// than all such windows together, so that these do not hold up that one.
	serverStreamWindow = 512 << 10
	serverConnMore     = 64 << 10
	clientStreamWindow = 8 << 20
	clientConnWindow   = 64 << 20
)

// Transport is QUIC as a transport.Transport. The zero value is ready. It must not
// be copied once it is in use.
type Transport struct {
	TLS transport.TLS

	once     sync.Once
	sessions tls.ClientSessionCache
	tokens   quic.TokenStore
}

var (
	_ transport.Transport = (*Transport)(nil)
	_ transport.Network   = (*Transport)(nil)
)

// Name is "quic".
func (*Transport) Name() string { return "quic" }

// Conn is a QUIC connection. As a net.Conn it is its first stream from the client,
// for protocols that want one stream of bytes.
type Conn struct {
	q      *quic.Conn
	client bool
	early  gate
	closed func() // gives the socket back

	mu     sync.Mutex
	stream *quic.Stream
	lost   error // the peer is gone
	end    sync.Once
}

var _ net.Conn = (*Conn)(nil)

// first returns the first stream; a source waits for its client to send on it.
func (c *Conn) first() (*quic.Stream, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var err error
	if c.stream == nil && c.client {
		c.stream, err = c.early.open(c.q.Context(), c.q, false)
	} else if c.stream == nil {
		c.stream, err = c.q.AcceptStream(c.q.Context())
	}
	return c.stream, err
}

// Read implements net.Conn.
func (c *Conn) Read(p []byte) (int, error) {
	s, err := c.first()
	if err != nil {
		return 0, c.over(err)
	}
	n, err := s.Read(p)
	return n, c.over(err)
}

// Write implements net.Conn.
func (c *Conn) Write(p []byte) (int, error) {
	s, err := c.first()
	if err != nil {
		return 0, c.over(err)
	}
	n, err := s.Write(p)
	return n, c.over(err)
}

// over makes the orderly end of the connection what it is for a stream of bytes.
func (c *Conn) over(err error) error {
	var app *quic.ApplicationError
	if errors.As(err, &app) && app.ErrorCode == 0 {
		if app.Remote {
			return io.EOF
		}
		return net.ErrClosed
	}
	return err
}

// Close implements net.Conn. It takes at most a moment and may be called twice.
func (c *Conn) Close() error {
	c.end.Do(func() {
		_ = c.q.CloseWithError(0, "")
		c.closed()
	})
	return nil
}

// LocalAddr implements net.Conn.
func (c *Conn) LocalAddr() net.Addr { return c.q.LocalAddr() }

// RemoteAddr implements net.Conn.
func (c *Conn) RemoteAddr() net.Addr { return c.q.RemoteAddr() }

// SetDeadline implements net.Conn, once the first stream is open.
func (c *Conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline implements net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error {
	s, err := c.first()
	if err != nil {
		return err
	}
	return s.SetReadDeadline(t)
}

// SetWriteDeadline implements net.Conn.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	s, err := c.first()
	if err != nil {
		return err
	}
	return s.SetWriteDeadline(t)
}

func config(server bool) *quic.Config {
	c := &quic.Config{
		HandshakeIdleTimeout: rpc.HandshakeTimeout, MaxIdleTimeout: idle, KeepAlivePeriod: idle / 8, Allow0RTT: true,
		MaxIncomingStreams: rpc.SessionCalls, MaxIncomingUniStreams: -1,
		InitialStreamReceiveWindow: rpc.StreamWindow, MaxStreamReceiveWindow: serverStreamWindow,
	}
	if server {
		narrow(c, rpc.SessionCalls, 1<<20)
	} else {
		c.InitialStreamReceiveWindow, c.MaxStreamReceiveWindow = clientStreamWindow, clientStreamWindow
		c.InitialConnectionReceiveWindow, c.MaxConnectionReceiveWindow = clientConnWindow, clientConnWindow
	}
	return c
}

// narrow bounds the requests of a connection, and what the source receives of them by
// the windows of their streams and some more for those that are read.
func narrow(c *quic.Config, calls, more int) {
	c.MaxIncomingStreams = int64(calls)
	c.InitialConnectionReceiveWindow = uint64(calls*rpc.StreamWindow + more)
	c.MaxConnectionReceiveWindow = c.InitialConnectionReceiveWindow
}

// crowd counts the connections of each address, those in their handshake too.
type crowd struct {
	mu sync.Mutex
	n  map[string]int
}

func host(a net.Addr) string {
	h, _, _ := net.SplitHostPort(a.String())
	return h
}

func (c *crowd) of(a net.Addr) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n[host(a)]
}

// add counts one from a until ctx ends.
func (c *crowd) add(ctx context.Context, a net.Addr) {
	c.mu.Lock()
	defer c.mu.Unlock()
	h := host(a)
	c.n[h]++
	context.AfterFunc(ctx, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.n[h]--; c.n[h] == 0 {
			delete(c.n, h)
		}
	})
}

// sessions gives each connection a copy of its own: both the library and package tls
// write to a session that they resume, and connections are opened together.
type sessions struct{ tls.ClientSessionCache }

// Get implements tls.ClientSessionCache.
func (s *sessions) Get(key string) (*tls.ClientSessionState, bool) {
	c, ok := s.ClientSessionCache.Get(key)
	if !ok || c == nil {
		return nil, false
	}
	c, err := copied(c)
	return c, err == nil // without a session there is a full handshake
}

// Put implements tls.ClientSessionCache.
func (s *sessions) Put(key string, c *tls.ClientSessionState) {
	var err error
	if c != nil {
		c, err = copied(c)
	}
	if err == nil {
		s.ClientSessionCache.Put(key, c)
	}
}

func copied(c *tls.ClientSessionState) (*tls.ClientSessionState, error) {
	ticket, state, err := c.ResumptionState()
	if err != nil {
		return nil, err
	}
	b, err := state.Bytes()
	if err != nil {
		return nil, err
	}
	if state, err = tls.ParseSessionState(b); err != nil {
		return nil, err
	}
	return tls.NewResumptionState(ticket, state)
}

// listener is a UDP socket that answers.
type listener struct {
	udp  *net.UDPConn
	tr   *quic.Transport
	l    *quic.EarlyListener
	ctx  context.Context
	stop context.CancelFunc
	once sync.Once

	mu     sync.Mutex
	conns  int // that were accepted and not closed yet
	closed bool
}

// Listen implements transport.Network.
func (t *Transport) Listen(_ context.Context, addr string, limits transport.Limits) (net.Listener, error) {
	a, err := net.ResolveUDPAddr("udp", addr)
	if err != nil {
		return nil, err
	}
	cfg := t.TLS.Server
	if cfg == nil {
		if cfg, err = ownCertificate(); err != nil {
			return nil, err
		}
	} else {
		cfg = cfg.Clone()
	}
	cfg.NextProtos = []string{protocol}
	udp, err := net.ListenUDP("udp", a)
	if err != nil {
		return nil, err
	}
	seen := &crowd{n: map[string]int{}}
	l := &listener{udp: udp, tr: &quic.Transport{Conn: udp, ConnContext: func(ctx context.Context, i *quic.ClientInfo) (context.Context, error) {
		seen.add(ctx, i.RemoteAddr)
		return ctx, nil
	}}}
	conf := config(true)
	conf.GetConfigForClient = func(i *quic.ClientInfo) (*quic.Config, error) { // just before ConnContext
		c := config(true)
		if seen.of(i.RemoteAddr) >= limits.Lanes(rpc.LaneMemory) {
			narrow(c, rpc.NarrowCalls, serverConnMore)
		}
		return c, nil
	}
	if l.l, err = l.tr.ListenEarly(cfg, conf); err != nil {
		return nil, errors.Join(err, l.tr.Close(), udp.Close())
	}
	l.ctx, l.stop = context.WithCancel(context.Background())
	return l, nil
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	q, err := l.l.Accept(l.ctx)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", net.ErrClosed, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed { // the socket may be gone already
		return nil, errors.Join(net.ErrClosed, q.CloseWithError(0, ""))
	}
	l.conns++
	return &Conn{q: q, closed: l.left}, nil
}

// left notes that a connection is closed.
func (l *listener) left() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns--
	l.release()
}

// release closes the socket once nobody needs it. l.mu is held.
func (l *listener) release() {
	if l.closed && l.conns == 0 {
		go func() {
			_ = l.tr.Close()
			_ = l.udp.Close()
		}()
	}
}

// Close implements net.Listener. The socket goes with the last connection.
func (l *listener) Close() error {
	l.once.Do(func() {
		l.stop()
		_ = l.l.Close()
		l.mu.Lock()
		defer l.mu.Unlock()
		l.closed = true
		l.release()
	})
	return nil
}

// Addr implements net.Listener.
func (l *listener) Addr() net.Addr { return l.udp.LocalAddr() }

// ownCertificate makes a certificate that nobody can check.
func ownCertificate() (*tls.Config, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: now.Add(-time.Hour), NotAfter: now.Add(365 * 24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, MinVersion: tls.VersionTLS13}, nil
}

// Dial implements transport.Network: one round trip, none where a session is resumed.
func (t *Transport) Dial(ctx context.Context, addr string) (net.Conn, error) {
	t.once.Do(func() {
		t.sessions, t.tokens = &sessions{tls.NewLRUClientSessionCache(16)}, quic.NewLRUTokenStore(16, 4)
	})
	a, err := net.ResolveUDPAddr("udp", addr)
	if err != nil {
		return nil, err
	}
	cfg := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13} // see the package's comment
	if t.TLS.Client != nil {
		cfg = t.TLS.Client.Clone()
	}
	if cfg.ServerName == "" {
		cfg.ServerName, _, _ = net.SplitHostPort(addr)
	}
	c := &Conn{client: true}
	cfg.NextProtos, cfg.ClientSessionCache, cfg.KeyLogWriter = []string{protocol}, t.sessions, &c.early
	local := &net.UDPAddr{}
	if a.IP.IsLoopback() {
		local.IP = a.IP
	}
	udp, err := net.ListenUDP("udp", local)
	if err != nil {
		return nil, err
	}
	tr := &quic.Transport{Conn: udp}
	free := func() {
		_ = tr.Close()
		_ = udp.Close()
	}
	conf := config(false)
	conf.TokenStore = t.tokens
	dialling, refuse := context.WithCancelCause(ctx)
	defer refuse(nil)
	end, err := watch(a, func(err error) {
		refuse(err)
		c.lose(err)
	})
	if err != nil {
		free()
		return nil, err
	}
	c.closed = func() { end(); free() }
	q, err := tr.DialEarly(dialling, a, cfg, conf)
	if err == nil {
		err = c.begin(q)
	}
	if err != nil {
		c.closed()
		if cause := context.Cause(dialling); ctx.Err() == nil && cause != nil {
			return nil, cause
		}
		return nil, handshake(ctx, "source", err)
	}
	return c, nil
}

// begin takes the connection, unless the peer is known to be gone.
func (c *Conn) begin(q *quic.Conn) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.q = q; c.lost != nil {
		_ = q.CloseWithError(1, "nobody listens")
		return c.lost
	}
	return nil
}

// lose ends a connection whose peer is gone.
func (c *Conn) lose(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.lost = err; c.q != nil {
		_ = c.q.CloseWithError(1, "nobody listens")
	}
}

// handshake says what a handshake failed of.
func handshake(ctx context.Context, peer string, err error) error {
	var transportErr *quic.TransportError
	if ctx.Err() == nil && errors.As(err, &transportErr) && transportErr.ErrorCode.IsCryptoError() {
		return transport.TLSError(peer, err)
	}
	return rpc.Gone(ctx, err)
}

// Open implements transport.Transport: two round trips, one where a session is resumed.
func (t *Transport) Open(ctx context.Context, d transport.Dialer, o transport.Options) (region.Store, error) {
	if o.Stream {
		return nil, fmt.Errorf("open QUIC region %q: all requests on one stream: %w", o.Name, region.ErrNotSupported)
	}
	c, err := rpc.Open(ctx, o, rpc.Settings{Name: "QUIC", Connections: 1, Calls: rpc.SessionCalls}, func(ctx context.Context) (rpc.Conn, error) { return dial(ctx, d) })
	if err != nil {
		return nil, err
	}
	return c, nil
}

func dial(ctx context.Context, d transport.Dialer) (rpc.Conn, error) {
	nc, err := d.Dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("dial: %w", err)
	}
	c, ok := nc.(*Conn)
	if !ok {
		nc.Close()
		return nil, fmt.Errorf("QUIC over a connection of %s: %w", nc.RemoteAddr().Network(), region.ErrNotSupported)
	}
	return &conn{c}, nil
}

// conn is the client's side of one connection.
type conn struct{ *Conn }

// Resumed reports whether the connection's session was, with 0-RTT.
func (c *Conn) Resumed() bool { return c.q.ConnectionState().Used0RTT }

// Call implements rpc.Conn.
func (c *conn) Call(ctx context.Context, q *rpc.Request, r *rpc.Reply) error {
	c.mu.Lock()
	now := c.q
	c.mu.Unlock()
	err := call(ctx, now, &c.early, q, r)
	if errors.Is(err, quic.Err0RTTRejected) { // the source has forgotten the session: nothing of it was done
		c.mu.Lock()
		var next *quic.Conn
		if next, err = now.NextConnection(ctx); err == nil {
			c.q, now = next, next
		}
		c.mu.Unlock()
		if err == nil {
			err = call(ctx, now, &c.early, q, r)
		}
	}
	switch {
	case err == nil, ctx.Err() == nil && errors.Is(err, rpc.ErrProtocol):
		return err
	}
	return handshake(ctx, "source", err)
}

// gate ends the time of early data: as soon as the source's answer is read no stream is
// opened until the handshake has ended. The library takes over the source's transport
// parameters in between, without a lock against those who open streams
// (github.com/quic-go/quic-go/issues/4303).
type gate struct {
	mu   sync.Mutex
	shut bool
}

// Write is of tls.Config.KeyLogWriter, which is called when the source's first message
// has been read and before the next one, on the way of those parameters. The secrets go nowhere.
func (g *gate) Write(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shut = true
	return len(p), nil
}

// open opens a stream of c, at once where there may be early data.
func (g *gate) open(ctx context.Context, c *quic.Conn, early bool) (*quic.Stream, error) {
	if early {
		g.mu.Lock()
		if !g.shut {
			if s, err := c.OpenStream(); err == nil { // else not so many streams yet
				g.mu.Unlock()
				return s, nil
			}
		}
		g.mu.Unlock()
	}
	select {
	case <-c.HandshakeComplete():
	case <-c.Context().Done():
		return nil, context.Cause(c.Context())
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return c.OpenStreamSync(ctx)
}

// early reports whether a request may be repeated by an attacker.
func early(q *rpc.Request) bool {
	return q.Op == rpc.OpRead || q.Op == rpc.OpExtents || q.Op == rpc.OpOpen && q.Writer == ""
}

func call(ctx context.Context, c *quic.Conn, g *gate, q *rpc.Request, r *rpc.Reply) (err error) {
	s, err := g.open(ctx, c, early(q))
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() {
		s.CancelRead(dropped)
		s.CancelWrite(dropped)
	})
	defer func() {
		stop()
		// Nobody waits for the rest. A stream of rejected early data is not cancelled: that
		// would meet the one of the same number that comes after it.
		if err != nil && !errors.Is(err, quic.Err0RTTRejected) {
			s.CancelRead(dropped)
			s.CancelWrite(dropped)
		}
	}()
	if _, err := s.Write(head(q.AppendHead, len(q.Data))); err != nil {
		return err
	}
	if len(q.Data) > 0 {
		if _, err := s.Write(q.Data); err != nil {
			return err
		}
	}
	if err := s.Close(); err != nil {
		return err
	}
	in := bufio.NewReaderSize(s, 4096)
	h, err := readHead(in)
	if err != nil {
		return err
	}
	into := r.Into
	r.Into = nil
	err = r.Decode(h)
	r.Into = into
	if err != nil {
		return err
	}
	if r.Status == rpc.StatusOK && into != nil {
		if _, err := io.ReadFull(in, into); err != nil {
			return fmt.Errorf("data of %d bytes: %w", len(into), err)
		}
		r.Data = into
	}
	if _, err := in.ReadByte(); err != io.EOF {
		if err == nil {
			err = fmt.Errorf("bytes after a reply: %w", rpc.ErrProtocol)
		}
		return err
	}
	return nil
}

// head makes what precedes a message's n bytes of data. The data's tag, which the
// head of a protocol buffer ends in, is left out.
func head(appendHead func([]byte) []byte, n int) []byte {
	b := appendHead(make([]byte, 4, 64))
	if n > 0 {
		b = b[:len(b)-1-uvarintLen(n)]
	}
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	return b
}

func uvarintLen(n int) int { return len(binary.AppendUvarint(nil, uint64(n))) }

func readHead(in io.Reader) ([]byte, error) {
	var l [4]byte
	if _, err := io.ReadFull(in, l[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(l[:])
	if n > rpc.MaxHead {
		return nil, fmt.Errorf("head of %d bytes, the limit is %d: %w", n, rpc.MaxHead, rpc.ErrProtocol)
	}
	h := make([]byte, n)
	_, err := io.ReadFull(in, h)
	return h, err
}

// Serve implements transport.Transport.
func (t *Transport) Serve(ctx context.Context, nc net.Conn, e transport.Exports) error {
	c, ok := nc.(*Conn)
	if !ok {
		nc.Close()
		return fmt.Errorf("serve QUIC over a connection of %s: %w", nc.RemoteAddr().Network(), region.ErrNotSupported)
	}
	s := rpc.NewSession(ctx, e, rpc.SessionOptions{Who: func() string { return transport.Identity(c.q.ConnectionState().TLS) }}, func() { _ = c.q.CloseWithError(2, "no region opened, or no request, in time") })
	defer s.Close()
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.q.CloseWithError(0, "") })()
	stall := transport.PlaceOf(ctx).Limits().Stall
	var work sync.WaitGroup
	defer work.Wait()
	for {
		st, err := c.q.AcceptStream(c.q.Context())
		if err != nil {
			var transportErr *quic.TransportError
			if ctx.Err() == nil && errors.As(err, &transportErr) && transportErr.ErrorCode.IsCryptoError() {
				return transport.TLSError("client", err)
			}
			return rpc.Ended(ctx, "QUIC", c.over(err))
		}
		_ = st.SetReadDeadline(time.Now().Add(stall)) // for its head
		work.Go(func() { answer(c.q, st, s, stall) })
	}
}

// answer serves one stream. Its errors are the stream's own.
func answer(c *quic.Conn, st *quic.Stream, s *rpc.Session, stall time.Duration) {
	done := false
	defer func() {
		if !done {
			st.CancelRead(dropped)
			st.CancelWrite(dropped)
		}
	}()
	q := new(rpc.Request)
	in := bufio.NewReaderSize(st, 1024)
	h, err := readHead(in)
	if err == nil {
		err = q.Decode(h)
	}
	if err != nil {
		return
	}
	ctx := st.Context() // ends when the client drops the stream
	free, err := s.Admit(ctx, q)
	if err != nil {
		return
	}
	defer free()
	_ = st.SetReadDeadline(time.Now().Add(stall))
	if q.Op == rpc.OpWrite && q.Length > 0 && q.Length <= s.Most() {
		p, put := s.Buffer(int(q.Length))
		defer put()
		if _, err := io.ReadFull(in, p); err != nil {
			return
		}
		q.Data = p
	}
	if !early(q) {
		select {
		case <-c.HandshakeComplete():
		case <-ctx.Done():
			return
		}
	}
	if _, err := in.ReadByte(); err != io.EOF {
		return
	}
	r := s.Handle(ctx, q)
	defer r.Release()
	if _, err := st.Write(head(r.AppendHead, len(r.Data))); err != nil {
		return
	}
	if len(r.Data) > 0 {
		if _, err := st.Write(r.Data); err != nil {
			return
		}
	}
	done = st.Close() == nil
}
