package plots

import (
	"math"
	"testing"
)

// A density has the area 1, and none of it below the least value.
func TestKDE(t *testing.T) {
	for name, sample := range map[string][]float64{
		"near 0":     {0.1, 0.2, 0.3, 2, 5, 9},
		"at 0":       {0, 0, 1},
		"far from 0": {100, 101, 103, 104},
	} {
		for _, least := range []float64{0, math.Inf(-1)} {
			curve := kde(sample, least)
			area := 0.0
			for i, p := range curve {
				if p.x < least {
					t.Errorf("%s: density at %v, below %v", name, p.x, least)
				}
				if i > 0 {
					area += (p.x - curve[i-1].x) * (p.y + curve[i-1].y) / 2
				}
			}
			if math.Abs(area-1) > 0.01 {
				t.Errorf("%s, least %v: area %v, want 1", name, least, area)
			}
		}
	}
	if kde([]float64{3, 3}, 0) != nil {
		t.Error("a sample without spread has a density")
	}
}
