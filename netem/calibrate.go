package netem

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Calibration is what a link was measured to do, beside what it was asked to do.
type Calibration struct {
	Shaper  Shaper  `json:"shaper"`
	Profile Profile `json:"profile"`
	// Accepted tells whether every measured value lies within its limits; Reasons
	// names the ones that do not.
	Accepted bool     `json:"accepted"`
	Reasons  []string `json:"reasons,omitempty"`

	RTT          EchoStats     `json:"rtt"`
	RTTTolerance time.Duration `json:"rtt_tolerance_ns"`
	RTTAttempts  int           `json:"rtt_attempts"`
	// Rates and Losses are of source to destination, then of the reverse; Rates is
	// empty where the rate is unlimited.
	Rates  []RateResult `json:"rates,omitempty"`
	Losses []LossResult `json:"losses"`
	// Goodput is one TCP stream's payload in bit/s from source to destination, once it
	// has had 7 RTT. It is recorded and never a gate; 0 where no stream came about.
	Goodput float64       `json:"tcp_goodput_bits_per_second"`
	Took    time.Duration `json:"took_ns"`
}

// RateResult is one direction's rate: L2 bytes that the receiving device counted
// while a UDP blast offered more than the link carries, with loss set to 0.
type RateResult struct {
	Wanted   int64         `json:"wanted_bits_per_second"`
	Measured float64       `json:"measured_bits_per_second"`
	Offered  float64       `json:"offered_bits_per_second"`
	Bytes    int64         `json:"bytes"`
	Window   time.Duration `json:"window_ns"`
	Attempts int           `json:"attempts"`
}

// LossResult is one direction's loss, and between which counts it had to lie: a
// binomial interval with 0.05 % beyond each end.
type LossResult struct {
	Wanted float64 `json:"wanted"`
	Sent   int     `json:"sent"`
	Lost   int     `json:"lost"`
	Low    int     `json:"low"`
	High   int     `json:"high"`
	// Attempts is how often this was measured; the numbers are the last one's.
	Attempts int `json:"attempts"`
}

const (
	rateTolerance = 0.10
	lossTail      = 0.0005
	blastExcess   = 1.3 // offered / rate: a moment's pause of the sender must not show
	blastWindow   = 150 * time.Millisecond
	blastPackets  = 300 // that a window should hold, so that one more is 0.3 %
	// A busy machine disturbs a measurement now and then, and hardly ever for the
	// better, so what fails is measured again before it counts: three times, after a
	// pause that grows, since what else the machine does comes in bursts.
	maxAttempts  = 4
	attemptPause = 50 * time.Millisecond // before the second; then four times as long each
)

// roomyQueue is the queue that calibration wants: as long as the sender may pause.
func roomyQueue(p Profile) int64 {
	return min(max(p.Queue(), p.Rate/8/50), MaxQueue) // 20 ms
}

// RTTTolerance is how far the median of n echoes may be from the profile's RTT: the
// larger of 5 % and 0.3 ms (1 ms for the tun shaper); with jitter also three standard
// errors of that median, sqrt(pi/2) * sqrt(2) * jitter / sqrt(n) each.
func RTTTolerance(s Shaper, p Profile, n int) time.Duration {
	t := 300 * time.Microsecond
	if s == ShaperTun {
		t = time.Millisecond
	}
	t = max(t, p.RTT/20)
	if p.Jitter > 0 && n > 0 {
		t += time.Duration(3 * math.Sqrt(math.Pi/float64(n)) * float64(p.Jitter))
	}
	return t
}

// AcceptRTT returns nil where the echoes fit the link's profile within RTTTolerance,
// else an error that gives the numbers. It is the check before and after a run.
func (l *Link) AcceptRTT(e EchoStats) error {
	tolerance := RTTTolerance(l.shaper, l.profile, e.Received)
	switch {
	case e.Received == 0:
		return fmt.Errorf("RTT: none of %d echoes came back", e.Sent)
	case (e.Median - l.profile.RTT).Abs() > tolerance:
		return fmt.Errorf("RTT: median of %d echoes is %v, not %v within %v", e.Received, e.Median, l.profile.RTT, tolerance)
	}
	return nil
}

