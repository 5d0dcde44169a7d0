package fuse

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// port is one descriptor of the connection with its own queue of requests that
// were read and not yet answered: a reply goes out where its request came in.
type port struct {
	f    *os.File // for its reference count: no reply can hit a reused descriptor
	rc   syscall.RawConn
	idle atomic.Int32 // goroutines that wait to read it
}

func newPort(fd int) (*port, error) {
	f := os.NewFile(uintptr(fd), devicePath)
	rc, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &port{f: f, rc: rc}, nil
}

func (p *port) close() { _ = p.f.Close() }

// clone opens a further descriptor of the same connection. Linux 4.2.
func (p *port) clone() (*port, error) {
	fd, err := openDevice()
	if err != nil {
		return nil, err
	}
	var errno syscall.Errno
	if err := p.rc.Control(func(first uintptr) {
		arg := uint32(first)
		_, _, errno = unix.Syscall(unix.SYS_IOCTL, uintptr(fd), iocClone, uintptr(unsafe.Pointer(&arg)))
	}); err != nil {
		unix.Close(fd)
		return nil, err
	}
	if errno != 0 {
		unix.Close(fd)
		return nil, errno
	}
	return newPort(fd)
}

// read returns the next request, in b. It blocks until there is one, the
// connection ends or the port is closed.
func (p *port) read(b []byte) (n int, err error) {
	for {
		var errno syscall.Errno
		err := p.rc.Read(func(fd uintptr) bool {
			// Without telling the scheduler: the descriptor does not block,
			// and a request is copied within some 100 us.
			r, _, e := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
			n, errno = int(r), e
			return e != unix.EAGAIN
		})
		switch {
		case err != nil:
			return 0, err
		case errno == 0:
			return n, nil
		case errno == unix.EINTR || errno == unix.ENOENT: // ENOENT: the request was taken back
		default:
			return 0, errno
		}
	}
}

// threadRead is read for a loop on a thread of its own: it polls for spin, then
// sleeps. It returns ErrClosed once stop is readable. Both descriptors must stay open.
func threadRead(fd uintptr, b []byte, stop int, spin time.Duration) (int, error) {
	var start time.Time
	for {
		n, _, e := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
		switch e {
		case 0:
			return int(n), nil
		case unix.EINTR, unix.ENOENT: // ENOENT: the request was taken back
			continue
		case unix.EAGAIN:
		default:
			return 0, e
		}
		if spin > 0 {
			if start.IsZero() {
				start = time.Now()
			}
			if time.Since(start) < spin {
				_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0) // the workload may share the CPU
				continue
			}
		}
		fds := [2]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(stop), Events: unix.POLLIN}}
		_, _ = unix.Poll(fds[:], -1)
		if fds[1].Revents != 0 {
			return 0, os.ErrClosed
		}
	}
}

// reply answers one request with an error, or with data: the concatenation of a and b.
func (p *port) reply(unique uint64, errno syscall.Errno, a, b []byte) error {
	return p.write(-int32(errno), unique, a, b)
}

func (p *port) notify(code int32, a, b []byte) error { return p.write(code, 0, a, b) }

func (p *port) write(code int32, unique uint64, a, b []byte) error {
	var head [outHeaderSize]byte
	le.PutUint32(head[:], uint32(outHeaderSize+len(a)+len(b)))
	le.PutUint32(head[4:], uint32(code))
	le.PutUint64(head[8:], unique)
	iov := [3]syscall.Iovec{iovec(head[:]), iovec(a), iovec(b)}
	var errno syscall.Errno
	if err := p.rc.Control(func(fd uintptr) {
		for {
			_, _, errno = unix.Syscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&iov)), uintptr(len(iov)))
			if errno != unix.EINTR {
				return
			}
		}
	}); err != nil {
		return err
	}
	if errno != 0 {
		return errno
	}
	return nil
}

// lead is how much of a buffer stays free before a request, so that the data of
// a WRITE begins on a page.
const lead = 4096 - inHeaderSize - rwInSize

