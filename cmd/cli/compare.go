package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"memsync/results"
	"memsync/results/table"
	"memsync/strategies/region"
)

type compareOptions struct {
	metrics   []string
	alpha     float64
	threshold float64
	json      bool
}

func newCompareCmd(s *state) *cobra.Command {
	o := &compareOptions{}
	c := &cobra.Command{
		Use:   "compare OLD NEW",
		Short: "Compare two result folders cell by cell; fail on a regression",
		Long: `Sets the runs of NEW against those of OLD, cell by cell: medians, the change with
its 95 % confidence interval (Hodges-Lehmann, on ratios) and the p of an exact
Mann-Whitney test. "worse" and "better" are changes with p below --alpha and of at
least --threshold; "~" is everything else. Every cell is tested on its own: of
cells that did not change, about a share of --alpha may show a change below the
threshold. Metrics are those that the figures draw, unless named.

Exit status: 0 nothing is worse; 1 a cell is worse, or was ok and is no more;
3 NEW has a run that read wrong bytes; 6 wrong usage.`,
		Example: `  memsync compare results/out/before results/out/after
  memsync compare main branch --threshold 10% --metric throughput --json`,
		Args: cobra.ExactArgs(2),
		RunE: func(_ *cobra.Command, args []string) error { return runCompare(s, o, args[0], args[1]) },
	}
	f := c.Flags()
	f.StringSliceVar(&o.metrics, "metric", nil, "metric to compare; may be repeated (default: what the figures draw)")
	f.Float64Var(&o.alpha, "alpha", 0.05, "level of significance, above 0 and below 1")
	o.threshold = 0.05
	f.Var(unitValue[float64]{&o.threshold, region.ParseFraction, func(f float64) string { return fmt.Sprintf("%g%%", f*100) }, "fraction"}, "threshold", "smallest change that counts, 5% or 0.05")
	f.BoolVar(&o.json, "json", false, "print one JSON object")
	completions(c, map[string]func() []string{"metric": comparedMetrics})
	return c
}

func comparedMetrics() []string {
	var names []string
	for _, m := range results.Metrics() {
		if m.Better != results.Neither {
			names = append(names, m.Name)
		}
	}
	return names
}

// comparison is what compare prints as JSON.
type comparison struct {
	Old       string           `json:"old"`
	New       string           `json:"new"`
	Alpha     float64          `json:"alpha"`
	Threshold float64          `json:"threshold"`
	Cells     []comparedCell   `json:"cells"`
	GeoMean   map[string]any   `json:"geometric_mean"` // of new/old - 1, by metric
	Lost      []comparedBroken `json:"lost"`           // ok in OLD only
	Gained    []comparedBroken `json:"gained"`         // ok in NEW only
	Corrupt   []comparedBroken `json:"corrupt"`        // of NEW
	Worse     int              `json:"worse"`
	Better    int              `json:"better"`
}

type comparedCell struct {
	Cell       map[string]string `json:"cell"`
	Metric     string            `json:"metric"`
	Unit       string            `json:"unit"`
	Old        results.Summary   `json:"old"`
	New        results.Summary   `json:"new"`
	Change     results.Number    `json:"change"`
	ChangeLow  results.Number    `json:"change_low"`
	ChangeHigh results.Number    `json:"change_high"`
	P          results.Number    `json:"p"`
	Verdict    string            `json:"verdict"` // worse, better or ~
}

type comparedBroken struct {
	Cell   map[string]string `json:"cell"`
	Status string            `json:"status"` // on the other side; "absent" where it has no such cell
	Error  string            `json:"error"`
}

func runCompare(s *state, o *compareOptions, oldDir, newDir string) error {
	if o.alpha <= 0 || o.alpha >= 1 {
		return exitWith(exitUsage, errors.New("--alpha must be above 0 and below 1"))
	}
	for _, m := range o.metrics {
		if !slices.Contains(comparedMetrics(), m) {
			return exitWith(exitUsage, fmt.Errorf("no metric %q to compare; valid: %s", m, strings.Join(comparedMetrics(), ", ")))
		}
	}
	old, err := readRows(s, oldDir)
	if err != nil {
		return err
	}
	new, err := readRows(s, newDir)
	if err != nil {
		return err
	}
	drawn := drawnMetrics(s)
	c, err := results.Compare(old, new, func(figure, metric string) bool {
		if o.metrics != nil {
			return slices.Contains(o.metrics, metric)
		}
		return slices.Contains(drawn[figure], metric)
	})
	if err != nil {
		return exitWith(exitUsage, fmt.Errorf("%s and %s: %w", oldDir, newDir, err))
	}
	out := deltas(c, o.alpha, o.threshold)
	out.Old, out.New = oldDir, newDir
	if o.json {
		e := json.NewEncoder(s.stdout)
		e.SetIndent("", "  ")
		err = e.Encode(out)
	} else {
		err = printComparison(s, out, c.Columns())
	}
	switch {
	case err != nil:
		return exitWith(exitFailed, err)
	case len(c.Corrupt) > 0:
		return exitWith(exitCorrupt, fmt.Errorf("%d cells of %s have runs that read wrong bytes", len(c.Corrupt), newDir))
	case out.Worse > 0 || len(c.Lost) > 0:
		return exitWith(exitFailed, fmt.Errorf("%d of %d comparisons are worse, %d cells are no more ok", out.Worse, len(out.Cells), len(c.Lost)))
	}
	return nil
}

