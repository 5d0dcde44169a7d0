// Package uffd holds the userfaultfd system calls, named as in
// include/uapi/linux/userfaultfd.h; the probes that say which of them work
// here; a Server that answers another process's page faults from a
// region.Store; and Poison, which keeps a lost server from becoming zeroes.
//
// Source: Documentation/admin-guide/mm/userfaultfd.rst, userfaultfd(2), ioctl_userfaultfd(2).
package uffd

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// Names, numbers and layouts of include/uapi/linux/userfaultfd.h.
const (
	UFFD_API            = 0xAA
	UFFD_USER_MODE_ONLY = 1 // Linux 5.11

	USERFAULTFD_IOC_NEW = 0xaa00 // ioctl of /dev/userfaultfd, Linux 6.1

	UFFDIO_API          = 0xc018aa3f
	UFFDIO_REGISTER     = 0xc020aa00
	UFFDIO_UNREGISTER   = 0x8010aa01
	UFFDIO_WAKE         = 0x8010aa02
	UFFDIO_COPY         = 0xc028aa03
	UFFDIO_ZEROPAGE     = 0xc020aa04
	UFFDIO_WRITEPROTECT = 0xc018aa06 // Linux 5.7
	UFFDIO_CONTINUE     = 0xc020aa07 // Linux 5.13
	UFFDIO_POISON       = 0xc020aa08 // Linux 6.6

	UFFDIO_REGISTER_MODE_MISSING = 1 << 0
	UFFDIO_REGISTER_MODE_WP      = 1 << 1
	UFFDIO_REGISTER_MODE_MINOR   = 1 << 2

	UFFDIO_COPY_MODE_DONTWAKE     = 1 << 0
	UFFDIO_COPY_MODE_WP           = 1 << 1
	UFFDIO_CONTINUE_MODE_DONTWAKE = 1 << 0
	UFFDIO_POISON_MODE_DONTWAKE   = 1 << 0
	UFFDIO_WRITEPROTECT_MODE_WP   = 1 << 0

	UFFD_EVENT_PAGEFAULT      = 0x12
	UFFD_PAGEFAULT_FLAG_WRITE = 1 << 0
	UFFD_PAGEFAULT_FLAG_WP    = 1 << 1
	UFFD_PAGEFAULT_FLAG_MINOR = 1 << 2

	UFFD_FEATURE_PAGEFAULT_FLAG_WP  = 1 << 0
	UFFD_FEATURE_MISSING_HUGETLBFS  = 1 << 4
	UFFD_FEATURE_MISSING_SHMEM      = 1 << 5
	UFFD_FEATURE_THREAD_ID          = 1 << 8
	UFFD_FEATURE_MINOR_HUGETLBFS    = 1 << 9
	UFFD_FEATURE_MINOR_SHMEM        = 1 << 10
	UFFD_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
	UFFD_FEATURE_WP_UNPOPULATED     = 1 << 13
	UFFD_FEATURE_POISON             = 1 << 14
	UFFD_FEATURE_WP_ASYNC           = 1 << 15
)

type uffdioAPI struct{ api, features, ioctls uint64 }
type uffdioRange struct{ start, len uint64 }
type uffdioRegister struct {
	uffdioRange
	mode, ioctls uint64
}
type uffdioCopy struct {
	dst, src, len, mode uint64
	copy                int64
}

// uffdioFill is struct uffdio_zeropage, uffdio_continue and uffdio_poison.
type uffdioFill struct {
	uffdioRange
	mode uint64
	done int64
}
type uffdioWriteprotect struct {
	uffdioRange
	mode uint64
}

// Msg is struct uffd_msg with its pagefault arm.
type Msg struct {
	Event   uint8
	_       [7]byte
	Flags   uint64
	Address uint64
	Ptid    uint32
	_       uint32
}

// ioctl does not enter the Go scheduler: none of the userfaultfd ioctls waits
// for anything but memory and mmap_lock, and the fault path is latency-bound.
func ioctl(fd int, req uint, arg unsafe.Pointer) unix.Errno {
	_, _, e := unix.RawSyscall(unix.SYS_IOCTL, uintptr(fd), uintptr(req), uintptr(arg))
	return e
}

// slowIoctl lets the Go scheduler know, for calls that move or touch much memory.
func slowIoctl(fd int, req uint, arg unsafe.Pointer) unix.Errno {
	_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(req), uintptr(arg))
	return e
}

