package hashsync

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"memsync/strategies"
	"memsync/strategies/delta"
	"memsync/strategies/hash"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/replay"
	"memsync/strategies/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// memory is a region that is written while it is hashed. A chunk that is read is
// torn only where its writers tear it: they write a part at a time.
type memory struct {
	mu sync.RWMutex
	b  []byte
}

func (m *memory) Size() int64                { return int64(len(m.b)) }
func (m *memory) Open() (hash.Reader, error) { return m, nil }
func (m *memory) Close() error               { return nil }

func (m *memory) Chunk(off, n int64, buf []byte) ([]byte, error) {
	return buf[:n], m.read(context.Background(), buf[:n], off)
}

func (m *memory) read(_ context.Context, p []byte, off int64) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	copy(p, m.b[off:])
	return nil
}

func (m *memory) write(p []byte, off int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	copy(m.b[off:], p)
}

func (m *memory) copy() []byte {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return bytes.Clone(m.b)
}

func newMemory(size int64) *memory {
	m := &memory{b: make([]byte, size)}
	region.Content{Seed: 3}.Fill(m.b, 0)
	return m
}

func source(t *testing.T, m *memory, o SourceOptions) *Source {
	t.Helper()
	if o.Hash.Name == "" {
		o.Hash, _ = hash.ByName("xxh3-128")
	}
	if o.Chunk == 0 {
		o.Chunk = 4096
	}
	if o.Interval == 0 {
		o.Interval = time.Hour
	}
	if o.Delta == "" {
		o.Delta = delta.Auto
	}
	o.Name = "region"
	s, err := NewSource(t.Context(), m, m.read, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// listen serves connections on loopback; cut closes those that are open.
type listener struct {
	addr string
	mu   sync.Mutex
	open map[net.Conn]bool
}

func (l *listener) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for c := range l.open {
		c.Close()
	}
}

func (l *listener) dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "tcp", l.addr)
}

func listen(t *testing.T, handle func(context.Context, net.Conn) error) *listener {
	t.Helper()
	nl, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &listener{addr: nl.Addr().String(), open: map[net.Conn]bool{}}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := nl.Accept()
			if err != nil {
				return
			}
			l.mu.Lock()
			l.open[c] = true
			l.mu.Unlock()
			wg.Go(func() {
				_ = handle(ctx, c)
				l.mu.Lock()
				delete(l.open, c)
				l.mu.Unlock()
			})
		}
	})
	t.Cleanup(func() {
		nl.Close()
		cancel()
		wg.Wait()
	})
	return l
}

func memfd(size int64) (*os.File, error) {
	fd, err := unix.MemfdCreate("replica", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "replica")
	return f, f.Truncate(size)
}

// follower is a replica that follows.
type follower struct {
	*Replica
	file *os.File
	stop func() error
}

func follows(t *testing.T, from *listener, file *os.File) *follower {
	t.Helper()
	f := &follower{file: file}
	f.Replica = NewReplica("region", 0, func(size int64) (_ *os.File, err error) {
		if f.file == nil {
			f.file, err = memfd(size)
		}
		return f.file, err
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Follow(ctx, from.dial, f.Replica) }()
	var once sync.Once
	var err error
	f.stop = func() error {
		once.Do(func() {
			cancel()
			err = <-done
			if cerr := f.Close(); cerr != nil {
				err = cerr
			}
		})
		return err
	}
	t.Cleanup(func() {
		_ = f.stop()
		if f.file != nil {
			f.file.Close()
		}
	})
	return f
}

// content is what the replica's file has.
func (f *follower) content(t *testing.T) []byte {
	t.Helper()
	b := make([]byte, f.node.size)
	if _, err := f.file.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

func equal(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("%s: byte %d is %#x, want %#x", what, i, got[i], want[i])
		}
	}
}

