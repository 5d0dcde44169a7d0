package nbd

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"memsync/strategies/region"
	"memsync/strategies/transport"
	"memsync/strategies/transport/flow"
)

// plain hides that a connection is a socket.
type plain struct{ net.Conn }

// testTLS makes a server's and a client's configuration that trust each other.
func testTLS(t testing.TB) (server, client *tls.Config) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "source"}, DNSNames: []string{"source"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
		&tls.Config{RootCAs: roots, ServerName: "source"}
}

// links are the ways to connect client and server; each gives a dialer.
func links(t testing.TB, e transport.Exports) map[string]func() (*Transport, transport.Dialer) {
	return map[string]func() (*Transport, transport.Dialer){
		"tcp": func() (*Transport, transport.Dialer) { tr := &Transport{}; return tr, serve(t, tr, e) },
		"wrapped": func() (*Transport, transport.Dialer) {
			tr := &Transport{}
			s := serve(t, tr, e)
			return tr, transport.DialFunc(func(ctx context.Context) (net.Conn, error) {
				c, err := s.Dial(ctx)
				return plain{c}, err
			})
		},
		"pipe": func() (*Transport, transport.Dialer) { tr := &Transport{}; return tr, pipes(t, tr, e) },
		"tls": func() (*Transport, transport.Dialer) {
			srv, cli := testTLS(t)
			tr := &Transport{ServerTLS: srv, RequireTLS: true, ClientTLS: cli}
			return tr, serve(t, tr, e)
		},
		"unix": func() (*Transport, transport.Dialer) {
			tr := &Transport{}
			var wg sync.WaitGroup
			ctx, cancel := context.WithCancel(context.Background())
			t.Cleanup(func() { cancel(); wg.Wait() })
			return tr, transport.DialFunc(func(context.Context) (net.Conn, error) {
				a, b := socketpair(t)
				wg.Go(func() { tr.Serve(ctx, a, e) })
				return b, nil
			})
		},
	}
}

