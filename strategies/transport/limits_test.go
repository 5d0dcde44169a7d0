package transport

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func addr(host string) net.Addr { return &net.TCPAddr{IP: net.ParseIP(host), Port: 1} }

// TestGuard: one peer has no more connections and no more memory than its share, and
// what it has does not keep others from theirs.
func TestGuard(t *testing.T) {
	defer goleak.VerifyNone(t)
	const share = 12 << 20
	g := NewGuard(Limits{PeerConnections: 2, Memory: 2 * share, PeerMemory: share})
	enter := func(host string) *Place {
		t.Helper()
		p, err := g.Enter(addr(host))
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	a, b := enter("127.0.0.1"), enter("127.0.0.1")
	if _, err := g.Enter(addr("127.0.0.1")); !errors.Is(err, ErrLimit) {
		t.Errorf("a third connection: %v", err)
	}
	other := enter("127.0.0.2")
	free := a.TryWork(1 << 40) // as much as there is
	if free == nil || b.TryWork(1) != nil {
		t.Error("two connections of a peer have a share each")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := b.Work(ctx, 1); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("memory over the share: %v", err)
	}
	if f := other.TryWork(share / 2); f == nil {
		t.Error("another peer has nothing")
	} else {
		f()
	}
	if f, err := b.Receive(t.Context(), share/6); err != nil { // of another kind
		t.Error(err)
	} else {
		f()
	}
	if f := a.TryAhead(share / 3); f == nil || b.TryAhead(1) != nil {
		t.Error("what is received ahead")
	} else {
		f()
	}
	third := enter("127.0.0.3")
	if f := other.TryWork(share / 2); f == nil || third.TryWork(1) != nil {
		t.Error("more than in all")
	} else {
		f()
	}
	free()
	if f := b.TryWork(1); f == nil {
		t.Error("what was given back is gone")
	} else {
		f()
	}
	for range 2 {
		a.Leave()
	}
	enter("127.0.0.1").Leave()
	b.Leave()
	other.Leave()
	third.Leave()
	if n := len(g.peers); n != 0 {
		t.Errorf("%d peers are remembered", n)
	}
}

func TestLimitsCheck(t *testing.T) {
	for _, l := range []Limits{{}, {Memory: MinMemory}, {PeerMemory: MinMemory}, {Request: MinRequest, Idle: 1}, {Connections: 4096, PeerConnections: 1}} {
		if err := l.Check(); err != nil {
			t.Errorf("%+v: %v", l, err)
		}
	}
	for _, l := range []Limits{{Connections: -1}, {Connections: 4097}, {PeerConnections: 5000}, {Memory: 1}, {PeerMemory: 1}, {Memory: 2 * MinMemory, PeerMemory: 3 * MinMemory}, {Request: 1}, {Idle: -1}, {Stall: -1}} {
		if l.Check() == nil {
			t.Errorf("%+v is taken", l)
		}
	}
}

// TestAcceptPeer: one connection too many of a peer is closed and told of; others stay.
func TestAcceptPeer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	refused, done := make(chan error, 1), make(chan error, 1)
	go func() {
		done <- Accept(ctx, l, Limits{PeerConnections: 1}, func(err error) { refused <- err }, func(ctx context.Context, c net.Conn) {
			if PlaceOf(ctx).Limits().PeerConnections != 1 {
				t.Error("the place is another one")
			}
			<-ctx.Done()
			c.Close()
		})
	}()
	conns := make([]net.Conn, 2)
	for i := range conns {
		if conns[i], err = net.Dial("tcp", l.Addr().String()); err != nil {
			t.Fatal(err)
		}
		defer conns[i].Close()
	}
	select {
	case err := <-refused:
		if !errors.Is(err, ErrLimit) {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("nothing is refused")
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
