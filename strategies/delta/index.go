package delta

import (
	"encoding/binary"
	"math/bits"

	"github.com/zeebo/xxh3"

	"memsync/strategies/region"
)

// Block is the unit of an Index, in bytes.
const Block = 4096

// Index knows the blocks of the version that the other side has by their
// checksums: 20 bytes for each 4 KiB, and 8 to 12 more once moved blocks are searched.
// It is not safe for concurrent use.
//
// The weak checksum is that of rsync (Tridgell and Mackerras, "The rsync
// algorithm", 1996), which rolls: two sums modulo 2^16 of a window's bytes, plain
// and weighted by their distance to its end. The strong one is XXH3-128; that two
// blocks share it by intent is caught by the digest of the whole piece.
type Index struct {
	size   int64
	weak   []uint32
	strong [][16]byte
	filter []uint64 // a bit for each value of the low bits of a weak sum that occurs
	heads  []int32  // the first block of each bucket of weak sums; -1 is none
	shift  int      // of what becomes the bucket's number
	next   []int32  // another block of the same bucket; -1 ends
	fresh  bool     // filter, heads and next are of this round
}

// NewIndex returns the index of a region of size bytes of which nothing is known.
func NewIndex(size int64) *Index {
	n := region.Chunks(size, Block)
	return &Index{size: size, weak: make([]uint32, n), strong: make([][16]byte, n)}
}

// Update says that the other side has p at off, a multiple of Block; p ends at
// such a multiple or the region's end.
func (x *Index) Update(off int64, p []byte) {
	for i := off / Block; len(p) > 0; i++ {
		n := min(Block, len(p))
		x.weak[i], x.strong[i] = weak(p[:n]), strong(p[:n])
		p = p[n:]
	}
}

// Round says that a round begins: until the next one moved blocks are searched
// among those that are known now, as far as they have not been replaced.
func (x *Index) Round() { x.fresh = false }

// Whence tells where the blocks of p, which are to go to off, are on the other
// side: how many bytes of them below where they go, and how many there or above.
func (x *Index) Whence(p []byte, off int64) (below, above int64) {
	x.refresh()
	x.probe(p, off, func(at int, from int64) bool {
		if from < off+int64(at) {
			below += Block
		} else {
			above += Block
		}
		return true
	})
	return below, above
}

// pitch is between two places where probe looks. What has moved and is as long as this and
// two blocks cannot be missed: so nothing of what rsync finds by blocks of 64 KiB.
const pitch = 32 << 10

// probe calls found for blocks of p, which is to go to off, that the other side has
// elsewhere: at most one of each pitch. It ends where found returns false.
func (x *Index) probe(p []byte, off int64, found func(at int, from int64) bool) {
	for at := 0; at+Block <= len(p); at += pitch {
		if hit, from, ok := x.search(p, at, min(at+Block, len(p)-Block+1)); ok && from != off+int64(hit) && !found(hit, from) {
			return
		}
	}
}

// search looks at the blocks of p that begin in [lo, hi) for the first that the
// other side has.
func (x *Index) search(p []byte, lo, hi int) (at int, from int64, ok bool) {
	sum := weak(p[lo : lo+Block])
	a, b := sum&0xffff, sum>>16
	for at := lo; ; {
		if from, ok := x.find(a&0xffff|b<<16, p[at:at+Block]); ok {
			return at, from, true
		}
		if at+1 >= hi {
			return at, 0, false
		}
		out, in := uint32(p[at]), uint32(p[at+Block])
		a += in - out
		b += a&0xffff - Block*out
		at++
	}
}

func strong(p []byte) [16]byte { return xxh3.Hash128(p).Bytes() }

func weak(p []byte) uint32 {
	var a, b uint32
	for i, c := range p {
		a += uint32(c)
		b += uint32(len(p)-i) * uint32(c)
	}
	return a&0xffff | b<<16
}

// same reports whether block i has these bytes on the other side.
func (x *Index) same(i int64, p []byte) bool { return x.strong[i] == strong(p) }

const filterBits = 1 << 20

func slot(w uint32) uint32 { return bucket(w, 12) } // 20 bits

func bucket(w uint32, shift int) uint32 { return (w * 0x9E3779B1) >> shift }

func (x *Index) refresh() {
	if x.fresh {
		return
	}
	x.fresh = true
	if x.next == nil {
		k := max(bits.Len(uint(len(x.weak))), 8)
		x.filter, x.next, x.heads, x.shift = make([]uint64, filterBits/64), make([]int32, len(x.weak)), make([]int32, 1<<k), 32-k
	}
	clear(x.filter)
	for i := range x.heads {
		x.heads[i] = -1
	}
	for i, w := range x.weak {
		if int64(i+1)*Block > x.size {
			break // a short last block is never found elsewhere
		}
		h := &x.heads[bucket(w, x.shift)]
		j := *h
		for j >= 0 && x.strong[j] != x.strong[i] {
			j = x.next[j]
		}
		if j >= 0 {
			continue // one of equal blocks is enough
		}
		x.next[i], *h = *h, int32(i)
		x.filter[slot(w)/64] |= 1 << (slot(w) % 64)
	}
}

// find returns the offset of a block of the old region that has the bytes of p,
// whose weak sum is w.
func (x *Index) find(w uint32, p []byte) (off int64, ok bool) {
	if x.filter[slot(w)/64]>>(slot(w)%64)&1 == 0 {
		return 0, false
	}
	var s [16]byte
	known := false
	for i := x.heads[bucket(w, x.shift)]; i >= 0; i = x.next[i] {
		if x.weak[i] != w {
			continue
		}
		if !known {
			s, known = strong(p), true
		}
		if x.strong[i] == s {
			return int64(i) * Block, true
		}
	}
	return 0, false
}

// moved writes the piece as copies of old blocks, at any offset, and the rest as new
// bytes. Of a block that lies across the piece's end it copies what is in the piece. It
// returns how many bytes it found elsewhere.
func (x *Index) moved(w *writer, p Piece) (found int) {
	b, lead := p.around()
	lit := 0 // the first byte of the piece that is not written yet
	for pos := 0; pos+Block <= len(b); {
		at, from, ok := x.search(b, pos, len(b)-Block+1)
		if !ok {
			break
		}
		to := at - lead // in the piece
		lo, hi := max(to, lit), min(to+Block, len(p.New))
		from += int64(lo - to)
		switch n := hi - lo; {
		case n <= 0:
		case from == p.Off+int64(lo):
			w.add(opNew, lo-lit, 0)
			w.add(opSame, n, 0)
			lit = hi
		case p.Usable(from, int64(n)):
			w.add(opNew, lo-lit, 0)
			w.add(opCopy, n, from)
			lit = hi
			found += n
		default:
			pos = at + 1
			continue
		}
		pos = at + Block
	}
	w.add(opNew, len(p.New)-lit, 0)
	return found
}

// zeroes reports whether p has only zeroes.
func zeroes(p []byte) bool {
	for len(p) >= 8 {
		if binary.NativeEndian.Uint64(p) != 0 {
			return false
		}
		p = p[8:]
	}
	for _, c := range p {
		if c != 0 {
			return false
		}
	}
	return true
}
