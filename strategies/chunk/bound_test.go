package chunk

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"memsync/strategies/region"
	"memsync/strategies/replay"
	"memsync/strategies/storetest"
)

// bounded makes a syncer with room for limit chunks of 4 bytes over remote.
func bounded(t *testing.T, remote region.Store, limit int64) *Syncer {
	t.Helper()
	const chunk = 4
	cache, err := NewSlots(remote.Size(), chunk, limit*chunk)
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewSyncer(remote, cache, chunk, 4*chunk)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Bound(limit * chunk); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = errors.Join(s.Close(), cache.Close()) })
	return s
}

// TestBoundHolds: whatever is read and written, the cache never has more chunks
// than it may, and all bytes are right.
func TestBoundHolds(t *testing.T) {
	r := rand.New(rand.NewPCG(replay.Seed(t), 11))
	for range 20 {
		limit := 1 + r.Int64N(20)
		size := 4*limit + r.Int64N(400)
		want := make([]byte, size)
		region.Content{Seed: 1}.Fill(want, 0)
		remote := storetest.New(bytes.Clone(want))
		s := bounded(t, remote, limit)
		p := StartPusher(s, PushOptions{Workers: r.IntN(3), Interval: time.Millisecond})
		for range 300 {
			off := r.Int64N(size)
			n := 1 + r.Int64N(min(40, size-off))
			if r.IntN(2) == 0 {
				region.Content{Seed: r.Uint64()}.Fill(want[off:off+n], off)
				if err := p.WriteAt(t.Context(), want[off:off+n], off); err != nil {
					t.Fatal(err)
				}
			} else {
				got := make([]byte, n)
				if err := p.ReadAt(t.Context(), got, off); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got, want[off:off+n]) {
					t.Fatalf("read %d at %d: wrong bytes", n, off)
				}
			}
			if n := s.nLocal.Load(); n > limit {
				t.Fatalf("%d chunks are local, %d may be", n, limit)
			}
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(remote.Snapshot(), want) {
			t.Fatal("the source lacks something after Close")
		}
		if s.bound.used != s.nLocal.Load() {
			t.Errorf("%d rooms are taken by %d chunks", s.bound.used, s.nLocal.Load())
		}
	}
}

// TestLatePull: a background pull that is overtaken by a write and arrives when
// the chunk has been pushed and its room is wanted brings no older bytes back.
func TestLatePull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := storetest.NewFaulty(storetest.New(make([]byte, 64)))
		late := &lateReply{Store: f, hold: make(chan struct{})}
		s := bounded(t, late, 2)
		p := StartPusher(s, PushOptions{})
		ctx := t.Context()
		var wg sync.WaitGroup
		wg.Go(func() { _ = s.Pull(region.WithClass(ctx, region.Prefetch), 0, 4) })
		synctest.Wait()
		if s.State(0) != Pulling {
			t.Fatal("the pull is not on its way")
		}
		if err := errors.Join(p.WriteAt(ctx, []byte("new!"), 0), p.Flush(ctx)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 4)
		for i := int64(1); i < 16; i++ { // each needs a room
			if err := p.ReadAt(ctx, b, 4*i); err != nil {
				t.Fatal(err)
			}
		}
		f.Stall(storetest.Read)
		wg.Go(func() { // if the chunk has gone, it is on its way again when the old bytes come
			if err := p.ReadAt(ctx, make([]byte, 4), 0); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		close(late.hold)
		synctest.Wait()
		f.Pass(storetest.Read)
		wg.Wait()
		if err := p.ReadAt(ctx, b, 0); err != nil || string(b) != "new!" {
			t.Errorf("read %q, %v", b, err)
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
}

// lateReply holds the answer of the first read, which has its bytes by then.
type lateReply struct {
	region.Store
	second atomic.Bool
	hold   chan struct{}
}

func (l *lateReply) ReadAt(ctx context.Context, p []byte, off int64) error {
	err := l.Store.ReadAt(ctx, p, off)
	if !l.second.Swap(true) {
		<-l.hold
	}
	return err
}

// TestFullOfDirty: a cache that is full of what the source does not take makes
// callers wait, and says so when their time is up; nothing is lost.
func TestFullOfDirty(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := storetest.New(make([]byte, 256))
		f := storetest.NewFaulty(source)
		s := bounded(t, f, 8)
		p := StartPusher(s, PushOptions{Workers: 1})
		f.Stall(storetest.Write)
		var failed int
		for i := range int64(12) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			if err := p.WriteAt(ctx, []byte{byte(i), 1, 2, 3}, 4*i); err != nil {
				if !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("write %d: %v", i, err)
				}
				failed++
			}
			cancel()
		}
		if failed == 0 || s.nLocal.Load() > 8 {
			t.Errorf("%d of 12 writes had to wait; %d chunks are local", failed, s.nLocal.Load())
		}
		f.Pass(storetest.Write)
		for i := range int64(12) {
			if err := p.WriteAt(t.Context(), []byte{byte(i), 1, 2, 3}, 4*i); err != nil {
				t.Fatal(err)
			}
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		for i, b := range source.Snapshot()[:48] {
			if want := []byte{byte(i / 4), 1, 2, 3}[i%4]; b != want {
				t.Fatalf("byte %d is %d, want %d", i, b, want)
			}
		}
	})
}

