package nbd

import (
	"math/bits"
	"sync"
)

const smallestBuffer = 12 // log2

// buffers lends byte slices, by powers of two from 4 KiB to maxPayload.
type buffers [26 - smallestBuffer]sync.Pool

func bufferClass(n int) int {
	return max(bits.Len(uint(max(n, 1)-1)), smallestBuffer) - smallestBuffer
}

// get returns a slice of n bytes (at most maxPayload) with any content.
func (p *buffers) get(n int) *[]byte {
	c := bufferClass(n)
	b, _ := p[c].Get().(*[]byte)
	if b == nil {
		s := make([]byte, 1<<(c+smallestBuffer))
		b = &s
	}
	*b = (*b)[:n]
	return b
}

// put takes it back.
func (p *buffers) put(b *[]byte) { p[bufferClass(cap(*b))].Put(b) }
