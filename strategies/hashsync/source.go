package hashsync

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"net"
	"slices"
	"sync/atomic"
	"time"

	"memsync/strategies/chunk"
	"memsync/strategies/delta"
	"memsync/strategies/dirty"
	"memsync/strategies/hash"
	"memsync/strategies/region"
)

// SourceOptions say how a source looks for changes.
type SourceOptions struct {
	Name     string
	Chunk    int64     // bytes; a power of two, 4 KiB to 1 MiB
	Hash     hash.Func // portable
	Workers  int       // that hash, at least 1
	Interval time.Duration
	Delta    delta.Mode
	// Detector says where to look; nil is everywhere. The source closes it.
	Detector dirty.Detector
	// Pages: the detector names pages, so that what it names has changed for
	// certain and is not hashed twice.
	Pages bool
	// Whole: one digest of everything first, and of chunks only where that one changed.
	Whole bool
	// Check is called before each round; an error ends the source. May be nil.
	Check func() error
	// Of a hand-over: rounds that are made right before the application is stopped;
	// how long it may take to stop (0 is 10 s); how long the last round may take, and
	// then the destination to commit (0 is 30 s).
	LeadRounds                    int
	SuspendTimeout, CommitTimeout time.Duration
}

// Source is the copy of a region that is written. It looks for changes every
// interval and sends them to all destinations. All methods may be called concurrently.
type Source struct {
	*node
	o      SourceOptions
	bytes  hash.Bytes
	enc    *delta.Encoder
	index  *delta.Index
	shadow []byte
	around []byte // the piece in hand, and a block less a byte at either side
	last   []byte // the digest of everything, with Whole
	fresh  []byte // table of a look at everything

	asked  chan chan uint64
	idle   atomic.Bool // does not look by itself
	cancel context.CancelFunc
}

// NewSource hashes all of b and begins to look. read copies bytes of the region
// while others may write them.
func NewSource(ctx context.Context, b hash.Bytes, read func(ctx context.Context, p []byte, off int64) error, o SourceOptions) (_ *Source, err error) {
	n, err := newNode(o.Name, b.Size(), o.Chunk, o.Hash)
	if err != nil {
		return nil, err
	}
	s := &Source{node: n, o: o, bytes: b, index: delta.NewIndex(b.Size()), asked: make(chan chan uint64), fresh: make([]byte, len(n.table))}
	n.read, n.owner = read, newOwner(s, o)
	if s.o.Workers < 1 {
		s.o.Workers = 1
	}
	if s.enc, err = delta.NewEncoder(o.Delta); err != nil {
		return nil, err
	}
	s.around = make([]byte, len(n.stage)+2*delta.Block)
	n.stage = s.around[:len(n.stage)] // of which only the size is used here
	if o.Delta == delta.Runs {
		s.shadow = make([]byte, b.Size())
	}
	if o.Detector != nil { // what is written from here on is reported later
		if err := o.Detector.Collect(ctx, func(int64, int64) {}); err != nil {
			return nil, err
		}
	}
	// Nobody has anything yet: note what is there, piece by piece.
	for lo := int64(0); lo < n.chunks(); lo += n.perPiece() {
		if err := s.emit(ctx, lo, min(lo+n.perPiece(), n.chunks())); err != nil {
			return nil, err
		}
	}
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	s.cancel = cancel
	go func() {
		err := s.loop(run)
		if run.Err() != nil {
			err = nil
		}
		s.enc.Close()
		n.end(err)
	}()
	return s, nil
}

// Close ends the loop; destinations stay as they are.
func (s *Source) Close() error {
	s.owner.close()
	s.cancel()
	s.mu.Lock()
	s.cond.Broadcast()
	s.mu.Unlock()
	<-s.done
	if s.o.Detector != nil {
		return errors.Join(s.err, s.o.Detector.Close())
	}
	return s.err
}

// Serve answers a connection of a destination.
func (s *Source) Serve(ctx context.Context, conn net.Conn) error {
	return serve(ctx, conn, func(name string, _ int64) (*node, error) {
		if name != s.name {
			return nil, fmt.Errorf("region %q: %w", name, region.ErrMissing)
		}
		return s.node, nil
	})
}

