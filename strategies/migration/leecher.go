package migration

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"memsync/strategies"
	"memsync/strategies/chunk"
	"memsync/strategies/device"
	"memsync/strategies/device/uffd"
	"memsync/strategies/migration/handover"
	"memsync/strategies/order"
	"memsync/strategies/region"
)

// Mode is how bytes are divided between before and after the application stops.
type Mode string

// The modes.
//
//	               before it stops        what was written meanwhile   the destination starts
//	PreCopy        pulls everything       is pulled again, in rounds   with every byte
//	PostCopy       pulls nothing          -                            at once
//	Hybrid         pulls everything       is pulled once, afterwards   at once
//	StopAndCopy    pulls nothing          -                            with every byte
const (
	PreCopy     Mode = "pre-copy"
	PostCopy    Mode = "post-copy"
	Hybrid      Mode = "hybrid"
	StopAndCopy Mode = "stop-and-copy"
)

// Modes lists the modes.
func Modes() []string {
	return []string{string(Hybrid), string(PreCopy), string(PostCopy), string(StopAndCopy)}
}

func (m Mode) bulk() bool   { return m == PreCopy || m == Hybrid }
func (m Mode) strict() bool { return m == PreCopy || m == StopAndCopy }

// leecherOptions say how a leecher behaves.
type leecherOptions struct {
	mode     Mode
	device   string
	chunk    int64
	extent   int64
	workers  int
	around   int64 // bytes that a fault pulls, an aligned block
	interval time.Duration
	policy   policy
	patience time.Duration // how long the source may be out of reach
	journal  string
	dev      device.Options
	params   uffd.MemoryOptions
}

// leecher is the destination's side: it pulls a region while an application
// goes on writing it at the source, and takes it over.
type leecher struct {
	o      leecherOptions
	remote *chunk.Reopen
	ctrl   *control
	cache  region.Store
	memory *uffd.Memory // the cache, with device uffd; else nil
	dev    device.Device
	syncer *chunk.Syncer
	size   int64

	ctx    context.Context // ends at Close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	looking    sync.Mutex    // one round at a time
	looked     time.Time     // when the last one was answered (looking)
	cycle      cycle         // what they said (looking)
	open       chan struct{} // closed once accesses may go ahead: what is local is right
	openOnce   sync.Once
	background context.CancelFunc // of rounds

	mu      sync.Mutex
	m       handover.Destination
	session uint64
	puller  *chunk.Puller
	stale   *chunk.Set // chunks that were written at the source after they were pulled
	dropped *chunk.Set // those of them that have left the memory already
	rtt     time.Duration
	h       strategies.Handover
	fault   *os.File // the workload's userfaultfd, until it is served
	base    uintptr
	served  bool
	err     error // of the rounds, which nobody waits for

	round    atomic.Uint64 // the last one that was answered
	throttle atomic.Int64  // what the application is held down to, B/s; 0 is no limit
	dirtied  atomic.Int64  // chunks that became stale, each time
	bulkFrom time.Time
	bulkRate float64 // B/s, once the share that was asked for is here (Finalize)
	closing  sync.Once
	closeErr error
}

// control is the connection on which the leecher calls.
type control struct {
	open func(ctx context.Context) (region.Store, error)
	lock chan struct{} // one call at a time
	cur  region.Store
	n    int64
}

func (c *control) close() error {
	c.lock <- struct{}{}
	defer func() { <-c.lock }()
	if c.cur == nil {
		return nil
	}
	err := c.cur.Close()
	c.cur = nil
	return err
}