func socketpair(t testing.TB) (a, b net.Conn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	conns := [2]net.Conn{}
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		if conns[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	return conns[0], conns[1]
}

// pipes serves over net.Pipe, which has no buffer at all.
func pipes(t testing.TB, tr *Transport, e transport.Exports) transport.Dialer {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	t.Cleanup(func() { cancel(); wg.Wait() })
	return transport.DialFunc(func(context.Context) (net.Conn, error) {
		a, b := net.Pipe()
		wg.Go(func() { tr.Serve(ctx, a, e) })
		return b, nil
	})
}

func TestLinks(t *testing.T) {
	store := &slow{ram: newRAM(4<<20, 3), max: time.Millisecond}
	for name, link := range links(t, transport.One{Store: store}) {
		t.Run(name, func(t *testing.T) {
			tr, d := link()
			c := open(t, tr, d, transport.Options{Connections: 2})
			ctx, cancel := context.WithCancel(testContext(t))
			defer cancel()
			var wg sync.WaitGroup
			for i := range int64(8) {
				wg.Go(func() {
					p := make([]byte, 200<<10)
					for j := range int64(20) {
						off := (i*20 + j) * 20 << 10
						off %= c.Size() - int64(len(p))
						if j%4 == 3 { // one that is given up, before, while or after it is answered
							ctx, cancel := context.WithTimeout(ctx, time.Duration(j*i)*20*time.Microsecond)
							err := c.ReadAt(ctx, p, off)
							cancel()
							if err != nil && !errors.Is(err, context.DeadlineExceeded) {
								t.Error(err)
							}
							region.Content{Seed: 99}.Fill(p, off) // must not be written to any more
							defer func(p []byte) {
								if err := (region.Content{Seed: 99}).Check(p, off); err != nil {
									t.Errorf("buffer of an abandoned read: %v", err)
								}
							}(p)
							p = make([]byte, len(p))
							continue
						}
						if err := c.ReadAt(ctx, p, off); err != nil {
							t.Error(err)
						} else if err := (region.Content{Seed: 3}).Check(p, off); err != nil {
							t.Error(err)
						}
						if err := c.WriteAt(ctx, p, off); err != nil {
							t.Error(err)
						}
					}
				})
			}
			wg.Wait()
			if tr.ClientTLS != nil && !c.Export().TLS {
				t.Error("not by TLS")
			}
		})
	}
}

func TestOpenErrors(t *testing.T) {
	srv, cli := testTLS(t)
	_, other := testTLS(t)
	e := exports{"r": newRAM(4096, 1)}
	for name, c := range map[string]struct {
		server, client *Transport
		name           string
		want           error
	}{
		"no such export":            {&Transport{}, &Transport{}, "q", region.ErrMissing},
		"TLS required":              {&Transport{ServerTLS: srv, RequireTLS: true}, &Transport{}, "r", region.ErrNotPermitted},
		"no TLS there":              {&Transport{}, &Transport{ClientTLS: cli}, "r", region.ErrNotPermitted},
		"wrong certificate":         {&Transport{ServerTLS: srv}, &Transport{ClientTLS: other}, "r", nil},
		"no such export, by TLS":    {&Transport{ServerTLS: srv}, &Transport{ClientTLS: cli}, "q", region.ErrMissing},
		"name longer than possible": {&Transport{}, &Transport{}, string(make([]byte, 5000)), nil},
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, c.server, e)
			_, err := c.client.Open(testContext(t), s, transport.Options{Name: c.name, Connections: 3})
			if err == nil || c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
	t.Run("number of connections", func(t *testing.T) {
		for _, n := range []int{-1, 17} {
			if _, err := (&Transport{}).Open(testContext(t), serve(t, &Transport{}, e), transport.Options{Connections: n}); err == nil {
				t.Errorf("%d connections: no error", n)
			}
		}
	})
}

func TestList(t *testing.T) {
	srv, cli := testTLS(t)
	tr := &Transport{ServerTLS: srv, ClientTLS: cli}
	s := serve(t, tr, exports{"a": newRAM(1, 1), "b": newRAM(1, 1)})
	for _, tr := range []*Transport{tr, {}} {
		conn, err := s.Dial(testContext(t))
		if err != nil {
			t.Fatal(err)
		}
		names, err := tr.List(testContext(t), conn)
		if err != nil || len(names) != 2 {
			t.Errorf("got %q, %v", names, err)
		}
	}
}

// Info says what opening would, and the session ends in peace.
func TestInfo(t *testing.T) {
	srv, cli := testTLS(t)
	for _, tr := range []*Transport{{}, {ServerTLS: srv, ClientTLS: cli}} {
		s := serve(t, tr, exports{"a": newRAM(12345, 1), "b": blocky{&slow{ram: newRAM(1<<20, 1)}, 4096}, "ro": frozen{viewed{newRAM(1, 1)}}})
		ask := func(name string) (Export, error) {
			conn, err := s.Dial(testContext(t))
			if err != nil {
				t.Fatal(err)
			}
			return tr.Info(testContext(t), conn, name)
		}
		for name, size := range map[string]int64{"a": 12345, "b": 1 << 20, "ro": 1} {
			e, err := ask(name)
			if err != nil || e.Name != name || e.Size != size || (e.Blocks.Minimum == 4096) != (name == "b") || (e.Flags&FlagReadOnly != 0) != (name == "ro") {
				t.Errorf("%s: %+v, %v", name, e, err)
			}
			if err := s.await(); err != nil {
				t.Errorf("%s: server: %v", name, err)
			}
		}
		if _, err := ask("c"); !errors.Is(err, region.ErrMissing) {
			t.Errorf("a missing export: %v", err)
		}
		_ = s.await()
	}
}

func TestReadOnly(t *testing.T) {
	s := serve(t, &Transport{}, exports{"rw": newRAM(1<<20, 1), "ro": frozen{viewed{newRAM(1<<20, 1)}}})
	for _, o := range []transport.Options{{Name: "rw", ReadOnly: true}, {Name: "ro"}} {
		c := open(t, &Transport{}, s, o)
		ctx := testContext(t)
		for name, err := range map[string]error{
			"write":        c.WriteAt(ctx, make([]byte, 10), 0),
			"trim":         c.Trim(ctx, 0, 10),
			"write zeroes": c.WriteZeroes(ctx, 0, 10, true),
		} {
			if !errors.Is(err, region.ErrReadOnly) {
				t.Errorf("%s of %+v: %v", name, o, err)
			}
		}
		if err := c.ReadAt(ctx, make([]byte, 10), 0); err != nil {
			t.Error(err)
		}
	}
	// A client that does not ask is refused by the server.
	c := open(t, &Transport{}, s, transport.Options{Name: "ro"})
	c.ro = false
	if err := c.WriteAt(testContext(t), make([]byte, 10), 0); !errors.Is(err, region.ErrNotPermitted) {
		t.Errorf("write to a read-only export: %v", err)
	}
}

func TestRanges(t *testing.T) {
	c := open(t, &Transport{}, serve(t, &Transport{}, transport.One{Store: newRAM(10000, 1)}), transport.Options{})
	ctx := testContext(t)
	for _, r := range [][2]int64{{-1, 1}, {0, 10001}, {10000, 1}, {10001, 0}, {1 << 62, 1 << 20}} {
		p := make([]byte, r[1])
		if err := c.ReadAt(ctx, p, r[0]); !errors.Is(err, region.ErrOutOfRange) {
			t.Errorf("read %v: %v", r, err)
		}
		if err := c.WriteAt(ctx, p, r[0]); !errors.Is(err, region.ErrOutOfRange) {
			t.Errorf("write %v: %v", r, err)
		}
	}
	if err := c.ReadAt(ctx, nil, 10000); err != nil {
		t.Error(err)
	}
}

func TestOptional(t *testing.T) {
	store := newSparse(1<<20, 1)
	for _, compactOnly := range []bool{false, true} {
		s := serve(t, &Transport{}, transport.One{Store: store})
		c := open(t, &Transport{}, s, transport.Options{})
		ctx := testContext(t)
		if compactOnly {
			nc, err := s.Dial(ctx)
			if err != nil {
				t.Fatal(err)
			}
			e, err := (&Transport{}).Negotiate(ctx, nc, "")
			if err != nil {
				t.Fatal(err)
			}
			l := newLink(nc)
			if err := l.enterTransmission(true); err != nil {
				t.Fatal(err)
			}
			c = &Client{export: e, conns: []*conn{newConn(l, simple, 0)}, bg: flow.New(0)}
			c.calls.New = func() any { return &call{done: make(chan struct{}, 1)} }
			defer c.Close()
		}
		if err := c.Trim(ctx, 100, 200); err != nil || len(store.trimmed) == 0 || store.trimmed[len(store.trimmed)-1] != (span{100, 300}) {
			t.Errorf("trim: %v, %v", err, store.trimmed)
		}
		if err := c.Cache(ctx, 5, 6); err != nil || len(store.cached) == 0 || store.cached[len(store.cached)-1] != (span{5, 11}) {
			t.Errorf("cache: %v, %v", err, store.cached)
		}
		if err := c.WriteZeroes(ctx, 1000, 2000, true); err != nil || !bytes.Equal(store.b[1000:3000], make([]byte, 2000)) {
			t.Errorf("write zeroes: %v", err)
		}
		flushed := store.flushed
		if err := c.WriteFUA(ctx, []byte("x"), 1); err != nil || store.flushed != flushed+1 {
			t.Errorf("write with FUA: %v, %d flushes", err, store.flushed-flushed)
		}
		if err := c.Flush(ctx); err != nil || store.flushed != flushed+2 {
			t.Errorf("flush: %v, %d flushes", err, store.flushed-flushed)
		}
		ext, err := c.Extents(ctx, 1000, 200000)
		want := []region.Extent{{Length: hole - 1000}, {Length: hole, Hole: true, Zero: true}, {Length: hole}, {Length: 201000 - 3*hole, Hole: true, Zero: true}}
		if compactOnly {
			if !errors.Is(err, region.ErrNotSupported) {
				t.Errorf("extents without structured replies: %v", err)
			}
		} else if err != nil || fmt.Sprint(ext) != fmt.Sprint(want) {
			t.Errorf("extents: %v, %v, want %v", ext, err, want)
		}
		got := bytes.Repeat([]byte{1}, 1<<20)
		if err := c.ReadAt(ctx, got, 0); err != nil || !bytes.Equal(got, store.b) {
			t.Errorf("read with holes: %v", err)
		}
	}
}

// counting counts what is read from a connection.
type counting struct {
	net.Conn
	n *int64
}

func (c counting) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	*c.n += int64(n)
	return n, err
}

