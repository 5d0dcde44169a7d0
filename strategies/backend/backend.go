// Package backend holds the places where a region's content can live: every
// backend is a region.Store that is filled before the clock starts and can be
// verified afterwards.
package backend

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// Names lists the backends that Open knows.
func Names() []string {
	return append([]string{"memory", "file"}, chunkedNames()...)
}

// Spec says what a source holds.
type Spec struct {
	Backend  string         `json:"backend"`            // one of Names
	Size     int64          `json:"size"`               // bytes, at least 1
	Chunk    int64          `json:"chunk"`              // bytes; of the backends that keep chunks
	Settings []string       `json:"settings,omitempty"` // key=value of Params
	Service  *Service       `json:"service,omitempty"`  // the server of a backend that has one
	Content  region.Content `json:"content"`            // where Input is empty
	Input    string         `json:"input,omitempty"`    // a file whose first Size bytes are the content
}

// Open makes the store and fills what can be filled at once. File-backed stores
// put their files into dir, which the caller removes. ctx bounds the filling.
func Open(ctx context.Context, s Spec, dir string) (region.Store, error) {
	if s.Size < 1 {
		return nil, fmt.Errorf("region size %d: want at least 1 byte", s.Size)
	}
	var fill func(p []byte, off int64) error
	closeFill := func() error { return nil }
	if s.Input != "" {
		in, err := os.Open(s.Input)
		if err != nil {
			return nil, fmt.Errorf("input: %w", err)
		}
		fill = func(p []byte, off int64) error {
			if n, err := in.ReadAt(p, off); n < len(p) {
				return fmt.Errorf("input %s: %d bytes at %d: it shrank or cannot be read: %w", s.Input, len(p), off, err)
			}
			return nil
		}
		closeFill = in.Close
	} else {
		fill = func(p []byte, off int64) error { s.Content.Fill(p, off); return nil }
	}
	switch s.Backend {
	case "memory":
		m, err := newMemory(s.Size, fill, closeFill)
		if err != nil {
			return nil, errors.Join(err, closeFill())
		}
		return m, nil
	case "file":
		f, err := newFile(dir, s.Size, fill)
		if err = errors.Join(err, closeFill()); err != nil {
			return nil, err
		}
		return f, nil
	}
	if b, ok := chunked()[s.Backend]; ok {
		st, err := openChunked(ctx, b, s, dir, fill)
		if err = errors.Join(err, closeFill()); err != nil {
			return nil, fmt.Errorf("backend %s: %w", s.Backend, err)
		}
		return st, nil
	}
	return nil, errors.Join(fmt.Errorf("unknown backend %q; valid: %s", s.Backend, strings.Join(Names(), ", ")), closeFill())
}

// block is the unit in which Memory materialises its content.
const block = 1 << 20

// eager is how much of a Memory is filled when it is made.
const eager = 512 << 20

// Memory holds a region in anonymous memory. A block of 1 MiB is filled from
// its origin when it is first needed, so that a region of 1 TiB costs what is
// touched of it. It implements region.Viewer.
type Memory struct {
	Sizes
	size   int64
	mem    []byte
	fill   func(p []byte, off int64) error
	filled []atomic.Bool // a block's content is in mem
	locks  [64]sync.Mutex
	open   sync.RWMutex // held for reading while mem is used, for writing by Close
	closed bool
	done   func() error
}

