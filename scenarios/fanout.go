package scenarios

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"memsync/netem"
	"memsync/scenarios/role"
	"memsync/strategies"
)

// destinations is how many hosts follow the source.
func (c *Cell) destinations() int {
	if c.Op != OpSync {
		return 1
	}
	return c.params.IntOr("destinations", 1)
}

// checkFanOut says what of several destinations contradicts itself.
func (c *Cell) checkFanOut() error {
	if c.Op != OpSync {
		for _, s := range []string{"destinations", "topology", "event"} {
			if c.params.IsSet(s) {
				return usage("%s goes with --op %s only", s, OpSync)
			}
		}
		return nil
	}
	if e := c.params.TextOr("event", strategies.EventNone); e != strategies.EventNone && (c.destinations() < 2 || c.params.Int("sync_rounds") < 3) {
		return usage("event=%s: want 2 destinations or more, and 3 sync_rounds or more: it happens to the last one, in the middle", e)
	}
	return nil
}

// destination is a host that follows the source.
type destination struct {
	host             *netem.Namespace
	daemon, workload *role.Process
	relay            string // where others find it; empty where it has none
	open             bool
	start, usable    int64            // Mount was called, the region could be used
	stats            strategies.Stats // when Mount returned
	equal            int64            // when it was equal in the latest round

	ended   func(error)
	unwatch context.CancelFunc
}

// watch calls ended when a process of d ends before ctx does.
func (d *destination) watch(ctx context.Context, ended func(error)) {
	d.ended = ended
	ctx, d.unwatch = context.WithCancel(ctx)
	d.daemon.Watch(ctx, ended)
	d.workload.Watch(ctx, ended)
}

// fan is the source's destinations, and whom each follows.
type fan struct {
	*run
	setup    role.Setup
	topology string
	source   string // the source's address
	all      []*destination
}

// fan returns the cell's destinations; none is open yet.
func (r *run) fan(setup role.Setup, source string) *fan {
	first := &destination{host: r.link.Destination(), daemon: r.daemon, workload: r.workload}
	return &fan{run: r, setup: setup, topology: r.cell.params.Text("topology"), source: source, all: append([]*destination{first}, r.others...)}
}

// up is the number of the destination that i follows, -1 for the source.
func (f *fan) up(i int) int {
	switch f.topology {
	case strategies.TopologyHub:
		return min(i, 1) - 1
	case strategies.TopologyChain:
		return i - 1
	}
	return -1
}

// mount mounts destination i, attaches its workload and, where others follow it, lets
// it serve them. It may go on beside rounds: those leave a destination out until its
// open is set, by whoever makes the rounds.
func (f *fan) mount(ctx context.Context, i int) error {
	d, source := f.all[i], f.source
	if up := f.up(i); up >= 0 {
		source = f.all[up].relay
	}
	var m role.Mounted
	files, err := d.daemon.Ask(ctx, "mount", role.MountArgs{Setup: f.setup, Source: source}, &m)
	if err != nil {
		return err
	}
	usable, err := attachTo(ctx, d.daemon, d.workload, m, files)
	if err != nil {
		return err
	}
	d.start, d.usable, d.stats = m.Start, usable, m.Stats
	for k := range f.all {
		if f.up(k) != i {
			continue
		}
		var at role.Listening
		if _, err := d.daemon.Ask(ctx, "relay", map[string]string{"addr": d.host.Addr().String()}, &at); err != nil {
			return err
		}
		d.relay = at.Region
		break
	}
	return nil
}

// openFirst opens the first n at once, each when the one that it follows is open.
func (f *fan) openFirst(ctx context.Context, n int) error {
	opened := make([]chan struct{}, n)
	for i := range opened {
		opened[i] = make(chan struct{})
	}
	g, ctx := errgroup.WithContext(ctx)
	for i := range n {
		g.Go(func() error {
			if up := f.up(i); up >= 0 {
				select {
				case <-opened[up]:
				case <-ctx.Done():
					return context.Cause(ctx)
				}
			}
			if err := f.mount(ctx, i); err != nil {
				return err
			}
			f.all[i].open = true
			close(opened[i])
			return nil
		})
	}
	return g.Wait()
}

// each calls do for all open destinations at once.
func (f *fan) each(do func(d *destination) error) error {
	var g errgroup.Group
	for _, d := range f.all {
		if d.open {
			g.Go(func() error { return do(d) })
		}
	}
	return g.Wait()
}

// last is the last destination: the one that things happen to, and the end of a chain.
func (f *fan) last() *destination { return f.all[len(f.all)-1] }

