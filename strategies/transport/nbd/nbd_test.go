package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"memsync/strategies/region"
	"memsync/strategies/transport"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "nbd-test-role" {
		os.Exit(role(os.Args[2:]))
	}
	goleak.VerifyTestMain(m)
}

// exports serves several stores by name.
type exports map[string]region.Store

func (e exports) Open(name string) (region.Store, error) {
	if s, ok := e[name]; ok {
		return s, nil
	}
	return nil, fmt.Errorf("export %q: %w", name, region.ErrMissing)
}

func (e exports) List() (names []string) {
	for n := range e {
		names = append(names, n)
	}
	return names
}

// server serves exports on a loopback port until the test ends.
type server struct {
	transport.Dialer
	addr    string
	exports transport.Exports
	t       testing.TB
	ended   chan error
}

func serve(t testing.TB, tr *Transport, e transport.Exports) *server {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &server{t: t, exports: e, addr: ln.Addr().String(), ended: make(chan error, 1000)}
	s.Dialer = transport.DialFunc(func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", s.addr)
	})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { s.ended <- tr.Serve(ctx, c, e) })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		cancel()
		wg.Wait()
	})
	return s
}

// await returns how the next connection ended.
func (s *server) await() error {
	s.t.Helper()
	select {
	case err := <-s.ended:
		return err
	case <-time.After(10 * time.Second):
		s.t.Fatal("connection has not ended")
		return nil
	}
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func open(t testing.TB, tr *Transport, d transport.Dialer, o transport.Options) *Client {
	t.Helper()
	if o.Connections == 0 {
		o.Connections = 1
	}
	s, err := tr.Open(testContext(t), d, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s.(*Client)
}

func TestReadWrite(t *testing.T) {
	const size = 5<<20 + 123
	for name, make := range map[string]func() region.Store{
		"memory": func() region.Store { return viewed{newRAM(size, 1)} },
		"slow":   func() region.Store { return &slow{ram: newRAM(size, 1), max: 2 * time.Millisecond} },
		"sparse": func() region.Store { return newSparse(size, 1) },
		"blocky": func() region.Store { return blocky{&slow{ram: newRAM(6<<20, 1)}, 4096} },
	} {
		for _, conns := range []int{1, 4} {
			t.Run(fmt.Sprintf("%s/%d", name, conns), func(t *testing.T) {
				t.Parallel()
				store := make()
				tr := &Transport{}
				s := serve(t, tr, transport.One{Name: "r", Store: store})
				c := open(t, tr, s, transport.Options{Name: "r", Connections: conns})
				if !c.Export().Extended || !c.Export().Allocation || c.Connections() != conns {
					t.Errorf("negotiated %+v over %d connections", c.Export(), c.Connections())
				}
				if c.Size() != store.Size() {
					t.Fatalf("size %d, want %d", c.Size(), store.Size())
				}
				ctx := testContext(t)
				want := append([]byte(nil), contentOf(t, store)...)
				all := func() {
					t.Helper()
					got := bytes.Repeat([]byte{0xa5}, int(c.Size()))
					if err := c.ReadAt(ctx, got, 0); err != nil {
						t.Fatal(err)
					}
					if !bytes.Equal(got, want) {
						t.Fatal("content differs")
					}
				}
				all()
				// Writers on disjoint stripes, at any offset and of any class, and readers of their own stripes.
				const stripes = 8
				var wg sync.WaitGroup
				for i := range stripes {
					wg.Go(func() {
						rnd := rand.New(rand.NewPCG(uint64(i), 7))
						lo, hi := c.Size()/stripes*int64(i), c.Size()/stripes*int64(i+1)
						if name == "blocky" {
							lo, hi = lo&^4095, hi&^4095
						}
						for range 40 {
							off := lo + rnd.Int64N(hi-lo)
							n := 1 + rnd.Int64N(min(hi-off, 300<<10))
							ctx := region.WithClass(ctx, region.Class(rnd.IntN(3)))
							if rnd.IntN(2) == 0 {
								region.Content{Seed: rnd.Uint64()}.Fill(want[off:off+n], off)
								if err := c.WriteAt(ctx, want[off:off+n], off); err != nil {
									t.Error(err)
								}
								continue
							}
							p := bytes.Repeat([]byte{0x5a}, int(n))
							if err := c.ReadAt(ctx, p, off); err != nil {
								t.Error(err)
							} else if !bytes.Equal(p, want[off:off+n]) {
								t.Errorf("[%d, +%d) differs", off, n)
							}
						}
					})
				}
				wg.Wait()
				if err := c.Flush(ctx); err != nil {
					t.Fatal(err)
				}
				all()
				if !bytes.Equal(contentOf(t, store), want) {
					t.Error("the store's content differs")
				}
				if err := c.Close(); err != nil {
					t.Fatal(err)
				}
				for range conns {
					if err := s.await(); err != nil {
						t.Errorf("server: %v", err)
					}
				}
				if err := c.ReadAt(ctx, want[:1], 0); !errors.Is(err, region.ErrClosed) {
					t.Errorf("read after Close: %v", err)
				}
			})
		}
	}
}

func contentOf(t testing.TB, s region.Store) []byte {
	p := make([]byte, s.Size())
	if err := s.ReadAt(testContext(t), p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}
