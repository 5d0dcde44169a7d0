package torture

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"memsync/strategies"
	"memsync/strategies/all"
	"memsync/strategies/backend"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/transport"
	"memsync/strategies/transport/cert"
)

// virtual is the world of a program in one process: the strategy's Mount without a
// device, its Serve, and a transport between them over connections in memory. It
// must run in a bubble of testing/synctest, where waiting costs nothing.
type virtual struct {
	p        Program
	rng      *rand.Rand
	known    strategies.Registry
	strategy strategies.Strategy
	dir      string // scratch
	link     *link
	disk     *disk
	backing  region.Store // below disk; nil where it has the bytes itself
	tr       transport.Transport

	mu       sync.Mutex
	source   *virtualSource // nil while it is down
	resume   chan struct{}  // closed once a paused source goes on; nil where it runs
	mount    strategies.Mount
	front    region.Store
	stop     context.CancelFunc // ends what the mount has of the world: its connections, for good
	mounts   int
	accesses sync.WaitGroup // under way
	relays   sync.WaitGroup
	timers   sync.WaitGroup // of faults that end by themselves
	over     chan struct{}  // closed by end
	healed   chan struct{}  // closed by heal: then such a fault ends at once
}

// virtualSource is a life of the source.
type virtualSource struct {
	exports transport.Exports
	ctx     context.Context
	cancel  context.CancelFunc
	conns   map[net.Conn]bool
	serving sync.WaitGroup
}

var virtualLimits = limits{access: 30 * time.Second, slack: 100 * time.Millisecond, recover: 5 * time.Minute}

func newVirtual(ctx context.Context, p Program, known strategies.Registry, scratch string) (_ *virtual, err error) {
	v := &virtual{p: p, known: known, rng: rand.New(rand.NewPCG(p.Seed, 1)), link: newLink(), over: make(chan struct{}), healed: make(chan struct{})}
	if v.strategy, err = known.Get(p.Strategy); err != nil {
		return nil, err
	}
	if v.dir, err = os.MkdirTemp(scratch, "program-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(v.dir))
		}
	}()
	if p.Kept {
		if err := os.Mkdir(v.cacheDir(), 0o700); err != nil {
			return nil, err
		}
	}
	if p.Backend == "memory" {
		v.disk = newDisk(p.content(), p.Size)
	} else {
		sub := filepath.Join(v.dir, "backend")
		if err := os.Mkdir(sub, 0o700); err != nil {
			return nil, err
		}
		if v.backing, err = backend.Open(ctx, backend.Spec{Backend: p.Backend, Size: p.Size, Chunk: p.Chunk, Content: p.content()}, sub); err != nil {
			return nil, err
		}
		v.disk = newDiskOn(v.backing)
	}
	var security transport.TLS
	if p.TLS {
		if security, err = identities(filepath.Join(v.dir, "certificates")); err != nil {
			return nil, err
		}
	}
	if v.tr, err = all.SecureTransport(p.Transport, security); err != nil {
		return nil, err
	}
	v.start()
	return v, nil
}

// identities makes certificates for a source at 127.0.0.1 and its daemon.
func identities(dir string) (t transport.TLS, err error) {
	a, err := cert.OpenAuthority(dir, 1000*time.Hour)
	if err != nil {
		return t, err
	}
	for _, name := range []string{cert.Server, cert.Client} {
		if _, err := a.Issue(name, []string{"127.0.0.1"}, 1000*time.Hour); err != nil {
			return t, err
		}
	}
	if t.Server, err = cert.ServerConfig(dir); err != nil {
		return t, err
	}
	t.Client, err = cert.ClientConfig(dir, "127.0.0.1")
	return t, err
}

func (v *virtual) cacheDir() string { return filepath.Join(v.dir, "cache") }

// start begins a life of the source.
func (v *virtual) start() {
	ctx, cancel := context.WithCancel(context.Background())
	s := &virtualSource{exports: transport.NewLeases(transport.One{Name: "region", Store: v.disk}), ctx: ctx, cancel: cancel, conns: map[net.Conn]bool{}}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.source = s
}

// pausing is a connection of a source that can be stopped, as by SIGSTOP: what comes in
// meanwhile waits. What it answers then to what came before is held up by the link.
type pausing struct {
	net.Conn
	v *virtual
}

func (c pausing) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.v.running()
	return n, err
}

// running waits while the source is paused.
func (v *virtual) running() {
	v.mu.Lock()
	r := v.resume
	v.mu.Unlock()
	if r != nil {
		<-r
	}
}

