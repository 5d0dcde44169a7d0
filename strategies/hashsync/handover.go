package hashsync

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies"
	"memsync/strategies/migration/handover"
	"memsync/strategies/param"
	"memsync/strategies/region"
)

// The hand-over of a region with its application: who owns it is decided by
// package handover; here are its messages, and what both ends do at its steps.

// Sizes of the messages' bodies, and the largest text in an answer.
const (
	takeSize  = 1 + 8 + 8
	takenSize = takeSize + 1 + 8 + 6*8
)

// taken is the body of frameTaken: the answer, and of Finalize what was done. Times
// are CLOCK_MONOTONIC of the source, ns.
type taken struct {
	handover.Reply
	Asked, Stopped, Flushed, Scanned int64
	Changed                          int64  // bytes of chunks of the last round
	Sent                             int64  // bytes of its deltas
	Text                             string // why it was refused
}

func encodeTake(b []byte, r handover.Request) []byte {
	b = append(b, byte(r.Verb))
	b = binary.BigEndian.AppendUint64(b, uint64(r.From))
	return binary.BigEndian.AppendUint64(b, r.Epoch)
}

func parseTake(b []byte) (r handover.Request, err error) {
	r = handover.Request{Verb: handover.Verb(b[0]), From: handover.ID(binary.BigEndian.Uint64(b[1:])), Epoch: binary.BigEndian.Uint64(b[9:])}
	switch {
	case r.Verb < handover.Track || r.Verb > handover.Done:
		return r, protocol("request %d of a hand-over, want %d to %d", b[0], handover.Track, handover.Done)
	case r.From == 0:
		return r, protocol("destination 0 in a request of a hand-over")
	}
	return r, nil
}

func (t taken) encode() []byte {
	b := encodeTake(nil, t.Request)
	b = append(b, byte(t.Result))
	for _, v := range []uint64{t.Epoch, uint64(t.Asked), uint64(t.Stopped), uint64(t.Flushed), uint64(t.Scanned), uint64(t.Changed), uint64(t.Sent)} {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	return append(b, t.Text[:min(len(t.Text), maxText)]...)
}

func parseTaken(b []byte) (t taken, err error) {
	if t.Request, err = parseTake(b); err != nil {
		return t, err
	}
	t.Result = handover.Result(b[takeSize])
	if t.Result < handover.OK || t.Result > handover.TooLate {
		return t, protocol("result %d of a hand-over, want %d to %d", t.Result, handover.OK, handover.TooLate)
	}
	b = b[takeSize+1:]
	n := func() int64 { v := binary.BigEndian.Uint64(b); b = b[8:]; return int64(v) }
	t.Epoch, t.Asked, t.Stopped, t.Flushed, t.Scanned, t.Changed, t.Sent = uint64(n()), n(), n(), n(), n(), n(), n()
	if t.Changed < 0 || t.Sent < 0 {
		return t, protocol("%d and %d bytes in the last round of a hand-over", t.Changed, t.Sent)
	}
	t.Text = string(b)
	return t, nil
}

func monotonic() int64 {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &t) // one clock for all processes of a host
	return t.Nano()
}

// owner is a source's side: it stops the application, makes the last round, and
// lets the application go on where no destination takes over.
type owner struct {
	source  *Source
	lead    int           // rounds made right before the application is stopped
	suspend time.Duration // that the application may take to stop and to flush
	commit  time.Duration // that the last round may take, and then the Commit

	ctx      context.Context // ends with the source
	cancel   context.CancelFunc
	wg       sync.WaitGroup
	gone     chan struct{}
	released atomic.Bool // the region is somebody else's: do not look for changes

	mu      sync.Mutex
	changed chan struct{} // closed and made anew with each step
	m       handover.Source
	hooks   strategies.Hooks
	last    taken  // what the epoch's Finalize did
	round   uint64 // the last one
	trouble error  // why Finalize was refused
	closed  bool
}

