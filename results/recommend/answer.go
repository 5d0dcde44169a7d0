package recommend

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"memsync/results"
)

// ErrNoData says that no record can answer.
var ErrNoData = errors.New("the records cannot tell")

// Confidence says how much an answer rests on.
type Confidence string

// The confidences.
const (
	High   Confidence = "high"   // measured around what was asked for, and told apart from the others
	Medium Confidence = "medium" // measured around it, but with too few runs, or not told apart
	Low    Confidence = "low"    // measured elsewhere, or nothing to compare with
)

// Option is a strategy with what is known of it at the point asked for.
type Option struct {
	Strategy string         `json:"strategy"`
	Device   string         `json:"device"`
	Settings string         `json:"settings"` // what its runs had, where others of the strategy had something else; else empty
	Median   results.Number `json:"median"`   // of the goal's metric, in its unit; interpolated
	CILow    results.Number `json:"ci_low"`   // the 95 % intervals' ends, interpolated alike; absent where a cell has too few runs for one
	CIHigh   results.Number `json:"ci_high"`
	N        int            `json:"n"`        // runs of the cell with fewest
	Needs    []string       `json:"needs"`    // features
	Missing  []string       `json:"missing"`  // of these, those that the host lacks
	Tied     bool           `json:"tied"`     // the runs do not tell it apart from the best
	Fits     bool           `json:"fits"`     // within what was asked for (max downtime)
	AtLeast  bool           `json:"at_least"` // some runs did not get to the end in their time, and count as that long
	from     *cell
}

// Reason is why something is no option.
type Reason struct {
	Strategy string `json:"strategy"`
	Why      string `json:"why"`
}

// Cell is a measured place that the answer rests on.
type Cell struct {
	RTTms  float64 `json:"rtt_ms"`
	Rate   float64 `json:"rate_mbit"` // 0 is unlimited
	Size   float64 `json:"region_mib"`
	Other  string  `json:"other"` // further axes
	Weight float64 `json:"weight"`
}

// Answer is a recommendation, and what it rests on.
type Answer struct {
	Goal       Goal       `json:"goal"`
	Unit       string     `json:"unit"`
	Figure     string     `json:"figure"` // whose runs it rests on
	Access     string     `json:"access"` // theirs
	Lab        bool       `json:"lab"`    // they were made in the lab kernel
	Best       string     `json:"best"`   // strategy; empty where none can be used
	Confidence Confidence `json:"confidence"`
	Caveats    []string   `json:"caveats"` // why it is not more
	Cells      []Cell     `json:"cells"`
	Ranking    []Option   `json:"ranking"` // best first, a line a strategy
	Excluded   []Reason   `json:"excluded"`
	WhatIf     []string   `json:"what_if"` // what a feature that is missing would change
}

// Late reports whether there are strategies that can be used, and none that keeps to the limit.
func (a Answer) Late() bool {
	return a.Best == "" && slices.ContainsFunc(a.Ranking, func(o Option) bool { return len(o.Missing) == 0 && !o.Fits })
}

// From answers a from the records rows. The scenario (figure, access pattern and other
// conditions) whose cells are nearest decides alone, so that only strategies that did
// the same are compared. It returns ErrNoData where none can answer.
func From(rows []results.Row, a Ask) (Answer, error) {
	if err := a.Check(); err != nil {
		return Answer{}, err
	}
	out, err := from(rows, a, a.Goal())
	if errors.Is(err, ErrNoData) && a.Goal().bounded {
		first := err
		if out, err = from(rows, a, pace); err != nil {
			return Answer{}, first
		}
		out.lower(Medium, "no strategy read all of a region in its time there: compared by their pace")
	}
	return out, err
}

func from(rows []results.Row, a Ask, goal Goal) (Answer, error) {
	axes := a.axes()
	all := scenarios(rows, a, axes, goal)
	var best *scenario
	least := math.Inf(1)
	for _, s := range all {
		if d := s.distance(a, axes); d < least || d == least && s.figure < best.figure {
			best, least = s, d
		}
	}
	if best == nil {
		return Answer{}, fmt.Errorf("%w: no run of op %s has %s", ErrNoData, strings.Join(goal.Ops, " or "), goal.Metric)
	}
	out := best.answer(a, axes)
	if !slices.ContainsFunc(out.Ranking, func(o Option) bool { return !o.AtLeast }) {
		return Answer{}, fmt.Errorf("%w: in figure %s, the nearest, no strategy has %s at the cells around the question: %s", ErrNoData, best.figure, goal.Metric, reasons(out))
	}
	out.whatIf(all, best, a, axes)
	return out, nil
}