// dial makes a connection to the source, through the link, for one life of the mount.
func (v *virtual) dial(ctx, life context.Context, values param.Values) (net.Conn, error) {
	if err := v.link.dial(ctx); err != nil {
		return nil, err
	}
	if life.Err() != nil {
		return nil, region.ErrPeerGone // the daemon is dead
	}
	v.mu.Lock()
	s := v.source
	if s == nil {
		v.mu.Unlock()
		return nil, errRefused
	}
	near, a := newPipe()
	b, far := newPipe()
	s.conns[far] = true
	v.relays.Go(func() { v.link.relay(a, b, v.running) })
	s.serving.Go(func() {
		// Its end is the daemon's business: connections break while a program runs.
		_ = v.strategy.Serve(s.ctx, v.tr, pausing{far, v}, s.exports, values)
		_ = far.Close()
		v.mu.Lock()
		delete(s.conns, far)
		v.mu.Unlock()
	})
	v.mu.Unlock()
	context.AfterFunc(life, func() { _ = near.Close() })
	return near, nil
}

// virtualRemote is strategies.Remote for one life of the mount.
type virtualRemote struct {
	v      *virtual
	life   context.Context
	writer string
	params param.Values
}

func (r virtualRemote) options() transport.Options {
	o := all.TransportOptions(r.params)
	o.Name, o.Writer = "region", r.writer
	return o
}

func (r virtualRemote) dialer() transport.Dialer {
	return transport.DialFunc(func(ctx context.Context) (net.Conn, error) { return r.v.dial(ctx, r.life, r.params) })
}

// opening bounds an opening that nobody else does.
const opening = 20 * time.Second

func (r virtualRemote) Open(ctx context.Context) (region.Store, error) {
	ctx, cancel := context.WithTimeout(ctx, opening)
	defer cancel()
	return r.v.tr.Open(ctx, r.dialer(), r.options())
}

func (r virtualRemote) OpenBeside(ctx context.Context, suffix string, writable bool) (region.Store, error) {
	ctx, cancel := context.WithTimeout(ctx, opening)
	defer cancel()
	o := r.options()
	o.Name, o.Connections, o.ReadOnly, o.Writer, o.Together = o.Name+suffix, 1, !writable, "", true
	return r.v.tr.Open(ctx, r.dialer(), o)
}

func (r virtualRemote) Dial(ctx context.Context) (net.Conn, error) { return r.dialer().Dial(ctx) }

