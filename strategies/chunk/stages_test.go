package chunk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"memsync/strategies/region"
	"memsync/strategies/replay"
)

func TestMain(m *testing.M) {
	playKilled()
	goleak.VerifyTestMain(m)
}

// aligned is a store that refuses requests that are no whole chunks.
type aligned struct {
	region.Store
	chunk int64
	max   int64
}

func (a aligned) check(p []byte, off int64) error {
	end := off + int64(len(p))
	if off%a.chunk != 0 || end%a.chunk != 0 && end != a.Size() || a.max > 0 && int64(len(p)) > a.max {
		return fmt.Errorf("request %d+%d is not allowed", off, len(p))
	}
	return nil
}

func (a aligned) ReadAt(ctx context.Context, p []byte, off int64) error {
	return errors.Join(a.check(p, off), a.Store.ReadAt(ctx, p, off))
}

func (a aligned) WriteAt(ctx context.Context, p []byte, off int64) error {
	return errors.Join(a.check(p, off), a.Store.WriteAt(ctx, p, off))
}

// stages are the stores that must behave like the plain slice below them.
func stages(t *testing.T, below *byteStore, chunk int64) map[string]region.Store {
	must := func(s region.Store, err error) region.Store {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = s.Close() })
		return s
	}
	mem, memErr := NewMemory(int64(len(below.b)))
	file, fileErr := NewFile(t.TempDir(), int64(len(below.b)))
	fd, fdErr := NewMemfd(int64(len(below.b)))
	for _, s := range []region.Store{must(mem, memErr), must(file, fileErr), must(fd, fdErr)} {
		if err := s.WriteAt(t.Context(), below.b, 0); err != nil {
			t.Fatal(err)
		}
	}
	cache, _ := NewMemory(int64(len(below.b)))
	syncer, err := NewSyncer(newBytesOf(below.b), cache, chunk, 3*chunk)
	arbitrary, arbitraryErr := NewArbitrary(aligned{Store: newBytesOf(below.b), chunk: chunk}, chunk)
	tracking, trackingErr := NewTracking(newBytesOf(below.b), chunk)
	reopen, reopenErr := OpenAgain(t.Context(), func(context.Context) (region.Store, error) { return newBytesOf(below.b), nil }, nil)
	limited := Limited{aligned{Store: newBytesOf(below.b), chunk: 1, max: chunk}, chunk}
	return map[string]region.Store{
		"memory": mem, "file": file, "memfd": fd, "syncer": must(syncer, err), "arbitrary": must(arbitrary, arbitraryErr),
		"tracking": must(tracking, trackingErr), "reopen": must(reopen, reopenErr), "limited": limited,
		"all": must(NewArbitrary(aligned{Store: Limited{aligned{Store: newBytesOf(below.b), chunk: chunk, max: 2 * chunk}, 2 * chunk}, chunk: chunk}, chunk)),
	}
}

func newBytesOf(b []byte) *byteStore { return &byteStore{b: bytes.Clone(b)} }

// TestStages: every stage is a Store: a random program does to it what it does
// to a slice, at all sizes around a chunk, and ranges outside are refused.
func TestStages(t *testing.T) {
	r := rand.New(rand.NewPCG(replay.Seed(t), 11))
	const chunk = 16
	for _, size := range []int64{1, chunk - 1, chunk, chunk + 1, 5 * chunk, 7*chunk + 3} {
		b := make([]byte, size)
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		for name, s := range stages(t, &byteStore{b: b}, chunk) {
			t.Run(fmt.Sprintf("%s/%d", name, size), func(t *testing.T) {
				want := bytes.Clone(b)
				for range 300 {
					off := r.Int64N(size)
					p := make([]byte, r.Int64N(size-off+1))
					if r.IntN(2) == 0 {
						for i := range p {
							p[i] = byte(r.Uint32())
						}
						copy(want[off:], p)
						if err := s.WriteAt(t.Context(), p, off); err != nil {
							t.Fatal(err)
						}
					} else if err := s.ReadAt(t.Context(), p, off); err != nil {
						t.Fatal(err)
					} else if !bytes.Equal(p, want[off:off+int64(len(p))]) {
						t.Fatalf("read %d+%d is wrong", off, len(p))
					}
				}
				for _, o := range []struct{ off, n int64 }{{-1, 1}, {size, 1}, {0, size + 1}, {1<<63 - 1, 1}, {size + 1, 0}} {
					if err := s.ReadAt(t.Context(), make([]byte, o.n), o.off); !errors.Is(err, region.ErrOutOfRange) {
						t.Errorf("read %d+%d: %v", o.off, o.n, err)
					}
					if err := s.WriteAt(t.Context(), make([]byte, o.n), o.off); !errors.Is(err, region.ErrOutOfRange) {
						t.Errorf("write %d+%d: %v", o.off, o.n, err)
					}
				}
				if err := s.Flush(t.Context()); err != nil || s.Size() != size {
					t.Error(err, s.Size())
				}
			})
		}
	}
}

