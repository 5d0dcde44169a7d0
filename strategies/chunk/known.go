package chunk

import (
	"context"
	"crypto/sha256"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"memsync/strategies/region"
)

// DigestSize is the bytes of one chunk's digest, SHA-256: digests of different
// content do not collide by chance nor by intent, so equal ones mean equal bytes.
const DigestSize = sha256.Size

// Digests is a store of the digests of another store's chunks, one after
// another: DigestSize bytes at idx*DigestSize are of chunk idx. They are computed
// when they are read, at 1 to 2 GB/s a CPU. It is read-only, and closes nothing.
type Digests struct {
	grid
	s region.Store
}

var (
	_ region.Store      = (*Digests)(nil)
	_ region.ReadOnlyer = (*Digests)(nil)
)

// NewDigests returns the digests of s in chunks of chunk bytes, a power of two.
func NewDigests(s region.Store, chunk int64) (*Digests, error) {
	g, err := newGrid(s.Size(), chunk)
	if err != nil {
		return nil, fmt.Errorf("digests: %w", err)
	}
	return &Digests{g, s}, nil
}

// Size implements region.Store.
func (d *Digests) Size() int64 { return d.n * DigestSize }

// ReadAt implements region.Store; it may be asked for any part of a digest.
func (d *Digests) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := region.CheckRange(off, int64(len(p)), d.Size()); err != nil {
		return err
	}
	viewer, _ := d.s.(region.Viewer)
	var buf []byte
	for len(p) > 0 {
		idx := off / DigestSize
		at, n := d.at(idx), d.at(idx+1)-d.at(idx)
		var content []byte
		ok := false
		if viewer != nil {
			content, ok = viewer.View(at, n)
		}
		if !ok {
			if buf == nil {
				buf = make([]byte, d.chunk())
			}
			content = buf[:n]
			if err := d.s.ReadAt(ctx, content, at); err != nil {
				return fmt.Errorf("digest of chunk %d at %d: %w", idx, at, err)
			}
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		sum := sha256.Sum256(content)
		k := copy(p, sum[off%DigestSize:])
		p, off = p[k:], off+int64(k)
	}
	return nil
}

// WriteAt gives region.ErrReadOnly.
func (d *Digests) WriteAt(context.Context, []byte, int64) error { return region.ErrReadOnly }

// ReadOnly implements region.ReadOnlyer.
func (d *Digests) ReadOnly() bool { return true }

// Flush does nothing.
func (d *Digests) Flush(context.Context) error { return nil }

// Close does nothing.
func (d *Digests) Close() error { return nil }

// maxKnown bounds the digests that are kept: 1 Mi chunks, 64 GiB in chunks of
// 64 KiB, at about 100 bytes each.
const maxKnown = 1 << 20

// Known is a remote store of which something is known beforehand, so that not
// all of it has to cross the wire: chunks that are holes, and chunks whose digest
// is that of one which is in the cache by now. It goes between a remote store and
// a Syncer. What is known comes by Holes and Same, while it is in use; what is
// not known yet is read from the remote store.
//
// A copy out of the cache counts only if it has the digest that was asked for, so
// that it matters little what happens to the cache meanwhile: chunks there may be
// written, evicted or still on their way. A chunk that is written through Known
// is not known any more. As with Syncer, nobody else may write to the remote store.
type Known struct {
	region.Store // remote
	grid
	cache region.Store

	zero, hashed, written *Set
	digests               [][DigestSize]byte // of the chunks in hashed
	mu                    sync.Mutex
	has                   map[[DigestSize]byte]int64 // a chunk that was read with this digest

	zeroBytes, sameBytes atomic.Int64
}

var _ region.Store = (*Known)(nil)

// NewKnown returns remote with nothing known about it yet. cache is where the
// chunks that are read end up, of the same size.
func NewKnown(remote, cache region.Store, chunk int64) (*Known, error) {
	g, err := newGrid(remote.Size(), chunk)
	if err != nil {
		return nil, err
	}
	return &Known{Store: remote, grid: g, cache: cache, zero: NewSet(g.n), hashed: NewSet(g.n), written: NewSet(g.n),
		has: map[[DigestSize]byte]int64{}}, nil
}

// Saved returns how many bytes were read without the remote store: zeroes, and
// copies of chunks in the cache.
func (k *Known) Saved() (zero, same int64) { return k.zeroBytes.Load(), k.sameBytes.Load() }

// Holes asks which chunks are zeroes, from the first to the last. It returns when
// all is known, or with the first error; e without such knowledge gives region.ErrNotSupported.
func (k *Known) Holes(ctx context.Context, e region.Extenter) error {
	for off := int64(0); off < k.size; {
		extents, err := e.Extents(ctx, off, k.size-off)
		if err != nil {
			return fmt.Errorf("holes from %d on: %w", off, err)
		}
		began := off
		for i := 0; i < len(extents); i++ {
			from := off
			off += max(extents[i].Length, 0)
			for extents[i].Zero && i+1 < len(extents) && extents[i+1].Zero {
				i++
				off += max(extents[i].Length, 0)
			}
			lo, hi := (from+k.chunk()-1)>>k.shift, min(off, k.size)>>k.shift
			if off >= k.size {
				hi = k.n
			}
			if extents[i].Zero && lo < hi {
				k.zero.Mark(lo, hi)
			}
		}
		if off <= began {
			return fmt.Errorf("holes from %d on: no extent: %w", off, region.ErrMismatch)
		}
	}
	return nil
}

