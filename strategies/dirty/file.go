package dirty

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// mtime watches the modification time. The kernel moves it on the first store to
// a page that is clean in the mapping, and on no later one (file_update_time in
// mm/memory.c, do_wp_page), so each round must clean the pages: note the time,
// then msync, then hash. A first store after the note moves the time again; a
// store to a page that was dirty before the note is before the hash or, if after
// the msync, a first store again.
type mtime struct {
	r    Region
	last unix.Timespec // zero: look in any case
	took time.Duration // of the last msync
}

// racy is for how long a modification time may stand for two moments: file
// systems without multigrain timestamps (before Linux 6.13) take the time of the
// last tick, 10 ms at most.
const racy = 20 * time.Millisecond

// File systems that move the time on mapped stores (statfs(2), linux/magic.h).
const (
	ext4Magic  = 0xef53
	xfsMagic   = 0x58465342
	btrfsMagic = 0x9123683e
)

func openMtime(r Region) (Detector, error) {
	var s unix.Statfs_t
	if err := unix.Fstatfs(int(r.File.Fd()), &s); err != nil {
		return nil, os.NewSyscallError("fstatfs", err)
	}
	switch s.Type {
	case ext4Magic, xfsMagic, btrfsMagic:
	default:
		return nil, fmt.Errorf("file system %#x: only ext4, xfs and btrfs are known to move the modification time on mapped stores (tmpfs does not): %w", s.Type, region.ErrNotSupported)
	}
	return &mtime{r: r}, nil
}

func (m *mtime) Add(Writer) error { return nil }

func (m *mtime) Collect(_ context.Context, found func(off, n int64)) error {
	m.took = 0
	var st unix.Stat_t
	if err := unix.Fstat(int(m.r.File.Fd()), &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if st.Mtim == m.last {
		return nil
	}
	m.last = st.Mtim
	if age := time.Since(time.Unix(st.Mtim.Unix())); age < racy {
		m.last = unix.Timespec{} // the same time may come again
	}
	begin := time.Now()
	if err := unix.Msync(m.r.Mem, unix.MS_SYNC); err != nil {
		return fmt.Errorf("msync %d bytes: %w", len(m.r.Mem), err)
	}
	m.took = time.Since(begin)
	found(0, int64(len(m.r.Mem)))
	return nil
}

// Flushing implements Flusher.
func (m *mtime) Flushing() time.Duration { return m.took }

func (m *mtime) Close() error { return nil }

// inotify watches IN_MODIFY, of which a mapped store makes none (inotify(7), "Limitations and caveats").
type inotify struct {
	r     Region
	fd    int
	first bool
}

func openInotify(r Region) (Detector, error) {
	if _, err := seals(r.File); err == nil { // only a memfd, or a file of tmpfs, has seals
		return nil, fmt.Errorf("a memfd raises no events at all (FMODE_NONOTIFY): %w", region.ErrNotSupported)
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("inotify_init1", err)
	}
	if _, err := unix.InotifyAddWatch(fd, fmt.Sprintf("/proc/self/fd/%d", r.File.Fd()), unix.IN_MODIFY); err != nil {
		_ = unix.Close(fd)
		return nil, os.NewSyscallError("inotify_add_watch", err)
	}
	return &inotify{r: r, fd: fd, first: true}, nil
}

func (i *inotify) Add(Writer) error { return nil }

func (i *inotify) Collect(_ context.Context, found func(off, n int64)) error {
	any := i.first
	i.first = false
	var buf [4096]byte
	for {
		n, err := unix.Read(i.fd, buf[:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.EAGAIN) {
			break
		}
		if err != nil {
			return fmt.Errorf("read inotify: %w", err)
		}
		any = any || n > 0
	}
	if any {
		found(0, int64(len(i.r.Mem)))
	}
	return nil
}

func (i *inotify) Close() error {
	if i.fd < 0 {
		return nil
	}
	err := unix.Close(i.fd)
	i.fd = -1
	return err
}
