// Package scenarios runs measurements: a cell (one point of a matrix) at a time,
// each run in fresh processes (package role) on a link that was measured
// (package netem), verified, and recorded (package results). Figures are data.
package scenarios

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"

	"memsync/netem"
	"memsync/results"
	"memsync/scenarios/inputs"
	"memsync/scenarios/program"
	"memsync/scenarios/role"
	"memsync/strategies"
	"memsync/strategies/all"
	"memsync/strategies/attach"
	"memsync/strategies/backend"
	"memsync/strategies/download"
	"memsync/strategies/order"
	"memsync/strategies/param"
	"memsync/strategies/region"
)

// Variants of a figure.
const (
	Thesis  = "thesis"  // sleep shaper, transport local, the thesis's sizes
	Network = "network" // a real shaped link, the same size for all series
)

// WholeRegion is the Limit of a cell that touches all of its region.
const WholeRegion = -1

// Cell is one point of a scenario's matrix. Resolve fills in what is left open
// and validates it; only a resolved cell can run.
type Cell struct {
	Figure, Variant string // empty and "network" outside figures
	Strategy        string
	Device          string        // "" or "auto": the strategy's best that works here
	Transport       string        // "" is nbd; local where the strategy has no source
	Backend         string        // "" or "auto": memory; file where the strategy's source is a program of its own
	Shaper          netem.Shaper  // "" or "auto": netem, else tun; none for an unshaped link
	Link            netem.Profile // what the shaper does
	Size            int64         // bytes; with Input 0 is the file's size
	Input           string        // a file whose content the region has; "made:NAME" as in package inputs, here and in traces
	Chunk           int64         // bytes; 0 is the strategy's default
	Op, Access      string        // "" is read, seq
	Via             string        // "" is map; file, path
	Threads         int           // 0 is 1
	Think           time.Duration
	Limit           int64 // bytes to touch; WholeRegion; 0 is only the first chunk
	PullWorkers     int   // -1 is the strategy's default
	PushWorkers     int
	CPUs            string   // "source=0,daemon=1,workload=1"; "" leaves it to the scheduler
	Settings        []string // key=value
	Budget          time.Duration
	Warm            bool  // read all once before the clock starts; slowdown is measured
	Floors          bool  // measure the yardsticks beside each run
	Peer            bool  // the strategy may be one of memsync-peers
	Missing         error // why it cannot run here; its runs are recorded as unsupported
	InLab           bool  // of a figure's cell: means something in the lab kernel, whatever binds it
	// Seeds: cells with the same text have the same seeds in their runs, and so the same
	// content, accesses and writes; "" has seeds of its own.
	Seeds string
	// Strategies has Strategy by its name; nil is those of strategies/all. The
	// roles must be started by a program that has them too.
	Strategies strategies.Registry

	kernel   string
	program  *program.Program  // of access program:NAME
	made     map[string]string // path of each made:NAME in the cell
	params   param.Values
	strategy strategies.Strategy
}

// ErrUsage marks errors in what was asked, as against errors in doing it.
var ErrUsage = errors.New("wrong usage")

func usage(format string, args ...any) error {
	return &usageError{fmt.Errorf(format, args...)}
}

type usageError struct{ error }

func (e *usageError) Is(target error) bool { return target == ErrUsage }
func (e *usageError) Unwrap() error        { return e.error }

// Accesses lists the access patterns that need no file.
func Accesses() []string {
	list := role.Accesses()
	for _, name := range inputs.Programs() {
		list = append(list, role.ProgramPrefix+name)
	}
	return list
}

// OpSync: a writer at the source, destinations that follow.
const OpSync = "sync"

// OpSnapshot: a writer on this host, of whose region images are taken.
const OpSnapshot = "snapshot"

// Ops lists what a workload can do.
func Ops() []string { return []string{"read", "write", "mixed", OpSync, OpMigrate, OpSnapshot} }

// minBudget is the shortest time budget of a run.
const minBudget = time.Millisecond

