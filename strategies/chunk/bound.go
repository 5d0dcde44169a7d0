package chunk

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	"memsync/strategies/region"
)

// bound keeps a Syncer's cache below a number of chunks.
//
// Each chunk that is not Remote holds a room, and so does each chunk that
// somebody is about to ask for; there are limit rooms. Whoever finds none waits
// for the reclaimer, which takes chunks out of the cache by two queues, as the
// kernel does with pages. What becomes Local enters active; the oldest there, but
// for what was used again since the reclaimer last came by, is on trial for as long as
// it takes a quarter of the cache to go by; then it goes, unless it was used
// meanwhile, is being read or written, or the source may still lack its bytes.
// The first use does not count: what is read once, as by a scan, goes first.
// What was pulled ahead and not read yet is the last to go.
//
// A chunk that was touched may have copies of its bytes in front of the cache
// (the kernel's page cache or page tables), whose use the Syncer does not see.
// Where those can be dropped, that begins with the trial: if the chunk is in use it
// will be touched again. Nobody waits for a drop, since it may wait for a read of the
// device that waits for a room itself. Copies of what has gone do no harm: the
// region is written through this Syncer only.
type bound struct {
	limit int64 // rooms
	low   int64 // the reclaimer keeps that many free
	trial int64 // and that many on trial

	mu      sync.Mutex
	used    int64
	waiting int           // for a room
	freed   chan struct{} // closed and replaced when rooms were given back
	active  ring          // chunks that are Local, oldest first
	onTrial ring          // the others that are
	pulls   []*stretch    // requests on their way: none of their chunks may go
	err     error         // why the last attempt to make chunks clean, or to take one out, failed
	drop    func(off, n int64) error
	clean   func(ctx context.Context) error

	streams streams
	kick    chan struct{} // to the reclaimer
	wg      sync.WaitGroup
	evicted int64 // chunks
}

// stretch is chunks [lo, hi).
type stretch struct{ lo, hi int64 }

// ring is a queue of chunk numbers.
type ring struct {
	buf     []int64
	head, n int
}

func (r *ring) push(idx int64) {
	if r.n == len(r.buf) {
		r.buf = append(slices.Concat(r.buf[r.head:], r.buf[:r.head]), make([]int64, max(64, r.n))...)
		r.head = 0
	}
	r.buf[(r.head+r.n)%len(r.buf)] = idx
	r.n++
}

func (r *ring) pop() int64 {
	idx := r.buf[r.head]
	r.head = (r.head + 1) % len(r.buf)
	r.n--
	return idx
}

const (
	maxDrops = 32 // of copies, that may be under way: each takes a thread that waits in the kernel

	// The reclaimer looks again after that long, doubling, where nothing can go.
	minIdle = time.Millisecond
	maxIdle = 16 * time.Millisecond
)

// Bound limits the cache to that many bytes, rounded down to chunks but at least
// one, and has to be called before anything else. The cache must be a
// region.Trimmer or Mapped. From then on View offers nothing. With the region's
// size or more nothing has to go, but can: see Invalidate.
func (s *Syncer) Bound(bytes int64) error {
	_, trims := s.local.(region.Trimmer)
	if _, drops := s.local.(Mapped); !trims && !drops {
		return fmt.Errorf("limit a cache that cannot give space back: %w", region.ErrNotSupported)
	}
	limit := max(1, bytes>>s.shift)
	if bytes >= s.size {
		limit = 4 * s.n // rooms that nobody waits for
	}
	s.maxExtent = max(1, min(s.maxExtent, limit/4))
	s.bound = &bound{limit: limit, low: min(limit/16, 4*s.maxExtent), trial: max(1, limit/4), freed: make(chan struct{}), kick: make(chan struct{}, 1)}
	s.bound.wg.Go(s.reclaim)
	return nil
}

// Invalidate takes all chunks out of the cache, and drops their copies in front of
// it: what is read once it has returned was asked of the remote store after it
// was called. It waits for reads and pulls that are under way. It needs a Bound.
// Chunks that wait to be pushed cannot be merged: they give region.ErrMismatch, and stay.
func (s *Syncer) Invalidate(ctx context.Context) error {
	b := s.bound
	if b == nil {
		return fmt.Errorf("invalidate a cache without a limit: %w", region.ErrNotSupported)
	}
	b.mu.Lock()
	old := slices.Clone(b.pulls) // they may bring older bytes
	drop := b.drop
	b.mu.Unlock()
	for {
		b.mu.Lock()
		old = slices.DeleteFunc(old, func(r *stretch) bool { return !slices.Contains(b.pulls, r) })
		b.mu.Unlock()
		if len(old) == 0 {
			break
		}
		if err := s.pause(ctx); err != nil {
			return fmt.Errorf("invalidate the cache: wait for %d pulls under way: %w", len(old), err)
		}
	}
	for idx := int64(0); idx < s.n; {
		st := State(s.words[idx].Load() & wordState)
		unclean := false
		if st == Local {
			_, unclean = s.evict(idx)
		} else if st != Filling { // Pulling: asked for since
			idx++
			continue
		}
		if unclean {
			return fmt.Errorf("chunk %d at %d waits to be pushed, %d bytes in all: %w", idx, s.at(idx), s.pending()<<s.shift, region.ErrMismatch)
		}
		if State(s.words[idx].Load()&wordState) == Remote {
			idx++
		} else if err := s.pause(ctx); err != nil {
			return fmt.Errorf("invalidate the cache: chunk %d at %d is in use: %w", idx, s.at(idx), err)
		}
	}
	b.mu.Lock()
	s.tidy(&b.active)
	s.tidy(&b.onTrial)
	b.mu.Unlock()
	if drop != nil {
		return drop(0, s.size)
	}
	return nil
}

