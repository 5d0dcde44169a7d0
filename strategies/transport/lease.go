package transport

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
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
	// Where writer says so (WriterOf), earlier openings of its user write no more, and what
	// they had begun to write has ended. The region must exist; the empty name is the first of List.
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
	// openings is the latest opening of each of its users that counts them.
	openings map[string]uint64

	writes  uint64            // that began or ended
	byEpoch map[uint32]uint64 // of these, by each writer
	written time.Time         // when the last of them did
}

// Grant is what one connection may do. Its methods may be called concurrently.
type Grant struct {
	l       *lease
	writer  string
	opening region.Opening
	epoch   uint32
	end     sync.Once
}

// WriterOf is what a client sends as its writer's name: o.Writer, and behind it which
// opening of its user this is (region.Opening), where ctx says that.
func WriterOf(ctx context.Context, o Options) string {
	n := region.OpeningOf(ctx)
	if o.Writer == "" || n.ID == "" {
		return o.Writer
	}
	return fmt.Sprintf("%s#%s.%d", o.Writer, n.ID, n.N)
}

// splitWriter undoes WriterOf.
func splitWriter(s string) (writer string, o region.Opening) {
	i := strings.LastIndexByte(s, '#')
	if i < 0 {
		return s, o
	}
	id, count, ok := strings.Cut(s[i+1:], ".")
	n, err := strconv.ParseUint(count, 10, 64)
	if !ok || id == "" || err != nil {
		return s, o
	}
	return s[:i], region.Opening{ID: id, N: n}
}

// maxOpenings bounds the users of one writer that count their openings.
const maxOpenings = 1024

// Lease implements Leaser.
func (l *Leases) Lease(name, writer string) (*Grant, error) {
	writer, o := splitWriter(writer)
	return l.of(name).grant(name, writer, o)
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

func (l *lease) grant(name, writer string, o region.Opening) (*Grant, error) {
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
			l.openings = map[string]uint64{}
			delete(l.byEpoch, l.epoch-maxEpochs)
		}
		if o.ID != "" {
			latest, known := l.openings[o.ID]
			switch {
			case o.N < latest:
				return nil, fmt.Errorf("region %q was opened again since, the %d. time: %w", name, latest, region.ErrNotPermitted)
			case !known && len(l.openings) >= maxOpenings:
				return nil, fmt.Errorf("region %q has been opened by %d users of one writer: %w", name, maxOpenings, region.ErrNotPermitted)
			}
			l.openings[o.ID] = o.N
		}
		l.conns++
	}
	return &Grant{l: l, writer: writer, opening: o, epoch: l.epoch}, nil
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
	late := !other && g.opening.ID != "" && g.l.openings[g.opening.ID] > g.opening.N
	epoch := g.l.epoch
	if !other && !late {
		g.count()
	}
	g.l.mu.Unlock()
	switch {
	case other:
		err = fmt.Errorf("another host has the lease to write, number %d: %w", epoch, region.ErrNotPermitted)
	case late:
		err = fmt.Errorf("a write of an earlier opening of the region, which was opened again since: %w", region.ErrNotPermitted)
	default:
		return g.done, nil
	}
	g.l.writing.RUnlock()
	return nil, err
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
