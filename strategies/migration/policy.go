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
	kind  string  // percent or adaptive
	share float64 // percent: of the region that must be here
	// maxDowntime is what adaptive aims at.
	maxDowntime time.Duration
	abort       bool // adaptive: rather give up than exceed it
}

// Names of policies.
const (
	policyPercent  = "percent"
	policyAdaptive = "adaptive"
)

// wait returns when it is time to finalise.
func (l *leecher) wait(ctx context.Context) error {
	if !l.o.mode.bulk() {
		return nil
	}
	p := l.o.policy
	share := 1.0
	if p.kind == policyPercent {
		share = p.share
	}
	if err := l.until(ctx, int64(share*float64(l.size))); err != nil {
		return err
	}
	if p.kind != policyAdaptive && (l.o.mode != PreCopy || share < 1) {
		return nil
	}
	return l.converge(ctx)
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
	s := l.syncer.Stats()
	return float64(s.PrefetchBytes+s.DemandBytes) / max(time.Since(l.bulkFrom).Seconds(), 1e-3)
}

// foreseen estimates the downtime of a hand-over now.
func (l *leecher) foreseen() time.Duration {
	l.mu.Lock()
	rtt := l.rtt
	l.mu.Unlock()
	need := float64(l.stale.Count() * l.o.chunk)
	trips := 3 * rtt / 2 // the answer of Finalize, then Commit beside the first pulls
	if l.o.mode.strict() {
		trips = 5 * rtt / 2
	}
	return trips + time.Duration(need/l.rate()*1e9)
}

// converge makes pre-copy's further rounds until little is left or they do not get
// shorter, and judges max_downtime.
func (l *leecher) converge(ctx context.Context) error {
	p := l.o.policy
	const stubborn = 3 // rounds in a row that leave hardly less
	last, same := int64(1)<<62, 0
	for {
		if err := l.look(ctx); err != nil && l.roundErr() == nil {
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
		if same >= stubborn {
			if p.kind != policyAdaptive {
				return nil
			}
			why := fmt.Sprintf("%d bytes are left at %.3g MB/s and do not get fewer: the downtime would be about %v, more than max_downtime=%v", left, l.rate()/1e6, est.Round(time.Millisecond), p.maxDowntime)
			l.promise(est, why)
			if p.abort {
				return fmt.Errorf("%s: %w", why, region.ErrNotPermitted)
			}
			return nil
		}
		last = left
		if err := l.drain(ctx); err != nil {
			return err
		}
		ranges, err := l.forget()
		if err != nil {
			return err
		}
		l.pull(order.List(ranges))
		if err := l.until(ctx, l.size); err != nil {
			return err
		}
	}
}

func (l *leecher) promise(d time.Duration, unmet string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.h.Promised, l.h.Unmet = int64(d), unmet
}
