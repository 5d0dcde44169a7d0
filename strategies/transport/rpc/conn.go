package rpc

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"memsync/strategies/transport"
)

// Dial makes a connection by d, in TLS where t has a client's configuration.
// protocols are those of ALPN.
func Dial(ctx context.Context, d transport.Dialer, t transport.TLS, protocols ...string) (net.Conn, error) {
	nc, err := d.Dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("dial: %w", err)
	}
	transport.TuneTCP(nc)
	if t.Client == nil {
		return nc, nil
	}
	cfg := t.Client.Clone()
	cfg.NextProtos = protocols
	c := tls.Client(nc, cfg)
	if err := c.HandshakeContext(ctx); err != nil {
		nc.Close()
		return nil, transport.TLSError("source", err)
	}
	return c, nil
}

// Secure begins TLS on a connection that a source has accepted, where t has a
// server's configuration, within the time of its Limits. It closes nc where it fails.
func Secure(ctx context.Context, nc net.Conn, t transport.TLS, protocols ...string) (net.Conn, error) {
	transport.TuneTCP(nc)
	if t.Server == nil {
		return nc, nil
	}
	cfg := t.Server.Clone()
	cfg.NextProtos = protocols
	ctx, cancel := context.WithTimeout(ctx, transport.PlaceOf(ctx).Limits().Handshake)
	defer cancel()
	c := tls.Server(nc, cfg)
	if err := c.HandshakeContext(ctx); err != nil {
		nc.Close()
		return nil, transport.TLSError("client", err)
	}
	return c, nil
}

// Identity is the SessionOptions.Who of a connection whose handshake has ended.
func Identity(c net.Conn) func() string {
	return func() string {
		if t, ok := c.(*tls.Conn); ok {
			return transport.Identity(t.ConnectionState())
		}
		return ""
	}
}

// Watched is a connection that tells when it was closed.
type Watched struct {
	net.Conn
	once   sync.Once
	closed chan struct{}
}

// Watch wraps c.
func Watch(c net.Conn) *Watched { return &Watched{Conn: c, closed: make(chan struct{})} }

// Close implements net.Conn.
func (w *Watched) Close() error {
	err := w.Conn.Close()
	w.once.Do(func() { close(w.closed) })
	return err
}

// Closed is closed by Close.
func (w *Watched) Closed() <-chan struct{} { return w.closed }

// Inbound is a connection whose peer may send a little, and then only as much as there
// is memory for: for libraries that take a message whole before they show it. One
// message at a time arrives on it.
type Inbound struct {
	net.Conn
	on atomic.Bool

	mu       sync.Mutex
	place    *transport.Place
	ctx      context.Context
	cancel   context.CancelFunc
	weight   int64
	unshown  int64  // bytes that were read and are in no request that was shown
	give     func() // unless nil, there is memory for a whole message
	late     *time.Timer
	finished bool
}

// freeBytes is what a connection may send without asking; overhead what surrounds a message at most.
const (
	freeBytes = 64 << 10
	overhead  = 8 << 10
)

// NewInbound wraps c, the source's end of a connection.
func NewInbound(c net.Conn) *Inbound { return &Inbound{Conn: c} }

// begin makes it hold its peer to the memory of its place, from which a message takes weight.
func (i *Inbound) begin(ctx context.Context, p *transport.Place, weight int64) {
	i.ctx, i.cancel = context.WithCancel(ctx)
	i.place, i.weight = p, weight
	i.on.Store(true)
}

// Read implements net.Conn. It waits for memory where there is too much already.
func (i *Inbound) Read(p []byte) (int, error) {
	n, err := i.Conn.Read(p)
	if n > 0 && i.on.Load() {
		if merr := i.count(int64(n)); merr != nil {
			return n, merr
		}
	}
	return n, err
}

func (i *Inbound) count(n int64) error {
	i.mu.Lock()
	i.unshown += n
	ask := i.unshown > freeBytes && i.give == nil
	i.mu.Unlock()
	if !ask {
		return nil
	}
	give, err := i.place.Receive(i.ctx, i.weight)
	if err != nil {
		return net.ErrClosed
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.finished || i.unshown <= freeBytes { // shown meanwhile
		give()
		return nil
	}
	i.give = give
	i.late = time.AfterFunc(i.place.Limits().Stall, func() { _ = i.Conn.Close() })
	return nil
}

// delivered says that a request with n bytes of data was shown, and has memory of its own.
func (i *Inbound) delivered(n int64) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.unshown = max(0, i.unshown-n-overhead)
	if i.unshown <= freeBytes {
		i.release()
	} else if i.late != nil {
		i.late.Reset(i.place.Limits().Stall)
	}
}

// release gives the memory back. Under mu.
func (i *Inbound) release() {
	if i.give != nil {
		i.late.Stop()
		i.give()
		i.give = nil
	}
}

func (i *Inbound) end() {
	i.cancel()
	i.mu.Lock()
	defer i.mu.Unlock()
	i.finished = true
	i.release()
}

// Close implements net.Conn.
func (i *Inbound) Close() error {
	if i.on.Load() {
		i.cancel() // whoever waits for memory
	}
	return i.Conn.Close()
}

// Listener is a net.Listener that gives the one connection, and then waits until
// that is closed: for libraries that serve listeners only.
func (w *Watched) Listener() net.Listener { return &lonely{w: w, done: make(chan struct{})} }

type lonely struct {
	w     *Watched
	given bool
	once  sync.Once
	done  chan struct{}
}

func (l *lonely) Accept() (net.Conn, error) {
	if !l.given {
		l.given = true
		return l.w, nil
	}
	select {
	case <-l.w.closed:
	case <-l.done:
	}
	return nil, net.ErrClosed
}

func (l *lonely) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *lonely) Addr() net.Addr { return l.w.LocalAddr() }

// Ended makes err of serving a connection the one to report: nil for a peer that
// has left, which is no fault of the protocol.
func Ended(ctx context.Context, name string, err error) error {
	switch {
	case ctx.Err() != nil:
		err = ctx.Err()
	case err == nil, errors.Is(err, io.EOF), errors.Is(err, net.ErrClosed), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return nil
	}
	return fmt.Errorf("serve %s connection: %w", name, err)
}

// Limited reads from R and fails after a message's budget: for libraries that read
// messages of any length. Next begins a message.
type Limited struct {
	R    io.Reader
	Most int64 // bytes of one message

	left int64
}

// Next gives the budget of one more message.
func (l *Limited) Next() { l.left = l.Most }

// Read implements io.Reader.
func (l *Limited) Read(p []byte) (int, error) {
	if l.left <= 0 {
		return 0, fmt.Errorf("message of more than %d bytes: %w", l.Most, ErrProtocol)
	}
	n, err := l.R.Read(p[:min(int64(len(p)), l.left)])
	l.left -= int64(n)
	return n, err
}
