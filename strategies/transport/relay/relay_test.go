package relay

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"memsync/strategies/region"
	"memsync/strategies/storetest"
	"memsync/strategies/transport"
	"memsync/strategies/transport/nbd"
	"memsync/strategies/transport/transporttest"
)

const (
	token    = "0123456789abcdef"
	patience = time.Minute
)

// relaying is a relay on a port of its own.
type relaying struct {
	*Relay
	addr string
	stop func()
}

func start(t *testing.T, addr string, l Limits) *relaying {
	t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	r := New(l)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- transport.Accept(ctx, ln, transport.Limits{}, nil, func(ctx context.Context, c net.Conn) { _ = r.Handle(ctx, c) })
	}()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.waits != 0 || len(r.waiting) != 0 || r.sessions.Load() != 0 {
			t.Errorf("%d wait in %d meetings, %d sessions after the end", r.waits, len(r.waiting), r.sessions.Load())
		}
	})
	t.Cleanup(stop)
	return &relaying{r, ln.Addr().String(), stop}
}

func (r *relaying) dialer() transport.Dialer {
	return transport.DialFunc(func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "tcp", r.addr) })
}

func (r *relaying) listen(t *testing.T, token string) *Listener {
	l := Listen(ListenOptions{Dialer: r.dialer(), Token: token, Spare: 4})
	t.Cleanup(func() { l.Close() })
	return l
}

