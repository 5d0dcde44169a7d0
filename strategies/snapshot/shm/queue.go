package shm

import (
	"encoding/binary"
	"fmt"

	"memsync/strategies/region"
)

// The queue. The stream is a ring of records, at positions that only grow: stores,
// and marks, up to which the stores before make a complete state. The client
// appends its stores, then a mark, then moves `published` behind it, and only
// then puts the stores into the region. So the region and the stream behind
// `applied` together always give the last complete state, whenever the client is killed.
//
// The host maps both read-only. It copies what is new in the stream, and counts the copy
// only if `reserved`, which the client moves before it writes, shows that none of it
// was being overwritten meanwhile. If it was, the host is starved: it copies the region as
// it is, which is then brought to one state by the stream from before the copy on.
// The client never waits.

// record is a store (at is an offset) or a mark (at is a sequence, data the blob).
type record struct {
	kind uint32
	at   uint64
	data []byte
}

const (
	kindStore = 1
	kindMark  = 2

	recordHead = 16
	markMax    = recordHead + (MaxBlob+7)&^7
)

func recordLength(n int) uint64 { return recordHead + uint64(n+7)&^7 }

// ringCopy copies p to position at of the ring.
func ringPut(ring []byte, at uint64, p []byte) {
	at %= uint64(len(ring))
	n := copy(ring[at:], p)
	copy(ring, p[n:])
}

func ringGet(p, ring []byte, at uint64) {
	at %= uint64(len(ring))
	n := copy(p, ring[at:])
	copy(p[n:], ring)
}

// putRecord writes a record and returns its length.
func putRecord(ring []byte, at uint64, r record) uint64 {
	var h [recordHead]byte
	binary.LittleEndian.PutUint32(h[:], r.kind)
	binary.LittleEndian.PutUint32(h[4:], uint32(len(r.data)))
	binary.LittleEndian.PutUint64(h[8:], r.at)
	ringPut(ring, at, h[:])
	ringPut(ring, at+recordHead, r.data)
	return recordLength(len(r.data))
}

// nextRecord takes the first record off b, which is of a region of size bytes.
func nextRecord(b []byte, size int64) (r record, rest []byte, err error) {
	if len(b) < recordHead {
		return r, nil, fmt.Errorf("the stream ends within a record: %w", region.ErrMismatch)
	}
	n := binary.LittleEndian.Uint32(b[4:])
	r = record{kind: binary.LittleEndian.Uint32(b), at: binary.LittleEndian.Uint64(b[8:])}
	length := recordLength(int(n))
	if length > uint64(len(b)) {
		return r, nil, fmt.Errorf("a record of %d bytes in a stream with %d left: %w", length, len(b), region.ErrMismatch)
	}
	r.data = b[recordHead : recordHead+int(n)]
	switch r.kind {
	case kindStore:
		if err := region.CheckRange(int64(r.at&(1<<63-1)), int64(n), size); err != nil || r.at>>63 != 0 {
			return r, nil, fmt.Errorf("a store of %d bytes at %d: %w: %w", n, r.at, region.ErrOutOfRange, region.ErrMismatch)
		}
	case kindMark:
		if n > MaxBlob {
			return r, nil, fmt.Errorf("a blob of %d bytes; the limit is %d: %w", n, MaxBlob, region.ErrMismatch)
		}
	default:
		return r, nil, fmt.Errorf("a record of kind %d: %w", r.kind, region.ErrMismatch)
	}
	return r, b[length:], nil
}

// QueueWriter is the client's side. One goroutine at a time.
type QueueWriter struct {
	control, mem, ring []byte
	start, pos         uint64 // of the state in the making
	reserved           uint64 // most that was ever written up to
	sequence           uint64
}

// NewQueueWriter returns the client's side of a formatted control file; mem is the region.
func NewQueueWriter(l Layout, control, mem []byte) *QueueWriter {
	w := &QueueWriter{control: control, mem: mem[:l.Size], ring: control[moreAt : moreAt+l.Stream]}
	w.pos = clientWord(control, publishedWord).Load()
	w.start, w.reserved, w.sequence = w.pos, w.pos, binary.LittleEndian.Uint64(control[56:])
	return w
}

// Limit is how many bytes of stores a state may have, each with 16 more and in
// whole words: what the stream holds beside two marks.
func (w *QueueWriter) Limit() int64 { return int64(len(w.ring)) - 2*markMax }