// Sync makes a round now and waits until every destination that is connected has
// it: all that was written before the call. It returns the round.
func (s *Source) Sync(ctx context.Context) (uint64, error) {
	r, err := s.now(ctx)
	if err != nil {
		return 0, err
	}
	return r, s.acknowledged(ctx, r)
}

// now makes a round now and returns it, without waiting for anybody to have it.
func (s *Source) now(ctx context.Context) (uint64, error) {
	answer := make(chan uint64, 1)
	select {
	case s.asked <- answer:
	case <-s.done:
		return 0, errors.Join(s.err, region.ErrClosed)
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
	select {
	case r := <-answer:
		return r, nil
	case <-s.done:
		return 0, errors.Join(s.err, region.ErrClosed)
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
}

// loop looks when it is time, when it is asked to, and when a destination wants more.
func (s *Source) loop(ctx context.Context) error {
	t := time.NewTimer(s.o.Interval)
	defer t.Stop()
	stop := context.AfterFunc(ctx, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.cond.Broadcast()
	})
	defer stop()
	more := false
	for {
		var answer chan uint64
		poll := false
		if more { // do not wait for anything
			select {
			case answer = <-s.asked:
			case <-t.C:
				poll = true
			case <-ctx.Done():
				return ctx.Err()
			case <-s.kick:
			}
		} else {
			select {
			case answer = <-s.asked:
			case <-t.C:
				poll = true
			case <-s.kick:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		var err error
		if more, err = s.cycle(ctx, poll && !s.idle.Load() && !s.owner.released.Load() || answer != nil, answer != nil); err != nil {
			return err
		}
		if answer != nil {
			answer <- s.round
		}
		if poll || answer != nil {
			t.Reset(s.o.Interval)
		}
	}
}

// cycle is one round: what changed, where it looks, and what destinations lack.
func (s *Source) cycle(ctx context.Context, look, force bool) (more bool, err error) {
	n := s.node
	n.own.Lock()
	defer n.own.Unlock()
	lacking := n.joining
	for o := range n.list() {
		lacking = lacking || o.stale.Count() > 0
	}
	if !look && !lacking {
		return false, nil
	}
	n.round++
	sent := force || n.joining
	emit := func(lo, hi int64) error { return s.emit(ctx, lo, hi) }
	if look {
		if s.o.Check != nil {
			if err := s.o.Check(); err != nil {
				return false, err
			}
		}
		set, err := s.changed(ctx)
		if err != nil {
			return false, err
		}
		pieces, err := s.pieces(ctx, set)
		if err != nil {
			return false, err
		}
		for lo, hi := range pieces {
			if err := ctx.Err(); err != nil {
				return false, err
			}
			if err := emit(lo, hi); err != nil {
				return false, err
			}
			sent = true
		}
	}
	filled, more, err := n.fill(ctx, emit)
	if err != nil {
		return more, err
	}
	if !sent && !filled { // nobody would learn anything by the end of this round
		n.round--
		return more, nil
	}
	n.finish()
	return more, nil
}

// pieces are the runs of chunks of set, in the order in which they are sent. A
// piece may be made of what the other side has anywhere, but not of what an
// earlier piece has replaced: so where bytes have moved up (an insertion) the last
// piece goes first.
func (s *Source) pieces(ctx context.Context, set *chunk.Set) (iter.Seq2[int64, int64], error) {
	n := s.node
	s.index.Round()
	var longest, end, from int64 // the longest run, and where it ends
	for {
		lo, hi, ok := set.Next(from, n.chunks())
		if !ok {
			break
		}
		if hi-lo > longest {
			longest, end = hi-lo, hi
		}
		from = hi
	}
	up := false
	if longest > n.perPiece() && s.enc.Searches() {
		// Its last piece: what is behind an insertion, not the insertion.
		off, length := n.extent(end-n.perPiece(), end)
		if err := s.take(ctx, off, s.around[:length]); err != nil {
			return nil, err
		}
		below, above := s.index.Whence(s.around[:length], off)
		up = below > above
	}
	each := func(yield func(lo, hi int64) bool) {
		for lo, hi, ok := set.Next(0, n.perPiece()); ok; lo, hi, ok = set.Next(hi, n.perPiece()) {
			if !yield(lo, hi) {
				return
			}
		}
	}
	if !up {
		return each, nil
	}
	var runs [][2]int64
	for lo, hi := range each {
		runs = append(runs, [2]int64{lo, hi})
	}
	return func(yield func(lo, hi int64) bool) {
		for _, r := range slices.Backward(runs) {
			if !yield(r[0], r[1]) {
				return
			}
		}
	}, nil
}

// take copies bytes of the region, which may change at any moment.
func (s *Source) take(ctx context.Context, off int64, p []byte) error {
	if err := hash.Guard(func() error { return s.read(ctx, p, off) }); err != nil {
		return fmt.Errorf("read %d bytes at %d: %w", len(p), off, err)
	}
	return nil
}

// changed returns the chunks to look at: those that the detector names or, where
// it names all or nothing, those of them whose digest is another one.
func (s *Source) changed(ctx context.Context) (*chunk.Set, error) {
	n := s.node
	begin := time.Now()
	set := chunk.NewSet(n.chunks())
	named := int64(0)
	mark := func(off, length int64) {
		set.Mark(off/n.chunk, region.Chunks(off+length, n.chunk))
		named += length
	}
	if s.o.Detector == nil {
		mark(0, n.size)
	} else if err := s.o.Detector.Collect(ctx, mark); err != nil {
		return nil, err
	}
	if named > 0 && !s.o.Pages && s.o.Whole {
		d, err := hash.Whole(ctx, n.f, s.bytes)
		if err != nil {
			return nil, fmt.Errorf("hash the region: %w", err)
		}
		if bytes.Equal(d, s.last) {
			set, named = chunk.NewSet(n.chunks()), 0
		}
		s.last = d
	}
	if named > 0 && !s.o.Pages {
		if err := hash.Table(ctx, n.f, s.bytes, n.chunk, s.o.Workers, s.fresh); err != nil {
			return nil, fmt.Errorf("hash the region: %w", err)
		}
		for i, k := int64(0), n.f.Size; i < n.chunks(); i++ {
			if bytes.Equal(s.fresh[int(i)*k:int(i+1)*k], n.entry(i, i+1)) {
				set.Clear(i, i+1)
			}
		}
	}
	n.mu.Lock()
	n.stats.Candidates += named
	n.stats.Detection = time.Since(begin)
	if f, ok := s.o.Detector.(dirty.Flusher); ok {
		n.stats.Flushing = f.Flushing()
	}
	n.mu.Unlock()
	return set, nil
}

// emit takes a copy of the chunks, which may change again at any moment, notes
// its digests and publishes it. What is sent is what was digested.
func (s *Source) emit(ctx context.Context, lo, hi int64) error {
	n := s.node
	off, length := n.extent(lo, hi)
	lead, tail := int64(0), int64(0)
	if s.enc.Searches() { // what has moved lies across pieces
		lead, tail = min(off, delta.Block-1), min(n.size-off-length, delta.Block-1)
	}
	around := s.around[:lead+length+tail]
	if err := s.take(ctx, off-lead, around); err != nil {
		return err
	}
	p := around[lead : lead+length]
	d := n.sum(p)
	var body []byte
	if !bytes.Equal(d, n.entry(lo, hi)) {
		body = []byte{0} // changed; nobody reads it where nobody is equal so far
		if rate, any := n.slowest(); any {
			pc := delta.Piece{New: p, Around: around, Lead: int(lead), Off: off, Index: s.index, Usable: func(o, k int64) bool { return o+k <= n.size }}
			if s.shadow != nil {
				pc.Old = s.shadow[off : off+length]
			}
			body = s.enc.Encode(pc, rate)
		}
		copy(n.entry(lo, hi), d)
		s.index.Update(off, p)
		if s.shadow != nil {
			copy(s.shadow[off:], p)
		}
		n.mu.Lock()
		n.stats.Changed += length
		n.mu.Unlock()
	}
	n.publish(ctx, lo, p, d, body)
	return nil
}

// slowest is the lowest rate, in bytes a second, at which frames leave to a
// destination that is equal so far; any is false where there is none.
func (n *node) slowest() (rate float64, any bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for s := range n.sessions {
		if s.stale.Count() > 0 {
			continue
		}
		any = true
		if r := s.c.rate(); r > 0 && (rate == 0 || r < rate) {
			rate = r
		}
	}
	return rate, any
}
