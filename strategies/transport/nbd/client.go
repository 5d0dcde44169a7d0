package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"memsync/strategies/region"
	"memsync/strategies/transport"
	"memsync/strategies/transport/flow"
)

const (
	maxConnections = 16
	demandPiece    = 1 << 20 // a longer request goes out in pieces of this size
	maxPieces      = 32      // of one request in flight
	spreadPiece    = 4 << 10 // the least that is worth a connection of its own; below the first window of TCP (RFC 6928)
	spreadRTT      = time.Millisecond
)

// Client is an NBD export as a region.Store.
//
// A request longer than a piece (1 MiB; in the background 256 KiB) goes out in
// pieces, in parallel and over all connections. On a path of a millisecond or
// more with several connections a request is cut into as many pieces as there are
// connections: each of them may send about 14 KB before the first acknowledgement
// (RFC 6928), so that 16 bring 200 KB in the first round trip, where one brings
// them in four. Background pieces grow with what the connections have carried, as
// TCP's windows do: short ones only cost system calls then. Demand requests take the least
// loaded connection, by what each can carry in a round trip. Background requests (region.Prefetch, region.Push) keep to
// the window, and off the first connection where there are several.
// Beside Store it offers what the server supports of region.Extenter, Zeroer,
// Trimmer and Cacher, and gives region.ErrNotSupported otherwise.
type Client struct {
	export Export
	conns  []*conn
	ro     bool
	bg     *flow.Window
	far    bool            // the path is long, requests are spread over the connections
	moved  [2]atomic.Int64 // bytes of background reads and writes so far
	calls  sync.Pool
	rmw    sync.RWMutex // writes that are smaller than a block, against all others
	closed atomic.Bool
}

var _ region.Store = (*Client)(nil)

// open connects and negotiates; see Transport.Open.
func (t *Transport) open(ctx context.Context, d transport.Dialer, o transport.Options) (*Client, error) {
	n, auto := o.Connections, o.Connections == 0
	if auto {
		n = maxConnections
	}
	if n < 1 || n > maxConnections {
		return nil, fmt.Errorf("open NBD export %q: %d connections, want 1 to %d", o.Name, n, maxConnections)
	}
	if o.Window < 0 {
		return nil, fmt.Errorf("open NBD export %q: window of %d bytes", o.Name, o.Window)
	}
	// How many connections pay is known once the first one stands. All are dialled
	// at once, so that the answer costs no round trip.
	var far bool
	known := make(chan struct{})
	links, exports := make([]*link, n), make([]Export, n)
	g, gctx := errgroup.WithContext(ctx)
	for i := range n {
		g.Go(func() error {
			ctx, cancel := context.WithTimeout(gctx, t.handshakeTimeout())
			defer cancel()
			began := time.Now()
			nc, err := d.Dial(ctx)
			if i == 0 {
				far = err == nil && roundTrip(nc, time.Since(began)) >= spreadRTT
				close(known)
			}
			if err != nil && auto && i > 0 {
				return nil
			}
			if err != nil {
				return fmt.Errorf("dial: %w", err)
			}
			if auto && i > 0 {
				if <-known; !far {
					nc.Close()
					return nil
				}
			}
			if links[i], exports[i], err = t.negotiate(ctx, nc, o.Name, transport.WriterOf(ctx, o), false, optGo); err != nil {
				nc.Close()
				if auto && i > 0 {
					links[i] = nil
					return nil
				}
				return err
			}
			tuneTCP(nc)
			return nil
		})
	}
	err := g.Wait()
	if auto && err == nil { // keep those that came about
		k := 0
		for i, l := range links {
			if l != nil {
				links[k], exports[k] = l, exports[i]
				k++
			}
		}
		links, exports = links[:k], exports[:k]
	}
	if err == nil && exports[0].Flags&FlagMultiConn == 0 {
		for i, l := range links[1:] { // the server does not promise that they agree
			l.disconnect(exports[i+1].Extended)
			l.close()
		}
		links = links[:1]
	}
	for i := range links {
		if err == nil && (exports[i].Size != exports[0].Size || exports[i].Flags != exports[0].Flags || exports[i].lease != exports[0].lease) {
			err = fmt.Errorf("connections see exports of %d and %d bytes: %w", exports[0].Size, exports[i].Size, region.ErrMismatch)
		}
	}
	c := &Client{export: exports[0], ro: o.ReadOnly || exports[0].Flags&FlagReadOnly != 0, bg: flow.New(o.Window), far: far && len(links) > 1}
	c.calls.New = func() any { return &call{done: make(chan struct{}, 1)} }
	for i, l := range links {
		if err == nil {
			err = l.enterTransmission(true)
		}
		if l != nil {
			c.conns = append(c.conns, newConn(l, exports[i].style(), exports[i].meta))
		}
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("open NBD export %q: %w", o.Name, err)
	}
	return c, nil
}

