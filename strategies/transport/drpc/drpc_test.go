package drpc

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"
	"storj.io/drpc/drpcwire"

	"memsync/strategies/region"
	"memsync/strategies/replay"
	"memsync/strategies/storetest"
	"memsync/strategies/transport"
	"memsync/strategies/transport/rpc"
	"memsync/strategies/transport/transporttest"
)

func factory(o transport.Options) transporttest.Factory {
	return transporttest.Factory{
		New: func(t transport.TLS) transport.Transport { return &Transport{TLS: t} }, Options: o, MaxRequest: rpc.MaxData,
		Oversize: func(t *testing.T, d transport.Dialer, n int64) error {
			return transporttest.Oversize(t, func(ctx context.Context) (rpc.Conn, error) { return (&Transport{}).dial(ctx, d, o.Stream) }, n)
		},
	}
}

func TestSuite(t *testing.T) {
	for name, o := range map[string]transport.Options{
		"unary": {}, "one connection": {Connections: 1}, "one at a time": {Connections: 3, Calls: 1}, "small messages": {Message: 8 << 10, Window: 64 << 10}, "stream": {Stream: true},
	} {
		t.Run(name, func(t *testing.T) { transporttest.Run(t, factory(o)) })
	}
}

// TestGivenUp: calls that are given up at any moment, also before their first byte is
// sent, cost those that come after them nothing.
func TestGivenUp(t *testing.T) {
	goroutines := goleak.IgnoreCurrent()
	defer goleak.VerifyNone(t, goroutines)
	content := region.Content{Seed: 1}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	tr := &Transport{}
	source, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	e := transport.NewLeases(transport.One{Store: storetest.Seeded(content, 1<<20)})
	go func() {
		done <- transport.Accept(source, l, transport.Limits{Connections: 8}, nil, func(ctx context.Context, c net.Conn) { _ = tr.Serve(ctx, c, e) })
	}()
	defer func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	s, err := tr.Open(ctx, transport.DialerTo(tr, l.Addr().String()), transport.Options{Connections: 1, Writer: "w"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	rnd := rand.New(rand.NewPCG(replay.Seed(t), 0))
	p := make([]byte, 4096)
	for i := range 600 {
		call, giveUp := context.WithTimeout(ctx, time.Duration(rnd.Int64N(int64(300*time.Microsecond))))
		if err := s.ReadAt(call, p, 0); err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("call %d, given up: %v", i, err)
		}
		giveUp()
		if i%10 > 0 {
			continue
		}
		if err := s.ReadAt(ctx, p, 0); err != nil {
			t.Fatalf("after call %d: %v", i, err)
		}
		if err := content.Check(p, 0); err != nil {
			t.Fatal(err)
		}
		if err := s.WriteAt(ctx, p, 0); err != nil {
			t.Fatalf("after call %d: %v", i, err)
		}
	}
}

// TestEndWithoutBeginning: a client that breaks the protocol so that the library stops
// reading, and leaves, does not keep its place at the source.
func TestEndWithoutBeginning(t *testing.T) {
	a, b := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- (&Transport{}).Serve(t.Context(), a, transport.One{Store: storetest.New(nil)}) }()
	frame := drpcwire.Frame{ID: drpcwire.ID{Stream: 1, Message: 1}, Kind: drpcwire.KindCancel, Done: true, Control: true}
	if _, err := b.Write(drpcwire.AppendFrame(nil, frame)); err != nil {
		t.Fatal(err)
	}
	b.Close()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(rpc.HandshakeTimeout + 30*time.Second):
		t.Error("still served")
	}
}

func TestTLS(t *testing.T) {
	transporttest.TLS(t, factory(transport.Options{Connections: 2}), transporttest.NewIdentities(t))
}
