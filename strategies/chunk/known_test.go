package chunk

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"memsync/strategies/order"
	"memsync/strategies/region"
	"memsync/strategies/replay"
)

// sparse is a source that knows its zeroes and counts what it is asked for.
type sparse struct {
	*byteStore
	read atomic.Int64
}

func (s *sparse) ReadAt(ctx context.Context, p []byte, off int64) error {
	s.read.Add(int64(len(p)))
	return s.byteStore.ReadAt(ctx, p, off)
}

// Extents gives at most three extents, to be asked again.
func (s *sparse) Extents(_ context.Context, off, n int64) ([]region.Extent, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []region.Extent
	for end := off + n; off < end && len(out) < 3; {
		e := region.Extent{Length: 1, Zero: s.b[off] == 0}
		for off+e.Length < end && (s.b[off+e.Length] == 0) == e.Zero {
			e.Length++
		}
		out = append(out, e)
		off += e.Length
	}
	return out, nil
}

// patterned fills b with chunks of a few kinds, zeroes among them.
func patterned(r *rand.Rand, b []byte, chunk int) {
	for off := 0; off < len(b); off += chunk {
		kind := byte(r.IntN(4))
		for i := off; i < min(off+chunk, len(b)); i++ {
			b[i] = kind * byte(1+(i-off)%7)
		}
		if r.IntN(3) == 0 {
			b[off] = byte(1 + r.IntN(255)) // of its own
		}
	}
}

