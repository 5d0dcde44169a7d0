package transport

import (
	"errors"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

const tcpRTOMax = 44 // TCP_RTO_MAX_MS of include/uapi/linux/tcp.h, Linux 6.15

// RetrySoon is the Control function of a net.Dialer or net.ListenConfig that has TCP
// send again what is not acknowledged every second at least, and not up to two
// minutes later, so that a link that comes back is noticed within its round-trip
// time and a second. Earlier kernels keep their way, and so do other sockets.
func RetrySoon(_, _ string, c syscall.RawConn) error {
	var err error
	if cerr := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, tcpRTOMax, 1000)
	}); cerr != nil {
		return cerr
	}
	for _, other := range []error{unix.ENOPROTOOPT, unix.EOPNOTSUPP, unix.EINVAL} {
		if errors.Is(err, other) {
			return nil
		}
	}
	return os.NewSyscallError("setsockopt TCP_RTO_MAX_MS", err)
}
