package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"memsync/plots"
	"memsync/results"
	"memsync/scenarios"
	"memsync/scenarios/lab"
	"memsync/strategies/probe"
)

type runOptions struct {
	all, quick, explain  bool
	variant, out, shard  string
	runs                 int
	seed                 uint64
	budget               time.Duration
	budgetSet, seedSet   bool
	figures              []string
	shardIndex, shardCnt int
}

func newRunCmd(s *state) *cobra.Command {
	o := &runOptions{}
	c := &cobra.Command{
		Use:   "run FIGURE... | --all",
		Short: "Run figures: records, plots and a table; goes on where it was stopped",
		Long: `Runs the scenarios of figures: every cell several times, shuffled, verified and
appended to runs.csv in the result folder, then drawn. Run the same command again
to go on after an interruption, whatever ended it.

A figure or series that this machine cannot make is recorded as unsupported, with
the reason.`,
		Example: `  memsync run throughput-rttvar-1 --quick
  memsync run latency-first-chunk-rttvar-1 throughput-rttvar-1 --variant thesis
  memsync run --all --shard 2/8 --out results/out/part2
  memsync run --all --quick --explain`,
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return s.program.pictureNames(), cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(c *cobra.Command, args []string) error {
			o.figures = args
			o.budgetSet, o.seedSet = c.Flags().Changed("budget"), c.Flags().Changed("seed")
			return runRun(s, o)
		},
	}
	f := c.Flags()
	f.BoolVar(&o.all, "all", false, "all figures")
	f.BoolVar(&o.quick, "quick", false, "three points of x a figure; smaller regions and budgets where the full form would take long")
	f.BoolVar(&o.explain, "explain", false, "say what would be run and about how long it would take, figure by figure, and stop")
	f.StringVar(&o.variant, "variant", scenarios.Network, "thesis (its sizes, a sleep for a network), network (a real shaped link) or both")
	f.StringVar(&o.out, "out", "", "result `folder` (default: results/out/NAME)")
	f.StringVar(&o.shard, "shard", "", "`i/n`: only the i-th of n parts of the sweep")
	f.IntVar(&o.runs, "runs", 6, "runs of each cell, 1 to 10000")
	f.Uint64Var(&o.seed, "seed", 1, "seed of order, content, accesses and links")
	durationFlag(f, &o.budget, "budget", 0, "time a run may spend reading (default: the figure's)")
	completions(c, map[string]func() []string{"variant": func() []string { return append(scenarios.Variants(), "both") }})
	return c
}

func (p Program) figureNames() []string {
	var names []string
	for _, f := range p.Figures {
		names = append(names, f.Spec.Name)
	}
	return names
}

// pictureNames are all names that run takes: those of figures, and of further
// pictures of their records.
func (p Program) pictureNames() []string {
	var names []string
	for _, f := range p.Figures {
		for _, spec := range f.Pictures() {
			names = append(names, spec.Name)
		}
	}
	return names
}

// check validates the options.
func (o *runOptions) check(p Program) (figures []scenarios.Figure, variants []string, err error) {
	if o.all == (len(o.figures) > 0) {
		return nil, nil, fmt.Errorf("name figures or give --all; valid: %s", strings.Join(p.pictureNames(), ", "))
	}
	if o.all {
		o.figures = p.figureNames()
	}
	for _, name := range o.figures {
		f, err := scenarios.FigureByName(p.Figures, name)
		if err != nil {
			return nil, nil, err
		}
		if !slices.ContainsFunc(figures, func(g scenarios.Figure) bool { return g.Spec.Name == f.Spec.Name }) {
			figures = append(figures, f)
		}
	}
	if variants, err = scenarios.CheckVariant(o.variant); err != nil {
		return nil, nil, err
	}
	if o.runs < 1 || o.runs > 10000 {
		return nil, nil, errors.New("--runs must be 1 to 10000")
	}
	if o.budgetSet && o.budget < time.Millisecond {
		return nil, nil, errors.New("--budget must be at least 1ms")
	}
	o.shardIndex, o.shardCnt = 1, 1
	if o.shard != "" {
		i, n, ok := strings.Cut(o.shard, "/")
		var err1, err2 error
		o.shardIndex, err1 = strconv.Atoi(i)
		o.shardCnt, err2 = strconv.Atoi(n)
		if !ok || err1 != nil || err2 != nil || o.shardIndex < 1 || o.shardIndex > o.shardCnt {
			return nil, nil, fmt.Errorf("--shard %q: want i/n with i from 1 to n", o.shard)
		}
	}
	if o.out == "" {
		name := "all"
		if len(o.figures) == 1 {
			name = o.figures[0]
		} else if !o.all {
			name = "run"
		}
		o.out = filepath.Join("results", "out", name)
	}
	return figures, variants, nil
}

