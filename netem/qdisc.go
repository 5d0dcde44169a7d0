package netem

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Attributes of sch_netem that package nl lacks (include/uapi/linux/pkt_sched.h).
const (
	netemDelayDist = 2
	netemRate      = 6
	netemRate64    = 8
	netemLatency64 = 10 // Linux 4.15
	netemJitter64  = 11 // Linux 4.15
	netemPRNGSeed  = 14 // Linux 6.6; older kernels ignore it
	netemQoptLen   = 24
	netemDistScale = 8192
)

// Qdisc is a root queueing discipline as the kernel reports it.
type Qdisc struct {
	Kind    string `json:"kind"`
	Handle  uint32 `json:"handle"`
	Limit   uint32 `json:"limit_packets,omitempty"`
	DelayNs int64  `json:"delay_ns,omitempty"`
	// JitterNs is the standard deviation, of a normal distribution.
	JitterNs int64   `json:"jitter_ns,omitempty"`
	Loss     float64 `json:"loss,omitempty"`
	Rate     int64   `json:"rate_bits_per_second,omitempty"`

	packets, bytes, drops int64
}

// settings is what sch_netem is asked for, in its own units.
type settings struct {
	delay, jitter int64 // ns, one way
	loss          uint32
	rate          int64 // bytes/s
	limit         uint32
	segments      uint32 // the device's limit of packets in a large segment
	seed          uint64
}

// mix spreads a seed over 64 bits (the finaliser of splitmix64): netem's generator
// gives small numbers, which are losses, right after a small seed.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// netemSettings translates one direction of p.
func netemSettings(p Profile, seed uint64) settings {
	s := settings{
		delay:    int64(p.RTT / 2),
		jitter:   int64(p.Jitter),
		loss:     uint32(math.Round(p.Loss * math.MaxUint32)),
		rate:     p.Rate / 8,
		limit:    1 << 20, // unlimited rate: as many as an unshaped path may hold
		segments: uint32(p.segments()),
		seed:     seed,
	}
	if p.Loss > 0 {
		s.segments = 1 // netem would lose a large segment whole
	}
	if p.Rate != 0 {
		// netem has one limit, in packets, for what waits and what is under way, and
		// counts a large segment as one: bulk data comes in those, so they are the unit.
		reach := p.RTT/2 + 3*p.Jitter
		under := float64(p.Rate) / 8 * reach.Seconds()
		s.limit = uint32(math.Ceil((under + float64(p.Queue())) / linkFrame / float64(s.segments)))
	}
	if s.jitter > 0 && s.rate == 0 {
		s.rate = MaxRate / 8 // with a rate, netem keeps the order
	}
	return s
}

// psched reads how many nanoseconds a tick of the kernel's packet scheduler has.
// Without it a delay in ticks would be wrong, and nobody would be told.
func psched() (nsPerTick float64, err error) {
	const path = "/proc/net/psched"
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, fmt.Errorf("read the scheduler's clock: %w (mount /proc)", err)
	}
	return parsePsched(string(b))
}

// parsePsched parses the first two of the four hexadecimal numbers of
// /proc/net/psched: the same time in nanoseconds and in ticks, times 1000.
func parsePsched(s string) (nsPerTick float64, err error) {
	var us, ticks uint32
	if _, err := fmt.Sscanf(s, "%08x %08x", &us, &ticks); err != nil {
		return 0, fmt.Errorf("scheduler's clock %q: %w", strings.TrimSpace(s), err)
	}
	if us == 0 || ticks == 0 {
		return 0, fmt.Errorf("scheduler's clock %q: %w: a zero", strings.TrimSpace(s), ErrInvalid)
	}
	return 1000 * float64(ticks) / float64(us), nil
}