func newMemory(size int64, fill func([]byte, int64) error, done func() error) (*Memory, error) {
	mem, err := unix.Mmap(-1, 0, int(region.RoundUp(size, region.PageSize())), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("reserve %d bytes of memory: %w", size, err)
	}
	_ = unix.Madvise(mem, unix.MADV_HUGEPAGE) // fewer faults while filling; no matter if refused
	m := &Memory{size: size, mem: mem, fill: fill, done: done, filled: make([]atomic.Bool, region.Chunks(size, block))}
	var wg sync.WaitGroup
	errs := make([]error, 2)
	head := min(size, eager)
	for i := range errs {
		wg.Go(func() {
			for off := int64(i) * block; off < head && errs[i] == nil; off += int64(len(errs)) * block {
				errs[i] = m.need(off, 1)
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return nil, errors.Join(err, unix.Munmap(mem)) // done is the caller's until there is a Memory
	}
	return m, nil
}

// need fills the blocks that [off, off+n) touches and that are not filled yet.
func (m *Memory) need(off, n int64) error {
	for b := off / block; b*block < off+n; b++ {
		if m.filled[b].Load() {
			continue
		}
		l := &m.locks[b%int64(len(m.locks))]
		l.Lock()
		if !m.filled[b].Load() {
			if err := m.fill(m.mem[b*block:min((b+1)*block, m.size)], b*block); err != nil {
				l.Unlock()
				return err
			}
			m.filled[b].Store(true)
		}
		l.Unlock()
	}
	return nil
}

func (m *Memory) check(ctx context.Context, off, n int64) error {
	if m.closed {
		return region.ErrClosed
	}
	if err := region.CheckRange(off, n, m.size); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return m.need(off, n)
}

// Size returns the region's size in bytes.
func (m *Memory) Size() int64 { return m.size }

// View returns the bytes themselves.
func (m *Memory) View(off, n int64) ([]byte, bool) {
	m.open.RLock()
	defer m.open.RUnlock()
	if m.check(context.Background(), off, n) != nil {
		return nil, false
	}
	m.count(int(n))
	return m.mem[off : off+n : off+n], true
}

// ReadAt copies from memory.
func (m *Memory) ReadAt(ctx context.Context, p []byte, off int64) error {
	m.open.RLock()
	defer m.open.RUnlock()
	if err := m.check(ctx, off, int64(len(p))); err != nil {
		return err
	}
	m.count(len(p))
	copy(p, m.mem[off:])
	return nil
}

// WriteAt copies to memory.
func (m *Memory) WriteAt(ctx context.Context, p []byte, off int64) error {
	m.open.RLock()
	defer m.open.RUnlock()
	if err := m.check(ctx, off, int64(len(p))); err != nil {
		return err
	}
	copy(m.mem[off:m.size], p)
	return nil
}

// Flush does nothing: memory is as durable as it gets.
func (m *Memory) Flush(ctx context.Context) error {
	m.open.RLock()
	defer m.open.RUnlock()
	return m.check(ctx, 0, 0)
}

// Close unmaps the memory; a View must not be used afterwards.
func (m *Memory) Close() error {
	m.open.Lock()
	defer m.open.Unlock()
	if m.closed {
		return nil
	}
	m.closed = true
	return errors.Join(unix.Munmap(m.mem), m.done())
}

// File holds a region in a file, through the page cache.
type File struct {
	Sizes
	size   int64
	f      *os.File
	closed atomic.Bool
	past   past
}

func newFile(dir string, size int64, fill func([]byte, int64) error) (*File, error) {
	f, err := os.CreateTemp(dir, "region-*")
	if err != nil {
		return nil, fmt.Errorf("create the region's file: %w", err)
	}
	s := &File{size: size, f: f}
	buf := make([]byte, block)
	for off := int64(0); off < size; off += block {
		p := buf[:min(block, size-off)]
		if err = fill(p, off); err == nil {
			_, err = f.WriteAt(p, off)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("fill the region's file at %d: %w", off, err), f.Close(), os.Remove(f.Name()))
		}
	}
	s.past.begin(f)
	return s, nil
}

// Path returns the file's path.
func (f *File) Path() string { return f.f.Name() }

// Size returns the region's size in bytes.
func (f *File) Size() int64 { return f.size }

func (f *File) do(ctx context.Context, op func([]byte, int64) (int, error), name string, p []byte, off int64) error {
	if f.closed.Load() {
		return region.ErrClosed
	}
	if err := region.CheckRange(off, int64(len(p)), f.size); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if _, err := op(p, off); err != nil {
		if errors.Is(err, os.ErrClosed) {
			return region.ErrClosed
		}
		return fmt.Errorf("%s %d bytes at %d: %w", name, len(p), off, err)
	}
	return nil
}

// ReadAt reads from the file.
func (f *File) ReadAt(ctx context.Context, p []byte, off int64) error {
	f.count(len(p))
	return f.do(ctx, f.f.ReadAt, "read", p, off)
}

// WriteAt writes to the file.
func (f *File) WriteAt(ctx context.Context, p []byte, off int64) error {
	defer f.past.write(f.f)()
	return f.do(ctx, f.f.WriteAt, "write", p, off)
}

// Version implements region.Versioner: it notices when a regular file was changed
// by another program, or given another size. See past.
func (f *File) Version(ctx context.Context) (region.Version, error) {
	if f.closed.Load() {
		return region.Version{}, region.ErrClosed
	}
	if err := ctx.Err(); err != nil {
		return region.Version{}, err
	}
	return f.past.version(f.f)
}

// Flush makes the file durable (fsync).
func (f *File) Flush(ctx context.Context) error {
	return f.do(ctx, func([]byte, int64) (int, error) { return 0, f.f.Sync() }, "flush", nil, 0)
}

// Close closes the file; it may be called twice.
func (f *File) Close() error {
	if f.closed.Swap(true) {
		return nil
	}
	return f.f.Close()
}

// Delayed is a Store whose every ReadAt, WriteAt and Flush first pauses for RTT:
// the thesis's stand-in for a network ("sleep" shaper). The pause is paid once
// a call, whatever its length; calls sleep side by side.
type Delayed struct {
	region.Store
	RTT time.Duration
}

func (d Delayed) pause(ctx context.Context) error { return pause(ctx, d.RTT) }

func pause(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// ReadAt pauses, then reads.
func (d Delayed) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := d.pause(ctx); err != nil {
		return err
	}
	return d.Store.ReadAt(ctx, p, off)
}

// WriteAt pauses, then writes.
func (d Delayed) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := d.pause(ctx); err != nil {
		return err
	}
	return d.Store.WriteAt(ctx, p, off)
}

// Flush pauses, then flushes.
func (d Delayed) Flush(ctx context.Context) error {
	if err := d.pause(ctx); err != nil {
		return err
	}
	return d.Store.Flush(ctx)
}
