package chunk

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"memsync/strategies/region"
)

// State of a chunk in a Syncer.
type State uint8

// The states. Dirty and Pushing are a local chunk's; Pushing wins where both hold.
const (
	Remote  State = iota // only the remote store has it
	Pulling              // asked for
	Filling              // its bytes are being put into the cache
	Local                // the cache has it
	Dirty                // the cache has it and the remote store has an older one
	Pushing              // on its way to the remote store
)

// The word of a chunk: 2 bits of State (Remote to Local), a bit that says that
// somebody waits for it to become local, one that it was asked for as Demand,
// and the time when. While the chunk is Local the rest has another meaning.
const (
	wordState  = 3
	wordWaited = 4
	wordDemand = 8
	// Of a Local chunk, with a Bound:
	wordTouched = 8  // since it became local or its copies were dropped
	wordUsed    = 16 // again, since the reclaimer last came by
	wordPin     = 32 // one read or write that is under way
	stampShift  = 4
	stampMask   = 1<<(32-stampShift) - 1
	stampUnit   = 16 // log2 of ns: 65.5 us, so that the stamp wraps after 4.9 h
)

// Syncer is a local cache over a remote store: reads pull what the cache lacks,
// writes go to the cache and make chunks dirty (Pusher writes them back).
//
// Reads and writes of local chunks take no lock and allocate nothing.
// A write of a whole chunk does not pull it. A write of a part of a chunk that
// is not local pulls it first. A pull that is overtaken by a write is dropped.
// Nothing else may write to the remote region meanwhile: a chunk is read from
// it once, and again only after it was evicted (Bound).
//
// A read of a chunk that was asked for already waits for it; where the request
// is a long background one, it asks again, for that chunk alone and as Demand,
// once that is likely to be quicker. Such requests make up at most 1/64 of the bytes.
//
// The Syncer has no goroutines of its own but for such repeated requests and,
// with a Bound, the reclaimer. Close closes neither store.
type Syncer struct {
	grid
	remote, local region.Store
	viewer        region.Viewer // local, where it offers views; else nil
	words         []atomic.Uint32
	nLocal        atomic.Int64
	dirty         *Set
	pushing       *Set
	unflushed     *Set       // pushed since the remote store was last flushed
	moving        sync.Mutex // held while chunks move from unflushed back to dirty
	journal       *Journal   // nil: what is dirty goes with the process
	bound         *bound     // nil: the cache may hold the whole region
	maxExtent     int64      // chunks in one request
	start         time.Time
	bufs          sync.Pool
	copying       chan struct{} // a token for each background request that copies into memory
	waits         [64]waits

	demandTime, prefetchTime atomic.Int64 // how long requests take, ns; 0: none yet
	stats                    syncStats

	ctx    context.Context // ends at Close
	cancel context.CancelFunc
	hedges sync.WaitGroup
	mu     sync.Mutex // of closed against hedges.Add
	closed bool
}

type syncStats struct {
	localRequests, localBytes, demandRequests, demandBytes, prefetchRequests, prefetchBytes,
	droppedBytes, hedges atomic.Int64
}

// waits is a shard of the chunks that somebody waits for.
type waits struct {
	mu sync.Mutex
	m  map[int64]*wait
	_  [48]byte // a cache line each
}

type wait struct {
	done   chan struct{} // closed when the chunk leaves Pulling or Filling
	hedged bool
}

var (
	_ region.Store  = (*Syncer)(nil)
	_ region.Viewer = (*Syncer)(nil)
)

