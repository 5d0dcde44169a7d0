package torture

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"memsync/scenarios/role"
	"memsync/strategies"
	"memsync/strategies/all"
	"memsync/strategies/backend"
	"memsync/strategies/region"
)

// processLimits: a fault lasts a second and a half at most, but several may follow one
// another, and the machine may be busy. A QUIC source learns that a daemon was killed from
// its silence only, and holds its lease until then. One access at a time: a role does one thing after another.
var processLimits = limits{access: 40 * time.Second, slack: 10 * time.Second, recover: 150 * time.Second, alone: true}

// available returns the combinations that work here, and why others do not.
func available(o Options) (combos []Combo, missing map[string]string, err error) {
	missing = map[string]string{}
	tried := map[string]error{}
	for _, s := range o.Known {
		info := s.Info()
		if o.Only.Strategy != "" && o.Only.Strategy != info.Name {
			continue
		}
		if why := notAProgram(s); why != "" {
			missing[info.Name] = why
			continue
		}
		for _, d := range info.Devices {
			if _, ok := tried[d]; !ok {
				tried[d] = all.ProbeDevice(d)
			}
			if tried[d] != nil {
				if o.Only.Takes(Combo{info.Name, d, o.Only.Transport, o.Only.Backend}) {
					missing[info.Name+"/"+d] = tried[d].Error()
				}
				continue
			}
			for _, t := range all.TransportNames() {
				if len(info.Transports) > 0 && info.Transports[0] != t {
					continue
				}
				for _, b := range backend.Names() {
					c := Combo{info.Name, d, t, b}
					switch {
					case !o.Only.Takes(c):
					case backend.NeedsService(b):
						missing["*/*/*/"+b] = "a server outside of the campaign; its faults are those of docs/backends.md"
					default:
						combos = append(combos, c)
					}
				}
			}
		}
	}
	return combos, missing, nil
}

// notAProgram says why a strategy has no programs here; empty where it has.
func notAProgram(s strategies.Strategy) string {
	info := s.Info()
	_, own := s.(strategies.Listener)
	switch {
	case info.Can(strategies.LocalOnly):
		return "its region is on this host: no link, no source"
	case own:
		return "its source is another project's program"
	case info.Can(strategies.Migrates), info.Can(strategies.Follows):
		return "its region is written at the source; see the tests of its package and level machines"
	case info.Can(strategies.Snapshots):
		return "its region is a program's own; see the tests of its package"
	case !info.Can(strategies.Reads):
		return "its region cannot be read"
	}
	return ""
}

// processes runs programs with real processes, one at a time.
func (c *campaign) processes(ctx context.Context) error {
	for {
		seed, ok := c.next(ctx, []string{Processes})
		if !ok {
			return nil
		}
		e := runProcesses(ctx, c.o, seed, c.combos, c.dir, false)
		if ctx.Err() != nil {
			return nil
		}
		c.ended(e)
	}
}

// runProcesses runs the program of a seed.
func runProcesses(ctx context.Context, o Options, seed uint64, combos []Combo, scratch string, keep bool) Ended {
	p := Generate(seed, Choices{Level: Processes, Combos: combos}.only(o.Only))
	s, err := o.Known.Get(p.Strategy)
	if err == nil {
		p.fit(s)
	}
	e := Ended{Seed: seed, Level: Processes, Program: p.Combo().String(), Only: Filter{p.Combo()}}
	began := time.Now()
	var mu sync.Mutex
	var trace []string
	note := func(format string, a ...any) {
		mu.Lock()
		defer mu.Unlock()
		trace = append(trace, fmt.Sprintf("%12v ", time.Since(began).Round(time.Millisecond))+fmt.Sprintf(format, a...))
	}
	note("%s", p.describe())
	var w *processWorld
	if err == nil {
		w, err = newProcessWorld(ctx, p, scratch)
	}
	if err == nil {
		e.Counts, err = execute(ctx, p, w, processLimits, note)
		err = errors.Join(err, w.end())
	}
	e.Took = time.Since(began)
	if err != nil && ctx.Err() == nil {
		note("%v", err)
		e.Error, e.Differ = err.Error(), errors.Is(err, region.ErrMismatch)
	}
	mu.Lock()
	defer mu.Unlock()
	if e.Error != "" || keep {
		e.Trace = trace
	}
	return e
}

