package role

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"memsync/strategies/transport"
)

// acceptor is the listeners of a role and the connections that they took.
type acceptor struct {
	mu    sync.Mutex
	conns map[net.Conn]bool
	wg    sync.WaitGroup
	ls    []net.Listener
}

// sourceLimits are for peers that are the run's own: what is measured is not to be what
// they are granted. They still bound what a broken one can do.
var sourceLimits = transport.Limits{Connections: 4096, PeerConnections: 4096, Memory: 2 << 30, PeerMemory: 1 << 30, Request: 32 << 20}

// accept listens on a free TCP port of addr and calls serve for each connection.
func (a *acceptor) accept(ctx context.Context, role, addr string, serve func(net.Conn)) (string, error) {
	return a.acceptBy(ctx, nil, role, addr, func(_ context.Context, c net.Conn) { serve(c) })
}

// acceptBy is accept for the connections of a transport.
func (a *acceptor) acceptBy(ctx context.Context, t transport.Transport, role, addr string, serve func(context.Context, net.Conn)) (string, error) {
	l, err := transport.Listen(ctx, t, net.JoinHostPort(addr, "0"), sourceLimits)
	if err != nil {
		return "", err
	}
	a.ls = append(a.ls, l)
	guard := transport.NewGuard(sourceLimits)
	a.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				if !errors.Is(err, net.ErrClosed) {
					fmt.Fprintf(os.Stderr, "%s: accept: %v\n", role, err)
				}
				return
			}
			place, err := guard.Enter(c.RemoteAddr())
			if err != nil {
				fmt.Fprintf(os.Stderr, "%s: %v\n", role, err)
				c.Close()
				continue
			}
			a.mu.Lock()
			if a.conns == nil {
				a.conns = map[net.Conn]bool{}
			}
			a.conns[c] = true
			a.mu.Unlock()
			a.wg.Go(func() {
				defer func() {
					place.Leave()
					c.Close()
					a.mu.Lock()
					delete(a.conns, c)
					a.mu.Unlock()
				}()
				serve(transport.WithPlace(ctx, place), c)
			})
		}
	})
	return l.Addr().String(), nil
}

// close ends listeners and connections and waits for those who served them.
func (a *acceptor) close() (err error) {
	for _, l := range a.ls {
		err = errors.Join(err, l.Close())
	}
	a.ls = nil
	a.mu.Lock()
	for c := range a.conns {
		c.Close()
	}
	a.mu.Unlock()
	a.wg.Wait()
	return err
}