// roundTrip is the path's round-trip time: what TCP measured of its own handshake,
// else the time that dialling took.
func roundTrip(nc net.Conn, dialled time.Duration) time.Duration {
	tc, ok := nc.(*net.TCPConn)
	if !ok {
		return dialled
	}
	raw, err := tc.SyscallConn()
	if err != nil {
		return dialled
	}
	_ = raw.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil && info.Rtt > 0 {
			dialled = time.Duration(info.Rtt) * time.Microsecond
		}
	})
	return dialled
}

// tuneTCP makes a lost peer known within two minutes.
func tuneTCP(nc net.Conn) {
	tc, ok := nc.(*net.TCPConn)
	if !ok {
		return
	}
	tc.SetNoDelay(true)
	tc.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 15 * time.Second, Count: 6})
	setUserTimeout(tc, 2*time.Minute)
}

// Export describes what the server offered.
func (c *Client) Export() Export { return c.export }

// Connections is the number of connections in use.
func (c *Client) Connections() int { return len(c.conns) }

// Epoch implements region.Epocher.
func (c *Client) Epoch() uint32 { return c.export.lease }

// Size is the export's size in bytes.
func (c *Client) Size() int64 { return c.export.Size }

// Blocks are the server's constraints. The client keeps to them by itself.
func (c *Client) Blocks() region.Blocks { return c.export.Blocks }

// ReadOnly reports whether writes give region.ErrReadOnly.
func (c *Client) ReadOnly() bool { return c.ro }

// check begins every request.
func (c *Client) check(ctx context.Context, write bool, off, n int64) error {
	if c.closed.Load() {
		return fmt.Errorf("NBD export %q: %w", c.export.Name, region.ErrClosed)
	}
	if write && c.ro {
		return fmt.Errorf("write [%d, +%d) to NBD export %q: %w", off, n, c.export.Name, region.ErrReadOnly)
	}
	if err := region.CheckRange(off, n, c.export.Size); err != nil {
		return err
	}
	return ctx.Err()
}

// pick returns the connection for the next request of n bytes.
func (c *Client) pick(class region.Class) *conn {
	conns := c.conns
	if len(conns) == 1 {
		return conns[0]
	}
	if class != region.Demand {
		conns = conns[1:]
	}
	best, load := conns[0], -1.0
	for _, k := range conns {
		n := float64(k.load.Load())
		if class == region.Demand {
			// Many at once must not wait on the first connection, which may have
			// carried little yet, for four round trips that the others do not need.
			n /= float64(k.window())
		}
		if (load < 0 || n < load) && k.lost() == nil {
			best, load = k, n
		}
	}
	if load < 0 && best.lost() != nil {
		for _, k := range c.conns {
			if k.lost() == nil {
				return k
			}
		}
	}
	return best
}

