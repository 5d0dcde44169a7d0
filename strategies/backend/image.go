package backend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// openers are the ways of opening content that exists already, by the scheme
// of its location.
func openers() map[string]func(ctx context.Context, location, rest string, readOnly bool) (region.Store, error) {
	return map[string]func(ctx context.Context, location, rest string, readOnly bool) (region.Store, error){
		"file": func(_ context.Context, _, path string, readOnly bool) (region.Store, error) {
			return OpenImage(path, readOnly)
		},
	}
}

// OpenLocation opens content that exists already: a path, or SCHEME://REST
// (today file:// only). Nothing is created. ctx bounds the opening.
func OpenLocation(ctx context.Context, location string, readOnly bool) (region.Store, error) {
	scheme, rest, ok := strings.Cut(location, "://")
	if !ok || strings.Contains(scheme, "/") {
		return OpenImage(location, readOnly)
	}
	open, ok := openers()[scheme]
	if !ok {
		var valid []string
		for s := range openers() {
			valid = append(valid, s+"://")
		}
		slices.Sort(valid)
		return nil, fmt.Errorf("open %s: unknown scheme %q; valid: a path, %s: %w", location, scheme, strings.Join(valid, ", "), region.ErrNotSupported)
	}
	return open(ctx, location, rest, readOnly)
}

// Image is a file or block device that was there before, and stays. Its holes
// can be asked for and made. All methods may be called concurrently.
type Image struct {
	*File
	readOnly bool
}

var (
	_ region.Store      = (*Image)(nil)
	_ region.Extenter   = (*Image)(nil)
	_ region.Zeroer     = (*Image)(nil)
	_ region.Trimmer    = (*Image)(nil)
	_ region.Cacher     = (*Image)(nil)
	_ region.ReadOnlyer = (*Image)(nil)
)

// OpenImage opens the regular file or block device at path with its present
// size, and takes the lock of flock(2) on it: shared for reading, else
// exclusive, so that two servers never write to one file. A block device that
// is written must not be mounted (O_EXCL). An empty file gives
// region.ErrOutOfRange, one that is locked region.ErrNotPermitted.
func OpenImage(path string, readOnly bool) (*Image, error) {
	wrap := func(err error) error { return fmt.Errorf("open %s: %w", path, err) }
	info, err := os.Stat(path)
	if err != nil {
		return nil, err // names the path
	}
	flags, lock := os.O_RDWR, unix.LOCK_EX
	if readOnly {
		flags, lock = os.O_RDONLY, unix.LOCK_SH
	}
	switch device := info.Mode()&fs.ModeDevice != 0 && info.Mode()&fs.ModeCharDevice == 0; {
	case device && !readOnly:
		flags |= unix.O_EXCL
	case !device && !info.Mode().IsRegular():
		return nil, wrap(fmt.Errorf("it is neither a regular file nor a block device (%v): %w", info.Mode().Type(), region.ErrNotSupported))
	}
	f, err := os.OpenFile(path, flags, 0)
	if errors.Is(err, unix.EBUSY) {
		return nil, wrap(fmt.Errorf("the block device is mounted or in use: %w", region.ErrNotPermitted))
	}
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), lock|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, wrap(fmt.Errorf("it is locked: already served, here or by another process: %w", region.ErrNotPermitted))
		}
		return nil, wrap(os.NewSyscallError("flock", err))
	}
	size, err := unix.Seek(int(f.Fd()), 0, unix.SEEK_END) // also right for a block device
	if err == nil && size == 0 {
		err = fmt.Errorf("it is empty: %w", region.ErrOutOfRange)
	}
	if err != nil {
		_ = f.Close()
		return nil, wrap(err)
	}
	m := &Image{File: &File{size: size, f: f}, readOnly: readOnly}
	m.past.begin(f)
	return m, nil
}

// ReadOnly reports whether writes give region.ErrReadOnly.
func (m *Image) ReadOnly() bool { return m.readOnly }

// WriteAt writes to the file.
func (m *Image) WriteAt(ctx context.Context, p []byte, off int64) error {
	if m.readOnly {
		return region.ErrReadOnly
	}
	return m.File.WriteAt(ctx, p, off)
}

