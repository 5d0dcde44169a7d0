package scenarios

import (
	"fmt"
	"slices"
	"time"

	"memsync/results"
)

// migrationFigures are those of op migrate: benchmarks N05 and N06.
func migrationFigures() []Figure {
	return []Figure{migrationDowntime(), migrationDirtyRate(), migrationSize(), migrationFinalize()}
}

// migrationModes are the series: the strategy's modes, hashsync, and the managed mount, closed and reopened.
func migrationModes() []results.FigureSeries {
	return []results.FigureSeries{
		{Key: "migration/hybrid", Label: "hybrid"}, {Key: "migration/pre-copy", Label: "pre-copy"}, {Key: "migration/post-copy", Label: "post-copy"},
		{Key: "migration/stop-and-copy", Label: "stop and copy"}, {Key: "hashsync/", Label: "hashsync"},
		{Key: "managed-mount/", Label: "managed mount, closed and reopened"},
	}
}

// migrateCell is a cell of op migrate at 20 ms and 1 Gbit/s.
func migrateCell(figure, mode string, size int64, settings ...string) *Cell {
	c := &Cell{Figure: figure, Variant: Network, Strategy: "migration", Op: OpMigrate, Size: size, PullWorkers: -1, PushWorkers: -1,
		Limit: WholeRegion, Budget: 10 * time.Second, Settings: slices.Clone(settings)}
	c.Link.RTT, c.Link.Rate = 20*time.Millisecond, NetworkRate
	switch mode {
	case "managed-mount":
		c.Strategy, c.Backend = mode, "file"
	case "hashsync":
		c.Strategy, c.Settings = mode, append(c.Settings, "dirty=pagemap")
	default:
		c.Settings = append(c.Settings, "mode="+mode)
	}
	return c
}

// migrationPictures are what is drawn of every such figure: by X.
func migrationPictures(figure, title string, x results.Axis, note string) (results.FigureSpec, []results.FigureSpec) {
	spec := func(name, label string, y results.Axis) results.FigureSpec {
		return results.FigureSpec{Name: name, Figure: figure, Title: title + ": " + label, Kind: results.FigureLine, X: x, Y: y,
			Keys: []string{"strategy", "params.mode"}, Series: migrationModes(), Note: note}
	}
	return spec(figure, "downtime", results.Axis{Column: "downtime", Label: "Downtime", Unit: "ms", Scale: 1e3, Log: true}), []results.FigureSpec{
		spec(figure+"-blocktime", "waits afterwards", results.Axis{Column: "blocktime", Label: "Sum of waits after the hand-over", Unit: "ms", Scale: 1e3}),
		spec(figure+"-recovery", "time to 90 % of the throughput before", results.Axis{Column: "time_to_90", Label: "Time to 90 %", Unit: "s"}),
		spec(figure+"-total", "until the source may exit", results.Axis{Column: "total_time", Label: "Total time", Unit: "s", Log: true}),
		spec(figure+"-local", "until nine tenths are local", results.Axis{Column: "local_90", Label: "Time to 90 % local", Unit: "s"}),
		spec(figure+"-bytes", "bytes sent", results.Axis{Column: "wire_tx_bytes", Label: "Bytes on the wire", Unit: "MB", Scale: 1e-6}),
		spec(figure+"-writer", "slowdown of the application before", results.Axis{Column: "writer_slowdown", Label: "Writes due by writes made"}),
	}
}

// modesAndReopen are the ways that are compared.
var modesAndReopen = [...]string{"hybrid", "pre-copy", "post-copy", "stop-and-copy", "hashsync", "managed-mount"}

// quickModes are those of the quick forms.
var quickModes = [...]string{"hybrid", "pre-copy", "post-copy", "managed-mount"}

