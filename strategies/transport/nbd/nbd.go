// Package nbd is memsync's own NBD, client and server: fixed newstyle with
// structured replies and extended headers where both sides can, EXPORT_NAME,
// GO, INFO, LIST, STARTTLS, block-size constraints, read, write, FUA, flush,
// trim, write-zeroes, cache, block status with base:allocation, several
// connections. It runs over any net.Conn and is fastest on TCP and Unix sockets.
//
// Source: doc/proto.md of the NBD project, and its branch extension-ext-header.
package nbd

import (
	"context"
	"crypto/tls"
	"net"
	"sync/atomic"
	"time"

	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/transport"
	"memsync/strategies/transport/flow"
)

const (
	handshakeTimeout = 10 * time.Second
	maxPolling       = 64 // server connections that wait on a thread of their own
)

// Transport is NBD as a transport.Transport. Its fields must not change once it
// is in use; the zero value is ready. It must not be copied.
type Transport struct {
	// ServerTLS lets clients ask for TLS. With RequireTLS they must.
	ServerTLS  *tls.Config
	RequireTLS bool
	// ClientTLS makes Open and List insist on TLS.
	ClientTLS *tls.Config
	// HandshakeTimeout bounds a handshake, dialling included; 0 is 10 s, or a server's Limits.
	HandshakeTimeout time.Duration
	// StallTimeout is how long the server waits, within a message, for a
	// client that sends or reads nothing; 0 is as its Limits say.
	StallTimeout time.Duration

	polling atomic.Int32
	buffers flow.Buffers
}

var _ transport.Transport = (*Transport)(nil)

// Params are the parameters of transport.Options that users may set.
func Params() []param.Spec {
	return []param.Spec{
		{Name: "connections", Kind: param.KindInt, Default: "0", Min: 0, Max: maxConnections, Doc: "connections that are opened together; 0 is one on a path below 1 ms, else 16, over which requests are spread"},
		{Name: "window", Kind: param.KindSize, Default: "0", Min: 0, Max: 1 << 30, Doc: "bytes of background requests in flight; 0 follows the path by itself"},
	}
}

// Name is "nbd".
func (t *Transport) Name() string { return "nbd" }

// Open connects and returns the export as a *Client; see transport.Transport.
// It takes two round trips (four with TLS), the same for several connections.
// Connections that d makes belong to the Store, as with Serve. A missing export
// gives region.ErrMissing, TLS that only one side wants region.ErrNotPermitted.
func (t *Transport) Open(ctx context.Context, d transport.Dialer, o transport.Options) (region.Store, error) {
	c, err := t.open(ctx, d, o)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// Serve answers one connection; see transport.Transport. Requests for bytes
// that the Store has in memory (region.Viewer) are answered at once and without
// a copy, others in parallel and out of order. It takes conn over: once
// transmission begins it reads a TCP or Unix socket by a duplicate of its
// descriptor, so only the end of ctx, not conn.Close, ends it from outside. What
// a client costs is as the Limits of its Place say (transport.PlaceOf).
func (t *Transport) Serve(ctx context.Context, conn net.Conn, e transport.Exports) error {
	return t.serve(ctx, conn, e)
}

func (t *Transport) handshakeTimeout() time.Duration {
	if t.HandshakeTimeout > 0 {
		return t.HandshakeTimeout
	}
	return handshakeTimeout
}
