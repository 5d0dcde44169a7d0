// Package table prints summaries for people and for scripts: aligned text with
// human units on a terminal, tab-separated base units elsewhere.
package table

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"memsync/results"
)

// Line is one line of a table: what it is about, and one summary per column.
type Line struct {
	Labels []string // as many as the table's Labels
	Cells  []Cell   // as many as the table's Metrics
}

// Cell is one summary, with the runs that gave no value.
type Cell struct {
	results.Summary
	Failed int
}

// Table is a table of summaries. The zero Table has no columns.
type Table struct {
	Labels  []string // headings of the leading columns
	Metrics []string // names of metrics, one per column that follows
	Lines   []Line
}

// FromRows makes the table of rows: a line for each combination of the columns
// labels, in the order of first appearance, and a column for each metric.
// Columns are those of results.Row.Get.
func FromRows(rows []results.Row, labels, metrics []string) (Table, error) {
	t := Table{Labels: labels, Metrics: metrics}
	index := map[string]int{}
	for _, r := range rows {
		texts := make([]string, len(labels))
		for i, c := range labels {
			var err error
			if texts[i], err = r.Get(c); err != nil {
				return Table{}, fmt.Errorf("make table: %w", err)
			}
		}
		key := strings.Join(texts, "\x00")
		if _, ok := index[key]; !ok {
			index[key] = len(t.Lines)
			t.Lines = append(t.Lines, Line{Labels: texts, Cells: make([]Cell, len(metrics))})
		}
	}
	for m, metric := range metrics {
		series, err := results.Group(rows, results.Query{Metric: metric, Keys: labels})
		if err != nil {
			return Table{}, fmt.Errorf("make table: %w", err)
		}
		for _, s := range series {
			p := s.Points[0]
			// Group joins with "/", which a label may hold: find the line by its texts.
			for i := range t.Lines {
				if strings.Join(t.Lines[i].Labels, "/") == s.Key {
					t.Lines[i].Cells[m] = Cell{p.Summary, p.Failed}
				}
			}
		}
	}
	return t, nil
}

// Write writes the table: aligned for a terminal, else as tab-separated values
// in base units at full precision, whose columns are stable: the labels, then
// for each metric its median, ci_low, ci_high, n and the runs that are not ok. Absent numbers are empty.
func (t Table) Write(w io.Writer, terminal bool) error {
	var b strings.Builder
	if terminal {
		t.aligned(&b)
	} else {
		t.separated(&b)
	}
	if _, err := io.WriteString(w, b.String()); err != nil {
		return fmt.Errorf("write table: %w", err)
	}
	return nil
}

func (t Table) separated(b *strings.Builder) {
	head := slices.Clone(t.Labels)
	for _, m := range t.Metrics {
		head = append(head, m, m+"_ci_low", m+"_ci_high", m+"_n", m+"_not_ok")
	}
	b.WriteString(strings.Join(head, "\t") + "\n")
	clean := strings.NewReplacer("\t", " ", "\n", " ")
	for _, l := range t.Lines {
		var f []string
		for _, s := range l.Labels {
			f = append(f, clean.Replace(s))
		}
		for _, c := range l.Cells {
			f = append(f, c.Median.String(), c.CILow.String(), c.CIHigh.String(), strconv.Itoa(c.N), strconv.Itoa(c.Failed))
		}
		b.WriteString(strings.Join(f, "\t") + "\n")
	}
}

// aligned writes labels to the left, numbers to the right.
func (t Table) aligned(b *strings.Builder) {
	lines := [][]string{slices.Clone(t.Labels)}
	for _, m := range t.Metrics {
		lines[0] = append(lines[0], m, "95 % CI", "n")
	}
	for _, l := range t.Lines {
		f := slices.Clone(l.Labels)
		for i, c := range l.Cells {
			m, _ := results.MetricByName(t.Metrics[i])
			f = append(f, cellTexts(c, m.Unit)...)
		}
		lines = append(lines, f)
	}
	width := make([]int, len(lines[0]))
	for _, l := range lines {
		for i, s := range l {
			width[i] = max(width[i], utf8.RuneCountInString(s))
		}
	}
	for _, l := range lines {
		var out strings.Builder
		for i, s := range l {
			pad := strings.Repeat(" ", width[i]-utf8.RuneCountInString(s))
			if i < len(t.Labels) {
				out.WriteString(s + pad + "  ")
			} else {
				out.WriteString(pad + s + "  ")
			}
		}
		b.WriteString(strings.TrimRight(out.String(), " ") + "\n")
	}
}

// cellTexts returns median, interval and n, in one unit prefix, that of the median.
func cellTexts(c Cell, unit string) []string {
	n := strconv.Itoa(c.N)
	if c.Failed > 0 {
		n += fmt.Sprintf(" (%d not ok)", c.Failed)
	}
	median, ok := c.Median.Get()
	if !ok {
		return []string{"–", "", n}
	}
	factor, prefixed := scale(math.Abs(median), unit)
	number := func(v float64) string { return significant(v / factor) }
	ci := "–"
	if low, ok := c.CILow.Get(); ok {
		ci = number(low) + " .. " + number(c.CIHigh.Float())
	}
	return []string{strings.TrimSpace(number(median) + " " + prefixed), ci, n}
}

// Human writes a value in base units as people read it: 3 significant digits
// and a prefix. B takes binary prefixes (KiB), s and bit/s and B/s decimal
// ones; count and ratio none, and no unit.
func Human(v float64, unit string) string {
	factor, prefixed := scale(math.Abs(v), unit)
	return strings.TrimSpace(significant(v/factor) + " " + prefixed)
}

type prefix struct {
	factor float64
	name   string
}

// scale returns by what to divide, and the unit with its prefix.
func scale(v float64, unit string) (float64, string) {
	var prefixes []prefix
	switch unit {
	case "s":
		prefixes = []prefix{{1, "s"}, {1e-3, "ms"}, {1e-6, "us"}, {1e-9, "ns"}}
	case "B":
		prefixes = []prefix{{1 << 40, "TiB"}, {1 << 30, "GiB"}, {1 << 20, "MiB"}, {1 << 10, "KiB"}, {1, "B"}}
	case "B/s", "bit/s":
		prefixes = []prefix{{1e9, "G" + unit}, {1e6, "M" + unit}, {1e3, "k" + unit}, {1, unit}}
	default:
		return 1, ""
	}
	if v == 0 {
		for _, p := range prefixes {
			if p.factor == 1 {
				return 1, p.name
			}
		}
	}
	for _, p := range prefixes {
		// What rounds up to the next prefix belongs there: 999.6 us is 1.00 ms.
		if v >= p.factor*0.9995 {
			return p.factor, p.name
		}
	}
	last := prefixes[len(prefixes)-1]
	return last.factor, last.name
}

// significant writes v with 3 significant digits and no exponent, but for very large numbers.
func significant(v float64) string {
	a := math.Abs(v)
	switch {
	case a != 0 && (a < 0.001 || a >= 1e7):
		return strconv.FormatFloat(v, 'g', 3, 64)
	case a >= 99.95 || a == 0:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case a >= 9.995:
		return strconv.FormatFloat(v, 'f', 1, 64)
	case a >= 0.9995:
		return strconv.FormatFloat(v, 'f', 2, 64)
	}
	return strconv.FormatFloat(v, 'f', 3, 64)
}
