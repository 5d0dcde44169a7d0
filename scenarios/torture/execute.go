package torture

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"memsync/strategies/region"
)

// world is what a program runs in. Steps come from one goroutine; accesses and
// sync from others beside it.
type world interface {
	read(ctx context.Context, p []byte, off int64) error
	write(ctx context.Context, p []byte, off int64) error
	// sync returns once all that was written before is at the source.
	sync(ctx context.Context) error
	// open opens the region, the first time or again.
	open(ctx context.Context) error
	// close closes it as its user would, and must not lose what was written.
	close(ctx context.Context) error
	// killDaemon ends the daemon without a chance to save anything.
	killDaemon(ctx context.Context) error
	// fault does what a step says: to the link, the source or its backend. It may go on beside
	// what follows for as long as the step says.
	fault(s Step) error
	// heal makes link, source and backend work, now.
	heal(ctx context.Context) error
	// stored returns the source's bytes: those that would outlive it.
	stored(ctx context.Context) ([]byte, error)
	// end takes all down, and says what is left over.
	end() error
}

// limits are the deadlines of a world's calls.
type limits struct {
	access  time.Duration // deadline of one access
	slack   time.Duration // by which a call may return later than its deadline
	recover time.Duration // from the link's healing until a sync succeeds
	alone   bool          // one access at a time, through the kernel's page cache
}

// Counts says what programs did.
type Counts struct {
	Steps     int64         `json:"steps"`
	Reads     int64         `json:"reads"`
	Writes    int64         `json:"writes"`
	Syncs     int64         `json:"syncs"`
	Failed    int64         `json:"failed"` // accesses and syncs that returned an error, as they may under faults
	Kills     int64         `json:"kills"`
	Faults    int64         `json:"faults"` // of every kind
	Bytes     int64         `json:"bytes_compared"`
	Scheduled time.Duration `json:"scheduled_ns"` // on the program's own clock
}

func (c *Counts) add(o Counts) {
	c.Steps += o.Steps
	c.Reads += o.Reads
	c.Writes += o.Writes
	c.Syncs += o.Syncs
	c.Failed += o.Failed
	c.Kills += o.Kills
	c.Faults += o.Faults
	c.Bytes += o.Bytes
	c.Scheduled += o.Scheduled
}

// errBroken marks an invariant that did not hold.
var errBroken = errors.New("invariant broken")

func broken(what string, format string, a ...any) error {
	return fmt.Errorf("%w: %s: %w", errBroken, what, fmt.Errorf(format, a...))
}

// The invariants, by the words of broken.
const (
	bytesEqual   = "the bytes equal the model"
	syncSurvives = "what was synced survives"
	byDeadline   = "every call returns by its deadline"
	noError      = "nothing fails where nothing is at fault"
	recovers     = "it goes on once the fault is over"
	nothingLeft  = "nothing is left behind"
)

// execution is a program under way.
type execution struct {
	p      Program
	w      world
	m      *model
	l      limits
	trace  func(format string, a ...any)
	counts Counts

	mu      sync.Mutex
	failure error
	faulty  bool  // a fault was injected, so calls may fail
	synced  int64 // when the last sync that succeeded began
	next    uint64

	running sync.WaitGroup
	places  chan struct{} // one for each access under way
}

// execute runs p in w and returns the first invariant that did not hold. trace is
// told of every step, and of what came of it.
func execute(ctx context.Context, p Program, w world, l limits, trace func(format string, a ...any)) (Counts, error) {
	e := &execution{p: p, w: w, m: newModel(p.Seed, p.Size), l: l, trace: trace, places: make(chan struct{}, 3)}
	if l.alone {
		e.places = make(chan struct{}, 1)
	}
	began := time.Now()
	err := e.run(ctx)
	e.running.Wait()
	if e.failure != nil {
		err = e.failure
	}
	e.counts.Scheduled = time.Since(began)
	return e.counts, err
}

func (e *execution) fail(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.p.Hostile && !errors.Is(err, errLate) {
		return
	}
	if e.failure == nil && err != nil {
		e.failure = err
	}
}

// errLate marks a call that returned after its deadline.
var errLate = errors.New("late")

func (e *execution) failed() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.failure
}

