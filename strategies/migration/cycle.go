package migration

import (
	"math"
	"slices"
	"time"

	"memsync/strategies/region"
)

// cycle learns from the rounds when an application is busy and when it is quiet, and
// judges whether now is a good moment to stop it: a naive Bayes classifier over two
// features, where in its period the application is and whether it was busy just now, trained
// with what it has done so far. After "Reducing Virtual Machine Live Migration Overhead via
// Workload Analysis" (Baruchi, Midorikawa, Sato, IEEE Latin America Transactions 2015), which
// also finds cycles in the dirty rate and postpones a migration with a Bayesian classifier.
type cycle struct {
	step  time.Duration // of the cells; an observation a step is best
	begin time.Time     // of the first cell
	bytes []float64     // written in each cell
	end   time.Time     // observed until
}

const (
	maxCells = 4096 // the oldest half goes
	minCells = 12   // before anything is said
	// burst is how many times more the busy class writes than the quiet one, at least.
	burst = 2
	// periodic is the autocorrelation from which a lag is taken for a period.
	periodic = 0.4
	// sure is the probability from which a moment is taken.
	sure = 0.75
)

type verdict int

const (
	unknown      verdict = iota // too little was seen
	steady                      // no quiet phases to wait for
	favourable                  // likely quiet for the whole horizon
	unfavourable                // likely not
)

// add notes that n bytes were written within elapsed until now.
func (c *cycle) add(now time.Time, elapsed time.Duration, n int64) {
	if elapsed <= 0 {
		return
	}
	if c.begin.IsZero() {
		c.begin = now.Add(-elapsed)
	}
	c.end = now
	// Spread over the cells that it lies in.
	from := now.Add(-elapsed).Sub(c.begin)
	for to := now.Sub(c.begin); from < to; {
		i := int(from / c.step)
		upTo := min(to, time.Duration(i+1)*c.step)
		for len(c.bytes) <= i && len(c.bytes) < 2*maxCells {
			c.bytes = append(c.bytes, 0)
		}
		if i < len(c.bytes) {
			c.bytes[i] += float64(n) * float64(upTo-from) / float64(elapsed)
		}
		from = upTo
	}
	if over := len(c.bytes) - maxCells; over > 0 {
		over = max(over, maxCells/2)
		c.bytes = slices.Clone(c.bytes[over:])
		c.begin = c.begin.Add(time.Duration(over) * c.step)
	}
}

// judge says whether the application will be quiet from now on for so long, with how
// probable that is.
func (c *cycle) judge(now time.Time, horizon time.Duration) (verdict, float64) {
	whole := c.bytes
	if !c.begin.IsZero() { // the cell that is not over says little
		whole = whole[:min(len(whole), max(int(c.end.Sub(c.begin)/c.step), 0))]
	}
	n := len(whole)
	if n < minCells {
		return unknown, 0
	}
	busy, ok := classify(whole)
	if !ok {
		return steady, 1
	}
	period := period(whole)
	if period == 0 {
		period = 1 // one phase: what it does now is all that is known
	}
	ahead := max(int((horizon+c.step-1)/c.step), 1)
	// quiet(i): no cell of those that follow i is busy.
	quiet := func(i int) bool { return !slices.Contains(busy[i+1:i+1+ahead], true) }
	last := n - 1
	phase := int(now.Sub(c.begin)/c.step) - 1 // of the last whole cell before now
	phase = max(phase, last) % period
	// counts[class][0]: cells of the class; then of those in our phase, and in our state.
	var counts [2]struct{ all, phase, state float64 }
	for i := 0; i+ahead < n; i++ {
		k := &counts[0]
		if quiet(i) {
			k = &counts[1]
		}
		k.all++
		if i%period == phase {
			k.phase++
		}
		if busy[i] == busy[last] {
			k.state++
		}
	}
	if counts[0].all+counts[1].all == 0 {
		return unknown, 0
	}
	var p [2]float64
	for i, k := range counts { // Laplace's rule, of half a case
		p[i] = (k.all + .5) * (k.phase + .5) / (k.all + .5*float64(period)) * (k.state + .5) / (k.all + 1)
	}
	probability := p[1] / (p[0] + p[1])
	if probability >= sure {
		return favourable, probability
	}
	return unfavourable, probability
}

// scale is how much a cell wrote, by its logarithm: a burst is a matter of factors.
func scale(bytes []float64) []float64 {
	out := make([]float64, len(bytes))
	for i, b := range bytes {
		out[i] = math.Log1p(b / float64(region.PageSize()))
	}
	return out
}

// classify divides cells into busy and quiet ones at the threshold between whose classes
// the variance is greatest (Otsu 1979). It is false where they hardly differ.
func classify(bytes []float64) (busy []bool, ok bool) {
	y := scale(bytes)
	sorted := slices.Sorted(slices.Values(y))
	var all, low float64
	for _, v := range sorted {
		all += v
	}
	n := float64(len(sorted))
	best, threshold, gap := -1.0, 0.0, 0.0
	for i, v := range sorted[:len(sorted)-1] {
		low += v
		if sorted[i+1] == v {
			continue
		}
		k := float64(i + 1)
		below, above := low/k, (all-low)/(n-k)
		if between := k * (n - k) * (above - below) * (above - below); between > best {
			best, threshold, gap = between, (v+sorted[i+1])/2, above-below
		}
	}
	if gap < math.Log(burst) {
		return nil, false
	}
	busy = make([]bool, len(y))
	for i, v := range y {
		busy[i] = v > threshold
	}
	return busy, true
}

// period returns the lag, in cells, at which what was written repeats itself; 0 is none.
func period(bytes []float64) int {
	y := scale(bytes)
	mean := 0.0
	for _, v := range y {
		mean += v / float64(len(y))
	}
	variance := 0.0
	for i := range y {
		y[i] -= mean
		variance += y[i] * y[i] / float64(len(y))
	}
	if variance == 0 {
		return 0
	}
	lags := min(len(y)/2, 1024)
	r := make([]float64, lags+1)
	for lag := 1; lag <= lags; lag++ {
		for i := range y[:len(y)-lag] {
			r[lag] += y[i] * y[i+lag]
		}
		r[lag] /= variance * float64(len(y)-lag)
	}
	if lags < 2 {
		return 0
	}
	greatest := slices.Max(r[2:])
	if greatest < periodic {
		return 0
	}
	for lag := 2; lag <= lags; lag++ { // its multiples are as good
		if r[lag] >= 0.9*greatest && r[lag] >= r[lag-1] && (lag == lags || r[lag] >= r[lag+1]) {
			return lag
		}
	}
	return 0
}
