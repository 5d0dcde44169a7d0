package plots

import (
	"cmp"
	"image/color"
	"math"
	"slices"
	"strconv"

	"gonum.org/v1/gonum/stat"
	"gonum.org/v1/gonum/stat/distuv"
	"gonum.org/v1/plot"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"

	"memsync/results"
)

// layer draws the data of a figure.
type layer func(c draw.Canvas, x, y func(float64) vg.Length)

// Plot implements plot.Plotter.
func (l layer) Plot(c draw.Canvas, p *plot.Plot) {
	x, y := p.Transforms(&c)
	l(c, x, y)
}

// horizontal reports whether values run along the horizontal axis, beside
// names that read without turning the page.
func (f *figure) horizontal() bool {
	return f.spec.Kind == results.FigureBar || f.spec.Kind == results.FigureBox
}

// prepare sets up the axes and returns the layer that draws the data, and what
// stands at the axes.
func (f *figure) prepare(p *plot.Plot) (l layer, xLabel, yLabel string) {
	switch f.spec.Kind {
	case results.FigureLine:
		return f.lines(p), f.spec.X.String(), f.spec.Y.String()
	case results.FigureDensity, results.FigureCDF:
		l, yLabel = f.distribution(p)
		return l, f.spec.Y.String(), yLabel
	}
	return f.bars(p), f.spec.Y.String(), ""
}

// valueAxis sets up an axis for shown values.
func valueAxis(a *plot.Axis, log bool, n int, lo, hi float64) {
	a.Min, a.Max = lo, hi
	a.Tick.Marker = linearTicks(n)
	if log {
		a.Scale, a.Tick.Marker = plot.LogScale{}, logTicks{}
	}
}

// shown returns the values of a summary that a log axis can show, in shown units.
func (f *figure) shown(n results.Number) (float64, bool) {
	v, ok := n.Get()
	v = f.spec.Y.Shown(v)
	return v, ok && !(f.spec.Y.Log && v <= 0)
}

type xy struct{ x, y float64 }

// median returns the point's place and median where the axes can show them.
func (f *figure) median(p results.Point) (xy, bool) {
	m, ok := f.shown(p.Median)
	at := xy{f.place(p), m}
	return at, ok && !(f.spec.X.Log && at.x <= 0)
}

// interval returns the ends of the point's interval, the lower one at least
// bottom, where there is one and the axes can show it.
func (f *figure) interval(p results.Point, bottom float64) (low, high xy, ok bool) {
	at, okM := f.median(p)
	l, okL := p.CILow.Get()
	h, okH := f.shown(p.CIHigh)
	return xy{at.x, max(f.spec.Y.Shown(l), bottom)}, xy{at.x, h}, okM && okL && okH
}

// place is where a point lies on the x axis.
func (f *figure) place(p results.Point) float64 {
	if f.spec.X.Category {
		return float64(slices.Index(f.cats, p.X))
	}
	return f.spec.X.Shown(p.Pos)
}

// thesisCurve returns the points of the thesis's curve that have a place here.
func (f *figure) thesisCurve(e entry) []xy {
	s, ok := f.theirs(e, "")
	if !ok {
		return nil
	}
	var out []xy
	for _, p := range s.Curve() {
		at, y := p.X.Float(), f.spec.Y.Shown(p.Base())
		if f.spec.X.Category {
			i := slices.IndexFunc(f.cats, func(c string) bool { v, err := strconv.ParseFloat(c, 64); return err == nil && v == at })
			if i < 0 {
				continue
			}
			at = float64(i)
		} else {
			at = f.spec.X.Shown(at)
		}
		if f.spec.Y.Log && y <= 0 || f.spec.X.Log && at <= 0 {
			continue
		}
		out = append(out, xy{at, y})
	}
	return out
}

