package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	readBuffer  = 64 << 10
	writePiece  = 256 << 10 // of a slow write, between two deadlines
	directLimit = 16 << 10  // payloads this long go straight into the caller's buffer
	maxIovecs   = 2 * batchReplies
	quick       = 64 << 10 // bytes that a call which does not wait copies without telling the Go scheduler: about 20 us
	headLimit   = 4 << 10  // read ahead of such a payload, so that little of it is copied
	lowWater    = 64 << 10 // of a payload, for which it is worth to wake up
)

var (
	errInterrupted = errors.New("interrupted")
	errAgain       = errors.New("nothing to read yet")
	errNotSent     = errors.New("not sent")
)

// link is the byte stream of one connection, with a read buffer.
//
// On a TCP or Unix socket it waits in recv(2) on the reader's own thread, not
// in Go's network poller: the thread that wakes up is then the one that wants
// the bytes, which saves a scheduler hand-off (several us) in each round trip.
// On any other net.Conn (TLS, pipes, wrappers) it reads and writes plainly.
//
// One goroutine at a time may read, and one may write.
type link struct {
	conn net.Conn        // for plain reads and slow writes: out, or TLS above it
	out  *tailConn       // the connection as given
	raw  syscall.RawConn // nil where there is no descriptor to wait on

	buf     []byte
	r, w    int  // buf[r:w] is read but not consumed
	drained bool // the last receive took all there was
	tcp     bool // raw is a TCP socket
	low     int  // its low-water mark; 0 is the kernel's, 1

	spin spinner // of who reads

	interruptible bool
	interrupted   atomic.Bool

	posted chan error // of the handshake's write, which runs beside its reads

	life sync.Mutex // of the descriptors, against close
	sock *os.File   // that of raw
	dead bool

	// Arguments and results of the functions below, which are made once so
	// that a request allocates nothing.
	recvFn, pollFn, writeFn, pollOutFn func(fd uintptr) bool
	readTo                             []byte
	readFlags                          int
	readN                              int
	readErr                            unix.Errno
	timeout                            int // ms; -1 is none
	iov                                []unix.Iovec
	msg                                unix.Msghdr
	writeN                             int
	writeErr                           unix.Errno
	writeWait                          int // ms
}

// newLink wraps c for the handshake: the deadlines of c hold.
func newLink(c net.Conn) *link {
	out := &tailConn{Conn: c}
	return &link{conn: out, out: out, buf: make([]byte, readBuffer)}
}

// enterTransmission takes a plain TCP or Unix socket away from Go's network
// poller: in there, each arrival would also wake a thread that waits in
// epoll_wait(2) for nothing, on a CPU that the peer needs (measured: +15 us for
// a round trip on two CPUs). The socket given is closed for that, and a
// duplicate takes its place. With interruptible, interrupt works from here on.
func (l *link) enterTransmission(interruptible bool) error {
	l.interruptible = interruptible
	if l.conn != net.Conn(l.out) {
		return nil // TLS
	}
	var sc syscall.Conn
	switch c := l.out.Conn.(type) { // exact types: a wrapper's own Read must be called
	case *net.TCPConn:
		sc, l.tcp = c, true
	case *net.UnixConn:
		sc = c
	default:
		return nil
	}
	l.life.Lock()
	defer l.life.Unlock()
	if l.dead {
		return net.ErrClosed
	}
	own, err := takeSocket(sc)
	if err != nil {
		return err
	}
	raw, err := own.SyscallConn()
	if err != nil {
		own.Close()
		return err
	}
	if interruptible {
		tv := unix.NsecToTimeval(int64(recvPoll))
		if err := unix.SetsockoptTimeval(int(own.Fd()), unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
			own.Close()
			return os.NewSyscallError("setsockopt SO_RCVTIMEO", err)
		}
	}
	l.sock, l.raw = own, raw
	l.out.Conn.Close()

	l.recvFn = func(fd uintptr) bool {
		// Not unix.Read or Writev: they tell the race detector of an access,
		// but a view of memory that is being served may change at any time.
		call := unix.Syscall6
		if l.readFlags&unix.MSG_DONTWAIT != 0 && len(l.readTo) <= quick {
			call = unix.RawSyscall6
		}
		r, _, errno := call(unix.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(unsafe.SliceData(l.readTo))), uintptr(len(l.readTo)), uintptr(l.readFlags), 0, 0)
		afterReceive()
		l.readN, l.readErr = int(r), errno
		return true
	}
	l.pollFn = func(fd uintptr) bool {
		p := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		l.readN, l.readErr = poll(p[:], l.timeout)
		return true
	}
	l.writeFn = func(fd uintptr) bool {
		l.msg = unix.Msghdr{Iov: unsafe.SliceData(l.iov)}
		l.msg.SetIovlen(len(l.iov))
		beforeSend()
		call, n := unix.RawSyscall, uint64(0)
		for i := range l.iov {
			if n += l.iov[i].Len; n > quick {
				call = unix.Syscall
				break
			}
		}
		r, _, errno := call(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&l.msg)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		l.writeN, l.writeErr = int(r), errno
		return true
	}
	l.pollOutFn = func(fd uintptr) bool {
		p := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		l.writeN, l.writeErr = poll(p[:], l.writeWait)
		return true
	}
	return nil
}

