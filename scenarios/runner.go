package scenarios

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"memsync/netem"
	"memsync/results"
	"memsync/scenarios/role"
	"memsync/strategies"
	"memsync/strategies/backend"
	"memsync/strategies/region"
)

// Item is one run of a sweep.
type Item struct {
	Cell  *Cell
	Run   int // from 1
	ID    string
	Order int // position in the shuffled order, from 0
	Seed  uint64
}

// Plan makes the runs of a sweep: every cell n times, shuffled by the seed, so
// that drift of the machine spreads over all cells. Run and Seed of an item
// depend on the cell (or its Seeds) and the sweep's seed only.
func Plan(cells []*Cell, n int, seed uint64) []Item {
	var items []Item
	for _, c := range cells {
		key := c.Key()
		for run := 1; run <= n; run++ {
			var k uint64
			_, _ = fmt.Sscanf(key, "%x", &k)
			if c.Seeds != "" {
				h := fnv.New64a()
				h.Write([]byte(c.Seeds))
				k = h.Sum64()
			}
			items = append(items, Item{Cell: c, Run: run, ID: fmt.Sprintf("%s-%d", key, run),
				Seed: rand.NewPCG(seed^k, uint64(run)).Uint64()})
		}
	}
	rng := rand.New(rand.NewPCG(seed, 0))
	rng.Shuffle(len(items), func(i, j int) { items[i], items[j] = items[j], items[i] })
	for i := range items {
		items[i].Order = i
	}
	return items
}

// Shard keeps every n-th item, beginning with the i-th (from 1), of a plan.
func Shard(items []Item, i, n int) []Item {
	var mine []Item
	for k, it := range items {
		if k%n == i-1 {
			mine = append(mine, it)
		}
	}
	return mine
}

// Outcome is what a run gave.
type Outcome struct {
	Item
	Status    results.Status
	Err       error
	Verified  bool // every byte that was read, and after writes the source, was compared
	Values    map[string]float64
	Histogram []byte // HDR, V2 compressed, base64: nanoseconds of every touch
	Requests  []byte // the same of the bytes of each read request that reached the region's store; only with op read
	RTT       time.Duration
	Rate      float64 // bit/s measured on the link; 0 where it has none
	Took      time.Duration
	yard      time.Duration // of Took, spent on yardsticks (floor_*)
	section   time.Duration // of Took, the measured section
}

// Rows returns the outcome as records.
func (o *Outcome) Rows() ([]results.Row, error) {
	r := o.Cell.Row()
	r.RunID, r.Run, r.Order, r.Seed, r.Status = o.ID, o.Run, o.Order, o.Seed, o.Status
	if o.RTT > 0 {
		r.RTTMeasuredms = results.Num(float64(o.RTT) / 1e6)
	}
	if o.Rate > 0 {
		r.RateMeasuredMbit = results.Num(o.Rate / 1e6)
	}
	if o.Err != nil {
		r.Error = o.Err.Error()
	}
	return results.RunRows(r, o.Values, o.Took.Seconds())
}

// Runner runs items one after another. It keeps the links of a sweep open, each
// calibrated until it is accepted, at most maxCalibrations times. It must run inside the sandbox (see EnterSandbox). Its methods
// must not be called concurrently.
type Runner struct {
	Scratch string // an existing folder
	Seed    uint64
	// Log gets a line for what the reader of a progress bar should know; may be nil.
	Log func(format string, args ...any)

	links   map[linkKey]*link
	servers servers
	floors  map[floorKey][]float64 // floor_tcp, B/s
}

type linkKey struct {
	shaper  netem.Shaper
	profile netem.Profile
	cc      string
	hosts   int
	initial int // segments of TCP's first window
}

type floorKey struct {
	linkKey
	bytes int64
	cpus  string
}

type link struct {
	*netem.Link
	calibration  netem.Calibration // the last one
	calibrations int
	err          error // why it cannot be used
}

// maxCalibrations is how often a link is calibrated that was not accepted: once a run,
// so that a machine which was busy when the link was opened does not cost the sweep all
// runs on it.
const maxCalibrations = 6

