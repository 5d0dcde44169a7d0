package scenarios

import (
	"slices"
	"strings"
	"time"

	"memsync/netem"
	"memsync/results"
)

// Figure is a scenario that makes one plot: its cells, and how they are drawn.
type Figure struct {
	Spec results.FigureSpec
	// More are further pictures of the same records, each with a Name of its own.
	More []results.FigureSpec
	// Variants it has; nil is both.
	Variants []string
	// Cells makes the matrix of a variant; quick is the short form (three points
	// of x, time budgets).
	Cells func(variant string, quick bool) []*Cell
}

// Figures returns all figures, family by family.
func Figures() []Figure {
	return slices.Concat(
		rttFigures(),
		thesisFigures(),
		linkFigures(),
		labFigures(),
		collectorFigures(),
		pullFigures(),
		deviceFigures(),
		cacheFigures(),
		hashsyncFigures(),
		migrationFigures(),
		snapshotFigures(),
		transportFigures(),
		caseFigures(),
		backendFigures(),
		allFigures(),
	)
}

// strategySeries are the series of figures that compare strategies.
func strategySeries() []results.FigureSeries {
	return []results.FigureSeries{
		{Key: "userfaultfd", Label: "userfaultfd", Thesis: "userfaultfd"},
		{Key: "direct-mount", Label: "direct mount", Thesis: "direct"},
		{Key: "managed-mount", Label: "managed mount", Thesis: "managed"},
		{Key: "memory", Label: "memory (baseline)", Baseline: true},
		{Key: "disk", Label: "disk (baseline)", Baseline: true},
		{Key: "nbd-direct", Label: "NBD alone"},
	}
}

// remoteSeries leaves the baselines out.
func remoteSeries() []results.FigureSeries {
	return slices.DeleteFunc(strategySeries(), func(s results.FigureSeries) bool { return s.Baseline })
}

func rttAxis() results.Axis {
	return results.Axis{Column: "rtt_ms", Position: "rtt_measured_ms", Label: "RTT", Unit: "ms"}
}

// rttFigures are the main ones: every strategy against the round-trip time.
func rttFigures() []Figure {
	series := strategySeries()
	rtt := rttAxis()
	return []Figure{
		{
			Spec: results.FigureSpec{
				Name: "latency-first-chunk-rttvar-1", Title: "First-chunk latency by RTT", Kind: results.FigureLine,
				X: rtt, Y: results.Axis{Column: "latency_first_chunk", Label: "First-chunk latency", Unit: "ms", Scale: 1e3},
				Keys: []string{"strategy"}, Series: series, Thesis: "latency-first-chunk-rttvar-1",
				Note: "One load of the second page after open. The thesis: a pause before each backend call, mean of 5 runs.",
			},
			Cells: func(variant string, quick bool) []*Cell {
				return matrix("latency-first-chunk-rttvar-1", variant, points(quick, steps(0, 40, 2)), func(c *Cell) {
					c.Limit = 0
					c.Size = 256 << 20
					if variant == Thesis {
						c.Size = 4 << 30
						if c.Strategy == "memory" || c.Strategy == "disk" {
							c.Size = 4 << 20
						}
					}
				})
			},
		},
		{
			Spec: results.FigureSpec{
				Name: "throughput-rttvar-1", Title: "Sequential read throughput by RTT", Kind: results.FigureLine,
				X: rtt, Y: results.Axis{Column: "throughput", Label: "Read throughput", Unit: "MiB/s", Scale: 1.0 / (1 << 20), Log: true},
				Keys: []string{"strategy"}, Series: series, Thesis: "throughput-rttvar-1",
				Note: "From the first load to the last byte copied out. The thesis: no rate limit, a pause before each backend call, mean of 5 runs.",
			},
			Cells: func(variant string, quick bool) []*Cell {
				rtts := []int{0, 2, 4, 6, 8, 10, 12, 14, 22, 28, 34, 40}
				return matrix("throughput-rttvar-1", variant, points(quick, rtts), func(c *Cell) {
					c.Limit = WholeRegion
					c.Size = 64 << 20
					c.Floors = variant == Network
					if variant == Thesis {
						c.Size = thesisThroughputSize(c.Strategy, c.Link.RTT)
					}
				})
			},
		},
	}
}

// collectorFigures asks whether the fault handler should be written in a language without
// a garbage collector: the tail of the fault latency with the daemon's collector
// on, off, and under allocation load.
func collectorFigures() []Figure {
	spec := func(quantile, label string) results.FigureSpec {
		return results.FigureSpec{
			Name: "gc-tail-" + quantile, Figure: "gc-tail", Title: "Fault latency and the daemon's garbage collector: " + label, Kind: results.FigureBar,
			X:    results.Axis{Column: "params.gc", Label: "Collector of the daemon", Category: true},
			Y:    results.Axis{Column: "fault_latency_" + quantile, Label: "Fault latency, " + label, Unit: "us", Scale: 1e6},
			Keys: []string{"transport"}, Series: []results.FigureSeries{{Key: "local", Label: "transport local"}, {Key: "nbd", Label: "unshaped link"}},
			Note: "userfaultfd, one handler, 4 KiB faults in random order. load: the daemon allocates about 1 GB/s beside.",
		}
	}
	f := Figure{Spec: spec("p99", "99th percentile"), More: []results.FigureSpec{spec("p50", "median"), spec("p999", "99.9th percentile")}, Variants: []string{Network}}
	f.Spec.Name = "gc-tail"
	f.Cells = func(_ string, quick bool) []*Cell {
		var cells []*Cell
		for _, transport := range []string{"local", "nbd"} {
			for _, gc := range []string{"on", "off", "load"} {
				c := &Cell{Figure: "gc-tail", Variant: Network, Strategy: "userfaultfd", Transport: transport, Size: 256 << 20, Access: "random",
					PullWorkers: -1, PushWorkers: -1, Limit: WholeRegion, Budget: 10 * time.Second, Floors: true, Settings: []string{"gc=" + gc}}
				if quick {
					c.Size, c.Budget = 64<<20, 2*time.Second
				}
				cells = append(cells, c)
			}
		}
		return cells
	}
	return []Figure{f}
}

