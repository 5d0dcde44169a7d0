package nbd

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"memsync/strategies/region"
)

const (
	maxInFlight  = 1024    // requests of one connection, abandoned ones included
	maxScattered = 1 << 12 // chunks of one reply that are ahead of a gap
	maxErrorData = 2 * maxString
)

// span is a half-open range of offsets.
type span struct{ off, end uint64 }

// call is one request in flight.
type call struct {
	req  request
	buf  []byte // where a read's bytes go; nil once abandoned
	load int64  // bytes it counts for in conn.load

	stamp bool      // note when it finishes
	at    time.Time // then

	done chan struct{} // capacity 1: finished, or asked to lead
	over atomic.Bool   // finished; written under conn.mu

	// Guarded by conn.mu.
	waiting   bool // its caller sleeps on done
	abandoned bool // its caller has left
	err       error

	// Of the reply, guarded by conn.rd.
	next      uint64 // all before this offset has arrived
	scattered []span // arrived beyond next, sorted
	extents   []region.Extent
}

// cover notes that [off, off+n) has arrived.
func (k *call) cover(off, n uint64) error {
	end := k.req.off + k.req.length
	if n == 0 || off < k.req.off || off > end || n > end-off {
		return protocolError("chunk [%d, +%d) is not within the read [%d, +%d)", off, n, k.req.off, k.req.length)
	}
	s := span{off, off + n}
	i, _ := slices.BinarySearchFunc(k.scattered, s, func(a, b span) int {
		if a.off < b.off {
			return -1
		}
		return 1
	})
	if off < k.next || i > 0 && k.scattered[i-1].end > off || i < len(k.scattered) && k.scattered[i].off < s.end {
		return protocolError("chunk [%d, +%d) of a read overlaps an earlier one", off, n)
	}
	if off != k.next {
		if len(k.scattered) == maxScattered {
			return protocolError("read of [%d, +%d) is answered in more than %d scattered chunks", k.req.off, k.req.length, maxScattered)
		}
		k.scattered = slices.Insert(k.scattered, i, s)
		return nil
	}
	k.next = s.end
	for len(k.scattered) > 0 && k.scattered[0].off == k.next {
		k.next = k.scattered[0].end
		k.scattered = k.scattered[1:]
	}
	return nil
}

// slot returns the part of the caller's buffer for [off, off+n), nil once abandoned.
func (k *call) slot(off, n uint64) []byte {
	if k.buf == nil {
		return nil
	}
	return k.buf[off-k.req.off:][:n]
}

// conn is the client's side of one connection after the handshake.
//
// There is no reader goroutine. Of the callers that wait for replies one leads:
// it reads the socket, finishes other callers' requests as their replies come,
// and hands leadership on when its own is finished. A lone caller, such as a
// page fault, thus wakes from recv(2) straight into its own reply.
type conn struct {
	l     *link
	style replyStyle
	meta  uint32 // id of base:allocation
	slots chan struct{}
	write chan struct{} // capacity 1: a lock that a context can end the wait for
	load  atomic.Int64  // bytes in flight, for spreading requests
	moved atomic.Int64  // bytes of payload so far
	hdr   [extendedRequestSize]byte
	iov   [2][]byte

	// rd is held by the leader while bytes go from the link to callers'
	// buffers, but not while it waits. Taken before mu.
	rd    sync.Mutex
	part  part
	aux   []byte // payload of the current chunk, where it is not a read's data
	large int    // reads in flight of directLimit or more; guarded by mu

	mu        sync.Mutex
	pending   map[uint64]*call
	cookie    uint64
	leading   bool
	waiters   int
	abandoned int
	blocked   int // senders that wait for the peer to read
	err       error
	refuse    error // new requests get this; those in flight go on
	watched   <-chan struct{}
	unwatch   func() bool
	drainer   sync.WaitGroup
}

// part is the chunk or simple reply whose payload is being read.
type part struct {
	k    *call // nil between messages
	r    reply
	off  uint64 // of the next byte of data
	left uint64 // bytes of payload not yet read
	data bool   // payload is a read's data
}

