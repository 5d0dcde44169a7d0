package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"memsync/netem"
	"memsync/results"
	"memsync/scenarios"
	"memsync/strategies/all"
	"memsync/strategies/backend"
	"memsync/strategies/param"
	"memsync/strategies/region"
)

// unitValue is a flag whose text carries a unit.
type unitValue[T any] struct {
	p     *T
	parse func(string) (T, error)
	show  func(T) string
	kind  string
}

func (u unitValue[T]) Set(s string) (err error) { *u.p, err = u.parse(s); return err }
func (u unitValue[T]) String() string {
	if u.p == nil {
		return ""
	}
	return u.show(*u.p)
}
func (u unitValue[T]) Type() string { return u.kind }

func durationFlag(f *pflag.FlagSet, p *time.Duration, name string, def time.Duration, doc string) {
	*p = def
	show := func(d time.Duration) string {
		if d == 0 {
			return "0" // which --help leaves out as a default
		}
		return d.String()
	}
	f.Var(unitValue[time.Duration]{p, region.ParseDuration, show, "time"}, name, doc)
}

func sizeFlag(f *pflag.FlagSet, p *int64, name string, def int64, doc string) {
	*p = def
	f.Var(unitValue[int64]{p, region.ParseSize, region.FormatSize, "size"}, name, doc)
}

type measureOptions struct {
	encrypt               string
	cell                  scenarios.Cell
	profile, shaper       string
	rtt, jitter           time.Duration
	rate, queue           int64
	loss                  float64
	runs                  int
	seed                  uint64
	explain, asJSON       bool
	pullWorkers, pushWork int
}

