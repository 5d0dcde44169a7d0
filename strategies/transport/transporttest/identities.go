package transporttest

import (
	"crypto/tls"
	"path/filepath"
	"testing"
	"time"

	"memsync/strategies/transport/cert"
)

// NewIdentities makes certificates for a source on 127.0.0.1.
func NewIdentities(t *testing.T) (id Identities) {
	t.Helper()
	sides := func(name, host string, valid time.Duration) (server, client *tls.Config) {
		dir := filepath.Join(t.TempDir(), name)
		a, err := cert.OpenAuthority(dir, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		return issued(t, a, dir, host, valid)
	}
	dir := filepath.Join(t.TempDir(), "ca")
	a, err := cert.OpenAuthority(dir, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	id.ServerExpired, id.Expired = issued(t, a, dir, "127.0.0.1", -time.Second)
	id.ServerElsewhere, _ = issued(t, a, dir, "elsewhere.example", time.Hour)
	id.Server, id.Client = issued(t, a, dir, "127.0.0.1", time.Hour)
	id.Nameless = &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: id.Client.RootCAs, ServerName: "127.0.0.1"}
	id.ServerOther, id.Other = sides("other", "127.0.0.1", time.Hour)
	id.Other.RootCAs = id.Client.RootCAs // it knows the source; the source does not know it
	return id
}

// issued loads what a issues at once: the files are for the next ones.
func issued(t *testing.T, a *cert.Authority, dir, host string, valid time.Duration) (server, client *tls.Config) {
	t.Helper()
	for _, name := range []string{cert.Server, cert.Client} {
		if _, err := a.Issue(name, []string{host}, valid); err != nil {
			t.Fatal(err)
		}
	}
	server, err := cert.ServerConfig(dir)
	if err != nil {
		t.Fatal(err)
	}
	if client, err = cert.ClientConfig(dir, "127.0.0.1"); err != nil {
		t.Fatal(err)
	}
	s, err := server.GetCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	server.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s, nil }
	c, err := client.GetClientCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	client.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c, nil }
	return server, client
}