func (f *figure) lines(p *plot.Plot) layer {
	var xs, ys []float64
	for _, e := range f.entries {
		for _, pt := range e.Points {
			if y, ok := f.shown(pt.Median); ok && e.Baseline {
				ys = append(ys, y)
			}
			if m, ok := f.median(pt); ok {
				xs, ys = append(xs, m.x), append(ys, m.y)
			}
			if l, h, ok := f.interval(pt, math.Inf(-1)); ok {
				ys = append(ys, l.y, h.y)
			}
		}
		for _, t := range f.thesisCurve(e) {
			xs, ys = append(xs, t.x), append(ys, t.y)
		}
	}
	lo, hi := limits(ys, f.spec.Y.Log, true)
	valueAxis(&p.Y, f.spec.Y.Log, 6, lo, hi)
	lo, hi = limits(xs, f.spec.X.Log, false)
	valueAxis(&p.X, f.spec.X.Log, 8, lo, hi)
	if f.spec.X.Category {
		var ticks plot.ConstantTicks
		for i, c := range f.cats {
			ticks = append(ticks, plot.Tick{Value: float64(i), Label: f.categoryLabel(c)})
		}
		p.X.Tick.Marker = ticks
	} else if f.spec.X.Log && len(f.cats) <= 8 { // what was measured says more than decades do
		digits := 4
		if f.spec.X.Position != "" { // measured, so not as round as it was meant to be
			digits = 2
		}
		var ticks plot.ConstantTicks
		seen := map[string]bool{}
		for _, v := range xs {
			if l := label(round(v, digits)); !seen[l] {
				seen[l] = true
				ticks = append(ticks, plot.Tick{Value: v, Label: l})
			}
		}
		p.X.Tick.Marker = ticks
	}
	bottom := p.Y.Min
	return func(c draw.Canvas, x, y func(float64) vg.Length) {
		at := func(p xy) vg.Point { return vg.Point{X: x(p.x), Y: y(p.y)} }
		for _, e := range f.entries {
			var line []vg.Point
			for _, t := range f.thesisCurve(e) {
				line = append(line, at(t))
			}
			if len(line) > 1 {
				c.StrokeLines(e.thesisLine(), line)
			}
			for _, pt := range line {
				c.DrawGlyphNoClip(draw.GlyphStyle{Color: e.pale(), Radius: 1.9, Shape: draw.CircleGlyph{}}, pt)
			}
		}
		for _, e := range f.entries {
			var low, high []vg.Point
			flush := func() {
				if len(low) > 1 {
					slices.Reverse(low)
					c.FillPolygon(e.band(), append(high, low...))
				}
				low, high = nil, nil
			}
			for _, pt := range e.Points {
				l, h, ok := f.interval(pt, bottom)
				if !ok {
					flush()
					continue
				}
				low, high = append(low, at(l)), append(high, at(h))
			}
			flush()
		}
		for _, e := range f.entries {
			var line []vg.Point
			for _, pt := range e.Points {
				if m, ok := f.median(pt); ok {
					line = append(line, at(m))
				}
				if l, h, ok := f.interval(pt, bottom); ok {
					errorBar(&c, e.color, at(l), at(h))
				}
			}
			if e.Baseline { // wherever it was measured
				across := e.line()
				across.Width = 0.8
				for _, pt := range e.Points[:1] {
					if m, ok := f.shown(pt.Median); ok {
						c.StrokeLine2(across, c.Min.X, y(m), c.Max.X, y(m))
					}
				}
			} else if len(line) > 1 {
				c.StrokeLines(e.line(), line)
			}
		}
		for _, e := range f.entries { // markers above all lines
			for _, pt := range e.Points {
				if m, ok := f.median(pt); ok {
					e.drawMarker(&c, at(m), 1)
				}
			}
		}
	}
}

// errorBar draws an interval with caps.
func errorBar(c *draw.Canvas, col color.Color, a, b vg.Point) {
	s := draw.LineStyle{Color: col, Width: 0.7}
	cap := vg.Point{X: 2}
	if a.Y == b.Y && a.X != b.X {
		cap = vg.Point{Y: 2.4}
	}
	c.StrokeLines(s, []vg.Point{a, b}, []vg.Point{a.Sub(cap), a.Add(cap)}, []vg.Point{b.Sub(cap), b.Add(cap)})
}

func rect(x0, y0, x1, y1 vg.Length) []vg.Point {
	return []vg.Point{{X: x0, Y: y0}, {X: x1, Y: y0}, {X: x1, Y: y1}, {X: x0, Y: y1}}
}

// row is one bar or box: a point of an entry, and its place from the top.
type row struct {
	entry
	results.Point
	at float64
}

