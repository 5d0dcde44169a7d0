package fuse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/mountinfo"
	"memsync/strategies/region"
)

const (
	devicePath = "/dev/fuse"
	// Its device number (the kernel's admin-guide/devices.txt).
	deviceMajor, deviceMinor = 10, 229

	fsType = "fuse.memsync" // in mountinfo, so that leftovers can be told
	// What to do where mount(2) or /dev/fuse are refused.
	remedy = "run as root with /dev/fuse present and readable, or inside `unshare --user --map-root-user --mount` where /dev/fuse is mode 0666"
)

// openDevice opens /dev/fuse, without blocking and not inherited by children: a
// child that kept it would keep the connection alive when this process dies.
func openDevice() (int, error) {
	fd, err := unix.Open(devicePath, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	switch {
	case err == nil:
		if err := checkDevice(fd); err != nil {
			unix.Close(fd)
			return -1, err
		}
		return fd, nil
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return -1, fmt.Errorf("open %s: %w (kernel option CONFIG_FUSE_FS; `modprobe fuse`): %w", devicePath, err, region.ErrNotSupported)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return -1, fmt.Errorf("open %s: %w (%s): %w", devicePath, err, remedy, region.ErrNotPermitted)
	}
	return -1, fmt.Errorf("open %s: %w", devicePath, err)
}

// checkDevice says so where something else lies in the place of the device, as in a
// container that was given none.
func checkDevice(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("stat %s: %w", devicePath, err)
	}
	if st.Rdev == unix.Mkdev(deviceMajor, deviceMinor) {
		return nil
	}
	return fmt.Errorf("open %s: it is device %d:%d (as root: rm %[1]s; mknod -m 666 %[1]s c %[4]d %[5]d, or give the container --device %[1]s): %[6]w",
		devicePath, unix.Major(st.Rdev), unix.Minor(st.Rdev), deviceMajor, deviceMinor, region.ErrNotPermitted)
}

// mountFile mounts the FUSE connection fd over the regular file at path. The
// root inode itself is a regular file (rootmode), so that no folder is needed.
func mountFile(fd int, path string, readOnly bool, mode uint32, maxRead int64) error {
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOATIME)
	if mode&0o111 == 0 {
		flags |= unix.MS_NOEXEC // what a source sends is executed only where that was asked for
	}
	if readOnly {
		flags |= unix.MS_RDONLY
	}
	// default_permissions lets the kernel judge mode and owner, and allow_other
	// lets a workload under another user try.
	data := fmt.Sprintf("fd=%d,rootmode=%o,user_id=%d,group_id=%d,allow_other,default_permissions,max_read=%d",
		fd, mode, os.Geteuid(), os.Getegid(), maxRead)
	err := unix.Mount("memsync", path, fsType, flags, data)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENODEV):
		return fmt.Errorf("mount FUSE on %s: %w: %w", path, err, region.ErrNotSupported)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("mount FUSE on %s: %w (%s): %w", path, err, remedy, region.ErrNotPermitted)
	}
	return fmt.Errorf("mount FUSE on %s: %w", path, err)
}

// deviceOf returns the minor number of the mount at path, which also names its
// folder in /sys/fs/fuse/connections and, as 0:N, in /sys/class/bdi. It reads
// mountinfo, since a stat would be a request to ourselves.
func deviceOf(path string) (int, error) {
	mounts, err := mountinfo.Read()
	if err != nil {
		return 0, err
	}
	for _, m := range slices.Backward(mounts) { // the last counts: mounts may be stacked
		if m.Point == path {
			return m.Minor, nil
		}
	}
	return 0, fmt.Errorf("find the mount %s in mountinfo: %w", path, region.ErrMissing)
}

func bdiPath(minor int) string { return fmt.Sprintf("/sys/class/bdi/0:%d/read_ahead_kb", minor) }

// maxPagesLimit is the most pages that the kernel puts in one request
// (fs.fuse.max_pages_limit, Linux 6.13; 256 before).
func maxPagesLimit() int64 {
	b, err := os.ReadFile("/proc/sys/fs/fuse/max_pages_limit")
	if err != nil {
		return 256
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	if err != nil || n < 1 || n > 65535 {
		return 256
	}
	return n
}

// Probe tries whether this process can serve a file through FUSE: it opens
// /dev/fuse, mounts a file in a mount namespace of its own and waits at most 2 s
// for the kernel's first request. It returns nil for yes, an error that wraps
// region.ErrNotSupported for a certain no, and another error with a remedy where
// it could not tell. It leaves nothing behind. Linux 5.4 or later.
func Probe() error {
	result := make(chan error, 1)
	go func() {
		// The thread has another mount namespace from here on: it must not be
		// used for anything else, so it dies with this goroutine.
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The first thread cannot die, and /proc/self would show its
			// namespace as the process's. While it is held, another one does it.
			defer runtime.UnlockOSThread()
			result <- Probe()
			return
		}
		result <- probe()
	}()
	return <-result
}

func probe() error {
	fd, err := openDevice()
	if err != nil {
		return err
	}
	defer unix.Close(fd)  // ends the connection
	const at = os.DevNull // any file will do, in a mount namespace of this thread alone
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("probe FUSE: make a mount namespace: %w (%s): %w", err, remedy, region.ErrNotPermitted)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("probe FUSE: make mounts private: %w", err)
	}
	if err := mountFile(fd, at, true, unix.S_IFREG|0o400, 0); err != nil {
		return fmt.Errorf("probe FUSE: %w", err)
	}
	defer unix.Unmount(at, unix.MNT_DETACH)
	buf := make([]byte, 1<<16)
	for deadline := time.Now().Add(2 * time.Second); ; {
		n, err := unix.Read(fd, buf)
		if err == nil {
			h, body, err := parseHeader(buf[:n])
			if err == nil && h.opcode != opInit {
				err = fmt.Errorf("first request is %d, not FUSE_INIT", h.opcode)
			}
			if err == nil {
				_, err = parseInit(body)
			}
			if err != nil {
				return fmt.Errorf("probe FUSE: %w: %w", err, region.ErrNotSupported)
			}
			return nil
		}
		left := time.Until(deadline)
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) || left <= 0 {
			return fmt.Errorf("probe FUSE: wait for the kernel's first request: %w", err)
		}
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
	}
}

// unmount takes the mount at path away. While a process still has the file open
// it tries again until ctx ends or busy passes; then it cuts the connection
// (what was not written back is lost), detaches the mount, and returns an error that says so.
func unmount(ctx context.Context, path string, busy time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, busy)
	defer cancel()
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW)
		if err == nil {
			return nil
		}
		if errors.Is(err, unix.EINVAL) { // perhaps no mount any more: umount(8) was quicker, and the kernel has written back
			if _, derr := deviceOf(path); errors.Is(derr, region.ErrMissing) {
				return nil
			}
		}
		if !errors.Is(err, syscall.EBUSY) || ctx.Err() != nil {
			// MNT_FORCE aborts the connection, without fusectl and its rights.
			if ferr := unix.Unmount(path, unix.MNT_FORCE|unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); ferr != nil {
				return fmt.Errorf("unmount %s: %w; by force: %w", path, err, ferr)
			}
			return fmt.Errorf("unmount %s: %w: a process still has it open; detached it, later access fails", path, err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}