func TestHolesDoNotCrossTheWire(t *testing.T) {
	store := &sparse{&slow{ram: newRAM(8<<20, 1)}}
	for off := hole; off < 8<<20; off += 2 * hole {
		clear(store.b[off : off+hole])
	}
	for name, st := range map[string]region.Store{"buffered": store, "viewed": struct {
		*sparse
		region.Viewer
	}{store, viewed{store.ram}}} {
		s := serve(t, &Transport{}, transport.One{Store: st})
		var n int64
		c := open(t, &Transport{}, transport.DialFunc(func(ctx context.Context) (net.Conn, error) {
			conn, err := s.Dial(ctx)
			return counting{conn, &n}, err
		}), transport.Options{Connections: 1})
		p := make([]byte, 8<<20)
		if err := c.ReadAt(testContext(t), p, 0); err != nil || !bytes.Equal(p, store.b) {
			t.Fatalf("%s: %v", name, err)
		}
		c.Close()
		if n > 4<<20+64<<10 {
			t.Errorf("%s: %d bytes for 4 MiB of data and as much of holes", name, n)
		}
	}
}

// A request whose context ends must end alone, at once, and for good.
func TestCancel(t *testing.T) {
	gate, entered := make(chan struct{}), make(chan struct{}, 100)
	store := gated{newRAM(1<<20, 1), gate, entered}
	pass := func() {
		t.Helper()
		select {
		case gate <- struct{}{}:
		case <-time.After(10 * time.Second):
			t.Fatal("no read at the store")
		}
	}
	for name, link := range links(t, transport.One{Store: store}) {
		t.Run(name, func(t *testing.T) {
			tr, d := link()
			c := open(t, tr, d, transport.Options{Connections: 1}) // else as many as the round trip says, which is long on a busy machine
			base := testContext(t)
			for _, lead := range []bool{true, false} { // the one that reads the socket, or one that waits for it
				var wg sync.WaitGroup
				start := func(ctx context.Context, off int64, check func(error)) {
					wg.Go(func() {
						p := make([]byte, 4096)
						err := c.ReadAt(ctx, p, off)
						check(err)
						if err == nil {
							if err := (region.Content{Seed: 1}).Check(p, off); err != nil {
								t.Error(err)
							}
						}
					})
					waitFor(t, "request on its way", func() bool { c.conns[0].mu.Lock(); defer c.conns[0].mu.Unlock(); return c.conns[0].leading })
				}
				ctx, cancel := context.WithCancel(base)
				bad := func(err error) {
					if !errors.Is(err, context.Canceled) {
						t.Errorf("cancelled read: %v", err)
					}
				}
				good := func(err error) {
					if err != nil {
						t.Errorf("other read: %v", err)
					}
				}
				done := make(chan struct{})
				if lead {
					start(ctx, 4096, func(err error) { bad(err); close(done) })
					start(base, 8192, good)
				} else {
					start(base, 8192, good)
					start(ctx, 4096, func(err error) { bad(err); close(done) })
				}
				waitFor(t, "both at the store", func() bool { return len(entered) == 2 })
				cancel()
				select {
				case <-done:
				case <-time.After(5 * time.Second):
					t.Error("cancelled read hangs")
				}
				pass()
				pass()
				wg.Wait()
				<-entered
				<-entered
			}
			// A late reply without anybody waiting is read all the same.
			ctx, cancel := context.WithCancel(base)
			go func() {
				defer cancel()
				select {
				case <-entered:
				case <-base.Done():
				}
			}()
			if err := c.ReadAt(ctx, make([]byte, 4096), 0); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
			pass()
			waitFor(t, "late reply read", func() bool { c.conns[0].mu.Lock(); defer c.conns[0].mu.Unlock(); return len(c.conns[0].pending) == 0 })
			ctx, cancel2 := context.WithCancel(base)
			cancel2()
			if err := c.ReadAt(ctx, make([]byte, 1), 0); !errors.Is(err, context.Canceled) {
				t.Errorf("read with a context that has ended: %v", err)
			}
		})
	}
}