// NewSyncer returns a Syncer over remote with an empty cache local of the same
// size. chunk is in bytes, a power of two. maxExtent is the most bytes that one
// request asks remote for, at least a chunk.
func NewSyncer(remote, local region.Store, chunk, maxExtent int64) (*Syncer, error) {
	g, err := newGrid(remote.Size(), chunk)
	if err != nil {
		return nil, err
	}
	if local.Size() != remote.Size() {
		return nil, fmt.Errorf("cache of %d bytes for a region of %d: %w", local.Size(), remote.Size(), region.ErrMismatch)
	}
	s := &Syncer{grid: g, remote: remote, local: local, words: make([]atomic.Uint32, g.n),
		dirty: NewSet(g.n), pushing: NewSet(g.n), unflushed: NewSet(g.n), maxExtent: max(1, maxExtent>>g.shift), start: time.Now()}
	s.viewer, _ = local.(region.Viewer)
	// Copying into memory takes a processor, and for long where its pages are
	// touched for the first time. One is left for requests that somebody waits for:
	// they would stand behind all copies in the scheduler's queue.
	s.copying = make(chan struct{}, max(1, runtime.GOMAXPROCS(0)-1))
	for i := range s.waits {
		s.waits[i].m = map[int64]*wait{}
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s, nil
}

// State returns the state of chunk idx.
func (s *Syncer) State(idx int64) State {
	st := State(s.words[idx].Load() & wordState)
	switch {
	case st == Local && s.pushing.Has(idx):
		return Pushing
	case st == Local && s.dirty.Has(idx):
		return Dirty
	}
	return st
}

// LocalBytes returns how many bytes the cache has, rounded up to chunks but for the region's end.
func (s *Syncer) LocalBytes() int64 { return min(s.nLocal.Load()<<s.shift, s.size) }

// DirtyBytes returns how many bytes are in chunks that wait to be pushed.
func (s *Syncer) DirtyBytes() int64 { return min(s.dirty.Count()<<s.shift, s.size) }

// Size implements region.Store.
func (s *Syncer) Size() int64 { return s.size }

// present reports whether chunks [lo, hi) are all local.
func (s *Syncer) present(lo, hi int64) bool {
	for i := lo; i < hi; i++ {
		if State(s.words[i].Load()&wordState) != Local {
			return false
		}
	}
	return true
}

// Has reports whether all of [off, off+n), which must lie in the region, is local.
func (s *Syncer) Has(off, n int64) bool {
	if n <= 0 {
		return true
	}
	lo, hi := s.span(off, n)
	j := s.pin(lo, hi) // which is also how the reclaimer learns that it is in use
	s.unpin(lo, j)
	return j == hi
}

// Stored says that the cache, which is Mapped, is being written in [off, off+n),
// whole chunks, by stores through its mapping. It reports false, and does nothing,
// where not all of it is local.
func (s *Syncer) Stored(off, n int64) bool {
	lo, hi := s.span(off, n)
	if !s.present(lo, hi) {
		return false
	}
	s.dirty.Mark(lo, hi)
	return true
}

// Forget makes the local chunks of [lo, hi) remote again, whose bytes in the cache are
// out of date, and calls gone for each run of them. No request for any of
// them may be under way, and it takes a Syncer without a Bound.
func (s *Syncer) Forget(lo, hi int64, gone func(lo, hi int64)) {
	for i := lo; i < hi; {
		j := i
		for j < hi && State(s.words[j].Load()&wordState) == Local {
			s.words[j].Store(uint32(Remote))
			j++
		}
		if i < j {
			s.nLocal.Add(i - j)
			s.dirty.Clear(i, j)
			gone(i, j)
		}
		i = max(j, i+1)
	}
}

func (s *Syncer) check(off, n int64) error {
	if err := region.CheckRange(off, n, s.size); err != nil {
		return err
	}
	if s.ctx.Err() != nil {
		return fmt.Errorf("syncer: %w", region.ErrClosed)
	}
	return nil
}

// View implements region.Viewer: it offers what is local and stays so.
func (s *Syncer) View(off, n int64) ([]byte, bool) {
	if s.viewer == nil || s.bound != nil || n <= 0 || s.check(off, n) != nil || !s.present(s.span(off, n)) {
		return nil, false
	}
	p, ok := s.viewer.View(off, n)
	if ok {
		s.countLocal(n)
	}
	return p, ok
}

func (s *Syncer) countLocal(n int64) {
	s.stats.localRequests.Add(1)
	s.stats.localBytes.Add(n)
}

// ReadAt implements region.Store. Chunks that are not local are pulled, as
// Demand, neighbours in one request.
func (s *Syncer) ReadAt(ctx context.Context, p []byte, off int64) error {
	n := int64(len(p))
	if err := s.check(off, n); err != nil || n == 0 {
		return err
	}
	lo, hi := s.span(off, n)
	if s.present(lo, hi) {
		s.countLocal(n)
	}
	s.readAhead(lo, hi)
	for end := off + n; off < end; {
		i := off >> s.shift
		j := s.pin(i, hi)
		if i == j {
			if err := s.ensure(ctx, i, hi); err != nil {
				return err
			}
			continue
		}
		to := min(s.at(j), end)
		err := s.local.ReadAt(ctx, p[:to-off], off)
		s.unpin(i, j)
		if err != nil {
			return err
		}
		p, off = p[to-off:], to
	}
	return nil
}

// WriteAt implements region.Store. It returns when the cache has the bytes.
func (s *Syncer) WriteAt(ctx context.Context, p []byte, off int64) error {
	n := int64(len(p))
	if err := s.check(off, n); err != nil || n == 0 {
		return err
	}
	end := off + n
	lo, hi := s.span(off, n)
	if s.present(lo, hi) {
		s.countLocal(n)
	} else if err := s.pullEdges(ctx, lo, hi, off, end); err != nil {
		return err
	}
	for first := off; off < end; {
		i := off >> s.shift
		j := s.pin(i, hi)
		claimed := j == i
		if claimed {
			var err error
			if j, err = s.claimWhole(ctx, i, hi, first, end); err != nil {
				return err
			}
		}
		if i == j { // only partly written and not local, or another is filling it
			if err := s.ensure(ctx, i, i+1); err != nil {
				return err
			}
			continue
		}
		to := min(s.at(j), end)
		err := s.local.WriteAt(ctx, p[:to-off], off)
		// After the bytes, and before anybody can see the chunk as local and clean;
		// on an error too, since some bytes may have changed.
		if err == nil || !claimed {
			jerr := s.journal.mark(i, j, func() { s.dirty.Mark(i, j) })
			if err == nil {
				err = jerr
			}
		}
		if err != nil && claimed {
			s.dirty.Clear(i, j) // it is to be Remote again
		}
		if claimed {
			s.publish(i, j, err == nil)
		} else {
			s.unpin(i, j)
		}
		if err != nil {
			return fmt.Errorf("write chunk %d at %d: %w", i, off, err)
		}
		p, off = p[to-off:], to
	}
	return nil
}

// claimWhole makes the chunks from lo on Filling that are not local and that
// [off, end) covers, up to hi or the first that is not one of them, and returns where that is.
func (s *Syncer) claimWhole(ctx context.Context, lo, hi, off, end int64) (int64, error) {
	for hi > lo && !s.whole(hi-1, off, end) {
		hi--
	}
	if hi == lo || !s.whole(lo, off, end) {
		return lo, nil
	}
	rooms, err := s.room(ctx, min(hi-lo, s.maxExtent), true)
	if err != nil {
		return lo, err
	}
	for hi = min(hi, lo+rooms); lo < hi; lo++ {
		ok, took := s.claimFill(lo, rooms > 0)
		if !ok {
			break
		}
		if took {
			rooms--
		}
	}
	s.leave(rooms)
	return lo, nil
}

// pullEdges pulls the first and the last chunk of a write together, where they
// are not written whole.
func (s *Syncer) pullEdges(ctx context.Context, lo, hi, off, end int64) error {
	first := !s.whole(lo, off, end) && !s.present(lo, lo+1)
	last := hi-1 > lo && !s.whole(hi-1, off, end) && !s.present(hi-1, hi)
	switch {
	case first && last && hi-lo == 2:
		return s.ensure(ctx, lo, hi)
	case first && last:
		ch := make(chan error, 1)
		go func() { ch <- s.ensure(ctx, hi-1, hi) }()
		return errors.Join(s.ensure(ctx, lo, lo+1), <-ch)
	case first:
		return s.ensure(ctx, lo, lo+1)
	case last:
		return s.ensure(ctx, hi-1, hi)
	}
	return nil
}

// Flush flushes the remote store. It does not push; Pusher.Flush does both.
func (s *Syncer) Flush(ctx context.Context) error { return s.remote.Flush(ctx) }

// Close ends waiting calls and later ones with ErrClosed, and repeated requests.
// What is dirty stays so.
func (s *Syncer) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	s.hedges.Wait()
	if s.bound != nil {
		s.bound.wg.Wait()
	}
	return nil
}

