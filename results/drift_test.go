package results

import (
	"fmt"
	"math/rand/v2"
	"testing"
)

// A sweep of 20 cells, 6 runs each, in shuffled order: values scatter by 5 %, and
// from half way on are multiplied by slow.
func halves(slow float64) []Row {
	r := rand.New(rand.NewPCG(4, 4))
	var rows []Row
	for i, place := range r.Perm(120) {
		cell := i / 6
		v := float64(cell+1) * (1 + 0.05*r.NormFloat64())
		if place >= 60 {
			v *= slow
		}
		row := Row{RunID: fmt.Sprint(i), Figure: "f", Strategy: fmt.Sprint("s", cell), Order: place, Status: StatusOK}
		for _, m := range []string{"throughput", "floor_map", "open_latency", RunMetric} {
			row.Metric, row.Value = m, Num(v)
			rows = append(rows, row)
		}
	}
	return rows
}

func TestDrifts(t *testing.T) {
	for slow, disturbed := range map[float64]bool{1: false, 1.01: false, 0.8: true, 1.3: true} {
		got := Drifts(halves(slow), func(_, metric string) bool { return metric == "throughput" })
		if len(got) != 2 || got[0].Metric != "throughput" || got[1].Metric != "floor_map" {
			t.Fatalf("drifts of %+v", got)
		}
		for _, d := range got {
			if d.Disturbed() != disturbed {
				t.Errorf("by %v: %+v", slow, d)
			}
			if disturbed && (d.Change.Float()-(slow-1))*(d.Change.Float()-(slow-1)) > 0.05*0.05 {
				t.Errorf("by %v: %+v", slow, d)
			}
		}
	}
	if got := Drifts(nil, nil); got != nil {
		t.Errorf("of nothing: %+v", got)
	}
}
