// Package relay joins two hosts that cannot reach each other: both dial out to a relay,
// which joins their connections as one stream of bytes each. It knows a meeting by its
// token and nothing of what is said there: under TLS between the two, it can drop or
// delay bytes, and no more.
//
// A side begins with a hello: "MSRELAY1", its kind (1 offers a connection, as a source
// does; 2 wants one), the token's length and the token. The relay answers with one byte
// of Answer when the two are joined, or when that cannot be. What follows is the peer's.
package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"memsync/strategies/region"
	"memsync/strategies/transport"
)

const (
	magic    = "MSRELAY1"
	headSize = len(magic) + 2
	// MinToken and MaxToken bound a token, in bytes: who knows it can take part.
	MinToken, MaxToken = 16, 64
)

// The kinds of sides.
const (
	offers = 1
	wants  = 2
)

// Answer is the relay's one byte.
type Answer byte

// The answers.
const (
	Joined  Answer = iota
	Nobody         // came in time
	TooMany        // connections wait or are joined
	Refused        // a hello that is none
)

func (a Answer) err() error {
	switch a {
	case Joined:
		return nil
	case Nobody:
		return fmt.Errorf("%w: %w", ErrNobody, region.ErrPeerGone)
	case TooMany:
		return fmt.Errorf("the relay: %w", transport.ErrLimit)
	case Refused:
		return fmt.Errorf("the relay does not understand: %w", region.ErrMismatch)
	}
	return fmt.Errorf("the relay answers %d: %w", byte(a), region.ErrMismatch)
}

// ErrNobody is wrapped where the other side of a meeting did not come in time.
var ErrNobody = errors.New("the relay knows of nobody on the other side")

// CheckToken returns an error unless a token can be one.
func CheckToken(token string) error {
	if len(token) < MinToken || len(token) > MaxToken {
		return fmt.Errorf("token of %d bytes: want %d to %d", len(token), MinToken, MaxToken)
	}
	return nil
}

// hello is what a side says first.
type hello struct {
	kind  byte
	token string
}

func (h hello) append(b []byte) []byte {
	return append(append(append(b, magic...), h.kind, byte(len(h.token))), h.token...)
}

var errHello = errors.New("no relay's hello")

func readHello(r io.Reader) (h hello, err error) {
	var b [headSize + MaxToken]byte
	if _, err := io.ReadFull(r, b[:headSize]); err != nil {
		return h, fmt.Errorf("%w: %w", errHello, err)
	}
	h.kind = b[headSize-2]
	n := int(b[headSize-1])
	if string(b[:len(magic)]) != magic || h.kind != offers && h.kind != wants || n < MinToken || n > MaxToken {
		return h, errHello
	}
	token := b[headSize : headSize+n]
	if _, err := io.ReadFull(r, token); err != nil {
		return h, fmt.Errorf("%w: %w", errHello, err)
	}
	h.token = string(token)
	return h, nil
}

// Limits are what a relay grants. The zero value of each field is its default.
type Limits struct {
	Sessions int           // pairs that are joined at once; 256
	Waiting  int           // connections that wait, in all; 1024
	Meeting  int           // of those, of one token and side; 32
	Hello    time.Duration // for a hello; 10 s
	Want     time.Duration // how long who wants a connection waits for an offer; 10 s
	Offer    time.Duration // how long an offer stands; then it is made anew; 10 min
	Idle     time.Duration // without a byte in either direction; 0: for ever
	Buffer   int64         // bytes of a direction that are held; 64 KiB
}

func (l Limits) full() Limits {
	set := func(p *time.Duration, d time.Duration) {
		if *p == 0 {
			*p = d
		}
	}
	count := func(p *int, d int) {
		if *p == 0 {
			*p = d
		}
	}
	count(&l.Sessions, 256)
	count(&l.Waiting, 1024)
	count(&l.Meeting, 32)
	set(&l.Hello, 10*time.Second)
	set(&l.Want, 10*time.Second)
	set(&l.Offer, 10*time.Minute)
	if l.Buffer == 0 {
		l.Buffer = 64 << 10
	}
	return l
}

// Relay joins connections. Its methods may be called concurrently.
type Relay struct {
	l Limits

	mu      sync.Mutex
	waiting map[hello][]*waiter
	waits   int

	sessions                                 atomic.Int64
	joined, unmet, refused, limited, carried atomic.Int64
}

// waiter is a connection that waits for its other side.
type waiter struct {
	c    net.Conn
	came chan *session // gets at most one
}

// session is the other side of a waiter.
type session struct {
	c     net.Conn
	ended chan struct{}
}

// New returns a Relay.
func New(l Limits) *Relay { return &Relay{l: l.full(), waiting: map[hello][]*waiter{}} }

// Counters returns what the relay did, by name.
func (r *Relay) Counters() map[string]int64 {
	r.mu.Lock()
	waits := int64(r.waits)
	r.mu.Unlock()
	return map[string]int64{"sessions": r.sessions.Load(), "waiting": waits, "joined_sessions": r.joined.Load(), "unmet_connections": r.unmet.Load(),
		"refused_connections": r.refused.Load(), "limited_connections": r.limited.Load(), "relayed_bytes": r.carried.Load()}
}