// setNetem adds the root qdisc of device index, or changes the one there. It runs in
// the calling thread's network namespace. Equal to: tc qdisc add dev D root handle 1:
// netem delay D J distribution normal loss random L rate R limit N seed S.
func setNetem(index int, s settings, change bool) error {
	tick, err := psched()
	if err != nil {
		return err
	}
	qopt := make([]byte, netemQoptLen) // latency, limit, loss, gap, duplicate, jitter
	put := func(off int, v uint32) { binary.NativeEndian.PutUint32(qopt[off:], v) }
	put(0, uint32(min(float64(s.delay)/tick, math.MaxUint32)))
	put(4, s.limit)
	put(8, s.loss)
	put(20, uint32(min(float64(s.jitter)/tick, math.MaxUint32)))
	options := nl.NewRtAttr(nl.TCA_OPTIONS, qopt)
	options.AddRtAttr(netemLatency64, nl.Uint64Attr(uint64(s.delay)))
	options.AddRtAttr(netemJitter64, nl.Uint64Attr(uint64(s.jitter)))
	options.AddRtAttr(netemPRNGSeed, nl.Uint64Attr(s.seed))
	rate := make([]byte, 16) // bytes/s, packet overhead, cell size, cell overhead
	binary.NativeEndian.PutUint32(rate, uint32(min(s.rate, math.MaxUint32)))
	if s.rate >= math.MaxUint32 {
		options.AddRtAttr(netemRate64, nl.Uint64Attr(uint64(s.rate)))
	}
	options.AddRtAttr(netemRate, rate)
	if s.jitter > 0 && !change {
		options.AddRtAttr(netemDelayDist, normalTable())
	}
	flags := unix.NLM_F_ACK
	if !change {
		flags |= unix.NLM_F_CREATE | unix.NLM_F_EXCL
	}
	return modifyQdisc(index, "netem", flags, options)
}

// setPfifo adds a plain FIFO of limit packets as root qdisc: a veth has none of its
// own, and a qdisc is what counts packets and bytes as segmented.
func setPfifo(index int, limit uint32) error {
	return modifyQdisc(index, "pfifo", unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_EXCL, nl.NewRtAttr(nl.TCA_OPTIONS, nl.Uint32Attr(limit)))
}

func modifyQdisc(index int, kind string, flags int, options *nl.RtAttr) error {
	req := nl.NewNetlinkRequest(unix.RTM_NEWQDISC, flags)
	req.AddData(&nl.TcMsg{Family: nl.FAMILY_ALL, Ifindex: int32(index), Handle: 0x10000, Parent: netlink.HANDLE_ROOT})
	req.AddData(nl.NewRtAttr(nl.TCA_KIND, nl.ZeroTerminated(kind)))
	req.AddData(options)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	switch {
	case errors.Is(err, unix.ENOENT) && kind == "netem":
		return fmt.Errorf("set qdisc netem: %w: %w (modprobe sch_netem; or take the tun shaper, or the lab kernel)", ErrNotSupported, err)
	case err != nil:
		return fmt.Errorf("set qdisc %s: %w", kind, permission(err, "needs CAP_NET_ADMIN in the namespace's user namespace"))
	}
	return nil
}

// normalTable is the inverse of the normal distribution in netem's form: equally
// likely values in units of 1/8192 of the standard deviation.
func normalTable() []byte {
	const n = 4096
	b := make([]byte, 0, 2*n)
	for i := range n {
		z := math.Sqrt2 * math.Erfinv(2*(float64(i)+0.5)/n-1)
		b = binary.NativeEndian.AppendUint16(b, uint16(int16(math.Round(z*netemDistScale))))
	}
	return b
}

// rootQdisc reads the root qdisc of device index in the calling thread's namespace.
func rootQdisc(index int) (Qdisc, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETQDISC, unix.NLM_F_DUMP)
	req.AddData(&nl.TcMsg{Family: nl.FAMILY_ALL, Ifindex: int32(index)})
	msgs, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWQDISC)
	if err != nil {
		return Qdisc{}, fmt.Errorf("list qdiscs: %w", err)
	}
	for _, m := range msgs {
		if len(m) < nl.SizeofTcMsg {
			continue
		}
		tc := nl.DeserializeTcMsg(m)
		if tc.Ifindex != int32(index) || tc.Parent != netlink.HANDLE_ROOT {
			continue
		}
		return parseQdisc(tc.Handle, m[nl.SizeofTcMsg:])
	}
	return Qdisc{Kind: "none"}, nil
}

