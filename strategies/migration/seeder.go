package migration

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies"
	"memsync/strategies/chunk"
	"memsync/strategies/migration/handover"
	"memsync/strategies/region"
	"memsync/strategies/transport"
)

// tracker finds out which bytes of a region its application writes.
type tracker interface {
	// Collect calls found for what may have been written since the last call, or
	// since Begin, as dirty.Detector does.
	Collect(ctx context.Context, found func(off, n int64)) error
}

// SeederOptions say how a Seeder behaves. The zero value means the defaults.
type SeederOptions struct {
	// SuspendTimeout is how long the application may take to stop and to flush. 0 means 10 s.
	SuspendTimeout time.Duration
	// CommitTimeout is how long the application stands still for a destination that
	// does not take over. 0 means 30 s.
	CommitTimeout time.Duration
	// Silence is after how long a destination that does not call is forgotten. 0 means 30 s.
	Silence time.Duration
	// Journal, unless empty, is a file that remembers across a crash who owns the region.
	Journal string
}

// Seeder is the source's side: a region that an application goes on writing
// while a destination pulls it, until the destination takes it over.
// All methods may be called concurrently.
type Seeder struct {
	store region.Store // for reading; its content may change at any time
	pages int64
	track tracker // nil: nobody writes
	o     SeederOptions

	ctx    context.Context // ends at Close
	cancel context.CancelFunc
	wg     sync.WaitGroup // of suspend and of timers
	gone   chan struct{}  // closed once the source is no longer needed

	mu      sync.Mutex
	changed chan struct{} // closed and made anew with each step of the machine
	m       handover.Source
	kept    handover.Kept // as the journal has it
	hooks   strategies.Hooks
	heard   time.Time
	closed  bool

	collect sync.Mutex // one look at a time
	session uint64
	round   uint64
	saved   []byte     // the set of round
	carry   *chunk.Set // pages that go into the next set whatever the tracker says

	throttling sync.Mutex // one change of the application's rate at a time
	limit      int64      // what its rate is to be held down to, B/s; 0 is no limit
	limited    int64      // what it is held down to (throttling)

	final                           []byte // the set of the epoch's Finalize
	asked, stopped, flushed, scaned int64
	trouble                         error // why Suspend failed
}

// NewSeeder returns a Seeder of store, which it does not close. t is nil where nobody writes.
func NewSeeder(store region.Store, t tracker, o SeederOptions) (*Seeder, error) {
	pages := region.Chunks(store.Size(), region.PageSize())
	if pages/8+replySize > slot {
		return nil, fmt.Errorf("region of %d bytes: its set of pages does not fit an answer: %w", store.Size(), region.ErrOutOfRange)
	}
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&o.SuspendTimeout, 10*time.Second)
	def(&o.CommitTimeout, 30*time.Second)
	def(&o.Silence, 30*time.Second)
	s := &Seeder{store: store, pages: pages, track: t, o: o, gone: make(chan struct{}), changed: make(chan struct{}), carry: chunk.NewSet(pages), m: handover.NewSource()}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	if o.Journal != "" {
		k, ok, err := readSource(o.Journal)
		if err != nil {
			return nil, err
		}
		if ok {
			s.m, _ = handover.Restart(k) // Control resumes the application
		}
		if err := writeSource(o.Journal, s.m.Kept()); err != nil {
			return nil, err
		}
	}
	s.kept = s.m.Kept()
	if s.m.Phase == handover.Gone {
		close(s.gone)
	}
	s.wg.Go(s.watch)
	return s, nil
}

// Control says how the application is stopped and let go on. It lets the
// application go on if it may, since one that outlived an earlier Seeder may have been stopped.
func (s *Seeder) Control(h strategies.Hooks) {
	s.mu.Lock()
	s.hooks = h
	owns := s.m.Phase.Owns() && s.m.Phase != handover.Suspending && s.m.Phase != handover.Suspended
	s.mu.Unlock()
	if owns && s.o.Journal != "" {
		s.resume()
	}
}

// Done is closed once the destination has every byte: the source may exit.
func (s *Seeder) Done() <-chan struct{} { return s.gone }

// Owns reports whether the application may run here.
func (s *Seeder) Owns() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.m.Phase.Owns()
}

// Exports is what a transport serves: the region, read-only, and its control.
// name is the region's.
func (s *Seeder) Exports(name string) transport.Exports { return exports{s, name} }

