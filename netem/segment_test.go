package netem

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// largeSegment makes what a TUN device hands over: headers and n bytes of payload.
func largeSegment(kind byte, n, mss int) []byte {
	l4 := 32 // TCP with timestamps
	proto := byte(unix.IPPROTO_TCP)
	if kind == gsoUDPL4 {
		l4, proto = 8, unix.IPPROTO_UDP
	}
	b := make([]byte, vnetLen+20+l4+n)
	b[0], b[1] = vnetNeedsCsum, kind
	binary.NativeEndian.PutUint16(b[4:], uint16(mss))
	ip := b[vnetLen:]
	ip[0], ip[8], ip[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	binary.BigEndian.PutUint16(ip[4:], 0xfffe) // the identification wraps
	src, dst := hostAddr(0).As4(), hostAddr(1).As4()
	copy(ip[12:], src[:])
	copy(ip[16:], dst[:])
	if proto == unix.IPPROTO_TCP {
		binary.BigEndian.PutUint32(ip[24:], 0xffffff00) // so does the sequence
		ip[32], ip[33] = 8<<4, tcpFin|tcpPsh|tcpCwr|0x10
	} else {
		binary.BigEndian.PutUint16(ip[24:], uint16(8+n))
	}
	for i := range n {
		ip[20+l4+i] = byte(i * 7)
	}
	return b
}

// checkPieces cuts b at random and checks every header and that no byte is missing.
func checkPieces(t *testing.T, b []byte, p packet, cut func(from int) int) {
	t.Helper()
	payload := b[vnetLen+p.headers:]
	var got []byte
	total := 0
	for i := range p.segs {
		total += p.size(i)
	}
	if want := p.l3 + (p.segs-1)*p.headers; total != want {
		t.Fatalf("%+v: packets have %d bytes, want %d", p, total, want)
	}
	ihl := int(b[vnetLen]&15) * 4
	for from := 0; from < p.segs; {
		to := min(p.segs, from+max(1, cut(from)))
		var dst [maxHeaders]byte
		n := p.cut(dst[:], b, from, to)
		lo, hi := p.payload(from, to)
		ip, l4 := dst[vnetLen:n], dst[vnetLen+ihl:n]
		if fold(sum(ip[:ihl])) != 0xffff {
			t.Fatalf("%+v [%d, %d): wrong IP checksum", p, from, to)
		}
		if int(binary.BigEndian.Uint16(ip[2:])) != len(ip)+hi-lo {
			t.Fatalf("%+v [%d, %d): IP length %d", p, from, to, binary.BigEndian.Uint16(ip[2:]))
		}
		if (dst[1] == gsoNone) != (to-from == 1) {
			t.Fatalf("%+v [%d, %d): type %d", p, from, to, dst[1])
		}
		if ip[9] == unix.IPPROTO_TCP {
			if seq := binary.BigEndian.Uint32(l4[4:]) - binary.BigEndian.Uint32(b[vnetLen+ihl+4:]); int(seq) != from*p.mss {
				t.Fatalf("%+v [%d, %d): sequence +%d", p, from, to, seq)
			}
			was := b[vnetLen+ihl+13]
			want := was
			if from > 0 {
				want &^= tcpCwr
			}
			if to < p.segs {
				want &^= tcpFin | tcpPsh
			}
			if l4[13] != want {
				t.Fatalf("%+v [%d, %d): flags %#x of %#x", p, from, to, l4[13], was)
			}
		} else if int(binary.BigEndian.Uint16(l4[4:])) != 8+hi-lo {
			t.Fatalf("%+v [%d, %d): UDP length %d", p, from, to, binary.BigEndian.Uint16(l4[4:]))
		}
		got = append(got, b[lo:hi]...)
		from = to
	}
	if !bytes.Equal(got, payload) {
		t.Fatalf("%+v: pieces hold %d bytes, not the %d of the segment", p, len(got), len(payload))
	}
}

func TestCut(t *testing.T) {
	rng := rand.New(rand.NewPCG(seed(t), 0))
	for range 500 {
		kind := []byte{gsoTCPv4, gsoTCPv4 | gsoECN, gsoUDPL4}[rng.IntN(3)]
		mss := 1 + rng.IntN(1448)
		b := largeSegment(kind, 1+rng.IntN(60_000), mss)
		p, err := parse(b)
		if err != nil {
			t.Fatal(err)
		}
		if want := (len(b) - vnetLen - p.headers + mss - 1) / mss; p.segs != want {
			t.Fatalf("%+v: want %d packets", p, want)
		}
		checkPieces(t, b, p, func(int) int { return 1 + rng.IntN(p.segs) })
	}
}

// The sum that a cut leaves is the one the kernel wants: of the pseudo header.
func TestCutChecksum(t *testing.T) {
	b := largeSegment(gsoTCPv4, 3000, 1448)
	p, err := parse(b)
	if err != nil {
		t.Fatal(err)
	}
	var dst [maxHeaders]byte
	n := p.cut(dst[:], b, 1, 2)
	// By hand: addresses 198.18.0.1 and .2, protocol 6, 32 + 1448 bytes.
	want := uint32(0xc612+0x0001+0xc612+0x0002+6) + 32 + 1448
	if got := binary.BigEndian.Uint16(dst[vnetLen+20+16 : n]); got != uint16(want>>16+want&0xffff) {
		t.Errorf("checksum field %#x, want %#x", got, want)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(largeSegment(gsoTCPv4, 4000, 1448), byte(3))
	f.Add(largeSegment(gsoUDPL4, 100, 99), byte(1))
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, byte(0))
	f.Fuzz(func(t *testing.T, b []byte, step byte) {
		b = b[:min(len(b), maxRead)]
		p, err := parse(b)
		if err != nil || p.segs == 1 {
			return
		}
		checkPieces(t, b, p, func(int) int { return int(step) })
	})
}

func FuzzKernelText(f *testing.F) {
	f.Add("000003e8 00000040 000f4240 3b9aca00\n", []byte{})
	f.Add("", []byte{8, 0, 1, 0, 'n', 'e', 't', 0})
	f.Fuzz(func(t *testing.T, s string, b []byte) {
		if ns, err := parsePsched(s); err == nil && !(ns > 0) {
			t.Errorf("parsePsched(%q) = %v", s, ns)
		}
		_, _ = parseQdisc(0, b) // must end, without a panic
	})
}

func TestPsched(t *testing.T) {
	if ns, err := parsePsched("000003e8 00000040 000f4240 3b9aca00\n"); err != nil || ns != 64 {
		t.Errorf("psched: %v ns, %v; want 64", ns, err)
	}
	for _, s := range []string{"", "x", "00000000 00000040", "000003e8 00000000"} {
		if _, err := parsePsched(s); err == nil {
			t.Errorf("psched %q: no error", s)
		}
	}
}

func TestNormalTable(t *testing.T) {
	b := normalTable()
	n := len(b) / 2
	var sum, squares float64
	last := math.MinInt
	for i := range n {
		v := int(int16(binary.NativeEndian.Uint16(b[2*i:])))
		if v < last {
			t.Fatalf("value %d at %d falls from %d", v, i, last)
		}
		last = v
		z := float64(v) / netemDistScale
		sum, squares = sum+z, squares+z*z
	}
	if mean, sd := sum/float64(n), math.Sqrt(squares/float64(n)); math.Abs(mean) > 1e-3 || math.Abs(sd-1) > 0.01 {
		t.Errorf("table has mean %v and deviation %v", mean, sd)
	}
}

// A forwarder between two sockets in place of TUN devices: what comes out, when, and
// that its ring of bytes survives any mix of sizes, wraps and back-pressure.
func TestForwarder(t *testing.T) {
	rng := rand.New(rand.NewPCG(seed(t), 0))
	for _, p := range []Profile{{}, {RTT: 4 * time.Millisecond}, {RTT: 4 * time.Millisecond, Rate: 4e9}} {
		in, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		out, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET, 0)
		if err != nil {
			t.Fatal(err)
		}
		stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		f, err := newForwarder(in[1], []int{-1, out[0]}, stop, p, newLine(Profile{RTT: p.RTT, Rate: p.Rate, QueueBytes: MaxQueue}, 1, 0))
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Munmap(f.arena); err != nil {
			t.Fatal(err)
		}
		f.arena = make([]byte, 300_000) // wraps all the time
		done := make(chan struct{})
		locked(func() bool { defer close(done); f.run(); return false })
		var want [][]byte
		for range 2000 {
			b := largeSegment(gsoNone, 1+rng.IntN([]int{100, 1400, 60_000}[rng.IntN(3)]), 0)
			if rng.IntN(2) == 0 {
				b = largeSegment(gsoTCPv4, 1+rng.IntN(9000), 1448)
			}
			want = append(want, b)
		}
		sendErr := make(chan error, 1)
		began := time.Now()
		go func() {
			for _, b := range want {
				for {
					_, err := unix.Write(in[0], b)
					if err == nil {
						break
					}
					if !errors.Is(err, unix.EAGAIN) {
						sendErr <- err
						return
					}
					_, _ = unix.Poll([]unix.PollFd{{Fd: int32(in[0]), Events: unix.POLLOUT}}, 100)
				}
			}
			sendErr <- nil
		}()
		buf := make([]byte, maxRead)
		for i, w := range want {
			var got []byte
			for len(got) < len(w)-vnetLen { // in one piece or in several
				tv := unix.NsecToTimeval(int64(5 * time.Second))
				if err := unix.SetsockoptTimeval(out[1], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
					t.Fatal(err)
				}
				n, err := unix.Read(out[1], buf)
				if err == unix.EINTR { // a read with a timeout is not restarted after a signal
					continue
				}
				if err != nil || n < vnetLen {
					t.Fatalf("%+v: packet %d: %d, %v", p, i, n, err)
				}
				if i == 0 && len(got) == 0 && time.Since(began) < p.RTT/2 {
					t.Errorf("%+v: first packet after %v", p, time.Since(began))
				}
				piece := buf[vnetLen:n]
				if len(got) > 0 {
					piece = piece[52:]
				}
				got = append(got, piece...)
			}
			if len(got) != len(w)-vnetLen || !bytes.Equal(got[min(len(got), 52):], w[min(len(w), vnetLen+52):]) {
				t.Fatalf("%+v: packet %d of %d bytes came as %d", p, i, len(w)-vnetLen, len(got))
			}
		}
		if err := <-sendErr; err != nil {
			t.Fatal(err)
		}
		if f.wrong.Load()+f.lost.Load()+f.over.Load() != 0 {
			t.Errorf("%+v: %d wrong, %d lost, %d over", p, f.wrong.Load(), f.lost.Load(), f.over.Load())
		}
		if f.cputime() <= 0 {
			t.Error("no CPU time")
		}
		if _, err := unix.Write(stop, []byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
			t.Fatal(err)
		}
		select {
		case <-done:
		case <-time.After(5 * time.Second):
			t.Fatal("forwarder does not stop")
		}
		for _, fd := range []int{in[0], in[1], out[0], out[1], stop} {
			if err := unix.Close(fd); err != nil {
				t.Error(os.NewSyscallError("close", err))
			}
		}
	}
}
