package attach

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// FileSystems lists what Options.FileSystem can be: none, or a file system on the device.
func FileSystems() []string { return []string{"none", "ext4"} }

// FileName is the name of the i-th file that an image for Options.FileSystem must hold.
func FileName(i int) string { return "part-" + strconv.Itoa(i) }

// mapParts maps k files one behind the other into one range: part i of
// region.PartSize each, so that they are a region of v.a.Size bytes again.
func (v *View) mapParts(paths []string, prot, flags int) error {
	size, part := v.a.Size, region.PartSize(v.a.Size, len(paths))
	length := region.RoundUp(size, region.PageSize())
	if part == 0 {
		return fmt.Errorf("%d bytes in %d parts: a part has at least a page: %w", size, len(paths), region.ErrOutOfRange)
	}
	if err := v.mmap(-1, length, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE); err != nil {
		return err
	}
	mode := unix.O_RDWR
	if v.a.ReadOnly {
		mode = unix.O_RDONLY
	}
	for i, path := range paths {
		f, err := os.OpenFile(path, mode, 0)
		if err != nil {
			return err
		}
		v.parts = append(v.parts, f)
		off, n := int64(i)*part, part
		if i == len(paths)-1 {
			n = size - off
		}
		if fi, err := f.Stat(); err != nil {
			return err
		} else if fi.Mode().IsRegular() && fi.Size() < n {
			return fmt.Errorf("%s has %d bytes, part %d of the region has %d: %w", path, fi.Size(), i, n, region.ErrOutOfRange)
		}
		at := unsafe.Add(unsafe.Pointer(unsafe.SliceData(v.mem)), off)
		if _, err := unix.MmapPtr(int(f.Fd()), 0, at, uintptr(region.RoundUp(n, region.PageSize())), prot, flags|unix.MAP_FIXED); err != nil {
			return fmt.Errorf("map %s: %w", path, err)
		}
	}
	return v.advise()
}

func (v *View) fileSystem() bool { return v.o.FileSystem != "" && v.o.FileSystem != "none" }

// mount mounts the file system that is on the device, through a loop device where
// that is a regular file, and returns the paths of its first o.Files files. It needs the
// right to mount (root, or the sandbox) and, for the loop, /dev/loop-control.
func (v *View) mount() ([]string, error) {
	path, kind := v.a.Path, v.o.FileSystem
	if !slices.Contains(FileSystems(), kind) || v.o.Files < 1 || v.o.Size < 1 || v.o.Size > v.a.Size {
		return nil, fmt.Errorf("%d files of %d bytes together on file system %q of a device of %d bytes; valid: %s: %w",
			v.o.Files, v.o.Size, kind, v.a.Size, strings.Join(FileSystems(), ", "), region.ErrOutOfRange)
	}
	v.a.Size = v.o.Size
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if fi.Mode().IsRegular() {
		if v.loop, err = openLoop(path, v.a.ReadOnly); err != nil {
			return nil, err
		}
		path = v.loop.Name()
	}
	dir, err := os.MkdirTemp(v.o.Dir, "files-")
	if err != nil {
		return nil, err
	}
	v.point = dir
	var flags uintptr = unix.MS_NOATIME
	data := ""
	if v.a.ReadOnly {
		flags |= unix.MS_RDONLY
		data = "noload" // a journal cannot be replayed
	}
	if err := unix.Mount(path, dir, kind, flags, data); err != nil {
		err = fmt.Errorf("mount %s on %s: %w", kind, path, err)
		switch {
		case errors.Is(err, unix.ENODEV):
			err = fmt.Errorf("%w (modprobe %s): %w", err, kind, region.ErrNotSupported)
		case errors.Is(err, unix.EPERM):
			err = fmt.Errorf("%w: %w", err, region.ErrNotPermitted)
		}
		return nil, err // Close undoes the rest
	}
	v.mounted = true
	paths := make([]string, v.o.Files)
	for i := range paths {
		paths[i] = filepath.Join(dir, FileName(i))
	}
	return paths, nil
}

// syncFileSystem writes its metadata back, and that of the device below.
func (v *View) syncFileSystem() error {
	if !v.mounted {
		return nil
	}
	if err := unix.Syncfs(int(v.parts[0].Fd())); err != nil {
		return fmt.Errorf("syncfs: %w", err)
	}
	if v.loop == nil {
		return nil
	}
	return os.NewSyscallError("fsync of the loop device", v.loop.Sync())
}

// unmount undoes mount.
func (v *View) unmount() error {
	var errs []error
	if v.mounted {
		v.mounted = false
		errs = append(errs, os.NewSyscallError("umount", unix.Unmount(v.point, 0)))
	}
	if v.point != "" {
		errs = append(errs, os.Remove(v.point))
		v.point = ""
	}
	if v.loop != nil {
		// The file behind it is the next to be closed: wait until it is let go of.
		_ = unix.IoctlSetInt(int(v.loop.Fd()), unix.LOOP_CLR_FD, 0)
		name := v.loop.Name()
		errs = append(errs, v.loop.Close())
		v.loop = nil
		errs = append(errs, awaitDetached(name))
	}
	return errors.Join(errs...)
}

// awaitDetached waits until a loop device has no file behind it.
func awaitDetached(name string) error {
	backing := filepath.Join("/sys/block", filepath.Base(name), "loop/backing_file")
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat(backing); errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("loop device %s is still attached", name)
		}
	}
}

// openLoop attaches a file to a free loop device, which detaches itself with its last user.
func openLoop(path string, readOnly bool) (*os.File, error) {
	mode := os.O_RDWR
	var flags uint32 = unix.LO_FLAGS_AUTOCLEAR
	if readOnly {
		mode = os.O_RDONLY
		flags |= unix.LO_FLAGS_READ_ONLY
	}
	file, err := os.OpenFile(path, mode, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close() // the loop device keeps it
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("a file system on a file needs a loop device (modprobe loop): %w: %w", err, region.ErrNotSupported)
	} else if err != nil {
		return nil, fmt.Errorf("loop device: %w: %w", err, region.ErrNotPermitted)
	}
	defer control.Close()
	for range 64 {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find a free loop device: %w", err)
		}
		loop, err := os.OpenFile("/dev/loop"+strconv.Itoa(n), mode, 0)
		if err != nil {
			return nil, fmt.Errorf("loop device %d: %w", n, err)
		}
		c := unix.LoopConfig{Fd: uint32(file.Fd())}
		c.Info.Flags = flags
		if err = unix.IoctlLoopConfigure(int(loop.Fd()), &c); err == nil {
			return loop, nil
		}
		loop.Close()
		if err != unix.EBUSY { // another was quicker
			return nil, fmt.Errorf("attach %s to loop device %d: %w", path, n, err)
		}
	}
	return nil, errors.New("no loop device stays free for long enough")
}

// Format makes an ext4 file system of size bytes in the file or device at path,
// with the regular files that are in folder from, if it is not "". It needs mke2fs
// (e2fsprogs). There is no journal: nothing here outlives its mount.
func Format(path string, size int64, from string) error {
	program, err := exec.LookPath("mke2fs")
	if err != nil {
		return fmt.Errorf("make an ext4 file system: %w (install e2fsprogs): %w", err, region.ErrNotSupported)
	}
	args := []string{"-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-O", "^has_journal", "-E", "lazy_itable_init=0,nodiscard"}
	if from != "" {
		args = append(args, "-d", from)
	}
	out, err := exec.Command(program, append(args, path, strconv.FormatInt(size>>10, 10)+"k")...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("mke2fs of %d bytes: %w: %s", size, err, strings.TrimSpace(string(out)))
	}
	return nil
}