// floorStreams is how many bulk streams are sent for a link and size; floor_tcp
// of a run is the median of those sent so far.
const floorStreams = 3

// Close takes the links down and ends the servers of backends.
func (r *Runner) Close() error {
	errs := []error{r.servers.Close()}
	for _, l := range r.links {
		if l.Link != nil {
			errs = append(errs, l.Link.Close())
		}
	}
	r.links = nil
	return errors.Join(errs...)
}

// Evidence returns what was read back from each link, and its calibration.
func (r *Runner) Evidence() (links, calibrations []json.RawMessage) {
	links, calibrations = []json.RawMessage{}, []json.RawMessage{} // [] and not null in JSON
	for _, l := range r.links {
		if l.Link == nil {
			continue
		}
		if b, err := json.Marshal(l.Link.Evidence()); err == nil {
			links = append(links, b)
		}
		if b, err := json.Marshal(l.calibration); err == nil {
			calibrations = append(calibrations, b)
		}
	}
	return links, calibrations
}

func (r *Runner) logf(format string, args ...any) {
	if r.Log != nil {
		r.Log(format, args...)
	}
}

// link returns the cell's link, opened once, and calibrated if it is not yet accepted.
func (r *Runner) link(ctx context.Context, c *Cell) (*link, error) {
	if c.Transport == "local" {
		return nil, nil
	}
	k := c.linkKey()
	l, ok := r.links[k]
	if !ok {
		l = &link{}
		l.Link, l.err = netem.Open(ctx, k.shaper, k.profile, netem.Options{Seed: r.Seed, Congestion: k.cc, Hosts: k.hosts, InitialWindow: k.initial})
	}
	if l.err == nil && !l.calibration.Accepted && l.calibrations < maxCalibrations {
		r.logf("calibrating the link%s: %s, RTT %v, rate %s", again(l.calibrations), k.shaper, k.profile.RTT, rateText(k.profile.Rate))
		l.calibrations++
		if l.calibration, l.err = l.Calibrate(ctx); l.err != nil {
			l.err = errors.Join(l.err, l.Link.Close())
			l.Link = nil
		}
	}
	if ctx.Err() == nil { // what was only interrupted is tried again
		if r.links == nil {
			r.links = map[linkKey]*link{}
		}
		r.links[k] = l
	}
	return l, l.err
}

// EstimateLinks says how many links the items need, and guesses how long it takes to open
// and calibrate them.
func EstimateLinks(items []Item) (n int, took time.Duration) {
	seen := map[linkKey]bool{}
	for _, it := range items {
		if c := it.Cell; c.Missing == nil && c.Transport != "local" && !seen[c.linkKey()] {
			seen[c.linkKey()] = true
			took += 2*time.Second + 20*c.Link.RTT
		}
	}
	return len(seen), took
}

func again(before int) string {
	if before == 0 {
		return ""
	}
	return " again"
}

func rateText(rate int64) string {
	if rate == 0 {
		return "unlimited"
	}
	return fmt.Sprintf("%g Mbit/s", float64(rate)/1e6)
}

func (c *Cell) linkKey() linkKey {
	k := linkKey{shaper: c.Shaper, profile: c.Link, hosts: 1 + c.destinations()}
	if c.params.Has("congestion") {
		k.cc, k.initial = c.params.Text("congestion"), int(c.params.Int("initial_window"))
	}
	k.profile.Name, k.profile.Doc = "", ""
	return k
}

// touchedMemory is the most that is touched before a run, in bytes.
const touchedMemory = 1 << 30

