package uffd

import (
	"context"
	"errors"
	"sync"
	"time"
)

var errDeadline = errors.New("the read's deadline has passed")

// lease lends one worker a context with a deadline for each read of the store
// without an allocation or a timer per read: the same context is lent until one
// read is late, and one watchdog looks at all leases.
type lease struct {
	parent  context.Context
	timeout time.Duration

	mu    sync.Mutex
	ctx   *timedContext
	until time.Time // zero: not lent
}

// timedContext says when it will end, for stores that wait in system calls.
type timedContext struct {
	context.Context
	cancel context.CancelCauseFunc
	lease  *lease
}

// Deadline returns when the read under way must end.
func (c *timedContext) Deadline() (time.Time, bool) {
	c.lease.mu.Lock()
	defer c.lease.mu.Unlock()
	return c.lease.until, !c.lease.until.IsZero()
}

func (l *lease) init(parent context.Context, timeout time.Duration) {
	l.parent, l.timeout = parent, timeout
}

func (l *lease) begin() context.Context {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ctx == nil {
		c := &timedContext{lease: l}
		c.Context, c.cancel = context.WithCancelCause(l.parent)
		l.ctx = c
	}
	l.until = time.Now().Add(l.timeout)
	return l.ctx
}

func (l *lease) end() {
	l.mu.Lock()
	l.until = time.Time{}
	l.mu.Unlock()
}

// expire ends the context lent if it is late at now.
func (l *lease) expire(now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ctx != nil && !l.until.IsZero() && now.After(l.until) {
		l.ctx.cancel(errDeadline)
		l.ctx = nil // the next read gets another
	}
}

// watch is the watchdog.
func (v *events) watch(workers []*worker) {
	t := time.NewTicker(max(v.deadline/8, time.Millisecond))
	defer t.Stop()
	for {
		select {
		case <-v.ctx.Done():
			return
		case now := <-t.C:
			for _, w := range workers {
				w.lease.expire(now)
			}
		}
	}
}
