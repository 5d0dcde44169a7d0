package results

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func all(string, string) bool { return true }

// sweep makes the records of cells x runs; value gives the throughput.
func sweep(t testing.TB, prefix string, cells, runs int, value func(cell, run int) float64) []Row {
	t.Helper()
	var rows []Row
	for c := range cells {
		for run := range runs {
			r := Row{RunID: fmt.Sprintf("%s-%d-%d", prefix, c, run), Figure: "f", Variant: "network", Strategy: fmt.Sprintf("s%d", c), Status: StatusOK, Run: run + 1}
			rs, err := RunRows(r, map[string]float64{"throughput": value(c, run), "rtt_measured": 0.02}, 1)
			if err != nil {
				t.Fatal(err)
			}
			rows = append(rows, rs...)
		}
	}
	return rows
}

// Values of the table in Hollander, Wolfe and Chicken, and such that can be counted by hand.
func TestMannWhitney(t *testing.T) {
	for _, c := range []struct {
		x, y []float64
		p    float64
	}{
		{[]float64{1, 2, 3}, []float64{4, 5, 6}, 2.0 / 20},                       // both extremes of C(6,3)
		{[]float64{1, 2, 3, 4, 5, 6}, []float64{7, 8, 9, 10, 11, 12}, 2.0 / 924}, // of C(12,6)
		{[]float64{1, 2, 3}, []float64{1, 2, 3}, 1},                              // nothing
		{[]float64{5, 5}, []float64{5, 5}, 1},                                    // all tied
		{[]float64{1}, []float64{2}, 1},                                          // too few
		{[]float64{1, 1, 2}, []float64{2, 3, 3}, 4.0 / 20},                       // ties: rank sums 7 (two ways of the tie) and 14
		{[]float64{0.8, 0.83, 1.89, 1.04, 1.45, 1.38, 1.91, 1.64, 0.73, 1.46}, []float64{1.15, 0.88, 0.90, 0.74, 1.21}, 0.2544}, // example 4.1, two-sided
	} {
		if p := mannWhitney(c.x, c.y); math.Abs(p-c.p) > 5e-4 {
			t.Errorf("%v, %v: p = %.4f, want %.4f", c.x, c.y, p, c.p)
		}
		if p, q := mannWhitney(c.x, c.y), mannWhitney(c.y, c.x); math.Abs(p-q) > 1e-12 {
			t.Errorf("%v, %v: %g one way, %g the other", c.x, c.y, p, q)
		}
	}
}

// The approximation joins the exact distribution where one hands over to the other.
func TestMannWhitneyLarge(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 20 {
		x, y := make([]float64, 29), make([]float64, 31)
		for i := range x {
			x[i] = math.Floor(r.NormFloat64() * 5)
		}
		for i := range y {
			y[i] = math.Floor(r.NormFloat64()*5 + 1)
		}
		ranks, sum := doubledRanks(x, y)
		far := sum - len(x)*(len(x)+len(y)+1)
		if far < 0 {
			far = -far
		}
		if e, a := mannWhitney(x, y), normalP(ranks, len(x), len(y), far); math.Abs(e-a) > 0.01 {
			t.Errorf("exact %.4f, approximation %.4f", e, a)
		}
	}
}

// The interval of the change covers the truth as often as it says, and agrees with p.
func TestChangeInterval(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	const rounds, truth = 2000, 0.25
	covered, rejected := 0, 0
	for range rounds {
		x, y := make([]float64, 7), make([]float64, 8)
		for i := range x {
			x[i] = math.Exp(0.2 * r.NormFloat64())
		}
		for i := range y {
			y[i] = (1 + truth) * math.Exp(0.2*r.NormFloat64())
		}
		d := difference(x, y)
		low, high := d.ChangeLow.Float(), d.ChangeHigh.Float()
		if low <= truth && truth <= high {
			covered++
		}
		if excludes := low > 0 || high < 0; excludes != (d.P.Float() <= 0.05) {
			t.Fatalf("p %.4f, interval %.4f..%.4f", d.P.Float(), low, high)
		}
		for i := range y {
			y[i] /= 1 + truth
		}
		if mannWhitney(x, y) < 0.05 {
			rejected++
		}
	}
	if share := float64(covered) / rounds; share < 0.94 {
		t.Errorf("the 95 %% interval covered the truth in %.1f %%", 100*share)
	}
	if share := float64(rejected) / rounds; share > 0.06 {
		t.Errorf("the test at 5 %% rejected a true hypothesis in %.1f %%", 100*share)
	}
}

func TestCompare(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	noisy := func(slow map[int]float64) func(cell, run int) float64 {
		return func(cell, run int) float64 {
			f := slow[cell]
			if f == 0 {
				f = 1
			}
			return 1e8 * f * math.Exp(0.03*r.NormFloat64())
		}
	}
	old := sweep(t, "a", 5, 6, noisy(nil))
	same, err := Compare(old, old, all)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range same.Deltas {
		if d.P.Float() != 1 || d.Change.Float() != 0 {
			t.Errorf("%s with itself: p %v, change %v", d.Cell.Strategy, d.P, d.Change)
		}
		if d.Cell.Metric != "throughput" {
			t.Errorf("%s is compared, but no direction of it is better", d.Cell.Metric)
		}
	}
	if g := same.GeoMean("throughput").Float(); len(same.Deltas) != 5 || math.Abs(g) > 1e-12 {
		t.Errorf("with itself: %d deltas, geometric mean %g", len(same.Deltas), g)
	}
	// A 20 % slow-down of one strategy is found, the speed-up of another too.
	c, err := Compare(old, sweep(t, "b", 5, 6, noisy(map[int]float64{2: 0.8, 4: 1.3})), all)
	if err != nil {
		t.Fatal(err)
	}
	if worse := c.Regressions(0.05, 0.1); len(worse) != 1 || worse[0].Cell.Strategy != "s2" {
		t.Errorf("worse: %+v", worse)
	}
	for _, d := range c.Deltas {
		if d.Improved(0.05, 0.1) != (d.Cell.Strategy == "s4") {
			t.Errorf("%s improved by %v, p %v", d.Cell.Strategy, d.Change, d.P)
		}
	}
	if got := strings.Join(c.Columns(), " "); got != "strategy" {
		t.Errorf("columns %q", got)
	}
}

