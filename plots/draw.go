// Package plots draws figures from records: medians with their 95 % confidence
// intervals, the thesis's own values as a pale layer beneath, units on the
// axes, n and the conditions below. The same records give the same bytes.
//
// A figure is data (results.FigureSpec) and is drawn 1:1 for one column of a
// two-column paper, with legends outside of the plot area.
package plots

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"html"
	"image/color"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgimg"
	"gonum.org/v1/plot/vg/vgpdf"
	"gonum.org/v1/plot/vg/vgsvg"

	"memsync/results"
)

// ErrNoData: no run of the figure is ok, so there is nothing to draw.
var ErrNoData = errors.New("no run is ok")

// Draw draws the figure from those of rows that belong to it, once for each
// variant, as NAME.VARIANT.svg and .png in outDir, which it makes if need be.
// hist is for figures that show raw histograms; others need none.
// It returns the paths of the files. Where no run is ok the error matches
// ErrNoData; the other variants are drawn.
func Draw(rows []results.Row, hist results.Histograms, spec results.FigureSpec, outDir string) ([]string, error) {
	if err := spec.Check(); err != nil {
		return nil, fmt.Errorf("draw: %w", err)
	}
	if err := os.MkdirAll(outDir, 0o777); err != nil {
		return nil, fmt.Errorf("draw figure %s: %w", spec.Name, err)
	}
	var paths []string
	err := each(rows, hist, spec, func(variant string, fig *figure) error {
		var errs []error
		for ext, render := range map[string]func() ([]byte, error){".png": fig.png, ".svg": fig.svg} {
			path := filepath.Join(outDir, spec.Name+"."+cmp.Or(variant, "all")+ext)
			data, err := render()
			if err == nil {
				err = results.WriteFile(path, data)
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("draw figure %s: %w", path, err))
				continue
			}
			paths = append(paths, path)
		}
		return errors.Join(errs...)
	})
	slices.Sort(paths)
	return paths, err
}

// Picture is a figure of one variant for a document that sets the words itself.
type Picture struct {
	Variant  string
	PDF      []byte // the plot and its legend, at the width of a column
	Title    string
	Subtitle string // what is shown, and n
	Caption  string // conditions, sources, notes
}

// Pictures draws the figure as PDF, once for each variant. Where no run is ok the
// error matches ErrNoData; the other variants are drawn.
func Pictures(rows []results.Row, hist results.Histograms, spec results.FigureSpec) ([]Picture, error) {
	if err := spec.Check(); err != nil {
		return nil, fmt.Errorf("draw: %w", err)
	}
	var out []Picture
	err := each(rows, hist, spec, func(variant string, fig *figure) error {
		p := Picture{Variant: variant, Title: spec.Title, Subtitle: fig.subtitle, Caption: strings.ReplaceAll(fig.caption, noBreak, " ")}
		fig.bare = true
		var err error
		if p.PDF, err = fig.pdf(); err != nil {
			return fmt.Errorf("draw figure %s, variant %s: %w", spec.Name, variant, err)
		}
		out = append(out, p)
		return nil
	})
	return out, err
}

