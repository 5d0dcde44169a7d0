package rpc

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"

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
// server's configuration, within HandshakeTimeout. It closes nc where it fails.
func Secure(ctx context.Context, nc net.Conn, t transport.TLS, protocols ...string) (net.Conn, error) {
	transport.TuneTCP(nc)
	if t.Server == nil {
		return nc, nil
	}
	cfg := t.Server.Clone()
	cfg.NextProtos = protocols
	ctx, cancel := context.WithTimeout(ctx, HandshakeTimeout)
	defer cancel()
	c := tls.Server(nc, cfg)
	if err := c.HandshakeContext(ctx); err != nil {
		nc.Close()
		return nil, transport.TLSError("client", err)
	}
	return c, nil
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