func newConn(l *link, style replyStyle, meta uint32) *conn {
	return &conn{l: l, style: style, meta: meta, slots: make(chan struct{}, maxInFlight), write: make(chan struct{}, 1), pending: map[uint64]*call{}}
}

// lock takes a place in ch, or gives up when ctx ends.
func lock(ctx context.Context, ch chan struct{}) error {
	select {
	case ch <- struct{}{}:
		return nil
	default:
	}
	select {
	case ch <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// start sends a request. Where it returns nil, wait must be called next.
func (c *conn) start(ctx context.Context, k *call, payload []byte) error {
	if err := lock(ctx, c.slots); err != nil {
		return err
	}
	c.mu.Lock()
	if err := c.usable(); err != nil {
		c.mu.Unlock()
		<-c.slots
		return err
	}
	c.cookie++
	k.req.cookie = c.cookie
	k.next = k.req.off
	c.pending[k.req.cookie] = k
	if len(k.buf) >= directLimit {
		c.large++
	}
	k.load = int64(len(k.buf) + len(payload))
	c.load.Add(k.load)
	c.mu.Unlock()

	if err := lock(ctx, c.write); err != nil {
		return c.leave(k, err, true)
	}
	err := c.send(ctx, k.req, payload)
	<-c.write
	switch {
	case err == nil:
		return nil
	case err == errNotSent:
		return c.leave(k, ctx.Err(), true)
	case ctx.Err() != nil && err == ctx.Err():
		return c.leave(k, err, false)
	}
	c.fail(peerGone("write to NBD server", err))
	return c.leave(k, c.lost(), false)
}

func (c *conn) usable() error {
	if c.err != nil {
		return c.err
	}
	return c.refuse
}

// lost returns the error that the connection has failed with.
func (c *conn) lost() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.usable()
}

func (c *conn) send(ctx context.Context, r request, payload []byte) error {
	c.iov[0] = r.append(c.hdr[:0], c.style == extended)
	bufs := c.iov[:1]
	if len(payload) > 0 {
		c.iov[1] = payload
		bufs = c.iov[:2]
	}
	defer func() { c.iov[1] = nil }()
	begun := false
	if len(c.l.out.tail) == 0 {
		total := len(bufs[0]) + len(payload)
		rest, err := c.l.trySend(bufs)
		if err != nil || len(rest) == 0 {
			return err
		}
		left := 0
		for _, b := range rest {
			left += len(b)
		}
		bufs, begun = rest, left < total
	}
	// The server may be stuck in writing to us: somebody has to read.
	c.mu.Lock()
	c.blocked++
	c.ensureReader()
	c.mu.Unlock()
	err := c.l.sendSlow(ctx, bufs, begun)
	c.mu.Lock()
	c.blocked--
	c.mu.Unlock()
	return err
}

// leave gives k up and returns err; where unsent, no reply will come for it.
func (c *conn) leave(k *call, err error, unsent bool) error {
	c.rd.Lock() // nobody is writing to k.buf now
	defer c.rd.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	if k.over.Load() {
		return err
	}
	if unsent {
		c.finish(k)
		k.buf = nil
		return err
	}
	c.unload(k)
	k.buf = nil
	k.abandoned = true
	c.abandoned++
	c.promote()
	return err
}

// finish takes k off the list and wakes its caller. Under rd and mu.
func (c *conn) finish(k *call) {
	if k.over.Load() {
		return // a server may answer what was registered but never sent
	}
	delete(c.pending, k.req.cookie)
	if k.abandoned {
		c.abandoned--
	}
	c.unload(k)
	if k.stamp {
		k.at = time.Now()
	}
	k.over.Store(true)
	<-c.slots
	if k.waiting {
		signal(k)
	}
}

// window is about what TCP can have in flight here: its first window, and as much more
// as was acknowledged (slow start, RFC 5681, 3.1), up to where the path's share ends it.
func (c *conn) window() int64 { return min(14<<10+c.moved.Load(), 1<<20) }

// unload stops counting k as load. Under mu.
func (c *conn) unload(k *call) {
	c.load.Add(-k.load)
	c.moved.Add(k.load)
	k.load = 0
	if len(k.buf) >= directLimit {
		c.large--
	}
}

func signal(k *call) {
	select {
	case k.done <- struct{}{}:
	default:
	}
}

// promote makes one of those that wait the leader, where there is none. Under mu.
func (c *conn) promote() {
	if c.leading || c.err != nil {
		return
	}
	if c.waiters > 0 {
		for _, k := range c.pending {
			if k.waiting {
				signal(k)
				return
			}
		}
	}
	if c.abandoned > 0 {
		c.ensureReader()
	}
}

// ensureReader starts a goroutine that leads as long as nobody else would and
// somebody must. Under mu.
func (c *conn) ensureReader() {
	if c.leading || c.err != nil || len(c.pending) == 0 {
		return
	}
	c.leading = true
	c.drainer.Add(1)
	go func() {
		defer c.drainer.Done()
		c.lead(context.Background(), nil)
	}()
}

// wait returns once k is finished or ctx ends; k's buffer is not touched after that.
func (c *conn) wait(ctx context.Context, k *call) error {
	for {
		c.mu.Lock()
		if k.over.Load() {
			err := k.err
			c.mu.Unlock()
			return err
		}
		if !c.leading && c.err == nil {
			c.leading = true
			c.watch(ctx)
			c.mu.Unlock()
			c.lead(ctx, k)
		} else {
			k.waiting = true
			c.waiters++
			c.mu.Unlock()
			select {
			case <-k.done:
			case <-ctx.Done():
			}
			c.mu.Lock()
			k.waiting = false
			c.waiters--
			c.mu.Unlock()
		}
		if !k.over.Load() && ctx.Err() != nil {
			return c.leave(k, ctx.Err(), false)
		}
	}
}

// watch lets the end of ctx interrupt the leader. The registration stays until
// a leader with another context comes: most callers share one. Under mu.
func (c *conn) watch(ctx context.Context) {
	done := ctx.Done()
	if done == c.watched {
		return
	}
	if c.unwatch != nil {
		c.unwatch()
		c.unwatch = nil
	}
	c.watched = done
	if done != nil {
		c.unwatch = context.AfterFunc(ctx, c.l.interrupt)
	}
}

// lead reads replies until own is finished or ctx ends; without own, until a
// reader is no longer needed. The caller has set leading.
func (c *conn) lead(ctx context.Context, own *call) {
	var err error
	for err == nil {
		c.rd.Lock()
		err = c.process(own)
		missing := uint64(0)
		if c.part.k != nil {
			missing = c.part.left
		}
		c.rd.Unlock()
		if err != nil {
			break
		}
		if own != nil {
			if own.over.Load() || ctx.Err() != nil {
				break
			}
		} else {
			c.mu.Lock()
			stay := c.err == nil && len(c.pending) > 0 && (c.blocked > 0 || c.waiters == 0 && c.abandoned > 0)
			if !stay {
				c.leading = false
				c.promote()
				c.mu.Unlock()
				return
			}
			c.mu.Unlock()
		}
		if err = c.l.mark(missing); err != nil {
			break
		}
		if err = c.l.await(c.expect(), 0); err == errInterrupted {
			err = nil
		}
	}
	if err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		c.fail(peerGone("read from NBD server", err))
	}
	c.mu.Lock()
	c.leading = false
	c.promote()
	c.mu.Unlock()
}