func runRun(s *state, o *runOptions) error {
	figures, variants, err := o.check(s.program)
	if err != nil {
		return exitWith(exitUsage, err)
	}
	if o.explain {
		return explainRun(s, o, figures, variants)
	}
	scratch, err := sandbox(s)
	if err != nil || scratch == "" {
		return err
	}
	w, seed, err := openResults(s, o)
	if err != nil {
		return err
	}
	defer w.Close()
	if lab.Lost(o.out) {
		fmt.Fprintf(s.stderr, "memsync: warning: %s is in the lab's own memory and goes when the lab ends: name a folder that is not below /dev/shm, /run or $TMPDIR\n", o.out)
	}

	r := &scenarios.Runner{Scratch: scratch, Seed: seed}
	defer r.Close()
	status := &statuses{}
	cells, missing, err := planCells(s, o, figures, variants)
	if err != nil {
		return err
	}
	for i, err := range missing {
		if i == 3 {
			fmt.Fprintf(s.stderr, "and %d more cells that cannot run here\n", len(missing)-i)
			break
		}
		fmt.Fprintln(s.stderr, "cannot run here:", err)
	}
	items := scenarios.Shard(scenarios.Plan(cells, o.runs, seed), o.shardIndex, o.shardCnt)
	total := len(items)
	items = slices.DeleteFunc(items, func(it scenarios.Item) bool {
		st, closed := w.Closed(it.ID)
		if closed {
			status.add(scenarios.Outcome{Item: it, Status: st, Err: errors.New("recorded earlier")})
		}
		return closed
	})
	if n := total - len(items); n > 0 {
		fmt.Fprintf(s.stderr, "going on in %s: %d of %d runs are recorded already\n", o.out, n, total)
	}
	p := newProgress(s, "run")
	r.Log = p.Note
	p.Plan(items)
	hist, err := results.OpenHistograms(o.out)
	if err != nil {
		return exitWith(exitFailed, err)
	}
	defer hist.Close()
	evidence := &linkEvidence{dir: o.out}
	if evidence.manifest, err = results.ReadManifest(o.out); err != nil {
		return exitWith(exitFailed, err)
	}
	err = r.Sweep(s.ctx, items, p.Begin, func(out scenarios.Outcome) error {
		status.add(out)
		rows, err := out.Rows()
		// Before the rows: a recorded run always has its histograms and its link's calibration.
		if err == nil {
			err = hist.Append(histograms(out)...)
		}
		if err == nil {
			err = evidence.add(r)
		}
		if err == nil {
			err = w.Append(rows...)
		}
		p.End(out)
		return err
	})
	p.Close()
	if err != nil && s.ctx.Err() == nil {
		return exitWith(exitFailed, fmt.Errorf("record: %w", err))
	}
	if err := evidence.finish(r); err != nil {
		return exitWith(exitFailed, err)
	}
	if s.ctx.Err() == nil {
		if err := show(s, o.out, figures, variants); err != nil {
			return exitWith(exitFailed, err)
		}
	}
	return status.err(s, true)
}

