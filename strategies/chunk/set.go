package chunk

import (
	"math/bits"
	"sync/atomic"
)

// Set is a set of chunks: one bit each, no locks. All methods may be called
// concurrently.
//
// A writer first writes its bytes and then marks; whoever takes a chunk out
// first takes and then reads the bytes. Mark is always a locked instruction,
// also where the bit is set already: a plain load could be carried out before
// the bytes that were stored ahead of it are visible, and the taker would miss them.
type Set struct {
	words []atomic.Uint64
	n     int64
	count atomic.Int64
}

// NewSet returns an empty set of the chunks [0, n).
func NewSet(n int64) *Set { return &Set{words: make([]atomic.Uint64, (n+63)/64), n: n} }

// Mark adds chunks [lo, hi) and returns how many were new.
func (s *Set) Mark(lo, hi int64) int64 {
	var added int64
	for lo < hi {
		w, mask := maskOf(lo, hi)
		added += int64(bits.OnesCount64(mask &^ s.words[w].Or(mask)))
		lo = (w + 1) * 64
	}
	if added != 0 {
		s.count.Add(added)
	}
	return added
}

// Clear removes chunks [lo, hi) and returns how many were in the set.
func (s *Set) Clear(lo, hi int64) int64 {
	var removed int64
	for lo < hi {
		w, mask := maskOf(lo, hi)
		if lo = (w + 1) * 64; s.words[w].Load()&mask == 0 {
			continue // keeps sets of mostly nothing cheap, and their memory untouched
		}
		removed += int64(bits.OnesCount64(mask & s.words[w].And(^mask)))
	}
	if removed != 0 {
		s.count.Add(-removed)
	}
	return removed
}

// maskOf returns the word that holds lo and the bits of [lo, hi) in it.
func maskOf(lo, hi int64) (w int64, mask uint64) {
	w = lo / 64
	mask = ^uint64(0) << (lo % 64)
	if end := (w + 1) * 64; hi < end {
		mask &= ^uint64(0) >> (end - hi)
	}
	return w, mask
}

// Has reports whether chunk idx is in the set.
func (s *Set) Has(idx int64) bool { return s.words[idx/64].Load()>>(idx%64)&1 != 0 }

// Count returns how many chunks are in the set; under concurrent changes, roughly.
func (s *Set) Count() int64 { return s.count.Load() }

// Len returns how many chunks could be in the set.
func (s *Set) Len() int64 { return s.n }

// Next returns the first run [lo, hi) of chunks in the set at or after from, at
// most limit long; ok is false where there is none.
func (s *Set) Next(from, limit int64) (lo, hi int64, ok bool) {
	for w := from / 64; w < int64(len(s.words)); w++ {
		v := s.words[w].Load()
		if w == from/64 {
			v &= ^uint64(0) << (from % 64)
		}
		if v == 0 {
			continue
		}
		lo = w*64 + int64(bits.TrailingZeros64(v))
		hi = lo + 1
		for hi < s.n && hi-lo < limit && s.Has(hi) {
			hi++
		}
		return lo, hi, true
	}
	return 0, 0, false
}

// Take is Next, and removes the run from the set.
func (s *Set) Take(from, limit int64) (lo, hi int64, ok bool) {
	lo, hi, ok = s.Next(from, limit)
	if ok {
		s.Clear(lo, hi)
	}
	return lo, hi, ok
}
