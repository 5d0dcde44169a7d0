package nbd

import (
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	spinFor    = 50 * time.Microsecond // above a small exchange on one host, with no wake-up in it
	spinMisses = 4                     // after so many vain spins in a row,
	spinRetry  = 64                    // only each so many-th wait spins
	spinLook   = 64                    // waits between two looks at where the peer runs
)

// spinner decides whether a reader looks for the next bytes for a while before
// it sleeps. A wake-up on another CPU costs more than all the rest of a small
// exchange (20 to 40 us in a virtual machine whose idle CPUs halt). It spins only
// in small exchanges, one at a time, as page faults make them; while that pays;
// and not on the CPU that the peer sends from, which the peer needs.
type spinner struct {
	soon          bool // set by the owner: a small exchange is all that is expected
	waits, misses int
	apart         bool // the peer's packets come from another CPU
	lookFn        func(fd uintptr)
}

// worth begins a wait on sock and reports whether to spin.
func (s *spinner) worth(sock syscall.RawConn) bool {
	if !s.soon {
		return false
	}
	if s.lookFn == nil { // made once, so that a wait allocates nothing
		s.lookFn = func(fd uintptr) { s.apart = comesFromElsewhere(fd) }
	}
	if s.waits%spinLook == 0 && sock.Control(s.lookFn) != nil {
		return false
	}
	s.waits++
	if s.misses >= spinMisses {
		s.misses++
		return s.apart && s.misses%spinRetry == 0
	}
	return s.apart
}

// spun notes how a spin ended.
func (s *spinner) spun(paid bool) {
	if s.misses++; paid {
		s.misses = 0
	}
}

// comesFromElsewhere reports whether the socket's packets were handled last by
// another CPU than the one that this thread is on (SO_INCOMING_CPU, Linux 3.19):
// on one host that is where the peer sent them.
func comesFromElsewhere(fd uintptr) bool {
	theirs, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_INCOMING_CPU)
	if err != nil {
		return false
	}
	var ours uint32
	_, _, e := unix.RawSyscall(unix.SYS_GETCPU, uintptr(unsafe.Pointer(&ours)), 0, 0)
	return e == 0 && theirs != int(ours)
}
