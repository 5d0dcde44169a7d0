package netem

import (
	"math"
	"math/bits"
	"math/rand/v2"
	"sync/atomic"
	"time"
)

// verdict is what becomes of a packet.
type verdict uint8

const (
	passed   verdict = iota
	lost             // drawn by the link's loss
	overflow         // the bottleneck's queue was full
)

// line is one direction of a shaped link as a pure function of virtual time:
// arrivals in, departures out. Loss comes first, then a drop-tail queue bounded in
// bytes, then the bottleneck, then delay with jitter. Packets leave in the order
// they came. Times are nanoseconds of any one clock. Only set may run concurrently with
// admit.
type line struct {
	rate   int64 // bit/s, 0 unlimited
	delay  int64
	jitter float64
	loss   atomic.Uint64 // math.Float64bits of 0..1
	queue  atomic.Int64  // how long the bottleneck may be busy with what waits; 0 where unlimited
	rng    *rand.Rand

	free int64 // when the bottleneck has sent all that was admitted
	last int64 // departure of the packet admitted last
}

// newLine makes direction dir (0 or 1) of a link of profile p. Equal seeds make
// equal draws, in the order of the packets.
func newLine(p Profile, seed uint64, dir uint64) *line {
	l := &line{
		rate:   p.Rate,
		delay:  int64(p.RTT / 2),
		jitter: float64(p.Jitter),
		rng:    rand.New(rand.NewPCG(seed, dir)),
		free:   math.MinInt64,
		last:   math.MinInt64,
	}
	l.set(p)
	return l
}

// set takes over the loss and the queue of p, from the next packet on.
func (l *line) set(p Profile) {
	l.loss.Store(math.Float64bits(p.Loss))
	l.queue.Store(serialisation(p.Queue(), p.Rate))
}

// serialisation is how long size bytes occupy a link of rate bit/s, rounded up so
// that the rate is never exceeded; 0 where the rate is unlimited.
func serialisation(size, rate int64) int64 {
	if rate == 0 {
		return 0
	}
	// size * 8e9 overflows 64 bits from 1.1 GB on; the quotient fits as long as it is below 292 years.
	hi, lo := bits.Mul64(uint64(size), 8*uint64(time.Second))
	q, r := bits.Div64(hi, lo, uint64(rate))
	if r != 0 {
		q++
	}
	return int64(q)
}

// admit offers a frame of size bytes that arrives now, not before an earlier one.
// It tells when the frame reaches the other end, or why it never does.
func (l *line) admit(now, size int64) (depart int64, v verdict) {
	if p := math.Float64frombits(l.loss.Load()); p > 0 && l.rng.Float64() < p {
		return 0, lost
	}
	depart = now
	if l.rate != 0 {
		start, took := max(now, l.free), serialisation(size, l.rate)
		// An idle bottleneck takes any frame, as a queue of less than one frame must.
		if wait := start - now; wait > 0 && wait+took > l.queue.Load() {
			return 0, overflow
		}
		l.free = start + took
		depart = l.free
	}
	delay := l.delay
	if l.jitter > 0 {
		delay = max(0, delay+int64(l.rng.NormFloat64()*l.jitter))
	}
	l.last = max(depart+delay, l.last)
	return l.last, passed
}