// ReadAt is region.Store's; one round trip where p is a piece or less.
func (c *Client) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := c.check(ctx, false, off, int64(len(p))); err != nil || len(p) == 0 {
		return err
	}
	if m := c.export.Blocks.Minimum; (off|int64(len(p)))&(m-1) != 0 {
		lo, hi := off&^(m-1), region.RoundUp(off+int64(len(p)), m)
		b := make([]byte, hi-lo)
		if err := c.transfer(ctx, cmdRead, 0, b, nil, lo, hi-lo); err != nil {
			return err
		}
		copy(p, b[off-lo:])
		return nil
	}
	return c.transfer(ctx, cmdRead, 0, p, nil, off, int64(len(p)))
}

// WriteAt is region.Store's.
func (c *Client) WriteAt(ctx context.Context, p []byte, off int64) error {
	return c.write(ctx, p, off, 0)
}

// WriteFUA is WriteAt that returns once the bytes are durable: with forced unit
// access where the server offers it, else with a flush.
func (c *Client) WriteFUA(ctx context.Context, p []byte, off int64) error {
	if c.export.Flags&FlagFUA != 0 {
		return c.write(ctx, p, off, cmdFlagFUA)
	}
	if err := c.write(ctx, p, off, 0); err != nil {
		return err
	}
	return c.Flush(ctx)
}

func (c *Client) write(ctx context.Context, p []byte, off int64, flags uint16) error {
	n := int64(len(p))
	if err := c.check(ctx, true, off, n); err != nil || n == 0 {
		return err
	}
	m := c.export.Blocks.Minimum
	if m == 1 {
		return c.transfer(ctx, cmdWrite, flags, nil, p, off, n)
	}
	lo, hi := off&^(m-1), region.RoundUp(off+n, m)
	if lo == off && hi == off+n {
		c.rmw.RLock()
		defer c.rmw.RUnlock()
		return c.transfer(ctx, cmdWrite, flags, nil, p, off, n)
	}
	c.rmw.Lock() // no other write may come between reading the rest of a block and writing it back
	defer c.rmw.Unlock()
	b := make([]byte, hi-lo)
	if err := c.transfer(ctx, cmdRead, 0, b[:m], nil, lo, m); err != nil {
		return err
	}
	if hi-lo > m {
		if err := c.transfer(ctx, cmdRead, 0, b[hi-lo-m:], nil, hi-m, m); err != nil {
			return err
		}
	}
	copy(b[off-lo:], p)
	return c.transfer(ctx, cmdWrite, flags, nil, b, lo, hi-lo)
}

// Flush is region.Store's. It does nothing where the server has nothing to flush.
func (c *Client) Flush(ctx context.Context) error {
	if err := c.check(ctx, false, 0, 0); err != nil {
		return err
	}
	if c.export.Flags&FlagFlush == 0 {
		return nil
	}
	return c.transfer(ctx, cmdFlush, 0, nil, nil, 0, 0)
}

// Trim is region.Trimmer's; it leaves out parts of blocks.
func (c *Client) Trim(ctx context.Context, off, n int64) error {
	if err := c.check(ctx, true, off, n); err != nil {
		return err
	}
	if c.export.Flags&FlagTrim == 0 {
		return fmt.Errorf("trim NBD export %q: %w", c.export.Name, region.ErrNotSupported)
	}
	m := c.export.Blocks.Minimum
	lo, hi := region.RoundUp(off, m), (off+n)&^(m-1)
	if lo >= hi {
		return nil
	}
	return c.long(ctx, cmdTrim, 0, lo, hi-lo)
}

// WriteZeroes is region.Zeroer's.
func (c *Client) WriteZeroes(ctx context.Context, off, n int64, hole bool) error {
	if err := c.check(ctx, true, off, n); err != nil || n == 0 {
		return err
	}
	if c.export.Flags&FlagWriteZeroes == 0 {
		return fmt.Errorf("write zeroes to NBD export %q: %w", c.export.Name, region.ErrNotSupported)
	}
	m := c.export.Blocks.Minimum
	lo, hi := region.RoundUp(off, m), (off+n)&^(m-1)
	if lo >= hi {
		return c.write(ctx, make([]byte, n), off, 0)
	}
	if err := c.write(ctx, make([]byte, lo-off), off, 0); err != nil {
		return err
	}
	var flags uint16 = cmdFlagNoHole
	if hole {
		flags = 0
	}
	c.rmw.RLock()
	err := c.long(ctx, cmdWriteZeroes, flags, lo, hi-lo)
	c.rmw.RUnlock()
	if err != nil {
		return err
	}
	return c.write(ctx, make([]byte, off+n-hi), hi, 0)
}

