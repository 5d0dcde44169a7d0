package uffd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// Prefetch says what a Server pulls before it is asked for.
type Prefetch uint8

// PrefetchNone: nothing. PrefetchSequential: ahead of readers that go forward,
// in batches that grow from twice FaultAround to Window. PrefetchAll: the whole
// region in order, from the start on.
const (
	PrefetchNone Prefetch = iota
	PrefetchSequential
	PrefetchAll
)

// Options of a Server. Sizes are bytes.
//
// Poll is how long a handler looks for the next fault before it sleeps, which
// saves a wake-up but burns its CPU. It does so only where the thread that
// faulted is pinned to CPUs that the handler may not use (else the two would
// compete, or be kept from sharing a CPU, where a wake-up costs a third), and
// where it has paid lately. That takes UFFD_FEATURE_THREAD_ID and Linux 6.10.
type Options struct {
	PageSize    int64         // of the mapping, a power of two; 0 means the MMU's
	FaultAround int64         // a fault fills the aligned block of this size; a multiple of PageSize; 0 means PageSize
	Handlers    int           // threads that answer faults; 0 means 1
	Poll        time.Duration // see above; 0 means never
	Deadline    time.Duration // of each read of the store, 12 % late at most; 0 means 30 s
	Prefetch    Prefetch
	Window      int64    // most bytes ahead of a sequential reader; 0 means 4 MiB
	Extent      int64    // of one background pull; a multiple of PageSize; 0 means 256 KiB (2 MiB where the store is a region.Viewer)
	Copiers     int      // background pulls in flight; 0 means 16 (2 where the store is a region.Viewer)
	Memfd       *os.File // not nil: fill by writing this file and UFFDIO_CONTINUE; stays the caller's
}

// Stats of a Server: counts and bytes since it was started.
type Stats struct {
	Faults                    int64 // events read
	Coalesced                 int64 // of these, answered by a fill that was under way
	Trips                     int64 // of these, on a page held back to pace the prefetch
	Fills, FillBytes          int64 // for faults
	Prefetches, PrefetchBytes int64 // in the background
	Errors                    int64 // reads of the store that failed
	Resident                  int64 // bytes filled so far
}

// Server answers the page faults of another process's mapping from a
// region.Store. Use Serve to make one; all methods may be called concurrently.
type Server struct {
	events
	size    int64 // of the store
	o       Options
	store   region.Store
	viewer  region.Viewer // nil where the store has none
	closing sync.Once

	coalesced, trips, errs                   atomic.Int64
	fills, fillBytes, pulls, pullBytes, live atomic.Int64

	mu      sync.Mutex
	work    sync.Cond // of mu: there are jobs, or the end
	busy    bitmap    // pages that somebody is filling
	filled  bitmap    // pages that were filled
	suspect bitmap    // filled pages on which a fault was seen since
	jobs    []job     // ring
	jobHead int
	jobLen  int
	cursor  int64 // PrefetchAll: next offset to pull
	streams [8]stream
	clock   uint64
	closed  error // what Close returned
}

type job struct {
	lo, hi int64
	stream int // whose trip page is at lo, or -1
}

// stream is a reader that goes forward. The first page of its newest batch, the
// trip page, is pulled but not filled: the fault that it causes says that the
// reader has come so far, and the next batch is pulled. (The kernel's page
// cache marks a page, PG_readahead, to the same end.)
type stream struct {
	next   int64 // where the next fault of a sequential reader falls
	from   int64 // start of the newest two batches; faults in [from, ahead) are of this stream
	ahead  int64 // end of the newest batch
	window int64 // size of the newest batch; 0 for a stream of one fault
	used   uint64
	trip   int64 // offset of the trip page, -1 for none
	held   bool  // its content is in page
	page   []byte
}

// Serve answers the faults of the mapping at base, which its process registered
// with uffd for missing (and, with Memfd, minor) faults, until Close. The
// mapping is store.Size() long, rounded up to pages; what exceeds the store
// reads as zeroes. Serve takes uffd over, also where it fails.
// It starts Handlers locked threads, which read the store themselves, and for
// a prefetch Copiers goroutines; the store must stand concurrent reads. With
// Viewer, bytes go from the store to the process without a copy in between.
//
// A page whose read fails or exceeds the deadline raises SIGBUS in the process
// that touches it (UFFDIO_POISON, Linux 6.6), with all of its block.
// The caller must not have the region mapped (docs/deadlocks.md, case 1).
// Errors: region.ErrOutOfRange for wrong sizes, or the system call's.
func Serve(uffd *os.File, base uintptr, store region.Store, o Options) (*Server, error) {
	s := &Server{events: events{uffd: uffd, fd: int(uffd.Fd()), base: base}, size: store.Size(), store: store, o: o}
	if err := s.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("serve faults of %d bytes: %w", store.Size(), err), s.Close())
	}
	return s, nil
}

