package netem

import (
	"errors"
	"math"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

func TestProfiles(t *testing.T) {
	want := "loopback, lan, metro, regional, continental, transatlantic, lte, satellite, lossy"
	var names []string
	for _, p := range Profiles() {
		names = append(names, p.Name)
		if err := p.Validate(); err != nil {
			t.Error(err)
		}
		if got, err := ProfileByName(p.Name); err != nil || got != p {
			t.Errorf("ProfileByName(%q) = %v, %v", p.Name, got, err)
		}
	}
	if got := strings.Join(names, ", "); got != want {
		t.Errorf("profiles are %s, want %s", got, want)
	}
	_, err := ProfileByName("moon")
	if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), want) {
		t.Errorf("unknown name: %v", err)
	}
}

func TestValidate(t *testing.T) {
	for _, p := range []Profile{
		{RTT: -1}, {RTT: MaxRTT + 1}, {Jitter: -1}, {Jitter: MaxRTT + 1},
		{Loss: -0.1}, {Loss: 1.1}, {Loss: math.NaN()},
		{Rate: -1}, {Rate: MinRate - 1}, {Rate: MaxRate + 1},
		{QueueBytes: -1}, {QueueBytes: 100}, {QueueBytes: MaxQueue + 1},
	} {
		if err := p.Validate(); !errors.Is(err, ErrInvalid) {
			t.Errorf("%+v: %v", p, err)
		}
	}
	for _, tt := range []struct {
		p          Profile
		bdp, queue int64
	}{
		{Profile{}, 0, 0},
		{Profile{RTT: time.Second}, 0, 0},
		{Profile{RTT: 20 * time.Millisecond, Rate: 1e9}, 2_500_000, 2_500_000},
		{Profile{RTT: time.Millisecond, Rate: 1e8}, 12_500, minQueue},
		{Profile{RTT: time.Millisecond, Rate: 1e8, QueueBytes: 3000}, 12_500, 3000},
		{Profile{RTT: MaxRTT, Rate: MaxRate}, 125_000_000_000, MaxQueue},
	} {
		if tt.p.BDP() != tt.bdp || tt.p.Queue() != tt.queue {
			t.Errorf("%+v: BDP %d, queue %d; want %d, %d", tt.p, tt.p.BDP(), tt.p.Queue(), tt.bdp, tt.queue)
		}
	}
}

// The line against what it promises, in virtual time, for random profiles and
// arrivals: order, delay, rate over every window, and the queue's bytes.
func TestLineProperties(t *testing.T) {
	rng := rand.New(rand.NewPCG(seed(t), 0))
	for range 300 {
		p := Profile{
			RTT:  time.Duration(rng.Int64N(int64(100 * time.Millisecond))),
			Rate: int64(math.Exp(rng.Float64()*math.Log(MaxRate/MinRate)) * MinRate),
		}
		if rng.IntN(2) == 0 {
			p.QueueBytes = linkFrame + rng.Int64N(1<<20)
		}
		if rng.IntN(2) == 0 {
			p.Jitter = p.RTT / 8
		}
		if rng.IntN(3) == 0 {
			p.Loss = rng.Float64()
		}
		checkLine(t, p, rng)
	}
}

func checkLine(t *testing.T, p Profile, rng *rand.Rand) {
	t.Helper()
	l := newLine(p, rng.Uint64(), 0)
	mean := float64(serialisation(800, p.Rate)) * (0.3 + 1.4*rng.Float64()) // from idle to overload
	type sent struct{ start, end, size int64 }
	var passedFrames []sent
	var now, last, busy int64
	for range 400 {
		if rng.IntN(4) > 0 { // else a burst
			now += int64(rng.ExpFloat64() * mean)
		}
		size := 42 + rng.Int64N(linkFrame-41)
		took := serialisation(size, p.Rate)
		wait := max(0, busy-now)
		held := float64(wait) * float64(p.Rate) / 8e9 // bytes before this one
		depart, v := l.admit(now, size)
		slack := float64(p.Rate)/8e9*2 + 1 // one ns of rounding each
		switch v {
		case lost:
			if p.Loss == 0 {
				t.Fatalf("%+v: lost a frame", p)
			}
			continue
		case overflow:
			if wait == 0 || held+float64(size) < float64(p.Queue())-slack {
				t.Fatalf("%+v: dropped %d bytes behind %.0f, the queue holds %d", p, size, held, p.Queue())
			}
			continue
		case passed:
		}
		if wait > 0 && held+float64(size) > float64(p.Queue())+slack {
			t.Fatalf("%+v: took %d bytes behind %.0f, the queue holds %d", p, size, held, p.Queue())
		}
		start := max(now, busy)
		busy = start + took
		least := busy
		if p.Jitter == 0 {
			least += int64(p.RTT / 2)
		}
		if depart < least || depart < last {
			t.Fatalf("%+v: frame of %v leaves at %v, not after %v and %v", p, now, depart, least, last)
		}
		if p.Jitter == 0 && depart != least {
			t.Fatalf("%+v: frame of %v leaves at %v, not %v", p, now, depart, least)
		}
		last = depart
		passedFrames = append(passedFrames, sent{start, busy, size})
	}
	// Over any window of whole frames the bottleneck sends no more than the rate.
	for range 50 {
		if len(passedFrames) < 2 {
			break
		}
		i := rng.IntN(len(passedFrames) - 1)
		j := i + 1 + rng.IntN(len(passedFrames)-i-1)
		var bytes int64
		for _, f := range passedFrames[i : j+1] {
			bytes += f.size
		}
		if took := passedFrames[j].end - passedFrames[i].start; float64(bytes)*8e9 > float64(p.Rate)*float64(took)*(1+1e-9) {
			t.Fatalf("%+v: %d bytes in %d ns", p, bytes, took)
		}
	}
}