// Calibrate measures RTT, loss and rate of an otherwise idle link and says whether
// they are as asked: RTT within RTTTolerance, rate within 10 %, loss within its
// interval. It takes about a second, several on long or slow links. An error means
// that measuring itself came to nothing; a link that fails is a Calibration that is
// not Accepted. Nothing else may use the link, or call SetLoss, meanwhile.
func (l *Link) Calibrate(ctx context.Context) (c Calibration, err error) {
	began := time.Now()
	defer func() {
		c.Took = time.Since(began)
		if err != nil {
			err = fmt.Errorf("calibrate %s link: %w", l.shaper, err)
		}
	}()
	c = Calibration{Shaper: l.shaper, Profile: l.profile}
	roomy := l.profile
	if roomy.Rate != 0 {
		roomy.QueueBytes = roomyQueue(roomy)
	}
	if err := l.change(roomy, true); err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, l.change(l.profile, false)) }()

	fail := func(err error) {
		if err != nil {
			c.Reasons = append(c.Reasons, err.Error())
		}
	}
	verdict, err := retry(ctx, func(n int) (verdict, err error) {
		c.RTTAttempts = n
		if c.RTT, err = l.Echo(ctx, l.echoes()); err != nil {
			return nil, err
		}
		verdict = l.AcceptRTT(c.RTT)
		for i, to := range l.hosts[2:] { // each from the one before it: no pair is nearer than another
			e, err := l.echo(ctx, l.hosts[i+1], to, 10)
			if err != nil {
				return nil, err
			}
			if no := l.AcceptRTT(e); no != nil {
				verdict = errors.Join(verdict, fmt.Errorf("to %s: %w", to.name, no))
			}
		}
		return verdict, nil
	})
	if err != nil {
		return c, err
	}
	c.RTTTolerance = RTTTolerance(l.shaper, l.profile, c.RTT.Received)
	fail(verdict)

	verdict, err = retry(ctx, func(n int) (verdict, err error) {
		c.Losses, err = l.measureLoss(ctx)
		for i := range c.Losses {
			r := &c.Losses[i]
			r.Attempts = n
			if r.Lost < r.Low || r.Lost > r.High {
				verdict = errors.Join(verdict, fmt.Errorf("loss %s: %d of %d, not %d to %d", directionName(i), r.Lost, r.Sent, r.Low, r.High))
			}
		}
		return verdict, err
	})
	if err != nil {
		return c, err
	}
	fail(verdict)

	if l.profile.Rate != 0 {
		roomy.Loss = 0
		if err := l.change(roomy, true); err != nil {
			return c, err
		}
		for i, from := range l.ends() {
			var r RateResult
			verdict, err = retry(ctx, func(n int) (verdict, err error) {
				if r, err = l.measureRate(ctx, from, l.ends()[1-i]); err != nil {
					return nil, fmt.Errorf("rate %s: %w", directionName(i), err)
				}
				r.Attempts = n
				if math.Abs(r.Measured/float64(r.Wanted)-1) > rateTolerance {
					verdict = fmt.Errorf("rate %s: %.4g bit/s with %.4g offered, not %d within %v %%", directionName(i), r.Measured, r.Offered, r.Wanted, 100*rateTolerance)
				}
				return verdict, nil
			})
			if err != nil {
				return c, err
			}
			c.Rates = append(c.Rates, r)
			fail(verdict)
		}
		if err := l.change(l.profile, false); err != nil {
			return c, err
		}
	}
	if c.Goodput, err = l.measureGoodput(ctx); err != nil {
		return c, err
	}
	c.Accepted = len(c.Reasons) == 0
	return c, nil
}

