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

	"golang.org/x/sys/unix"

	"memsync/strategies/param"
	"memsync/strategies/region"
)

// Params are the parameters of a Memory.
func Params() []param.Spec {
	return []param.Spec{
		{Name: "handlers", Kind: param.KindInt, Default: "4", Min: 1, Max: 64, Doc: "threads that answer faults; one that waits for the source holds up no other"},
		{Name: "poll", Kind: param.KindDuration, Default: "50us", Max: 1e9, Doc: "how long a handler looks for the next fault before it sleeps, where the faulting thread is pinned to other CPUs and that has paid lately; 0 is never"},
		{Name: "request_timeout", Kind: param.KindDuration, Default: "30s", Doc: "a fault that the source does not answer by then raises SIGBUS; 0 is never"},
	}
}

// Owner is what knows the state of a Memory's chunks, such as chunk.Pusher. Its
// methods may be called concurrently.
type Owner interface {
	// Has reports whether all of [off, off+n) is local. It does not block.
	Has(off, n int64) bool
	// Pull returns once all of [off, off+n) was local.
	Pull(ctx context.Context, off, n int64) error
	// Stored says that [off, off+n) is about to be written through the mapping,
	// from now until Seal. It reports false, and then nothing may be written,
	// where not all of it is local. It does not block.
	Stored(off, n int64) bool
	// Full reports whether more bytes are dirty than may be; Throttle waits until they are not.
	Full() bool
	Throttle(ctx context.Context) error
}

// MemoryOptions say how to make a Memory.
type MemoryOptions struct {
	Chunk    int64 // bytes: of what one fault maps and one store makes dirty; a power of two, at least a page
	ReadOnly bool  // no store is possible, and none is tracked
	// Evicts says that Drop will be used. Without it the kernel refuses every
	// write to the memory but by the workload's mapping (F_SEAL_FUTURE_WRITE);
	// that seal forbids to give memory back, too.
	Evicts bool
	Params param.Values // of Params; the zero value means the defaults
}

// MemoryStats counts since NewMemory.
type MemoryStats struct {
	Faults   int64 // events of all kinds
	Stores   int64 // of these, first stores to a chunk since it was sealed
	Errors   int64 // of these, answered by SIGBUS
	Bytes    int64 // mapped because of a fault
	Filled   int64 // bytes put into the workload's memory before it asked
	Repaired int64 // bytes that raised SIGBUS and do no longer
}

// Memory is the memory of a region that a workload maps, a memfd: a local cache
// (region.Store) and a device at once. The daemon itself never maps it.
//
// Before a workload is there, WriteAt writes to the memfd. Then it fills: bytes
// go by UFFDIO_COPY into pages that are not there yet, and a reader who comes
// later does not fault. Pages that are there stay as they are: once the workload
// may write, nobody else does. ReadAt reads the memfd by pread(2), which takes no
// fault of the mapping.
//
// Every page is mapped write-protected. The first store to a chunk is an event:
// it is told to the Owner (Stored) and the protection of the chunk is lifted.
// Seal protects it again. So a chunk that is clean can only be changed by a
// store that waits for us, which is what makes it safe to push and to Drop.
//
// Userfaultfd sees this mapping only. Other writes are refused by the kernel: the memfd
// is sealed against pwrite(2) and further writable mappings, and its size is fixed.
// With Evicts the seal is not possible; then no descriptor of it is left to the workload
// but the mapping (package attach). Not seen in either case: writes of a device
// into pages that were pinned before Seal (RDMA, registered io_uring buffers).
//
// All methods may be called concurrently, but Own before ServeFaults.
// Source: userfaultfd.rst, "Write Protect Notifications"; memfd_create(2), fcntl(2). Linux 6.6.
type Memory struct {
	events
	size  int64
	chunk int64
	mode  uint64 // of what is mapped: UFFDIO_COPY_MODE_WP, equal for UFFDIO_CONTINUE, or 0
	o     MemoryOptions
	file  *os.File
	owner Owner

	gate    sync.RWMutex // what uses the userfaultfd outside of its threads, against its beginning and end
	serving bool         // from ServeFaults to Stop
	stopped bool

	// mu makes one step of "told and lifted" by a handler, and of "taken and
	// protected" by Seal and Drop: else a store between the two halves of one
	// would be in a chunk that nobody knows to be dirty. It is held over ioctls only.
	mu sync.Mutex

	broken   chan struct{} // a chunk was poisoned
	badMu    sync.Mutex
	bad      map[int64]bool // offsets of chunks that raise SIGBUS
	stopOnce sync.Once
	stopErr  error
	close1   sync.Once
	closeErr error

	stores, errs, mapped, filled, repaired atomic.Int64
}