// fit leaves out what a strategy cannot do.
func (p *Program) fit(s strategies.Strategy) {
	info := s.Info()
	p.ReadOnly = !info.Can(strategies.Writes)
	p.Fragile = !strings.HasSuffix(p.Strategy, "-mount") && p.Strategy != "nbd-direct"
	p.Size = max(region.RoundUp(p.Size, max(info.Whole, 1)), info.Whole)
	if info.Whole > 1 || p.Device == "uffd" {
		p.Size = region.RoundUp(p.Size, region.PageSize())
	}
	var steps []Step
	for _, st := range p.Steps {
		switch {
		case p.ReadOnly && st.Op == opWrite:
			st.Op = opRead
		case p.ReadOnly && st.Op == opSync, st.Op == opFail:
			continue
		}
		steps = append(steps, st)
	}
	p.Steps = steps
}

// processWorld is a source, a daemon and a workload, each a process of its own, and a
// link of ours between the first two. It must be in the sandbox (scenarios.EnterSandbox).
type processWorld struct {
	p     Program
	dir   string
	link  *link
	proxy net.Listener // nil where the transport is not on TCP
	back  sync.WaitGroup

	mu       sync.Mutex
	source   *role.Process
	addr     string // of the source
	lives    int
	daemon   *role.Process
	workload *role.Process
	stopped  map[int]bool // processes that were stopped by a signal
	timers   sync.WaitGroup
	healed   chan struct{}
}

func newProcessWorld(ctx context.Context, p Program, scratch string) (_ *processWorld, err error) {
	w := &processWorld{p: p, link: newLink(), stopped: map[int]bool{}, healed: make(chan struct{})}
	if w.dir, err = os.MkdirTemp(scratch, "program-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.end())
		}
	}()
	if p.Kept {
		if err := os.Mkdir(filepath.Join(w.dir, "cache"), 0o700); err != nil {
			return nil, err
		}
	}
	if err := w.startSource(ctx, ""); err != nil {
		return nil, err
	}
	if p.Transport == "quic" { // not TCP: its faults are those of its processes
		return w, nil
	}
	if w.proxy, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return nil, err
	}
	w.back.Go(w.accept)
	return w, nil
}

// accept joins the daemon's connections to the source, by the link.
func (w *processWorld) accept() {
	for {
		near, err := w.proxy.Accept()
		if err != nil {
			return
		}
		w.back.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			w.mu.Lock()
			addr := w.addr
			w.mu.Unlock()
			var far net.Conn
			err := w.link.dial(ctx)
			if err == nil {
				far, err = new(net.Dialer).DialContext(ctx, "tcp", addr)
			}
			if err != nil {
				_ = near.(*net.TCPConn).SetLinger(0) // a reset, as of a port where nobody listens
				_ = near.Close()
				return
			}
			w.link.relay(near, far, nil)
		})
	}
}

func (w *processWorld) setup(dir string) role.Setup {
	s := role.Setup{
		Strategy: w.p.Strategy, Device: w.p.Device, Transport: w.p.Transport, Chunk: w.p.Chunk,
		Backend:     backend.Spec{Backend: w.p.Backend, Size: w.p.Size, Chunk: w.p.Chunk, Content: w.p.content()},
		PullWorkers: w.p.Pull, PushWorkers: w.p.Push, ReadOnly: w.p.ReadOnly, Reopen: true, Dir: dir,
		Settings: append([]string(nil), w.p.Settings...),
	}
	if w.p.TLS {
		s.Settings = append(s.Settings, "tls=true")
	}
	if w.p.Kept {
		s.Settings = append(s.Settings, "cache_dir="+filepath.Join(w.dir, "cache"))
	}
	return s
}

// sourceDir is where a life of the source keeps its files, and the certificates of all.
func (w *processWorld) sourceDir() string { return filepath.Join(w.dir, "source") }

// startSource starts a source, whose content is that of a file, or the first.
func (w *processWorld) startSource(ctx context.Context, input string) (err error) {
	if err := os.MkdirAll(w.sourceDir(), 0o700); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, processLimits.recover)
	defer cancel()
	p, err := role.Start(ctx, role.Source, "", nil)
	if err != nil {
		return err
	}
	s := w.setup(w.sourceDir())
	s.Backend.Input = input
	var at role.Listening
	if _, err = p.Ask(ctx, "open", s, nil); err == nil {
		_, err = p.Ask(ctx, "listen", map[string]string{"addr": "127.0.0.1"}, &at)
	}
	if err != nil {
		return errors.Join(err, p.Stop(ctx))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.source, w.addr = p, at.Region
	return nil
}