// TestHotStays: what is used again and again is kept, although a scan of the whole
// region goes by.
func TestHotStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := bounded(t, storetest.New(make([]byte, 4*1000)), 32)
		b := make([]byte, 4)
		for i := range int64(1000) {
			for _, idx := range []int64{i, i % 8 * 3} { // not neighbours: nothing is read ahead for them
				if err := s.ReadAt(t.Context(), b, 4*idx); err != nil {
					t.Fatal(err)
				}
				synctest.Wait() // for the reclaimer
			}
		}
		st := s.Stats()
		if n := (st.DemandBytes + st.PrefetchBytes) / 4; n > 1020 {
			t.Errorf("%d chunks were pulled for a scan of 1000, 8 of them hot", n)
		}
	})
}

// TestTerabyte: a region of 1 TiB costs the cache and the states of what was touched.
func TestTerabyte(t *testing.T) {
	const size, chunk = 1 << 40, 64 << 10
	remote := &pipe{size: size, content: region.Content{Seed: 5}}
	cache, err := NewSlots(size, chunk, 64*chunk)
	if err != nil {
		t.Fatal(err)
	}
	defer cache.Close()
	s, err := NewSyncer(remote, cache, chunk, 8*chunk)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Bound(64 * chunk); err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(replay.Seed(t), 12))
	b := make([]byte, 4096)
	for _, off := range []int64{0, size - 4096, size / 2} {
		if err := s.ReadAt(t.Context(), b, off); err != nil {
			t.Fatal(err)
		}
		if err := remote.content.Check(b, off); err != nil {
			t.Fatal(err)
		}
	}
	for range 500 {
		off := r.Int64N(size/4096) * 4096
		if err := s.ReadAt(t.Context(), b, off); err != nil {
			t.Fatal(err)
		}
		if err := remote.content.Check(b, off); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.ReadAt(t.Context(), b, size-4095); !errors.Is(err, region.ErrOutOfRange) {
		t.Errorf("read beyond the end: %v", err)
	}
	if n := s.nLocal.Load(); n > 64 {
		t.Errorf("%d chunks are local, 64 may be", n)
	}
}

// TestDropThatWaits: a drop of copies that waits for a read, which waits for a room
// (the kernel drops no page that a READ of the device is to fill), holds up nothing.
func TestDropThatWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := bounded(t, storetest.New(make([]byte, 256)), 4)
		answered := make(chan struct{})
		s.OnDrop(func(int64, int64) error {
			<-answered
			return nil
		})
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		begun := time.Now()
		for i := range int64(64) {
			if err := s.ReadAt(ctx, make([]byte, 4), 4*i); err != nil {
				t.Errorf("read chunk %d: %v", i, err)
				break
			}
		}
		if took := time.Since(begun); took > 100*time.Millisecond {
			t.Errorf("64 reads took %v", took)
		}
		close(answered)
	})
}

// TestAheadStays: what was pulled ahead does not leave the cache before it was
// read, also while copies of all that is older are being dropped.
func TestAheadStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size, chunk, rtt = 64 << 20, 64 << 10, 20 * time.Millisecond
		p := &pipe{size: size, rtt: rtt}
		cache, err := NewSlots(size, chunk, 8<<20)
		if err != nil {
			t.Fatal(err)
		}
		defer cache.Close()
		s, err := NewSyncer(p, cache, chunk, 512<<10)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if err := s.Bound(8 << 20); err != nil {
			t.Fatal(err)
		}
		s.OnDrop(func(int64, int64) error {
			time.Sleep(100 * time.Millisecond)
			return nil
		})
		b := make([]byte, chunk)
		for off := int64(0); off < size; off += chunk {
			if err := s.ReadAt(t.Context(), b, off); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Millisecond)
		}
		if p.bytes > size*65/64 {
			t.Errorf("%d bytes were pulled for %d", p.bytes, int64(size))
		}
	})
}