// gated answers one read for each token.
type gated struct {
	*ram
	gate    chan struct{}
	entered chan struct{}
}

func (g gated) ReadAt(ctx context.Context, p []byte, off int64) error {
	select {
	case g.entered <- struct{}{}:
	default:
	}
	select {
	case <-g.gate:
	case <-ctx.Done():
		return ctx.Err()
	}
	return g.ram.ReadAt(ctx, p, off)
}

func waitFor(t testing.TB, what string, f func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !f() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
		time.Sleep(100 * time.Microsecond)
	}
}

func TestConnectionLost(t *testing.T) {
	store := gated{newRAM(1<<20, 1), make(chan struct{}), nil}
	s := serve(t, &Transport{}, transport.One{Store: store})
	var mu sync.Mutex
	var relays []net.Conn
	d := transport.DialFunc(func(ctx context.Context) (net.Conn, error) { // through a relay that can be cut
		up, err := s.Dial(ctx)
		if err != nil {
			return nil, err
		}
		a, b := socketpair(t)
		mu.Lock()
		relays = append(relays, up, a)
		mu.Unlock()
		go func() { io.Copy(up, a); up.Close() }()
		go func() { io.Copy(a, up); a.Close() }()
		return b, nil
	})
	c := open(t, &Transport{}, d, transport.Options{Connections: 2})
	ctx := testContext(t)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			ctx := region.WithClass(ctx, region.Class(i%2))
			if err := c.ReadAt(ctx, make([]byte, 4096), 0); !errors.Is(err, region.ErrPeerGone) {
				t.Errorf("read in flight when the connection is lost: %v", err)
			}
		})
	}
	waitFor(t, "requests in flight", func() bool { return c.conns[0].load.Load()+c.conns[1].load.Load() == 20*4096 })
	mu.Lock()
	for _, r := range relays {
		r.Close()
	}
	mu.Unlock()
	wg.Wait()
	if err := c.ReadAt(ctx, make([]byte, 4096), 0); !errors.Is(err, region.ErrPeerGone) {
		t.Errorf("read after that: %v", err)
	}
	if err := c.Flush(ctx); !errors.Is(err, region.ErrPeerGone) {
		t.Errorf("flush after that: %v", err)
	}
}

