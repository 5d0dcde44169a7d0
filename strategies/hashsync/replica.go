package hashsync

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"memsync/strategies"
	"memsync/strategies/chunk"
	"memsync/strategies/delta"
	"memsync/strategies/hash"
	"memsync/strategies/region"
)

// Replica is a destination's copy of a region: a file of the region's bytes,
// rounded up to pages, and behind them 8 bytes for each chunk, its version:
// twice the round that it is of, plus one while it is being changed. A reader of
// a mapping copies and looks whether the version is even and the same before and
// after; so it sees round k or k+1 of a chunk and never a mixture.
//
// A Replica may have destinations of its own (hub and chain): they get the
// pieces as they came. It is made when its source says how large it is.
type Replica struct {
	name   string
	want   int64
	create func(size int64) (*os.File, error)

	mu    sync.Mutex
	node  *node // nil until the source has answered
	ready chan struct{}
	err   error // why there will be none, or no more rounds

	file     *os.File
	mem      []byte // the region, of the mapping
	mapping  []byte
	versions []uint64
	dec      *delta.Decoder
	spare    []byte       // a piece before it is applied
	damaged  bool         // a piece of this round was refused
	empty    bool         // nothing was ever applied: there is nothing to compare
	equalAt  atomic.Int64 // CLOCK_MONOTONIC, ns: when it had the source's digest last
	cancel   context.CancelFunc
	wg       sync.WaitGroup

	// The hand-over. owned and all behind it is guarded by node.own.
	asking  atomic.Pointer[request]
	poke    chan struct{} // there is something to ask
	began   int64         // CLOCK_MONOTONIC, ns: NewReplica
	owned   bool          // the region is ours: nothing of it comes from the source any more
	local   int64         // bytes that are here
	arrived []strategies.LocalAt
	dirtied *chunk.Set // chunks that came again
}

// NewReplica makes a destination for the region of that name, in chunks of that
// many bytes where the source has no opinion. create makes its file, of exactly
// size bytes, zero or what an earlier run left.
func NewReplica(name string, chunk int64, create func(size int64) (*os.File, error)) *Replica {
	return &Replica{name: name, want: chunk, create: create, ready: make(chan struct{}), poke: make(chan struct{}, 1), began: monotonic()}
}

// FileSize is the size of a replica's file.
func FileSize(size, chunk int64) int64 {
	return versionsAt(size) + 8*region.Chunks(size, chunk)
}

func versionsAt(size int64) int64 { return region.RoundUp(size, region.PageSize()) }

// open makes the replica once the source has said what it is.
func (r *Replica) open(o opened) (err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.node != nil {
		if n := r.node; n.size != o.size || n.chunk != o.chunk || n.f.Name != o.hash {
			return fmt.Errorf("the source has %d bytes in chunks of %d by %s now, and had %d, %d, %s: %w", o.size, o.chunk, o.hash, n.size, n.chunk, n.f.Name, errResized)
		}
		return nil
	}
	f, err := hash.ByName(o.hash)
	if err != nil {
		return protocol("%w", err)
	}
	n, err := newNode(r.name, o.size, o.chunk, f)
	if err != nil {
		return err
	}
	n.patience = 500 * time.Millisecond
	if r.file, err = r.create(FileSize(o.size, o.chunk)); err != nil {
		return err
	}
	total := region.RoundUp(FileSize(o.size, o.chunk), region.PageSize())
	if r.mapping, err = unix.Mmap(int(r.file.Fd()), 0, int(total), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return errors.Join(fmt.Errorf("map the replica of %d bytes: %w", total, err), r.file.Close())
	}
	r.mem = r.mapping[:o.size:o.size]
	r.versions = unsafe.Slice((*uint64)(unsafe.Pointer(&r.mapping[versionsAt(o.size)])), n.chunks())
	r.spare, r.dirtied = make([]byte, len(n.stage)), chunk.NewSet(n.chunks())
	if r.dec, err = delta.NewDecoder(); err != nil {
		return err
	}
	n.read = func(_ context.Context, p []byte, off int64) error { copy(p, r.mem[off:]); return nil }
	r.empty = true
	for _, v := range r.versions {
		if v != 0 {
			r.empty = false
		}
		n.round = max(n.round, v/2)
	}
	if !r.empty { // an earlier run's; what it was changing when it died differs and is sent again
		if err := hash.Table(context.Background(), n.f, hash.Mapped(r.mem), n.chunk, 2, n.table); err != nil {
			return err
		}
	}
	r.node = n
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	r.wg.Go(func() { r.relay(ctx) })
	close(r.ready)
	return nil
}

