package torture

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"syscall"

	"memsync/strategies/region"
)

// disk is a backend that fails as told. One with bytes of its own forgets, in a
// crash, what nobody flushed, page by page or not; another store keeps what it has.
type disk struct {
	under region.Store // nil: the bytes are here

	mu               sync.Mutex
	content, durable []byte
	fails            map[string]failing
}

type failing struct {
	left int64
	how  string
}

var _ region.Store = (*disk)(nil)

func newDisk(c region.Content, size int64) *disk {
	d := &disk{content: make([]byte, size), fails: map[string]failing{}}
	c.Fill(d.content, 0)
	d.durable = bytes.Clone(d.content)
	return d
}

func newDiskOn(s region.Store) *disk { return &disk{under: s, fails: map[string]failing{}} }

// fail makes the next n requests of a kind ("read", "write", "flush") fail.
func (d *disk) fail(kind, how string, n int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fails[kind] = failing{n, how}
}

// heal ends all failing.
func (d *disk) heal() {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.fails)
}

// crash forgets what was not flushed, or some of it.
func (d *disk) crash(r *rand.Rand) {
	d.mu.Lock()
	defer d.mu.Unlock()
	const page = 4096
	for off := 0; off < len(d.content); off += page {
		end := min(off+page, len(d.content))
		if r.IntN(2) == 0 {
			copy(d.content[off:end], d.durable[off:end])
		}
	}
	copy(d.durable, d.content)
}

// stored returns the bytes that would outlive a crash now.
func (d *disk) stored(ctx context.Context) ([]byte, error) {
	if d.under != nil {
		p := make([]byte, d.under.Size())
		return p, d.under.ReadAt(ctx, p, 0)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return bytes.Clone(d.durable), nil
}

// failure returns what becomes of a request of a kind, "" where nothing does. The lock is held.
func (d *disk) failure(kind string) string {
	f := d.fails[kind]
	if f.left == 0 {
		return ""
	}
	f.left--
	d.fails[kind] = f
	return f.how
}

func (d *disk) Size() int64 {
	if d.under != nil {
		return d.under.Size()
	}
	return int64(len(d.content))
}

func (d *disk) begin(ctx context.Context, kind string, off, n int64) (fail string, err error) {
	if err := region.CheckRange(off, n, d.Size()); err != nil {
		return "", err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.failure(kind), ctx.Err()
}

func (d *disk) ReadAt(ctx context.Context, p []byte, off int64) error {
	fail, err := d.begin(ctx, "read", off, int64(len(p)))
	switch {
	case err != nil:
		return err
	case fail == eshort:
		n := len(p) / 2
		_ = d.get(ctx, p[:n], off)
		return fmt.Errorf("read %d bytes at %d: got %d: %w", len(p), off, n, io.ErrUnexpectedEOF)
	case fail != "":
		return fmt.Errorf("read %d bytes at %d: %w", len(p), off, syscall.EIO)
	}
	return d.get(ctx, p, off)
}

func (d *disk) get(ctx context.Context, p []byte, off int64) error {
	if d.under != nil {
		return d.under.ReadAt(ctx, p, off)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	copy(p, d.content[off:])
	return nil
}

func (d *disk) WriteAt(ctx context.Context, p []byte, off int64) error {
	fail, err := d.begin(ctx, "write", off, int64(len(p)))
	switch {
	case err != nil:
		return err
	case fail == enospc: // what there was room for is written
		n := len(p) / 2
		_ = d.put(ctx, p[:n], off)
		return fmt.Errorf("write %d bytes at %d: wrote %d: %w", len(p), off, n, syscall.ENOSPC)
	case fail != "":
		return fmt.Errorf("write %d bytes at %d: %w", len(p), off, syscall.EIO)
	}
	return d.put(ctx, p, off)
}

func (d *disk) put(ctx context.Context, p []byte, off int64) error {
	if d.under != nil {
		return d.under.WriteAt(ctx, p, off)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	copy(d.content[off:], p)
	return nil
}

func (d *disk) Flush(ctx context.Context) error {
	fail, err := d.begin(ctx, "flush", 0, 0)
	switch {
	case err != nil:
		return err
	case fail != "":
		return fmt.Errorf("flush: %w", syscall.EIO)
	case d.under != nil:
		return d.under.Flush(ctx)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	copy(d.durable, d.content)
	return nil
}

// Close leaves the bytes to the next life of the source.
func (d *disk) Close() error { return nil }
