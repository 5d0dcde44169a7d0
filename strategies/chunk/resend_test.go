package chunk

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"

	"memsync/strategies/region"
	"memsync/strategies/replay"
)

// forgetful is a source that keeps what was flushed when it is killed.
type forgetful struct {
	mu            sync.Mutex
	kept, present []byte
	life          int
	flushes       int
}

// connection is a store of one life of the source.
type connection struct {
	f    *forgetful
	life int
}

func (f *forgetful) open(context.Context) (region.Store, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return connection{f, f.life}, nil
}

func (f *forgetful) kill() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.life++
	copy(f.present, f.kept)
}

func (c connection) do(g func()) error {
	c.f.mu.Lock()
	defer c.f.mu.Unlock()
	if c.life != c.f.life {
		return region.ErrPeerGone
	}
	g()
	return nil
}

func (c connection) Size() int64 { return int64(len(c.f.kept)) }
func (c connection) ReadAt(_ context.Context, p []byte, off int64) error {
	return c.do(func() { copy(p, c.f.present[off:]) })
}
func (c connection) WriteAt(_ context.Context, p []byte, off int64) error {
	return c.do(func() { copy(c.f.present[off:], p) })
}
func (c connection) Flush(context.Context) error {
	return c.do(func() { copy(c.f.kept, c.f.present); c.f.flushes++ })
}
func (connection) Close() error { return nil }

// TestResend: a source that is killed at random, and forgets what was not flushed,
// looks like one that never was; what a Flush said is kept by the source itself.
func TestResend(t *testing.T) {
	rng := rand.New(rand.NewPCG(replay.Seed(t), 0))
	const size = 64 << 10
	f := &forgetful{kept: make([]byte, size), present: make([]byte, size)}
	r, err := OpenResending(t.Context(), f.open)
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, size)
	for i := range 20000 {
		off := rng.Int64N(size - 100)
		p := make([]byte, 1+rng.IntN(100))
		switch rng.IntN(12) {
		case 0:
			f.kill()
		case 1:
			if err := r.Flush(t.Context()); err != nil {
				t.Fatalf("step %d: flush: %v", i, err)
			}
			if !bytes.Equal(f.kept, want) {
				t.Fatalf("step %d: the source has not kept what was flushed", i)
			}
		case 2, 3, 4:
			if err := r.ReadAt(t.Context(), p, off); err != nil || !bytes.Equal(p, want[off:off+int64(len(p))]) {
				t.Fatalf("step %d: read %d bytes at %d: differ, %v", i, len(p), off, err)
			}
		default:
			for k := range p {
				p[k] = byte(rng.Uint32())
			}
			if err := r.WriteAt(t.Context(), p, off); err != nil {
				t.Fatalf("step %d: write: %v", i, err)
			}
			copy(want[off:], p)
		}
	}
	if err := r.Flush(t.Context()); err != nil || len(r.log) != 0 || r.bytes != 0 {
		t.Errorf("%d writes of %d bytes are kept after a flush, %v", len(r.log), r.bytes, err)
	}
}

// TestResendBound: what is kept does not grow beyond the limit, and what failed is not kept.
func TestResendBound(t *testing.T) {
	f := &forgetful{kept: make([]byte, 1<<20), present: make([]byte, 1<<20)}
	r, err := OpenResending(t.Context(), f.open)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 1<<20)
	for range 2*resendLimit>>20 + 4 {
		if err := r.WriteAt(t.Context(), p, 0); err != nil {
			t.Fatal(err)
		}
		if r.bytes > resendLimit+int64(len(p)) {
			t.Fatalf("%d bytes are kept", r.bytes)
		}
	}
	if f.flushes < 2 {
		t.Errorf("flushed %d times", f.flushes)
	}
	kept := r.bytes
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := r.WriteAt(t.Context(), p, 0); !errors.Is(err, region.ErrClosed) || r.bytes != kept {
		t.Errorf("%v; %d bytes kept, %d before", err, r.bytes, kept)
	}
}
