package uffd

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// The probes try the feature on one page of their own. nil is yes;
// region.ErrNotSupported is no, for certain; anything else is "could not tell",
// with what to do. They change nothing and take less than a millisecond.

// ProbeMissing tries missing faults of anonymous memory (UFFDIO_COPY). Linux 4.3.
func ProbeMissing() error { return probeCopy(-1, 0, region.PageSize()) }

// ProbeShared tries missing faults of a memfd. Linux 4.11.
func ProbeShared() error {
	return withMemfd(0, func(fd int) error { return probeCopy(fd, UFFD_FEATURE_MISSING_SHMEM, region.PageSize()) })
}

// HugePageSize is the size of the huge pages that ProbeHuge tries, in bytes.
const HugePageSize = 2 << 20

// ProbeHuge tries missing faults of a hugetlb memfd with 2 MiB pages, of which
// one must be free. Linux 4.11.
func ProbeHuge() error {
	err := withMemfd(unix.MFD_HUGETLB|unix.MFD_HUGE_2MB, func(fd int) error {
		return probeCopy(fd, UFFD_FEATURE_MISSING_HUGETLBFS, HugePageSize)
	})
	if errors.Is(err, unix.ENOMEM) {
		return fmt.Errorf("no huge page is free (sysctl vm.nr_hugepages=N reserves N of 2 MiB): %w", err)
	}
	return err
}

// ProbeMinor tries minor faults of a memfd (UFFDIO_CONTINUE). Linux 5.14.
func ProbeMinor() error {
	return withMemfd(0, func(fd int) error {
		page := region.PageSize()
		if _, err := unix.Pwrite(fd, []byte{probeByte}, 0); err != nil {
			return os.NewSyscallError("pwrite", err)
		}
		return try(fd, UFFD_FEATURE_MINOR_SHMEM|UFFD_FEATURE_MISSING_SHMEM, UFFDIO_REGISTER_MODE_MISSING|UFFDIO_REGISTER_MODE_MINOR, page,
			func(u int, at unsafe.Pointer) error {
				_, e := Continue(u, uintptr(at), page, 0)
				return step("UFFDIO_CONTINUE", e)
			})
	})
}

// ProbeWriteProtect tries write-protect faults of anonymous memory. Linux 5.7
// (unpopulated pages: 6.4).
func ProbeWriteProtect() error {
	return try(-1, UFFD_FEATURE_PAGEFAULT_FLAG_WP|UFFD_FEATURE_WP_UNPOPULATED, UFFDIO_REGISTER_MODE_WP, region.PageSize(),
		func(u int, at unsafe.Pointer) error { return WriteProtect(u, uintptr(at), region.PageSize(), true) })
}

// ProbePoison tries UFFDIO_POISON, without which a lost server cannot be told
// from a slow one. Linux 6.6.
func ProbePoison() error {
	return try(-1, UFFD_FEATURE_POISON, UFFDIO_REGISTER_MODE_MISSING, region.PageSize(), func(u int, at unsafe.Pointer) error {
		marked, err := poison(u, uintptr(at), region.PageSize(), region.PageSize())
		if err == nil && !marked {
			err = errNoProgress
		}
		return err
	})
}

// ProbeMemory tries what a Memory needs: missing, minor and write-protect faults
// of one mapping of a memfd, pages that are filled protected, and UFFDIO_POISON. Linux 6.6.
func ProbeMemory() error {
	if err := ProbePoison(); err != nil {
		return err
	}
	const features = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM | UFFD_FEATURE_POISON
	const modes = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR | UFFDIO_REGISTER_MODE_WP
	page := region.PageSize()
	return withMemfd(0, func(fd int) error {
		return try(fd, features, modes, page, func(u int, at unsafe.Pointer) error {
			if _, e := Copy(u, uintptr(at), make([]byte, page), UFFDIO_COPY_MODE_WP); e != 0 {
				return step("UFFDIO_COPY of a protected page", e)
			}
			if err := WriteProtect(u, uintptr(at), page, false); err != nil {
				return err
			}
			*(*byte)(at) = probeByte // it is there and not protected: this process may
			return nil
		})
	})
}

// ProbeKernelFaults tells whether faults from within system calls wait as those
// from user code do: nil, or region.ErrNotPermitted where this user only gets
// UFFD_USER_MODE_ONLY, with which read(2) into unfilled memory gives EFAULT.
func ProbeKernelFaults() error {
	fd, userOnly, err := open()
	if err != nil {
		return err
	}
	_ = unix.Close(fd)
	if userOnly {
		return fmt.Errorf("userfaultfd is for user-mode faults only (root, access to /dev/userfaultfd, or sysctl vm.unprivileged_userfaultfd=1 mends it): %w", region.ErrNotPermitted)
	}
	return nil
}

const probeByte = 0x5a

var errNoProgress = errors.New("the kernel claims success but did nothing")

func step(name string, e unix.Errno) error {
	if e == 0 {
		return nil
	}
	return fmt.Errorf("%s: %w", name, e)
}

func withMemfd(flags int, f func(fd int) error) error {
	fd, err := unix.MemfdCreate("memsync-probe", unix.MFD_CLOEXEC|flags)
	if err != nil {
		if err == unix.EINVAL || err == unix.ENOSYS {
			return fmt.Errorf("memfd_create with flags %#x: %w: %w", flags, err, region.ErrNotSupported)
		}
		return os.NewSyscallError("memfd_create", err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, HugePageSize); err != nil {
		return os.NewSyscallError("ftruncate", err)
	}
	return f(fd)
}

func probeCopy(fd int, features uint64, page int64) error {
	return try(fd, features, UFFDIO_REGISTER_MODE_MISSING, page, func(u int, at unsafe.Pointer) error {
		src := make([]byte, page)
		src[0] = probeByte
		if _, e := Copy(u, uintptr(at), src, 0); e != 0 {
			return step("UFFDIO_COPY", e)
		}
		// It is filled: this process may touch it.
		if got := *(*byte)(at); got != probeByte {
			return fmt.Errorf("UFFDIO_COPY: the page holds %#x: %w", got, errNoProgress)
		}
		return nil
	})
}

// try maps one page (of fd, or anonymous where fd is -1), registers it with a
// userfaultfd that has the features, and calls f.
func try(fd int, features, mode uint64, page int64, f func(u int, at unsafe.Pointer) error) error {
	flags := unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
	if fd >= 0 {
		flags = unix.MAP_SHARED
	}
	at, err := unix.MmapPtr(fd, 0, nil, uintptr(page), unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		return os.NewSyscallError("mmap", err)
	}
	defer unix.MunmapPtr(at, uintptr(page))
	u, _, err := New(features)
	if err != nil {
		return err
	}
	defer u.Close()
	if err := Register(u, uintptr(at), page, mode); err != nil {
		return err
	}
	return f(int(u.Fd()), at)
}
