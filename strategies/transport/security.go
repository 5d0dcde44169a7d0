package transport

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// TLS is how a transport secures its connections. nil in both is not at all.
type TLS struct {
	Server *tls.Config // a source insists on it
	Client *tls.Config // a daemon insists on it
}

// TLSError says in a sentence what a handshake with peer ("client", "source")
// failed of. It matches region.ErrNotPermitted where one side refuses the other.
func TLSError(peer string, err error) error {
	var (
		plain   tls.RecordHeaderError
		alert   tls.AlertError
		invalid x509.CertificateInvalidError
		unknown x509.UnknownAuthorityError
		host    x509.HostnameError
	)
	why, kind := "", region.ErrNotPermitted
	switch {
	case errors.As(err, &plain):
		why = "it does not speak TLS on this port"
	case errors.As(err, &unknown):
		why = "its certificate is of another CA"
	case errors.As(err, &host):
		why = "its certificate is for another host"
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		why = "its certificate has expired or is not valid yet"
	case errors.As(err, &invalid):
		why = "its certificate does not hold"
	case errors.As(err, &alert):
		why = "it refuses our certificate or parameters"
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, unix.ECONNRESET):
		why, kind = "it hung up: no TLS on this port, or our certificate is not accepted", region.ErrPeerGone
	default:
		return fmt.Errorf("TLS with the %s: %w", peer, err)
	}
	return fmt.Errorf("TLS with the %s: %s: %w: %w", peer, why, err, kind)
}

// TuneTCP makes a lost peer of a TCP connection known within two minutes, and
// small messages leave at once. Other connections stay as they are.
func TuneTCP(nc net.Conn) {
	tc, ok := nc.(*net.TCPConn)
	if !ok {
		return
	}
	_ = tc.SetNoDelay(true)
	_ = tc.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 15 * time.Second, Count: 6})
	raw, err := tc.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) { // Linux 2.6.37
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int((2 * time.Minute).Milliseconds()))
	})
}
