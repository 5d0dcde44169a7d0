package chunk

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"memsync/strategies/region"
	"memsync/strategies/storetest"
)

// TestGivenUpWrite: after a write that was given up, which may still come in, the store is
// opened again before anything else is asked of it, and says which opening that is.
func TestGivenUpWrite(t *testing.T) {
	under := storetest.New(make([]byte, 100))
	f := storetest.NewFaulty(under)
	var openings []region.Opening
	lost := 0
	r, err := OpenAgain(t.Context(), func(ctx context.Context) (region.Store, error) {
		openings = append(openings, region.OpeningOf(ctx))
		return keepOpen{f}, nil
	}, func() { lost++ })
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	f.Stall(storetest.Write)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := r.WriteAt(ctx, []byte("old"), 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("a write that stalls: %v", err)
	}
	f.Pass(storetest.Write)
	if err := r.WriteAt(t.Context(), []byte("new"), 0); err != nil {
		t.Fatal(err)
	}
	if err := r.WriteAt(ctx, []byte("not sent"), 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a write whose context has ended: %v", err)
	}
	if err := r.ReadAt(t.Context(), make([]byte, 3), 0); err != nil {
		t.Fatal(err)
	}
	n := slices.IndexFunc(openings, func(o region.Opening) bool { return o.ID != openings[0].ID })
	if len(openings) != 2 || n >= 0 || openings[0].ID == "" || openings[0].N != 1 || openings[1].N != 2 || lost != 1 {
		t.Errorf("openings %+v, told of %d: want the first and a second one", openings, lost)
	}
}

// keepOpen is a store whose Close leaves it as it is.
type keepOpen struct{ region.Store }

func (keepOpen) Close() error { return nil }