func (v *virtual) open(ctx context.Context) error {
	settings := append([]string(nil), v.p.Settings...)
	if v.p.Kept {
		settings = append(settings, "cache_dir="+v.cacheDir())
	}
	values, err := param.New(all.Specs(v.strategy, "", v.p.Transport, "memory"), settings)
	if err != nil {
		return err
	}
	v.mounts++
	scratch := filepath.Join(v.dir, fmt.Sprint("mount-", v.mounts))
	if err := os.Mkdir(scratch, 0o700); err != nil {
		return err
	}
	life, stop := context.WithCancel(context.Background())
	r := virtualRemote{v, life, fmt.Sprint("writer ", v.mounts), values}
	var front region.Store
	m, err := v.strategy.Mount(ctx, r, strategies.Options{
		Chunk: v.p.Chunk, PullWorkers: v.p.Pull, PushWorkers: v.p.Push, Dir: scratch, Reopen: true, Params: values,
		Front: func(s region.Store) { front = s },
	})
	if err != nil {
		stop()
		return err
	}
	if v.mounts > 1 {
		// What the one before pushed and did not flush is what this one reads, and it
		// owes nobody to flush that.
		if err := v.disk.Flush(ctx); err != nil {
			stop()
			return errors.Join(err, m.Close(ctx))
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.mount, v.front, v.stop = m, front, stop
	return nil
}

// opened begins an access, which ends by done.
func (v *virtual) opened() (m strategies.Mount, front region.Store, done func(), err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.mount == nil {
		return nil, nil, nil, fmt.Errorf("the daemon is dead: %w", region.ErrClosed)
	}
	v.accesses.Add(1)
	return v.mount, v.front, v.accesses.Done, nil
}

func (v *virtual) read(ctx context.Context, p []byte, off int64) error {
	_, f, done, err := v.opened()
	if err != nil {
		return err
	}
	defer done()
	return f.ReadAt(ctx, p, off)
}

func (v *virtual) write(ctx context.Context, p []byte, off int64) error {
	_, f, done, err := v.opened()
	if err != nil {
		return err
	}
	defer done()
	return f.WriteAt(ctx, p, off)
}

func (v *virtual) sync(ctx context.Context) error {
	m, _, done, err := v.opened()
	if err != nil {
		return err
	}
	defer done()
	return m.Sync(ctx)
}

func (v *virtual) take() (strategies.Mount, context.CancelFunc) {
	v.mu.Lock()
	defer v.mu.Unlock()
	m, stop := v.mount, v.stop
	v.mount, v.front = nil, nil
	return m, stop
}

func (v *virtual) close(ctx context.Context) error {
	m, stop := v.take()
	if m == nil {
		return nil
	}
	defer stop()
	return m.Close(ctx)
}

// killDaemon takes the world away from the mount: from one moment to the next, nothing
// that it does has an effect any more. Then it may fall apart.
func (v *virtual) killDaemon(ctx context.Context) error {
	m, stop := v.take()
	if m == nil {
		return nil
	}
	stop()
	v.accesses.Wait() // a process that is dead makes none; these fail, or find what they want in the cache
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_ = m.Close(ctx) // it cannot write anything back
	return nil
}

// crash ends the source.
func (v *virtual) crash() {
	v.mu.Lock()
	s := v.source
	v.source = nil
	if s != nil {
		for c := range s.conns {
			_ = c.Close()
		}
	}
	v.mu.Unlock()
	if s == nil {
		return
	}
	s.cancel()
	s.serving.Wait() // a process that is gone does nothing more
	v.disk.crash(v.rng)
}

// for_ does something that a heal, the end, or the time undoes.
func (v *virtual) during(d time.Duration, undo func()) {
	v.mu.Lock()
	healed := v.healed
	v.mu.Unlock()
	v.timers.Go(func() {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-t.C:
		case <-healed:
		case <-v.over:
		}
		undo()
	})
}

func (v *virtual) fault(s Step) error {
	switch s.Op {
	case opCut:
		v.link.cut(s.For)
	case opCutAfter:
		v.link.cutAfter(s.Way, s.N, s.For)
	case opStall:
		v.link.stall()
		v.during(s.For, v.link.pass)
	case opRefuse:
		v.link.refuse(true)
		v.during(s.For, func() { v.link.refuse(false) })
	case opDelay:
		v.link.slow(s.For)
	case opCorrupt:
		v.link.corrupt(s.Way, int(s.N))
	case opFail:
		v.disk.fail(s.How, s.Err, s.N)
	case opPauseSource:
		v.mu.Lock()
		if v.resume != nil {
			v.mu.Unlock()
			return nil
		}
		r := make(chan struct{})
		v.resume = r
		v.mu.Unlock()
		v.during(s.For, func() {
			v.mu.Lock()
			v.resume = nil
			v.mu.Unlock()
			close(r)
		})
	case opKillSource:
		v.mu.Lock()
		up, paused := v.source != nil, v.resume != nil
		v.mu.Unlock()
		if !up || paused {
			return nil
		}
		v.crash()
		v.during(s.For, v.start)
	default:
		return fmt.Errorf("a program in one process has no %q", s.Op)
	}
	return nil
}

func (v *virtual) heal(context.Context) error {
	v.link.heal()
	v.disk.heal()
	v.mu.Lock()
	close(v.healed)
	v.healed = make(chan struct{})
	v.mu.Unlock()
	v.timers.Wait()
	return nil
}

func (v *virtual) stored(ctx context.Context) ([]byte, error) { return v.disk.stored(ctx) }

// end takes all down. What is left then of goroutines, the bubble tells.
func (v *virtual) end() error {
	if m, stop := v.take(); m != nil {
		stop()
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = m.Close(ctx) // after a failure
	}
	close(v.over)
	v.link.heal()
	v.timers.Wait()
	v.crash()
	v.link.cut(0)
	v.relays.Wait()
	var errs []error
	if v.backing != nil {
		errs = append(errs, v.backing.Close())
	}
	if err := errors.Join(errs...); err != nil {
		return broken(nothingLeft, "close the backend: %w", err)
	}
	left, err := filepath.Glob(filepath.Join(v.dir, "mount-*", "*"))
	if err != nil {
		return err
	}
	if len(left) > 0 {
		return broken(nothingLeft, "%d files in the scratch folder of a mount that was closed, such as %s", len(left), filepath.Base(left[0]))
	}
	return os.RemoveAll(v.dir)
}

var (
	_ world             = (*virtual)(nil)
	_ strategies.Remote = virtualRemote{}
	_ strategies.Beside = virtualRemote{}
	_ io.Closer         = pausing{}
)
