package role

import (
	"context"
	"fmt"

	"memsync/strategies/region"
)

// maxPoke is the most bytes of one load, store or dump.
const maxPoke = 4 << 20

// Poke is a range of the region and, for a store, its bytes. It is for programs that say
// themselves what is touched (memsync torture).
type Poke struct {
	Off  int64  `json:"off"`
	N    int64  `json:"n"`
	Data []byte `json:"data,omitempty"`
}

func (p Poke) check() error {
	if p.N < 0 || p.N > maxPoke || len(p.Data) > maxPoke {
		return fmt.Errorf("%d bytes, want at most %d: %w", max(p.N, int64(len(p.Data))), maxPoke, region.ErrOutOfRange)
	}
	return nil
}

// load reads from the attachment.
func (w *workload) load(_ context.Context, p Poke) (Poke, error) {
	if err := w.poked(p); err != nil {
		return Poke{}, err
	}
	p.Data = make([]byte, p.N)
	return p, w.view.ReadAt(p.Data, p.Off)
}

// store writes to the attachment.
func (w *workload) store(_ context.Context, p Poke) (none, error) {
	if err := w.poked(p); err != nil {
		return none{}, err
	}
	return none{}, w.view.WriteAt(p.Data, p.Off)
}

func (w *workload) poked(p Poke) error {
	if w.view == nil {
		return fmt.Errorf("nothing is attached: %w", region.ErrClosed)
	}
	return p.check()
}

// dump reads from the store that a source holds.
func (s *source) dump(ctx context.Context, p Poke) (Poke, error) {
	if s.store == nil {
		return Poke{}, fmt.Errorf("no region is open: %w", region.ErrClosed)
	}
	if err := p.check(); err != nil {
		return Poke{}, err
	}
	p.Data = make([]byte, p.N)
	return p, s.store.ReadAt(ctx, p.Data, p.Off)
}
