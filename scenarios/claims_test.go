package scenarios

import (
	"errors"
	"slices"
	"strconv"
	"strings"
	"testing"

	"memsync/results"
	"memsync/results/claims"
)

// Every claim speaks of figures, series, places and columns that a full sweep has.
func TestClaimsHaveRecords(t *testing.T) {
	specs := map[string]results.FigureSpec{}
	var rows []results.Row
	// What claims about cells compute with; a figure's own metrics come with it.
	metrics := []string{"link_utilisation", "rate_utilisation", "latency_first_chunk", "open_latency", "throughput", "fault_latency_p50", "staleness",
		"prefetch_bytes", "push_bytes", "harness_overhead", "rtt_measured", "floor_map", "floor_fill", "floor_tcp", "floor_wake", "floor_rr"}
	for _, f := range Figures() {
		record := slices.Clone(metrics)
		for _, spec := range append(f.More, f.Spec) {
			specs[spec.Name] = spec
			if !slices.Contains(record, spec.Y.Column) {
				record = append(record, spec.Y.Column)
			}
		}
		for _, v := range Variants() {
			if !f.Has(v) {
				continue
			}
			for i, c := range f.Cells(v, false) {
				if err := c.Resolve(); errors.Is(err, ErrUsage) {
					t.Fatal(err)
				}
				for run := range results.MinCI {
					r := c.Row()
					r.RunID, r.Run, r.Status = f.Spec.Name+v+strconv.Itoa(i)+"/"+strconv.Itoa(run), run+1, results.StatusOK
					for _, name := range record {
						r.Metric, r.Value = name, results.Num(1+float64(run)/10)
						rows = append(rows, r)
					}
				}
			}
		}
	}
	// What no sweep has, and why.
	missing := map[string]string{
		"B03": "no figure has a region of this size on such a link",
		"C46": "no row bears the names Dudirekta and fRPC (docs/transports.md)", "C47": "the same", "C48": "the same", "C49": "the same", "C50": "the same", "C51": "the same",
	}
	for _, v := range Variants() {
		for _, o := range claims.Evaluate(claims.All(), specs, rows, v) {
			_, known := specs[o.Figure]
			switch {
			case o.Figure != "" && !known:
				t.Logf("%s: no figure %s yet", o.ID, o.Figure)
			case missing[o.ID] != "":
				if o.Reason == "" {
					t.Errorf("%s can be decided now", o.ID)
				}
			case len(o.Checks) == 0 && (v == Network || strings.HasPrefix(o.ID, "C")):
				t.Errorf("%s, %s: %s", o.ID, v, o.Reason)
			}
		}
	}
}
