// Package transporttest is the one test suite of all transports.
package transporttest

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"memsync/strategies/region"
	"memsync/strategies/replay"
	"memsync/strategies/storetest"
	"memsync/strategies/transport"
)

// Factory makes what is tested.
type Factory struct {
	// New makes a transport, secured by t; the zero TLS is none.
	New func(t transport.TLS) transport.Transport
	// Options are those of all connections.
	Options transport.Options
	// MaxRequest is the longest read or write that a source answers, in bytes; for TestOversize.
	MaxRequest int64
	// Blurred are kinds of a source's errors that the protocol cannot tell.
	Blurred []error
	// Extents: it gives extents of every region, data where the source knows none.
	Extents bool
	// Oversize sends a request of n bytes past the client's own checks, and returns the answer's error.
	Oversize func(t *testing.T, d transport.Dialer, n int64) error
}

// suite is a Factory; its methods whose names begin with Test are the cases.
type suite struct{ Factory }

// Run runs all cases. Each fails if goroutines are left.
func Run(t *testing.T, f Factory) {
	s := reflect.ValueOf(suite{f})
	for i := range s.NumMethod() {
		name, ok := strings.CutPrefix(s.Type().Method(i).Name, "Test")
		if !ok {
			continue
		}
		t.Run(name, func(t *testing.T) {
			goroutines := goleak.IgnoreCurrent()
			t.Cleanup(func() { goleak.VerifyNone(t, goroutines) })
			s.Method(i).Interface().(func(*testing.T))(t)
		})
	}
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// patience is for what must succeed, with the race detector on a busy machine too.
const patience = time.Minute

// source answers on loopback until the test ends.
type source struct {
	addr string
	tr   transport.Transport
	mu   sync.Mutex
	errs []error
	stop func()
}

func serve(t *testing.T, tr transport.Transport, e transport.Exports) *source {
	t.Helper()
	l, err := transport.Listen(t.Context(), tr, "127.0.0.1:0", transport.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	s := &source{addr: l.Addr().String(), tr: tr}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- transport.Accept(ctx, l, transport.Limits{Connections: 512, PeerConnections: 512, Request: 32 << 20}, func(err error) { t.Error(err) }, func(ctx context.Context, c net.Conn) {
			if err := tr.Serve(ctx, c, e); err != nil && ctx.Err() == nil {
				s.mu.Lock()
				s.errs = append(s.errs, err)
				s.mu.Unlock()
			}
		})
	}()
	s.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(patience):
			t.Error("the source does not end")
		}
	})
	t.Cleanup(s.stop)
	return s
}

func (s *source) errors() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := errors.Join(s.errs...); err != nil {
		return err.Error()
	}
	return ""
}

func (f Factory) open(t *testing.T, tr transport.Transport, addr string, change func(*transport.Options)) (region.Store, error) {
	o := f.Options
	if change != nil {
		change(&o)
	}
	c, err := tr.Open(within(t, patience), transport.DialerTo(tr, addr), o)
	if err == nil {
		t.Cleanup(func() {
			if err := c.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
			if err := c.Close(); err != nil {
				t.Errorf("close again: %v", err)
			}
		})
	}
	return c, err
}

// pair is a source of e and a Store opened on it.
func (f Factory) pair(t *testing.T, e transport.Exports, change func(*transport.Options)) (region.Store, *source) {
	t.Helper()
	tr := f.New(transport.TLS{})
	s := serve(t, tr, e)
	c, err := f.open(t, tr, s.addr, change)
	if err != nil {
		t.Fatal(err)
	}
	return c, s
}

