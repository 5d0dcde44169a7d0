package uffd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// events reads the events of a userfaultfd on locked threads, its handlers, and
// calls answer for each fault. Server and Memory are made of it. The fields
// above ctx are set before start.
type events struct {
	uffd     *os.File
	fd       int
	base     uintptr
	length   int64 // of the mapping
	page     int64
	polling  time.Duration // see Options.Poll
	deadline time.Duration // of each read of the store
	// answer answers the fault on the page at off. It is called with w.baton,
	// which it gives up (yield) before it does what may take long.
	answer func(w *worker, off int64, msg *Msg)

	ctx      context.Context // ends with close
	cancel   context.CancelFunc
	stopping atomic.Bool
	baton    baton // of the handler that reads the next event
	handlers []*worker
	threads  sync.WaitGroup // handlers, and what else the owner starts
	faults   atomic.Int64   // events read
	first    atomic.Pointer[error]
}

// worker is what one handler or copier owns: everything is allocated once.
type worker struct {
	lease lease
	buf   []byte // may be empty
	tid   atomic.Int64
	done  chan struct{}

	baton  bool   // it has the baton
	misses int    // polls in vain since the last that paid
	ptid   uint32 // of the thread whose fault was the last
	apart  bool   // that thread cannot run on the CPUs of this one
}

// newWorker makes a worker with a buffer of buf bytes, whose reads have the class.
func (v *events) newWorker(class region.Class, buf int64) (*worker, error) {
	w := &worker{done: make(chan struct{})}
	if buf > 0 {
		// Outside the Go heap: page-aligned, and no page of it is ever missing.
		mem, err := unix.Mmap(-1, 0, int(region.RoundUp(buf, region.PageSize())), unix.PROT_READ|unix.PROT_WRITE,
			unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
		if err != nil {
			return nil, os.NewSyscallError("mmap", err)
		}
		w.buf = mem
	}
	w.lease.init(region.WithClass(v.ctx, class), v.deadline)
	return w, nil
}

func (w *worker) free() {
	if w.buf != nil {
		_ = unix.Munmap(w.buf)
	}
}

// start starts the handlers. Others are workers of the owner's, which run
// beside them and whose deadlines are watched too.
func (v *events) start(handlers []*worker, others ...*worker) {
	// A handler that sleeps in read(2) keeps its P until the runtime takes it away,
	// after 20 us to 10 ms: leave others for who it has given work to.
	if n := len(handlers) + min(len(others), 2) + 1; runtime.GOMAXPROCS(0) < n {
		runtime.GOMAXPROCS(n)
	}
	v.handlers = handlers
	for _, w := range handlers {
		v.threads.Go(func() { v.handle(w) })
	}
	all := append(append([]*worker(nil), handlers...), others...)
	v.threads.Go(func() { v.watch(all) })
}

// handle reads and answers faults on a thread of its own until close.
// The read blocks: a netpoller between fault and answer costs two more wake-ups.
func (v *events) handle(w *worker) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer close(w.done)
	w.tid.Store(int64(unix.Gettid()))
	defer w.free()
	var msg Msg
	for {
		if !w.baton {
			v.baton.lock()
			w.baton = true
		}
		if v.stopping.Load() {
			v.baton.unlock()
			return
		}
		switch e := v.next(w, &msg); e {
		case 0:
			if msg.Event == UFFD_EVENT_PAGEFAULT {
				v.fault(w, &msg)
			}
		case unix.EAGAIN, unix.EINTR: // close made it non-blocking; or a signal came
		default:
			v.baton.unlock()
			// Nobody would answer any more: rather errors than a hang.
			v.fail(fmt.Errorf("read userfaultfd: %w", e))
			if _, err := poison(v.fd, v.base, v.length, v.page); err != nil {
				v.fail(err)
			}
			return
		}
	}
}

func (v *events) fault(w *worker, msg *Msg) {
	v.faults.Add(1)
	if v.polling > 0 && msg.Ptid != w.ptid {
		w.ptid, w.apart = msg.Ptid, apart(int(msg.Ptid))
	}
	off := int64(uintptr(msg.Address)-v.base) &^ (v.page - 1)
	if off < 0 || off >= v.length {
		v.fail(fmt.Errorf("fault at %#x outside of the mapping at %#x: %w", msg.Address, v.base, region.ErrOutOfRange))
		return
	}
	v.answer(w, off, msg)
}

// yield lets another handler read the next event.
func (v *events) yield(w *worker) {
	if w.baton {
		v.baton.unlock()
		w.baton = false
	}
}

const rwfNowait = 8 // RWF_NOWAIT

// next waits for the next event: by polling for up to v.polling where that has
// paid lately, then asleep. w has the baton.
func (v *events) next(w *worker, msg *Msg) unix.Errno {
	if w.misses < pollMisses || w.misses%pollRetry == 0 {
		if e := v.poll(w, msg); e != unix.EAGAIN {
			return e
		}
	} else {
		w.misses++
	}
	n, _, e := unix.Syscall(unix.SYS_READ, uintptr(v.fd), uintptr(unsafe.Pointer(msg)), unsafe.Sizeof(*msg))
	if e == 0 && n != unsafe.Sizeof(*msg) {
		e = unix.EIO
	}
	return e
}

