package region

import (
	"encoding/binary"
	"fmt"
)

// Content is the seeded content of a region: a pure function of seed,
// generation and offset, so that no side has to store or send it to verify it.
//
// Each aligned 8-byte little-endian word encodes its own offset and
// generation: word(i) = i*K + base(seed, generation) modulo 2^64, with K odd and
// therefore invertible. A swapped, stale or torn chunk is thus seen at once and
// Explain says where its bytes came from.
type Content struct {
	Seed       uint64 // of the run
	Generation uint64 // 0 is the source's first content; writers count up
}

const contentK = 0x9E3779B97F4A7C15 // 2^64 / golden ratio, odd

func mix(x uint64) uint64 { // splitmix64's finaliser (Steele, Lea, Flood, OOPSLA 2014)
	x += contentK
	x = (x ^ x>>30) * 0xBF58476D1CE4E5B9
	x = (x ^ x>>27) * 0x94D049BB133111EB
	return x ^ x>>31
}

func (c Content) base() uint64 { return mix(mix(c.Seed) + c.Generation) }

// Fill writes the content of [off, off+len(p)) to p, at any alignment.
func (c Content) Fill(p []byte, off int64) {
	base := c.base()
	if r := int(off & 7); r != 0 {
		var w [8]byte
		binary.LittleEndian.PutUint64(w[:], uint64(off>>3)*contentK+base)
		n := copy(p, w[r:])
		p, off = p[n:], off+int64(n)
	}
	w := uint64(off>>3)*contentK + base
	for len(p) >= 32 {
		binary.LittleEndian.PutUint64(p[0:8], w)
		binary.LittleEndian.PutUint64(p[8:16], w+contentK)
		binary.LittleEndian.PutUint64(p[16:24], w+2*(contentK&(1<<63-1))) // 2K mod 2^64
		binary.LittleEndian.PutUint64(p[24:32], w+contentK+2*(contentK&(1<<63-1)))
		w += 4 * (contentK & (1<<62 - 1))
		p = p[32:]
	}
	for len(p) >= 8 {
		binary.LittleEndian.PutUint64(p, w)
		w += contentK
		p = p[8:]
	}
	if len(p) > 0 {
		var last [8]byte
		binary.LittleEndian.PutUint64(last[:], w)
		copy(p, last[:])
	}
}

// Check compares p with the content of [off, off+len(p)) and returns nil or an
// error that wraps ErrMismatch and names the first wrong byte.
func (c Content) Check(p []byte, off int64) error {
	base := c.base()
	i := 0
	for i < len(p) && (off+int64(i))&7 != 0 {
		if err := c.checkByte(p, i, off); err != nil {
			return err
		}
		i++
	}
	w := uint64((off+int64(i))>>3)*contentK + base
	for ; i+8 <= len(p); i += 8 {
		if binary.LittleEndian.Uint64(p[i:]) != w {
			for j := i; j < i+8; j++ {
				if err := c.checkByte(p, j, off); err != nil {
					return err
				}
			}
		}
		w += contentK
	}
	for ; i < len(p); i++ {
		if err := c.checkByte(p, i, off); err != nil {
			return err
		}
	}
	return nil
}

func (c Content) checkByte(p []byte, i int, off int64) error {
	var want [1]byte
	at := off + int64(i)
	c.Fill(want[:], at)
	if p[i] == want[0] {
		return nil
	}
	return fmt.Errorf("byte at offset %d is 0x%02x, not 0x%02x%s: %w", at, p[i], want[0], c.Explain(p, i, off), ErrMismatch)
}

// Explain returns where the word around p[i] (p is at offset off of the region)
// may have come from, as " (...)", or "" where it cannot tell.
func (c Content) Explain(p []byte, i int, off int64) string {
	start := i - int((off+int64(i))&7)
	if start < 0 || start+8 > len(p) {
		return ""
	}
	w := binary.LittleEndian.Uint64(p[start:])
	if w == 0 {
		return " (the word is zero: never filled)"
	}
	const kInv = 0xF1DE83E19937733D // contentK * kInv = 1 mod 2^64
	for g := c.Generation + 1; ; g-- {
		idx := (w - Content{c.Seed, g}.base()) * kInv
		if idx < 1<<45 {
			return fmt.Sprintf(" (the word belongs at offset %d, generation %d)", int64(idx)*8, g)
		}
		if g == 0 || c.Generation-g > 64 && g < c.Generation {
			return ""
		}
	}
}