func (s *Syncer) pause(ctx context.Context) error {
	sleep(ctx, minIdle)
	if s.ctx.Err() != nil {
		return region.ErrClosed
	}
	return ctx.Err()
}

// tidy takes the chunks out of a queue that have gone. Under mu.
func (s *Syncer) tidy(q *ring) {
	for range q.n {
		if idx := q.pop(); State(s.words[idx].Load()&wordState) != Remote {
			q.push(idx)
		}
	}
}

// OnDrop sets the function that drops the copies of [off, off+n) in front of
// the Syncer, after having written back what is dirty of them. It may block for
// requests that the Syncer has under way. It is called by goroutines of the Syncer only.
func (s *Syncer) OnDrop(drop func(off, n int64) error) {
	if b := s.bound; b != nil {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.drop = drop
	}
}

// Evicted returns how many bytes went out of the cache to make room, rounded up to chunks.
func (s *Syncer) Evicted() int64 {
	b := s.bound
	if b == nil {
		return 0
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.evicted << s.shift
}

// room returns from 1 to n rooms and waits for the first. Without wait, it
// returns 0 where there is none; for a prefetch also where few are left.
func (s *Syncer) room(ctx context.Context, n int64, wait bool) (int64, error) {
	b := s.bound
	if b == nil {
		return n, nil
	}
	for {
		b.mu.Lock()
		free := b.limit - b.used
		if !wait && region.ClassOf(ctx) != region.Demand {
			free -= b.low / 2
		}
		got := min(n, max(0, free))
		b.used += got
		freed := b.freed
		if b.limit-b.used < b.low || got == 0 && wait {
			b.poke()
		}
		if got > 0 || !wait {
			b.mu.Unlock()
			return got, nil
		}
		b.waiting++
		b.mu.Unlock()
		var err error
		select {
		case <-freed:
		case <-ctx.Done():
			err = ctx.Err()
		case <-s.ctx.Done():
			err = region.ErrClosed
		}
		b.mu.Lock()
		b.waiting--
		if err != nil {
			err = fmt.Errorf("wait for room in the cache of %d bytes, of which %d wait to be pushed: %w",
				b.limit<<s.shift, s.pending()<<s.shift, errors.Join(err, b.err))
		}
		b.mu.Unlock()
		if err != nil {
			return 0, err
		}
	}
}

// full reports whether the cache is as full as the reclaimer lets it be.
func (s *Syncer) full() bool {
	b := s.bound
	if b == nil {
		return false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.limit-b.used <= b.low
}

// poke wakes the reclaimer.
func (b *bound) poke() {
	select {
	case b.kick <- struct{}{}:
	default:
	}
}

// leave gives n rooms back.
func (s *Syncer) leave(n int64) {
	if b := s.bound; b != nil && n > 0 {
		b.mu.Lock()
		b.leave(n)
		b.mu.Unlock()
	}
}

func (b *bound) leave(n int64) {
	b.used -= n
	if b.waiting > 0 {
		close(b.freed)
		b.freed = make(chan struct{})
	}
}

// enqueue puts chunks [lo, hi), which have become Local, at the end of active.
func (b *bound) enqueue(lo, hi int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := lo; i < hi; i++ {
		b.active.push(i)
	}
	if b.waiting > 0 {
		b.poke()
	}
}

// hold keeps the chunks of r where they are until release. A chunk that a pull
// is to fill must not go meanwhile: it might have been written, pushed and evicted,
// and the pull would bring its older bytes back.
func (b *bound) hold(r *stretch) (release func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.pulls = append(b.pulls, r)
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		i := slices.Index(b.pulls, r)
		b.pulls = slices.Delete(b.pulls, i, i+1)
		if b.waiting > 0 {
			b.poke()
		}
	}
}

func (b *bound) held(idx int64) bool {
	return slices.ContainsFunc(b.pulls, func(r *stretch) bool { return r.lo <= idx && idx < r.hi })
}

// pin keeps the Local chunks from lo on in the cache, up to hi or the first that
// is not, and returns where that is. Without a limit all that is Local stays anyway.
func (s *Syncer) pin(lo, hi int64) int64 {
	if s.bound == nil {
		for lo < hi && State(s.words[lo].Load()&wordState) == Local {
			lo++
		}
		return lo
	}
	for ; lo < hi; lo++ {
		for w := &s.words[lo]; ; {
			old := w.Load()
			if State(old&wordState) != Local {
				return lo
			}
			mark := uint32(wordTouched)
			if old&wordTouched != 0 {
				mark = wordUsed
			}
			if w.CompareAndSwap(old, (old|mark)+wordPin) {
				break
			}
		}
	}
	return hi
}

func (s *Syncer) unpin(lo, hi int64) {
	if s.bound == nil {
		return
	}
	for ; lo < hi; lo++ {
		s.words[lo].Add(math.MaxUint32 - wordPin + 1)
	}
}

// pending returns how many chunks cannot go because the source may lack their bytes.
func (s *Syncer) pending() int64 { return s.dirty.Count() + s.unflushed.Count() }

// reclaim is the reclaimer. It waits for nothing but work.
func (s *Syncer) reclaim() {
	b := s.bound
	drops := make(chan struct{}, maxDrops)
	cleaning := make(chan struct{}, 1)
	idle := minIdle
	for stuck := false; ; {
		var retry <-chan time.Time
		if stuck {
			retry = time.After(idle)
			idle = min(2*idle, maxIdle)
		} else {
			idle = minIdle
		}
		select {
		case <-b.kick:
		case <-retry:
		case <-s.ctx.Done():
			return
		}
		stuck = false
		for fruitless := int64(0); s.ctx.Err() == nil && !stuck; {
			b.mu.Lock()
			want := b.limit-b.used < b.low || b.limit == b.used && b.waiting > 0
			active, onTrial, drop := int64(b.active.n), int64(b.onTrial.n), b.drop
			b.mu.Unlock()
			if !want || active+onTrial == 0 {
				break // enqueue pokes
			}
			// Thrice: a step may clear a chunk's mark, the next put it on trial, another try it.
			if stuck = fruitless > 3*(active+onTrial); stuck {
				break
			}
			fruitless++
			switch {
			case active > 0 && (onTrial == 0 || onTrial < b.trial && len(drops) < maxDrops):
				s.age(drop, drops)
			case s.try(drop != nil, cleaning):
				fruitless = 0
			}
		}
	}
}

// age puts the oldest of active on trial, with the neighbours that follow it where
// their copies are to be dropped, or has it stay active.
func (s *Syncer) age(drop func(off, n int64) error, drops chan struct{}) {
	b := s.bound
	b.mu.Lock()
	defer b.mu.Unlock()
	idx := b.active.pop()
	old := s.words[idx].Load()
	marks := uint32(wordUsed)
	if drop != nil {
		marks |= wordTouched
	}
	switch {
	case old >= wordPin:
		b.active.push(idx)
		return
	case old&marks == 0:
		b.onTrial.push(idx)
		return
	case drop == nil:
		s.unmark(idx, marks)
		b.active.push(idx)
		return
	}
	run := stretch{idx, s.markedRun(idx, marks)}
	for i := run.lo; i < run.hi; i++ {
		s.unmark(i, marks)
		b.onTrial.push(i)
	}
	select {
	case drops <- struct{}{}:
	default:
		return // all that may be under way are stuck: it is on trial with its copies
	}
	b.wg.Go(func() {
		// An error is the device's: it is closed, or the kernel has no such pages.
		_ = drop(s.at(run.lo), s.at(run.hi)-s.at(run.lo))
		<-drops
	})
}

// unmark takes marks of chunk idx away if it is Local: otherwise, as after an
// Invalidate, the bits mean something else.
func (s *Syncer) unmark(idx int64, marks uint32) {
	for w := &s.words[idx]; ; {
		old := w.Load()
		if State(old&wordState) != Local || w.CompareAndSwap(old, old&^marks) {
			return
		}
	}
}

// markedRun takes the chunks that follow idx in active, as long as they are its
// neighbours, marked and not pinned, and returns the end of the run. Under mu.
func (s *Syncer) markedRun(idx int64, marks uint32) (hi int64) {
	q := &s.bound.active
	for hi = idx + 1; q.n > 0 && hi-idx < s.maxExtent; hi++ {
		next := q.buf[q.head]
		if w := s.words[min(next, s.n-1)].Load(); next != hi || w&marks == 0 || w >= wordPin {
			break
		}
		q.pop()
	}
	return hi
}

// try takes the oldest of those on trial out of the cache and reports whether it
// has gone; else it is active again.
func (s *Syncer) try(drops bool, cleaning chan struct{}) (gone bool) {
	b := s.bound
	marks := uint32(wordUsed)
	if drops {
		marks |= wordTouched
	}
	b.mu.Lock()
	idx := b.onTrial.pop()
	b.mu.Unlock()
	unclean := false
	w := s.words[idx].Load()
	if w == uint32(Remote) { // it was invalidated
		return false
	}
	if w&marks == 0 {
		gone, unclean = s.evict(idx)
	}
	if unclean {
		s.makeClean(cleaning)
	}
	if !gone {
		b.mu.Lock()
		b.active.push(idx)
		b.mu.Unlock()
	}
	return gone
}

// evict makes chunk idx Remote, unless somebody needs it where it is; unclean
// says that it would be possible if the source had its bytes.
func (s *Syncer) evict(idx int64) (gone, unclean bool) {
	b := s.bound
	if s.dirty.Has(idx) || s.unflushed.Has(idx) {
		return false, true
	}
	old := s.words[idx].Load()
	claimed := false
	take := func() bool {
		// From here on nobody reads or writes it: they wait until it is Remote.
		claimed = old&^(wordTouched|wordUsed) == uint32(Local) && s.words[idx].CompareAndSwap(old, uint32(Filling))
		if !claimed {
			return false
		}
		// Whoever wrote it marked it before that. Chunks move from dirty to
		// unflushed by marks that overlap, and back only under moving.
		s.moving.Lock()
		unclean = s.dirty.Has(idx) || s.unflushed.Has(idx)
		s.moving.Unlock()
		b.mu.Lock()
		defer b.mu.Unlock()
		gone = !unclean && !b.held(idx)
		return gone
	}
	var err error
	off, n := s.at(idx), s.at(idx+1)-s.at(idx)
	if m, ok := s.local.(Mapped); ok {
		err = m.Drop(off, n, take)
	} else if take() {
		err = s.local.(region.Trimmer).Trim(s.ctx, off, n)
	}
	if !claimed {
		return false, false
	}
	to := old
	if err != nil {
		gone = false
		b.mu.Lock()
		b.err = err // for who waits for the room
		b.mu.Unlock()
	}
	if gone {
		to = uint32(Remote)
		s.nLocal.Add(-1)
	}
	if s.words[idx].Swap(to)&wordWaited != 0 {
		s.wake(idx)
	}
	if gone {
		b.mu.Lock()
		b.evicted++
		b.leave(1)
		b.mu.Unlock()
	}
	return gone, unclean
}

// makeClean has what is dirty pushed and flushed, by one goroutine at a time.
func (s *Syncer) makeClean(cleaning chan struct{}) {
	b := s.bound
	b.mu.Lock()
	clean := b.clean
	b.mu.Unlock()
	if clean == nil {
		return
	}
	select {
	case cleaning <- struct{}{}:
	default:
		return
	}
	b.wg.Go(func() {
		err := clean(s.ctx)
		b.mu.Lock()
		b.err = err
		b.mu.Unlock()
		if err != nil {
			sleep(s.ctx, minBackoff) // the reclaimer comes back anyway
		}
		<-cleaning
		b.poke()
	})
}

// streams notices who reads on from where it stopped, a few readers at once.
type streams struct {
	mu   sync.Mutex
	next [8]int64 // the chunk after the last read
	hits [8]int   // reads in a row
	old  int      // which to forget next
}

// see takes note of a read of chunks [lo, hi) and returns how many in a row it is.
func (t *streams) see(lo, hi int64) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, next := range t.next {
		if lo != next && lo != next-1 {
			continue
		}
		if hi > next {
			t.next[i] = hi
			t.hits[i]++
		}
		return t.hits[i]
	}
	t.next[t.old], t.hits[t.old] = hi, 0
	t.old = (t.old + 1) % len(t.next)
	return 0
}

// readAhead asks, as Prefetch and without waiting, for what follows chunks [lo,
// hi), which are being read, if they were reached in order: twice as much with
// each such read, up to two extents. Without a Bound that is the Puller's work.
func (s *Syncer) readAhead(lo, hi int64) {
	b := s.bound
	if b == nil {
		return
	}
	hits := b.streams.see(lo, hi)
	if hits < 2 {
		return
	}
	end := min(hi+min(int64(1)<<min(hits, 20), 2*s.maxExtent), s.n)
	s.mu.Lock()
	defer s.mu.Unlock()
	for !s.closed {
		from, to, stamp := s.claim(hi, end, s.maxExtent, region.Prefetch)
		if from == to {
			return
		}
		s.hedges.Go(func() {
			// An error is the reader's to get, when it asks for the chunk itself.
			_ = s.fetch(region.WithClass(s.ctx, region.Prefetch), from, to, stamp)
		})
	}
}
