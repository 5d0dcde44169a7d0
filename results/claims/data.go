package claims

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"

	"github.com/montanaflynn/stats"

	"memsync/results"
)

// data is what checks are made from: our records, or the thesis's own values.
type data interface {
	// line returns a figure's series by the name that it has in the thesis, or by its key.
	line(figure, series string) (line, error)
	// cells returns the runs of a figure (of all, where it is empty) that a condition chooses, by cell.
	cells(figure string, where expr) ([]cell, error)
}

// cell is the runs of a cell.
type cell struct {
	row  results.Row
	runs []run
}

// line is a series of a figure.
type line struct {
	name   string
	points []point
	flat   bool                                                   // its only point stands for every place
	stat   func(name string) (*sample, func(draw) float64, error) // of the only point; nil where there are several
}

// place is where a point stands: a number of the x axis, or a name where it has categories.
type place struct {
	x    float64
	name string
}

// String is the place as sentences name it; numbers are the RTT in ms in the thesis's figures.
func (p place) String() string {
	if p.name != "" {
		return p.name
	}
	return strconv.FormatFloat(p.x, 'g', 6, 64)
}

func placeOf(text string) place {
	if v, ok := results.Quantity(text); ok {
		return place{x: v}
	}
	return place{name: text}
}

// point is a place of a series, by its nominal x.
type point struct {
	place
	sample *sample
}

// at returns the point at a place.
func (l line) at(x place) (point, bool) {
	if l.flat {
		return l.points[0], true
	}
	i := slices.IndexFunc(l.points, func(p point) bool { return p.place == x })
	if i < 0 {
		return point{}, false
	}
	return l.points[i], true
}

// records is our own data.
type records struct {
	figures map[string]results.FigureSpec
	rows    []results.Row
	of      map[string][]results.Row // the rows of each figure
}

func newRecords(figures map[string]results.FigureSpec, rows []results.Row, variant string) records {
	d := records{figures: figures, of: map[string][]results.Row{}}
	for _, r := range rows {
		if r.Variant == variant {
			d.rows = append(d.rows, r)
			d.of[r.Figure] = append(d.of[r.Figure], r)
		}
	}
	return d
}

func (d records) line(figure, series string) (line, error) {
	spec, ok := d.figures[figure]
	if !ok {
		return line{}, fmt.Errorf("there is no figure %s yet", figure)
	}
	rows := spec.Select(d.of[cmp.Or(spec.Figure, spec.Name)])
	if len(rows) == 0 {
		return line{}, fmt.Errorf("no runs of figure %s", figure)
	}
	all, err := results.Group(rows, spec.Query())
	if err != nil {
		return line{}, err
	}
	key := series
	for _, s := range spec.Series {
		if s.Thesis == series {
			key = s.Key
		}
	}
	i := slices.IndexFunc(all, func(s results.Series) bool { return s.Key == key })
	if i < 0 {
		return line{}, fmt.Errorf("figure %s has no runs of series %s", figure, series)
	}
	l := line{name: series}
	baseline := slices.ContainsFunc(spec.Series, func(s results.FigureSeries) bool { return s.Key == key && s.Baseline })
	for _, p := range all[i].Points {
		if len(p.Values) == 0 {
			continue
		}
		x := place{} // without an x axis there is one point, at 0
		if spec.X.Column != "" {
			x = placeOf(p.X)
		}
		l.points = append(l.points, point{x, &sample{p.Pos, p.Values}})
	}
	if len(l.points) == 0 {
		return line{}, fmt.Errorf("no run of series %s of figure %s is ok", series, figure)
	}
	if len(l.points) == 1 {
		l.flat = baseline
		s := l.points[0].sample
		l.stat = func(name string) (*sample, func(draw) float64, error) {
			of, ok := statistics[name]
			if !ok {
				return nil, nil, fmt.Errorf("no statistic %q", name)
			}
			return s, func(d draw) float64 { return of(d(s)) }, nil
		}
	}
	return l, nil
}

