package quic

import (
	"context"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"

	"memsync/strategies/region"
	"memsync/strategies/storetest"
	"memsync/strategies/transport"
	"memsync/strategies/transport/rpc"
	"memsync/strategies/transport/transporttest"
)

func factory(o transport.Options) transporttest.Factory {
	return transporttest.Factory{
		New: func(t transport.TLS) transport.Transport { return &Transport{TLS: t} }, Options: o, MaxRequest: rpc.MaxData,
		Oversize: func(t *testing.T, d transport.Dialer, n int64) error {
			return transporttest.Oversize(t, func(ctx context.Context) (rpc.Conn, error) { return dial(ctx, d) }, n)
		},
	}
}

// TestResume: who comes back asks in early data; where the source has forgotten the
// session, it asks again after the handshake, and nothing is lost.
func TestResume(t *testing.T) {
	goroutines := goleak.IgnoreCurrent()
	defer goleak.VerifyNone(t, goroutines)
	content := region.Content{Seed: 1}
	e := transport.NewLeases(transport.One{Store: storetest.Seeded(content, 100_000)})
	tr := &Transport{}
	open := func(addr, writer string) *Conn {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		var c *Conn
		d := transport.DialFunc(func(ctx context.Context) (net.Conn, error) {
			nc, err := tr.Dial(ctx, addr)
			if err == nil {
				c = nc.(*Conn)
			}
			return nc, err
		})
		s, err := tr.Open(ctx, d, transport.Options{Writer: writer})
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 100_000)
		if err := s.ReadAt(ctx, p, 0); err != nil {
			t.Fatal(err)
		}
		if err := content.Check(p, 0); err != nil {
			t.Fatal(err)
		}
		if writer != "" {
			if err := s.WriteAt(ctx, p[:10], 0); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		return c
	}
	source := func(addr string) (_ string, stop func()) {
		t.Helper()
		l, err := (&Transport{}).Listen(t.Context(), addr, transport.Limits{})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() {
			done <- transport.Accept(ctx, l, transport.Limits{Connections: 8}, nil, func(ctx context.Context, c net.Conn) { _ = tr.Serve(ctx, c, e) })
		}()
		return l.Addr().String(), func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}
	addr, stop := source("127.0.0.1:0")
	if open(addr, "").Resumed() {
		t.Error("the first connection is resumed")
	}
	for _, writer := range []string{"", "w"} {
		if !open(addr, writer).Resumed() {
			t.Errorf("writer %q: the next connection is not resumed", writer)
		}
	}
	stop()
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) { // the port comes free a little later
		if l, err := net.ListenPacket("udp", addr); err == nil {
			l.Close()
			break
		} else if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	_, stop = source(addr)
	defer stop()
	for _, writer := range []string{"", "w"} {
		open(addr, writer)
	}
}

func TestSuite(t *testing.T) {
	for name, o := range map[string]transport.Options{
		"default": {}, "more connections": {Connections: 3}, "one at a time": {Calls: 1}, "small messages": {Message: 8 << 10, Window: 64 << 10},
	} {
		t.Run(name, func(t *testing.T) { transporttest.Run(t, factory(o)) })
	}
}

func TestTLS(t *testing.T) {
	transporttest.TLS(t, factory(transport.Options{Connections: 2}), transporttest.NewIdentities(t))
}