// within calls f with a deadline, and sees to it that f keeps it.
func (e *execution) within(ctx context.Context, what string, d time.Duration, f func(context.Context) error) error {
	c, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	began := time.Now()
	err := f(c)
	if took := time.Since(began); took > d+e.l.slack {
		e.fail(broken(byDeadline, "%s took %v with a deadline of %v (%v): %w", what, took, d, err, errLate))
	}
	return err
}

// outcome judges an error of an access.
func (e *execution) outcome(what string, err error) {
	e.trace("    %s: %v", what, err)
	e.mu.Lock()
	defer e.mu.Unlock()
	if err == nil {
		return
	}
	e.counts.Failed++
	if e.p.Hostile {
		return
	}
	if !e.faulty && e.failure == nil {
		e.failure = broken(noError, "%s: %w", what, err)
	}
	if errors.Is(err, region.ErrMismatch) && e.failure == nil {
		e.failure = broken(bytesEqual, "%s: %w", what, err)
	}
}

func (e *execution) run(ctx context.Context) error {
	if err := e.within(ctx, "open", e.l.recover, e.w.open); err != nil {
		return broken(noError, "open: %w", err)
	}
	for i, s := range e.p.Steps {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := e.failed(); err != nil {
			return err
		}
		e.trace("%3d %v", i, s)
		e.counts.Steps++
		if err := e.step(ctx, s); err != nil {
			if e.p.Hostile && !errors.Is(err, errLate) { // it could not be opened again, say
				break
			}
			return err
		}
	}
	if e.p.Hostile {
		e.running.Wait()
		err := e.within(ctx, "the last close", e.l.access, e.w.close)
		e.trace("    the last close: %v", err)
		return e.failed()
	}
	return e.finish(ctx)
}

// go_ runs an access beside the steps.
func (e *execution) beside(ctx context.Context, s Step, f func(context.Context) error) {
	e.places <- struct{}{}
	e.running.Go(func() {
		defer func() { <-e.places }()
		err := e.within(ctx, s.String(), e.l.access, f)
		e.outcome(s.String(), err)
	})
}

func (e *execution) step(ctx context.Context, s Step) error {
	switch s.Op {
	case opRead:
		e.counts.Reads++
		e.beside(ctx, s, func(ctx context.Context) error { return e.read(ctx, s.Off, s.N) })
	case opWrite:
		e.counts.Writes++
		e.next++
		id := e.next
		e.beside(ctx, s, func(ctx context.Context) error {
			w, p := e.m.begin(id, s.Off, s.N)
			err := e.w.write(ctx, p, s.Off)
			e.m.end(w, err)
			return err
		})
	case opSync:
		e.counts.Syncs++
		e.beside(ctx, s, e.sync)
	case opJoin:
		e.running.Wait()
	case opWait:
		return sleep(ctx, s.For)
	case opReopen:
		e.running.Wait()
		return e.reopen(ctx)
	case opCheck:
		e.running.Wait()
		err := e.within(ctx, s.Op, e.l.access, func(ctx context.Context) error { return e.read(ctx, 0, e.p.Size) })
		e.outcome(s.Op, err)
	case opHeal:
		return e.w.heal(ctx)
	case opKillDaemon:
		e.fault()
		e.counts.Kills++
		return e.kill(ctx)
	default:
		if s.fault() {
			e.fault()
		}
		if s.Op == opKillSource {
			e.counts.Kills++
		}
		return e.w.fault(s)
	}
	return nil
}

func (e *execution) fault() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.faulty = true
	e.counts.Faults++
}

func (e *execution) read(ctx context.Context, off, n int64) error {
	p := make([]byte, n)
	from := e.m.now()
	if err := e.w.read(ctx, p, off); err != nil {
		return err
	}
	e.compared(n)
	if err := e.m.check(p, off, from); err != nil {
		e.fail(broken(bytesEqual, "read [%d, +%d): %w", off, n, err))
	}
	return nil
}

func (e *execution) compared(n int64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.counts.Bytes += n
}

