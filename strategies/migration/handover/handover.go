// Package handover decides who owns a region while it moves from a source to a
// destination: two state machines without I/O, which the drivers in package
// migration and the model checker in this package's tests run alike.
// docs/strategies/migration.md has the diagram.
//
// The owner is the host whose application may write. The hand-over takes place at
// one point: when the source handles Commit. Before it the source may always take its
// application back, by going to the next epoch, which makes a later Commit of the old one
// stale; after it the source never may.
//
// Requests go from the destination to the source only, and each may be lost,
// doubled or late: all are idempotent within their epoch.
package handover

import "fmt"

// ID names a destination, across its restarts. It is not 0.
type ID uint64

// Verb is what a destination asks.
type Verb uint8

// The requests.
const (
	Track    Verb = iota + 1 // note from now on which pages are written
	Finalize                 // stop the application, flush, say what was written
	Commit                   // the destination takes the region over
	Abort                    // go on at the source
	Done                     // the destination has every byte: the source may exit
)

// String returns the request's name.
func (v Verb) String() string {
	names := [...]string{"nothing", "track", "finalize", "commit", "abort", "done"}
	if int(v) < len(names) {
		return names[v]
	}
	return fmt.Sprintf("verb %d", uint8(v))
}

// Request is a message to the source. Epoch is 0 with Track.
type Request struct {
	Verb  Verb
	From  ID
	Epoch uint64
}

// Result is the source's answer in a word.
type Result uint8

// The results.
const (
	OK         Result = iota + 1
	Yours             // of Track: the region is yours already, by a Commit of Reply.Epoch
	Stale             // that epoch is over; Reply.Epoch is the present one
	Busy              // another destination has the region, or is about to
	Refused           // the application did not stop; it goes on, in Reply.Epoch
	Early             // the request needs another one before
	TooLate           // the region has been handed over
	lastResult = TooLate
)

// String returns the result's name.
func (r Result) String() string {
	names := [...]string{"nothing", "ok", "yours", "stale epoch", "another destination has the region", "the application did not stop", "out of order", "already handed over"}
	if int(r) < len(names) {
		return names[r]
	}
	return fmt.Sprintf("result %d", uint8(r))
}

// Reply answers a Request. Epoch is the source's present one.
type Reply struct {
	Request Request
	Result  Result
	Epoch   uint64
}

// Phase is a source's.
type Phase uint8

// The phases of a source. It owns the region but in Released and Gone.
const (
	Running    Phase = iota // nobody is interested
	Tracking                // a destination pulls, the application goes on
	Suspending              // the application was told to stop
	Suspended               // it has stopped, and its stores are flushed
	Released                // the destination owns the region; its bytes can still be read here
	Gone                    // and need not be any more
)

// String returns the phase's name.
func (p Phase) String() string {
	return [...]string{"running", "tracking", "suspending", "suspended", "released", "gone"}[p]
}

// Owns reports whether the source owns the region.
func (p Phase) Owns() bool { return p < Released }

// Action is what the driver of a source must do after a step, in this order:
// write Kept where it changed, then the action, then answer.
type Action uint8

// The actions.
const (
	Nothing Action = iota
	Watch          // begin to track
	Unwatch        // stop tracking
	Suspend        // stop the application and flush; report by Stopped or Refuse
	Resume         // let it go on; it may not have stopped, or may be about to
	Exit           // the source is no longer needed
)

// Source is the machine of the host that has the region. The zero value is not
// ready: NewSource and Restart make one. It is plain data; its methods return the next state.
type Source struct {
	Phase   Phase
	Epoch   uint64 // of the next hand-over, or of the last where the region is gone
	With    ID     // the destination; 0 in Running
	refused uint64 // the epoch whose Finalize was refused
}

// Kept is what a source must find again when it is killed.
type Kept struct {
	Epoch    uint64
	Released bool
	With     ID
}

// NewSource returns a source that owns its region.
func NewSource() Source { return Source{Phase: Running, Epoch: 1} }

// Kept returns what must be durable before the action is done and the answer sent.
func (s Source) Kept() Kept {
	if s.Phase.Owns() {
		return Kept{Epoch: s.Epoch}
	}
	return Kept{s.Epoch, true, s.With}
}