// fail ends the connection: every request in flight gets err. Callable at any
// time, but not under rd or mu. The first error counts.
func (c *conn) fail(err error) {
	c.rd.Lock()
	c.mu.Lock()
	if c.err == nil {
		c.err = err
		if c.unwatch != nil {
			c.unwatch()
			c.unwatch = nil
		}
		for _, k := range c.pending {
			k.err = err
			c.finish(k)
		}
	}
	c.mu.Unlock()
	c.rd.Unlock()
	c.l.close()
}

// process handles all that can be read without waiting, or up to the end of
// own's reply. Under rd.
func (c *conn) process(own *call) error {
	c.mu.Lock()
	err := c.err // the requests have ended: their buffers are no longer ours
	c.mu.Unlock()
	if err != nil {
		return err
	}
	for {
		var err error
		switch {
		case c.part.k != nil && c.part.left == 0:
			err = c.endPart()
		case c.part.k != nil:
			err = c.payload()
		case own != nil && own.over.Load():
			return nil
		default:
			err = c.header()
		}
		if err == errAgain {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// limit is how much to read ahead: little where a large payload comes next, so
// that it is not copied.
func (c *conn) limit() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.large > 0 {
		return headLimit
	}
	return readBuffer / 2
}

// expect is limit for a wait, and tells the spinner what is waited for.
func (c *conn) expect() int {
	c.mu.Lock()
	c.l.spin.soon = c.large == 0 && len(c.pending) == 1
	c.mu.Unlock()
	return c.limit()
}

// header begins the next reply.
func (c *conn) header() error {
	r, n, err := parseReply(c.l.buffered(), c.style)
	if err != nil {
		return err
	}
	data := n > 0 && !r.simple && r.typ == chunkOffsetData
	if n == 0 || data && len(c.l.buffered()) < n+8 {
		return c.l.recvBuf(c.limit())
	}
	c.mu.Lock()
	k := c.pending[r.cookie]
	c.mu.Unlock()
	if k == nil {
		return protocolError("reply with cookie %d, for which no request is in flight", r.cookie)
	}
	p := part{k: k, r: r}
	switch {
	case r.simple && k.req.cmd == cmdRead && c.style != simple:
		return protocolError("simple reply to a read, with structured replies negotiated")
	case r.simple:
		if r.errno == 0 && k.req.cmd == cmdRead {
			p.data, p.off, p.left = true, k.req.off, k.req.length
			if err := k.cover(p.off, p.left); err != nil {
				return err
			}
		} else if r.errno == 0 && k.req.cmd == cmdBlockStatus {
			return protocolError("simple reply to block status")
		}
	case c.style == extended && r.off != k.req.off:
		return protocolError("extended reply with offset %d to a request at %d", r.off, k.req.off)
	case data:
		if k.req.cmd != cmdRead {
			return protocolError("data chunk in the reply to %v", k.req.cmd)
		}
		if r.length < 9 || r.length-8 > k.req.length {
			return protocolError("data chunk of length %d in the reply to a read of %d bytes", r.length, k.req.length)
		}
		p.data, p.off, p.left = true, be.Uint64(c.l.buffered()[n:]), r.length-8
		if err := k.cover(p.off, p.left); err != nil {
			return err
		}
		n += 8
	default:
		p.left = r.length
		if err := checkChunk(r, k, c.style); err != nil {
			return err
		}
	}
	c.l.consume(n)
	c.part = p
	return nil
}

// checkChunk checks type and length of a chunk without data, before its payload is read.
func checkChunk(r reply, k *call, style replyStyle) error {
	lo, hi, unit := uint64(0), uint64(0), uint64(1)
	wantCmd := k.req.cmd
	switch {
	case r.typ == chunkNone:
		if r.flags&replyFlagDone == 0 {
			return protocolError("chunk NONE without the flag DONE")
		}
	case r.typ == chunkOffsetHole:
		lo, hi, wantCmd = 12, 12, cmdRead
	case r.typ == chunkBlockStatus && style == structured:
		lo, hi, unit, wantCmd = 4+8, maxStatusChunk, 8, cmdBlockStatus
	case r.typ == chunkBlockStatusExt && style == extended:
		lo, hi, unit, wantCmd = 8+16, 2*maxStatusChunk, 16, cmdBlockStatus
	case r.typ == chunkErrorOffset:
		lo, hi = 14, maxErrorData
	case r.typ&(1<<15) != 0:
		lo, hi = 6, maxErrorData
	default:
		return protocolError("chunk of unknown type %d", r.typ)
	}
	if r.length < lo || r.length > hi || (r.length-lo)%unit != 0 {
		return protocolError("chunk of type %d has length %d", r.typ, r.length)
	}
	if wantCmd != k.req.cmd {
		return protocolError("chunk of type %d in the reply to %v", r.typ, k.req.cmd)
	}
	return nil
}

// payload moves some of the current chunk's payload on.
func (c *conn) payload() error {
	p := &c.part
	b := c.l.buffered()
	if len(b) == 0 {
		if p.data && p.k.buf != nil && p.left >= headLimit {
			n, err := c.l.recv(p.k.slot(p.off, p.left))
			p.off, p.left = p.off+uint64(n), p.left-uint64(n)
			return err
		}
		return c.l.recvBuf(c.limit())
	}
	b = b[:min(uint64(len(b)), p.left)]
	if !p.data {
		c.aux = append(c.aux, b...)
	} else if dst := p.k.slot(p.off, uint64(len(b))); dst != nil {
		copy(dst, b)
	}
	c.l.consume(len(b))
	p.off, p.left = p.off+uint64(len(b)), p.left-uint64(len(b))
	return nil
}

// endPart acts on a chunk or simple reply that is complete.
func (c *conn) endPart() error {
	p, b := c.part, c.aux
	k := p.k
	c.part = part{}
	if c.aux = c.aux[:0]; cap(c.aux) > maxErrorData {
		c.aux = nil
	}
	var failed error
	switch {
	case p.r.simple && p.r.errno != 0:
		failed = c.refusal(k, Errno(p.r.errno), "")
	case p.r.simple, p.data, p.r.typ == chunkNone:
	case p.r.typ == chunkOffsetHole:
		off, n := be.Uint64(b), uint64(be.Uint32(b[8:]))
		if err := k.cover(off, n); err != nil {
			return err
		}
		clear(k.slot(off, n))
	case p.r.typ&(1<<15) != 0:
		n := int(be.Uint16(b[4:]))
		if n > len(b)-6 {
			return protocolError("error chunk of length %d with a message of %d bytes", len(b), n)
		}
		if be.Uint32(b) == 0 {
			return protocolError("error chunk without an error")
		}
		failed = c.refusal(k, Errno(be.Uint32(b)), string(b[6:6+n]))
	default:
		if err := c.status(k, b, p.r.typ == chunkBlockStatusExt); err != nil {
			return err
		}
	}
	finished := p.r.simple || p.r.flags&replyFlagDone != 0
	c.mu.Lock()
	defer c.mu.Unlock()
	if failed != nil && k.err == nil {
		k.err = failed
	}
	if !finished {
		return nil
	}
	if k.err == nil {
		switch {
		case k.req.cmd == cmdRead && k.next != k.req.off+k.req.length:
			return protocolError("reply to a read of [%d, +%d) ends at %d", k.req.off, k.req.length, k.next)
		case k.req.cmd == cmdBlockStatus && len(k.extents) == 0:
			return protocolError("reply to block status without an extent")
		}
	}
	c.finish(k)
	return nil
}

func (c *conn) refusal(k *call, no Errno, message string) error {
	err := &Error{Command: k.req.cmd.String(), Off: int64(k.req.off), N: int64(k.req.length), Errno: no, Message: message}
	if no == ESHUTDOWN {
		c.mu.Lock()
		c.refuse = fmt.Errorf("NBD server is shutting down: %w", region.ErrPeerGone)
		c.mu.Unlock()
	}
	return err
}

// status decodes a block status chunk, whose length is already checked.
func (c *conn) status(k *call, b []byte, ext bool) error {
	if id := be.Uint32(b); id != c.meta || len(k.extents) > 0 {
		return protocolError("block status of metadata context %d, not once of %d", id, c.meta)
	}
	if ext && uint64(be.Uint32(b[4:])) != uint64(len(b)-8)/16 {
		return protocolError("block status with %d descriptors in %d bytes", be.Uint32(b[4:]), len(b))
	}
	left := k.req.length
	step := 8
	if b = b[4:]; ext {
		b, step = b[4:], 16
	}
	for ; len(b) > 0; b = b[step:] {
		n, flags := uint64(be.Uint32(b)), uint64(be.Uint32(b[4:]))
		if ext {
			n, flags = be.Uint64(b), be.Uint64(b[8:])
		}
		if n == 0 || left == 0 {
			return protocolError("block status descriptor of length %d with %d bytes left of the request", n, left)
		}
		n = min(n, left) // the last may reach further
		left -= n
		k.extents = append(k.extents, region.Extent{Length: int64(n), Hole: flags&stateHole != 0, Zero: flags&stateZero != 0})
	}
	return nil
}
