package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"

	"memsync/scenarios/torture"
	"memsync/strategies/all"
	"memsync/strategies/backend"
	"memsync/strategies/region"
)

type tortureOptions struct {
	torture.Options
	only   string
	replay string
	seed   uint64 // that replay says
	json   bool
}

func newTortureCmd(s *state) *cobra.Command {
	o := &tortureOptions{}
	c := &cobra.Command{
		Use:   "torture",
		Short: "Run random programs against a model while links, processes and backends fail",
		Long: `Runs random programs of reads, writes, syncs, reopenings and kills against a plain
byte slice, while links are cut, stalled and slowed, sources and daemons are killed and
stopped, and backends fail, for as long as --time. What must hold: bytes equal the
model, what was synced survives, there is one owner, every call returns by its deadline, it goes
on once a fault is over, memory is bounded, nothing is left behind.

A program follows from its seed alone. Three levels: virtual, the layers of one strategy in one process on a
virtual clock; machines, the hand-over's state machines, on such a clock too; processes,
sources, daemons and workloads as users run them, over what this machine has.

A broken invariant is printed with the program's seed, its steps, and the command that
runs it again. Exit status: 0 all held; 1 one was broken; 3 bytes differed; 4 nothing that
--only takes works here; 6 wrong usage; 130 interrupted.`,
		Example: `  memsync torture --time 5m --seed 1
  memsync torture --only managed-mount/fuse --level processes
  memsync torture --soak --time 1h
  memsync torture --replay 844424930131968`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return runTorture(s, o) },
	}
	f := c.Flags()
	durationFlag(f, &o.Time, "time", time.Minute, "how long; programs under way are finished")
	f.Uint64Var(&o.Seed, "seed", 1, "of the campaign: which programs")
	f.IntVar(&o.Programs, "programs", 0, "stop after so many; 0 is no limit")
	f.StringSliceVar(&o.Levels, "level", nil, "virtual, machines or processes; may be repeated (default all)")
	f.StringVar(&o.only, "only", "", "`strategy/device/transport/backend`: only these; * is any, the last parts may be left out")
	f.IntVar(&o.Jobs, "jobs", 0, "programs at once on virtual clocks; 0 is one for each CPU but one")
	f.BoolVar(&o.Soak, "soak", false, "fail where a process that runs programs grows: memory, descriptors, goroutines, threads")
	f.StringVar(&o.replay, "replay", "", "run only the program of this `seed`, and print what it does")
	f.BoolVar(&o.json, "json", false, "print one JSON object")
	completions(c, map[string]func() []string{"level": torture.Levels, "only": s.program.Strategies.Names})
	return c
}

// check looks at what was asked.
func (o *tortureOptions) check(s *state) (err error) {
	if o.Options.Only, err = torture.ParseFilter(o.only); err != nil {
		return fmt.Errorf("--only %w", err)
	}
	for _, part := range []struct {
		what, name string
		valid      []string
	}{
		{"strategy", o.Only.Strategy, s.program.Strategies.Names()},
		{"device", o.Only.Device, all.DeviceNames()},
		{"transport", o.Only.Transport, append(all.TransportNames(), "local")},
		{"backend", o.Only.Backend, backend.Names()},
	} {
		if part.name != "" && !slices.Contains(part.valid, part.name) {
			return fmt.Errorf("--only %s: unknown %s %q; valid: %s", o.only, part.what, part.name, strings.Join(part.valid, ", "))
		}
	}
	for _, l := range o.Levels {
		if !slices.Contains(torture.Levels(), l) {
			return fmt.Errorf("--level %s: valid: %s", l, strings.Join(torture.Levels(), ", "))
		}
	}
	switch {
	case o.Time <= 0:
		return errors.New("--time: want more than 0")
	case o.Programs < 0:
		return fmt.Errorf("--programs %d: want 0 or more", o.Programs)
	case o.Jobs < 0 || o.Jobs > 256:
		return fmt.Errorf("--jobs %d: want 0 to 256", o.Jobs)
	}
	return nil
}