// thesisThroughputSize is how much the thesis read: it changed with the RTT.
func thesisThroughputSize(strategy string, rtt time.Duration) int64 {
	switch {
	case strategy == "managed-mount":
		return 400 << 20
	case strategy == "direct-mount" && rtt == 0:
		return 400 << 20
	case strategy == "direct-mount":
		return 4 << 20
	case strategy == "userfaultfd" && rtt == 0:
		return 40 << 20
	case strategy == "userfaultfd":
		return 4 << 10
	}
	return 256 << 20 // the baselines, which this figure of the thesis does not have
}

func steps(from, to, by int) []int {
	var x []int
	for ; from <= to; from += by {
		x = append(x, from)
	}
	return x
}

// points returns the RTTs in ms: all, or 0, 20 and 40 in the quick form.
func points(quick bool, all []int) []int {
	if quick {
		return []int{0, 20, 40}
	}
	return all
}

// NetworkRate is the link rate of the figures in variant network, bit/s: high
// enough that no strategy is bound by it at 0 ms but the fastest, low enough
// that every shaper reaches it on two cores.
const NetworkRate = 1_000_000_000

// cellOf is a cell of a figure, in the form of its variant: in the thesis's, a
// local store with a pause before each call, and its chunks and worker counts;
// else a link of NetworkRate. Baselines have no link.
func cellOf(figure, variant, strategy string, rtt time.Duration) *Cell {
	c := &Cell{Figure: figure, Variant: variant, Strategy: strategy, PullWorkers: -1, PushWorkers: -1, Limit: WholeRegion, Budget: 2 * time.Second}
	c.Link.RTT = rtt
	switch {
	case variant == Thesis:
		c.Transport, c.Chunk = "local", 4096
		if strategy == "direct-mount" || strategy == "managed-mount" {
			c.Settings = append(c.Settings, "read_ahead=128KiB") // the kernel's default, as in the thesis
		}
		if rtt > 0 {
			c.Shaper = netem.ShaperSleep
		}
		if strategy == "managed-mount" {
			c.PullWorkers, c.PushWorkers = 4096, 4096
		}
	case !isBaseline(strategy):
		c.Link.Rate = NetworkRate
	}
	return c
}

func isBaseline(strategy string) bool { return strategy == "memory" || strategy == "disk" }

// remotes are the strategies that a figure of both variants compares:
// nbd-direct needs a source across a link, so the thesis's variant has none.
func remotes(variant string) []string {
	if variant == Thesis {
		return []string{"userfaultfd", "direct-mount", "managed-mount"}
	}
	return []string{"userfaultfd", "direct-mount", "managed-mount", "nbd-direct"}
}

// matrix is the matrix of the rttvar figures: each remote strategy at every RTT, the
// baselines once.
func matrix(figure, variant string, rtts []int, set func(*Cell)) []*Cell {
	var cells []*Cell
	add := func(strategy string, rtt time.Duration) {
		c := cellOf(figure, variant, strategy, rtt)
		set(c)
		cells = append(cells, c)
	}
	add("memory", 0)
	add("disk", 0)
	for _, ms := range rtts {
		for _, s := range remotes(variant) {
			add(s, time.Duration(ms)*time.Millisecond)
		}
	}
	return cells
}

// Has reports whether the figure has the variant.
func (f Figure) Has(variant string) bool {
	return f.Variants == nil || slices.Contains(f.Variants, variant)
}

// Pictures returns the figure's pictures, its own first.
func (f Figure) Pictures() []results.FigureSpec {
	return append([]results.FigureSpec{f.Spec}, f.More...)
}

// FigureByName finds one of figures by its name or that of one of its pictures;
// the error of an unknown name lists the valid ones.
func FigureByName(figures []Figure, name string) (Figure, error) {
	var names []string
	for _, f := range figures {
		for _, p := range f.Pictures() {
			if p.Name == name {
				return f, nil
			}
			names = append(names, p.Name)
		}
	}
	return Figure{}, usage("unknown figure %q; valid: %s", name, strings.Join(names, ", "))
}

// Variants lists the variants of figures.
func Variants() []string { return []string{Thesis, Network} }

// CheckVariant returns the variants that name stands for: itself, or all for "both".
func CheckVariant(name string) ([]string, error) {
	if name == "both" {
		return Variants(), nil
	}
	for _, v := range Variants() {
		if v == name {
			return []string{v}, nil
		}
	}
	return nil, usage("unknown variant %q; valid: %s, both", name, strings.Join(Variants(), ", "))
}
