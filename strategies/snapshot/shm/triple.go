package shm

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"

	"memsync/strategies/region"
)

// The triple buffer. Client and host own a buffer each; the third is exchanged
// by one atomic swap of the middle word. The client publishes by swapping its
// buffer for the middle one, the host takes by doing the same: neither waits for
// the other. The buffer that a client gets is an older state, which it brings up to
// date from the one that it has just published and may still read. Of each chunk
// a buffer has the sequence at which it was last changed, so that the host knows what
// is new in it.

// tripleFiles is what both sides have.
type tripleFiles struct {
	l        Layout
	middle   *atomic.Uint64
	buffer   [3][]byte
	slot     [3][]byte // sequence, blob
	versions [3][]byte // 8 bytes a chunk
}

func newTripleFiles(l Layout, control, mem []byte) tripleFiles {
	f := tripleFiles{l: l, middle: clientWord(control, middleWord)}
	for b := range 3 {
		at := int64(b) * l.Stride()
		f.buffer[b] = mem[at : at+l.Size : at+l.Size]
		f.slot[b] = control[slotsAt+b*page : slotsAt+(b+1)*page]
		v := moreAt + int64(b)*l.versionsLength()
		f.versions[b] = control[v : v+l.versionsLength()]
	}
	return f
}

func (f *tripleFiles) extent(idx int64) (lo, hi int64) {
	return idx * f.l.Chunk, min((idx+1)*f.l.Chunk, f.l.Size)
}

// chunkSet is a set of chunks that can be listed and cleared in time of its members.
type chunkSet struct {
	has  []bool
	list []int64
}

func (s *chunkSet) add(idx int64) {
	if !s.has[idx] {
		s.has[idx] = true
		s.list = append(s.list, idx)
	}
}

func (s *chunkSet) clear() {
	for _, idx := range s.list {
		s.has[idx] = false
	}
	s.list = s.list[:0]
}

// TripleWriter is the client's side. One goroutine at a time.
type TripleWriter struct {
	tripleFiles
	back     int
	sequence uint64
	touched  chunkSet    // since the last publication
	stale    [3]chunkSet // of each buffer, what it lacks of the last publication
}

// NewTripleWriter returns the client's side of a formatted control file; mem has the three buffers.
func NewTripleWriter(l Layout, control, mem []byte) *TripleWriter {
	w := &TripleWriter{tripleFiles: newTripleFiles(l, control, mem), sequence: binary.LittleEndian.Uint64(control[56:])}
	n := region.Chunks(l.Size, l.Chunk)
	w.touched.has = make([]bool, n)
	for b := range w.stale {
		w.stale[b].has = make([]bool, n)
	}
	return w
}

// Mem is the client's buffer, until Publish: then it is another one.
func (w *TripleWriter) Mem() []byte { return w.buffer[w.back] }

// Touch says that [off, off+n) of Mem was or will be written before Publish.
func (w *TripleWriter) Touch(off, n int64) error {
	if err := region.CheckRange(off, n, w.l.Size); err != nil || n == 0 {
		return err
	}
	for idx := off / w.l.Chunk; idx*w.l.Chunk < off+n; idx++ {
		w.touched.add(idx)
	}
	return nil
}

// Write stores p at off.
func (w *TripleWriter) Write(p []byte, off int64) error {
	if err := w.Touch(off, int64(len(p))); err != nil {
		return err
	}
	copy(w.Mem()[off:], p)
	return nil
}

// Publish makes the buffer a state, with blob, and returns its sequence. It takes
// time for the chunks that changed since the buffer that it gets was last its own.
func (w *TripleWriter) Publish(blob []byte) (uint64, error) {
	if len(blob) > MaxBlob {
		return 0, fmt.Errorf("blob of %d bytes; the limit is %d: %w", len(blob), MaxBlob, region.ErrOutOfRange)
	}
	w.sequence++
	last := w.back
	le := binary.LittleEndian
	le.PutUint64(w.slot[last], w.sequence)
	putBlob(w.slot[last][8:], blob)
	for _, idx := range w.touched.list {
		le.PutUint64(w.versions[last][8*idx:], w.sequence)
		for b := range w.stale {
			if b != last {
				w.stale[b].add(idx)
			}
		}
	}
	w.touched.clear()
	got := w.middle.Swap(uint64(last) | fresh)
	w.back = int(got & 3)
	if w.back > 2 || w.back == last {
		return 0, fmt.Errorf("the middle word is %#x: %w", got, region.ErrMismatch)
	}
	s := &w.stale[w.back]
	for _, idx := range s.list {
		lo, hi := w.extent(idx)
		copy(w.buffer[w.back][lo:hi], w.buffer[last][lo:hi])
		copy(w.versions[w.back][8*idx:8*idx+8], w.versions[last][8*idx:8*idx+8])
	}
	s.clear()
	return w.sequence, nil
}

// TripleReader is the host's side. One goroutine at a time.
type TripleReader struct {
	tripleFiles
	front int
	have  []uint64 // of each chunk, the version that was saved
}

// NewTripleReader returns the host's side before the client has started; all that
// is in the buffers counts as saved.
func NewTripleReader(l Layout, control, mem []byte) *TripleReader {
	return &TripleReader{tripleFiles: newTripleFiles(l, control, mem), front: 2, have: make([]uint64, region.Chunks(l.Size, l.Chunk))}
}

// Take takes the last state that was published; fresh is false where there is none since.
func (r *TripleReader) Take() (isFresh bool, err error) {
	if r.middle.Load()&fresh == 0 {
		return false, nil
	}
	got := r.middle.Swap(uint64(r.front))
	b := int(got & 3)
	if b > 2 || b == r.front || got&^7 != 0 {
		return false, fmt.Errorf("the middle word is %#x, and buffer %d is the host's: %w", got, r.front, region.ErrMismatch)
	}
	r.front = b
	return got&fresh != 0, nil
}

// State returns sequence and blob of the state that was taken.
func (r *TripleReader) State() (sequence uint64, blob []byte, err error) {
	blob, err = getBlob(r.slot[r.front][8:])
	return binary.LittleEndian.Uint64(r.slot[r.front]), blob, err
}

// Changed calls save for each chunk of the state that was not saved yet. p is
// the client's memory, which is not written to until the next Take.
func (r *TripleReader) Changed(save func(p []byte, off int64) error) error {
	for idx := range r.have {
		if r.version(idx) != r.have[idx] {
			lo, hi := r.extent(int64(idx))
			if err := save(r.buffer[r.front][lo:hi], lo); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r *TripleReader) version(idx int) uint64 {
	return binary.LittleEndian.Uint64(r.versions[r.front][8*idx:])
}

// Saved says that all of the state was saved.
func (r *TripleReader) Saved() {
	for idx := range r.have {
		r.have[idx] = r.version(idx)
	}
}
