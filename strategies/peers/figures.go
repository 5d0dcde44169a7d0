package peers

import (
	"strings"
	"time"

	"memsync/results"
	"memsync/scenarios"
)

// Figures returns the figures of the peers: each peer beside what memsync has for
// the same task, natively (peers) and on the kernel's NBD devices (peers-kernel,
// for a kernel that has them, such as the lab's).
func Figures() []scenarios.Figure {
	rtt := results.Axis{Column: "rtt_ms", Label: "RTT", Unit: "ms", Category: true}
	access := results.Axis{Column: "access", Label: "Access, RTT 20 ms", Category: true, Categories: []string{"seq", "random"}}
	return []scenarios.Figure{
		comparison("peers", "Peers and memsync", []contender{
			{"userfaultfd-go", "uffd", "userfaultfd-go", nil},
			{"userfaultfd", "uffd", "userfaultfd", []string{"fault_around=4KiB"}},
			{"userfaultfd", "uffd", "userfaultfd, 64 KiB a fault", []string{"fault_around=64KiB"}},
			{"direct-mount-go-nbd", "fuse", "direct mount, server go-nbd", nil},
			{"direct-mount-nbd-server", "fuse", "direct mount, server nbd-server", nil},
			{"direct-mount-nbdkit", "fuse", "direct mount, server nbdkit", nil},
			{"direct-mount", "fuse", "direct mount", nil},
			{"rsync", "", "rsync (download)", nil},
			{"nbdcopy", "", "nbdcopy (download)", nil},
			{"managed-mount", "fuse", "managed mount", nil},
		}, rtt, cond{0, "seq"}, cond{20, "seq"}),
		comparison("peers-kernel", "Peers and memsync on the kernel's NBD devices", []contender{
			{"go-nbd", "nbd", "go-nbd", nil},
			{"nbd-server", "nbd", "nbd-server", nil},
			{"nbdkit", "nbd", "nbdkit", nil},
			{"nbd-direct", "nbd", "nbd-direct", nil},
			{"direct-mount", "nbd", "direct mount", nil},
			{"managed-mount", "nbd", "managed mount", nil},
		}, access, cond{20, "seq"}, cond{20, "random"}),
	}
}

// contender is a series: a strategy on a device, with settings.
type contender struct {
	strategy, device, label string
	settings                []string
}

// cond is a point of x.
type cond struct {
	ms     int // RTT
	access string
}

// comparison is a figure of reads by all contenders under some conditions, in
// three pictures. All sources keep the region in a file.
func comparison(name, title string, all []contender, x results.Axis, conds ...cond) scenarios.Figure {
	picture := func(suffix, what string, y results.Axis, note string) results.FigureSpec {
		s := results.FigureSpec{
			Name: name + suffix, Figure: name, Title: title + ": " + what, Kind: results.FigureBar,
			X: x, Y: y,
			Keys: []string{"strategy", "device", "params.fault_around"}, Note: note,
		}
		for _, c := range all {
			s.Series = append(s.Series, results.FigureSeries{Key: c.strategy + "/" + c.device + "/" + strings.TrimPrefix(strings.Join(c.settings, ""), "fault_around="), Label: c.label})
		}
		return s
	}
	return scenarios.Figure{
		Spec: picture("", "rate from open to the last byte", results.Axis{Column: "link_utilisation", Label: "Rate by that of one TCP stream", Log: true},
			"4 KiB a touch, at 1 Gbit/s, until all is read or the time budget ends; opening counts, and so does a download before it."),
		More: []results.FigureSpec{
			picture("-throughput", "read throughput", results.Axis{Column: "throughput", Label: "Read throughput", Unit: "MiB/s", Scale: 1.0 / (1 << 20), Log: true},
				"From the first load to the last byte: what was downloaded before is read from memory."),
			picture("-latency", "first-chunk latency", results.Axis{Column: "latency_first_chunk", Label: "First-chunk latency", Unit: "ms", Scale: 1e3, Log: true},
				"One load of the second page after open."),
		},
		Variants: []string{scenarios.Network},
		Cells: func(_ string, quick bool) []*scenarios.Cell {
			var cells []*scenarios.Cell
			for _, at := range conds {
				for _, p := range all {
					c := &scenarios.Cell{Figure: name, Variant: scenarios.Network, Strategy: p.strategy, Device: p.device, Backend: "file", Access: at.access, Settings: p.settings,
						Size: 64 << 20, PullWorkers: -1, PushWorkers: -1, Limit: scenarios.WholeRegion, Budget: 2 * time.Second, Floors: true}
					c.Link.RTT, c.Link.Rate = time.Duration(at.ms)*time.Millisecond, scenarios.NetworkRate
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