// TestModel runs a random program of reads, writes and flushes beside a plain slice.
func (f suite) TestModel(t *testing.T) {
	rnd := rand.New(rand.NewPCG(replay.Seed(t), 1))
	for _, size := range []int64{1, 4095, 4096, 65537, 5<<20 + 3} {
		content := region.Content{Seed: rnd.Uint64()}
		store := storetest.Seeded(content, size)
		want := store.Snapshot()
		c, _ := f.pair(t, transport.One{Name: "r", Store: store}, nil)
		if c.Size() != size {
			t.Fatalf("size %d, want %d", c.Size(), size)
		}
		ctx := within(t, patience)
		for range 60 {
			off := rnd.Int64N(size + 1)
			n := min(rnd.Int64N(size-off+1), []int64{1, 4096, 100_000, size}[rnd.IntN(4)])
			ctx := region.WithClass(ctx, []region.Class{region.Demand, region.Prefetch, region.Push}[rnd.IntN(3)])
			switch rnd.IntN(5) {
			case 0:
				p := make([]byte, n)
				for i := range p {
					p[i] = byte(rnd.Uint32())
				}
				if err := c.WriteAt(ctx, p, off); err != nil {
					t.Fatal(err)
				}
				copy(want[off:], p)
				clear(p) // not retained
			case 1:
				if err := c.Flush(ctx); err != nil {
					t.Fatal(err)
				}
			default:
				p := make([]byte, n)
				if err := c.ReadAt(ctx, p, off); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(p, want[off:off+n]) {
					t.Fatalf("%d bytes at %d of %d differ", n, off, size)
				}
			}
		}
		if !bytes.Equal(store.Snapshot(), want) {
			t.Fatalf("the source's %d bytes differ", size)
		}
	}
}