// call asks until there is an answer, on new connections where the old one is lost, for
// as long as patience without one, or ctx, allows.
func (c *control) call(ctx context.Context, r request, patience time.Duration) (out reply, err error) {
	select {
	case c.lock <- struct{}{}:
		defer func() { <-c.lock }()
	case <-ctx.Done():
		return out, ctx.Err()
	}
	until := time.Now().Add(patience)
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		tctx, cancel := context.WithDeadline(ctx, until)
		out, err = c.once(tctx, r)
		cancel()
		switch {
		case err == nil && out.err() != nil:
			return out, fmt.Errorf("%v at the source: %w", r.Verb, out.err())
		case err == nil:
			return out, nil
		case ctx.Err() != nil:
			return out, fmt.Errorf("%v at the source: %w", r.Verb, context.Cause(ctx))
		case errors.Is(err, region.ErrMissing), errors.Is(err, region.ErrMismatch), errors.Is(err, region.ErrNotSupported), errors.Is(err, region.ErrOutOfRange):
			return out, fmt.Errorf("%v at the source: %w", r.Verb, err) // of no use to try again
		case time.Now().After(until):
			return out, fmt.Errorf("%v: the source was out of reach for %v: %w", r.Verb, patience, errors.Join(err, region.ErrPeerGone))
		}
		if c.cur != nil {
			_ = c.cur.Close()
			c.cur = nil
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

func (c *control) once(ctx context.Context, r request) (reply, error) {
	if c.cur == nil {
		s, err := c.open(ctx)
		if err != nil {
			return reply{}, err
		}
		c.cur, c.n = s, 0
	}
	if c.n == 0 {
		if s := c.cur; s.Size() != slot*callNumbers {
			return reply{}, fmt.Errorf("control of %d bytes, want %d: no source of a migration: %w", s.Size(), int64(slot*callNumbers), region.ErrNotSupported)
		}
	}
	if c.n++; c.n >= callNumbers {
		return reply{}, fmt.Errorf("control: calls are used up: %w", region.ErrPeerGone)
	}
	return ask(ctx, c.cur, c.n, r)
}

// openLeecher connects and begins to track and, where the mode says so, to pull.
func openLeecher(ctx context.Context, openRegion, openControl func(ctx context.Context) (region.Store, error), o leecherOptions) (_ *leecher, err error) {
	l := &leecher{o: o, open: make(chan struct{}), ctrl: &control{open: openControl, lock: make(chan struct{}, 1)}}
	l.cycle.step = o.interval
	l.ctx, l.cancel = context.WithCancel(context.WithoutCancel(ctx))
	l.background = func() {}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close(ctx))
		}
	}()
	l.m = handover.Destination{ID: handover.ID(rand.Uint64() | 1), Strict: o.mode.strict()}
	if o.journal != "" {
		if err := l.again(); err != nil {
			return nil, err
		}
	}
	l.session = rand.Uint64() | 1
	var g errgroup.Group
	g.Go(func() (err error) {
		if l.remote, err = chunk.OpenAgain(ctx, openRegion, nil); err != nil {
			err = fmt.Errorf("open the region at the source: %w", err)
		}
		return err
	})
	g.Go(func() (err error) {
		if l.ctrl.cur, err = openControl(ctx); err != nil {
			err = fmt.Errorf("open the control of the region at the source: %w", err)
		}
		return err
	})
	if err := g.Wait(); err != nil {
		return nil, err
	}
	l.size = l.remote.Size()
	if err := l.openCache(); err != nil {
		return nil, err
	}
	if l.syncer, err = chunk.NewSyncer(l.remote, l.cache, o.chunk, max(o.extent, o.chunk)); err != nil {
		return nil, err
	}
	n := region.Chunks(l.size, o.chunk)
	l.stale, l.dropped = chunk.NewSet(n), chunk.NewSet(n)
	if l.memory != nil {
		l.memory.Own(owner{l})
		l.dev = device.OfMemory(l.memory)
	} else {
		d := o.dev
		d.Chunk = o.chunk
		if l.dev, err = device.Open(ctx, o.device, gated{l}, d); err != nil {
			return nil, err
		}
	}
	l.wg.Go(l.sample)
	if l.m.Stage == handover.Joining {
		if err := l.join(ctx); err != nil {
			return nil, err
		}
	}
	if l.state().Stage == handover.Committing { // a destination that was killed: the region may be ours
		return l, nil
	}
	bg, cancel := context.WithCancel(l.ctx)
	l.background = cancel
	if o.mode.bulk() {
		l.bulkFrom = time.Now()
		l.pull(order.Linear())
		l.wg.Go(func() { l.rounds(bg) })
	}
	return l, nil
}

func (l *leecher) openCache() (err error) {
	if l.o.device == "uffd" {
		l.memory, err = uffd.NewMemory(l.size, l.o.params)
		if err == nil {
			l.cache = l.memory
		}
		return err
	}
	m, err := chunk.NewMemory(l.size)
	if err == nil {
		l.cache = m
	}
	return err
}