// InMemory reports whether a Server copies from where the store has its bytes.
func InMemory(store region.Store) bool {
	v, ok := store.(region.Viewer)
	if !ok || store.Size() == 0 {
		return false
	}
	_, ok = v.View(0, 1)
	return ok
}

func (s *Server) open() error {
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.answer = s.fault
	s.work.L = &s.mu
	o := &s.o
	if InMemory(s.store) {
		s.viewer = s.store.(region.Viewer)
	}
	local := s.viewer != nil
	s.page = or(o.PageSize, region.PageSize())
	o.FaultAround = or(o.FaultAround, s.page)
	o.Handlers = or(o.Handlers, 1)
	o.Deadline = or(o.Deadline, 30*time.Second)
	s.polling, s.deadline = o.Poll, o.Deadline
	o.Window = or(o.Window, 4<<20)
	o.Extent = max(s.page, or(o.Extent, pick(local, int64(2<<20), 256<<10)))
	o.Copiers = or(o.Copiers, pick(local, 2, 16))
	s.length = region.RoundUp(s.size, s.page)
	if err := region.CheckChunk(s.page); err != nil {
		return err
	}
	if s.size <= 0 || s.base%uintptr(s.page) != 0 || o.FaultAround%s.page != 0 || o.Extent%s.page != 0 ||
		min(o.FaultAround, o.Extent, o.Window) < 0 || min(o.Handlers, o.Copiers) < 0 {
		return fmt.Errorf("page %d, fault-around %d, extent %d, window %d, %d handlers, %d copiers: %w",
			s.page, o.FaultAround, o.Extent, o.Window, o.Handlers, o.Copiers, region.ErrOutOfRange)
	}
	if err := unix.SetNonblock(s.fd, false); err != nil {
		return os.NewSyscallError("fcntl", err)
	}
	pages := s.length / s.page
	s.busy, s.filled, s.suspect = newBitmap(pages), newBitmap(pages), newBitmap(pages)
	for i := range s.streams {
		s.streams[i] = stream{next: -1, trip: -1}
		if o.Prefetch == PrefetchSequential && !local {
			s.streams[i].page = make([]byte, s.page)
		}
	}
	s.streams[0].next = 0 // a reader that starts at the start is sequential at once
	if o.Prefetch == PrefetchSequential {
		s.jobs = make([]job, len(s.streams)*int(o.Window/o.Extent+2))
	}
	var workers []*worker
	copiers := o.Copiers
	if o.Prefetch == PrefetchNone {
		copiers = 0
	}
	for i := range o.Handlers + copiers {
		class, buf := region.Demand, o.FaultAround
		if i >= o.Handlers {
			class, buf = region.Prefetch, o.Extent
		}
		w, err := s.newWorker(class, buf)
		if err != nil {
			for _, w := range workers {
				w.free()
			}
			return err
		}
		workers = append(workers, w)
	}
	s.start(workers[:o.Handlers], workers[o.Handlers:]...)
	for _, w := range workers[o.Handlers:] {
		s.threads.Go(func() { s.pull(w) })
	}
	return nil
}

func or[T comparable](v, standard T) T {
	var zero T
	if v == zero {
		return standard
	}
	return v
}

func pick[T any](c bool, a, b T) T {
	if c {
		return a
	}
	return b
}

// fault answers one event.
func (s *Server) fault(w *worker, off int64, _ *Msg) {
	lo := off - off%s.o.FaultAround
	hi := min(lo+s.o.FaultAround, s.length)

	s.mu.Lock()
	more := false
	var held []byte
	if s.o.Prefetch == PrefetchSequential {
		more, held = s.follow(w, off, lo, hi)
	}
	page := off / s.page
	switch {
	case s.busy.get(page): // its fill wakes this waiter too
		s.mu.Unlock()
		s.coalesced.Add(1)
	case s.filled.get(page) && s.suspect.set(page, page+1, true) == 1:
		// The event was read after the fill that woke its thread, or the thread gave
		// the page back (MADV_DONTNEED). Then it faults again.
		s.mu.Unlock()
		s.coalesced.Add(1)
		Wake(s.fd, s.base+uintptr(off), s.page)
	default:
		if held != nil || s.filled.get(page) {
			lo, hi = off, off+s.page // only this page is known to be wanted
		} else {
			lo, hi = s.around(off, lo, hi)
		}
		s.busy.set(lo/s.page, hi/s.page, true)
		s.suspect.set(page, page+1, false)
		s.mu.Unlock()
		if s.viewer == nil && held == nil || hi-lo > quick { // it may take long: another handler's turn
			s.yield(w)
		}
		s.demand(w, lo, hi, held)
	}
	if more {
		s.work.Broadcast()
	}
}

