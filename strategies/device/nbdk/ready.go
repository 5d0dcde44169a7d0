package nbdk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/param"
	"memsync/strategies/region"
)

// Multicast groups of NETLINK_KOBJECT_UEVENT (systemd's libsystemd/sd-device).
const (
	groupKernel = 1
	groupUdev   = 2
)

// uevents is a socket that gets events of devices: the kernel's own, for which
// no udevd is needed, or those of udevd, which come once its rules have run.
type uevents struct {
	f    *os.File
	udev bool
}

// udevControl is there while a udevd runs.
const udevControl = "/run/udev/control"

func listenUevents(udev bool) (*uevents, error) {
	group := uint32(groupKernel)
	if udev {
		group = groupUdev
		if _, err := os.Stat(udevControl); errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("wait for udevd: none is running here (%s); use nbd_ready=uevent, or in the lab memsync lab --udevd: %w", udevControl, region.ErrNotSupported)
		}
	}
	var fd int
	socket := func() (err error) {
		fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
		return err
	}
	// The kernel tells every network namespace of its devices, udevd its own alone.
	open := func(f func() error) error { return f() }
	if udev {
		open = inFirstNetns
	}
	if err := open(socket); err != nil {
		return nil, fmt.Errorf("open a uevent socket: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: group}); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("listen for uevents: %w", err)
	}
	return &uevents{os.NewFile(uintptr(fd), "uevents"), udev}, nil
}

// change waits for a change event of a block device.
func (u *uevents) change(ctx context.Context, name string) error {
	stop := context.AfterFunc(ctx, func() { _ = u.f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buf := make([]byte, 16<<10)
	for {
		n, err := u.f.Read(buf)
		if errors.Is(err, unix.ENOBUFS) {
			return nil // events were lost; the caller looks at sysfs anyway
		}
		if err != nil {
			return fmt.Errorf("wait for the change event of %s: %w", name, errors.Join(err, context.Cause(ctx)))
		}
		if action, path, ok := parseUevent(buf[:n], u.udev); ok && action == "change" && filepath.Base(path) == name {
			return nil
		}
	}
}

// parseUevent takes action and device path from a message: the kernel's begins
// with "ACTION@DEVPATH", udevd's with a header that says where the properties are.
func parseUevent(b []byte, udev bool) (action, path string, ok bool) {
	if !udev {
		head, _, _ := bytes.Cut(b, []byte{0})
		return strings.Cut(string(head), "@")
	}
	// "libudev\0", magic (big endian), header size, offset and length of the properties.
	const header = 24
	if len(b) < header || string(b[:8]) != "libudev\x00" || binary.BigEndian.Uint32(b[8:]) != 0xfeedcafe {
		return "", "", false
	}
	off, n := binary.NativeEndian.Uint32(b[16:]), binary.NativeEndian.Uint32(b[20:])
	if uint64(off)+uint64(n) > uint64(len(b)) {
		return "", "", false
	}
	for property := range bytes.SplitSeq(b[off:off+n], []byte{0}) {
		switch k, v, _ := strings.Cut(string(property), "="); k {
		case "ACTION":
			action = v
		case "DEVPATH":
			path = v
		}
	}
	return action, path, action != "" && path != ""
}

func (u *uevents) Close() { _ = u.f.Close() }

// tune writes the settings of the device's queue (Documentation/block/queue-sysfs.rst).
func (d *Device) tune(p param.Values) error {
	set := func(name, value string) error {
		if err := os.WriteFile(d.sysfs(filepath.Join("queue", name)), []byte(value), 0); err != nil {
			return judge(fmt.Sprintf("set queue/%s of %s to %s", name, d.Path(), value), err)
		}
		return nil
	}
	var errs []error
	if s := p.Text("nbd_scheduler"); s != "default" {
		errs = append(errs, set("scheduler", s))
	}
	if n := p.Int("nbd_queue_depth"); n > 0 {
		errs = append(errs, set("nr_requests", strconv.Itoa(n)))
	}
	if n := p.Size("nbd_max_request"); n > 0 {
		errs = append(errs, set("max_sectors_kb", strconv.FormatInt(max(n>>10, 1), 10)))
	}
	return errors.Join(errs...)
}
