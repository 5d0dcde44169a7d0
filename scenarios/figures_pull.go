package scenarios

import (
	"time"

	"memsync/results"
	"memsync/scenarios/inputs"
)

// pullFigures are about what is pulled first, and when pulling begins.
func pullFigures() []Figure {
	return []Figure{
		preemptivePull(),
		startUp(),
		pullOrder(),
		pullOrderByFormat(),
		learntOrder(),
	}
}

// orderKeys tell the orders of a figure apart: without pull workers the order does not matter.
var orderKeys = []string{"params.order", "pull_workers"}

// orderCell is a managed mount with an order; "none" pulls nothing in the
// background. The window follows the path: the default, 8 MiB, is 33 times what
// 100 Mbit/s and 20 ms hold, and whoever waits would stand behind it.
func orderCell(figure, order string, rtt time.Duration, rate int64) *Cell {
	c := cellOf(figure, Network, "managed-mount", rtt)
	c.Link.Rate = rate
	c.Device = "fuse"
	c.Budget = 20 * time.Second
	if order == "none" {
		c.PullWorkers, order = 0, "linear"
	}
	c.Settings = append(c.Settings, "order="+order, "window=0")
	return c
}

// preemptivePull has the thesis's axes: the bytes that are local when open returns.
func preemptivePull() Figure {
	const name = "latency-preemptive-pull-1"
	counts := []int{0, 1, 64, 512, 2048, 4096}
	series := workerSeries(counts)
	series[0].Thesis = "" // it has no value for none
	return Figure{
		Spec: results.FigureSpec{
			Name: name, Title: "Bytes pulled while the mount is being opened", Kind: results.FigureLine,
			X: rttAxis(), Y: results.Axis{Column: "preemptive_pull_bytes", Label: "Pulled when open returns", Unit: "MB", Scale: 1e-6, Log: true},
			Keys: []string{"pull_workers"}, Series: series, Thesis: name,
			Note: "128 KiB are pulled first in any case. The thesis: a pause before each backend call that moves no data, one chunk of 4 KiB a worker.",
		},
		Cells: func(variant string, quick bool) []*Cell {
			rtts := []int{0, 1, 2, 3, 5, 7, 10, 15, 20}
			if quick {
				rtts = []int{0, 5, 20}
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

// startUp asks what the thesis left open: how much time a parallel start saves.
func startUp() Figure {
	const name = "start-up-time"
	f := Figure{
		Spec: results.FigureSpec{
			Name: name, Title: "Time from open to the last byte of the first 4 MiB", Kind: results.FigureLine,
			X: rttAxis(), Y: results.Axis{Column: "time_to_last_byte", Label: "Time from open", Unit: "ms", Scale: 1e3},
			Keys:   []string{"params.pull_during_open", "pull_workers"},
			Series: []results.FigureSeries{{Key: "true/16", Label: "pull while opening"}, {Key: "false/16", Label: "pull once open"}, {Key: "true/0", Label: "no background pull"}},
			Note:   "Sequential read. The difference of the first two lines is the time that a parallel start saves.",
		},
		More: []results.FigureSpec{{
			Name: name + "-first", Figure: name, Title: "Open and first chunk", Kind: results.FigureLine,
			X: rttAxis(), Y: results.Axis{Column: "open_latency", Label: "Open", Unit: "ms", Scale: 1e3},
			Keys:   []string{"params.pull_during_open", "pull_workers"},
			Series: []results.FigureSeries{{Key: "true/16", Label: "pull while opening"}, {Key: "false/16", Label: "pull once open"}, {Key: "true/0", Label: "no background pull"}},
			Note:   "Until the attachment is usable; 128 KiB are pulled first in any case.",
		}},
		Variants: []string{Network},
	}
	f.Cells = func(variant string, quick bool) []*Cell {
		var cells []*Cell
		rtts := []int{0, 5, 10, 20, 40, 80}
		if quick {
			rtts = []int{0, 20, 40}
		}
		for _, ms := range rtts {
			for _, pull := range []string{"true", "false", "none"} {
				c := cellOf(name, variant, "managed-mount", time.Duration(ms)*time.Millisecond)
				c.Size, c.Limit = 64<<20, 4<<20
				if pull == "none" {
					c.PullWorkers, pull = 0, "true"
				}
				c.Settings = append(c.Settings, "pull_during_open="+pull)
				cells = append(cells, c)
			}
		}
		return cells
	}
	return f
}

// pullOrder is N07 on content without a format: order of access against order of pull.
func pullOrder() Figure {
	const name = "pull-order"
	spec := results.FigureSpec{
		Name: name, Title: "Order of pulling against order of access: time to the last byte", Kind: results.FigureBar,
		X:    results.Axis{Column: "access", Label: "Access", Category: true, Categories: []string{"seq", "reverse", "random"}},
		Y:    results.Axis{Column: "time_to_last_byte", Label: "Time from open", Unit: "s"},
		Keys: orderKeys, Series: []results.FigureSeries{{Key: "linear/16", Label: "linear"}, {Key: "reverse/16", Label: "reverse"},
			{Key: "random/16", Label: "random"}, {Key: "linear/0", Label: "no pull"}},
		Note: "20 ms, 100 Mbit/s, window=0, 16 MiB of 4 KiB touches; told random (madvise), the kernel reads no page ahead.",
	}
	f := Figure{Spec: spec, Variants: []string{Network}, More: []results.FigureSpec{
		alsoAs(spec, name+"-latency", func(s *results.FigureSpec) {
			s.Title = "Order of pulling against order of access: 99th percentile of the touches"
			s.Y = results.Axis{Column: "fault_latency_p99", Label: "Latency, 99th percentile", Unit: "ms", Scale: 1e3}
		}),
	}}
	f.Cells = func(_ string, quick bool) []*Cell {
		var cells []*Cell
		for _, access := range []string{"seq", "reverse", "random"} {
			for _, order := range []string{"linear", "reverse", "random", "none"} {
				if quick && order == "random" {
					continue
				}
				c := orderCell(name, order, 20*time.Millisecond, 100e6)
				if c.Size, c.Access = 16<<20, access; quick {
					c.Size = 4 << 20
				}
				c.Settings = append(c.Settings, "advice=random")
				cells = append(cells, c)
			}
		}
		return cells
	}
	return f
}

// pullOrderByFormat is N07 on real files: how long a program waits for what it reads.
func pullOrderByFormat() Figure {
	const name = "pull-order-format"
	f := Figure{
		Spec: results.FigureSpec{
			Name: name, Title: "Real files: time until a program has read its part", Kind: results.FigureBar,
			X:    results.Axis{Column: "params.input", Label: "File", Category: true},
			Y:    results.Axis{Column: "time_to_last_byte", Label: "Time from open", Unit: "s", Log: true},
			Keys: orderKeys, Series: []results.FigureSeries{{Key: "linear/0", Label: "no pull"}, {Key: "linear/16", Label: "linear"},
				{Key: "random/16", Label: "random"}, {Key: "format/16", Label: "by format"}},
			Note: "20 ms, 100 Mbit/s, 64 to 96 MiB, window=0. The trace of a real program's reads is replayed as fast as it goes: sqlite3 looks up 20 rows, unzip prints one of 16,000 members, debugfs lists 40 folders and reads a file in each, ffmpeg decodes a second.",
		},
		Variants: []string{Network},
	}
	f.Cells = func(_ string, quick bool) []*Cell {
		orders := []string{"none", "linear", "random", "format"}
		if quick {
			orders = []string{"none", "format"}
		}
		var cells []*Cell
		for _, in := range inputs.All() {
			for _, order := range orders {
				c := orderCell(name, order, 20*time.Millisecond, 100e6)
				c.Input = inputs.Prefix + in.Name
				c.Access = "trace:" + c.Input + ".trace"
				c.Settings = append(c.Settings, "advice=random")
				cells = append(cells, c)
			}
		}
		return cells
	}
	return f
}

// learntOrder is N08: recorded with pulling off, then used as the order.
func learntOrder() Figure {
	const name = "learnt-order"
	trace := func(suffix string) string { return "trace:" + inputs.Prefix + "ext4." + suffix }
	f := Figure{
		Spec: results.FigureSpec{
			Name: name, Title: "An order learnt from an earlier run", Kind: results.FigureLine,
			X: rttAxis(), Y: results.Axis{Column: "time_to_last_byte", Label: "Time from open", Unit: "s"},
			Keys: orderKeys, Series: []results.FigureSeries{{Key: "linear/0", Label: "no pull"}, {Key: "linear/16", Label: "linear"},
				{Key: "format/16", Label: "by format"}, {Key: trace("other") + "/16", Label: "learnt from another run"}, {Key: trace("trace") + "/16", Label: "learnt from the same run"}},
			Note: "100 Mbit/s, window=0; debugfs lists 40 folders of an ext4 image of 96 MiB and reads a file in each; the other run did so with other folders. Recorded without background pull.",
		},
		Variants: []string{Network},
	}
	f.Cells = func(_ string, quick bool) []*Cell {
		var cells []*Cell
		rtts, orders := []int{0, 5, 10, 20, 40, 80}, []string{"none", "linear", "format", trace("trace"), trace("other")}
		if quick {
			rtts, orders = []int{0, 20, 40}, []string{"none", "linear", trace("other")}
		}
		for _, ms := range rtts {
			for _, order := range orders {
				c := orderCell(name, order, time.Duration(ms)*time.Millisecond, 100e6)
				c.Input = inputs.Prefix + "ext4"
				c.Access = trace("trace")
				c.Settings = append(c.Settings, "advice=random")
				cells = append(cells, c)
			}
		}
		return cells
	}
	return f
}
