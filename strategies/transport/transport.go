// Package transport defines how a daemon reaches a source's region: the
// Transport contract that every wire protocol implements (NBD first; see
// transport/nbd), and the connections it is made of.
package transport

import (
	"context"
	"net"

	"memsync/strategies/region"
)

// Dialer makes connections to one source.
// Dial blocks until connected or ctx ends and may be called concurrently.
type Dialer interface {
	Dial(ctx context.Context) (net.Conn, error)
}

// DialFunc is a Dialer made of a function.
type DialFunc func(ctx context.Context) (net.Conn, error)

// Dial calls f.
func (f DialFunc) Dial(ctx context.Context) (net.Conn, error) { return f(ctx) }

// Exports is the set of named regions that a source serves on one port.
// Open returns the region and is called once for each connection that asks for
// it; the transport never closes it. A missing name gives region.ErrMissing.
type Exports interface {
	Open(name string) (region.Store, error)
	List() []string
}

// One is an Exports with a single region under one name; the empty name means it too.
type One struct {
	Name  string
	Store region.Store
}

// Open returns the region if name is its name or empty.
func (o One) Open(name string) (region.Store, error) {
	if name != "" && name != o.Name {
		return nil, region.ErrMissing
	}
	return o.Store, nil
}

// List returns the one name.
func (o One) List() []string { return []string{o.Name} }

// Options tune the opening of a region.
type Options struct {
	Name        string // of the export; empty is the source's default
	Connections int    // number of connections opened together, 1..16; 0: the transport chooses
	ReadOnly    bool   // refuse writes on this side
	// Writer asks to be the only host that writes, by a name that no other uses
	// (see Leaser); empty does not ask. A source that knows no leases grants nothing
	// and refuses nothing: see region.Epocher.
	Writer string
	Window int64 // bytes of background requests in flight; 0: the transport chooses
	// Together is for a source that may answer a request only once it has another one:
	// there are several under way on each connection, whatever Calls and Stream say.
	Together bool
	// The rest is for transports of remote procedure calls; NBD does not look at it.
	Calls   int   // requests under way on one connection; 0: the transport chooses, 1: one at a time
	Message int64 // bytes of data in one request at most; 0: the transport chooses
	Stream  bool  // all requests of a connection go over one stream of the library's, not each as a call of its own
}

// Transport is a wire protocol between daemon and source.
// Both methods may be called concurrently.
type Transport interface {
	// Name is the transport's name on the command line, for instance "nbd".
	Name() string
	// Serve answers one connection until the peer disconnects (nil), ctx ends
	// or the peer breaks the protocol (an error that names the field). It
	// closes conn. Other connections are not affected.
	Serve(ctx context.Context, conn net.Conn, e Exports) error
	// Open connects and returns the named region as a Store whose Close
	// disconnects. Requests are pipelined; demand overtakes prefetch and push
	// (region.ClassOf). A lost connection fails the requests in flight with
	// region.ErrPeerGone.
	Open(ctx context.Context, d Dialer, o Options) (region.Store, error)
}

// Network is what a Transport may be whose connections are not those of TCP. The
// connections that it gives are for Serve and for its Dialer only.
type Network interface {
	// Listen answers on addr, host:port with port 0 for a free one. It has taken the
	// port when it returns. Limits are those by which the connections are then served.
	Listen(ctx context.Context, addr string, l Limits) (net.Listener, error)
	// Dial blocks until connected or ctx ends.
	Dial(ctx context.Context, addr string) (net.Conn, error)
}

// Listen answers on addr (host:port) for t: TCP, or what t is a Network of. Limits are
// those by which the connections are then served.
func Listen(ctx context.Context, t Transport, addr string, l Limits) (net.Listener, error) {
	if n, ok := t.(Network); ok {
		return n.Listen(ctx, addr, l)
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // on by default for listeners; the link is one path
	return lc.Listen(ctx, "tcp", addr)
}

// DialerTo is the Dialer of connections to addr (host:port) for t.
func DialerTo(t Transport, addr string) Dialer {
	if n, ok := t.(Network); ok {
		return DialFunc(func(ctx context.Context) (net.Conn, error) { return n.Dial(ctx, addr) })
	}
	return DialFunc(func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "tcp", addr) })
}
