package order

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"memsync/strategies/region"
)

// Recorder is a Store that remembers what is read of it, in the order of the
// requests, failed ones too: the trace of what lies above it. Writes are passed
// on and not remembered, since they need no bytes of the source but at their
// edges. It remembers at most MaxEntries requests, 32 bytes each.
//
// It offers the views of a Store that has them; a view counts as a read.
type Recorder struct {
	region.Store
	viewer region.Viewer
	start  time.Time

	mu      sync.Mutex
	entries []Entry
	lost    int64
}

var (
	_ region.Store  = (*Recorder)(nil)
	_ region.Viewer = (*Recorder)(nil)
)

// NewRecorder wraps s; times count from now.
func NewRecorder(s region.Store) *Recorder {
	v, _ := s.(region.Viewer)
	return &Recorder{Store: s, viewer: v, start: time.Now()}
}

// Note remembers a read of [off, off+n) that did not come by ReadAt or View.
func (r *Recorder) Note(off, n int64) {
	if n <= 0 {
		return
	}
	e := Entry{Range: Range{off, off + n}, Time: time.Since(r.start)}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.entries) < MaxEntries {
		r.entries = append(r.entries, e)
	} else {
		r.lost++
	}
}

// ReadAt implements region.Store.
func (r *Recorder) ReadAt(ctx context.Context, p []byte, off int64) error {
	r.Note(off, int64(len(p)))
	return r.Store.ReadAt(ctx, p, off)
}

// View implements region.Viewer. A view that is refused is not remembered: a read follows.
func (r *Recorder) View(off, n int64) ([]byte, bool) {
	if r.viewer == nil {
		return nil, false
	}
	p, ok := r.viewer.View(off, n)
	if ok {
		r.Note(off, n)
	}
	return p, ok
}

// Entries returns what was read so far.
func (r *Recorder) Entries() []Entry {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]Entry(nil), r.entries...)
}

// Save writes the trace to a file, aside and renamed.
func (r *Recorder) Save(name string) (err error) {
	r.mu.Lock()
	entries, lost := r.entries, r.lost
	r.mu.Unlock()
	f, err := os.CreateTemp(filepath.Dir(name), filepath.Base(name)+".*")
	if err != nil {
		return fmt.Errorf("save the trace: %w", err)
	}
	comment := fmt.Sprintf("memsync trace: %d reads of a region of %d bytes", len(entries), r.Size())
	if lost > 0 {
		comment += fmt.Sprintf("; %d more were left out", lost)
	}
	err = WriteTrace(f, comment, entries)
	err = errors.Join(err, f.Chmod(0o644), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("save the trace to %s: %w", name, err), os.Remove(f.Name()))
	}
	return nil
}
