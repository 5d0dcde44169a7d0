package relay

import (
	"context"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"memsync/strategies/region"
	"memsync/strategies/transport"
)

// meet says hello on c and waits for the answer, until ctx ends. It closes c where it fails.
func meet(ctx context.Context, c net.Conn, h hello) (err error) {
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() && err == nil {
			err = ctx.Err()
		}
		if err != nil {
			c.Close()
		}
	}()
	transport.TuneTCP(c)
	if _, err := c.Write(h.append(nil)); err != nil {
		return gone(ctx, err)
	}
	var a [1]byte
	if _, err := io.ReadFull(c, a[:]); err != nil {
		return gone(ctx, err)
	}
	return Answer(a[0]).err()
}

func gone(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return fmt.Errorf("the relay: %w: %w", region.ErrPeerGone, err)
}

// Dialer makes connections to whoever offers them under token at the relay that d reaches.
func Dialer(d transport.Dialer, token string) transport.Dialer {
	return transport.DialFunc(func(ctx context.Context) (net.Conn, error) {
		c, err := d.Dial(ctx)
		if err != nil {
			return nil, fmt.Errorf("dial the relay: %w", err)
		}
		if err := meet(ctx, c, hello{wants, token}); err != nil {
			return nil, err
		}
		return c, nil
	})
}

// ListenOptions say how a source offers connections at a relay.
type ListenOptions struct {
	Dialer transport.Dialer // to the relay
	Addr   net.Addr         // of the relay, for who asks the Listener
	Token  string
	Spare  int             // connections that are offered at once, so that as many can come together; 0 is 16
	Log    func(err error) // unless nil, hears of an offer that failed; it is made again
}

// Listener is a net.Listener of the connections that come by a relay. Those offered are
// made again when they are taken, have stood for too long, or the relay is gone, which is
// tried for again and again.
type Listener struct {
	o     ListenOptions
	came  chan net.Conn
	ctx   context.Context
	stop  context.CancelFunc
	works sync.WaitGroup
}

var _ net.Listener = (*Listener)(nil)

// Retry bounds the time between two attempts at a relay that is gone.
const retryFirst, retryMost = 50 * time.Millisecond, 2 * time.Second

// Listen begins to offer connections. Close must be called.
func Listen(o ListenOptions) *Listener {
	if o.Spare == 0 {
		o.Spare = 16
	}
	l := &Listener{o: o, came: make(chan net.Conn)}
	l.ctx, l.stop = context.WithCancel(context.Background())
	for range o.Spare {
		l.works.Go(l.offer)
	}
	return l
}

// offer offers one connection after another.
func (l *Listener) offer() {
	pause := retryFirst
	for l.ctx.Err() == nil {
		c, err := l.o.Dialer.Dial(l.ctx)
		if err == nil {
			err = meet(l.ctx, c, hello{offers, l.o.Token})
		}
		if err == nil {
			pause = retryFirst
			select {
			case l.came <- c:
			case <-l.ctx.Done():
				c.Close()
			}
			continue
		}
		if l.ctx.Err() != nil {
			return
		}
		if l.o.Log != nil {
			l.o.Log(err)
		}
		select {
		case <-time.After(pause):
		case <-l.ctx.Done():
		}
		pause = min(2*pause, retryMost)
	}
}

// Accept implements net.Listener.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.came:
		return c, nil
	case <-l.ctx.Done():
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener. Connections that were accepted go on.
func (l *Listener) Close() error {
	l.stop()
	l.works.Wait()
	return nil
}

// Addr is the relay's address.
func (l *Listener) Addr() net.Addr { return l.o.Addr }
