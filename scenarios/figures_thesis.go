package scenarios

import (
	"fmt"
	"time"

	"memsync/results"
)

// thesisFigures are the other figures of the thesis about latency, throughput,
// worker counts, writes and chunking.
func thesisFigures() []Figure {
	return []Figure{
		latencyWithoutDelay(),
		throughputWithoutDelay(),
		latencyByWorkers(),
		throughputByWorkers(),
		writeByRTT(),
		splitByRTT(),
	}
}

// alsoAs is the picture called name of a figure's records: its spec, changed by set.
func alsoAs(spec results.FigureSpec, name string, set func(*results.FigureSpec)) results.FigureSpec {
	spec.Figure, spec.Name = spec.Name, name
	if results.Thesis(name) != nil {
		spec.Thesis = name
	}
	set(&spec)
	return spec
}

// withThesisBaselines adds the thesis's baselines, which stand in its figures without delay.
func withThesisBaselines(series []results.FigureSeries) []results.FigureSeries {
	for i := range series {
		if series[i].Baseline {
			series[i].Thesis = series[i].Key
		}
	}
	return series
}

func acrossLink() map[string][]string { return map[string][]string{"strategy": remotes(Network)} }

func latencyWithoutDelay() Figure {
	const name = "latency-first-chunk-rtt0-1"
	f := Figure{Spec: results.FigureSpec{
		Name: name, Title: "First-chunk latency without delay", Kind: results.FigureBar,
		Y:    results.Axis{Column: "latency_first_chunk", Label: "First-chunk latency", Unit: "us", Scale: 1e6, Log: true},
		Keys: []string{"strategy"}, Series: withThesisBaselines(strategySeries()), Thesis: name,
		Note: "One load of the second page after open. The thesis: mean of 100 runs, 4 GiB, no network; its disk is a file that was never written.",
	}}
	f.More = []results.FigureSpec{alsoAs(f.Spec, "latency-first-chunk-rtt0-2", func(s *results.FigureSpec) {
		s.Title, s.Kind, s.Where, s.Series = "Spread of the first-chunk latency without delay", results.FigureBox, acrossLink(), remoteSeries()
		s.Note = "One load of the second page after open. The thesis: 100 runs, 4 GiB, no network; its managed mount has outliers up to 1750 us."
	})}
	f.Cells = func(variant string, _ bool) []*Cell {
		return matrix(name, variant, []int{0}, func(c *Cell) {
			c.Limit, c.Size = 0, 256<<20
			if variant == Thesis {
				c.Size = 4 << 30
				if isBaseline(c.Strategy) {
					c.Size = 4 << 20
				}
			}
		})
	}
	return f
}

func throughputWithoutDelay() Figure {
	const name = "throughput-rtt0-1"
	f := Figure{Spec: results.FigureSpec{
		Name: name, Title: "Sequential read throughput without delay", Kind: results.FigureBar,
		Y:    results.Axis{Column: "throughput", Label: "Read throughput", Unit: "MiB/s", Scale: 1.0 / (1 << 20), Log: true},
		Keys: []string{"strategy"}, Series: withThesisBaselines(strategySeries()), Thesis: name,
		Note: "From the first load to the last byte copied out. The thesis: mean of 10 runs, no network, a backend that moves no data, holes for a disk.",
	}}
	f.More = []results.FigureSpec{
		alsoAs(f.Spec, "throughput-rtt0-2", func(s *results.FigureSpec) {
			s.Title, s.Where, s.Series = "Sequential read throughput without delay, across the link", acrossLink(), remoteSeries()
		}),
		alsoAs(f.Spec, "throughput-rtt0-3", func(s *results.FigureSpec) {
			s.Title, s.Kind, s.Where, s.Series = "Spread of the sequential read throughput without delay", results.FigureBox, acrossLink(), remoteSeries()
		}),
	}
	f.Cells = func(variant string, quick bool) []*Cell {
		return matrix(name, variant, []int{0}, func(c *Cell) {
			c.Size = 64 << 20
			if variant == Thesis {
				if c.Size = thesisThroughputSize(c.Strategy, 0); isBaseline(c.Strategy) && !quick {
					c.Size = 4 << 30
				}
			}
		})
	}
	return f
}

