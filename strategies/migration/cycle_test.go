package migration

import (
	"math/rand/v2"
	"testing"
	"time"

	"memsync/strategies/replay"
)

// observe feeds a cycle with what an application writes in each step and returns how often a moment that
// was called favourable was one, how many were called so, and how many were.
func observe(write func(step int) float64, steps, ahead int) (right, said, were int, last verdict) {
	const step = 100 * time.Millisecond
	c := cycle{step: step}
	at := time.Unix(1000, 0)
	for i := range steps {
		at = at.Add(step)
		c.add(at, step, int64(write(i)))
		v, _ := c.judge(at, time.Duration(ahead)*step)
		last = v
		if i < 40 {
			continue // it learns
		}
		good := true
		for k := 1; k <= ahead; k++ {
			good = good && write(i+k) < 1e6
		}
		if good {
			were++
		}
		if v == favourable {
			said++
			if good {
				right++
			}
		}
	}
	return right, said, were, last
}

// A periodic application: the quiet phases are found, and the end of one is foreseen.
func TestCyclePeriodic(t *testing.T) {
	r := rand.New(rand.NewPCG(replay.Seed(t), 1))
	noise := make([]float64, 1000)
	for i := range noise {
		noise[i] = 0.8 + 0.4*r.Float64()
	}
	for _, q := range []struct{ period, busy, ahead int }{{10, 2, 2}, {10, 5, 1}, {7, 3, 3}, {25, 5, 4}} {
		write := func(i int) float64 {
			if i%q.period < q.busy {
				return 10e6 * noise[i]
			}
			return 40e3 * noise[i]
		}
		right, said, were, _ := observe(write, 400, q.ahead)
		t.Logf("%+v: %d of %d called favourable were, of %d in all", q, right, said, were)
		if said == 0 || float64(right) < 0.98*float64(said) || float64(right) < 0.8*float64(were) {
			t.Errorf("%+v: %d of %d called favourable were, of %d in all", q, right, said, were)
		}
	}
}

// Without a period what the application does now says most; without phases there is nothing to wait for.
func TestCycleIrregular(t *testing.T) {
	r := rand.New(rand.NewPCG(replay.Seed(t), 2))
	series, busy := make([]float64, 1000), false
	for i := range series {
		if r.IntN(10) == 0 {
			busy = !busy
		}
		if busy {
			series[i] = 10e6
		}
	}
	right, said, were, _ := observe(func(i int) float64 { return series[i] }, 800, 1)
	t.Logf("irregular: %d of %d called favourable were, of %d in all", right, said, were)
	if said == 0 || float64(right) < 0.75*float64(said) {
		t.Errorf("irregular: %d of %d called favourable were", right, said)
	}
	for name, write := range map[string]func(int) float64{
		"even": func(int) float64 { return 2e6 }, "noisy": func(i int) float64 { return 2e6 * (0.85 + 0.3*series[i%500]/10e6) }, "nothing": func(int) float64 { return 0 },
	} {
		if _, _, _, v := observe(write, 60, 1); v != steady {
			t.Errorf("%s: verdict %d, want steady", name, v)
		}
	}
	if _, _, _, v := observe(func(int) float64 { return 0 }, minCells-1, 1); v != unknown {
		t.Errorf("verdict %d of too little, want unknown", v)
	}
}

// Observations at odd moments give the same cells; memory is bounded.
func TestCycleCells(t *testing.T) {
	c := cycle{step: 100 * time.Millisecond}
	at, r := time.Unix(1, 0), rand.New(rand.NewPCG(replay.Seed(t), 3))
	total := 0.0
	for range 2000 {
		d := time.Duration(1 + r.Int64N(int64(250*time.Millisecond)))
		at = at.Add(d)
		c.add(at, d, 4096)
		total += 4096
	}
	sum := 0.0
	for _, b := range c.bytes {
		sum += b
	}
	if sum < 0.999*total || sum > 1.001*total {
		t.Errorf("cells hold %g of %g bytes", sum, total)
	}
	for range 20000 {
		at = at.Add(50 * time.Millisecond)
		c.add(at, 50*time.Millisecond, 1)
	}
	if len(c.bytes) > maxCells {
		t.Errorf("%d cells, want at most %d", len(c.bytes), maxCells)
	}
	c.add(at.Add(1000*time.Hour), 1000*time.Hour, 1) // a host that slept
	if len(c.bytes) > maxCells {
		t.Errorf("%d cells after a long pause, want at most %d", len(c.bytes), maxCells)
	}
}