func (d records) cells(figure string, where expr) ([]cell, error) {
	rows := d.rows
	if figure != "" {
		rows = d.of[figure]
	}
	byRun := map[string]int{}
	var runs []run
	for _, r := range rows {
		if r.Status != results.StatusOK {
			continue
		}
		i, ok := byRun[r.RunID]
		if !ok {
			i = len(runs)
			byRun[r.RunID] = i
			runs = append(runs, run{r, map[string]float64{}})
		}
		if v, ok := r.Value.Get(); ok {
			runs[i].metrics[r.Metric] = v
		}
	}
	byCell := map[string]int{}
	var cells []cell
	for _, r := range runs {
		if ok, err := where.bool(r); err != nil {
			return nil, err
		} else if !ok {
			continue
		}
		key := r.row.CellKey()
		i, ok := byCell[key]
		if !ok {
			i = len(cells)
			byCell[key] = i
			cells = append(cells, cell{row: r.row})
		}
		cells[i].runs = append(cells[i].runs, r)
	}
	return cells, nil
}

// median of values; NaN of none.
func median(values []float64) float64 { return results.Summarize(values).Median.Float() }

// statistics are those that claims about spread name. Outliers are what lies more than
// 1.5 interquartile ranges beyond the quartiles, as box plots draw them.
var statistics = map[string]func([]float64) float64{
	"median": median,
	"mean":   func(v []float64) float64 { m, _ := stats.Mean(v); return m }, // fails for none only
	"sd":     func(v []float64) float64 { s, _ := stats.StandardDeviationSample(v); return s },
	"iqr": func(v []float64) float64 {
		s := results.Summarize(v)
		return s.Q3.Float() - s.Q1.Float()
	},
	"outlier_count": func(v []float64) float64 { return float64(len(outliers(v))) },
	"outlier_max": func(v []float64) float64 {
		o := outliers(v)
		if len(o) == 0 {
			return 0 // none lies anywhere
		}
		return slices.Max(o)
	},
}

func outliers(v []float64) []float64 {
	s := results.Summarize(v)
	reach := 1.5 * (s.Q3.Float() - s.Q1.Float())
	return slices.DeleteFunc(slices.Clone(v), func(x float64) bool { return x >= s.Q1.Float()-reach && x <= s.Q3.Float()+reach })
}

// thesis is the thesis's own data: one value a point, and statistics as it gives them.
type thesis struct{}

func (thesis) line(figure, series string) (line, error) {
	for _, s := range results.Thesis(figure) {
		if s.Name != series {
			continue
		}
		l := line{name: series}
		for _, p := range s.Curve() {
			l.points = append(l.points, point{place{x: p.X.Float()}, &sample{p.X.Float(), []float64{p.Base()}}})
		}
		l.stat = func(name string) (*sample, func(draw) float64, error) {
			p, ok := s.Stat(name)
			if !ok {
				return nil, nil, fmt.Errorf("the thesis has no %s of %s", name, series)
			}
			return &sample{math.NaN(), []float64{p.Base()}}, func(draw) float64 { return p.Base() }, nil
		}
		return l, nil
	}
	return line{}, fmt.Errorf("the thesis's figure %s has no series %s", figure, series)
}

func (thesis) cells(string, expr) ([]cell, error) {
	return nil, errors.New("the thesis has no such records")
}

// thesisNumbers returns the thesis's own value of each check of a claim, by Check.What.
func thesisNumbers(c Claim) map[string]results.Number {
	out := map[string]results.Number{}
	if c.Set != "thesis" {
		return out
	}
	checks, err := c.checks(thesis{})
	if err != nil {
		return out // it gives no values for these
	}
	for _, k := range checks {
		out[k.what] = results.Num(k.value(func(s *sample) []float64 { return s.values }))
	}
	return out
}
