package managed_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"memsync/strategies"
	"memsync/strategies/managed"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/storetest"
	"memsync/strategies/transport"
	"memsync/strategies/transport/nbd"
)

// served is a source across a pipe, which notices changes past it.
type served struct {
	*storetest.Faulty
	content *storetest.Bytes
	changes atomic.Uint64
	exports transport.Exports
	ctx     context.Context
	wg      sync.WaitGroup
}

func serve(t *testing.T, size int64) *served {
	content := storetest.Seeded(region.Content{Seed: 21}, size)
	s := &served{Faulty: storetest.NewFaulty(content), content: content}
	s.restart()
	ctx, cancel := context.WithCancel(context.Background())
	s.ctx = ctx
	t.Cleanup(func() {
		cancel()
		s.wg.Wait()
	})
	return s
}

// restart makes it another life of the source.
func (s *served) restart() { s.exports = transport.NewLeases(transport.One{Name: "region", Store: s}) }

// Version implements region.Versioner.
func (s *served) Version(context.Context) (region.Version, error) {
	return region.Version{Changes: s.changes.Load(), Age: time.Hour}, nil
}

// Close is the transport's, which never calls it.
func (s *served) Close() error { return nil }

// Dial implements transport.Dialer.
func (s *served) Dial(context.Context) (net.Conn, error) {
	ours, theirs := net.Pipe()
	s.wg.Go(func() { _ = managed.Strategy{}.Serve(s.ctx, &nbd.Transport{}, theirs, s.exports, param.Values{}) })
	return ours, nil
}

func (s *served) open(ctx context.Context, name, writer string) (region.Store, error) {
	return (&nbd.Transport{}).Open(ctx, transport.DialFunc(s.Dial), transport.Options{Name: name, Connections: 1, Writer: writer, ReadOnly: writer == ""})
}

// there is the way to it for one daemon.
type there struct {
	*served
	writer string
}

func (r there) Open(ctx context.Context) (region.Store, error) {
	return r.open(ctx, "region", r.writer)
}
func (r there) OpenBeside(ctx context.Context, suffix string, _ bool) (region.Store, error) {
	return r.open(ctx, "region"+suffix, "")
}

// daemon mounts as a host of its own.
func (s *served) daemon(t *testing.T, o strategies.Options) (strategies.Mount, error) {
	return patiently(t, func(ctx context.Context) (strategies.Mount, error) {
		return managed.Strategy{}.Mount(ctx, there{s, fmt.Sprint("host ", rand.Uint64())}, o)
	})
}

// patiently opens as a writer: the source may not have noticed yet that the one before has left.
func patiently[T any](t *testing.T, open func(context.Context) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		v, err := open(ctx)
		if !errors.Is(err, region.ErrNotPermitted) || ctx.Err() != nil {
			return v, err
		}
		time.Sleep(time.Millisecond)
	}
}

// TestRecoverOntoChange: what an earlier mount could not push is pushed by the
// next one onto the content that it belongs to, and onto no other.
func TestRecoverOntoChange(t *testing.T) {
	const size = 300_000
	for _, c := range []struct {
		name    string
		between func(t *testing.T, s *served)
		setting string
		refused bool
		pushed  bool
	}{
		{"nothing", func(*testing.T, *served) {}, "", false, true},
		{"another program", func(_ *testing.T, s *served) { s.changes.Add(1) }, "", true, false},
		{"another program, ignored", func(_ *testing.T, s *served) { s.changes.Add(1) }, "on_change=ignore", false, true},
		{"another program, discarded", func(_ *testing.T, s *served) { s.changes.Add(1) }, "recover=discard", false, false},
		{"another writer", func(t *testing.T, s *served) {
			w, err := patiently(t, func(ctx context.Context) (region.Store, error) { return s.open(ctx, "region", "another") })
			if err == nil {
				err = errors.Join(w.WriteAt(t.Context(), []byte("another"), 250_000), w.Close())
			}
			if err != nil {
				t.Fatal(err)
			}
		}, "", true, false},
		{"a restart in memory", func(_ *testing.T, s *served) { s.restart() }, "", true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := serve(t, size)
			dir := t.TempDir()
			o := options(t, "cache_dir="+dir, "push_interval=1h")
			o.PushWorkers = 0
			m, err := s.daemon(t, o)
			if err != nil {
				t.Fatal(err)
			}
			s.Fail(storetest.Write, errors.New("no"), 0) // a daemon that was killed pushes nothing either (chunk.TestKilled)
			cmd := exec.Command("dd", "of="+m.Attachment().Path, "bs=4", "seek=17500", "conv=notrunc", "status=none")
			cmd.Stdin = strings.NewReader("ours")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if err := m.Close(t.Context()); err == nil {
				t.Fatal("Close says that all was pushed")
			}
			s.Pass(storetest.Write)
			c.between(t, s)
			before := s.content.Snapshot()
			settings := []string{"cache_dir=" + dir}
			if c.setting != "" {
				settings = append(settings, c.setting)
			}
			for range 2 { // the second attempt is no different, where the first was refused
				m, err = s.daemon(t, options(t, settings...))
				if c.refused != errors.Is(err, region.ErrMismatch) {
					t.Fatalf("Mount: %v, want refused: %t", err, c.refused)
				}
				if err == nil {
					if err := m.Close(t.Context()); err != nil {
						t.Fatal(err)
					}
					break
				}
			}
			want := before
			if c.pushed {
				copy(want[70000:], "ours")
			}
			if got := s.content.Snapshot(); !bytes.Equal(got, want) {
				t.Errorf("the source has not what it should: pushed is to be %t", c.pushed)
			}
		})
	}
}
