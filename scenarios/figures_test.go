package scenarios

import (
	"errors"
	"testing"
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