func (w *processWorld) open(ctx context.Context) (err error) {
	w.lives++
	dir := filepath.Join(w.dir, fmt.Sprint("mount-", w.lives))
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if err := os.Symlink(filepath.Join(w.sourceDir(), "certificates"), filepath.Join(dir, "certificates")); err != nil {
		return err
	}
	daemon, err := role.Start(ctx, role.Daemon, "", nil)
	if err != nil {
		return err
	}
	workload, err := role.Start(ctx, role.Workload, "", nil)
	if err != nil {
		return errors.Join(err, daemon.Stop(ctx))
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, workload.Stop(ctx), daemon.Stop(ctx))
		}
	}()
	w.mu.Lock()
	to := w.addr
	w.mu.Unlock()
	if w.proxy != nil {
		to = w.proxy.Addr().String()
	}
	var m role.Mounted
	files, err := daemon.Ask(ctx, "mount", role.MountArgs{Setup: w.setup(dir), Source: to}, &m)
	defer func() {
		for _, f := range files {
			_ = f.Close()
		}
	}()
	if err != nil {
		return err
	}
	var a role.Attached
	uffd, err := workload.Ask(ctx, "attach", m.Attachment, &a, files...)
	if err != nil {
		return err
	}
	if len(uffd) > 0 {
		_, err = daemon.Ask(ctx, "faults", map[string]uintptr{"base": a.Base}, nil, uffd...)
		for _, f := range uffd {
			_ = f.Close()
		}
		if err != nil {
			return err
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.daemon, w.workload = daemon, workload
	return nil
}

func (w *processWorld) roles() (daemon, workload *role.Process, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.daemon == nil {
		return nil, nil, fmt.Errorf("the daemon is dead: %w", region.ErrClosed)
	}
	return w.daemon, w.workload, nil
}

func (w *processWorld) read(ctx context.Context, p []byte, off int64) error {
	_, l, err := w.roles()
	if err != nil {
		return err
	}
	var r role.Poke
	if _, err := l.Ask(ctx, "load", role.Poke{Off: off, N: int64(len(p))}, &r); err != nil {
		return err
	}
	if copy(p, r.Data) != len(p) {
		return fmt.Errorf("%d bytes, want %d: %w", len(r.Data), len(p), region.ErrMismatch)
	}
	return nil
}

func (w *processWorld) write(ctx context.Context, p []byte, off int64) error {
	_, l, err := w.roles()
	if err != nil {
		return err
	}
	_, err = l.Ask(ctx, "store", role.Poke{Off: off, Data: p}, nil)
	return err
}

func (w *processWorld) sync(ctx context.Context) error {
	d, l, err := w.roles()
	if err != nil || w.p.ReadOnly {
		return err
	}
	if _, err := l.Ask(ctx, "sync", struct{}{}, nil); err != nil {
		return err
	}
	_, err = d.Ask(ctx, "sync", struct{}{}, nil)
	return err
}

// take takes the daemon and the workload away from the accesses.
func (w *processWorld) take() (daemon, workload *role.Process) {
	w.mu.Lock()
	defer w.mu.Unlock()
	daemon, workload = w.daemon, w.workload
	w.daemon, w.workload = nil, nil
	return daemon, workload
}

func (w *processWorld) close(ctx context.Context) error {
	d, l := w.take()
	if d == nil {
		return nil
	}
	var err error
	if !w.p.ReadOnly {
		_, err = l.Ask(ctx, "sync", struct{}{}, nil) // what a mapping has is the workload's to flush
	}
	if _, derr := l.Ask(ctx, "detach", struct{}{}, nil); err == nil {
		err = derr
	}
	if _, derr := d.Ask(ctx, "unmount", struct{}{}, nil); err == nil {
		err = derr
	}
	return errors.Join(err, l.Stop(ctx), d.Stop(ctx))
}

// killDaemon sends SIGKILL to the daemon. The workload, which may wait for it in a
// fault, must get an answer by that; it is killed only then.
func (w *processWorld) killDaemon(ctx context.Context) error {
	d, l := w.take()
	if d == nil {
		return nil
	}
	d.Kill()
	err := d.Stop(ctx)
	l.Kill()
	err = errors.Join(err, l.Stop(ctx))
	// The kernel keeps the place of a dead server's mount until somebody takes it
	// away, as memsync clean does, or the sandbox ends.
	for _, m := range w.mounts() {
		err = errors.Join(err, unix.Unmount(m, unix.MNT_DETACH))
	}
	return err
}

// during undoes something after a while, or when all faults end.
func (w *processWorld) during(d time.Duration, undo func()) {
	w.mu.Lock()
	healed := w.healed
	w.mu.Unlock()
	w.timers.Go(func() {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-t.C:
		case <-healed:
		}
		undo()
	})
}

