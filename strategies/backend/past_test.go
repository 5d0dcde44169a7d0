package backend

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"memsync/strategies/region"
)

// TestPast: what another program does to a file is a change, what the store does
// itself is none, however the two alternate.
func TestPast(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	m, err := OpenImage(path, false)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Close() }() // of the last one
	ctx := t.Context()
	version := func() region.Version {
		t.Helper()
		v, err := m.Version(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	own := func() {
		t.Helper()
		if err := errors.Join(m.WriteAt(ctx, []byte("own"), 5), m.Trim(ctx, 8192, 4096), m.Flush(ctx)); err != nil {
			t.Fatal(err)
		}
	}
	other, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	for range 3 {
		before := version()
		own()
		if v := version(); v.Changes != before.Changes || v.State == before.State {
			t.Errorf("own writes: %+v after %+v", v, before)
		}
		// Kernels without fine timestamps tell changes apart by their ticks only.
		time.Sleep(20 * time.Millisecond)
		if _, err := other.WriteAt([]byte("other"), 70); err != nil {
			t.Fatal(err)
		}
		own()
		if v := version(); v.Changes != before.Changes+1 {
			t.Errorf("another's write between the store's own: %+v after %+v", v, before)
		}
		time.Sleep(20 * time.Millisecond)
		if err := os.Truncate(path, 1<<20+1); err != nil {
			t.Fatal(err)
		}
		if v := version(); v.Changes != before.Changes+2 || v.Age > time.Minute {
			t.Errorf("another size: %+v after %+v", v, before)
		}
		if err := os.Truncate(path, 1<<20); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	// Many of the store's own at once are none either.
	before := version()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 50 {
				if err := m.WriteAt(context.Background(), []byte("x"), 9); err != nil {
					t.Error(err)
				}
				if v := version(); v.Changes != before.Changes {
					t.Errorf("%+v after %+v", v, before)
				}
			}
		})
	}
	wg.Wait()
	// What is opened anew, with nothing written in between, has the same state.
	before = version()
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if m, err = OpenImage(path, true); err != nil {
		t.Fatal(err)
	}
	if v := version(); v.State != before.State || v.State == 0 {
		t.Errorf("opened anew: %+v, before %+v", v, before)
	}
}
