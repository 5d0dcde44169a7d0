package dirty

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"memsync/strategies/device/uffd"
	"memsync/strategies/region"
)

// Arm prepares a mapping of the calling process for the method: it registers it
// with a userfaultfd for write protection, and locks its pages, as they come,
// in memory, since a page that the kernel unmaps forgets that it was written.
// The caller sends the file to the Detector (Writer.Uffd) and closes its own
// copy: were it to keep one, a detector that dies would leave it waiting in
// faults for ever. It returns nil where the method needs none.
// Errors: region.ErrNotSupported, region.ErrNotPermitted (RLIMIT_MEMLOCK).
func Arm(method string, mem []byte) (*os.File, error) {
	var features uint64 = uffd.UFFD_FEATURE_WP_UNPOPULATED | uffd.UFFD_FEATURE_WP_HUGETLBFS_SHMEM | uffd.UFFD_FEATURE_PAGEFAULT_FLAG_WP
	switch method {
	case "pagemap":
		features |= uffd.UFFD_FEATURE_WP_ASYNC
	case "uffd-wp":
	default:
		return nil, nil
	}
	base, length := addressOf(mem), region.RoundUp(int64(len(mem)), region.PageSize())
	const onFault = 1 // MLOCK_ONFAULT
	if _, _, e := unix.Syscall(unix.SYS_MLOCK2, base, uintptr(length), onFault); e != 0 {
		return nil, fmt.Errorf("mlock2 of %d bytes (ulimit -l): %w: %w", length, e, region.ErrNotPermitted)
	}
	f, _, err := uffd.New(features)
	if err != nil {
		return nil, err
	}
	if err := uffd.Register(f, base, length, uffd.UFFDIO_REGISTER_MODE_WP); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func probeUffdWP() error {
	f, _, err := uffd.New(uffd.UFFD_FEATURE_WP_UNPOPULATED | uffd.UFFD_FEATURE_WP_HUGETLBFS_SHMEM | uffd.UFFD_FEATURE_PAGEFAULT_FLAG_WP)
	if err != nil {
		return err
	}
	return f.Close()
}

func probePagemap() error {
	f, _, err := uffd.New(uffd.UFFD_FEATURE_WP_UNPOPULATED | uffd.UFFD_FEATURE_WP_HUGETLBFS_SHMEM | uffd.UFFD_FEATURE_WP_ASYNC)
	if err != nil {
		return err
	}
	return f.Close()
}

// struct page_region and struct pm_scan_arg of include/uapi/linux/fs.h.
type pageRegion struct{ start, end, categories uint64 }

type pmScanArg struct {
	size, flags, start, end, walkEnd, vec, vecLen, maxPages uint64
	inverted, mask, anyof, returned                         uint64
}

const (
	ioctlPagemapScan = 0xc0606610 // _IOWR('f', 16, struct pm_scan_arg), Linux 6.7
	scanWPMatching   = 1 << 0     // write-protect what is reported, in the same step
	scanCheckWPAsync = 1 << 1     // fail where the range is not armed
	pageIsWritten    = 1 << 1
)

// pagemap is PAGEMAP_SCAN: one system call reads which pages were written and
// protects them again. Source: Documentation/admin-guide/mm/pagemap.rst.
type pagemap struct {
	pages
	maps []*os.File // /proc/PID/pagemap of each writer
	vec  []pageRegion
}

func openPagemap(r Region) (Detector, error) {
	return &pagemap{pages: newPages(r), vec: make([]pageRegion, 4096)}, nil
}

func (d *pagemap) Add(w Writer) error {
	f, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", w.PID))
	if err != nil {
		return fmt.Errorf("writer's page map: %w", err)
	}
	if err = d.add(w); err == nil {
		if err = protect(w.Uffd, w.Base, w.Length, true); err != nil {
			d.writers = d.writers[:len(d.writers)-1]
		}
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	d.maps = append(d.maps, f)
	return nil
}

func (d *pagemap) Collect(ctx context.Context, found func(off, n int64)) error {
	var ranges [][2]int64
	for i := 0; i < len(d.writers); i++ {
		w := d.writers[i]
		err := d.scan(ctx, d.maps[i], w, func(lo, hi int64) { ranges = append(ranges, [2]int64{lo, hi}) })
		if d.ended(i) {
			// Its last stores are in the file, and what knew of them is gone: all may have changed.
			d.all = true
			err = errors.Join(closeUffds(d.writers[i:i+1]), d.maps[i].Close())
			d.writers, d.maps = slices.Delete(d.writers, i, i+1), slices.Delete(d.maps, i, i+1)
			i--
		}
		if err != nil {
			return err
		}
	}
	if !d.everything(found) {
		merge(ranges, int64(len(d.r.Mem)), found)
	}
	return nil
}

// ended reports whether writer i has no memory any more: then its page map has no
// entries. Where it has some, a scan that went before has seen its stores.
func (d *pagemap) ended(i int) bool {
	var entry [8]byte
	n, err := d.maps[i].ReadAt(entry[:], int64(d.writers[i].Base)/region.PageSize()*8)
	return n == 0 && (err == nil || errors.Is(err, io.EOF))
}

func (d *pagemap) scan(ctx context.Context, f *os.File, w Writer, found func(lo, hi int64)) error {
	base := uint64(w.Base)
	arg := &pmScanArg{flags: scanWPMatching | scanCheckWPAsync, start: base, end: base + uint64(w.Length),
		vec: uint64(uintptr(unsafe.Pointer(&d.vec[0]))), vecLen: uint64(len(d.vec)), mask: pageIsWritten, returned: pageIsWritten}
	arg.size = uint64(unsafe.Sizeof(*arg))
	for arg.start < arg.end {
		n, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), ioctlPagemapScan, uintptr(unsafe.Pointer(arg)))
		runtime.KeepAlive(d.vec)
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			return fmt.Errorf("PAGEMAP_SCAN of %d bytes of process %d: %w", arg.end-arg.start, w.PID, e)
		}
		for _, r := range d.vec[:n] {
			found(int64(r.start-base), int64(r.end-base))
		}
		if arg.walkEnd <= arg.start || ctx.Err() != nil {
			return errors.Join(fmt.Errorf("PAGEMAP_SCAN stopped at %#x", arg.walkEnd), ctx.Err())
		}
		arg.start = arg.walkEnd
	}
	return nil
}

