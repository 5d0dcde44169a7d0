package managed_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"testing"
	"time"

	"memsync/strategies"
	"memsync/strategies/conformance"
	"memsync/strategies/device"
	"memsync/strategies/managed"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/storetest"
)

func TestMain(m *testing.M) { conformance.Main(m) }

type local struct{ region.Store }

func (l local) Open(context.Context) (region.Store, error) { return local{l.Store}, nil }
func (local) Dial(context.Context) (net.Conn, error)       { return nil, region.ErrNotSupported }
func (local) Close() error                                 { return nil }

func options(t *testing.T, settings ...string) strategies.Options {
	t.Helper()
	k, err := device.Get("fuse")
	if err != nil {
		t.Fatal(err)
	}
	if err := k.Probe(); errors.Is(err, region.ErrNotSupported) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	info := managed.Strategy{}.Info()
	v, err := param.New(info.Params, settings)
	if err != nil {
		t.Fatal(err)
	}
	return strategies.Options{Device: "fuse", Chunk: info.DefaultChunk, Dir: t.TempDir(), Params: v}
}

// TestPullFirst: what pull_first asks for is local when Mount returns, also
// without workers, and Stats says so.
func TestPullFirst(t *testing.T) {
	for workers := range 3 {
		for _, want := range []int64{0, 1, 300 << 10, 8 << 20} {
			const size = 2<<20 + 5
			f := storetest.NewFaulty(storetest.Seeded(region.Content{}, size))
			o := options(t, fmt.Sprintf("pull_first=%d", want))
			o.PullWorkers = workers
			m, err := managed.Strategy{}.Mount(t.Context(), local{f}, o)
			if err != nil {
				t.Fatal(err)
			}
			st := m.Stats()
			if st.PreemptiveBytes < min(want, size) || workers == 0 && st.PreemptiveBytes > min(region.RoundUp(want, o.Chunk), size) {
				t.Errorf("%d workers, pull_first=%d: %d bytes were local", workers, want, st.PreemptiveBytes)
			}
			if workers == 0 && want == 0 && f.Count(storetest.Read) != 0 {
				t.Errorf("0 workers read the source %d times", f.Count(storetest.Read))
			}
			if err := m.Close(t.Context()); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestMountFails: a mount that cannot be made says why and leaves nothing.
func TestMountFails(t *testing.T) {
	f := storetest.NewFaulty(storetest.Seeded(region.Content{}, 1<<20))
	bad := errors.New("bad")
	f.Fail(storetest.Read, bad, 0)
	o := options(t, "pull_first=1MiB")
	if _, err := (managed.Strategy{}).Mount(t.Context(), local{f}, o); !errors.Is(err, bad) {
		t.Errorf("Mount: %v, want the source's error", err)
	}
	o = options(t, "cache_kind=file")
	o.Dir += "/missing"
	if _, err := (managed.Strategy{}).Mount(t.Context(), local{f}, o); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Mount: %v, want ErrNotExist", err)
	}
	o = options(t)
	o.Chunk = 5000
	if _, err := (managed.Strategy{}).Mount(t.Context(), local{f}, o); err == nil {
		t.Error("a chunk of 5000 bytes must be refused")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	f.Stall(storetest.Read)
	if _, err := (managed.Strategy{}).Mount(ctx, local{f}, options(t, "pull_first=1MiB")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Mount: %v, want DeadlineExceeded", err)
	}
}
