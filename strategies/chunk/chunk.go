// Package chunk is the pipeline between a device and a source: small stages
// that each take a region.Store and mostly are one.
//
//	Arbitrary   any offset and length over a store of whole chunks (read-modify-write)
//	Limited     splits requests that are larger than the next stage takes
//	Tracking    remembers which chunks were written (Set)
//	Ranges      lockable ranges of chunks, shared or exclusive
//	Memory,File the local cache: anonymous memory or a file
//	Syncer      a local cache over a remote store, with a state for each chunk
//	Puller      copies from remote to local in the background, in an order.Order
//	Pusher      copies what is dirty from local to remote in the background
//
// The state of a chunk in a Syncer:
//
//	remote --claim--> pulling --arrives--> filling --> local
//	remote or pulling --write of the whole chunk--> filling --> local, dirty
//	pulling --error--> remote
//	local --write--> dirty --push starts--> pushing --> local
//
// Dirty and pushing are kept apart from the rest, since a local chunk can be
// both: written again while its earlier content is on its way.
package chunk

import (
	"fmt"
	"sync/atomic"

	"memsync/strategies/region"
)

// grid is the division of a region into chunks.
type grid struct {
	size  int64 // bytes
	shift uint8 // log2 of the chunk size
	n     int64 // chunks
}

func newGrid(size, chunk int64) (grid, error) {
	if size < 0 || chunk <= 0 || chunk&(chunk-1) != 0 {
		return grid{}, fmt.Errorf("region of %d bytes in chunks of %d: want a size that is not negative and a power of two", size, chunk)
	}
	g := grid{size: size, n: region.Chunks(size, chunk)}
	for int64(1)<<g.shift < chunk {
		g.shift++
	}
	return g, nil
}

func (g grid) chunk() int64 { return 1 << g.shift }

// span returns the chunks [lo, hi) that [off, off+n) touches; n is above 0.
func (g grid) span(off, n int64) (lo, hi int64) {
	return off >> g.shift, (off+n-1)>>g.shift + 1
}

// at returns the offset at which chunk idx begins, or the end of the region.
func (g grid) at(idx int64) int64 { return min(idx<<g.shift, g.size) }

// whole reports whether [off, end) covers all of chunk idx.
func (g grid) whole(idx, off, end int64) bool { return off <= g.at(idx) && g.at(idx+1) <= end }

// gate lets operations in until it is closed, without a lock: Close must know
// that nobody reads the memory that it unmaps.
type gate struct {
	n       atomic.Int64 // operations inside; gateClosed is added by close
	drained chan struct{}
}

const gateClosed = -1 << 62

func newGate() *gate { return &gate{drained: make(chan struct{}, 1)} }

func (g *gate) enter() bool {
	if g.n.Add(1) > 0 {
		return true
	}
	g.leave()
	return false
}

func (g *gate) leave() {
	if g.n.Add(-1) == gateClosed {
		select {
		case g.drained <- struct{}{}:
		default:
		}
	}
}

// close refuses new operations, waits for those inside and reports whether it
// was the first close.
func (g *gate) close() bool {
	for {
		n := g.n.Load()
		if n < 0 {
			return false
		}
		if g.n.CompareAndSwap(n, n+gateClosed) {
			for g.n.Load() != gateClosed {
				<-g.drained
			}
			return true
		}
	}
}
