package chunk

import (
	"context"
	"errors"
	"testing"

	"memsync/strategies/region"
	"memsync/strategies/storetest"
)

type epochStore struct {
	*storetest.Faulty
	epoch uint32
}

func (e epochStore) Epoch() uint32 { return e.epoch }

// TestOtherWriter: a region that another host had the lease of while the
// connection was lost is not opened again: what is cached may be of before.
func TestOtherWriter(t *testing.T) {
	epoch := uint32(1)
	f := storetest.NewFaulty(storetest.New(make([]byte, 8)))
	r, err := OpenAgain(t.Context(), func(context.Context) (region.Store, error) {
		return epochStore{storetest.NewFaulty(storetest.New(make([]byte, 8))), epoch}, nil
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	lose := func() error {
		f = r.cur.(epochStore).Faulty
		f.Fail(storetest.Read, region.ErrPeerGone, 0)
		return r.ReadAt(t.Context(), make([]byte, 1), 0)
	}
	if err := lose(); err != nil {
		t.Fatalf("the same epoch: %v", err)
	}
	epoch = 3
	if err := lose(); !errors.Is(err, region.ErrMismatch) {
		t.Errorf("another epoch: %v, want ErrMismatch", err)
	}
}
