// Package watch notices that a source changed behind a mount, so that bytes of
// before and after are not mixed in silence.
//
// A source of ours offers the version of each region (transport.VersionSuffix). A
// Watch asks for it when the mount is opened, every check_interval, and when it is
// told to (Check: before a Sync and at the end). What the version cannot show, it
// cannot notice: see transport.Leases and the backend's store. Other servers
// offer none; then there is no Watch.
package watch

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"memsync/strategies/chunk"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/transport"
)

// What to do when the source has changed.
const (
	Fail       = "fail"       // requests to the source give region.ErrMismatch from then on
	Invalidate = "invalidate" // what is cached is dropped and read anew
	Restart    = "restart"    // as Fail, but a source that was started anew is taken for the same
	Ignore     = "ignore"     // nothing is asked
)

// Params are the parameters of a Watch. invalidate says whether the strategy can.
func Params(invalidate bool) []param.Spec {
	const restart = "restart: fail, but believe that a source which was started anew, and not written to since, is the same"
	actions, doc := []string{Fail, Restart, Ignore}, "what to do when somebody else changed the source: fail reads and Sync from then on; "+restart+"; ignore: do not look"
	if invalidate {
		actions, doc = []string{Fail, Restart, Invalidate, Ignore}, "what to do when somebody else changed the source: fail reads and Sync from then on; "+restart+"; invalidate: drop what is cached and read it anew; ignore: do not look"
	}
	return []param.Spec{
		{Name: "on_change", Kind: param.KindEnum, Default: Fail, Values: actions, Doc: doc},
		{Name: "check_interval", Kind: param.KindDuration, Default: "1s", Min: int64(time.Millisecond), Max: int64(time.Hour), Doc: "pause between looks at the source's version, beside those at the opening, Sync and Close"},
	}
}

// checkTime bounds a look that nobody waits for.
const checkTime = 10 * time.Second

// lastTime bounds the look when a mount is closed.
const lastTime = 2 * time.Second

// firstPause is after a look that failed while there is no version yet.
const firstPause = 50 * time.Millisecond

// Watch follows the version of one source. A nil Watch notices nothing. All
// methods may be called concurrently.
type Watch struct {
	source     *chunk.Reopen
	interval   time.Duration
	restart    bool                            // a source that was started anew is the same
	invalidate func(ctx context.Context) error // nil: fail
	noted      func(region.Version) error      // nil, or told of each version that stood for the same content

	asking chan struct{} // a token
	known  chan struct{} // closed when base is
	kick   chan struct{}
	cancel context.CancelFunc
	done   sync.WaitGroup

	mu      sync.Mutex
	epoch   func() uint32
	base    region.Version
	at      time.Time // reads that began before may have met a change before the first version
	checks  int64
	changes int64

	settled atomic.Bool // base is known
	failed  atomic.Pointer[error]
}

// Open opens the versions of a source by open, which is that of the export beside
// the region with a suffix (strategies.Beside). It takes as long as opening the
// region and may go on beside that. A source without versions gives nil, nil.
func Open(ctx context.Context, open func(ctx context.Context, suffix string, writable bool) (region.Store, error), p param.Values) (*Watch, error) {
	if p.Text("on_change") == Ignore {
		return nil, nil
	}
	s, err := chunk.OpenAgain(ctx, func(ctx context.Context) (region.Store, error) { return open(ctx, transport.VersionSuffix, false) }, nil)
	if errors.Is(err, region.ErrMissing) || errors.Is(err, region.ErrNotSupported) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("open the version of the source: %w", err)
	}
	if s.Size() != transport.VersionSize { // a server that has one export under whatever name
		return nil, s.Close()
	}
	return &Watch{source: s, interval: p.Duration("check_interval"), restart: p.Text("on_change") == Restart, asking: make(chan struct{}, 1),
		known: make(chan struct{}), kick: make(chan struct{}, 1)}, nil
}

// Options say how to follow.
type Options struct {
	Epoch func() uint32 // of the lease with which the region was opened; 0, or nil, without one
	// Invalidate drops what is cached; nil means to fail instead. It must not go
	// on to use what was asked of the source before it was called.
	Invalidate func(ctx context.Context) error
	// Base, unless nil, is the version that what is cached already belongs to.
	Base *region.Version
	// Noted, unless nil, is told of each version that stands for the same content as Base.
	Noted func(region.Version) error
}

// Start begins to follow the source; the first answer is Base, unless there is
// one. It does not wait for it: Wrap and Ready do.
func (w *Watch) Start(o Options) {
	if w == nil {
		return
	}
	w.epoch, w.invalidate, w.noted = o.Epoch, o.Invalidate, o.Noted
	if w.epoch == nil {
		w.epoch = func() uint32 { return 0 }
	}
	if o.Base != nil {
		w.base = *o.Base
		w.settle()
	}
	ctx, cancel := context.WithCancel(context.Background())
	w.cancel = cancel
	w.done.Go(func() { w.follow(ctx) })
}

func (w *Watch) settle() {
	w.settled.Store(true)
	close(w.known)
}

func (w *Watch) follow(ctx context.Context) {
	for {
		look, cancel := context.WithTimeout(ctx, checkTime)
		_ = w.ask(look) // what is to be told is in w.err; what could not be told is asked again
		cancel()
		pause := w.interval
		select {
		case <-w.known:
		default: // readers wait for it
			pause = min(pause, firstPause)
		}
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-w.kick:
			t.Stop()
		case <-ctx.Done():
			t.Stop()
			return
		}
	}
}

// Kick has the version looked at soon, as after a flush: the source's state is then
// known should it be started anew.
func (w *Watch) Kick() {
	if w == nil {
		return
	}
	select {
	case w.kick <- struct{}{}:
	default:
	}
}