func migrationDowntime() Figure {
	f := Figure{Variants: []string{Network}}
	f.Spec, f.More = migrationPictures("migration-downtime", "Migration by RTT", rttAxis(),
		"1 Gbit/s; the application writes 20 MB/s in random order. hashsync: PAGEMAP_SCAN. Managed mount: the application stops, the destination mounts, it goes on there. Downtime: last write here to first write there.")
	f.Cells = func(_ string, quick bool) []*Cell {
		size, settings, modes := int64(256<<20), []string{"dirty_rate=20MB"}, modesAndReopen[:]
		if quick {
			size, settings, modes = 32<<20, append(settings, quickSettle), quickModes[:]
		}
		var cells []*Cell
		for _, rtt := range points(quick, []int{1, 5, 20, 40, 100}) {
			for _, mode := range modes {
				c := migrateCell("migration-downtime", mode, size, settings...)
				c.Link.RTT = time.Duration(rtt) * time.Millisecond
				cells = append(cells, c)
			}
		}
		return cells
	}
	return f
}

func migrationDirtyRate() Figure {
	rates := []string{"0", "5MB", "20MB", "40MB", "60MB", "100MB"}
	f := Figure{Variants: []string{Network}}
	f.Spec, f.More = migrationPictures("migration-dirty-rate", "Migration by what the application writes",
		results.Axis{Column: "params.dirty_rate", Label: "Distinct bytes written a second, of a link of 125 MB/s", Category: true, Categories: []string{"0", "5000000", "20000000", "40000000", "60000000", "100000000"}},
		"20 ms, 1 Gbit/s, random order.")
	f.Cells = func(_ string, quick bool) []*Cell {
		size, rates, settings, modes := int64(256<<20), rates, []string(nil), modesAndReopen[:]
		if quick {
			size, rates, settings, modes = 32<<20, []string{"0", "20MB", "60MB"}, []string{quickSettle}, []string{"hybrid", "pre-copy"}
		}
		var cells []*Cell
		for _, rate := range rates {
			for _, mode := range modes {
				cells = append(cells, migrateCell("migration-dirty-rate", mode, size, append(settings, "dirty_rate="+rate)...))
			}
		}
		return cells
	}
	return f
}

func migrationSize() Figure {
	f := Figure{Variants: []string{Network}}
	f.Spec, f.More = migrationPictures("migration-size", "Migration by size",
		results.Axis{Column: "region_bytes", Label: "Region", Category: true}, "20 ms, 1 Gbit/s; 20 MB/s in random order.")
	f.Cells = func(_ string, quick bool) []*Cell {
		sizes, settings, modes := []int64{64 << 20, 256 << 20, 1 << 30}, []string{"dirty_rate=20MB"}, modesAndReopen[:]
		if quick {
			sizes, settings, modes = []int64{8 << 20, 32 << 20, 128 << 20}, append(settings, quickSettle), []string{"hybrid", "managed-mount"}
		}
		var cells []*Cell
		for _, size := range sizes {
			for _, mode := range modes {
				cells = append(cells, migrateCell("migration-size", mode, size, settings...))
			}
		}
		return cells
	}
	return f
}

