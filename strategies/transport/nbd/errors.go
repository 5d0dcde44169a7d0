package nbd

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"memsync/strategies/region"
)

// ErrProtocol is wrapped by errors that say which field a peer got wrong.
var ErrProtocol = errors.New("NBD protocol broken")

func protocolError(format string, a ...any) error {
	return fmt.Errorf(format+": %w", append(a, ErrProtocol)...)
}

// Errno is an NBD error value (proto.md, "Error values").
type Errno uint32

// The error values.
const (
	EPERM     Errno = 1
	EIO       Errno = 5
	ENOMEM    Errno = 12
	EINVAL    Errno = 22
	ENOSPC    Errno = 28
	EOVERFLOW Errno = 75
	ENOTSUP   Errno = 95
	ESHUTDOWN Errno = 108
)

// Error is the server's answer to a request that it could not serve.
// It matches the sentinel of package region that fits, or the system's errno.
type Error struct {
	Command string
	Off, N  int64 // bytes
	Errno   Errno
	Message string // the server's own words, may be empty
}

// Error says what the server refused, and its reason.
func (e *Error) Error() string {
	s := fmt.Sprintf("NBD %s of [%d, +%d): server answers %s", e.Command, e.Off, e.N, syscall.Errno(e.Errno).Error())
	if e.Message != "" {
		s += fmt.Sprintf(" (%q)", e.Message)
	}
	return s
}

// Unwrap returns what errors.Is should match.
func (e *Error) Unwrap() error {
	switch e.Errno {
	case EPERM:
		return region.ErrNotPermitted
	case ENOTSUP:
		return region.ErrNotSupported
	case ESHUTDOWN:
		return region.ErrPeerGone
	}
	return syscall.Errno(e.Errno)
}

// errnoOf is what the server answers for err, given for a command.
func errnoOf(err error, cmd command) Errno {
	var no syscall.Errno
	switch {
	case errors.Is(err, region.ErrReadOnly), errors.Is(err, region.ErrNotPermitted):
		return EPERM
	case errors.Is(err, region.ErrOutOfRange):
		if cmd == cmdWrite || cmd == cmdWriteZeroes {
			return ENOSPC
		}
		return EINVAL
	case errors.Is(err, region.ErrNotSupported):
		return EINVAL // ENOTSUP is kept for fast zeroes
	case errors.Is(err, region.ErrClosed), errors.Is(err, context.Canceled):
		return ESHUTDOWN
	case errors.As(err, &no):
		switch no {
		case syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG:
			return ENOSPC
		case syscall.EPERM, syscall.EACCES, syscall.EROFS:
			return EPERM
		case syscall.EINVAL:
			return EINVAL
		case syscall.ENOMEM:
			return ENOMEM
		}
	}
	return EIO
}

// peerGone wraps an error of the connection so that it matches region.ErrPeerGone.
func peerGone(what string, err error) error {
	if errors.Is(err, region.ErrPeerGone) {
		return err
	}
	return fmt.Errorf("%s: %w: %w", what, region.ErrPeerGone, err)
}
