package transport

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
	"memsync/strategies/storetest"
)

func TestNamed(t *testing.T) {
	a, b := storetest.New([]byte("a")), storetest.New([]byte("b"))
	n := Named{{"a", a}, {"b", b}}
	if s, err := n.Open("b"); s != region.Store(b) || err != nil {
		t.Errorf("%v, %v", s, err)
	}
	for _, name := range []string{"", "c"} {
		if _, err := n.Open(name); !errors.Is(err, region.ErrMissing) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if s, err := n[:1].Open(""); s != region.Store(a) || err != nil {
		t.Errorf("the empty name of one: %v, %v", s, err)
	}
}

// TestAccept: never more handlers than the limit, all joined at the end, and a
// listener that lacks descriptors for a while goes on.
func TestAccept(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &lacking{Listener: inner}
	l.lack.Store(3)
	ctx, cancel := context.WithCancel(t.Context())
	var now, most, served atomic.Int32
	done := make(chan error, 1)
	go func() {
		done <- Accept(ctx, l, Limits{Connections: 2}, nil, func(ctx context.Context, c net.Conn) {
			most.Store(max(most.Load(), now.Add(1)))
			served.Add(1)
			time.Sleep(time.Millisecond)
			if served.Load() == 10 {
				<-ctx.Done()
			}
			c.Close()
			now.Add(-1)
		})
	}()
	for range 10 {
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	for end := time.Now().Add(10 * time.Second); served.Load() < 10; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d of 10 served", served.Load())
		}
	}
	cancel()
	if err := <-done; err != nil || now.Load() != 0 || most.Load() > 2 {
		t.Errorf("%v, %d handlers at the end, %d at once", err, now.Load(), most.Load())
	}
	if _, err := net.Dial("tcp", inner.Addr().String()); err == nil {
		t.Error("still listening")
	}
	if err := Accept(t.Context(), l, Limits{}, nil, nil); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a listener that failed: %v", err)
	}
}

// lacking is a listener that fails some times.
type lacking struct {
	net.Listener
	lack atomic.Int32
}

func (l *lacking) Accept() (net.Conn, error) {
	if l.lack.Add(-1) >= 0 {
		return nil, &net.OpError{Op: "accept", Err: unix.EMFILE}
	}
	return l.Listener.Accept()
}