// Resolve fills in defaults and validates the cell. Errors that match ErrUsage
// are of the request; others (region.ErrNotSupported, ErrNotPermitted) are of this
// machine, and the cell is then complete enough to be recorded as unsupported.
func (c *Cell) Resolve() error {
	if c.Strategies == nil {
		c.Strategies = all.Registry()
	}
	st, err := c.Strategies.Get(c.Strategy)
	if err != nil && c.Peer {
		c.Missing = fmt.Errorf("%s is a strategy of memsync-peers: run the figure with that program: %w", c.Strategy, region.ErrNotSupported)
		return c.Missing
	}
	if err != nil {
		return usage("%w", err)
	}
	info := st.Info()
	c.strategy = st
	def := func(s *string, v string) {
		if *s == "" || *s == "auto" {
			*s = v
		}
	}
	local := info.Can(strategies.LocalOnly)
	switch {
	case !local:
		def(&c.Transport, "nbd")
	case !slices.Contains([]string{"", "auto", "local"}, c.Transport):
		return usage("strategy %s has no source, so no transport %q; valid: local", c.Strategy, c.Transport)
	default:
		c.Transport = "local"
	}
	_, program := st.(strategies.Listener)
	if program {
		def(&c.Backend, "file")
	}
	def(&c.Backend, "memory")
	def(&c.Op, "read")
	def(&c.Access, "seq")
	def(&c.Via, "map")
	def(&c.Variant, Network)
	c.Threads = max(c.Threads, 1)
	if err := c.pickProgram(); err != nil {
		return err
	}
	madeErr := c.make()
	if errors.Is(madeErr, ErrUsage) {
		return madeErr
	}
	if madeErr != nil {
		c.Size = max(c.Size, inputs.Size)
	} else if c.Input != "" {
		fi, err := os.Stat(c.real(c.Input))
		switch {
		case err != nil:
			return usage("input: %w", err)
		case !fi.Mode().IsRegular():
			return usage("input %s: not a regular file", c.Input)
		case fi.Size() == 0:
			return usage("input %s: the file is empty; a region has at least 1 byte", c.Input)
		case c.Size > fi.Size():
			return usage("input %s: has %d bytes, fewer than the size asked for, %d", c.Input, fi.Size(), c.Size)
		case c.Size == 0:
			c.Size = fi.Size()
		}
	}
	if c.Chunk == 0 {
		c.Chunk = info.DefaultChunk
	}
	pulls := c.PullWorkers
	if c.PullWorkers < 0 {
		c.PullWorkers = info.PullWorkers
	}
	if c.PushWorkers < 0 {
		c.PushWorkers = info.PushWorkers
	}
	if err := c.validate(); err != nil {
		return err
	}
	if strings.HasPrefix(c.Access, "trace:") && madeErr == nil {
		if _, err := role.TracePages(c.real(c.Access), c.Size); err != nil {
			return usage("%w", err)
		}
	}
	c.kernel = kernelName()
	deviceErr := c.pickDevice(info)
	if errors.Is(deviceErr, ErrUsage) {
		return deviceErr
	}
	specs := all.Specs(st, c.Device, c.Transport, c.Backend)
	if c.params, err = param.New(specs, c.Settings); err != nil {
		return usage("%w", err)
	}
	if d, ok := st.(strategies.Defaulter); ok {
		inMemory := c.Transport == "local" && c.Backend == "memory" && c.Link.RTT == 0
		n, settings, err := d.Defaults(strategies.Options{Chunk: c.Chunk, PullWorkers: pulls, Params: c.params}, inMemory)
		if err != nil {
			return usage("%w", err)
		}
		c.PullWorkers = n
		if c.params, err = param.New(specs, slices.Concat(c.Settings, settings)); err != nil {
			return usage("%w", err)
		}
	}
	if c.Op == OpMigrate && c.Size < 2*region.PageSize() {
		return usage("op migrate with a region of %d bytes: the application needs two pages", c.Size)
	}
	if c.params.Has("order") && madeErr == nil {
		if spec := c.real(c.params.Text("order")); spec != order.FormatName {
			if _, err := order.Parse(spec, c.Size, 0); err != nil {
				return usage("%w", err)
			}
		}
	}
	if c.direct() && c.Via == "map" {
		return usage("o_direct goes past the page cache, which a mapping cannot: use --via file or path")
	}
	shaperErr := c.pickShaper()
	if errors.Is(shaperErr, ErrUsage) {
		return shaperErr
	}
	var opErr error
	files := c.params.IntOr("files", 1)
	switch {
	case (files > 1 || c.fileSystem() != "none") && c.Via != "map":
		return usage("files and file_system go with --via map only")
	case files > 1 && c.Size < int64(files)*region.PageSize():
		return usage("%d files of a region of %d bytes: each has at least a page", files, c.Size)
	case c.fileSystem() != "none" && (c.Op != "read" || c.Input != ""):
		return usage("file_system goes with --op read only, and without --input")
	case c.program != nil && (c.Op != "read" || c.Via != "map" || c.Warm || c.Limit == 0 || files > 1 || c.direct() || c.advice() != attach.AdviceNone):
		return usage("access %s: the program says itself how it reads the region: no other --op, --via, and settings files, o_direct and advice", c.Access)
	case c.program == nil && c.params.TextOr("fetch", download.Whole) != download.Whole:
		return usage("fetch=%s gives a program an address: use --access program:NAME", c.params.Text("fetch"))
	}
	if err := c.checkFanOut(); err != nil {
		return err
	}
	if c.Op == OpSync && c.params.TextOr("topology", strategies.TopologyDirect) != strategies.TopologyDirect && !info.Can(strategies.Relays) {
		opErr = fmt.Errorf("strategy %s, topology %s: its destinations serve no others: %w", c.Strategy, c.params.Text("topology"), region.ErrNotSupported)
	} else if _, ok := st.(strategies.Publisher); c.Op == OpSync && (!info.Can(strategies.Follows) || !ok && !program || c.Transport == "local") {
		opErr = fmt.Errorf("strategy %s, transport %s: no destination follows a writer at the source: %w", c.Strategy, c.Transport, region.ErrNotSupported)
	} else if c.Op == OpMigrate {
		opErr = c.migratable(info)
	} else if c.Op == OpSnapshot && !info.Can(strategies.Snapshots) {
		opErr = fmt.Errorf("strategy %s takes no images: %w", c.Strategy, region.ErrNotSupported)
	} else if c.Op != "read" && c.Op != OpSync && c.Op != OpSnapshot && !info.Can(strategies.Writes) {
		opErr = fmt.Errorf("strategy %s does not write back: %w", c.Strategy, region.ErrNotSupported)
	}
	var labErr error
	if c.Figure != "" && !c.InLab {
		labErr = c.LabDistorts()
	}
	return errors.Join(opErr, c.whole(info, program), madeErr, deviceErr, shaperErr, labErr)
}

