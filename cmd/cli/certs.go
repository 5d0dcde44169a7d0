package cli

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"memsync/strategies/transport/cert"
)

type certsOptions struct {
	hosts     []string
	client    string
	valid, ca time.Duration
}

func newCertsCmd(s *state) *cobra.Command {
	var o certsOptions
	c := &cobra.Command{
		Use:   "certs DIR",
		Short: "Make or renew the certificates of mutual TLS",
		Long: `Makes a CA in DIR, where there is none, and issues a key and a certificate each for a
server and a client: ca-cert.pem, ca-key.pem, server-cert.pem, server-key.pem,
client-cert.pem, client-key.pem. These are the names that libnbd, nbdkit and QEMU look
for, so DIR is also what their options for TLS take.

Run again it renews both and keeps the CA. A server that runs takes the new ones for
its next connection; those that stand go on. Keep ca-key.pem where the certificates are
made: give a server ca-cert.pem and server-*, a client ca-cert.pem and client-*.

With --client NAME it issues a certificate of that name, for serve --allow, into the
folder DIR/NAME with all that such a client needs, and nothing else.

stdout has a line for each certificate: file, end of its validity.`,
		Example: `  memsync certs /etc/memsync/tls --host source.example --host 10.0.0.1
  memsync certs /etc/memsync/tls --client alice
  memsync certs tls --valid 24h && memsync serve disk.img --tls tls --listen 0.0.0.0:10809`,
		RunE: func(_ *cobra.Command, args []string) error { return certs(s, o, args) },
	}
	f := c.Flags()
	f.StringArrayVar(&o.hosts, "host", []string{"localhost", "127.0.0.1", "::1"}, "`NAME` or address that clients reach the server at; may be repeated")
	f.StringVar(&o.client, "client", "", "issue a certificate for the client `NAME` only, into the folder DIR/NAME")
	durationFlag(f, &o.valid, "valid", 24*time.Hour, "how long the certificates are valid, at most as long as the CA")
	durationFlag(f, &o.ca, "ca-valid", 30*24*time.Hour, "how long a new CA is valid")
	return c
}

func certs(s *state, o certsOptions, args []string) error {
	switch {
	case len(args) != 1 || args[0] == "":
		return exitWith(exitUsage, errors.New("certs: want one folder: memsync certs DIR"))
	case o.valid < time.Second || o.ca < time.Second:
		return exitWith(exitUsage, errors.New("--valid and --ca-valid: want at least 1s"))
	}
	if strings.ContainsAny(o.client, "/\t\n*") || strings.HasPrefix(o.client, ".") || len(o.client) > 64 {
		return exitWith(exitUsage, fmt.Errorf("--client %q: want a name of at most 64 bytes that a folder can have and a line of serve --allow, without *", o.client))
	}
	for _, h := range o.hosts {
		if net.ParseIP(h) == nil && (h == "" || strings.ContainsAny(h, " :/")) {
			return exitWith(exitUsage, fmt.Errorf("--host %q: want a name or an address, without a port", h))
		}
	}
	a, err := cert.OpenAuthority(args[0], o.ca)
	if err != nil {
		return exitWith(exitFailed, err)
	}
	line := func(name string, until time.Time) {
		fmt.Fprintf(s.stdout, "%s\t%s\n", filepath.Join(args[0], name+"-cert.pem"), until.UTC().Format(time.RFC3339))
	}
	line("ca", a.Expires())
	if o.client != "" {
		until, err := a.IssueClient(o.client, o.valid)
		if err != nil {
			return exitWith(exitFailed, err)
		}
		line(filepath.Join(o.client, cert.Client), until)
		return nil
	}
	for _, name := range []string{cert.Server, cert.Client} {
		until, err := a.Issue(name, o.hosts, o.valid)
		if err != nil {
			return exitWith(exitFailed, err)
		}
		line(name, until)
	}
	return nil
}