// After pollMisses polls in vain, a handler polls before each pollRetry-th event only.
const pollMisses, pollRetry = 4, 32

func (v *events) poll(w *worker, msg *Msg) unix.Errno {
	if v.polling <= 0 || !w.apart {
		return unix.EAGAIN
	}
	w.misses++
	iov := unix.Iovec{Base: (*byte)(unsafe.Pointer(msg)), Len: uint64(unsafe.Sizeof(*msg))}
	for end := time.Now().Add(v.polling); ; {
		// Offset -1: like read(2). EOPNOTSUPP before Linux 6.10: no polling.
		n, _, e := unix.RawSyscall6(unix.SYS_PREADV2, uintptr(v.fd), uintptr(unsafe.Pointer(&iov)), 1, ^uintptr(0), ^uintptr(0), rwfNowait)
		switch {
		case e == 0 && n == unsafe.Sizeof(*msg):
			w.misses = 0
			return 0
		case e != unix.EAGAIN || v.stopping.Load() || time.Now().After(end):
			return unix.EAGAIN // the blocking read finds out what it is
		}
	}
}

// apart reports whether thread tid may not run on any CPU that this one may.
func apart(tid int) bool {
	var theirs, ours unix.CPUSet
	if tid == 0 || unix.SchedGetaffinity(tid, &theirs) != nil || unix.SchedGetaffinity(0, &ours) != nil {
		return false
	}
	for i := range theirs {
		if theirs[i]&ours[i] != 0 {
			return false
		}
	}
	return true
}

// lend calls read with a context that ends with close or after the deadline,
// and says in the error which of the two it was.
func (v *events) lend(w *worker, read func(ctx context.Context) error) error {
	ctx := w.lease.begin()
	err := read(ctx)
	w.lease.end()
	if err != nil && context.Cause(ctx) == errDeadline {
		err = fmt.Errorf("%w after %v: %w", context.DeadlineExceeded, v.deadline, err)
	}
	return err
}

// put fills [off, off+length) by calls of do, which fills what it can from at on,
// the address of off+done. Pages that are there already are left out. It returns how
// many bytes were filled; region.ErrPeerGone where process or mapping are no more.
func (v *events) put(off, length int64, do func(at uintptr, done int64) (int64, unix.Errno)) (filled int64, err error) {
	there := false
	for done, tries := int64(0), 0; done < length; {
		n, e := do(v.base+uintptr(off+done), done)
		done += n
		filled += n
		switch {
		case n > 0:
			tries = 0
		case e == unix.EEXIST:
			done += v.page
			there = true
		case e == unix.EAGAIN && tries < 1e6 && !v.stopping.Load(): // the mappings are changing
			tries++
			runtime.Gosched()
		case gone(e):
			return filled, fmt.Errorf("fill %d bytes at %d: %w: %w", length-done, off+done, e, region.ErrPeerGone)
		default:
			return filled, fmt.Errorf("fill %d bytes at %d: %w", length-done, off+done, e)
		}
	}
	if there { // somebody may have begun to wait before the page came from elsewhere
		Wake(v.fd, v.base+uintptr(off), length)
	}
	return filled, nil
}

func (v *events) fail(err error) {
	if !v.stopping.Load() {
		v.first.CompareAndSwap(nil, &err)
	}
}

// Err returns the first error so far, such as a store that could not be read.
func (v *events) Err() error {
	if e := v.first.Load(); e != nil {
		return *e
	}
	return nil
}

// close ends the handlers and what ctx ends, poisons what is not there, and
// closes the userfaultfd. wake is called after ctx has ended, before the threads
// are waited for. It must be called once.
func (v *events) close(wake func()) error {
	v.stopping.Store(true)
	v.cancel()
	// Wake a handler from its blocking read: its flags are looked at when the
	// read starts, and SIGURG, which the Go runtime ignores, restarts it.
	err := os.NewSyscallError("fcntl", unix.SetNonblock(v.fd, true))
	v.interrupt()
	wake()
	v.threads.Wait()
	if v.length > 0 {
		_, perr := poison(v.fd, v.base, v.length, v.page)
		err = errors.Join(err, perr)
	}
	return errors.Join(err, v.uffd.Close())
}

// interrupt signals all handlers until they have ended: each of them may be
// the one that the others wait for.
func (v *events) interrupt() {
	t := time.NewTicker(time.Millisecond)
	defer t.Stop()
	for _, w := range v.handlers {
		for ended := false; !ended; {
			for _, w := range v.handlers {
				if tid := w.tid.Load(); tid != 0 {
					_ = unix.Tgkill(unix.Getpid(), int(tid), unix.SIGURG)
				}
			}
			select {
			case <-w.done:
				ended = true
			case <-t.C:
			}
		}
	}
}
