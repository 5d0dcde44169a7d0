package claims

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"gonum.org/v1/gonum/stat"

	"memsync/results"
)

// figureClaim is a sentence about the series of a figure, as thesis.csv writes it
// (README.md tells the columns). Several series or places are separated by "|".
type figureClaim struct {
	figure, kind, relation string
	left                   []string // series
	leftX                  string
	right                  []string // series; or none where it is held against numbers
	want                   []float64
	rightX                 string
	slack                  float64
}

func parseFigureClaim(f map[string]string) (figureClaim, error) {
	c := figureClaim{figure: f["figure"], kind: f["kind"], relation: f["relation"],
		left: strings.Split(f["left_series"], "|"), leftX: f["left_x"], rightX: f["right_x"]}
	switch tolerance := f["tolerance"]; {
	case tolerance == "" || tolerance == "0":
	default:
		v, err := strconv.ParseFloat(strings.TrimSuffix(tolerance, "%"), 64)
		if err != nil || !strings.HasSuffix(tolerance, "%") || v < 0 {
			return c, fmt.Errorf("tolerance %q is no share such as 10%%", tolerance)
		}
		c.slack = v / 100
	}
	if right := f["right_series_or_value"]; right != "" {
		c.right = strings.Split(right, "|")
		for _, r := range c.right {
			v, err := strconv.ParseFloat(r, 64)
			if err != nil {
				c.want = nil
				break
			}
			c.want = append(c.want, v)
		}
		if c.want != nil {
			c.right = nil
		}
	}
	if _, err := c.places(c.leftX, []line{{}}); err != nil && c.kind != "trend" {
		return c, err
	}
	relations := map[string][]string{
		"ratio": {"~=", ">"}, "value": {"~="}, "bound": {"<", ">", ">="}, "compare": {"<", "<=", ">", ">="}, "order": {"increasing", "decreasing"},
		"monotone": {"increasing"}, "linear": {"slope~="}, "trend": {"<", ">"}, "flat": {"range/mean<"},
	}[c.kind]
	switch {
	case relations == nil:
		return c, fmt.Errorf("no kind of claim %q", c.kind)
	case !slices.Contains(relations, c.relation):
		return c, fmt.Errorf("a %s claim has relation %s, not %q", c.kind, strings.Join(relations, " or "), c.relation)
	case c.kind == "ratio" && len(c.left) != 2:
		return c, fmt.Errorf("a ratio is of two series, not %d", len(c.left))
	case slices.Contains([]string{"ratio", "bound", "linear", "flat"}, c.kind) && len(c.want) != 1:
		return c, fmt.Errorf("a %s claim is held against one number", c.kind)
	case c.kind == "value" && len(c.want) == 0, slices.Contains([]string{"compare", "trend"}, c.kind) && len(c.right) == 0:
		return c, fmt.Errorf("a %s claim needs a right side", c.kind)
	}
	return c, nil
}

// places returns the places that text names: one, several, or a range that all of lines
// have points in ("0..40", ">=25", "<10", "all"). A statistic is none.
func (c figureClaim) places(text string, lines []line) ([]place, error) {
	text = strings.TrimSuffix(text, " (interpolate)")
	text = strings.TrimPrefix(strings.TrimPrefix(text, "argmax over "), "max over ")
	if _, ok := statistics[text]; ok {
		return nil, nil
	}
	within := func(in func(float64) bool) []place {
		var out []place
		for _, p := range lines[0].points {
			if in(p.x) && !slices.ContainsFunc(lines, func(l line) bool { _, ok := l.at(p.place); return !ok }) {
				out = append(out, p.place)
			}
		}
		return out
	}
	bound := func(s string) (float64, error) {
		v, err := strconv.ParseFloat(s, 64)
		if err != nil {
			return 0, fmt.Errorf("no place %q", text)
		}
		return v, nil
	}
	from, to, between := strings.Cut(text, "..")
	switch {
	case text == "all":
		return within(func(float64) bool { return true }), nil
	case between:
		a, err := bound(from)
		b, err2 := bound(to)
		return within(func(x float64) bool { return x >= a && x <= b }), cmp.Or(err, err2)
	case strings.HasPrefix(text, ">="):
		a, err := bound(text[2:])
		return within(func(x float64) bool { return x >= a }), err
	case strings.HasPrefix(text, "<"):
		a, err := bound(text[1:])
		return within(func(x float64) bool { return x < a }), err
	}
	var out []place
	for s := range strings.SplitSeq(text, "|") {
		out = append(out, placeOf(s))
	}
	return out, nil
}