// pause stops a process for a while.
func (w *processWorld) pause(p *role.Process, d time.Duration) {
	if p == nil {
		return
	}
	w.mu.Lock()
	busy := w.stopped[p.PID()]
	w.stopped[p.PID()] = true
	w.mu.Unlock()
	if busy || unix.Kill(p.PID(), unix.SIGSTOP) != nil {
		return
	}
	w.during(d, func() {
		_ = unix.Kill(p.PID(), unix.SIGCONT) // it may have been killed meanwhile
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.stopped, p.PID())
	})
}

func (w *processWorld) fault(s Step) error {
	w.mu.Lock()
	source, daemon := w.source, w.daemon
	w.mu.Unlock()
	switch s.Op {
	case opCut:
		w.link.cut(s.For)
	case opCutAfter:
		w.link.cutAfter(s.Way, s.N, s.For)
	case opStall:
		w.link.stall()
		w.during(s.For, w.link.pass)
	case opRefuse:
		w.link.refuse(true)
		w.during(s.For, func() { w.link.refuse(false) })
	case opDelay:
		w.link.slow(s.For)
	case opCorrupt:
		w.link.corrupt(s.Way, int(s.N))
	case opPauseSource:
		w.pause(source, s.For)
	case opPauseDaemon:
		w.pause(daemon, s.For)
	case opKillSource:
		if source == nil || w.p.Backend != "file" || w.proxy == nil {
			return nil // what it held is gone with it, or nobody finds it again
		}
		return w.restart(source, s.For)
	default:
		return fmt.Errorf("a program with processes has no %q", s.Op)
	}
	return nil
}

// restart kills the source, and starts another one later that has its bytes.
func (w *processWorld) restart(source *role.Process, down time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), processLimits.recover)
	defer cancel()
	w.mu.Lock()
	w.source = nil
	w.mu.Unlock()
	source.Kill()
	if err := source.Stop(ctx); err != nil {
		return err
	}
	files, err := filepath.Glob(filepath.Join(w.sourceDir(), "region-*"))
	if err != nil || len(files) != 1 {
		return fmt.Errorf("%d files of the region, want one: %w", len(files), errors.Join(err, region.ErrMissing))
	}
	kept := filepath.Join(w.dir, "kept")
	if err := os.Rename(files[0], kept); err != nil {
		return err
	}
	failed := make(chan error, 1)
	w.during(down, func() { failed <- w.startSource(context.Background(), kept) })
	w.timers.Go(func() {
		if err := <-failed; err != nil {
			fmt.Fprintln(os.Stderr, "torture: start the source again:", err)
		}
	})
	return nil
}

func (w *processWorld) heal(context.Context) error {
	w.link.heal()
	w.mu.Lock()
	close(w.healed)
	w.healed = make(chan struct{})
	w.mu.Unlock()
	w.timers.Wait()
	return nil
}

// stored asks the source. nil is that it cannot be asked now.
func (w *processWorld) stored(ctx context.Context) ([]byte, error) {
	w.mu.Lock()
	s, stopped := w.source, false
	if s != nil {
		stopped = w.stopped[s.PID()]
	}
	w.mu.Unlock()
	if s == nil || stopped {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, processLimits.access)
	defer cancel()
	var r role.Poke
	if _, err := s.Ask(ctx, "dump", role.Poke{N: w.p.Size}, &r); err != nil {
		if errors.Is(err, region.ErrPeerGone) {
			return nil, nil // it was killed just now
		}
		return nil, err
	}
	return r.Data, nil
}

// end takes all down and says what is left over.
func (w *processWorld) end() error {
	ctx, cancel := context.WithTimeout(context.Background(), processLimits.recover)
	defer cancel()
	var errs []error
	if err := w.heal(ctx); err != nil {
		errs = append(errs, err)
	}
	if d, l := w.take(); d != nil {
		errs = append(errs, l.Stop(ctx), d.Stop(ctx)) // after a failure
	}
	if w.source != nil {
		_, err := w.source.Ask(ctx, "close", struct{}{}, nil)
		errs = append(errs, err, w.source.Stop(ctx))
	}
	if w.proxy != nil {
		errs = append(errs, w.proxy.Close())
		w.link.cut(0)
		w.back.Wait()
	}
	for _, m := range w.mounts() {
		errs = append(errs, fmt.Errorf("the mount %s", m))
	}
	if err := errors.Join(errs...); err != nil {
		return broken(nothingLeft, "%w", err)
	}
	return os.RemoveAll(w.dir)
}

// mounts lists those below the program's folder.
func (w *processWorld) mounts() (below []string) {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return []string{"/proc/self/mountinfo: " + err.Error()}
	}
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], w.dir+"/") {
			below = append(below, f[4])
		}
	}
	return below
}
