package results

import (
	"math"
	"slices"
	"strings"
)

// Drift is how one metric moved between the first half of a sweep and the second. Runs
// are shuffled, so on a machine that stays the same it does not move.
type Drift struct {
	Metric        string `json:"metric"`
	First, Second int    `json:"-"` // runs of each half
	// Change is the median of second/first - 1 over all pairs of runs of the same cell.
	Change Number `json:"change"`
	// P is that of the Mann-Whitney test of the halves, each run by its cell's median.
	P Number `json:"p"`
}

// Disturbed reports whether the machine was not the same in both halves: a change of at
// least 5 % that is no accident (p below 1 %).
func (d Drift) Disturbed() bool {
	p, ok := d.P.Get()
	change, known := d.Change.Get()
	return ok && known && p < 0.01 && math.Abs(change) >= 0.05
}

// Drifts compares the halves of a sweep, metric by metric: those that want accepts, and
// all yardsticks. Cells with one run, and metrics without a positive median, say nothing.
func Drifts(rows []Row, want func(figure, metric string) bool) []Drift {
	type key struct{ cell, metric string }
	type value struct {
		order int
		v     float64
	}
	cells := map[key][]value{}
	var orders []int
	for _, r := range rows {
		if r.Status != StatusOK {
			continue
		}
		if r.Metric == RunMetric {
			orders = append(orders, r.Order)
			continue
		}
		v, ok := r.Value.Get()
		if !ok || !want(r.Figure, r.Metric) && !yardstick(r.Metric) {
			continue
		}
		k := key{r.CellKey(), r.Metric}
		cells[k] = append(cells[k], value{r.Order, v})
	}
	if len(orders) == 0 {
		return nil
	}
	slices.Sort(orders)
	half := orders[len(orders)/2]
	first, second, ratios := map[string][]float64{}, map[string][]float64{}, map[string][]float64{}
	for k, vs := range cells {
		var all []float64
		for _, v := range vs {
			all = append(all, v.v)
		}
		median := Summarize(all).Median.Float()
		if len(vs) < 2 || !(median > 0) {
			continue
		}
		for _, v := range vs {
			if v.order >= half {
				second[k.metric] = append(second[k.metric], v.v/median)
				continue
			}
			first[k.metric] = append(first[k.metric], v.v/median)
			for _, w := range vs {
				if w.order >= half && v.v > 0 {
					ratios[k.metric] = append(ratios[k.metric], w.v/v.v)
				}
			}
		}
	}
	var out []Drift
	for _, m := range metrics {
		a, b := first[m.Name], second[m.Name]
		if len(a) == 0 || len(b) == 0 {
			continue
		}
		change := Summarize(ratios[m.Name]).Median.Float() - 1
		out = append(out, Drift{m.Name, len(a), len(b), Num(change), Num(mannWhitney(a, b))})
	}
	return out
}

// yardstick reports whether a metric measures the machine and not a strategy.
func yardstick(metric string) bool { return strings.HasPrefix(metric, "floor_") }
