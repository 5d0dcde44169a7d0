package results

import (
	"fmt"
	"slices"
	"strings"
)

// Filter returns the rows for which keep is true.
func Filter(rows []Row, keep func(Row) bool) []Row {
	var out []Row
	for _, r := range rows {
		if keep(r) {
			out = append(out, r)
		}
	}
	return out
}

// Point is one place of a series: what the runs of one cell measured.
type Point struct {
	X      string    // text of the x column; "" where there is none
	Pos    float64   // where it is drawn: median of the position column, else X as a Quantity, else 0
	Values []float64 // one for each run that is ok, in the order of recording
	Runs   []string  // the runs' names, in the same order
	Summary
	Failed int // runs of the cell with another status
}

// Series is one line, or one group of bars, of a figure.
type Series struct {
	Key    string // texts of the key columns, joined by "/"
	Points []Point
}

// Query says which rows make series, and how.
type Query struct {
	Metric   string
	Keys     []string // columns (or params.NAME) that tell series apart
	X        string   // column that tells points apart; empty for one point a series
	Position string   // numeric column whose median over a point's runs is its place; empty means X
}

// Group groups rows into series. Series come in the order in which they first
// appear, points by Pos, those of equal Pos by X. Runs that are not ok are
// counted and give no value. Series that differ in a column which is neither
// key nor x are one series to Group: Varying tells.
func Group(rows []Row, q Query) ([]Series, error) {
	if m, ok := MetricByName(q.Metric); !ok || m.Name == RunMetric {
		return nil, fmt.Errorf("group rows: no metric %q", q.Metric)
	}
	type place struct{ key, x string }
	var (
		series    []Series
		index     = map[string]int{}
		points    = map[place]*Point{}
		positions = map[place][]float64{}
		order     []place
	)
	for _, r := range rows {
		failed := r.Metric == RunMetric && r.Status != StatusOK
		if !failed && (r.Metric != q.Metric || r.Status != StatusOK) {
			continue
		}
		keys := make([]string, len(q.Keys))
		for i, c := range q.Keys {
			var err error
			if keys[i], err = r.Get(c); err != nil {
				return nil, fmt.Errorf("group rows: series: %w", err)
			}
		}
		at := place{key: strings.Join(keys, "/")}
		if q.X != "" {
			var err error
			if at.x, err = r.Get(q.X); err != nil {
				return nil, fmt.Errorf("group rows: x: %w", err)
			}
		}
		p := points[at]
		if p == nil {
			p = &Point{X: at.x}
			points[at] = p
			order = append(order, at)
		}
		if failed {
			p.Failed++
			continue
		}
		p.Values, p.Runs = append(p.Values, r.Value.v), append(p.Runs, r.RunID)
		if q.Position != "" {
			s, err := r.Get(q.Position)
			if err != nil {
				return nil, fmt.Errorf("group rows: position: %w", err)
			}
			if v, err := parseFloat(s); err == nil {
				positions[at] = append(positions[at], v)
			}
		}
	}
	for _, at := range order {
		p := points[at]
		p.Summary = Summarize(p.Values)
		if v, ok := Quantity(at.x); ok {
			p.Pos = v
		}
		if s := Summarize(positions[at]); s.N > 0 {
			p.Pos = s.Median.v
		}
		i, ok := index[at.key]
		if !ok {
			i = len(series)
			index[at.key] = i
			series = append(series, Series{Key: at.key})
		}
		series[i].Points = append(series[i].Points, *p)
	}
	for _, s := range series {
		slices.SortStableFunc(s.Points, func(a, b Point) int {
			switch {
			case a.Pos < b.Pos:
				return -1
			case a.Pos > b.Pos:
				return 1
			}
			return strings.Compare(a.X, b.X)
		})
	}
	return series, nil
}

// Varying returns the cell columns, but those of except, that differ between
// rows, with the values that they take, in the order of appearance. What a
// grouping does not separate but Varying names is mixed into its series.
func Varying(rows []Row, except ...string) map[string][]string {
	out := map[string][]string{}
	for _, c := range columns {
		if !c.cell || slices.Contains(except, c.Name) {
			continue
		}
		var values []string
		seen := map[string]bool{}
		for i := range rows {
			if v := encodeField(c.field(&rows[i])); !seen[v] {
				seen[v] = true
				values = append(values, v)
			}
		}
		if len(values) > 1 {
			out[c.Name] = values
		}
	}
	return out
}