func newMeasureCmd(s *state) *cobra.Command {
	o := &measureOptions{}
	o.cell.Strategies = s.program.Strategies
	c := &cobra.Command{
		Use:   "measure --strategy NAME",
		Short: "Measure one cell, now",
		Long: `Runs one strategy under one network a few times, each time in fresh processes,
checks every byte, and prints medians with 95 % confidence intervals (from 6 runs on).

Exit status: 0 all runs are ok; 1 a run failed; 3 bytes differ; 4 a feature is
missing here; 5 not permitted or the link could not be calibrated; 6 wrong usage;
130 interrupted.`,
		Example: `  memsync measure --strategy userfaultfd --rtt 20ms --rate 1gbit --size 16MiB --set fault_around=64KiB
  memsync measure --strategy managed-mount --profile regional --input FILE --json
  memsync measure --strategy userfaultfd --transport local --shaper none --cpus daemon=0,workload=0`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return runMeasure(s, c.Flags(), o) },
	}
	f := c.Flags()
	k := &o.cell
	f.StringVar(&k.Strategy, "strategy", "", "`name` of the strategy (memsync list strategies); required")
	f.StringVar(&k.Device, "device", "auto", "auto, fuse, nbd, ublk or uffd")
	f.StringVar(&k.Transport, "transport", "nbd", "nbd, grpc, drpc, quic, jsonrpc, or local: the daemon holds the data itself")
	f.StringVar(&k.Backend, "backend", "auto", "where the source keeps the data: "+strings.Join(backend.Names(), ", ")+" (auto: memory, file where another program serves it)")
	f.StringVar(&o.profile, "profile", "", "named network (memsync list profiles); the flags below override its values")
	durationFlag(f, &o.rtt, "rtt", 0, "round-trip time, half on each end")
	f.Var(unitValue[int64]{&o.rate, region.ParseRate, rateText, "rate"}, "rate", "link rate per direction; 0 is unlimited")
	durationFlag(f, &o.jitter, "jitter", 0, "standard deviation of the delay per direction")
	f.Var(unitValue[float64]{&o.loss, region.ParseFraction, func(f float64) string { return fmt.Sprintf("%g%%", f*100) }, "fraction"}, "loss", "loss per direction, 1% or 0.01")
	sizeFlag(f, &o.queue, "queue", 0, "bottleneck queue; 0 is 1 BDP, at least 64 KiB")
	f.StringVar(&o.shaper, "shaper", "auto", "auto (netem, else tun; none without network flags), netem, tun, sleep or none")
	sizeFlag(f, &k.Size, "size", 64<<20, "region size, any number of bytes from 1")
	sizeFlag(f, &k.Chunk, "chunk", 0, "chunk size, a power of two from a page on (default: the strategy's)")
	f.StringVar(&k.Input, "input", "", "`file` whose content the region has (size: the file's); made:NAME makes one (docs/pull-order.md)")
	f.StringVar(&k.Op, "op", "read", "read, write, mixed, sync (a writer at the source), migrate (an application that moves) or snapshot (images of what a writer here writes)")
	f.StringVar(&k.Access, "access", "seq", "seq, random, random:SIZE (blocks), reverse, zipf, trace:FILE (docs/pull-order.md) or program:NAME (docs/cases.md)")
	f.StringVar(&k.Via, "via", "map", "how the workload accesses the region: map, file (one handle) or path (opened for each access)")
	f.IntVar(&k.Threads, "threads", 1, "threads of the workload, 1 to 256")
	durationFlag(f, &k.Think, "think", 0, "pause after each touch")
	f.IntVar(&o.pullWorkers, "pull-workers", -1, "background pulls in flight; 0 is none (default: the strategy's)")
	f.IntVar(&o.pushWork, "push-workers", -1, "background pushes in flight; 0 is none (default: the strategy's)")
	f.Lookup("pull-workers").DefValue, f.Lookup("push-workers").DefValue = "0", "0" // -1 means nothing to a reader of --help
	f.StringVar(&o.encrypt, "encrypt", "", "encrypt chunks before the backend has them, with the key in `KEYFILE` (32 bytes, or these in hexadecimal or base64), or env for MEMSYNC_ENCRYPTION_KEY; with the backends that keep chunks")
	f.StringArrayVar(&k.Settings, "set", nil, "`key=value`: a parameter of the strategy, device, transport or backend (--explain lists them); may be repeated")
	f.StringVar(&k.CPUs, "cpus", "", "`placement`, such as source=0,daemon=1,workload=1 (default: the scheduler's)")
	f.IntVar(&o.runs, "runs", 6, "number of runs, 1 to 10000")
	durationFlag(f, &k.Budget, "budget", 10*time.Second, "time a run may spend reading or writing")
	f.Uint64Var(&o.seed, "seed", 1, "seed of content, accesses and the link")
	f.BoolVar(&o.explain, "explain", false, "say what would be measured and how, and stop")
	f.BoolVar(&o.asJSON, "json", false, "print one JSON object (docs/measure.schema.json)")
	completions(c, map[string]func() []string{
		"strategy": s.program.Strategies.Names,
		"device":   func() []string { return append([]string{"auto"}, all.DeviceNames()...) },
		"profile":  profileNames, "transport": func() []string { return append(all.TransportNames(), "local") },
		"op": scenarios.Ops, "access": func() []string { return scenarios.Accesses() },
		"shaper": func() []string { return []string{"auto", "netem", "tun", "sleep", "none"} },
	})
	return c
}

// completions registers the fixed values of flags for shell completion.
func completions(c *cobra.Command, values map[string]func() []string) {
	for flag, f := range values {
		_ = c.RegisterFlagCompletionFunc(flag, func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return f(), cobra.ShellCompDirectiveNoFileComp
		})
	}
}

func profileNames() []string {
	var names []string
	for _, p := range netem.Profiles() {
		names = append(names, p.Name)
	}
	return names
}

func rateText(r int64) string {
	if r == 0 {
		return "0"
	}
	return fmt.Sprintf("%gmbit", float64(r)/1e6)
}