// each lays out the figure for each variant that rows have, in order.
func each(rows []results.Row, hist results.Histograms, spec results.FigureSpec, do func(variant string, fig *figure) error) error {
	variants := map[string][]results.Row{}
	for _, r := range spec.Select(rows) {
		variants[r.Variant] = append(variants[r.Variant], r)
	}
	if len(variants) == 0 {
		return fmt.Errorf("draw figure %s: there are no records of it: %w", spec.Name, ErrNoData)
	}
	var errs []error
	for _, variant := range slices.Sorted(maps.Keys(variants)) {
		fig, err := newFigure(variants[variant], hist, spec)
		if err != nil {
			errs = append(errs, fmt.Errorf("draw figure %s, variant %s: %w", spec.Name, variant, err))
			continue
		}
		if err := do(variant, fig); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// entry is a series as drawn.
type entry struct {
	results.Series
	style
	results.FigureSeries
}

// figure is a figure that is laid out.
type figure struct {
	spec     results.FigureSpec
	entries  []entry
	thesis   map[string]results.ThesisSeries
	cats     []string        // texts of a category axis, in order
	counts   [][]results.Bar // of each entry, where the figure shows histograms
	panels   []panel         // of a heat map
	subtitle string
	caption  string
	bare     bool // without title, subtitle and caption

	height  vg.Length
	legend  []legendItem
	columns int
}

type legendItem struct {
	label  string
	sample func(c *draw.Canvas, r vg.Rectangle)
}

func newFigure(rows []results.Row, hist results.Histograms, spec results.FigureSpec) (*figure, error) {
	f := &figure{spec: spec, thesis: map[string]results.ThesisSeries{}}
	own, err := results.Group(results.Filter(rows, func(r results.Row) bool { return !r.Lab() }), spec.Query())
	if err != nil {
		return nil, err
	}
	lab, err := results.Group(results.Filter(rows, results.Row.Lab), spec.Query())
	if err != nil {
		return nil, err
	}
	if spec.Kind == results.FigureMap && len(own) > 0 {
		lab = nil // no rivals of those outside
		rows = results.Filter(rows, func(r results.Row) bool { return !r.Lab() })
	}
	for i, s := range lab { // a panel is named by all of its key but the last part
		if at := strings.LastIndex(s.Key, "/"); spec.Kind == results.FigureHeat && at >= 0 && len(own) > 0 {
			lab[i].Key = s.Key[:at] + ", lab" + s.Key[at:]
		}
	}
	for _, s := range results.Thesis(spec.Thesis) {
		f.thesis[s.Name] = s
	}
	if f.entries = mark(arrange(own, spec), arrange(lab, spec)); !slices.ContainsFunc(f.entries, entry.hasValues) {
		return nil, ErrNoData
	}
	f.cats = categories(f.entries, spec.X.Categories)
	if spec.Kind.Grid() {
		f.panels = makePanels(slices.Concat(own, lab), spec)
	}
	for _, e := range f.entries {
		var bars []results.Bar
		for _, p := range e.Points {
			b, err := hist.Merged(spec.Y.Column, p.Runs)
			if err != nil {
				return nil, err
			}
			bars = append(bars, b...)
		}
		f.counts = append(f.counts, bars)
	}
	f.subtitle, f.caption = f.describe(rows)
	f.makeLegend()
	return f, nil
}

func (e entry) name() string { return cmp.Or(e.Label, e.Series.Key, "all") }

func (e entry) hasCI() bool {
	return slices.ContainsFunc(e.Points, func(p results.Point) bool { _, ok := p.CILow.Get(); return ok })
}

func (e entry) hasValues() bool {
	return slices.ContainsFunc(e.Points, func(p results.Point) bool { return p.N > 0 })
}

// mark puts the series of the lab kernel after the machine's own, and says which
// they are: beside those in their names and markers, else below the title (describe).
func mark(own, lab []entry) []entry {
	for i := range lab {
		lab[i].lab = true
		if len(own) > 0 {
			lab[i].Label = lab[i].name() + ", lab"
		}
		if slices.ContainsFunc(own, func(e entry) bool { return e.Series.Key == lab[i].Series.Key }) {
			lab[i].Thesis = "" // lies beneath the machine's own
		}
	}
	return append(own, lab...)
}

// arrange brings series into the figure's order. A style depends on the place
// in the figure's list, so a series that is missing recolours no other.
func arrange(series []results.Series, spec results.FigureSpec) []entry {
	var out []entry
	rest := slices.Clone(series)
	slices.SortFunc(rest, func(a, b results.Series) int { return cmp.Compare(a.Key, b.Key) })
	for i, fs := range spec.Series {
		if j := slices.IndexFunc(rest, func(s results.Series) bool { return s.Key == fs.Key }); j >= 0 {
			out = append(out, entry{rest[j], styleOf(i), fs})
			rest = slices.Delete(rest, j, j+1)
		}
	}
	for i, s := range rest {
		out = append(out, entry{s, styleOf(len(spec.Series) + i), results.FigureSeries{Key: s.Key}})
	}
	return out
}

// categories returns the x texts of all series: those of first in its order,
// then by number where they are numbers, then by text.
func categories(entries []entry, first []string) []string {
	var cats []string
	for _, e := range entries {
		for _, p := range e.Points {
			if !slices.Contains(cats, p.X) {
				cats = append(cats, p.X)
			}
		}
	}
	rank := func(c string) (int, float64) {
		if i := slices.Index(first, c); i >= 0 {
			return i, 0
		}
		v, ok := results.Quantity(c)
		if !ok {
			v = math.Inf(1)
		}
		return len(first), v
	}
	slices.SortFunc(cats, func(a, b string) int {
		ia, va := rank(a)
		ib, vb := rank(b)
		return cmp.Or(cmp.Compare(ia, ib), cmp.Compare(va, vb), cmp.Compare(a, b))
	})
	return cats
}

// categoryLabel is the text of a category at the axis.
func (f *figure) categoryLabel(x string) string {
	if n, err := strconv.ParseInt(x, 10, 64); err == nil && strings.HasSuffix(f.spec.X.Column, "_bytes") {
		return bytesText(n)
	}
	return x
}

// describe makes the line under the title and the caption.
func (f *figure) describe(rows []results.Row) (subtitle, caption string) {
	lo, hi, failed := 0, 0, 0
	var empty []string
	for _, e := range f.entries {
		for _, p := range e.Points {
			failed += p.Failed
			if p.N == 0 {
				continue
			}
			if lo == 0 || p.N < lo {
				lo = p.N
			}
			hi = max(hi, p.N)
		}
		if name := f.emptyName(e); name != "" && !slices.Contains(empty, name) {
			empty = append(empty, name)
		}
	}
	n := fmt.Sprintf("n = %d", lo)
	if lo != hi {
		n = fmt.Sprintf("n = %d–%d", lo, hi)
	}
	switch f.spec.Kind {
	case results.FigureLine, results.FigureBar:
		subtitle = "Median and 95 % CI, " + n
		if hi < results.MinCI {
			subtitle = fmt.Sprintf("Median, %s (no CI below %d)", n, results.MinCI)
		}
	case results.FigureBox:
		subtitle = "Quartiles, whiskers of 1.5 IQR, outliers, " + n
	case results.FigureDensity:
		subtitle = "Gaussian kernel density (Scott), " + n
	case results.FigureCDF:
		subtitle = "Empirical distribution, " + n
		if f.ofHistograms() {
			subtitle = "Distribution over all runs, " + n
		}
	case results.FigureHeat:
		subtitle = "Median, " + n
	case results.FigureMap:
		subtitle = "Best median, and by how much; several where their 95 % intervals overlap, " + strings.ReplaceAll(n, " ", noBreak)
		if hi < results.MinCI {
			subtitle = fmt.Sprintf("Best median, %s (no CI below %d: nothing is told apart)", n, results.MinCI)
		}
	}
	if slices.ContainsFunc(f.entries, func(e entry) bool { return e.lab && e.hasValues() }) {
		if subtitle += "; lab kernel"; f.spec.Kind == results.FigureLine || f.spec.Kind == results.FigureBar {
			subtitle += " (hollow)"
		}
	}
	if failed > 0 {
		subtitle += fmt.Sprintf("; %d not ok left out", failed)
	}

	var parts []string
	for _, c := range []struct{ column, name, none string }{
		{"variant", "variant", ""}, {"shaper", "shaper", ""}, {"rtt_ms", "RTT", ""}, {"rate_mbit", "rate", ""}, {"loss", "loss", ""},
		{"region_bytes", "region", ""}, {"chunk_bytes", "chunk", ""}, {"device", "device", ""}, {"kernel", "kernel", ""}, {"cpus", "placement", "free"},
	} {
		if c.column == f.spec.X.Column || c.column == f.spec.Rows.Column || slices.Contains(f.spec.Keys, c.column) {
			continue
		}
		if v := values(rows, c.column, c.none); v != "" {
			parts = append(parts, strings.ReplaceAll(c.name+" "+v, " ", noBreak))
		}
	}
	caption = strings.Join(parts, " · ") + "."
	if len(empty) > 0 {
		caption += " No run is ok: " + strings.Join(empty, ", ") + "."
	}
	if f.hasThesis() {
		caption += " Thesis: Pojtinger 2023, read from its figure " + f.spec.Thesis + "."
	}
	caption += f.crossings()
	if f.spec.Note != "" {
		caption += " " + f.spec.Note
	}
	return subtitle, caption
}

// emptyName is the name of what e shows where none of that is ok, else "".
func (f *figure) emptyName(e entry) string {
	if !f.spec.Kind.Grid() {
		if e.hasValues() {
			return ""
		}
		return e.name()
	}
	key := e.Series.Key[:strings.LastIndex(e.Series.Key, "/")] // without its row
	name := key
	for _, s := range f.spec.Series {
		if s.Key == key {
			name = cmp.Or(s.Label, key)
		}
	}
	if slices.ContainsFunc(f.panels, func(p panel) bool { return p.name == name }) {
		return ""
	}
	return name
}

// ofHistograms reports whether the figure shows raw histograms.
func (f *figure) ofHistograms() bool {
	return slices.ContainsFunc(f.counts, func(b []results.Bar) bool { return len(b) > 0 })
}

// crossings says where each series crosses the one that they are compared with.
func (f *figure) crossings() string {
	i := slices.IndexFunc(f.entries, func(e entry) bool { return f.spec.Versus != "" && e.FigureSeries.Key == f.spec.Versus })
	if i < 0 {
		return ""
	}
	var parts []string
	for _, e := range f.entries {
		if e.FigureSeries.Key == f.spec.Versus || !e.hasValues() {
			continue
		}
		var at []string
		for _, c := range results.Crossings(e.Series, f.entries[i].Series, f.spec.X.Log, f.spec.Y.Log) {
			way := "below"
			if c.Above {
				way = "above"
			}
			at = append(at, fmt.Sprintf("%s it from %s %s", way, label(round(f.spec.X.Shown(c.Pos), 3)), f.spec.X.Unit))
		}
		if at == nil {
			at = []string{"does not cross it"}
		}
		parts = append(parts, e.name()+" "+strings.Join(at, ", "))
	}
	return fmt.Sprintf(" Against %s (interpolated medians): %s.", f.entries[i].name(), strings.Join(parts, "; "))
}

// values returns the values that a column takes, as people read them, numbers
// from small to large.
func values(rows []results.Row, column, none string) string {
	var all, out []string
	for _, r := range rows {
		if v, _ := r.Get(column); !slices.Contains(all, v) {
			all = append(all, v)
		}
	}
	slices.SortStableFunc(all, func(a, b string) int {
		x, errX := strconv.ParseFloat(a, 64)
		y, errY := strconv.ParseFloat(b, 64)
		if errX != nil || errY != nil {
			return 0 // text stays in the order of appearance
		}
		return cmp.Compare(x, y)
	})
	for _, v := range all {
		switch x, _ := strconv.ParseFloat(v, 64); {
		case column == "region_bytes" || column == "chunk_bytes":
			if v = bytesText(int64(x)); x == 0 {
				v = ""
			}
		case column == "rtt_ms":
			v += " ms"
		case column == "rate_mbit" && x >= 1000:
			v = strconv.FormatFloat(x/1000, 'g', 4, 64) + " Gbit/s"
		case column == "rate_mbit" && x > 0:
			v += " Mbit/s"
		case column == "loss" && x > 0:
			v = strconv.FormatFloat(x*100, 'g', 4, 64) + " %"
		case v == "0":
			v = ""
		}
		if v = cmp.Or(v, none); v != "" && !slices.Contains(out, v) {
			out = append(out, v)
		}
	}
	if len(out) > 4 {
		return fmt.Sprintf("%s ... %s (%d values)", out[0], out[len(out)-1], len(out))
	}
	return strings.Join(out, ", ")
}

func bytesText(n int64) string {
	for i, u := range []string{"GiB", "MiB", "KiB"} {
		if unit := int64(1) << (30 - 10*i); n != 0 && n%unit == 0 {
			return fmt.Sprintf("%d %s", n/unit, u)
		}
	}
	return fmt.Sprintf("%d B", n)
}

// theirs returns the thesis's series for a point of the entry.
func (f *figure) theirs(e entry, x string) (results.ThesisSeries, bool) {
	s, ok := f.thesis[strings.ReplaceAll(e.Thesis, "{x}", x)]
	return s, ok && e.Thesis != ""
}

func (f *figure) hasThesis() bool {
	for _, e := range f.entries {
		for _, x := range f.cats {
			if s, ok := f.theirs(e, x); ok && len(f.thesisValues(s)) > 0 {
				return true
			}
		}
	}
	return false
}

// thesisValues returns what the figure's kind shows of a thesis's series, in shown units.
func (f *figure) thesisValues(s results.ThesisSeries) []float64 {
	var out []float64
	stat := func(names ...string) {
		for _, n := range names {
			if p, ok := s.Stat(n); ok {
				out = append(out, f.spec.Y.Shown(p.Base()))
			}
		}
	}
	switch f.spec.Kind {
	case results.FigureLine:
		for _, p := range s.Curve() {
			out = append(out, f.spec.Y.Shown(p.Base()))
		}
	case results.FigureBar:
		if c := s.Curve(); len(c) > 0 && c[0].X == results.Num(0) {
			out = append(out, f.spec.Y.Shown(c[0].Base()))
		}
	case results.FigureBox:
		if stat("whisker_low", "q1", "median", "q3", "whisker_high"); len(out) != 5 {
			return nil
		}
	case results.FigureDensity:
		stat("peak_position")
	}
	return out
}

// makeLegend lists what the plot shows. A figure of one bar or box a series
// names them on its axis and needs no more than the thesis's entry.
func (f *figure) makeLegend() {
	named := f.horizontal() && f.spec.X.Column == "" || f.spec.Kind.Grid()
	for _, e := range f.entries {
		if named || !e.hasValues() {
			continue
		}
		f.legend = append(f.legend, legendItem{e.name(), func(c *draw.Canvas, r vg.Rectangle) {
			mid := (r.Min.Y + r.Max.Y) / 2
			switch f.spec.Kind {
			case results.FigureLine:
				if e.hasCI() {
					c.FillPolygon(e.band(), rect(r.Min.X, mid-3, r.Max.X, mid+3))
				}
				c.StrokeLine2(e.line(), r.Min.X, mid, r.Max.X, mid)
				e.drawMarker(c, vg.Point{X: (r.Min.X + r.Max.X) / 2, Y: mid}, 1)
			case results.FigureDensity, results.FigureCDF:
				c.StrokeLine2(e.line(), r.Min.X, mid, r.Max.X, mid)
			case results.FigureBar:
				if f.spec.Y.Log {
					e.drawMarker(c, vg.Point{X: (r.Min.X + r.Max.X) / 2, Y: mid}, 1)
					break
				}
				e.fill(c, rect(r.Min.X+4, mid-2.5, r.Max.X-2, mid+2.5))
			default:
				e.fill(c, rect(r.Min.X+4, mid-2.5, r.Max.X-2, mid+2.5))
			}
		}})
	}
	if f.hasThesis() {
		grey := style{color: grey}
		what := "thesis (pale, same colour)"
		if f.spec.Kind == results.FigureDensity {
			what = "thesis's peak (pale, same colour)"
		}
		f.legend = append(f.legend, legendItem{what, func(c *draw.Canvas, r vg.Rectangle) {
			mid := (r.Min.Y + r.Max.Y) / 2
			if f.spec.Kind == results.FigureBar && f.spec.Y.Log {
				c.DrawGlyphNoClip(draw.GlyphStyle{Color: grey.pale(), Radius: 2.6, Shape: draw.CircleGlyph{}}, vg.Point{X: (r.Min.X + r.Max.X) / 2, Y: mid})
			} else if f.horizontal() {
				c.FillPolygon(grey.pale(), rect(r.Min.X+4, mid-2.5, r.Max.X-2, mid+2.5))
			} else {
				c.StrokeLine2(grey.thesisLine(), r.Min.X, mid, r.Max.X, mid)
			}
		}})
	}
	widest := vg.Length(0)
	for _, l := range f.legend {
		widest = max(widest, legendText.Width(l.label))
	}
	f.columns = max(1, min(len(f.legend), int((width-2*margin)/(widest+sampleWidth+12))))
}

const (
	sampleWidth  = 20 * vg.Length(1)
	legendLine   = 10.5 * vg.Length(1)
	legendGap    = 3 * vg.Length(1)
	labelLine    = 10.5 * vg.Length(1)
	titleLine    = 11 * vg.Length(1)
	subtitleLine = 9.5 * vg.Length(1)
	captionLine  = 7.6 * vg.Length(1)
)

var (
	titleText    = textStyle(8.5, true, ink)
	subtitleText = textStyle(7, false, grey)
	legendText   = textStyle(7, false, ink)
	axisText     = textStyle(7.5, false, ink)
	tickText     = textStyle(6.8, false, ink)
	captionText  = textStyle(5.8, false, grey)
)

// layout fixes the parts' heights and the figure's, top to bottom: title,
// subtitle, plot, legend, caption.
func (f *figure) layout() (title, subtitle, caption []string, plotH vg.Length) {
	w := width - 2*margin
	if !f.bare {
		title, subtitle, caption = wrap(titleText, f.spec.Title, w), wrap(subtitleText, f.subtitle, w), wrap(captionText, f.caption, w)
	}
	plotH = plotHeight
	if f.spec.Kind == results.FigureHeat {
		plotH = f.heatHeight()
	} else if f.spec.Kind == results.FigureMap {
		plotH = f.mapHeight()
	} else if f.horizontal() {
		_, span := f.rows()
		plotH = 34 + vg.Length(span)*max(13, min(26, 130/vg.Length(span)))
	}
	f.height = 2*margin + plotH + legendGap + titleLine*vg.Length(len(title)) + subtitleLine*vg.Length(len(subtitle)) + 3 +
		legendLine*vg.Length((len(f.legend)+f.columns-1)/f.columns) + 4 + captionLine*vg.Length(len(caption))
	return
}

// noBreak is a space at which no line ends.
const noBreak = "\u00a0"

// wrap breaks text into lines of at most w.
func wrap(s text.Style, txt string, w vg.Length) []string {
	var lines []string
	line := ""
	for _, word := range strings.Split(txt, " ") {
		if longer := strings.TrimSpace(line + " " + word); line == "" || s.Width(longer) <= w {
			line = longer
			continue
		}
		lines = append(lines, strings.ReplaceAll(line, noBreak, " "))
		line = word
	}
	return append(lines, strings.ReplaceAll(line, noBreak, " "))
}

// draw paints the whole figure.
func (f *figure) draw(c draw.Canvas) {
	title, subtitle, caption, plotH := f.layout()
	y := f.height - margin
	lines := func(s text.Style, txt []string, height vg.Length) {
		for _, l := range txt {
			c.FillText(s, vg.Point{X: margin, Y: y}, l)
			y -= height
		}
	}
	c.SetColor(color.White)
	c.Fill(c.Rectangle.Path())
	lines(titleText, title, titleLine)
	lines(subtitleText, subtitle, subtitleLine)
	y -= 3

	area := c
	area.Rectangle = vg.Rectangle{Min: vg.Point{X: margin, Y: y - plotH}, Max: vg.Point{X: width - margin, Y: y}}
	if f.spec.Kind == results.FigureHeat {
		f.heat(c, area.Rectangle)
	} else if f.spec.Kind == results.FigureMap {
		f.decisions(c, area.Rectangle)
	} else {
		f.axes(c, area)
	}
	y -= plotH + legendGap

	colW := (width - 2*margin) / vg.Length(f.columns)
	for i, l := range f.legend {
		x := margin + colW*vg.Length(i%f.columns)
		top := y - legendLine*vg.Length(i/f.columns)
		l.sample(&c, vg.Rectangle{Min: vg.Point{X: x, Y: top - legendLine}, Max: vg.Point{X: x + sampleWidth, Y: top}})
		s := legendText
		s.YAlign = draw.YCenter
		c.FillText(s, vg.Point{X: x + sampleWidth + 4, Y: top - legendLine/2 + 0.6}, l.label)
	}
	y -= legendLine*vg.Length((len(f.legend)+f.columns-1)/f.columns) + 4
	lines(captionText, caption, captionLine)
}

// axes draws the data between a pair of axes.
func (f *figure) axes(c, area draw.Canvas) {
	p := plot.New()
	p.BackgroundColor = nil
	for _, a := range []*plot.Axis{&p.X, &p.Y} {
		a.LineStyle.Width, a.LineStyle.Color = 0.5, ink
		a.Tick.LineStyle.Width, a.Tick.LineStyle.Color, a.Tick.Length = 0.5, ink, 3
		a.Padding, a.Label.Padding = 0, 0
		a.Tick.Label.Font, a.Tick.Label.Color = tickText.Font, tickText.Color
		a.Label.TextStyle.Font = tickText.Font // its space is the gap at the ticks
	}
	layer, xLabel, yLabel := f.prepare(p)
	// The axes' labels are drawn here: plot reserves room for them as if their
	// middle were that of a linear axis.
	if xLabel != "" {
		area.Min.Y += labelLine
	}
	if yLabel != "" {
		area.Min.X += labelLine + 1
	}
	grid := plotter.NewGrid()
	grid.Horizontal = draw.LineStyle{Color: rule, Width: 0.5}
	grid.Vertical = grid.Horizontal
	if f.horizontal() {
		grid.Horizontal.Width = 0
	}
	p.Add(grid, layer)
	p.Draw(area)
	middle := p.DataCanvas(area)
	s := axisText
	s.XAlign, s.YAlign = draw.XCenter, draw.YBottom
	c.FillText(s, vg.Point{X: middle.Center().X, Y: area.Min.Y - labelLine + 1}, xLabel)
	s.Rotation, s.YAlign = math.Pi/2, draw.YTop
	c.FillText(s, vg.Point{X: margin, Y: middle.Center().Y}, yLabel)
}

func (f *figure) png() ([]byte, error) {
	f.layout()
	c := vgimg.NewWith(vgimg.UseWH(width, f.height), vgimg.UseDPI(dpi))
	f.draw(draw.New(c))
	var b bytes.Buffer
	_, err := vgimg.PngCanvas{Canvas: c}.WriteTo(&b)
	return b.Bytes(), err
}

func (f *figure) pdf() ([]byte, error) {
	f.layout()
	c := vgpdf.New(width, f.height)
	f.draw(draw.NewCanvas(outlined{c}, width, f.height))
	var b bytes.Buffer
	_, err := c.WriteTo(&b)
	return b.Bytes(), err
}

func (f *figure) svg() ([]byte, error) {
	f.layout()
	c := vgsvg.New(width, f.height)
	f.draw(draw.New(c))
	var b bytes.Buffer
	if _, err := c.WriteTo(&b); err != nil {
		return nil, err
	}
	// The face is Liberation Sans; Arial and Helvetica have the same metrics, so
	// that the layout holds where it is not installed. The title is what a screen
	// reader says.
	s := strings.ReplaceAll(b.String(), "font-family:Liberation Sans;", "font-family:'Liberation Sans',Arial,Helvetica,sans-serif;")
	if i := strings.Index(s, "<svg"); i >= 0 {
		j := i + strings.Index(s[i:], ">") + 1
		s = s[:j] + "\n<title>" + html.EscapeString(f.spec.Title+". "+f.subtitle+".") + "</title>" + s[j:]
	}
	return []byte(s), nil
}
