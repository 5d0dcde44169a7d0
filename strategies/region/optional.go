package region

import (
	"context"
	"time"
)

// Extent is a run of bytes with one allocation state.
type Extent struct {
	Length int64 // bytes, at least 1
	Hole   bool  // nothing is allocated for it
	Zero   bool  // it reads as zeroes
}

// What a Store may also offer; found by type assertion. Ranges are checked as
// in Store, and all methods may be called concurrently with its own.

// Extenter tells allocated bytes from holes. Extents returns consecutive
// extents from off on, at least one and together at most n bytes; it may stop
// early. Data whose state is unknown is {Hole: false, Zero: false}.
type Extenter interface {
	Extents(ctx context.Context, off, n int64) ([]Extent, error)
}

// Zeroer writes zeroes without having them in memory. With hole it may also
// release what was allocated; the bytes read as zeroes either way.
type Zeroer interface {
	WriteZeroes(ctx context.Context, off, n int64, hole bool) error
}

// Trimmer is told that the bytes are no longer needed; they may read as
// anything until they are written again.
type Trimmer interface {
	Trim(ctx context.Context, off, n int64) error
}

// Cacher is told that the bytes will be read soon.
type Cacher interface {
	Cache(ctx context.Context, off, n int64) error
}

// Blocks are constraints on the requests to a Store, in bytes: powers of two,
// but for Maximum, which is the largest length of one request.
type Blocks struct {
	Minimum, Preferred, Maximum int64
}

// Blocker is a Store whose requests must be multiples of, and aligned to, a
// minimum. A Store without it takes any offset and length.
type Blocker interface {
	Blocks() Blocks
}

// ReadOnlyer tells whether every write would give ErrReadOnly.
type ReadOnlyer interface {
	ReadOnly() bool
}

// Epocher tells with which epoch of the lease to write a Store was opened (see
// transport.Leases); 0 means that the source knows no leases.
type Epocher interface{ Epoch() uint32 }

// Version tells one state of a region's bytes from another, as one host sees it.
type Version struct {
	// Instance is a life of the source. Changes of different lives cannot be compared.
	Instance uint64
	// Changes counts the changes by others than the host that asks.
	Changes uint64
	// State stands for the content from one life of the source to the next; it
	// changes with every write. 0 is unknown.
	State uint64
	// Age is how long ago the bytes were changed, by whomever; long where that is not known.
	Age time.Duration
}

// Same reports whether nobody else changed the bytes between v and w. Where the
// source was started anew in between, that needs the State to be known, and
// nothing to have been written at all.
func (v Version) Same(w Version) bool {
	if v.Instance == w.Instance {
		return v.Changes == w.Changes
	}
	return v.State != 0 && v.State == w.State
}

// Versioner is a Store that notices changes of its bytes that are made past it.
// Its Version has no Instance: Changes are since the Store was opened.
type Versioner interface {
	Version(ctx context.Context) (Version, error)
}