// touchMemory makes sure that memory which the kernel has free is there: a virtual
// machine gives free memory back to its host within seconds (free page reporting
// of its balloon), and then the first touch of a huge page costs ten times
// more: 1.4 s for 512 MiB, against 0.13 s. So this goes before each run: twice the
// region, for a cache and the kernel's page cache.
func (r *run) touchMemory() error {
	if inLab() {
		return nil // a touch costs 20 us there, the first and all others, and there is less memory
	}
	m, err := unix.Mmap(-1, 0, int(min(2*r.cell.Size, touchedMemory)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return fmt.Errorf("touch the memory budget: %w", err)
	}
	_ = unix.Madvise(m, unix.MADV_HUGEPAGE) // as the caches do; no matter if refused
	err = unix.Madvise(m, unix.MADV_POPULATE_WRITE)
	if errors.Is(err, unix.ENOMEM) {
		err = nil // what there is has been touched
	}
	if err = errors.Join(err, unix.Munmap(m)); err != nil {
		return fmt.Errorf("touch the memory budget: %w", err)
	}
	return nil
}

// margin is what a run may take beyond its time budget before it counts as hung.
const margin = 30 * time.Second

// Run makes one run and returns what it gave; it never fails itself. A run that
// ctx ends has status interrupted. Whatever happens, all processes and mounts of
// the run are gone when Run returns.
func (r *Runner) Run(ctx context.Context, it Item) (o Outcome) {
	began := time.Now()
	o = Outcome{Item: it, Values: map[string]float64{}}
	defer func() {
		o.Took = time.Since(began)
		if o.Err == nil {
			o.Values["harness_overhead"] = (o.Took - o.yard - o.section).Seconds()
		}
		o.Status = o.status(ctx)
	}()
	if o.Err = it.Cell.Missing; o.Err != nil {
		return o
	}
	l, err := r.link(ctx, it.Cell)
	if err != nil {
		o.Err = err
		return o
	}
	service, err := r.servers.For(ctx, it.Cell, r.Scratch, r.Log)
	if err != nil {
		o.Err = err
		return o
	}
	began = time.Now() // opening and calibrating a link is the sweep's, not the run's
	// A link at 100 % loss or a hung process must not hold the sweep.
	limit := margin + it.Cell.Budget + 20*it.Cell.Link.RTT
	if it.Cell.Op == OpSync && it.Cell.Link.Rate > 0 {
		limit += time.Duration(float64(1+it.Cell.params.Int("sync_rounds")) * float64(int64(it.Cell.destinations())*it.Cell.Size*8) / float64(it.Cell.Link.Rate) * 1e9)
	}
	if (it.Cell.Op != "read" || it.Cell.program != nil) && it.Cell.Link.Rate > 0 { // Sync moves what was written, a program what it needs
		limit += time.Duration(float64(it.Cell.Size*8) / float64(it.Cell.Link.Rate) * 2e9)
	}
	rctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("the run takes longer than %v: %w", limit, context.DeadlineExceeded))
	defer cancel()
	one := &run{Runner: r, cell: it.Cell, seed: it.Seed, link: l, out: &o, service: service}
	o.Err = one.do(rctx)
	return o
}

func (o *Outcome) status(ctx context.Context) results.Status {
	switch {
	case ctx.Err() != nil:
		o.Err = errors.Join(errors.New("interrupted"), o.Err)
		return results.StatusInterrupted
	case o.Err == nil:
		return results.StatusOK
	case errors.Is(o.Err, region.ErrMismatch):
		return results.StatusCorrupt
	case errors.Is(o.Err, errUncalibrated):
		return results.StatusUncalibrated
	case errors.Is(o.Err, context.DeadlineExceeded), errors.Is(o.Err, os.ErrDeadlineExceeded):
		return results.StatusTimeout
	case errors.Is(o.Err, region.ErrNotPermitted), errors.Is(o.Err, netem.ErrNotPermitted):
		return results.StatusFailed // also where others of several ways are missing: this one could be had
	case errors.Is(o.Err, region.ErrNotSupported), errors.Is(o.Err, netem.ErrNotSupported):
		return results.StatusUnsupported
	}
	return results.StatusFailed
}

var errUncalibrated = errors.New("the link is not what it should be")

// run is one run under way.
type run struct {
	*Runner
	cell *Cell
	seed uint64
	link *link // nil with transport local
	out  *Outcome

	service *backend.Service // nil where the backend has none

	source, daemon, workload *role.Process
	writer                   *role.Process  // op sync: the workload at the source
	others                   []*destination // op sync: those beside daemon and workload
}