// TestConcurrent has readers and writers of their own parts together.
func (f suite) TestConcurrent(t *testing.T) {
	const part, workers = 96 << 10, 24
	content := region.Content{Seed: 5}
	store := storetest.Seeded(content, part*workers)
	c, _ := f.pair(t, transport.One{Store: store}, nil)
	ctx := within(t, patience)
	var wg sync.WaitGroup
	for w := range int64(workers) {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(9, uint64(w)))
			gen := content
			p := make([]byte, part)
			ctx := region.WithClass(ctx, region.Class(w%3))
			for range 20 {
				off, n := rnd.Int64N(part), int64(0)
				n = rnd.Int64N(part - off + 1)
				if err := c.ReadAt(ctx, p[:n], w*part+off); err != nil {
					t.Error(err)
					return
				}
				if err := gen.Check(p[:n], w*part+off); err != nil {
					t.Error(err)
					return
				}
				if w%4 == 0 {
					gen.Generation++
					gen.Fill(p, w*part)
					if err := c.WriteAt(ctx, p, w*part); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	wg.Wait()
}

// TestNames opens regions by name, and one that is not there.
func (f suite) TestNames(t *testing.T) {
	e := transport.Named{{Name: "a", Store: storetest.New([]byte("first"))}, {Name: "b", Store: storetest.New([]byte("second one"))}}
	tr := f.New(transport.TLS{})
	s := serve(t, tr, e)
	for _, x := range e {
		c, err := f.open(t, tr, s.addr, func(o *transport.Options) { o.Name = x.Name })
		if err != nil || c.Size() != x.Store.Size() {
			t.Fatalf("%s: %v, %v", x.Name, c, err)
		}
	}
	for _, name := range []string{"c", strings.Repeat("x", 5000), ""} {
		if c, err := f.open(t, tr, s.addr, func(o *transport.Options) { o.Name = name }); err == nil || c != nil {
			t.Errorf("region %.10q: no error", name)
		} else if len(name) < 100 && !errors.Is(err, region.ErrMissing) {
			t.Errorf("region %q: %v", name, err)
		}
	}
}

// TestErrors: ranges, read-only regions and the source's own errors keep their kind.
func (f suite) TestErrors(t *testing.T) {
	store := storetest.NewFaulty(storetest.New(make([]byte, 1<<20)))
	c, s := f.pair(t, transport.One{Store: store}, nil)
	ctx := within(t, patience)
	for _, r := range [][2]int64{{-1, 1}, {1 << 20, 1}, {1<<20 - 1, 2}, {1 << 62, 1}} {
		if err := c.ReadAt(ctx, make([]byte, r[1]), r[0]); !errors.Is(err, region.ErrOutOfRange) {
			t.Errorf("read [%d, +%d): %v", r[0], r[1], err)
		}
		if err := c.WriteAt(ctx, make([]byte, r[1]), r[0]); !errors.Is(err, region.ErrOutOfRange) {
			t.Errorf("write [%d, +%d): %v", r[0], r[1], err)
		}
	}
	for _, kind := range []error{region.ErrNotSupported, region.ErrNotPermitted} {
		store.Fail(storetest.Read, fmt.Errorf("chunk 5 of the store: %w", kind), 0)
		if err := c.ReadAt(ctx, make([]byte, 10), 0); err == nil || !errors.Is(err, kind) && !slices.Contains(f.Blurred, kind) || !strings.Contains(err.Error(), "chunk 5") {
			t.Errorf("a source that fails with %v: %v", kind, err)
		}
	}
	store.Fail(storetest.Read, errors.New("broken disk"), 3)
	if err := c.ReadAt(ctx, make([]byte, 1<<20), 0); err == nil && store.Count(storetest.Read) > 6 {
		t.Error("a source that fails in the middle: no error")
	}
	store.Fail(storetest.Write, errors.New("broken disk"), 0)
	if err := c.WriteAt(ctx, make([]byte, 10), 0); err == nil || errors.Is(err, region.ErrPeerGone) {
		t.Errorf("a source that cannot write: %v", err)
	}
	store.Fail(storetest.Flush, errors.New("broken disk"), 0)
	if err := c.Flush(ctx); err == nil || errors.Is(err, region.ErrPeerGone) {
		t.Errorf("a source that cannot flush: %v", err)
	}
	store.Pass(storetest.Read)
	if err := c.ReadAt(ctx, make([]byte, 10), 0); err != nil {
		t.Errorf("after errors: %v", err)
	}
	ro, err := f.open(t, s.tr, s.addr, func(o *transport.Options) { o.ReadOnly = true })
	if err != nil {
		t.Fatal(err)
	}
	if err := ro.WriteAt(ctx, make([]byte, 10), 0); !errors.Is(err, region.ErrReadOnly) {
		t.Errorf("read-only: %v", err)
	}
	_ = c.Close()
	for what, err := range map[string]error{"read": c.ReadAt(ctx, make([]byte, 1), 0), "write": c.WriteAt(ctx, make([]byte, 1), 0), "flush": c.Flush(ctx)} {
		if !errors.Is(err, region.ErrClosed) {
			t.Errorf("%s after Close: %v", what, err)
		}
	}
}

// TestCancel: requests that a stalled source holds end with their context, and do
// not use up what the connections have; the others go on.
func (f suite) TestCancel(t *testing.T) {
	content := region.Content{Seed: 3}
	store := storetest.NewFaulty(storetest.Seeded(content, 4<<20))
	c, _ := f.pair(t, transport.One{Store: store}, nil)
	for _, kind := range []storetest.Kind{storetest.Read, storetest.Write} {
		for round := range 30 {
			store.Stall(kind)
			ctx, cancel := context.WithTimeout(context.Background(), time.Duration(1+round%5)*time.Millisecond)
			var wg sync.WaitGroup
			for i := range int64(8) {
				wg.Go(func() {
					p := make([]byte, 64<<10)
					var err error
					if kind == storetest.Read {
						err = c.ReadAt(ctx, p, i*64<<10)
					} else {
						content.Fill(p, i*64<<10)
						err = c.WriteAt(ctx, p, i*64<<10)
					}
					if !errors.Is(err, context.DeadlineExceeded) {
						t.Errorf("%s: %v", kind, err)
					}
					clear(p) // it is ours again
				})
			}
			began := time.Now()
			wg.Wait()
			if d := time.Since(began); d > patience/2 {
				t.Fatalf("%s: ended %v after its deadline", kind, d)
			}
			cancel()
		}
		store.Pass(kind)
	}
	// Nothing of that is in the way. A write that was given up may be done or not.
	ctx := within(t, patience)
	p := make([]byte, 4<<20)
	if err := c.ReadAt(ctx, p, 0); err != nil {
		t.Fatal(err)
	}
	if err := content.Check(p, 0); err != nil {
		t.Fatal(err)
	}
	if err := c.Flush(ctx); err != nil {
		t.Fatal(err)
	}
}

// TestLostPeer: a source that ends, with and without requests under way.
func (f suite) TestLostPeer(t *testing.T) {
	store := storetest.NewFaulty(storetest.New(make([]byte, 1<<20)))
	c, s := f.pair(t, transport.One{Store: store}, nil)
	store.Stall(storetest.Read)
	ctx := within(t, patience)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if err := c.ReadAt(ctx, make([]byte, 4096), 0); !errors.Is(err, region.ErrPeerGone) {
				t.Errorf("under way: %v", err)
			}
		})
	}
	for store.Count(storetest.Read) < 1 {
		time.Sleep(time.Millisecond)
	}
	s.stop()
	wg.Wait()
	for what, err := range map[string]error{"read": c.ReadAt(ctx, make([]byte, 1), 0), "write": c.WriteAt(ctx, make([]byte, 1), 0), "flush": c.Flush(ctx)} {
		if !errors.Is(err, region.ErrPeerGone) {
			t.Errorf("%s afterwards: %v", what, err)
		}
	}
	if _, err := s.tr.Open(within(t, 2*time.Second), transport.DialerTo(s.tr, s.addr), f.Options); err == nil {
		t.Error("open without a source: no error")
	}
}

