package results

import (
	_ "embed"
	"fmt"
	"strings"
	"sync"
)

//go:embed thesis/values.csv
var thesisCSV string

// ThesisPoint is one value of the thesis.
type ThesisPoint struct {
	X       Number // RTT in ms; absent where the value is a statistic or holds for a range
	Stat    string // the statistic (median, q1, ...), or the range (">=10", "all"), where X is absent
	Y       float64
	Unit    string // of Y, as printed there: us, ms, s, MiB/s, MB, x, count, 1/ms
	Bound   string // "" for a value; "<" or ">" where only a bound is known, "~" where it is rough
	Printed bool   // stands in the thesis's text or is printed on the figure; else read from its pixels
}

// Base returns the value in the base unit of records (s, B, B/s), the bound aside.
func (p ThesisPoint) Base() float64 {
	switch p.Unit {
	case "us":
		return p.Y / 1e6
	case "ms":
		return p.Y / 1e3
	case "MiB/s":
		return p.Y * (1 << 20)
	case "MB":
		return p.Y * 1e6
	case "1/ms":
		return p.Y * 1e3
	}
	return p.Y
}

// ThesisSeries is a series of a figure of the thesis.
type ThesisSeries struct {
	Name   string
	Points []ThesisPoint
}

// Curve returns the points that can be drawn: values at an RTT, each RTT once.
// Where one is both printed and read from pixels, the pixels count, because the
// text rounds, and at some places differs from its own figure.
func (s ThesisSeries) Curve() []ThesisPoint {
	var out []ThesisPoint
	for _, p := range s.Points {
		if !p.X.ok || p.Bound != "" {
			continue
		}
		i := 0
		for i < len(out) && out[i].X.v < p.X.v {
			i++
		}
		switch {
		case i < len(out) && out[i].X == p.X:
			if out[i].Printed && !p.Printed {
				out[i] = p
			}
		default:
			out = append(out[:i], append([]ThesisPoint{p}, out[i:]...)...)
		}
	}
	return out
}

// Stat returns the point of a statistic.
func (s ThesisSeries) Stat(name string) (ThesisPoint, bool) {
	for _, p := range s.Points {
		if p.Stat == name {
			return p, true
		}
	}
	return ThesisPoint{}, false
}

// Thesis returns the series of a figure of the thesis, in its order, or nil
// where it has no such figure. Source, method and errors: thesis/README.md.
func Thesis(figure string) []ThesisSeries { return thesisFigures()[figure] }

var thesisFigures = sync.OnceValue(func() map[string][]ThesisSeries {
	figures, err := parseThesis(thesisCSV)
	if err != nil {
		panic("results: " + err.Error()) // a test reads all of the embedded file
	}
	return figures
})

func parseThesis(text string) (map[string][]ThesisSeries, error) {
	figures := map[string][]ThesisSeries{}
	for i, l := range strings.Split(strings.TrimSpace(text), "\n") {
		f := strings.Split(l, ",")
		if len(f) != 7 {
			return nil, fmt.Errorf("thesis values line %d: %d columns, not 7", i+1, len(f))
		}
		if i == 0 {
			continue
		}
		p := ThesisPoint{Unit: f[5], Printed: f[6] == "text"}
		if x, err := parseFloat(f[2]); err == nil && f[3] == "ms RTT" {
			p.X = Num(x)
		} else {
			p.Stat = f[2]
		}
		y := strings.TrimLeft(f[4], "<>~")
		p.Bound = f[4][:len(f[4])-len(y)]
		var err error
		if p.Y, err = parseFloat(y); err != nil {
			return nil, fmt.Errorf("thesis values line %d: y is %q: %w", i+1, f[4], err)
		}
		series := figures[f[0]]
		j := 0
		for j < len(series) && series[j].Name != f[1] {
			j++
		}
		if j == len(series) {
			series = append(series, ThesisSeries{Name: f[1]})
		}
		series[j].Points = append(series[j].Points, p)
		figures[f[0]] = series
	}
	return figures, nil
}
