package transport

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"memsync/strategies/region"
)

// Leaser is Exports that let one host write at a time.
type Leaser interface {
	Exports
	// Lease is asked once for each connection that opens the region called name.
	// writer names the host that wants to be the one writer, the same for all its
	// connections; it is empty for one that does not ask. Where another has the
	// lease, asking gives region.ErrNotPermitted. End ends the Grant.
	// The region must exist; the empty name is the first of List.
	Lease(name, writer string) (*Grant, error)
}

// Leases makes Exports a Leaser. A lease is held as long as its writer has a
// connection. It has an epoch, which counts the writers: whoever comes back and
// finds the same epoch knows that nobody wrote under a lease meanwhile.
//
// While somebody holds the lease, nobody else writes. While nobody does, who
// never asked may (foreign clients do not know how); from the moment that a
// lease is granted their writes are refused, and those under way have ended.
// Beside each region it offers its version (VersionSuffix), which counts the
// writes under its Grants, and what the region's store notices by itself (region.Versioner).
type Leases struct {
	Exports
	instance uint64
	mu       sync.Mutex
	m        map[string]*lease // by name
}

// NewLeases returns Leases of e, of which nobody has one.
func NewLeases(e Exports) *Leases {
	return &Leases{Exports: e, instance: rand.Uint64() | 1, m: map[string]*lease{}}
}

var _ Leaser = (*Leases)(nil)

type lease struct {
	writing sync.RWMutex // read-locked by writes
	mu      sync.Mutex
	writer  string // the last that had it
	conns   int    // that it has now
	epoch   uint32

	writes  uint64            // that began or ended
	byEpoch map[uint32]uint64 // of these, by each writer
	written time.Time         // when the last of them did
}

// Grant is what one connection may do. Its methods may be called concurrently.
type Grant struct {
	l      *lease
	writer string
	epoch  uint32
	end    sync.Once
}

// Lease implements Leaser.
func (l *Leases) Lease(name, writer string) (*Grant, error) {
	return l.of(name).grant(name, writer)
}

// of returns the lease of a region, which exists.
func (l *Leases) of(name string) *lease {
	if all := l.List(); name == "" && len(all) > 0 {
		name = all[0]
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.m[name]
	if e == nil {
		e = &lease{byEpoch: map[uint32]uint64{}}
		l.m[name] = e
	}
	return e
}

func (l *lease) grant(name, writer string) (*Grant, error) {
	if writer != "" {
		l.writing.Lock() // what others write has ended, or comes later and finds the lease taken
		defer l.writing.Unlock()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case writer == "":
	case l.conns > 0 && l.writer != writer:
		return nil, fmt.Errorf("region %q has a writer already, with lease %d: %w", name, l.epoch, region.ErrNotPermitted)
	default:
		if l.writer != writer {
			l.writer = writer
			l.epoch++
			delete(l.byEpoch, l.epoch-maxEpochs)
		}
		l.conns++
	}
	return &Grant{l: l, writer: writer, epoch: l.epoch}, nil
}

// Epoch counts the writers up to the one of this Grant. A nil Grant has 0.
func (g *Grant) Epoch() uint32 {
	if g == nil {
		return 0
	}
	return g.epoch
}

// Begin says that a write begins and returns what to call when it has ended, or
// region.ErrNotPermitted where another host has the lease. A nil Grant may write.
func (g *Grant) Begin() (end func(), err error) {
	if g == nil {
		return func() {}, nil
	}
	g.l.writing.RLock()
	g.l.mu.Lock()
	other := g.l.writer != g.writer && (g.writer != "" || g.l.conns > 0)
	epoch := g.l.epoch
	if !other {
		g.count()
	}
	g.l.mu.Unlock()
	if other {
		g.l.writing.RUnlock()
		return nil, fmt.Errorf("another host has the lease to write, number %d: %w", epoch, region.ErrNotPermitted)
	}
	return g.done, nil
}

func (g *Grant) done() {
	g.l.mu.Lock()
	g.count()
	g.l.mu.Unlock()
	g.l.writing.RUnlock()
}

// count counts a write, under mu: as it begins, so that whoever has seen its bytes
// sees it counted, and as it ends, so that whoever knew the count before sees a change.
func (g *Grant) count() {
	g.l.writes++
	if g.writer != "" {
		g.l.byEpoch[g.epoch]++
	}
	g.l.written = time.Now()
}

// End gives the Grant up. It may be called twice, and on a nil Grant.
func (g *Grant) End() {
	if g == nil || g.writer == "" {
		return
	}
	g.end.Do(func() {
		g.l.mu.Lock()
		defer g.l.mu.Unlock()
		g.l.conns--
	})
}

// With returns e with another way of opening, for a strategy that offers more than
// the regions. Where e is a Leaser it stays one: own names the region whose lease
// an export has.
func With(e Exports, open func(name string) (region.Store, error), own func(name string) string) Exports {
	d := derived{e, open}
	if l, ok := e.(Leaser); ok {
		return derivedLeaser{d, l, own}
	}
	return d
}

type derived struct {
	Exports
	open func(name string) (region.Store, error)
}

// Open implements Exports.
func (d derived) Open(name string) (region.Store, error) { return d.open(name) }

type derivedLeaser struct {
	derived
	l   Leaser
	own func(name string) string
}

var _ Leaser = derivedLeaser{}

// Lease implements Leaser.
func (d derivedLeaser) Lease(name, writer string) (*Grant, error) {
	return d.l.Lease(d.own(name), writer)
}