// One of several connections lost: its requests fail, later ones go by the others.
func TestOneConnectionLost(t *testing.T) {
	c := open(t, &Transport{}, serve(t, &Transport{}, transport.One{Store: viewed{newRAM(1<<20, 1)}}), transport.Options{Connections: 3})
	c.conns[1].fail(peerGone("test", io.EOF))
	c.conns[2].fail(peerGone("test", io.EOF))
	for i := range 20 {
		if err := c.ReadAt(region.WithClass(testContext(t), region.Class(i%3)), make([]byte, 4096), 0); err != nil {
			t.Error(err)
		}
	}
}

func TestCloseEndsRequests(t *testing.T) {
	store := gated{newRAM(1<<20, 1), make(chan struct{}), nil}
	c := open(t, &Transport{}, serve(t, &Transport{}, transport.One{Store: store}), transport.Options{Connections: 1})
	errs := make(chan error, 2)
	for range 2 {
		go func() { errs <- c.ReadAt(testContext(t), make([]byte, 4096), 0) }()
	}
	waitFor(t, "requests in flight", func() bool { return c.conns[0].load.Load() == 2*4096 })
	c.Close()
	c.Close()
	for range 2 {
		if err := <-errs; !errors.Is(err, region.ErrClosed) {
			t.Errorf("read in flight at Close: %v", err)
		}
	}
}
