package nbdk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// Numbers of include/uapi/linux/nbd-netlink.h and nbd.h.
const (
	cmdConnect     = 1
	cmdDisconnect  = 2
	cmdReconfigure = 3

	attrIndex       = 1
	attrSize        = 2
	attrBlock       = 3
	attrTimeout     = 4
	attrServerFlags = 5
	attrClientFlags = 6
	attrSockets     = 7
	attrDeadTimeout = 8
	sockItem        = 1
	sockFD          = 1

	flagDisconnectOnClose = 1 << 1

	ioctlSetSock       = 0xab00
	ioctlSetBlock      = 0xab01
	ioctlDoIt          = 0xab03
	ioctlClearSock     = 0xab04
	ioctlSetSizeBlocks = 0xab07
	ioctlDisconnect    = 0xab08
	ioctlSetTimeout    = 0xab09
	ioctlSetFlags      = 0xab0a
)

// errNoFamily: the kernel's nbd cannot be reached by netlink from here.
var errNoFamily = errors.New("no generic netlink family nbd")

var errAllInUse = errors.New("all nbd devices are in use")

// family finds the generic netlink family, which the driver has in the first
// network namespace only.
func family() (*netlink.GenlFamily, error) {
	var f *netlink.GenlFamily
	err := inFirstNetns(func() (err error) {
		f, err = netlink.GenlFamilyGet("nbd")
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoFamily, err)
	}
	return f, nil
}

// inFirstNetns runs f here, or in the network namespace of process 1 if this
// process has another one that it may leave.
func inFirstNetns(f func() error) error {
	same := func(a, b string) bool {
		x, err1 := os.Readlink(a)
		y, err2 := os.Readlink(b)
		return err1 != nil || err2 != nil || x == y
	}
	const first = "/proc/1/ns/net"
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if same(first, "/proc/thread-self/ns/net") {
			defer runtime.UnlockOSThread()
			done <- f()
			return
		}
		if unix.Gettid() == unix.Getpid() {
			// The first thread cannot die with its changed namespace: hold it
			// while another one does it.
			defer runtime.UnlockOSThread()
			done <- inFirstNetns(f)
			return
		}
		ns, err := os.Open(first)
		if err == nil {
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
			_ = ns.Close()
		}
		if err != nil {
			done <- fmt.Errorf("enter the first network namespace: %w", err)
			return
		}
		done <- f() // the thread dies with the goroutine
	}()
	return <-done
}

func u32(n int) []byte   { return binary.NativeEndian.AppendUint32(nil, uint32(n)) }
func u64(n int64) []byte { return binary.NativeEndian.AppendUint64(nil, uint64(n)) }

func seconds(d time.Duration) int64 { return int64((d + time.Second - 1) / time.Second) }

// call makes one request of the nbd family.
func call(cmd uint8, attrs ...*nl.RtAttr) (answer [][]byte, err error) {
	f, err := family()
	if err != nil {
		return nil, err
	}
	err = inFirstNetns(func() (err error) {
		req := nl.NewNetlinkRequest(int(f.ID), unix.NLM_F_ACK)
		req.AddData(&nl.Genlmsg{Command: cmd, Version: uint8(f.Version)})
		for _, a := range attrs {
			req.AddData(a)
		}
		answer, err = req.Execute(unix.NETLINK_GENERIC, 0)
		return err
	})
	return answer, err
}