func poll(fds []unix.PollFd, ms int) (int, unix.Errno) {
	n, err := unix.Poll(fds, ms)
	errno, _ := err.(unix.Errno)
	return n, errno
}

// buffered returns what is read but not consumed; it stays valid until the
// next read of the link.
func (l *link) buffered() []byte { return l.buf[l.r:l.w] }

func (l *link) consume(n int) { l.r += n }

// space makes room for up to limit more bytes in the buffer.
func (l *link) space(limit int) []byte {
	if l.r == l.w {
		l.r, l.w = 0, 0
	} else if len(l.buf)-l.w < limit {
		l.w = copy(l.buf, l.buf[l.r:l.w])
		l.r = 0
	}
	return l.buf[l.w:min(len(l.buf), l.w+limit)]
}

// recv receives into p without waiting. It returns errAgain where nothing is
// there, and always where the link cannot tell.
func (l *link) recv(p []byte) (int, error) {
	if l.raw == nil || l.drained {
		return 0, errAgain
	}
	return l.receive(p, unix.MSG_DONTWAIT)
}

func (l *link) receive(p []byte, flags int) (int, error) {
	for {
		l.readTo, l.readFlags = p, flags
		err := l.raw.Read(l.recvFn)
		l.readTo = nil
		switch {
		case err != nil:
			return 0, err
		case l.readErr == unix.EINTR && flags == 0: // who sent the signal may have asked for an interrupt
			return 0, errAgain
		case l.readErr == unix.EINTR:
			continue
		case l.readErr == unix.EAGAIN:
			l.drained = true
			return 0, errAgain
		case l.readErr != 0:
			return 0, os.NewSyscallError("recv", l.readErr)
		case l.readN == 0:
			return 0, io.EOF
		}
		l.drained = l.readN < len(p)
		return l.readN, nil
	}
}

// recvBuf is recv into the buffer, up to limit bytes.
func (l *link) recvBuf(limit int) error {
	n, err := l.recv(l.space(limit))
	l.w += n
	return err
}

// await blocks until there is more to read: it receives some into the buffer, from
// a socket up to limit bytes, or none where recv would now find something. It returns
// errInterrupted after interrupt, and os.ErrDeadlineExceeded after timeout (0 is none).
func (l *link) await(limit int, timeout time.Duration) error {
	if l.raw == nil {
		if timeout > 0 {
			if err := l.conn.SetReadDeadline(time.Now().Add(timeout)); err != nil {
				return err
			}
			defer l.conn.SetReadDeadline(time.Time{})
		}
		n, err := l.conn.Read(l.space(readBuffer / 2)) // no recv follows that could save a copy
		l.w += n
		if n > 0 {
			return nil
		}
		if l.interruptible && errors.Is(err, os.ErrDeadlineExceeded) {
			l.conn.SetReadDeadline(time.Time{})
			return errInterrupted
		}
		return err
	}
	if timeout > 0 {
		return l.poll(timeout)
	}
	if l.spin.worth(l.raw) {
		for end := time.Now().Add(spinFor); time.Now().Before(end); {
			n, err := l.receive(l.space(limit), unix.MSG_DONTWAIT)
			l.w += n
			if err != errAgain {
				l.spin.spun(true)
				return err
			}
			_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0) // somebody else may have come to this CPU
		}
		l.spin.spun(false)
	}
	for {
		n, err := l.receive(l.space(limit), 0)
		l.w += n
		switch {
		case err != errAgain:
			return err
		case l.interrupted.Swap(false):
			return errInterrupted
		}
	}
}

// poll blocks until recv would find something.
func (l *link) poll(timeout time.Duration) error {
	l.timeout = int(max(timeout.Milliseconds(), 1))
	for {
		err := l.raw.Read(l.pollFn)
		switch {
		case err != nil:
			return err
		case l.readErr == unix.EINTR:
			continue
		case l.readErr != 0:
			return os.NewSyscallError("poll", l.readErr)
		case l.readN == 0:
			return os.ErrDeadlineExceeded
		}
		l.drained = false
		return nil
	}
}