// serve starts to answer requests of p.
//
// Where the store has views, a loop with a thread of its own answers reads of
// views itself; the rest has a worker each. Else goroutines take turns: the one
// that has read a request serves it, without a hand-over, and another one reads
// the next. The kernel bounds their number: max_background and one per thread
// of the workload.
func (d *Device) serve(p *port) {
	d.loops.Add(1)
	if d.viewer == nil {
		go d.follow(p)
		return
	}
	stop := int(d.stop.Fd())
	go func() {
		defer d.loops.Done()
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		_ = p.rc.Control(func(fd uintptr) { // which keeps the descriptor open
			d.loop(p, func(b []byte) (int, error) { return threadRead(fd, b, stop, d.spin) })
		})
	}()
}

// follow is one of the goroutines that take turns to read p. Whoever reads a
// request while nobody else waits to read the next one starts a follower first.
func (d *Device) follow(p *port) {
	defer d.loops.Done()
	d.loop(p, func(b []byte) (int, error) {
		p.idle.Add(1)
		n, err := p.read(b)
		if p.idle.Add(-1) == 0 && err == nil {
			d.loops.Add(1)
			go d.follow(p)
		}
		return n, err
	})
}

func (d *Device) loop(p *port, read func([]byte) (int, error)) {
	b := d.bufs.get(lead + d.requestSize)
	for {
		n, err := read(b[lead:])
		if err != nil { // ENODEV: unmounted or aborted; ErrClosed: Close
			d.bufs.put(b)
			return
		}
		h, body, err := parseHeader(b[lead : lead+n])
		if err != nil {
			d.fail(err)
		} else if d.dispatch(p, h, body, b) {
			b = d.bufs.get(lead + d.requestSize)
		}
	}
}

// dispatch answers a request or has a goroutine do so. It returns true if it
// keeps the request's buffer.
func (d *Device) dispatch(p *port, h header, body []byte, b []byte) bool {
	switch h.opcode {
	case opRead:
		r, _, errno := parseRW(body)
		if errno == 0 {
			r.n = max(0, min(r.n, d.size-r.off)) // the kernel asks for whole pages
			if d.viewer != nil {
				if v, ok := d.viewer.View(r.off, r.n); ok {
					d.counters.reads.Add(1)
					d.counters.readBytes.Add(r.n)
					d.answer(p, h, 0, v)
					return false
				}
			}
			d.async(p, h, func(q *request) { d.read(p, q, r) })
			return false
		}
		d.answer(p, h, errno, nil)
	case opWrite:
		r, data, errno := parseRW(body)
		if errno == 0 {
			d.async(p, h, func(q *request) { d.write(p, q, r, data); d.bufs.put(b) })
			return true
		}
		d.answer(p, h, errno, nil)
	case opFsync, opSyncfs:
		d.async(p, h, func(q *request) {
			d.counters.flushes.Add(1)
			d.answer(p, h, d.call(q, d.store.Flush), nil)
		})
	case opInterrupt:
		if len(body) < 8 {
			return false
		}
		d.counters.interrupts.Add(1)
		if q := d.inflight.get(le.Uint64(body)); q != nil {
			d.work(q.watch)
		} else {
			// Perhaps another port has read it and not registered it yet:
			// the kernel sends this again, unless the request was answered.
			_ = p.reply(h.unique, unix.EAGAIN, nil, nil)
			runtime.Gosched()
		}
	case opForget, opBatchForget, opNotifyReply: // no answer
	case opInit:
		d.init(p, h, body)
	case opGetattr:
		d.answer(p, h, 0, d.attr.encode())
	case opSetattr:
		d.answer(p, h, d.setattr(body), d.attr.encode())
	case opOpen:
		out := make([]byte, openOutSize)
		le.PutUint32(out[8:], openKeepCache)
		d.answer(p, h, 0, out)
	case opRelease, opDestroy:
		d.answer(p, h, 0, nil)
	case opStatfs:
		out := make([]byte, statfsOutSize)
		le.PutUint64(out, uint64(d.size+4095)/4096)
		le.PutUint32(out[40:], 4096) // bsize
		le.PutUint32(out[44:], 255)  // namelen
		le.PutUint32(out[48:], 4096) // frsize
		d.answer(p, h, 0, out)
	default: // FLUSH, LSEEK, FALLOCATE, IOCTL, ...: the kernel does its own or refuses
		d.answer(p, h, unix.ENOSYS, nil)
	}
	return false
}

