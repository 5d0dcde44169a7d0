package transport

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// Export is a region with a name.
type Export struct {
	Name  string
	Store region.Store
}

// Named is an Exports of several regions, in the order of the list. Where there
// is only one, the empty name means it too.
type Named []Export

// Open returns the region called name.
func (n Named) Open(name string) (region.Store, error) {
	for _, e := range n {
		if e.Name == name || name == "" && len(n) == 1 {
			return e.Store, nil
		}
	}
	return nil, fmt.Errorf("no region %q; valid: %s: %w", name, strings.Join(n.List(), ", "), region.ErrMissing)
}

// List returns the names.
func (n Named) List() []string {
	var names []string
	for _, e := range n {
		names = append(names, e.Name)
	}
	return names
}

// Accept calls handle, on a goroutine of its own, for each connection that l
// gives, as the limits allow, with a context that has the connection's Place;
// refused, unless nil, hears of those that they do not. handle
// closes its connection and returns soon after ctx ends. When ctx ends or l
// fails, Accept closes l, ends the context that handle got, and returns once
// all calls of handle have: nil at the end of ctx.
func Accept(ctx context.Context, l net.Listener, limits Limits, refused func(error), handle func(context.Context, net.Conn)) error {
	guard := NewGuard(limits)
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	var handlers sync.WaitGroup
	defer handlers.Wait()
	defer stop()
	defer cancel()
	places := make(chan struct{}, guard.l.Connections)
	for {
		select {
		case places <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		c, err := l.Accept()
		switch {
		case err == nil:
			place, err := guard.Enter(c.RemoteAddr())
			if err != nil {
				c.Close()
				<-places
				if refused != nil {
					refused(err)
				}
				continue
			}
			handlers.Go(func() {
				defer func() { <-places }()
				defer place.Leave()
				handle(WithPlace(ctx, place), c)
			})
			continue
		case ctx.Err() != nil:
			return nil
		}
		<-places
		// The connection's own trouble, or a lack that may pass (accept(2)).
		passing := false
		for _, no := range []error{unix.ECONNABORTED, unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.EPROTO} {
			passing = passing || errors.Is(err, no)
		}
		if !passing {
			return fmt.Errorf("accept connections on %v: %w", l.Addr(), err)
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return nil
		}
	}
}
