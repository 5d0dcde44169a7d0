package results

import (
	"cmp"
	"slices"
)

// Contender is one of several that are compared by a metric.
type Contender struct {
	Name string
	Summary
}

// Best sorts all best first, by median and then by name, and returns how many of them
// lead: the first, and those after it that their 95 % intervals do not tell apart from it;
// without intervals nothing is told apart. Those without a median come last and never lead.
func Best(all []Contender, better Better) (lead int) {
	missing := map[bool]int{true: 1}
	slices.SortFunc(all, func(a, b Contender) int {
		x, okX := a.Median.Get()
		y, okY := b.Median.Get()
		c := cmp.Compare(x, y)
		if better == Higher {
			c = -c
		}
		return cmp.Or(cmp.Compare(missing[!okX], missing[!okY]), c, cmp.Compare(a.Name, b.Name))
	})
	for i, o := range all {
		if _, ok := o.Median.Get(); !ok {
			break
		}
		if i == 0 {
			lead = 1
			continue
		}
		near, far := o.CILow, all[0].CIHigh
		if better == Higher {
			near, far = all[0].CILow, o.CIHigh
		}
		low, okLow := near.Get()
		high, okHigh := far.Get()
		if okLow && okHigh && low > high {
			break
		}
		lead++
	}
	return lead
}