// parseQdisc reads the attributes of one qdisc message.
func parseQdisc(handle uint32, b []byte) (Qdisc, error) {
	q := Qdisc{Handle: handle}
	var options []byte
	err := eachAttr(b, func(kind uint16, v []byte) {
		switch kind {
		case nl.TCA_KIND:
			q.Kind = strings.TrimRight(string(v), "\x00")
		case nl.TCA_OPTIONS:
			options = v
		case nl.TCA_STATS2:
			_ = eachAttr(v, func(kind uint16, v []byte) { // tested below by what it must hold
				switch {
				case kind == nl.TCA_STATS_BASIC && len(v) >= 12: // bytes u64, packets u32
					q.bytes, q.packets = int64(binary.NativeEndian.Uint64(v)), int64(binary.NativeEndian.Uint32(v[8:]))
				case kind == nl.TCA_STATS_QUEUE && len(v) >= 12: // qlen, backlog, drops
					q.drops = int64(binary.NativeEndian.Uint32(v[8:]))
				}
			})
		}
	})
	if err != nil {
		return Qdisc{}, fmt.Errorf("parse qdisc %q: %w", q.Kind, err)
	}
	switch {
	case q.Kind == "pfifo" && len(options) >= 4:
		q.Limit = binary.NativeEndian.Uint32(options)
	case q.Kind == "netem" && len(options) >= netemQoptLen:
		q.Limit = binary.NativeEndian.Uint32(options[4:])
		q.Loss = float64(binary.NativeEndian.Uint32(options[8:])) / math.MaxUint32
		err = eachAttr(options[netemQoptLen:], func(kind uint16, v []byte) {
			switch {
			case kind == netemLatency64 && len(v) >= 8:
				q.DelayNs = int64(binary.NativeEndian.Uint64(v))
			case kind == netemJitter64 && len(v) >= 8:
				q.JitterNs = int64(binary.NativeEndian.Uint64(v))
			case kind == netemRate && len(v) >= 4 && q.Rate == 0:
				q.Rate = 8 * int64(binary.NativeEndian.Uint32(v))
			case kind == netemRate64 && len(v) >= 8:
				q.Rate = 8 * int64(binary.NativeEndian.Uint64(v))
			}
		})
		if err != nil {
			return Qdisc{}, fmt.Errorf("parse qdisc netem: %w", err)
		}
	}
	return q, nil
}

// eachAttr walks netlink attributes: length u16, type u16, value, padding to 4 bytes.
func eachAttr(b []byte, f func(kind uint16, value []byte)) error {
	for len(b) >= 4 {
		n := int(binary.NativeEndian.Uint16(b))
		if n < 4 || n > len(b) {
			return fmt.Errorf("netlink attribute of %d bytes in %d: %w", n, len(b), ErrInvalid)
		}
		f(binary.NativeEndian.Uint16(b[2:])&nl.NLA_TYPE_MASK, b[4:n])
		b = b[min((n+3)&^3, len(b)):]
	}
	return nil
}

// check compares what the kernel holds with what was asked for.
func (q Qdisc) check(s settings) error {
	type pair struct {
		name      string
		got, want int64
	}
	for _, p := range []pair{
		{"delay in ns", q.DelayNs, s.delay},
		{"jitter in ns", q.JitterNs, s.jitter},
		{"loss in 2^-32", int64(math.Round(q.Loss * math.MaxUint32)), int64(s.loss)},
		{"rate in bytes/s", q.Rate / 8, s.rate},
		{"limit in packets", int64(q.Limit), int64(s.limit)},
	} {
		if p.got != p.want {
			return fmt.Errorf("qdisc %s: %w: %s is %d, asked for %d", q.Kind, ErrReadBack, p.name, p.got, p.want)
		}
	}
	if q.Kind != "netem" {
		return fmt.Errorf("%w: root qdisc is %s, not netem", ErrReadBack, q.Kind)
	}
	return nil
}