// planCells makes the cells of figures, resolved, and says what cannot run here.
func planCells(s *state, o *runOptions, figures []scenarios.Figure, variants []string) (cells []*scenarios.Cell, missing []error, err error) {
	for _, f := range figures {
		for _, v := range variants {
			if !f.Has(v) {
				continue
			}
			for _, c := range f.Cells(v, o.quick) {
				if o.budgetSet {
					c.Budget = o.budget
				}
				c.Strategies = s.program.Strategies
				if err := c.Resolve(); err != nil {
					if errors.Is(err, scenarios.ErrUsage) {
						return nil, nil, exitWith(exitFailed, fmt.Errorf("figure %s, %s: %w", f.Spec.Name, c.Strategy, err))
					}
					missing = append(missing, fmt.Errorf("%s, %s, RTT %v: %w", f.Spec.Name, c.Strategy, c.Link.RTT, err))
					c.Missing = err
				}
				cells = append(cells, c)
			}
		}
	}
	return cells, missing, nil
}

// explainRun prints a line for each figure: its cells, those that cannot run here, runs, and
// about how long they take; the last line is the sum, with the calibration of the links.
func explainRun(s *state, o *runOptions, figures []scenarios.Figure, variants []string) error {
	cells, _, err := planCells(s, o, figures, variants)
	if err != nil {
		return err
	}
	type line struct {
		cells, missing, runs int
		took                 time.Duration
	}
	var order [][2]string
	lines := map[[2]string]*line{}
	var sum line
	for _, c := range cells {
		at := [2]string{c.Figure, c.Variant}
		if lines[at] == nil {
			lines[at], order = &line{}, append(order, at)
		}
		for _, l := range []*line{lines[at], &sum} {
			l.cells++
			if c.Missing != nil {
				l.missing++
			}
		}
	}
	items := scenarios.Shard(scenarios.Plan(cells, o.runs, o.seed), o.shardIndex, o.shardCnt)
	for _, it := range items {
		for _, l := range []*line{lines[[2]string{it.Cell.Figure, it.Cell.Variant}], &sum} {
			l.runs++
			l.took += it.Cell.Estimate()
		}
	}
	links, took := scenarios.EstimateLinks(items)
	out := [][]string{{"FIGURE", "VARIANT", "CELLS", "NOT HERE", "RUNS", "ABOUT"}}
	add := func(name, variant string, l line) {
		out = append(out, []string{name, variant, strconv.Itoa(l.cells), strconv.Itoa(l.missing), strconv.Itoa(l.runs), l.took.Round(time.Second).String()})
	}
	for _, at := range order {
		add(at[0], at[1], *lines[at])
	}
	out = append(out, []string{"links", "", "", "", strconv.Itoa(links), took.Round(time.Second).String()})
	sum.took += took
	add("all", "", sum)
	return writeColumns(s, out)
}

// openResults makes the result folder, or goes on in it with its own seed.
func openResults(s *state, o *runOptions) (*results.Writer, uint64, error) {
	m := results.NewManifest()
	m.Seed = o.seed
	features, err := json.Marshal(probe.Run(machineProbes(s)))
	if err != nil {
		return nil, 0, exitWith(exitFailed, err)
	}
	m.Features = features
	w, err := results.Create(o.out, m)
	if errors.Is(err, fs.ErrExist) {
		old, merr := results.ReadManifest(o.out)
		if merr != nil {
			return nil, 0, exitWith(exitFailed, merr)
		}
		if o.seedSet && old.Seed != o.seed {
			return nil, 0, exitWith(exitUsage, fmt.Errorf("%s was begun with seed %d; go on with that one, or name another --out", o.out, old.Seed))
		}
		o.seed = old.Seed
		if w, err = results.Open(o.out); err == nil && newKernel(old, m.Host) {
			m.Seed, old.Parts = old.Seed, append(old.Parts, m)
			err = w.WriteManifest(old)
		}
	}
	if err != nil {
		return nil, 0, exitWith(exitFailed, err)
	}
	return w, o.seed, nil
}