func runTorture(s *state, o *tortureOptions) error {
	if err := o.check(s); err != nil {
		return exitWith(exitUsage, err)
	}
	o.Known = s.program.Strategies
	levels := o.Levels
	if len(levels) == 0 {
		levels = torture.Levels()
	}
	if o.replay != "" {
		seed, err := strconv.ParseUint(o.replay, 10, 64)
		if err != nil {
			return exitWith(exitUsage, fmt.Errorf("--replay %s: want the number of a program", o.replay))
		}
		o.seed, levels = seed, []string{torture.LevelOf(seed)}
	}
	if slices.Contains(levels, torture.Processes) {
		// What real processes mount and start ends with the sandbox.
		scratch, err := sandbox(s)
		if scratch == "" {
			return err
		}
		o.Scratch = scratch
	}
	if o.replay != "" {
		return replayTorture(s, o)
	}
	p := newTortureProgress(s, o.Time)
	o.Ended = func(e torture.Ended) {
		p.end(e)
		if e.Error != "" {
			p.clear()
			fmt.Fprintf(s.stderr, "%s", story(s, e))
		}
	}
	report, err := torture.Run(s.ctx, o.Options)
	p.clear()
	if errors.Is(err, torture.ErrNothing) {
		return exitWith(exitUnsupported, err)
	} else if err != nil {
		return exitWith(exitFailed, err)
	}
	if o.json {
		e := json.NewEncoder(s.stdout)
		e.SetIndent("", "  ")
		if err := e.Encode(report); err != nil {
			return exitWith(exitFailed, err)
		}
	} else if err := printTorture(s, report); err != nil {
		return exitWith(exitFailed, err)
	}
	if s.ctx.Err() != nil {
		return exitWith(exitInterrupted, errors.New("interrupted"))
	}
	if err := verdict(report.Failures...); err != nil {
		return err
	}
	for _, k := range report.Soaked {
		if k.Error != "" {
			return exitWith(exitFailed, errors.New(k.Error))
		}
	}
	return nil
}

// verdict is the error of programs that failed.
func verdict(failures ...torture.Ended) error {
	code, n := exitFailed, 0
	for _, f := range failures {
		if f.Error == "" {
			continue
		}
		n++
		if f.Differ {
			code = exitCorrupt
		}
	}
	if n == 0 {
		return nil
	}
	return exitWith(code, fmt.Errorf("%d programs broke an invariant", n))
}

func replayTorture(s *state, o *tortureOptions) error {
	e, err := torture.Replay(s.ctx, o.Options, o.seed)
	switch {
	case s.ctx.Err() != nil:
		return exitWith(exitInterrupted, errors.New("interrupted"))
	case errors.Is(err, torture.ErrNothing):
		return exitWith(exitUnsupported, err)
	case err != nil:
		return exitWith(exitFailed, err)
	}
	if o.json {
		enc := json.NewEncoder(s.stdout)
		enc.SetIndent("", "  ")
		if err := enc.Encode(e); err != nil {
			return exitWith(exitFailed, err)
		}
	} else {
		fmt.Fprintf(s.stdout, "program %d, level %s, took %v\n%s\n", e.Seed, e.Level, e.Took.Round(time.Millisecond), strings.Join(e.Trace, "\n"))
		if e.Error != "" {
			fmt.Fprintln(s.stdout, e.Error)
		}
	}
	return verdict(e)
}

// storySteps is how much of a failed program is shown at once; --json and --replay have all.
const storySteps = 40

// story tells of a program that failed.
func story(s *state, e torture.Ended) string {
	var b strings.Builder
	fmt.Fprintf(&b, "\nprogram %d, level %s: %s\n", e.Seed, e.Level, e.Error)
	trace := e.Trace
	if len(trace) > storySteps {
		fmt.Fprintf(&b, "%s\n... %d lines left out\n", trace[0], len(trace)-storySteps)
		trace = trace[len(trace)-storySteps:]
	}
	for _, l := range trace {
		fmt.Fprintln(&b, l)
	}
	fmt.Fprintf(&b, "run it again: %s %s\n\n", s.program.Name, e.Replay())
	return b.String()
}

