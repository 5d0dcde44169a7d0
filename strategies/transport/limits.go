package transport

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
)

// Limits are what a server grants those who connect to it. A peer is a host: all
// connections from one address, or all of a Unix socket. 0 is a field's default.
type Limits struct {
	Connections     int // at once; the next one waits in the kernel's queue; 128
	PeerConnections int // of one peer; one more is closed; 64
	// Memory is how many bytes of requests and replies the server holds at once: half
	// of it for those that are carried out and answered, the rest for those that are
	// being received. Who would need more waits. 64 MiB; PeerMemory is a peer's, 24 MiB.
	Memory     int64
	PeerMemory int64
	Request    int64         // bytes of data in one read or write; the most that the transport allows is its default
	Handshake  time.Duration // from the connection to the opening of a region; 10 s
	Stall      time.Duration // within a message that is being received or sent; 60 s
	Idle       time.Duration // without a request; 0: for ever, since who lost its network is noticed by TCP
}

// Bounds of Limits.
const (
	MinMemory  = 12 << 20
	MinRequest = 64 << 10
)

// ErrLimit is wrapped by errors of a peer that wants more than the Limits grant.
var ErrLimit = errors.New("over the server's limit")

// Defaults returns l with its zero fields as they will be; Request and Idle stay.
func (l Limits) Defaults() Limits {
	set := func(v *int64, d int64) {
		if *v == 0 {
			*v = d
		}
	}
	if l.Connections == 0 {
		l.Connections = 128
	}
	if l.PeerConnections == 0 {
		l.PeerConnections = 64
	}
	set(&l.Memory, 64<<20)
	set(&l.PeerMemory, min(24<<20, l.Memory))
	l.PeerMemory = min(l.PeerMemory, l.Memory)
	set((*int64)(&l.Handshake), int64(10*time.Second))
	set((*int64)(&l.Stall), int64(60*time.Second))
	return l
}

// Check returns an error that says which limit cannot be.
func (l Limits) Check() error {
	f := l.Defaults()
	switch {
	case f.Connections < 1 || f.Connections > 4096:
		return fmt.Errorf("%d connections: want 1 to 4096", f.Connections)
	case f.PeerConnections < 1 || f.PeerConnections > 4096:
		return fmt.Errorf("%d connections of one peer: want 1 to 4096", f.PeerConnections)
	case f.PeerMemory < MinMemory || f.Memory < f.PeerMemory || l.PeerMemory > f.Memory:
		return fmt.Errorf("memory of %d bytes, %d of one peer: want at least %d for a peer, and no more than in all", f.Memory, max(f.PeerMemory, l.PeerMemory), MinMemory)
	case f.Request != 0 && f.Request < MinRequest:
		return fmt.Errorf("requests of %d bytes: want at least %d", f.Request, MinRequest)
	case f.Handshake < 0 || f.Stall < 0 || f.Idle < 0:
		return fmt.Errorf("times of %v, %v and %v: want none below 0", f.Handshake, f.Stall, f.Idle)
	}
	return nil
}

// Guard holds a server to its Limits. Its methods may be called concurrently.
type Guard struct {
	l    Limits
	pool pools

	mu    sync.Mutex
	peers map[string]*peer
}

// What memory is for, and in which order one may wait for it while one has some.
const (
	ahead   = iota // what connections receive of requests before anybody has looked at them
	receive        // requests that are received whole
	work           // requests that are carried out and answered
	kinds
)

// pools are the parts of a memory.
type pools [kinds]*semaphore.Weighted

func newPools(n int64) (p pools) {
	for k := range p {
		p[k] = semaphore.NewWeighted(share(k, n))
	}
	return p
}

// share is the part of a memory of n bytes that is for kind.
func share(kind int, n int64) int64 { return n / [...]int64{ahead: 3, receive: 6, work: 2}[kind] }

type peer struct {
	name  string
	conns int // under Guard.mu
	pool  pools
}

// NewGuard returns a Guard for one server.
func NewGuard(l Limits) *Guard {
	l = l.Defaults()
	return &Guard{l: l, pool: newPools(l.Memory), peers: map[string]*peer{}}
}

// Place is what one connection may use of a server. Its methods may be called concurrently.
type Place struct {
	g   *Guard
	p   *peer
	end sync.Once
}

