package netem

import (
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	tunPath = "/dev/net/tun"
	// Its device number (the kernel's admin-guide/devices.txt).
	tunMajor, tunMinor = 10, 200
)

// openTun makes the TUN device name in the calling thread's network namespace, with
// virtio headers and with checksums and the segmentation of TCP (Linux 2.6.27) and UDP
// (Linux 6.2, and done without before) left to us. The device lives as long as the descriptor.
func openTun(name string) (fd int, err error) {
	fd, err = unix.Open(tunPath, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return -1, fmt.Errorf("open %s: %w: %w (modprobe tun, or give the container --device %s)", tunPath, ErrNotSupported, err, tunPath)
	case err != nil:
		return -1, fmt.Errorf("open %s: %w", tunPath, permission(err, "as root: chmod 0666 "+tunPath))
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err != nil {
		return -1, fmt.Errorf("stat %s: %w", tunPath, err)
	}
	if st.Rdev != unix.Mkdev(tunMajor, tunMinor) {
		return -1, fmt.Errorf("open %s: %w: it is device %d:%d (as root: rm %[1]s; mknod -m 666 %[1]s c %[5]d %[6]d, or give the container --device %[1]s)",
			tunPath, ErrNotPermitted, unix.Major(st.Rdev), unix.Minor(st.Rdev), tunMajor, tunMinor)
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return -1, fmt.Errorf("device name %q: %w", name, err)
	}
	ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return -1, fmt.Errorf("make tun device %s: %w", name, permission(err, "needs CAP_NET_ADMIN in the namespace's user namespace"))
	}
	const tcp = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO_ECN
	if unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tcp|unix.TUN_F_USO4|unix.TUN_F_USO6) == nil {
		return fd, nil
	}
	if err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tcp); err != nil {
		return -1, fmt.Errorf("offloads of tun device %s: %w", name, err)
	}
	return fd, nil
}

const (
	maxRead = vnetLen + 65535
	// An unlimited rate has no BDP, so its buffer is a fixed one: 10 Gbit/s at 50 ms one way.
	unlimitedArena = 64 << 20
	// Departures closer than this are waited for together: a sleep costs about as much.
	coalesce = 20 * time.Microsecond
)

// piece is what waits in a forwarder: packets [from, to) of the read at off, for outs[out].
type piece struct {
	depart   int64
	off      int
	pkt      packet
	from, to int
	out      int
}

// forwarder carries what leaves one host of a tun link: a thread that reads in, asks
// line, and writes to the host that a packet is for in time. Packets stay where they were read, in a ring of bytes
// outside of the Go heap; nothing is copied and nothing allocated on the way.
type forwarder struct {
	in, stop  int
	outs      []int // of all hosts, by number
	line      *line
	pieceSegs int

	arena       []byte
	tail        int // end of the newest read; the oldest starts at the front piece's off
	ring        []piece
	first, held int // of ring
	scratch     [maxHeaders]byte

	gave              []given
	lost, over, wrong atomic.Int64 // packets
	tid               atomic.Int64 // of its thread, 0 before it runs and after it ended
	cpu               atomic.Int64 // ns, once it ended
}

// given counts what was written out to one host: L3 bytes, and packets as segmented.
type given struct{ packets, bytes atomic.Int64 }

func newForwarder(in int, outs []int, stop int, p Profile, l *line) (*forwarder, error) {
	size := int64(unlimitedArena)
	segs := 1 << 16 // an unlimited rate has nobody wait
	if p.Rate != 0 {
		// What is under way, twice for segments held for a part of theirs, and a margin for wrapping.
		reach := p.RTT/2 + 6*p.Jitter
		size = 2*(roomyQueue(p)+int64(float64(p.Rate)/8*reach.Seconds())) + 16*maxRead
		size = min(size, 4*MaxQueue)
		segs = p.segments()
	}
	// Populating a small ring spares its first packets the page faults; a large one is walked only under load.
	flags := unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_NORESERVE
	if size <= 16<<20 {
		flags |= unix.MAP_POPULATE
	}
	arena, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes for packets under way: %w", size, err)
	}
	return &forwarder{in: in, outs: outs, stop: stop, gave: make([]given, len(outs)), line: l, pieceSegs: segs, arena: arena,
		ring: make([]piece, min(max(size/64, 1<<12), 1<<16))}, nil
}

// room returns where the next read may go, or false while the ring is full.
func (f *forwarder) room() (off int, ok bool) {
	if f.held == 0 {
		f.tail = 0 // stay in the cache
		return 0, true
	}
	// The largest read can become a piece per packet; a read that makes more than fit loses them.
	if len(f.ring)-f.held < 64 {
		return 0, false
	}
	head := f.ring[f.first].off
	switch {
	case f.tail <= head: // wrapped
		return f.tail, head-f.tail > maxRead
	case len(f.arena)-f.tail >= maxRead:
		return f.tail, true
	default:
		return 0, head > maxRead
	}
}

