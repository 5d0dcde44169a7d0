package hashsync

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"memsync/strategies/chunk"
	"memsync/strategies/delta"
	"memsync/strategies/hash"
	"memsync/strategies/region"
)

// errResized: the source's file has not the size any more that it was opened with.
var errResized = errors.New("the source was truncated or has grown")

// node is one copy of a region in the tree of copies: the source, a destination,
// or one that is both. Lock order: own, then mu.
type node struct {
	name     string
	patience time.Duration // how long a piece waits for a destination without room; 0 is for ever

	own         sync.Mutex // guards all down to joining, and the stale sets of sessions
	size, chunk int64
	f           hash.Func
	table       []byte // digests of the version that round is
	round       uint64
	stable      atomic.Uint64
	current     atomic.Uint64 // latest round that is complete here
	whole       *delta.Encoder
	read        func(ctx context.Context, p []byte, off int64) error

	stage, digests []byte // of the piece in hand
	joining        bool   // a destination was admitted and wants an end

	owner *owner // of a source; nil: a copy, which cannot be taken over

	kick chan struct{} // something to look at: room, a destination
	done chan struct{} // closed when the loop has ended; err is set

	mu       sync.Mutex
	cond     *sync.Cond // of mu: queues, acks, sessions, complete rounds
	sessions map[*session]bool
	err      error
	stats    Stats
}

// Stats counts what a node has done.
type Stats struct {
	Rounds      int64 // ended
	Candidates  int64 // bytes that the detection named
	Changed     int64 // bytes of chunks that had changed
	DeltaBytes  int64 // bodies of deltas, once whatever the number of destinations
	SentBytes   int64 // bodies queued, all destinations
	FilledBytes int64 // of region, sent whole to destinations that lacked them
	Mismatches  int64
	Detection   time.Duration // that the last look took
	Flushing    time.Duration // of that, to write the region back
	Arming      time.Duration // that the writers' mappings took to be armed, at the source
}

// session is one destination of a node, on a connection that it may share.
type session struct {
	id    uint16
	n     *node
	c     *serverConn
	stale *chunk.Set // chunks that it lacks

	admitting atomic.Bool   // what it has is being compared
	taking    atomic.Bool   // a request of the hand-over is being answered
	taker     atomic.Uint64 // handover.ID of who asked last; 0 is nobody

	// Guarded by n.mu.
	queue  [][]byte
	queued int // bytes
	acked  uint64
	gone   bool
}

// room is how many bytes may wait for a destination.
const room = 4 << 20

func newNode(name string, size, chunkSize int64, f hash.Func) (*node, error) {
	if err := checkChunk(chunkSize); err != nil {
		return nil, err
	}
	if size < 1 || size > maxSize || region.Chunks(size, chunkSize) > maxChunks {
		return nil, fmt.Errorf("region of %d bytes in chunks of %d: %w", size, chunkSize, region.ErrOutOfRange)
	}
	if !f.Portable {
		return nil, fmt.Errorf("digests of %s mean nothing to another process: %w", f.Name, region.ErrNotSupported)
	}
	n := &node{name: name, size: size, chunk: chunkSize, f: f, kick: make(chan struct{}, 1), done: make(chan struct{}), sessions: map[*session]bool{},
		stage: make([]byte, min(delta.MaxPiece, region.RoundUp(size, chunkSize))), table: make([]byte, region.Chunks(size, chunkSize)*int64(f.Size))}
	n.digests = make([]byte, len(n.stage)/int(chunkSize)*f.Size)
	n.cond = sync.NewCond(&n.mu)
	var err error
	n.whole, err = delta.NewEncoder(delta.Auto)
	return n, err
}

func (n *node) chunks() int64 { return region.Chunks(n.size, n.chunk) }

// extent is the byte range of chunks [lo, hi).
func (n *node) extent(lo, hi int64) (off, length int64) {
	off = lo * n.chunk
	return off, min(hi*n.chunk, n.size) - off
}

// perPiece is how many chunks a piece has at most.
func (n *node) perPiece() int64 { return int64(len(n.stage)) / n.chunk }

