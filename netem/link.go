package netem

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Shaper names what makes the delay, the loss and the rate of a link.
type Shaper string

// The shapers; the package's documentation says what each is.
const (
	ShaperNetem Shaper = "netem"
	ShaperTun   Shaper = "tun"
	ShaperSleep Shaper = "sleep"
	ShaperNone  Shaper = "none"
)

// Shapers returns all shapers, in the order in which they are preferred.
func Shapers() []Shaper { return []Shaper{ShaperNetem, ShaperTun, ShaperNone, ShaperSleep} }

// Options tune a link beyond its Profile. The zero value is the default of each.
type Options struct {
	// Seed fixes loss and jitter where they are drawn here (tun) and where the kernel
	// takes a seed (netem, Linux 6.6). Any value is one.
	Seed uint64 `json:"seed"`
	// Congestion is the congestion control of every TCP connection over the link, such
	// as "bbr"; empty leaves the namespace's default (the host's).
	Congestion string `json:"congestion,omitempty"`
	// InitialWindow is how many segments a connection sends before the first
	// acknowledgement (initcwnd of the route); 0 is the kernel's own, 10 (RFC 6928).
	InitialWindow int `json:"initial_window_segments,omitempty"`
	// Window is the least maximum of the TCP buffers in bytes; the maximum is never
	// below 4 BDP nor below 16 MiB (64 MiB where the rate is unlimited).
	Window int64 `json:"window_bytes,omitempty"`
	// Hosts is how many hosts the link joins: 2 by default, at most MaxHosts. The first
	// is the source, the others are destinations. More than two meet at a switch that
	// adds neither delay nor limit: what leaves a host goes through that host's own
	// shaper, so that the RTT of any two is the profile's, and each host sends at
	// most at its rate, to however many others.
	Hosts int `json:"hosts,omitempty"`
}

// MaxHosts is the largest Options.Hosts.
const MaxHosts = 17

// The names and addresses at the two ends. The namespaces are private, so every
// link has the same ones; 198.18.0.0/15 is set aside for benchmarks by RFC 2544.
const (
	sourceDevice      = "memsync-src"
	destinationDevice = "memsync-dst"
	prefixBits        = 27
)

// hostAddr is the address of host i, from 0; its last byte is i+1.
func hostAddr(i int) netip.Addr { return netip.AddrFrom4([4]byte{198, 18, 0, byte(i + 1)}) }

// hostName is what host i is called in errors, and its device.
func hostName(i int) (name, device string) {
	switch i {
	case 0:
		return "source", sourceDevice
	case 1:
		return "destination", destinationDevice
	}
	return fmt.Sprintf("destination %d", i), fmt.Sprint(destinationDevice, i)
}

// Link joins two namespaces, or as many as Options.Hosts says. It owns them, its
// devices, descriptors and threads until Close. Its methods may be called concurrently.
type Link struct {
	shaper   Shaper
	profile  Profile
	options  Options
	hosts    []*Namespace
	src, dst *Namespace // the first two hosts
	hub      *Namespace // the switch: veth with more than two hosts
	evidence Evidence

	// tun only
	tuns     []int
	stop     int
	forwards []*forwarder
	running  sync.WaitGroup

	mu      sync.Mutex // serialises change and Close
	changes uint64     // since Open; netem starts its random numbers anew with each
	closed  bool
}

