package region

import "sync/atomic"

// ReadVersion copies from, which lies within one chunk that another process may
// change meanwhile, to p of the same length, and returns the chunk's version: even,
// and the same before and after the copy. It spins while the chunk is being changed.
func ReadVersion(version *uint64, p, from []byte) uint64 {
	for {
		v := atomic.LoadUint64(version)
		if v&1 == 0 {
			copy(p, from)
			if atomic.LoadUint64(version) == v {
				return v
			}
		}
	}
}