func TestLineSeeded(t *testing.T) {
	p := Profile{RTT: 20 * time.Millisecond, Jitter: 3 * time.Millisecond, Loss: 0.1}
	trace := func(seed, dir uint64) (out []int64) {
		l := newLine(p, seed, dir)
		for i := range int64(200) {
			depart, v := l.admit(i*1e6, 100)
			out = append(out, depart, int64(v))
		}
		return out
	}
	equal := func(a, b []int64) bool {
		for i := range a {
			if a[i] != b[i] {
				return false
			}
		}
		return true
	}
	if !equal(trace(1, 0), trace(1, 0)) {
		t.Error("equal seeds differ")
	}
	if equal(trace(1, 0), trace(2, 0)) || equal(trace(1, 0), trace(1, 1)) {
		t.Error("other seeds and directions are equal")
	}
}

func TestLineLossAndJitter(t *testing.T) {
	const n = 20_000
	p := Profile{RTT: 20 * time.Millisecond, Jitter: 2 * time.Millisecond, Loss: 0.05}
	l := newLine(p, seed(t), 0)
	gone := 0
	var sum, squares float64
	for i := range int64(n) {
		now := i * int64(time.Second) // so far apart that none waits for another
		depart, v := l.admit(now, 100)
		if v == lost {
			gone++
			continue
		}
		d := float64(depart-now) / 1e6
		sum, squares = sum+d, squares+d*d
	}
	if low, high := binomialInterval(n, p.Loss, 1e-6); gone < low || gone > high {
		t.Errorf("lost %d of %d, want %d to %d", gone, n, low, high)
	}
	mean := sum / float64(n-gone)
	sd := math.Sqrt(squares/float64(n-gone) - mean*mean)
	if math.Abs(mean-10) > 0.1 || math.Abs(sd-2) > 0.1 {
		t.Errorf("delay has mean %.3f ms and deviation %.3f ms, want 10 and 2", mean, sd)
	}
	// Cut at zero: more jitter than delay never sends a frame into the past.
	l = newLine(Profile{Jitter: time.Millisecond}, 1, 0)
	for i := range int64(1000) {
		if depart, _ := l.admit(i*1e9, 100); depart < i*1e9 {
			t.Fatalf("frame of %d leaves at %d", i*1e9, depart)
		}
	}
	// Changed while it runs.
	l.set(Profile{Loss: 1})
	if _, v := l.admit(1e15, 100); v != lost {
		t.Errorf("with loss 1: verdict %d", v)
	}
}

func TestBinomialInterval(t *testing.T) {
	for _, tt := range []struct {
		n         int
		p, tail   float64
		low, high int
	}{
		{1000, 0, 0.01, 0, 0},
		{1000, 1, 0.01, 1000, 1000},
		// Of 10 coins, P(X<=1) = 11/1024 and P(X<=0) = 1/1024.
		{10, 0.5, 0.011, 2, 8},
		{10, 0.5, 0.010, 1, 9},
		{1, 0.5, 0.1, 0, 1},
	} {
		low, high := binomialInterval(tt.n, tt.p, tt.tail)
		if low != tt.low || high != tt.high {
			t.Errorf("binomialInterval(%d, %v, %v) = %d, %d; want %d, %d", tt.n, tt.p, tt.tail, low, high, tt.low, tt.high)
		}
	}
}
