package recommend

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"memsync/results"
)

// point is a cell of a made folder.
type point struct {
	strategy, device string
	rtt, rate        float64
	mib              int64
	value            float64 // median of the goal's metric; 0: its time was over first; below 0: unsupported
	set              func(*results.Row)
	runs             int
	metric           string
}

// folder makes the records of points, each of 6 runs around its median.
func folder(t *testing.T, points ...point) []results.Row {
	t.Helper()
	var rows []results.Row
	for i, p := range points {
		if p.runs == 0 {
			p.runs = 6
		}
		if p.metric == "" {
			p.metric = "time_to_last_byte"
		}
		for run := 1; run <= p.runs; run++ {
			r := results.Row{RunID: fmt.Sprintf("%d-%d", i, run), Figure: "f", Variant: "network", Strategy: p.strategy, Device: p.device, Transport: "nbd", Backend: "memory",
				RTTms: p.rtt, RateMbit: p.rate, RegionBytes: p.mib << 20, Op: "read", Access: "seq", Params: "budget=2s;think=0s;threads=1;via=map", Run: run, Status: results.StatusOK}
			values := map[string]float64{"bytes_done": 1}
			switch {
			case p.value > 0:
				values[p.metric] = p.value * (1 + (float64(run)-float64(p.runs+1)/2)/1000)
			case p.value < 0:
				r.Status, r.Error, values = results.StatusUnsupported, "the kernel has no "+p.device, nil
			}
			if p.set != nil {
				p.set(&r)
			}
			made, err := results.RunRows(r, values, 1)
			if err != nil {
				t.Fatal(err)
			}
			rows = append(rows, made...)
		}
	}
	return rows
}

// grid is a strategy at every RTT and rate, with the time that took makes.
func grid(strategy, device string, took func(rtt, rate float64, mib int64) float64) []point {
	var out []point
	for _, rtt := range []float64{0, 10, 40, 100} {
		for _, rate := range []float64{10, 100, 1000} {
			for _, mib := range []int64{16, 64} {
				out = append(out, point{strategy: strategy, device: device, rtt: rtt, rate: rate, mib: mib, value: took(rtt, rate, mib)})
			}
		}
	}
	return out
}

// bulk is bound by the rate, faults by the RTT: which is better depends on the link.
func bulk(_, rate float64, mib int64) float64 { return 1 + float64(mib)*8.4/rate }
func faults(rtt, _ float64, mib int64) float64 {
	return 0.01 + float64(mib)*256*(rtt+0.01)/1000
}

func ask(rtt, rate float64, mib int64) Ask {
	return Ask{RTTms: rtt, RateMbit: rate, Size: mib << 20, Access: "seq", Destinations: 1}
}

