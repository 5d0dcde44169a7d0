package userfaultfd

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"memsync/strategies/region"
)

// store is a region of seeded content that can be slow, stall or fail.
type store struct {
	content region.Content
	size    int64
	addr    string        // not empty: of an NBD server that stands for it
	mem     []byte        // not nil: a region.Viewer
	delay   time.Duration // of each read
	stallAt atomic.Int64  // a read of this offset waits for its context; -1 for none
	failAt  atomic.Int64  // a read of this offset fails; -1 for none
	stalled atomic.Int64  // reads that wait so
	closed  atomic.Bool

	mu    sync.Mutex
	reads map[region.Class]int64 // requests by class
	twice []string               // bytes that were read again
	seen  map[int64]bool
}

var errInjected = errors.New("injected")

func newStore(c region.Content, size int64) *store {
	s := &store{content: c, size: size, reads: map[region.Class]int64{}, seen: map[int64]bool{}}
	s.stallAt.Store(-1)
	s.failAt.Store(-1)
	return s
}

func (s *store) view(on bool) *store {
	if on {
		s.mem = make([]byte, s.size)
		s.content.Fill(s.mem, 0)
	}
	return s
}

func (s *store) View(off, n int64) ([]byte, bool) {
	if s.mem == nil {
		return nil, false
	}
	return s.mem[off : off+n], true
}

func (s *store) Size() int64 { return s.size }

func (s *store) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := region.CheckRange(off, int64(len(p)), s.size); err != nil {
		return err
	}
	s.mu.Lock()
	s.reads[region.ClassOf(ctx)]++
	for o := off; o < off+int64(len(p)); o += 4096 {
		if s.seen[o] {
			s.twice = append(s.twice, fmt.Sprint(o))
		}
		s.seen[o] = true
	}
	s.mu.Unlock()
	within := func(at int64) bool { return at >= off && at < off+int64(len(p)) }
	if within(s.failAt.Load()) {
		return errInjected
	}
	if within(s.stallAt.Load()) {
		s.stalled.Add(1)
		<-ctx.Done()
		return ctx.Err()
	}
	if s.delay > 0 {
		select {
		case <-time.After(s.delay):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	s.content.Fill(p, off)
	return nil
}

func (s *store) WriteAt(context.Context, []byte, int64) error { return region.ErrReadOnly }
func (s *store) Flush(context.Context) error                  { return nil }
func (s *store) Close() error                                 { s.closed.Store(true); return nil }