// digest is the digest of the whole region: SHA-256 of the digests of its chunks.
func (n *node) digest() [digestSize]byte { return sha256.Sum256(n.table) }

// sum fills n.digests for a piece and returns them.
func (n *node) sum(p []byte) []byte {
	k := 0
	for off := int64(0); off < int64(len(p)); off += n.chunk {
		n.f.Sum(n.digests[k:], p[off:min(off+n.chunk, int64(len(p)))])
		k += n.f.Size
	}
	return n.digests[:k]
}

// check is what tells a piece that was damaged, or that belongs elsewhere: the
// digest of its offset and of the digests of its chunks.
func (n *node) check(off int64, digests []byte) (c [checkSize]byte) {
	d := make([]byte, max(n.f.Size, checkSize))
	n.f.Sum(d, append(binary.BigEndian.AppendUint64(nil, uint64(off)), digests...))
	copy(c[:], d)
	return c
}

func (n *node) entry(lo, hi int64) []byte {
	return n.table[lo*int64(n.f.Size) : hi*int64(n.f.Size)]
}

// publish queues the piece that begins at chunk lo: its delta (nil: it has not
// changed) for destinations that are equal so far, all of it for the others,
// where they lack it or it has changed.
func (n *node) publish(ctx context.Context, lo int64, p, digests, body []byte) {
	hi := lo + int64(len(digests)/n.f.Size)
	var diff, full []byte
	n.mu.Lock()
	defer n.mu.Unlock()
	for s := range n.sessions {
		b := &diff
		synced := s.stale.Count() == 0
		if !synced {
			b = &full
			if body == nil && !s.lacks(lo, hi) {
				continue
			}
		} else if body == nil {
			continue
		}
		if *b == nil {
			msg := piece{off: lo * n.chunk, n: len(p), check: n.check(lo*n.chunk, digests), body: body}
			if !synced {
				msg.body = n.whole.Encode(delta.Piece{New: p, Off: msg.off}, 0)
				n.stats.FilledBytes += int64(len(p))
			} else {
				n.stats.DeltaBytes += int64(len(body))
			}
			*b = frame{kind: frameDelta, round: n.round, body: msg.encode()}.encode(nil)
		}
		if s.offer(ctx, *b) {
			s.stale.Clear(lo, hi)
			n.stats.SentBytes += int64(len(*b))
		} else {
			s.stale.Mark(lo, hi)
		}
	}
}

func (s *session) lacks(lo, hi int64) bool {
	at, _, ok := s.stale.Next(lo, 1)
	return ok && at < hi
}

// offer queues a frame. Where there is no room it waits, but not for one that is
// slower than another, nor longer than the node's patience: it gets later what it
// missed. n.mu is held.
func (s *session) offer(ctx context.Context, b []byte) bool {
	var late bool
	if s.n.patience > 0 && s.queued > 0 && s.queued+len(b) > room {
		t := time.AfterFunc(s.n.patience, func() {
			s.n.mu.Lock()
			defer s.n.mu.Unlock()
			late = true
			s.n.cond.Broadcast()
		})
		defer t.Stop()
	}
	for s.queued > 0 && s.queued+len(b) > room {
		if s.gone || late || ctx.Err() != nil {
			return false
		}
		for o := range s.n.sessions {
			if o != s && !o.gone && o.queued == 0 && o.stale.Count() == 0 {
				return false
			}
		}
		s.n.cond.Wait()
	}
	if s.gone {
		return false
	}
	s.put(b)
	return true
}

// put queues a frame; the connection writes the session's number into it. n.mu is held.
func (s *session) put(b []byte) {
	s.queue = append(s.queue, b)
	s.queued += len(b)
	s.c.wake()
}

