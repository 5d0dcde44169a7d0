package netem

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"runtime"
	"slices"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// udpSocket is a blocking UDP socket of one namespace; its port is the kernel's choice.
type udpSocket struct {
	fd   int
	addr unix.SockaddrInet4
}

// openUDP makes a socket inside n, with buffers as large as allowed up to 4 MiB. A
// read returns EAGAIN after at most quantum, so that a reader sees its deadline.
func openUDP(n *Namespace, quantum time.Duration) (*udpSocket, error) {
	s := &udpSocket{fd: -1}
	err := n.Do(func() (err error) {
		s.fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("make UDP socket in namespace %s: %w", n.name, err)
	}
	tv := unix.NsecToTimeval(int64(quantum))
	err = errors.Join(
		unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 4<<20),
		unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 4<<20),
		unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1),
		unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		unix.Bind(s.fd, &unix.SockaddrInet4{Addr: n.addr.As4()}))
	if err == nil {
		var sa unix.Sockaddr
		sa, err = unix.Getsockname(s.fd)
		if in, ok := sa.(*unix.SockaddrInet4); ok {
			s.addr = *in
		}
	}
	if err != nil {
		unix.Close(s.fd)
		return nil, fmt.Errorf("set up UDP socket in namespace %s: %w", n.name, err)
	}
	return s, nil
}

func (s *udpSocket) connect(to *udpSocket) error {
	if err := unix.Connect(s.fd, &to.addr); err != nil {
		return fmt.Errorf("connect UDP socket: %w", err)
	}
	return nil
}

func (s *udpSocket) close() { _ = unix.Close(s.fd) }

// receive reads one datagram and the time at which the kernel had it (CLOCK_REALTIME).
func (s *udpSocket) receive(b, oob []byte) (n int, at time.Time, err error) {
	n, oobn, _, _, err := unix.Recvmsg(s.fd, b, oob, 0)
	if err != nil {
		return 0, time.Time{}, err
	}
	at = time.Now()
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return n, at, nil //nolint:nilerr // the datagram is good; only its time is less exact
	}
	for _, m := range msgs {
		if m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SCM_TIMESTAMPNS && len(m.Data) >= 16 {
			at = time.Unix(int64(binary.NativeEndian.Uint64(m.Data)), int64(binary.NativeEndian.Uint64(m.Data[8:])))
		}
	}
	return n, at, nil
}

// temporary tells errors that a UDP loop goes on after: nothing came in time, a
// signal, a full device queue, an ICMP answer to an earlier datagram.
func temporary(err error) bool {
	return errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) || errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.ECONNREFUSED)
}

// EchoStats summarises round trips. All times are zero where Received is.
type EchoStats struct {
	Sent     int           `json:"sent"`
	Received int           `json:"received"`
	Median   time.Duration `json:"median_ns"`
	Min      time.Duration `json:"min_ns"`
	Max      time.Duration `json:"max_ns"`
	Mean     time.Duration `json:"mean_ns"`
	StdDev   time.Duration `json:"standard_deviation_ns"`
}

const (
	// Datagrams of an echo: sequence, and in the answer the time the far end held it.
	echoSize = 56 // with headers, a ping's
	// How long after it is due an answer is waited for.
	echoPatience = 200 * time.Millisecond
)

// Echo measures the round trip of n UDP echoes, 1 to 1000, sent one every
// millisecond (with jitter: four standard deviations, so that none waits for
// another), so that several are in flight. It blocks for about n ms + RTT, 0.2 s longer where
// echoes are lost, and may run beside other traffic.
//
// A round trip is counted as ping does: to the moment the kernel had the answer. The
// time for which the answering thread held the echo is taken off, so a busy CPU does
// not pass for a long link. Source: RFC 2681; SO_TIMESTAMPNS in socket(7).
//
// Echoes go from the source to the destination, the first of several.
func (l *Link) Echo(ctx context.Context, n int) (EchoStats, error) {
	if n < 1 || n > 1000 {
		return EchoStats{}, fmt.Errorf("%d echoes: %w: must be 1 to 1000", n, ErrInvalid)
	}
	return l.echo(ctx, l.src, l.dst, n)
}

func (l *Link) echo(ctx context.Context, from, to *Namespace, n int) (EchoStats, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	client, err := openUDP(from, 20*time.Millisecond)
	if err != nil {
		return EchoStats{}, fmt.Errorf("echo: %w", err)
	}
	defer client.close()
	server, err := openUDP(to, 20*time.Millisecond)
	if err != nil {
		return EchoStats{}, fmt.Errorf("echo: %w", err)
	}
	defer server.close()
	if err := errors.Join(client.connect(server), server.connect(client)); err != nil {
		return EchoStats{}, fmt.Errorf("echo: %w", err)
	}
	answered, sent := make(chan struct{}), make(chan error, 1)
	go func() { defer close(answered); answerEchoes(ctx, server) }()
	starts := make([]atomic.Int64, n) // wall clock, as the kernel's times are
	go func() { sent <- sendEchoes(ctx, client, starts, max(time.Millisecond, 4*l.profile.Jitter)) }()

	trips, err := collectEchoes(ctx, client, starts, sent, l.profile.RTT+10*l.profile.Jitter+echoPatience)
	cancel()
	_ = unix.Shutdown(server.fd, unix.SHUT_RDWR) // ends its read at once
	<-answered
	if err != nil {
		return EchoStats{}, fmt.Errorf("echo: %w", err)
	}
	return summarise(n, trips), nil
}

