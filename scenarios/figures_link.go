package scenarios

import (
	"fmt"
	"time"

	"memsync/results"
)

// linkFigures are benchmarks that the thesis's notes name (N11 to N19) and that
// it does not have.
func linkFigures() []Figure {
	return []Figure{
		pushWorkers(),
		chunkSize(),
		faultsByRate(),
		rttAndRate(),
		slowCache(),
		pastPageCache(),
	}
}

func throughputAxis(label string) results.Axis {
	return results.Axis{Column: "throughput", Label: label, Unit: "MiB/s", Scale: 1.0 / (1 << 20), Log: true}
}

// pushWorkers writes at a steady pace across a long link.
func pushWorkers() Figure {
	const name = "push-workers"
	f := Figure{Variants: []string{Network}, Spec: results.FigureSpec{
		Name: name, Title: "Push workers and interval in high latency (N11): time to sync after the last write", Kind: results.FigureLine,
		X:      results.Axis{Column: "push_workers", Label: "Push workers", Category: true},
		Y:      results.Axis{Column: "sync_latency", Label: "Sync after the last write", Unit: "s"},
		Keys:   []string{"params.push_interval"},
		Series: []results.FigureSeries{{Key: "10ms", Label: "every 10 ms"}, {Key: "100ms", Label: "every 100 ms"}, {Key: "1s", Label: "every 1 s"}},
		Note:   "Managed mount, 4 KiB writes in sequence with a pause of 200 us after each. What the workers have not pushed by then, Sync pushes, with 16 requests at least.",
	}}
	f.More = []results.FigureSpec{alsoAs(f.Spec, "push-workers-bytes", func(s *results.FigureSpec) {
		s.Title = "Push workers and interval in high latency (N11): bytes pushed"
		s.Y = results.Axis{Column: "push_bytes", Label: "Pushed", Unit: "MiB", Scale: 1.0 / (1 << 20)}
		s.Note = "As before. Beyond the bytes written: chunks that were written again after a push had taken them."
	})}
	f.Cells = func(variant string, quick bool) []*Cell {
		counts, intervals, size := []int{0, 1, 2, 4, 8, 16, 32}, []string{"10ms", "100ms", "1s"}, int64(32<<20)
		if quick {
			counts, intervals, size = []int{0, 1, 16}, []string{"10ms", "1s"}, 2<<20
		}
		var cells []*Cell
		for _, n := range counts {
			for _, interval := range intervals {
				c := cellOf(name, variant, "managed-mount", 100*time.Millisecond)
				c.Link.Rate = 100_000_000
				c.Op, c.Via, c.Size, c.PushWorkers, c.Think, c.Budget = "write", "file", size, n, 200*time.Microsecond, 10*time.Second
				c.Settings = append(c.Settings, "push_interval="+interval, "extent=64KiB")
				cells = append(cells, c)
			}
		}
		return cells
	}
	return f
}

// chunkSize varies the unit of transfer, and looks at the requests that come of it.
func chunkSize() Figure {
	const name = "chunk-size"
	f := Figure{Variants: []string{Network}, Spec: results.FigureSpec{
		Name: name, Title: "Chunk size (N12): sequential read throughput", Kind: results.FigureLine,
		X: results.Axis{Column: "chunk_bytes", Label: "Chunk", Unit: "KiB", Scale: 1.0 / 1024, Log: true}, Y: throughputAxis("Read throughput"),
		Keys: []string{"strategy"}, Series: remoteSeries(),
		Note: "For userfaultfd the bytes that a fault fills, for a direct mount the largest request, for a managed mount the unit of its states, which it joins to requests of up to 512 KiB.",
	}}
	sizes := []int64{4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20}
	f.More = []results.FigureSpec{alsoAs(f.Spec, "chunk-size-tail", func(s *results.FigureSpec) {
		s.Title = "Chunk size (N12): 99.9th percentile of the touches"
		s.Y = results.Axis{Column: "fault_latency_p999", Label: "Touch, 99.9th percentile", Unit: "ms", Scale: 1e3, Log: true}
	})}
	for _, strategy := range []results.FigureSeries{{Key: "direct-mount", Label: "direct mount"}, {Key: "managed-mount", Label: "managed mount"}, {Key: "userfaultfd", Label: "userfaultfd"}} {
		f.More = append(f.More, alsoAs(f.Spec, "chunk-size-requests-"+strategy.Key, func(s *results.FigureSpec) {
			s.Title, s.Kind = "Chunk size (N12): sizes of the read requests of a "+strategy.Label, results.FigureCDF
			s.X, s.Y = results.Axis{}, results.Axis{Column: results.RequestHistogram, Label: "Request", Unit: "KiB", Scale: 1.0 / 1024, Log: true}
			s.Keys, s.Where, s.Series = []string{"chunk_bytes"}, map[string][]string{"strategy": {strategy.Key}}, nil
			for _, n := range sizes {
				s.Series = append(s.Series, results.FigureSeries{Key: fmt.Sprint(n), Label: fmt.Sprintf("chunks of %d KiB", n>>10)})
			}
			s.Note = "Share of the bytes that were asked of the source in requests of at most this size."
		}))
	}
	f.Cells = func(variant string, quick bool) []*Cell {
		var cells []*Cell
		for i, n := range sizes {
			for _, strategy := range remotes(variant) {
				if quick && i%2 == 1 {
					continue
				}
				c := cellOf(name, variant, strategy, 20*time.Millisecond)
				c.Chunk, c.Size = n, 64<<20
				if quick {
					c.Budget = 600 * time.Millisecond
				}
				cells = append(cells, c)
			}
		}
		return cells
	}
	return f
}

