// Package cert makes the certificates of mutual TLS and loads them: a CA of one's
// own, short-lived certificates that it issues, and configurations of package tls
// that follow the files while connections go on.
//
// A folder has ca-cert.pem, ca-key.pem, server-cert.pem, server-key.pem,
// client-cert.pem and client-key.pem: the names that libnbd, nbdkit and QEMU look for.
package cert

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"memsync/strategies/region"
)

// The names of those to whom an Authority issues.
const (
	Server = "server"
	Client = "client"
)

// skew is how long before it is issued a certificate is valid: clocks differ.
const skew = 5 * time.Minute

// Authority is a CA in a folder.
type Authority struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func file(dir, name, what string) string { return filepath.Join(dir, name+"-"+what+".pem") }

// OpenAuthority returns the CA in dir, or makes one that is valid for valid where
// there is none. A CA that has expired is an error.
func OpenAuthority(dir string, valid time.Duration) (*Authority, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	pair, err := tls.LoadX509KeyPair(file(dir, "ca", "cert"), file(dir, "ca", "key"))
	if errors.Is(err, fs.ErrNotExist) {
		return newAuthority(dir, valid)
	}
	if err != nil {
		return nil, fmt.Errorf("CA in %s: %w", dir, err)
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	switch {
	case !ok || !pair.Leaf.IsCA:
		return nil, fmt.Errorf("CA in %s: not one that memsync made: %w", dir, region.ErrNotSupported)
	case time.Now().After(pair.Leaf.NotAfter):
		return nil, fmt.Errorf("CA in %s: expired on %s; remove ca-cert.pem and ca-key.pem to make another", dir, pair.Leaf.NotAfter.Format(time.RFC3339))
	}
	return &Authority{dir, pair.Leaf, key}, nil
}

func newAuthority(dir string, valid time.Duration) (*Authority, error) {
	c, err := template("memsync CA", valid)
	if err != nil {
		return nil, err
	}
	c.IsCA, c.BasicConstraintsValid, c.MaxPathLenZero = true, true, true
	c.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		return nil, err
	}
	if err := write(dir, "ca", der, key); err != nil {
		return nil, err
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	return &Authority{dir, c, key}, nil
}

func template(name string, valid time.Duration) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	now := time.Now()
	return &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-skew), NotAfter: now.Add(valid)}, nil
}

// Expires is when the CA does.
func (a *Authority) Expires() time.Time { return a.cert.NotAfter }

// Issue makes a key and a certificate for name (Server or Client), valid for hosts,
// which are DNS names and IP addresses, and not longer than the CA. It replaces the
// files of an earlier one; who uses them goes on and takes the new ones for its
// next connection.
func (a *Authority) Issue(name string, hosts []string, valid time.Duration) (expires time.Time, err error) {
	return a.issue(a.dir, name, "memsync "+name, hosts, valid)
}

// IssueClient makes a key and a certificate for the client called who, whom a server
// tells from others by that name, in the folder of that name below the CA's, with a copy
// of the CA's certificate: the folder is all that the client needs.
func (a *Authority) IssueClient(who string, valid time.Duration) (expires time.Time, err error) {
	dir := filepath.Join(a.dir, who)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return expires, err
	}
	if err := put(dir, file(dir, "ca", "cert"), "CERTIFICATE", a.cert.Raw, 0o644); err != nil {
		return expires, err
	}
	return a.issue(dir, Client, who, nil, valid)
}

func (a *Authority) issue(dir, name, subject string, hosts []string, valid time.Duration) (expires time.Time, err error) {
	c, err := template(subject, valid)
	if err != nil {
		return expires, err
	}
	if c.NotAfter.After(a.cert.NotAfter) {
		c.NotAfter = a.cert.NotAfter
	}
	c.KeyUsage = x509.KeyUsageDigitalSignature
	c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	if name == Client {
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			c.IPAddresses = append(c.IPAddresses, ip)
		} else {
			c.DNSNames = append(c.DNSNames, h)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return expires, err
	}
	der, err := x509.CreateCertificate(rand.Reader, c, a.cert, key.Public(), a.key)
	if err != nil {
		return expires, err
	}
	return c.NotAfter, write(dir, name, der, key)
}

// write replaces name's files. Between the two a reader may find a pair that does
// not fit, and keeps the old one.
func write(dir, name string, der []byte, key *ecdsa.PrivateKey) error {
	k, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return errors.Join(put(dir, file(dir, name, "key"), "PRIVATE KEY", k, 0o600), put(dir, file(dir, name, "cert"), "CERTIFICATE", der, 0o644))
}

// put makes or replaces one file of dir.
func put(dir, path, kind string, b []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(dir, ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	err = pem.Encode(f, &pem.Block{Type: kind, Bytes: b})
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	return err
}

// ServerConfig is the configuration of a source with the certificates of dir: TLS
// 1.3, and every client must have a certificate of the CA. Its own certificate
// follows the files from one handshake to the next (while new ones do not load the
// old ones hold); the CA does not.
func ServerConfig(dir string) (*tls.Config, error) {
	l := &loader{dir: dir, name: Server}
	if err := l.load(); err != nil {
		return nil, err
	}
	return &tls.Config{MinVersion: tls.VersionTLS13, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: l.pool,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return l.current(), nil }}, nil
}

// ClientConfig is the configuration of a daemon with the certificates of dir: TLS
// 1.3, and the source must have a certificate of the CA for host, which may be a
// name or an address. Its own certificate follows the files, as a source's does.
func ClientConfig(dir, host string) (*tls.Config, error) {
	l := &loader{dir: dir, name: Client}
	if err := l.load(); err != nil {
		return nil, err
	}
	return &tls.Config{MinVersion: tls.VersionTLS13, ServerName: host, RootCAs: l.pool,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return l.current(), nil }}, nil
}

// loader has the certificates of one side as they were last read.
type loader struct {
	dir, name string

	mu    sync.Mutex
	state [3]time.Time // of the files
	pair  *tls.Certificate
	pool  *x509.CertPool
}

func (l *loader) load() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	files := [3]string{file(l.dir, "ca", "cert"), file(l.dir, l.name, "cert"), file(l.dir, l.name, "key")}
	var state [3]time.Time
	for i, f := range files {
		fi, err := os.Stat(f)
		if err != nil {
			return fmt.Errorf("certificates: %w", err)
		}
		state[i] = fi.ModTime()
	}
	if state == l.state {
		return nil
	}
	ca, err := os.ReadFile(files[0])
	if err != nil {
		return fmt.Errorf("certificates: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		return fmt.Errorf("certificates: %s has no certificate in PEM", files[0])
	}
	pair, err := tls.LoadX509KeyPair(files[1], files[2])
	if err != nil {
		return fmt.Errorf("certificates: %s and %s: %w", files[1], files[2], err)
	}
	l.state, l.pair, l.pool = state, &pair, pool
	return nil
}

// current is the certificate of the files, or the last that loaded.
func (l *loader) current() *tls.Certificate {
	_ = l.load()
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.pair
}
