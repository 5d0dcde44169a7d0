package netem

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Evidence is what was read back from the kernel after everything was set, for the
// manifest of a sweep.
type Evidence struct {
	Shaper     Shaper  `json:"shaper"`
	Profile    Profile `json:"profile"`
	Options    Options `json:"options"`
	Kernel     string  `json:"kernel"`
	BDP        int64   `json:"bdp_bytes"`
	QueueBytes int64   `json:"queue_bytes"`
	// Segments is how many packets a large segment may stand for on its way through
	// the shaper, so that it takes no longer than 0.1 ms at the link's rate.
	Segments    int         `json:"large_segment_packets"`
	Source      EndEvidence `json:"source"`
	Destination EndEvidence `json:"destination"`
	// More are the further destinations of a link of more than two hosts.
	More []EndEvidence `json:"more_destinations,omitempty"`
}

// EndEvidence is one end of a link as the kernel reports it.
type EndEvidence struct {
	Device     string `json:"device"`
	Kind       string `json:"kind"`
	Address    string `json:"address"`
	MTU        int    `json:"mtu_bytes"`
	TxQueue    int    `json:"tx_queue_packets"`
	GSOMaxSegs uint32 `json:"gso_max_segments"`
	Qdisc      Qdisc  `json:"qdisc"`
	// Offloads by ethtool's names: tx-checksum, scatter-gather, tso, gso, gro.
	Offloads map[string]bool `json:"offloads"`
	// Sysctls of the namespace, by their path below net/ipv4.
	Sysctls map[string]string `json:"sysctls"`
	// Congestion is the control that connections over the link use, and CongestionBy
	// what makes them: "sysctl" or, where the kernel refuses that, "route".
	Congestion   string `json:"congestion"`
	CongestionBy string `json:"congestion_by"`
	// InitialWindow is the route's initcwnd in segments; 0 is the kernel's own.
	InitialWindow int `json:"initial_window_segments"`
}

// Evidence returns what Open read back.
func (l *Link) Evidence() Evidence { return l.evidence }

const (
	sysctlRoot     = "/proc/sys/net/ipv4/"
	congestionName = "tcp_congestion_control"
	maxWindow      = 1 << 30

	maxInitialWindow = 1000 // segments
)

func recordedSysctls() []string {
	return []string{"tcp_rmem", "tcp_wmem", congestionName, "tcp_slow_start_after_idle", "tcp_no_metrics_save",
		"tcp_window_scaling", "tcp_sack", "tcp_timestamps", "tcp_moderate_rcvbuf"}
}

// window is the maximum of the TCP buffers.
func (l *Link) window() int64 {
	floor := int64(16 << 20)
	if l.profile.Rate == 0 {
		floor = 64 << 20
	}
	// Linux keeps half of a receive buffer, or less, for payload: 4 BDP offer a window of 2.
	return min(max(floor, 4*l.profile.BDP(), l.options.Window), maxWindow)
}

// setSysctls runs inside the namespace: /proc/sys/net shows the caller's own.
func (l *Link) setSysctls(n *Namespace) error {
	w := l.window()
	// A connection offers half of its first buffer: enough for all of the first window.
	first := min(max(131072, 4*1448*int64(l.options.InitialWindow)), w)
	for _, s := range []struct{ name, value string }{
		{"tcp_rmem", fmt.Sprintf("4096 %d %d", first, w)},
		{"tcp_wmem", fmt.Sprintf("4096 65536 %d", w)},
		{"tcp_slow_start_after_idle", "0"}, // a pause between runs must not change the next
		{"tcp_no_metrics_save", "1"},       // nor what an earlier connection learnt
	} {
		if err := os.WriteFile(sysctlRoot+s.name, []byte(s.value), 0); err != nil {
			return fmt.Errorf("set sysctl: %w", err)
		}
		got, err := sysctl(s.name)
		if err != nil {
			return err
		}
		if got != s.value {
			return fmt.Errorf("sysctl %s: %w: is %q, asked for %q", s.name, ErrReadBack, got, s.value)
		}
	}
	return noIPv6(n.dev)
}

// noIPv6 keeps IPv6 off a device: its neighbour discovery would add packets nobody asked for.
func noIPv6(device string) error {
	err := os.WriteFile(filepath.Join("/proc/sys/net/ipv6/conf", device, "disable_ipv6"), []byte("1"), 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("set sysctl: %w", err)
	}
	return nil
}

// sysctl reads net.ipv4.name with single blanks between its fields.
func sysctl(name string) (string, error) {
	b, err := os.ReadFile(sysctlRoot + name)
	if err != nil {
		return "", fmt.Errorf("read sysctl: %w", err)
	}
	return strings.Join(strings.Fields(string(b)), " "), nil
}

// setCongestion makes Options.Congestion the control of the link. A namespace other
// than the first may take only what the host allows everyone as its default (Linux
// 5.15); a route may name any, and both ends of a connection follow it.
func (l *Link) setCongestion(index int, n *Namespace) error {
	want := l.options.Congestion
	if want == "" {
		return nil
	}
	sysctlErr := os.WriteFile(sysctlRoot+congestionName, []byte(want), 0)
	if sysctlErr == nil {
		return nil
	}
	if err := l.setRoute(index, n, func(r *netlink.Route) { r.Congctl = want }); err != nil {
		available, _ := sysctl("tcp_available_congestion_control")
		return fmt.Errorf("congestion control %q: %w; as a sysctl: %w; available: %s", want, err, sysctlErr, available)
	}
	return nil
}