// migratable says why an application at the source cannot go on at the destination.
func (c *Cell) migratable(info strategies.Info) error {
	switch {
	case c.Transport == "local":
		return fmt.Errorf("transport local has no source to migrate from: %w", region.ErrNotSupported)
	case info.Can(strategies.Migrates):
		return nil
	case !info.Can(strategies.Writes):
		return fmt.Errorf("strategy %s gives the destination no region that an application could go on writing: %w", c.Strategy, region.ErrNotSupported)
	case c.Backend != "file":
		return fmt.Errorf("strategy %s is closed and reopened, with a file that the application maps at the source: use --backend file, not %s: %w", c.Strategy, c.Backend, region.ErrNotSupported)
	}
	return nil
}

// whole says what a strategy that has a protocol or other programs of its own cannot serve.
func (c *Cell) whole(info strategies.Info, program bool) error {
	only := info.Transports
	if program {
		only = []string{"nbd"}
	}
	switch {
	case c.Transport != "local" && only != nil && !slices.Contains(only, c.Transport):
		return fmt.Errorf("strategy %s speaks its own protocol and has no transport %s; it goes with: %s: %w", c.Strategy, c.Transport, strings.Join(only, ", "), region.ErrNotSupported)
	case (c.Op == OpSync || c.Op == OpMigrate) && c.params.Has("tls") && c.params.Bool("tls"):
		return fmt.Errorf("op %s has no TLS: %w", c.Op, region.ErrNotSupported)
	case only != nil && c.params.Has("tls") && c.params.Bool("tls"):
		return fmt.Errorf("strategy %s speaks its own protocol, without TLS: %w", c.Strategy, region.ErrNotSupported)
	case program && c.Transport == "local":
		return fmt.Errorf("strategy %s has a server of its own and no transport local: %w", c.Strategy, region.ErrNotSupported)
	case program && c.Backend != "file":
		return fmt.Errorf("strategy %s serves a file: use --backend file, not %s: %w", c.Strategy, c.Backend, region.ErrNotSupported)
	case info.Whole > 0 && c.Size%info.Whole != 0:
		return fmt.Errorf("strategy %s serves regions of whole %d bytes, not %d: %w", c.Strategy, info.Whole, c.Size, region.ErrNotSupported)
	}
	return nil
}