// TestArbitraryConcurrent: writers of neighbouring bytes of one chunk lose nothing.
func TestArbitraryConcurrent(t *testing.T) {
	const chunk, size = 64, 64*5 + 9
	below := newBytes(size)
	a, err := NewArbitrary(jitter{aligned{Store: below, chunk: chunk}}, chunk)
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, size)
	var wg sync.WaitGroup
	for g := range 5 {
		r := rand.New(rand.NewPCG(replay.Seed(t), uint64(g)))
		wg.Go(func() {
			for range 60 {
				off := (r.IntN(size/5))*5 + g // bytes of its own
				want[off]++
				if err := a.WriteAt(t.Context(), want[off:off+1], int64(off)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if !bytes.Equal(below.b, want) {
		t.Error("a write was lost")
	}
}

// FuzzSet compares a Set with a map.
func FuzzSet(f *testing.F) {
	f.Add([]byte{200, 0, 3, 70, 1, 65, 66, 2, 0, 200})
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) == 0 {
			return
		}
		n := int64(p[0]) + 1
		s, want := NewSet(n), map[int64]bool{}
		for p = p[1:]; len(p) >= 3; p = p[3:] {
			lo := int64(p[1]) % n
			hi := min(n, lo+1+int64(p[2]))
			var changed int64
			set := p[0]%2 == 0
			for i := lo; i < hi; i++ {
				if want[i] != set {
					changed++
				}
				want[i] = set
			}
			got := int64(0)
			if set {
				got = s.Mark(lo, hi)
			} else {
				got = s.Clear(lo, hi)
			}
			if got != changed {
				t.Fatalf("%d changed, want %d", got, changed)
			}
		}
		count := int64(0)
		for i := range n {
			if s.Has(i) != want[i] {
				t.Fatalf("Has(%d) is %v", i, s.Has(i))
			}
			if want[i] {
				count++
			}
		}
		if s.Count() != count {
			t.Fatalf("Count %d, want %d", s.Count(), count)
		}
		for at := int64(0); ; {
			lo, hi, ok := s.Take(at, 7)
			if !ok {
				break
			}
			if lo < at || hi <= lo || hi-lo > 7 {
				t.Fatalf("Take(%d) = [%d, %d)", at, lo, hi)
			}
			for i := lo; i < hi; i++ {
				if !want[i] {
					t.Fatalf("Take returned %d, which was not in the set", i)
				}
			}
			count -= hi - lo
			at = hi
		}
		if count != 0 || s.Count() != 0 {
			t.Fatalf("Take left %d, Count says %d", count, s.Count())
		}
	})
}

func TestRanges(t *testing.T) {
	var r Ranges
	shared, err := r.Lock(t.Context(), 0, 10, true)
	if err != nil {
		t.Fatal(err)
	}
	also, err := r.Lock(t.Context(), 5, 6, true)
	if err != nil {
		t.Fatal(err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.Lock(ended, 9, 11, false); !errors.Is(err, context.Canceled) {
		t.Errorf("an exclusive lock within a shared one: %v", err)
	}
	beside, err := r.Lock(ended, 10, 11, false)
	if err != nil {
		t.Errorf("a lock beside another: %v", err)
	}
	got := make(chan func())
	go func() {
		u, err := r.Lock(t.Context(), 5, 6, false)
		if err != nil {
			t.Error(err)
		}
		got <- u
	}()
	shared()
	also()
	(<-got)()
	beside()
	if len(r.held) != 0 {
		t.Errorf("%d locks are held", len(r.held))
	}
}
