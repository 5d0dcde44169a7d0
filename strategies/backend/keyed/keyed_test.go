package keyed_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"memsync/strategies/backend/keyed"
	"memsync/strategies/backend/keyed/keyedtest"
	"memsync/strategies/region"
)

// memory is a table that fails when told.
type memory struct {
	mu     sync.Mutex
	m      map[int64][]byte
	closed bool
	fail   func(call int) error
	calls  int
}

func (t *memory) call(ctx context.Context) error {
	t.calls++
	switch {
	case t.closed:
		return region.ErrClosed
	case ctx.Err() != nil:
		return ctx.Err()
	case t.fail != nil:
		return t.fail(t.calls)
	}
	return nil
}

func (t *memory) Get(ctx context.Context, numbers []int64, use func(int, []byte)) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.call(ctx); err != nil {
		return err
	}
	for i, n := range numbers {
		if v, ok := t.m[n]; ok {
			use(i, v)
		}
	}
	return nil
}

func (t *memory) Put(ctx context.Context, numbers []int64, values [][]byte) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, n := range numbers {
		if i == len(numbers)/2 { // a failure in the middle: half is there
			if err := t.call(ctx); err != nil {
				return err
			}
		}
		t.m[n] = bytes.Clone(values[i])
	}
	return nil
}

func (t *memory) Flush(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.call(ctx)
}
func (t *memory) Close() error { t.mu.Lock(); defer t.mu.Unlock(); t.closed = true; return nil }

func TestSuite(t *testing.T) {
	keyedtest.Run(t, func(*testing.T) (keyed.Table, func() keyed.Table) { return &memory{m: map[int64][]byte{}}, nil })
}

// Calls that fail are repeated, a permanent error is not, and time bounds it.
func TestRetry(t *testing.T) {
	ctx := context.Background()
	table := &memory{m: map[int64][]byte{}}
	s, err := keyed.New(table, keyed.Options{Size: 1 << 14, Chunk: 1 << 12, Retry: 400 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	want := bytes.Repeat([]byte{7}, 1<<14)
	twice := func() { // fails two times from now
		from := table.calls
		table.fail = func(call int) error {
			if call <= from+2 {
				return errors.New("connection reset")
			}
			return nil
		}
	}
	twice()
	if err := s.WriteAt(ctx, want, 0); err != nil {
		t.Errorf("write: %v", err)
	}
	twice()
	got := make([]byte, 1<<14)
	if err := s.ReadAt(ctx, got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("read: %v", err)
	}
	twice()
	if err := s.Flush(ctx); err != nil {
		t.Errorf("flush: %v", err)
	}

	calls := table.calls
	table.fail = func(int) error { return fmt.Errorf("wrong password: %w", keyed.ErrPermanent) }
	if err := s.ReadAt(ctx, got, 0); !errors.Is(err, keyed.ErrPermanent) || table.calls != calls+1 {
		t.Errorf("a permanent error: %v after %d calls", err, table.calls-calls)
	}
	table.fail = func(int) error { return errors.New("down") }
	began := time.Now()
	if err := s.ReadAt(ctx, got, 0); err == nil || time.Since(began) > 2*time.Second {
		t.Errorf("%v after %v", err, time.Since(began))
	}
	short, cancel := context.WithTimeout(ctx, 30*time.Millisecond)
	defer cancel()
	if err := s.WriteAt(short, want, 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("at the caller's deadline: %v", err)
	}
}

func TestOptions(t *testing.T) {
	for _, o := range []keyed.Options{{Size: 0, Chunk: 4096}, {Size: 10, Chunk: 100}, {Size: 10, Chunk: 5000}} {
		if _, err := keyed.New(&memory{}, o); err == nil {
			t.Errorf("%+v: no error", o)
		}
	}
}