// claim takes the first run of remote chunks in [lo, hi), at most limit long,
// and makes it Pulling. It returns an empty run at hi where there is none, or no
// room for it in the cache.
func (s *Syncer) claim(lo, hi, limit int64, class region.Class) (from, to int64, stamp uint32) {
	from, to, stamp, _ = s.claimFor(region.WithClass(context.Background(), class), lo, hi, limit, false)
	return from, to, stamp
}

// claimFor is claim that, with wait, waits for room and returns ctx's error
// where that ends first.
func (s *Syncer) claimFor(ctx context.Context, lo, hi, limit int64, wait bool) (from, to int64, stamp uint32, err error) {
	for lo < hi && s.words[lo].Load() != 0 {
		lo++
	}
	if lo == hi {
		return hi, hi, 0, nil
	}
	rooms, err := s.room(ctx, min(limit, hi-lo), wait)
	if rooms == 0 {
		return hi, hi, 0, err
	}
	stamp = s.stamp()
	pulling := uint32(Pulling) | stamp<<stampShift
	if region.ClassOf(ctx) == region.Demand {
		pulling |= wordDemand
	}
	for from = lo; from < hi && !s.claimOne(from, pulling); {
		from++
	}
	for to = from; to < hi && to-from < rooms && (to == from || s.claimOne(to, pulling)); {
		to++
	}
	s.leave(rooms - (to - from))
	return from, to, stamp, nil
}

