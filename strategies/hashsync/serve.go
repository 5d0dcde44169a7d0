package hashsync

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/chunk"
	"memsync/strategies/delta"
	"memsync/strategies/migration/handover"
	"memsync/strategies/region"
)

// serverConn is the source's side of a connection: many regions, one writer.
type serverConn struct {
	conn net.Conn
	some chan struct{}

	mu       sync.Mutex
	control  [][]byte
	sessions []*session
	closing  bool // the writer ends once all is written

	bytesPerSecond atomic.Int64 // while there was something to write
}

// rate is how fast frames have left lately, in bytes a second; 0 is not known.
func (c *serverConn) rate() float64 { return float64(c.bytesPerSecond.Load()) }

func (c *serverConn) wake() {
	select {
	case c.some <- struct{}{}:
	default:
	}
}

func (c *serverConn) send(f frame) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.control = append(c.control, f.encode(nil))
	c.wake()
}

// serve answers a connection until the peer leaves (nil), breaks the protocol,
// or ctx ends. find gives a region's
// node by name; a chunk size other than 0 is the peer's wish.
func serve(ctx context.Context, conn net.Conn, find func(name string, chunk int64) (*node, error)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	c := &serverConn{conn: conn, some: make(chan struct{}, 1)}
	var wg sync.WaitGroup
	written := make(chan error, 1)
	wg.Go(func() {
		written <- c.write(ctx)
		cancel()
	})
	err := c.receive(ctx, find, &wg)
	c.mu.Lock()
	sessions := c.sessions
	c.mu.Unlock()
	for _, s := range sessions {
		s.n.leave(s)
		if id := s.taker.Load(); id != 0 {
			s.n.owner.forget(handover.ID(id))
		}
	}
	var refused *openError
	if errors.Is(err, errProtocol) || errors.As(err, &refused) { // say why, then hang up
		c.send(errorFrame(0, err))
		c.mu.Lock()
		c.closing = true
		c.mu.Unlock()
		c.wake()
	} else {
		cancel()
	}
	wg.Wait()
	if werr := <-written; err == nil || errors.Is(err, context.Canceled) {
		err = werr
	}
	_ = conn.Close()
	if err = gone(err); errors.Is(err, region.ErrPeerGone) || errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// openError is why a region could not be opened.
type openError struct {
	name string
	err  error
}

func (e *openError) Error() string { return fmt.Sprintf("open %q: %v", e.name, e.err) }
func (e *openError) Unwrap() error { return e.err }

func (c *serverConn) receive(ctx context.Context, find func(string, int64) (*node, error), wg *sync.WaitGroup) error {
	byID := map[uint16]*session{}
	prints := map[uint16][]byte{}
	var buf []byte
	for first := true; ; first = false {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		_ = c.conn.SetReadDeadline(time.Now().Add(silence))
		if ctx.Err() != nil {
			_ = c.conn.SetDeadline(time.Unix(1, 0))
		}
		f, b, err := readFrame(c.conn, buf)
		if err != nil {
			return err
		}
		buf = b
		if first {
			if err := f.checkHello(); err != nil {
				return err
			}
			c.send(hello())
			continue
		}
		s := byID[f.region]
		if s == nil && f.kind != frameOpen && f.kind != framePing {
			return protocol("frame of type %d for region %d, which is not open", f.kind, f.region)
		}
		switch f.kind {
		case frameOpen:
			if s != nil || len(byID) >= maxRegions {
				return protocol("region %d is open already, or more than %d are", f.region, maxRegions)
			}
			if f.round > delta.MaxPiece {
				return protocol("chunk size %d, at most %d", f.round, delta.MaxPiece)
			}
			n, err := find(string(f.body), int64(f.round))
			if err != nil {
				return &openError{string(f.body), err}
			}
			s = &session{id: f.region, n: n, c: c, stale: chunk.NewSet(n.chunks())}
			byID[f.region] = s
			c.mu.Lock()
			c.sessions = append(c.sessions, s)
			c.mu.Unlock()
			c.send(frame{kind: frameOpened, region: f.region, round: n.current.Load(), body: opened{n.size, n.chunk, n.f.Name}.encode()})
		case framePrints:
			if len(prints[f.region])+len(f.body) > len(s.n.table) {
				return protocol("fingerprints of %d bytes, want %d", len(prints[f.region])+len(f.body), len(s.n.table))
			}
			prints[f.region] = append(prints[f.region], f.body...)
			if f.flags&flagLast == 0 {
				continue
			}
			p := prints[f.region]
			delete(prints, f.region)
			if f.flags&flagEmpty != 0 {
				p = nil
			} else if len(p) != len(s.n.table) {
				return protocol("fingerprints of %d bytes, want %d", len(p), len(s.n.table))
			}
			if s.admitting.Swap(true) {
				return protocol("fingerprints of region %d again, before the last were compared", f.region)
			}
			wg.Go(func() { // waits for the round that is under way
				defer s.admitting.Store(false)
				s.n.admit(s, p)
			})
		case frameAck:
			if f.body[0] > ackMismatch || f.round > s.n.current.Load() {
				return protocol("ack %d of round %d, the latest is %d", f.body[0], f.round, s.n.current.Load())
			}
			s.n.ack(s, f.round, f.body[0])
		case frameTake:
			if err := c.take(ctx, s, f, wg); err != nil {
				return err
			}
		case framePing:
		case frameError:
			return f.remoteError()
		default:
			return protocol("frame of type %d from a destination", f.kind)
		}
	}
}

// writeAll writes the buffers as full segments: each time that the socket has room
// for a part of a large write, the kernel would else send the odd bytes at its end by
// themselves, which on a quick link is half a percent more of headers.
func (c *serverConn) writeAll(out net.Buffers) (int64, error) {
	total := 0
	for _, b := range out {
		total += len(b)
	}
	if total > 32<<10 {
		c.cork(1)
		defer c.cork(0)
	}
	return out.WriteTo(c.conn)
}

// cork is for speed only: connections that are not TCP do without.
func (c *serverConn) cork(on int) {
	if s, ok := c.conn.(syscall.Conn); ok {
		if raw, err := s.SyscallConn(); err == nil {
			_ = raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_CORK, on) })
		}
	}
}

