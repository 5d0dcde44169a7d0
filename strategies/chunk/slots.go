package chunk

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// Slots is a cache in anonymous memory for a part of a region: a chunk takes a
// slot when it is first written, whole, and gives it back by Trim. Reading or
// partly writing a chunk without a slot, and writing when none is free, are
// errors: a Syncer with a Bound does neither. Its memory is that of the slots
// and 4 bytes a chunk of the region, of which pages that were never used cost nothing.
//
// Unlike a mapping of the whole region, of which chunks are given back by
// madvise, it costs no page faults or TLB flushes once warm, and no page
// tables beyond its own size. All but Close never block.
type Slots struct {
	grid
	mem  []byte
	slot []atomic.Uint32 // of each chunk, counted from 1; 0 is none
	gate *gate

	mu   sync.Mutex
	free []uint32 // given back
	next uint32   // the first that was never used
}

var (
	_ region.Store   = (*Slots)(nil)
	_ region.Trimmer = (*Slots)(nil)
)

// NewSlots returns a cache for a region of size bytes that holds at most
// capacity bytes of it, rounded down to chunks but at least one.
func NewSlots(size, chunk, capacity int64) (*Slots, error) {
	g, err := newGrid(size, chunk)
	if err != nil {
		return nil, err
	}
	n := min(max(1, capacity>>g.shift), g.n)
	s := &Slots{grid: g, slot: make([]atomic.Uint32, g.n), gate: newGate()}
	if n > 0 {
		if s.mem, err = unix.Mmap(-1, 0, int(n<<g.shift), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE); err != nil {
			return nil, fmt.Errorf("map %d bytes of cache: %w", n<<g.shift, err)
		}
		_ = unix.Madvise(s.mem, unix.MADV_HUGEPAGE)
	}
	return s, nil
}

// Size implements region.Store: the region's size.
func (s *Slots) Size() int64 { return s.size }

// ReadAt implements region.Store.
func (s *Slots) ReadAt(_ context.Context, p []byte, off int64) error {
	return s.do(p, off, func(_ int64, slot uint32) (uint32, error) { return slot, nil }, func(mem, p []byte) { copy(p, mem) })
}

// WriteAt implements region.Store.
func (s *Slots) WriteAt(_ context.Context, p []byte, off int64) error {
	return s.do(p, off, s.take, func(mem, p []byte) { copy(mem, p) })
}

func (s *Slots) do(p []byte, off int64, slotOf func(idx int64, slot uint32) (uint32, error), f func(mem, p []byte)) error {
	if err := region.CheckRange(off, int64(len(p)), s.size); err != nil {
		return err
	}
	if !s.gate.enter() {
		return fmt.Errorf("cache: %w", region.ErrClosed)
	}
	defer s.gate.leave()
	for len(p) > 0 {
		idx := off >> s.shift
		slot, err := slotOf(idx, s.slot[idx].Load())
		if err == nil && slot == 0 {
			err = region.ErrMissing
		}
		if err != nil {
			return fmt.Errorf("cache: chunk %d at %d: %w", idx, s.at(idx), err)
		}
		n := min(int64(len(p)), s.at(idx+1)-off)
		from := int64(slot-1)<<s.shift + off - s.at(idx)
		f(s.mem[from:from+n], p[:n])
		p, off = p[n:], off+n
	}
	return nil
}

// take gives chunk idx a slot where it has none. Nobody else writes the same chunk then.
func (s *Slots) take(idx int64, slot uint32) (uint32, error) {
	if slot != 0 {
		return slot, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch last := len(s.free) - 1; {
	case last >= 0:
		slot, s.free = s.free[last], s.free[:last]
	case int64(s.next)<<s.shift < int64(len(s.mem)):
		s.next++
		slot = s.next
	default:
		return 0, fmt.Errorf("all %d slots are taken: %w", s.next, unix.ENOSPC)
	}
	s.slot[idx].Store(slot)
	return slot, nil
}

// Trim implements region.Trimmer: whole chunks give their slots back.
func (s *Slots) Trim(_ context.Context, off, n int64) error {
	if err := region.CheckRange(off, n, s.size); err != nil || n == 0 {
		return err
	}
	lo, hi := s.span(off, n)
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := lo; i < hi; i++ {
		if !s.whole(i, off, off+n) {
			continue
		}
		if slot := s.slot[i].Swap(0); slot != 0 {
			s.free = append(s.free, slot)
		}
	}
	return nil
}

// Flush does nothing: memory promises nothing.
func (s *Slots) Flush(context.Context) error { return nil }

// Close unmaps the memory.
func (s *Slots) Close() error {
	if !s.gate.close() || s.mem == nil {
		return nil
	}
	return unix.Munmap(s.mem)
}