// reasons are why an answer has nothing to rank.
func reasons(a Answer) string {
	var out []string
	for _, o := range a.Ranking {
		out = append(out, o.Strategy+" did not get to the end")
	}
	for _, r := range a.Excluded {
		out = append(out, r.Strategy+": "+r.Why)
	}
	return strings.Join(out, "; ")
}

// distance says how far a scenario is from what was asked for; smaller is better. An
// axis that it does not reach counts 1 and as much again for each doubling; another access pattern 2, or
// half where it is of the same kind; the lab kernel 4; each condition that is not usual,
// such as several threads, 1; and a scenario of one strategy compares nothing.
func (s *scenario) distance(a Ask, axes []axis) float64 {
	d := 0.0
	supports, off := around(s.places, axes, 0)
	for _, o := range off {
		d += 1 + o.distance
	}
	if a.accessed() && s.access != a.Access {
		if d += 2; kind(s.access) == kind(a.Access) {
			d -= 1.5
		}
	}
	if s.lab {
		d += 4
	}
	d += float64(len(s.conditions))
	strategies := map[string]bool{}
	for _, c := range s.candidates {
		if _, ok := s.option(c, supports); ok {
			strategies[strategyOf(c)] = true
		}
	}
	switch len(strategies) {
	case 0:
		d += 16
	case 1:
		d += 8
	}
	return d
}

func kind(access string) string { k, _, _ := strings.Cut(access, ":"); return k }

func strategyOf(candidate string) string { s, _, _ := strings.Cut(candidate, "\x00"); return s }

// option interpolates a candidate between the supports, where it has a value at all of them.
func (s *scenario) option(candidate string, supports []support) (Option, bool) {
	var medians, lows, highs, weights []float64
	o := Option{Strategy: strategyOf(candidate), Needs: []string{}, Missing: []string{}, Fits: true}
	for i, at := range supports {
		c := s.cells[candidate][at.key()]
		if c == nil {
			return o, false
		}
		values := slices.Clone(c.values)
		if budget, ok := results.Quantity(text(c.row, "params.budget")); ok && s.goal.bounded {
			for len(values) < c.runs { // it was over first: so long, or longer
				values, o.AtLeast = append(values, budget), true
			}
		}
		if len(values) == 0 || len(values) < c.runs {
			return o, false
		}
		sum := results.Summarize(values)
		medians, weights = append(medians, sum.Median.Float()), append(weights, at.weight)
		low, ok := sum.CILow.Get()
		if high, _ := sum.CIHigh.Get(); ok {
			lows, highs = append(lows, low), append(highs, high)
		}
		if i == 0 || sum.N < o.N {
			o.N = sum.N
		}
		o.from = c
	}
	o.Device, o.Needs = o.from.row.Device, append(o.Needs, needs(o.from.row)...)
	o.Median = results.Num(mix(medians, weights))
	if len(lows) == len(supports) {
		o.CILow, o.CIHigh = results.Num(mix(lows, weights)), results.Num(mix(highs, weights))
	}
	return o, true
}

// answer ranks the scenario's strategies.
func (s *scenario) answer(a Ask, axes []axis) Answer {
	goal := s.goal
	m, _ := results.MetricByName(goal.Metric)
	out := Answer{Goal: goal, Unit: m.Unit, Figure: s.figure, Access: s.access, Lab: s.lab, Confidence: High,
		Caveats: []string{}, Cells: []Cell{}, Ranking: []Option{}, Excluded: []Reason{}, WhatIf: []string{}}
	supports, off := around(s.places, axes, 0)
	for _, at := range supports {
		c := Cell{RTTms: at.place[0], Rate: at.place[1], Size: at.place[2], Weight: at.weight}
		if c.Rate == unlimited {
			c.Rate = 0
		}
		for i := 3; i < len(axes); i++ {
			c.Other = strings.TrimSpace(fmt.Sprintf("%s %s", axes[i].name, axes[i].text(at.place[i])))
		}
		out.Cells = append(out.Cells, c)
	}
	options := s.options(a, supports)
	for _, o := range options {
		if len(o.Missing) == 0 && o.Fits && !o.AtLeast {
			out.Best = o.Strategy
			break
		}
	}
	out.Ranking = options
	for _, c := range s.candidates {
		name := strategyOf(c)
		if !slices.ContainsFunc(options, func(o Option) bool { return o.Strategy == name }) &&
			!slices.ContainsFunc(out.Excluded, func(r Reason) bool { return r.Strategy == name }) {
			out.Excluded = append(out.Excluded, Reason{name, s.why(name, supports)})
		}
	}
	for _, o := range off {
		out.lower(Low, "%s %s is outside of what was measured: the answer is for %s, the nearest", o.axis.name, o.axis.text(o.axis.at), o.axis.text(o.nearest))
	}
	if a.accessed() && s.access != a.Access {
		out.lower(Low, "access %s was not measured there: the answer is for %s", a.Access, s.access)
	}
	if s.lab {
		out.lower(Low, "measured in the lab kernel, where CPU time costs more")
	}
	if len(s.conditions) > 0 {
		out.lower(Medium, "measured with %s", strings.Join(s.conditions, ", "))
	}
	var usable []Option
	for _, o := range options {
		if len(o.Missing) == 0 {
			usable = append(usable, o)
		}
	}
	switch {
	case len(usable) == 0:
		out.lower(Low, "no strategy that was measured works with the features that there are")
	case len(usable) == 1:
		out.lower(Low, "there is nothing to compare %s with", usable[0].Strategy)
	case usable[1].Tied:
		out.lower(Medium, "the runs do not tell %s", together(usable))
	}
	if len(usable) > 0 && usable[0].N < results.MinCI {
		out.lower(Medium, "%d runs a cell: a confidence interval needs %d", usable[0].N, results.MinCI)
	}
	if a.MaxDowntime > 0 && len(usable) > 0 && out.Best == "" {
		out.lower(Low, "no strategy keeps to a downtime of %.4g s", a.MaxDowntime)
	}
	return out
}