// sync makes a round and returns when it was asked for and how long it took until
// the source and all destinations know that they are equal.
func (f *fan) sync(ctx context.Context) (start int64, took float64, err error) {
	start = monotonic()
	if _, err := f.run.source.Ask(ctx, "sync", struct{}{}, nil); err != nil {
		return start, 0, f.trouble(ctx, err)
	}
	err = f.each(func(d *destination) error {
		_, err := d.daemon.Ask(ctx, "sync", struct{}{}, nil) // where the destination asks the source
		d.equal = monotonic()
		return err
	})
	took = seconds(monotonic() - start)
	if err != nil {
		return start, took, err
	}
	return start, took, f.each(func(d *destination) error {
		var s strategies.Stats
		_, err := d.daemon.Ask(ctx, "stats", struct{}{}, &s)
		if at := s.Extra[strategies.EqualAt]; at > start { // it knows better
			d.equal = at
		}
		return err
	})
}

// spread returns when the first and the last of the open destinations were equal,
// without those left out, in seconds from start.
func (f *fan) spread(start int64, without ...*destination) (first, last float64) {
	var at []int64
	for _, d := range f.all {
		if d.open && !slices.Contains(without, d) {
			at = append(at, d.equal)
		}
	}
	if len(at) == 0 {
		return 0, 0
	}
	return seconds(slices.Min(at) - start), seconds(slices.Max(at) - start)
}

// sent is what has left the source, and what all other hosts.
func (f *fan) sent() (bytes []int64, err error) {
	for i := range f.all {
		t, err := f.link.Sent(1 + i)
		if err != nil {
			return nil, err
		}
		bytes = append(bytes, t.Bytes)
	}
	return bytes, nil
}

// happens starts what the cell's event does in round n to the last destination,
// and returns what waits for its end; whether anything happens.
func (f *fan) happens(ctx context.Context, n int) (end func() error, happened bool) {
	d, middle := f.last(), (f.cell.params.Int("sync_rounds")+1)/2
	var do func() error
	after := func() {}
	switch event := f.cell.params.Text("event"); {
	case event == strategies.EventLate && n == middle, event == strategies.EventReturns && n == middle+1:
		do = func() error { return f.join(ctx) }
		after = func() {
			d.open = true
			f.out.Values["join_time"] = seconds(d.usable - d.start)
		}
	case event == strategies.EventSlow && n == middle:
		slow, stop := context.WithCancel(ctx)
		done := make(chan error, 1)
		go func() { done <- throttle(slow, d.daemon.PID()) }()
		return func() error { stop(); return <-done }, true
	case (event == strategies.EventDies || event == strategies.EventReturns) && n == middle:
		d.unwatch()
		d.open = false
		do = func() error {
			time.Sleep(f.cell.Link.RTT/2 + time.Millisecond) // let some of the round be under way
			d.daemon.Kill()
			return d.daemon.Stop(ctx)
		}
	default:
		return func() error { return nil }, false
	}
	done := make(chan error, 1)
	go func() { done <- do() }()
	return func() error {
		err := <-done
		if err == nil {
			after()
		}
		return err
	}, true
}

// join opens the last destination while rounds go on; one that died is a new process.
func (f *fan) join(ctx context.Context) error {
	d := f.last()
	if d.start != 0 {
		place, err := ParsePlacement(f.cell.CPUs)
		if err != nil {
			return err
		}
		if d.daemon, err = role.Start(ctx, role.Daemon, place[role.Daemon], d.host); err != nil {
			return err
		}
		d.watch(ctx, d.ended)
		if _, err := d.workload.Ask(ctx, "detach", struct{}{}, nil); err != nil {
			return err
		}
	}
	return f.mount(ctx, len(f.all)-1)
}

// throttle stops a process for four fifths of the time until ctx ends.
func throttle(ctx context.Context, pid int) error {
	const on, off = 4 * time.Millisecond, 16 * time.Millisecond
	for {
		if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
			return fmt.Errorf("stop process %d: %w", pid, err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(off):
		}
		if err := unix.Kill(pid, unix.SIGCONT); err != nil {
			return fmt.Errorf("continue process %d: %w", pid, err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(on):
		}
	}
}

// close detaches and unmounts all, those that follow others first.
func (f *fan) close(ctx context.Context) error {
	err := f.each(func(d *destination) error {
		_, err := d.workload.Ask(ctx, "detach", struct{}{}, nil)
		return err
	})
	for _, d := range slices.Backward(f.all) {
		if d.open && err == nil {
			_, err = d.daemon.Ask(ctx, "unmount", struct{}{}, nil)
		}
	}
	return err
}

// trouble adds what the daemons know of an error.
func (f *fan) trouble(ctx context.Context, err error) error {
	var why []error
	for i, d := range f.all {
		var t role.Trouble
		if !d.open {
			continue
		}
		if _, askErr := d.daemon.Ask(ctx, "trouble", struct{}{}, &t); askErr == nil && t.Text != "" {
			why = append(why, fmt.Errorf("daemon %d says: %s", i+1, t.Text))
		}
	}
	if len(why) == 0 {
		return err
	}
	return fmt.Errorf("%w; %w", err, errors.Join(why...))
}