// A destination gets everything, then what changes; for every hash and encoding.
func TestSync(t *testing.T) {
	for _, name := range hash.Names(true) {
		f, _ := hash.ByName(name)
		for i, mode := range delta.Modes() {
			if i > 0 && name != "blake3" {
				continue
			}
			for _, size := range []int64{1, 4096, 5*4096 + 7, 3<<20 + 99} {
				t.Run(fmt.Sprint(name, "/", mode, "/", size), func(t *testing.T) {
					ctx := within(t)
					m := newMemory(size)
					s := source(t, m, SourceOptions{Hash: f, Delta: delta.Mode(mode), Workers: 2})
					d := follows(t, listen(t, s.Serve), nil)
					if err := d.Wait(ctx, 1); err != nil {
						t.Fatal(err)
					}
					equal(t, "first", d.content(t), m.copy())
					r := rand.New(rand.NewPCG(uint64(size), 1))
					for range 5 {
						for range 4 {
							off := r.Int64N(size)
							p := make([]byte, 1+r.Int64N(min(9000, size-off)))
							region.Content{Seed: r.Uint64()}.Fill(p, off)
							m.write(p, off)
						}
						if _, err := s.Sync(ctx); err != nil {
							t.Fatal(err)
						}
						equal(t, "after Sync", d.content(t), m.copy())
					}
					if err := d.stop(); !errors.Is(err, context.Canceled) {
						t.Error(err)
					}
				})
			}
		}
	}
}

// The model: a region that is written at random while destinations come, go, are
// cut off and come back, in a tree. After a Sync each that is connected equals
// the region; at the end all do. No schedule may hang.
func TestModel(t *testing.T) {
	schedules := 12
	if n, err := strconv.Atoi(os.Getenv("HASHSYNC_SCHEDULES")); err == nil { // the long form: 2000, an hour
		schedules = n
	}
	base := replay.Seed(t)
	for i := range schedules {
		if !t.Run(fmt.Sprint(i), func(t *testing.T) { model(t, base+uint64(i)) }) {
			t.Fatalf("replay with TEST_SEED=%d HASHSYNC_SCHEDULES=1", base+uint64(i))
		}
	}
}

func model(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 2))
	ctx := within(t)
	size := 1 + r.Int64N(2<<20)
	m := newMemory(size)
	modes := delta.Modes()
	s := source(t, m, SourceOptions{Chunk: 4096 << r.IntN(5), Interval: time.Duration(1+r.IntN(20)) * time.Millisecond, Delta: delta.Mode(modes[r.IntN(len(modes))]), Workers: 1 + r.IntN(3)})
	type point struct {
		*listener
		depth int
	}
	points := []point{{listen(t, s.Serve), 0}}
	var all []*follower
	join := func() {
		p := points[r.IntN(len(points))]
		d := follows(t, p.listener, nil)
		all = append(all, d)
		points = append(points, point{listen(t, d.Serve), p.depth + 1})
	}
	join()
	if err := all[0].Wait(ctx, 1); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var writer sync.WaitGroup
	var hold sync.Mutex // held while nobody may write
	writer.Go(func() {
		w := rand.New(rand.NewPCG(seed, 3))
		for i := uint64(1); ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			hold.Lock()
			off := w.Int64N(size)
			p := make([]byte, 1+w.Int64N(min(size-off, 1<<(4+w.IntN(14)))))
			if w.IntN(10) == 0 { // an insertion
				now := m.copy()[off:]
				copy(p, now)
				m.write(append([]byte{1, 2, 3}, p[:max(0, len(p)-3)]...)[:min(len(p), 3+max(0, len(p)-3))], off)
			} else {
				region.Content{Seed: seed, Generation: i}.Fill(p, off)
				m.write(p, off)
			}
			hold.Unlock()
			time.Sleep(time.Duration(w.IntN(300)) * time.Microsecond)
		}
	})
	for range 12 {
		switch k := r.IntN(6); {
		case k == 0 && len(all) < 6:
			join()
		case k == 1:
			points[r.IntN(len(points))].cut()
		case k == 2:
			time.Sleep(time.Duration(r.IntN(20)) * time.Millisecond)
		default:
			hold.Lock()
			if _, err := s.Sync(ctx); err != nil {
				t.Fatal(err)
			}
			hold.Unlock()
		}
	}
	close(stop)
	writer.Wait()
	want := m.copy()
	// All that are connected, however far down: a destination that was cut off is
	// there again before long.
	for i, d := range all {
		for {
			round, err := s.Sync(ctx)
			if err != nil {
				t.Fatal(err)
			}
			wait, cancel := context.WithTimeout(ctx, 2*time.Second)
			err = d.Wait(wait, round)
			cancel()
			if err == nil {
				break
			}
			if ctx.Err() != nil {
				t.Fatalf("destination %d does not reach round %d: %v", i, round, err)
			}
		}
		equal(t, fmt.Sprintf("destination %d", i), d.content(t), want)
	}
	for i := len(all) - 1; i >= 0; i-- {
		if err := all[i].stop(); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
}