// Handle takes one connection and returns when it has ended. It closes c, soon after
// ctx ends. Its error says what was wrong with the hello; that nobody came is none.
func (r *Relay) Handle(ctx context.Context, c net.Conn) error {
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	transport.TuneTCP(c)
	_ = c.SetDeadline(time.Now().Add(r.l.Hello))
	h, err := readHello(c)
	if err != nil {
		r.refused.Add(1)
		_, _ = c.Write([]byte{byte(Refused)})
		return err
	}
	_ = c.SetDeadline(time.Time{})
	mine, w, answer := r.meet(h, c)
	switch {
	case answer != Joined:
		r.limited.Add(1)
		return r.say(c, answer)
	case mine != nil:
		<-mine.ended // by the waiter's Handle, which hears of the end of c
		return nil
	}
	return r.wait(ctx, h, w)
}

// meet takes the other side of a meeting, or a place to wait for it.
func (r *Relay) meet(h hello, c net.Conn) (*session, *waiter, Answer) {
	other := hello{offers + wants - h.kind, h.token}
	r.mu.Lock()
	defer r.mu.Unlock()
	if list := r.waiting[other]; len(list) > 0 {
		if r.sessions.Load() >= int64(r.l.Sessions) {
			return nil, nil, TooMany
		}
		r.sessions.Add(1)
		s := &session{c, make(chan struct{})}
		first := list[0]
		r.remove(other, first)
		first.came <- s
		return s, nil, Joined
	}
	if r.waits >= r.l.Waiting || len(r.waiting[h]) >= r.l.Meeting {
		return nil, nil, TooMany
	}
	w := &waiter{c, make(chan *session, 1)}
	r.waiting[h] = append(r.waiting[h], w)
	r.waits++
	return nil, w, Joined
}

// remove takes w off the list, and says whether it was there. Under mu.
func (r *Relay) remove(h hello, w *waiter) bool {
	i := slices.Index(r.waiting[h], w)
	if i < 0 {
		return false
	}
	r.waits--
	if r.waiting[h] = slices.Delete(r.waiting[h], i, i+1); len(r.waiting[h]) == 0 {
		delete(r.waiting, h)
	}
	return true
}

func (r *Relay) say(c net.Conn, a Answer) error {
	_ = c.SetWriteDeadline(time.Now().Add(r.l.Hello))
	_, err := c.Write([]byte{byte(a)})
	_ = c.SetWriteDeadline(time.Time{})
	return err
}

// wait returns when the connection's session has ended, or nobody came in time, or it
// hangs up meanwhile.
func (r *Relay) wait(ctx context.Context, h hello, w *waiter) error {
	long := r.l.Want
	if h.kind == offers {
		long = r.l.Offer
	}
	// Until it is joined a side says nothing: a read ends with the connection, or by a deadline.
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		_, _ = w.c.Read(make([]byte, 1))
	}()
	t := time.NewTimer(long)
	defer t.Stop()
	var s *session
	left := false
	select {
	case s = <-w.came:
	case <-t.C:
	case <-ctx.Done():
	case <-gone:
		left = true
	}
	_ = w.c.SetReadDeadline(time.Unix(1, 0))
	<-gone
	_ = w.c.SetReadDeadline(time.Time{})
	if s == nil {
		r.mu.Lock()
		waits := r.remove(h, w)
		r.mu.Unlock()
		if waits {
			r.unmet.Add(1)
			if left {
				return nil
			}
			return r.say(w.c, Nobody)
		}
		s = <-w.came // at that moment
	}
	defer close(s.ended)
	defer r.sessions.Add(-1)
	defer s.c.Close()
	if left {
		return r.say(s.c, Nobody)
	}
	if err := errors.Join(r.say(w.c, Joined), r.say(s.c, Joined)); err != nil {
		return nil // one of them has left
	}
	r.joined.Add(1)
	r.join(w.c, s.c)
	return nil
}

// join copies both ways until one side fails or both have ended. The end of one
// direction is passed on, and the other goes on.
func (r *Relay) join(a, b net.Conn) {
	var wg sync.WaitGroup
	var last atomic.Int64 // when a byte came
	last.Store(time.Now().UnixNano())
	one := func(to, from net.Conn) {
		if err := r.carry(to, from, &last); err != nil {
			a.Close()
			b.Close()
			return
		}
		if c, ok := to.(interface{ CloseWrite() error }); !ok || c.CloseWrite() != nil {
			to.Close()
		}
	}
	wg.Go(func() { one(a, b) })
	wg.Go(func() { one(b, a) })
	wg.Wait()
}

// carry copies bytes until from ends (nil). It holds no more than a buffer of them.
func (r *Relay) carry(to, from net.Conn, last *atomic.Int64) error {
	b := make([]byte, r.l.Buffer)
	for {
		if r.l.Idle > 0 {
			_ = from.SetReadDeadline(time.Unix(0, last.Load()).Add(r.l.Idle))
		}
		n, err := from.Read(b)
		if n > 0 {
			last.Store(time.Now().UnixNano())
			r.carried.Add(int64(n))
			if _, err := to.Write(b[:n]); err != nil {
				return err
			}
		}
		switch {
		case err == io.EOF:
			return nil
		case errors.Is(err, os.ErrDeadlineExceeded) && time.Since(time.Unix(0, last.Load())) < r.l.Idle: // the other way goes on
		case err != nil:
			return err
		}
	}
}