func (s *Server) demand(w *worker, lo, hi int64, held []byte) {
	data, err := held, error(nil)
	if data == nil {
		data, err = s.read(w, lo, hi)
	}
	if err == nil {
		s.fills.Add(1)
		s.fillBytes.Add(hi - lo)
		err = s.fill(lo, data)
	}
	s.release(lo, hi, err == nil)
	if err != nil {
		s.fail(err)
		if _, err := poison(s.fd, s.base+uintptr(lo), hi-lo, s.page); err != nil {
			s.fail(err)
		}
	}
}

// around returns the widest run of pages within [lo, hi) that holds off and
// nothing that is filled or being filled. mu is held.
func (s *Server) around(off, lo, hi int64) (int64, int64) {
	free := func(off int64) bool { return !s.busy.get(off/s.page) && !s.filled.get(off/s.page) }
	a, b := off, off+s.page
	for a > lo && free(a-s.page) {
		a -= s.page
	}
	for b < hi && free(b) {
		b += s.page
	}
	return a, b
}

// release ends the claim on [lo, hi).
func (s *Server) release(lo, hi int64, ok bool) {
	s.mu.Lock()
	s.busy.set(lo/s.page, hi/s.page, false)
	if ok {
		s.live.Add(s.filled.set(lo/s.page, hi/s.page, true) * s.page)
	}
	s.mu.Unlock()
}

// read returns the content of [lo, hi), zero-padded beyond the store's end:
// a view, or w.buf.
func (s *Server) read(w *worker, lo, hi int64) ([]byte, error) {
	if s.viewer != nil && hi <= s.size {
		if p, ok := s.viewer.View(lo, hi-lo); ok {
			return p, nil
		}
	}
	n := min(hi, s.size) - lo
	err := s.lend(w, func(ctx context.Context) error { return s.store.ReadAt(ctx, w.buf[:n], lo) })
	if err != nil {
		s.errs.Add(1)
		return nil, fmt.Errorf("fill %d bytes at %d: %w", hi-lo, lo, err)
	}
	clear(w.buf[n : hi-lo])
	return w.buf[:hi-lo], nil
}

// fill puts data at lo and wakes who waits. Pages that are there already stay.
func (s *Server) fill(lo int64, data []byte) error {
	if s.o.Memfd != nil {
		for off := 0; off < len(data); {
			n, err := unix.Pwrite(int(s.o.Memfd.Fd()), data[off:], lo+int64(off))
			if err != nil && err != unix.EINTR {
				return fmt.Errorf("write %d bytes at %d of the memfd: %w", len(data)-off, lo+int64(off), err)
			}
			off += max(n, 0)
		}
	}
	_, err := s.put(lo, int64(len(data)), func(at uintptr, done int64) (int64, unix.Errno) {
		if s.o.Memfd != nil {
			return Continue(s.fd, at, int64(len(data))-done, 0)
		}
		return Copy(s.fd, at, data[done:], 0)
	})
	if errors.Is(err, region.ErrPeerGone) {
		return nil // nobody is left who could see these pages
	}
	return err
}

// Stats returns the counters.
func (s *Server) Stats() Stats {
	return Stats{Faults: s.faults.Load(), Coalesced: s.coalesced.Load(), Trips: s.trips.Load(),
		Fills: s.fills.Load(), FillBytes: s.fillBytes.Load(), Prefetches: s.pulls.Load(), PrefetchBytes: s.pullBytes.Load(),
		Errors: s.errs.Load(), Resident: s.live.Load()}
}

// Local reports whether bytes come from a region.Viewer without a copy.
func (s *Server) Local() bool { return s.viewer != nil }

// Close ends reads of the store, handlers and prefetch, makes what was not
// filled raise SIGBUS in a process that still has the mapping, and closes the
// userfaultfd. It returns once all threads have ended, which takes as long as
// the store needs to end a read whose context has ended. It may be called twice.
func (s *Server) Close() error {
	s.closing.Do(func() {
		s.closed = s.close(func() {
			s.mu.Lock()
			s.work.Broadcast()
			s.mu.Unlock()
		})
	})
	return s.closed
}
