package results

import (
	"cmp"
	"errors"
	"iter"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/montanaflynn/stats"
	"gonum.org/v1/gonum/stat/distuv"
)

// Delta is how one metric of one cell differs between two sets of records.
type Delta struct {
	Cell     Row // columns of the cell, as the new records have them; metric and unit
	Old, New Summary
	Better   Better

	// Change estimates new/old - 1: the Hodges-Lehmann estimate on logarithms,
	// with its 95 % confidence interval, the one that belongs to P. Absent where a
	// value is not positive; the interval also where there are too few runs for one.
	Change, ChangeLow, ChangeHigh Number
	// P is the two-sided p of the Mann-Whitney test, exact, also with ties, up to
	// 60 runs; absent where one side has no value.
	P Number
}

// Worse reports whether the change is a regression: significant at level alpha,
// in the worse direction, and of at least threshold (0.05 is 5 %).
func (d Delta) Worse(alpha, threshold float64) bool { return d.moved(alpha, threshold) < 0 }

// Improved is the opposite of Worse.
func (d Delta) Improved(alpha, threshold float64) bool { return d.moved(alpha, threshold) > 0 }

// moved returns +1 for a change for the better, -1 for one for the worse, else 0.
func (d Delta) moved(alpha, threshold float64) int {
	p, ok := d.P.Get()
	change, known := d.Change.Get()
	if !ok || !known || p >= alpha || math.Abs(change) < threshold || change == 0 {
		return 0
	}
	if (change > 0) == (d.Better == Higher) {
		return 1
	}
	return -1
}

// Broken is a cell that has runs which are ok in one of two sets of records only.
type Broken struct {
	Cell   Row
	Status Status // of the other side's first run that is not ok; empty where it has no such cell
	Error  string
}

// Comparison is what differs between two sets of records.
type Comparison struct {
	Deltas []Delta
	// Lost are cells that were ok in the old records and have no run that is ok
	// in the new ones; Gained the reverse.
	Lost, Gained []Broken
	// Corrupt are cells of the new records with a run that read a wrong byte.
	Corrupt []Row
}

// Regressions returns the deltas that are worse (see Delta.Worse).
func (c Comparison) Regressions(alpha, threshold float64) []Delta {
	var out []Delta
	for _, d := range c.Deltas {
		if d.Worse(alpha, threshold) {
			out = append(out, d)
		}
	}
	return out
}

// GeoMean returns the geometric mean of the median ratios new/old of a metric,
// minus 1, over all cells that have both; absent where there is none.
func (c Comparison) GeoMean(metric string) Number {
	var ratios []float64
	for _, d := range c.Deltas {
		old, new := d.Old.Median.Float(), d.New.Median.Float()
		if d.Cell.Metric == metric && old > 0 && new > 0 {
			ratios = append(ratios, new/old)
		}
	}
	g, err := stats.GeometricMean(ratios)
	if err != nil {
		return Number{}
	}
	return Num(g - 1)
}

// Compare sets the runs of new against those of old, cell by cell, for the
// metrics that want accepts and that have a better direction. Cells are the same
// when all their columns agree but the kernel's release and the params that only
// one side knows; a lab kernel's runs are never set against a machine's own.
//
// Every cell is tested on its own, without a correction for their number: at
// level alpha about that share of cells that did not change will seem to have.
func Compare(old, new []Row, want func(figure, metric string) bool) (Comparison, error) {
	if len(old) == 0 || len(new) == 0 {
		return Comparison{}, errors.New("compare records: one side has no closed run")
	}
	common := commonParams(old, new)
	a, b := cellsOf(old, common), cellsOf(new, common)
	var out Comparison
	both := 0
	for _, key := range b.order {
		n, o := b.cells[key], a.cells[key]
		if n.corrupt {
			out.Corrupt = append(out.Corrupt, n.first)
		}
		switch {
		case o == nil || o.ok == 0:
			if n.ok > 0 {
				out.Gained = append(out.Gained, broken(n.first, o))
			}
			continue
		case n.ok == 0:
			continue // below, as lost
		}
		both++
		for _, m := range metrics {
			x, y := o.values[m.Name], n.values[m.Name]
			if m.Better == Neither || len(x) == 0 || len(y) == 0 || !want(n.first.Figure, m.Name) {
				continue
			}
			d := difference(x, y)
			d.Cell, d.Better = n.first, m.Better
			d.Cell.Metric, d.Cell.Unit = m.Name, m.Unit
			out.Deltas = append(out.Deltas, d)
		}
	}
	for _, key := range a.order {
		o, n := a.cells[key], b.cells[key]
		if o.ok > 0 && (n == nil || n.ok == 0) {
			out.Lost = append(out.Lost, broken(o.first, n))
		}
	}
	if both == 0 && len(out.Lost) == 0 {
		return out, errors.New("compare records: no cell of one side is in the other")
	}
	return out, nil
}

