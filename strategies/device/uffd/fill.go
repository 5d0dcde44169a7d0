package uffd

import (
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// quick is the largest fill, in bytes, that is made without telling the Go
// scheduler: about 20 us, well below a collection's patience.
const quick = 64 << 10

func fillIoctl(fd int, req uint, arg unsafe.Pointer, length int64) unix.Errno {
	if length <= quick {
		return ioctl(fd, req, arg)
	}
	return slowIoctl(fd, req, arg)
}

// Copy fills the missing pages [dst, dst+len(src)) of the registered process
// with src and wakes who waits for them. The pages appear whole or not at all.
// len(src) and dst are multiples of the mapping's page size. It returns the
// bytes filled, which may be fewer: then e is EEXIST (the next page is there
// already), EAGAIN (the mappings are changing: again), ENOENT (unmapped or not
// registered), ESRCH (the process is gone), ENOMEM or EFAULT (src).
// mode is a set of UFFDIO_COPY_MODE_ bits. Linux 4.3.
func Copy(fd int, dst uintptr, src []byte, mode uint64) (n int64, e unix.Errno) {
	a := uffdioCopy{dst: uint64(dst), src: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(src)))), len: uint64(len(src)), mode: mode}
	e = fillIoctl(fd, UFFDIO_COPY, unsafe.Pointer(&a), int64(len(src)))
	runtime.KeepAlive(src)
	return progress(a.copy, e)
}

// Continue maps the pages [start, start+length) that are in the page cache of
// the registered process's shared file already, and wakes who waits for them.
// It returns as Copy does; EFAULT means that a page is not in the cache.
// Linux 5.13 (hugetlb), 5.14 (shmem).
func Continue(fd int, start uintptr, length int64, mode uint64) (n int64, e unix.Errno) {
	return fill(fd, UFFDIO_CONTINUE, start, length, mode)
}

// ZeroPage fills missing pages with zeroes and returns as Copy does. Linux 4.3.
func ZeroPage(fd int, start uintptr, length int64, mode uint64) (n int64, e unix.Errno) {
	return fill(fd, UFFDIO_ZEROPAGE, start, length, mode)
}

func fill(fd int, req uint, start uintptr, length int64, mode uint64) (int64, unix.Errno) {
	a := uffdioFill{uffdioRange: uffdioRange{uint64(start), uint64(length)}, mode: mode}
	e := fillIoctl(fd, req, unsafe.Pointer(&a), length)
	return progress(a.done, e)
}

// progress sorts out the two ways in which a fill reports: EAGAIN with bytes
// done means that the page after them failed, with an errno that the next call gives.
func progress(done int64, e unix.Errno) (int64, unix.Errno) {
	if e == 0 || e == unix.EAGAIN && done > 0 {
		return done, e
	}
	if done < 0 {
		e = unix.Errno(-done)
	}
	return 0, e
}

// Wake wakes the threads that wait for a page of [start, start+length), filled
// or not; those whose page is not there fault again.
func Wake(fd int, start uintptr, length int64) unix.Errno {
	a := uffdioRange{uint64(start), uint64(length)}
	return ioctl(fd, UFFDIO_WAKE, unsafe.Pointer(&a))
}

// WriteProtect protects [start, start+length) (on) or lifts the protection and
// wakes the writers that wait (off). Linux 5.7; 5.19 for shmem and hugetlb.
func WriteProtect(fd int, start uintptr, length int64, on bool) error {
	a := uffdioWriteprotect{uffdioRange: uffdioRange{uint64(start), uint64(length)}}
	if on {
		a.mode = UFFDIO_WRITEPROTECT_MODE_WP
	}
	for {
		switch e := slowIoctl(fd, UFFDIO_WRITEPROTECT, unsafe.Pointer(&a)); e {
		case 0:
			return nil
		case unix.EAGAIN: // a fork or an unmap is under way
			runtime.Gosched()
		default:
			return fmt.Errorf("UFFDIO_WRITEPROTECT %d bytes: %w", length, e)
		}
	}
}

// Poison makes every page of [base, base+length) that is not there raise SIGBUS
// (EFAULT within a system call) instead of waiting, and wakes who waits: so
// that a server which ends leaves errors, neither hangs nor zeroes. Any process
// that holds uffd may call it. The mapping's owner can take the mark off a page
// with madvise(MADV_DONTNEED), after which a touch faults again.
// A process or mapping that is gone is no error. length and base are multiples
// of page, the mapping's page size. It makes one ioctl per run of missing pages
// and one per page that is there, 0.2 us each.
// Source: UFFDIO_POISON of ioctl_userfaultfd(2). Linux 6.6.
func Poison(uffd *os.File, base uintptr, length, page int64) error {
	defer runtime.KeepAlive(uffd)
	_, err := poison(int(uffd.Fd()), base, length, page)
	return err
}

// poison returns whether any page was marked.
func poison(fd int, base uintptr, length, page int64) (marked bool, err error) {
	for off := int64(0); off < length; {
		a := uffdioFill{uffdioRange: uffdioRange{uint64(base) + uint64(off), uint64(length - off)}}
		e := slowIoctl(fd, UFFDIO_POISON, unsafe.Pointer(&a))
		n, e := progress(a.done, e)
		marked = marked || n > 0
		off += n
		switch {
		case n > 0:
		case e == unix.EEXIST:
			off += page
		case e == unix.EAGAIN:
			runtime.Gosched()
		case gone(e):
			return marked, nil
		case e == unix.EINVAL:
			return marked, fmt.Errorf("UFFDIO_POISON at %d, %d bytes: %w (Linux 6.6): %w", off, length-off, e, region.ErrNotSupported)
		default:
			return marked, fmt.Errorf("UFFDIO_POISON at %d, %d bytes: %w", off, length-off, e)
		}
	}
	// A waiter may sit on a page that was there already.
	Wake(fd, base, length)
	return marked, nil
}

// gone reports that the process (ESRCH; ENOSPC before Linux 4.14) or the mapping is no more.
func gone(e unix.Errno) bool { return e == unix.ESRCH || e == unix.ENOENT || e == unix.ENOSPC }
