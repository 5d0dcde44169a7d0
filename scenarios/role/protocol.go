// Package role holds the three processes of a run (source, daemon, workload),
// what each can be asked to do, and the small protocol in which the runner asks.
// The protocol is written down in docs/role-protocol.md.
package role

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// Version is the role protocol's version. Both sides refuse another one.
const Version = 1

// limits of one message.
const (
	maxMessage = 16 << 20 // bytes of JSON
	maxFiles   = 4        // descriptors
)

// message is one frame: a request (ID, Op, Body) or its reply (ID, Error, Kind, Body).
type message struct {
	Version int             `json:"v"`
	ID      uint64          `json:"id"`
	Op      string          `json:"op,omitempty"`
	Body    json.RawMessage `json:"body,omitempty"`
	Error   string          `json:"error,omitempty"`
	Kind    string          `json:"kind,omitempty"` // of the error: see kinds
}

// kinds maps the sentinels to their names on the wire, so that errors.Is works
// across processes.
var kinds = []struct {
	name string
	err  error
}{
	{"mismatch", region.ErrMismatch}, {"not-supported", region.ErrNotSupported}, {"not-permitted", region.ErrNotPermitted},
	{"out-of-range", region.ErrOutOfRange}, {"read-only", region.ErrReadOnly}, {"peer-gone", region.ErrPeerGone},
	{"missing", region.ErrMissing}, {"closed", region.ErrClosed},
	{"deadline", context.DeadlineExceeded}, {"deadline", os.ErrDeadlineExceeded}, {"canceled", context.Canceled},
}

// RemoteError is an error that another role reported. It matches (errors.Is) the
// sentinel that the error matched there.
type RemoteError struct {
	Role, Op, Text string
	sentinel       error
}

func (e *RemoteError) Error() string { return e.Role + ": " + e.Op + ": " + e.Text }
func (e *RemoteError) Unwrap() error { return e.sentinel }

// Conn is one end of the role protocol: frames of a 4-byte big-endian length and
// that many bytes of JSON over a Unix stream socket; descriptors ride on the
// length (SCM_RIGHTS).
type Conn struct {
	c    *net.UnixConn
	role string // who is at the other end, for errors
	wmu  sync.Mutex
	next uint64
}

// newConn wraps one end of a socket pair. It takes over f.
func newConn(f *os.File, role string) (*Conn, error) {
	c, err := net.FileConn(f)
	f.Close()
	if err != nil {
		return nil, fmt.Errorf("role socket: %w", err)
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, errors.New("role socket: not a Unix socket")
	}
	return &Conn{c: u, role: role}, nil
}

// Close closes the connection.
func (c *Conn) Close() error { return c.c.Close() }

func (c *Conn) write(m message, files []*os.File) error {
	m.Version = Version
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(b) > maxMessage || len(files) > maxFiles {
		return fmt.Errorf("role message of %d bytes and %d descriptors: above the limit", len(b), len(files))
	}
	frame := binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(b)), uint32(len(b)))
	frame = append(frame, b...)
	var oob []byte
	if len(files) > 0 {
		var fds []int
		for _, f := range files {
			fds = append(fds, int(f.Fd()))
		}
		oob = unix.UnixRights(fds...)
	}
	c.wmu.Lock()
	defer c.wmu.Unlock()
	n, _, err := c.c.WriteMsgUnix(frame, oob, nil)
	if err == nil && n < len(frame) {
		_, err = c.c.Write(frame[n:])
	}
	return err
}

func (c *Conn) read() (m message, files []*os.File, err error) {
	defer func() {
		if err != nil {
			closeAll(files)
			files = nil
		}
	}()
	var head [4]byte
	oob := make([]byte, unix.CmsgSpace(maxFiles*4))
	n, oobn, _, _, err := c.c.ReadMsgUnix(head[:], oob)
	if err != nil {
		return m, nil, err
	}
	if n == 0 {
		return m, nil, io.EOF
	}
	if oobn > 0 {
		cms, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil {
			return m, nil, err
		}
		for _, cm := range cms {
			fds, err := unix.ParseUnixRights(&cm)
			if err != nil {
				return m, files, err
			}
			for _, fd := range fds {
				unix.CloseOnExec(fd)
				files = append(files, os.NewFile(uintptr(fd), "passed"))
			}
		}
	}
	if _, err := io.ReadFull(c.c, head[n:]); err != nil {
		return m, files, err
	}
	size := binary.BigEndian.Uint32(head[:])
	if size > maxMessage {
		return m, files, fmt.Errorf("role message of %d bytes: above the limit of %d", size, maxMessage)
	}
	b := make([]byte, size)
	if _, err := io.ReadFull(c.c, b); err != nil {
		return m, files, err
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return m, files, fmt.Errorf("role message: %w", err)
	}
	if m.Version != Version {
		return m, files, fmt.Errorf("role protocol version %d, want %d: both ends must be the same memsync", m.Version, Version)
	}
	return m, files, nil
}