func broken(cell Row, other *sample) Broken {
	b := Broken{Cell: cell}
	if other != nil {
		b.Status, b.Error = other.bad.Status, other.bad.Error
	}
	return b
}

// sample is what the runs of a cell gave.
type sample struct {
	first   Row
	ok      int
	corrupt bool
	bad     Row // the first that is not ok
	values  map[string][]float64
}

type samples struct {
	cells map[string]*sample
	order []string
}

// commonParams returns, by strategy, the params that rows of both sides have. A
// version that has learnt a parameter has it at the old behaviour by default, so
// what one side does not know does not tell cells apart.
func commonParams(old, new []Row) map[string]map[string]bool {
	keys := func(rows []Row) map[string]map[string]bool {
		m := map[string]map[string]bool{}
		for _, r := range rows {
			if m[r.Strategy] == nil {
				m[r.Strategy] = map[string]bool{}
			}
			for k := range paramsOf(r) {
				m[r.Strategy][k] = true
			}
		}
		return m
	}
	a, b := keys(old), keys(new)
	for strategy, m := range a {
		maps.DeleteFunc(m, func(k string, _ bool) bool { return !b[strategy][k] })
	}
	return a
}

func cellsOf(rows []Row, params map[string]map[string]bool) samples {
	s := samples{cells: map[string]*sample{}}
	for _, r := range rows {
		c := r
		c.Kernel = "machine"
		if strings.HasPrefix(r.Kernel, "lab") {
			c.Kernel = "lab"
		}
		var known []string
		for k, v := range paramsOf(r) {
			if params[r.Strategy][k] {
				known = append(known, k+"="+v)
			}
		}
		c.Params = strings.Join(known, ";")
		key := c.CellKey()
		cell := s.cells[key]
		if cell == nil {
			cell = &sample{first: r, values: map[string][]float64{}}
			s.cells[key] = cell
			s.order = append(s.order, key)
		}
		v, has := r.Value.Get()
		switch {
		case r.Status != StatusOK:
			cell.corrupt = cell.corrupt || r.Status == StatusCorrupt
			if cell.bad.Status == "" {
				cell.bad = r
			}
		case r.Metric == RunMetric:
			cell.ok++
		case has:
			cell.values[r.Metric] = append(cell.values[r.Metric], v)
		}
	}
	return s
}

// difference compares two samples, neither of them empty.
func difference(x, y []float64) Delta {
	d := Delta{Old: Summarize(x), New: Summarize(y), P: Num(mannWhitney(x, y))}
	if slices.Min(x) <= 0 || slices.Min(y) <= 0 {
		return d
	}
	diffs := make([]float64, 0, len(x)*len(y))
	for _, a := range x {
		for _, b := range y {
			diffs = append(diffs, math.Log(b)-math.Log(a))
		}
	}
	slices.Sort(diffs)
	mid, _ := stats.Median(diffs) // fails for an empty sample only
	d.Change = Num(math.Expm1(mid))
	if k := shiftRank(len(x), len(y)); k > 0 {
		d.ChangeLow, d.ChangeHigh = Num(math.Expm1(diffs[k-1])), Num(math.Expm1(diffs[len(diffs)-k]))
	}
	return d
}

// exactLimit is the most values, of both samples together, for which the null
// distribution is counted out; its cost grows with the fourth power.
const exactLimit = 60

// mannWhitney returns the two-sided p of the Mann-Whitney-Wilcoxon test: the
// share of all ways to divide the values into samples of these sizes whose rank
// sum lies at least as far from its mean. Ties have their mean rank. Above
// exactLimit values it is the normal approximation with the correction for ties.
// Source: Hollander, Wolfe and Chicken, Nonparametric Statistical Methods, section 4.1.
func mannWhitney(x, y []float64) float64 {
	ranks, sum := doubledRanks(x, y)
	n, m := len(x), len(y)
	mean := n * (n + m + 1) // of the doubled rank sum
	far := sum - mean
	if far < 0 {
		far = -far
	}
	if n+m > exactLimit {
		return normalP(ranks, n, m, far)
	}
	var all, extreme float64
	for s, ways := range rankSums(ranks, n) {
		all += ways
		if s-mean >= far || mean-s >= far {
			extreme += ways
		}
	}
	return min(1, extreme/all)
}