// Flush makes the file durable (fsync).
func (m *Image) Flush(ctx context.Context) error {
	if m.readOnly {
		return ctx.Err()
	}
	return m.File.Flush(ctx)
}

// Extents tells data from holes by lseek(2), SEEK_DATA and SEEK_HOLE. Block
// devices give region.ErrNotSupported.
func (m *Image) Extents(ctx context.Context, off, n int64) (ext []region.Extent, err error) {
	err = m.span(ctx, "extents of", off, n, func(fd int) error {
		const most = 1024 // a caller that wants more asks again
		for end := off + n; off < end && len(ext) < most; {
			data, err := unix.Seek(fd, off, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) { // no data up to the end, wherever that is now
				data = end
				if size, e := unix.Seek(fd, 0, unix.SEEK_END); e != nil || size >= m.size {
					err = e
				} else {
					err = fmt.Errorf("the file shrank to %d bytes: %w", size, io.ErrUnexpectedEOF)
				}
			}
			if err != nil {
				return err
			}
			if data = min(data, end); data > off {
				ext = append(ext, region.Extent{Length: data - off, Hole: true, Zero: true})
				off = data
				continue
			}
			hole, err := unix.Seek(fd, off, unix.SEEK_HOLE)
			if err != nil {
				return err
			}
			hole = min(hole, end)
			if hole <= off {
				return fmt.Errorf("SEEK_HOLE at %d gives %d", off, hole)
			}
			ext = append(ext, region.Extent{Length: hole - off})
			off = hole
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return ext, nil
}

// WriteZeroes is region.Zeroer's, by fallocate(2). What the file system cannot
// do gives region.ErrNotSupported and changes nothing.
func (m *Image) WriteZeroes(ctx context.Context, off, n int64, hole bool) error {
	mode := uint32(unix.FALLOC_FL_ZERO_RANGE)
	if hole {
		mode = unix.FALLOC_FL_PUNCH_HOLE
	}
	return m.fallocate(ctx, "write zeroes to", off, n, mode)
}

// Trim punches a hole; where that is impossible it does nothing.
func (m *Image) Trim(ctx context.Context, off, n int64) error {
	err := m.fallocate(ctx, "trim", off, n, unix.FALLOC_FL_PUNCH_HOLE)
	if errors.Is(err, region.ErrNotSupported) {
		return nil
	}
	return err
}

func (m *Image) fallocate(ctx context.Context, what string, off, n int64, mode uint32) error {
	if m.readOnly {
		return region.ErrReadOnly
	}
	defer m.past.write(m.f)()
	return m.span(ctx, what, off, n, func(fd int) error {
		for {
			err := unix.Fallocate(fd, mode|unix.FALLOC_FL_KEEP_SIZE, off, n)
			if !errors.Is(err, unix.EINTR) {
				return err
			}
		}
	})
}

// Cache starts reading the bytes into the page cache (posix_fadvise(2),
// POSIX_FADV_WILLNEED).
func (m *Image) Cache(ctx context.Context, off, n int64) error {
	return m.span(ctx, "cache", off, n, func(fd int) error {
		return unix.Fadvise(fd, off, n, unix.FADV_WILLNEED)
	})
}

// span checks a range and calls f with the descriptor. Errors that say that
// the file system or device lacks the operation, or wants another alignment,
// become region.ErrNotSupported.
func (m *Image) span(ctx context.Context, what string, off, n int64, f func(fd int) error) error {
	if m.closed.Load() {
		return region.ErrClosed
	}
	if err := errors.Join(region.CheckRange(off, n, m.size), ctx.Err()); err != nil || n == 0 {
		return err
	}
	raw, err := m.f.SyscallConn()
	if err != nil {
		return region.ErrClosed
	}
	var op error
	if err := raw.Control(func(fd uintptr) { op = f(int(fd)) }); err != nil {
		return region.ErrClosed
	}
	switch {
	case errors.Is(op, unix.EOPNOTSUPP), errors.Is(op, unix.EINVAL), errors.Is(op, unix.ENOSYS):
		return fmt.Errorf("%s %d bytes at %d: %w: %w", what, n, off, region.ErrNotSupported, op)
	case op != nil:
		return fmt.Errorf("%s %d bytes at %d: %w", what, n, off, op)
	}
	return nil
}