// Open makes a link of profile p and returns when it carries packets and all that
// was set has been read back. It takes some milliseconds. ctx bounds Open only.
//
// It returns ErrInvalid for a profile, shaper or option out of range (also for
// ShaperSleep, which has no link, and for ShaperNone with a profile that shapes),
// ErrNotSupported and ErrNotPermitted as Probe does, and ErrReadBack where the
// kernel took other values. What was made is gone again after an error.
func Open(ctx context.Context, shaper Shaper, p Profile, o Options) (_ *Link, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("open %s link: %w", shaper, err)
		}
	}()
	if err := p.Validate(); err != nil {
		return nil, err
	}
	switch shaper {
	case ShaperNetem, ShaperTun:
	case ShaperNone:
		if p.RTT != 0 || p.Jitter != 0 || p.Loss != 0 || p.Rate != 0 {
			return nil, fmt.Errorf("%w: it shapes nothing, and the profile asks for RTT %v, jitter %v, loss %v, %d bit/s", ErrInvalid, p.RTT, p.Jitter, p.Loss, p.Rate)
		}
	case ShaperSleep:
		return nil, fmt.Errorf("%w: it has no link; the pause is applied by the backend", ErrInvalid)
	default:
		return nil, fmt.Errorf("%w: it is none of %v", ErrInvalid, Shapers())
	}
	if o.Window < 0 || o.Window > maxWindow {
		return nil, fmt.Errorf("window of %d bytes: %w: must be 0 to %d", o.Window, ErrInvalid, maxWindow)
	}
	if o.InitialWindow < 0 || o.InitialWindow > maxInitialWindow {
		return nil, fmt.Errorf("initial window of %d segments: %w: must be 0 to %d", o.InitialWindow, ErrInvalid, maxInitialWindow)
	}
	n := max(o.Hosts, 2)
	if o.Hosts == 1 || o.Hosts < 0 || n > MaxHosts {
		return nil, fmt.Errorf("%d hosts: %w: must be 2 to %d", o.Hosts, ErrInvalid, MaxHosts)
	}
	l := &Link{shaper: shaper, profile: p, options: o, stop: -1}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	for i := range n {
		name, device := hostName(i)
		h, err := newNamespace(name)
		if err != nil {
			return nil, err
		}
		h.dev, h.addr = device, hostAddr(i)
		l.hosts = append(l.hosts, h)
	}
	l.src, l.dst = l.hosts[0], l.hosts[1]
	if n > 2 && shaper != ShaperTun {
		if l.hub, err = newNamespace("switch"); err != nil {
			return nil, err
		}
	}
	for _, step := range []func() error{l.makeDevices, func() error { return l.configure(ctx) }, l.shape, l.readEvidence} {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := step(); err != nil {
			return nil, err
		}
	}
	return l, nil
}

// ends are the first two hosts, which calibration is about; direction i goes from
// ends()[i] to ends()[1-i].
func (l *Link) ends() [2]*Namespace { return [2]*Namespace{l.src, l.dst} }