var _ region.Store = (*Memory)(nil)

// NewMemory makes a memory of size bytes, above 0, of which nothing is there yet.
// Errors: region.ErrNotSupported where the kernel lacks what it takes.
func NewMemory(size int64, o MemoryOptions) (*Memory, error) {
	if !o.Params.Has("handlers") {
		var err error
		if o.Params, err = param.New(Params(), nil); err != nil {
			return nil, err
		}
	}
	if err := region.CheckChunk(o.Chunk); err != nil {
		return nil, err
	}
	if size <= 0 {
		return nil, fmt.Errorf("memory of %d bytes: %w", size, region.ErrOutOfRange)
	}
	if err := ProbeMemory(); err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("memsync-region", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	m := &Memory{size: size, chunk: o.Chunk, o: o, file: os.NewFile(uintptr(fd), "memfd"), bad: map[int64]bool{}, broken: make(chan struct{}, 1)}
	m.page = region.PageSize()
	m.length = region.RoundUp(size, m.page)
	if !o.ReadOnly {
		m.mode = UFFDIO_COPY_MODE_WP
	}
	if err := m.file.Truncate(m.length); err != nil {
		return nil, errors.Join(fmt.Errorf("size the memfd to %d bytes: %w", m.length, err), m.file.Close())
	}
	return m, nil
}

// Own says who knows the chunks. It must be called once, before ServeFaults.
func (m *Memory) Own(o Owner) { m.owner = o }

// File is the memfd, to be mapped shared by the workload; it stays the Memory's.
func (m *Memory) File() *os.File { return m.file }

// ServeFaults takes over uffd, which the workload registered for its mapping of
// File at base for missing, minor and, unless ReadOnly, write-protect faults. It
// returns once faults are being served, which Stop ends.
func (m *Memory) ServeFaults(uffd *os.File, base uintptr) error {
	m.gate.Lock() // no write to the memfd is under way
	defer m.gate.Unlock()
	switch {
	case m.stopped:
		return errors.Join(region.ErrClosed, uffd.Close())
	case m.serving:
		return errors.Join(errors.New("the memory serves a workload already"), uffd.Close())
	case m.owner == nil:
		return errors.Join(errors.New("the memory has no owner"), uffd.Close())
	}
	p := m.o.Params
	m.uffd, m.fd, m.base = uffd, int(uffd.Fd()), base
	m.polling, m.deadline = p.Duration("poll"), p.Duration("request_timeout")
	if m.deadline == 0 {
		m.deadline = 1 << 62
	}
	m.answer = m.fault
	if err := m.begin(); err != nil {
		return errors.Join(fmt.Errorf("serve faults of %d bytes: %w", m.size, err), uffd.Close())
	}
	m.serving = true
	return nil
}

func (m *Memory) begin() error {
	if m.base%uintptr(m.page) != 0 {
		return fmt.Errorf("mapping at %#x: %w", m.base, region.ErrOutOfRange)
	}
	seals := unix.F_SEAL_GROW | unix.F_SEAL_SHRINK
	if !m.o.Evicts {
		seals |= unix.F_SEAL_FUTURE_WRITE
	}
	if _, err := unix.FcntlInt(m.file.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		return fmt.Errorf("seal the memfd: %w", err)
	}
	if err := unix.SetNonblock(m.fd, false); err != nil {
		return os.NewSyscallError("fcntl", err)
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	var workers []*worker
	for range m.o.Params.Int("handlers") {
		w, err := m.newWorker(region.Demand, 0)
		if err != nil {
			return err
		}
		workers = append(workers, w)
	}
	repairer, err := m.newWorker(region.Demand, 0) // somebody got an error, and a full cache has room for who asks only
	if err != nil {
		return err
	}
	m.start(workers, repairer)
	m.threads.Go(m.mapLocal)
	m.threads.Go(func() { m.repair(repairer) })
	return nil
}

// mapLocal maps what was local before the workload came, neighbours together.
func (m *Memory) mapLocal() {
	const most = 2 << 20 // bytes at once, so that Stop need not wait
	for lo := int64(0); lo < m.size && !m.stopping.Load(); {
		hi := lo
		for hi < m.size && hi-lo < most && m.owner.Has(hi, min(hi+m.chunk, m.size)-hi) {
			hi = min(hi+m.chunk, m.length)
		}
		for at := lo; at < hi; {
			n, _ := Continue(m.fd, m.base+uintptr(at), hi-at, m.mode)
			m.filled.Add(n)
			if at += n; n == 0 { // mapped already, or dropped
				at += m.page
			}
		}
		lo = max(hi, lo+m.chunk)
	}
}

// Stop ends serving: what is not there raises SIGBUS in a workload that still has the
// mapping, and stores are no longer tracked. It cancels the Owner's Pull and
// Throttle, and returns once all threads have ended. ReadAt, Seal and Drop still
// work. It may be called twice.
func (m *Memory) Stop() error {
	m.stopOnce.Do(func() {
		m.gate.Lock()
		serving := m.serving
		m.stopped, m.serving = true, false
		m.gate.Unlock()
		if serving {
			m.stopErr = m.events.close(func() {})
		}
	})
	return m.stopErr
}

// Close is Stop, and gives the memory up; the workload's mapping keeps it.
func (m *Memory) Close() error {
	m.close1.Do(func() { m.closeErr = errors.Join(m.Stop(), m.file.Close()) })
	return m.closeErr
}

// Size implements region.Store.
func (m *Memory) Size() int64 { return m.size }

// ReadAt implements region.Store. Bytes that are not there read as zeroes.
func (m *Memory) ReadAt(_ context.Context, p []byte, off int64) error {
	if err := region.CheckRange(off, int64(len(p)), m.size); err != nil {
		return err
	}
	_, err := m.file.ReadAt(p, off)
	return m.wrap("read", len(p), off, err)
}

// WriteAt writes p, or, with a workload, fills the pages of p that are not there:
// then it takes whole pages only, but at the region's end.
// Errors: region.ErrPeerGone where the workload has unmapped the memory, ErrClosed after Stop.
func (m *Memory) WriteAt(_ context.Context, p []byte, off int64) error {
	if err := region.CheckRange(off, int64(len(p)), m.size); err != nil || len(p) == 0 {
		return err
	}
	m.gate.RLock()
	defer m.gate.RUnlock()
	end := off + int64(len(p))
	var err error
	switch {
	case m.stopped:
		err = region.ErrClosed
	case !m.serving:
		_, err = m.file.WriteAt(p, off)
	case off%m.page != 0 || end%m.page != 0 && end != m.size:
		err = fmt.Errorf("not whole pages: %w", region.ErrOutOfRange)
	default:
		whole := int64(len(p)) &^ (m.page - 1)
		if err = m.fill(p[:whole], off); err == nil && whole < int64(len(p)) {
			last := make([]byte, m.page)
			copy(last, p[whole:])
			err = m.fill(last, off+whole)
		}
	}
	return m.wrap("write", len(p), off, err)
}

func (m *Memory) wrap(verb string, n int, off int64, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrClosed):
		err = region.ErrClosed
	}
	return fmt.Errorf("%s %d bytes of the memory at %d: %w", verb, n, off, err)
}

