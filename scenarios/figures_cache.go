package scenarios

import (
	"fmt"
	"time"

	"memsync/results"
)

// cacheFigures are about a local cache smaller than the region, as in the
// literature of far memory: what it costs that only a part of the region is local.
func cacheFigures() []Figure {
	return []Figure{
		farMemory("far-memory", "fuse", "FUSE", "The kernel's page cache lies in front of the local cache: what leaves the one is dropped from the other."),
		farMemory("far-memory-uffd", "uffd", "userfaultfd", "The local cache is the workload's memory; a chunk that is mapped is used unseen, so that the oldest goes."),
	}
}

func farMemory(name, device, label, note string) Figure {
	const size = 64 << 20
	f := Figure{Variants: []string{Network}, Spec: results.FigureSpec{
		Name: name, Title: "Slowdown against all-local, by the part of the region that is local: " + label, Kind: results.FigureBar,
		X:    results.Axis{Column: "params.cache", Label: "Local cache, of a region of 64 MiB", Category: true},
		Y:    results.Axis{Column: "slowdown", Label: "Slowdown", Log: true},
		Keys: []string{"access", "params.think"}, Series: farSeries(),
		Note: "Managed mount, 0.2 ms, 1 Gbit/s. All was read once before, in order. 1 is the same touches with the same pauses in the workload's own memory. " + note,
	}}
	f.Cells = func(_ string, quick bool) []*Cell {
		percents := []int64{10, 25, 50, 75, 90, 100}
		if quick {
			percents = []int64{10, 50, 100}
		}
		var cells []*Cell
		for _, percent := range percents {
			for _, access := range []string{"seq", "random", "zipf"} {
				for i, think := range thinkTimes {
					if quick && i == 0 { // with pauses, as programs have, a cache can keep up
						continue
					}
					c := &Cell{Figure: name, Variant: Network, Strategy: "managed-mount", Device: device, Size: size, Access: access, Think: think,
						PullWorkers: -1, PushWorkers: -1, Limit: WholeRegion, Budget: 5 * time.Second, Warm: true,
						Settings: []string{fmt.Sprintf("cache=%d", size*percent/100>>16<<16)}}
					c.Link.RTT, c.Link.Rate = 200*time.Microsecond, NetworkRate
					if quick {
						c.Budget = 500 * time.Millisecond
					}
					cells = append(cells, c)
				}
			}
		}
		return cells
	}
	return f
}

// thinkTimes are the pauses after each touch.
var thinkTimes = [...]time.Duration{0, 100 * time.Microsecond}

func farSeries() []results.FigureSeries {
	var series []results.FigureSeries
	for _, access := range []string{"seq", "random", "zipf"} {
		for _, think := range thinkTimes {
			label := access
			if think > 0 {
				label += ", think " + think.String()
			}
			series = append(series, results.FigureSeries{Key: access + "/" + think.String(), Label: label})
		}
	}
	return series
}