func (r *run) do(ctx context.Context) error {
	if r.link == nil {
		return r.inFolder(ctx)
	}
	cal := r.link.calibration
	if len(cal.Rates) > 0 {
		r.out.Rate = cal.Rates[0].Measured
		r.out.Values["rate_measured"] = r.out.Rate
	}
	if cal.Goodput > 0 {
		r.out.Values["tcp_goodput"] = cal.Goodput / 8
	}
	before, err := r.echo(ctx, "before")
	r.out.RTT = before
	if err != nil {
		return err
	}
	if err := r.inFolder(ctx); err != nil {
		return err
	}
	if err := r.drain(ctx); err != nil {
		return err
	}
	after, err := r.echo(ctx, "after")
	if err != nil {
		return err
	}
	r.out.RTT = (before + after) / 2
	r.out.Values["rtt_measured"] = r.out.RTT.Seconds()
	if !cal.Accepted {
		return fmt.Errorf("%w: %s", errUncalibrated, strings.Join(cal.Reasons, "; "))
	}
	return nil
}

// inFolder makes the run's processes and a folder for them, and measures.
func (r *run) inFolder(ctx context.Context) (err error) {
	dir, err := os.MkdirTemp(r.Scratch, "run-")
	if err != nil {
		return err
	}
	defer func() {
		UnmountBelow(dir)
		err = errors.Join(err, os.RemoveAll(dir))
	}()
	defer func() { err = errors.Join(err, r.stop(ctx, err != nil)) }()
	if err := r.start(ctx); err != nil {
		return err
	}
	// When one of the processes dies, what waits for the others must not wait
	// for the deadline: nobody may be left who could answer.
	watched, cancel := context.WithCancelCause(ctx)
	defer cancel(nil) // before the processes are stopped
	for _, p := range r.processes() {
		p.Watch(watched, cancel)
	}
	for _, d := range r.others {
		d.watch(watched, cancel)
	}
	setup := r.cell.setup(r.seed, dir)
	setup.Backend.Service = r.service
	switch r.cell.Op {
	case OpSync:
		err = r.measureSync(watched, setup, cancel)
	case OpMigrate:
		err = r.measureMigrate(watched, setup)
	case OpSnapshot:
		err = r.measureSnapshot(watched, setup)
	default:
		err = r.measure(watched, setup, r.cell.work(r.seed, dir))
	}
	if err == nil || ctx.Err() != nil {
		return err
	}
	// A workload whose page cannot come any more may say so (EIO) before we know
	// that the process behind it has ended: that is the cause.
	select {
	case <-watched.Done():
	case <-time.After(time.Second): // a busy machine may take a while to end a process
	}
	if cause := context.Cause(watched); cause != nil && !errors.Is(err, cause) {
		err = fmt.Errorf("%w; then %w", cause, err)
	}
	return err
}

// drain waits until the link is idle: what a strategy had in flight when it was
// closed would stand before the echoes.
func (r *run) drain(ctx context.Context) error {
	quiet := r.cell.Link.RTT/2 + 5*time.Millisecond // a packet may be on the way that long, unseen
	last, err := r.link.Counters()
	for until := time.Now().Add(5 * time.Second); err == nil; {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(quiet):
		}
		now, e := r.link.Counters()
		if err = e; now == last || time.Now().After(until) {
			break
		}
		last = now
	}
	return err
}

// echoTries is how often the RTT is measured before it counts as wrong: on a
// busy machine ten echoes can meet a moment in which nobody was scheduled.
const echoTries = 3

// echo measures the RTT, and says whether it is what it should be.
func (r *run) echo(ctx context.Context, when string) (rtt time.Duration, err error) {
	for range echoTries {
		e, echoErr := r.link.Echo(ctx, 10)
		if echoErr != nil {
			return 0, fmt.Errorf("measure the RTT %s the run: %w", when, echoErr)
		}
		if rtt, err = e.Median, r.link.AcceptRTT(e); err == nil {
			return rtt, nil
		}
		if err := r.drain(ctx); err != nil {
			return 0, err
		}
	}
	return rtt, fmt.Errorf("%w %s the run: %w", errUncalibrated, when, err)
}