// unit is the figure's own unit, and the size of one in base units.
func (c figureClaim) unit() (string, float64) {
	for _, s := range results.Thesis(c.figure) {
		for _, p := range s.Points {
			if p.X != (results.Number{}) {
				return p.Unit, results.ThesisPoint{Y: 1, Unit: p.Unit}.Base()
			}
		}
	}
	for _, s := range results.Thesis(c.figure) {
		for _, p := range s.Points {
			if p.Stat == "median" || p.Stat == "mean" {
				return p.Unit, results.ThesisPoint{Y: 1, Unit: p.Unit}.Base()
			}
		}
	}
	return "", 1
}

// at returns a number of a line: at x, interpolated between its neighbours where the
// claim asks for a place that has no point and says so.
func (c figureClaim) at(l line, x place) ([]*sample, func(draw) float64, error) {
	if p, ok := l.at(x); ok {
		return []*sample{p.sample}, func(d draw) float64 { return median(d(p.sample)) }, nil
	}
	if strings.HasSuffix(c.leftX, " (interpolate)") {
		for i := 1; i < len(l.points); i++ {
			a, b := l.points[i-1], l.points[i]
			if a.x < x.x && x.x < b.x {
				share := (x.x - a.x) / (b.x - a.x)
				return []*sample{a.sample, b.sample}, func(d draw) float64 {
					return median(d(a.sample))*(1-share) + median(d(b.sample))*share
				}, nil
			}
		}
	}
	return nil, nil, fmt.Errorf("figure %s has no runs of series %s at %s", c.figure, l.name, x)
}

// checks makes the claim's checks.
func (c figureClaim) checks(d data) ([]check, error) {
	lines := func(names []string) ([]line, error) {
		var out []line
		for _, n := range names {
			l, err := d.line(c.figure, n)
			if err != nil {
				return nil, err
			}
			out = append(out, l)
		}
		return out, nil
	}
	left, err := lines(c.left)
	if err != nil {
		return nil, err
	}
	var right []line
	if !slices.Equal(c.right, []string{"same series"}) {
		if right, err = lines(c.right); err != nil {
			return nil, err
		}
	}
	m := maker{c: c}
	_, isStat := statistics[c.leftX]
	switch {
	case c.kind == "linear" || c.kind == "flat":
		m.along(left)
	case c.kind == "trend":
		m.trend(left, right)
	case isStat:
		m.stats(left, right)
	case strings.HasPrefix(c.leftX, "argmax over "):
		m.peak(left[0], right)
	default:
		m.points(left, right)
	}
	if m.err == nil && len(m.out) == 0 {
		m.err = fmt.Errorf("figure %s has no runs at the places of the claim (%s)", c.figure, c.leftX)
	}
	return m.out, m.err
}

// maker collects checks.
type maker struct {
	c   figureClaim
	out []check
	err error
}

// term is a number of a claim with its name.
type term struct {
	what    string
	samples []*sample
	value   func(draw) float64
}

func (m *maker) at(l line, x place) term {
	s, v, err := m.c.at(l, x)
	m.err = cmp.Or(m.err, err)
	what := l.name
	if x != (place{}) || len(l.points) > 1 {
		what = fmt.Sprintf("%s at %s", l.name, x)
	}
	return term{what, s, v}
}