func printTorture(s *state, r *torture.Report) error {
	var w io.Writer = s.stdout
	if s.stdoutTTY {
		t := tabwriter.NewWriter(s.stdout, 0, 8, 2, ' ', 0)
		defer t.Flush()
		w = t
	}
	fmt.Fprintln(w, "level\tprograms\tschedule\treads\twrites\tsyncs\tfaults\tkills\tfailed calls\tcompared")
	for _, l := range torture.Levels() {
		if r.Programs[l] == 0 {
			continue
		}
		k := r.Counts[l]
		fmt.Fprintf(w, "%s\t%d\t%v\t%d\t%d\t%d\t%d\t%d\t%d\t%s\n", l, r.Programs[l], k.Scheduled.Round(time.Second),
			k.Reads, k.Writes, k.Syncs, k.Faults, k.Kills, k.Failed, region.FormatSize(k.Bytes))
	}
	if len(r.Missing) > 0 {
		fmt.Fprintln(w, "\nnot here\twhy")
		var names []string
		for n := range r.Missing {
			names = append(names, n)
		}
		slices.Sort(names)
		for _, n := range names {
			fmt.Fprintf(w, "%s\t%s\n", n, r.Missing[n])
		}
	}
	if len(r.Soaked) > 0 {
		fmt.Fprintln(w, "\nsoak\tprograms\theap\tresident\tdescriptors\tgoroutines\tthreads")
		for i, k := range r.Soaked {
			for _, at := range []struct {
				when string
				torture.Sample
			}{{"first", k.First}, {"last", k.Last}} {
				fmt.Fprintf(w, "process %d, %s\t%d\t%s\t%s\t%.0f\t%.0f\t%.0f\n", i+1, at.when, k.Programs,
					region.FormatSize(int64(at.Heap)), region.FormatSize(int64(at.Resident)), at.Descriptors, at.Goroutines, at.Threads)
			}
		}
	}
	_, err := fmt.Fprintf(w, "\nseed %d, %d programs broke an invariant\n", r.Seed, len(r.Failures))
	return err
}

// tortureProgress shows how long a campaign still takes: a bar on a terminal, now and
// then a line elsewhere.
type tortureProgress struct {
	s        *state
	bar      *progressbar.ProgressBar
	total    time.Duration
	began    time.Time
	last     time.Time
	programs int
	broken   int
}

func newTortureProgress(s *state, total time.Duration) *tortureProgress {
	p := &tortureProgress{s: s, total: total, began: time.Now(), last: time.Now()}
	if s.stderrTTY {
		p.bar = progressbar.NewOptions64(int64(total/time.Millisecond), progressbar.OptionSetWriter(s.stderr), progressbar.OptionSetDescription("torture"),
			progressbar.OptionSetPredictTime(true), progressbar.OptionSetElapsedTime(true), progressbar.OptionSetWidth(30),
			progressbar.OptionThrottle(200*time.Millisecond), progressbar.OptionClearOnFinish())
	}
	return p
}

func (p *tortureProgress) end(e torture.Ended) {
	p.programs++
	if e.Error != "" {
		p.broken++
	}
	took := min(time.Since(p.began), p.total)
	if p.bar != nil {
		p.bar.Describe(fmt.Sprintf("%d programs, %d broke an invariant", p.programs, p.broken))
		_ = p.bar.Set64(int64(took / time.Millisecond))
		return
	}
	if time.Since(p.last) > 10*time.Second {
		p.last = time.Now()
		fmt.Fprintf(p.s.stderr, "torture: %d programs, %d broke an invariant, about %v left\n", p.programs, p.broken, (p.total - took).Round(time.Second))
	}
}

func (p *tortureProgress) clear() {
	if p.bar != nil {
		_ = p.bar.Clear()
	}
}