// A link that was lost and a destination that starts again with its old file
// get what differs, not everything.
func TestResume(t *testing.T) {
	ctx := within(t)
	m := newMemory(4 << 20)
	s := source(t, m, SourceOptions{Chunk: 64 << 10})
	l := listen(t, s.Serve)
	d := follows(t, l, nil)
	if err := d.Wait(ctx, 1); err != nil {
		t.Fatal(err)
	}
	l.cut()
	m.write([]byte("changed meanwhile"), 1<<20)
	before := s.statistics().SentBytes
	for round := uint64(0); ; { // until it is back
		var err error
		if round, err = s.Sync(ctx); err != nil {
			t.Fatal(err)
		}
		wait, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
		err = d.Wait(wait, round)
		cancel()
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
	}
	equal(t, "after a lost link", d.content(t), m.copy())
	if sent := s.statistics().SentBytes - before; sent > 70<<10 {
		t.Errorf("a lost link cost %d bytes for one changed chunk", sent)
	}
	// It dies in the middle of a chunk: half of it is there.
	if err := d.stop(); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if _, err := d.file.WriteAt(make([]byte, 30000), 2<<20); err != nil {
		t.Fatal(err)
	}
	m.write([]byte("changed again"), 3<<20)
	before = s.statistics().SentBytes
	again := follows(t, l, d.file)
	if err := again.Wait(ctx, 1); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	equal(t, "after a crash", again.content(t), m.copy())
	if sent := s.statistics().SentBytes - before; sent > 200<<10 {
		t.Errorf("a crash in one chunk cost %d bytes", sent)
	}
}

// A destination that is damaged from outside is repaired by the next round.
func TestRepair(t *testing.T) {
	ctx := within(t)
	m := newMemory(1 << 20)
	s := source(t, m, SourceOptions{Chunk: 4096})
	d := follows(t, listen(t, s.Serve), nil)
	if err := d.Wait(ctx, 1); err != nil {
		t.Fatal(err)
	}
	d.node.own.Lock() // as if a round had gone wrong: table and bytes differ from the source's
	d.mem[5000] ^= 1
	d.node.f.Sum(d.node.entry(1, 2), d.mem[4096:8192])
	d.node.own.Unlock()
	if _, err := s.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	equal(t, "repaired", d.content(t), m.copy())
	if n := s.statistics().Mismatches; n == 0 {
		t.Error("nobody noticed")
	}
}

// Readers that look at versions never see a mixture of rounds in a chunk.
func TestNoTear(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector does not know sequence locks")
	}
	ctx := within(t)
	const chunk, chunks = 64 << 10, 8
	m := &memory{b: make([]byte, chunk*chunks)}
	s := source(t, m, SourceOptions{Chunk: chunk, Interval: time.Millisecond})
	d := follows(t, listen(t, s.Serve), nil)
	if err := d.Wait(ctx, 1); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	var reads, changes atomic.Int64
	for range 2 {
		wg.Go(func() {
			p := make([]byte, chunk)
			var last [chunks]uint64
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				c := i % chunks
				_, v, err := d.ReadAt(ctx, p, int64(c)*chunk, 0)
				if err != nil {
					t.Error(err)
					return
				}
				if !bytes.Equal(p[1:], p[:chunk-1]) {
					t.Errorf("chunk %d of round %d is torn", c, v)
					return
				}
				if v < last[c] {
					t.Errorf("chunk %d went back from round %d to %d", c, last[c], v)
				}
				if v > last[c] {
					changes.Add(1)
				}
				last[c] = v
				reads.Add(1)
			}
		})
	}
	for i := range 300 {
		m.write(bytes.Repeat([]byte{byte(i)}, chunk), int64(i%chunks)*chunk)
		time.Sleep(time.Millisecond)
	}
	close(stop)
	wg.Wait()
	if changes.Load() < 50 {
		t.Errorf("only %d changes were seen in %d reads", changes.Load(), reads.Load())
	}
}

