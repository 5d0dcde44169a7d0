package results

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// FigureKind is the form of a figure.
type FigureKind string

// The kinds of figures.
const (
	FigureLine    FigureKind = "line"    // median and its interval against x
	FigureBar     FigureKind = "bar"     // median and its interval, a bar per x (or series)
	FigureBox     FigureKind = "box"     // quartiles, whiskers of 1.5 interquartile ranges, outliers
	FigureDensity FigureKind = "density" // kernel density of the runs' values
	FigureCDF     FigureKind = "cdf"     // share of the runs, or of a histogram's counts, at or below a value
	FigureHeat    FigureKind = "heat"    // the median as the colour of a cell of x and Rows, a panel a series
	FigureMap     FigureKind = "map"     // the series with the best median as the colour of a cell of x and Rows
)

// Grid reports whether the figure has cells of x and Rows.
func (k FigureKind) Grid() bool { return k == FigureHeat || k == FigureMap }

// Axis is an axis of a figure: what it shows, and in which unit.
type Axis struct {
	Column   string  // X: the column (or params.NAME) that tells points apart; Y: the metric
	Position string  // X only: numeric column whose median places a point, such as rtt_measured_ms; empty means Column
	Label    string  // without unit: "First-chunk latency"
	Unit     string  // shown: "ms", "MiB/s"; empty for a pure number or category
	Scale    float64 // stored value x Scale = shown value (1000 for s to ms); 0 means 1
	Log      bool
	Category bool // X only: equally spaced, not to scale

	Categories []string // X only: order of categories by their text; those not named follow, sorted
}

// Shown converts a stored value to the axis's unit.
func (a Axis) Shown(v float64) float64 {
	if a.Scale == 0 {
		return v
	}
	return v * a.Scale
}

// String returns label and unit as they stand at the axis.
func (a Axis) String() string {
	if a.Unit == "" {
		return a.Label
	}
	return fmt.Sprintf("%s (%s)", a.Label, a.Unit)
}

// FigureSeries names a series of a figure and its counterpart in the thesis.
type FigureSeries struct {
	Key      string // texts of the figure's key columns, joined by "/"
	Label    string // in the legend; empty means Key
	Baseline bool   // does not depend on x: its median is drawn across a line figure
	Thesis   string // name of the series in the thesis's figure, in which {x} stands for the point's x; empty where it has none
}

// FigureSpec is a figure as data: which rows it shows and how. Package plots draws it.
type FigureSpec struct {
	Name   string // of the figure, as in file names
	Figure string // text of the figure column of its rows; empty means Name
	Title  string
	Kind   FigureKind
	X, Y   Axis
	Rows   Axis                // of heat and map: the vertical axis; Y is what colours
	Where  map[string][]string // only rows whose column has one of the texts; nil is all rows of the figure
	Keys   []string            // columns (or params.NAME) that tell series apart
	Series []FigureSeries      // order, labels and colours; series that are not named follow in order of their keys
	Thesis string              // the thesis's figure that lies beneath; empty for none
	Versus string              // lines only: key of the series that the others are compared with; the caption says where each crosses it
	Note   string              // a sentence for the caption, such as what a reader must know of the method
}

// Select returns those of rows that the figure shows.
func (f FigureSpec) Select(rows []Row) []Row {
	return Filter(rows, func(r Row) bool {
		if r.Figure != cmp.Or(f.Figure, f.Name) {
			return false
		}
		for column, texts := range f.Where {
			if v, err := r.Get(column); err != nil || !slices.Contains(texts, v) {
				return false
			}
		}
		return true
	})
}

// Query returns what Group needs to make the figure's series.
func (f FigureSpec) Query() Query {
	q := Query{Metric: f.Y.Column, Keys: f.Keys, X: f.X.Column, Position: f.X.Position}
	if f.histogram() {
		q.Metric = "bytes_done" // every run that is ok has it; what counts are the runs' names
	}
	if f.Kind.Grid() {
		q.Keys = append(slices.Clone(f.Keys), f.Rows.Column)
	}
	return q
}

// histogram reports whether the figure shows raw histograms and not a metric.
func (f FigureSpec) histogram() bool {
	_, ok := histogramUnits[f.Y.Column]
	return ok && f.Kind == FigureCDF
}

// Check returns an error unless the figure can be drawn: known kind, metric and
// columns, series named once, thesis series that exist.
func (f FigureSpec) Check() error {
	fault := func(format string, a ...any) error {
		return fmt.Errorf("figure %s: %w", f.Name, fmt.Errorf(format, a...))
	}
	switch f.Kind {
	case FigureLine, FigureBar, FigureBox, FigureDensity, FigureCDF, FigureHeat, FigureMap:
	default:
		return fault("no kind %q", f.Kind)
	}
	if f.Name == "" || f.Title == "" || f.Y.Label == "" {
		return fault("name, title and label of y must be set")
	}
	if f.Kind == FigureLine && f.X.Column == "" {
		return fault("a line needs a column for x")
	}
	if (f.X.Column == "" || f.Rows.Column == "" || len(f.Keys) == 0) && f.Kind.Grid() {
		return fault("a %s needs columns for x and rows, and keys", f.Kind)
	}
	if m, _ := MetricByName(f.Y.Column); f.Kind == FigureMap && m.Better == Neither {
		return fault("of %s neither more nor less is better", f.Y.Column)
	}
	if m, ok := MetricByName(f.Y.Column); (!ok || m.Name == RunMetric) && !f.histogram() {
		return fault("no metric %q", f.Y.Column)
	}
	for _, c := range slices.Concat([]string{f.X.Column, f.X.Position, f.Rows.Column}, f.Keys, slices.Collect(maps.Keys(f.Where))) {
		if c == "" {
			continue
		}
		if _, err := (Row{}).Get(c); err != nil {
			return fault("%w", err)
		}
	}
	theirs := map[string]bool{}
	if f.Thesis != "" {
		t := Thesis(f.Thesis)
		if t == nil {
			return fault("the thesis has no figure %q", f.Thesis)
		}
		for _, s := range t {
			theirs[s.Name] = true
		}
	}
	if f.Versus != "" && !slices.ContainsFunc(f.Series, func(s FigureSeries) bool { return s.Key == f.Versus }) {
		return fault("no series %q to compare with", f.Versus)
	}
	seen := map[string]bool{}
	for _, s := range f.Series {
		if seen[s.Key] {
			return fault("series %q is named twice", s.Key)
		}
		seen[s.Key] = true
		known := f.Thesis == "" || s.Thesis == "" || theirs[s.Thesis]
		if before, after, ok := strings.Cut(s.Thesis, "{x}"); ok {
			for name := range theirs {
				known = known || strings.HasPrefix(name, before) && strings.HasSuffix(name, after)
			}
		}
		if !known {
			return fault("the thesis's figure %q has no series %q", f.Thesis, s.Thesis)
		}
	}
	return nil
}