// take answers a request of the hand-over, which may take a while.
func (c *serverConn) take(ctx context.Context, s *session, f frame, wg *sync.WaitGroup) error {
	q, err := parseTake(f.body)
	if err != nil {
		return err
	}
	if s.n.owner == nil {
		return protocol("%v of region %d, which is a copy here: only its source can hand it over", q.Verb, s.id)
	}
	if s.taking.Swap(true) {
		return protocol("%v of region %d, before the last request was answered", q.Verb, s.id)
	}
	s.taker.Store(uint64(q.From))
	wg.Go(func() {
		t, round, err := s.n.owner.handle(ctx, q)
		s.taking.Store(false)
		if err == nil {
			c.send(frame{kind: frameTaken, region: s.id, round: round, body: t.encode()})
		}
	})
	return nil
}

// write sends what is queued, a share of each session in turn.
func (c *serverConn) write(ctx context.Context) error {
	ping := time.NewTicker(pingEvery)
	defer ping.Stop()
	idle := false
	var busy time.Time
	var sent int64
	for {
		c.mu.Lock()
		out := net.Buffers(c.control)
		c.control = nil
		sessions, closing := c.sessions, c.closing
		c.mu.Unlock()
		type taken struct {
			s *session
			n int
		}
		var took []taken
		for _, s := range sessions {
			s.n.mu.Lock()
			n := 0
			for len(s.queue) > 0 && n < delta.MaxPiece {
				b := s.queue[0]
				s.queue = s.queue[1:]
				n += len(b)
				head := append([]byte(nil), b[:headerSize]...) // the body is shared with other sessions
				binary.BigEndian.PutUint16(head[2:], s.id)
				out = append(out, head, b[headerSize:])
			}
			s.n.mu.Unlock()
			if n > 0 {
				took = append(took, taken{s, n})
			}
		}
		if len(out) == 0 && idle {
			out = net.Buffers{frame{kind: framePing}.encode(nil)}
		}
		idle = false
		if len(out) > 0 {
			if sent == 0 {
				busy = time.Now()
			}
			_ = c.conn.SetWriteDeadline(time.Now().Add(silence))
			n, err := c.writeAll(out)
			sent += n
			if d := time.Since(busy); sent > 1<<20 && d > 10*time.Millisecond { // beyond what socket buffers swallow
				c.bytesPerSecond.Store(int64(float64(sent) / d.Seconds()))
			}
			for _, t := range took {
				t.s.n.mu.Lock()
				t.s.queued -= t.n
				t.s.n.cond.Broadcast()
				t.s.n.mu.Unlock()
				t.s.n.look()
			}
			if err != nil {
				return err
			}
			ping.Reset(pingEvery)
			continue
		}
		if closing {
			return nil
		}
		sent = 0
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-c.some:
		case <-ping.C:
			idle = true
		}
	}
}