// options are the best of each strategy, best first.
func (s *scenario) options(a Ask, supports []support) []Option {
	var options []Option
	several := map[string]int{}
	for _, c := range s.candidates {
		o, ok := s.option(c, supports)
		if !ok {
			continue
		}
		for _, f := range o.Needs {
			if a.Has != nil && !a.Has(f) {
				o.Missing = append(o.Missing, f)
			}
		}
		if limit := a.MaxDowntime; limit > 0 {
			worst := o.Median.Float()
			if high, ok := o.CIHigh.Get(); ok {
				worst = high
			}
			o.Fits = worst <= limit
		}
		several[o.Strategy]++
		options = append(options, o)
	}
	better := func(a, b Option) int {
		c := cmp.Compare(a.Median.Float(), b.Median.Float())
		if s.goal.higher() {
			c = -c
		}
		unknown := map[bool]int{true: 1}
		return cmp.Or(cmp.Compare(unknown[a.AtLeast], unknown[b.AtLeast]), c, cmp.Compare(a.Strategy, b.Strategy))
	}
	slices.SortStableFunc(options, func(a, b Option) int { // a variant that can be used stands for its strategy
		return cmp.Or(cmp.Compare(min(len(a.Missing), 1), min(len(b.Missing), 1)), better(a, b))
	})
	seen := map[string]bool{}
	options = slices.DeleteFunc(options, func(o Option) bool {
		again := seen[o.Strategy]
		seen[o.Strategy] = true
		return again
	})
	slices.SortStableFunc(options, better)
	first := slices.IndexFunc(options, func(o Option) bool { return len(o.Missing) == 0 })
	for i := range options {
		o := &options[i]
		if several[o.Strategy] > 1 {
			o.Settings = s.apart(*o)
		}
		if first >= 0 && i != first && len(o.Missing) == 0 {
			near, far := o.CILow, options[first].CIHigh
			if s.goal.higher() {
				near, far = options[first].CILow, o.CIHigh
			}
			low, okLow := near.Get()
			high, okHigh := far.Get()
			o.Tied = !okLow || !okHigh || low <= high
		}
	}
	return options
}

// apart names the settings in which o differs from the strategy's other candidates.
func (s *scenario) apart(o Option) string {
	mine := strings.Split(settings(o.from.row), ";")
	mine = append(mine, "device="+o.Device, fmt.Sprintf("chunk=%d", o.from.row.ChunkBytes), fmt.Sprintf("pull_workers=%d", o.from.row.PullWorkers))
	common := map[string]int{}
	n := 0
	for _, c := range s.candidates {
		if strategyOf(c) != o.Strategy {
			continue
		}
		for _, one := range s.cells[c] {
			n++
			for _, kv := range append(strings.Split(settings(one.row), ";"), "device="+one.row.Device, fmt.Sprintf("chunk=%d", one.row.ChunkBytes), fmt.Sprintf("pull_workers=%d", one.row.PullWorkers)) {
				common[kv]++
			}
			break // all cells of a candidate have its settings
		}
	}
	return strings.Join(slices.DeleteFunc(mine, func(kv string) bool { return kv == "" || common[kv] == n }), ";")
}

