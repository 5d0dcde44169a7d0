package transport

import (
	"context"
	"errors"
	"testing"

	"memsync/strategies/region"
	"memsync/strategies/storetest"
)

// TestVersion: a writer's own writes are no changes to it, from whatever
// connection; all others' are, and what the store notices by itself.
func TestVersion(t *testing.T) {
	s := &noticing{Store: storetest.New(make([]byte, 10))}
	l := NewLeases(One{Name: "r", Store: s})
	export, err := l.Open("r" + VersionSuffix)
	if err != nil {
		t.Fatal(err)
	}
	at := func(epoch uint32) region.Version {
		t.Helper()
		v, err := ReadVersion(t.Context(), export, epoch)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	grant := func(writer string) *Grant {
		t.Helper()
		g, err := l.Lease("r", writer)
		if err != nil {
			t.Fatal(err)
		}
		return g
	}
	write := func(g *Grant) {
		t.Helper()
		end, err := g.Begin()
		if err != nil {
			t.Fatal(err)
		}
		end()
	}
	first := at(0)
	if first.Instance == 0 || !first.Same(at(0)) {
		t.Errorf("%+v, and then %+v, with nothing in between", first, at(0))
	}
	foreign := grant("")
	end, err := foreign.Begin()
	if err != nil {
		t.Fatal(err)
	}
	during := at(0)
	end()
	if during.Same(first) || at(0).Same(during) || at(0).Age > 1e9 {
		t.Error("a write counts as it begins, and as it ends")
	}
	a, beside := grant("a"), grant("a")
	mine, readers := at(a.Epoch()), at(0)
	write(a)
	write(beside)
	if !at(a.Epoch()).Same(mine) {
		t.Error("the writer's own writes are changes to it")
	}
	if at(0).Same(readers) {
		t.Error("a writer's writes are no change to a reader")
	}
	a.End()
	beside.End()
	b := grant("b")
	if !at(a.Epoch()).Same(mine) {
		t.Error("a new writer who did not write is a change")
	}
	write(b)
	if at(a.Epoch()).Same(mine) {
		t.Error("what the next writer wrote is no change to the one before")
	}
	b.End()
	c := grant("c")
	mine = at(c.Epoch())
	s.v.Changes++
	if at(c.Epoch()).Same(mine) {
		t.Error("a change past the store is none")
	}
	for range maxEpochs + 1 {
		c.End()
		c = grant(c.writer + "x")
		write(c)
	}
	if n := len(l.of("r").byEpoch); n > maxEpochs {
		t.Errorf("%d writers are remembered", n)
	}
	// Another life of the source: only the state of the store says that all is as it was.
	s.v.State = 7
	before := at(0)
	l = NewLeases(One{Name: "r", Store: s})
	if export, err = l.Open(VersionSuffix); err != nil {
		t.Fatal(err)
	}
	if !at(0).Same(before) {
		t.Error("the same state in another life is a change")
	}
	s.v.State = 8
	if at(0).Same(before) {
		t.Error("another state in another life is no change")
	}
	s.v.State, before.State = 0, 0
	if at(0).Same(before) {
		t.Error("unknown states are the same")
	}
}

// noticing is a store that says what it noticed.
type noticing struct {
	region.Store
	v region.Version
}

func (n *noticing) Version(context.Context) (region.Version, error) { return n.v, nil }

// TestVersionExport: what is no whole record is refused, and so are writes.
func TestVersionExport(t *testing.T) {
	l := NewLeases(One{Name: "r", Store: storetest.New(make([]byte, 10))})
	s, err := l.Open("r" + VersionSuffix)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ off, n int64 }{{0, 31}, {1, 32}, {0, 64}, {s.Size(), 32}, {-32, 32}} {
		if err := s.ReadAt(t.Context(), make([]byte, c.n), c.off); !errors.Is(err, region.ErrOutOfRange) {
			t.Errorf("%d bytes at %d: %v", c.n, c.off, err)
		}
	}
	if err := s.WriteAt(t.Context(), make([]byte, 32), 0); !errors.Is(err, region.ErrReadOnly) {
		t.Error(err)
	}
	if _, err := ReadVersion(t.Context(), storetest.New(make([]byte, 99)), 0); !errors.Is(err, region.ErrMismatch) {
		t.Errorf("an export that is none: %v", err)
	}
	for _, name := range []string{"other" + VersionSuffix, "r" + VersionSuffix + VersionSuffix} {
		if _, err := l.Open(name); !errors.Is(err, region.ErrMissing) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
