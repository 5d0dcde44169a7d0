package scenarios

import (
	"fmt"
	"time"

	"memsync/results"
)

// snapshotFigures: what consistent images of a region cost its writer.
func snapshotFigures() []Figure {
	rates := []string{"1MB", "10MB", "30MB", "100MB", "300MB"}
	spec := func(name, label string, y results.Axis, note string) results.FigureSpec {
		return results.FigureSpec{
			Name: name, Figure: "snapshot-cost", Title: "Images of a region that is written to: " + label, Kind: results.FigureLine,
			X: results.Axis{Column: "params.dirty_rate", Label: "Dirty rate a second", Category: true, Categories: rates}, Y: y,
			Keys: []string{"params.mode", "params.full"},
			Series: []results.FigureSeries{{Key: "cow/false", Label: "copy-on-write, what changed"}, {Key: "cow/true", Label: "copy-on-write, all of it"},
				{Key: "queue/false", Label: "queue"}, {Key: "triple/false", Label: "triple buffer"}},
			Note: note,
		}
	}
	f := Figure{
		Spec: spec("snapshot-cost", "the writer's longest stop", results.Axis{Column: "pause", Label: "Longest write during an image", Unit: "ms", Scale: 1e3, Log: true}, "4 KiB writes, 16 to a publication; chunks of 64 KiB; an image every 200 ms. Median over the images of a run."),
		More: []results.FigureSpec{
			spec("snapshot-cost-slowdown", "writer slowdown", results.Axis{Column: "writer_slowdown", Label: "Time of a write by its time untracked", Log: true}, "Mean over all writes while images are taken every 200 ms."),
			spec("snapshot-cost-bytes", "bytes written", results.Axis{Column: "snapshot_bytes", Label: "Bytes of an image", Unit: "MB", Scale: 1e-6, Log: true}, "To the image file, with its record."),
			spec("snapshot-cost-fork", "against fork", results.Axis{Column: "pause_by_fork", Label: "Longest write by the time of fork", Log: true}, "fork(2) of a process with as much private memory, in the same run."),
		},
		Variants: []string{Network},
	}
	f.Cells = func(_ string, quick bool) []*Cell {
		size, points := int64(1<<30), rates
		if quick {
			size, points = 128<<20, []string{"1MB", "10MB", "100MB"}
		}
		var cells []*Cell
		for _, mode := range []string{"cow", "queue", "triple"} {
			for _, full := range []bool{false, true} {
				if full && (mode != "cow" || quick) {
					continue
				}
				for _, rate := range points {
					c := &Cell{Figure: "snapshot-cost", Variant: Network, Strategy: "snapshot", Op: OpSnapshot, Size: size, PullWorkers: -1, PushWorkers: -1,
						Limit: WholeRegion, Budget: 2 * time.Second, Settings: []string{"mode=" + mode, "dirty_rate=" + rate, fmt.Sprintf("full=%t", full)}}
					if quick {
						c.Budget, c.Settings = time.Second, append(c.Settings, "images=3")
					}
					cells = append(cells, c)
				}
			}
		}
		return cells
	}
	return []Figure{f}
}