// Apportioned reads: a reader may ask any node of a chain, and is never told less than
// the round that it names; a node that does not have that round lets it wait, also while it
// has lost the one above it.
func TestReads(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector does not know sequence locks")
	}
	ctx := within(t)
	const chunk, chunks = 4096, 16
	m := newMemory(chunk * chunks)
	clear(m.b)
	s := source(t, m, SourceOptions{Chunk: chunk, Interval: time.Millisecond})
	up := listen(t, s.Serve)
	var nodes []*follower
	var links []*listener
	for range 3 {
		d := follows(t, up, nil)
		nodes, links, up = append(nodes, d), append(links, up), listen(t, d.Serve)
	}
	if err := nodes[2].Wait(ctx, 1); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var round uint64          // the latest that Sync returned
	var known [chunks]uint64  // what the chunks had then
	var reads [3]atomic.Int64 // by node
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 2 {
		r := rand.New(rand.NewPCG(replay.Seed(t), uint64(i)))
		wg.Go(func() {
			var seen [chunks]uint64 // by this reader, at any node
			var newest uint64
			for p := make([]byte, 8); ; {
				select {
				case <-stop:
					return
				default:
				}
				mu.Lock()
				least, floor := max(round, newest), known
				mu.Unlock()
				k, c := r.IntN(len(nodes)), r.IntN(chunks)
				_, v, err := nodes[k].ReadAt(ctx, p, int64(c)*chunk, least)
				if err != nil {
					t.Error(err)
					return
				}
				got := binary.NativeEndian.Uint64(p)
				if got < floor[c] || got < seen[c] {
					t.Errorf("node %d, chunk %d, at least round %d: %d, known %d, seen %d", k, c, least, got, floor[c], seen[c])
					return
				}
				newest, seen[c] = max(newest, v), got
				reads[k].Add(1)
			}
		})
	}
	for i := uint64(1); i <= 200; i++ {
		if i%40 == 20 {
			links[i/40%3].cut()
		}
		c := i % chunks
		m.write(binary.NativeEndian.AppendUint64(nil, i), int64(c)*chunk)
		at, err := s.Sync(ctx)
		if err != nil {
			t.Fatal(err)
		}
		mu.Lock()
		round, known[c] = at, i
		mu.Unlock()
	}
	close(stop)
	wg.Wait()
	for k := range reads {
		if reads[k].Load() == 0 {
			t.Errorf("node %d was never asked", k)
		}
	}
	if err := nodes[2].Wait(ctx, round); err != nil { // the last cut is over
		t.Fatal(err)
	}
	// The tail is stable: it has every round that Stable says any node has.
	if st := nodes[0].Stable(); nodes[2].node.current.Load() < st {
		t.Errorf("round %d is said to be everywhere, the tail has %d", st, nodes[2].node.current.Load())
	}
	wait, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if _, _, err := nodes[2].ReadAt(wait, make([]byte, 8), 0, round+1_000_000); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a round that is not there yet: %v", err)
	}
}

// A chain and a hub: each byte leaves the source once; a slow or dead
// destination does not stop the others; one that joins late gets all.
func TestTopologies(t *testing.T) {
	ctx := within(t)
	m := newMemory(2 << 20)
	s := source(t, m, SourceOptions{Chunk: 64 << 10})
	first := follows(t, listen(t, s.Serve), nil)
	hub := listen(t, first.Serve)
	var leaves []*follower
	for range 4 {
		leaves = append(leaves, follows(t, hub, nil))
	}
	last := follows(t, listen(t, leaves[0].Serve), nil)
	for _, d := range append(leaves, first, last) {
		if err := d.Wait(ctx, 1); err != nil {
			t.Fatal(err)
		}
	}
	before := s.statistics().SentBytes
	m.write(make([]byte, 10000), 12345)
	round, err := s.Sync(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range append(leaves, first, last) {
		if err := d.Wait(ctx, round); err != nil {
			t.Fatal(err)
		}
		equal(t, "in the tree", d.content(t), m.copy())
	}
	if sent := s.statistics().SentBytes - before; sent > 14000 {
		t.Errorf("the source sent %d bytes for 10000 with a hub", sent)
	}
	// Sync returns when the tail has it: all are stable.
	if err := leaves[1].stop(); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	m.write([]byte("after one has left"), 99999)
	if _, err := s.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	equal(t, "last", last.content(t), m.copy())
	late := follows(t, hub, nil)
	if err := late.Wait(ctx, 1); err != nil {
		t.Fatal(err)
	}
	equal(t, "late", late.content(t), m.copy())
}

// A destination that reads nothing does not stop another for longer than it
// takes to fill its queue, and costs no more memory than that.
func TestStalledDestination(t *testing.T) {
	ctx := within(t)
	m := newMemory(32 << 20)
	s := source(t, m, SourceOptions{Chunk: 64 << 10})
	l := listen(t, s.Serve)
	good := follows(t, l, nil)
	if err := good.Wait(ctx, 1); err != nil {
		t.Fatal(err)
	}
	c, err := l.dial(ctx) // says that it has nothing, and reads nothing
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	b := hello().encode(nil)
	b = frame{kind: frameOpen, body: []byte("region")}.encode(b)
	b = frame{kind: framePrints, flags: flagEmpty | flagLast}.encode(b)
	if _, err := c.Write(b); err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		p := make([]byte, 8<<20)
		region.Content{Seed: uint64(i)}.Fill(p, 0)
		m.write(p, 0)
		round := make(chan error, 1)
		go func() {
			_, err := s.Sync(ctx)
			round <- err
		}()
		for !bytes.Equal(good.content(t)[:len(p)], p) {
			if ctx.Err() != nil {
				t.Fatal("the good destination waits for the stalled one")
			}
			time.Sleep(5 * time.Millisecond)
		}
		if i == 4 {
			c.Close()
		}
		go func() { <-round }()
	}
}