// sync makes what was written durable, and looks at the source whether it is.
func (e *execution) sync(ctx context.Context) error {
	from := e.m.now()
	if err := e.w.sync(ctx); err != nil {
		if e.l.alone { // there is a page cache
			e.m.doubt()
		}
		return err
	}
	e.mu.Lock()
	e.synced = max(e.synced, from)
	e.mu.Unlock()
	return e.atSource(from)
}

// atSource compares what the source has.
func (e *execution) atSource(from int64) error {
	p, err := e.w.stored(context.Background())
	if err != nil || p == nil {
		return err
	}
	e.compared(int64(len(p)))
	if err := e.m.check(p, 0, from); err != nil {
		e.fail(broken(syncSurvives, "the source after a sync: %w", err))
	}
	return nil
}

// reopen closes the region and opens it again. What cannot be written back while there is a
// fault is the same as a kill.
func (e *execution) reopen(ctx context.Context) error {
	from := e.m.now()
	err := e.within(ctx, "close", e.l.access, e.w.close)
	e.outcome("close", err)
	if err != nil {
		from = e.survives(from)
	}
	return e.again(ctx, from)
}

// kill kills the daemon, also while it is in the middle of accesses.
func (e *execution) kill(ctx context.Context) error {
	from := e.m.now()
	if err := e.within(ctx, "kill the daemon", e.l.access, e.w.killDaemon); err != nil {
		return broken(byDeadline, "kill the daemon: %w", err)
	}
	e.running.Wait()
	return e.again(ctx, e.survives(from))
}

// survives is from when on a daemon that was killed at a moment may have lost what was
// answered: what a workload stores in a mapping is in the kernel's page cache until it is flushed.
func (e *execution) survives(killed int64) int64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.p.Kept && !e.l.alone {
		return killed
	}
	return e.synced
}

// again opens the region after it was closed or killed, with all faults over, and
// makes what is there the model: nothing that was under way may come any more.
func (e *execution) again(ctx context.Context, from int64) error {
	if err := e.w.heal(ctx); err != nil {
		return err
	}
	end := time.Now().Add(e.l.recover)
	for {
		err := e.within(ctx, "open again", e.l.access, e.w.open)
		e.trace("    open again: %v", err)
		if err == nil {
			break
		}
		if time.Now().After(end) {
			return broken(recovers, "open again: %w", err)
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
	p := make([]byte, e.p.Size)
	if err := e.eventually(ctx, "read everything", func(ctx context.Context) error { return e.w.read(ctx, p, 0) }); err != nil {
		return err
	}
	e.compared(e.p.Size)
	if err := e.m.check(p, 0, from); err != nil {
		return broken(syncSurvives, "after it was opened again: %w", err)
	}
	e.m.settle(p)
	e.mu.Lock()
	e.synced = e.m.now()
	e.mu.Unlock()
	return nil
}

// eventually repeats what must succeed now that nothing is at fault.
func (e *execution) eventually(ctx context.Context, what string, f func(context.Context) error) error {
	end := time.Now().Add(e.l.recover)
	for {
		err := e.within(ctx, what, e.l.access, f)
		e.trace("    %s: %v", what, err)
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case time.Now().After(end):
			return broken(recovers, "%s, %v after all faults ended: %w", what, e.l.recover, err)
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
}

// finish ends all faults, and wants everything to be as it should.
func (e *execution) finish(ctx context.Context) error {
	e.trace("    all faults end")
	if err := e.w.heal(ctx); err != nil {
		return err
	}
	e.running.Wait()
	if err := e.failed(); err != nil {
		return err
	}
	if e.p.Fragile { // it does not come back by itself
		from := e.m.now()
		if err := e.within(ctx, "close", e.l.access, e.w.close); err != nil {
			e.trace("    close: %v", err)
		}
		if err := e.again(ctx, from); err != nil {
			return err
		}
	}
	if err := e.eventually(ctx, "the last sync", e.sync); err != nil {
		return err
	}
	if err := e.eventually(ctx, "the last read", func(ctx context.Context) error { return e.read(ctx, 0, e.p.Size) }); err != nil {
		return err
	}
	if err := e.within(ctx, "the last close", e.l.access, e.w.close); err != nil {
		return broken(recovers, "the last close: %w", err)
	}
	if err := e.atSource(e.m.now()); err != nil {
		return err
	}
	return e.failed()
}