func (l *Link) makeDevices() error {
	for i, n := range l.hosts {
		err := n.Do(func() error {
			switch {
			case l.shaper == ShaperTun:
				fd, err := openTun(n.dev)
				if err == nil {
					l.tuns = append(l.tuns, fd)
				}
				return err
			case l.hub != nil:
				return addVeth(n.dev, port(i), netlink.NsFd(l.hub.fd))
			case i == 0: // one pair for both
				return addVeth(n.dev, l.dst.dev, netlink.NsFd(l.dst.fd))
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// addVeth makes the pair name and peer, the latter in another namespace (a
// netlink.NsFd) or, where that is nil, in the calling thread's as well.
func addVeth(name, peer string, in any) error {
	v := &netlink.Veth{
		LinkAttrs:       netlink.LinkAttrs{Name: name, MTU: mtu, TxQLen: deviceQueue, NumTxQueues: 1, NumRxQueues: 1},
		PeerName:        peer,
		PeerNamespace:   in,
		PeerMTU:         mtu,
		PeerTxQLen:      deviceQueue,
		PeerNumTxQueues: 1,
		PeerNumRxQueues: 1,
	}
	err := netlink.LinkAdd(v)
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = fmt.Errorf("%w: %w (modprobe veth)", ErrNotSupported, err)
	}
	if err != nil {
		return fmt.Errorf("make veth pair: %w", permission(err, "needs CAP_NET_ADMIN in the namespace's user namespace"))
	}
	return nil
}

// deviceQueue is the length in packets of a device's own queue: what a direction's
// thread or the peer may fall behind (4096 frames are 50 ms at 1 Gbit/s) before
// packets are lost that no profile asked to lose.
const deviceQueue = 4096

// configure sets addresses, neighbours, routes and sysctls, and brings the devices up.
func (l *Link) configure(ctx context.Context) error {
	devices := make([]netlink.Link, len(l.hosts))
	for i, n := range l.hosts {
		err := n.Do(func() (err error) {
			devices[i], err = netlink.LinkByName(n.dev)
			return err
		})
		if err != nil {
			return fmt.Errorf("find device %s: %w", n.dev, err)
		}
	}
	next := []netlink.Link{devices[1], devices[0]} // whom the frames of each host go to
	if l.hub != nil {
		err := l.hub.Do(func() (err error) {
			next, err = l.configureSwitch(devices)
			return err
		})
		if err != nil {
			return fmt.Errorf("configure the switch: %w", err)
		}
	}
	for i, n := range l.hosts {
		var mac net.HardwareAddr // a tun has none
		if l.shaper != ShaperTun {
			mac = next[i].Attrs().HardwareAddr
		}
		err := n.Do(func() error { return l.configureEnd(n, devices[i], mac) })
		if err != nil {
			return fmt.Errorf("configure the %s end: %w", n.name, err)
		}
	}
	// A route is there only once the device is up.
	for i, n := range l.hosts {
		err := n.Do(func() error {
			if err := awaitCarrier(ctx, n.dev); err != nil {
				return err
			}
			return errors.Join(l.setCongestion(devices[i].Attrs().Index, n), l.setInitialWindow(devices[i].Attrs().Index, n))
		})
		if err != nil {
			return fmt.Errorf("configure the %s end: %w", n.name, err)
		}
	}
	if l.hub == nil {
		return nil
	}
	return l.hub.Do(func() error {
		for i := range l.hosts {
			if err := awaitCarrier(ctx, port(i)); err != nil {
				return err
			}
		}
		return nil
	})
}

// port is the name of the switch's device that leads to host i.
func port(i int) string { return fmt.Sprintf("port-%d", i) }

// configureSwitch makes a router of the switch's namespace, in which it runs: each
// host's address leads to its port. Neighbours are known, and the
// queue of a port has room for all that can come, so that it neither asks nor drops.
func (l *Link) configureSwitch(devices []netlink.Link) (ports []netlink.Link, err error) {
	if err := os.WriteFile(sysctlRoot+"ip_forward", []byte("1"), 0); err != nil {
		return nil, fmt.Errorf("set sysctl: %w", err)
	}
	for i, h := range l.hosts {
		dev, err := netlink.LinkByName(port(i))
		if err != nil {
			return nil, fmt.Errorf("find device %s: %w", port(i), err)
		}
		index, host := dev.Attrs().Index, netlink.NewIPNet(h.addr.AsSlice())
		err = errors.Join(noIPv6(port(i)), netlink.LinkSetTxQLen(dev, deviceQueue), netlink.LinkSetUp(dev), setPfifo(index, 1<<16),
			netlink.NeighSet(&netlink.Neigh{LinkIndex: index, State: netlink.NUD_PERMANENT, IP: h.addr.AsSlice(), HardwareAddr: devices[i].Attrs().HardwareAddr}),
			netlink.RouteAdd(&netlink.Route{LinkIndex: index, Dst: host, Scope: netlink.SCOPE_LINK}))
		if err != nil {
			return nil, fmt.Errorf("device %s: %w", port(i), err)
		}
		ports = append(ports, dev)
	}
	return ports, nil
}

// awaitCarrier waits until the kernel's link watch, a work queue of its own, has seen
// the peer come up: before that the device drops what it is given, without a count.
func awaitCarrier(ctx context.Context, device string) error {
	const patience = 5 * time.Second
	for pace := newPacer(); ; {
		dev, err := netlink.LinkByName(device)
		if err != nil {
			return fmt.Errorf("find device %s: %w", device, err)
		}
		state := dev.Attrs().OperState
		waited := time.Since(pace.start)
		switch {
		case state == netlink.OperUp || state == netlink.OperUnknown: // a tun has no state
			return nil
		case waited > patience:
			return fmt.Errorf("device %s is %v %v after it was brought up: %w", device, state, patience, ErrReadBack)
		}
		if err := pace.until(ctx, waited+time.Millisecond); err != nil {
			return err
		}
	}
}

// configureEnd sets host n up; mac is where its frames go, nil on a tun device.
func (l *Link) configureEnd(n *Namespace, dev netlink.Link, mac net.HardwareAddr) error {
	if err := l.setSysctls(n); err != nil {
		return err
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	if err := netlink.LinkSetTxQLen(dev, deviceQueue); err != nil {
		return fmt.Errorf("queue length of %s: %w", n.dev, err)
	}
	prefix := netip.PrefixFrom(n.addr, prefixBits)
	addr, err := netlink.ParseAddr(prefix.String())
	if err != nil {
		return fmt.Errorf("address %s: %w", prefix, err)
	}
	if err := netlink.AddrAdd(dev, addr); err != nil {
		return fmt.Errorf("add address %s to %s: %w", prefix, n.dev, err)
	}
	if err := netlink.LinkSetUp(dev); err != nil {
		return fmt.Errorf("bring %s up: %w", n.dev, err)
	}
	for _, peer := range l.hosts {
		if mac == nil || peer == n {
			continue
		}
		// Known neighbours, so that no ARP adds to a first packet or to a count.
		neigh := &netlink.Neigh{LinkIndex: dev.Attrs().Index, State: netlink.NUD_PERMANENT, IP: peer.addr.AsSlice(), HardwareAddr: mac}
		if err := netlink.NeighSet(neigh); err != nil {
			return fmt.Errorf("neighbour of %s: %w", n.dev, err)
		}
	}
	return nil
}

// shape applies the profile.
func (l *Link) shape() error {
	if l.shaper == ShaperTun {
		return l.startForwarders()
	}
	for i, n := range l.hosts {
		err := n.Do(func() error {
			dev, err := netlink.LinkByName(n.dev)
			if err != nil {
				return fmt.Errorf("find device %s: %w", n.dev, err)
			}
			if l.shaper == ShaperNone {
				return setPfifo(dev.Attrs().Index, 1<<16)
			}
			return l.applyNetem(dev, i, netemSettings(l.profile, l.seed(i)), false)
		})
		if err != nil {
			return fmt.Errorf("shape the %s end: %w", n.name, err)
		}
	}
	return nil
}

// seed is the one for what leaves host i, by netem, after the changes so far.
func (l *Link) seed(i int) uint64 {
	return mix(mix(l.options.Seed) + uint64(len(l.hosts))*l.changes + uint64(i))
}

// applyNetem sets what leaves host i and compares what the kernel then reports.
func (l *Link) applyNetem(dev netlink.Link, i int, s settings, change bool) error {
	// TCP makes large segments even where GSO is off (since Linux 4.17), so it takes a
	// limit of the device; sockets that are connected already keep the one they found.
	if err := netlink.LinkSetGSOMaxSegs(dev, int(s.segments)); err != nil {
		return fmt.Errorf("limit large segments of %s: %w", l.hosts[i].dev, err)
	}
	if err := setNetem(dev.Attrs().Index, s, change); err != nil {
		return err
	}
	q, err := rootQdisc(dev.Attrs().Index)
	if err != nil {
		return err
	}
	return q.check(s)
}

func (l *Link) startForwarders() error {
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("eventfd: %w", err)
	}
	l.stop = stop
	for i, tun := range l.tuns {
		f, err := newForwarder(tun, l.tuns, stop, l.profile, newLine(l.profile, l.options.Seed, uint64(i)))
		if err != nil {
			return err
		}
		l.forwards = append(l.forwards, f)
	}
	for _, f := range l.forwards {
		l.running.Go(func() {
			// A thread of its own that may end: not the first one of the process.
			done := make(chan struct{})
			locked(func() bool { defer close(done); f.run(); return false })
			<-done
		})
	}
	return nil
}

// SetLoss changes the loss of what leaves each host, 0..1, from the next packet on; 1 cuts
// the link. Profile and Evidence keep what Open was asked for. It returns
// ErrInvalid, also on a link that shapes nothing, and ErrClosed.
func (l *Link) SetLoss(loss float64) error {
	p := l.profile
	p.Loss = loss
	if err := p.Validate(); err != nil {
		return fmt.Errorf("set loss: %w", err)
	}
	if l.shaper == ShaperNone {
		return fmt.Errorf("set loss: %w: a link of shaper %s has none", ErrInvalid, l.shaper)
	}
	return l.change(p, false)
}

// change takes over the loss and the queue of p. A roomy link also has room for
// many small packets where the shaper counts packets.
func (l *Link) change(p Profile, roomy bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return fmt.Errorf("change link: %w", ErrClosed)
	}
	l.changes++
	switch l.shaper {
	case ShaperTun:
		for _, f := range l.forwards {
			f.line.set(p)
		}
	case ShaperNetem:
		for i, n := range l.hosts {
			err := n.Do(func() error {
				dev, err := netlink.LinkByName(n.dev)
				if err != nil {
					return fmt.Errorf("find device %s: %w", n.dev, err)
				}
				s := netemSettings(p, l.seed(i))
				if roomy {
					s.limit = max(s.limit, 1<<15)
				}
				return l.applyNetem(dev, i, s, true)
			})
			if err != nil {
				return fmt.Errorf("change the %s end: %w", n.name, err)
			}
		}
	}
	return nil
}

// Source is the namespace of the host that has the data.
func (l *Link) Source() *Namespace { return l.src }

// Destination is the namespace of the host that wants the data; the first of several.
func (l *Link) Destination() *Namespace { return l.dst }

// Hosts are the namespaces of all hosts: the source and the destinations.
func (l *Link) Hosts() []*Namespace { return slices.Clone(l.hosts) }

// Shaper tells what shapes the link.
func (l *Link) Shaper() Shaper { return l.shaper }

// Profile is what was asked for. What the link does is Calibrate's answer.
func (l *Link) Profile() Profile { return l.profile }

// Counters counts what went over the link since Open.
type Counters struct {
	// SourceTx left the source, DestinationTx came to it.
	SourceTx      Traffic `json:"source_tx"`
	DestinationTx Traffic `json:"destination_tx"`
}

// Traffic is one direction: packets and L3 bytes, as segmented to the MTU, that came
// through the shaper. Dropped packets are in Dropped only: lost by the profile, or
// more than the queue held. Packets still under way are in neither.
type Traffic struct {
	Packets int64 `json:"packets"`
	Bytes   int64 `json:"bytes"`
	Dropped int64 `json:"dropped_packets"`
}

// Counters reads the counters of both directions of the source.
func (l *Link) Counters() (c Counters, err error) {
	if c.SourceTx, err = l.Sent(0); err != nil {
		return Counters{}, err
	}
	switch {
	case len(l.hosts) == 2:
		c.DestinationTx, err = l.Sent(1)
	case l.shaper == ShaperTun:
		for _, f := range l.forwards[1:] {
			c.DestinationTx.Packets += f.gave[0].packets.Load()
			c.DestinationTx.Bytes += f.gave[0].bytes.Load()
		}
	default: // what the switch gave the source, as segmented
		err = l.hub.Do(func() (err error) {
			c.DestinationTx, err = qdiscTraffic(port(0))
			return err
		})
	}
	return c, err
}

// Sent counts what has left host i, as Hosts numbers them, since Open.
func (l *Link) Sent(i int) (t Traffic, err error) {
	n := l.hosts[i]
	err = n.Do(func() (err error) {
		if l.shaper != ShaperTun {
			t, err = qdiscTraffic(n.dev)
			return err
		}
		f := l.forwards[i]
		t.Dropped = f.lost.Load() + f.over.Load() + f.wrong.Load()
		for k := range f.gave {
			t.Packets += f.gave[k].packets.Load()
			t.Bytes += f.gave[k].bytes.Load()
		}
		dev, err := netlink.LinkByName(n.dev)
		if err == nil && dev.Attrs().Statistics != nil {
			t.Dropped += int64(dev.Attrs().Statistics.TxDropped) // more than the device's own queue held
		}
		return err
	})
	if err != nil {
		return Traffic{}, fmt.Errorf("read counters of the %s end: %w", n.name, err)
	}
	return t, nil
}

// qdiscTraffic is what the root qdisc of a device in this thread's namespace has let through.
func qdiscTraffic(device string) (Traffic, error) {
	dev, err := netlink.LinkByName(device)
	if err != nil {
		return Traffic{}, err
	}
	q, err := rootQdisc(dev.Attrs().Index)
	return Traffic{q.packets, q.bytes - l2Header*q.packets, q.drops}, err
}

// CPU is the CPU time that this process has spent on forwarding since Open; 0 where
// the kernel does it (every shaper but tun).
func (l *Link) CPU() time.Duration {
	var sum time.Duration
	for _, f := range l.forwards {
		if f != nil {
			sum += f.cputime()
		}
	}
	return sum
}

// Close ends the link: its threads, devices and namespaces. It waits for our threads,
// not for the kernel, which removes the namespaces soon after (or when the last
// process and socket inside ends). Connections over the link stop carrying data
// without being closed. Close may be called more than once and concurrently.
func (l *Link) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	var errs []error
	if l.stop >= 0 {
		one := [8]byte{1, 1, 1, 1, 1, 1, 1, 1} // any number but 0 wakes
		if _, err := unix.Write(l.stop, one[:]); err != nil {
			errs = append(errs, fmt.Errorf("stop forwarding: %w", err))
		}
		l.running.Wait()
		errs = append(errs, os.NewSyscallError("close", unix.Close(l.stop)))
	}
	for _, fd := range l.tuns {
		errs = append(errs, os.NewSyscallError("close", unix.Close(fd)))
	}
	for _, n := range l.hosts {
		errs = append(errs, n.close())
	}
	if l.hub != nil {
		errs = append(errs, l.hub.close())
	}
	return errors.Join(errs...)
}
