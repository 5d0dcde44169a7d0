package chunk

import (
	"context"
	"fmt"
	"sync"

	"memsync/strategies/param"
	"memsync/strategies/region"
)

// Arbitrary gives a store of whole chunks reads and writes at any offset and
// length. The store below sees only requests that begin at a chunk and end at a
// chunk's end or the region's.
//
// Whole chunks go straight through, as one request. A chunk that is only partly
// read is read whole and copied from; one that is only partly written is read,
// changed and written back, under an exclusive lock on it, so that no
// concurrent write to its other bytes is lost. That holds for writes through
// this Arbitrary only.
type Arbitrary struct {
	region.Store
	grid  grid
	locks Ranges
	bufs  sync.Pool
}

var _ region.Store = (*Arbitrary)(nil)

// NewArbitrary wraps below, whose chunks have the given size in bytes, a power of two.
func NewArbitrary(below region.Store, chunk int64) (*Arbitrary, error) {
	g, err := newGrid(below.Size(), chunk)
	if err != nil {
		return nil, err
	}
	a := &Arbitrary{Store: below, grid: g}
	a.bufs.New = func() any { b := make([]byte, chunk); return &b }
	return a, nil
}

// parts calls part for each chunk that [off, off+len(p)) touches in part and
// whole for the run of chunks between them.
func (a *Arbitrary) parts(p []byte, off int64, part, whole func(p []byte, off int64) error) error {
	if err := region.CheckRange(off, int64(len(p)), a.grid.size); err != nil {
		return err
	}
	for end := off + int64(len(p)); off < end; {
		idx := off >> a.grid.shift
		to, do := min(a.grid.at(idx+1), end), part
		if a.grid.whole(idx, off, end) {
			do = whole
			to = end
			if end < a.grid.size {
				to = end &^ (a.grid.chunk() - 1)
			}
		}
		if err := do(p[:to-off], off); err != nil {
			return err
		}
		p, off = p[to-off:], to
	}
	return nil
}

// load reads the chunk around off; put returns the buffer.
func (a *Arbitrary) load(ctx context.Context, off int64) (buf []byte, start int64, put func(), err error) {
	b := a.bufs.Get().(*[]byte)
	idx := off >> a.grid.shift
	start = a.grid.at(idx)
	buf = (*b)[:a.grid.at(idx+1)-start]
	return buf, start, func() { a.bufs.Put(b) }, a.Store.ReadAt(ctx, buf, start)
}

// ReadAt implements region.Store.
func (a *Arbitrary) ReadAt(ctx context.Context, p []byte, off int64) error {
	return a.parts(p, off, func(p []byte, off int64) error {
		buf, start, put, err := a.load(ctx, off)
		defer put()
		if err == nil {
			copy(p, buf[off-start:])
		}
		return err
	}, func(p []byte, off int64) error { return a.Store.ReadAt(ctx, p, off) })
}

// WriteAt implements region.Store.
func (a *Arbitrary) WriteAt(ctx context.Context, p []byte, off int64) error {
	return a.parts(p, off, func(p []byte, off int64) error {
		idx := off >> a.grid.shift
		unlock, err := a.locks.Lock(ctx, idx, idx+1, false)
		if err != nil {
			return fmt.Errorf("write %d bytes at %d: %w", len(p), off, err)
		}
		defer unlock()
		buf, start, put, err := a.load(ctx, off)
		defer put()
		if err != nil {
			return err
		}
		copy(buf[off-start:], p)
		return a.Store.WriteAt(ctx, buf, start)
	}, func(p []byte, off int64) error {
		// Shared: against the read-modify-write of a chunk, not against others like it.
		lo, hi := a.grid.span(off, int64(len(p)))
		unlock, err := a.locks.Lock(ctx, lo, hi, true)
		if err != nil {
			return fmt.Errorf("write %d bytes at %d: %w", len(p), off, err)
		}
		defer unlock()
		return a.Store.WriteAt(ctx, p, off)
	})
}

// The sides on which Split may cut requests.
const (
	SplitNone        = "none"
	SplitSource      = "source"
	SplitDestination = "destination"
)

// SplitParams are the parameters of Split, for strategies that reach the source
// through a store on the destination's side.
func SplitParams() []param.Spec {
	return []param.Spec{
		{Name: "split", Kind: param.KindEnum, Default: SplitNone, Values: []string{SplitNone, SplitSource, SplitDestination},
			Doc: "which side cuts requests into pieces of split_size, one after another: the source before its backend, or the destination before the transport"},
		{Name: "split_size", Kind: param.KindSize, Default: "2KiB", Min: 1, Max: 1 << 30, Doc: "bytes of a piece"},
	}
}

// Split returns s, Limited where the parameters have that side cut requests.
func Split(s region.Store, side string, p param.Values) region.Store {
	if !p.Has("split") || p.Text("split") != side {
		return s
	}
	return Limited{s, p.Size("split_size")}
}

// Limited splits requests into pieces of at most Max bytes (above 0), one after
// the other. Pieces end at multiples of Max, so that an aligned request stays aligned.
type Limited struct {
	region.Store
	Max int64 // bytes
}

var _ region.Store = Limited{}

func (l Limited) split(p []byte, off int64, do func(p []byte, off int64) error) error {
	if err := region.CheckRange(off, int64(len(p)), l.Size()); err != nil {
		return err
	}
	for len(p) > 0 {
		n := min(int64(len(p)), l.Max-off%l.Max)
		if err := do(p[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// ReadAt implements region.Store.
func (l Limited) ReadAt(ctx context.Context, p []byte, off int64) error {
	return l.split(p, off, func(p []byte, off int64) error { return l.Store.ReadAt(ctx, p, off) })
}

// WriteAt implements region.Store.
func (l Limited) WriteAt(ctx context.Context, p []byte, off int64) error {
	return l.split(p, off, func(p []byte, off int64) error { return l.Store.WriteAt(ctx, p, off) })
}

// Version implements region.Versioner where the store below does.
func (l Limited) Version(ctx context.Context) (region.Version, error) {
	v, ok := l.Store.(region.Versioner)
	if !ok {
		return region.Version{}, fmt.Errorf("version of the region: %w", region.ErrNotSupported)
	}
	return v.Version(ctx)
}

// Tracking remembers which chunks were written through it.
type Tracking struct {
	region.Store
	grid  grid
	dirty *Set
}

var _ region.Store = (*Tracking)(nil)

// NewTracking wraps below; chunk is in bytes, a power of two.
func NewTracking(below region.Store, chunk int64) (*Tracking, error) {
	g, err := newGrid(below.Size(), chunk)
	if err != nil {
		return nil, err
	}
	return &Tracking{Store: below, grid: g, dirty: NewSet(g.n)}, nil
}

// Dirty returns the live set of chunks that were written. Take chunks out
// before reading their bytes: a write that comes later marks them again.
func (t *Tracking) Dirty() *Set { return t.dirty }

// WriteAt implements region.Store. A write that fails marks its chunks too: some bytes may have changed.
func (t *Tracking) WriteAt(ctx context.Context, p []byte, off int64) error {
	err := t.Store.WriteAt(ctx, p, off)
	if len(p) > 0 && region.CheckRange(off, int64(len(p)), t.grid.size) == nil {
		t.dirty.Mark(t.grid.span(off, int64(len(p))))
	}
	return err
}
