package chunk

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"memsync/strategies/order"
	"memsync/strategies/region"
	"memsync/strategies/replay"
)

var schedules = flag.Int("schedules", 3000, "random schedules of TestModel")

// scheduler holds every operation on the remote store and on the cache until
// the test lets it go on: once before its effect, once after it.
type scheduler struct {
	mu     sync.Mutex
	parked []*op
}

type op struct {
	what string
	wake chan error
}

func (s *scheduler) park(ctx context.Context, what string) error {
	o := &op{what, make(chan error, 1)}
	s.mu.Lock()
	s.parked = append(s.parked, o)
	s.mu.Unlock()
	select {
	case err := <-o.wake:
		return err
	case <-ctx.Done():
		s.mu.Lock()
		defer s.mu.Unlock()
		for i, p := range s.parked {
			if p == o {
				s.parked = append(s.parked[:i], s.parked[i+1:]...)
			}
		}
		return ctx.Err()
	}
}

// release lets one parked operation go on, or fail with err.
func (s *scheduler) release(r *rand.Rand, err error) (what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.parked) == 0 {
		return ""
	}
	i := r.IntN(len(s.parked))
	o := s.parked[i]
	s.parked = append(s.parked[:i], s.parked[i+1:]...)
	o.wake <- err
	return o.what
}

// source is a remote region that forgets what was not flushed when it crashes.
type source struct {
	mu               sync.Mutex
	content, durable []byte
	epoch            int
	lease            uint32 // counts the writers
}

func (s *source) crash() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.epoch++
	copy(s.content, s.durable)
}

// another is a write of somebody else, flushed; with lease it took that over first.
func (s *source) another(id byte, off, end int64, lease bool) (now []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if lease {
		s.lease++
	}
	for x := off; x < end; x++ {
		s.content[x], s.durable[x] = value(id, x), value(id, x)
	}
	return bytes.Clone(s.durable)
}

func (s *source) snapshot() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return bytes.Clone(s.durable)
}

// conn is one connection to the source.
type conn struct {
	*source
	sched *scheduler
	epoch int
	lease uint32
}

func (c *conn) Epoch() uint32 { return c.lease }
func (c *conn) Size() int64   { return int64(len(c.content)) }
func (c *conn) Close() error  { return nil }

func (c *conn) do(ctx context.Context, what string, f func()) error {
	if err := c.sched.park(ctx, what); err != nil {
		return err
	}
	c.mu.Lock()
	gone := c.epoch != c.source.epoch
	if !gone {
		f()
	}
	c.mu.Unlock()
	if gone {
		return region.ErrPeerGone
	}
	if err := c.sched.park(ctx, what+" reply"); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.epoch != c.source.epoch {
		return region.ErrPeerGone
	}
	return nil
}

func (c *conn) ReadAt(ctx context.Context, p []byte, off int64) error {
	return c.do(ctx, fmt.Sprintf("remote read %d+%d", off, len(p)), func() { copy(p, c.content[off:]) })
}

func (c *conn) WriteAt(ctx context.Context, p []byte, off int64) error {
	return c.do(ctx, fmt.Sprintf("remote write %d+%d", off, len(p)), func() { copy(c.content[off:], p) })
}

func (c *conn) Flush(ctx context.Context) error {
	return c.do(ctx, "remote flush", func() { copy(c.durable, c.content) })
}

// trimmer is a cache that can be bounded.
type trimmer interface {
	region.Store
	region.Trimmer
}

// slowCache parks the operations on the cache too, as a disk might.
type slowCache struct {
	trimmer
	sched *scheduler
}

func (c slowCache) Trim(ctx context.Context, off, n int64) error {
	if err := c.sched.park(ctx, fmt.Sprintf("cache trim %d+%d", off, n)); err != nil {
		return err
	}
	return c.trimmer.Trim(ctx, off, n)
}

func (c slowCache) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := c.sched.park(ctx, fmt.Sprintf("cache read %d+%d", off, len(p))); err != nil {
		return err
	}
	return c.trimmer.ReadAt(ctx, p, off)
}

