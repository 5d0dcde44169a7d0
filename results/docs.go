package results

import (
	"fmt"
	"strings"
)

// MetricsPage returns docs/metrics.md, made from the tables of columns and metrics.
func MetricsPage() string {
	var b strings.Builder
	fmt.Fprintf(&b, `# Records and metrics

<!-- Made from the tables in results/row.go and results/metric.go by: go test ./results -run TestMetricsPage -rewrite -->

A sweep writes `+"`%s` and `%s`"+` into its folder. The records are RFC 4180 CSV with one header line and lines that
end in LF; line breaks in text are written as "; ", so one row is one line. This page describes schema %d.

A run is one row per metric and a last row, metric `+"`%s`"+`, that closes it; they are appended in one write and fsynced.
After a kill, the rows of a run that is not closed are cut off before the sweep goes on. Values are in base units at full
precision. 1 MB is 10^6 bytes, 1 MiB is 2^20. A run that is not `+"`ok`"+` has an empty value in its closing row, says why in
`+"`error`"+`, and enters no summary. Summaries give median, quartiles, n and the 95 %% confidence interval of the median by
order statistics, which exists from n = %d.

## Columns

| column | in the cell | meaning |
|---|---|---|
`, RunsFile, ManifestFile, Schema, RunMetric, MinCI)
	for _, c := range columns {
		cell := ""
		if c.cell {
			cell = "yes"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", c.Name, cell, c.Doc)
	}
	b.WriteString(`
Runs that agree in all columns of the cell repeat one measurement.

## Metrics

| metric | unit | better | from | to | meaning |
|---|---|---|---|---|---|
`)
	for _, m := range metrics {
		kind := string(m.Better)
		if m.Better == Neither {
			kind = "–"
		}
		if m.Exact {
			kind += ", exact"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s | %s |\n", m.Name, m.Unit, kind, m.From, m.To, m.Doc)
	}
	b.WriteString(`
A metric marked exact is the same in every run of a cell; all others are noisy.

## Schemas
Folders of another schema are refused: the same names mean other things there.

| schema | what changed |
|---|---|
| 1 | |
| 2 | ` + "`time_to_last_byte`" + ` is absent where the budget ended before; ` + "`open_latency`" + ` ends when faults are served; ` + "`rss_*`" + ` are peaks, not what is resident at the end; ` + "`link_utilisation`, `rate_utilisation`" + ` of op read only, and of what crossed the link; ` + "`harness_overhead`" + ` has the first touch of memory and the wait for an idle link; columns and params have effective defaults |
`)
	return b.String()
}
