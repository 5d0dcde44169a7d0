package cert

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func authority(t *testing.T) (string, *Authority) {
	dir := filepath.Join(t.TempDir(), "certs")
	a, err := OpenAuthority(dir, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	issue(t, a)
	return dir, a
}

func issue(t *testing.T, a *Authority) {
	t.Helper()
	for _, name := range []string{Server, Client} {
		if _, err := a.Issue(name, []string{"127.0.0.1", "source.example"}, 30*time.Minute); err != nil {
			t.Fatal(err)
		}
	}
}

// handshake connects the two sides and returns the serial number of the server's certificate.
func handshake(server, client *tls.Config) (serial string, err error) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	s, c := tls.Server(a, server), tls.Client(b, client)
	done := make(chan error, 1)
	go func() {
		err := s.HandshakeContext(ctx)
		if err != nil {
			a.Close()
		}
		done <- err
	}()
	err = c.HandshakeContext(ctx)
	if err != nil {
		b.Close()
	}
	if serr := <-done; err == nil {
		err = serr
	}
	if err == nil {
		serial = c.ConnectionState().PeerCertificates[0].SerialNumber.String()
	}
	return serial, err
}

// TestRotate: a certificate that is issued again is used by the next handshake; half a pair is not.
func TestRotate(t *testing.T) {
	dir, a := authority(t)
	server, err := ServerConfig(dir)
	if err != nil {
		t.Fatal(err)
	}
	client, err := ClientConfig(dir, "source.example")
	if err != nil {
		t.Fatal(err)
	}
	first, err := handshake(server, client)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := handshake(server, client); err != nil || again != first {
		t.Fatalf("%s, %v, want %s", again, err, first)
	}
	again, err := OpenAuthority(dir, time.Hour) // the same one
	if err != nil || !again.cert.Equal(a.cert) {
		t.Fatal("another CA", err)
	}
	issue(t, again)
	second, err := handshake(server, client)
	if err != nil || second == first {
		t.Fatalf("after rotation: %s, %v; before: %s", second, err, first)
	}
	if err := os.WriteFile(file(dir, Server, "key"), []byte("nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := handshake(server, client); err != nil || got != second {
		t.Fatalf("with a broken key file: %s, %v, want %s", got, err, second)
	}
	if _, err := ServerConfig(dir); err == nil {
		t.Error("a broken key file: no error")
	}
}

func TestIssue(t *testing.T) {
	dir, a := authority(t)
	for name, mode := range map[string]os.FileMode{"ca-key.pem": 0o600, "server-key.pem": 0o600, "client-key.pem": 0o600, "ca-cert.pem": 0o644, "server-cert.pem": 0o644, "client-cert.pem": 0o644} {
		fi, err := os.Stat(filepath.Join(dir, name))
		if err != nil || fi.Mode() != mode {
			t.Errorf("%s: %v, %v", name, fi.Mode(), err)
		}
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 6 {
		t.Errorf("%d files in the folder", len(entries))
	}
	until, err := a.Issue(Server, nil, 1000*time.Hour)
	if err != nil || until.After(a.Expires()) {
		t.Errorf("valid until %v, longer than the CA, %v: %v", until, a.Expires(), err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "client-cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	p, _ := pem.Decode(b)
	c, err := x509.ParseCertificate(p.Bytes)
	if err != nil || c.IsCA || c.ExtKeyUsage[0] != x509.ExtKeyUsageClientAuth || len(c.IPAddresses) != 1 || len(c.DNSNames) != 1 {
		t.Errorf("client's certificate: %+v, %v", c, err)
	}
	old := filepath.Join(t.TempDir(), "old")
	if _, err := OpenAuthority(old, -time.Second); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenAuthority(old, time.Hour); err == nil {
		t.Error("a CA that has expired: no error")
	}
	if _, err := ClientConfig(t.TempDir(), "x"); err == nil {
		t.Error("an empty folder: no error")
	}
}