// readRows reads the closed runs of a folder; what was cut off is said.
func readRows(s *state, dir string) ([]results.Row, error) {
	rows, err := results.Read(dir)
	switch {
	case errors.Is(err, results.ErrUnclosed):
		fmt.Fprintln(s.stderr, "memsync:", err)
	case errors.Is(err, fs.ErrNotExist):
		return nil, exitWith(exitUsage, err)
	case err != nil:
		return nil, exitWith(exitFailed, err)
	}
	return rows, nil
}

// drawnMetrics are the metrics that each figure draws.
func drawnMetrics(s *state) map[string][]string {
	drawn := map[string][]string{}
	for _, f := range s.program.Figures {
		for _, spec := range append([]results.FigureSpec{f.Spec}, f.More...) {
			drawn[f.Spec.Name] = append(drawn[f.Spec.Name], spec.Y.Column)
		}
	}
	return drawn
}

func deltas(c results.Comparison, alpha, threshold float64) comparison {
	cols := c.Columns()
	cell := func(r results.Row) map[string]string {
		m := map[string]string{}
		for _, col := range cols {
			m[col], _ = r.Get(col) // Columns are columns
		}
		return m
	}
	broken := func(list []results.Broken) []comparedBroken {
		out := []comparedBroken{}
		for _, b := range list {
			status := string(b.Status)
			if status == "" {
				status = "absent"
			}
			out = append(out, comparedBroken{cell(b.Cell), status, b.Error})
		}
		return out
	}
	out := comparison{Alpha: alpha, Threshold: threshold, Cells: []comparedCell{}, GeoMean: map[string]any{},
		Lost: broken(c.Lost), Gained: broken(c.Gained), Corrupt: []comparedBroken{}}
	for _, r := range c.Corrupt {
		out.Corrupt = append(out.Corrupt, comparedBroken{cell(r), string(results.StatusCorrupt), ""})
	}
	for _, d := range c.Deltas {
		v := "~"
		switch {
		case d.Worse(alpha, threshold):
			v = "worse"
			out.Worse++
		case d.Improved(alpha, threshold):
			v = "better"
			out.Better++
		}
		out.Cells = append(out.Cells, comparedCell{cell(d.Cell), d.Cell.Metric, d.Cell.Unit, d.Old, d.New, d.Change, d.ChangeLow, d.ChangeHigh, d.P, v})
		out.GeoMean[d.Cell.Metric] = c.GeoMean(d.Cell.Metric)
	}
	return out
}

func printComparison(s *state, c comparison, cols []string) error {
	percent := func(n results.Number) string {
		v, ok := n.Get()
		if !ok {
			return "–"
		}
		return strconv.FormatFloat(100*v, 'f', 1, 64) + "%"
	}
	value := func(n results.Number, unit string) string {
		if s.stdoutTTY {
			return table.Human(n.Float(), unit)
		}
		return n.String()
	}
	var w io.Writer = s.stdout
	if s.stdoutTTY {
		aligned := tabwriter.NewWriter(s.stdout, 0, 0, 2, ' ', 0)
		defer aligned.Flush()
		w = aligned
	}
	line := func(fields ...string) { fmt.Fprintln(w, strings.Join(fields, "\t")) }
	line(append(slices.Clone(cols), "metric", "old", "new", "change", "ci_low", "ci_high", "p", "n", "verdict")...)
	for _, d := range c.Cells {
		var f []string
		for _, col := range cols {
			f = append(f, d.Cell[col])
		}
		p := "–"
		if v, ok := d.P.Get(); ok {
			p = strconv.FormatFloat(v, 'f', 3, 64)
		}
		line(append(f, d.Metric, value(d.Old.Median, d.Unit), value(d.New.Median, d.Unit), percent(d.Change), percent(d.ChangeLow),
			percent(d.ChangeHigh), p, fmt.Sprintf("%d+%d", d.Old.N, d.New.N), d.Verdict)...)
	}
	for _, m := range results.Metrics() {
		if g, ok := c.GeoMean[m.Name]; ok {
			fmt.Fprintf(w, "geometric mean of %s: %s\n", m.Name, percent(g.(results.Number)))
		}
	}
	for _, b := range c.Lost {
		fmt.Fprintf(w, "no more ok: %s: %s %s\n", cellText(b.Cell, cols), b.Status, b.Error)
	}
	for _, b := range c.Gained {
		fmt.Fprintf(w, "new: %s (before: %s)\n", cellText(b.Cell, cols), b.Status)
	}
	return nil
}

func cellText(cell map[string]string, cols []string) string {
	var parts []string
	for _, col := range cols {
		parts = append(parts, col+"="+cell[col])
	}
	return strings.Join(parts, " ")
}

func newMergeCmd(s *state) *cobra.Command {
	var out string
	c := &cobra.Command{
		Use:   "merge DIR... --out DIR",
		Short: "Join the result folders of the shards of one sweep",
		Long: `Joins result folders (memsync run --shard i/n) into a new one. A run that stands in
several is taken once; where its rows differ, nothing is merged and the run is named.`,
		Example: `  memsync merge part1 part2 --out results/out/all && memsync plot results/out/all`,
		Args:    cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if out == "" {
				return exitWith(exitUsage, errors.New("--out DIR is missing: the folder to make"))
			}
			m, err := results.Merge(out, args...)
			for _, note := range m.Notes {
				fmt.Fprintf(s.stderr, "%s: left out: %s\n", s.program.Name, note)
			}
			switch {
			case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrExist):
				return exitWith(exitUsage, err)
			case err != nil:
				return exitWith(exitFailed, err)
			}
			fmt.Fprintf(s.stderr, "%d runs in %s; %d were there more than once\n", m.Runs, out, m.Repeated)
			return nil
		},
	}
	c.Flags().StringVar(&out, "out", "", "`folder` to make; must have no records yet")
	return c
}