// fill puts whole pages in where there are none, mapped and protected.
func (m *Memory) fill(p []byte, off int64) error {
	n, err := m.put(off, int64(len(p)), func(at uintptr, done int64) (int64, unix.Errno) {
		n, e := Copy(m.fd, at, p[done:], m.mode)
		if e == unix.EEXIST { // there, from an attempt that failed later, but perhaps not mapped
			if n, e := Continue(m.fd, at, m.page, m.mode); e == 0 {
				return n, 0
			}
		}
		return n, e
	})
	m.filled.Add(n)
	return err
}

// Flush does nothing: the memory promises nothing.
func (m *Memory) Flush(context.Context) error { return nil }

// Seal calls take with stores held off, and makes the first later store to [off,
// off+n), whole chunks, known to the Owner again. A store that came before is in
// what ReadAt reads afterwards. On an error stores may go on unknown.
func (m *Memory) Seal(off, n int64, take func()) error {
	m.gate.RLock()
	defer m.gate.RUnlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	take()
	return m.protect(off, n, true)
}

func (m *Memory) protect(off, n int64, on bool) error {
	if !m.serving || m.mode == 0 {
		return nil
	}
	err := WriteProtect(m.fd, m.base+uintptr(off), region.RoundUp(n, m.page), on)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
		return nil // unmapped: nobody can store any more
	}
	return err
}

