package migration

import (
	"context"
	"fmt"
	"time"

	"memsync/strategies/order"
	"memsync/strategies/region"
)

// policy says when to finalise.
type policy struct {
	kind  string  // one of those below
	share float64 // of the region that must be here first; adaptive wants all of it
	// maxDowntime is what adaptive aims at.
	maxDowntime time.Duration
	// quietWait is how long cycle and quiet postpone.
	quietWait time.Duration
	unmet     string // what to do where what was aimed at cannot be had
}

// Names of policies.
const (
	policyPercent  = "percent"
	policyAdaptive = "adaptive"
	policyCycle    = "cycle" // in a quiet phase, as package cycle foresees it
	policyQuiet    = "quiet" // at a quiet point that the application announces
)

// What to do where a policy's aim cannot be had.
const (
	unmetFinalize = "finalize"
	unmetAbort    = "abort"
	unmetThrottle = "throttle" // adaptive: slow the application down
)

// wait returns when it is time to finalise.
func (l *leecher) wait(ctx context.Context) error {
	if !l.o.mode.bulk() {
		return nil
	}
	p := l.o.policy
	share := 1.0
	if p.kind != policyAdaptive {
		share = p.share
	}
	if err := l.until(ctx, int64(share*float64(l.size))); err != nil {
		return err
	}
	l.bulkRate = l.rate() // while one waits nothing comes
	if p.kind == policyCycle || p.kind == policyQuiet {
		if err := l.postpone(ctx); err != nil {
			return err
		}
	}
	if p.kind != policyAdaptive && (l.o.mode != PreCopy || share < 1) {
		return nil
	}
	return l.converge(ctx)
}

// postpone returns in a quiet phase of the application, or when quietWait is over.
func (l *leecher) postpone(ctx context.Context) error {
	begun := time.Now()
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.h.Postponed = int64(time.Since(begun))
	}()
	now := l.announced
	if l.o.policy.kind == policyCycle {
		now = l.foreseenQuiet
	}
	for {
		left := time.Until(begun.Add(l.o.policy.quietWait))
		if left <= 0 {
			return l.miss(l.foreseen(), fmt.Sprintf("no quiet phase of the application within quiet_wait=%v", l.o.policy.quietWait))
		}
		if ok, err := now(ctx, left); ok || err != nil {
			return err
		}
	}
}

// announced waits for a quiet point that the application announces.
func (l *leecher) announced(ctx context.Context, left time.Duration) (bool, error) {
	return l.look(ctx, min(left, l.o.patience/4))
}

// foreseenQuiet waits for one more round, and judges by all of them.
func (l *leecher) foreseenQuiet(ctx context.Context, left time.Duration) (bool, error) {
	likely := func(horizon time.Duration) bool {
		l.looking.Lock()
		defer l.looking.Unlock()
		v, _ := l.cycle.judge(time.Now(), horizon)
		return v == favourable || v == steady
	}
	if ok := likely(l.trips()); ok && !l.o.mode.strict() {
		return true, nil // what is left comes afterwards
	} else if ok {
		// What the burst before left is pulled in the quiet phase, once.
		if l.stale.Count() > 0 {
			if err := l.repeat(ctx); err != nil {
				return false, err
			}
			if _, err := l.look(ctx, 0); err != nil {
				return false, err
			}
		}
		if likely(l.foreseen()) {
			return true, nil
		}
	}
	select {
	case <-time.After(min(left, l.o.interval)):
		return false, l.roundErr()
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
}

// miss notes that a policy's aim cannot be had, and why, and gives up where that was asked for.
func (l *leecher) miss(foreseen time.Duration, why string) error {
	l.promise(foreseen, why)
	if l.o.policy.unmet == unmetAbort {
		return fmt.Errorf("%s: %w", why, region.ErrNotPermitted)
	}
	return nil
}

// slower has the application store half of what the link can take, then half of that. It
// says false at the lowest rate.
func (l *leecher) slower() bool {
	const least = 1.0 / 64 // of the link
	rate := l.rate() / 2
	if now := l.throttle.Load(); now > 0 {
		rate = float64(now) / 2
	}
	if rate < max(l.rate()*least, 1) {
		return false
	}
	l.throttle.Store(int64(rate))
	l.mu.Lock()
	defer l.mu.Unlock()
	l.h.Throttled = int64(rate)
	return true
}

// until returns when so many bytes were pulled once.
func (l *leecher) until(ctx context.Context, bytes int64) error {
	l.mu.Lock()
	p := l.puller
	l.mu.Unlock()
	t := time.NewTicker(time.Millisecond)
	defer t.Stop()
	for l.syncer.LocalBytes() < bytes {
		select {
		case <-t.C:
			if err := l.roundErr(); err != nil {
				return err
			}
		case <-p.Done():
			if l.syncer.LocalBytes() < bytes {
				return fmt.Errorf("%d of %d bytes were pulled: %w", l.syncer.LocalBytes(), bytes, region.ErrPeerGone)
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

func (l *leecher) roundErr() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// rate is how fast the bulk came, B/s.
func (l *leecher) rate() float64 {
	if l.bulkRate > 0 {
		return l.bulkRate
	}
	s := l.syncer.Stats()
	return max(float64(s.PrefetchBytes+s.DemandBytes), 1) / max(time.Since(l.bulkFrom).Seconds(), 1e-3)
}

// foreseen estimates the downtime of a hand-over now.
func (l *leecher) foreseen() time.Duration {
	return l.trips() + time.Duration(float64(l.stale.Count()*l.o.chunk)/l.rate()*1e9)
}

// trips is what the messages of a hand-over take.
func (l *leecher) trips() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.o.mode.strict() {
		return 5 * l.rtt / 2
	}
	return 3 * l.rtt / 2 // the answer of Finalize, then Commit beside the first pulls
}

// converge makes pre-copy's further rounds until little is left or they do not get
// shorter, and judges max_downtime.
func (l *leecher) converge(ctx context.Context) error {
	p := l.o.policy
	const stubborn = 3 // rounds in a row that leave hardly less
	last, same := int64(1)<<62, 0
	for {
		if _, err := l.look(ctx, 0); err != nil && l.roundErr() == nil {
			return err
		}
		est := l.foreseen()
		left := l.stale.Count() * l.o.chunk
		switch {
		case p.kind == policyAdaptive && est <= p.maxDowntime:
			l.promise(est, "")
			return nil
		case l.o.mode != PreCopy || left == 0:
			same = stubborn // hybrid cannot shrink what is left
		case left > last*9/10:
			same++
		default:
			same = 0
		}
		if same >= stubborn && p.kind != policyAdaptive {
			return nil
		}
		if same >= stubborn && p.unmet == unmetThrottle && l.slower() {
			same = 0
		}
		if same >= stubborn {
			why := fmt.Sprintf("%d bytes are left at %.3g MB/s and do not get fewer: the downtime would be about %v, more than max_downtime=%v", left, l.rate()/1e6, est.Round(time.Millisecond), p.maxDowntime)
			return l.miss(est, why)
		}
		last = left
		if err := l.repeat(ctx); err != nil {
			return err
		}
	}
}

// repeat pulls once more what is out of date.
func (l *leecher) repeat(ctx context.Context) error {
	if err := l.drain(ctx); err != nil {
		return err
	}
	ranges, err := l.forget()
	if err != nil {
		return err
	}
	l.pull(order.List(ranges))
	return l.until(ctx, l.size)
}

func (l *leecher) promise(d time.Duration, unmet string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.h.Promised, l.h.Unmet = int64(d), unmet
}