func must(t *testing.T, rows []results.Row, a Ask) Answer {
	t.Helper()
	out, err := From(rows, a)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (a Answer) says(list []string, words string) bool {
	return slices.ContainsFunc(list, func(s string) bool { return strings.Contains(s, words) })
}

func TestKnownAnswer(t *testing.T) {
	rows := folder(t, slices.Concat(grid("bulk", "", bulk), grid("faults", "uffd", faults))...)
	for _, c := range []struct {
		rtt, rate float64
		mib       int64
		best      string
		cells     int
	}{
		{0, 10, 16, "faults", 1}, {40, 1000, 64, "bulk", 1}, {0, 1000, 64, "faults", 1}, {100, 10, 64, "bulk", 1}, // measured cells, and the corners
		{20, 1000, 64, "bulk", 2}, {20, 300, 32, "bulk", 8}, {0, 30, 16, "faults", 2},
	} {
		a := must(t, rows, ask(c.rtt, c.rate, c.mib))
		if a.Best != c.best || a.Confidence != High || len(a.Cells) != c.cells || len(a.Caveats) > 0 {
			t.Errorf("%+v: %s, %s, %d cells, %v", c, a.Best, a.Confidence, len(a.Cells), a.Caveats)
		}
		sum := 0.0
		for _, cell := range a.Cells {
			sum += cell.Weight
			if cell.Weight <= 0 {
				t.Errorf("%+v: a cell counts %g", c, cell.Weight)
			}
		}
		if math.Abs(sum-1) > 1e-9 {
			t.Errorf("%+v: weights add up to %g", c, sum)
		}
	}
	a := must(t, rows, ask(40, 1000, 64))
	if got, want := a.Ranking[0].Median.Float(), bulk(40, 1000, 64); math.Abs(got/want-1) > 1e-9 || a.Ranking[0].N != 6 || a.Unit != "s" {
		t.Errorf("at a measured cell %g %s, n %d; want its median, %g", got, a.Unit, a.Ranking[0].N, want)
	}
}

// TestOutside: what lies beyond the cells is said, and answered for the nearest.
func TestOutside(t *testing.T) {
	rows := folder(t, slices.Concat(grid("bulk", "", bulk), grid("faults", "uffd", faults))...)
	for _, c := range []struct {
		a    Ask
		says string
		at   Cell
	}{
		{ask(200, 100, 64), "RTT 200 ms is outside", Cell{100, 100, 64, "", 1}},
		{ask(10, 10000, 64), "rate 1e+04 Mbit/s is outside", Cell{10, 1000, 64, "", 1}},
		{ask(10, 1, 64), "rate 1 Mbit/s is outside", Cell{10, 10, 64, "", 1}},
		{ask(10, 0, 64), "rate unlimited is outside", Cell{10, 1000, 64, "", 1}},
		{ask(10, 100, 1024), "size 1024 MiB is outside", Cell{10, 100, 64, "", 1}},
		{ask(10, 100, 1), "size 1 MiB is outside", Cell{10, 100, 16, "", 1}},
	} {
		a := must(t, rows, c.a)
		if a.Confidence != Low || len(a.Cells) != 1 || a.Cells[0] != c.at || !a.says(a.Caveats, c.says) {
			t.Errorf("%+v: %s, %+v, %v", c.a, a.Confidence, a.Cells, a.Caveats)
		}
	}
	a := ask(10, 100, 64)
	a.Access = "random"
	if got := must(t, rows, a); got.Confidence != Low || !got.says(got.Caveats, "access random was not measured") {
		t.Errorf("another access pattern: %s, %v", got.Confidence, got.Caveats)
	}
}

// TestNearestScenario: the access pattern asked for goes before another one, and runs of one
// use are not compared with those of another.
func TestNearestScenario(t *testing.T) {
	random := func(r *results.Row) { r.Figure, r.Access = "g", "random" }
	threads := func(r *results.Row) { r.Figure, r.Params = "h", strings.Replace(r.Params, "threads=1", "threads=8", 1) }
	local := func(r *results.Row) { r.Transport = "local" }
	rows := folder(t, point{strategy: "a", mib: 1, rate: 10, value: 3}, point{strategy: "b", mib: 1, rate: 10, value: 4},
		point{strategy: "a", mib: 1, rate: 10, value: 6, set: random}, point{strategy: "b", mib: 1, rate: 10, value: 5, set: random},
		point{strategy: "b", mib: 1, rate: 10, value: 0.1, set: threads}, point{strategy: "a", mib: 1, rate: 10, value: 0.2, set: threads},
		point{strategy: "memory", mib: 1, rate: 10, value: 0.001, set: local})
	for access, want := range map[string]string{"seq": "a", "random": "b", "random:64KiB": "b"} {
		a := ask(0, 10, 1)
		a.Access = access
		if got := must(t, rows, a); got.Best != want || len(got.Ranking) != 2 {
			t.Errorf("%s: %s of %d", access, got.Best, len(got.Ranking))
		}
	}
}

func TestMissingAndFew(t *testing.T) {
	two := []point{{strategy: "a", device: "fuse", mib: 1, rate: 10, value: 3}, {strategy: "b", device: "uffd", mib: 1, rate: 10, value: 2}}
	none := func(string) bool { return false }

	if _, err := From(nil, ask(0, 10, 1)); !errors.Is(err, ErrNoData) {
		t.Errorf("an empty folder: %v", err)
	}
	if a := must(t, folder(t, two[:1]...), ask(0, 10, 1)); a.Best != "a" || a.Confidence != Low || !a.says(a.Caveats, "nothing to compare a with") {
		t.Errorf("one strategy: %s, %s, %v", a.Best, a.Confidence, a.Caveats)
	}
	a := ask(0, 10, 1)
	a.Has = func(f string) bool { return f == "fuse" }
	if got := must(t, folder(t, two...), a); got.Best != "a" || !got.says(got.WhatIf, "with uffd the answer would be b") {
		t.Errorf("without uffd: %s, %v", got.Best, got.WhatIf)
	}
	a.Has = func(f string) bool { return f == "uffd" }
	if got := must(t, folder(t, two...), a); got.Best != "b" || !got.says(got.WhatIf, "fuse would not change the answer") {
		t.Errorf("without fuse: %s, %v", got.Best, got.WhatIf)
	}
	a.Has = none
	if got := must(t, folder(t, two...), a); got.Best != "" || got.Confidence != Low || got.Late() || len(got.WhatIf) != 2 {
		t.Errorf("without both: %q, %v", got.Best, got.WhatIf)
	}
	lacks := append(slices.Clone(two), point{strategy: "c", device: "nbd", mib: 1, rate: 10, value: -1})
	if got := must(t, folder(t, lacks...), ask(0, 10, 1)); len(got.Excluded) != 1 || !strings.Contains(got.Excluded[0].Why, "no nbd") || !got.says(got.WhatIf, "nbd was missing where this was measured") {
		t.Errorf("not measured: %+v, %v", got.Excluded, got.WhatIf)
	}
	lab := func(r *results.Row) { r.Kernel = results.LabPrefix + "7" }
	for value, want := range map[float64]string{1: "might change the answer to c", 9: "would probably not change"} {
		with := append(slices.Clone(lacks), point{strategy: "c", device: "nbd", mib: 1, rate: 10, value: value, set: lab}, point{strategy: "b", device: "uffd", mib: 1, rate: 10, value: 5, set: lab})
		if got := must(t, folder(t, with...), ask(0, 10, 1)); got.Best != "b" || got.Lab || !got.says(got.WhatIf, want) {
			t.Errorf("the lab's %g: %s, %v", value, got.Best, got.WhatIf)
		}
	}
	few := slices.Clone(two)
	few[0].runs, few[1].runs = 3, 3
	if got := must(t, folder(t, few...), ask(0, 10, 1)); got.Best != "b" || got.Confidence != Medium || !got.says(got.Caveats, "do not tell b and a apart") {
		t.Errorf("three runs: %s, %s, %v", got.Best, got.Confidence, got.Caveats)
	}
	close := slices.Clone(two)
	close[0].value = 2.0001
	if got := must(t, folder(t, close...), ask(0, 10, 1)); got.Confidence != Medium || !got.Ranking[1].Tied {
		t.Errorf("equal ones: %s, %+v", got.Confidence, got.Ranking)
	}
}

// TestOverTime: a run whose time was over first counts as that long, and is never the answer.
func TestOverTime(t *testing.T) {
	if got := must(t, folder(t, point{strategy: "a", mib: 1, rate: 10, value: 0}, point{strategy: "b", mib: 1, rate: 10, value: 1.5}), ask(0, 10, 1)); got.Best != "b" ||
		!got.Ranking[1].AtLeast || got.Ranking[1].Median.Float() != 2 || got.Ranking[1].Tied {
		t.Errorf("%s, %+v", got.Best, got.Ranking)
	}
	none := folder(t, point{strategy: "a", mib: 1, rate: 10, value: 0}, point{strategy: "b", mib: 1, rate: 10, value: 0})
	if _, err := From(none, ask(0, 10, 1)); !errors.Is(err, ErrNoData) {
		t.Errorf("no run got to the end: %v", err)
	}
	paced := folder(t, point{strategy: "a", mib: 1, rate: 10, value: 0.5, metric: "rate_utilisation"}, point{strategy: "b", mib: 1, rate: 10, value: 0.2, metric: "rate_utilisation"})
	if got := must(t, paced, ask(0, 10, 1)); got.Best != "a" || got.Confidence != Medium || got.Goal.Metric != "rate_utilisation" || !got.says(got.Caveats, "compared by their pace") {
		t.Errorf("%s, %s, %v", got.Best, got.Confidence, got.Caveats)
	}
}

func TestOtherGoals(t *testing.T) {
	op := func(op, params string) func(*results.Row) {
		return func(r *results.Row) { r.Op, r.Params = op, r.Params+";"+params }
	}
	at := func(strategy, metric string, value float64, set func(*results.Row)) point {
		return point{strategy: strategy, mib: 1, rate: 10, value: value, metric: metric, set: set}
	}
	rows := folder(t,
		at("m", "downtime", 0.2, op("migrate", "dirty_rate=0;writer=random")), at("n", "downtime", 0.5, op("migrate", "dirty_rate=0;writer=random")),
		at("m", "downtime", 0.9, op("migrate", "dirty_rate=20000000;writer=random")), at("n", "downtime", 0.6, op("migrate", "dirty_rate=20000000;writer=random")),
		at("h", "staleness", 0.1, op("sync", "destinations=1")), at("r", "staleness", 0.3, op("sync", "destinations=1")),
		at("h", "last_equal_time", 4, op("sync", "destinations=2")), at("r", "last_equal_time", 3, op("sync", "destinations=2")),
		at("h", "last_equal_time", 5, op("sync", "destinations=8")), at("r", "last_equal_time", 9, op("sync", "destinations=8")),
		at("d", "total_time", 2, op("mixed", "")), at("g", "total_time", 3, op("mixed", "")))
	for _, c := range []struct {
		set    func(*Ask)
		best   string
		metric string
		late   bool
	}{
		{func(a *Ask) { a.MaxDowntime = 0.3 }, "m", "downtime", false},
		{func(a *Ask) { a.MaxDowntime, a.ChangeRate = 0.7, 20e6 }, "n", "downtime", false},
		{func(a *Ask) { a.MaxDowntime, a.ChangeRate = 0.3, 20e6 }, "", "downtime", true},
		{func(a *Ask) { a.ChangeRate = 1 }, "h", "staleness", false},
		{func(a *Ask) { a.Destinations = 2 }, "r", "last_equal_time", false},
		{func(a *Ask) { a.Destinations = 8 }, "h", "last_equal_time", false},
		{func(a *Ask) { a.WriteFraction = 0.5 }, "d", "total_time", false},
	} {
		a := ask(0, 10, 1)
		c.set(&a)
		if got := must(t, rows, a); got.Best != c.best || got.Goal.Metric != c.metric || got.Late() != c.late || got.says(got.Caveats, "outside") {
			t.Errorf("%+v: %q by %s, late %t, %v", a, got.Best, got.Goal.Metric, got.Late(), got.Caveats)
		}
	}
	a := ask(0, 10, 1)
	a.WriteFraction = 0.1
	if got := must(t, rows, a); got.Confidence != Low || !got.says(got.Caveats, "write fraction 0.1 is outside") {
		t.Errorf("%s, %v", got.Confidence, got.Caveats)
	}
}

func TestCheck(t *testing.T) {
	for _, set := range []func(*Ask){
		func(a *Ask) { a.RTTms = -1 }, func(a *Ask) { a.RTTms = math.NaN() }, func(a *Ask) { a.RateMbit = math.Inf(1) }, func(a *Ask) { a.Size = 0 },
		func(a *Ask) { a.WriteFraction = 1.5 }, func(a *Ask) { a.WriteFraction = math.NaN() }, func(a *Ask) { a.Destinations = 0 },
		func(a *Ask) { a.MaxDowntime, a.Destinations = 1, 2 }, func(a *Ask) { a.WriteFraction, a.ChangeRate = 0.5, 1 }, func(a *Ask) { a.WriteFraction, a.MaxDowntime = 0.5, 1 },
	} {
		a := ask(1, 10, 1)
		set(&a)
		if _, err := From(nil, a); err == nil || errors.Is(err, ErrNoData) {
			t.Errorf("%+v: %v", a, err)
		}
	}
}

// TestProperties: a strategy that is better everywhere is always recommended, whatever is
// asked; other units of time change nothing but the numbers; nor does the order of the records.
func TestProperties(t *testing.T) {
	seed := uint64(1)
	if s := os.Getenv("TEST_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seed = n
	}
	t.Logf("TEST_SEED=%d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for range 25 {
		var points, scaled []point
		factor := math.Exp(6 * (rng.Float64() - 0.5))
		for _, rtt := range []float64{1, 20, 100}[:1+rng.IntN(3)] {
			for _, rate := range []float64{0, 10, 1000}[rng.IntN(3):] {
				for _, mib := range []int64{1, 64}[:1+rng.IntN(2)] {
					best := 0.1 + rng.Float64()
					for i := range 4 {
						p := point{strategy: fmt.Sprintf("s%d", i), rtt: rtt, rate: rate, mib: mib, value: best * (1 + 0.2*float64(i)*(1+rng.Float64()))}
						points = append(points, p)
						p.value *= factor
						scaled = append(scaled, p)
					}
				}
			}
		}
		rows, other := folder(t, points...), folder(t, scaled...)
		for range 6 {
			a := ask(200*rng.Float64(), 2000*rng.Float64(), 1+rng.Int64N(200))
			if rng.IntN(4) == 0 {
				a.RateMbit = 0
			}
			got := must(t, rows, a)
			if got.Best != "s0" || len(got.Ranking) != 4 {
				t.Fatalf("%+v: %s of %d, not the one that is better everywhere", a, got.Best, len(got.Ranking))
			}
			same := must(t, other, a)
			if same.Best != got.Best || same.Confidence != got.Confidence || !slices.Equal(same.Caveats, got.Caveats) {
				t.Fatalf("%+v: other units change the answer: %+v, %+v", a, got, same)
			}
			for i, o := range same.Ranking {
				if o.Strategy != got.Ranking[i].Strategy || math.Abs(o.Median.Float()/got.Ranking[i].Median.Float()/factor-1) > 1e-9 {
					t.Fatalf("%+v: rank %d is %+v, and %+v in other units (%g)", a, i, got.Ranking[i], o, factor)
				}
			}
		}
		a := ask(20, 100, 10)
		before := must(t, rows, a)
		shuffled := slices.Clone(rows)
		rng.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		after := must(t, shuffled, a)
		for i, o := range before.Ranking {
			if p := after.Ranking[i]; o.Strategy != p.Strategy || math.Abs(o.Median.Float()/p.Median.Float()-1) > 1e-12 {
				t.Fatalf("the order of the records counts: %+v, %+v", o, p)
			}
		}
	}
}
