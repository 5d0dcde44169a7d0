package scenarios

import (
	"slices"
	"strings"

	"memsync/results"
)

// labFigures are those of the kernel's NBD device alone. Where the machine's
// kernel has none, they are made in the lab kernel (memsync lab -- memsync run).
func labFigures() []Figure {
	figures := []Figure{readyFigure()}
	for _, f := range rttFigures() {
		figures = append(figures, onNBD(f))
	}
	return figures
}

// onNBD is a figure with all mounts on the kernel's NBD device, as in the thesis.
func onNBD(f Figure) Figure {
	cells := f.Cells
	f.More = nil
	f.Spec.Name = strings.TrimSuffix(f.Spec.Name, "-1") + "-nbd"
	f.Spec.Title += ", on kernel NBD"
	f.Cells = func(variant string, quick bool) []*Cell {
		mounts := slices.DeleteFunc(cells(variant, quick), func(c *Cell) bool { return isBaseline(c.Strategy) || c.Strategy == "userfaultfd" })
		for _, c := range mounts {
			c.Figure, c.Device = f.Spec.Name, "nbd"
		}
		return mounts
	}
	return f
}

// readyFigure asks how a device's user should learn that it is ready.
func readyFigure() Figure {
	const name = "latency-polling-udev-1"
	return Figure{
		Spec: results.FigureSpec{
			Name: name, Title: "Time to open an NBD device: polling against events", Kind: results.FigureDensity,
			Y:    results.Axis{Column: "open_latency", Label: "Time to open", Unit: "ms", Scale: 1e3},
			Keys: []string{"params.nbd_ready"},
			Series: []results.FigureSeries{
				{Key: "poll", Label: "polling sysfs", Thesis: "polling"},
				{Key: "uevent", Label: "kernel's uevent"},
				{Key: "udev", Label: "udevd's event", Thesis: "udev"},
			},
			Thesis: name,
			Note:   "Direct mount on kernel NBD, from Mount until the workload can attach. The thesis: 100 runs of 4 GiB; it polls every 1 ms, we every 0.2 ms. The kernel's own event needs no udevd; udevd's comes after its rules, where one runs.",
		},
		Cells: func(variant string, _ bool) []*Cell {
			var cells []*Cell
			for _, ready := range []string{"poll", "uevent", "udev"} {
				c := cellOf(name, variant, "direct-mount", 0)
				c.Device, c.Limit, c.Size, c.InLab = "nbd", 0, 256<<20, true
				if variant == Thesis {
					c.Size = 4 << 30
				}
				c.Settings = append(c.Settings, "nbd_ready="+ready)
				cells = append(cells, c)
			}
			return cells
		},
	}
}