// setInitialWindow makes Options.InitialWindow that of the link: a route has it
// (ip route change ... initcwnd N).
func (l *Link) setInitialWindow(index int, n *Namespace) error {
	want := l.options.InitialWindow
	if want == 0 {
		return nil
	}
	if err := l.setRoute(index, n, func(r *netlink.Route) { r.InitCwnd = want }); err != nil {
		return fmt.Errorf("initial window of %d segments: %w", want, err)
	}
	return nil
}

// setRoute changes the route to the link's other hosts.
func (l *Link) setRoute(index int, n *Namespace, change func(*netlink.Route)) error {
	routes, err := linkRoutes(index)
	if err != nil {
		return fmt.Errorf("list routes of %s: %w", n.dev, err)
	}
	for _, r := range routes {
		if r.Dst == nil || !r.Dst.Contains(l.dst.addr.AsSlice()) {
			continue
		}
		change(&r)
		r.Flags = 0 // such as linkdown, which the kernel reports and refuses
		if err := netlink.RouteReplace(&r); err != nil {
			return fmt.Errorf("change the route over %s: %w: %w", n.dev, ErrNotSupported, err)
		}
		return nil
	}
	return fmt.Errorf("%w: no route over %s", ErrReadBack, n.dev)
}

func linkRoutes(index int) ([]netlink.Route, error) {
	return netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{LinkIndex: index}, netlink.RT_FILTER_OIF)
}

func (l *Link) readEvidence() error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("uname: %w", err)
	}
	l.evidence = Evidence{Shaper: l.shaper, Profile: l.profile, Options: l.options, Kernel: unix.ByteSliceToString(u.Release[:]),
		BDP: l.profile.BDP(), QueueBytes: l.profile.Queue(), Segments: l.profile.segments()}
	if l.shaper == ShaperNetem {
		l.evidence.Segments = int(netemSettings(l.profile, 0).segments)
	}
	ends := make([]EndEvidence, len(l.hosts))
	for i, n := range l.hosts {
		if err := n.Do(func() error { return l.readEnd(n, &ends[i]) }); err != nil {
			return fmt.Errorf("read back the %s end: %w", n.name, err)
		}
	}
	l.evidence.Source, l.evidence.Destination, l.evidence.More = ends[0], ends[1], ends[2:]
	return nil
}

func (l *Link) readEnd(n *Namespace, e *EndEvidence) error {
	dev, err := netlink.LinkByName(n.dev)
	if err != nil {
		return fmt.Errorf("find device %s: %w", n.dev, err)
	}
	a := dev.Attrs()
	*e = EndEvidence{Device: n.dev, Kind: dev.Type(), MTU: a.MTU, TxQueue: a.TxQLen, GSOMaxSegs: a.GSOMaxSegs, Sysctls: make(map[string]string)}
	addrs, err := netlink.AddrList(dev, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("addresses of %s: %w", n.dev, err)
	}
	if len(addrs) != 1 {
		return fmt.Errorf("%s: %w: %d IPv4 addresses, set 1", n.dev, ErrReadBack, len(addrs))
	}
	e.Address = addrs[0].IPNet.String()
	if e.MTU != mtu || e.TxQueue != deviceQueue {
		return fmt.Errorf("%s: %w: MTU %d and queue %d, asked for %d and %d", n.dev, ErrReadBack, e.MTU, e.TxQueue, mtu, deviceQueue)
	}
	if e.Qdisc, err = rootQdisc(a.Index); err != nil {
		return err
	}
	if e.Offloads, err = readOffloads(n.dev); err != nil {
		return err
	}
	if want := netemSettings(l.profile, 0).segments; l.shaper == ShaperNetem && e.GSOMaxSegs != want {
		return fmt.Errorf("%s: %w: large segments of %d packets, asked for %d", n.dev, ErrReadBack, e.GSOMaxSegs, want)
	}
	for _, name := range recordedSysctls() {
		v, err := sysctl(name)
		if err != nil {
			return err
		}
		e.Sysctls[name] = v
	}
	e.Congestion, e.CongestionBy = e.Sysctls[congestionName], "sysctl"
	routes, err := linkRoutes(a.Index)
	if err != nil {
		return fmt.Errorf("list routes of %s: %w", n.dev, err)
	}
	for _, r := range routes {
		if r.Congctl != "" {
			e.Congestion, e.CongestionBy = r.Congctl, "route"
		}
		e.InitialWindow = max(e.InitialWindow, r.InitCwnd)
	}
	if want := l.options.Congestion; want != "" && e.Congestion != want {
		return fmt.Errorf("%w: congestion control is %q, asked for %q", ErrReadBack, e.Congestion, want)
	}
	if want := l.options.InitialWindow; e.InitialWindow != want {
		return fmt.Errorf("%w: initial window of %d segments, asked for %d", ErrReadBack, e.InitialWindow, want)
	}
	return nil
}