// async registers a request that may wait for the store and has f serve it: here
// where others read on meanwhile, else in a worker.
func (d *Device) async(p *port, h header, f func(*request)) {
	q := d.inflight.add(d.ctx, h, d.timeout)
	run := func() {
		f(q)
		d.inflight.remove(q) // after the answer: until then an INTERRUPT must find it
	}
	if d.viewer == nil {
		run()
	} else {
		d.work(run)
	}
}

// work runs f in an idle worker or a new one. Workers stay until the loops end,
// as growing the stack of a new goroutine took 7 % of a 4 KiB read.
func (d *Device) work(f func()) {
	select {
	case d.jobs <- f:
		return
	default:
	}
	d.workers.Add(1) // the loop that calls us still runs, so nobody waits yet
	go func() {
		defer d.workers.Done()
		for {
			f()
			select {
			case f = <-d.jobs:
			case <-d.quit:
				return
			}
		}
	}()
}

// answer sends a reply. A reply that the kernel does not take (a view whose
// memory is gone) becomes EIO, so that nobody waits for ever.
func (d *Device) answer(p *port, h header, errno syscall.Errno, data []byte) {
	if errno != 0 {
		data = nil
	}
	err := p.reply(h.unique, errno, data, nil)
	if err == nil || errors.Is(err, unix.ENOENT) || errors.Is(err, os.ErrClosed) {
		return // ENOENT: interrupted or aborted meanwhile
	}
	d.fail(fmt.Errorf("answer FUSE request %d (opcode %d): %w", h.unique, h.opcode, err))
	if errno == 0 {
		_ = p.reply(h.unique, unix.EIO, nil, nil)
	}
}

func (d *Device) fail(err error) {
	d.counters.errors.Add(1)
	d.lastErr.Store(&err)
}

// call runs f with the request's context, which ends at the deadline, at Close,
// and when the workload's thread is killed.
func (d *Device) call(q *request, f func(context.Context) error) syscall.Errno {
	err := f(q.ctx)
	switch {
	case err == nil:
		return 0
	case q.killed.Load():
		return unix.EINTR
	}
	d.fail(err)
	if errors.Is(err, region.ErrReadOnly) {
		return unix.EROFS
	}
	return unix.EIO
}

func (d *Device) read(p *port, q *request, r rw) {
	b := d.bufs.get(r.n)
	data := b[:r.n]
	errno := d.call(q, func(ctx context.Context) error {
		if err := d.store.ReadAt(ctx, data, r.off); err != nil {
			return fmt.Errorf("read %d bytes at %d: %w", r.n, r.off, err)
		}
		return nil
	})
	d.counters.reads.Add(1)
	if errno == 0 {
		d.counters.readBytes.Add(r.n)
	}
	d.answer(p, q.header, errno, data)
	d.bufs.put(b)
}

func (d *Device) write(p *port, q *request, r rw, data []byte) {
	n := min(r.n, int64(len(data)))
	room := d.size - r.off
	switch {
	case d.readOnly:
		d.answer(p, q.header, unix.EROFS, nil)
		return
	case n > room && r.flags&writeCache == 0:
		d.answer(p, q.header, unix.EFBIG, nil) // the file does not grow
		return
	}
	data = data[:max(0, min(n, room))] // a written-back page may reach past the end
	errno := d.call(q, func(ctx context.Context) error {
		if err := d.store.WriteAt(ctx, data, r.off); err != nil {
			return fmt.Errorf("write %d bytes at %d: %w", len(data), r.off, err)
		}
		return nil
	})
	d.counters.writes.Add(1)
	if errno == 0 {
		d.counters.writeBytes.Add(int64(len(data)))
	}
	out := make([]byte, 8)
	le.PutUint32(out, uint32(n))
	d.answer(p, q.header, errno, out)
}

// setattr refuses a new size; times are taken and forgotten.
func (d *Device) setattr(body []byte) syscall.Errno {
	if len(body) < 24 {
		return unix.EINVAL
	}
	valid := le.Uint32(body)
	if valid&fattrSize != 0 && int64(le.Uint64(body[16:])) != d.size {
		return unix.EPERM
	}
	return 0
}

