package plots

import (
	"math"
	"strconv"

	"gonum.org/v1/plot"
)

// label writes a tick's value without exponent where that is short.
func label(v float64) string {
	if v != 0 && (math.Abs(v) >= 1e6 || math.Abs(v) < 1e-3) {
		return strconv.FormatFloat(v, 'g', 3, 64)
	}
	return strconv.FormatFloat(math.Round(v*1e6)/1e6+0, 'f', -1, 64) // + 0: no "-0"
}

// linearTicks marks round numbers, about n of them.
type linearTicks int

func (n linearTicks) Ticks(lo, hi float64) []plot.Tick {
	step := math.Pow(10, math.Floor(math.Log10((hi-lo)/float64(n))))
	for _, f := range []float64{1, 2, 5, 10} {
		if step*f*float64(n) >= hi-lo {
			step *= f
			break
		}
	}
	var ticks []plot.Tick
	for i := math.Ceil(lo/step - 1e-9); i*step <= hi+step*1e-9; i++ {
		ticks = append(ticks, plot.Tick{Value: i * step, Label: label(i * step)})
	}
	return ticks
}

// logTicks marks decades, and 2 and 5 in between where the range is short.
type logTicks struct{}

func (logTicks) Ticks(lo, hi float64) []plot.Tick {
	decades := math.Log10(hi / lo)
	every := max(1, int(math.Ceil(decades/7)))
	var ticks []plot.Tick
	for e := int(math.Floor(math.Log10(lo))) - 1; e <= int(math.Ceil(math.Log10(hi))); e++ {
		for m := 1; m <= 9; m++ {
			v := float64(m) * math.Pow(10, float64(e))
			if v < lo*(1-1e-9) || v > hi*(1+1e-9) {
				continue
			}
			t := plot.Tick{Value: v}
			switch {
			case m == 1 && e%every == 0,
				(m == 2 || m == 5) && decades < 2.2,
				m == 3 && decades >= 2.2 && decades < 3.2:
				t.Label = label(v)
			}
			if t.Label != "" || every == 1 {
				ticks = append(ticks, t)
			}
		}
	}
	return ticks
}

// limits returns the range of an axis that shows values: from zero where it is
// linear and nothing is negative, else with a small margin.
func limits(values []float64, log, fromZero bool) (lo, hi float64) {
	lo, hi = math.Inf(1), math.Inf(-1)
	for _, v := range values {
		if log && v <= 0 {
			continue
		}
		lo, hi = min(lo, v), max(hi, v)
	}
	switch {
	case lo > hi:
		return 1, 10
	case log:
		lo, hi = lo/1.25, hi*1.25
		if hi/lo < 4 { // less than that shows noise as if it were a difference
			mid := math.Sqrt(lo * hi)
			lo, hi = mid/2, mid*2
		}
		return lo, hi
	case fromZero && lo >= 0:
		lo = 0
	}
	if hi <= lo {
		hi = lo + max(math.Abs(lo), 1)
	}
	pad := (hi - lo) * 0.05
	if lo != 0 || !fromZero {
		lo -= pad
	}
	return lo, hi + pad
}