func (c slowCache) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := c.sched.park(ctx, fmt.Sprintf("cache write %d+%d", off, len(p))); err != nil {
		return err
	}
	err := c.trimmer.WriteAt(ctx, p, off)
	if err == nil {
		err = c.sched.park(ctx, fmt.Sprintf("cache write %d+%d reply", off, len(p)))
	}
	return err
}

// history is what the writes so far allow a byte to be.
type history struct {
	mu     sync.Mutex
	clock  atomic.Int64
	writes []*written
}

type written struct {
	id         byte
	off, end   int64 // bytes
	start      int64
	returned   int64 // 0: still running
	incomplete bool  // it returned an error
}

func value(id byte, x int64) byte { return id*37 + byte(x*101) }

func (h *history) begin(id byte, off, end int64) *written {
	w := &written{id: id, off: off, end: end, start: h.clock.Add(1)}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.writes = append(h.writes, w)
	return w
}

func (h *history) finish(w *written, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	w.returned, w.incomplete = h.clock.Add(1), err != nil
}

// check returns an error unless p may be the content at off for somebody who
// looked at it once or several times between from and now: each byte is of a
// write that began before now and that no other write superseded before from.
func (h *history) check(p []byte, off, from int64) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i, b := range p {
		x := off + int64(i)
		ok := false
		for _, w := range h.writes {
			if x < w.off || x >= w.end || value(w.id, x) != b {
				continue
			}
			ok = true
			for _, v := range h.writes {
				if x >= v.off && x < v.end && v.returned != 0 && !v.incomplete && v.returned < from &&
					w.returned != 0 && v.start > w.returned {
					ok = false
				}
			}
			break
		}
		if !ok {
			return fmt.Errorf("byte at %d is stale or wrong: %#x is of write %d", x, b, (b-byte(x*101))*173)
		}
	}
	return nil
}

// TestModel runs many random schedules of reads, writes, barriers, pulls,
// pushes, errors, cancellations and crashes against a model. In each, all that
// the remote store and the cache are asked is held back and let go in a random
// order. -run 'TestModel' with TEST_SEED=n -schedules=1 replays one.
func TestModel(t *testing.T) {
	first := replay.Seed(t)
	var c counts
	n := *schedules
	if testing.Short() {
		n /= 10
	}
	for i := range uint64(n) {
		if !t.Run("", func(t *testing.T) { synctest.Test(t, func(t *testing.T) { c.schedule(t, first+i) }) }) {
			t.Fatalf("replay with TEST_SEED=%d go test -run TestModel -schedules=1", first+i)
		}
	}
	t.Logf("%d schedules: %+v", n, c)
	if c.Reads == 0 || c.Writes == 0 || c.Syncs == 0 || c.Crashes == 0 || c.Hedges == 0 || c.Dropped == 0 || c.Repushed == 0 || c.Retries == 0 ||
		c.Evicted == 0 || c.Drops == 0 || c.Takeovers == 0 || c.Changes == 0 {
		t.Errorf("the schedules missed something")
	}
}

// anyOrder returns one of the orders; a list may overlap itself and leave bytes out.
func anyOrder(r *rand.Rand, size int64) order.Order {
	switch r.IntN(4) {
	case 0:
		return order.Linear()
	case 1:
		return order.Reverse()
	case 2:
		return order.Random(r.Uint64())
	}
	var list []order.Range
	for range r.IntN(20) {
		off := r.Int64N(size)
		list = append(list, order.Range{Off: off, End: off + 1 + r.Int64N(size)})
	}
	return order.Then(order.First(r.Int64N(size)), order.List(list))
}

type counts struct {
	Reads, Writes, Syncs, Failed, Crashes, Hedges, Dropped, Repushed, Retries, Evicted, Drops, Steps int64
	Takeovers                                                                                        int64 // schedules in which another host took the lease while the connection was lost
	Changes                                                                                          int64 // changes by others that were dealt with by Invalidate
}