func (m *maker) statistic(l line, name string) term {
	if l.stat == nil {
		m.err = cmp.Or(m.err, fmt.Errorf("series %s of figure %s has several points; a %s is of one", l.name, m.c.figure, name))
		return term{}
	}
	s, v, err := l.stat(name)
	m.err = cmp.Or(m.err, err)
	return term{name + " of " + l.name, []*sample{s}, v}
}

// versus holds the ratio of two terms against a number.
func (m *maker) versus(a, b term, relation string, want, slack float64) {
	if m.err != nil {
		return
	}
	m.out = append(m.out, check{a.what + " / " + b.what, "ratio", relation, want, slack, append(slices.Clone(a.samples), b.samples...),
		func(d draw) float64 {
			x, y := a.value(d), b.value(d)
			if x == y { // also where both are none, as of outliers
				return 1
			}
			return x / y
		}})
}

// against holds a term against a number in the figure's unit.
func (m *maker) against(a term, relation string, want float64) {
	if m.err != nil {
		return
	}
	unit, scale := m.c.unit()
	m.out = append(m.out, check{a.what, unit, relation, want, m.c.slack, a.samples, func(d draw) float64 { return a.value(d) / scale }})
}

// inOrder holds each term against the one before it.
func (m *maker) inOrder(terms []term) {
	for i := 1; i < len(terms); i++ {
		switch {
		case m.c.relation == "decreasing":
			m.versus(terms[i], terms[i-1], "<", 1, m.c.slack)
		default:
			m.versus(terms[i], terms[i-1], ">", 1, m.c.slack)
		}
	}
}

// pairs calls with for every left and right side that belong together: one each where
// both sides list as many, else every left with every right.
func pairs[T any](left, right []T, with func(l, r T)) {
	for i, l := range left {
		for j, r := range right {
			if len(left) != len(right) || i == j {
				with(l, r)
			}
		}
	}
}

func (m *maker) points(left, right []line) {
	c := m.c
	over := left
	if c.rightX == "same" {
		over = append(slices.Clone(left), right...)
	}
	xs, err := c.places(c.leftX, over)
	m.err = cmp.Or(m.err, err)
	for i, x := range xs {
		var terms []term
		for _, l := range left {
			terms = append(terms, m.at(l, x))
		}
		switch c.kind {
		case "ratio":
			m.versus(terms[0], terms[1], c.relation, c.want[0], c.slack)
		case "order", "monotone":
			m.inOrder(terms)
		case "bound":
			for _, t := range terms {
				m.against(t, c.relation, c.want[0])
			}
		case "value": // a number a series, or a number a place
			for j, t := range terms {
				k := 0
				switch len(c.want) {
				case 1:
				case len(xs):
					k = i
				case len(terms):
					k = j
				default:
					m.err = fmt.Errorf("%d values for %d series at %d places", len(c.want), len(terms), len(xs))
					return
				}
				m.against(t, c.relation, c.want[k])
			}
		case "compare":
			at := x
			if c.rightX != "same" {
				at = placeOf(c.rightX)
			}
			var others []term
			for _, r := range right {
				others = append(others, m.at(r, at))
			}
			pairs(terms, others, func(l, r term) { m.versus(l, r, c.relation, 1, c.slack) })
		}
	}
}

func (m *maker) stats(left, right []line) {
	c := m.c
	var terms, others []term
	for _, l := range left {
		terms = append(terms, m.statistic(l, c.leftX))
	}
	for _, r := range right {
		others = append(others, m.statistic(r, c.rightX))
	}
	switch c.kind {
	case "ratio":
		m.versus(terms[0], terms[1], c.relation, c.want[0], c.slack)
	case "order":
		m.inOrder(terms)
	case "compare":
		pairs(terms, others, func(l, r term) { m.versus(l, r, c.relation, 1, c.slack) })
	case "bound":
		for _, t := range terms {
			m.against(t, c.relation, c.want[0])
		}
	default:
		m.err = fmt.Errorf("a %s claim about a statistic", c.kind)
	}
}

