package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"memsync/scenarios/mount"
	"memsync/strategies/all"
	"memsync/strategies/backend"
	"memsync/strategies/region"
	"memsync/strategies/transport"
	"memsync/strategies/transport/cert"
)

const (
	nbdPort       = "10809" // IANA's
	maxExportName = 4096    // bytes; proto.md, "Conventions"
)

type serveOptions struct {
	listen    string
	readOnly  bool
	insecure  bool
	limits    transport.Limits
	tls       string
	allow     string
	relay     relayFlags
	transport string
	metrics   string
	asJSON    bool
}

func newServeCmd(s *state) *cobra.Command {
	var o serveOptions
	c := &cobra.Command{
		Use:   "serve [NAME=]FILE...",
		Short: "Serve files and block devices as named regions over NBD",
		Long: `Serves each FILE, a regular file or block device (or file://PATH), as a region
called NAME, by default the last part of its path; a path with = in front of its
first / is written ./a=b. Any NBD client can list, read and write the regions:
memsync on another host, nbdinfo, nbdcopy, qemu, the kernel's nbd-client. Where
there is one region, the empty name means it too.

stdout has a line for each region when connections are answered: name, bytes, URI.
The other transports than NBD are for memsync mount. With --listen systemd the socket is
the one that the service manager passes (sd_listen_fds), which is told when it is served.
FILE is locked (flock) while it is served and is neither created nor resized. What a
client flushed is on disk. Runs until SIGINT or SIGTERM, and then exits with 130.`,
		Example: `  memsync serve disk.img
  memsync serve a=disk.img b=/dev/vdb --read-only --listen 127.0.0.1:0
  memsync serve disk.img --listen unix:/run/memsync.sock
  memsync serve disk.img --listen 10.0.0.1:10809 --tls /etc/memsync/tls
  memsync serve disk.img --listen 10.0.0.1:10809 --tls /etc/memsync/tls --allow /etc/memsync/allow
  memsync serve disk.img --listen 10.0.0.1:10809 --insecure
  memsync serve disk.img --relay relay.example --relay-token token --tls /etc/memsync/tls
  memsync serve disk.img --transport quic --metrics 127.0.0.1:9100`,
		RunE: func(c *cobra.Command, args []string) error {
			if o.relay.addr != "" && c.Flags().Changed("listen") {
				return exitWith(exitUsage, errors.New("--listen and --relay: connections come from one of them"))
			}
			return serve(s, o, args)
		},
	}
	f := c.Flags()
	f.StringVar(&o.listen, "listen", "127.0.0.1:"+nbdPort, "`ADDR` to answer on: HOST:PORT (port 0: a free one), unix:PATH, or systemd: the socket that it passes")
	f.StringVar(&o.transport, "transport", "nbd", strings.Join(all.TransportNames(), ", "))
	f.StringVar(&o.metrics, "metrics", "", "answer http://`ADDR`/metrics in the text format of Prometheus; a loopback address")
	f.BoolVar(&o.asJSON, "json", false, "print the lines as JSON objects")
	completions(c, map[string]func() []string{"transport": all.TransportNames})
	f.BoolVar(&o.readOnly, "read-only", false, "refuse writes; FILE needs to be readable only")
	f.BoolVar(&o.insecure, "insecure", false, "answer on an address that is not loopback, without TLS: whoever reaches it can read and write")
	f.StringVar(&o.tls, "tls", "", "insist on TLS 1.3 and on a certificate of each client, with ca-cert.pem, server-cert.pem and server-key.pem of `DIR` (memsync certs), which are read anew when they change")
	f.StringVar(&o.allow, "allow", "", "what each client may do, by `FILE` of lines WHO REGION RIGHTS: WHO is the name in the certificate (memsync certs --client), RIGHTS of read,write,migrate; needs --tls")
	o.relay.add(f)
	limitFlags(f, &o.limits)
	return c
}

// rules are those of --allow.
func (o serveOptions) rules() ([]transport.Rule, error) {
	if o.allow == "" {
		return nil, nil
	}
	if o.tls == "" {
		return nil, errors.New("without --tls nobody has a name")
	}
	f, err := os.Open(o.allow)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return transport.ParseRules(f)
}