// Ready returns once the first version is known.
func (w *Watch) Ready(ctx context.Context) error {
	if w == nil {
		return nil
	}
	select {
	case <-w.known:
		return nil
	default:
	}
	select {
	case <-w.known:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the version of the source: %w", ctx.Err())
	}
}

// Err is region.ErrMismatch, and what happened, once a change was noticed that
// was not dealt with by invalidation.
func (w *Watch) Err() error {
	if w == nil {
		return nil
	}
	if err := w.failed.Load(); err != nil {
		return *err
	}
	return nil
}

// fail sets Err unless there is one.
func (w *Watch) fail(err error) { w.failed.CompareAndSwap(nil, &err) }

// Counts returns how often the source's version was looked at, and how often it had changed.
func (w *Watch) Counts() (checks, changes int64) {
	if w == nil {
		return 0, 0
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.checks, w.changes
}

// Check looks now. It returns Err, or the error of asking.
func (w *Watch) Check(ctx context.Context) error {
	if w == nil {
		return nil
	}
	return w.ask(ctx)
}

// At asks for the version as the writer with another epoch sees it, and changes nothing.
func (w *Watch) At(ctx context.Context, epoch uint32) (region.Version, error) {
	return transport.ReadVersion(ctx, w.source, epoch)
}

// Last looks once more when a mount is closed: what was mixed since the look
// before must not go unsaid. It returns Err. Where the source does not answer it
// takes 2 s at most and cannot tell; whoever has something to push meets that too.
func (w *Watch) Last(ctx context.Context) error {
	if w == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, lastTime)
	defer cancel()
	_ = w.ask(ctx)
	return w.Err()
}

func (w *Watch) ask(ctx context.Context) error {
	select { // one at a time: no older answer may pass a newer one
	case w.asking <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("version of the source: %w", ctx.Err())
	}
	defer func() { <-w.asking }()
	now, err := w.read(ctx)
	if err != nil {
		return errors.Join(w.Err(), err)
	}
	w.mu.Lock()
	w.checks++
	first := !w.settled.Load()
	before := w.base
	// In this life of the source nobody else has written yet. Of what happened to
	// the region between the two lives nothing is known.
	anew := w.restart && before.Instance != now.Instance && now.Changes == 0
	same := first || before.Same(now) || anew
	if same {
		if w.noted != nil && (first || now.State != before.State) {
			if err := w.noted(now); err != nil {
				w.fail(err)
			}
		}
		w.base = now
	}
	if first {
		w.at = time.Now().Add(-now.Age) // the change may be as late as that
		w.settle()
	}
	w.mu.Unlock()
	if same || w.Err() != nil {
		return w.Err()
	}
	err = fmt.Errorf("the source changed behind this mount, by %s: %w", what(before, now), region.ErrMismatch)
	if w.invalidate != nil {
		if ierr := w.invalidate(ctx); ierr == nil {
			w.mu.Lock()
			w.base = now
			w.changes++
			w.mu.Unlock()
			return nil
		} else {
			err = fmt.Errorf("%w; invalidate what is cached: %w", err, ierr)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.changes++
	w.fail(err)
	return err
}

// read asks for the version as the writer sees it who has the lease now.
func (w *Watch) read(ctx context.Context) (v region.Version, err error) {
	for {
		epoch := w.epoch()
		v, err = transport.ReadVersion(ctx, w.source, epoch)
		if err != nil || epoch == w.epoch() {
			return v, err
		}
	}
}

func what(before, now region.Version) string {
	if before.Instance != now.Instance {
		return "a restart, across which it is not known to be the same"
	}
	return fmt.Sprintf("another writer (change %d, it was %d)", now.Changes, before.Changes)
}

// Close ends following. It returns once nothing is under way, and may be called twice.
func (w *Watch) Close() error {
	if w == nil {
		return nil
	}
	if w.cancel != nil {
		w.cancel()
	}
	err := w.source.Close()
	w.done.Wait()
	return err
}

// Wrap returns s, the region, whose requests fail with Err once there is one.
// Nothing is read from it before the first version is known, so that no bytes
// are of before the version that they are compared by.
func (w *Watch) Wrap(s region.Store) region.Store {
	if w == nil {
		return s
	}
	return watched{s, w}
}

type watched struct {
	region.Store
	w *Watch
}

// ReadAt implements region.Store. The first reads and the first version are asked
// for at the same time. Where the source says that it was changed about then,
// the bytes are read once more.
func (s watched) ReadAt(ctx context.Context, p []byte, off int64) error {
	for !s.w.settled.Load() {
		began := time.Now()
		if err := s.Store.ReadAt(ctx, p, off); err != nil {
			return err
		}
		if err := errors.Join(s.w.Ready(ctx), s.w.Err()); err != nil || !s.w.changedSince(began) {
			return err
		}
	}
	if err := s.Store.ReadAt(ctx, p, off); err != nil {
		return err
	}
	return s.w.Err()
}

// changedSince reports whether the source may have been changed between began and
// the first version.
func (w *Watch) changedSince(began time.Time) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return began.Before(w.at)
}

// WriteAt implements region.Store.
func (s watched) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := errors.Join(s.w.Ready(ctx), s.w.Err()); err != nil {
		return err
	}
	return s.Store.WriteAt(ctx, p, off)
}

// Flush implements region.Store.
func (s watched) Flush(ctx context.Context) error {
	if err := s.w.Err(); err != nil {
		return err
	}
	err := s.Store.Flush(ctx)
	if err == nil {
		s.w.Kick()
	}
	return err
}
