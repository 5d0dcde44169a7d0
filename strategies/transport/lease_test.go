package transport

import (
	"errors"
	"testing"

	"memsync/strategies/region"
	"memsync/strategies/storetest"
)

// TestOpenings: once a writer has opened its region again, what an earlier opening sent
// is refused, however late it comes. Another user of the same writer is not concerned.
func TestOpenings(t *testing.T) {
	l := NewLeases(One{Name: "r", Store: storetest.New(make([]byte, 10))})
	lease := func(id string, n uint64) (*Grant, error) {
		ctx := region.WithOpening(t.Context(), region.Opening{ID: id, N: n})
		return l.Lease("r", WriterOf(ctx, Options{Writer: "a#b"}))
	}
	must := func(g *Grant, err error) *Grant {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return g
	}
	writes := func(g *Grant, want error) {
		t.Helper()
		end, err := g.Begin()
		if !errors.Is(err, want) {
			t.Errorf("a write: %v, want %v", err, want)
		}
		if err == nil {
			end()
		}
	}
	first, beside, other := must(lease("x", 1)), must(lease("x", 1)), must(lease("y", 1))
	for _, g := range []*Grant{first, beside, other} {
		writes(g, nil)
	}
	second := must(lease("x", 2))
	if second.Epoch() != first.Epoch() {
		t.Errorf("epoch %d after %d: it is the same writer", second.Epoch(), first.Epoch())
	}
	writes(first, region.ErrNotPermitted)
	writes(beside, region.ErrNotPermitted)
	writes(second, nil)
	writes(other, nil)
	if _, err := lease("x", 1); !errors.Is(err, region.ErrNotPermitted) {
		t.Errorf("a connection of an earlier opening that comes late: %v", err)
	}
	for _, g := range []*Grant{first, beside, other, second} {
		g.End()
	}
	if _, err := l.Lease("r", "somebody else"); err != nil {
		t.Errorf("after all have gone: %v", err)
	}
	if w, o := splitWriter("plain#name"); w != "plain#name" || o.ID != "" {
		t.Errorf("a name that is no opening: %q %+v", w, o)
	}
}