// Call asks the role at the other end for op and decodes its answer into reply
// (nil to ignore it). Descriptors in files are passed along and stay the
// caller's; those that come back are the caller's too. Calls on one Conn must
// not overlap. When ctx ends first, the connection is of no further use.
func (c *Conn) Call(ctx context.Context, op string, body, reply any, files ...*os.File) ([]*os.File, error) {
	fail := func(err error) error {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		} else if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) {
			err = fmt.Errorf("the process ended: %w", region.ErrPeerGone)
		}
		return fmt.Errorf("%s: %s: %w", c.role, op, err)
	}
	b, err := json.Marshal(body)
	if err != nil {
		return nil, fail(err)
	}
	stop := context.AfterFunc(ctx, func() { _ = c.c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	c.next++
	if err := c.write(message{ID: c.next, Op: op, Body: b}, files); err != nil {
		return nil, fail(err)
	}
	m, got, err := c.read()
	if err != nil {
		return nil, fail(err)
	}
	if m.ID != c.next {
		closeAll(got)
		return nil, fail(fmt.Errorf("reply to request %d, want %d", m.ID, c.next))
	}
	if m.Error != "" {
		closeAll(got)
		e := &RemoteError{Role: c.role, Op: op, Text: m.Error}
		for _, k := range kinds {
			if k.name == m.Kind {
				e.sentinel = k.err
				break
			}
		}
		return nil, e
	}
	if reply != nil {
		if err := json.Unmarshal(m.Body, reply); err != nil {
			closeAll(got)
			return nil, fail(err)
		}
	}
	return got, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// handler answers one op. The files it is given are its own; those it returns
// are sent and stay its own.
type handler func(ctx context.Context, body json.RawMessage, files []*os.File) (reply any, out []*os.File, err error)

// serve answers requests one after another until the peer closes the socket,
// which cancels what is under way; then it returns.
func (c *Conn) serve(ops map[string]handler) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	type request struct {
		m     message
		files []*os.File
	}
	requests := make(chan request)
	errs := make(chan error, 1)
	go func() { // reads ahead, so that a runner that goes away is noticed at once
		defer cancel()
		for {
			m, files, err := c.read()
			if err != nil {
				errs <- err
				return
			}
			select {
			case requests <- request{m, files}:
			case <-ctx.Done():
				closeAll(files)
				return
			}
		}
	}()
	for {
		select {
		case err := <-errs:
			if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, unix.ECONNRESET) {
				return nil
			}
			return err
		case r := <-requests:
			reply := message{ID: r.m.ID}
			var out []*os.File
			h, ok := ops[r.m.Op]
			err := fmt.Errorf("unknown operation %q", r.m.Op)
			if ok {
				var v any
				v, out, err = h(ctx, r.m.Body, r.files)
				if err == nil {
					reply.Body, err = json.Marshal(v)
				}
			} else {
				closeAll(r.files)
			}
			if err != nil {
				reply.Error, out = err.Error(), nil
				for _, k := range kinds {
					if errors.Is(err, k.err) {
						reply.Kind = k.name
						break
					}
				}
			}
			if err := c.write(reply, out); err != nil {
				return err
			}
		}
	}
}

// on makes a handler of a function with typed arguments that passes no files.
func on[A, R any](f func(context.Context, A) (R, error)) handler {
	return func(ctx context.Context, body json.RawMessage, files []*os.File) (any, []*os.File, error) {
		closeAll(files)
		var a A
		if err := json.Unmarshal(body, &a); err != nil {
			return nil, nil, fmt.Errorf("arguments: %w", err)
		}
		r, err := f(ctx, a)
		return r, nil, err
	}
}

// none is the empty argument or reply.
type none struct{}

// monotonic returns CLOCK_MONOTONIC in nanoseconds: one clock for all processes of a host.
func monotonic() int64 {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &t)
	return t.Nano()
}