// rows returns the bars or boxes from top to bottom, by x, then by series, and
// how many rows they span with the gaps between the groups of one x.
func (f *figure) rows() (out []row, span float64) {
	for _, x := range f.cats {
		n := len(out)
		for _, e := range f.entries {
			for _, p := range e.Points {
				if p.X == x && p.N > 0 {
					out = append(out, row{e, p, span})
					span++
				}
			}
		}
		if len(out) > n && f.spec.X.Column != "" {
			span += 0.5
		}
	}
	if f.spec.X.Column != "" {
		span -= 0.5
	}
	return out, span
}

// rowTicks names the rows: by series, or each group by its x.
func (f *figure) rowTicks(rows []row) plot.ConstantTicks {
	var ticks plot.ConstantTicks
	for i := 0; i < len(rows); {
		j := i + 1
		name := rows[i].name()
		if f.spec.X.Column != "" {
			for j < len(rows) && rows[j].X == rows[i].X {
				j++
			}
			name = f.categoryLabel(rows[i].X)
		}
		ticks = append(ticks, plot.Tick{Value: -(rows[i].at + rows[j-1].at) / 2, Label: name})
		i = j
	}
	return ticks
}

// bars draws bars or boxes, one below the other, ours above the thesis's. On a
// log axis, which has no zero for a bar to start from, bars are dots.
func (f *figure) bars(p *plot.Plot) layer {
	rows, span := f.rows()
	var vs []float64
	thesis := make([][]float64, len(rows))
	for i, r := range rows {
		for _, n := range []results.Number{r.Median, r.CILow, r.CIHigh} {
			if v, ok := f.shown(n); ok {
				vs = append(vs, v)
			}
		}
		if f.spec.Kind == results.FigureBox {
			for _, v := range r.Values {
				vs = append(vs, f.spec.Y.Shown(v))
			}
		}
		if s, ok := f.theirs(r.entry, r.X); ok {
			thesis[i] = f.thesisValues(s)
			vs = append(vs, thesis[i]...)
		}
	}
	lo, hi := limits(vs, f.spec.Y.Log, true)
	if f.spec.Kind == results.FigureBar {
		if f.spec.Y.Log { // room for the number beside the bar
			hi *= math.Pow(hi/lo, 0.15)
		} else {
			hi += (hi - lo) * 0.13
		}
	}
	valueAxis(&p.X, f.spec.Y.Log, 6, lo, hi)
	p.Y.Min, p.Y.Max, p.Y.Tick.Marker = -span+0.4, 0.6, f.rowTicks(rows)
	p.Y.Tick.Length = 0

	return func(c draw.Canvas, x, y func(float64) vg.Length) {
		left := x(lo)
		for i, r := range rows {
			mid := y(-r.at)
			unit := y(1) - y(0)
			half := min(unit*0.36, 8)
			if thesis[i] != nil { // ours takes the upper part of the row
				f.thesisMark(&c, r.entry, thesis[i], x, left, mid-half*0.75, half*0.5)
				mid, half = mid+half*0.45, half*0.6
			}
			if f.spec.Kind == results.FigureBox {
				f.box(&c, r, x, mid, half)
				continue
			}
			m, ok := f.shown(r.Median)
			if !ok {
				continue
			}
			end := x(m)
			if !f.spec.Y.Log {
				r.fill(&c, rect(left, mid-half, end, mid+half))
			}
			if l, ok := f.shown(r.CILow); ok {
				h, _ := f.shown(r.CIHigh)
				col := color.Color(ink)
				if f.spec.Y.Log {
					col = r.color
				}
				errorBar(&c, col, vg.Point{X: x(l), Y: mid}, vg.Point{X: x(h), Y: mid})
				end = max(end, x(h))
			}
			if f.spec.Y.Log {
				r.drawMarker(&c, vg.Point{X: x(m), Y: mid}, 0.85)
			}
			number(&c, end, mid, m)
		}
	}
}

func number(c *draw.Canvas, x, y vg.Length, v float64) {
	s := textStyle(6, false, ink)
	s.YAlign = draw.YCenter
	digits := 3
	if math.Abs(v) >= 1000 {
		digits = 4
	}
	c.FillText(s, vg.Point{X: x + 4, Y: y}, label(round(v, digits)))
}

// round keeps the given number of significant digits.
func round(v float64, digits int) float64 {
	r, _ := strconv.ParseFloat(strconv.FormatFloat(v, 'g', digits, 64), 64)
	return r
}

