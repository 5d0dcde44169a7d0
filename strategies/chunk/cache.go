package chunk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// Mapped is what a cache may also be: one that somebody maps and stores to. The
// Syncer learns of that by Stored, before the first store to a chunk since Seal.
type Mapped interface {
	// Seal calls take and makes the next store to [off, off+n), whole chunks, known
	// again, in one step against Stored. A store that came before is in what is read
	// from the cache afterwards.
	Seal(off, n int64, take func()) error
	// Drop gives the memory of [off, off+n), whole chunks, back if take, called in one
	// step against Stored, says so. It need not work where the cache is not bounded.
	Drop(off, n int64, take func() bool) error
}

// Memory is a cache in anonymous memory. It offers views. Its content is zero
// until written. All but Close never block; Close waits for calls in progress
// (views are the holder's to give up first).
type Memory struct {
	mem  []byte
	size int64
	gate *gate
}

var (
	_ region.Store  = (*Memory)(nil)
	_ region.Viewer = (*Memory)(nil)
)

// NewMemory maps size bytes, not negative, private and anonymous. Huge pages
// are asked for (madvise(2), MADV_HUGEPAGE), since each 4 KiB page would cost a
// fault of its own when the cache is filled; a kernel without them is fine.
func NewMemory(size int64) (*Memory, error) {
	m := &Memory{size: size, gate: newGate()}
	if size > 0 {
		mem, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
		if err != nil {
			return nil, fmt.Errorf("map %d bytes of cache: %w", size, err)
		}
		_ = unix.Madvise(mem, unix.MADV_HUGEPAGE)
		m.mem = mem
	}
	return m, nil
}

// Size implements region.Store.
func (m *Memory) Size() int64 { return m.size }

// ReadAt implements region.Store.
func (m *Memory) ReadAt(_ context.Context, p []byte, off int64) error {
	return m.do(p, off, func(mem []byte) { copy(p, mem) })
}

// WriteAt implements region.Store.
func (m *Memory) WriteAt(_ context.Context, p []byte, off int64) error {
	return m.do(p, off, func(mem []byte) { copy(mem, p) })
}

func (m *Memory) do(p []byte, off int64, f func(mem []byte)) error {
	if err := region.CheckRange(off, int64(len(p)), m.size); err != nil {
		return err
	}
	if !m.gate.enter() {
		return fmt.Errorf("cache: %w", region.ErrClosed)
	}
	defer m.gate.leave()
	f(m.mem[off : off+int64(len(p))])
	return nil
}

// View implements region.Viewer.
func (m *Memory) View(off, n int64) ([]byte, bool) {
	if region.CheckRange(off, n, m.size) != nil || m.gate.n.Load() < 0 {
		return nil, false
	}
	return m.mem[off : off+n : off+n], true
}

// Trim implements region.Trimmer: whole pages are given back and read as zeroes.
func (m *Memory) Trim(_ context.Context, off, n int64) error {
	if err := region.CheckRange(off, n, m.size); err != nil {
		return err
	}
	page := region.PageSize()
	lo, hi := region.RoundUp(off, page), off+n
	if hi < m.size {
		hi &^= page - 1
	}
	if lo >= hi {
		return nil
	}
	if !m.gate.enter() {
		return fmt.Errorf("cache: %w", region.ErrClosed)
	}
	defer m.gate.leave()
	return unix.Madvise(m.mem[lo:hi], unix.MADV_DONTNEED)
}

// Flush does nothing: memory promises nothing.
func (m *Memory) Flush(context.Context) error { return nil }

// Close unmaps the memory. Views must no longer be used.
func (m *Memory) Close() error {
	if !m.gate.close() || m.mem == nil {
		return nil
	}
	return unix.Munmap(m.mem)
}