// byNetlink lets the kernel choose a free device, or make one. Linux 4.12.
func (d *Device) byNetlink(s settings) error {
	attrs := []*nl.RtAttr{
		nl.NewRtAttr(attrSize, u64(s.size)),
		nl.NewRtAttr(attrBlock, u64(s.block)),
		nl.NewRtAttr(attrTimeout, u64(seconds(s.timeout))),
		nl.NewRtAttr(attrServerFlags, u64(int64(s.flags))),
		socketList(s.sockets),
	}
	if s.dead > 0 {
		attrs = append(attrs, nl.NewRtAttr(attrDeadTimeout, u64(seconds(s.dead))))
	}
	answer, err := call(cmdConnect, attrs...)
	if err != nil {
		return judge("NBD_CMD_CONNECT", err)
	}
	for _, m := range answer {
		if len(m) < nl.SizeofGenlmsg {
			continue
		}
		parsed, err := nl.ParseRouteAttr(m[nl.SizeofGenlmsg:])
		if err != nil {
			return fmt.Errorf("NBD_CMD_CONNECT: %w", err)
		}
		for _, a := range parsed {
			if a.Attr.Type == attrIndex && len(a.Value) >= 4 {
				d.index = int(binary.NativeEndian.Uint32(a.Value))
			}
		}
	}
	if d.index < 0 {
		return errors.New("NBD_CMD_CONNECT: the kernel did not say which device it took")
	}
	d.detach = func(context.Context) error {
		if _, err := call(cmdDisconnect, nl.NewRtAttr(attrIndex, u32(d.index))); err != nil {
			return judge("NBD_CMD_DISCONNECT "+d.Path(), err)
		}
		return nil
	}
	return nil
}

// letGoOnClose has the kernel detach the device when the last process closes it,
// as it does when this one is killed. Only who holds the device open may ask
// for that: whoever looks into a new device (udev, another client that searches
// for a free one) closes it again.
func (d *Device) letGoOnClose() error {
	if _, err := call(cmdReconfigure, nl.NewRtAttr(attrIndex, u32(d.index)), nl.NewRtAttr(attrClientFlags, u64(flagDisconnectOnClose))); err != nil {
		return judge("NBD_CMD_RECONFIGURE "+d.Path(), err)
	}
	return nil
}

func judge(what string, err error) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("%s: %w (needs root): %w", what, err, region.ErrNotPermitted)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// free opens a device that nobody uses. The lock on it keeps another memsync
// away; a foreign client that comes between is noticed by NBD_SET_SOCK (EBUSY).
func free(skip ...int) (index int, node *os.File, err error) {
	nodes, err := filepath.Glob("/sys/block/nbd*")
	if err != nil {
		return 0, nil, err
	}
	var why error
	for i := range nodes {
		if _, err := os.Stat(fmt.Sprintf("/sys/block/nbd%d/pid", i)); err == nil || slices.Contains(skip, i) {
			continue
		}
		f, err := os.OpenFile(fmt.Sprintf("/dev/nbd%d", i), os.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			why = err
			continue
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			return i, f, nil
		}
		_ = f.Close()
	}
	switch {
	case errors.Is(why, fs.ErrPermission):
		return 0, nil, judge("open an nbd device", why)
	case why != nil && !errors.Is(why, unix.EBUSY):
		return 0, nil, fmt.Errorf("open an nbd device: %w", why)
	}
	return 0, nil, fmt.Errorf("%w: %d (modprobe -r nbd && modprobe nbd nbds_max=%d gives more)", errAllInUse, len(nodes), 4*max(len(nodes), 4))
}

func blockIoctl(fd int, req uint, arg uintptr) error {
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(req), arg); e != 0 {
		return e
	}
	return nil
}