// again takes up what the journal says.
func (l *leecher) again() error {
	var j destinationJournal
	ok, err := readJournal(l.o.journal, &j)
	if err != nil {
		return err
	}
	if !ok { // so that the source knows us again
		return writeJournal(l.o.journal, destinationJournal{ID: l.m.ID})
	}
	l.m.ID = j.ID
	m, started := l.m.Again(j.Kept)
	if started {
		return fmt.Errorf("the application was started here before, with what is in %s: nothing is left to take over: %w", l.o.journal, region.ErrClosed)
	}
	l.m = m
	return nil
}

// set makes a state durable and takes it.
func (l *leecher) set(m handover.Destination) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.o.journal != "" && m.Kept() != l.m.Kept() {
		if err := writeJournal(l.o.journal, destinationJournal{m.ID, m.Kept()}); err != nil {
			return err
		}
	}
	l.m = m
	return nil
}

func (l *leecher) state() handover.Destination {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.m
}

// advance sends what the machine wants and takes the answer.
func (l *leecher) advance(ctx context.Context) (reply, error) {
	m := l.state()
	want, ok := m.Want()
	if !ok {
		return reply{}, nil
	}
	r := request{Request: want, Session: l.session, Round: l.round.Load(), Size: l.size}
	begun := time.Now()
	out, err := l.ctrl.call(ctx, r, l.o.patience)
	if err != nil {
		return out, err
	}
	if want.Verb != handover.Finalize {
		l.observe(time.Since(begun))
	}
	return out, l.set(m.Handle(out.Reply))
}

// observe follows the shortest round trip.
func (l *leecher) observe(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.rtt == 0 || d < l.rtt {
		l.rtt = d
	}
}

// join asks to track.
func (l *leecher) join(ctx context.Context) error {
	out, err := l.advance(ctx)
	if err != nil {
		return err
	}
	m := l.state()
	switch m.Stage {
	case handover.Pulling, handover.Committing:
		if m.Stage == handover.Pulling && out.Session != l.session {
			return fmt.Errorf("the source tracks %x, not %x: %w", out.Session, l.session, region.ErrMismatch)
		}
		return nil
	}
	return fmt.Errorf("track the region: %v: %w", out.Result, region.ErrNotPermitted)
}

// pull starts a puller.
func (l *leecher) pull(o order.Order) {
	p := chunk.StartPuller(l.syncer, chunk.PullOptions{Workers: max(l.o.workers, 1), Order: o})
	l.mu.Lock()
	l.puller = p
	l.mu.Unlock()
}

// rounds asks for dirty pages again and again.
func (l *leecher) rounds(ctx context.Context) {
	t := time.NewTicker(l.o.interval)
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
		if _, err := l.look(ctx, 0); err != nil {
			l.mu.Lock()
			if ctx.Err() == nil {
				l.err = err
			}
			l.mu.Unlock()
			return
		}
	}
}

// look makes one round. With a wait the source answers at a quiet point of its
// application, or when the wait is over; look says whether it is at one.
func (l *leecher) look(ctx context.Context, wait time.Duration) (quiet bool, err error) {
	l.looking.Lock()
	defer l.looking.Unlock()
	m := l.state()
	next := l.round.Load() + 1
	r := request{Request: handover.Request{Verb: verbRound, From: m.ID, Epoch: m.Epoch}, Session: l.session, Round: next, Size: l.size,
		Wait: int64(wait), Throttle: l.throttle.Load()}
	begun := time.Now()
	out, err := l.ctrl.call(ctx, r, l.o.patience)
	if err != nil {
		return false, err
	}
	if len(out.Dirty) < firstRead/2 && wait == 0 {
		l.observe(time.Since(begun))
	}
	if out.Round != next {
		return false, fmt.Errorf("asked for round %d, got %d: %w", next, out.Round, region.ErrMismatch)
	}
	n, err := l.written(out.Dirty)
	if err != nil {
		return false, err
	}
	now := time.Now()
	if !l.looked.IsZero() { // the first says what was written since tracking began
		l.cycle.add(now, now.Sub(l.looked), n)
	}
	l.looked = now
	l.round.Store(next)
	l.mu.Lock()
	l.h.Rounds++
	l.mu.Unlock()
	return out.Quiet, nil
}

