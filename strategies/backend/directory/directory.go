// Package directory keeps a region as a folder with one file a chunk.
package directory

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"memsync/strategies/backend/keyed"
	"memsync/strategies/region"
)

// Table is a folder. A value is written aside and renamed, so that it is seen
// whole or not at all, also after a crash; Flush makes values durable (fsync of
// each file that was written since, and of the folders).
type Table struct {
	dir     string
	handles chan struct{} // one for each file that may be open

	mu     sync.Mutex
	dirty  map[int64]bool // written since the last Flush
	closed bool
}

var _ keyed.Table = (*Table)(nil)

// perFolder is how many values stand in one folder.
const perFolder = 1024

// Open takes the folder dir, which must exist, with at most handles open files at a time.
func Open(dir string, handles int) (*Table, error) {
	fi, err := os.Stat(dir)
	switch {
	case err != nil:
		return nil, fmt.Errorf("open directory backend: %w", err)
	case !fi.IsDir():
		return nil, fmt.Errorf("open directory backend: %s is not a folder: %w", dir, region.ErrNotSupported)
	case handles < 1:
		return nil, fmt.Errorf("open directory backend: %d handles: want at least 1", handles)
	}
	return &Table{dir: dir, handles: make(chan struct{}, handles), dirty: map[int64]bool{}}, nil
}

func (t *Table) folder(number int64) string {
	return filepath.Join(t.dir, fmt.Sprintf("%08x", number/perFolder))
}

// Path returns the file of a chunk.
func (t *Table) Path(number int64) string {
	return filepath.Join(t.folder(number), fmt.Sprintf("%03x", number%perFolder))
}

// with runs f while it may have one file open.
func (t *Table) with(ctx context.Context, f func() error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case t.handles <- struct{}{}:
		defer func() { <-t.handles }()
	case <-ctx.Done():
		return ctx.Err()
	}
	t.mu.Lock()
	closed := t.closed
	t.mu.Unlock()
	if closed {
		return region.ErrClosed
	}
	return f()
}

// Get implements keyed.Table.
func (t *Table) Get(ctx context.Context, numbers []int64, use func(i int, value []byte)) error {
	for i, n := range numbers {
		err := t.with(ctx, func() error {
			b, err := os.ReadFile(t.Path(n))
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err == nil {
				use(i, b)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// Put implements keyed.Table.
func (t *Table) Put(ctx context.Context, numbers []int64, values [][]byte) error {
	for i, n := range numbers {
		if err := t.with(ctx, func() error { return t.put(n, values[i]) }); err != nil {
			return err
		}
	}
	return nil
}

func (t *Table) put(number int64, value []byte) error {
	dir := t.folder(number)
	f, err := os.CreateTemp(dir, ".new-*")
	if errors.Is(err, fs.ErrNotExist) {
		if err = os.MkdirAll(dir, 0o777); err == nil {
			f, err = os.CreateTemp(dir, ".new-*")
		}
	}
	if err != nil {
		return err
	}
	_, err = f.Write(value)
	if err = errors.Join(err, f.Close()); err == nil {
		t.mu.Lock()
		t.dirty[number] = true // before it can be seen, so that no Flush misses it
		t.mu.Unlock()
		err = os.Rename(f.Name(), t.Path(number))
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

// Flush implements keyed.Table.
func (t *Table) Flush(ctx context.Context) error {
	t.mu.Lock()
	dirty := t.dirty
	t.dirty = map[int64]bool{}
	t.mu.Unlock()
	folders := map[string]bool{t.dir: true}
	var failed error
	for n := range dirty {
		if failed == nil {
			failed = t.with(ctx, func() error { return syncPath(t.Path(n)) })
		}
		if failed != nil { // the next Flush tries again
			t.mu.Lock()
			t.dirty[n] = true
			t.mu.Unlock()
			continue
		}
		folders[t.folder(n)] = true
	}
	for dir := range folders {
		if failed == nil {
			failed = t.with(ctx, func() error { return syncPath(dir) })
		}
	}
	return failed
}

// syncPath makes a file or folder durable. One that is gone was replaced, and its
// successor is dirty.
func syncPath(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// Close implements keyed.Table. The files stay.
func (t *Table) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	return nil
}