// resolve turns flags into a cell.
func (o *measureOptions) resolve(f *pflag.FlagSet) error {
	c := &o.cell
	if c.Strategy == "" {
		return exitWith(exitUsage, fmt.Errorf("--strategy is required; valid: %s", strings.Join(c.Strategies.Names(), ", ")))
	}
	if o.encrypt != "" {
		if !backend.Chunked(c.Backend) {
			return exitWith(exitUsage, fmt.Errorf("--encrypt with --backend %s: it keeps no chunks to encrypt; valid: %s", c.Backend, strings.Join(slices.DeleteFunc(backend.Names(), func(n string) bool { return !backend.Chunked(n) }), ", ")))
		}
		if o.encrypt != "env" {
			path, err := filepath.Abs(o.encrypt)
			if err != nil {
				return exitWith(exitUsage, err)
			}
			o.encrypt = path
		}
		c.Settings = append(c.Settings, "encrypt="+o.encrypt)
	}
	if o.profile != "" {
		p, err := netem.ProfileByName(o.profile)
		if err != nil {
			return exitWith(exitUsage, err)
		}
		c.Link = p
	}
	for name, set := range map[string]func(){
		"rtt": func() { c.Link.RTT = o.rtt }, "rate": func() { c.Link.Rate = o.rate }, "jitter": func() { c.Link.Jitter = o.jitter },
		"loss": func() { c.Link.Loss = o.loss }, "queue": func() { c.Link.QueueBytes = o.queue },
	} {
		if f.Changed(name) {
			set()
		}
	}
	if !f.Changed("transport") {
		c.Transport = "" // nbd, or what a strategy that has no source has
	}
	if o.queue != 0 && c.Link.Rate == 0 {
		return exitWith(exitUsage, fmt.Errorf("--queue %s: the link has no rate, and so no bottleneck: add --rate", region.FormatSize(o.queue)))
	}
	c.Shaper = netem.Shaper(o.shaper)
	if c.Input != "" && !f.Changed("size") {
		c.Size = 0
	}
	if f.Changed("pull-workers") && o.pullWorkers < 0 || f.Changed("push-workers") && o.pushWork < 0 {
		return exitWith(exitUsage, errors.New("workers: 0 means none; a negative number means nothing"))
	}
	if c.Threads < 1 || c.Threads > 256 || o.runs < 1 || o.runs > 10000 {
		return exitWith(exitUsage, errors.New("--threads must be 1 to 256 and --runs 1 to 10000"))
	}
	if f.Changed("chunk") && c.Chunk == 0 {
		return exitWith(exitUsage, errors.New("chunk size 0: must be a power of two and at least the page size"))
	}
	if f.Changed("size") && c.Size == 0 {
		return exitWith(exitUsage, errors.New("size 0: a region has at least 1 byte"))
	}
	c.PullWorkers, c.PushWorkers = o.pullWorkers, o.pushWork
	c.Limit, c.Floors = scenarios.WholeRegion, true
	return resolveError(c.Resolve())
}

// resolveError gives a cell's error its exit code.
func resolveError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, scenarios.ErrUsage):
		return exitWith(exitUsage, err)
	case errors.Is(err, region.ErrNotSupported) && !errors.Is(err, region.ErrNotPermitted): // of both, the latter
		return exitWith(exitUnsupported, err)
	}
	return exitWith(exitNotPermitted, err)
}

func runMeasure(s *state, f *pflag.FlagSet, o *measureOptions) error {
	// Wrong usage is told without a sandbox; the machine is judged inside it.
	outer := *o
	outer.cell.Settings = slices.Clone(o.cell.Settings)
	if err := outer.resolve(f); err != nil {
		var e *exitError
		if errors.As(err, &e) && e.code == exitUsage {
			return err
		}
	}
	scratch, err := sandbox(s)
	var resolveErr error
	switch {
	case errors.Is(err, region.ErrNotPermitted): // no run can be made, which the object says
		o.cell, resolveErr = outer.cell, err
	case err != nil || scratch == "":
		return err
	default:
		resolveErr = o.resolve(f)
	}
	report := scenarios.NewReport(&o.cell, o.runs, o.seed)
	if o.explain {
		explain(s.stdout, &o.cell, report)
		return resolveErr
	}
	r := &scenarios.Runner{Scratch: scratch, Seed: o.seed}
	p := newProgress(s, "measure")
	r.Log = p.Note
	status := &statuses{}
	items := scenarios.Plan([]*scenarios.Cell{&o.cell}, o.runs, o.seed)
	if resolveErr != nil { // said once, at the end; the object has it in each run
		o.cell.Missing = resolveErr
		for _, it := range items {
			report.Add(r.Run(s.ctx, it))
		}
	} else {
		if err := o.cell.LabDistorts(); err != nil {
			fmt.Fprintf(s.stderr, "%s: warning: %v\n", s.program.Name, err)
		}
		p.Plan(items)
		_ = r.Sweep(s.ctx, items, p.Begin, func(out scenarios.Outcome) error {
			report.Add(out)
			status.add(out)
			p.End(out)
			return nil
		})
	}
	report.Finish(r.Evidence())
	closeErr := r.Close()
	p.Close()
	if o.asJSON {
		enc := json.NewEncoder(s.stdout)
		enc.SetIndent("", "  ")
		if err := enc.Encode(report); err != nil {
			return exitWith(exitFailed, err)
		}
	} else if resolveErr == nil {
		if err := printReport(s, &o.cell, report); err != nil {
			return exitWith(exitFailed, err)
		}
	}
	if resolveErr != nil {
		return resolveErr
	}
	if closeErr != nil {
		return exitWith(exitFailed, closeErr)
	}
	return status.err(s, false)
}