func (r *run) start(ctx context.Context) error {
	place, err := ParsePlacement(r.cell.CPUs)
	if err != nil {
		return err
	}
	var g errgroup.Group
	begin := func(p **role.Process, name string, side func(*netem.Link) *netem.Namespace) {
		g.Go(func() (err error) {
			if r.link == nil {
				*p, err = role.Start(ctx, name, place[name], nil)
			} else {
				*p, err = role.Start(ctx, name, place[name], side(r.link.Link))
			}
			return err
		})
	}
	if r.link != nil {
		begin(&r.source, role.Source, (*netem.Link).Source)
	}
	begin(&r.daemon, role.Daemon, (*netem.Link).Destination)
	begin(&r.workload, role.Workload, (*netem.Link).Destination)
	for i := 1; i < r.cell.destinations(); i++ {
		d := &destination{host: r.link.Hosts()[1+i]}
		r.others = append(r.others, d)
		host := func(*netem.Link) *netem.Namespace { return d.host }
		begin(&d.daemon, role.Daemon, host)
		begin(&d.workload, role.Workload, host)
	}
	return g.Wait()
}

// workloads are those of all destinations.
func (r *run) workloads() []*role.Process {
	all := []*role.Process{r.workload}
	for _, d := range r.others {
		all = append(all, d.workload)
	}
	return all
}