func newOwner(s *Source, o SourceOptions) *owner {
	w := &owner{source: s, lead: o.LeadRounds, suspend: o.SuspendTimeout, commit: o.CommitTimeout, m: handover.NewSource(), gone: make(chan struct{}), changed: make(chan struct{})}
	if w.suspend <= 0 {
		w.suspend = 10 * time.Second
	}
	if w.commit <= 0 {
		w.commit = 30 * time.Second
	}
	w.ctx, w.cancel = context.WithCancel(context.Background())
	return w
}

// close ends what is under way. An application that stands still stays so.
func (w *owner) close() {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.cancel()
	w.wg.Wait()
}

func (w *owner) control(h strategies.Hooks) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.hooks = h
}

// forget is called when a destination's connection is lost: one that only follows
// so far leaves the region to others.
func (w *owner) forget(from handover.ID) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.m.With == from {
		w.step(w.m.Forget())
	}
}

// step goes to the next state and does what it asks for. w.mu is held.
func (w *owner) step(m handover.Source, a handover.Action) {
	if m == w.m || w.closed {
		return
	}
	w.m = m
	w.released.Store(!m.Phase.Owns())
	close(w.changed)
	w.changed = make(chan struct{})
	epoch := m.Epoch
	switch a {
	case handover.Suspend:
		w.last, w.trouble = taken{Asked: monotonic()}, nil
		w.wg.Go(func() { w.finalize(epoch) })
	case handover.Resume:
		w.wg.Go(w.resume)
	case handover.Exit:
		close(w.gone)
	}
}

func call(ctx context.Context, f func(context.Context) error) error {
	if f == nil {
		return nil
	}
	return f(ctx)
}

// resume lets the application go on.
func (w *owner) resume() {
	w.mu.Lock()
	h := w.hooks
	w.mu.Unlock()
	ctx, cancel := context.WithTimeout(w.ctx, w.suspend)
	defer cancel()
	if err := call(ctx, h.Resume); err != nil {
		w.mu.Lock()
		w.trouble = fmt.Errorf("resume the application: %w", err)
		w.mu.Unlock()
	}
}

// finalize stops the application and makes the last round.
func (w *owner) finalize(epoch uint64) {
	w.mu.Lock()
	h, t := w.hooks, w.last
	w.mu.Unlock()
	round, err := w.lastRound(h, &t)
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil {
		w.trouble = err
		w.step(w.m.Refuse(epoch))
		return
	}
	if m := w.m.Stopped(epoch); m != w.m {
		w.last, w.round = t, round
		w.step(m, handover.Nothing)
		w.wg.Go(func() { w.expire(epoch) })
	}
}

func (w *owner) lastRound(h strategies.Hooks, t *taken) (round uint64, err error) {
	for range w.lead {
		ctx, cancel := context.WithTimeout(w.ctx, w.commit)
		_, err := w.source.Sync(ctx)
		cancel()
		if err != nil {
			return 0, fmt.Errorf("a round before the application is stopped: %w", err)
		}
	}
	ctx, cancel := context.WithTimeout(w.ctx, w.suspend)
	defer cancel()
	if err := call(ctx, h.Suspend); err != nil {
		return 0, fmt.Errorf("suspend the application: %w", err)
	}
	t.Stopped = monotonic()
	if err := call(ctx, h.Flush); err != nil {
		return 0, fmt.Errorf("flush the application's stores: %w", err)
	}
	t.Flushed = monotonic()
	before := w.source.statistics()
	ctx, cancel = context.WithTimeout(w.ctx, w.commit)
	defer cancel()
	if round, err = w.source.now(ctx); err != nil {
		return 0, fmt.Errorf("the last round: %w", err)
	}
	after := w.source.statistics()
	t.Scanned, t.Changed, t.Sent = monotonic(), after.Changed-before.Changed, after.DeltaBytes-before.DeltaBytes
	return round, nil
}

// expire ends an epoch whose Commit does not come.
func (w *owner) expire(epoch uint64) {
	t := time.NewTimer(w.commit)
	defer t.Stop()
	select {
	case <-t.C:
	case <-w.ctx.Done():
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.step(w.m.Expire(epoch))
}

// handle answers a request; round is the last one, with an OK to Finalize.
func (w *owner) handle(ctx context.Context, r handover.Request) (t taken, round uint64, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.step(w.m.Handle(r))
	for {
		rep, ready := w.m.Answer(r)
		if ready {
			if r.Verb == handover.Finalize && rep.Result == handover.OK {
				t, round = w.last, w.round
			}
			if t.Reply = rep; rep.Result == handover.Refused {
				t.Text = fmt.Sprint(w.trouble)
			}
			return t, round, nil
		}
		changed := w.changed
		w.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			err = context.Cause(ctx)
		case <-w.ctx.Done():
			err = region.ErrClosed
		}
		w.mu.Lock()
		if err != nil {
			return t, 0, err
		}
	}
}