// retry measures until the verdict is good, at most maxAttempts times, and returns
// the last one.
func retry(ctx context.Context, measure func(attempt int) (verdict, err error)) (verdict, err error) {
	pause := attemptPause
	for n := 1; ; n++ {
		if verdict, err = measure(n); verdict == nil || err != nil || n == maxAttempts {
			return verdict, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(pause):
		}
		pause *= 4
	}
}

// echoes is how many make an RTT: 100, fewer on long links, about a second's worth
// where jitter spaces them.
func (l *Link) echoes() int {
	n := 100
	if l.profile.RTT > 50*time.Millisecond {
		n = 40
	}
	if j := l.profile.Jitter; j > 0 {
		n = min(n, max(30, int(time.Second/(4*j))))
	}
	return n
}

func directionName(i int) string {
	if i == 0 {
		return "source to destination"
	}
	return "destination to source"
}

// measureLoss sends small packets both ways at once, well below the rate.
func (l *Link) measureLoss(ctx context.Context) ([]LossResult, error) {
	const (
		payload = 32
		budget  = 2 * time.Second
	)
	n, pps := 10_000, 20_000.0
	if l.profile.Loss == 0 {
		n = 1000
	}
	if l.profile.Rate != 0 {
		pps = min(pps, 0.5*float64(l.profile.Rate)/8/(payload+28+l2Header))
		n = min(n, int(pps*budget.Seconds()))
	}
	results := make([]LossResult, 2)
	g, ctx := errgroup.WithContext(ctx)
	for i, from := range l.ends() {
		g.Go(func() error {
			got, err := l.countDatagrams(ctx, from, l.ends()[1-i], payload, n, pps)
			low, high := binomialInterval(n, l.profile.Loss, lossTail)
			results[i] = LossResult{Wanted: l.profile.Loss, Sent: n, Lost: n - got, Low: low, High: high}
			if err != nil {
				return fmt.Errorf("loss %s: %w", directionName(i), err)
			}
			return nil
		})
	}
	return results, g.Wait()
}

// countDatagrams sends n datagrams and returns how many arrive.
func (l *Link) countDatagrams(ctx context.Context, from, to *Namespace, payload, n int, pps float64) (int, error) {
	tx, err := openUDP(from, 20*time.Millisecond)
	if err != nil {
		return 0, err
	}
	defer tx.close()
	rx, err := openUDP(to, 20*time.Millisecond)
	if err != nil {
		return 0, err
	}
	defer rx.close()
	if err := errors.Join(tx.connect(rx), rx.connect(tx)); err != nil {
		return 0, err
	}
	sent := make(chan error, 1)
	go func() {
		_, err := flood(ctx, tx, payload, pps, func(sent int) int { return n - sent })
		sent <- err
	}()
	v, got := newVector(payload), 0
	defer v.pin.Unpin()
	var deadline time.Time
	for {
		select {
		case err := <-sent:
			if err != nil {
				return got, err
			}
			sent, deadline = nil, time.Now().Add(l.profile.RTT/2+6*l.profile.Jitter+100*time.Millisecond)
		default:
		}
		if sent == nil && (got >= n || time.Now().After(deadline)) {
			return got, nil
		}
		k, err := v.receive(rx.fd)
		if err == nil {
			got += k
		} else if !temporary(err) {
			if sent != nil {
				<-sent
			}
			return got, fmt.Errorf("receive: %w", err)
		}
	}
}

// flood sends datagrams at pps until left, asked how many more, says none; it returns
// how many it sent.
func flood(ctx context.Context, tx *udpSocket, payload int, pps float64, left func(sent int) int) (int, error) {
	v := newVector(payload)
	defer v.pin.Unpin()
	pace, sent := newPacer(), 0
	for {
		due := int(time.Since(pace.start).Seconds()*pps) - sent + 1
		for due > 0 {
			n := min(due, left(sent), batch)
			if n <= 0 {
				return sent, nil
			}
			k, err := v.send(tx.fd, n)
			if err != nil && !temporary(err) {
				return sent, fmt.Errorf("send: %w", err)
			}
			sent, due = sent+k, due-n
		}
		// A hundred microseconds or one packet, whichever is longer.
		next := max(time.Since(pace.start)+100*time.Microsecond, time.Duration(float64(sent)/pps*1e9))
		if err := pace.until(ctx, next); err != nil {
			return sent, err
		}
	}
}

