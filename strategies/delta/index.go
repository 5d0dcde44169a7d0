package delta

import (
	"encoding/binary"

	"github.com/zeebo/xxh3"

	"memsync/strategies/region"
)

// Block is the unit of an Index, in bytes.
const Block = 4096

// Index knows the blocks of the version that the other side has by their
// checksums: 20 bytes for each 4 KiB, and 12 more once moved blocks are searched.
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
	lookup map[uint32]int32
	next   []int32 // another block with the same weak sum; -1 ends
	fresh  bool    // filter, lookup and next are of this round
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
	w := writer{piec: p}
	x.moved(&w, func(at int, from, n int64) bool {
		if from < off+int64(at) {
			below += n
		} else {
			above += n
		}
		return true
	}, len(p))
	return below, above
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

func slot(w uint32) uint32 { return (w * 0x9E3779B1) >> 12 } // 20 bits

func (x *Index) refresh() {
	if x.fresh {
		return
	}
	x.fresh = true
	x.filter, x.next = make([]uint64, filterBits/64), make([]int32, len(x.weak))
	x.lookup = make(map[uint32]int32, len(x.weak))
	for i, w := range x.weak {
		if int64(i+1)*Block > x.size {
			break // a short last block is never found elsewhere
		}
		x.next[i] = -1
		if j, ok := x.lookup[w]; ok {
			if x.strong[j] == x.strong[i] {
				continue // one of equal blocks is enough
			}
			x.next[i] = j
		}
		x.lookup[w] = int32(i)
		x.filter[slot(w)/64] |= 1 << (slot(w) % 64)
	}
}

// find returns the offset of a block of the old region that has the bytes of p,
// whose weak sum is w.
func (x *Index) find(w uint32, p []byte) (off int64, ok bool) {
	if x.filter[slot(w)/64]>>(slot(w)%64)&1 == 0 {
		return 0, false
	}
	i, ok := x.lookup[w]
	if !ok {
		return 0, false
	}
	s := strong(p)
	for ; i >= 0; i = x.next[i] {
		if x.strong[i] == s {
			return int64(i) * Block, true
		}
	}
	return 0, false
}

// moved writes the piece as copies of old blocks, at any offset, and the rest as
// new bytes. usable says whether the decoder can copy n bytes from off to byte at of the
// piece. It returns how many bytes it found.
func (x *Index) moved(w *writer, usable func(at int, off, n int64) bool, patience int) (found int) {
	x.refresh()
	p := w.piec
	pos, lit := 0, 0 // lit is the first byte not written yet
	for pos+Block <= len(p) && pos-lit < patience {
		sum := weak(p[pos : pos+Block])
		a, b := sum&0xffff, sum>>16
		hit := false
		for pos-lit < patience {
			if off, ok := x.find(a&0xffff|b<<16, p[pos:pos+Block]); ok && usable(pos, off, Block) {
				w.add(opNew, pos-lit, 0)
				w.add(opCopy, Block, off)
				pos += Block
				lit, hit = pos, true
				found += Block
				break
			}
			if pos+Block >= len(p) {
				break
			}
			out, in := uint32(p[pos]), uint32(p[pos+Block])
			a += in - out
			b += a&0xffff - Block*out
			pos++
		}
		if !hit {
			break
		}
	}
	w.add(opNew, len(p)-lit, 0)
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