type exports struct {
	s    *Seeder
	name string
}

// Open implements transport.Exports.
func (e exports) Open(name string) (region.Store, error) {
	switch name {
	case "", e.name:
		return readOnly{e.s.store}, nil
	case e.name + controlSuffix:
		return newMailbox(e.s.handle), nil
	}
	return nil, fmt.Errorf("region %q of a migration's source: %w", name, region.ErrMissing)
}

// List implements transport.Exports.
func (e exports) List() []string { return []string{e.name} }

// readOnly is a store that refuses to be written, with views and extents where it has them.
type readOnly struct{ region.Store }

func (readOnly) ReadOnly() bool { return true }
func (r readOnly) WriteAt(_ context.Context, p []byte, off int64) error {
	return fmt.Errorf("write %d bytes at %d of a region that migrates: %w", len(p), off, region.ErrReadOnly)
}

func (r readOnly) View(off, n int64) ([]byte, bool) {
	if v, ok := r.Store.(region.Viewer); ok {
		return v.View(off, n)
	}
	return nil, false
}

func (r readOnly) Extents(ctx context.Context, off, n int64) ([]region.Extent, error) {
	if x, ok := r.Store.(region.Extenter); ok {
		return x.Extents(ctx, off, n)
	}
	return []region.Extent{{Length: n}}, nil
}

func monotonic() int64 {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &t)
	return t.Nano()
}

// step makes the journal durable, wakes who waits for an answer, and acts. s.mu is held.
func (s *Seeder) step(m handover.Source, a handover.Action) error {
	if k := m.Kept(); k != s.kept && s.o.Journal != "" {
		if err := writeSource(s.o.Journal, k); err != nil {
			return err // nothing was decided: the old state holds
		}
		s.kept = k
	}
	s.m = m
	close(s.changed)
	s.changed = make(chan struct{})
	epoch := m.Epoch
	switch a {
	case handover.Watch, handover.Unwatch:
		s.session = 0
		s.release()
	case handover.Suspend:
		s.asked, s.stopped, s.flushed, s.scaned, s.final = monotonic(), 0, 0, 0, nil
		s.wg.Go(func() { s.suspend(epoch) })
	case handover.Resume:
		// What Finalize reported may not have arrived.
		if s.final != nil {
			if err := decodeSet(s.final, s.carry); err != nil {
				panic(err) // we made it
			}
			s.final = nil
		}
		s.release()
		s.wg.Go(s.resume)
	case handover.Exit:
		close(s.gone)
	}
	return nil
}

func call0(ctx context.Context, f func(context.Context) error) error {
	if f == nil {
		return nil
	}
	return f(ctx)
}

func (s *Seeder) getHooks() strategies.Hooks {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hooks
}

// resume lets the application go on.
func (s *Seeder) resume() {
	ctx, cancel := context.WithTimeout(s.ctx, s.o.SuspendTimeout)
	defer cancel()
	if err := call0(ctx, s.getHooks().Resume); err != nil {
		s.mu.Lock()
		s.trouble = fmt.Errorf("resume the application: %w", err)
		s.mu.Unlock()
	}
}

