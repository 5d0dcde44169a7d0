package scenarios

import (
	"errors"
	"slices"
	"testing"
	"time"

	"memsync/results"
	"memsync/strategies/all"
)

// Every figure can be drawn, and its cells can be asked for.
func TestFigures(t *testing.T) {
	seen := map[string]bool{}
	for _, f := range Figures() {
		if seen[f.Spec.Name] {
			t.Errorf("figure %s is there twice", f.Spec.Name)
		}
		seen[f.Spec.Name] = true
		for _, spec := range append(f.More, f.Spec) {
			if err := spec.Check(); err != nil {
				t.Error(err)
			}
		}
		for _, v := range Variants() {
			if !f.Has(v) {
				continue
			}
			for _, quick := range []bool{true, false} {
				keys := map[string]bool{}
				for _, c := range f.Cells(v, quick) {
					if err := c.Resolve(); errors.Is(err, ErrUsage) {
						t.Errorf("%s, %s: %v", f.Spec.Name, v, err)
					}
					if c.Figure != f.Spec.Name || c.Variant != v {
						t.Errorf("%s, %s: a cell says it is of %s, %s", f.Spec.Name, v, c.Figure, c.Variant)
					}
					if keys[c.Key()] {
						t.Errorf("%s, %s: the same cell twice: %s", f.Spec.Name, v, c.Params())
					}
					keys[c.Key()] = true
				}
			}
		}
	}
}

// TestQuickIsQuick holds the quick form of all figures to what somebody waits for: by the
// estimate, and with 6 runs a cell, well under an hour on two cores, a third of what it would be
// with the full forms' series and sizes.
func TestQuickIsQuick(t *testing.T) {
	var took time.Duration
	for _, f := range Figures() {
		if !f.Has(Network) {
			continue
		}
		for _, c := range f.Cells(Network, true) {
			if err := c.Resolve(); err != nil {
				c.Missing = err
			}
			took += 6 * c.Estimate()
		}
	}
	if took == 0 || took > 55*time.Minute {
		t.Errorf("the quick form of all figures takes about %v", took)
	}
}

// TestAllStrategies: every strategy of the registry is in the figure of all, and every
// series has a cell.
func TestAllStrategies(t *testing.T) {
	f, err := FigureByName(Figures(), "all-strategies")
	if err != nil {
		t.Fatal(err)
	}
	for _, quick := range []bool{false, true} {
		has, sizes, seeds := map[string]bool{}, map[int64]bool{}, map[string]bool{}
		for _, c := range f.Cells(Network, quick) {
			if err := c.Resolve(); errors.Is(err, ErrUsage) {
				t.Error(err)
			}
			sizes[c.Size], seeds[c.Seeds], has[c.Strategy] = true, true, true
			row := c.Row()
			prefetch, err := row.Get("params.prefetch")
			if err != nil {
				t.Fatal(err)
			}
			if key := c.Strategy + "/" + prefetch; !slices.ContainsFunc(f.Spec.Series, func(s results.FigureSeries) bool { return s.Key == key }) {
				t.Errorf("%s is no series", key)
			}
		}
		for _, s := range all.Registry() {
			if !has[s.Info().Name] {
				t.Errorf("strategy %s is not there (quick: %t)", s.Info().Name, quick)
			}
		}
		if len(sizes) != 1 || len(seeds) != 1 || seeds[""] {
			t.Errorf("sizes %v, seeds %v: want one region and one set of seeds", sizes, seeds)
		}
	}
}
