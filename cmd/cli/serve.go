package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"memsync/strategies/backend"
	"memsync/strategies/region"
	"memsync/strategies/transport"
	"memsync/strategies/transport/cert"
	"memsync/strategies/transport/nbd"
)

const (
	nbdPort       = "10809" // IANA's
	maxExportName = 4096    // bytes; proto.md, "Conventions"
)

type serveOptions struct {
	listen      string
	readOnly    bool
	insecure    bool
	connections int
	tls         string
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
FILE is locked (flock) while it is served and is neither created nor resized. What a
client flushed is on disk. Runs until SIGINT or SIGTERM, and then exits with 130.`,
		Example: `  memsync serve disk.img
  memsync serve a=disk.img b=/dev/vdb --read-only --listen 127.0.0.1:0
  memsync serve disk.img --listen unix:/run/memsync.sock
  memsync serve disk.img --listen 10.0.0.1:10809 --tls /etc/memsync/tls
  memsync serve disk.img --listen 10.0.0.1:10809 --insecure`,
		RunE: func(_ *cobra.Command, args []string) error { return serve(s, o, args) },
	}
	f := c.Flags()
	f.StringVar(&o.listen, "listen", "127.0.0.1:"+nbdPort, "`ADDR` to answer on: HOST:PORT (port 0: a free one) or unix:PATH")
	f.BoolVar(&o.readOnly, "read-only", false, "refuse writes; FILE needs to be readable only")
	f.BoolVar(&o.insecure, "insecure", false, "answer on an address that is not loopback, without TLS: whoever reaches it can read and write")
	f.StringVar(&o.tls, "tls", "", "insist on TLS 1.3 and on a certificate of each client, with ca-cert.pem, server-cert.pem and server-key.pem of `DIR` (memsync certs), which are read anew when they change")
	f.IntVar(&o.connections, "connections", 64, "connections at once, 1 to 4096; each costs at most 64 MiB of buffers, so 64 bad clients at most 4 GiB in all")
	return c
}

func serve(s *state, o serveOptions, args []string) (err error) {
	if len(args) == 0 {
		return exitWith(exitUsage, errors.New("serve: no file given: memsync serve [NAME=]FILE"))
	}
	if o.connections < 1 || o.connections > 4096 {
		return exitWith(exitUsage, fmt.Errorf("--connections %d: want 1 to 4096", o.connections))
	}
	network, addr, err := listenAddress(s.ctx, o.listen, o.insecure || o.tls != "")
	if err != nil {
		return exitWith(exitUsage, fmt.Errorf("--listen %s: %w", o.listen, err))
	}
	t := &nbd.Transport{}
	if o.tls != "" {
		if t.ServerTLS, err = cert.ServerConfig(o.tls); err != nil {
			return exitWith(exitUsage, fmt.Errorf("--tls %s: %w", o.tls, err))
		}
		t.RequireTLS = true
	}
	var exports transport.Named
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
		store, err := backend.OpenLocation(s.ctx, location, o.readOnly)
		if err != nil {
			code := exitUsage
			if errors.Is(err, region.ErrNotPermitted) || errors.Is(err, fs.ErrPermission) {
				code = exitNotPermitted
			}
			return exitWith(code, fmt.Errorf("region %q: %w", name, err))
		}
		exports = append(exports, transport.Export{Name: name, Store: store})
	}
	lc := net.ListenConfig{Control: transport.RetrySoon} // connections inherit it
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(s.ctx, network, addr)
	if err != nil {
		return exitWith(exitFailed, err)
	}
	for _, e := range exports {
		fmt.Fprintf(s.stdout, "%s\t%d\t%s\n", e.Name, e.Store.Size(), exportURI(l.Addr(), e.Name, o.tls != ""))
	}
	fmt.Fprintf(s.stderr, "serving %d regions on %s\n", len(exports), l.Addr())
	leases := transport.NewLeases(exports)
	err = transport.Accept(s.ctx, l, o.connections, func(ctx context.Context, c net.Conn) {
		peer := c.RemoteAddr()
		if err := t.Serve(ctx, c, leases); err != nil && ctx.Err() == nil {
			fmt.Fprintf(s.stderr, "connection of %s: %v\n", peer, err)
		}
	})
	if err != nil {
		return exitWith(exitFailed, err)
	}
	return exitWith(exitInterrupted, nil)
}

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
		return "", "", errors.New("the address is not loopback and there is no TLS: whoever reaches it could read and write. Use --tls DIR, a loopback address with a tunnel, or --insecure")
	}
	return "tcp", net.JoinHostPort(host, port), nil
}

// exportURI is how clients name the region (doc/uri.md of the NBD project).
func exportURI(a net.Addr, name string, secure bool) string {
	u := url.URL{Scheme: "nbd", Host: a.String(), Path: "/" + name}
	if secure {
		u.Scheme = "nbds"
	}
	if a.Network() == "unix" {
		u.Scheme, u.Host = u.Scheme+"+unix", ""
		u.RawQuery = "socket=" + url.QueryEscape(a.String())
	}
	return u.String()
}