// relay serves the destinations of this one: those that lack something, and
// the acknowledgement of rounds once they have them.
func (r *Replica) relay(ctx context.Context) {
	n := r.node
	more := false
	for {
		if !more {
			select {
			case <-n.kick:
			case <-ctx.Done():
				return
			}
		} else if ctx.Err() != nil {
			return
		}
		n.own.Lock()
		lacking := n.joining
		for s := range n.list() {
			lacking = lacking || s.stale.Count() > 0
		}
		more = false
		if lacking && n.current.Load() > 0 && n.current.Load() == n.round {
			var sent bool
			var err error
			sent, more, err = n.fill(ctx, func(lo, hi int64) error {
				off, length := n.extent(lo, hi)
				p := n.stage[:length]
				copy(p, r.mem[off:])
				n.publish(ctx, lo, p, n.entry(lo, hi), nil)
				return nil
			})
			if err == nil && (sent || n.joining) {
				n.finish()
			}
		}
		n.own.Unlock()
		if more {
			select { // room comes with a kick; look again soon in any case
			case <-n.kick:
			case <-time.After(10 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	}
}

// epoch is called at the beginning of a connection: a source that was started
// again counts its rounds from 1 again.
func (r *Replica) epoch(round uint64) {
	n := r.node
	n.own.Lock()
	defer n.own.Unlock()
	if r.owned {
		return
	}
	r.damaged = false
	if round < n.round {
		n.round = round
		n.current.Store(min(n.current.Load(), round))
	}
}

// prints returns what to tell the source that this replica has.
func (r *Replica) prints(id uint16) []frame {
	n := r.node
	n.own.Lock()
	defer n.own.Unlock()
	if r.owned {
		return nil // the source has nothing for us any more
	}
	if r.empty {
		return []frame{{kind: framePrints, flags: flagLast | flagEmpty, region: id}}
	}
	var fs []frame
	for t := n.table; ; {
		k := min(len(t), delta.MaxPiece)
		f := frame{kind: framePrints, region: id, body: bytes.Clone(t[:k])}
		if t = t[k:]; len(t) == 0 {
			f.flags = flagLast
			return append(fs, f)
		}
		fs = append(fs, f)
	}
}

// handle takes a frame from the source and returns what to answer.
func (r *Replica) handle(ctx context.Context, f frame) (answers []frame, err error) {
	n := r.node
	switch f.kind {
	case frameDelta:
		n.own.Lock()
		defer n.own.Unlock()
		if r.owned {
			return nil, protocol("round %d of a region that was taken over", f.round)
		}
		p, err := parsePiece(f.body, n.size, n.chunk)
		if err != nil {
			return nil, err
		}
		if f.round < n.round {
			return nil, protocol("round %d after round %d", f.round, n.round)
		}
		n.round = f.round
		// Pages of its file may be taken only now.
		if err := hash.Guard(func() error { return r.apply(ctx, p) }); errors.Is(err, unix.EIO) {
			return nil, fmt.Errorf("change %d bytes at %d of the replica's file, for which there may be no room: %w", p.n, p.off, err)
		} else if err != nil {
			r.damaged = true // the end of the round will ask for repair
			n.mu.Lock()
			n.stats.Mismatches++
			n.mu.Unlock()
		}
	case frameEnd:
		return r.end(ctx, f)
	case frameTaken:
		return nil, r.taken(f)
	case frameStable:
		n.mu.Lock()
		defer n.mu.Unlock()
		n.stable.Store(f.round)
		for s := range n.sessions {
			s.put(frame{kind: frameStable, round: f.round}.encode(nil))
		}
	default:
		return nil, protocol("frame of type %d from a source", f.kind)
	}
	return nil, nil
}

// apply checks a piece and only then changes the region, chunk by chunk.
func (r *Replica) apply(ctx context.Context, p piece) error {
	n := r.node
	now := r.mem[p.off : p.off+int64(p.n)]
	next := r.spare[:p.n]
	err := r.dec.Decode(next, now, p.body, func(b []byte, off int64) error {
		if err := region.CheckRange(off, int64(len(b)), n.size); err != nil {
			return err
		}
		copy(b, r.mem[off:])
		return nil
	})
	if err != nil {
		return err
	}
	d := n.sum(next)
	if n.check(p.off, d) != p.check {
		return fmt.Errorf("piece of %d bytes at %d: %w", p.n, p.off, region.ErrMismatch)
	}
	r.store(p, next, d)
	n.mu.Lock()
	n.stats.DeltaBytes += int64(len(p.body))
	n.stats.Changed += int64(p.n)
	relays := len(n.sessions) > 0
	n.mu.Unlock()
	if relays {
		n.publish(ctx, p.off/n.chunk, next, d, p.body)
	}
	return nil
}

// store puts the new version of a piece, with the digests d, in place.
func (r *Replica) store(p piece, next, d []byte) {
	n, now := r.node, r.mem[p.off:p.off+int64(p.n)]
	size := n.f.Size
	for i, at := p.off/n.chunk, int64(0); at < int64(p.n); i, at = i+1, at+n.chunk {
		k := int(at/n.chunk) * size
		if !r.empty && bytes.Equal(d[k:k+size], n.entry(i, i+1)) && atomic.LoadUint64(&r.versions[i])&1 == 0 {
			continue // this chunk of the piece is as it was
		}
		to := min(at+n.chunk, int64(p.n))
		if r.versions[i] == 0 {
			r.here(to - at)
		} else {
			r.dirtied.Mark(i, i+1)
		}
		atomic.StoreUint64(&r.versions[i], n.round<<1|1)
		copy(now[at:to], next[at:to])
		copy(n.entry(i, i+1), d[k:k+size])
		atomic.StoreUint64(&r.versions[i], n.round<<1)
	}
}

// here notes that n more bytes are here, a hundred times in all. n.own is held.
func (r *Replica) here(n int64) {
	size, before := r.node.size, r.local
	if r.local += n; before == 0 || r.local == size || r.local*100/size > before*100/size {
		r.arrived = append(r.arrived, strategies.LocalAt{At: monotonic(), Bytes: r.local})
	}
}

// progress is when so many bytes were here for the first time, how many came in all, in which
// time since NewReplica, and the bytes of chunks that came again.
func (r *Replica) progress() (arrived []strategies.LocalAt, n, took, again int64) {
	r.node.own.Lock()
	defer r.node.own.Unlock()
	if k := len(r.arrived); k > 0 {
		n, took = r.arrived[k-1].Bytes, r.arrived[k-1].At-r.began
	}
	return slices.Clone(r.arrived), n, took, min(r.dirtied.Count()*r.node.chunk, r.node.size)
}

// end ends a round: the region must have the source's digest.
func (r *Replica) end(ctx context.Context, f frame) ([]frame, error) {
	n := r.node
	n.own.Lock()
	defer n.own.Unlock()
	if r.owned {
		return nil, nil
	}
	ack := frame{kind: frameAck, region: f.region, round: f.round, body: []byte{ackEqual}}
	if f.round < n.round {
		return nil, protocol("end of round %d in round %d", f.round, n.round)
	}
	if f.flags&flagPartial != 0 {
		ack.body[0] = ackPartial
		return []frame{ack}, nil
	}
	if len(f.body) != digestSize {
		return nil, protocol("digest of %d bytes, want %d", len(f.body), digestSize)
	}
	d := n.digest()
	if r.damaged || !bytes.Equal(d[:], f.body) {
		r.damaged, r.empty = false, false
		ack.body[0] = ackMismatch
		// Whatever it is that differs, look at the bytes themselves.
		if err := hash.Table(ctx, n.f, hash.Mapped(r.mem), n.chunk, 2, n.table); err != nil {
			return nil, err
		}
		n.own.Unlock()
		fs := append([]frame{ack}, r.prints(f.region)...)
		n.own.Lock()
		return fs, nil
	}
	r.empty = false
	n.round = f.round
	n.finish()
	r.equalAt.Store(monotonic())
	return []frame{ack}, nil
}

// subtree waits until the destinations of this one, if it has any, have round.
func (r *Replica) subtree(ctx context.Context, round uint64) {
	ctx, cancel := context.WithTimeout(ctx, silence)
	defer cancel()
	_ = r.node.acknowledged(ctx, round) // one that is slower does not hold the others for ever
}

// Wait returns once the replica has at least that round, complete and equal to
// the source's.
func (r *Replica) Wait(ctx context.Context, round uint64) error {
	select {
	case <-r.ready:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return r.node.until(ctx, func() bool { return r.node.current.Load() >= max(round, 1) })
}

// ReadAt copies [off, off+len(p)) as of round atLeast or a later one, each chunk
// of one round, and returns the oldest and the newest round among its chunks.
// It waits for atLeast. Round Stable() is at every destination.
func (r *Replica) ReadAt(ctx context.Context, p []byte, off int64, atLeast uint64) (oldest, newest uint64, err error) {
	if err := r.Wait(ctx, atLeast); err != nil {
		return 0, 0, err
	}
	n := r.node
	if err := region.CheckRange(off, int64(len(p)), n.size); err != nil {
		return 0, 0, err
	}
	oldest = ^uint64(0)
	for len(p) > 0 {
		i := off / n.chunk
		k := min(int64(len(p)), (i+1)*n.chunk-off)
		v := region.ReadVersion(&r.versions[i], p[:k], r.mem[off:off+k]) / 2
		oldest, newest = min(oldest, v), max(newest, v)
		p, off = p[k:], off+k
	}
	return oldest, newest, nil
}

// Stable is the latest round that every destination in the tree is known to have.
func (r *Replica) Stable() uint64 { return r.node.stable.Load() }

// Close unmaps the replica; it must not be followed any more. Its file stays open.
func (r *Replica) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.node == nil {
		return nil
	}
	r.cancel()
	r.wg.Wait()
	r.node.end(r.err)
	r.dec.Close()
	return os.NewSyscallError("munmap", unix.Munmap(r.mapping))
}

// Follow keeps replicas equal to the regions of their names at the source that
// dial reaches, on one connection; where it is lost another one is made, on
// which only what differs is sent. It returns ctx's error, or why it makes no
// sense to go on: the source has no such region, or one of another size now.
func Follow(ctx context.Context, dial func(ctx context.Context) (net.Conn, error), replicas ...*Replica) error {
	pause := 10 * time.Millisecond
	for {
		began := time.Now()
		var refused *remoteError
		conn, err := dial(ctx)
		if err == nil {
			err = follow(ctx, conn, replicas)
		}
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.As(err, &refused) && !ready(replicas): // it never worked
			return err
		case errors.Is(err, region.ErrMissing), errors.Is(err, region.ErrMismatch), errors.Is(err, errResized), errors.Is(err, errProtocol), errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EIO):
			return err
		}
		if time.Since(began) > time.Second {
			pause = 10 * time.Millisecond
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pause + rand.N(pause)):
		}
		pause = min(2*pause, time.Second)
	}
}

