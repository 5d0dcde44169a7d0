package nbd

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"memsync/strategies/region"
	"memsync/strategies/storetest"
	"memsync/strategies/transport"
)

// TestLease: one writer at a time, many readers; a writer that comes back keeps
// its epoch unless another one wrote meanwhile; who never asked is refused from
// the moment that somebody did.
func TestLease(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	tr := &Transport{}
	exports := transport.NewLeases(transport.One{Name: "r", Store: storetest.New(make([]byte, 1<<16))})
	serving, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { _ = tr.Serve(serving, c, exports) })
		}
	})
	defer wg.Wait()
	defer l.Close()
	defer stop()
	dial := transport.DialFunc(func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", l.Addr().String())
	})
	open := func(writer string, readOnly bool) (*Client, error) {
		s, err := tr.Open(ctx, dial, transport.Options{Name: "r", Connections: 3, Writer: writer, ReadOnly: readOnly})
		if err != nil {
			return nil, err
		}
		return s.(*Client), nil
	}
	must := func(c *Client, err error) *Client {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	write := func(c *Client) error { return c.WriteAt(ctx, []byte("x"), 9) }
	// gone closes c and waits until the source has noticed.
	gone := func(c *Client, next string) *Client {
		t.Helper()
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		for {
			n, err := open(next, false)
			if !errors.Is(err, region.ErrNotPermitted) {
				return must(n, err)
			}
			time.Sleep(time.Millisecond)
		}
	}

	foreign := must(open("", false)) // as a client that knows no leases
	defer foreign.Close()
	if err := write(foreign); err != nil {
		t.Errorf("nobody has the lease, and a foreign client's write gives %v", err)
	}
	a := must(open("a", false))
	if a.Epoch() != 1 || foreign.Epoch() != 0 {
		t.Errorf("epochs %d and %d, want 1 and 0", a.Epoch(), foreign.Epoch())
	}
	if err := write(a); err != nil {
		t.Errorf("the writer's write: %v", err)
	}
	if err := write(foreign); err == nil {
		t.Error("a foreign client writes beside the writer")
	}
	if _, err := open("b", false); !errors.Is(err, region.ErrNotPermitted) {
		t.Errorf("a second writer: %v, want ErrNotPermitted", err)
	}
	reader := must(open("", true))
	defer reader.Close()
	if err := reader.ReadAt(ctx, make([]byte, 10), 0); err != nil {
		t.Errorf("a reader beside the writer: %v", err)
	}
	a = gone(a, "a")
	if a.Epoch() != 1 {
		t.Errorf("epoch %d of the writer that came back, want 1", a.Epoch())
	}
	b := gone(a, "b")
	if b.Epoch() != 2 {
		t.Errorf("epoch %d of the next writer, want 2", b.Epoch())
	}
	a = gone(b, "a")
	if a.Epoch() != 3 {
		t.Errorf("epoch %d of a writer that came back after another, want 3", a.Epoch())
	}
	if err := errors.Join(write(a), a.Close()); err != nil {
		t.Error(err)
	}
}
