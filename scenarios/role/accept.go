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

// accept listens on a free TCP port of addr and calls serve for each connection.
func (a *acceptor) accept(ctx context.Context, role, addr string, serve func(net.Conn)) (string, error) {
	return a.acceptBy(ctx, nil, role, addr, serve)
}

// acceptBy is accept for the connections of a transport.
func (a *acceptor) acceptBy(ctx context.Context, t transport.Transport, role, addr string, serve func(net.Conn)) (string, error) {
	l, err := transport.Listen(ctx, t, net.JoinHostPort(addr, "0"))
	if err != nil {
		return "", err
	}
	a.ls = append(a.ls, l)
	a.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				if !errors.Is(err, net.ErrClosed) {
					fmt.Fprintf(os.Stderr, "%s: accept: %v\n", role, err)
				}
				return
			}
			a.mu.Lock()
			if a.conns == nil {
				a.conns = map[net.Conn]bool{}
			}
			a.conns[c] = true
			a.mu.Unlock()
			a.wg.Go(func() {
				defer func() {
					c.Close()
					a.mu.Lock()
					delete(a.conns, c)
					a.mu.Unlock()
				}()
				serve(c)
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
