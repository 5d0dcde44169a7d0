package scenarios

import (
	"context"
	"encoding/json"

	"memsync/results"
)

// Report is what `memsync measure --json` prints; docs/measure.schema.json is its schema.
type Report struct {
	Cell        map[string]any             `json:"cell"`
	Environment map[string]any             `json:"environment"`
	Runs        []ReportRun                `json:"runs"`
	Summary     map[string]ReportedSummary `json:"summary"`
}

// ReportRun is one run of a Report.
type ReportRun struct {
	Run      int              `json:"run"`
	Status   results.Status   `json:"status"`
	Verified bool             `json:"verified"`
	Error    string           `json:"error"`
	Metrics  map[string]Value `json:"metrics"`
}

// Value is a number with its unit.
type Value struct {
	Value float64 `json:"value"`
	Unit  string  `json:"unit"`
}

// ReportedSummary is the summary of a metric over the runs that are ok.
type ReportedSummary struct {
	results.Summary
	Unit string `json:"unit"`
}

// NewReport makes an empty report of a resolved cell.
func NewReport(c *Cell, runs int, seed uint64) *Report {
	return &Report{
		Cell: map[string]any{
			"strategy": c.Strategy, "device": c.Device, "transport": c.Transport, "backend": c.Backend, "kernel": c.kernel,
			"shaper": c.Shaper, "rtt_ms": float64(c.Link.RTT) / 1e6, "jitter_ms": float64(c.Link.Jitter) / 1e6,
			"loss": c.Link.Loss, "rate_mbit": float64(c.Link.Rate) / 1e6, "queue_bytes": c.Link.QueueBytes,
			"region_bytes": c.Size, "input": c.Input, "chunk_bytes": c.Chunk, "op": c.Op, "access": c.Access, "via": c.Via,
			"threads": c.Threads, "think_s": c.Think.Seconds(), "pull_workers": c.PullWorkers, "push_workers": c.PushWorkers,
			"cpus": c.CPUs, "params": c.Params(), "runs": runs, "budget_s": c.Budget.Seconds(), "seed": seed,
		},
		Environment: map[string]any{"host": results.ReadHost()},
		Runs:        []ReportRun{},
		Summary:     map[string]ReportedSummary{},
	}
}

// Add takes a run into the report.
func (r *Report) Add(o Outcome) {
	run := ReportRun{Run: o.Run, Status: o.Status, Verified: o.Verified, Metrics: map[string]Value{}}
	if o.Err != nil {
		run.Error = o.Err.Error()
	}
	for name, v := range o.Values {
		if m, ok := results.MetricByName(name); ok {
			run.Metrics[name] = Value{v, m.Unit}
		}
	}
	r.Runs = append(r.Runs, run)
}

// Finish computes the summary and takes the links' evidence in.
func (r *Report) Finish(links, calibrations []json.RawMessage) {
	r.Environment["links"], r.Environment["calibrations"] = links, calibrations
	values := map[string][]float64{}
	for _, run := range r.Runs {
		if run.Status != results.StatusOK {
			continue
		}
		for name, v := range run.Metrics {
			values[name] = append(values[name], v.Value)
		}
	}
	for name, vs := range values {
		m, _ := results.MetricByName(name)
		r.Summary[name] = ReportedSummary{results.Summarize(vs), m.Unit}
	}
}

// Sweep runs items in order, calling begin before and end after each. It stops
// when ctx ends or end returns an error.
func (r *Runner) Sweep(ctx context.Context, items []Item, begin func(Item), end func(Outcome) error) error {
	for _, it := range items {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		begin(it)
		if err := end(r.Run(ctx, it)); err != nil {
			return err
		}
	}
	return ctx.Err()
}