// request is one that a replica wants answered, on this connection or the next.
type request struct {
	handover.Request
	answer chan answered
}

type answered struct {
	taken
	round uint64
}

// ask sends a request of the hand-over until it is answered.
func (r *Replica) ask(ctx context.Context, q handover.Request) (answered, error) {
	c := &request{Request: q, answer: make(chan answered, 1)}
	r.asking.Store(c)
	defer r.asking.CompareAndSwap(c, nil)
	select {
	case r.poke <- struct{}{}:
	default:
	}
	select {
	case a := <-c.answer:
		return a, nil
	case <-ctx.Done():
		return answered{}, fmt.Errorf("%v of epoch %d: no answer: %w", q.Verb, q.Epoch, context.Cause(ctx))
	}
}

// requests sends, on one connection, what the replica wants answered.
func (r *Replica) requests(ctx context.Context, id uint16, write func(...frame) error) {
	var sent *request
	for {
		if c := r.asking.Load(); c != nil && c != sent {
			sent = c
			if write(frame{kind: frameTake, region: id, body: encodeTake(nil, c.Request)}) != nil {
				return
			}
		}
		select {
		case <-r.poke:
		case <-ctx.Done():
			return
		}
	}
}

// taken takes an answer; one that nobody waits for is dropped. Once the region is
// ours no byte of it comes from the source any more.
func (r *Replica) taken(f frame) error {
	t, err := parseTaken(f.body)
	if err != nil {
		return err
	}
	c := r.asking.Load()
	if c == nil || c.Request != t.Request {
		return nil
	}
	if t.Request.Verb == handover.Commit && t.Result == handover.OK {
		r.node.own.Lock()
		r.owned = true
		r.node.own.Unlock()
	}
	select {
	case c.answer <- answered{t, f.round}:
	default: // was sent on two connections and answered on both
	}
	return nil
}

// taker is a mount's side of the hand-over.
type taker struct {
	run      context.Context // ends, with why, when the replica is not followed any more
	replica  *Replica
	patience time.Duration // that an answer may take

	mu sync.Mutex
	m  handover.Destination
	h  strategies.Handover
}

// newTaker makes one that has not asked for anything.
func newTaker(run context.Context, r *Replica, p param.Values) *taker {
	id := handover.ID(rand.Uint64() | 1)
	// As long as the source may take to answer Finalize, and a while to reach it.
	patience := time.Duration(p.Int("lead_rounds")+1)*p.Duration("commit_timeout") + p.Duration("suspend_timeout") + silence
	return &taker{run: run, replica: r, patience: patience, m: handover.Destination{ID: id, Strict: true}}
}

func (t *taker) state() handover.Destination {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.m
}

func (t *taker) set(m handover.Destination) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.m = m
}

// advance asks what the state wants answered.
func (t *taker) advance(ctx context.Context) (answered, error) {
	q, ok := t.state().Want()
	if !ok {
		return answered{}, nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, t.patience, fmt.Errorf("after %v: %w", t.patience, region.ErrPeerGone))
	defer cancel()
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	defer context.AfterFunc(t.run, func() { stop(fmt.Errorf("%w: %w", context.Cause(t.run), region.ErrPeerGone)) })()
	a, err := t.replica.ask(ctx, q)
	if err == nil {
		t.set(t.state().Handle(a.Reply))
	}
	return a, err
}

var errWentOn = errors.New("the source went on")