// Same reads the chunks' digests, from the first to the last, in pieces that grow.
// It returns when all are known, or with the first error. Too many chunks give region.ErrOutOfRange.
func (k *Known) Same(ctx context.Context, digests region.Store) error {
	if k.n > maxKnown || digests.Size() != k.n*DigestSize {
		return fmt.Errorf("digests of %d bytes for %d chunks, at most %d: %w", digests.Size(), k.n, maxKnown, region.ErrOutOfRange)
	}
	k.mu.Lock()
	k.digests = make([][DigestSize]byte, k.n)
	k.mu.Unlock()
	buf := make([]byte, 1024*DigestSize)
	for lo, step := int64(0), int64(16); lo < k.n; step = min(2*step, 1024) {
		hi := min(lo+step, k.n)
		b := buf[:(hi-lo)*DigestSize]
		if err := digests.ReadAt(ctx, b, lo*DigestSize); err != nil {
			return fmt.Errorf("digests of chunks %d to %d: %w", lo, hi-1, err)
		}
		k.mu.Lock()
		for i := lo; i < hi; i++ {
			copy(k.digests[i][:], b[(i-lo)*DigestSize:])
		}
		k.mu.Unlock()
		k.hashed.Mark(lo, hi)
		lo = hi
	}
	return nil
}

// Forget makes all unknown, for good: the content is another.
func (k *Known) Forget() { k.written.Mark(0, k.n) }

// digest returns the digest of chunk idx and a chunk that had it when it was read.
func (k *Known) digest(idx int64) (d [DigestSize]byte, like int64, ok bool) {
	if !k.hashed.Has(idx) || k.written.Has(idx) {
		return d, 0, false
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	like, ok = k.has[k.digests[idx]]
	return k.digests[idx], like, ok
}

// ReadAt implements region.Store. The chunks that are not known are read at the
// same time, neighbours in one request.
func (k *Known) ReadAt(ctx context.Context, p []byte, off int64) error {
	n := int64(len(p))
	if err := region.CheckRange(off, n, k.size); err != nil || n == 0 {
		return err
	}
	if k.zero.Count() == 0 && k.hashed.Count() == 0 || off != k.at(off>>k.shift) {
		return k.Store.ReadAt(ctx, p, off)
	}
	part := func(lo, hi int64) []byte { return p[k.at(lo)-off : min(k.at(hi)-off, n)] }
	lo, hi := k.span(off, n)
	type run struct{ lo, hi int64 }
	var ask []run
	for i := lo; i < hi; i++ {
		if k.known(ctx, i, part(i, i+1)) {
			continue
		}
		if last := len(ask) - 1; last >= 0 && ask[last].hi == i {
			ask[last].hi++
		} else {
			ask = append(ask, run{i, i + 1})
		}
	}
	var err error
	switch len(ask) {
	case 0:
		err = ctx.Err()
	case 1:
		err = k.Store.ReadAt(ctx, part(ask[0].lo, ask[0].hi), k.at(ask[0].lo))
	default:
		g, gctx := errgroup.WithContext(ctx)
		for _, r := range ask {
			g.Go(func() error { return k.Store.ReadAt(gctx, part(r.lo, r.hi), k.at(r.lo)) })
		}
		err = g.Wait()
	}
	if err != nil {
		return err
	}
	for _, r := range ask {
		for i := r.lo; i < r.hi; i++ {
			if k.hashed.Has(i) && !k.written.Has(i) {
				k.mu.Lock()
				k.has[k.digests[i]] = i
				k.mu.Unlock()
			}
		}
	}
	return nil
}

// known fills p with chunk idx, or its first bytes, if that needs no request.
func (k *Known) known(ctx context.Context, idx int64, p []byte) bool {
	if k.zero.Has(idx) && !k.written.Has(idx) {
		clear(p)
		k.zeroBytes.Add(int64(len(p)))
		return true
	}
	d, like, ok := k.digest(idx)
	n := k.at(idx+1) - k.at(idx)
	if !ok || like == idx || int64(len(p)) != n || k.at(like+1)-k.at(like) != n {
		return false
	}
	if k.cache.ReadAt(ctx, p, k.at(like)) != nil || sha256.Sum256(p) != d {
		return false // it was written, evicted, or is not there yet
	}
	k.sameBytes.Add(n)
	return true
}

// WriteAt implements region.Store.
func (k *Known) WriteAt(ctx context.Context, p []byte, off int64) error {
	if n := int64(len(p)); n > 0 && region.CheckRange(off, n, k.size) == nil {
		k.written.Mark(k.span(off, n)) // before anybody can read it back
	}
	return k.Store.WriteAt(ctx, p, off)
}

// Extents implements region.Extenter where the store that is open does.
func (r *Reopen) Extents(ctx context.Context, off, n int64) (extents []region.Extent, err error) {
	err = r.twice(ctx, func(s region.Store) (err error) {
		e, ok := s.(region.Extenter)
		if !ok {
			return fmt.Errorf("extents of the remote region: %w", region.ErrNotSupported)
		}
		extents, err = e.Extents(ctx, off, n)
		return err
	})
	return extents, err
}