func (c *counts) schedule(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 7))
	chunk := int64(1) << r.IntN(5) // 1..16 bytes
	size := 1 + r.Int64N(6*chunk)
	src := &source{content: make([]byte, size)}
	for x := range src.content {
		src.content[x] = value(0, int64(x))
	}
	src.durable = bytes.Clone(src.content)
	h := &history{}
	h.finish(h.begin(0, 0, size), nil)
	sched := &scheduler{}
	var limit int64 // of the cache, in bytes
	cache := func() trimmer {
		if r.IntN(2) == 0 {
			m, err := NewMemory(size)
			if err != nil {
				t.Fatal(err)
			}
			return m
		}
		limit = (1 + r.Int64N(4)) * chunk
		m, err := NewSlots(size, chunk, limit)
		if err != nil {
			t.Fatal(err)
		}
		return m
	}()
	defer cache.Close()
	if r.IntN(2) == 0 {
		cache = slowCache{cache, sched}
	}
	var pusher *Pusher
	opens := 0
	remote, err := OpenAgain(t.Context(), func(ctx context.Context) (region.Store, error) {
		if opens++; opens > 1 {
			if err := sched.park(ctx, "open"); err != nil {
				return nil, err
			}
		}
		src.mu.Lock()
		defer src.mu.Unlock()
		return &conn{source: src, sched: sched, epoch: src.epoch, lease: src.lease}, nil
	}, func() { pusher.Lost() })
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewSyncer(remote, cache, chunk, chunk<<r.IntN(4))
	if err != nil {
		t.Fatal(err)
	}
	if limit > 0 {
		if err := s.Bound(limit); err != nil {
			t.Fatal(err)
		}
		if r.IntN(2) == 0 {
			s.OnDrop(func(off, n int64) error {
				atomic.AddInt64(&c.Drops, 1)
				return sched.park(s.ctx, fmt.Sprintf("drop %d+%d", off, n))
			})
		}
	}
	pusher = StartPusher(s, PushOptions{Workers: r.IntN(4), Interval: time.Duration(r.IntN(100)) * time.Millisecond,
		SyncWorkers: r.IntN(4), DirtyLimit: int64(r.IntN(3)) * chunk})
	puller := StartPuller(s, PullOptions{Workers: r.IntN(4), Window: r.Int64N(4 * chunk), Order: anyOrder(r, size)})

	var (
		trace   []string
		running atomic.Int64
		failMu  sync.Mutex
		failure error
		cancels []context.CancelFunc
	)
	fail := func(err error) {
		failMu.Lock()
		defer failMu.Unlock()
		if failure == nil {
			failure = err
		}
	}
	// In some schedules nobody writes but others, behind the Syncer's back, after which it is invalidated;
	// in some another host takes the lease over when the connection is lost.
	others := limit > 0 && r.IntN(4) == 0
	var taken []byte // what the source has from then on
	var changing atomic.Bool
	change := func(id byte, off, end int64) {
		if changing.Swap(true) {
			return
		}
		w := h.begin(id, off, end)
		src.another(id, off, end, false)
		running.Add(1)
		go func() {
			defer running.Add(-1)
			defer changing.Store(false)
			err := s.Invalidate(t.Context())
			h.finish(w, err)
			if err == nil {
				atomic.AddInt64(&c.Changes, 1)
			}
		}()
	}
	client := func(id byte, kind int, off, n int64) {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second) // a cache that is full of what cannot be pushed any more
		if others && kind > 1 {
			kind = 0
		}
		cancels = append(cancels, cancel)
		running.Add(1)
		go func() {
			defer running.Add(-1)
			defer cancel()
			var err error
			switch kind {
			case 0, 1:
				p := make([]byte, n)
				from := h.clock.Add(1)
				if view, ok := s.View(off, n); ok && kind == 1 {
					copy(p, view)
				} else {
					err = pusher.ReadAt(ctx, p, off)
				}
				if err == nil {
					if err := h.check(p, off, from); err != nil {
						fail(fmt.Errorf("read %d of %d+%d: %w", id, off, n, err))
					}
				}
				atomic.AddInt64(&c.Reads, 1)
			case 2, 3:
				p := make([]byte, n)
				for i := range p {
					p[i] = value(id, off+int64(i))
				}
				w := h.begin(id, off, off+n)
				err = pusher.WriteAt(ctx, p, off)
				h.finish(w, err)
				atomic.AddInt64(&c.Writes, 1)
			case 4:
				from := h.clock.Add(1)
				if err = pusher.Flush(ctx); err == nil {
					if err := h.check(src.snapshot(), 0, from); err != nil {
						fail(fmt.Errorf("barrier %d: %w", id, err))
					}
				}
				atomic.AddInt64(&c.Syncs, 1)
			}
			if err != nil {
				atomic.AddInt64(&c.Failed, 1)
			}
		}()
	}
	rate := []int{0, 0, 10, 30}[r.IntN(4)] // per cent of operations that fail
	crashes := r.IntN(3) == 0
	takeover := crashes && r.IntN(3) == 0
	injected := errors.New("injected")
	step := func(draining bool) {
		synctest.Wait()
		var err error
		if !draining && r.IntN(100) < rate {
			err = injected
		}
		if what := sched.release(r, err); what != "" {
			trace = append(trace, fmt.Sprintf("go on: %s (%v)", what, err))
			return
		}
		time.Sleep(time.Duration(1+r.IntN(60)) * time.Millisecond)
	}
	id := byte(0)
	for range 30 + r.IntN(120) {
		c.Steps++
		switch k := r.IntN(20); {
		case k < 6 && running.Load() < 5 && id < 250:
			id++
			off := r.Int64N(size)
			n := 1 + r.Int64N(size-off)
			if r.IntN(2) == 0 { // whole chunks
				off = off &^ (chunk - 1)
				n = min((1+r.Int64N(2))*chunk, size-off)
			}
			kind := r.IntN(5)
			trace = append(trace, fmt.Sprintf("start %d: %s %d+%d", id, []string{"read", "view", "write", "write", "barrier"}[kind], off, n))
			client(id, kind, off, n)
		case k == 6 && len(cancels) > 0 && rate > 0:
			i := r.IntN(len(cancels))
			trace = append(trace, fmt.Sprintf("cancel %d", i+1))
			cancels[i]()
		case k == 7 && crashes:
			trace = append(trace, "crash")
			src.crash()
			c.Crashes++
			if takeover && taken == nil && !others {
				off := r.Int64N(size)
				end := off + 1 + r.Int64N(size-off)
				trace = append(trace, fmt.Sprintf("another host takes the lease and writes %d+%d", off, end-off))
				h.finish(h.begin(253, off, end), errors.New("no reader need see it"))
				taken = src.another(253, off, end, true)
				c.Takeovers++
			}
		case k == 9 && others && id < 250:
			id++
			off := r.Int64N(size)
			end := off + 1 + r.Int64N(size-off)
			trace = append(trace, fmt.Sprintf("another changes %d+%d, write %d", off, end-off, id))
			change(id, off, end)
		case k == 8:
			trace = append(trace, "time")
			time.Sleep(time.Duration(r.IntN(300)) * time.Millisecond)
		default:
			step(false)
		}
	}
	for synctest.Wait(); running.Load() > 0; synctest.Wait() {
		step(true)
	}
	client(251, 4, 0, 0) // a last barrier
	for synctest.Wait(); running.Load() > 0; synctest.Wait() {
		step(true)
	}
	client(252, 0, 0, size) // and a read of everything
	for synctest.Wait(); running.Load() > 0; synctest.Wait() {
		step(true)
	}
	c.Hedges += s.stats.hedges.Load()
	c.Dropped += s.stats.droppedBytes.Load()
	c.Retries += puller.Retries()
	c.Evicted += s.Evicted() >> s.shift
	requests, pushed, _ := pusher.Pushed()
	if requests > 0 && pushed > size {
		c.Repushed++
	}
	closed := make(chan error)
	go func() {
		puller.Close()
		closed <- pusher.Close()
	}()
	for open := true; open; {
		synctest.Wait()
		select {
		case err := <-closed:
			if err != nil && (taken == nil || !errors.Is(err, region.ErrMismatch)) {
				fail(err)
			}
			open = false
		default:
			step(true)
		}
	}
	if taken != nil && !bytes.Equal(src.snapshot(), taken) {
		fail(errors.New("the source does not have what the host wrote that took the lease over"))
	}
	if err := h.check(src.snapshot(), 0, h.clock.Add(1)); err != nil && taken == nil {
		fail(fmt.Errorf("source after Close: %w", err))
	}
	if err := pusher.ReadAt(t.Context(), make([]byte, 1), 0); !errors.Is(err, region.ErrClosed) {
		fail(fmt.Errorf("read after Close: %v", err))
	}
	if err := remote.Close(); err != nil {
		fail(err)
	}
	if failure != nil {
		for _, l := range trace {
			t.Log(l)
		}
		t.Fatalf("seed %d, %d bytes in chunks of %d: %v", seed, size, chunk, failure)
	}
}