// Restart returns the state of a source that was killed. Its tracking is lost.
// The action is Resume unless the region was handed over: nobody knows whether
// the application was stopped.
func Restart(k Kept) (Source, Action) {
	if k.Released {
		return Source{Phase: Released, Epoch: k.Epoch, With: k.With}, Nothing
	}
	return Source{Phase: Running, Epoch: k.Epoch + 1}, Resume
}

// back makes the application go on, in the next epoch.
func (s Source) back(phase Phase) (Source, Action) {
	s.Phase, s.Epoch = phase, s.Epoch+1
	if phase == Running {
		s.With = 0
	}
	return s, Resume
}

// Handle takes a request. The answer is Answer's of the state that it returns, once
// that is ready.
func (s Source) Handle(r Request) (Source, Action) {
	if r.From == 0 || s.With != 0 && s.With != r.From {
		return s, Nothing
	}
	current := r.Epoch == s.Epoch && s.With == r.From
	switch {
	case r.Verb == Track && s.Phase == Running:
		s.Phase, s.With = Tracking, r.From
		return s, Watch
	case !current:
	case r.Verb == Finalize && s.Phase == Tracking:
		s.Phase = Suspending
		return s, Suspend
	case r.Verb == Commit && s.Phase == Suspended:
		s.Phase = Released
	case r.Verb == Abort && s.Phase == Tracking:
		s, _ = s.back(Running)
		return s, Unwatch
	case r.Verb == Abort && s.Phase.Owns():
		return s.back(Running)
	case r.Verb == Done && s.Phase == Released:
		s.Phase = Gone
		return s, Exit
	}
	return s, Nothing
}

// Answer says what the state means for a request that was handled; ready is false while
// that is not known yet. It changes nothing, so that a request that comes again
// gets the same answer.
func (s Source) Answer(r Request) (_ Reply, ready bool) {
	reply := func(res Result) (Reply, bool) { return Reply{r, res, s.Epoch}, true }
	mine := s.With == r.From
	switch {
	case r.From == 0:
		return reply(Early)
	case r.Verb == Track && mine && !s.Phase.Owns():
		return reply(Yours)
	case r.Verb == Track && mine:
		return reply(OK)
	case r.Verb == Track:
		return reply(Busy)
	case r.Epoch < s.Epoch && r.Verb == Abort:
		return reply(OK) // that epoch did not end in a hand-over
	case r.Verb == Finalize && s.refused != 0 && r.Epoch == s.refused && mine:
		return reply(Refused)
	case s.With != 0 && !mine:
		return reply(Busy)
	case r.Epoch != s.Epoch:
		return reply(Stale)
	case !mine: // nobody tracks
		return reply(Early)
	}
	switch r.Verb {
	case Finalize:
		switch s.Phase {
		case Suspending:
			return Reply{}, false
		case Suspended, Released, Gone:
			return reply(OK)
		}
	case Commit, Done:
		if s.Phase == Gone || s.Phase == Released && r.Verb == Commit {
			return reply(OK)
		}
	case Abort:
		return reply(TooLate)
	}
	return reply(Early)
}

// Stopped says that Suspend of this epoch was done: no store of the application
// comes any more, and all are flushed.
func (s Source) Stopped(epoch uint64) Source {
	if s.Phase == Suspending && s.Epoch == epoch {
		s.Phase = Suspended
	}
	return s
}

// Refuse says that the application did not stop. Tracking goes on.
func (s Source) Refuse(epoch uint64) (Source, Action) {
	if s.Phase != Suspending || s.Epoch != epoch {
		return s, Nothing
	}
	s, a := s.back(Tracking)
	s.refused = epoch
	return s, a
}

// Expire says that no Commit came in time. The application goes on, and so does tracking.
func (s Source) Expire(epoch uint64) (Source, Action) {
	if s.Phase != Suspending && s.Phase != Suspended || s.Epoch != epoch {
		return s, Nothing
	}
	return s.back(Tracking)
}

// Forget says that the destination has not been heard of for long.
func (s Source) Forget() (Source, Action) {
	if s.Phase != Tracking {
		return s, Nothing
	}
	s, _ = s.back(Running)
	return s, Unwatch
}

// Stage is a destination's.
type Stage uint8