// written notes which chunks are out of date by a set of pages, and returns how many bytes
// the set has. A chunk that nobody has asked for yet is not out of date: it
// will be read later.
func (l *leecher) written(b []byte) (int64, error) {
	page := region.PageSize()
	set := chunk.NewSet(region.Chunks(l.size, page))
	if err := decodeSet(b, set); err != nil {
		return 0, err
	}
	var drop [][2]int64
	for at := int64(0); ; {
		lo, hi, ok := set.Next(at, set.Len())
		if !ok {
			break
		}
		at = hi
		for c, end := lo*page/l.o.chunk, (hi*page-1)/l.o.chunk; c <= end && c < l.stale.Len(); c++ {
			state := l.syncer.State(c)
			if state == chunk.Remote {
				continue
			}
			l.dirtied.Add(l.stale.Mark(c, c+1))
			// Hybrid leaves it alone until the end: then it may go now, which takes time.
			if state == chunk.Local && l.memory != nil && l.o.mode == Hybrid && l.dropped.Mark(c, c+1) == 1 {
				if n := len(drop); n > 0 && drop[n-1][1] == c {
					drop[n-1][1] = c + 1
				} else {
					drop = append(drop, [2]int64{c, c + 1})
				}
			}
		}
	}
	for _, d := range drop {
		if err := l.drop(d[0], d[1]); err != nil {
			return 0, err
		}
	}
	return set.Count() * page, nil
}

// drop takes chunks out of the memory.
func (l *leecher) drop(lo, hi int64) error {
	off := lo * l.o.chunk
	return l.memory.Drop(off, min(hi*l.o.chunk, l.size)-off, func() bool { return true })
}

// forget makes what is stale remote, to be pulled again. Nothing may be under way.
func (l *leecher) forget() (ranges []order.Range, err error) {
	for at := int64(0); ; {
		lo, hi, ok := l.stale.Next(at, l.stale.Len())
		if !ok {
			return ranges, err
		}
		at = hi
		l.syncer.Forget(lo, hi, func(lo, hi int64) {
			ranges = append(ranges, order.Range{Off: lo * l.o.chunk, End: min(hi*l.o.chunk, l.size)})
			for i := lo; i < hi && l.memory != nil; {
				j := i
				for j < hi && !l.dropped.Has(j) {
					j++
				}
				if i < j {
					err = errors.Join(err, l.drop(i, j))
				}
				i = j + 1
			}
		})
		l.dropped.Clear(lo, hi)
		l.stale.Clear(lo, hi)
	}
}

// drain lets what is under way come, and asks for nothing more.
func (l *leecher) drain(ctx context.Context) error {
	l.mu.Lock()
	p := l.puller
	l.puller = nil
	l.mu.Unlock()
	if p == nil {
		return nil
	}
	defer p.Close()
	return p.Drain(ctx)
}

// current is how many bytes are here and not known to be out of date.
func (l *leecher) current() int64 {
	return max(l.syncer.LocalBytes()-l.stale.Count()*l.o.chunk, 0)
}

// maxSamples bounds the record of availability; when it is full every second one goes.
const maxSamples = 1024

// sample records local availability over time.
func (l *leecher) sample() {
	every := 5 * time.Millisecond
	for {
		at := strategies.LocalAt{At: monotonic(), Bytes: l.current()}
		l.mu.Lock()
		l.h.Local = append(l.h.Local, at)
		if len(l.h.Local) >= maxSamples {
			for i := range maxSamples / 2 {
				l.h.Local[i] = l.h.Local[2*i]
			}
			l.h.Local = l.h.Local[:maxSamples/2]
			every *= 2
		}
		done := l.m.Stage >= handover.Finishing
		l.mu.Unlock()
		if done {
			return
		}
		select {
		case <-time.After(every):
		case <-l.ctx.Done():
			return
		}
	}
}

// Finalize implements strategies.Migrator.
func (l *leecher) Finalize(ctx context.Context, hooks strategies.Hooks) (_ strategies.Handover, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(l.ctx, cancel)()
	prepared := make(chan error, 1)
	go func() { prepared <- call0(ctx, hooks.Prepare) }()
	defer func() {
		if err != nil {
			err = errors.Join(err, l.giveUp(hooks))
		}
	}()
	if l.state().Stage == handover.Pulling {
		if err := l.wait(ctx); err != nil {
			return l.handover(), err
		}
	}
	if err := <-prepared; err != nil {
		return l.handover(), fmt.Errorf("prepare the application: %w", err)
	}
	for try := 0; ; try++ {
		err := l.takeOver(ctx)
		if err == nil {
			break
		}
		// The source went on without us, which it may: once more.
		if !errors.Is(err, errStale) || try == 3 {
			return l.handover(), err
		}
	}
	if err := call0(ctx, hooks.Resume); err != nil {
		return l.handover(), fmt.Errorf("start the application: %w", err)
	}
	l.mu.Lock()
	l.h.Resumed = monotonic()
	l.mu.Unlock()
	return l.handover(), nil
}

