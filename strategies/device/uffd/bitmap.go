package uffd

import "math/bits"

// bitmap holds a bit per page.
type bitmap []uint64

func newBitmap(n int64) bitmap { return make(bitmap, (n+63)/64) }

func (b bitmap) get(i int64) bool { return b[i/64]>>(i%64)&1 != 0 }

// set gives the bits [lo, hi) the value v and returns how many changed.
func (b bitmap) set(lo, hi int64, v bool) (changed int64) {
	for lo < hi {
		n := min(hi-lo, 64-lo%64)
		mask := (^uint64(0) >> (64 - n)) << (lo % 64)
		w := &b[lo/64]
		if v {
			changed += int64(bits.OnesCount64(mask &^ *w))
			*w |= mask
		} else {
			changed += int64(bits.OnesCount64(mask & *w))
			*w &^= mask
		}
		lo += n
	}
	return changed
}
