package conformance

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"memsync/strategies"
	"memsync/strategies/region"
	"memsync/strategies/storetest"
	sourcewatch "memsync/strategies/watch"
)

// TestSecondWriter: while a mount may write, no other host gets one that may,
// and any number reads; afterwards the next writer finds what the first wrote.
func (s suite) TestSecondWriter(t *testing.T) {
	s.need(t, strategies.Leases)
	if s.Transport == nil {
		t.Skip("the daemon holds the source: there is nobody else")
	}
	ctx := within(t)
	source := storetest.Seeded(region.Content{Seed: 11}, 3*s.chunk()+5)
	want := source.Snapshot()
	g := s.mount(t, source, nil)
	another := func(writer string) (strategies.Mount, error) {
		r, o := g.remote, s.options(t, t.TempDir())
		r.writer, o.ReadOnly = writer, writer == ""
		return s.Strategy.Mount(ctx, r, o)
	}
	if m, err := another("another host"); !errors.Is(err, region.ErrNotPermitted) {
		t.Errorf("a second writer: %v, want ErrNotPermitted", err)
		if err == nil {
			_ = m.Close(ctx)
		}
	}
	for range 2 {
		m, err := another("")
		if err != nil {
			t.Fatalf("a reader beside the writer: %v", err)
		}
		defer func() {
			// What the writer writes changes the source behind the reader.
			if err := m.Close(ctx); err != nil && !errors.Is(err, region.ErrMismatch) {
				t.Error(err)
			}
		}()
	}
	region.Content{Seed: 11, Generation: 1}.Fill(want[7:], 7)
	if err := g.write(ctx, want[7:], 7); err != nil {
		t.Fatal(err)
	}
	g.barrier(ctx)
	if err := same(source.Snapshot(), want, 0); err != nil {
		t.Errorf("source after Sync: %v", err)
	}
	g.close(ctx)
	for {
		m, err := another("another host")
		if err == nil {
			if err := m.Close(ctx); err != nil {
				t.Error(err)
			}
			return
		}
		if !errors.Is(err, region.ErrNotPermitted) || ctx.Err() != nil {
			t.Fatalf("the next writer: %v", err)
		}
		time.Sleep(time.Millisecond) // the source may not have noticed yet that the first left
	}
}

// changing is a source that others change, and which notices that.
type changing struct {
	*storetest.Bytes
	changes atomic.Uint64
}

// Version implements region.Versioner.
func (c *changing) Version(context.Context) (region.Version, error) {
	return region.Version{Changes: c.changes.Load(), Age: time.Hour}, nil
}

// change replaces all of the content, as another program would.
func (c *changing) change(ctx context.Context, to []byte) error {
	err := c.Bytes.WriteAt(ctx, to, 0)
	c.changes.Add(1)
	return err
}

// watches leaves the case out where a changed source is not watched for.
func (s suite) watches(t *testing.T, action string) {
	if s.Transport == nil {
		t.Skip("the daemon holds the source: there is nobody else")
	}
	for _, p := range s.Strategy.Info().Params {
		if p.Name == "on_change" && slices.Contains(p.Values, action) {
			return
		}
	}
	t.Skipf("has no on_change=%s", action)
}

// TestSourceChanges: somebody else changes the source behind a mount. It is
// reported, and no byte of after is delivered from then on; nor is any written.
func (s suite) TestSourceChanges(t *testing.T) {
	s.watches(t, sourcewatch.Fail)
	ctx := within(t)
	size := 64*s.chunk() + 4<<20
	source := &changing{Bytes: storetest.Seeded(region.Content{Seed: 12}, size)}
	before := source.Snapshot()
	g := s.mount(t, source, func(o *strategies.Options) { o.PullWorkers = 0 }, "check_interval=5ms", "pull_first=0")
	g.ended = true // Close reports it, too
	g.expect(ctx, before, 0, 3*region.PageSize())
	if s.can(strategies.Writes) {
		copy(before, "ours")
		if err := g.write(ctx, []byte("ours"), 0); err != nil {
			t.Fatal(err)
		}
	}
	after := make([]byte, size)
	region.Content{Seed: 13}.Fill(after, 0)
	if err := source.change(ctx, after); err != nil {
		t.Fatal(err)
	}
	for g.Mount.(strategies.Troubled).Err() == nil && ctx.Err() == nil {
		time.Sleep(time.Millisecond)
	}
	if err := g.Mount.(strategies.Troubled).Err(); !errors.Is(err, region.ErrMismatch) {
		t.Fatalf("the source changed, and Err says %v", err)
	}
	if p, err := g.read(ctx, size-200, 100); s.Eager && err == nil {
		if err := same(p, before[size-200:size-100], size-200); err != nil {
			t.Errorf("what was pulled before the source changed: %v", err)
		}
	} else if !errors.Is(err, errAccess) {
		t.Errorf("read of what was not read before: %v, want an error", err)
	}
	if s.Device != "nbd" { // its page cache may be gone after an error
		g.expect(ctx, before, 0, region.PageSize()) // what was read stays
	}
	if s.can(strategies.Writes) {
		_ = g.toucher.sync(ctx) // may fail by itself
	}
	if err := g.Mount.Sync(ctx); !errors.Is(err, region.ErrMismatch) {
		t.Errorf("Sync: %v, want ErrMismatch", err)
	}
	_ = g.detach(ctx)
	if err := g.Mount.Close(ctx); !errors.Is(err, region.ErrMismatch) {
		t.Errorf("Close: %v, want ErrMismatch", err)
	}
	if err := same(source.Snapshot(), after, 0); err != nil {
		t.Errorf("the mount wrote onto what another had written: %v", err)
	}
}

