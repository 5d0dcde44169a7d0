package torture

import (
	"bytes"
	"fmt"
	"sync"

	"memsync/strategies/region"
)

// model is a plain byte slice and the writes that may have changed it since: it
// knows what each byte may be. A byte is of a write that had begun, and that no other
// one superseded which had been answered before the look began. A write that was
// answered with an error may have been made or not, in part or all of it.
// All methods may be called concurrently.
type model struct {
	seed   uint64
	mu     sync.Mutex
	clock  int64
	base   []byte
	writes []*write // in the order in which they began
}

type write struct {
	id         uint64
	off, end   int64
	start      int64
	returned   int64 // 0: still under way
	incomplete bool  // it returned an error
}

func newModel(seed uint64, size int64) *model {
	m := &model{seed: seed, base: make([]byte, size)}
	m.content(0).Fill(m.base, 0)
	return m
}

// content is what a write puts where it writes.
func (m *model) content(id uint64) region.Content {
	return region.Content{Seed: m.seed, Generation: id}
}

// now returns a moment, for check.
func (m *model) now() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.clock++
	return m.clock
}

// begin notes a write and returns its bytes.
func (m *model) begin(id uint64, off, n int64) (*write, []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.clock++
	w := &write{id: id, off: off, end: off + n, start: m.clock}
	m.writes = append(m.writes, w)
	p := make([]byte, n)
	m.content(id).Fill(p, off)
	return w, p
}

// end notes what became of a write.
func (m *model) end(w *write, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.clock++
	w.returned, w.incomplete = m.clock, err != nil
}

// doubt makes all that was written since the last restart what may be or not: so it
// is where the kernel could not write pages back, which tells whoever flushes
// next, once, and forgets them.
func (m *model) doubt() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, w := range m.writes {
		w.incomplete = true
	}
}

// superseded reports whether w cannot be seen at x by a look that began at from.
// nil is the base.
func (m *model) superseded(w *write, x, from int64) bool {
	for _, v := range m.writes {
		if x >= v.off && x < v.end && v.returned != 0 && !v.incomplete && v.returned < from && (w == nil || w.returned != 0 && v.start > w.returned) {
			return true
		}
	}
	return false
}

// check returns an error unless p may be the bytes at off for somebody who looked
// at them, at once or several times, between the moment from and now.
func (m *model) check(p []byte, off, from int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	// Between two ends of writes all bytes have the same candidates.
	for lo := int64(0); lo < int64(len(p)); {
		hi := int64(len(p))
		for _, w := range m.writes {
			for _, edge := range []int64{w.off - off, w.end - off} {
				if edge > lo && edge < hi {
					hi = edge
				}
			}
		}
		if err := m.checkRun(p[lo:hi], off+lo, from); err != nil {
			return err
		}
		lo = hi
	}
	return nil
}

func (m *model) checkRun(p []byte, off, from int64) error {
	var may [][]byte
	if !m.superseded(nil, off, from) {
		may = append(may, m.base[off:off+int64(len(p))])
	}
	for _, w := range m.writes {
		if off >= w.off && off < w.end && !m.superseded(w, off, from) {
			b := make([]byte, len(p))
			m.content(w.id).Fill(b, off)
			may = append(may, b)
		}
	}
	for _, b := range may {
		if bytes.Equal(p, b) {
			return nil
		}
	}
	for i := range p { // of several writes side by side, perhaps
		ok := false
		for _, b := range may {
			ok = ok || b[i] == p[i]
		}
		if !ok {
			return fmt.Errorf("byte at %d is %#x, which is %s; it may be that of %d writes: %w", off+int64(i), p[i], m.whose(p[i:], off+int64(i)), len(may), region.ErrMismatch)
		}
	}
	return nil
}

// whose says where bytes are from.
func (m *model) whose(p []byte, off int64) string {
	n := min(len(p), 8)
	if bytes.Equal(p[:n], m.base[off:off+int64(n)]) {
		return "that of before all writes since the last restart"
	}
	b := make([]byte, n)
	for i := len(m.writes) - 1; i >= 0; i-- {
		w := m.writes[i]
		m.content(w.id).Fill(b, off)
		if bytes.Equal(p[:n], b) {
			state := "answered"
			if w.incomplete {
				state = "failed"
			} else if w.returned == 0 {
				state = "under way"
			}
			return fmt.Sprintf("that of write %d to [%d, %d), which is %s, from moment %d to %d", w.id, w.off, w.end, state, w.start, w.returned)
		}
	}
	if bytes.Count(p[:n], []byte{0}) == n {
		return "zero"
	}
	return "of no write"
}

// settle makes p all that is known: everything that was written has ended, for good
// or for bad, and what it may have left was checked. From now on only p counts.
func (m *model) settle(p []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.base = bytes.Clone(p)
	m.writes = nil
}