// TestSlots: the capacity holds, and what has no slot is an error.
func TestSlots(t *testing.T) {
	s, err := NewSlots(100, 8, 17)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ctx := t.Context()
	if err := errors.Join(s.WriteAt(ctx, make([]byte, 8), 8), s.WriteAt(ctx, make([]byte, 4), 96)); err != nil {
		t.Fatal(err)
	}
	if err := s.WriteAt(ctx, make([]byte, 8), 16); err == nil {
		t.Error("a third chunk found a slot")
	}
	if err := s.ReadAt(ctx, make([]byte, 8), 16); !errors.Is(err, region.ErrMissing) {
		t.Errorf("read of a chunk without a slot: %v", err)
	}
	if err := s.Trim(ctx, 8, 8); err != nil {
		t.Fatal(err)
	}
	want := []byte("abcdefgh")
	if err := s.WriteAt(ctx, want, 16); err != nil {
		t.Error(err)
	}
	got := make([]byte, 8)
	if err := s.ReadAt(ctx, got, 16); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%q, %v", got, err)
	}
}

// TestReadAhead: who reads a region that is larger than the cache in order does
// not wait a round trip for each chunk; who reads at random pulls no more than it reads.
func TestReadAhead(t *testing.T) {
	for _, sequential := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			const size, rtt = 64 << 20, 20 * time.Millisecond
			p := &pipe{size: size, rtt: rtt}
			cache, err := NewSlots(size, 64<<10, 16<<20)
			if err != nil {
				t.Fatal(err)
			}
			defer cache.Close()
			s, err := NewSyncer(p, cache, 64<<10, 512<<10)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if err := s.Bound(16 << 20); err != nil {
				t.Fatal(err)
			}
			begun := time.Now()
			b := make([]byte, 64<<10)
			for i := range int64(size >> 16) {
				off := i << 16
				if !sequential {
					off = i * 389 % (size >> 16) << 16
				}
				if err := s.ReadAt(t.Context(), b, off); err != nil {
					t.Fatal(err)
				}
			}
			took, trips := time.Since(begun), time.Duration(size>>16)*rtt
			if sequential && took > trips/8 {
				t.Errorf("in order: %v, a round trip for each chunk would be %v", took, trips)
			}
			if !sequential && p.bytes > size*5/4 {
				t.Errorf("at random: %d bytes were pulled for %d", p.bytes, int64(size))
			}
		})
	}
}

// TestInvalidate: afterwards all is read anew; what waits to be pushed is not
// dropped, and says so; the queues do not grow by it.
func TestInvalidate(t *testing.T) {
	const chunk, size = 16, 16*10 + 3
	remote := newBytes(size)
	mem, err := NewSlots(size, chunk, size+chunk)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	s, err := NewSyncer(remote, mem, chunk, 4*chunk)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Invalidate(t.Context()); !errors.Is(err, region.ErrNotSupported) {
		t.Errorf("without a Bound: %v", err)
	}
	if err := s.Bound(size); err != nil {
		t.Fatal(err)
	}
	p := StartPusher(s, PushOptions{})
	got := make([]byte, size)
	for round := range byte(5) {
		for i := range remote.b {
			remote.b[i] = round
		}
		if err := errors.Join(s.Invalidate(t.Context()), p.ReadAt(t.Context(), got, 0)); err != nil {
			t.Fatal(err)
		}
		if got[0] != round || got[size-1] != round || s.LocalBytes() != size {
			t.Errorf("round %d: read %d and %d, %d bytes are local", round, got[0], got[size-1], s.LocalBytes())
		}
	}
	if n := s.bound.active.n + s.bound.onTrial.n; n != 11 {
		t.Errorf("%d chunks in the queues, want 11", n)
	}
	if err := p.WriteAt(t.Context(), []byte("x"), 50); err != nil {
		t.Fatal(err)
	}
	if err := s.Invalidate(t.Context()); !errors.Is(err, region.ErrMismatch) {
		t.Errorf("with a dirty chunk: %v, want ErrMismatch", err)
	}
	if err := errors.Join(p.ReadAt(t.Context(), got, 0), p.Close()); err != nil {
		t.Fatal(err)
	}
	if got[50] != 'x' || remote.b[50] != 'x' {
		t.Error("what was written is lost")
	}
}