// why says why a strategy has no value at all of the supports.
func (s *scenario) why(strategy string, supports []support) string {
	for _, at := range supports {
		for _, c := range s.candidates {
			cell := s.cells[c][at.key()]
			switch {
			case strategyOf(c) != strategy || cell == nil:
			case cell.runs > len(cell.values):
				return fmt.Sprintf("%d of %d runs have no %s, at RTT %g ms", cell.runs-len(cell.values), cell.runs, s.goal.Metric, at.place[0])
			case cell.runs == 0 && cell.failed.Error != "":
				return string(cell.failed.Status) + ": " + cell.failed.Error
			}
		}
	}
	return "was not measured at all of these places"
}

// whatIf says of features that are missing, here or where the runs were made, what they would change.
func (out *Answer) whatIf(all []*scenario, chosen *scenario, a Ask, axes []axis) {
	best := slices.IndexFunc(out.Ranking, func(o Option) bool { return o.Strategy == out.Best })
	said := map[string]bool{}
	for i, o := range out.Ranking {
		with := strings.Join(o.Missing, " and ")
		if with == "" || said[with] { // the best that comes with it has been named
			continue
		}
		said[with] = true
		atLeast := ""
		if o.AtLeast {
			atLeast = "at least "
		}
		switch {
		case o.Fits && !o.AtLeast && (best < 0 || i < best):
			out.WhatIf = append(out.WhatIf, fmt.Sprintf("with %s the answer would be %s: %s%.4g %s", with, o.Strategy, atLeast, o.Median.Float(), out.Unit))
		default:
			out.WhatIf = append(out.WhatIf, fmt.Sprintf("%s would not change the answer: %s has %s%.4g %s", with, o.Strategy, atLeast, o.Median.Float(), out.Unit))
		}
	}
	unlimitedHost := a
	unlimitedHost.Has = nil
	for _, r := range out.Excluded {
		missing := chosen.lacking(r.Strategy)
		if missing == "" {
			continue
		}
		line := fmt.Sprintf("%s was missing where this was measured: whether %s would be the answer with it cannot be told", missing, r.Strategy)
		// The lab kernel has the feature, perhaps: there both were measured alike.
		for _, s := range all {
			if !s.lab || chosen.lab || s.figure != chosen.figure || s.access != chosen.access || out.Best == "" {
				continue
			}
			supports, _ := around(s.places, axes, 0)
			there := s.options(unlimitedHost, supports)
			i := slices.IndexFunc(there, func(o Option) bool { return o.Strategy == r.Strategy })
			j := slices.IndexFunc(there, func(o Option) bool { return o.Strategy == out.Best })
			if i < 0 || j < 0 {
				continue
			}
			verb := "would probably not change the answer"
			if i < j {
				verb = "might change the answer to " + r.Strategy
			}
			line = fmt.Sprintf("%s %s: in the lab kernel %s has %.4g %s, %s %.4g", missing, verb, r.Strategy, there[i].Median.Float(), out.Unit, out.Best, there[j].Median.Float())
		}
		out.WhatIf = append(out.WhatIf, line)
	}
}

// lacking is the device of a strategy whose runs here are all unsupported for want of it; else empty.
func (s *scenario) lacking(strategy string) string {
	device := ""
	for _, c := range s.candidates {
		if strategyOf(c) != strategy {
			continue
		}
		for _, one := range s.cells[c] {
			// What a strategy cannot do on any machine says so by its name.
			if one.failed.Status != results.StatusUnsupported || one.runs > 0 || one.row.Device == "" || strings.Contains(one.failed.Error, "strategy "+strategy) {
				return ""
			}
			device = one.row.Device
		}
	}
	return device
}

// lower takes the confidence down to at most c, and says why.
func (out *Answer) lower(c Confidence, why string, args ...any) {
	if out.Confidence != Low {
		out.Confidence = c
	}
	out.Caveats = append(out.Caveats, fmt.Sprintf(why, args...))
}

// together names the options that are not told apart from the first.
func together(options []Option) string {
	names := []string{options[0].Strategy}
	for _, o := range options[1:] {
		if o.Tied {
			names = append(names, o.Strategy)
		}
	}
	return strings.Join(names[:len(names)-1], ", ") + " and " + names[len(names)-1] + " apart"
}

// text is a value of the axis for people.
func (x axis) text(v float64) string {
	if v == unlimited {
		return "unlimited"
	}
	return strings.TrimSpace(fmt.Sprintf("%.4g %s", v, x.unit))
}