// sandbox returns the scratch folder where this process is inside the sandbox.
// Outside it runs the same command inside and returns its exit status as an
// error (nil for 0) and no scratch folder.
func sandbox(s *state) (scratch string, err error) {
	code := 0
	scratch, inside := scenarios.Sandboxed()
	if inside {
		err = scenarios.SetUpSandbox()
	} else {
		code, err = scenarios.EnterSandbox(s.ctx)
	}
	if errors.Is(err, region.ErrNotPermitted) {
		return "", exitWith(exitNotPermitted, err)
	}
	if err != nil {
		code := exitFailed
		if s.ctx.Err() != nil {
			code = exitInterrupted
		}
		return "", exitWith(code, err)
	}
	if code != 0 {
		return "", &exitError{code: code}
	}
	return scratch, nil
}

// statuses collects how runs ended, for the exit code.
type statuses struct {
	count map[results.Status]int
	first map[results.Status]error
}

// notPermitted stands beside the statuses of package results: a run that failed
// for want of permission.
const notPermitted results.Status = "not permitted"

func (t *statuses) add(o scenarios.Outcome) {
	if t.count == nil {
		t.count, t.first = map[results.Status]int{}, map[results.Status]error{}
	}
	st := o.Status
	if st == results.StatusFailed && (errors.Is(o.Err, region.ErrNotPermitted) || errors.Is(o.Err, netem.ErrNotPermitted)) {
		st = notPermitted
	}
	t.count[st]++
	if t.first[st] == nil {
		t.first[st] = o.Err
	}
}

// err is the error of all runs together: bytes that differ before failures before
// what could not be told before what is missing. Listed says that a missing
// feature is only listed, not an error.
func (t *statuses) err(s *state, listed bool) error {
	if s.ctx.Err() != nil || t.count[results.StatusInterrupted] > 0 {
		return exitWith(exitInterrupted, errors.New("interrupted; the records are valid"))
	}
	for _, e := range []struct {
		status results.Status
		code   int
	}{
		{results.StatusCorrupt, exitCorrupt}, {results.StatusFailed, exitFailed}, {results.StatusTimeout, exitFailed},
		{notPermitted, exitNotPermitted}, {results.StatusUncalibrated, exitNotPermitted}, {results.StatusUnsupported, exitUnsupported},
	} {
		n := t.count[e.status]
		if n == 0 || listed && e.status == results.StatusUnsupported {
			continue
		}
		return exitWith(e.code, fmt.Errorf("%d runs are %s; the first: %w", n, e.status, t.first[e.status]))
	}
	return nil
}

// explain says what would be measured.
func explain(w io.Writer, c *scenarios.Cell, r *scenarios.Report) {
	var keys []string
	for k := range r.Cell {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	fmt.Fprintln(w, "What would be measured:")
	for _, k := range keys {
		if k != "params" {
			fmt.Fprintf(w, "  %-14s %v\n", k, r.Cell[k])
		}
	}
	st, err := c.Strategies.Get(c.Strategy)
	if err != nil {
		return
	}
	info := st.Info()
	fmt.Fprintf(w, "\n%s: %s\nConsistency: %s\n\nParameters (--set):\n", info.Name, info.Doc, info.Consistency)
	printParams(w, all.Specs(st, c.Device, c.Transport, c.Backend), c.Params())
}

func printParams(w io.Writer, specs []param.Spec, values string) {
	set := map[string]string{}
	for kv := range strings.SplitSeq(values, ";") {
		k, v, _ := strings.Cut(kv, "=")
		set[k] = v
	}
	for _, p := range specs {
		v := set[p.Name]
		if v == "" {
			v = p.Default
		}
		kind := string(p.Kind)
		if p.Kind == param.KindEnum {
			kind = strings.Join(p.Values, "|")
		}
		fmt.Fprintf(w, "  %s=%s (%s)\n      %s\n", p.Name, v, kind, p.Doc)
	}
}