// TestKnown: whatever is known, and whenever, a managed pipeline reads the bytes
// of a plain slice, and what is written is at the source in the end. With all
// known before, zeroes and copies do not cross the wire.
func TestKnown(t *testing.T) {
	r := rand.New(rand.NewPCG(replay.Seed(t), 4))
	var zeroes, copies int64
	for range 300 {
		chunk := int64(1) << (3 + r.IntN(3))
		size := 1 + r.Int64N(40*chunk)
		src := &sparse{byteStore: newBytes(size)}
		patterned(r, src.b, int(chunk))
		model := bytes.Clone(src.b)
		mem, err := NewMemory(size)
		if err != nil {
			t.Fatal(err)
		}
		k, err := NewKnown(src, mem, chunk)
		if err != nil {
			t.Fatal(err)
		}
		digests, err := NewDigests(newCopy(src.b), chunk)
		if err != nil {
			t.Fatal(err)
		}
		learn := make(chan error, 2)
		early := r.IntN(2) == 0
		go func() { learn <- k.Holes(t.Context(), src) }()
		go func() { learn <- k.Same(t.Context(), digests) }()
		wait := func() {
			for range 2 {
				if err := <-learn; err != nil {
					t.Fatal(err)
				}
			}
		}
		if early {
			wait()
		}
		s, err := NewSyncer(k, mem, chunk, chunk<<r.IntN(4))
		if err != nil {
			t.Fatal(err)
		}
		p := StartPusher(s, PushOptions{Workers: r.IntN(3), Interval: time.Duration(1+r.IntN(200)) * time.Microsecond})
		writes := r.IntN(2) == 0
		puller := StartPuller(s, PullOptions{Workers: r.IntN(4), Order: anyOrder(r, size)})
		for range 40 {
			off := r.Int64N(size)
			b := make([]byte, 1+r.Int64N(size-off))
			if writes && r.IntN(2) == 0 {
				patterned(r, b, int(chunk))
				copy(model[off:], b)
				err = p.WriteAt(t.Context(), b, off)
			} else if err = p.ReadAt(t.Context(), b, off); err == nil && !bytes.Equal(b, model[off:off+int64(len(b))]) {
				t.Fatalf("read of %d bytes at %d, in chunks of %d, is wrong", len(b), off, chunk)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		all := make([]byte, size)
		if err := p.ReadAt(t.Context(), all, 0); err != nil || !bytes.Equal(all, model) {
			t.Fatalf("the whole region is wrong: %v", err)
		}
		puller.Close()
		zero, same := k.Saved()
		zeroes, copies = zeroes+zero, copies+same
		if st := s.Stats(); early && !writes && src.read.Load() != st.DemandBytes+st.PrefetchBytes-zero-same {
			t.Fatalf("%d bytes crossed the wire; pulled %d, zero %d, same %d", src.read.Load(), st.DemandBytes+st.PrefetchBytes, zero, same)
		}
		if err := p.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(src.b, model) {
			t.Fatal("the source is wrong in the end")
		}
		// After writes through it nothing is taken for what it was before.
		if err := k.ReadAt(t.Context(), all, 0); err != nil || !bytes.Equal(all, model) {
			t.Fatalf("read past the syncer: %v", err)
		}
		if !early {
			wait()
		}
		_ = mem.Close()
	}
	t.Logf("%d bytes known to be zero, %d copied", zeroes, copies)
	if zeroes == 0 || copies == 0 {
		t.Error("nothing was saved")
	}
}

func newCopy(b []byte) *byteStore { return &byteStore{b: bytes.Clone(b)} }

// TestKnownIsVerified: digests that do not fit what the cache has, since it was
// written meanwhile, save nothing and spoil nothing.
func TestKnownIsVerified(t *testing.T) {
	src := newBytes(64)
	for i := range src.b {
		src.b[i] = byte(i % 8) // eight equal chunks
	}
	mem, err := NewMemory(64)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	k, err := NewKnown(src, mem, 8)
	if err != nil {
		t.Fatal(err)
	}
	d, _ := NewDigests(newCopy(src.b), 8)
	if err := k.Same(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 8)
	for i, garbage := range []bool{false, true, false} {
		if err := k.ReadAt(t.Context(), b, int64(i*8)); err != nil || !bytes.Equal(b, src.b[:8]) {
			t.Fatalf("chunk %d: %v, %v", i, b, err)
		}
		put := b
		if garbage {
			put = []byte("garbage!")
		}
		if err := mem.WriteAt(t.Context(), put, 0); err != nil {
			t.Fatal(err)
		}
	}
	if _, same := k.Saved(); same != 8 { // the second chunk is the first's copy; the third must be read
		t.Errorf("%d bytes were copied, want 8", same)
	}
}

// TestDigests: every part of a digest is that of its chunk; the limits hold.
func TestDigests(t *testing.T) {
	src := newBytes(100)
	patterned(rand.New(rand.NewPCG(1, 1)), src.b, 16)
	d, err := NewDigests(src, 16)
	if err != nil {
		t.Fatal(err)
	}
	var want []byte
	for off := 0; off < 100; off += 16 {
		sum := sha256.Sum256(src.b[off:min(off+16, 100)])
		want = append(want, sum[:]...)
	}
	for off := range int64(len(want)) {
		for _, n := range []int64{1, 31, 33, 100} {
			p := make([]byte, min(n, int64(len(want))-off))
			if err := d.ReadAt(t.Context(), p, off); err != nil || !bytes.Equal(p, want[off:off+int64(len(p))]) {
				t.Fatalf("%d bytes at %d: %v", len(p), off, err)
			}
		}
	}
	if err := d.ReadAt(t.Context(), make([]byte, 2), d.Size()-1); !errors.Is(err, region.ErrOutOfRange) {
		t.Errorf("beyond the end: %v", err)
	}
	if err := d.WriteAt(t.Context(), []byte{1}, 0); !errors.Is(err, region.ErrReadOnly) {
		t.Errorf("a write: %v", err)
	}
	k, _ := NewKnown(src, newBytes(100), 16)
	if err := k.Same(t.Context(), newBytes(5)); !errors.Is(err, region.ErrOutOfRange) {
		t.Errorf("digests of another size: %v", err)
	}
}

// TestDemandOvertakesOrder: while a pull in any order fills the link, a read of
// nearly any chunk takes about a round trip and its own bytes, not the queue of
// 670 ms in front of it. A chunk that is due anyway is waited for a little longer.
func TestDemandOvertakesOrder(t *testing.T) {
	for name, o := range map[string]order.Order{"linear": order.Linear(), "reverse": order.Reverse(), "random": order.Random(1)} {
		synctestRun(t, name, func(t *testing.T) {
			p := &pipe{size: 64 << 20, rtt: 20 * time.Millisecond, rate: 1e8 / 8}
			s := mountPipe(t, p)
			puller := StartPuller(s, PullOptions{Workers: 16, Order: o})
			defer puller.Close()
			time.Sleep(200 * time.Millisecond) // the queue is as long as it gets
			r := rand.New(rand.NewPCG(1, 1))
			b := make([]byte, 4096)
			late := 0
			for range 30 {
				begun := time.Now()
				off := r.Int64N(p.size/4096) * 4096
				if err := s.ReadAt(t.Context(), b, off); err != nil {
					t.Fatal(err)
				}
				// A chunk takes 5.2 ms to send; one that is on its way may be asked for again.
				took := time.Since(begun)
				if took > 2*p.rtt+20*time.Millisecond {
					late++
				}
				if late > 3 || took > 6*p.rtt+30*time.Millisecond {
					t.Errorf("%s: a read at %d took %v behind %d bytes in flight; %d were late", name, off, took, p.peak, late)
				}
			}
		})
	}
}

// TestScatteredPull: an order that jumps from chunk to chunk fills the window as a linear one does.
func TestScatteredPull(t *testing.T) {
	took := func(o order.Order) (d time.Duration) {
		synctestRun(t, "", func(t *testing.T) {
			p := &pipe{size: 32 << 20, rtt: 40 * time.Millisecond, rate: 1e9 / 8}
			s := mountPipe(t, p)
			begun := time.Now()
			<-StartPuller(s, PullOptions{Workers: 16, Order: o}).Done()
			if d = time.Since(begun); p.peak > 8<<20 || s.LocalBytes() != p.size {
				t.Errorf("%d bytes in flight, %d local", p.peak, s.LocalBytes())
			}
		})
		return d
	}
	var list []order.Range
	for _, i := range rand.New(rand.NewPCG(1, 1)).Perm(512) {
		list = append(list, order.Range{Off: int64(i) << 16, End: int64(i+1) << 16})
	}
	linear, scattered := took(order.Linear()), took(order.List(list))
	t.Logf("linear %v, chunk by chunk %v", linear, scattered)
	if scattered > linear*3/2 {
		t.Errorf("chunk by chunk takes %v, linear %v", scattered, linear)
	}
}