// suspend stops the application, flushes, and looks for the last dirty pages.
func (s *Seeder) suspend(epoch uint64) {
	ctx, cancel := context.WithTimeout(s.ctx, s.o.SuspendTimeout)
	defer cancel()
	h := s.getHooks()
	err := call0(ctx, h.Suspend)
	stopped := monotonic()
	if err == nil {
		err = call0(ctx, h.Flush)
	}
	flushed := monotonic()
	var set []byte
	if err == nil {
		set, err = s.look(ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.trouble = fmt.Errorf("suspend the application: %w", err)
		if m, a := s.m.Refuse(epoch); m != s.m {
			_ = s.step(m, a) // only a Commit needs the journal
		}
		return
	}
	if m := s.m.Stopped(epoch); m != s.m {
		s.stopped, s.flushed, s.scaned, s.final = stopped, flushed, monotonic(), set
		_ = s.step(m, handover.Nothing)
		s.wg.Go(func() { s.expire(epoch) })
		return
	}
	// It went on meanwhile, and what was collected must not be forgotten.
	_ = decodeSet(set, s.carry)
}

// quietStep is how long the application is asked at a time for a quiet point.
const quietStep = 20 * time.Millisecond

// quiet waits for a quiet point of the application, and says whether there is one.
func (s *Seeder) quiet(ctx context.Context, wait time.Duration) (bool, error) {
	f := s.getHooks().Quiet
	if f == nil {
		if s.track == nil {
			return true, nil // nobody writes
		}
		return false, fmt.Errorf("the application announces no quiet points: %w", region.ErrNotSupported)
	}
	// A destination must not be taken for silent meanwhile.
	for until := time.Now().Add(min(wait, s.o.Silence/2)); ; {
		ok, err := f(ctx, min(quietStep, time.Until(until)))
		if ok || err != nil || time.Until(until) <= 0 {
			return ok, err
		}
	}
}

// release lets the application write as it likes. s.mu is held.
func (s *Seeder) release() {
	if s.limit == 0 {
		return
	}
	s.limit = 0
	s.wg.Go(func() {
		ctx, cancel := context.WithTimeout(s.ctx, s.o.SuspendTimeout)
		defer cancel()
		if err := s.throttle(ctx); err != nil {
			s.mu.Lock()
			s.trouble = err
			s.mu.Unlock()
		}
	})
}

// throttle has the application write no faster than s.limit says.
func (s *Seeder) throttle(ctx context.Context) error {
	s.throttling.Lock()
	defer s.throttling.Unlock()
	s.mu.Lock()
	limit := s.limit
	s.mu.Unlock()
	if limit == s.limited {
		return nil
	}
	f := s.getHooks().Throttle
	if f == nil {
		return fmt.Errorf("the application cannot be throttled: %w", region.ErrNotSupported)
	}
	if err := f(ctx, limit); err != nil {
		return fmt.Errorf("throttle the application to %d bytes a second: %w", limit, err)
	}
	s.limited = limit
	return nil
}

// expire ends an epoch whose Commit does not come.
func (s *Seeder) expire(epoch uint64) {
	t := time.NewTimer(s.o.CommitTimeout)
	defer t.Stop()
	select {
	case <-t.C:
	case <-s.ctx.Done():
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if m, a := s.m.Expire(epoch); m != s.m {
		_ = s.step(m, a)
	}
}

// watch forgets a destination that is silent.
func (s *Seeder) watch() {
	t := time.NewTicker(s.o.Silence/4 + time.Millisecond)
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-s.ctx.Done():
			return
		}
		s.mu.Lock()
		if s.m.Phase == handover.Tracking && time.Since(s.heard) > s.o.Silence {
			_ = s.step(s.m.Forget())
		}
		s.mu.Unlock()
	}
}

// look returns the set of pages written since the last look.
func (s *Seeder) look(ctx context.Context) ([]byte, error) {
	s.collect.Lock()
	defer s.collect.Unlock()
	s.mu.Lock()
	set := s.carry
	s.carry = chunk.NewSet(s.pages)
	s.mu.Unlock()
	if s.track == nil {
		return encodeSet(set), nil
	}
	page := region.PageSize()
	err := s.track.Collect(ctx, func(off, n int64) { set.Mark(off/page, (off+n+page-1)/page) })
	if err != nil {
		s.mu.Lock()
		_ = decodeSet(encodeSet(set), s.carry)
		s.mu.Unlock()
		return nil, fmt.Errorf("look for dirty pages: %w", err)
	}
	return encodeSet(set), nil
}

