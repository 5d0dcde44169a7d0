package nbd

import (
	"context"
	"errors"
	"sync"
	"testing"

	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/transport"
)

func TestDemandOvertakes(t *testing.T) {
	const window = 1 << 20
	gate := make(chan struct{})
	store := urgent{gated{newRAM(32<<20, 1), gate, nil}}
	for _, class := range []region.Class{region.Prefetch, region.Push} {
		c := open(t, &Transport{}, serve(t, &Transport{}, transport.One{Store: store}), transport.Options{Window: window, Connections: 2})
		ctx, cancel := context.WithCancel(region.WithClass(testContext(t), class))
		var wg sync.WaitGroup
		load := func() int64 { return c.conns[0].load.Load() + c.conns[1].load.Load() }
		for i := range int64(4) {
			wg.Go(func() {
				p := make([]byte, 8<<20)
				var err error
				if class == region.Prefetch {
					err = c.ReadAt(ctx, p, i*8<<20)
				} else {
					err = c.WriteAt(ctx, p, i*8<<20)
				}
				if !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
			})
		}
		waitFor(t, "window full", func() bool { return load() == window })
		for range 20 {
			if err := c.ReadAt(testContext(t), make([]byte, 4096), 12345); err != nil {
				t.Fatal(err)
			}
			if n := load(); n > window {
				t.Fatalf("%d bytes in the background, the window is %d", n, window)
			}
		}
		if c.conns[0].load.Load() != 0 {
			t.Error("background requests on the connection that is kept for demand")
		}
		cancel()
		wg.Wait()
	}
}

// urgent lets small reads past the gate, and holds writes at it.
type urgent struct{ gated }

func (u urgent) ReadAt(ctx context.Context, p []byte, off int64) error {
	if len(p) <= 4096 {
		return u.ram.ReadAt(ctx, p, off)
	}
	return u.gated.ReadAt(ctx, p, off)
}

func (u urgent) WriteAt(ctx context.Context, p []byte, off int64) error {
	return u.gated.ReadAt(ctx, make([]byte, len(p)), off)
}

func TestParams(t *testing.T) {
	v, err := param.New(Params(), []string{"connections=4", "window=2MiB"})
	if err != nil || v.Int("connections") != 4 || v.Size("window") != 2<<20 {
		t.Errorf("%v, %v", v, err)
	}
	if _, err := param.New(Params(), []string{"connections=17"}); err == nil {
		t.Error("17 connections: no error")
	}
}