// TestStress has readers and writers in parallel on a region that is pulled
// and pushed by as many goroutines as will run, with real time. Each word has one
// writer, who counts up; a reader may see no less than was there before it began.
func TestStress(t *testing.T) {
	r := rand.New(rand.NewPCG(replay.Seed(t), 3))
	const chunk, size = 64, 64*97 + 24
	rounds := 60
	if testing.Short() {
		rounds = 10
	}
	for range rounds {
		stress(t, r, chunk, size)
	}
}

func stress(t *testing.T, r *rand.Rand, chunk, size int64) {
	remote := newBytes(size)
	mem, err := NewMemory(size)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	s, err := NewSyncer(jitter{remote}, mem, chunk, 4*chunk)
	if err != nil {
		t.Fatal(err)
	}
	p := StartPusher(s, PushOptions{Workers: 3, Interval: time.Duration(r.IntN(300)) * time.Microsecond, DirtyLimit: int64(r.IntN(2)) * 20 * chunk})
	puller := StartPuller(s, PullOptions{Workers: 4, Order: anyOrder(r, size)})
	words := size / 8
	written := make([]atomic.Uint64, words)
	started := make([]atomic.Uint64, words)
	var wg sync.WaitGroup
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for g := range 4 {
		r := rand.New(rand.NewPCG(r.Uint64(), 0))
		wg.Go(func() {
			for range 300 {
				i := r.Int64N(words)
				n := 1 + r.Int64N(min(24, words-i))
				switch {
				case r.IntN(2) == 0 && g < 2: // writer g owns the words whose block of 3 is of its parity: neighbours within a chunk
					i = i / 6 * 6
					i += int64(g) * 3
					n = min(3, words-i)
					if n <= 0 {
						continue
					}
					b := make([]byte, n*8)
					for k := range n {
						put(b[k*8:], started[i+k].Add(1))
					}
					if err := p.WriteAt(ctx, b, i*8); err != nil {
						t.Error(err)
						return
					}
					for k := range n {
						written[i+k].Add(1)
					}
				case g == 2 && r.IntN(40) == 0:
					before := make([]uint64, words)
					for k := range before {
						before[k] = written[k].Load()
					}
					if err := p.Flush(ctx); err != nil {
						t.Error(err)
						return
					}
					remote.mu.Lock()
					for k := range before {
						if v := get(remote.b[k*8:]); v < before[k] {
							t.Errorf("word %d is %d at the source after a barrier, want at least %d", k, v, before[k])
						}
					}
					remote.mu.Unlock()
				default:
					before := make([]uint64, n)
					for k := range before {
						before[k] = written[i+int64(k)].Load()
					}
					b := make([]byte, n*8)
					if err := p.ReadAt(ctx, b, i*8); err != nil {
						t.Error(err)
						return
					}
					for k := range before {
						if v := get(b[k*8:]); v < before[k] || v > started[i+int64(k)].Load() {
							t.Errorf("word %d is %d, want %d to %d", i+int64(k), v, before[k], started[i+int64(k)].Load())
						}
					}
				}
				if r.IntN(20) == 0 {
					runtime.Gosched()
				}
			}
		})
	}
	wg.Wait()
	puller.Close()
	if err := p.Shutdown(ctx); err != nil {
		t.Error(err)
	}
	for k := range words {
		if v := get(remote.b[k*8:]); v != written[k].Load() {
			t.Errorf("word %d is %d at the source after Close, want %d", k, v, written[k].Load())
		}
	}
	if t.Failed() {
		t.FailNow()
	}
}
