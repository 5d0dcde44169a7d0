// Package netem makes one point-to-point network link between two fresh network
// namespaces, shapes it, reads back what the kernel applied, and measures the result.
//
// Words: the source end and the destination end are namespaces joined by one link.
// RTT counts both ways, delay one way. Rates are bit/s of L2 frames: what a frame
// occupies is its L3 length plus the 14 bytes of an Ethernet header, on every
// shaper, also on the tun one whose devices carry no such header. A wire byte in
// Counters is an L3 byte, as segmented.
//
// # Nothing stays behind
//
// The namespaces are anonymous: unshare(CLONE_NEWNET) on a thread, kept by a file
// descriptor and never bound below /run/netns. When the last descriptor, process
// and socket of a namespace is gone, the kernel removes the namespace with its
// veth, tun and qdiscs. That holds after Close as after SIGKILL, so no clean-up
// command has to know about links. TUN devices are not persistent and end with
// their descriptor. A child that still runs inside a namespace keeps that
// namespace (but not the tun device) until it ends.
//
// # Shapers
//
//   - netem: a veth pair with sch_netem on both ends. Needs the module.
//   - tun: a TUN device in each namespace, joined in this process by one thread per
//     direction that delays, paces, queues and drops. Needs /dev/net/tun only.
//   - none: the veth pair alone.
//   - sleep: no link at all; Open refuses it. The pause belongs to the backend.
//
// A link needs CAP_SYS_ADMIN and CAP_NET_ADMIN in the current user namespace, so
// root inside a user namespace is enough where the kernel allows those.
//
// # Large segments
//
// A TCP stack hands over up to 64 KiB as one large segment (GSO). Where the rate is limited a large segment is kept short, so that it
// takes no longer than 0.1 ms on the link. The tun shaper accounts for every packet
// in it: each is lost, queued or passed by itself. sch_netem counts one large segment
// as one packet, so there the limit is in such segments, and with loss TCP is held to
// single packets. What this does not reach is UDP_SEGMENT (QUIC) over netem: it is
// lost, and counted against the limit, by the batch.
//
// # What the shapers have in common
//
// Loss, drawn for each MTU packet, comes before the queue; the queue is bounded in
// bytes and drops its tail; then come the bottleneck's rate and the delay. Jitter
// is normal, cut at zero delay, and never reorders: a packet that would overtake
// leaves together with the one before it (sch_netem does the same when it has a
// rate, so a link with jitter always gives it one). Under dense traffic this makes
// the effective delay tend to the upper end of the jitter, in both shapers.
//
// Sources: tc-netem(8); linux Documentation/networking/tuntap.rst;
// include/uapi/linux/virtio_net.h; net/sched/sch_netem.c; namespaces(7), network_namespaces(7). Linux 4.15
// or later (64-bit netem times).
package netem

import "errors"

// Sentinels of this package, matched with errors.Is.
var (
	// ErrNotSupported: this kernel lacks what the shaper needs, for certain.
	ErrNotSupported = errors.New("not supported here")
	// ErrNotPermitted: the kernel might be able to, this user may not.
	ErrNotPermitted = errors.New("not permitted")
	// ErrClosed: the link was closed.
	ErrClosed = errors.New("link is closed")
	// ErrReadBack: the kernel holds other settings than the ones asked for.
	ErrReadBack = errors.New("read back differs")
	// ErrInvalid: a profile or an option is out of its range.
	ErrInvalid = errors.New("invalid")
)
