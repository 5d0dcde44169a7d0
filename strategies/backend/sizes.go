package backend

import (
	"sync"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// maxCounted is the largest request that Sizes tells from larger ones, in bytes.
const maxCounted = 1 << 30

// Sizes counts requests by their size. The zero value is ready; methods may be
// called concurrently. It is embedded in backends and not wrapped around them, since
// a wrapper would hide what else they can do (region.Extenter and the like).
type Sizes struct {
	mu   sync.Mutex
	hist *hdrhistogram.Histogram // nil while empty
}

func (s *Sizes) count(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hist == nil {
		s.hist = hdrhistogram.New(1, maxCounted, 3)
	}
	_ = s.hist.RecordValue(int64(min(n, maxCounted)))
}

// ReadSizes returns the sizes in bytes of the reads and views so far: HDR, V2
// compressed, base64; nil where there were none. A view stands for a read, also
// where it is asked for by who is about to write, so this is a histogram of
// reads only where nothing is written.
func (s *Sizes) ReadSizes() ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hist == nil {
		return nil, nil
	}
	return s.hist.Encode(hdrhistogram.V2CompressedEncodingCookieBase)
}

// Counter is a backend that counts its reads.
type Counter interface{ ReadSizes() ([]byte, error) }