// Two regions on one connection.
func TestRegions(t *testing.T) {
	ctx := within(t)
	m := []*memory{newMemory(100000), newMemory(70001)}
	var nodes []*node
	var sources []*Source
	for _, x := range m {
		s := source(t, x, SourceOptions{})
		sources, nodes = append(sources, s), append(nodes, s.node)
	}
	l := listen(t, func(ctx context.Context, c net.Conn) error {
		return serve(ctx, c, func(name string, _ int64) (*node, error) {
			i, err := strconv.Atoi(name)
			if err != nil {
				return nil, region.ErrMissing
			}
			return nodes[i], nil
		})
	})
	var rs []*Replica
	for i := range m {
		rs = append(rs, NewReplica(strconv.Itoa(i), 0, memfd))
	}
	run, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- Follow(run, l.dial, rs...) }()
	for i, r := range rs {
		m[i].write([]byte("x"), 50000)
		if err := r.Wait(ctx, 1); err != nil {
			t.Fatal(err)
		}
		round, err := sources[i].Sync(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Wait(ctx, round); err != nil {
			t.Fatal(err)
		}
		equal(t, r.name, r.mem, m[i].b)
	}
	cancel()
	<-done
	for _, r := range rs {
		if err := errors.Join(r.Close(), r.file.Close()); err != nil {
			t.Error(err)
		}
	}
	err := Follow(ctx, l.dial, NewReplica("none", 0, memfd))
	if !errors.Is(err, region.ErrMissing) {
		t.Errorf("a region that does not exist: %v", err)
	}
}

// A source whose size changed ends with an error that says so, here and there.
func TestResized(t *testing.T) {
	ctx := within(t)
	m := newMemory(10000)
	var bad atomic.Bool
	f, _ := hash.ByName("sha256")
	s, err := NewSource(ctx, m, m.read, SourceOptions{Name: "region", Chunk: 4096, Hash: f, Interval: time.Millisecond, Delta: delta.Auto, Check: func() error {
		if bad.Load() {
			return fmt.Errorf("3 bytes now: %w", errResized)
		}
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	l := listen(t, s.Serve)
	r := NewReplica("region", 0, memfd)
	done := make(chan error, 1)
	go func() { done <- Follow(ctx, l.dial, r) }()
	if err := r.Wait(ctx, 1); err != nil {
		t.Fatal(err)
	}
	bad.Store(true)
	if err := <-done; !errors.Is(err, region.ErrMismatch) {
		t.Errorf("the destination: %v", err)
	}
	if _, err := s.Sync(ctx); !errors.Is(err, errResized) {
		t.Errorf("Sync: %v", err)
	}
	if err := s.Close(); !errors.Is(err, errResized) {
		t.Errorf("Close: %v", err)
	}
	if err := errors.Join(r.Close(), r.file.Close()); err != nil {
		t.Error(err)
	}
}

// The context of Mount bounds the opening only: a mount goes on after it ended.
func TestMountContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	p, err := param.New(Strategy{}.Info().Params, []string{"interval=5ms"})
	if err != nil {
		t.Fatal(err)
	}
	store := storetest.Seeded(region.Content{Seed: 1}, 200_000)
	m, err := Strategy{}.Mount(ctx, localRemote{store}, strategies.Options{Chunk: 4096, Dir: t.TempDir(), Params: p})
	cancel()
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(50 * time.Millisecond) // some rounds
	if err := m.Close(context.Background()); err != nil {
		t.Error(err)
	}
}

// localRemote is a region that the mount's own process holds.
type localRemote struct{ region.Store }

func (r localRemote) Open(context.Context) (region.Store, error) { return r.Store, nil }
func (localRemote) Dial(context.Context) (net.Conn, error)       { return nil, region.ErrNotSupported }