func summarise(sent int, trips []time.Duration) EchoStats {
	s := EchoStats{Sent: sent, Received: len(trips)}
	if len(trips) == 0 {
		return s
	}
	slices.Sort(trips)
	s.Min, s.Max = trips[0], trips[len(trips)-1]
	s.Median = (trips[(len(trips)-1)/2] + trips[len(trips)/2]) / 2
	var sum time.Duration
	for _, t := range trips {
		sum += t
	}
	s.Mean = sum / time.Duration(len(trips))
	var squares float64
	for _, t := range trips {
		squares += math.Pow(float64(t-s.Mean), 2)
	}
	s.StdDev = time.Duration(math.Sqrt(squares / float64(max(1, len(trips)-1))))
	return s
}

func answerEchoes(ctx context.Context, server *udpSocket) {
	b, oob := make([]byte, echoSize), make([]byte, 128)
	for ctx.Err() == nil {
		n, at, err := server.receive(b, oob)
		if err != nil || n != echoSize {
			continue // EAGAIN, at most the read's quantum late
		}
		binary.NativeEndian.PutUint64(b[8:], uint64(max(0, time.Now().UnixNano()-at.UnixNano())))
		_, _ = unix.Write(server.fd, b) // a lost answer is a lost echo
	}
}

func sendEchoes(ctx context.Context, client *udpSocket, starts []atomic.Int64, gap time.Duration) error {
	b := make([]byte, echoSize)
	pace := newPacer()
	for i := range starts {
		if err := pace.until(ctx, time.Duration(i)*gap); err != nil {
			return err
		}
		binary.NativeEndian.PutUint64(b, uint64(i))
		starts[i].Store(time.Now().UnixNano())
		if _, err := unix.Write(client.fd, b); err != nil && !temporary(err) {
			return fmt.Errorf("send echo %d: %w", i, err)
		}
	}
	return nil
}

// collectEchoes returns when all answers are there, or patience after the last send.
func collectEchoes(ctx context.Context, client *udpSocket, starts []atomic.Int64, sent chan error, patience time.Duration) ([]time.Duration, error) {
	trips := make([]time.Duration, 0, len(starts))
	seen := make([]bool, len(starts))
	b, oob := make([]byte, echoSize), make([]byte, 128)
	var deadline time.Time
	for {
		select {
		case err := <-sent:
			if err != nil {
				return nil, err
			}
			sent, deadline = nil, time.Now().Add(patience)
		default:
		}
		if sent == nil && (len(trips) == len(starts) || time.Now().After(deadline) || ctx.Err() != nil) {
			return trips, ctx.Err()
		}
		n, at, err := client.receive(b, oob)
		switch {
		case temporary(err), err == nil && n != echoSize:
			continue
		case err != nil:
			if sent != nil {
				<-sent
			}
			return nil, fmt.Errorf("receive: %w", err)
		}
		i, held := binary.NativeEndian.Uint64(b), time.Duration(binary.NativeEndian.Uint64(b[8:]))
		if i < uint64(len(starts)) && !seen[i] {
			seen[i] = true
			trips = append(trips, max(0, time.Duration(at.UnixNano()-starts[i].Load())-held))
		}
	}
}

// pacer keeps a schedule: it sleeps on a thread whose timers are exact, not on Go's.
type pacer struct{ start time.Time }

func newPacer() *pacer { return &pacer{time.Now()} }

// until sleeps to the offset after the start, in steps short enough to see ctx end.
func (p *pacer) until(ctx context.Context, offset time.Duration) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		left := offset - time.Since(p.start)
		if left <= 0 {
			return nil
		}
		ts := unix.NsecToTimespec(int64(min(left, 50*time.Millisecond)))
		if _, err := unix.Ppoll(nil, &ts, nil); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("sleep: %w", err)
		}
	}
}

// batch is how many datagrams one system call moves.
const batch = 32

type mmsghdr struct {
	hdr unix.Msghdr
	len uint32
	_   [4]byte
}

// vector is a set of datagrams of one size for sendmmsg and recvmmsg (Linux 3.0).
type vector struct {
	msgs  [batch]mmsghdr
	iovs  [batch]unix.Iovec
	bytes []byte
	size  int
	pin   runtime.Pinner
}

func newVector(size int) *vector {
	v := &vector{bytes: make([]byte, batch*size), size: size}
	v.pin.Pin(&v.bytes[0])
	v.pin.Pin(&v.iovs)
	for i := range v.msgs {
		v.iovs[i].Base = &v.bytes[i*size]
		v.iovs[i].SetLen(size)
		v.msgs[i].hdr.Iov = &v.iovs[i]
		v.msgs[i].hdr.SetIovlen(1)
	}
	return v
}

func (v *vector) call(trap uintptr, fd, n, flags int) (int, error) {
	r, _, errno := unix.Syscall6(trap, uintptr(fd), uintptr(unsafe.Pointer(&v.msgs[0])), uintptr(n), uintptr(flags), 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(r), nil
}

// send sends the first n datagrams and returns how many the kernel took.
func (v *vector) send(fd, n int) (int, error) { return v.call(unix.SYS_SENDMMSG, fd, n, 0) }

// receive blocks for one datagram, then takes what else is there.
func (v *vector) receive(fd int) (int, error) {
	return v.call(unix.SYS_RECVMMSG, fd, batch, unix.MSG_WAITFORONE)
}
