package backend

import (
	"context"
	"sync"

	"github.com/HdrHistogram/hdrhistogram-go"

	"memsync/strategies/region"
)

// maxCounted is the largest request that Sized tells from larger ones, in bytes.
const maxCounted = 1 << 30

// Sized is a Store that counts the sizes of reads and views, which stand for reads.
// Who looks for a view of what it is about to write is counted too, so the
// histogram is one of read requests only where nothing is written.
type Sized struct {
	region.Store
	mu   sync.Mutex
	hist *hdrhistogram.Histogram
}

var (
	_ region.Store  = (*Sized)(nil)
	_ region.Viewer = (*Sized)(nil)
)

// NewSized wraps s.
func NewSized(s region.Store) *Sized {
	return &Sized{Store: s, hist: hdrhistogram.New(1, maxCounted, 3)}
}

func (s *Sized) count(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = s.hist.RecordValue(min(n, maxCounted)) // n of 0 counts as 0
}

// Histogram returns the sizes so far: HDR, V2 compressed, base64, in bytes.
func (s *Sized) Histogram() ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hist.Encode(hdrhistogram.V2CompressedEncodingCookieBase)
}

// ReadAt counts and reads.
func (s *Sized) ReadAt(ctx context.Context, p []byte, off int64) error {
	s.count(int64(len(p)))
	return s.Store.ReadAt(ctx, p, off)
}

// View counts and returns the inner store's view, where it has one.
func (s *Sized) View(off, n int64) ([]byte, bool) {
	v, ok := s.Store.(region.Viewer)
	if !ok {
		return nil, false
	}
	p, ok := v.View(off, n)
	if ok {
		s.count(n)
	}
	return p, ok
}
