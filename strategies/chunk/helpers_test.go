package chunk

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"memsync/strategies/region"
)

func put(b []byte, v uint64) { binary.LittleEndian.PutUint64(b, v) }
func get(b []byte) uint64    { return binary.LittleEndian.Uint64(b) }

// byteStore is a store in a slice, under a lock.
type byteStore struct {
	mu sync.Mutex
	b  []byte
}

func newBytes(n int64) *byteStore { return &byteStore{b: make([]byte, n)} }

func (s *byteStore) Size() int64 { return int64(len(s.b)) }
func (s *byteStore) ReadAt(_ context.Context, p []byte, off int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := region.CheckRange(off, int64(len(p)), int64(len(s.b))); err != nil {
		return err
	}
	copy(p, s.b[off:])
	return nil
}
func (s *byteStore) WriteAt(_ context.Context, p []byte, off int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := region.CheckRange(off, int64(len(p)), int64(len(s.b))); err != nil {
		return err
	}
	copy(s.b[off:], p)
	return nil
}
func (s *byteStore) Flush(context.Context) error { return nil }
func (s *byteStore) Close() error                { return nil }

// jitter delays requests by up to 200 us, half before and half after their effect.
type jitter struct{ region.Store }

func (j jitter) pause() {
	if rand.IntN(3) > 0 {
		time.Sleep(time.Duration(rand.IntN(100)) * time.Microsecond)
	}
}
func (j jitter) ReadAt(ctx context.Context, p []byte, off int64) error {
	j.pause()
	defer j.pause()
	return j.Store.ReadAt(ctx, p, off)
}
func (j jitter) WriteAt(ctx context.Context, p []byte, off int64) error {
	j.pause()
	defer j.pause()
	return j.Store.WriteAt(ctx, p, off)
}

// synctestRun runs f as a subtest in simulated time.
func synctestRun(t *testing.T, name string, f func(*testing.T)) {
	t.Helper()
	t.Run(name, func(t *testing.T) { synctest.Test(t, f) })
}
