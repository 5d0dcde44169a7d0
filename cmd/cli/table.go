package cli

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"memsync/results"
	"memsync/results/table"
	"memsync/scenarios"
)

// printFigure prints a figure's numbers as a table.
func printFigure(s *state, spec results.FigureSpec, variant string, rows []results.Row) error {
	rows = slices.Clone(rows)
	slices.SortStableFunc(rows, func(a, b results.Row) int {
		return cmp.Or(cmp.Compare(seriesIndex(spec, a), seriesIndex(spec, b)), cmp.Compare(a.RTTms, b.RTTms))
	})
	labels := slices.Clone(spec.Keys)
	if spec.X.Column != "" {
		labels = append(labels, spec.X.Column)
	}
	labels = append(labels, "shaper")
	if i := slices.IndexFunc(rows, results.Row.Lab); i >= 0 {
		labels = append(labels, "kernel")
	}
	t, err := table.FromRows(spec.Select(rows), labels, []string{spec.Y.Column})
	if err != nil {
		return err
	}
	if s.stdoutTTY {
		fmt.Fprintf(s.stdout, "%s (%s): %s, median and 95 %% confidence interval\n", spec.Name, variant, spec.Title)
	}
	return t.Write(s.stdout, s.stdoutTTY)
}

// seriesIndex is the place of a row's series in the figure; those it does not name come last.
func seriesIndex(spec results.FigureSpec, r results.Row) int {
	var key []string
	for _, c := range spec.Keys {
		v, _ := r.Get(c) // the spec's columns exist: a test checks every spec
		key = append(key, v)
	}
	i := slices.IndexFunc(spec.Series, func(s results.FigureSeries) bool { return s.Key == strings.Join(key, "/") })
	if i < 0 {
		return len(spec.Series)
	}
	return i
}

// reported are the metrics that measure prints first; the others follow with --json.
var reported = []string{
	"open_latency", "latency_first_chunk", "throughput", "time_to_last_byte", "time_to_first_result", "time_to_result", "stall_time", "total_time", "link_utilisation", "rate_utilisation",
	"fault_latency_p50", "fault_latency_p99", "bytes_done", "wire_tx_bytes", "wire_rx_bytes",
	"staleness", "staleness_p99", "staleness_max", "poll_load", "round_tx_bytes", "round_rx_bytes", "round_tx_bytes_max", "round_tx_bytes_others", "first_equal_time", "last_equal_time", "event_round_time", "event_others_time", "join_time", "detection_time", "store_time", "hash_rate", "floor_read", "hash_ratio",
	"cpu_source", "cpu_daemon", "cpu_workload", "rss_daemon", "preemptive_pull_bytes", "rtt_measured", "rate_measured", "harness_overhead",
	"floor_map", "floor_fill", "floor_tcp", "floor_wake", "floor_rr",
}

// printReport prints a measurement as a table, a line for each metric.
func printReport(s *state, c *scenarios.Cell, r *scenarios.Report) error {
	if s.stdoutTTY {
		fmt.Fprintf(s.stdout, "%s: device %s, transport %s, shaper %s, RTT %v, rate %s, region %d bytes, chunk %d, %s %s\nparameters: %s\n\n",
			c.Strategy, c.Device, c.Transport, c.Shaper, c.Link.RTT, rateText(c.Link.Rate), c.Size, c.Chunk, c.Op, c.Access, c.Params())
	}
	var lines []metricLine
	for _, name := range reported {
		if v, ok := r.Summary[name]; ok {
			lines = append(lines, metricLine{name, v})
		}
	}
	if s.stdoutTTY {
		for _, l := range lines {
			median := table.Human(l.Median.Float(), l.Unit)
			ci := "–"
			if low, ok := l.CILow.Get(); ok {
				ci = table.Human(low, l.Unit) + " .. " + table.Human(l.CIHigh.Float(), l.Unit)
			}
			fmt.Fprintf(s.stdout, "%-22s %14s   95 %% CI %s   n %d\n", l.name, median, ci, l.N)
		}
		return nil
	}
	fmt.Fprintln(s.stdout, "metric\tmedian\tci_low\tci_high\tn\tunit")
	for _, l := range lines {
		fmt.Fprintf(s.stdout, "%s\t%s\t%s\t%s\t%d\t%s\n", l.name, l.Median, l.CILow, l.CIHigh, l.N, l.Unit)
	}
	return nil
}

type metricLine struct {
	name string
	scenarios.ReportedSummary
}