// The stages of a destination. It owns the region in Owning and after it.
const (
	Joining    Stage = iota // asks to track
	Pulling                 // pulls, while the application runs at the source
	Finalizing              // asks to finalise
	Filling                 // all must be local before it commits, and is not
	Committing              // asks to take over
	Aborting                // asks to go on at the source
	Aborted                 // the source goes on
	Owning                  // the application may run here
	Finishing               // has every byte, says so
	Finished                // the source may be gone
)

// String returns the stage's name.
func (s Stage) String() string {
	return [...]string{"joining", "pulling", "finalizing", "filling", "committing", "aborting", "aborted", "owning", "finishing", "finished"}[s]
}

// Destination is the machine of the host that wants the region. It is plain
// data; its methods return the next state.
type Destination struct {
	ID     ID
	Stage  Stage
	Epoch  uint64 // of the hand-over under way
	Strict bool   // commit only once every byte is local (pre-copy, stop-and-copy)
	Last   Result // of the last reply, where it led back to an earlier stage
}

// KeptBy is what a destination must find again when it is killed.
type KeptBy struct {
	Committing bool   // Commit of Epoch may have been sent
	Started    bool   // the application may have been started
	Epoch      uint64 // 0 without either
}

// Kept returns what must be durable before the next request is sent or, with
// Owning, the application is started.
func (d Destination) Kept() KeptBy {
	switch {
	case d.Stage >= Owning:
		return KeptBy{true, true, d.Epoch}
	case d.Stage == Committing:
		return KeptBy{true, false, d.Epoch}
	}
	return KeptBy{}
}

// Again returns the state of a destination that was killed and has lost what it pulled.
// started: its application may have run; what it wrote is the application's own loss, and this
// machine has nothing to do.
func (d Destination) Again(k KeptBy) (_ Destination, started bool) {
	n := Destination{ID: d.ID, Strict: d.Strict}
	if k.Committing && !k.Started {
		n.Stage, n.Epoch = Committing, k.Epoch
	}
	return n, k.Started
}

// Want returns the request whose answer the destination needs, to be sent again until
// it comes; ok is false where it needs none.
func (d Destination) Want() (r Request, ok bool) {
	v := map[Stage]Verb{Joining: Track, Finalizing: Finalize, Committing: Commit, Aborting: Abort, Finishing: Done}[d.Stage]
	if r = (Request{v, d.ID, d.Epoch}); v == Track {
		r.Epoch = 0
	}
	return r, v != 0
}

// Handle takes a reply; one that is not to what the destination wants changes nothing.
func (d Destination) Handle(r Reply) Destination {
	if want, ok := d.Want(); !ok || want != r.Request {
		return d
	}
	d.Last = r.Result
	switch d.Stage {
	case Joining:
		switch r.Result {
		case OK:
			d.Stage, d.Epoch = Pulling, r.Epoch
		case Yours:
			d.Stage, d.Epoch = Committing, r.Epoch // which says so once more, after it was made durable
		default:
			d.Stage = Aborted
		}
	case Finalizing:
		switch {
		case r.Result == OK && d.Strict:
			d.Stage = Filling
		case r.Result == OK:
			d.Stage = Committing
		case r.Result == Busy:
			d.Stage = Aborted
		default:
			d.Stage = Joining
		}
	case Committing:
		switch r.Result {
		case OK:
			d.Stage = Owning
		case Busy:
			d.Stage = Aborted
		default:
			d.Stage = Joining
		}
	case Aborting:
		d.Stage = Aborted
	case Finishing:
		d.Stage = Finished
	}
	return d
}

// Decide says that the time to finalise has come.
func (d Destination) Decide() Destination {
	if d.Stage == Pulling {
		d.Stage = Finalizing
	}
	return d
}

// Complete says that every byte is local.
func (d Destination) Complete() Destination {
	switch d.Stage {
	case Filling:
		d.Stage = Committing
	case Owning:
		d.Stage = Finishing
	}
	return d
}

// GiveUp says that the destination does not want the region any more. Once a Commit may
// have been sent only its answer can tell, and nothing changes.
func (d Destination) GiveUp() Destination {
	switch d.Stage {
	case Joining:
		d.Stage = Aborted
	case Pulling, Finalizing, Filling:
		d.Stage = Aborting
	}
	return d
}

// Owns reports whether the destination knows that it owns the region.
func (d Destination) Owns() bool { return d.Stage >= Owning }