// peak compares a line where it is highest with others at the same place.
func (m *maker) peak(l line, right []line) {
	c := m.c
	xs, err := c.places(c.leftX, append([]line{l}, right...))
	m.err = cmp.Or(m.err, err)
	for _, r := range right {
		var top, other []term
		var samples []*sample
		for _, x := range xs {
			a, b := m.at(l, x), m.at(r, x)
			top, other = append(top, a), append(other, b)
			samples = append(samples, a.samples...)
			samples = append(samples, b.samples...)
		}
		if m.err != nil || len(xs) == 0 {
			return
		}
		m.out = append(m.out, check{fmt.Sprintf("%s / %s where %s is highest", l.name, r.name, l.name), "ratio", c.relation, 1, c.slack, samples, func(d draw) float64 {
			best := 0
			for i := range top {
				if top[i].value(d) > top[best].value(d) {
					best = i
				}
			}
			return top[best].value(d) / other[best].value(d)
		}})
	}
}

// highest is the greatest median of a line over a range.
func (m *maker) highest(l line, text string) term {
	xs, err := m.c.places(text, []line{l})
	m.err = cmp.Or(m.err, err)
	var terms []term
	var samples []*sample
	for _, x := range xs {
		t := m.at(l, x)
		terms = append(terms, t)
		samples = append(samples, t.samples...)
	}
	if len(terms) < 2 {
		m.err = cmp.Or(m.err, fmt.Errorf("series %s of figure %s has fewer than two points in %s", l.name, m.c.figure, text))
	}
	return term{fmt.Sprintf("highest %s", l.name), samples, func(d draw) float64 {
		top := math.Inf(-1)
		for _, t := range terms {
			top = max(top, t.value(d))
		}
		return top
	}}
}

// trend compares a place of a line, or its highest, with another of the same line.
func (m *maker) trend(left, right []line) {
	side := func(l line, text string) term {
		if strings.HasPrefix(text, "max over ") {
			return m.highest(l, text)
		}
		return m.at(l, placeOf(text))
	}
	if right == nil {
		right = left
	}
	pairs(left, right, func(l, r line) { m.versus(side(l, m.c.leftX), side(r, m.c.rightX), m.c.relation, 1, m.c.slack) })
}

// straight is the least correlation of x and y that still passes for a straight line.
const straight = 0.95

// along makes the checks over a whole line: its slope, or how flat it is.
func (m *maker) along(left []line) {
	c := m.c
	for _, l := range left {
		xs, err := c.places(c.leftX, []line{l})
		m.err = cmp.Or(m.err, err)
		var samples []*sample
		var pos []float64
		for _, x := range xs {
			p, _ := l.at(x) // places gives places of l
			samples, pos = append(samples, p.sample), append(pos, p.sample.pos)
		}
		if m.err != nil {
			return
		}
		if len(samples) < 3 {
			m.err = fmt.Errorf("series %s of figure %s has %d points in %s, 3 are needed", l.name, c.figure, len(samples), c.leftX)
			return
		}
		medians := func(d draw) []float64 {
			var y []float64
			for _, s := range samples {
				y = append(y, median(d(s)))
			}
			return y
		}
		if c.kind == "flat" {
			m.out = append(m.out, check{"range / mean of " + l.name, "ratio", "<", c.want[0], c.slack, samples, func(d draw) float64 {
				y := medians(d)
				return (slices.Max(y) - slices.Min(y)) / stat.Mean(y, nil)
			}})
			continue
		}
		m.out = append(m.out, check{"slope of " + l.name, "ms/ms", "~=", c.want[0], c.slack, samples, func(d draw) float64 {
			_, slope := stat.LinearRegression(pos, medians(d), nil, false)
			return 1000 * slope // x is in ms, y in s
		}}, check{"correlation with x of " + l.name, "", ">", straight, 0, samples, func(d draw) float64 {
			return stat.Correlation(pos, medians(d), nil)
		}})
	}
}