func (s *Syncer) claimOne(idx int64, pulling uint32) bool {
	// A remote chunk's word is 0 but for the waited bit, which cannot be set:
	// leaving Pulling or Filling wakes and clears it.
	return s.words[idx].Load() == 0 && s.words[idx].CompareAndSwap(0, pulling)
}

func (s *Syncer) stamp() uint32 { return uint32(time.Since(s.start)>>stampUnit) & stampMask }

// claimFill makes chunk idx Filling if it is Pulling, or Remote and remote is
// set, for the caller to put bytes in and publish. took says that it was Remote
// and now has one of the caller's rooms.
//
// A pull may fill a chunk that went from Pulling back to Remote meanwhile
// (another request for it failed): no write can have been to it, since a chunk
// that was written stays local while pulls of it are on their way.
func (s *Syncer) claimFill(idx int64, remote bool) (ok, took bool) {
	for w := &s.words[idx]; ; {
		old := w.Load()
		if st := State(old & wordState); st > Pulling || st == Remote && !remote {
			return false, false
		}
		if w.CompareAndSwap(old, uint32(Filling)|old&wordWaited) {
			return true, State(old&wordState) == Remote
		}
	}
}

// publish ends Filling: chunks [lo, hi) are Local, or Remote again where the cache refused them.
func (s *Syncer) publish(lo, hi int64, ok bool) {
	to := uint32(Remote)
	if ok {
		to = uint32(Local)
		s.nLocal.Add(hi - lo)
	}
	for i := lo; i < hi; i++ {
		if s.words[i].Swap(to)&wordWaited != 0 {
			s.wake(i)
		}
	}
	switch {
	case !ok:
		s.leave(hi - lo)
	case s.bound != nil:
		s.bound.enqueue(lo, hi)
	}
}

// release gives chunks [lo, hi) back that were claimed with stamp and are still Pulling.
func (s *Syncer) release(lo, hi int64, stamp uint32) {
	for i := lo; i < hi; i++ {
		for w := &s.words[i]; ; {
			old := w.Load()
			if old&^(wordWaited|wordDemand) != uint32(Pulling)|stamp<<stampShift {
				break
			}
			if w.CompareAndSwap(old, uint32(Remote)) {
				s.leave(1)
				if old&wordWaited != 0 {
					s.wake(i)
				}
				break
			}
		}
	}
}

func (s *Syncer) wake(idx int64) {
	sh := &s.waits[idx%int64(len(s.waits))]
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if w := sh.m[idx]; w != nil {
		close(w.done)
		delete(sh.m, idx)
	}
}

// ensure pulls the chunks of [lo, hi) that nobody has asked for, as far as there
// is room, and returns once the first of them has been local, and without a
// Bound all of them. It returns the first error.
func (s *Syncer) ensure(ctx context.Context, lo, hi int64) error {
	for !s.present(lo, hi) {
		from, to, stamp, err := s.claimFor(ctx, lo, hi, s.maxExtent, s.State(lo) == Remote)
		if err != nil {
			return err
		}
		if from == lo && to == hi { // one request is all it takes
			if err := s.fetch(ctx, lo, hi, stamp); err != nil {
				return err
			}
			continue
		}
		var requests int
		errs := make(chan error)
		for from < to {
			go func(from, to int64, stamp uint32) { errs <- s.fetch(ctx, from, to, stamp) }(from, to, stamp)
			requests++
			from, to, stamp, _ = s.claimFor(ctx, to, hi, s.maxExtent, false)
		}
		if s.bound != nil {
			hi = lo + 1 // others may be gone again before all have come
		}
		for i := lo; i < hi && err == nil; i++ {
			err = s.await(ctx, i)
		}
		for range requests {
			err = errors.Join(err, <-errs)
		}
		if err != nil || s.bound != nil {
			return err
		}
	}
	return nil
}