// faultsByRate asks when page faults are bound by the rate of the link and not by its RTT.
func faultsByRate() Figure {
	const name = "userfaultfd-rate"
	kinds := []struct {
		series   results.FigureSeries
		settings []string
	}{
		{results.FigureSeries{Key: "4KiB/none", Label: "4 KiB a fault"}, []string{"fault_around=4KiB"}},
		{results.FigureSeries{Key: "64KiB/none", Label: "64 KiB a fault"}, []string{"fault_around=64KiB"}},
		{results.FigureSeries{Key: "64KiB/sequential", Label: "64 KiB, prefetch ahead"}, []string{"fault_around=64KiB", "prefetch=sequential"}},
		{results.FigureSeries{Key: "64KiB/all", Label: "64 KiB, prefetch all"}, []string{"fault_around=64KiB", "prefetch=all"}},
	}
	f := Figure{Variants: []string{Network}, Spec: results.FigureSpec{
		Name: name, Title: "userfaultfd by the rate of the link (N13)", Kind: results.FigureLine,
		X: results.Axis{Column: "rate_mbit", Position: "rate_measured_mbit", Label: "Rate", Unit: "Mbit/s", Log: true}, Y: throughputAxis("Read throughput"),
		Keys: []string{"params.fault_around", "params.prefetch"},
		Note: "Sequential read at an RTT of 20 ms. Where a line is flat the RTT binds, where it rises the rate.",
	}}
	for _, k := range kinds {
		f.Spec.Series = append(f.Spec.Series, k.series)
	}
	f.Cells = func(variant string, quick bool) []*Cell {
		rates := []int64{10, 30, 100, 300, 1000}
		if quick {
			rates = []int64{10, 100, 1000}
		}
		var cells []*Cell
		for _, rate := range rates {
			for _, k := range kinds {
				c := cellOf(name, variant, "userfaultfd", 20*time.Millisecond)
				c.Link.Rate, c.Size, c.Settings = rate*1_000_000, 64<<20, k.settings
				if quick {
					c.Budget = 400 * time.Millisecond
				}
				cells = append(cells, c)
			}
		}
		return cells
	}
	return f
}

// rttAndRate compares the strategies on links that have both a delay and a rate.
func rttAndRate() Figure {
	const name = "rtt-and-rate"
	f := Figure{Variants: []string{Network}, Spec: results.FigureSpec{
		Name: name, Title: "Latency and bandwidth together (N14): share of the link's rate", Kind: results.FigureHeat,
		X: results.Axis{Column: "rtt_ms", Label: "RTT", Unit: "ms"}, Rows: results.Axis{Column: "rate_mbit", Label: "Rate", Unit: "Mbit/s"},
		Y:    results.Axis{Column: "rate_utilisation", Label: "Bytes read, from open on, by time and rate"},
		Keys: []string{"strategy"}, Series: remoteSeries(),
		Note: "Sequential read of what the link carries in 5 s (quick: 0.25 s), the same for all strategies. Where a run's time ends first, the bytes until then count.",
	}}
	f.More = []results.FigureSpec{
		alsoAs(f.Spec, "rtt-and-rate-throughput", func(s *results.FigureSpec) {
			s.Title, s.Y = "Latency and bandwidth together (N14): sequential read throughput", throughputAxis("Read throughput")
		}),
		alsoAs(f.Spec, "rtt-and-rate-first-chunk", func(s *results.FigureSpec) {
			s.Title = "Latency and bandwidth together (N14): first-chunk latency"
			s.Y = results.Axis{Column: "latency_first_chunk", Label: "First-chunk latency", Unit: "ms", Scale: 1e3, Log: true}
			s.Note = "One load of the second page after open."
		}),
		alsoAs(f.Spec, "decision-map", func(s *results.FigureSpec) {
			s.Title, s.Kind = "Which strategy wins where: soonest to have the region", results.FigureMap
			s.Note = "By the bytes read from opening on, by time and rate, of what the link carries in 5 s (quick: 0.25 s); ×: times the next. Sequential read, every strategy as it is by default."
		}),
		alsoAs(f.Spec, "decision-map-first-chunk", func(s *results.FigureSpec) {
			s.Title, s.Kind = "Which strategy wins where: soonest first page", results.FigureMap
			s.Y = results.Axis{Column: "latency_first_chunk", Label: "First-chunk latency", Unit: "ms", Scale: 1e3}
			s.Note = "One load of the second page after open, which has been pulled by then where a strategy prefetches; ×: times sooner than the next."
		}),
	}
	f.Cells = func(variant string, quick bool) []*Cell {
		rtts, rates := []int{1, 10, 20, 40, 100}, []int64{10, 100, 1000}
		if quick {
			rtts, rates = []int{0, 20, 40}, []int64{100, 1000}
		}
		var cells []*Cell
		for _, ms := range rtts {
			for _, rate := range rates {
				for _, strategy := range remotes(variant) {
					c := cellOf(name, variant, strategy, time.Duration(ms)*time.Millisecond)
					c.Link.Rate, c.Size, c.Budget = rate*1_000_000, rate*640<<10, 10*time.Second // 5 s at the link's rate
					if quick {
						c.Size, c.Budget = rate*32<<10, 500*time.Millisecond
					}
					cells = append(cells, c)
				}
			}
		}
		return cells
	}
	return f
}

