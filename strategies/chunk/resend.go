package chunk

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"memsync/strategies/region"
)

// resendLimit bounds what a Resend keeps, in bytes; beyond it a write flushes.
const resendLimit = 32 << 20

// Resend is a Reopen that loses no write with a connection: it keeps a copy of
// what was written since the last Flush, and writes that once more, in order, on
// each new connection before anything else is asked of it. So a Flush can be
// repeated, and its success means what it says also where the source was started
// anew and had forgotten what nobody told it to keep. At most 32 MiB and the
// writes under way are kept: then a write flushes too.
// Source: the unstable writes of NFS (RFC 1813, section 3.3.7, "stable").
type Resend struct {
	*Reopen
	mu    sync.Mutex
	log   []*unflushed // in the order in which the writes began
	bytes int64
}

type unflushed struct {
	off  int64
	p    []byte
	done bool // answered
}

var _ region.Store = (*Resend)(nil)

// OpenResending opens the store with open and returns it, ready to do so again.
func OpenResending(ctx context.Context, open func(ctx context.Context) (region.Store, error)) (*Resend, error) {
	r := &Resend{}
	var err error
	if r.Reopen, err = OpenAgain(ctx, open, nil); err != nil {
		return nil, err
	}
	r.again = r.replay
	return r, nil
}

// replay writes what is kept to s. What is begun meanwhile waits for s and is
// written by who began it.
func (r *Resend) replay(ctx context.Context, s region.Store) error {
	r.mu.Lock()
	log := slices.Clone(r.log)
	r.mu.Unlock()
	for _, u := range log {
		if err := s.WriteAt(ctx, u.p, u.off); err != nil {
			return fmt.Errorf("write %d bytes at %d once more: %w", len(u.p), u.off, err)
		}
	}
	return nil
}

// WriteAt implements region.Store.
func (r *Resend) WriteAt(ctx context.Context, p []byte, off int64) error {
	u := &unflushed{off: off, p: slices.Clone(p)}
	r.mu.Lock()
	r.log = append(r.log, u)
	r.bytes += int64(len(p))
	full := r.bytes > resendLimit
	r.mu.Unlock()
	err := r.Reopen.WriteAt(ctx, p, off)
	r.mu.Lock()
	u.done = err == nil
	r.mu.Unlock()
	if err != nil { // whoever wrote is told, so it is not for us to try again
		r.forget(func(o *unflushed) bool { return o == u })
		return err
	}
	if full {
		return r.Flush(ctx)
	}
	return nil
}

func (r *Resend) forget(these func(*unflushed) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.log = slices.DeleteFunc(r.log, func(u *unflushed) bool {
		if !these(u) {
			return false
		}
		r.bytes -= int64(len(u.p))
		return true
	})
}

// Flush implements region.Store. It is repeated on a new connection.
func (r *Resend) Flush(ctx context.Context) error {
	r.mu.Lock()
	covered := map[*unflushed]bool{}
	for _, u := range r.log {
		if u.done {
			covered[u] = true
		}
	}
	r.mu.Unlock()
	for attempt := 0; ; attempt++ {
		err := r.Reopen.Flush(ctx)
		if err == nil {
			break
		}
		if attempt > 0 || !errors.Is(err, region.ErrPeerGone) || ctx.Err() != nil {
			return err
		}
	}
	r.forget(func(u *unflushed) bool { return covered[u] })
	return nil
}
