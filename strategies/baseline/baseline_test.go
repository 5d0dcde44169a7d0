package baseline

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"testing"

	"memsync/strategies"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/storetest"
)

// here is a Remote with the data on this host.
type here struct{ region.Store }

func (h here) Open(context.Context) (region.Store, error) { return h.Store, nil }
func (h here) Dial(context.Context) (net.Conn, error)     { return nil, region.ErrNotSupported }

func options(t *testing.T, s strategies.Strategy, settings ...string) strategies.Options {
	t.Helper()
	p, err := param.New(s.Info().Params, settings)
	if err != nil {
		t.Fatal(err)
	}
	return strategies.Options{Dir: t.TempDir(), Params: p}
}

func descriptors(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

// TestMount: the attachment's file holds every byte, at all sizes around a page
// and a step, warm and cold; Close leaves no descriptor and no file.
func TestMount(t *testing.T) {
	c := region.Content{Seed: 5}
	for _, s := range []strategies.Strategy{Memory{}, Disk{}} {
		for _, cache := range []string{"warm", "cold"} {
			for _, size := range []int64{1, 4095, 4096, 4097, step - 1, step, step + 1, 3*step + 7} {
				before := descriptors(t)
				o := options(t, s, "cache="+cache)
				m, err := s.Mount(t.Context(), here{storetest.Seeded(c, size)}, o)
				if err != nil {
					t.Fatalf("%s, %s, %d bytes: %v", s.Info().Name, cache, size, err)
				}
				a := m.Attachment()
				got := make([]byte, size)
				if _, err := a.File.ReadAt(got, 0); err != nil || a.Size != size || c.Check(got, 0) != nil {
					t.Errorf("%s, %s: %d of %d bytes are wrong: %v, %v", s.Info().Name, cache, a.Size, size, err, c.Check(got, 0))
				}
				if fi, err := a.File.Stat(); err != nil || fi.Size() != size {
					t.Errorf("%s: the file has %d bytes, want %d: %v", s.Info().Name, fi.Size(), size, err)
				}
				wantKind := strategies.AttachMemfd
				if s == (Memory{}) && cache == "warm" {
					wantKind = strategies.AttachAnonymous
				}
				if a.Kind != wantKind || m.Stats().PreemptiveBytes != size {
					t.Errorf("%s, %s: attach %s, %d bytes are there", s.Info().Name, cache, a.Kind, m.Stats().PreemptiveBytes)
				}
				if err := errors.Join(m.Sync(t.Context()), m.Close(t.Context()), m.Close(t.Context())); err != nil {
					t.Error(err)
				}
				if after := descriptors(t); after != before {
					t.Errorf("%s: %d descriptors before, %d after", s.Info().Name, before, after)
				}
				if files, _ := os.ReadDir(o.Dir); len(files) > 0 {
					t.Errorf("%s leaves %s", s.Info().Name, files[0].Name())
				}
			}
		}
	}
}

func TestMountFails(t *testing.T) {
	broken := errors.New("broken")
	for _, s := range []strategies.Strategy{Memory{}, Disk{}} {
		before := descriptors(t)
		f := storetest.NewFaulty(storetest.New(bytes.Repeat([]byte{1}, 3*step)))
		f.Fail(storetest.Read, broken, 2)
		if _, err := s.Mount(t.Context(), here{f}, options(t, s)); !errors.Is(err, broken) {
			t.Errorf("%s: a source that fails: %v", s.Info().Name, err)
		}
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := s.Mount(ended, here{storetest.New(make([]byte, 10))}, options(t, s)); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: a context that ended: %v", s.Info().Name, err)
		}
		if after := descriptors(t); after != before {
			t.Errorf("%s: %d descriptors before, %d after", s.Info().Name, before, after)
		}
		if err := s.Serve(t.Context(), nil, nil, nil, param.Values{}); !errors.Is(err, region.ErrNotSupported) {
			t.Errorf("%s: Serve: %v", s.Info().Name, err)
		}
	}
	o := options(t, Disk{})
	o.Dir = "/does/not/exist"
	if _, err := (Disk{}).Mount(t.Context(), here{storetest.New([]byte{1})}, o); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("disk in a folder that does not exist: %v", err)
	}
}