// limitFlags adds the flags of what each client is granted.
func limitFlags(f *pflag.FlagSet, l *transport.Limits) {
	d := transport.Limits{}.Defaults()
	f.IntVar(&l.Connections, "connections", d.Connections, "connections at once, 1 to 4096; the next one waits")
	f.IntVar(&l.PeerConnections, "peer-connections", d.PeerConnections, "connections at once from one address, 1 to 4096; one more is closed")
	sizeFlag(f, &l.Memory, "memory", d.Memory, "requests and replies that are held at once; who needs more waits")
	sizeFlag(f, &l.PeerMemory, "peer-memory", 0, "of those, for one address; at least 12 MiB; 0 is 24 MiB, or all of --memory where that is less")
	sizeFlag(f, &l.Request, "max-request", 0, "data in one read or write, at least 64 KiB; 0 is 32 MiB with nbd, 1 MiB with the others, which have at most 4 MiB")
	durationFlag(f, &l.Handshake, "handshake-timeout", d.Handshake, "from the connection to the opening of a region")
	durationFlag(f, &l.Stall, "stall-timeout", d.Stall, "how long a message may stand still half-way")
	durationFlag(f, &l.Idle, "idle-timeout", 0, "how long a client may ask for nothing; 0: for ever")
}

func serve(s *state, o serveOptions, args []string) (err error) {
	if len(args) == 0 {
		return exitWith(exitUsage, errors.New("serve: no file given: memsync serve [NAME=]FILE"))
	}
	if o.limits.Connections < 1 || o.limits.PeerConnections < 1 { // 0 is no default here
		return exitWith(exitUsage, fmt.Errorf("--connections %d, --peer-connections %d: want 1 to 4096", o.limits.Connections, o.limits.PeerConnections))
	}
	if err := o.limits.Check(); err != nil {
		return exitWith(exitUsage, fmt.Errorf("limits: %w", err))
	}
	var security transport.TLS
	if o.tls != "" {
		var err error
		if security.Server, err = cert.ServerConfig(o.tls); err != nil {
			return exitWith(exitUsage, fmt.Errorf("--tls %s: %w", o.tls, err))
		}
	}
	rules, err := o.rules()
	if err != nil {
		return exitWith(exitUsage, fmt.Errorf("--allow %s: %w", o.allow, err))
	}
	t, err := all.SecureTransport(o.transport, security)
	if err != nil {
		return exitWith(exitUsage, fmt.Errorf("--transport: unknown transport %q; valid: %s", o.transport, strings.Join(all.TransportNames(), ", ")))
	}
	listen, err := listener(s, o, t)
	if o.relay != (relayFlags{}) {
		if listen, err = o.relay.listener(s, t, o.insecure || o.tls != ""); err != nil {
			return exitWith(exitUsage, err)
		}
	}
	if err != nil {
		return exitWith(exitUsage, fmt.Errorf("--listen %s: %w", o.listen, err))
	}
	publish, err := metrics(s, o.metrics)
	if err != nil {
		return err
	}
	var exports transport.Named
	var stores []*mount.Counted
	var locations []string
	defer func() {
		for _, e := range exports {
			if !o.readOnly {
				if ferr := e.Store.Flush(context.WithoutCancel(s.ctx)); ferr != nil {
					err = exitWith(exitFailed, fmt.Errorf("region %q: %w", e.Name, ferr))
				}
			}
			if cerr := e.Store.Close(); cerr != nil {
				err = exitWith(exitFailed, fmt.Errorf("region %q: %w", e.Name, cerr))
			}
		}
	}()
	for _, arg := range args {
		name, location, err := exportArg(arg)
		if err != nil {
			return exitWith(exitUsage, err)
		}
		if slices.Contains(exports.List(), name) {
			return exitWith(exitUsage, fmt.Errorf("%s: there is a region %q already; give another one: NAME=FILE", arg, name))
		}
		locations = append(locations, location)
		store, err := backend.OpenLocation(s.ctx, location, o.readOnly)
		if err != nil {
			code := exitUsage
			if errors.Is(err, region.ErrNotPermitted) || errors.Is(err, fs.ErrPermission) {
				code = exitNotPermitted
			}
			return exitWith(code, fmt.Errorf("region %q: %w", name, err))
		}
		counted := &mount.Counted{Store: store}
		stores = append(stores, counted)
		exports = append(exports, transport.Export{Name: name, Store: counted})
	}
	if s.env("GOMEMLIMIT") == "" { // garbage is collected in time for what clients may hold to be what there is
		debug.SetMemoryLimit(max(o.limits.Memory, transport.Limits{}.Defaults().Memory))
	}
	began := time.Now()
	var address atomic.Pointer[string] // once it is known
	status := func() mount.Status {
		st := mount.Status{Kind: "serve", PID: os.Getpid(), Seconds: time.Since(began).Seconds()}
		if a := address.Load(); a != nil {
			st.Address = *a
		}
		for i, e := range exports {
			path, _ := filepath.Abs(strings.TrimPrefix(locations[i], "file://"))
			st.Regions = append(st.Regions, mount.RegionStatus{Name: e.Name, Path: path, Bytes: e.Store.Size(), ReadOnly: stores[i].ReadOnly(), Counters: stores[i].Counters()})
		}
		return st
	}
	if stop, err := mount.Announce(status); err == nil {
		defer stop()
	} else { // it serves all the same
		fmt.Fprintf(s.stderr, "memsync status will not find this: %v\n", err)
	}
	l, err := listen()
	if err != nil {
		return exitWith(exitFailed, err)
	}
	at := l.Addr().String()
	address.Store(&at)
	defer publish(status)()
	for _, e := range exports {
		uri := exportURI(l.Addr(), o.transport, e.Name, o.tls != "")
		if o.asJSON {
			line, err := json.Marshal(map[string]any{"region": e.Name, "bytes": e.Store.Size(), "uri": uri, "read_only": o.readOnly})
			if err != nil {
				return exitWith(exitFailed, err)
			}
			fmt.Fprintf(s.stdout, "%s\n", line)
		} else {
			fmt.Fprintf(s.stdout, "%s\t%d\t%s\n", e.Name, e.Store.Size(), uri)
		}
	}
	fmt.Fprintf(s.stderr, "serving %d regions on %s\n", len(exports), l.Addr())
	notify(s, "READY=1", fmt.Sprintf("STATUS=serving %d regions on %s", len(exports), l.Addr()))
	var leases transport.Exports = transport.NewLeases(exports)
	if o.allow != "" {
		leases = transport.NewAccess(leases, rules)
	}
	refused := func(err error) { fmt.Fprintf(s.stderr, "refused: %v\n", err) }
	err = transport.Accept(s.ctx, l, o.limits, refused, func(ctx context.Context, c net.Conn) {
		peer := c.RemoteAddr()
		if err := t.Serve(ctx, c, leases); err != nil && ctx.Err() == nil {
			fmt.Fprintf(s.stderr, "connection of %s: %v\n", peer, err)
		}
	})
	notify(s, "STOPPING=1")
	if err != nil {
		return exitWith(exitFailed, err)
	}
	return exitWith(exitInterrupted, nil)
}