var errStale = errors.New("the source went on")

func (l *leecher) handover() strategies.Handover {
	l.mu.Lock()
	defer l.mu.Unlock()
	h := l.h
	h.Local = append([]strategies.LocalAt(nil), l.h.Local...)
	h.DirtiedBytes = l.dirtied.Load() * l.o.chunk
	return h
}

// giveUp tells the source that it may go on, where that is still ours to say.
func (l *leecher) giveUp(hooks strategies.Hooks) error {
	if l.state().Owns() {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(l.ctx), 2*time.Second)
	defer cancel()
	err := l.abort(ctx)
	return errors.Join(err, call0(ctx, hooks.Abort))
}

func (l *leecher) abort(ctx context.Context) error {
	l.background()
	m := l.state()
	if err := l.set(m.GiveUp()); err != nil {
		return err
	}
	if m = l.state(); m.Stage != handover.Aborting {
		if m.Stage == handover.Committing {
			return fmt.Errorf("whether the region was handed over in epoch %d could not be found out: the source knows: %w", m.Epoch, region.ErrPeerGone)
		}
		return nil
	}
	_, err := l.advance(ctx)
	return err
}

// takeOver goes from Pulling to Owning.
func (l *leecher) takeOver(ctx context.Context) error {
	if l.state().Stage == handover.Joining {
		if err := l.join(ctx); err != nil {
			return err
		}
	}
	if l.state().Stage == handover.Pulling {
		if err := l.stop(ctx); err != nil {
			return err
		}
	}
	if l.state().Stage == handover.Filling {
		if err := l.fill(ctx); err != nil {
			return err
		}
		if err := l.all(ctx); err != nil {
			return err
		}
		if err := l.set(l.state().Complete()); err != nil {
			return err
		}
		return l.commit(ctx)
	}
	// Commit leaves first: its answer would stand behind what is pulled. What is
	// to be done here is done while it travels.
	committed := make(chan error, 1)
	go func() { committed <- l.commit(ctx) }()
	err := l.fill(ctx)
	return errors.Join(<-committed, err)
}

// fill makes what is out of date remote, begins to pull all that is, and to answer faults.
func (l *leecher) fill(ctx context.Context) error {
	ranges, err := l.forget()
	if err != nil {
		return err
	}
	l.mu.Lock()
	l.h.NeededBytes = l.size - l.syncer.LocalBytes()
	l.mu.Unlock()
	if l.o.mode.strict() {
		if err := l.urgent(ctx, ranges); err != nil {
			return err
		}
	}
	l.pull(order.List(ranges)) // what was written, then the rest
	return l.serve()
}

// urgent pulls ranges while the application stands still. They are many and short:
// the transport's window for background requests would let a few of them travel at a time.
func (l *leecher) urgent(ctx context.Context, ranges []order.Range) error {
	const requests = 1024 // 4 MiB of single pages
	g, ctx := errgroup.WithContext(region.WithClass(ctx, region.Demand))
	g.SetLimit(requests)
	for _, r := range ranges {
		g.Go(func() error { return l.insist(ctx, r) })
	}
	return g.Wait()
}

