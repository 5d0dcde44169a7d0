package rpc

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"syscall"
	"time"

	"memsync/strategies/region"
)

// ErrProtocol is wrapped by errors that say what a peer got wrong.
var ErrProtocol = errors.New("protocol broken")

// Status says what kind of error a request ended in.
type Status uint8

// The kinds. What none of them fits is StatusIO.
const (
	StatusOK Status = iota
	StatusIO
	StatusOutOfRange
	StatusReadOnly
	StatusNotPermitted
	StatusNotSupported
	StatusMissing
	StatusMismatch
	StatusInvalid
	StatusNoSpace
	StatusGone
)

// sentinels has what errors.Is should match for each Status.
var sentinels = [...]error{
	StatusIO: syscall.EIO, StatusOutOfRange: region.ErrOutOfRange, StatusReadOnly: region.ErrReadOnly, StatusNotPermitted: region.ErrNotPermitted,
	StatusNotSupported: region.ErrNotSupported, StatusMissing: region.ErrMissing, StatusMismatch: region.ErrMismatch,
	StatusInvalid: syscall.EINVAL, StatusNoSpace: syscall.ENOSPC, StatusGone: region.ErrPeerGone,
}

// refuse makes r the answer to a request that err ended.
func (r *Reply) refuse(err error) {
	r.Status = StatusIO
	for s, sentinel := range slices.Backward(sentinels[:]) {
		if sentinel != nil && errors.Is(err, sentinel) {
			r.Status = Status(s)
			break
		}
	}
	if errors.Is(err, ErrProtocol) {
		r.Status = StatusInvalid
	}
	text := err.Error()
	r.Message = text[:min(len(text), maxText)]
}

// Err is the error that a reply brings, nil for success.
func (r *Reply) Err() error {
	if r.Status == StatusOK {
		return nil
	}
	sentinel := error(syscall.EIO)
	if int(r.Status) < len(sentinels) {
		sentinel = sentinels[r.Status]
	}
	return fmt.Errorf("source answers %.*q: %w", maxText, r.Message, sentinel)
}

// Over is ctx's error, from its deadline on: a connection that has the same one may
// fail a moment before ctx says so.
func Over(ctx context.Context) error {
	if end, ok := ctx.Deadline(); ok && !time.Now().Before(end) {
		return context.DeadlineExceeded
	}
	return ctx.Err()
}

// Gone makes err of a transport one that matches region.ErrPeerGone, or ctx's own
// where it has ended.
func Gone(ctx context.Context, err error) error {
	if over := Over(ctx); over != nil {
		return over
	}
	return fmt.Errorf("%w: %w", region.ErrPeerGone, err)
}