// TestSourceInvalidates: with on_change=invalidate all bytes are the new ones in the end,
// each word is of some state at any time, and never of an older one than before. (A
// copy of a page may meet the change in the middle, as one of memory that a thread writes.)
func (s suite) TestSourceInvalidates(t *testing.T) {
	s.watches(t, sourcewatch.Invalidate)
	ctx := within(t)
	size := 20*s.chunk() + 5
	source := &changing{Bytes: storetest.Seeded(region.Content{Seed: 12}, size)}
	states := [][]byte{source.Snapshot()}
	g, err := s.tryMount(t, source, func(o *strategies.Options) { o.ReadOnly = true }, "on_change=invalidate", "check_interval=5ms")
	if s.Device == "nbd" { // the kernel's page cache of a block device is not ours to drop
		if !errors.Is(err, region.ErrNotSupported) {
			t.Errorf("Mount: %v, want ErrNotSupported", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	g.expect(ctx, states[0], 0, size)
	const word = 8
	least := make([]int, region.Chunks(size, word)) // the newest state that was seen of each word
	for round := 1; round <= 3; round++ {
		next := make([]byte, size)
		region.Content{Seed: 12, Generation: uint64(round)}.Fill(next, 0)
		states = append(states, next)
		if err := source.change(ctx, next); err != nil {
			t.Fatal(err)
		}
		for fresh := false; !fresh; {
			var got []byte
			for off := int64(0); off < size; off += s.chunk() { // aligned, so that no word is loaded in two parts
				p, err := g.read(ctx, off, int(min(s.chunk(), size-off)))
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, p...)
			}
			fresh = true
			for i := range least {
				lo, hi := int64(i)*word, min(int64(i+1)*word, size)
				state := round
				for state >= 0 && !bytes.Equal(got[lo:hi], states[state][lo:hi]) {
					state--
				}
				if state < least[i] {
					t.Fatalf("word at %d is of state %d, after one of state %d, in round %d", lo, state, least[i], round)
				}
				least[i] = state
				fresh = fresh && state == round
			}
		}
	}
	if n := g.Stats().Extra["source_changes"]; n < 1 {
		t.Errorf("%d changes were noticed", n)
	}
	g.close(ctx)
}

// patchy is a source that cannot read some of its bytes.
type patchy struct {
	*storetest.Bytes
	from, to int64
	mended   atomic.Bool
}

func (p *patchy) ReadAt(ctx context.Context, b []byte, off int64) error {
	if !p.mended.Load() && off < p.to && off+int64(len(b)) > p.from {
		return errInjected
	}
	return p.Bytes.ReadAt(ctx, b, off)
}

// TestOneBadChunk: a source that gives an error for one chunk fails the readers of
// that chunk, and nobody else; when it can read it again, so can they.
func (s suite) TestOneBadChunk(t *testing.T) {
	if s.can(strategies.LocalOnly) || s.can(strategies.Copies) {
		t.Skip("reads all of the source in Mount")
	}
	if s.can(strategies.Migrates) {
		t.Skip("one request of a migration covers chunks beside the one that is asked for")
	}
	ctx := within(t)
	chunk := max(s.chunk(), s.Block)
	size := 64*chunk + 4<<20
	content := storetest.Seeded(region.Content{Seed: 14}, size)
	want := content.Snapshot()
	bad := 32 * chunk
	source := &patchy{Bytes: content, from: bad, to: bad + chunk}
	g := s.mount(t, source, nil, "pull_first=0")
	g.ended = true // a mount may report the error once more when it is closed
	if _, err := g.read(ctx, bad+10, 100); !errors.Is(err, errAccess) {
		t.Errorf("read of the bad chunk: %v, want an error", err)
	}
	for _, off := range []int64{0, bad - chunk, bad - 100, bad + chunk, size - 100} {
		g.expect(ctx, want, off, 100)
	}
	if _, err := g.read(ctx, bad-50, 100); !errors.Is(err, errAccess) {
		t.Errorf("read across the border of the bad chunk: %v, want an error", err)
	}
	source.mended.Store(true)
	if g.Attachment().Kind == strategies.AttachFault && !s.can(strategies.Writes) {
		return // a page that could not be filled stays poisoned in that mapping
	}
	for {
		p, err := g.read(ctx, bad, int(chunk))
		if err == nil {
			if err := same(p, want[bad:bad+chunk], bad); err != nil {
				t.Error(err)
			}
			break
		}
		if !errors.Is(err, errAccess) {
			t.Fatalf("the source can read the chunk again, but the mount cannot: %v", err)
		}
		time.Sleep(time.Millisecond) // a retry may be due first
	}
	g.close(ctx)
}
