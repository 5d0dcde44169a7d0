package torture

import (
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// newPipe returns the two ends of a connection in memory. Unlike net.Pipe, what is
// written waits in a buffer, as in a socket's, and here without a limit: a writer that waited
// while it holds a lock would keep a virtual clock from going on, since who waits
// for a sync.Mutex counts as running (package testing/synctest).
func newPipe() (a, b net.Conn) {
	x, y := newStream(), newStream()
	return &end{in: x, out: y}, &end{in: y, out: x}
}

// stream is one direction.
type stream struct {
	mu      sync.Mutex
	b       []byte
	closed  bool // by its writer: what is there can still be read
	dead    bool // by its reader
	changed chan struct{}
}

func newStream() *stream { return &stream{changed: make(chan struct{})} }

// wake is called with mu held.
func (s *stream) wake() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// end is one end. Its deadline is of reads: writes do not wait.
type end struct {
	in, out *stream

	mu       sync.Mutex
	deadline time.Time
	moved    chan struct{} // closed when deadline is set; nil: nobody waits
}

func (e *end) Read(p []byte) (int, error) {
	for {
		e.mu.Lock()
		deadline := e.deadline
		if e.moved == nil {
			e.moved = make(chan struct{})
		}
		moved := e.moved
		e.mu.Unlock()
		e.in.mu.Lock()
		changed := e.in.changed
		switch {
		case e.in.dead:
			e.in.mu.Unlock()
			return 0, net.ErrClosed
		case !deadline.IsZero() && !time.Now().Before(deadline):
			e.in.mu.Unlock()
			return 0, os.ErrDeadlineExceeded
		case len(e.in.b) > 0 || len(p) == 0:
			n := copy(p, e.in.b)
			e.in.b = e.in.b[n:]
			if len(e.in.b) == 0 {
				e.in.b = nil
			}
			e.in.mu.Unlock()
			return n, nil
		case e.in.closed:
			e.in.mu.Unlock()
			return 0, io.EOF
		}
		e.in.mu.Unlock()
		var late <-chan time.Time
		var t *time.Timer
		if !deadline.IsZero() {
			t = time.NewTimer(time.Until(deadline))
			late = t.C
		}
		select {
		case <-changed:
		case <-moved:
		case <-late:
		}
		if t != nil {
			t.Stop()
		}
	}
}

func (e *end) Write(p []byte) (int, error) {
	e.out.mu.Lock()
	defer e.out.mu.Unlock()
	switch {
	case e.out.closed:
		return 0, net.ErrClosed
	case e.out.dead:
		return 0, io.ErrClosedPipe
	}
	e.out.b = append(e.out.b, p...)
	e.out.wake()
	return len(p), nil
}

func (e *end) Close() error {
	e.out.mu.Lock()
	if !e.out.closed {
		e.out.closed = true
		e.out.wake()
	}
	e.out.mu.Unlock()
	e.in.mu.Lock()
	defer e.in.mu.Unlock()
	if !e.in.dead {
		e.in.dead, e.in.b = true, nil
		e.in.wake()
	}
	return nil
}

func (e *end) SetReadDeadline(t time.Time) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.deadline = t
	if e.moved != nil {
		close(e.moved)
		e.moved = nil
	}
	return nil
}

func (e *end) SetDeadline(t time.Time) error    { return e.SetReadDeadline(t) }
func (e *end) SetWriteDeadline(time.Time) error { return nil }
func (e *end) LocalAddr() net.Addr              { return memory{} }
func (e *end) RemoteAddr() net.Addr             { return memory{} }

// memory is the address of a connection in memory.
type memory struct{}

func (memory) Network() string { return "memory" }
func (memory) String() string  { return "memory" }
