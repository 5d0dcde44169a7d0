package hash

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// Bytes is a region whose bytes can be had chunk by chunk. Open gives a worker
// its way to them; the others may be called concurrently.
type Bytes interface {
	Size() int64
	Open() (Reader, error)
}

// Reader is one worker's way to the bytes; it is used by one goroutine.
type Reader interface {
	// Chunk returns the bytes [off, off+n), in buf (of n bytes or more) or, where
	// it needs no copy, elsewhere. They are valid until the next call.
	Chunk(off, n int64, buf []byte) ([]byte, error)
	io.Closer
}

// Mapped is a region in memory. A SIGBUS, where the file behind a mapping was
// truncated, becomes an error of Table and Whole.
type Mapped []byte

// Size is the region's size in bytes.
func (m Mapped) Size() int64 { return int64(len(m)) }

// Open returns m itself.
func (m Mapped) Open() (Reader, error) { return m, nil }

// Chunk returns the bytes without a copy.
func (m Mapped) Chunk(off, n int64, _ []byte) ([]byte, error) { return m[off : off+n], nil }

// Close does nothing.
func (m Mapped) Close() error { return nil }

// Handle says how workers come to the file that they read.
type Handle string

// The ways.
const (
	OneHandle   Handle = "one"       // all workers pread on one open file
	WorkerOwn   Handle = "worker"    // each worker opens the file once
	ChunkOpens  Handle = "chunk"     // the file is opened and closed for every chunk
	MappedBytes Handle = "mapped"    // no file: the mapping
	WholeFile   Handle = "wholefile" // one stream over the whole file (one digest)
)

// Handles lists the ways.
func Handles() []string {
	return []string{string(MappedBytes), string(OneHandle), string(WorkerOwn), string(ChunkOpens)}
}

// File is a region in a file that workers read.
type File struct {
	Path   string
	Length int64 // bytes
	How    Handle

	once sync.Once
	f    *os.File
	err  error
}

// Size is the region's size in bytes.
func (f *File) Size() int64 { return f.Length }

// Open opens the file, or shares it.
func (f *File) Open() (Reader, error) {
	switch f.How {
	case OneHandle:
		f.once.Do(func() { f.f, f.err = os.Open(f.Path) })
		return &fileReader{f: f.f, shared: true}, f.err
	case WorkerOwn:
		h, err := os.Open(f.Path)
		return &fileReader{f: h}, err
	case ChunkOpens:
		return &fileReader{path: f.Path}, nil
	}
	return nil, fmt.Errorf("handle %q: want %s, %s or %s", f.How, OneHandle, WorkerOwn, ChunkOpens)
}

// Close closes what the workers share.
func (f *File) Close() error {
	if f.f == nil {
		return nil
	}
	return f.f.Close()
}

type fileReader struct {
	f      *os.File
	path   string
	shared bool
}

func (r *fileReader) Chunk(off, n int64, buf []byte) ([]byte, error) {
	f := r.f
	if f == nil {
		var err error
		if f, err = os.Open(r.path); err != nil {
			return nil, err
		}
		defer f.Close()
	}
	if _, err := f.ReadAt(buf[:n], off); err != nil {
		return nil, fmt.Errorf("read %d bytes at %d: %w", n, off, err)
	}
	return buf[:n], nil
}

func (r *fileReader) Close() error {
	if r.f == nil || r.shared {
		return nil
	}
	return r.f.Close()
}

// batch is how many bytes a worker takes at once.
const batch = 1 << 20

// Table writes the digest of chunk i of b to digests[i*Size:], with the given
// number of workers (at least 1). Chunk sizes are bytes; the last chunk may be
// short. It blocks until all is hashed, a read failed or ctx ends, and holds one
// chunk of memory a worker where b cannot do without.
func Table(ctx context.Context, f Func, b Bytes, chunk int64, workers int, digests []byte) error {
	n := region.Chunks(b.Size(), chunk)
	if int64(len(digests)) < n*int64(f.Size) {
		return fmt.Errorf("%d bytes for the digests of %d chunks: %w", len(digests), n, region.ErrOutOfRange)
	}
	return Each(ctx, n, max(batch/chunk, 1), workers, func(next func() (int64, bool)) error {
		r, err := b.Open()
		if err != nil {
			return err
		}
		var buf []byte
		if _, mapped := b.(Mapped); !mapped {
			buf = make([]byte, chunk)
		}
		for i, ok := next(); ok && err == nil; i, ok = next() {
			off := i * chunk
			var p []byte
			if p, err = r.Chunk(off, min(chunk, b.Size()-off), buf); err == nil {
				f.Sum(digests[i*int64(f.Size):], p)
			}
		}
		return errors.Join(err, r.Close())
	})
}

// Whole returns the one digest of all of b, read as a stream by one worker.
func Whole(ctx context.Context, f Func, b Bytes) (digest []byte, err error) {
	const block = 1 << 20
	h := f.New()
	err = Each(ctx, region.Chunks(b.Size(), block), 1, 1, func(next func() (int64, bool)) error {
		r, err := b.Open()
		if err != nil {
			return err
		}
		buf := make([]byte, block)
		for i, ok := next(); ok && err == nil; i, ok = next() {
			var p []byte
			if p, err = r.Chunk(i*block, min(block, b.Size()-i*block), buf); err == nil {
				_, err = h.Write(p)
			}
		}
		return errors.Join(err, r.Close())
	})
	return h.Sum(nil), err
}

// Each runs work on the given number of goroutines; next gives each the numbers
// [0, n) that are its own, step neighbours at a time, until there are none left,
// another worker failed or ctx ends. A SIGBUS or SIGSEGV in work becomes an error.
func Each(ctx context.Context, n, step int64, workers int, work func(next func() (int64, bool)) error) error {
	var taken atomic.Int64
	var failed atomic.Bool
	errs := make([]error, max(workers, 1))
	var wg sync.WaitGroup
	for w := range errs {
		body := func() {
			var i, end int64
			errs[w] = Guard(func() error {
				return work(func() (int64, bool) {
					if i == end {
						if failed.Load() || ctx.Err() != nil {
							return 0, false
						}
						if i = taken.Add(step) - step; i >= n {
							i = end
							return 0, false
						}
						end = min(i+step, n)
					}
					i++
					return i - 1, true
				})
			})
			if errs[w] != nil {
				failed.Store(true)
			}
		}
		if w == len(errs)-1 {
			body() // the caller is a worker too
		} else {
			wg.Go(body)
		}
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return context.Cause(ctx)
}

// Guard runs f; a memory fault in it (a mapped file that was truncated) becomes
// an error that wraps EIO.
func Guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		r := recover()
		if r == nil {
			return
		}
		fault, ok := r.(interface {
			error
			Addr() uintptr
		})
		if !ok {
			panic(r)
		}
		err = fmt.Errorf("memory fault at %#x (was the file truncated?): %w", fault.Addr(), unix.EIO)
	}()
	return f()
}

// Scan reads all of the regions with the given number of workers, as fast as
// plain code can: the read bandwidth that hashing is held against. It returns a
// count that depends on every byte.
func Scan(ctx context.Context, m Mapped, workers int) (count int64, err error) {
	var sum atomic.Int64
	err = Each(ctx, region.Chunks(m.Size(), batch), 1, workers, func(next func() (int64, bool)) error {
		n := 0
		for i, ok := next(); ok; i, ok = next() {
			n += bytes.Count(m[i*batch:min((i+1)*batch, m.Size())], []byte{0})
		}
		sum.Add(int64(n))
		return nil
	})
	return sum.Load(), err
}