// thesisMark draws the thesis's bar (one value) or box (five).
func (f *figure) thesisMark(c *draw.Canvas, e entry, v []float64, x func(float64) vg.Length, left, mid, half vg.Length) {
	line := draw.LineStyle{Color: e.pale(), Width: 1}
	switch {
	case len(v) == 5:
		c.StrokeLine2(line, x(v[0]), mid, x(v[1]), mid)
		c.StrokeLine2(line, x(v[3]), mid, x(v[4]), mid)
		c.FillPolygon(e.pale(), rect(x(v[1]), mid-half, x(v[3]), mid+half))
		c.StrokeLine2(draw.LineStyle{Color: color.White, Width: 1}, x(v[2]), mid-half, x(v[2]), mid+half)
	case len(v) == 1 && f.spec.Y.Log:
		c.DrawGlyphNoClip(draw.GlyphStyle{Color: e.pale(), Radius: 2.6, Shape: draw.CircleGlyph{}}, vg.Point{X: x(v[0]), Y: mid})
	case len(v) == 1:
		c.FillPolygon(e.pale(), rect(left, mid-half, x(v[0]), mid+half))
	}
}

// box draws quartiles, whiskers to the last value within 1.5 interquartile
// ranges, and each value beyond as a ring.
func (f *figure) box(c *draw.Canvas, r row, x func(float64) vg.Length, mid, half vg.Length) {
	q1, ok1 := f.shown(r.Q1)
	q3, ok3 := f.shown(r.Q3)
	m, okM := f.shown(r.Median)
	ring := draw.GlyphStyle{Color: r.color, Radius: 1.6, Shape: draw.RingGlyph{}}
	if !ok1 || !ok3 || !okM { // a single value has no quartiles
		for _, v := range r.Values {
			if v, ok := f.shown(results.Num(v)); ok {
				c.DrawGlyphNoClip(ring, vg.Point{X: x(v), Y: mid})
			}
		}
		return
	}
	low, high := q1, q3
	for _, v := range r.Values {
		v, ok := f.shown(results.Num(v))
		switch {
		case !ok:
		case v < q1-1.5*(q3-q1) || v > q3+1.5*(q3-q1):
			c.DrawGlyphNoClip(ring, vg.Point{X: x(v), Y: mid})
		default:
			low, high = min(low, v), max(high, v)
		}
	}
	line := draw.LineStyle{Color: r.color, Width: 0.9}
	for _, w := range [][2]float64{{low, q1}, {q3, high}} {
		c.StrokeLine2(line, x(w[0]), mid, x(w[1]), mid)
	}
	for _, w := range []float64{low, high} {
		c.StrokeLine2(line, x(w), mid-half/2, x(w), mid+half/2)
	}
	body := rect(x(q1), mid-half, x(q3), mid+half)
	c.FillPolygon(r.band(), body)
	c.StrokeLines(line, append(body, body[0]))
	c.StrokeLine2(draw.LineStyle{Color: r.color, Width: 1.8}, x(m), mid-half, x(m), mid+half)
}

// sample returns all values of an entry, sorted, in shown units.
func (f *figure) sample(e entry) []float64 {
	var out []float64
	for _, p := range e.Points {
		for _, v := range p.Values {
			if v, ok := f.shown(results.Num(v)); ok {
				out = append(out, v)
			}
		}
	}
	slices.Sort(out)
	return out
}