// fromManager is what --listen says for the socket of a service manager.
const fromManager = "systemd"

// listener checks --listen and returns what begins to listen.
func listener(s *state, o serveOptions, t transport.Transport) (func() (net.Listener, error), error) {
	secure := o.insecure || o.tls != ""
	_, own := t.(transport.Network)
	if o.listen == fromManager {
		if own {
			return nil, fmt.Errorf("transport %s makes its own socket", t.Name())
		}
		l, err := passed(s)
		if err != nil {
			return nil, err
		}
		if a, ok := l.Addr().(*net.TCPAddr); ok && !a.IP.IsLoopback() && !secure {
			return nil, errors.Join(errNoTLS, l.Close())
		}
		return func() (net.Listener, error) { return l, nil }, nil
	}
	network, addr, err := listenAddress(s.ctx, o.listen, secure)
	switch {
	case err != nil:
		return nil, err
	case own && network != "tcp":
		return nil, fmt.Errorf("transport %s has no Unix sockets", t.Name())
	case own:
		return func() (net.Listener, error) { return transport.Listen(s.ctx, t, addr, o.limits) }, nil
	}
	lc := net.ListenConfig{Control: transport.RetrySoon} // connections inherit it
	lc.SetMultipathTCP(false)
	return func() (net.Listener, error) { return lc.Listen(s.ctx, network, addr) }, nil
}