// HugePages reports whether the kernel makes huge pages of anonymous memory that
// asks for them (Documentation/admin-guide/mm/transhuge.rst).
func HugePages() bool {
	b, err := os.ReadFile("/sys/kernel/mm/transparent_hugepage/enabled")
	return err == nil && !bytes.Contains(b, []byte("[never]"))
}

// NewMemfd makes a cache in a memfd of size bytes, zeroes until written. No page
// of it is mapped here, so that filling it costs no page faults, only copies by
// the kernel; it offers no views. Linux 3.17.
func NewMemfd(size int64) (*File, error) {
	fd, err := unix.MemfdCreate("memsync-cache", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make a memfd: %w", err)
	}
	f := os.NewFile(uintptr(fd), "memsync-cache")
	if err := f.Truncate(size); err != nil {
		return nil, errors.Join(fmt.Errorf("make a memfd of %d bytes: %w", size, err), f.Close())
	}
	return &File{f: f, size: size, close: sync.OnceValue(f.Close)}, nil
}

// File is a cache in a file. Those of NewFile and NewMemfd are gone after Close, that of OpenFile stays.
type File struct {
	f     *os.File
	size  int64
	close func() error
}

var _ region.Store = (*File)(nil)

// NewFile makes a sparse file of size bytes in the existing folder dir. Its
// name is removed at once where that works, so that no crash leaves it behind.
func NewFile(dir string, size int64) (*File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "cache"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("make the cache file: %w", err)
	}
	err = errors.Join(os.Remove(f.Name()), f.Truncate(size))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make the cache file of %d bytes: %w", size, err), f.Close())
	}
	return &File{f: f, size: size, close: sync.OnceValue(f.Close)}, nil
}

// OpenFile opens the file "cache" in the existing folder dir as a cache of size
// bytes, with what it holds, or makes it. Remove removes it.
func OpenFile(dir string, size int64) (*File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "cache"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the cache file: %w", err)
	}
	if err := f.Truncate(size); err != nil {
		return nil, errors.Join(fmt.Errorf("make the cache file of %d bytes: %w", size, err), f.Close())
	}
	return &File{f: f, size: size, close: sync.OnceValue(f.Close)}, nil
}

// Remove removes the name of a file of OpenFile.
func (c *File) Remove() error { return os.Remove(c.f.Name()) }

// Size implements region.Store.
func (c *File) Size() int64 { return c.size }

// ReadAt implements region.Store.
func (c *File) ReadAt(_ context.Context, p []byte, off int64) error {
	if err := region.CheckRange(off, int64(len(p)), c.size); err != nil {
		return err
	}
	_, err := c.f.ReadAt(p, off)
	return fileError("read", len(p), off, err)
}

// WriteAt implements region.Store.
func (c *File) WriteAt(_ context.Context, p []byte, off int64) error {
	if err := region.CheckRange(off, int64(len(p)), c.size); err != nil {
		return err
	}
	_, err := c.f.WriteAt(p, off)
	return fileError("write", len(p), off, err)
}

func fileError(verb string, n int, off int64, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrClosed):
		err = region.ErrClosed
	}
	return fmt.Errorf("%s %d bytes of the cache file at %d: %w", verb, n, off, err)
}

// Trim implements region.Trimmer: it punches a hole, whole blocks of the file system.
func (c *File) Trim(_ context.Context, off, n int64) error {
	if err := region.CheckRange(off, n, c.size); err != nil || n == 0 {
		return err
	}
	return fileError("trim", int(n), off, control(c.f, func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	}))
}

// control calls f with the file's descriptor, and again where a signal interrupts it.
func control(f *os.File, call func(fd int) error) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	err = rc.Control(func(fd uintptr) {
		for result = call(int(fd)); errors.Is(result, unix.EINTR); result = call(int(fd)) {
		}
	})
	return errors.Join(err, result)
}

// Flush does nothing: the cache does not outlive the process.
func (c *File) Flush(context.Context) error { return nil }

// Close implements region.Store and frees the file's space.
func (c *File) Close() error { return c.close() }
