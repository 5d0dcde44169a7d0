package mount

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"memsync/strategies"
	"memsync/strategies/region"
	"memsync/strategies/transport"
)

const (
	firstPause = 20 * time.Millisecond // between two tries to reach a source that is gone
	longPause  = 500 * time.Millisecond
)

// remote is the region at the source. It is first opened once; later, when its
// connection was lost, it is tried for as long as the user allows.
type remote struct {
	transport transport.Transport
	dialer    transport.Dialer
	options   transport.Options
	reconnect time.Duration
	log       func(format string, args ...any)

	ready      atomic.Bool // mounted: failing is not final any more
	reconnects atomic.Int64

	mu    sync.Mutex
	since time.Time // of the outage; zero is none
	last  error
}

var (
	_ strategies.Remote   = (*remote)(nil)
	_ strategies.Beside   = (*remote)(nil)
	_ strategies.Exported = (*remote)(nil)
)

// Export implements strategies.Exported.
func (r *remote) Export() string { return r.options.Name }

// Open implements strategies.Remote.
func (r *remote) Open(ctx context.Context) (region.Store, error) {
	s, err := r.open(ctx, r.options)
	if err == nil && r.ready.Load() {
		r.reconnects.Add(1)
	}
	return s, err
}

// OpenBeside implements strategies.Beside.
func (r *remote) OpenBeside(ctx context.Context, suffix string, writable bool) (region.Store, error) {
	o := r.options
	o.Name, o.Connections, o.ReadOnly, o.Writer, o.Together = o.Name+suffix, 1, !writable, "", true
	return r.open(ctx, o)
}

// Dial implements strategies.Remote.
func (r *remote) Dial(ctx context.Context) (net.Conn, error) { return r.dialer.Dial(ctx) }

func (r *remote) open(ctx context.Context, o transport.Options) (s region.Store, err error) {
	for pause := firstPause; ; pause = min(2*pause, longPause) {
		if s, err = r.transport.Open(ctx, r.dialer, o); err == nil {
			r.back()
			return s, nil
		}
		if final(err) {
			return nil, err
		}
		if !r.ready.Load() {
			r.never(err)
			return nil, err
		}
		if gone := r.gone(err); gone > r.reconnect {
			return nil, fmt.Errorf("the source has been gone for %v, and --reconnect is %v: %w", gone.Round(time.Second), r.reconnect, err)
		}
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil, fmt.Errorf("%w: %w", err, ctx.Err())
		}
	}
}

// final reports whether to try again is of no use: the source answered.
func final(err error) bool {
	for _, answer := range []error{region.ErrMissing, region.ErrMismatch, region.ErrNotSupported, region.ErrNotPermitted, region.ErrReadOnly, region.ErrOutOfRange} {
		if errors.Is(err, answer) {
			return true
		}
	}
	return false
}

// gone notes that the source cannot be reached and returns for how long.
func (r *remote) gone(err error) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last = err
	if r.since.IsZero() {
		r.since = time.Now()
		r.log("the source is gone, trying again for %v: %v", r.reconnect, err)
	}
	return time.Since(r.since)
}

// never notes that the source could not be reached in the first place.
func (r *remote) never(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.last == nil && !errors.Is(err, context.Canceled) {
		r.last = err
	}
}

func (r *remote) back() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.since.IsZero() {
		r.log("the source is back after %v", time.Since(r.since).Round(time.Millisecond))
	}
	r.since, r.last = time.Time{}, nil
}

// outage returns for how long the source has been known to be gone; 0 is not.
func (r *remote) outage() (time.Duration, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.since.IsZero() {
		return 0, r.last
	}
	return time.Since(r.since), r.last
}