// takeOver goes from Joining to Owning.
func (t *taker) takeOver(ctx context.Context) error {
	for t.state().Stage == handover.Joining {
		a, err := t.advance(ctx)
		if err != nil {
			return err
		}
		if t.state().Stage == handover.Aborted {
			return fmt.Errorf("track: %v: %w", a.Result, region.ErrNotPermitted)
		}
	}
	t.set(t.state().Decide())
	asked := monotonic()
	a, err := t.advance(ctx)
	switch {
	case err != nil:
		return err
	case a.Result == handover.Refused:
		return fmt.Errorf("finalize epoch %d: %v (%s): %w", a.Request.Epoch, a.Result, a.Text, region.ErrNotPermitted)
	case t.state().Stage != handover.Filling:
		return fmt.Errorf("finalize epoch %d: %v, it is in epoch %d: %w", a.Request.Epoch, a.Result, a.Epoch, errWentOn)
	}
	t.mu.Lock()
	t.h.Asked, t.h.Stopped, t.h.Flushed, t.h.Scanned, t.h.FinalBytes, t.h.NeededBytes = asked, a.Stopped, a.Flushed, a.Scanned, a.Changed, a.Sent
	t.mu.Unlock()
	// The round's digest is the proof that every byte is here.
	if err := t.replica.Wait(ctx, a.round); err != nil {
		return fmt.Errorf("the last round, %d: %w", a.round, err)
	}
	t.set(t.state().Complete())
	if a, err = t.advance(ctx); err != nil {
		return err
	}
	if !t.state().Owns() {
		return fmt.Errorf("commit epoch %d: %v, it is in epoch %d: %w", a.Request.Epoch, a.Result, a.Epoch, errWentOn)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.h.Owned, t.h.Epoch, t.h.Rounds = monotonic(), a.Epoch, t.replica.node.statistics().Rounds
	return nil
}

// Finalize stops the application at the source, takes the last round, and then the region.
func (t *taker) Finalize(ctx context.Context, hooks strategies.Hooks) (strategies.Handover, error) {
	if err := call(ctx, hooks.Prepare); err != nil {
		return t.handover(), errors.Join(fmt.Errorf("prepare the application: %w", err), call(ctx, hooks.Abort))
	}
	for try := 0; ; try++ {
		err := t.takeOver(ctx)
		if err == nil {
			break
		}
		if !errors.Is(err, errWentOn) || try == 3 || t.state().Stage == handover.Aborted {
			return t.handover(), errors.Join(err, t.giveUp(ctx, hooks))
		}
	}
	if err := call(ctx, hooks.Resume); err != nil {
		return t.handover(), fmt.Errorf("start the application: %w", err)
	}
	t.mu.Lock()
	t.h.Resumed = monotonic()
	t.mu.Unlock()
	return t.handover(), nil
}

// giveUp tells the source that it may go on, where that is still ours to say.
func (t *taker) giveUp(ctx context.Context, hooks strategies.Hooks) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	var err error
	if m := t.state(); m.Stage == handover.Joining && m.Last != 0 {
		_, err = t.advance(ctx) // the source takes us for one that goes on: find the epoch to abort
	}
	t.set(t.state().GiveUp())
	switch m := t.state(); m.Stage {
	case handover.Committing:
		err = fmt.Errorf("whether the region was handed over in epoch %d could not be found out: the source knows: %w", m.Epoch, region.ErrPeerGone)
	case handover.Aborting:
		_, err = t.advance(ctx)
	case handover.Aborted:
		err = nil
	}
	return errors.Join(err, call(ctx, hooks.Abort))
}

// Complete tells the source that it may exit.
func (t *taker) Complete(ctx context.Context) (strategies.Handover, error) {
	if m := t.state(); !m.Owns() {
		return t.handover(), fmt.Errorf("complete a migration that is %v: %w", m.Stage, region.ErrNotPermitted)
	}
	t.set(t.state().Complete())
	if t.state().Stage == handover.Finishing {
		// A source that is gone has had the message, and cannot be told again.
		if _, err := t.advance(ctx); err != nil && !errors.Is(err, region.ErrPeerGone) {
			return t.handover(), err
		}
	}
	return t.handover(), nil
}

func (t *taker) handover() strategies.Handover {
	t.mu.Lock()
	defer t.mu.Unlock()
	h := t.h
	h.Local, h.BulkBytes, h.BulkTime, h.DirtiedBytes = t.replica.progress()
	return h
}