// fill sends what destinations lack: all where no other destination waits, else
// some, so that the others' rounds go on. It reports whether anything was sent and
// whether more is to be.
func (n *node) fill(ctx context.Context, emit func(lo, hi int64) error) (sent, more bool, err error) {
	others := n.patience > 0 // a relay's own rounds must go on
	for s := range n.list() {
		others = others || s.stale.Count() == 0
	}
	for s := range n.list() {
		for budget := int64(room); ; {
			lo, hi, ok := s.stale.Next(0, n.perPiece())
			if !ok {
				break
			}
			if err := ctx.Err(); err != nil {
				return sent, true, err
			}
			if n.left(s) {
				break
			}
			if others {
				if budget <= 0 || n.full(s) {
					more = true
					break
				}
				budget -= (hi - lo) * n.chunk
			}
			if err := emit(lo, hi); err != nil {
				return sent, more, err
			}
			sent = true
		}
	}
	return sent, more, nil
}

func (n *node) full(s *session) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return s.queued > room/2
}

func (n *node) left(s *session) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return s.gone
}

// list is a copy of the sessions.
func (n *node) list() map[*session]bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	m := make(map[*session]bool, len(n.sessions))
	for s := range n.sessions {
		m[s] = true
	}
	return m
}

// finish ends the round.
func (n *node) finish() {
	d := n.digest()
	n.joining = false
	n.mu.Lock()
	defer n.mu.Unlock()
	for s := range n.sessions {
		f := frame{kind: frameEnd, round: n.round, body: d[:]}
		if s.stale.Count() > 0 {
			f.flags, f.body = flagPartial, nil
		}
		s.put(f.encode(nil))
	}
	n.stats.Rounds++
	n.current.Store(n.round)
	n.cond.Broadcast()
}

// admit compares what a destination has (nil: nothing) with the table: at its
// beginning, and after a mismatch.
func (n *node) admit(s *session, prints []byte) {
	n.own.Lock()
	defer n.own.Unlock()
	size := n.f.Size
	for i := range n.chunks() {
		if k := int(i) * size; prints == nil || !bytes.Equal(prints[k:k+size], n.table[k:k+size]) {
			s.stale.Mark(i, i+1)
		} else {
			s.stale.Clear(i, i+1)
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if !s.gone {
		n.joining = true
		n.sessions[s] = true
		n.cond.Broadcast()
		n.look()
	}
}

// leave forgets a destination.
func (n *node) leave(s *session) {
	n.mu.Lock()
	defer n.mu.Unlock()
	s.gone = true
	delete(n.sessions, s)
	n.cond.Broadcast()
	n.look()
}

func (n *node) look() {
	select {
	case n.kick <- struct{}{}:
	default:
	}
}

// ack notes what a destination says of a round.
func (n *node) ack(s *session, round uint64, what byte) {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch what {
	case ackEqual:
		s.acked = max(s.acked, round)
	case ackMismatch:
		n.stats.Mismatches++
	}
	least := round
	for o := range n.sessions {
		least = min(least, o.acked)
	}
	if what == ackEqual && least > n.stable.Load() {
		n.stable.Store(least)
		for o := range n.sessions {
			o.put(frame{kind: frameStable, round: least}.encode(nil))
		}
	}
	n.cond.Broadcast()
}

// acknowledged waits until every destination that is there has round.
func (n *node) acknowledged(ctx context.Context, round uint64) error {
	return n.until(ctx, func() bool {
		for s := range n.sessions {
			if s.acked < round {
				return false
			}
		}
		return true
	})
}

// until waits for a condition on what n.mu guards, for the loop's end or ctx's.
func (n *node) until(ctx context.Context, ok func() bool) error {
	stop := context.AfterFunc(ctx, func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.cond.Broadcast()
	})
	defer stop()
	n.mu.Lock()
	defer n.mu.Unlock()
	for !ok() {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		select {
		case <-n.done:
			return errors.Join(n.err, region.ErrClosed)
		default:
		}
		n.cond.Wait()
	}
	return nil
}

// end is called when the loop ends.
func (n *node) end(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.err = err
	for s := range n.sessions {
		if err != nil {
			s.put(errorFrame(s.id, err).encode(nil))
		}
	}
	close(n.done)
	n.cond.Broadcast()
	n.whole.Close()
}

func (n *node) statistics() Stats {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.stats
}