// Cache is region.Cacher's.
func (c *Client) Cache(ctx context.Context, off, n int64) error {
	if err := c.check(ctx, false, off, n); err != nil || n == 0 {
		return err
	}
	if c.export.Flags&FlagCache == 0 {
		return fmt.Errorf("cache NBD export %q: %w", c.export.Name, region.ErrNotSupported)
	}
	m := c.export.Blocks.Minimum
	lo, hi := off&^(m-1), region.RoundUp(off+n, m)
	return c.long(ctx, cmdCache, 0, lo, hi-lo)
}

// long sends a command without payload, cut into lengths that the headers can hold.
func (c *Client) long(ctx context.Context, cmd command, flags uint16, off, n int64) error {
	step := int64(1) << 31
	if c.export.Extended {
		step = n
	}
	for n > 0 {
		k := min(n, step)
		if err := c.transfer(ctx, cmd, flags, nil, nil, off, k); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

// Extents is region.Extenter's, by base:allocation. It gives
// region.ErrNotSupported where the server does not offer that.
func (c *Client) Extents(ctx context.Context, off, n int64) ([]region.Extent, error) {
	if err := c.check(ctx, false, off, n); err != nil || n == 0 {
		return nil, err
	}
	if !c.export.Allocation {
		return nil, fmt.Errorf("extents of NBD export %q: %w", c.export.Name, region.ErrNotSupported)
	}
	m := c.export.Blocks.Minimum
	lo, hi := off&^(m-1), region.RoundUp(off+n, m)
	if !c.export.Extended {
		hi = min(hi, lo+1<<31)
	}
	k := c.get(cmdBlockStatus, 0, nil, lo, hi-lo)
	cn := c.pick(region.ClassOf(ctx))
	if err := cn.start(ctx, k, nil); err != nil {
		return nil, c.fix(err)
	}
	err := cn.wait(ctx, k)
	if err != nil {
		return nil, c.fix(err)
	}
	ext := k.extents
	c.put(k)
	ext[0].Length -= off - lo
	if ext[0].Length <= 0 {
		return nil, protocolError("block status of [%d, +%d) with an extent smaller than a block", lo, hi-lo)
	}
	var sum int64
	for i := range ext {
		if sum += ext[i].Length; sum >= n {
			ext[i].Length -= sum - n
			return ext[:i+1], nil
		}
	}
	return ext, nil
}

func (c *Client) get(cmd command, flags uint16, buf []byte, off, n int64) *call {
	k := c.calls.Get().(*call)
	if cmd == cmdWrite && c.export.Extended {
		flags |= cmdFlagPayloadLen
	}
	k.req = request{flags: flags, cmd: cmd, off: uint64(off), length: uint64(n)}
	k.buf, k.stamp = buf, false
	return k
}

// put takes back a call that has finished (an abandoned one stays out).
func (c *Client) put(k *call) {
	select {
	case <-k.done:
	default:
	}
	k.over.Store(false)
	k.req, k.buf, k.err, k.next, k.scattered, k.extents = request{}, nil, nil, 0, nil, nil
	c.calls.Put(k)
}

// fix gives requests that Close cut off the error that the user expects.
func (c *Client) fix(err error) error {
	if c.closed.Load() && errors.Is(err, region.ErrPeerGone) {
		return fmt.Errorf("NBD export %q: %w", c.export.Name, region.ErrClosed)
	}
	return err
}

// transfer carries out one command. dst is what a read fills, src what a write
// sends; both have n bytes, or none.
func (c *Client) transfer(ctx context.Context, cmd command, flags uint16, dst, src []byte, off, n int64) error {
	class := region.ClassOf(ctx)
	piece := int64(demandPiece)
	if class != region.Demand {
		piece = c.bg.Piece()
	}
	if c.far {
		conns := int64(len(c.conns))
		least := int64(spreadPiece)
		if class != region.Demand {
			least = max(least, c.moved[direction(cmd)].Load()/conns&^(spreadPiece-1))
		}
		piece = min(piece, max(least, region.RoundUp((n+conns-1)/conns, spreadPiece)))
	}
	piece = max(min(piece, c.export.Blocks.Maximum)&^(c.export.Blocks.Minimum-1), c.export.Blocks.Minimum)
	payload := len(dst) > 0 || len(src) > 0
	if class == region.Demand && (n <= piece || !payload) {
		return c.single(ctx, class, cmd, flags, dst, src, off, n)
	}
	if !payload {
		return c.single(ctx, class, cmd, flags, nil, nil, off, n)
	}
	return c.pieces(ctx, class, cmd, flags, dst, src, off, n, piece)
}

// direction is that of a command's payload, for Client.moved.
func direction(cmd command) int {
	if cmd == cmdWrite {
		return 1
	}
	return 0
}

func (c *Client) single(ctx context.Context, class region.Class, cmd command, flags uint16, dst, src []byte, off, n int64) error {
	cn := c.pick(class)
	k := c.get(cmd, flags, dst, off, n)
	err := cn.start(ctx, k, src)
	if err == nil {
		err = cn.wait(ctx, k)
	}
	if err != nil {
		return c.fix(err)
	}
	c.put(k)
	return nil
}

// pieces carries out a long or background request in pieces.
func (c *Client) pieces(ctx context.Context, class region.Class, cmd command, flags uint16, dst, src []byte, off, n, piece int64) error {
	type flight struct {
		cn   *conn
		k    *call
		n    int64
		sent time.Time
	}
	var queue [maxPieces]flight
	head, count := 0, 0
	var first error
	reap := func() {
		f := &queue[head%maxPieces]
		head, count = head+1, count-1
		err := f.cn.wait(ctx, f.k)
		if class != region.Demand {
			took := time.Duration(0)
			if err == nil {
				took = f.k.at.Sub(f.sent)
				c.moved[direction(cmd)].Add(f.n)
			}
			c.bg.Release(f.n, took)
		}
		if err == nil {
			c.put(f.k)
		} else if first == nil {
			first = err
		}
	}
	for done := int64(0); done < n && first == nil; {
		m := min(piece, n-done)
		if count == maxPieces {
			reap()
			continue
		}
		f := flight{cn: c.pick(class), n: m}
		if class != region.Demand {
			if !c.bg.Try(m) {
				if count > 0 {
					reap() // who waits for the window must not hold what others could lead
					continue
				}
				if first = c.bg.Acquire(ctx, m); first != nil {
					break
				}
			}
			f.sent = time.Now()
		}
		var d, s []byte
		if dst != nil {
			d = dst[done : done+m]
		} else {
			s = src[done : done+m]
		}
		f.k = c.get(cmd, flags, d, off+done, m)
		f.k.stamp = class != region.Demand
		if first = f.cn.start(ctx, f.k, s); first != nil {
			if class != region.Demand {
				c.bg.Release(m, 0)
			}
			break
		}
		queue[(head+count)%maxPieces] = f
		count++
		done += m
	}
	for count > 0 {
		reap()
	}
	if first != nil {
		return c.fix(first)
	}
	return nil
}

// Close disconnects. Requests in flight end with region.ErrClosed.
func (c *Client) Close() error {
	if c.closed.Swap(true) {
		return nil
	}
	for _, cn := range c.conns {
		select {
		case cn.write <- struct{}{}: // else a sender is stuck: no polite way out
			cn.l.disconnect(cn.style == extended)
			<-cn.write
		default:
		}
		cn.fail(fmt.Errorf("NBD connection: %w: %w", region.ErrPeerGone, region.ErrClosed))
		cn.drainer.Wait()
	}
	return nil
}