// measureRate blasts from one end to the other with more than the rate, in large
// segments where the shaper lets them pass.
func (l *Link) measureRate(ctx context.Context, from, to *Namespace) (RateResult, error) {
	rate := float64(l.profile.Rate) / 8
	frame := int(min(linkFrame, max(128, rate*blastWindow.Seconds()/blastPackets)))
	window := max(blastWindow, time.Duration(float64(frame*blastPackets)/rate*1e9))
	window = min(window, 2*time.Second)
	first := l.profile.RTT/2 + 5*l.profile.Jitter + 20*time.Millisecond
	payload, segments := frame-l2Header-28, 1
	if frame == linkFrame {
		segments = l.profile.segments()
	}

	tx, err := openUDP(from, time.Second)
	if err != nil {
		return RateResult{}, err
	}
	defer tx.close()
	rx, err := openUDP(to, time.Second) // nobody reads it: what counts is the device
	if err != nil {
		return RateResult{}, err
	}
	defer rx.close()
	if err := tx.connect(rx); err != nil {
		return RateResult{}, err
	}
	if segments > 1 { // Linux 4.18 and 5.0
		err := errors.Join(unix.SetsockoptInt(tx.fd, unix.SOL_UDP, unix.UDP_SEGMENT, payload),
			unix.SetsockoptInt(rx.fd, unix.SOL_UDP, unix.UDP_GRO, 1))
		if err != nil {
			return RateResult{}, fmt.Errorf("large UDP segments: %w", err)
		}
	}
	began := time.Now()
	var enough sync.Once
	done := make(chan struct{})
	stop := func() { enough.Do(func() { close(done) }) }
	defer stop()
	pps := blastExcess * rate / float64(frame*segments)
	r := RateResult{Wanted: l.profile.Rate}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		begin := time.Now()
		n, err := flood(gctx, tx, payload*segments, pps, func(int) int {
			select {
			case <-done:
				return 0
			default:
				return batch
			}
		})
		r.Offered = float64(n*segments*frame) * 8 / time.Since(begin).Seconds()
		return err
	})
	g.Go(func() error {
		defer stop()
		return to.Do(func() error {
			pace := newPacer()
			if err := pace.until(gctx, first); err != nil {
				return err
			}
			b0, t0, err := l.received(to)
			if err != nil {
				return err
			}
			if err := pace.until(gctx, t0.Sub(pace.start)+window); err != nil {
				return err
			}
			b1, t1, err := l.received(to)
			// Payload has arrived in full frames, however many the device counted as one.
			r.Bytes, r.Window = (b1-b0)/int64(payload)*int64(frame), t1.Sub(t0)
			r.Measured = float64(r.Bytes) * 8 / r.Window.Seconds()
			return err
		})
	})
	if err := g.Wait(); err != nil {
		return r, err
	}
	// The excess is still queued; leave the link empty.
	return r, l.drain(ctx, time.Duration(blastExcess*float64(time.Since(began)))-time.Since(began))
}

// received reads how much UDP payload the device of n has received, inside n.
func (l *Link) received(n *Namespace) (int64, time.Time, error) {
	before := time.Now()
	dev, err := netlink.LinkByName(n.dev)
	if err != nil {
		return 0, before, fmt.Errorf("read counters of %s: %w", n.dev, err)
	}
	at := before.Add(time.Since(before) / 2)
	s := dev.Attrs().Statistics
	if s == nil {
		return 0, at, fmt.Errorf("read counters of %s: %w: there are none", n.dev, ErrReadBack)
	}
	headers := int64(28)
	if l.shaper != ShaperTun { // its devices have no L2 header
		headers += l2Header
	}
	return int64(s.RxBytes) - headers*int64(s.RxPackets), at, nil
}

