package peers

import (
	"time"

	"memsync/results"
	"memsync/scenarios"
)

// Figures returns the figures of the peers: each peer beside what memsync has for
// the same task, natively (peers) and on the kernel's NBD devices (peers-kernel,
// for a kernel that has them, such as the lab's).
func Figures() []scenarios.Figure {
	return []scenarios.Figure{
		comparison("peers", "Peers and memsync", []contender{
			{"userfaultfd-go", "uffd", "userfaultfd-go"},
			{"userfaultfd", "uffd", "userfaultfd"},
			{"direct-mount-go-nbd", "fuse", "direct mount, server go-nbd"},
			{"direct-mount-nbd-server", "fuse", "direct mount, server nbd-server"},
			{"direct-mount-nbdkit", "fuse", "direct mount, server nbdkit"},
			{"direct-mount", "fuse", "direct mount"},
			{"rsync", "", "rsync (download)"},
			{"nbdcopy", "", "nbdcopy (download)"},
			{"managed-mount", "fuse", "managed mount"},
		}, []int{0, 20}),
		comparison("peers-kernel", "Peers and memsync on the kernel's NBD devices", []contender{
			{"go-nbd", "nbd", "go-nbd"},
			{"nbd-server", "nbd", "nbd-server"},
			{"nbdkit", "nbd", "nbdkit"},
			{"nbd-direct", "nbd", "nbd-direct"},
			{"direct-mount", "nbd", "direct mount"},
			{"managed-mount", "nbd", "managed mount"},
		}, []int{20}),
	}
}

// contender is a series: a strategy on a device.
type contender struct{ strategy, device, label string }

// comparison is a figure of sequential reads by all contenders at some RTTs in ms,
// in three pictures. All sources keep the region in a file.
func comparison(name, title string, all []contender, rtts []int) scenarios.Figure {
	picture := func(suffix, what string, y results.Axis, note string) results.FigureSpec {
		s := results.FigureSpec{
			Name: name + suffix, Figure: name, Title: title + ": " + what, Kind: results.FigureBar,
			X: results.Axis{Column: "rtt_ms", Label: "RTT", Unit: "ms", Category: true}, Y: y,
			Keys: []string{"strategy", "device"}, Note: note,
		}
		for _, c := range all {
			s.Series = append(s.Series, results.FigureSeries{Key: c.strategy + "/" + c.device, Label: c.label})
		}
		return s
	}
	return scenarios.Figure{
		Spec: picture("", "rate from open to the last byte", results.Axis{Column: "link_utilisation", Label: "Rate by that of one TCP stream", Log: true},
			"Sequential read of 64 MiB at 1 Gbit/s, for at most 2 s; opening counts, and so does a download before it."),
		More: []results.FigureSpec{
			picture("-throughput", "read throughput", results.Axis{Column: "throughput", Label: "Read throughput", Unit: "MiB/s", Scale: 1.0 / (1 << 20), Log: true},
				"From the first load to the last byte: what was downloaded before is read from memory."),
			picture("-latency", "first-chunk latency", results.Axis{Column: "latency_first_chunk", Label: "First-chunk latency", Unit: "ms", Scale: 1e3, Log: true},
				"One load of the second page after open."),
		},
		Variants: []string{scenarios.Network},
		Cells: func(_ string, quick bool) []*scenarios.Cell {
			var cells []*scenarios.Cell
			for _, ms := range rtts {
				for _, p := range all {
					c := &scenarios.Cell{Figure: name, Variant: scenarios.Network, Strategy: p.strategy, Device: p.device, Backend: "file",
						Size: 64 << 20, PullWorkers: -1, PushWorkers: -1, Limit: scenarios.WholeRegion, Budget: 2 * time.Second, Floors: true}
					c.Link.RTT, c.Link.Rate = time.Duration(ms)*time.Millisecond, scenarios.NetworkRate
					if quick {
						c.Size, c.Budget = 16<<20, time.Second
					}
					cells = append(cells, c)
				}
			}
			return cells
		},
	}
}