// migrationFinalize compares when to stop the application.
func migrationFinalize() Figure {
	shares := []float64{0.25, 0.5, 0.75, 0.9, 1}
	writers := []results.FigureSeries{{Key: "random", Label: "random"}, {Key: "zipf", Label: "hot set"}, {Key: "burst", Label: "bursts"}, {Key: "log", Label: "log"}}
	spec := func(name, label string, y results.Axis) results.FigureSpec {
		return results.FigureSpec{Name: name, Figure: "migration-finalize", Title: "When to finalise: " + label, Kind: results.FigureBar,
			X: results.Axis{Column: "params.finalize_at", Label: "Share of the region that is pulled before", Category: true}, Y: y,
			Where: map[string][]string{"params.finalize": {policyPercentName}},
			Keys:  []string{"params.writer"}, Series: writers, Note: "Hybrid, 20 ms, 1 Gbit/s; 20 MB/s."}
	}
	adaptive := func(name, label string, y results.Axis) results.FigureSpec {
		s := spec(name, label, y)
		s.Title = "When to finalise, by what is asked for: " + label
		s.X = results.Axis{Column: "params.max_downtime", Label: "max_downtime", Category: true, Categories: adaptiveLimits[:]}
		s.Where = map[string][]string{"params.finalize": {"adaptive"}}
		s.Note = "Pre-copy, 20 ms, 1 Gbit/s; 20 MB/s. Rounds go on until the downtime that is foreseen is within max_downtime, or rounds do not get shorter."
		return s
	}
	when := func(name, label string, y results.Axis) results.FigureSpec {
		s := spec(name, label, y)
		s.Title = "When to finalise an application that writes in bursts: " + label
		s.X = results.Axis{Column: "params.finalize", Label: "Rule: at once, in a phase that is foreseen or announced to be quiet", Category: true, Categories: quietRules[:]}
		s.Where = map[string][]string{"params.finalize_at": {"1"}, "params.finalize": quietRules[:], "params.writer": {"burst"}}
		s.Keys, s.Series = []string{"params.mode"}, []results.FigureSeries{{Key: "hybrid", Label: "hybrid"}, {Key: "pre-copy", Label: "pre-copy"}}
		s.Note = "20 ms, 1 Gbit/s; 20 MB a second, written in a fifth of it. Baruchi et al. (2015) report up to 74 % less time and 43 % less data for virtual machines."
		return s
	}
	down := results.Axis{Column: "downtime", Label: "Downtime", Unit: "ms", Scale: 1e3}
	f := Figure{Variants: []string{Network}, Spec: spec("migration-finalize", "downtime", down)}
	f.More = []results.FigureSpec{
		spec("migration-finalize-blocktime", "waits afterwards", results.Axis{Column: "blocktime", Label: "Sum of waits after the hand-over", Unit: "ms", Scale: 1e3}),
		spec("migration-finalize-total", "until the source may exit", results.Axis{Column: "total_time", Label: "Total time", Unit: "s"}),
		spec("migration-finalize-bytes", "bytes sent", results.Axis{Column: "wire_tx_bytes", Label: "Bytes on the wire", Unit: "MB", Scale: 1e-6}),
		adaptive("migration-finalize-adaptive", "downtime", down),
		adaptive("migration-finalize-adaptive-bytes", "bytes sent", results.Axis{Column: "wire_tx_bytes", Label: "Bytes on the wire", Unit: "MB", Scale: 1e-6}),
		when("migration-finalize-cycle", "standstill", results.Axis{Column: "standstill", Label: "From stopped to the first write", Unit: "ms", Scale: 1e3}),
		when("migration-finalize-cycle-total", "until the source may exit", results.Axis{Column: "total_time", Label: "Total time", Unit: "s"}),
		when("migration-finalize-cycle-bytes", "bytes sent", results.Axis{Column: "wire_tx_bytes", Label: "Bytes on the wire", Unit: "MB", Scale: 1e-6}),
	}
	f.Cells = func(_ string, quick bool) []*Cell {
		size, shares, limits, writers, settings := int64(256<<20), shares, adaptiveLimits[:], writers, []string(nil)
		if quick {
			size, shares, limits, writers, settings = 32<<20, []float64{0.5, 1}, []string{"300ms"}, writers[:2], []string{quickSettle}
		}
		var cells []*Cell
		for _, w := range writers {
			for _, share := range shares {
				cells = append(cells, migrateCell("migration-finalize", "hybrid", size, append(settings, "writer="+w.Key, fmt.Sprintf("finalize_at=%g", share))...))
			}
			for _, limit := range limits {
				cells = append(cells, migrateCell("migration-finalize", "pre-copy", size, append(settings, "writer="+w.Key, "finalize=adaptive", "max_downtime="+limit)...))
			}
		}
		for _, mode := range []string{"hybrid", "pre-copy"} {
			for _, rule := range quietRules {
				if mode == "hybrid" && rule == policyPercentName && !quick {
					continue // above
				}
				cells = append(cells, migrateCell("migration-finalize", mode, size, append(settings, "writer=burst", "finalize="+rule)...))
			}
		}
		return cells
	}
	return f
}

// quickSettle is how long the application goes on at the destination in quick forms: longer
// than what they have to move.
const quickSettle = "settle=300ms"

const policyPercentName = "percent"

// quietRules are the rules that are compared for an application that writes in bursts.
var quietRules = [...]string{policyPercentName, "cycle", "quiet"}

// adaptiveLimits are the downtimes that are asked for.
var adaptiveLimits = [...]string{"60ms", "100ms", "300ms", "1s"}