func (r *relaying) await(t *testing.T, counter string, n int64) {
	t.Helper()
	for end := time.Now().Add(patience); r.Counters()[counter] != n; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: %d, want %d", counter, r.Counters()[counter], n)
		}
	}
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// TestJoin: bytes of both directions arrive as they are; the end of one direction leaves the other.
func TestJoin(t *testing.T) {
	goroutines := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, goroutines) })
	r := start(t, "127.0.0.1:0", Limits{Buffer: 1000})
	l := r.listen(t, token)
	there, back := make([]byte, 1<<20), make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{1}).Read(there)
	rand.NewChaCha8([32]byte{2}).Read(back)
	served := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			defer c.Close()
			var got []byte
			if got, err = io.ReadAll(c); err == nil && !bytes.Equal(got, there) {
				err = errors.New("bytes differ at the source")
			}
		}
		if err == nil {
			_, err = c.Write(back)
		}
		served <- err
	}()
	c, err := Dialer(r.dialer(), token).Dial(within(t))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write(there); err != nil {
		t.Fatal(err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, back) {
		t.Errorf("%d bytes came back, %v", len(got), err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
	r.await(t, "relayed_bytes", 2<<20)
	r.await(t, "joined_sessions", 1)
	c.Close()
	l.Close()
	r.stop()
}

// TestNobody: another token meets nobody, and who hangs up while it waits is forgotten.
func TestNobody(t *testing.T) {
	r := start(t, "127.0.0.1:0", Limits{Want: 50 * time.Millisecond})
	r.listen(t, token)
	if _, err := Dialer(r.dialer(), strings.ToUpper(token)).Dial(within(t)); !errors.Is(err, region.ErrPeerGone) {
		t.Errorf("another token: %v", err)
	}
	r.await(t, "unmet_connections", 1)
	r.await(t, "waiting", 4)
}

// TestLimits: a meeting, all meetings and sessions have room for so many and no more.
func TestLimits(t *testing.T) {
	r := start(t, "127.0.0.1:0", Limits{Sessions: 1, Waiting: 3, Meeting: 2, Hello: 100 * time.Millisecond, Offer: time.Hour})
	offer := func(token string) chan error {
		done := make(chan error, 1)
		ctx := within(t)
		go func() {
			c, err := r.dialer().Dial(ctx)
			if err == nil {
				if err = meet(ctx, c, hello{offers, token}); err == nil {
					t.Cleanup(func() { c.Close() })
				}
			}
			done <- err
		}()
		return done
	}
	first := offer(token)
	r.await(t, "waiting", 1)
	offer(token)
	r.await(t, "waiting", 2)
	if err := <-offer(token); !errors.Is(err, transport.ErrLimit) {
		t.Errorf("a third of a meeting: %v", err)
	}
	offer(token + "2")
	r.await(t, "waiting", 3)
	if err := <-offer(token + "3"); !errors.Is(err, transport.ErrLimit) {
		t.Errorf("a fourth in all: %v", err)
	}
	c, err := Dialer(r.dialer(), token).Dial(within(t))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := <-first; err != nil {
		t.Error(err)
	}
	if _, err := Dialer(r.dialer(), token).Dial(within(t)); !errors.Is(err, transport.ErrLimit) {
		t.Errorf("a second session: %v", err)
	}
	silent, err := r.dialer().Dial(within(t))
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	r.await(t, "refused_connections", 1)
}

// TestDies: when the relay dies in the middle both sides see an error, and when there is
// one again at its address they meet again.
func TestDies(t *testing.T) {
	r := start(t, "127.0.0.1:0", Limits{})
	content := region.Content{Seed: 1}
	store := storetest.Seeded(content, 1<<20)
	tr := &nbd.Transport{}
	l := r.listen(t, token)
	ctx, cancel := context.WithCancel(context.Background())
	done, ended := make(chan error, 1), make(chan error, 64)
	go func() {
		done <- transport.Accept(ctx, l, transport.Limits{}, nil, func(ctx context.Context, c net.Conn) {
			ended <- tr.Serve(ctx, c, transport.One{Name: "r", Store: store})
		})
	}()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	read := func() error {
		s, err := tr.Open(within(t), Dialer(r.dialer(), token), transport.Options{Connections: 2})
		if err != nil {
			return err
		}
		defer s.Close()
		p := make([]byte, 1<<20)
		if err := s.ReadAt(within(t), p, 0); err != nil {
			return err
		}
		return content.Check(p, 0)
	}
	if err := read(); err != nil {
		t.Fatal(err)
	}
	s, err := tr.Open(within(t), Dialer(r.dialer(), token), transport.Options{Connections: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for len(ended) > 0 { // those of the first read
		<-ended
	}
	addr := r.addr
	r.stop()
	if err := s.ReadAt(within(t), make([]byte, 4096), 0); !errors.Is(err, region.ErrPeerGone) {
		t.Errorf("a read as the relay dies: %v", err)
	}
	select {
	case <-ended: // the source's side has ended too
	case <-time.After(patience):
		t.Error("the source does not notice")
	}
	if err := read(); err == nil {
		t.Error("served without a relay")
	}
	r = start(t, addr, Limits{})
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		if err = read(); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

// TestBlind: under TLS the relay sees neither names nor bytes of the region, and it works.
func TestBlind(t *testing.T) {
	id := transporttest.NewIdentities(t)
	secret := bytes.Repeat([]byte("the secret of the region"), 1000)
	r := start(t, "127.0.0.1:0", Limits{})
	var seen tap
	l := Listen(ListenOptions{Dialer: seen.of(r.dialer()), Token: token, Spare: 2})
	defer l.Close()
	tr := &nbd.Transport{ServerTLS: id.Server, RequireTLS: true, ClientTLS: id.Client}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- transport.Accept(ctx, l, transport.Limits{}, nil, func(ctx context.Context, c net.Conn) {
			_ = tr.Serve(ctx, c, transport.One{Name: "a name that nobody sees", Store: storetest.New(secret)})
		})
	}()
	defer func() { cancel(); <-done }()
	s, err := tr.Open(within(t), Dialer(r.dialer(), token), transport.Options{Name: "a name that nobody sees", Connections: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	p := make([]byte, len(secret))
	if err := s.ReadAt(within(t), p, 0); err != nil || !bytes.Equal(p, secret) {
		t.Fatalf("bytes differ, %v", err)
	}
	seen.mu.Lock()
	defer seen.mu.Unlock()
	if seen.b.Len() < len(secret) || bytes.Contains(seen.b.Bytes(), []byte("secret")) || bytes.Contains(seen.b.Bytes(), []byte("nobody")) {
		t.Errorf("the relay saw %d bytes, or what they say", seen.b.Len())
	}
}

// tap keeps what connections carry both ways.
type tap struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *tap) of(d transport.Dialer) transport.Dialer {
	return transport.DialFunc(func(ctx context.Context) (net.Conn, error) {
		c, err := d.Dial(ctx)
		return tapped{c, s}, err
	})
}

type tapped struct {
	net.Conn
	s *tap
}

func (c tapped) keep(p []byte) {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.s.b.Write(p)
}

func (c tapped) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.keep(p[:n])
	return n, err
}

func (c tapped) Write(p []byte) (int, error) {
	c.keep(p)
	return c.Conn.Write(p)
}

// FuzzHello: what is taken is what is sent, and no more is read.
func FuzzHello(f *testing.F) {
	f.Add(hello{offers, token}.append(nil))
	f.Add(hello{wants, strings.Repeat("x", MaxToken)}.append([]byte{}))
	f.Add([]byte(magic))
	f.Add([]byte(magic + "\x01\xff" + token))
	f.Add([]byte(magic + "\x03\x10" + token))
	f.Add([]byte("GET / HTTP/1.1\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		in := bytes.NewReader(b)
		h, err := readHello(in)
		if err != nil {
			if !errors.Is(err, errHello) {
				t.Fatal(err)
			}
			return
		}
		if CheckToken(h.token) != nil || !bytes.Equal(h.append(nil), b[:len(b)-in.Len()]) {
			t.Fatalf("%+v of %x", h, b)
		}
	})
}