// newKernel reports whether a folder has no records of h's kernel yet.
func newKernel(m results.Manifest, h results.Host) bool {
	same := func(m results.Manifest) bool { return m.Host.Kernel == h.Kernel && m.Host.Lab == h.Lab }
	return !same(m) && !slices.ContainsFunc(m.Parts, same)
}

// histograms are the records of a run's histograms.
func histograms(o scenarios.Outcome) []results.HistogramRecord {
	var records []results.HistogramRecord
	if len(o.Histogram) > 0 {
		records = append(records, results.NewHistogramRecord(o.ID, results.TouchHistogram, o.Histogram))
	}
	if len(o.Requests) > 0 {
		records = append(records, results.NewHistogramRecord(o.ID, results.RequestHistogram, o.Requests))
	}
	return records
}

// linkEvidence keeps what a sweep's links have shown in the manifest of its folder.
type linkEvidence struct {
	dir      string
	manifest results.Manifest // as the sweep found it
	known    int              // of the sweep's links, those that the written one has
}

// add writes the manifest where links were opened since it was written.
func (e *linkEvidence) add(r *scenarios.Runner) error {
	links, calibrations := r.Evidence()
	if len(links) == e.known {
		return nil
	}
	m := e.manifest
	m.Links, m.Calibrations = slices.Concat(m.Links, links), slices.Concat(m.Calibrations, calibrations)
	if err := results.WriteManifest(e.dir, m); err != nil {
		return err
	}
	e.known = len(links)
	return nil
}

// finish writes the manifest at the end of the sweep.
func (e *linkEvidence) finish(r *scenarios.Runner) error {
	e.manifest.End, e.known = time.Now(), -1
	return e.add(r)
}

// show draws the figures of a result folder and prints the table.
func show(s *state, dir string, figures []scenarios.Figure, variants []string) error {
	rows, err := results.Read(dir)
	if errors.Is(err, results.ErrUnclosed) {
		fmt.Fprintf(s.stderr, "%s: %v\n", s.program.Name, err)
	} else if err != nil {
		return err
	}
	histograms, err := results.ReadHistograms(dir)
	if err != nil {
		return err
	}
	for _, f := range figures {
		for _, v := range variants {
			of := results.Filter(rows, func(r results.Row) bool { return r.Figure == f.Spec.Name && r.Variant == v })
			if len(of) == 0 {
				continue
			}
			if err := printFigure(s, f.Spec, v, of); err != nil {
				return err
			}
			for _, spec := range f.Pictures() {
				files, err := plots.Draw(of, histograms, spec, filepath.Join(dir, "plots"))
				if err != nil {
					fmt.Fprintf(s.stderr, "no picture of %s (%s): %v\n", spec.Name, v, err)
					continue
				}
				for _, file := range files {
					fmt.Fprintln(s.stdout, "picture:", file)
				}
			}
			fmt.Fprintln(s.stdout)
		}
	}
	drawn := drawnMetrics(s)
	for _, d := range results.Drifts(rows, func(figure, metric string) bool { return slices.Contains(drawn[figure], metric) }) {
		if d.Disturbed() {
			fmt.Fprintf(s.stderr, "the machine was not the same all the time: %s moved by %.0f %% from the first half of the runs to the second (p %.2g)\n",
				d.Metric, 100*d.Change.Float(), d.P.Float())
		}
	}
	fmt.Fprintln(s.stdout, "records:", filepath.Join(dir, results.RunsFile))
	return nil
}

func newPlotCmd(s *state) *cobra.Command {
	return &cobra.Command{
		Use:     "plot DIR",
		Short:   "Draw the figures of a result folder again, and print their table",
		Example: "  memsync plot results/out/throughput-rttvar-1",
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			err := show(s, args[0], s.program.Figures, scenarios.Variants())
			switch {
			case errors.Is(err, fs.ErrNotExist):
				return exitWith(exitUsage, err)
			case err != nil:
				return exitWith(exitFailed, err)
			}
			return nil
		},
	}
}
