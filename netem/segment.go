package netem

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// The header that Linux puts before each packet of a TUN device opened with
// IFF_VNET_HDR: struct virtio_net_hdr, in the machine's byte order.
const (
	vnetLen       = 10
	vnetNeedsCsum = 1    // VIRTIO_NET_HDR_F_NEEDS_CSUM
	gsoNone       = 0    // VIRTIO_NET_HDR_GSO_NONE
	gsoTCPv4      = 1    // VIRTIO_NET_HDR_GSO_TCPV4
	gsoUDPL4      = 5    // VIRTIO_NET_HDR_GSO_UDP_L4
	gsoECN        = 0x80 // VIRTIO_NET_HDR_GSO_ECN, a flag beside the type
)

// TCP flags that belong to one end of a large segment only.
const (
	tcpFin = 0x01
	tcpPsh = 0x08
	tcpCwr = 0x80
)

// maxHeaders is the longest virtio, IPv4 and TCP header together.
const maxHeaders = vnetLen + 60 + 60

// packet describes one read from a TUN device: a packet, or a large TCP or UDP
// segment that stands for segs packets.
type packet struct {
	headers int // length of the IP and TCP or UDP headers, repeated in each packet; 0 where segs is 1
	mss     int // payload bytes of every packet but the last
	segs    int
	l3      int // bytes of the read after the virtio header
}

// parse reads the virtio header of b and, of a large segment, the lengths that
// follow. It trusts no length: what does not add up is an error, never a panic.
func parse(b []byte) (packet, error) {
	if len(b) < vnetLen {
		return packet{}, fmt.Errorf("read of %d bytes: shorter than its virtio header", len(b))
	}
	ip := b[vnetLen:]
	p := packet{segs: 1, l3: len(ip)}
	var proto byte
	switch b[1] &^ gsoECN {
	case gsoNone:
		return p, nil
	case gsoTCPv4:
		proto = unix.IPPROTO_TCP
	case gsoUDPL4:
		proto = unix.IPPROTO_UDP
	default:
		return packet{}, fmt.Errorf("large segment of type %d that nobody offered to take", b[1])
	}
	if len(ip) < 20 || ip[0]>>4 != 4 || ip[9] != proto {
		return packet{}, fmt.Errorf("large segment of %d bytes is no protocol %d over IPv4", len(ip), proto)
	}
	ihl := int(ip[0]&15) * 4
	l4, least := 8, 8
	if proto == unix.IPPROTO_TCP {
		least = 20
	}
	if ihl < 20 || len(ip) < ihl+least {
		return packet{}, fmt.Errorf("large segment of %d bytes with an IP header of %d", len(ip), ihl)
	}
	if proto == unix.IPPROTO_TCP {
		l4 = int(ip[ihl+12]>>4) * 4
	}
	p.mss = int(binary.NativeEndian.Uint16(b[4:]))
	p.headers = ihl + l4
	if l4 < least || len(ip) <= p.headers || p.mss == 0 {
		return packet{}, fmt.Errorf("large segment of %d bytes with headers of %d and packets of %d", len(ip), p.headers, p.mss)
	}
	p.segs = (len(ip) - p.headers + p.mss - 1) / p.mss
	return p, nil
}

// payload is the range of packet number from to before to within the read.
func (p packet) payload(from, to int) (lo, hi int) {
	base := vnetLen + p.headers
	return base + from*p.mss, min(base+to*p.mss, vnetLen+p.l3)
}

// size is the L3 length of packet number i.
func (p packet) size(i int) int {
	if p.segs == 1 {
		return p.l3
	}
	lo, hi := p.payload(i, i+1)
	return p.headers + hi - lo
}

// cut writes into dst, at least maxHeaders long, the headers of a segment that
// carries the packets [from, to) of the large segment b, and returns their length.
// The checksum stays partial (the sum of the pseudo header), as the kernel left it.
func (p packet) cut(dst, b []byte, from, to int) int {
	n := vnetLen + p.headers
	copy(dst[:n], b[:n])
	lo, hi := p.payload(from, to)
	if hi-lo <= p.mss {
		dst[1] = gsoNone
		binary.NativeEndian.PutUint16(dst[4:], 0)
	}
	ip := dst[vnetLen:n]
	ihl := int(ip[0]&15) * 4
	l4 := ip[ihl:]
	binary.BigEndian.PutUint16(ip[2:], uint16(p.headers+hi-lo))
	binary.BigEndian.PutUint16(ip[4:], binary.BigEndian.Uint16(ip[4:])+uint16(from))
	ip[10], ip[11] = 0, 0
	binary.BigEndian.PutUint16(ip[10:], ^fold(sum(ip[:ihl])))
	length := len(l4) + hi - lo
	at := 16 // of the checksum in the header
	if ip[9] == unix.IPPROTO_UDP {
		at = 6
		binary.BigEndian.PutUint16(l4[4:], uint16(length))
	} else {
		binary.BigEndian.PutUint32(l4[4:], binary.BigEndian.Uint32(l4[4:])+uint32(from*p.mss))
		if from > 0 {
			l4[13] &^= tcpCwr
		}
		if to < p.segs {
			l4[13] &^= tcpFin | tcpPsh
		}
	}
	binary.BigEndian.PutUint16(l4[at:], fold(sum(ip[12:20])+uint32(ip[9])+uint32(length)))
	return n
}

// sum and fold are the Internet checksum of RFC 1071 without its last complement;
// len(b) is even.
func sum(b []byte) (s uint32) {
	for ; len(b) >= 2; b = b[2:] {
		s += uint32(binary.BigEndian.Uint16(b))
	}
	return s
}

func fold(s uint32) uint16 {
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}