// pickProgram finds the program of an access pattern program:NAME, and the input that
// it is for where none was named.
func (c *Cell) pickProgram() (err error) {
	name, ok := role.ProgramOf(c.Access)
	if !ok {
		return nil
	}
	p, err := inputs.Program(name)
	if err != nil {
		return usage("%w", err)
	}
	c.program = &p
	if c.Input == "" {
		c.Input, c.Size = inputs.Prefix+name, 0
	}
	return nil
}

// madeName is a name that package inputs knows, within a longer text.
var madeName = regexp.MustCompile(inputs.Prefix + `[a-z0-9]+(\.[a-z]+)?`)

// make makes the inputs that the cell names, where they are not there yet.
func (c *Cell) make() error {
	c.made = map[string]string{}
	for _, text := range append([]string{c.Input, c.Access}, c.Settings...) {
		for _, name := range madeName.FindAllString(text, -1) {
			path, err := inputs.Path(context.Background(), name)
			switch {
			case err == nil:
				c.made[name] = path
			case !slices.Contains(inputs.Names(), name):
				return usage("%w", err)
			default:
				return err
			}
		}
	}
	return nil
}

// real returns text with the paths of what was made.
func (c *Cell) real(text string) string {
	return madeName.ReplaceAllStringFunc(text, func(name string) string {
		if path, ok := c.made[name]; ok {
			return path
		}
		return name
	})
}

func (c *Cell) validate() error {
	if c.Size < 1 {
		return usage("size %d: a region has at least 1 byte", c.Size)
	}
	if err := region.CheckChunk(c.Chunk); err != nil {
		return usage("%w", err)
	}
	if !slices.Contains(Ops(), c.Op) {
		return usage("unknown operation %q; valid: %s", c.Op, strings.Join(Ops(), ", "))
	}
	if err := role.CheckAccess(c.Access, c.Threads); err != nil {
		return usage("%w", err)
	}
	if !slices.Contains([]string{"map", "file", "path"}, c.Via) {
		return usage("unknown way of access %q; valid: map, file, path", c.Via)
	}
	if !slices.Contains(backend.Names(), c.Backend) {
		return usage("unknown backend %q; valid: %s", c.Backend, strings.Join(backend.Names(), ", "))
	}
	if c.Transport != "local" {
		if _, err := all.Transport(c.Transport); err != nil {
			return usage("%w", err)
		}
	}
	if c.Budget < minBudget {
		return usage("time budget %v: want at least %v", c.Budget, minBudget)
	}
	if c.Think < 0 || c.Limit < WholeRegion {
		return usage("think time and limit must not be negative")
	}
	if err := c.Link.Validate(); err != nil {
		return usage("%w", err)
	}
	if _, err := ParsePlacement(c.CPUs); err != nil {
		return err
	}
	return nil
}

