package mount

import (
	"context"
	"fmt"
	"sync/atomic"

	"memsync/strategies/region"
)

// Counted counts what a server's clients ask of a store. What the store lacks of
// the optional interfaces gives region.ErrNotSupported.
type Counted struct {
	region.Store
	counts [countKinds]atomic.Int64
}

const (
	pulledBytes = iota
	pullRequests
	pushedBytes
	pushRequests
	flushes
	failures
	countKinds
)

var (
	_ region.Extenter   = (*Counted)(nil)
	_ region.Zeroer     = (*Counted)(nil)
	_ region.Trimmer    = (*Counted)(nil)
	_ region.Cacher     = (*Counted)(nil)
	_ region.ReadOnlyer = (*Counted)(nil)
	_ region.Versioner  = (*Counted)(nil)
)

// Counters returns them by name, as in RegionStatus.
func (c *Counted) Counters() map[string]int64 {
	m := map[string]int64{}
	for i, name := range []string{"pulled_bytes", "pull_requests", "pushed_bytes", "push_requests", "flush_requests", "failed_requests"} {
		m[name] = c.counts[i].Load()
	}
	return m
}

func (c *Counted) did(requests, bytes int, n int64, err error) error {
	c.counts[requests].Add(1)
	if err != nil {
		c.counts[failures].Add(1)
	} else if bytes >= 0 {
		c.counts[bytes].Add(n)
	}
	return err
}

// ReadAt implements region.Store.
func (c *Counted) ReadAt(ctx context.Context, p []byte, off int64) error {
	return c.did(pullRequests, pulledBytes, int64(len(p)), c.Store.ReadAt(ctx, p, off))
}

// WriteAt implements region.Store.
func (c *Counted) WriteAt(ctx context.Context, p []byte, off int64) error {
	return c.did(pushRequests, pushedBytes, int64(len(p)), c.Store.WriteAt(ctx, p, off))
}

// Flush implements region.Store.
func (c *Counted) Flush(ctx context.Context) error {
	return c.did(flushes, -1, 0, c.Store.Flush(ctx))
}

func (c *Counted) lacks(what string) error {
	return fmt.Errorf("%s of %T: %w", what, c.Store, region.ErrNotSupported)
}

// Extents implements region.Extenter.
func (c *Counted) Extents(ctx context.Context, off, n int64) ([]region.Extent, error) {
	if e, ok := c.Store.(region.Extenter); ok {
		return e.Extents(ctx, off, n)
	}
	return nil, c.lacks("extents")
}

// WriteZeroes implements region.Zeroer.
func (c *Counted) WriteZeroes(ctx context.Context, off, n int64, hole bool) error {
	if z, ok := c.Store.(region.Zeroer); ok {
		return c.did(pushRequests, pushedBytes, n, z.WriteZeroes(ctx, off, n, hole))
	}
	return c.lacks("zeroes")
}

// Trim implements region.Trimmer.
func (c *Counted) Trim(ctx context.Context, off, n int64) error {
	if t, ok := c.Store.(region.Trimmer); ok {
		return c.did(pushRequests, -1, 0, t.Trim(ctx, off, n))
	}
	return c.lacks("trim")
}

// Cache implements region.Cacher.
func (c *Counted) Cache(ctx context.Context, off, n int64) error {
	if x, ok := c.Store.(region.Cacher); ok {
		return x.Cache(ctx, off, n)
	}
	return c.lacks("cache")
}

// ReadOnly implements region.ReadOnlyer.
func (c *Counted) ReadOnly() bool {
	r, ok := c.Store.(region.ReadOnlyer)
	return ok && r.ReadOnly()
}

// Version implements region.Versioner.
func (c *Counted) Version(ctx context.Context) (region.Version, error) {
	if v, ok := c.Store.(region.Versioner); ok {
		return v.Version(ctx)
	}
	return region.Version{}, c.lacks("version")
}