// byIoctl is the way of nbd-client before netlink. One thread, which does nothing else,
// hands the kernel the sockets and then sits in NBD_DO_IT for as long as the device
// is attached: the kernel takes the first thread that hands it a socket for the device's
// owner and refuses sockets of all others with EBUSY, so that no other goroutine
// may run on it.
func (d *Device) byIoctl(ctx context.Context, s settings) error {
	claimed, ended := make(chan error, 1), make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := d.search(ctx, s)
		if err != nil {
			claimed <- err
			return
		}
		fd := int(d.node.Fd())
		// It is ours by its sockets now, and udevd leaves a locked device alone.
		_ = unix.Flock(fd, unix.LOCK_UN)
		claimed <- nil
		// A signal would end NBD_DO_IT, and the device with it.
		var all, old unix.Sigset_t
		for i := range all.Val {
			all.Val[i] = ^all.Val[i]
		}
		if err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, &old); err != nil {
			ended <- err
			return
		}
		err = blockIoctl(fd, ioctlDoIt, 0)
		d.noteLost(fmt.Errorf("%s: all connections were lost: %w", d.Path(), region.ErrPeerGone)) // unless detached: then nobody asks
		// What is in flight would wait for nbd_timeout.
		_ = blockIoctl(fd, ioctlClearSock, 0)
		_ = unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil)
		ended <- err
	}()
	if err := <-claimed; err != nil {
		return err
	}
	fd := int(d.node.Fd())
	d.detach = func(ctx context.Context) error {
		if err := blockIoctl(fd, ioctlDisconnect, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			return judge("NBD_DISCONNECT "+d.Path(), err)
		}
		_ = blockIoctl(fd, ioctlClearSock, 0)
		select {
		case <-ended: // its error is how the connection ended
			return nil
		case <-ctx.Done():
			return fmt.Errorf("detach %s: NBD_DO_IT goes on: %w", d.Path(), context.Cause(ctx))
		}
	}
	return nil
}

// search claims a free device.
func (d *Device) search(ctx context.Context, s settings) error {
	var skip []int
	for {
		index, node, err := free(skip...)
		if err != nil {
			return err
		}
		err = claim(node, s)
		if err == nil {
			d.index, d.node = index, node
			return nil
		}
		_ = node.Close()
		if !errors.Is(err, unix.EBUSY) {
			return judge(fmt.Sprintf("set /dev/nbd%d up", index), err)
		}
		skip = append(skip, index) // somebody was faster
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
}

func claim(node *os.File, s settings) error {
	fd := int(node.Fd())
	for i, sock := range s.sockets {
		if err := blockIoctl(fd, ioctlSetSock, sock.Fd()); err != nil {
			switch {
			case i > 0:
				_ = blockIoctl(fd, ioctlClearSock, 0)
			case errors.Is(err, unix.EINVAL): // it came under the control of netlink meanwhile
				err = unix.EBUSY
			}
			return fmt.Errorf("NBD_SET_SOCK: %w", err)
		}
	}
	for _, c := range []struct {
		name string
		req  uint
		arg  int64
	}{
		{"NBD_SET_BLKSIZE", ioctlSetBlock, s.block},
		{"NBD_SET_SIZE_BLOCKS", ioctlSetSizeBlocks, s.size / s.block},
		{"NBD_SET_TIMEOUT", ioctlSetTimeout, seconds(s.timeout)},
		{"NBD_SET_FLAGS", ioctlSetFlags, int64(s.flags)},
	} {
		if err := blockIoctl(fd, c.req, uintptr(c.arg)); err != nil {
			_ = blockIoctl(fd, ioctlClearSock, 0)
			return fmt.Errorf("%s %d: %w", c.name, c.arg, err)
		}
	}
	return nil
}

// ready waits until the device has its size.
func (d *Device) ready(ctx context.Context, s settings, events *uevents) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if events != nil {
		if err := events.change(ctx, "nbd"+strconv.Itoa(d.index)); err != nil {
			return err
		}
	}
	return d.poll(ctx, "the device is ready", func() bool {
		b, err := os.ReadFile(d.sysfs("size"))
		_, pidErr := os.Stat(d.sysfs("pid"))
		return err == nil && pidErr == nil && strings.TrimSpace(string(b)) == strconv.FormatInt(s.size/512, 10)
	})
}

// idle waits until the kernel has let the device go, which it does when the last
// process has closed it.
func (d *Device) idle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	return d.poll(ctx, "every process has closed it", func() bool {
		_, err := os.Stat(d.sysfs("pid"))
		return err != nil
	})
}

func (d *Device) poll(ctx context.Context, what string, ok func() bool) error {
	tick := time.NewTicker(200 * time.Microsecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("wait until %s, %s: %w", d.Path(), what, context.Cause(ctx))
		}
	}
	return nil
}
