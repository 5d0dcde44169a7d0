package netem

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestProbe(t *testing.T) {
	for _, s := range []Shaper{ShaperTun, ShaperNone, ShaperSleep} {
		if err := Probe(s); err != nil && !errors.Is(err, ErrNotPermitted) {
			t.Errorf("probe %s: %v", s, err)
		}
	}
	err := Probe(ShaperNetem)
	if inLab() && err != nil {
		t.Errorf("the lab kernel has netem: %v", err)
	}
	if errors.Is(err, ErrNotSupported) && !strings.Contains(err.Error(), "modprobe sch_netem") {
		t.Errorf("no remedy in: %v", err)
	}
	if err := Probe("carrier-pigeon"); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "tun") {
		t.Errorf("unknown shaper: %v", err)
	}
}

func TestOpenRefuses(t *testing.T) {
	for _, tt := range []struct {
		s Shaper
		p Profile
		o Options
	}{
		{ShaperSleep, Profile{}, Options{}},
		{"", Profile{}, Options{}},
		{ShaperNone, Profile{RTT: 1}, Options{}},
		{ShaperTun, Profile{Loss: 2}, Options{}},
		{ShaperTun, Profile{}, Options{Window: -1}},
	} {
		if l, err := Open(t.Context(), tt.s, tt.p, tt.o); !errors.Is(err, ErrInvalid) {
			t.Errorf("%+v: %v, %v", tt, l, err)
		}
	}
	need(t, ShaperNone)
	if _, err := Open(t.Context(), ShaperNone, Profile{}, Options{Congestion: "wishful"}); !errors.Is(err, ErrNotSupported) || !strings.Contains(err.Error(), "reno") {
		t.Errorf("unknown congestion control: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Open(ctx, ShaperNone, Profile{}, Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// Every kind of profile on every shaper that this kernel has must pass its own
// calibration, and the numbers must be what the profile says.
func TestCalibrate(t *testing.T) {
	profiles := []Profile{
		{RTT: time.Millisecond, Rate: 100e6},
		{RTT: 20 * time.Millisecond, Rate: 1e9},
		{RTT: 40 * time.Millisecond, Rate: 50e6, Loss: 0.01},
		{RTT: 30 * time.Millisecond, Rate: 20e6, Jitter: 2 * time.Millisecond},
		{RTT: 10 * time.Millisecond, Jitter: time.Millisecond},
	}
	if inLab() { // the links that docs/bars.md speaks of, with the two above
		for _, rtt := range []time.Duration{1, 20, 40, 100} {
			for _, rate := range []int64{100e6, 1e9} {
				if p := (Profile{RTT: rtt * time.Millisecond, Rate: rate}); !slices.Contains(profiles, p) {
					profiles = append(profiles, p)
				}
			}
		}
	}
	for _, p := range profiles {
		for _, s := range shaping() {
			t.Run(fmt.Sprintf("%s/%v/%d/loss=%v/jitter=%v", s, p.RTT, p.Rate, p.Loss, p.Jitter), func(t *testing.T) {
				l := open(t, s, p, Options{Seed: seed(t)})
				steady(t, func() error {
					c, err := l.Calibrate(t.Context())
					if err != nil {
						t.Fatal(err)
					}
					b, err := json.Marshal(c)
					t.Logf("%s %v; forwarding took %v", b, err, l.CPU())
					if !c.Accepted {
						return fmt.Errorf("not accepted: %v", c.Reasons)
					}
					if sd := math.Sqrt2 * float64(p.Jitter); sd > 0 && math.Abs(float64(c.RTT.StdDev)/sd-1) > 0.5 {
						return fmt.Errorf("RTT deviates by %v, want %v", c.RTT.StdDev, time.Duration(sd))
					}
					if c.Goodput == 0 && p.Loss == 0 {
						return errors.New("no goodput")
					}
					return nil
				})
				if s == ShaperTun && l.CPU() == 0 {
					t.Error("no CPU time")
				}
			})
		}
	}
	// The named ones, as `measure --profile` sets them.
	for _, p := range Profiles() {
		for _, s := range shaping() {
			t.Run(fmt.Sprintf("%s/%s", s, p.Name), func(t *testing.T) {
				if p.RTT >= 40*time.Millisecond && !inLab() {
					t.Parallel() // they wait most of the time, and may be off by 2 ms or more
				}
				l := open(t, s, p, Options{Seed: seed(t)})
				steady(t, func() error {
					c, err := l.Calibrate(t.Context())
					if err != nil {
						t.Fatal(err)
					}
					if !c.Accepted {
						return fmt.Errorf("not accepted: %v", c.Reasons)
					}
					if (len(c.Rates) == 2) != (p.Rate > 0) {
						return fmt.Errorf("%d rates were measured", len(c.Rates))
					}
					return nil
				})
			})
		}
	}
	t.Run("none", func(t *testing.T) {
		l := open(t, ShaperNone, Profile{}, Options{})
		steady(t, func() error {
			c, err := l.Calibrate(t.Context())
			if err != nil || !c.Accepted || len(c.Rates) != 0 {
				return fmt.Errorf("%+v, %w", c, err)
			}
			return nil
		})
	})
}

// What Calibrate refuses: a link that is not as its profile says.
func TestCalibrateRefuses(t *testing.T) {
	for _, s := range shaping() {
		t.Run(string(s), func(t *testing.T) {
			l := open(t, s, Profile{RTT: 4 * time.Millisecond, Rate: 50e6}, Options{})
			l.profile = Profile{RTT: 8 * time.Millisecond, Rate: 80e6}
			if s == ShaperNetem { // whose change sets all of the profile
				l.profile = Profile{RTT: 4 * time.Millisecond, Rate: 50e6}
				other := open(t, s, l.profile, Options{})
				other.profile.RTT = time.Millisecond
				e, err := other.Echo(t.Context(), 10)
				if err := errors.Join(err, other.AcceptRTT(e)); err == nil {
					t.Error("a wrong RTT passes")
				}
				return
			}
			c, err := l.Calibrate(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			all := strings.Join(c.Reasons, "\n")
			if c.Accepted || !strings.Contains(all, "RTT: median") || !strings.Contains(all, "rate source") || c.RTTAttempts != maxAttempts {
				t.Errorf("accepted %v: %s", c.Accepted, all)
			}
		})
	}
}

func TestEcho(t *testing.T) {
	for _, s := range shaping() {
		t.Run(string(s), func(t *testing.T) {
			l := open(t, s, Profile{RTT: 40 * time.Millisecond}, Options{})
			steady(t, func() error {
				began := time.Now()
				e, err := l.Echo(t.Context(), 10)
				took := time.Since(began)
				if err != nil || e.Received != 10 {
					t.Fatalf("%+v, %v", e, err)
				}
				if e.Min < l.profile.RTT {
					t.Fatalf("an echo took %v, the link has %v", e.Min, l.profile.RTT)
				}
				if took > 100*time.Millisecond {
					return fmt.Errorf("10 echoes at 40 ms took %v", took)
				}
				return l.AcceptRTT(e)
			})
		})
	}
	l := open(t, ShaperNone, Profile{}, Options{})
	for _, n := range []int{0, -1, 1001} {
		if _, err := l.Echo(t.Context(), n); !errors.Is(err, ErrInvalid) {
			t.Errorf("%d echoes: %v", n, err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := l.Echo(ctx, 1000); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("deadline: %v", err)
	}
}

// The measuring instrument against another: ping, from inside the namespace.
func TestPing(t *testing.T) {
	ping, err := exec.LookPath("ping")
	if err != nil {
		t.Skipf("no ping on this machine: %v", err)
	}
	for _, s := range shaping() {
		t.Run(string(s), func(t *testing.T) {
			l := open(t, s, Profile{RTT: 20 * time.Millisecond}, Options{})
			steady(t, func() error {
				var out bytes.Buffer
				cmd := exec.Command(ping, "-c", "30", "-i", "0.01", "-w", "5", l.Destination().Addr().String())
				cmd.Stdout, cmd.Stderr = &out, &out
				if err := l.Source().Start(cmd); err != nil {
					t.Fatal(err)
				}
				if err := cmd.Wait(); err != nil {
					t.Fatalf("%v: %s", err, out.String())
				}
				var trips []time.Duration
				for _, m := range regexp.MustCompile(`time=([0-9.]+) ms`).FindAllStringSubmatch(out.String(), -1) {
					ms, err := strconv.ParseFloat(m[1], 64)
					if err != nil {
						t.Fatal(err)
					}
					trips = append(trips, time.Duration(ms*1e6))
				}
				e := summarise(30, trips)
				t.Logf("%+v", e)
				return l.AcceptRTT(e)
			})
		})
	}
}

// stream sends size pseudo-random bytes from the source to the destination over one
// TCP connection, compares each, and returns how long it took.
func stream(t *testing.T, l *Link, size int) time.Duration {
	t.Helper()
	took, _ := streamInfo(t, l, size)
	return took
}

// streamInfo is stream that waits for every acknowledgement and returns what TCP says
// of the sending end.
func streamInfo(t *testing.T, l *Link, size int) (time.Duration, *unix.TCPInfo) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	ln, err := l.Destination().Listen(ctx, "tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	data, got := make([]byte, size), make([]byte, size)
	for i := range data {
		data[i], got[i] = byte(i^i>>8^i>>16), 1
	}
	began := time.Now()
	tx, err := l.Source().Dial(ctx, "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Close()
	rx, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer rx.Close()
	deadline, _ := ctx.Deadline()
	_ = tx.SetDeadline(deadline)
	_ = rx.SetDeadline(deadline)
	sent := make(chan error, 1)
	go func() {
		_, err := tx.Write(data)
		sent <- err
	}()
	n, err := io.ReadFull(rx, got)
	took := time.Since(began)
	if err := errors.Join(err, <-sent); err != nil {
		t.Fatalf("%d of %d bytes: %v", n, size, err)
	}
	if !bytes.Equal(got, data) {
		t.Fatal("bytes differ")
	}
	raw, err := tx.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for {
		var info *unix.TCPInfo
		var of error
		err := raw.Control(func(fd uintptr) { info, of = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) })
		if err := errors.Join(err, of, ctx.Err()); err != nil {
			t.Fatalf("ask TCP: %v", err)
		}
		if info.Unacked == 0 {
			return took, info
		}
		time.Sleep(time.Millisecond)
	}
}

// One bulk TCP stream: all bytes right, never faster than the link, and not much
// slower; with loss, large segments are taken apart on the way.
func TestStream(t *testing.T) {
	for _, s := range shaping() {
		for _, tt := range []struct {
			p          Profile
			size       int
			congestion string
			least      float64 // of the rate
		}{
			{Profile{RTT: 10 * time.Millisecond, Rate: 100e6}, 8 << 20, "bbr", 0.6},
			{Profile{RTT: 4 * time.Millisecond, Rate: 200e6, Loss: 0.02}, 2 << 20, "bbr", 0},
			{Profile{RTT: 10 * time.Millisecond, Rate: 100e6, QueueBytes: 20_000}, 2 << 20, "reno", 0},
			{Profile{Loss: 0.05}, 2 << 20, "reno", 0},
			{Profile{}, 16 << 20, "reno", 0},
		} {
			t.Run(fmt.Sprintf("%s/%v/%d/loss=%v/queue=%d", s, tt.p.RTT, tt.p.Rate, tt.p.Loss, tt.p.QueueBytes), func(t *testing.T) {
				l := open(t, s, tt.p, Options{Congestion: tt.congestion})
				steady(t, func() error {
					before, err := l.Counters()
					if err != nil {
						t.Fatal(err)
					}
					took := stream(t, l, tt.size)
					c, err := l.Counters()
					if err != nil {
						t.Fatal(err)
					}
					tx := Traffic{c.SourceTx.Packets - before.SourceTx.Packets, c.SourceTx.Bytes - before.SourceTx.Bytes, c.SourceTx.Dropped - before.SourceTx.Dropped}
					bits, rate := float64(tt.size)*8/took.Seconds(), float64(tt.p.Rate)
					t.Logf("%.4g bit/s; %+v; forwarding took %v", bits, tx, l.CPU())
					if tx.Bytes < int64(tt.size) || tx.Bytes > int64(tt.size)*6/5 || tx.Packets < int64(tt.size)/mtu {
						t.Errorf("%d bytes of payload are %+v on the wire", tt.size, tx)
					}
					if (tt.p.Loss > 0 || tt.p.QueueBytes > 0) && tx.Dropped == 0 {
						t.Error("nothing was dropped")
					}
					if rate > 0 && bits > rate {
						t.Errorf("%.4g bit/s at a rate of %.4g", bits, rate)
					}
					if bits < tt.least*rate {
						return fmt.Errorf("%.4g bit/s at a rate of %.4g", bits, rate)
					}
					return nil
				})
			})
		}
	}
}

// UDP sockets by which a test sends and counts single frames.
func sockets(t *testing.T, l *Link) (tx, rx *udpSocket) {
	t.Helper()
	tx, err := openUDP(l.Source(), 100*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tx.close)
	if rx, err = openUDP(l.Destination(), 100*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(rx.close)
	if err := tx.connect(rx); err != nil {
		t.Fatal(err)
	}
	return tx, rx
}

// count reads datagrams until none comes for the socket's 100 ms.
func count(rx *udpSocket) (n int) {
	b := make([]byte, 2048)
	for {
		_, err := unix.Read(rx.fd, b)
		switch {
		case err == nil:
			n++
		case !errors.Is(err, unix.EINTR): // which Go's own signals cause
			return n
		}
	}
}

// The queue holds the bytes that it was asked to hold, and drops its tail.
func TestQueue(t *testing.T) {
	for _, s := range shaping() {
		t.Run(string(s), func(t *testing.T) {
			const held = 20
			p := Profile{RTT: 2 * time.Millisecond, Rate: 2e6, QueueBytes: held * linkFrame}
			l := open(t, s, p, Options{})
			tx, rx := sockets(t, l)
			b := make([]byte, mtu-28)
			began := time.Now()
			for range 100 {
				if _, err := unix.Write(tx.fd, b); err != nil && !temporary(err) {
					t.Fatal(err)
				}
			}
			// One is with the bottleneck; as long as sending took, others left.
			left := int(time.Since(began)/time.Duration(serialisation(linkFrame, p.Rate))) + 1
			got := count(rx)
			c, err := l.Counters()
			t.Logf("%d of 100 came, at most %d left meanwhile; %+v %v", got, left, c, err)
			if got < held-1 || got > held+left+2 {
				t.Errorf("%d frames came through a queue of %d", got, held)
			}
			if int(c.SourceTx.Packets) != got || int(c.SourceTx.Dropped) != 100-got || c.SourceTx.Bytes != int64(got*mtu) {
				t.Errorf("counters say %+v, %d came", c.SourceTx, got)
			}
		})
	}
}

func TestSetLoss(t *testing.T) {
	for _, s := range shaping() {
		t.Run(string(s), func(t *testing.T) {
			l := open(t, s, Profile{}, Options{})
			tx, rx := sockets(t, l)
			send := func() int {
				for range 50 {
					if _, err := unix.Write(tx.fd, make([]byte, 100)); err != nil && !temporary(err) {
						t.Fatal(err)
					}
				}
				return count(rx)
			}
			for _, tt := range []struct {
				loss float64
				want int
			}{{0, 50}, {1, 0}, {0, 50}} {
				if err := l.SetLoss(tt.loss); err != nil {
					t.Fatal(err)
				}
				if got := send(); got != tt.want {
					t.Errorf("loss %v: %d of 50 came", tt.loss, got)
				}
			}
			if err := l.SetLoss(-1); !errors.Is(err, ErrInvalid) {
				t.Errorf("loss -1: %v", err)
			}
		})
	}
	if err := open(t, ShaperNone, Profile{}, Options{}).SetLoss(0.1); !errors.Is(err, ErrInvalid) {
		t.Errorf("loss of an unshaped link: %v", err)
	}
}

func TestCountersUnshaped(t *testing.T) {
	l := open(t, ShaperNone, Profile{}, Options{})
	_, info := streamInfo(t, l, 8<<20)
	c, err := l.Counters()
	if err != nil {
		t.Fatal(err)
	}
	// As segmented: each 1448 bytes of payload have 52 of headers. TCP's own count
	// includes what it sent again, which it does on an idle link too when the host is slow.
	payload := int64(info.Bytes_sent)
	want := payload + 52*payload/1448
	if b := c.SourceTx.Bytes; payload < 8<<20 || b < want || b > want*1005/1000 {
		t.Errorf("%+v; TCP sent %d bytes of payload, %d again: want %d bytes", c, payload, info.Bytes_retrans, want)
	}
}

func TestEvidence(t *testing.T) {
	p := Profile{RTT: 100 * time.Millisecond, Rate: 1e9}
	for _, s := range shaping() {
		t.Run(string(s), func(t *testing.T) {
			l := open(t, s, p, Options{Congestion: "reno", Seed: 7})
			e := l.Evidence()
			b, err := json.Marshal(e)
			if err != nil {
				t.Fatal(err)
			}
			var back Evidence
			if err := json.Unmarshal(b, &back); err != nil {
				t.Fatal(err)
			}
			t.Logf("%s", b)
			for _, end := range []EndEvidence{back.Source, back.Destination} {
				if end.MTU != mtu || end.Congestion != "reno" || end.Qdisc.Kind == "" || len(end.Offloads) == 0 {
					t.Errorf("%+v", end)
				}
				for _, name := range []string{"tcp_rmem", "tcp_wmem"} {
					f := strings.Fields(end.Sysctls[name])
					if v, err := strconv.ParseInt(f[len(f)-1], 10, 64); err != nil || v < 4*p.BDP() {
						t.Errorf("%s is %v, BDP %d", name, f, p.BDP())
					}
				}
				if s == ShaperNetem && (end.Qdisc.DelayNs != int64(p.RTT/2) || end.Qdisc.Rate != p.Rate) {
					t.Errorf("qdisc %+v", end.Qdisc)
				}
			}
			if back.QueueBytes != p.BDP() || back.Shaper != s || back.Kernel == "" {
				t.Errorf("%+v", back)
			}
		})
	}
}

// connected returns both ends of a TCP connection from the source to the destination.
func connected(t *testing.T, l *Link) []net.Conn {
	t.Helper()
	ln, err := l.Destination().Listen(t.Context(), "tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	tx, err := l.Source().Dial(t.Context(), "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tx.Close() })
	rx, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { rx.Close() })
	return []net.Conn{tx, rx}
}

func control(t *testing.T, c net.Conn, f func(fd int) error) {
	t.Helper()
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if cerr := raw.Control(func(fd uintptr) { err = f(int(fd)) }); errors.Join(err, cerr) != nil {
		t.Fatal(err, cerr)
	}
}

// The first window that was asked for is the one that sockets have, on both sides,
// whatever else the route says.
func TestInitialWindow(t *testing.T) {
	if _, err := Open(t.Context(), ShaperNone, Profile{}, Options{InitialWindow: 1001}); !errors.Is(err, ErrInvalid) {
		t.Errorf("1001 segments: %v", err)
	}
	for _, o := range []Options{{}, {InitialWindow: 100}, {InitialWindow: 100, Congestion: "reno"}} {
		l := open(t, ShaperNone, Profile{}, o)
		want := uint32(10)
		if o.InitialWindow > 0 {
			want = uint32(o.InitialWindow)
		}
		for _, c := range connected(t, l) {
			var info *unix.TCPInfo
			control(t, c, func(fd int) (err error) {
				info, err = unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
				return err
			})
			if info.Snd_cwnd != want {
				t.Errorf("%+v: a window of %d segments", o, info.Snd_cwnd)
			}
		}
		if got := l.Evidence().Source.InitialWindow; got != o.InitialWindow {
			t.Errorf("%+v: evidence says %d", o, got)
		}
	}
}

// The congestion control that was asked for is the one that sockets have, on both
// sides, also where only the first namespace may have it by default.
func TestCongestion(t *testing.T) {
	available, err := sysctl("tcp_available_congestion_control")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range strings.Fields(available) {
		t.Run(name, func(t *testing.T) {
			l := open(t, ShaperNone, Profile{}, Options{Congestion: name})
			t.Logf("by %s", l.Evidence().Source.CongestionBy)
			for _, c := range connected(t, l) {
				var got string
				control(t, c, func(fd int) (err error) {
					got, err = unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
					return err
				})
				if got = strings.TrimRight(got, "\x00"); got != name {
					t.Errorf("%v -> %v uses %q", c.LocalAddr(), c.RemoteAddr(), got)
				}
			}
		})
	}
}

func TestNamespace(t *testing.T) {
	l := open(t, ShaperNone, Profile{}, Options{})
	inside := func() (string, error) { return os.Readlink("/proc/thread-self/ns/net") }
	outside, err := inside()
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 20 {
		n := l.ends()[i%2]
		wg.Go(func() {
			if err := n.Do(func() error {
				links, err := net.Interfaces()
				if err == nil && (len(links) != 2 || links[1].Name != n.Device()) {
					err = fmt.Errorf("interfaces %v", links)
				}
				return err
			}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for range 100 { // no thread of the pool was left inside
		wg.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			if now, err := inside(); err != nil || now != outside {
				t.Errorf("outside is %s, %v; was %s", now, err, outside)
			}
		})
	}
	wg.Wait()
	if err := l.Source().Do(func() error { runtime.Goexit(); return nil }); !errors.Is(err, errExited) {
		t.Errorf("Goexit: %v", err)
	}
	if err := l.Source().Do(func() error { return io.ErrNoProgress }); !errors.Is(err, io.ErrNoProgress) {
		t.Errorf("error: %v", err)
	}
	if _, err := l.Source().Dial(t.Context(), "tcp", "localhost:1"); !errors.Is(err, ErrInvalid) {
		t.Errorf("dial by name: %v", err)
	}
	// A child that asked to die with its parent outlives Start.
	out, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd := exec.Command("sh", "-c", "readlink /proc/self/ns/net; exec sleep 60")
	cmd.Stdout = in
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := l.Destination().Start(cmd); err != nil {
		t.Fatal(err)
	}
	in.Close()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || strings.TrimSpace(line) == outside {
		t.Errorf("child runs in %q, %v; outside is %s", line, err, outside)
	}
	runtime.GC()
	if err := cmd.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("child is gone: %v", err)
	}
	if err := l.Close(); err != nil { // ends it: its parent thread goes
		t.Fatal(err)
	}
	waited := make(chan error, 1)
	go func() { waited <- cmd.Wait() }()
	select {
	case err := <-waited:
		if err == nil {
			t.Error("child ended by itself")
		}
	case <-time.After(5 * time.Second):
		t.Error("child outlives Close")
		_ = cmd.Process.Kill()
		<-waited
	}
	for _, err := range []error{l.Close(), l.Close()} {
		if err != nil {
			t.Errorf("close again: %v", err)
		}
	}
	if err := l.Source().Do(func() error { return nil }); !errors.Is(err, ErrClosed) {
		t.Errorf("Do after Close: %v", err)
	}
	if err := l.Source().Start(exec.Command("true")); !errors.Is(err, ErrClosed) {
		t.Errorf("Start after Close: %v", err)
	}
	if _, err := l.Echo(t.Context(), 1); !errors.Is(err, ErrClosed) {
		t.Errorf("Echo after Close: %v", err)
	}
	if err := l.SetLoss(0); err == nil {
		t.Error("SetLoss after Close")
	}
}

// holders lists the processes that hold a namespace of the given names, by being in
// it or by a descriptor.
func holders(names []string) (found []string) {
	paths, _ := filepath.Glob("/proc/[0-9]*/ns/net")
	tasks, _ := filepath.Glob("/proc/[0-9]*/task/*/ns/net")
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, path := range append(append(paths, tasks...), fds...) {
		target, err := os.Readlink(path)
		for _, n := range names {
			if err == nil && target == n {
				found = append(found, path+" -> "+target)
			}
		}
	}
	return found
}

// However the process ends, nothing is left: no namespace, no device, no child.
func TestTearDown(t *testing.T) {
	for _, s := range append(shaping(), ShaperNone) {
		for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM, syscall.SIGINT} {
			t.Run(fmt.Sprintf("%s/%v", s, sig), func(t *testing.T) {
				need(t, s)
				out, in, err := os.Pipe()
				if err != nil {
					t.Fatal(err)
				}
				defer out.Close()
				cmd := exec.Command("/proc/self/exe")
				cmd.Env = append(os.Environ(), childRole+"=hold", "SHAPER="+string(s))
				cmd.Stdout, cmd.Stderr = in, os.Stderr
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				in.Close()
				var names []string
				sc := bufio.NewScanner(out)
				for sc.Scan() && sc.Text() != "ready" {
					names = append(names, sc.Text())
				}
				if len(names) != 2 || len(holders(names)) < 2 {
					t.Errorf("child made %v, held by %v", names, holders(names))
				}
				if err := cmd.Process.Signal(sig); err != nil {
					t.Fatal(err)
				}
				_ = cmd.Wait()
				for tries, pace := 1, newPacer(); len(holders(names)) > 0; tries++ {
					if tries > 100 {
						t.Fatalf("left: %v", holders(names))
					}
					if err := pace.until(t.Context(), time.Duration(tries)*50*time.Millisecond); err != nil {
						t.Fatal(err)
					}
				}
			})
		}
	}
	links, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if strings.HasPrefix(l.Name, "memsync-") {
			t.Errorf("left: device %s", l.Name)
		}
	}
	if entries, err := os.ReadDir("/run/netns"); err == nil && len(entries) > 0 {
		t.Errorf("left: %v", entries)
	}
}

// Many links at once and one after the other: no descriptor, thread or goroutine stays.
func TestManyLinks(t *testing.T) {
	for _, s := range append(shaping(), ShaperNone) {
		t.Run(string(s), func(t *testing.T) {
			need(t, s)
			before := len(descriptors())
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() {
					for range 2 {
						l, err := Open(t.Context(), s, Profile{}, Options{})
						if err != nil {
							t.Error(err)
							return
						}
						if e, err := l.Echo(t.Context(), 3); err != nil || e.Received != 3 {
							t.Errorf("%+v, %v", e, err)
						}
						var closing sync.WaitGroup
						for range 3 {
							closing.Go(func() {
								if err := l.Close(); err != nil {
									t.Error(err)
								}
							})
						}
						closing.Wait()
					}
				})
			}
			wg.Wait()
			if after := len(descriptors()); after > before {
				t.Errorf("%d descriptors, %d before", after, before)
			}
		})
	}
}

// An ordinary user, root of nothing but a user namespace, has all of it, given a
// /dev/net/tun that may be opened.
func TestUserNamespace(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to become another user")
	}
	const uid = 1000
	for _, s := range append(shaping(), ShaperNone) {
		t.Run(string(s), func(t *testing.T) {
			need(t, s)
			steady(t, func() error { return inUserNamespace(t, s, uid) })
		})
	}
}

func inUserNamespace(t *testing.T, s Shaper, uid int) error {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childRole+"=userns", "SHAPER="+string(s))
	if s == ShaperTun {
		// As udev makes it (mode 0666), whatever this machine's is.
		dir := t.TempDir()
		if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(filepath.Dir(dir), 0o755)); err != nil {
			t.Fatal(err)
		}
		node := filepath.Join(dir, "tun")
		if err := unix.Mknod(node, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 200))); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(node, 0o666); err != nil {
			t.Fatal(err)
		}
		cmd.Env = append(cmd.Env, "TUN_NODE="+node)
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		UidMappings: ids, GidMappings: ids,
		Credential: &syscall.Credential{NoSetGroups: true},
		Pdeathsig:  syscall.SIGKILL,
	}
	err := cmd.Run()
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSPC) {
		t.Skipf("this machine has no user namespaces: %v", err)
	}
	if err != nil {
		return fmt.Errorf("%w: %s", err, out.String())
	}
	return nil
}