// TestClose ends requests under way.
func (f suite) TestClose(t *testing.T) {
	store := storetest.NewFaulty(storetest.New(make([]byte, 1<<20)))
	c, _ := f.pair(t, transport.One{Store: store}, nil)
	store.Stall(storetest.Read)
	done := make(chan error, 2)
	for range 2 {
		go func() { done <- c.ReadAt(within(t, patience), make([]byte, 4096), 0) }()
	}
	for store.Count(storetest.Read) < 1 {
		time.Sleep(time.Millisecond)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := <-done; !errors.Is(err, region.ErrClosed) {
			t.Errorf("under way: %v", err)
		}
	}
}

// TestLease: one host writes at a time; the next one gets another epoch.
func (f suite) TestLease(t *testing.T) {
	tr := f.New(transport.TLS{})
	s := serve(t, tr, transport.NewLeases(transport.One{Name: "r", Store: storetest.New(make([]byte, 1<<16))}))
	writer := func(name string) (region.Store, error) {
		return f.open(t, tr, s.addr, func(o *transport.Options) { o.Name, o.Writer = "r", name })
	}
	a, err := writer("a")
	if err != nil {
		t.Fatal(err)
	}
	ctx := within(t, patience)
	if err := a.WriteAt(ctx, make([]byte, 100), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := writer("b"); !errors.Is(err, region.ErrNotPermitted) {
		t.Errorf("a second writer: %v", err)
	}
	other, err := f.open(t, tr, s.addr, func(o *transport.Options) { o.Name = "r" })
	if err != nil {
		t.Fatal(err)
	}
	if err := other.WriteAt(ctx, make([]byte, 100), 0); !errors.Is(err, region.ErrNotPermitted) {
		t.Errorf("a write without the lease: %v", err)
	}
	if err := other.ReadAt(ctx, make([]byte, 100), 0); err != nil {
		t.Error(err)
	}
	first := a.(region.Epocher).Epoch()
	_ = a.Close()
	var b region.Store
	for end := time.Now().Add(patience); b == nil; time.Sleep(5 * time.Millisecond) { // the source learns of the end a little later
		if b, err = writer("b"); err != nil && (!errors.Is(err, region.ErrNotPermitted) || time.Now().After(end)) {
			t.Fatal(err)
		}
	}
	if n := b.(region.Epocher).Epoch(); first == 0 || n != first+1 {
		t.Errorf("epochs %d and %d", first, n)
	}
}

// mailbox is a store whose reads wait for a write.
type mailbox struct {
	*storetest.Bytes
	once    sync.Once
	written chan struct{}
}

func (m *mailbox) ReadAt(ctx context.Context, p []byte, off int64) error {
	select {
	case <-m.written:
	case <-ctx.Done():
		return ctx.Err()
	}
	return m.Bytes.ReadAt(ctx, p, off)
}

func (m *mailbox) WriteAt(ctx context.Context, p []byte, off int64) error {
	defer m.once.Do(func() { close(m.written) })
	return m.Bytes.WriteAt(ctx, p, off)
}

// TestTogether: a request that the source answers only once it has had another does not
// stand in that one's way on the one connection, whatever else the options say.
func (f suite) TestTogether(t *testing.T) {
	store := &mailbox{Bytes: storetest.New(make([]byte, 1<<20)), written: make(chan struct{})}
	c, s := f.pair(t, transport.One{Store: store}, func(o *transport.Options) { o.Connections, o.Together = 1, true })
	ctx := within(t, patience)
	p, read := make([]byte, 5), make(chan error, 1)
	go func() { read <- c.ReadAt(ctx, p, 7) }()
	select {
	case err := <-read:
		t.Fatalf("a read that must wait: %v", err)
	case <-time.After(20 * time.Millisecond): // so that it is the first, as a rule
	}
	if err := c.WriteAt(ctx, []byte("there"), 7); err != nil {
		t.Error(err)
	}
	if err := <-read; err != nil || string(p) != "there" {
		t.Errorf("%q, %v; source: %s", p, err, s.errors())
	}
}

// offers is a store with more to offer.
type offers struct {
	*storetest.Bytes
	trimmed, cached atomic.Int64
}

func (o *offers) Extents(_ context.Context, off, n int64) ([]region.Extent, error) {
	var e []region.Extent
	for n > 0 {
		k := min(n, 4096-off%4096)
		hole := off / 4096 % 2
		e = append(e, region.Extent{Length: k, Hole: hole == 1, Zero: hole == 1})
		off, n = off+k, n-k
	}
	return e, nil
}
func (o *offers) WriteZeroes(ctx context.Context, off, n int64, _ bool) error {
	return o.WriteAt(ctx, make([]byte, n), off)
}
func (o *offers) Trim(_ context.Context, _, n int64) error  { o.trimmed.Add(n); return nil }
func (o *offers) Cache(_ context.Context, _, n int64) error { o.cached.Add(n); return nil }

// TestOffers: what a store has beside reads and writes, and what it lacks.
func (f suite) TestOffers(t *testing.T) {
	type all interface {
		region.Extenter
		region.Zeroer
		region.Trimmer
		region.Cacher
	}
	ctx := within(t, patience)
	store := &offers{Bytes: storetest.Seeded(region.Content{Seed: 1}, 64<<10)}
	c, _ := f.pair(t, transport.One{Store: store}, nil)
	a, ok := c.(all)
	if !ok {
		t.Fatalf("%T does not offer what its source has", c)
	}
	runs, err := a.Extents(ctx, 100, 10000)
	want := []region.Extent{{Length: 3996}, {Length: 4096, Hole: true, Zero: true}, {Length: 1908}}
	if err != nil || !reflect.DeepEqual(runs, want) {
		t.Errorf("extents: %v, %v, want %v", runs, err, want)
	}
	if err := errors.Join(a.WriteZeroes(ctx, 1000, 2000, true), a.Trim(ctx, 0, 4096), a.Cache(ctx, 0, 8192)); err != nil {
		t.Error(err)
	}
	if got := store.Snapshot(); !bytes.Equal(got[1000:3000], make([]byte, 2000)) || got[999] == 0 && got[998] == 0 || store.trimmed.Load() != 4096 || store.cached.Load() != 8192 {
		t.Errorf("zeroes not written, or trimmed %d, cached %d", store.trimmed.Load(), store.cached.Load())
	}
	if err := a.Trim(ctx, 0, 1<<20); !errors.Is(err, region.ErrOutOfRange) {
		t.Errorf("trim beyond the end: %v", err)
	}
	plain, _ := f.pair(t, transport.One{Store: storetest.New(make([]byte, 4096))}, nil)
	p := plain.(all)
	runs, err = p.Extents(ctx, 0, 10)
	if f.Extents && err == nil && reflect.DeepEqual(runs, []region.Extent{{Length: 10}}) {
		err = region.ErrNotSupported
	}
	for what, err := range map[string]error{"extents": err, "trim": p.Trim(ctx, 0, 10), "cache": p.Cache(ctx, 0, 10)} {
		if !errors.Is(err, region.ErrNotSupported) {
			t.Errorf("%s of a store without: %v", what, err)
		}
	}
}

// TestOversize: a request that is longer than the limit is refused, and the source goes on.
func (f suite) TestOversize(t *testing.T) {
	if f.Oversize == nil {
		t.Fatal("the factory does not say how to send an oversize request")
	}
	tr := f.New(transport.TLS{})
	s := serve(t, tr, transport.One{Store: storetest.New(make([]byte, 64<<20))})
	d := transport.DialerTo(tr, s.addr)
	if err := f.Oversize(t, d, f.MaxRequest); err != nil {
		t.Errorf("a request of %d bytes: %v", f.MaxRequest, err)
	}
	for _, n := range []int64{f.MaxRequest + 1, max(32<<20, 2*f.MaxRequest)} {
		if err := f.Oversize(t, d, n); err == nil {
			t.Errorf("a request of %d bytes: no error", n)
		}
	}
	c, err := f.open(t, tr, s.addr, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.ReadAt(within(t, patience), make([]byte, 100), 0); err != nil {
		t.Error(err)
	}
}

// TestGarbage: peers that send something else, or nothing; the others are served.
func (f suite) TestGarbage(t *testing.T) {
	tr := f.New(transport.TLS{})
	if _, ok := tr.(transport.Network); ok {
		t.Skip("connections are the library's own: what is no packet of theirs it drops")
	}
	s := serve(t, tr, transport.One{Store: storetest.New(make([]byte, 4096))})
	rnd := rand.New(rand.NewPCG(replay.Seed(t), 1))
	for i := range 40 {
		c, err := net.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, rnd.IntN(3000))
		for j := range b {
			b[j] = byte(rnd.Uint32())
		}
		if i%4 == 1 {
			b = append([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), b...)
		}
		_, _ = c.Write(b)
		if i%2 == 0 {
			_ = c.(*net.TCPConn).CloseWrite()
			_ = c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
			_, _ = io.Copy(io.Discard, c)
		}
		_ = c.Close()
	}
	c, err := f.open(t, tr, s.addr, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.ReadAt(within(t, patience), make([]byte, 100), 0); err != nil {
		t.Error(err)
	}
}

// TestBadOptions are refused with the numbers that are valid.
func (f suite) TestBadOptions(t *testing.T) {
	tr := f.New(transport.TLS{})
	s := serve(t, tr, transport.One{Store: storetest.New(make([]byte, 4096))})
	for _, change := range []func(*transport.Options){
		func(o *transport.Options) { o.Connections = 17 }, func(o *transport.Options) { o.Connections = -1 },
		func(o *transport.Options) { o.Window = -1 },
	} {
		if _, err := f.open(t, tr, s.addr, change); err == nil {
			t.Error("no error")
		}
	}
}

// Identities are configurations of the two sides, for TLS.
type Identities struct {
	Server, Client           *tls.Config
	Expired, Other, Nameless *tls.Config // clients: expired, of another CA, without a certificate
	ServerExpired            *tls.Config
	ServerOther              *tls.Config
	ServerElsewhere          *tls.Config // for another host
}

// TLS checks that both sides insist on each other's certificate.
func TLS(t *testing.T, f Factory, id Identities) {
	ok := f.New(transport.TLS{Server: id.Server, Client: id.Client})
	store := storetest.Seeded(region.Content{Seed: 7}, 1<<20)
	try := func(t *testing.T, server, client *tls.Config) (source string, err error) {
		goroutines := goleak.IgnoreCurrent()
		defer goleak.VerifyNone(t, goroutines)
		st := f.New(transport.TLS{Server: server})
		s := serve(t, st, transport.One{Store: store})
		defer s.stop()
		ct := f.New(transport.TLS{Client: client})
		began := time.Now()
		c, err := ct.Open(within(t, patience), transport.DialerTo(ct, s.addr), f.Options)
		if err == nil {
			p := make([]byte, 1<<20)
			if err = c.ReadAt(within(t, patience), p, 0); err == nil {
				err = region.Content{Seed: 7}.Check(p, 0)
			}
			if cerr := c.Close(); cerr != nil && err == nil {
				err = cerr
			}
		}
		if d := time.Since(began); d > patience/2 {
			t.Errorf("took %v", d)
		}
		s.stop()
		if err != nil {
			source = s.errors()
		}
		return source, err
	}
	if ok.Name() == "" {
		t.Error("no name")
	}
	if _, err := try(t, id.Server, id.Client); err != nil {
		t.Fatalf("both sides right: %v", err)
	}
	_, quic := ok.(transport.Network)
	for _, c := range []struct {
		name           string
		server, client *tls.Config
		says           string // the client's or the source's error has it
	}{
		{"client's certificate expired", id.Server, id.Expired, "expired"},
		{"client of another CA", id.Server, id.Other, "another CA"},
		{"client without certificate", id.Server, id.Nameless, "certificate"},
		{"source's certificate expired", id.ServerExpired, id.Client, "expired"},
		{"source of another CA", id.ServerOther, id.Client, "another CA"},
		{"source's certificate for another host", id.ServerElsewhere, id.Client, "another host"},
		{"plain client", id.Server, nil, "TLS"},
		{"plain source", nil, id.Client, "TLS"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if quic && (c.client == nil || c.server == nil) {
				c.says = "certificate" // there is no plain QUIC: it has one that nobody can check
			}
			source, err := try(t, c.server, c.client)
			if err == nil {
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error()+source, c.says) {
				t.Errorf("neither side says %q:\nclient: %v\nsource: %s", c.says, err, source)
			}
			t.Logf("client: %v", err)
			t.Logf("source: %s", source)
		})
	}
}
