package nbdk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"memsync/strategies/region"
	"memsync/strategies/transport/nbd"
)

const (
	firstRedial = 20 * time.Millisecond // after a connection was lost; doubles
	lastRedial  = time.Second
	takeOver    = 2 * time.Second // the kernel may take so long to notice what we saw
)

// Redial makes one more connection to the server, negotiated as those that were
// given to Connect. It ends with ctx.
type Redial func(ctx context.Context) (net.Conn, nbd.Export, error)

// supervisor watches over the sockets that the kernel was given. It keeps a
// descriptor of each: poll(2) tells when the peer has left, and also when the
// kernel has given a connection up after nbd_timeout.
//
//	all connected --a connection ends--> redial, other connections carry on
//	                                       |  ^
//	                          all are lost |  | one is back (NBD_CMD_RECONFIGURE)
//	                                       v  |
//	                     requests wait up to nbd_dead_timeout
//	                                       |
//	                                       v
//	                     device detached: every request gets EIO
//
// A request that was on its way over a lost connection is sent again when its
// nbd_timeout has passed (drivers/block/nbd.c, nbd_xmit_timeout); new ones go
// out at once.
type supervisor struct {
	d      *Device
	export nbd.Export
	redial Redial // nil: a lost connection stays lost
	dead   time.Duration
	sndtmo time.Duration // that the kernel sets on a socket which it takes
	socks  []*os.File    // nil where lost
	wake   *os.File      // eventfd: the device is being closed
}

// supervise starts a supervisor of the sockets, which it takes over. The
// device's stop ends it.
func (d *Device) supervise(socks []*os.File, e nbd.Export, redial Redial, s settings) error {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("eventfd", err)
	}
	v := &supervisor{d: d, export: e, redial: redial, dead: s.dead, sndtmo: time.Duration(seconds(s.timeout)) * time.Second,
		socks: socks, wake: os.NewFile(uintptr(fd), "nbd supervisor")}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		v.run(ctx)
	}()
	d.stop = func() {
		cancel()
		var one [8]byte
		binary.NativeEndian.PutUint64(one[:], 1)
		_, _ = v.wake.Write(one[:])
		<-done
		_ = v.wake.Close()
		closeFiles(v.socks)
	}
	return nil
}

func (v *supervisor) run(ctx context.Context) {
	var lostAll, next time.Time // zero: not all are lost; nothing to redial
	var last error              // why a redial failed
	pause := firstRedial
	for {
		alive := 0
		for _, f := range v.socks {
			if f != nil {
				alive++
			}
		}
		now := time.Now()
		switch {
		case alive > 0:
			lostAll = time.Time{}
		case lostAll.IsZero():
			lostAll = now
		}
		if alive == len(v.socks) || v.redial == nil {
			next = time.Time{}
			pause = firstRedial
		} else if next.IsZero() {
			next = now.Add(pause)
		}
		if alive == 0 && (v.redial == nil || now.Sub(lostAll) >= v.dead) {
			v.giveUp(now.Sub(lostAll), last)
			return
		}
		until := next
		if end := lostAll.Add(v.dead); alive == 0 && end.Before(until) {
			until = end
		}
		if !v.wait(until) {
			return
		}
		if !next.IsZero() && !time.Now().Before(next) {
			limit := time.Now().Add(5 * time.Second)
			if end := lostAll.Add(v.dead); alive == 0 && end.Before(limit) {
				limit = end
			}
			if err := v.reconnect(ctx, limit); err == nil {
				pause, next = firstRedial, time.Now() // the next lost one
			} else {
				if ctx.Err() != nil {
					return
				}
				last = err
				v.d.noteLost(err)
				if errors.Is(err, region.ErrMismatch) { // another server: never mix the two
					v.redial = nil
				}
				pause = min(2*pause, lastRedial)
				next = time.Now().Add(pause)
			}
		}
	}
}

// wait blocks until a connection is lost, which it notes, or until the given
// time (zero: for ever). It returns false when the device is being closed.
func (v *supervisor) wait(until time.Time) bool {
	for {
		fds := []unix.PollFd{{Fd: int32(v.wake.Fd()), Events: unix.POLLIN}}
		var slots []int
		for i, f := range v.socks {
			if f != nil {
				fds = append(fds, unix.PollFd{Fd: int32(f.Fd()), Events: unix.POLLRDHUP})
				slots = append(slots, i)
			}
		}
		ms := -1
		if !until.IsZero() {
			if ms = int((time.Until(until) + time.Millisecond - 1) / time.Millisecond); ms < 0 {
				ms = 0
			}
		}
		_, err := unix.Poll(fds, ms)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || fds[0].Revents != 0 {
			return false
		}
		for i, p := range fds[1:] {
			if p.Revents != 0 {
				slot := slots[i]
				_ = v.socks[slot].Close()
				v.socks[slot] = nil
				v.d.noteLost(fmt.Errorf("connection %d of %s was lost: %w", slot, v.d.Path(), region.ErrPeerGone))
			}
		}
		return true
	}
}