func (d *pagemap) Close() (err error) {
	err = closeUffds(d.writers)
	for _, f := range d.maps {
		err = errors.Join(err, f.Close())
	}
	d.writers, d.maps = nil, nil
	return err
}

func protect(f *os.File, base uintptr, length int64, on bool) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	a := struct{ start, len, mode uint64 }{uint64(base), uint64(length), 0}
	if on {
		a.mode = uffd.UFFDIO_WRITEPROTECT_MODE_WP
	}
	var e unix.Errno
	err = rc.Control(func(fd uintptr) {
		for {
			if _, _, e = unix.Syscall(unix.SYS_IOCTL, fd, uffd.UFFDIO_WRITEPROTECT, uintptr(unsafe.Pointer(&a))); e != unix.EAGAIN {
				return
			}
		}
	})
	if e != 0 {
		err = errors.Join(err, fmt.Errorf("UFFDIO_WRITEPROTECT of %d bytes: %w", length, e))
	}
	return err
}

// present passes err on unless it says that the writer has ended or unmapped:
// then nobody waits, and nobody writes.
func present(err error) error {
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// uffdWP answers an event for the first write to each unit: note it, make it
// writable, wake the writer.
type uffdWP struct {
	pages
	wg sync.WaitGroup

	mu    sync.Mutex // note and unprotect, or take and protect: never interleaved
	dirty map[[2]int64]bool
	err   error
}

func openUffdWP(r Region) (Detector, error) {
	if r.Unit == 0 {
		r.Unit = region.PageSize()
	}
	if err := region.CheckChunk(r.Unit); err != nil {
		return nil, err
	}
	return &uffdWP{pages: newPages(r), dirty: map[[2]int64]bool{}}, nil
}

func (d *uffdWP) Add(w Writer) error {
	// A file that the poller knows: Close ends a read.
	fd, err := unix.FcntlInt(w.Uffd.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("dup", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return errors.Join(err, unix.Close(fd))
	}
	f := os.NewFile(uintptr(fd), "userfaultfd")
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.add(w); err != nil {
		return errors.Join(err, f.Close())
	}
	_ = w.Uffd.Close()
	w.Uffd = f
	d.writers[len(d.writers)-1] = w
	if err := protect(f, w.Base, w.Length, true); err != nil {
		return err
	}
	i := len(d.writers) - 1
	d.wg.Go(func() {
		if err := d.serve(int64(i), w); !errors.Is(err, os.ErrClosed) {
			d.mu.Lock()
			d.err = errors.Join(d.err, err)
			d.mu.Unlock()
		}
	})
	return nil
}

// serve answers events until the file is closed.
func (d *uffdWP) serve(writer int64, w Writer) error {
	var msgs [16]uffd.Msg
	buf := unsafe.Slice((*byte)(unsafe.Pointer(&msgs[0])), unsafe.Sizeof(msgs))
	for {
		n, err := w.Uffd.Read(buf)
		if err != nil {
			return err
		}
		d.mu.Lock()
		for _, m := range msgs[:n/int(unsafe.Sizeof(msgs[0]))] {
			off := (int64(m.Address) - int64(w.Base)) &^ (d.r.Unit - 1)
			if m.Event != uffd.UFFD_EVENT_PAGEFAULT || off < 0 || off >= w.Length {
				err = errors.Join(err, fmt.Errorf("userfaultfd event %#x at %#x", m.Event, m.Address))
				continue
			}
			d.dirty[[2]int64{writer, off}] = true
			err = errors.Join(err, present(protect(w.Uffd, w.Base+uintptr(off), min(d.r.Unit, w.Length-off), false)))
		}
		d.mu.Unlock()
		if err != nil {
			return err
		}
	}
}

func (d *uffdWP) Collect(_ context.Context, found func(off, n int64)) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil {
		return d.err
	}
	var ranges [][2]int64
	byWriter := make([][][2]int64, len(d.writers))
	for k := range d.dirty {
		byWriter[k[0]] = append(byWriter[k[0]], [2]int64{k[1], k[1] + d.r.Unit})
	}
	clear(d.dirty)
	var err error
	for i, w := range d.writers {
		merge(byWriter[i], w.Length, func(off, n int64) { // neighbours in one call
			err = errors.Join(err, present(protect(w.Uffd, w.Base+uintptr(off), n, true)))
			ranges = append(ranges, [2]int64{off, off + n})
		})
	}
	if err == nil && !d.everything(found) {
		merge(ranges, int64(len(d.r.Mem)), found)
	}
	return err
}

func (d *uffdWP) Close() (err error) {
	d.mu.Lock()
	ws := d.writers
	d.writers = nil
	d.mu.Unlock()
	for _, w := range ws {
		err = errors.Join(err, present(protect(w.Uffd, w.Base, w.Length, false))) // nobody may wait any more
	}
	err = errors.Join(err, closeUffds(ws))
	d.wg.Wait()
	return err
}
func addressOf(mem []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(mem))) }