// stop ends the processes: the workload first, since only it can be waiting for
// the others. After a failure they are killed at once, but for the daemon: it is
// asked first, as only it can let go of a kernel device on which the workload
// waits beyond the reach of signals.
func (r *run) stop(ctx context.Context, failed bool) error {
	var errs []error
	workloads, daemons := append(r.workloads(), r.writer), []*role.Process{r.daemon}
	for _, d := range r.others {
		daemons = append(daemons, d.daemon)
	}
	if failed {
		for _, p := range workloads {
			if p != nil {
				p.Kill()
			}
		}
		for _, p := range daemons {
			if p != nil {
				errs = append(errs, p.Stop(ctx))
			}
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(ctx)
		cancel()
	}
	for _, p := range slices.Concat(workloads, daemons, []*role.Process{r.source}) {
		if p != nil {
			errs = append(errs, p.Stop(ctx))
		}
	}
	return errors.Join(errs...)
}

// processes returns those that run, by name; of several destinations the first's.
func (r *run) processes() map[string]*role.Process {
	m := map[string]*role.Process{"daemon": r.daemon, "workload": r.workload}
	if r.source != nil {
		m["source"] = r.source
	}
	if r.writer != nil {
		m["writer"] = r.writer
	}
	return m
}

// counters asks all roles at once.
func (r *run) counters(ctx context.Context) (map[string]role.Counters, error) {
	m := map[string]role.Counters{}
	got := map[string]*role.Counters{}
	var g errgroup.Group
	for name, p := range r.processes() {
		c := &role.Counters{}
		got[name] = c
		g.Go(func() error { _, err := p.Ask(ctx, "counters", struct{}{}, c); return err })
	}
	err := g.Wait()
	for name, c := range got {
		m[name] = *c
	}
	return m, err
}

// settle has all roles end what their start left to do, and count the peak of their memory from now on.
func (r *run) settle(ctx context.Context) error {
	var g errgroup.Group
	for _, p := range r.processes() {
		g.Go(func() error { _, err := p.Ask(ctx, "settle", struct{}{}, nil); return err })
	}
	return g.Wait()
}

func (r *run) measure(ctx context.Context, setup role.Setup, work role.Work) error {
	c, v := r.cell, r.out.Values
	if c.Shaper == netem.ShaperSleep {
		setup.Sleep = int64(c.Link.RTT)
	}
	if c.fileSystem() != "none" {
		if err := r.image(ctx, &setup, work); err != nil {
			return err
		}
	}
	// Before any clock: content in place, buffers touched.
	mount := role.MountArgs{Setup: setup}
	var at role.Listening
	var g errgroup.Group
	g.Go(func() error { _, err := r.workload.Ask(ctx, "prepare", work, nil); return err })
	if r.source == nil {
		g.Go(func() error { _, err := r.daemon.Ask(ctx, "hold", setup, nil); return err })
	} else {
		g.Go(func() error {
			if _, err := r.source.Ask(ctx, "open", setup, nil); err != nil {
				return err
			}
			_, err := r.source.Ask(ctx, "listen", map[string]string{"addr": r.link.Source().Addr().String()}, &at)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	mount.Source = at.Region
	if err := r.floorTCP(ctx, at.Yard); err != nil {
		return err
	}
	if err := r.touchMemory(); err != nil {
		return err
	}
	if err := r.settle(ctx); err != nil {
		return err
	}
	var wire netem.Counters
	var err error
	if r.link != nil {
		if wire, err = r.link.Counters(); err != nil {
			return err
		}
	}

	// Open.
	idle, err := r.counters(ctx)
	if err != nil {
		return err
	}
	var m role.Mounted
	files, err := r.daemon.Ask(ctx, "mount", mount, &m)
	if err != nil {
		return err
	}
	usable, err := attachTo(ctx, r.daemon, r.workload, m, files)
	if err != nil {
		return err
	}
	v["open_latency"] = seconds(usable - m.Start)
	v["preemptive_pull_bytes"] = float64(m.Stats.PreemptiveBytes)

	// Measure.
	before, err := r.counters(ctx)
	if err != nil {
		return err
	}
	steal := stealTime()
	var t role.Touched
	if _, err := r.workload.Ask(ctx, "run", struct{}{}, &t); err != nil {
		return r.trouble(ctx, err)
	}
	v["steal_time"] = stealTime() - steal
	after, err := r.counters(ctx)
	if err != nil {
		return err
	}
	r.out.Histogram = t.Hist
	r.touches(m, t)
	r.spent(before, after)
	r.measured(m.Start, t.End)
	if t.Bytes > 0 {
		cpu := 0.0
		for name, b := range before {
			cpu += after[name].CPU - b.CPU
			v["cpu_per_byte_"+name] = (after[name].CPU - idle[name].CPU) / float64(t.Bytes)
		}
		v["cpu_per_byte"] = cpu / float64(t.Bytes)
	}

	// The clock stands still from here, but for Sync.
	if c.Op != "read" {
		if _, err := r.workload.Ask(ctx, "sync", struct{}{}, nil); err != nil {
			return err
		}
		if _, err := r.daemon.Ask(ctx, "sync", struct{}{}, nil); err != nil {
			return err
		}
		now := monotonic()
		v["total_time"], v["sync_latency"] = seconds(now-t.Start), seconds(now-t.End)
		r.measured(t.End, now)
	}
	var s strategies.Stats
	if _, err := r.daemon.Ask(ctx, "stats", struct{}{}, &s); err != nil {
		return err
	}
	r.stats(s)
	r.utilisation(seconds(t.End - m.Start))
	if err := r.verify(ctx, work, t); err != nil {
		return err
	}
	if _, err := r.workload.Ask(ctx, "detach", struct{}{}, nil); err != nil {
		return err
	}
	if _, err := r.daemon.Ask(ctx, "unmount", struct{}{}, nil); err != nil {
		return err
	}
	if r.link != nil {
		end, err := r.link.Counters()
		if err != nil {
			return err
		}
		wired(v, wire, end)
	}
	if c.Floors {
		if err := r.floors(ctx, at.Yard); err != nil {
			return err
		}
	}
	if c.Op == "read" {
		if r.out.Requests, err = r.requests(ctx); err != nil {
			return err
		}
	}
	if r.source != nil {
		if _, err := r.source.Ask(ctx, "close", struct{}{}, nil); err != nil {
			return err
		}
	}
	return nil
}

// attachTo attaches the workload to what the daemon mounted, which it closes the files of,
// and returns when the region became usable: where the daemon answers the faults of the
// workload's mapping, once it does.
func attachTo(ctx context.Context, daemon, workload *role.Process, m role.Mounted, files []*os.File) (usable int64, err error) {
	var a role.Attached
	uffd, err := workload.Ask(ctx, "attach", m.Attachment, &a, files...)
	closeFiles(files)
	if err != nil || !a.Fault {
		return a.Usable, err
	}
	_, err = daemon.Ask(ctx, "faults", map[string]uintptr{"base": a.Base}, nil, uffd...)
	closeFiles(uffd)
	return monotonic(), err
}

// requests returns the histogram of what was read from the store that holds the region.
func (r *run) requests(ctx context.Context) ([]byte, error) {
	holder := r.source
	if holder == nil {
		holder = r.daemon
	}
	var h role.Requests
	_, err := holder.Ask(ctx, "requests", struct{}{}, &h)
	return h.Hist, err
}

// spent records what the processes used between two looks.
func (r *run) spent(before, after map[string]role.Counters) {
	v := r.out.Values
	for name, b := range before {
		e := after[name]
		v["cpu_"+name] = e.CPU - b.CPU
		v["rss_"+name] = float64(e.RSS)
		v["minor_faults_"+name] = float64(e.MinorFaults - b.MinorFaults)
		v["major_faults_"+name] = float64(e.MajorFaults - b.MajorFaults)
		v["context_switches_"+name] = float64(e.ContextSwitches - b.ContextSwitches)
	}
}

// touches turns what the workload did into metrics.
func (r *run) touches(m role.Mounted, t role.Touched) {
	v := r.out.Values
	if p := t.Program; p != nil {
		v["time_to_first_result"] = seconds(t.Start-m.Start) + p.First.Seconds()
		if p.All {
			v["time_to_result"] = seconds(t.End - m.Start)
		}
		if p.Rated {
			v["stall_time"] = p.Stalled.Seconds()
		}
		return
	}
	if t.First > 0 {
		v["latency_first_chunk"] = seconds(t.First)
	}
	v["bytes_done"] = float64(t.Bytes)
	if t.Bytes == 0 {
		return
	}
	if t.Last {
		v["time_to_last_byte"] = seconds(t.End - m.Start)
	}
	v["throughput"] = float64(t.Bytes) / seconds(t.End-t.Start)
	if t.Local > 0 {
		v["slowdown"] = float64(t.End-t.Start-t.First) / float64(t.Local)
	}
	v["fault_latency_p50"], v["fault_latency_p99"] = seconds(t.P50), seconds(t.P99)
	v["fault_latency_p999"], v["fault_latency_max"] = seconds(t.P999), seconds(t.Max)
}

// utilisation sets what the reader got through the link from open on, by the link's
// rate. What crossed and was not read does not count, nor what was read and did
// not cross.
func (r *run) utilisation(elapsed float64) {
	v, c := r.out.Values, r.cell
	got := v["bytes_done"]
	if n := v["payload_bytes"]; n > 0 { // 0 where the strategy is a program that does not tell
		got = min(got, n)
	}
	if r.link == nil || c.Op != "read" || got <= 0 || elapsed <= 0 {
		return
	}
	if c.Link.Rate > 0 {
		v["rate_utilisation"] = got / elapsed * 8 / float64(c.Link.Rate)
	}
	if f, ok := v["floor_tcp"]; ok && f > 0 {
		v["link_utilisation"] = got / elapsed / f
	}
}

// measured counts the time between two moments as the measured section's.
func (r *run) measured(from, to int64) { r.out.section += time.Duration(to - from) }

func (r *run) stats(s strategies.Stats) {
	v := r.out.Values
	v["demand_requests"], v["demand_bytes"] = float64(s.DemandRequests), float64(s.DemandBytes)
	v["prefetch_requests"], v["prefetch_bytes"] = float64(s.PrefetchRequests), float64(s.PrefetchBytes)
	v["push_requests"], v["push_bytes"] = float64(s.PushRequests), float64(s.PushBytes)
	if s.Faults > 0 {
		v["faults"] = float64(s.Faults)
	}
	v["payload_bytes"] = float64(s.DemandBytes + s.PrefetchBytes + s.PushBytes)
	for name, n := range s.Extra {
		if name != strategies.EqualAt {
			v[name] = float64(n)
		}
	}
	if done := v["bytes_done"]; done > 0 && r.cell.Op == "write" {
		v["read_per_written"] = float64(s.DemandBytes+s.PrefetchBytes) / done
		v["pushed_per_written"] = float64(s.PushBytes) / done
	}
	v["payload_bytes"] -= v["zero_bytes"] + v["duplicate_bytes"]
}

// verify compares what was read, and after writes what the source has, with
// what they must be.
func (r *run) verify(ctx context.Context, work role.Work, t role.Touched) error {
	var seen role.Verified
	if _, err := r.workload.Ask(ctx, "verify", struct{}{}, &seen); err != nil {
		return err
	}
	if r.cell.Op != "read" {
		t.Hist = nil // the source needs only the counts
		holder := r.source
		if holder == nil {
			holder = r.daemon
		}
		if _, err := holder.Ask(ctx, "verify", map[string]any{"work": work, "touched": t}, nil); err != nil {
			return err
		}
	}
	r.out.Verified = true
	return nil
}

// floorTCP sends a bulk stream before each of the first runs on a link and sets
// floor_tcp to the median so far, where the cell wants yardsticks.
func (r *run) floorTCP(ctx context.Context, addr string) error {
	c := r.cell
	if !c.Floors || r.link == nil || c.Limit == 0 {
		return nil
	}
	n := c.Size
	if c.Limit > 0 {
		n = min(n, c.Limit)
	}
	k := floorKey{c.linkKey(), n, c.CPUs}
	if r.Runner.floors == nil {
		r.Runner.floors = map[floorKey][]float64{}
	}
	if len(r.Runner.floors[k]) < floorStreams {
		defer r.yardstick()()
		var f role.Floors
		if _, err := r.daemon.Ask(ctx, "floors", role.DaemonFloorArgs{Addr: addr, Bulk: n}, &f); err != nil {
			return err
		}
		r.Runner.floors[k] = append(r.Runner.floors[k], f.TCP)
	}
	r.out.Values["floor_tcp"] = results.Summarize(r.Runner.floors[k]).Median.Float()
	return nil
}

// yardstick counts the time until the returned function is called as a
// yardstick's, which is neither measured section nor overhead.
func (r *run) yardstick() func() {
	start := time.Now()
	return func() { r.out.yard += time.Since(start) }
}

// floors measures the other yardsticks with the same processes.
func (r *run) floors(ctx context.Context, addr string) error {
	defer r.yardstick()()
	place, err := ParsePlacement(r.cell.CPUs)
	if err != nil {
		return err
	}
	args := role.FloorArgs{Size: min(r.cell.Size, 256<<20), Threads: r.cell.Threads, Daemon: firstCPU(place["daemon"]), Workload: firstCPU(place["workload"])}
	var f role.Floors
	if _, err := r.workload.Ask(ctx, "floors", args, &f); err != nil {
		return err
	}
	v := r.out.Values
	v["floor_map"], v["floor_fill"], v["floor_wake"] = f.Map, f.Fill, f.Wake
	if r.link == nil {
		return nil
	}
	rounds := 300
	if r.cell.Link.RTT > 0 {
		rounds = 3
	}
	if _, err := r.daemon.Ask(ctx, "floors", role.DaemonFloorArgs{Addr: addr, RR: rounds}, &f); err != nil {
		return err
	}
	v["floor_rr"] = f.RR
	return nil
}

func firstCPU(list string) int {
	if cpus, err := role.ParseCPUs(list); err == nil {
		return cpus[0]
	}
	return -1
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

func seconds(ns int64) float64 { return float64(ns) / 1e9 }

func monotonic() int64 {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &t)
	return t.Nano()
}

// stealTime is the time in seconds that the hypervisor took from all CPUs (proc_stat(5)).
func stealTime() float64 {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	var user, nice, system, idle, iowait, irq, softirq, steal float64
	if _, err := fmt.Sscanf(string(b), "cpu %g %g %g %g %g %g %g %g", &user, &nice, &system, &idle, &iowait, &irq, &softirq, &steal); err != nil {
		return 0
	}
	return steal / 100
}

// wired fills in what went over the link between two readings of its counters.
func wired(v map[string]float64, begin, end netem.Counters) {
	for name, of := range map[string]func(netem.Counters) netem.Traffic{
		"wire_tx": func(c netem.Counters) netem.Traffic { return c.SourceTx },
		"wire_rx": func(c netem.Counters) netem.Traffic { return c.DestinationTx },
	} {
		a, b := of(begin), of(end)
		v[name+"_bytes"], v[name+"_dropped"] = float64(b.Bytes-a.Bytes), float64(b.Dropped-a.Dropped)
	}
}