// drain waits until what the queue holds, and what is under way, must have arrived.
func (l *Link) drain(ctx context.Context, queued time.Duration) error {
	return newPacer().until(ctx, queued+l.profile.RTT/2+2*l.profile.Jitter)
}

// measureGoodput runs one TCP stream for a moment.
func (l *Link) measureGoodput(ctx context.Context) (float64, error) {
	bits, err := l.stream(ctx, min(100*time.Millisecond+14*l.profile.RTT, 1500*time.Millisecond))
	if err != nil {
		return 0, fmt.Errorf("goodput: %w", err)
	}
	return bits, l.drain(ctx, time.Duration(serialisation(l.profile.Queue(), l.profile.Rate))*5/4)
}

// stream sends over one TCP connection for the length given and returns the bit/s of
// the second half; 0 where no connection comes about, as where everything is lost.
func (l *Link) stream(ctx context.Context, length time.Duration) (float64, error) {
	limit := length + 2*l.profile.RTT + 10*l.profile.Jitter + time.Second
	dialCtx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	ln, err := l.dst.Listen(ctx, "tcp", ":0")
	if err != nil {
		return 0, err
	}
	defer ln.Close()
	tx, err := l.src.Dial(dialCtx, "tcp", ln.Addr().String())
	if err != nil {
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
		return 0, nil
	}
	defer tx.Close()
	if d, ok := ln.(*net.TCPListener); ok {
		_ = d.SetDeadline(time.Now().Add(limit))
	}
	rx, err := ln.Accept()
	if err != nil {
		return 0, nil //nolint:nilerr // as above: its last ACK was lost
	}
	defer rx.Close()
	stopped := context.AfterFunc(ctx, func() { tx.Close(); rx.Close() })
	defer stopped()
	deadline := time.Now().Add(length)
	_ = tx.SetDeadline(deadline)
	_ = rx.SetDeadline(deadline)
	written := make(chan struct{})
	defer func() { tx.Close(); <-written }()
	go func() {
		defer close(written)
		b := make([]byte, 256<<10)
		for {
			if _, err := tx.Write(b); err != nil {
				return
			}
		}
	}()
	b := make([]byte, 256<<10)
	half := deadline.Add(-length / 2)
	var bytes int64
	var from, last time.Time
	for {
		n, err := rx.Read(b)
		now := time.Now()
		switch {
		case !from.IsZero():
			bytes, last = bytes+int64(n), now
		case now.After(half):
			from = now
		}
		if err != nil {
			if errors.Is(err, io.EOF) || ctx.Err() == nil {
				break
			}
			return 0, ctx.Err()
		}
	}
	// Reset, so that what was not sent yet never is.
	if t, ok := tx.(*net.TCPConn); ok {
		_ = t.SetLinger(0)
	}
	tx.Close()
	if bytes == 0 || !last.After(from) {
		return 0, nil
	}
	return float64(bytes) * 8 / last.Sub(from).Seconds(), nil
}

// binomialInterval returns the smallest [low, high] that leaves at most tail of the
// distribution of n draws of probability p below and at most tail above.
func binomialInterval(n int, p, tail float64) (low, high int) {
	if p <= 0 || p >= 1 {
		k := int(math.Round(p)) * n
		return k, k
	}
	lgamma := func(x int) float64 { v, _ := math.Lgamma(float64(x) + 1); return v }
	pmf := func(k int) float64 {
		return math.Exp(lgamma(n) - lgamma(k) - lgamma(n-k) + float64(k)*math.Log(p) + float64(n-k)*math.Log1p(-p))
	}
	for sum := pmf(0); sum <= tail; sum += pmf(low) {
		low++
	}
	high = n
	for sum := pmf(n); sum <= tail; sum += pmf(high) {
		high--
	}
	return low, high
}