// Drop gives the memory of [off, off+n), whole chunks, back to the kernel, from
// the workload's mapping too, if take, called with stores held off, reports that
// the Owner has made the chunks remote, which it may if they are not dirty. A later touch
// faults and pulls them again. It takes MemoryOptions.Evicts.
func (m *Memory) Drop(off, n int64, take func() bool) error {
	if !m.o.Evicts {
		return fmt.Errorf("drop %d bytes at %d of a sealed memory: %w", n, off, region.ErrNotSupported)
	}
	if err := region.CheckRange(off, n, m.size); err != nil || n == 0 {
		return err
	}
	m.gate.RLock()
	defer m.gate.RUnlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	if !take() {
		return nil
	}
	// Clean chunks are protected: a store waits for m.mu, and then finds them remote.
	err := unix.Fallocate(int(m.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, region.RoundUp(n, m.page))
	runtime.KeepAlive(m.file)
	return m.wrap("drop", int(n), off, err)
}

// fault answers one event: all of the chunk at once.
func (m *Memory) fault(w *worker, off int64, msg *Msg) {
	lo := off &^ (m.chunk - 1)
	n := min(lo+m.chunk, m.size) - lo
	store := msg.Flags&UFFD_PAGEFAULT_FLAG_WRITE != 0 && m.mode != 0
	if msg.Flags&UFFD_PAGEFAULT_FLAG_WP == 0 {
		if !m.owner.Has(lo, n) {
			m.yield(w)
			err := m.lend(w, func(ctx context.Context) error { return m.owner.Pull(ctx, lo, n) })
			if err != nil {
				m.spoil(lo, n, err)
				return
			}
		}
		m.mapChunk(off, lo, n, !store)
	}
	if !store {
		return
	}
	m.stores.Add(1)
	if m.owner.Full() {
		m.yield(w)
		if err := m.lend(w, m.owner.Throttle); err != nil {
			// The memory is there, and the store could as well have come before the
			// limit was reached: it goes on, and who asks (Err, Sync) is told.
			m.fail(fmt.Errorf("store to chunk at %d: %w", lo, err))
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.owner.Stored(lo, n) {
		if err := WriteProtect(m.fd, m.base+uintptr(lo), region.RoundUp(n, m.page), false); err != nil && !gone(errno(err)) {
			m.fail(err)
		}
		return
	}
	// Dropped meanwhile: the thread faults again, and then the page is missing.
	Wake(m.fd, m.base+uintptr(lo), region.RoundUp(n, m.page))
}

func errno(err error) (e unix.Errno) {
	errors.As(err, &e)
	return e
}

// mapChunk maps the pages of a chunk that is local, and wakes who waits for one.
func (m *Memory) mapChunk(off, lo, n int64, wake bool) {
	mode := m.mode
	if !wake {
		mode |= UFFDIO_CONTINUE_MODE_DONTWAKE
	}
	length := region.RoundUp(n, m.page)
	done, e := Continue(m.fd, m.base+uintptr(lo), length, mode)
	if e != 0 && off >= lo+done {
		// Some page was mapped before; the one that is wanted may still be missing.
		var d int64
		if d, _ = Continue(m.fd, m.base+uintptr(off), m.page, mode); wake {
			// It was there before the fault was answered, or the chunk was dropped just
			// now (EFAULT) and the thread must fault again.
			Wake(m.fd, m.base+uintptr(lo), length)
		}
		done += max(d, 0)
	}
	m.mapped.Add(max(done, 0))
}

// spoil makes the chunk at lo raise SIGBUS, until it can be had again.
func (m *Memory) spoil(lo, n int64, err error) {
	m.errs.Add(1)
	m.fail(fmt.Errorf("fill %d bytes at %d: %w", n, lo, err))
	m.badMu.Lock()
	m.bad[lo] = true
	m.badMu.Unlock()
	if _, err := poison(m.fd, m.base+uintptr(lo), region.RoundUp(n, m.page), m.page); err != nil {
		m.fail(err)
	}
	select {
	case m.broken <- struct{}{}:
	default:
	}
}

// repair asks for the chunks that raise SIGBUS until they come, and puts them
// where the mark is. Touching such a page is no event: nobody else would.
func (m *Memory) repair(w *worker) {
	const least, most = 10 * time.Millisecond, time.Second
	for {
		select {
		case <-m.broken:
		case <-m.ctx.Done():
			return
		}
		for pause := least; ; pause = min(2*pause, most) {
			select {
			case <-time.After(pause):
			case <-m.ctx.Done():
				return
			}
			if m.tryRepair(w) {
				break
			}
		}
	}
}

// tryRepair reports whether no chunk is bad any more.
func (m *Memory) tryRepair(w *worker) bool {
	m.badMu.Lock()
	bad := make([]int64, 0, len(m.bad))
	for lo := range m.bad {
		bad = append(bad, lo)
	}
	m.badMu.Unlock()
	for _, lo := range bad {
		n := min(lo+m.chunk, m.size) - lo
		if m.lend(w, func(ctx context.Context) error { return m.owner.Pull(ctx, lo, n) }) != nil || !m.owner.Has(lo, n) {
			continue
		}
		// UFFDIO_CONTINUE takes the place of a mark; a page that was filled by the
		// pull itself is mapped already.
		mended := true
		for at := lo; at < lo+n; at += m.page {
			if _, e := Continue(m.fd, m.base+uintptr(at), m.page, m.mode); e == unix.EFAULT {
				mended = false // it has left a small cache again
			}
		}
		if !mended {
			continue
		}
		m.repaired.Add(n)
		m.badMu.Lock()
		delete(m.bad, lo)
		m.badMu.Unlock()
	}
	m.badMu.Lock()
	defer m.badMu.Unlock()
	return len(m.bad) == 0
}

// Stats returns the counters.
func (m *Memory) Stats() MemoryStats {
	return MemoryStats{Faults: m.faults.Load(), Stores: m.stores.Load(), Errors: m.errs.Load(),
		Bytes: m.mapped.Load(), Filled: m.filled.Load(), Repaired: m.repaired.Load()}
}