// workers is the matrix of figures about pull workers: a managed mount at each RTT.
func workers(name, variant string, counts, rtts []int, set func(*Cell)) []*Cell {
	var cells []*Cell
	for _, ms := range rtts {
		for _, n := range counts {
			c := cellOf(name, variant, "managed-mount", time.Duration(ms)*time.Millisecond)
			c.PullWorkers = n
			c.Settings = append(c.Settings, "window=0") // as many requests in flight as there are workers
			set(c)
			cells = append(cells, c)
		}
	}
	return cells
}

func workerSeries(counts []int) []results.FigureSeries {
	var s []results.FigureSeries
	for _, n := range counts {
		s = append(s, results.FigureSeries{Key: fmt.Sprint(n), Label: fmt.Sprintf("%d workers", n), Thesis: fmt.Sprintf("workers=%d", n)})
	}
	return s
}

func latencyByWorkers() Figure {
	const name = "latency-first-chunk-workervar-1"
	counts, rtts := []int{0, 1, 16, 512}, []int{0, 5, 10, 15, 20, 30}
	return Figure{
		Spec: results.FigureSpec{
			Name: name, Title: "First-chunk latency of the managed mount by pull workers", Kind: results.FigureLine,
			X: rttAxis(), Y: results.Axis{Column: "latency_first_chunk", Label: "First-chunk latency", Unit: "ms", Scale: 1e3, Log: true},
			Keys: []string{"pull_workers"}, Series: workerSeries(counts), Thesis: name,
			Note: "One load of the second page after open, the first 128 KiB are pulled while opening. 0 workers pull nothing in the background; in the thesis 0 means 512.",
		},
		Cells: func(variant string, quick bool) []*Cell {
			if quick {
				rtts = []int{0, 10, 30}
			}
			return workers(name, variant, counts, rtts, func(c *Cell) {
				c.Limit, c.Size = 0, 256<<20
				if variant == Thesis {
					c.Size = 4 << 30
				}
			})
		},
	}
}

func throughputByWorkers() Figure {
	const name = "throughput-workervar-1"
	all := []int{0, 1, 16, 512, 2048, 4092, 8192, 16384}
	return Figure{
		Spec: results.FigureSpec{
			Name: name, Title: "Sequential read throughput of the managed mount by pull workers", Kind: results.FigureLine,
			X: rttAxis(), Y: results.Axis{Column: "throughput", Label: "Read throughput", Unit: "MiB/s", Scale: 1.0 / (1 << 20), Log: true},
			Keys: []string{"pull_workers"}, Series: workerSeries(all), Thesis: name,
			Note: "A worker moves up to 512 KiB in a request; the thesis's 4 KiB, and its 0 means 512. With 0, 1 and 16 workers and a delay the thesis reads 4 MiB, else 400 MiB.",
		},
		Cells: func(variant string, quick bool) []*Cell {
			counts, rtts := all, []int{0, 5, 10, 15, 20, 30}
			if quick {
				counts, rtts = []int{0, 1, 16, 4092}, []int{0, 10, 30}
			}
			return workers(name, variant, counts, rtts, func(c *Cell) {
				if c.Size = 64 << 20; quick {
					c.Size, c.Budget = 32<<20, time.Second
				}
				if variant == Thesis {
					c.Size = 400 << 20
					if c.PullWorkers <= 16 && c.Link.RTT > 0 {
						c.Size = 4 << 20
					}
				}
			})
		},
	}
}