// insist pulls a range, on a new connection where the first is lost, for as long as patience allows.
func (l *leecher) insist(ctx context.Context, r order.Range) error {
	until := time.Now().Add(l.o.patience)
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		err := l.syncer.Pull(ctx, r.Off, r.End-r.Off)
		if err == nil || ctx.Err() != nil || time.Now().After(until) {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

// commit asks to take over.
func (l *leecher) commit(ctx context.Context) error {
	out, err := l.advance(ctx)
	switch {
	case err != nil:
		return err
	case !l.state().Owns():
		return fmt.Errorf("commit epoch %d: %v, it is in epoch %d: %w", out.Request.Epoch, out.Result, out.Epoch, errStale)
	}
	l.openOnce.Do(func() { close(l.open) })
	l.mu.Lock()
	l.h.Owned, l.h.Epoch = monotonic(), out.Epoch
	l.mu.Unlock()
	return nil
}

// stop has the application stopped, and learns what it wrote last.
func (l *leecher) stop(ctx context.Context) error {
	// Requests under way would stand before Finalize in the path's queue, and
	// their chunks could not be told stale or not.
	if err := l.drain(ctx); err != nil {
		return err
	}
	l.background()
	l.mu.Lock()
	if l.o.mode.bulk() && l.h.BulkTime == 0 {
		s := l.syncer.Stats()
		l.h.BulkBytes, l.h.BulkTime = s.PrefetchBytes+s.DemandBytes, int64(time.Since(l.bulkFrom))
	}
	l.mu.Unlock()
	if l.o.mode.bulk() {
		// So that Finalize has little to say.
		if _, err := l.look(ctx, 0); err != nil {
			return err
		}
	}
	if err := l.set(l.state().Decide()); err != nil {
		return err
	}
	asked := monotonic()
	out, err := l.advance(ctx)
	if err != nil {
		return err
	}
	switch l.state().Stage {
	case handover.Filling, handover.Committing:
	default:
		why := fmt.Errorf("finalize epoch %d: %v %s, it is in epoch %d: %w", out.Request.Epoch, out.Result, out.Text, out.Epoch, errStale)
		if out.Result == handover.Refused {
			why = fmt.Errorf("finalize epoch %d: %v (%s): %w", out.Request.Epoch, out.Result, out.Text, region.ErrNotPermitted)
		}
		return why
	}
	n, err := l.written(out.Dirty)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.h.Asked, l.h.Stopped, l.h.Flushed, l.h.Scanned, l.h.FinalBytes = asked, out.Stopped, out.Flushed, out.Scanned, n
	return err
}

// all returns once every byte is local.
func (l *leecher) all(ctx context.Context) error {
	l.mu.Lock()
	p := l.puller
	l.mu.Unlock()
	for l.syncer.LocalBytes() < l.size {
		select {
		case <-p.Done():
			// The last may have been pulled by somebody who waits for it, or not yet.
			if err := l.syncer.Pull(ctx, 0, l.size); err != nil {
				return err
			}
		case <-ctx.Done():
			return fmt.Errorf("%d of %d bytes are here: %w", l.syncer.LocalBytes(), l.size, context.Cause(ctx))
		case <-l.ctx.Done():
			return region.ErrClosed
		}
	}
	return nil
}

// serve begins to answer faults, where the workload's memory is here and can be right.
func (l *leecher) serve() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.served = true
	if l.fault == nil {
		return nil
	}
	f := l.fault
	l.fault = nil
	return l.memory.ServeFaults(f, l.base)
}

// ServeFaults implements strategies.FaultServer. Until the region is about to be handed over
// every access of the workload waits, since no page is mapped and nobody answers.
func (l *leecher) ServeFaults(f *os.File, base uintptr) error {
	if l.memory == nil {
		return errors.Join(fmt.Errorf("this device serves no faults: %w", region.ErrNotSupported), f.Close())
	}
	l.mu.Lock()
	if l.fault != nil {
		l.mu.Unlock()
		return errors.Join(errors.New("a workload has attached already"), f.Close())
	}
	l.fault, l.base = f, base
	served := l.served
	l.mu.Unlock()
	if served {
		return l.serve()
	}
	return nil
}

// Complete implements strategies.Migrator.
func (l *leecher) Complete(ctx context.Context) (strategies.Handover, error) {
	if m := l.state(); !m.Owns() {
		return l.handover(), fmt.Errorf("complete a migration that is %v: %w", m.Stage, region.ErrNotPermitted)
	}
	if err := l.all(ctx); err != nil {
		return l.handover(), err
	}
	if err := l.set(l.state().Complete()); err != nil {
		return l.handover(), err
	}
	if l.state().Stage == handover.Finishing {
		// A source that is gone has had the message, and cannot be told again.
		if _, err := l.advance(ctx); err != nil && !errors.Is(err, region.ErrPeerGone) {
			return l.handover(), err
		}
	}
	return l.handover(), nil
}

// Attachment implements strategies.Mount.
func (l *leecher) Attachment() strategies.Attachment {
	if l.memory == nil {
		return strategies.Attachment{Kind: strategies.AttachPath, Path: l.dev.Path(), Size: l.size}
	}
	return strategies.Attachment{Kind: strategies.AttachFault, File: l.memory.File(), Size: l.size,
		Fault: &strategies.Fault{Memory: "shared", PageSize: region.PageSize(), Missing: true, Minor: true}}
}

// Sync implements strategies.Mount: what is stored stays here, where it belongs.
func (l *leecher) Sync(context.Context) error {
	if l.ctx.Err() != nil {
		return region.ErrClosed
	}
	return nil
}

// Err is the latest error behind an EIO or SIGBUS.
func (l *leecher) Err() error {
	l.mu.Lock()
	err := l.err
	l.mu.Unlock()
	return errors.Join(l.dev.Err(), err)
}

// Stats implements strategies.Mount.
func (l *leecher) Stats() strategies.Stats {
	s, d := l.syncer.Stats(), l.dev.Stats()
	h := l.handover()
	out := strategies.Stats{
		DemandRequests: s.DemandRequests, DemandBytes: s.DemandBytes, PrefetchRequests: s.PrefetchRequests, PrefetchBytes: s.PrefetchBytes,
		LocalRequests: s.LocalRequests, LocalBytes: s.LocalBytes,
		Extra: map[string]int64{"local_bytes": l.syncer.LocalBytes(), "resent_bytes": max(s.DemandBytes+s.PrefetchBytes-l.size, 0), "rounds": h.Rounds,
			"dropped_pull_bytes": s.DroppedBytes, "repeated_requests": s.Repeated,
			"device_reads": d.ReadRequests, "device_writes": d.WriteRequests, "device_flushes": d.Flushes, "device_errors": d.Errors},
	}
	if l.memory != nil {
		out.Faults = l.memory.Stats().Faults
	}
	return out
}

// Close implements strategies.Mount. Where the region was not taken over the
// source is told to go on; what was not pulled of one that was is lost here.
func (l *leecher) Close(ctx context.Context) error {
	l.closing.Do(func() { l.closeErr = l.close(ctx) })
	return l.closeErr
}

func (l *leecher) close(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	l.background()
	if m := l.state(); l.remote != nil && (m.Stage == handover.Pulling || m.Stage == handover.Finalizing || m.Stage == handover.Filling) {
		_ = l.abort(ctx) // else the source waits for its deadline
	}
	l.cancel()
	l.mu.Lock()
	p := l.puller
	l.mu.Unlock()
	if p != nil {
		p.Close()
	}
	l.wg.Wait()
	if l.dev != nil {
		err = errors.Join(err, l.dev.Close(ctx))
	}
	l.mu.Lock()
	if l.fault != nil {
		err = errors.Join(err, l.fault.Close())
		l.fault = nil
	}
	l.mu.Unlock()
	if l.syncer != nil {
		err = errors.Join(err, l.syncer.Close())
	}
	err = errors.Join(err, l.ctrl.close())
	if l.remote != nil {
		err = errors.Join(err, l.remote.Close())
	}
	if l.cache != nil {
		err = errors.Join(err, l.cache.Close())
	}
	return err
}

// owner lets the memory of device uffd ask for chunks. Faults are answered from serve on only.
type owner struct{ l *leecher }

var _ uffd.Owner = owner{}

func (o owner) Has(off, n int64) bool { return o.l.syncer.Has(off, n) }

// Pull pulls the block around a fault.
func (o owner) Pull(ctx context.Context, off, n int64) error {
	a := max(o.l.o.around, o.l.o.chunk)
	lo := off &^ (a - 1)
	hi := min(max(region.RoundUp(off+n, a), off+n), o.l.size)
	return o.l.syncer.Pull(ctx, lo, hi-lo)
}

func (o owner) Stored(int64, int64) bool       { return true }
func (o owner) Full() bool                     { return false }
func (o owner) Throttle(context.Context) error { return nil }

// gated is the region as a device sees it: every access waits until it was handed over.
type gated struct{ l *leecher }

var _ region.Store = gated{}

func (g gated) wait(ctx context.Context) error {
	select {
	case <-g.l.open:
		return nil
	default:
	}
	select {
	case <-g.l.open:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the region was not handed over yet: %w", ctx.Err())
	case <-g.l.ctx.Done():
		return region.ErrClosed
	}
}

func (g gated) Size() int64 { return g.l.size }

func (g gated) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := g.wait(ctx); err != nil {
		return err
	}
	return g.l.syncer.ReadAt(ctx, p, off)
}

func (g gated) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := g.wait(ctx); err != nil {
		return err
	}
	return g.l.syncer.WriteAt(ctx, p, off)
}

func (g gated) Flush(ctx context.Context) error { return nil }
func (g gated) Close() error                    { return nil }