// Pull returns once [off, off+n) was local, and asks for what is missing, as the
// class of ctx, a few requests at a time. It returns the first error. With a
// Bound, background pulls stop where there is no room; others wait for it.
func (s *Syncer) Pull(ctx context.Context, off, n int64) error {
	if err := s.check(off, n); err != nil || n == 0 {
		return err
	}
	const requests = 8
	lo, hi := s.span(off, n)
	for lo < hi && (region.ClassOf(ctx) == region.Demand || !s.full()) {
		to := min(lo+requests*s.maxExtent, hi)
		if err := s.ensure(ctx, lo, to); err != nil {
			return err
		}
		for lo < to && State(s.words[lo].Load()&wordState) == Local {
			lo++
		}
	}
	return nil
}

// Stats are counts since NewSyncer. Bytes are those of requests without an error.
type Stats struct {
	LocalRequests, LocalBytes       int64 // reads, views and writes of local chunks
	DemandRequests, DemandBytes     int64 // pulled for somebody who waits
	PrefetchRequests, PrefetchBytes int64 // pulled otherwise
	DroppedBytes                    int64 // pulled, but written or pulled by another meanwhile
	Repeated                        int64 // requests made again because the first took long
}

// Stats returns the counts so far.
func (s *Syncer) Stats() Stats {
	c := &s.stats
	return Stats{LocalRequests: c.localRequests.Load(), LocalBytes: c.localBytes.Load(),
		DemandRequests: c.demandRequests.Load(), DemandBytes: c.demandBytes.Load(),
		PrefetchRequests: c.prefetchRequests.Load(), PrefetchBytes: c.prefetchBytes.Load(),
		DroppedBytes: c.droppedBytes.Load(), Repeated: c.hedges.Load()}
}

// fetch reads chunks [lo, hi), claimed with stamp, from the remote store and
// fills in those that are still wanted. On an error it releases them.
func (s *Syncer) fetch(ctx context.Context, lo, hi int64, stamp uint32) error {
	n := s.at(hi) - s.at(lo)
	buf := s.buffer(n)
	defer s.bufs.Put(buf)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.ctx, cancel)()
	if s.bound != nil {
		defer s.bound.hold(&stretch{lo, hi})()
	}
	begun := time.Now()
	err := s.remote.ReadAt(ctx, (*buf)[:n], s.at(lo))
	if err == nil {
		recent, requests, bytes := &s.demandTime, &s.stats.demandRequests, &s.stats.demandBytes
		if region.ClassOf(ctx) != region.Demand {
			recent, requests, bytes = &s.prefetchTime, &s.stats.prefetchRequests, &s.stats.prefetchBytes
		}
		observe(recent, time.Since(begun))
		requests.Add(1)
		bytes.Add(n)
		if s.viewer != nil && region.ClassOf(ctx) != region.Demand {
			s.copying <- struct{}{}
			err = s.fill(ctx, lo, hi, (*buf)[:n])
			<-s.copying
		} else {
			err = s.fill(ctx, lo, hi, (*buf)[:n])
		}
	}
	if err != nil {
		s.release(lo, hi, stamp)
		if s.ctx.Err() != nil {
			err = region.ErrClosed
		}
		return fmt.Errorf("pull chunks %d to %d, %d bytes at %d: %w", lo, hi-1, n, s.at(lo), err)
	}
	return nil
}

// observe follows the time of requests: up at once, since a queue that fills
// makes each later than the one before, and down by an eighth of the difference.
func observe(recent *atomic.Int64, d time.Duration) {
	old := recent.Load()
	if int64(d) < old {
		d = time.Duration(old - (old-int64(d))/8)
	}
	recent.Store(int64(d)) // a lost update between two threads does no harm
}

func (s *Syncer) buffer(n int64) *[]byte {
	if b, ok := s.bufs.Get().(*[]byte); ok && int64(cap(*b)) >= n {
		return b
	}
	b := make([]byte, max(n, s.maxExtent<<s.shift))
	return &b
}

// fill puts the content of chunks [lo, hi) into the cache, but for chunks that are there.
func (s *Syncer) fill(ctx context.Context, lo, hi int64, p []byte) error {
	base := s.at(lo)
	for i := lo; i < hi; {
		j := i
		for ; j < hi; j++ {
			// One that went back to Remote has given its room back too.
			if ok, _ := s.claimFill(j, s.bound == nil); !ok {
				break
			}
		}
		if i == j {
			s.stats.droppedBytes.Add(s.at(i+1) - s.at(i))
			i++
			continue
		}
		err := s.local.WriteAt(ctx, p[s.at(i)-base:s.at(j)-base], s.at(i))
		s.publish(i, j, err == nil)
		if err != nil {
			return err
		}
		i = j
	}
	return nil
}