func TestCompareBroken(t *testing.T) {
	value := func(int, int) float64 { return 1e8 }
	old := sweep(t, "a", 3, 2, value)
	new := sweep(t, "b", 2, 2, value)
	for i := range new {
		if new[i].Strategy == "s1" {
			new[i].Status, new[i].Error = StatusCorrupt, "wrong byte"
		}
	}
	c, err := Compare(old, new, all)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Lost) != 2 || c.Lost[0].Status != StatusCorrupt || c.Lost[1].Status != "" || len(c.Corrupt) == 0 {
		t.Errorf("lost %+v, corrupt %d", c.Lost, len(c.Corrupt))
	}
	if c, err = Compare(new, old, all); err != nil || len(c.Gained) != 2 || len(c.Lost) != 0 {
		t.Errorf("the other way: %+v, %v", c, err)
	}
	// A parameter that the old version did not know does not make another cell.
	learnt := sweep(t, "d", 3, 2, value)
	for i := range learnt {
		learnt[i].Params = "new=1;window=8MiB"
	}
	if c, err := Compare(old, learnt, all); err != nil || len(c.Deltas) != 3 {
		t.Errorf("with a new parameter: %+v, %v", c, err)
	}
	lab := sweep(t, "c", 3, 2, value)
	for i := range lab {
		lab[i].Kernel = "lab 7.2"
	}
	if c, err := Compare(old, lab, all); err != nil || len(c.Deltas) != 0 || len(c.Lost) != 3 {
		t.Errorf("a lab kernel's runs were set against a machine's: %+v, %v", c, err)
	}
	if _, err := Compare(old, nil, all); err == nil {
		t.Error("no records, and no error")
	}
}

func TestMerge(t *testing.T) {
	dir := t.TempDir()
	rows := sweep(t, "a", 4, 3, func(c, r int) float64 { return float64(1e6 * (c + r + 1)) })
	folder := func(name string, seed uint64, rows []Row, hist string) string {
		p := filepath.Join(dir, name)
		w, err := Create(p, Manifest{Seed: seed})
		if err != nil {
			t.Fatal(err)
		}
		for run := range runsOf(rows) {
			if err := w.Append(run...); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(p, HistogramsFile), []byte(hist), 0o666); err != nil {
			t.Fatal(err)
		}
		return p
	}
	half := len(rows) / 2 // runs have three rows each, so this is between two
	a := folder("a", 1, rows[:half], `{"run_id":"a-0-0","hdr_v2":"x"}`+"\n"+`{"run_id":"a-0-0","of":"histogram.request","hdr_v2":"z"}`+"\n")
	b := folder("b", 1, rows[half:], `{"run_id":"a-3-2","hdr_v2":"y"}`+"\n"+`{"run_id":"a-`)
	out := filepath.Join(dir, "out")
	m, err := Merge(out, a, b, b)
	if err != nil || m.Runs != 12 || m.Repeated != 6 {
		t.Fatalf("%+v, %v", m, err)
	}
	got, err := Read(out)
	if err != nil || len(got) != len(rows) {
		t.Fatalf("%d rows, %v", len(got), err)
	}
	for i := range got {
		if got[i] != rows[i] {
			t.Fatalf("row %d is %+v, want %+v", i, got[i], rows[i])
		}
	}
	if man, err := ReadManifest(out); err != nil || len(man.Parts) != 3 {
		t.Errorf("manifest of %d parts, %v", len(man.Parts), err)
	}
	if h, err := os.ReadFile(filepath.Join(out, HistogramsFile)); err != nil || strings.Count(string(h), "\n") != 3 {
		t.Errorf("histograms %q, %v", h, err)
	}
	if _, err := Merge(out, a); !errors.Is(err, fs.ErrExist) {
		t.Errorf("into a folder that is in use: %v", err)
	}
	other := append([]Row(nil), rows[:3]...)
	other[0].Value = Num(7)
	bad := map[string][]string{
		"with 2":         {a, folder("seed", 2, rows[half:], "")},
		"different rows": {a, folder("changed", 1, other, "")},
		"no such file":   {a, filepath.Join(dir, "nowhere")},
	}
	for want, dirs := range bad {
		out := filepath.Join(dir, "bad")
		if _, err := Merge(out, dirs...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
		if _, err := os.Stat(filepath.Join(out, RunsFile)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: records were left behind", want)
		}
	}
	// An interrupted run gives way to the whole one.
	cut := append([]Row(nil), rows[:3]...)
	for i := range cut {
		cut[i].Status, cut[i].Error = StatusInterrupted, "signal"
		if cut[i].Metric == RunMetric {
			cut[i].Value = Number{}
		}
	}
	if m, err := Merge(filepath.Join(dir, "cut"), folder("interrupted", 1, cut, ""), a); err != nil || m.Runs != 6 {
		t.Errorf("%+v, %v", m, err)
	} else if got, _ := Read(filepath.Join(dir, "cut")); got[0].Status != StatusOK {
		t.Errorf("the interrupted run stayed: %+v", got[0])
	}
}