func normalP(ranks []int, n, m, far int) float64 {
	var variance float64 // of the ranks, doubled
	mean := float64(n + m + 1)
	for _, r := range ranks {
		variance += (float64(r) - mean) * (float64(r) - mean)
	}
	nf, mf := float64(n), float64(m)
	sd := math.Sqrt(nf * mf / ((nf + mf) * (nf + mf - 1)) * variance)
	if sd == 0 {
		return 1
	}
	z := max(0, float64(far)-1) / sd // a step of the doubled sum is 2, half of it the continuity correction
	return min(1, 2*distuv.UnitNormal.Survival(z))
}

// doubledRanks ranks both samples together; it returns all ranks, doubled so
// that mean ranks are whole, and the sum of those of x.
func doubledRanks(x, y []float64) (ranks []int, sum int) {
	type value struct {
		v   float64
		inX bool
	}
	all := make([]value, 0, len(x)+len(y))
	for _, v := range x {
		all = append(all, value{v, true})
	}
	for _, v := range y {
		all = append(all, value{v, false})
	}
	slices.SortFunc(all, func(a, b value) int { return cmp.Compare(a.v, b.v) })
	for i := 0; i < len(all); {
		j := i
		for j < len(all) && all[j].v == all[i].v {
			j++
		}
		for k := i; k < j; k++ {
			ranks = append(ranks, i+j+1) // twice the mean of i+1 .. j
			if all[k].inX {
				sum += i + j + 1
			}
		}
		i = j
	}
	return ranks, sum
}

// rankSums returns, by sum, in how many ways n of ranks have it.
func rankSums(ranks []int, n int) []float64 {
	total := 0
	for _, r := range ranks {
		total += r
	}
	ways := make([][]float64, n+1)
	for k := range ways {
		ways[k] = make([]float64, total+1)
	}
	ways[0][0] = 1
	reach := 0
	for _, r := range ranks {
		reach += r
		for k := n; k > 0; k-- {
			for s := reach; s >= r; s-- {
				ways[k][s] += ways[k-1][s-r]
			}
		}
	}
	return ways[n]
}

// shiftRank returns the k for which the k-th smallest and largest of the n*m
// differences bound the shift with at least 95 %, or 0 (Hollander, Wolfe and
// Chicken, section 4.3).
func shiftRank(n, m int) int {
	if n+m > exactLimit {
		nf, mf := float64(n), float64(m)
		return max(0, int(nf*mf/2-distuv.UnitNormal.Quantile(0.975)*math.Sqrt(nf*mf*(nf+mf+1)/12)))
	}
	ranks := make([]int, n+m)
	for i := range ranks {
		ranks[i] = i + 1
	}
	var all, below float64
	ways := rankSums(ranks, n)
	for _, w := range ways {
		all += w
	}
	k := 0
	for s := n * (n + 1) / 2; ; s++ { // the smallest rank sum: no difference below 0
		below += ways[s]
		if 2*below > 0.05*all {
			return k
		}
		k++
	}
}

// Columns returns what tells the cells of the comparison apart: the strategy, and
// the cell columns and params (as "params.NAME") that differ between the cells of
// one strategy. Each is a column for Row.Get.
func (c Comparison) Columns() []string {
	byStrategy := map[string][]Row{}
	add := func(r Row) { byStrategy[r.Strategy] = append(byStrategy[r.Strategy], r) }
	for _, d := range c.Deltas {
		add(d.Cell)
	}
	for _, b := range slices.Concat(c.Lost, c.Gained) {
		add(b.Cell)
	}
	for _, r := range c.Corrupt {
		add(r)
	}
	varies := map[string]bool{}
	for _, rows := range byStrategy {
		for name := range Varying(rows, "kernel", "params") {
			varies[name] = true
		}
		seen := map[string]string{}
		for _, r := range rows {
			for k, v := range paramsOf(r) {
				if first, ok := seen[k]; ok && first != v {
					varies["params."+k] = true
				} else {
					seen[k] = v
				}
			}
		}
	}
	out := []string{"strategy"}
	for _, col := range columns {
		if varies[col.Name] {
			out = append(out, col.Name)
			delete(varies, col.Name)
		}
	}
	return append(out, slices.Sorted(maps.Keys(varies))...)
}

// paramsOf yields the params of a row.
func paramsOf(r Row) iter.Seq2[string, string] {
	return func(yield func(string, string) bool) {
		for kv := range strings.SplitSeq(r.Params, ";") {
			if k, v, ok := strings.Cut(kv, "="); ok && !yield(k, v) {
				return
			}
		}
	}
}