// Write stores p at off with the next publication. The region has it afterwards.
func (w *QueueWriter) Write(p []byte, off int64) error {
	if err := region.CheckRange(off, int64(len(p)), int64(len(w.mem))); err != nil {
		return err
	}
	n := recordLength(len(p))
	if w.pos+n-w.start > uint64(w.Limit()) {
		return fmt.Errorf("store of %d bytes: a state may have stores of %d bytes, and this one has %d: publish more often, or have a larger stream: %w",
			len(p), w.Limit(), w.pos-w.start, region.ErrOutOfRange)
	}
	w.put(n, record{kindStore, uint64(off), p})
	return nil
}

func (w *QueueWriter) put(n uint64, r record) {
	// Said first: a host that reads what was here sees that it is no more.
	w.reserved = max(w.reserved, w.pos+n)
	clientWord(w.control, reservedWord).Swap(w.reserved)
	w.pos += putRecord(w.ring, w.pos, r)
}

// Publish makes the stores since the last one a state, with blob, and returns its sequence.
func (w *QueueWriter) Publish(blob []byte) (uint64, error) {
	if len(blob) > MaxBlob {
		return 0, fmt.Errorf("blob of %d bytes; the limit is %d: %w", len(blob), MaxBlob, region.ErrOutOfRange)
	}
	mark := w.pos
	w.sequence++
	w.put(recordLength(len(blob)), record{kindMark, w.sequence, blob})
	clientWord(w.control, publishedWord).Swap(w.pos)
	for at := w.start; at < mark; {
		var h [recordHead]byte
		ringGet(h[:], w.ring, at)
		n, off := binary.LittleEndian.Uint32(h[4:]), binary.LittleEndian.Uint64(h[8:])
		ringGet(w.mem[off:off+uint64(n)], w.ring, at+recordHead)
		at += recordLength(int(n))
	}
	clientWord(w.control, appliedWord).Swap(mark)
	w.start = w.pos
	return w.sequence, nil
}

// Abort forgets the stores since the last publication.
func (w *QueueWriter) Abort() { w.pos = w.start }

// QueueReader is the host's side: it follows the stream into a copy of its own.
// One goroutine at a time.
type QueueReader struct {
	Sequence uint64
	Blob     []byte

	l            Layout
	control, mem []byte
	ring         []byte
	copy         []byte // of the region, in the last state
	changed      func(off, n int64)
	pos          uint64
	lost         bool
	buf          []byte
}

// NewQueueReader returns the host's side before the client has started: own is a
// copy of the region as it is now. changed is called for each range of own that changes.
func NewQueueReader(l Layout, control, mem, own []byte, changed func(off, n int64)) (*QueueReader, error) {
	r := &QueueReader{l: l, control: control, mem: mem[:l.Size], ring: control[moreAt : moreAt+l.Stream], copy: own[:l.Size], changed: changed}
	var err error
	r.Sequence, r.Blob, err = Restored(control)
	r.pos = clientWord(control, publishedWord).Load()
	return r, err
}

// Poll brings the copy to the last state that is published. moved reports
// whether that is another one. starved reports that the client was faster: the copy
// has no state then until a later Poll succeeds. An error is a client that broke the protocol.
func (r *QueueReader) Poll() (moved, starved bool, err error) {
	from := r.pos
	if r.lost {
		from = clientWord(r.control, appliedWord).Load()
		copy(r.copy, r.mem)
		r.changed(0, r.l.Size)
	}
	to := clientWord(r.control, publishedWord).Load()
	if to == from {
		return false, false, nil
	}
	n := to - from
	if from > to || n > uint64(len(r.ring)) {
		if from > to {
			return false, false, fmt.Errorf("the stream went back from %d to %d: %w", from, to, region.ErrMismatch)
		}
		r.lost = true
		return false, true, nil
	}
	if uint64(cap(r.buf)) < n {
		r.buf = make([]byte, n)
	}
	b := r.buf[:n]
	ringGet(b, r.ring, from)
	if reserved := clientWord(r.control, reservedWord).Load(); reserved-from > uint64(len(r.ring)) {
		r.lost = true
		return false, true, nil
	}
	for len(b) > 0 {
		rec, rest, err := nextRecord(b, r.l.Size)
		if err != nil {
			return false, false, fmt.Errorf("the client's stream at %d: %w", to-uint64(len(b)), err)
		}
		b = rest
		if rec.kind == kindStore {
			copy(r.copy[rec.at:], rec.data)
			r.changed(int64(rec.at), int64(len(rec.data)))
			if len(b) == 0 {
				return false, false, fmt.Errorf("the client's stream is published without a mark: %w", region.ErrMismatch)
			}
			continue
		}
		r.Sequence, r.Blob = rec.at, append(r.Blob[:0:0], rec.data...)
	}
	r.pos, r.lost = to, false
	return true, false, nil
}
