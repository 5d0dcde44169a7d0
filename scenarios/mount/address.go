package mount

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"

	"memsync/scenarios"
	"memsync/strategies/transport"
)

// Port is what NBD servers answer on (IANA).
const Port = "10809"

// Address is where a server answers, and which of its regions is meant.
type Address struct {
	Network string // "tcp" or "unix"
	Host    string // host:port, or the socket's path
	Name    string // of the region; empty is the server's only one
	TLS     bool   // the address says so (nbds)
	// Transport that the address says, other than nbd; empty: it does not.
	Transport string
}

// ParseAddress takes HOST[:PORT][/NAME], unix:PATH, or an NBD URI (doc/uri.md of
// the NBD project): nbd://HOST[:PORT]/NAME, nbds://..., nbd+unix:///NAME?socket=PATH.
// The other transports have URIs alike, as quic://HOST[:PORT]/NAME.
func ParseAddress(s string) (a Address, err error) {
	bad := func(why string) (Address, error) {
		return a, fmt.Errorf("address %q: %s; want HOST[:PORT][/NAME], unix:PATH, nbd://HOST[:PORT]/NAME or nbd+unix:///NAME?socket=PATH: %w", s, why, scenarios.ErrUsage)
	}
	if path, ok := strings.CutPrefix(s, "unix:"); ok {
		if path == "" {
			return bad("no path")
		}
		return Address{Network: "unix", Host: path}, nil
	}
	var host string
	if strings.Contains(s, "://") {
		u, err := url.Parse(s)
		if err != nil {
			return bad(err.Error())
		}
		a.Name = strings.TrimPrefix(u.Path, "/")
		switch u.Scheme {
		case "nbd", "nbds":
			host, a.TLS = u.Host, u.Scheme == "nbds"
		case "nbd+unix", "nbds+unix":
			a.Network, a.Host, a.TLS = "unix", u.Query().Get("socket"), u.Scheme == "nbds+unix"
			if a.Host == "" {
				return bad("no socket")
			}
			return a, nil
		case "grpc", "drpc", "quic", "jsonrpc":
			host, a.Transport = u.Host, u.Scheme
		default:
			return bad(fmt.Sprintf("unknown scheme %q", u.Scheme))
		}
	} else {
		host, a.Name, _ = strings.Cut(s, "/")
	}
	a.Network = "tcp"
	if _, _, err := net.SplitHostPort(host); err != nil {
		host = net.JoinHostPort(strings.Trim(host, "[]"), Port)
	}
	name, port, err := net.SplitHostPort(host)
	if err != nil || name == "" {
		return bad("no host")
	}
	if _, err := net.LookupPort("tcp", port); err != nil {
		return bad(fmt.Sprintf("port %q", port))
	}
	a.Host = host
	return a, nil
}

// String is the address as ParseAddress takes it.
func (a Address) String() string {
	if a.Transport != "" {
		return (&url.URL{Scheme: a.Transport, Host: a.Host, Path: "/" + a.Name}).String()
	}
	u := url.URL{Scheme: "nbd", Host: a.Host, Path: "/" + a.Name}
	if a.TLS {
		u.Scheme = "nbds"
	}
	if a.Network == "unix" {
		u.Scheme, u.Host = u.Scheme+"+unix", ""
		u.RawQuery = "socket=" + url.QueryEscape(a.Host)
	}
	return u.String()
}

// dialer makes connections for t to the address.
func (a Address) dialer(t transport.Transport) (transport.Dialer, error) {
	if _, own := t.(transport.Network); own {
		if a.Network != "tcp" {
			return nil, fmt.Errorf("transport %s has no Unix sockets: %w", t.Name(), scenarios.ErrUsage)
		}
		return transport.DialerTo(t, a.Host), nil
	}
	d := net.Dialer{}
	if a.Network == "tcp" {
		d.Control = transport.RetrySoon
	}
	return transport.DialFunc(func(ctx context.Context) (net.Conn, error) { return d.DialContext(ctx, a.Network, a.Host) }), nil
}

// lister is a transport that can tell which regions a server has.
type lister interface {
	List(ctx context.Context, conn net.Conn) ([]string, error)
}

// list returns the names of the server's regions. The error matches errors.ErrUnsupported
// where the transport cannot tell.
func list(ctx context.Context, t transport.Transport, d transport.Dialer) ([]string, error) {
	l, ok := t.(lister)
	if !ok {
		return nil, fmt.Errorf("transport %s does not list regions: %w", t.Name(), errors.ErrUnsupported)
	}
	conn, err := d.Dial(ctx)
	if err != nil {
		return nil, err
	}
	return l.List(ctx, conn)
}