// slowCache makes the local side slow until going without it is better.
func slowCache() Figure {
	const name = "slow-cache"
	delays := []string{"0s", "1ms", "5ms"}
	f := Figure{Spec: results.FigureSpec{
		Name: name, Title: "Slow local disk or memory (N18): read throughput by the rate of the cache", Kind: results.FigureLine,
		X: results.Axis{Column: "params.cache_rate", Label: "Rate of the cache", Unit: "MiB/s", Scale: 1.0 / (1 << 20), Log: true}, Y: throughputAxis("Read throughput"),
		Keys: []string{"strategy", "params.cache_delay"}, Versus: "direct-mount/",
		Note: "Sequential read. What is pulled goes through the cache's rate twice, in and out; its delay is paid at each access, side by side.",
	}}
	for _, d := range delays {
		f.Spec.Series = append(f.Spec.Series, results.FigureSeries{Key: "managed-mount/" + d, Label: "managed, delay " + d})
	}
	f.Spec.Series = append(f.Spec.Series, results.FigureSeries{Key: "direct-mount/", Label: "direct mount", Baseline: true})
	f.Cells = func(variant string, quick bool) []*Cell {
		rates, delays := []int{1, 4, 16, 64, 256, 1024}, delays
		if quick {
			rates, delays = []int{8, 32, 128}, []string{"0s", "5ms"}
		}
		var cells []*Cell
		add := func(strategy string, settings ...string) {
			c := cellOf(name, variant, strategy, 20*time.Millisecond)
			c.Size, c.Budget = 32<<20, 90*time.Second
			c.Settings = append(c.Settings, settings...)
			if quick {
				c.Size, c.Budget = 8<<20, 4*time.Second
			}
			cells = append(cells, c)
		}
		add("direct-mount")
		for _, d := range delays {
			for _, rate := range rates {
				add("managed-mount", fmt.Sprintf("cache_rate=%dMiB", rate), "cache_delay="+d)
			}
		}
		return cells
	}
	return f
}

// pastPageCache reads devices with and without the kernel's page cache.
func pastPageCache() Figure {
	const name = "o-direct"
	var series []results.FigureSeries
	for _, s := range remoteSeries()[1:] { // userfaultfd has no device to open
		series = append(series, results.FigureSeries{Key: s.Key + "/false", Label: s.Label + ", cached"},
			results.FigureSeries{Key: s.Key + "/true", Label: s.Label + ", O_DIRECT"})
	}
	f := Figure{Spec: results.FigureSpec{
		Name: name, Title: "With and without the page cache, and NBD alone (N19): sequential read", Kind: results.FigureLine,
		X: rttAxis(), Y: throughputAxis("Read throughput"), Keys: []string{"strategy", "params.o_direct"}, Series: series,
		Note: "pread of 4 KiB at a time on one handle. With O_DIRECT each is a request to the device, and there is no read-ahead of the kernel.",
	}}
	f.More = []results.FigureSpec{alsoAs(f.Spec, "o-direct-reads", func(s *results.FigureSpec) {
		s.Title, s.Kind = "With and without the page cache, and NBD alone (N19): each read, all RTTs together", results.FigureCDF
		s.X, s.Y = results.Axis{}, results.Axis{Column: results.TouchHistogram, Label: "Read of 4 KiB", Unit: "ms", Scale: 1e3, Log: true}
		s.Note = "pread of 4 KiB at a time on one handle, in sequence."
	})}
	f.Cells = func(variant string, quick bool) []*Cell {
		rtts := []int{0, 1, 5, 10, 20, 40}
		if quick {
			rtts = []int{0, 20, 40}
		}
		var cells []*Cell
		for _, ms := range rtts {
			for _, strategy := range remotes(variant)[1:] {
				for _, direct := range []bool{false, true} {
					c := cellOf(name, variant, strategy, time.Duration(ms)*time.Millisecond)
					c.Via, c.Size = "file", 16<<20
					c.Settings = append(c.Settings, fmt.Sprintf("o_direct=%t", direct))
					if quick {
						c.Budget = 400 * time.Millisecond
					}
					cells = append(cells, c)
				}
			}
		}
		return cells
	}
	return f
}