func writeByRTT() Figure {
	const name = "throughput-write-rttvar-1"
	f := Figure{Spec: results.FigureSpec{
		Name: name, Title: "Write throughput by RTT", Kind: results.FigureLine,
		X: rttAxis(), Y: results.Axis{Column: "throughput", Label: "Write throughput", Unit: "MiB/s", Scale: 1.0 / (1 << 20), Log: true},
		Keys: []string{"strategy"}, Series: remoteSeries()[1:], Thesis: name, // userfaultfd does not write back
		Note: "4 KiB writes past the page cache (O_DIRECT), one after another; pushing what the managed mount has cached is not in it. The thesis: 4 MiB, mean of 5 runs.",
	}}
	f.More = []results.FigureSpec{alsoAs(f.Spec, "throughput-write-rttvar-1-synced", func(s *results.FigureSpec) {
		s.Title, s.Thesis = "Time until the source has what was written, by RTT", ""
		s.Y = results.Axis{Column: "total_time", Label: "Write and sync", Unit: "s", Log: true}
		s.Note = "4 MiB in 4 KiB writes past the page cache (O_DIRECT), then fsync and Sync; where a run's time is over first, less."
	})}
	f.Cells = func(variant string, quick bool) []*Cell {
		rtts := steps(0, 6, 1)
		if quick {
			rtts = []int{0, 2, 6}
		}
		var cells []*Cell
		for _, ms := range rtts {
			for _, s := range remotes(variant) {
				if s == "userfaultfd" { // it does not write back
					continue
				}
				c := cellOf(name, variant, s, time.Duration(ms)*time.Millisecond)
				c.Op, c.Via, c.Size = "write", "file", 4<<20
				c.Settings = append(c.Settings, "o_direct=true")
				cells = append(cells, c)
			}
		}
		return cells
	}
	return f
}

// splitByRTT asks on which side of the link requests should be cut into pieces.
func splitByRTT() Figure {
	const name = "chunking-local-remote-1"
	series := []results.FigureSeries{
		{Key: "direct-mount/source", Label: "direct, source's side", Thesis: "server-side/direct"},
		{Key: "direct-mount/destination", Label: "direct, destination's side", Thesis: "client-side/direct"},
		{Key: "managed-mount/source", Label: "managed, source's side", Thesis: "server-side/managed"},
		{Key: "managed-mount/destination", Label: "managed, destination's side", Thesis: "client-side/managed"},
	}
	f := Figure{Spec: results.FigureSpec{
		Name: name, Title: "Where requests are cut into pieces of 2 KiB: read throughput by RTT", Kind: results.FigureLine,
		X: rttAxis(), Y: results.Axis{Column: "throughput", Label: "Read throughput", Unit: "MiB/s", Scale: 1.0 / (1 << 20), Log: true},
		Keys: []string{"strategy", "params.split"}, Series: series, Thesis: name,
		Note: "Pieces are asked for one after another. On the destination's side each costs a round trip; the thesis slept once for all pieces of a request (gRPC on loopback, mean of 2 runs).",
	}}
	only := func(i int, strategy, title string) results.FigureSpec {
		return alsoAs(f.Spec, fmt.Sprintf("chunking-local-remote-%d", i), func(s *results.FigureSpec) {
			s.Title, s.Where, s.Series = title+", cut on either side: read throughput by RTT", map[string][]string{"strategy": {strategy}}, series[2*(i-2):][:2]
		})
	}
	f.More = []results.FigureSpec{only(2, "direct-mount", "Direct mount"), only(3, "managed-mount", "Managed mount")}
	f.Cells = func(variant string, quick bool) []*Cell {
		rtts := []int{0, 1, 2, 4, 6, 10, 14, 20}
		if quick {
			rtts = []int{0, 4, 10}
		}
		var cells []*Cell
		for _, ms := range rtts {
			for _, strategy := range []string{"direct-mount", "managed-mount"} {
				for _, side := range []string{"source", "destination"} {
					c := cellOf(name, variant, strategy, time.Duration(ms)*time.Millisecond)
					c.Size = 40 << 20
					c.Settings = append(c.Settings, "split="+side, "split_size=2KiB")
					if strategy == "managed-mount" {
						c.Settings = append(c.Settings, "extent=64KiB") // as large as the direct mount's requests
					}
					if quick {
						c.Budget = 500 * time.Millisecond
						if side == "destination" { // a first read in pieces takes long
							c.Budget = 900 * time.Millisecond
						}
					}
					cells = append(cells, c)
				}
			}
		}
		return cells
	}
	return f
}