// handle answers one call.
func (s *Seeder) handle(ctx context.Context, r request) (out reply) {
	s.mu.Lock()
	defer s.mu.Unlock()
	answer := func(a handover.Reply, err error) reply {
		out := reply{Reply: a, Phase: s.m.Phase, Session: s.session, Round: s.round, Size: s.store.Size()}
		if err != nil {
			f := failed(err)
			out.Result, out.Text, out.Kind = 0, f.Text, f.Kind
		}
		return out
	}
	switch {
	case s.closed:
		return answer(handover.Reply{}, fmt.Errorf("migration source: %w", region.ErrClosed))
	case r.From == 0:
		return answer(handover.Reply{}, fmt.Errorf("a destination must have a name: %w", region.ErrOutOfRange))
	case r.Size != 0 && r.Size != s.store.Size():
		return answer(handover.Reply{}, fmt.Errorf("the destination has %d bytes for a region of %d: %w", r.Size, s.store.Size(), region.ErrMismatch))
	case r.Verb == verbRound:
		return s.answerRound(ctx, r, answer)
	case r.Verb < handover.Track || r.Verb > handover.Done:
		return answer(handover.Reply{}, fmt.Errorf("request %d is unknown: %w", r.Verb, region.ErrNotSupported))
	}
	if s.m.With == r.From {
		s.heard = time.Now()
	}
	m, a := s.m.Handle(r.Request)
	if m != s.m {
		if err := s.step(m, a); err != nil {
			return answer(handover.Reply{}, err)
		}
		s.heard = time.Now()
	}
	var rep handover.Reply
	for ready := false; ; {
		if rep, ready = s.m.Answer(r.Request); ready {
			break
		}
		changed := s.changed
		s.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
		case <-s.ctx.Done():
		}
		s.mu.Lock()
		if err := errors.Join(ctx.Err(), s.ctx.Err()); err != nil {
			return answer(handover.Reply{}, err)
		}
	}
	if r.Verb == handover.Track && rep.Result == handover.OK && (r.Session != s.session || r.Session == 0) {
		// A destination that has nothing yet, or lost it.
		if err := s.newSession(ctx, r.Session); err != nil {
			return answer(handover.Reply{}, err)
		}
	}
	out = answer(rep, nil)
	if r.Verb == handover.Finalize {
		switch rep.Result {
		case handover.OK:
			out.Asked, out.Stopped, out.Flushed, out.Scanned = s.asked, s.stopped, s.flushed, s.scaned
			if r.Session != s.session || r.Round > s.round || r.Round+1 < s.round {
				return answer(handover.Reply{}, fmt.Errorf("finalise after round %d of tracking %x, the source is at %d of %x: %w", r.Round, r.Session, s.round, s.session, region.ErrMismatch))
			}
			out.Dirty = s.final
			if r.Round < s.round { // the answer to the last round was lost
				both := chunk.NewSet(s.pages)
				if err := errors.Join(decodeSet(s.saved, both), decodeSet(s.final, both)); err != nil {
					return answer(handover.Reply{}, err)
				}
				out.Dirty = encodeSet(both)
			}
		case handover.Refused:
			out.Text = fmt.Sprint(s.trouble)
		}
	}
	return out
}

// newSession begins to track for a destination that has nothing. s.mu is held.
func (s *Seeder) newSession(ctx context.Context, session uint64) error {
	s.mu.Unlock()
	_, err := s.look(ctx) // what was written before is read later
	s.mu.Lock()
	if err != nil {
		return err
	}
	s.session, s.round, s.saved = session, 0, nil
	return nil
}

// answerRound answers a call for the pages written since the round before. s.mu is held.
func (s *Seeder) answerRound(ctx context.Context, r request, answer func(handover.Reply, error) reply) reply {
	bad := func(err error) reply { return answer(handover.Reply{Epoch: s.m.Epoch}, err) }
	if s.m.With != r.From || r.Session != s.session || s.session == 0 || !s.m.Phase.Owns() {
		return bad(fmt.Errorf("round %d of tracking %x: the source tracks %x for %x and is %v: %w", r.Round, r.Session, s.session, s.m.With, s.m.Phase, region.ErrMismatch))
	}
	s.heard = time.Now()
	quiet := false
	switch r.Round {
	case s.round:
	case s.round + 1:
		s.limit = r.Throttle
		s.mu.Unlock()
		err := s.throttle(ctx)
		if err == nil && r.Wait > 0 {
			quiet, err = s.quiet(ctx, time.Duration(r.Wait))
		}
		var set []byte
		if err == nil {
			set, err = s.look(ctx)
		}
		s.mu.Lock()
		s.heard = time.Now()
		if err != nil {
			return bad(err)
		}
		if r.Session != s.session || r.Round != s.round+1 { // another call was quicker
			_ = decodeSet(set, s.carry)
			return bad(fmt.Errorf("two rounds at once: %w", region.ErrMismatch))
		}
		s.round, s.saved = r.Round, set
	default:
		return bad(fmt.Errorf("round %d, the source is at %d: %w", r.Round, s.round, region.ErrOutOfRange))
	}
	out := answer(handover.Reply{Result: handover.OK, Epoch: s.m.Epoch}, nil)
	out.Dirty, out.Quiet = s.saved, quiet
	return out
}

// Err is the last trouble with the application's hooks.
func (s *Seeder) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.trouble
}

// Close ends all calls and waits for what is under way. It may be called twice.
// An application that stands still at that moment stays so: what is in the
// journal decides what becomes of it.
func (s *Seeder) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	s.wg.Wait()
	return nil
}