// ready reports whether a source has ever opened all of them.
func ready(replicas []*Replica) bool {
	for _, r := range replicas {
		select {
		case <-r.ready:
		default:
			return false
		}
	}
	return true
}

// follow is one connection's life.
func follow(ctx context.Context, conn net.Conn, replicas []*Replica) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	defer conn.Close()
	var mu sync.Mutex
	write := func(fs ...frame) error {
		mu.Lock()
		defer mu.Unlock()
		for _, f := range fs {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			_ = conn.SetWriteDeadline(time.Now().Add(silence))
			if _, err := conn.Write(f.encode(nil)); err != nil {
				return gone(err)
			}
		}
		return nil
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() {
		t := time.NewTicker(pingEvery)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				_ = write(frame{kind: framePing})
			case <-ctx.Done():
				return
			}
		}
	})
	first := []frame{hello()}
	for i, r := range replicas {
		first = append(first, frame{kind: frameOpen, region: uint16(i), round: uint64(r.want), body: []byte(r.name)})
	}
	if err := write(first...); err != nil {
		return err
	}
	isOpen := make([]bool, len(replicas))
	var buf []byte
	for greeted := false; ; {
		_ = conn.SetReadDeadline(time.Now().Add(silence))
		if ctx.Err() != nil {
			return ctx.Err()
		}
		f, b, err := readFrame(conn, buf)
		if err != nil {
			return gone(err)
		}
		buf = b
		if f.kind == frameError {
			return f.remoteError()
		}
		if !greeted {
			if err := f.checkHello(); err != nil {
				return err
			}
			greeted = true
			continue
		}
		if f.kind == framePing {
			continue
		}
		if int(f.region) >= len(replicas) || isOpen[f.region] == (f.kind == frameOpened) {
			return protocol("frame of type %d for region %d", f.kind, f.region)
		}
		r := replicas[f.region]
		var answers []frame
		if f.kind == frameOpened {
			o, err := parseOpened(f.body)
			if err == nil {
				err = r.open(o)
			}
			if err != nil {
				return err
			}
			isOpen[f.region] = true
			id := f.region
			wg.Go(func() { r.requests(ctx, id, write) })
			r.epoch(f.round)
			answers = r.prints(f.region)
		} else if answers, err = r.handle(ctx, f); err != nil {
			_ = write(errorFrame(f.region, err))
			return err
		}
		if len(answers) == 1 && answers[0].kind == frameAck && answers[0].body[0] == ackEqual && r.relays() {
			// As in chain replication the tail acknowledges first.
			wg.Go(func() {
				r.subtree(ctx, answers[0].round)
				_ = write(answers...)
			})
			continue
		}
		if err := write(answers...); err != nil {
			return err
		}
	}
}

func (r *Replica) relays() bool {
	r.node.mu.Lock()
	defer r.node.mu.Unlock()
	return len(r.node.sessions) > 0
}

// Serve answers a connection of a destination of this replica (hub and chain),
// once the replica has something to give.
func (r *Replica) Serve(ctx context.Context, conn net.Conn) error {
	if err := r.Wait(ctx, 1); err != nil {
		return errors.Join(err, conn.Close())
	}
	return serve(ctx, conn, func(name string, _ int64) (*node, error) {
		if name != r.name {
			return nil, fmt.Errorf("region %q: %w", name, region.ErrMissing)
		}
		return r.node, nil
	})
}
