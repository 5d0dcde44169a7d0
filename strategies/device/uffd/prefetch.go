package uffd

// follow notes a fault at page off, whose block is [lo, hi), and asks for more
// where its stream is sequential. held is the page's content where it is a trip
// page that was pulled. mu is held.
func (s *Server) follow(w *worker, off, lo, hi int64) (more bool, held []byte) {
	s.clock++
	oldest := &s.streams[0]
	for i := range s.streams {
		st := &s.streams[i]
		switch {
		case st.trip == off:
			s.trips.Add(1)
			if st.held {
				if s.viewer == nil {
					held = w.buf[:copy(w.buf, st.page)]
				} else if held, _ = s.viewer.View(off, min(s.page, s.size-off)); int64(len(held)) < s.page {
					held = nil // the short last page: read it again
				}
			}
			st.trip, st.held = -1, false
			return s.advance(i), held
		case st.next == lo:
			st.ahead = hi
			return s.advance(i), nil
		case st.from <= lo && lo < st.ahead:
			st.used = s.clock
			return false, nil // it has overtaken its own batch
		case st.used < oldest.used:
			oldest = st
		}
	}
	*oldest = stream{next: hi, from: lo, ahead: hi, trip: -1, page: oldest.page, used: s.clock}
	return false, nil
}

// advance asks for the next batch of stream i. mu is held.
func (s *Server) advance(i int) (more bool) {
	st := &s.streams[i]
	st.used = s.clock
	fa := s.o.FaultAround
	st.window = max(min(max(4*st.window, 2*fa, 64<<10), s.o.Window)/fa*fa, fa)
	lo, hi := st.ahead, min(st.ahead+st.window, s.length)
	if lo >= hi {
		return false
	}
	st.from = max(st.from, lo-st.window)
	st.next, st.ahead, st.trip, st.held = hi, hi, lo, false
	for ; lo < hi && s.jobLen < len(s.jobs); s.jobLen++ {
		j := job{lo: lo, hi: min(lo+s.o.Extent, hi), stream: -1}
		if lo == st.trip {
			j.stream = i
		}
		s.jobs[(s.jobHead+s.jobLen)%len(s.jobs)] = j
		lo = j.hi
	}
	return true
}

// pull does the background work until Close.
func (s *Server) pull(w *worker) {
	defer w.free()
	for {
		j, ok := s.nextJob()
		if !ok {
			return
		}
		for lo := j.lo; lo < j.hi; {
			a, b := s.claim(lo, j.hi)
			if a < b {
				s.pullRun(w, a, b, j)
			}
			lo = b
		}
	}
}

func (s *Server) nextJob() (job, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		switch {
		case s.stopping.Load():
			return job{}, false
		case s.jobLen > 0:
			j := s.jobs[s.jobHead]
			s.jobHead, s.jobLen = (s.jobHead+1)%len(s.jobs), s.jobLen-1
			return j, true
		case s.o.Prefetch == PrefetchAll:
			if s.cursor >= s.length {
				return job{}, false
			}
			j := job{s.cursor, min(s.cursor+s.o.Extent, s.length), -1}
			s.cursor = j.hi
			return j, true
		}
		s.work.Wait()
	}
}

// claim takes the first run of pages in [lo, hi) that nobody fills or filled.
// It returns (hi, hi) where there is none.
func (s *Server) claim(lo, hi int64) (int64, int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	free := func(off int64) bool { return !s.busy.get(off/s.page) && !s.filled.get(off/s.page) }
	for lo < hi && !free(lo) {
		lo += s.page
	}
	end := lo
	for end < hi && free(end) {
		end += s.page
	}
	s.busy.set(lo/s.page, end/s.page, true)
	return lo, end
}

// pullRun pulls and fills [lo, hi), which is claimed, and holds the trip page back.
func (s *Server) pullRun(w *worker, lo, hi int64, j job) {
	if s.stopping.Load() {
		s.release(lo, hi, false)
		return
	}
	data, err := s.read(w, lo, hi)
	if err == nil {
		s.pulls.Add(1)
		s.pullBytes.Add(hi - lo)
	}
	first := lo
	if err == nil && j.stream >= 0 && lo == j.lo {
		s.mu.Lock()
		if st := &s.streams[j.stream]; st.trip == lo { // nobody waits for it yet
			st.held = true
			copy(st.page, data)
			s.busy.set(lo/s.page, lo/s.page+1, false)
			first += s.page
		}
		s.mu.Unlock()
	}
	if err == nil && first < hi {
		err = s.fill(first, data[first-lo:])
	}
	s.release(first, hi, err == nil)
	if err != nil {
		// Who waits here faults again, and its own read finds out.
		s.fail(err)
		Wake(s.fd, s.base+uintptr(lo), hi-lo)
	}
}