// pickDevice chooses the first of the strategy's devices that works here, or
// checks the one asked for.
func (c *Cell) pickDevice(info strategies.Info) error {
	if c.Device != "" && c.Device != "auto" {
		if !slices.Contains(info.Devices, c.Device) {
			if !slices.Contains(all.DeviceNames(), c.Device) {
				return usage("unknown device %q; valid: auto, %s", c.Device, strings.Join(all.DeviceNames(), ", "))
			}
			has := strings.Join(info.Devices, ", ")
			if has == "" {
				has = "none, as a baseline"
			}
			return fmt.Errorf("strategy %s has no device %s; it has: %s: %w", c.Strategy, c.Device, has, region.ErrNotSupported)
		}
		return probeDevice(c.Device)
	}
	var errs []error
	for _, d := range info.Devices {
		c.Device = d
		if d == "" {
			return nil
		}
		err := probeDevice(d)
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	c.Device = info.Devices[0]
	return errors.Join(errs...)
}

// shaped reports whether the link is anything but a plain veth.
func shaped(p netem.Profile) bool { return p.RTT != 0 || p.Jitter != 0 || p.Loss != 0 || p.Rate != 0 }

func (c *Cell) pickShaper() error {
	if c.Transport == "local" {
		switch {
		case c.Shaper == "" || c.Shaper == "auto":
			c.Shaper = netem.ShaperNone
			if c.Link.RTT > 0 {
				c.Shaper = netem.ShaperSleep
			}
		case c.Shaper != netem.ShaperNone && c.Shaper != netem.ShaperSleep:
			return usage("transport local has no link: use --shaper sleep or none, not %s", c.Shaper)
		}
		if c.Link.Rate != 0 || c.Link.Jitter != 0 || c.Link.Loss != 0 {
			return usage("transport local has no link: only --rtt can be imitated, by --shaper sleep")
		}
		if c.Shaper == netem.ShaperNone && c.Link.RTT != 0 {
			return usage("--shaper none does not delay: leave --rtt out or use --shaper sleep")
		}
		return nil
	}
	switch c.Shaper {
	case netem.ShaperSleep:
		return usage("--shaper sleep goes with --transport local only")
	case netem.ShaperNone:
		if shaped(c.Link) {
			return usage("--shaper none does not shape: leave RTT, rate, jitter and loss out, or use netem or tun")
		}
	case "", "auto":
		c.Shaper = netem.ShaperNone
		if shaped(c.Link) {
			c.Shaper = netem.ShaperNetem
			if probeShaper(netem.ShaperNetem) != nil {
				c.Shaper = netem.ShaperTun
			}
		}
	case netem.ShaperNetem, netem.ShaperTun:
	default:
		return usage("unknown shaper %q; valid: auto, netem, tun, sleep, none", c.Shaper)
	}
	if err := probeShaper(c.Shaper); err != nil {
		if errors.Is(err, netem.ErrNotSupported) {
			return fmt.Errorf("%w: %w", err, region.ErrNotSupported)
		}
		return fmt.Errorf("%w: %w", err, region.ErrNotPermitted)
	}
	return nil
}

// ParsePlacement parses "source=0,daemon=1,workload=0-1" into CPU lists by role.
func ParsePlacement(s string) (map[string]string, error) {
	m := map[string]string{}
	last := ""
	for _, f := range strings.Split(s, ",") {
		if f == "" && s == "" {
			break
		}
		r, cpus, ok := strings.Cut(f, "=")
		if !ok && last != "" { // "daemon=0,1": another CPU of the same role
			m[last] += "," + f
			continue
		}
		_, twice := m[r]
		if !ok || twice || !slices.Contains([]string{role.Source, role.Daemon, role.Workload}, r) {
			return nil, usage("placement %q: want source=, daemon= or workload=, each at most once, and CPU numbers", s)
		}
		m[r], last = cpus, r
	}
	for _, cpus := range m {
		list, err := role.ParseCPUs(cpus)
		if err != nil {
			return nil, usage("placement %q: %w", s, err)
		}
		if n := slices.Max(list); n >= runtime.NumCPU() {
			return nil, usage("placement %q: this machine has CPUs 0 to %d", s, runtime.NumCPU()-1)
		}
	}
	return m, nil
}

// Params returns all effective parameters as k=v;k=v, those without a column of
// their own among them.
func (c *Cell) Params() string {
	extra := []string{"via=" + c.Via, fmt.Sprintf("threads=%d", c.Threads), "think=" + c.Think.String(), "budget=" + c.Budget.String()}
	if c.Limit != WholeRegion {
		extra = append(extra, "limit="+region.FormatSize(c.Limit))
	}
	if c.Warm {
		extra = append(extra, "warm=true")
	}
	if c.Input != "" {
		extra = append(extra, "input="+strings.NewReplacer(";", "_", "\n", "_").Replace(c.Input))
	}
	kv := strings.Split(c.params.String(), ";")
	if c.strategy == nil { // a peer's, whose parameters are not known here: what was asked for
		kv = slices.Clone(c.Settings)
	}
	kv = append(slices.DeleteFunc(kv, func(s string) bool { return s == "" }), extra...)
	slices.Sort(kv)
	return strings.Join(kv, ";")
}

// Row returns the record of the cell, without what belongs to a run.
func (c *Cell) Row() results.Row {
	return results.Row{
		Figure: c.Figure, Variant: c.Variant, Strategy: c.Strategy, Device: c.Device, Transport: c.Transport, Backend: c.Backend,
		Kernel: c.kernel, Shaper: string(c.Shaper),
		RTTms: float64(c.Link.RTT) / 1e6, Jitterms: float64(c.Link.Jitter) / 1e6, Loss: c.Link.Loss, RateMbit: float64(c.Link.Rate) / 1e6,
		RegionBytes: c.Size, ChunkBytes: c.Chunk, Op: c.Op, Access: c.Access, PullWorkers: c.PullWorkers, PushWorkers: c.PushWorkers,
		CPUs: c.CPUs, Params: c.Params(),
	}
}

// Key names the cell within a sweep: equal cells have equal keys, on every machine,
// but others in the lab kernel.
func (c *Cell) Key() string {
	r := c.Row()
	if r.Kernel = ""; inLab() { // of which the same sweep may have records beside the machine's own
		r.Kernel = results.LabPrefix
	}
	h := fnv.New64a()
	h.Write([]byte(r.CellKey()))
	return fmt.Sprintf("%016x", h.Sum64())
}

// setup is what the roles must know of the cell.
func (c *Cell) setup(seed uint64, dir string) role.Setup {
	settings := c.params.Settings()
	for i, kv := range settings {
		settings[i] = c.real(kv)
	}
	mode := os.FileMode(0)
	if c.program != nil {
		mode = 0o700 // the program may be the region itself
	}
	return role.Setup{
		Mode: mode, Strategy: c.Strategy, Device: c.Device, Transport: c.Transport,
		Backend: backend.Spec{Backend: c.Backend, Size: c.Size, Chunk: c.Chunk, Settings: c.backendSettings(),
			Content: region.Content{Seed: seed}, Input: c.real(c.Input)},
		Chunk: c.Chunk, PullWorkers: c.PullWorkers, PushWorkers: c.PushWorkers, Settings: settings,
		ReadOnly: c.Op == "read" || c.Op == OpSync, Pwrite: c.Via != "map", Dir: dir,
	}
}

// backendSettings are those of the settings that are the backend's.
func (c *Cell) backendSettings() []string {
	var out []string
	for _, kv := range c.params.Settings() {
		name, _, _ := strings.Cut(kv, "=")
		if slices.ContainsFunc(backend.Params(c.Backend), func(s param.Spec) bool { return s.Name == name }) {
			out = append(out, kv)
		}
	}
	return out
}

// work is what the workload does.
func (c *Cell) work(seed uint64, dir string) role.Work {
	return role.Work{
		Op: c.Op, Access: c.real(c.Access), Threads: c.Threads, Think: c.Think, Limit: c.Limit, Budget: c.Budget, Seed: seed,
		Size: c.Size, Content: region.Content{Seed: seed}, Input: c.real(c.Input), Via: c.Via, Advice: c.advice(), Direct: c.direct(), Warm: c.Warm,
		FileSystem: c.fileSystem(), Files: c.params.IntOr("files", 1), Dir: dir, Program: c.program,
	}
}

// fileSystem is what lies between the device and the files that are the region.
func (c *Cell) fileSystem() string { return c.params.TextOr("file_system", "none") }

// advice is what the workload tells the kernel of its accesses.
func (c *Cell) advice() string {
	if !c.params.Has("advice") {
		return attach.AdviceNone
	}
	return c.params.Text("advice")
}

// direct reports whether the workload goes past the page cache.
func (c *Cell) direct() bool { return c.params.Has("o_direct") && c.params.Bool("o_direct") }

// Estimate guesses how long one run of the resolved cell takes, for progress and plans
// only: what its op moves at the link's rate, the round trips of what is fetched on
// demand, at most its budget, and what a run costs beside. A cell that cannot run takes no time.
func (c *Cell) Estimate() time.Duration {
	if c.Missing != nil {
		return 0
	}
	n := c.Size
	if c.Limit >= 0 {
		n = min(n, c.Limit)
	}
	rate := 3e9 // bit/s, a guess for an unlimited link
	if c.Link.Rate > 0 {
		rate = float64(c.Link.Rate)
	}
	seconds := func(s float64) time.Duration { return time.Duration(s * 1e9) }
	moved := func(bytes int64) time.Duration { return seconds(float64(bytes*8) / rate) }
	d := 200*time.Millisecond + 12*c.Link.RTT // processes, echoes, opening, closing
	if c.Floors {
		d += 300*time.Millisecond + moved(n)/2 // a bulk stream before every second run
	}
	switch c.Op {
	case OpSync:
		rounds, pulses := c.params.IntOr("sync_rounds", 0), c.params.IntOr("pulses", 0)
		fraction := 0.0
		if c.params.Has("dirty_fraction") {
			fraction = c.params.Float("dirty_fraction")
		}
		all := c.Size * int64(c.destinations())
		d += moved(all) + time.Duration(rounds)*(moved(int64(fraction*float64(all)))+seconds(float64(c.Size)/1e9)+2*c.Link.RTT)
		if pulses > 0 && c.params.Has("interval") {
			d += min(time.Duration(pulses)*c.params.Duration("interval")*3/7, c.Budget) + c.params.Duration("interval")
		}
		return d
	case OpMigrate:
		return d + warmUp + moved(c.Size) + c.params.Duration("settle") + 400*time.Millisecond
	case OpSnapshot:
		return d + min(c.Budget/4, time.Second) + time.Duration(c.params.Int("images"))*c.params.Duration("interval") + 200*time.Millisecond
	}
	if strings.HasPrefix(c.Access, "trace:") {
		if pages, err := role.TracePages(c.real(c.Access), c.Size); err == nil {
			n = int64(len(pages)) * region.PageSize()
		}
	}
	work := moved(n)
	if c.program != nil && !c.strategy.Info().Can(strategies.Copies) {
		return d + c.Budget + time.Second
	} else if c.program != nil {
		return d + work + c.Budget/4 + time.Second
	}
	if demand := c.demand(); demand > 0 {
		work = max(work, time.Duration(n/demand)*c.Link.RTT)
	}
	d += min(work+time.Duration(n/region.PageSize())*c.Think, c.Budget)
	if c.Op != "read" {
		d += moved(n) // Sync
	}
	return d
}

// demand is about how many bytes a strategy fetches in one round trip, one after another;
// 0 where it has many under way.
func (c *Cell) demand() int64 {
	switch {
	case isBaseline(c.Strategy) || c.PullWorkers > 1:
		return 0
	case c.params.Has("fault_around"):
		return c.params.Size("fault_around")
	case c.strategy != nil && c.strategy.Info().Can(strategies.Copies):
		return 0
	}
	return 128 << 10 // the kernel's read-ahead
}

// kernelName is the release of the running kernel; the lab kernel's begins with "lab".
func kernelName() string {
	k := kernelRelease()
	if inLab() {
		return results.LabPrefix + k
	}
	return k
}
