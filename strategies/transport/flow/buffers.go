package flow

import (
	"math/bits"
	"sync"
)

const smallestBuffer = 12 // log2

// Buffers lends byte slices, by powers of two from 4 KiB to 32 MiB. The
// zero value is ready; it must not be copied.
type Buffers [26 - smallestBuffer]sync.Pool

func bufferClass(n int) int {
	return max(bits.Len(uint(max(n, 1)-1)), smallestBuffer) - smallestBuffer
}

// Get returns a slice of n bytes (at most 32 MiB) with any content.
func (p *Buffers) Get(n int) *[]byte {
	c := bufferClass(n)
	b, _ := p[c].Get().(*[]byte)
	if b == nil {
		s := make([]byte, 1<<(c+smallestBuffer))
		b = &s
	}
	*b = (*b)[:n]
	return b
}

// Put takes it back.
func (p *Buffers) Put(b *[]byte) { p[bufferClass(cap(*b))].Put(b) }