// passed is the one socket that the service manager passed to this process: sd_listen_fds(3).
func passed(s *state) (net.Listener, error) {
	const first = 3
	if pid := s.env("LISTEN_PID"); pid != strconv.Itoa(os.Getpid()) {
		return nil, fmt.Errorf("no socket was passed to this process (LISTEN_PID is %q)", pid)
	}
	if n := s.env("LISTEN_FDS"); n != "1" {
		return nil, fmt.Errorf("%q sockets were passed (LISTEN_FDS); want 1", n)
	}
	f := os.NewFile(first, "passed socket")
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("descriptor %d: %w", first, err)
	}
	if c, ok := l.(syscall.Conn); ok {
		if raw, err := c.SyscallConn(); err == nil {
			_ = transport.RetrySoon("", "", raw) // as good as it gets: the socket is not ours
		}
	}
	if u, ok := l.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false)
	}
	return l, nil
}

// notify tells the service manager, if there is one.
func notify(s *state, state ...string) {
	if err := mount.Notify(s.env("NOTIFY_SOCKET"), state...); err != nil {
		fmt.Fprintf(s.stderr, "%s: %v\n", s.program.Name, err)
	}
}

var errNoTLS = errors.New("the address is not loopback and there is no TLS: whoever reaches it could read and write. Use --tls DIR, a loopback address with a tunnel, or --insecure")

// exportArg takes [NAME=]FILE apart.
func exportArg(arg string) (name, location string, err error) {
	name, location, ok := strings.Cut(arg, "=")
	if !ok || strings.Contains(name, "/") {
		location = arg
		name = filepath.Base(arg)
	}
	switch {
	case location == "":
		return "", "", fmt.Errorf("%q: no file; want [NAME=]FILE", arg)
	case name == "" || name == "." || name == "/":
		return "", "", fmt.Errorf("%q: no name; want NAME=FILE", arg)
	case len(name) > maxExportName:
		return "", "", fmt.Errorf("name of %d bytes; the limit is %d", len(name), maxExportName)
	case !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl):
		return "", "", fmt.Errorf("name %q is not printable UTF-8", name)
	}
	return name, location, nil
}

// listenAddress takes --listen apart. A host is resolved here, once, so that
// what was checked is what is listened on.
func listenAddress(ctx context.Context, s string, insecure bool) (network, addr string, err error) {
	if path, ok := strings.CutPrefix(s, "unix:"); ok {
		if path == "" {
			return "", "", errors.New("no path; want unix:PATH")
		}
		return "unix", path, nil
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		if host, port, err = net.SplitHostPort(s + ":" + nbdPort); err != nil {
			return "", "", errors.New("want HOST:PORT, [HOST]:PORT or unix:PATH")
		}
	}
	if _, err := net.DefaultResolver.LookupPort(ctx, "tcp", port); err != nil {
		return "", "", fmt.Errorf("port %q: want 0 to 65535", port)
	}
	ip := net.IPv6unspecified
	if host != "" {
		ips, err := net.DefaultResolver.LookupIPAddr(ctx, host)
		if err != nil {
			return "", "", fmt.Errorf("resolve the host: %w", err)
		}
		ip = ips[0].IP
		host = ips[0].String()
	}
	if !ip.IsLoopback() && !insecure {
		return "", "", errNoTLS
	}
	return "tcp", net.JoinHostPort(host, port), nil
}

// exportURI is how clients name the region (doc/uri.md of the NBD project).
func exportURI(a net.Addr, transport, name string, secure bool) string {
	u := url.URL{Scheme: "nbd", Host: a.String(), Path: "/" + name}
	if transport != "nbd" {
		u.Scheme = transport
	} else if secure {
		u.Scheme = "nbds"
	}
	if a.Network() == "unix" {
		u.Scheme, u.Host = u.Scheme+"+unix", ""
		u.RawQuery = "socket=" + url.QueryEscape(a.String())
	}
	return u.String()
}
