// Package storetest holds stores and wrappers for tests: a plain memory store
// that the race detector can see through, and a wrapper that counts, delays,
// fails or stalls requests.
package storetest

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"time"

	"memsync/strategies/region"
)

// Bytes is a store in a slice.
type Bytes struct {
	mu     sync.RWMutex
	b      []byte
	closed bool
}

var _ region.Store = (*Bytes)(nil)

// New returns a store with the content b, which it takes over.
func New(b []byte) *Bytes { return &Bytes{b: b} }

// Seeded returns a store of size bytes with the content c.
func Seeded(c region.Content, size int64) *Bytes {
	b := make([]byte, size)
	c.Fill(b, 0)
	return New(b)
}

// Snapshot returns a copy of all bytes.
func (s *Bytes) Snapshot() []byte {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return bytes.Clone(s.b)
}

// Size implements region.Store.
func (s *Bytes) Size() int64 { return int64(len(s.b)) }

func (s *Bytes) check(ctx context.Context, p []byte, off int64) error {
	if err := region.CheckRange(off, int64(len(p)), s.Size()); err != nil {
		return err
	}
	if s.closed {
		return fmt.Errorf("test store: %w", region.ErrClosed)
	}
	return ctx.Err()
}

// ReadAt implements region.Store.
func (s *Bytes) ReadAt(ctx context.Context, p []byte, off int64) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	err := s.check(ctx, p, off)
	if err == nil {
		copy(p, s.b[off:])
	}
	return err
}

// WriteAt implements region.Store.
func (s *Bytes) WriteAt(ctx context.Context, p []byte, off int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.check(ctx, p, off)
	if err == nil {
		copy(s.b[off:], p)
	}
	return err
}

// Flush implements region.Store.
func (s *Bytes) Flush(ctx context.Context) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.check(ctx, nil, 0)
}

// Close implements region.Store.
func (s *Bytes) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	return nil
}

// Kind of a request.
type Kind string

// The kinds.
const (
	Read  Kind = "read"
	Write Kind = "write"
	Flush Kind = "flush"
)

// Faulty passes requests on, and counts, delays, fails or stalls them as told.
// What it is told holds for requests that come later.
type Faulty struct {
	region.Store
	mu     sync.Mutex
	counts map[Kind]int
	rules  map[Kind]rule
}

type rule struct {
	delay time.Duration
	err   error
	after int           // requests of this kind that pass before err or stall
	stall chan struct{} // closed to go on
}

var _ region.Store = (*Faulty)(nil)

// NewFaulty wraps s.
func NewFaulty(s region.Store) *Faulty {
	return &Faulty{Store: s, counts: map[Kind]int{}, rules: map[Kind]rule{}}
}

func (f *Faulty) set(k Kind, r rule) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if old := f.rules[k]; old.stall != nil {
		close(old.stall)
	}
	f.rules[k] = r
}

// Fail makes requests of kind k fail with err, from the after-th on; nil ends that.
func (f *Faulty) Fail(k Kind, err error, after int) { f.set(k, rule{err: err, after: after}) }

// Delay makes requests of kind k take at least d more.
func (f *Faulty) Delay(k Kind, d time.Duration) { f.set(k, rule{delay: d}) }

// Stall makes requests of kind k wait until the next call of Pass, Fail, Delay or Stall for k.
func (f *Faulty) Stall(k Kind) { f.set(k, rule{stall: make(chan struct{})}) }

// Pass lets requests of kind k pass.
func (f *Faulty) Pass(k Kind) { f.set(k, rule{}) }

// Count returns how many requests of kind k have come.
func (f *Faulty) Count(k Kind) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.counts[k]
}

func (f *Faulty) before(ctx context.Context, k Kind) error {
	f.mu.Lock()
	f.counts[k]++
	r := f.rules[k]
	if r.after > 0 {
		r.after--
		f.rules[k] = r
		f.mu.Unlock()
		return nil
	}
	f.mu.Unlock()
	var late <-chan time.Time
	if r.delay > 0 {
		t := time.NewTimer(r.delay)
		defer t.Stop()
		late = t.C
	}
	switch {
	case r.err != nil:
		return fmt.Errorf("%s: %w", k, r.err)
	case r.stall != nil || late != nil:
		select {
		case <-r.stall: // nil where there is only a delay
		case <-late:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// ReadAt implements region.Store.
func (f *Faulty) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := f.before(ctx, Read); err != nil {
		return err
	}
	return f.Store.ReadAt(ctx, p, off)
}

// WriteAt implements region.Store.
func (f *Faulty) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := f.before(ctx, Write); err != nil {
		return err
	}
	return f.Store.WriteAt(ctx, p, off)
}

// Flush implements region.Store.
func (f *Faulty) Flush(ctx context.Context) error {
	if err := f.before(ctx, Flush); err != nil {
		return err
	}
	return f.Store.Flush(ctx)
}