func (d *Device) init(p *port, h header, body []byte) {
	in, err := parseInit(body)
	if err != nil {
		d.answer(p, h, unix.EPROTO, nil)
		err = fmt.Errorf("%w: %w", err, region.ErrNotSupported)
	} else {
		out := d.want
		out.flags &= in.flags
		d.answer(p, h, 0, out.encode())
	}
	select {
	case d.ready <- err:
	default: // a second INIT: not ours to mind
	}
}

// inflight holds the requests that are in the store.
type inflight struct {
	mu sync.Mutex
	m  map[uint64]*request
}

type request struct {
	header
	ctx    context.Context
	cancel context.CancelFunc
	killed atomic.Bool // the workload's thread is dying: nobody wants the answer
}

func (t *inflight) add(parent context.Context, h header, timeout time.Duration) *request {
	r := &request{header: h}
	if timeout > 0 {
		r.ctx, r.cancel = context.WithTimeout(parent, timeout)
	} else {
		r.ctx, r.cancel = context.WithCancel(parent)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.m == nil {
		t.m = map[uint64]*request{}
	}
	t.m[h.unique] = r
	return r
}

func (t *inflight) remove(r *request) {
	r.cancel()
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.m, r.unique)
}

func (t *inflight) get(unique uint64) *request {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.m[unique]
}

// watch cancels r once the thread that waits for it is being killed. Other
// signals (the Go scheduler of a workload sends many) must not end a request: a
// page fault would turn the error into SIGBUS, and programs do not expect EINTR from
// a file. The kernel says only once that there was a signal, hence the polling.
func (r *request) watch() {
	const interval = 20 * time.Millisecond
	t := time.NewTicker(interval)
	defer t.Stop()
	for {
		if dying(r.pid) {
			r.killed.Store(true)
			r.cancel()
			return
		}
		select {
		case <-r.ctx.Done():
			return
		case <-t.C:
		}
	}
}

// dying reports whether SIGKILL is pending for the thread; the kernel turns
// every fatal signal into that one (kernel/signal.c, complete_signal).
func dying(tid uint32) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	if err != nil {
		return errors.Is(err, os.ErrNotExist) && tid != 0
	}
	return pendingKill(string(b))
}

func pendingKill(status string) bool {
	for line := range strings.Lines(status) {
		k, v, _ := strings.Cut(line, ":")
		if k != "SigPnd" && k != "ShdPnd" {
			continue
		}
		if mask, err := strconv.ParseUint(strings.TrimSpace(v), 16, 64); err == nil && mask&(1<<(unix.SIGKILL-1)) != 0 {
			return true
		}
	}
	return false
}

// pool keeps buffers by size class, a power of two. They are mappings of their
// own: a reader needs one for the largest request, of which most touch a page,
// and some megabytes of those on the heap set the collector to work on the first request.
type pool struct {
	mu     sync.Mutex
	free   [64][][]byte
	keep   int // buffers kept of each class
	closed bool
}

func class(n int64) int { return bits.Len64(uint64(max(n, 4096) - 1)) }

// get returns a buffer of at least n bytes, with unspecified content.
func (p *pool) get(n int64) []byte {
	c := class(n)
	p.mu.Lock()
	if l := len(p.free[c]); l > 0 {
		b := p.free[c][l-1]
		p.free[c] = p.free[c][:l-1]
		p.mu.Unlock()
		return b
	}
	p.mu.Unlock()
	return mapped(1<<c, 0)
}

// warm puts k buffers of at least n bytes into the pool whose pages are there.
func (p *pool) warm(n int64, k int) {
	for range k {
		p.put(mapped(1<<class(n), unix.MAP_POPULATE))
	}
}

func mapped(n, flags int) []byte {
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE|flags)
	if err != nil { // no address space or mappings left; the runtime ends as it does where make finds none
		panic(fmt.Sprintf("map a buffer of %d bytes: %v", n, err))
	}
	return b
}

// put takes back what get returned.
func (p *pool) put(b []byte) {
	c := class(int64(len(b)))
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.free[c]) < p.keep && !p.closed {
		p.free[c] = append(p.free[c], b)
	} else {
		_ = unix.Munmap(b)
	}
}

// close unmaps what is in the pool and what is put later.
func (p *pool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for c, l := range p.free {
		for _, b := range l {
			_ = unix.Munmap(b)
		}
		p.free[c] = nil
	}
}
