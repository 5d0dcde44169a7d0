// Package region holds what every layer of memsync shares: the Store contract
// (a fixed-size byte range that can be read and written at offsets), page and
// chunk arithmetic, the seeded content that runs are verified against, and the
// error sentinels.
//
// Words: a page is the MMU's unit; a chunk is the unit that a strategy tracks
// and moves (a power of two, at least a page; only a region's last chunk may be
// short); an extent is a run of neighbouring chunks moved in one request.
// Offsets, lengths and sizes are bytes; ranges are half open.
package region

import (
	"context"
	"errors"
	"fmt"
	"os"
)

// Error sentinels. Match them with errors.Is; never read error text.
var (
	// ErrOutOfRange: the request does not lie within [0, Size()).
	ErrOutOfRange = errors.New("out of range")
	// ErrReadOnly: a write to a region that was opened or exported read-only.
	ErrReadOnly = errors.New("region is read-only")
	// ErrClosed: the store, device or connection was closed on this side.
	ErrClosed = errors.New("closed")
	// ErrPeerGone: the other side went away (connection reset, process died).
	ErrPeerGone = errors.New("peer is gone")
	// ErrNotSupported: this kernel or build cannot do it, for certain.
	ErrNotSupported = errors.New("not supported here")
	// ErrNotPermitted: the kernel could, but this user may not, or we could not tell.
	ErrNotPermitted = errors.New("not permitted")
	// ErrMismatch: bytes or versions differ from what they must be.
	ErrMismatch = errors.New("content mismatch")
	// ErrMissing: a backend holds no such chunk or region.
	ErrMissing = errors.New("missing")
)

// Store is a fixed-size byte range that can be read and written at offsets:
// the one contract between backends, wrappers, transports, caches and devices.
//
// ReadAt and WriteAt transfer all of p or return an error; on an error the
// content of p (or of the written range) is unspecified. A range that does not
// lie within [0, Size()) gives ErrOutOfRange and moves nothing. An empty p is
// legal and does nothing. Neither retains p after it returns.
// Flush returns when all writes that returned before it was called are as
// durable as the store promises; on a remote store, at the source.
// Every call ends early with ctx's error when ctx ends. All methods may be
// called concurrently; overlapping concurrent writes end in either's bytes per
// byte. Close releases everything, may be called twice, and makes later calls
// return ErrClosed.
type Store interface {
	Size() int64
	ReadAt(ctx context.Context, p []byte, off int64) error
	WriteAt(ctx context.Context, p []byte, off int64) error
	Flush(ctx context.Context) error
	Close() error
}

// Viewer is what a Store that has its bytes in memory may also offer: a view
// of [off, off+n) that needs no copy. The view stays valid until Close and may
// change under concurrent writes. ok is false where there is no such view.
type Viewer interface {
	View(off, n int64) (p []byte, ok bool)
}

// Class says on whose behalf a request is made, so that a queue can let demand
// overtake background work. It travels in the context.
type Class uint8

// Demand: somebody waits for these bytes (the zero value). Prefetch: nobody
// waits yet. Push: background write-back.
const (
	Demand Class = iota
	Prefetch
	Push
)

type classKey struct{}

// WithClass returns a context that marks the requests made with it as c.
func WithClass(ctx context.Context, c Class) context.Context {
	return context.WithValue(ctx, classKey{}, c)
}

// ClassOf returns the class of requests made with ctx; Demand where none is set.
func ClassOf(ctx context.Context) Class {
	c, _ := ctx.Value(classKey{}).(Class)
	return c
}

// Opening says which of the openings of a remote store by its one user this is. A
// source that grants leases takes no write of an earlier one of the same ID any more, so that
// what was given up, or was under way when a connection was lost, cannot come in late
// and undo what was written since. It travels in the context.
type Opening struct {
	ID string // the same for all openings; no other user has it
	N  uint64 // counts up
}

type openingKey struct{}

// WithOpening returns a context for opening a store as o.
func WithOpening(ctx context.Context, o Opening) context.Context {
	return context.WithValue(ctx, openingKey{}, o)
}

// OpeningOf returns what WithOpening set; without an ID where it was not called.
func OpeningOf(ctx context.Context) Opening {
	o, _ := ctx.Value(openingKey{}).(Opening)
	return o
}

// CheckRange returns ErrOutOfRange, with the numbers, unless [off, off+n) lies
// within [0, size). It cannot overflow.
func CheckRange(off, n, size int64) error {
	if off < 0 || n < 0 || off > size || n > size-off {
		return fmt.Errorf("range [%d, +%d) of %d bytes: %w", off, n, size, ErrOutOfRange)
	}
	return nil
}

// PageSize is the MMU's page size in bytes.
func PageSize() int64 { return int64(os.Getpagesize()) }

// RoundUp returns n rounded up to a multiple of unit, a power of two.
func RoundUp(n, unit int64) int64 { return (n + unit - 1) &^ (unit - 1) }

// Chunks is the number of chunks of the given size in a region of size bytes.
func Chunks(size, chunk int64) int64 { return (size + chunk - 1) / chunk }

// PartSize is the size of the first k-1 of k parts of a region of size bytes: whole
// pages. The last part has the rest, which is above 0 where size is at least k pages.
func PartSize(size int64, k int) int64 { return size / int64(k) &^ (PageSize() - 1) }

// CheckChunk returns an error unless chunk is a power of two and at least a page.
func CheckChunk(chunk int64) error {
	if chunk < PageSize() || chunk&(chunk-1) != 0 {
		return fmt.Errorf("chunk size %d: must be a power of two and at least the page size, %d", chunk, PageSize())
	}
	return nil
}