// await returns nil once chunk idx is neither Pulling nor Filling. It asks for
// the chunk a second time where the first request takes long.
func (s *Syncer) await(ctx context.Context, idx int64) error {
	w, old := s.enqueue(idx)
	if w == nil {
		return nil
	}
	var timer *time.Timer
	var late <-chan time.Time
	if State(old&wordState) == Pulling {
		timer = time.NewTimer(s.patience(old))
		defer timer.Stop()
		late = timer.C
	}
	var hedge <-chan error
	for {
		select {
		case <-w.done:
			return nil
		case <-late:
			if !s.maySpend() {
				timer.Reset(s.patience(old) + minBackoff)
				continue
			}
			var stop context.CancelFunc
			hedge, stop = s.hedge(ctx, idx, w)
			defer stop()
		case err := <-hedge:
			if err != nil {
				return err
			}
			hedge = nil // filled: done is closed or about to be
		case <-ctx.Done():
			return fmt.Errorf("wait for chunk %d at %d: %w", idx, s.at(idx), ctx.Err())
		case <-s.ctx.Done():
			return fmt.Errorf("wait for chunk %d at %d: %w", idx, s.at(idx), region.ErrClosed)
		}
	}
}

// enqueue returns the wait of chunk idx and its word, or nil if it is Local or Remote.
func (s *Syncer) enqueue(idx int64) (*wait, uint32) {
	sh := &s.waits[idx%int64(len(s.waits))]
	sh.mu.Lock()
	defer sh.mu.Unlock()
	for word := &s.words[idx]; ; {
		old := word.Load()
		if st := State(old & wordState); st == Local || st == Remote {
			return nil, 0
		}
		if old&wordWaited == 0 && !word.CompareAndSwap(old, old|wordWaited) {
			continue
		}
		w := sh.m[idx]
		if w == nil {
			w = &wait{done: make(chan struct{})}
			sh.m[idx] = w
		}
		return w, old
	}
}

// patience is how long to wait for the chunk with this word before asking again.
// A background request is given no time if it is so young that a demand request
// will overtake it; else requests are given until well beyond the time at which
// they are due, since asking twice costs bytes. While nothing is known of
// background requests, one chunk twice is a small price for the first bytes.
func (s *Syncer) patience(word uint32) time.Duration {
	age := time.Duration((s.stamp()-word>>stampShift)&stampMask) << stampUnit
	demand, due := time.Duration(s.demandTime.Load()), time.Duration(s.prefetchTime.Load())
	switch {
	case word&wordDemand != 0 && demand == 0:
		return time.Second
	case word&wordDemand != 0:
		due = demand
	case due == 0:
		return 2 * time.Millisecond
	case demand > 0 && due-age > demand*3/2+time.Millisecond:
		return 0
	}
	return 2*max(due-age, 0) + 2*demand + 10*time.Millisecond
}

// maySpend reports whether another repeated request keeps their bytes at no
// more than 1/64 of all, and a few chunks.
func (s *Syncer) maySpend() bool {
	pulled := s.stats.demandBytes.Load() + s.stats.prefetchBytes.Load()
	return s.stats.hedges.Load()<<s.shift <= pulled/64+4<<s.shift
}

// hedge asks for chunk idx again, once for all who wait for it. The request
// ends when stop is called; the channel gets its result.
func (s *Syncer) hedge(ctx context.Context, idx int64, w *wait) (<-chan error, context.CancelFunc) {
	sh := &s.waits[idx%int64(len(s.waits))]
	sh.mu.Lock()
	again := w.hedged
	w.hedged = true
	sh.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if again || s.closed {
		return nil, func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	ch := make(chan error, 1)
	s.hedges.Add(1)
	s.stats.hedges.Add(1)
	go func() {
		defer s.hedges.Done()
		err := s.fetch(ctx, idx, idx+1, stampMask) // a stamp that releases nothing, but for once in 4.9 h
		if err != nil {
			sh.mu.Lock()
			w.hedged = false
			sh.mu.Unlock()
		}
		ch <- err
	}()
	return ch, cancel
}