// Enter gives a connection its Place, or an error that matches ErrLimit where its
// peer has too many. Leave must be called when it has ended.
func (g *Guard) Enter(addr net.Addr) (*Place, error) {
	name := "" // Unix sockets have no address of the other side
	if addr != nil {
		if host, _, err := net.SplitHostPort(addr.String()); err == nil {
			name = host
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	p := g.peers[name]
	if p == nil {
		p = &peer{name: name, pool: newPools(g.l.PeerMemory)}
		g.peers[name] = p
	}
	if p.conns >= g.l.PeerConnections {
		return nil, fmt.Errorf("connection %d of %q, of which there may be %d: %w", p.conns+1, name, g.l.PeerConnections, ErrLimit)
	}
	p.conns++
	return &Place{g: g, p: p}, nil
}

// Leave gives the Place back. It may be called twice.
func (p *Place) Leave() {
	p.end.Do(func() {
		p.g.mu.Lock()
		defer p.g.mu.Unlock()
		if p.p.conns--; p.p.conns == 0 {
			delete(p.g.peers, p.p.name)
		}
	})
}

// Limits are those of the server, without a 0 but for Request and Idle.
func (p *Place) Limits() Limits { return p.g.l }

// Request is the most bytes of data in one request, of which the transport allows most.
func (p *Place) Request(most int64) int64 {
	if r := p.g.l.Request; r > 0 {
		return min(r, most)
	}
	return most
}

// Work waits for n bytes to carry out and answer a request; free gives them back. One
// request may have all that its peer has and then more, so that it is not refused.
func (p *Place) Work(ctx context.Context, n int64) (free func(), err error) {
	return p.take(ctx, work, n)
}

// Receive waits for n bytes of a request that is being received, to be held until Work
// has given what it then needs; never the other way round.
func (p *Place) Receive(ctx context.Context, n int64) (free func(), err error) {
	return p.take(ctx, receive, n)
}

func (p *Place) take(ctx context.Context, kind int, n int64) (func(), error) {
	n = min(n, share(kind, p.g.l.PeerMemory))
	own, all := p.p.pool[kind], p.g.pool[kind]
	if err := own.Acquire(ctx, n); err != nil {
		return nil, err
	}
	if err := all.Acquire(ctx, n); err != nil {
		own.Release(n)
		return nil, err
	}
	return func() { all.Release(n); own.Release(n) }, nil
}

// TryWork is Work that does not wait; free is nil where there is nothing.
func (p *Place) TryWork(n int64) (free func()) {
	return p.try(work, n)
}

// TryAhead takes n bytes for what the connection receives of requests that nobody has
// looked at; free is nil where there is nothing.
func (p *Place) TryAhead(n int64) (free func()) { return p.try(ahead, n) }

func (p *Place) try(kind int, n int64) func() {
	n = min(n, share(kind, p.g.l.PeerMemory))
	own, all := p.p.pool[kind], p.g.pool[kind]
	if !own.TryAcquire(n) {
		return nil
	}
	if !all.TryAcquire(n) {
		own.Release(n)
		return nil
	}
	return func() { all.Release(n); own.Release(n) }
}

// Lanes is how many connections of one peer may have n bytes each of requests that
// nobody has looked at.
func (l Limits) Lanes(n int64) int { return int(share(ahead, l.Defaults().PeerMemory) / n) }

type placeKey struct{}

// WithPlace returns a context for a Transport's Serve.
func WithPlace(ctx context.Context, p *Place) context.Context {
	return context.WithValue(ctx, placeKey{}, p)
}

// PlaceOf is the Place of the connection that is served with ctx, or one of a server of
// its own with the default Limits.
func PlaceOf(ctx context.Context) *Place {
	if p, ok := ctx.Value(placeKey{}).(*Place); ok {
		return p
	}
	p, _ := NewGuard(Limits{}).Enter(nil) // the first of its peer
	return p
}

// Identified is Exports of which a client sees what its certificate allows.
type Identified interface {
	Exports
	// As returns what the client called name may use; the empty name has no certificate.
	As(name string) Exports
}

// Identity is the name of a peer: the common name of its certificate, "" without one.
func Identity(s tls.ConnectionState) string {
	if len(s.PeerCertificates) == 0 {
		return ""
	}
	return s.PeerCertificates[0].Subject.CommonName
}

// As returns e as the client called name sees it: e itself where it is not Identified.
func As(e Exports, name string) Exports {
	if i, ok := e.(Identified); ok {
		return i.As(name)
	}
	return e
}