// take asks the line about each packet of the n bytes read at off and queues the
// ones that pass, in as few pieces as the line's rate allows.
func (f *forwarder) take(now int64, off, n int) {
	p, err := parse(f.arena[off : off+n])
	out := f.recipient(f.arena[off : off+n])
	if err != nil || out < 0 {
		f.wrong.Add(1)
		return
	}
	var open *piece
	for i := range p.segs {
		depart, v := f.line.admit(now, int64(p.size(i)+l2Header))
		switch {
		case v == lost:
			f.lost.Add(1)
			open = nil
			continue
		case v == overflow:
			f.over.Add(1)
			open = nil
			continue
		}
		if open == nil || open.to-open.from >= f.pieceSegs {
			if f.held == len(f.ring) {
				f.over.Add(1)
				open = nil
				continue
			}
			open = &f.ring[(f.first+f.held)%len(f.ring)]
			*open = piece{off: off, pkt: p, from: i, out: out}
			f.held++
		}
		open.depart, open.to = depart, i+1
		f.tail = off + n
		if p.segs > 1 { // what follows is free again unless another packet passes
			_, hi := p.payload(i, i+1)
			f.tail = off + hi
		}
	}
}

// recipient is the number of the host that a read is for, -1 where there is none
// such: the last byte of an IPv4 address counts hosts from 1 (hostAddr).
func (f *forwarder) recipient(b []byte) int {
	ip := b[min(vnetLen, len(b)):]
	if len(ip) < 20 || ip[0]>>4 != 4 {
		return -1
	}
	i := int(ip[19]) - 1
	if i < 0 || i >= len(f.outs) || f.outs[i] == f.in {
		return -1
	}
	return i
}

// give writes the front piece out and frees it.
func (f *forwarder) give() {
	e := &f.ring[f.first]
	out := f.outs[e.out]
	b := f.arena[e.off : e.off+vnetLen+e.pkt.l3]
	var err error
	var l3 int
	if e.to-e.from == e.pkt.segs {
		_, err = unix.Write(out, b)
		l3 = e.pkt.l3 + (e.pkt.segs-1)*e.pkt.headers
	} else {
		n := e.pkt.cut(f.scratch[:], b, e.from, e.to)
		lo, hi := e.pkt.payload(e.from, e.to)
		iov := [2]unix.Iovec{{Base: &f.scratch[0]}, {Base: &b[lo]}}
		iov[0].SetLen(n)
		iov[1].SetLen(hi - lo)
		_, _, errno := unix.Syscall(unix.SYS_WRITEV, uintptr(out), uintptr(unsafe.Pointer(&iov)), 2)
		if errno != 0 {
			err = errno
		}
		l3 = hi - lo + (e.to-e.from)*e.pkt.headers
	}
	if err != nil { // a device that is down (EIO), or a packet that the kernel refuses
		f.wrong.Add(int64(e.to - e.from))
	} else {
		f.gave[e.out].packets.Add(int64(e.to - e.from))
		f.gave[e.out].bytes.Add(int64(l3))
	}
	f.first = (f.first + 1) % len(f.ring)
	f.held--
}

// run forwards until the eventfd stop becomes readable. It wants a thread of its own.
func (f *forwarder) run() {
	runtime.LockOSThread() // and never unlocks: the thread ends with its timer slack and priority
	f.tid.Store(int64(unix.Gettid()))
	// The default slack, 50 us, would be added to every departure. Linux 2.6.28.
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
	// A link must not be late because its users are busy. Allowed to root only, and no harm where it is not.
	_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), -20)
	defer func() { _ = unix.Munmap(f.arena) }()
	fds := []unix.PollFd{{Fd: int32(f.stop), Events: unix.POLLIN}, {Fd: int32(f.in)}}
	timeout := new(unix.Timespec)
	base := time.Now()
	for turn := uint(1); ; turn++ {
		now := int64(time.Since(base))
		for f.held > 0 && f.ring[f.first].depart <= now {
			f.give()
		}
		off, ok := f.room()
		if ok {
			n, err := unix.Read(f.in, f.arena[off:off+maxRead])
			if err == nil {
				f.take(int64(time.Since(base)), off, n)
				if turn%256 != 0 { // look at stop now and then, also under load
					continue
				}
				*timeout = unix.Timespec{}
				if n, _ := unix.Ppoll(fds[:1], timeout, nil); n > 0 {
					break
				}
				continue
			}
			if !temporary(err) {
				// EBADFD or EIO: the device is gone or down; deliver what is held, try again later.
				f.wrong.Add(1)
			}
		}
		fds[1].Events = 0
		if ok {
			fds[1].Events = unix.POLLIN
		}
		wait := timeout
		if f.held > 0 {
			*timeout = unix.NsecToTimespec(max(f.ring[f.first].depart-int64(time.Since(base)), int64(coalesce)))
		} else {
			wait = nil
		}
		if _, err := unix.Ppoll(fds, wait, nil); err != nil && !errors.Is(err, unix.EINTR) {
			break
		}
		if fds[0].Revents != 0 {
			break
		}
	}
	f.cpu.Store(int64(f.cputime()))
	f.tid.Store(0)
}

// cputime is the CPU time of the thread. The clock of another thread of one's own
// process is made from its id: CPUCLOCK_SCHED and CPUCLOCK_PERTHREAD of
// include/linux/posix-timers.h.
func (f *forwarder) cputime() time.Duration {
	tid := f.tid.Load()
	if tid == 0 {
		return time.Duration(f.cpu.Load())
	}
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^tid<<3|2|4), &ts); err != nil {
		return time.Duration(f.cpu.Load()) // it has just ended
	}
	return time.Duration(ts.Nano())
}
