package nbd

import (
	"bytes"
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"memsync/strategies/region"
)

// ram is a Store in memory with a view of all its bytes.
type ram struct {
	mu      sync.RWMutex
	b       []byte
	flushed int
}

func newRAM(size int, seed uint64) *ram {
	r := &ram{b: make([]byte, size)}
	region.Content{Seed: seed}.Fill(r.b, 0)
	return r
}

func (r *ram) Size() int64 { return int64(len(r.b)) }

func (r *ram) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := region.CheckRange(off, int64(len(p)), r.Size()); err != nil {
		return err
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	copy(p, r.b[off:])
	return ctx.Err()
}

func (r *ram) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := region.CheckRange(off, int64(len(p)), r.Size()); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	copy(r.b[off:], p)
	return ctx.Err()
}

func (r *ram) Flush(context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.flushed++
	return nil
}

func (r *ram) Close() error { return nil }

// viewed is ram as a server sees memory.
type viewed struct{ *ram }

func (r viewed) View(off, n int64) ([]byte, bool) { return r.b[off : off+n], true }

// slow is ram that answers after a random time, and offers what is optional.
type slow struct {
	*ram
	max time.Duration

	optMu   sync.Mutex
	trimmed []span
	cached  []span
}

func (s *slow) pause(ctx context.Context) error {
	if s.max == 0 {
		return ctx.Err()
	}
	t := time.NewTimer(rand.N(s.max))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *slow) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := s.pause(ctx); err != nil {
		return err
	}
	return s.ram.ReadAt(ctx, p, off)
}

func (s *slow) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := s.pause(ctx); err != nil {
		return err
	}
	return s.ram.WriteAt(ctx, p, off)
}

func (s *slow) Trim(_ context.Context, off, n int64) error {
	s.optMu.Lock()
	defer s.optMu.Unlock()
	s.trimmed = append(s.trimmed, span{uint64(off), uint64(off + n)})
	return nil
}

func (s *slow) Cache(_ context.Context, off, n int64) error {
	s.optMu.Lock()
	defer s.optMu.Unlock()
	s.cached = append(s.cached, span{uint64(off), uint64(off + n)})
	return nil
}

// sparse is slow with holes, at first at every odd multiple of 64 KiB. An
// aligned 64 KiB of zeroes is a hole.
type sparse struct{ *slow }

const hole = 64 << 10

func newSparse(size int, seed uint64) *sparse {
	s := &sparse{&slow{ram: newRAM(size, seed)}}
	for off := hole; off+hole <= size; off += 2 * hole {
		clear(s.b[off : off+hole])
	}
	return s
}

func (s *sparse) Extents(_ context.Context, off, n int64) ([]region.Extent, error) {
	if err := region.CheckRange(off, n, s.Size()); err != nil {
		return nil, err
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	var ext []region.Extent
	zeroes := make([]byte, hole)
	for n > 0 {
		k := min(n, hole-off%hole)
		start := off / hole * hole
		h := start+hole <= s.Size() && bytes.Equal(s.b[start:start+hole], zeroes)
		ext = append(ext, region.Extent{Length: k, Hole: h, Zero: h})
		off, n = off+k, n-k
	}
	return ext, nil
}

func (s *sparse) WriteZeroes(_ context.Context, off, n int64, _ bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.b[off : off+n])
	return nil
}

// blocky is a Store that takes whole blocks only.
type blocky struct {
	*slow
	unit int64
}

func (b blocky) Blocks() region.Blocks {
	return region.Blocks{Minimum: b.unit, Preferred: b.unit, Maximum: 1 << 20}
}

func (b blocky) WriteAt(ctx context.Context, p []byte, off int64) error {
	if (off|int64(len(p)))%b.unit != 0 {
		panic("unaligned write reached the store")
	}
	return b.slow.WriteAt(ctx, p, off)
}

// frozen is read-only.
type frozen struct{ viewed }

func (frozen) ReadOnly() bool { return true }
