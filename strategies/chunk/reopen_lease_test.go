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

// hangingUp never answers at 0, and notices at 1 that its peer is gone. Like an
// NBD client, it ends what is in flight with ErrClosed when it is closed.
type hangingUp struct {
	region.Store
	asked, closed chan struct{}
}

func (h *hangingUp) ReadAt(_ context.Context, _ []byte, off int64) error {
	if off > 0 {
		return region.ErrPeerGone
	}
	close(h.asked)
	<-h.closed
	return region.ErrClosed
}

func (h *hangingUp) Close() error {
	close(h.closed)
	return nil
}

// TestLostUnderAnother: one request learns that the peer is gone, and the store is
// closed for that; the others in flight on it are made again as well.
func TestLostUnderAnother(t *testing.T) {
	source := storetest.New([]byte("12345678"))
	h := &hangingUp{source, make(chan struct{}), make(chan struct{})}
	next := region.Store(h)
	r, err := OpenAgain(t.Context(), func(context.Context) (region.Store, error) {
		s := next
		next = source
		return s, nil
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 2)
	first := make(chan error)
	go func() { first <- r.ReadAt(t.Context(), b[:1], 0) }()
	<-h.asked
	if err := errors.Join(r.ReadAt(t.Context(), b[1:], 1), <-first); err != nil || string(b) != "12" {
		t.Errorf("read %q, %v", b, err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if err := r.ReadAt(t.Context(), b, 0); !errors.Is(err, region.ErrClosed) {
		t.Errorf("read after Close: %v", err)
	}
}
