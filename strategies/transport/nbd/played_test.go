package nbd

import (
	"bytes"
	"context"
	"net"
	"sync"
	"testing"
	"time"

	"memsync/strategies/transport"
)

// kinds are what a played session goes over: a connection that is no socket, which
// is read plainly, and sockets, for which there are recv(2), poll(2) and sendmsg(2).
var kinds = []string{"plain", "unix", "tcp"}

// played is a connection whose other side says something, then nothing more, and
// hears whatever is said to it.
type played struct {
	conn net.Conn // the type matters: only a bare socket is taken from Go's poller
	// heard closes the connection and returns what the other side has heard.
	heard func() []byte
}

// play makes one. It does not outlive the test.
func play(t testing.TB, kind string, says []byte) played {
	t.Helper()
	if kind == "plain" {
		s := newScript(says)
		return played{s, func() []byte {
			s.mu.Lock()
			defer s.mu.Unlock()
			return bytes.Clone(s.out.Bytes())
		}}
	}
	ours, theirs := pair(t, kind)
	_ = theirs.SetDeadline(time.Now().Add(20 * time.Second)) // more than any test waits
	var out bytes.Buffer
	var wg sync.WaitGroup
	wg.Go(func() {
		_, _ = theirs.Write(says)
		_ = theirs.(interface{ CloseWrite() error }).CloseWrite()
	})
	wg.Go(func() {
		_, _ = out.ReadFrom(theirs)
	})
	heard := sync.OnceValue(func() []byte {
		_ = ours.Close() // has been taken and closed where the session came to transmission
		wg.Wait()
		_ = theirs.Close()
		return out.Bytes()
	})
	t.Cleanup(func() { heard() })
	return played{ours, heard}
}

// pair returns two connected sockets.
func pair(t testing.TB, kind string) (a, b net.Conn) {
	t.Helper()
	if kind == "unix" {
		return socketpair(t)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err == nil {
		defer l.Close()
		if a, err = net.Dial("tcp", l.Addr().String()); err == nil {
			b, err = l.Accept()
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return a, b
}

// dialPlayed dials played connections.
func dialPlayed(t testing.TB, kind string, says []byte) transport.Dialer {
	return transport.DialFunc(func(context.Context) (net.Conn, error) { return play(t, kind, says).conn, nil })
}