// distribution draws densities or cumulative distributions of the runs' values.
func (f *figure) distribution(p *plot.Plot) (l layer, yLabel string) {
	density := f.spec.Kind == results.FigureDensity
	curves := make([][]xy, len(f.entries))
	var xs, ys []float64
	for i, e := range f.entries {
		switch v := f.sample(e); {
		case density:
			curves[i] = f.density(v)
		case f.ofHistograms():
			curves[i] = f.share(f.counts[i])
		default:
			curves[i] = ecdf(v)
		}
		for _, p := range curves[i] {
			xs, ys = append(xs, p.x), append(ys, p.y)
		}
	}
	for _, e := range f.entries {
		if s, ok := f.theirs(e, ""); ok && density {
			xs = append(xs, f.thesisValues(s)...)
		}
	}
	lo, hi := limits(xs, f.spec.Y.Log, false)
	valueAxis(&p.X, f.spec.Y.Log, 7, lo, hi)
	if density {
		lo, hi = limits(ys, false, true)
		unit := ""
		switch {
		case f.spec.Y.Log:
			unit = " (per decade)"
		case f.spec.Y.Unit != "":
			unit = " (1/" + f.spec.Y.Unit + ")"
		}
		valueAxis(&p.Y, false, 6, lo, hi)
		yLabel = "Density" + unit
	} else {
		valueAxis(&p.Y, false, 5, 0, 1)
		yLabel = "Share of runs"
		switch f.spec.Y.Column {
		case results.TouchHistogram:
			yLabel = "Share of touches"
		case results.RequestHistogram:
			yLabel = "Share of requested bytes"
		}
	}
	return func(c draw.Canvas, x, y func(float64) vg.Length) {
		for _, e := range f.entries {
			if s, ok := f.theirs(e, ""); ok && density {
				for _, v := range f.thesisValues(s) {
					c.StrokeLine2(e.thesisLine(), x(v), c.Min.Y, x(v), c.Max.Y)
				}
			}
		}
		lines := make([][]vg.Point, len(curves))
		for i, e := range f.entries {
			for _, p := range curves[i] {
				lines[i] = append(lines[i], vg.Point{X: x(p.x), Y: y(p.y)})
			}
			if l := lines[i]; density && len(l) > 0 {
				c.FillPolygon(e.band(), append(slices.Clone(l), vg.Point{X: l[len(l)-1].X, Y: y(0)}, vg.Point{X: l[0].X, Y: y(0)}))
			}
		}
		for i, e := range f.entries {
			if len(lines[i]) > 0 {
				c.StrokeLines(e.line(), lines[i])
			}
		}
	}, yLabel
}

// density is the density along the axis: on a log axis, of the logarithms.
func (f *figure) density(v []float64) []xy {
	if !f.spec.Y.Log {
		least := math.Inf(-1)
		if len(v) > 0 && v[0] >= 0 {
			least = 0 // times, sizes and rates are never below
		}
		return kde(v, least)
	}
	logs := make([]float64, len(v))
	for i := range v {
		logs[i] = math.Log10(v[i])
	}
	curve := kde(logs, math.Inf(-1))
	for i := range curve {
		curve[i].x = math.Pow(10, curve[i].x)
	}
	return curve
}

// kde is the Gaussian kernel density of a sorted sample, with the bandwidth of
// Scott's rule (sd n^-1/5), as the tools that drew the thesis's figures use. A
// sample without spread has none. What would lie below least is reflected at it
// (Silverman, Density Estimation, section 2.10), so that the area stays 1.
func kde(v []float64, least float64) []xy {
	sd := 0.0
	if len(v) > 1 {
		sd = stat.StdDev(v, nil)
	}
	if sd == 0 {
		return nil
	}
	h := sd * math.Pow(float64(len(v)), -0.2)
	const steps = 200
	lo, hi := max(v[0]-3*h, least), v[len(v)-1]+3*h
	out := make([]xy, steps+1)
	for i := range out {
		at := lo + (hi-lo)*float64(i)/steps
		sum := 0.0
		for _, m := range v {
			sum += distuv.UnitNormal.Prob((at - m) / h)
			if !math.IsInf(least, -1) {
				sum += distuv.UnitNormal.Prob((at - (2*least - m)) / h)
			}
		}
		out[i] = xy{at, sum / (h * float64(len(v)))}
	}
	return out
}

// share is the distribution of a histogram: of its counts, or, where it is of
// sizes, of their bytes.
func (f *figure) share(bars []results.Bar) []xy {
	weight := func(b results.Bar) float64 {
		if f.spec.Y.Column == results.RequestHistogram {
			return float64(b.Count) * b.Value
		}
		return float64(b.Count)
	}
	bars = slices.Clone(bars)
	slices.SortFunc(bars, func(a, b results.Bar) int { return cmp.Compare(a.Value, b.Value) })
	var total, sum float64
	for _, b := range bars {
		total += weight(b)
	}
	var out []xy
	for _, b := range bars {
		v := f.spec.Y.Shown(b.Value)
		if f.spec.Y.Log && v <= 0 {
			continue
		}
		before := sum
		sum += weight(b)
		out = append(out, xy{v, before / total}, xy{v, sum / total})
	}
	return out
}

// ecdf is the empirical distribution of a sorted sample, as steps.
func ecdf(v []float64) []xy {
	var out []xy
	for i, at := range v {
		n := float64(len(v))
		out = append(out, xy{at, float64(i) / n}, xy{at, float64(i+1) / n})
	}
	return out
}