// New opens a userfaultfd (close-on-exec, blocking) and negotiates exactly the
// given features. It tries userfaultfd(2), then /dev/userfaultfd (Linux 6.1),
// then userfaultfd(2) with UFFD_USER_MODE_ONLY (Linux 5.11), whose faults from
// within system calls give EFAULT instead of waiting; userOnly reports that.
// Errors: region.ErrNotSupported where the kernel lacks userfaultfd or a
// feature; region.ErrNotPermitted where this user may not.
func New(features uint64) (f *os.File, userOnly bool, err error) {
	fd, userOnly, err := open()
	if err != nil {
		return nil, false, err
	}
	a := uffdioAPI{api: UFFD_API, features: features}
	if e := ioctl(fd, UFFDIO_API, unsafe.Pointer(&a)); e != 0 {
		_ = unix.Close(fd)
		if e == unix.EINVAL {
			have, _ := Features()
			return nil, false, fmt.Errorf("userfaultfd features %#x are missing of %#x: %w", features&^have, features, region.ErrNotSupported)
		}
		return nil, false, fmt.Errorf("UFFDIO_API with features %#x: %w", features, e)
	}
	return os.NewFile(uintptr(fd), "userfaultfd"), userOnly, nil
}

func open() (fd int, userOnly bool, err error) {
	call := func(flags uintptr) (int, unix.Errno) {
		fd, _, e := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|flags, 0, 0)
		return int(fd), e
	}
	fd, e := call(0)
	switch e {
	case 0:
		return fd, false, nil
	case unix.ENOSYS:
		return -1, false, fmt.Errorf("userfaultfd(2): %w (CONFIG_USERFAULTFD is off): %w", e, region.ErrNotSupported)
	case unix.EPERM:
		if dev, err := unix.Open("/dev/userfaultfd", unix.O_RDWR|unix.O_CLOEXEC, 0); err == nil {
			defer unix.Close(dev)
			n, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(dev), USERFAULTFD_IOC_NEW, unix.O_CLOEXEC)
			if e == 0 {
				return int(n), false, nil
			}
		}
		if fd, e = call(UFFD_USER_MODE_ONLY); e == 0 {
			return fd, true, nil
		}
	}
	if e == unix.EPERM || e == unix.EINVAL {
		return -1, false, fmt.Errorf("userfaultfd(2): %w (needs root, access to /dev/userfaultfd, or sysctl vm.unprivileged_userfaultfd=1): %w", e, region.ErrNotPermitted)
	}
	return -1, false, fmt.Errorf("userfaultfd(2): %w", e)
}

// Features returns the UFFD_FEATURE_ bits that this kernel offers.
func Features() (uint64, error) {
	fd, _, err := open()
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	a := uffdioAPI{api: UFFD_API}
	if e := ioctl(fd, UFFDIO_API, unsafe.Pointer(&a)); e != 0 {
		return 0, fmt.Errorf("UFFDIO_API: %w", e)
	}
	return a.features, nil
}

// Register makes faults in [base, base+length) of this process events of f.
// mode is a set of UFFDIO_REGISTER_MODE_ bits; base and length are multiples of
// the mapping's page size.
func Register(f *os.File, base uintptr, length int64, mode uint64) error {
	r := uffdioRegister{uffdioRange: uffdioRange{uint64(base), uint64(length)}, mode: mode}
	if e := ioctl(int(f.Fd()), UFFDIO_REGISTER, unsafe.Pointer(&r)); e != 0 {
		if e == unix.EINVAL {
			return fmt.Errorf("UFFDIO_REGISTER mode %#x, %d bytes: %w: %w", mode, length, e, region.ErrNotSupported)
		}
		return fmt.Errorf("UFFDIO_REGISTER mode %#x, %d bytes: %w", mode, length, e)
	}
	return nil
}

// Unregister ends that and wakes the waiters: pages not filled become zeroes.
func Unregister(f *os.File, base uintptr, length int64) error {
	r := uffdioRange{uint64(base), uint64(length)}
	if e := slowIoctl(int(f.Fd()), UFFDIO_UNREGISTER, unsafe.Pointer(&r)); e != 0 {
		return fmt.Errorf("UFFDIO_UNREGISTER %d bytes: %w", length, e)
	}
	return nil
}