// mark says that n bytes are missing to the end of a message. The next await of a
// TCP socket then ends when lowWater of them are there, or all, and not with every
// packet: a wake-up costs more than the packet (SO_RCVLOWAT, socket(7)). Only for
// waits without a timeout, which would take a slow peer for a stalled one.
func (l *link) mark(n uint64) error {
	if !l.tcp {
		return nil
	}
	low := int(min(n, lowWater))
	if low < lowWater/4 {
		low = 0 // saves less than the two calls
	}
	if low == l.low || l.low > 0 && l.low <= low { // a lower mark than could be is no harm
		return nil
	}
	l.low = low
	var set error
	err := l.raw.Control(func(fd uintptr) { set = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVLOWAT, max(low, 1)) })
	return errors.Join(err, os.NewSyscallError("setsockopt SO_RCVLOWAT", set))
}

// interrupt ends an await that is under way, or else the next one; on a socket
// up to recvPoll later.
func (l *link) interrupt() {
	if l.raw == nil {
		l.conn.SetReadDeadline(time.Unix(1, 0))
		return
	}
	l.interrupted.Store(true)
}

// need blocks until at least n bytes (at most the buffer's size) are buffered.
// Only a single reader that is never interrupted may use it.
func (l *link) need(n int, timeout time.Duration) error {
	for l.w-l.r < n {
		err := l.recvBuf(len(l.buf))
		if err == errAgain {
			err = l.await(readBuffer/2, timeout)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// readFull fills p, each wait of it at most timeout long; see need.
func (l *link) readFull(p []byte, timeout time.Duration) error {
	n := copy(p, l.buffered())
	l.consume(n)
	for p = p[n:]; len(p) > 0; p = p[n:] {
		var err error
		n, err = l.recv(p)
		if err == errAgain {
			if err = l.await(readBuffer/2, timeout); err == nil {
				n = copy(p, l.buffered())
				l.consume(n)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// skip reads n bytes and drops them; see need.
func (l *link) skip(n uint64, timeout time.Duration) error {
	for n > 0 {
		if l.r == l.w {
			if err := l.need(1, timeout); err != nil {
				return err
			}
		}
		k := int(min(n, uint64(l.w-l.r)))
		l.consume(k)
		n -= uint64(k)
	}
	return nil
}

// trySend writes what the socket takes at once, and returns what is left.
func (l *link) trySend(bufs [][]byte) ([][]byte, error) {
	if l.raw == nil || len(bufs) == 0 {
		return bufs, nil
	}
	for {
		l.iov = l.iov[:0]
		for _, b := range bufs[:min(len(bufs), maxIovecs)] {
			v := unix.Iovec{Base: unsafe.SliceData(b)}
			v.SetLen(len(b))
			l.iov = append(l.iov, v)
		}
		err := l.raw.Write(l.writeFn)
		clear(l.iov)
		switch {
		case err != nil:
			return nil, err
		case l.writeErr == unix.EINTR:
			continue
		case l.writeErr == unix.EAGAIN:
			return bufs, nil
		case l.writeErr != 0:
			return nil, os.NewSyscallError("sendmsg", l.writeErr)
		}
		n := l.writeN
		for len(bufs) > 0 && n >= len(bufs[0]) {
			n -= len(bufs[0])
			bufs = bufs[1:]
		}
		if n > 0 {
			bufs[0] = bufs[0][n:]
		}
		return bufs, nil
	}
}

// sendAll writes bufs, which it uses up. It fails after stall without progress.
func (l *link) sendAll(bufs [][]byte, stall time.Duration) error {
	for {
		var err error
		if bufs, err = l.trySend(bufs); err != nil || len(bufs) == 0 {
			return err
		}
		if l.raw == nil {
			break
		}
		l.writeWait = int(max(stall.Milliseconds(), 1))
		switch err := l.raw.Write(l.pollOutFn); {
		case err != nil:
			return err
		case l.writeErr != 0 && l.writeErr != unix.EINTR:
			return os.NewSyscallError("poll", l.writeErr)
		case l.writeErr == 0 && l.writeN == 0:
			return fmt.Errorf("peer has read nothing for %v: %w", stall, os.ErrDeadlineExceeded)
		}
	}
	defer l.out.SetWriteDeadline(time.Time{})
	for _, b := range bufs {
		for len(b) > 0 {
			if err := l.out.SetWriteDeadline(time.Now().Add(stall)); err != nil {
				return err
			}
			n, err := l.conn.Write(b[:min(len(b), writePiece)])
			if err != nil {
				return err
			}
			b = b[n:]
		}
	}
	return nil
}

// sendSlow writes bufs, waiting for the peer. Where ctx ends in the middle it
// copies what is left, to go out before the next message, so that the stream
// stays whole; it then returns ctx's error, or errNotSent where no byte of bufs
// is or will be on its way.
func (l *link) sendSlow(ctx context.Context, bufs [][]byte, begun bool) error {
	if l.raw != nil {
		return l.sendSlowRaw(ctx, bufs, begun)
	}
	stop := l.out.cancelOn(ctx)
	defer stop()
	if err := l.out.flush(); err != nil {
		return err
	}
	if l.out.cancelled.Load() && !begun {
		return errNotSent
	}
	for _, b := range bufs {
		if _, err := l.conn.Write(b); err != nil {
			return err
		}
	}
	if l.out.cancelled.Load() {
		return ctx.Err()
	}
	return nil
}

// cancelPoll is how often who waits for the peer looks at its context.
const cancelPoll = 10 * time.Millisecond

// recvPoll is the same for who waits for replies, which many threads do at once.
const recvPoll = 50 * time.Millisecond

func (l *link) sendSlowRaw(ctx context.Context, bufs [][]byte, begun bool) error {
	t := l.out
	for {
		if len(t.tail) > 0 {
			rest, err := l.trySend([][]byte{t.tail})
			if err != nil {
				return err
			}
			if t.tail = nil; len(rest) > 0 {
				t.tail = rest[0]
			}
		}
		if len(t.tail) == 0 {
			before := len(bufs[0])
			n := len(bufs)
			var err error
			if bufs, err = l.trySend(bufs); err != nil || len(bufs) == 0 {
				return err
			}
			begun = begun || len(bufs) < n || len(bufs[0]) < before
		}
		if err := ctx.Err(); err != nil {
			if !begun {
				return errNotSent
			}
			for _, b := range bufs {
				t.tail = append(t.tail, b...)
			}
			return err
		}
		l.writeWait = int(cancelPoll.Milliseconds())
		if err := l.raw.Write(l.pollOutFn); err != nil {
			return err
		}
		if l.writeErr != 0 && l.writeErr != unix.EINTR {
			return os.NewSyscallError("poll", l.writeErr)
		}
	}
}

// disconnect sends NBD_CMD_DISC if that needs no waiting to speak of.
func (l *link) disconnect(ext bool) {
	if len(l.out.tail) > 0 {
		return
	}
	b := request{cmd: cmdDisc}.append(nil, ext)
	if rest, err := l.trySend([][]byte{b}); err != nil || len(rest) == 0 {
		return
	}
	l.conn.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	l.conn.Write(b)
	l.bye()
}

// bye ends a TLS session; the stream below stays open.
func (l *link) bye() {
	if t, ok := l.conn.(*tls.Conn); ok {
		t.CloseWrite() // has a deadline of its own
	}
}

// close ends reads and writes that are under way, and releases everything.
func (l *link) close() {
	l.life.Lock()
	defer l.life.Unlock()
	l.dead = true
	l.out.Conn.Close()
	if l.raw != nil {
		l.raw.Control(func(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_RDWR) })
		l.sock.Close() // takes effect once poll and recv have left it
	}
}

// tailConn is a net.Conn whose Write can be cancelled without breaking the
// stream: it then keeps the bytes that did not go out. It works below TLS too,
// which takes an interrupted Write for the end of the connection.
type tailConn struct {
	net.Conn
	cancelled atomic.Bool
	tail      []byte
}

func (t *tailConn) Write(p []byte) (int, error) {
	if t.cancelled.Load() {
		t.tail = append(t.tail, p...)
		return len(p), nil
	}
	n, err := t.Conn.Write(p)
	if err != nil && t.cancelled.Load() && errors.Is(err, os.ErrDeadlineExceeded) {
		t.tail = append(t.tail, p[n:]...)
		return len(p), nil
	}
	return n, err
}

// flush writes the tail. It leaves what does not go out before cancellation.
func (t *tailConn) flush() error {
	if len(t.tail) == 0 {
		return nil
	}
	n, err := t.Conn.Write(t.tail)
	if t.tail = t.tail[n:]; len(t.tail) == 0 {
		t.tail = nil
	}
	if err != nil && t.cancelled.Load() && errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return err
}

// cancelOn lets the end of ctx cancel writes until stop is called.
func (t *tailConn) cancelOn(ctx context.Context) (stop func()) {
	if ctx.Done() == nil {
		return func() {}
	}
	var mu sync.Mutex
	active := true
	unregister := context.AfterFunc(ctx, func() {
		mu.Lock()
		defer mu.Unlock()
		if active {
			t.cancelled.Store(true)
			t.Conn.SetWriteDeadline(time.Unix(1, 0))
		}
	})
	return func() {
		if unregister() {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		active = false
		t.cancelled.Store(false)
		t.Conn.SetWriteDeadline(time.Time{})
	}
}