// reconnect gives the kernel a new connection for one that was lost.
func (v *supervisor) reconnect(ctx context.Context, limit time.Time) error {
	ctx, cancel := context.WithDeadline(ctx, limit)
	defer cancel()
	conn, e, err := v.redial(ctx)
	if err != nil {
		return fmt.Errorf("connect %s again: %w", v.d.Path(), err)
	}
	defer conn.Close()
	e.Flags |= v.export.Flags & nbd.FlagReadOnly // which may be our wish
	if e.Size != v.export.Size || (e.Flags^v.export.Flags)&kernelFlags != 0 {
		return fmt.Errorf("connect %s again: the export has %d bytes and flags %#x, it had %d and %#x: %w",
			v.d.Path(), e.Size, e.Flags, v.export.Size, v.export.Flags, region.ErrMismatch)
	}
	f, err := socketFile(conn)
	if err != nil {
		return err
	}
	for end := time.Now().Add(takeOver); ; {
		if err = reconfigure(v.d.index, f); err == nil {
			// The kernel says yes also where it did not know yet of a lost
			// connection, and has no use for the new one. It sets a send timeout
			// on a socket that it takes.
			if v.taken(f) {
				break
			}
			err = errors.New("the kernel has not noticed the loss")
		}
		if ctx.Err() != nil || time.Now().After(end) {
			_ = f.Close()
			return fmt.Errorf("connect %s again: %w", v.d.Path(), err)
		}
		time.Sleep(5 * time.Millisecond)
	}
	for i, old := range v.socks {
		if old == nil {
			v.socks[i] = f
			break
		}
	}
	v.d.reconnects.Add(1)
	return nil
}

// taken tells whether the kernel uses the socket (nbd_reconnect_socket).
func (v *supervisor) taken(f *os.File) bool {
	tv, err := unix.GetsockoptTimeval(int(f.Fd()), unix.SOL_SOCKET, unix.SO_SNDTIMEO)
	return err == nil && time.Duration(tv.Nano()) == v.sndtmo
}

// giveUp detaches the device: what waits for an answer gets EIO now.
func (v *supervisor) giveUp(after time.Duration, last error) {
	v.d.noteLost(fmt.Errorf("%s: all connections were lost and none came back within %v: %w",
		v.d.Path(), after.Round(time.Millisecond), errors.Join(region.ErrPeerGone, last)))
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := v.d.detachOnce(ctx); err != nil {
		v.d.noteLost(err)
	}
}

// noteLost keeps err for Err.
func (d *Device) noteLost(err error) { d.lost.Store(&err) }

// Reconnects counts the connections that took the place of lost ones.
func (d *Device) Reconnects() int64 { return d.reconnects.Load() }

// reconfigure hands the kernel a socket in place of one that it has lost.
// Source: drivers/block/nbd.c, nbd_genl_reconfigure. Linux 4.12.
func reconfigure(index int, sock *os.File) error {
	_, err := call(cmdReconfigure, nl.NewRtAttr(attrIndex, u32(index)), socketList([]*os.File{sock}))
	if err != nil {
		return judge("NBD_CMD_RECONFIGURE", err)
	}
	return nil
}

// socketList is the attribute NBD_ATTR_SOCKETS.
func socketList(socks []*os.File) *nl.RtAttr {
	list := nl.NewRtAttr(attrSockets|unix.NLA_F_NESTED, nil)
	for _, f := range socks {
		item := list.AddRtAttr(sockItem|unix.NLA_F_NESTED, nil)
		item.AddRtAttr(sockFD, u32(int(f.Fd())))
	}
	return list
}

// socketFile returns a descriptor of a connection's socket.
func socketFile(c net.Conn) (*os.File, error) {
	fc, ok := c.(interface{ File() (*os.File, error) })
	if !ok {
		return nil, fmt.Errorf("attach an nbd device: a %T is no socket: %w", c, region.ErrNotSupported)
	}
	f, err := fc.File()
	if err != nil {
		return nil, fmt.Errorf("attach an nbd device: %w", err)
	}
	return f, nil
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		if f != nil {
			_ = f.Close()
		}
	}
}
