package torture

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// link is the fault layer between a daemon and a source: it passes the bytes of
// connections on, each way, and does to them what it was told. It never does what
// TCP cannot do: bytes come in order, once, or not at all. It works on any pair of
// connections, on a clock that may be virtual.
//
// Half is what makes a cut hard: the near end learns at once, while what was already under
// way still reaches the far end, later, as after a reset by something in between.
type link struct {
	mu      sync.Mutex
	pairs   map[*pair]bool
	refused bool          // new connections are
	delay   time.Duration // one way
	stalled chan struct{} // closed to go on; nil where bytes pass
	cutIn   [2]int64      // bytes until a cut in the middle of a message; 0 is never. [0] is from the near end to the far one
	half    time.Duration // of that cut: how much later the far end learns of it
	flip    [2]int        // pieces to come of which a bit is flipped
}

// pair is a connection through the link.
type pair struct {
	near, far net.Conn
	once      sync.Once
}

var errRefused = errors.New("connection refused by the torture's link")

func newLink() *link { return &link{pairs: map[*pair]bool{}} }

// dial refuses a connection where it is told to, and takes the delay's time.
func (l *link) dial(ctx context.Context) error {
	l.mu.Lock()
	refused, d, stalled := l.refused, 2*l.delay, l.stalled
	l.mu.Unlock()
	if refused {
		return errRefused
	}
	if stalled != nil {
		select {
		case <-stalled:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return sleep(ctx, d)
}

// sleep waits for d or until ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// relay joins two connections, and closes both when either ends or the link is
// cut. It returns once nothing is left of them. Before what the far end says is passed
// on, it calls hold, unless that is nil.
func (l *link) relay(near, far net.Conn, hold func()) {
	p := &pair{near: near, far: far}
	l.mu.Lock()
	l.pairs[p] = true
	l.mu.Unlock()
	var both sync.WaitGroup
	both.Go(func() { l.pump(p, 0, near, far, nil) })
	both.Go(func() { l.pump(p, 1, far, near, hold) })
	both.Wait()
	_ = p.near.Close()
	_ = p.far.Close()
	l.mu.Lock()
	delete(l.pairs, p)
	l.mu.Unlock()
}

// piece is what was read at once.
type piece struct {
	data []byte
	due  time.Time
}

// pump passes on what from says until one of the two is closed.
func (l *link) pump(p *pair, way int, from, to net.Conn, hold func()) {
	queue := make(chan piece, 64) // what a path holds; a reader that is slower pushes back
	var writer sync.WaitGroup
	writer.Go(func() {
		defer to.Close()
		dead := false
		for q := range queue {
			if dead {
				continue
			}
			time.Sleep(time.Until(q.due))
			l.passable()
			if hold != nil {
				hold()
			}
			_, err := to.Write(q.data)
			dead = err != nil
		}
		l.passable() // the end of the stream is held up as its bytes are
	})
	buf := make([]byte, 16<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			data, cut := l.damage(way, append([]byte(nil), buf[:n]...))
			l.mu.Lock()
			q, half := piece{data, time.Now().Add(l.delay)}, l.half
			l.mu.Unlock()
			queue <- q
			if cut {
				l.cutPair(p, half)
				err = io.EOF
			}
		}
		if err != nil {
			break
		}
	}
	close(queue)
	writer.Wait()
	_ = from.Close()
}

// damage does to a piece what is due, and reports whether the connection ends behind it.
func (l *link) damage(way int, data []byte) (_ []byte, cut bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.flip[way] > 0 {
		l.flip[way]--
		data[len(data)/2] ^= 1 << (len(data) % 8)
	}
	if l.cutIn[way] > 0 {
		if l.cutIn[way] -= int64(len(data)); l.cutIn[way] <= 0 {
			data = data[:int64(len(data))+l.cutIn[way]]
			l.cutIn[way] = 0
			return data, true
		}
	}
	return data, false
}

// passable waits while the link is stalled.
func (l *link) passable() {
	for {
		l.mu.Lock()
		stalled := l.stalled
		l.mu.Unlock()
		if stalled == nil {
			return
		}
		<-stalled
	}
}

// cutPair ends a connection for its near end, and half later for its far end. What
// the link holds in the direction of the far end still gets there meanwhile.
func (l *link) cutPair(p *pair, half time.Duration) {
	p.once.Do(func() {
		_ = p.near.Close()
		if half <= 0 {
			_ = p.far.Close()
			return
		}
		// The end of the near one's stream would reach the far one behind what is
		// under way in any case; this is for a link that is stalled for longer.
		time.AfterFunc(half, func() { _ = p.far.Close() })
	})
}

// cut ends all connections that there are.
func (l *link) cut(half time.Duration) {
	l.mu.Lock()
	var all []*pair
	for p := range l.pairs {
		all = append(all, p)
	}
	l.mu.Unlock()
	for _, p := range all {
		l.cutPair(p, half)
	}
}

// cutAfter cuts the connection that carries the n-th byte from now on in a direction.
func (l *link) cutAfter(way int, n int64, half time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cutIn[way], l.half = n, half
}

// stall holds all bytes up until heal; it does not lose them.
func (l *link) stall() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stalled == nil {
		l.stalled = make(chan struct{})
	}
}

// pass ends a stall.
func (l *link) pass() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stalled != nil {
		close(l.stalled)
		l.stalled = nil
	}
}

// refuse says whether new connections are refused.
func (l *link) refuse(on bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refused = on
}

// slow sets the delay of bytes that come from now on.
func (l *link) slow(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.delay = d
}

// corrupt flips a bit in each of the next n pieces of a direction.
func (l *link) corrupt(way, n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.flip[way] = n
}

// heal makes the link good again: it passes, refuses and harms nothing. The delay stays.
func (l *link) heal() {
	l.pass()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refused, l.cutIn, l.flip = false, [2]int64{}, [2]int{}
}
