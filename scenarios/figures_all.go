package scenarios

import (
	"slices"
	"time"

	"memsync/results"
)

// allFigures set every strategy beside every other.
func allFigures() []Figure { return []Figure{allStrategies()} }

// entrants are the series of all-strategies, by strategy and prefetch.
func entrants() []results.FigureSeries {
	return []results.FigureSeries{
		{Key: "memory/", Label: "memory (baseline)"}, {Key: "disk/", Label: "disk (baseline)"},
		{Key: "userfaultfd/none", Label: "userfaultfd"}, {Key: "userfaultfd/all", Label: "userfaultfd, prefetch"},
		{Key: "direct-mount/", Label: "direct mount"}, {Key: "managed-mount/", Label: "managed mount"}, {Key: "nbd-direct/", Label: "NBD alone"},
		{Key: "hashsync/", Label: "hashsync"}, {Key: "download/", Label: "download (HTTP)"}, {Key: "migration/", Label: "migration"}, {Key: "snapshot/", Label: "snapshot"},
	}
}

// allStrategies gives every strategy the same region, content, accesses and writes, and
// asks of each what it is for: to be read, to be written, to follow a source that
// changes, to move with its application, to be saved. What a strategy cannot do is a
// cell too, recorded with the reason.
func allStrategies() Figure {
	const name = "all-strategies"
	where := map[string]string{
		"read":   "Every page once, 256 KiB in a row and these in random order, the same for all; 20 ms RTT, 100 Mbit/s.",
		"mixed":  "The same pages in the same order, every second touch a write; then fsync and Sync. 20 ms RTT, 100 Mbit/s.",
		OpSync:   "Single words written at the source at random moments, looked at every 100 ms; 20 ms RTT, 100 Mbit/s. Of those without a bar no destination follows a source that changes.",
		"move":   "An application that writes 2 MB/s in random order goes on at the other host: migration (hybrid) and hashsync take it over, a mount is closed and opened there; 20 ms RTT, 100 Mbit/s.",
		"images": "Copy-on-write images of a region on this host, every 200 ms, while a program writes 10 MB/s to it.",
	}
	pictures := []struct {
		name, op, title, note string
		y                     results.Axis
	}{
		{"", "read", "time until all is read", where["read"], results.Axis{Column: "time_to_last_byte", Label: "Open to the last byte", Unit: "s", Log: true}},
		{"-open", "read", "time to open", where["read"], results.Axis{Column: "open_latency", Label: "Open", Unit: "ms", Scale: 1e3, Log: true}},
		{"-first-chunk", "read", "first chunk", where["read"], results.Axis{Column: "latency_first_chunk", Label: "First load after open", Unit: "us", Scale: 1e6, Log: true}},
		{"-wire", "read", "bytes sent", where["read"], results.Axis{Column: "wire_tx_bytes", Label: "Sent by the source", Unit: "MB", Scale: 1e-6}},
		{"-cpu-source", "read", "CPU time of the source", where["read"], results.Axis{Column: "cpu_per_byte_source", Label: "CPU time of the source", Unit: "s/GiB", Scale: 1 << 30, Log: true}},
		{"-cpu-daemon", "read", "CPU time of the daemon", where["read"], results.Axis{Column: "cpu_per_byte_daemon", Label: "CPU time of the daemon", Unit: "s/GiB", Scale: 1 << 30, Log: true}},
		{"-cpu-workload", "read", "CPU time of the workload", where["read"], results.Axis{Column: "cpu_per_byte_workload", Label: "CPU time of the workload", Unit: "s/GiB", Scale: 1 << 30, Log: true}},
		{"-written", "mixed", "time until the source has what was written", where["mixed"], results.Axis{Column: "total_time", Label: "First touch to the end of Sync", Unit: "s", Log: true}},
		{"-staleness", OpSync, "age of what is seen", where[OpSync], results.Axis{Column: "staleness", Label: "Staleness", Unit: "ms", Scale: 1e3}},
		{"-downtime", OpMigrate, "downtime of an application that moves", where["move"], results.Axis{Column: "downtime", Label: "Downtime", Unit: "ms", Scale: 1e3, Log: true}},
		{"-pause", OpSnapshot, "longest stop of the writer for an image", where["images"], results.Axis{Column: "pause", Label: "Longest write during an image", Unit: "ms", Scale: 1e3, Log: true}},
	}
	f := Figure{Variants: []string{Network}}
	for i, p := range pictures {
		spec := results.FigureSpec{
			Name: name + p.name, Title: "All strategies: " + p.title, Kind: results.FigureBar, Y: p.y,
			Where: map[string][]string{"op": {p.op}}, Keys: []string{"strategy", "params.prefetch"}, Series: entrants(), Note: p.note,
		}
		if i == 0 {
			f.Spec = spec
			continue
		}
		spec.Figure = name
		f.More = append(f.More, spec)
	}
	f.Cells = func(variant string, quick bool) []*Cell {
		size, budget := int64(16<<20), 20*time.Second
		if quick {
			size, budget = 4<<20, 4*time.Second
		}
		var cells []*Cell
		add := func(strategy, op string, settings ...string) *Cell {
			c := cellOf(name, variant, strategy, 0)
			if !isBaseline(strategy) && strategy != "snapshot" {
				c.Link.RTT, c.Link.Rate = 20*time.Millisecond, 100_000_000
			} else {
				c.Link.Rate = 0
			}
			c.Op, c.Size, c.Budget, c.Access, c.Seeds = op, size, budget, "random:256KiB", name
			c.Settings = append(c.Settings, settings...)
			cells = append(cells, c)
			return c
		}
		remotes := []string{"userfaultfd", "direct-mount", "managed-mount", "nbd-direct", "hashsync", "migration"}
		fill := map[string][]string{"userfaultfd": {"fault_around=64KiB"}}
		for _, s := range slices.Concat([]string{"memory", "disk"}, remotes) {
			add(s, "read", fill[s]...)
		}
		add("userfaultfd", "read", "prefetch=all")
		add("download", "read")
		for _, s := range remotes {
			add(s, "mixed", fill[s]...)
			c := add(s, OpSync, fill[s]...)
			if s == "hashsync" {
				c.Settings = append(c.Settings, "interval=100ms", "sync_rounds=1")
				if quick {
					c.Settings = append(c.Settings, "pulses=20")
				}
			}
			c = add(s, OpMigrate, fill[s]...)
			if quick && (s == "migration" || s == "hashsync" || s == "direct-mount" || s == "managed-mount" || s == "nbd-direct") {
				c.Settings = append(c.Settings, quickSettle)
			}
			switch s {
			case "migration":
				c.Settings = append(c.Settings, "mode=hybrid", "dirty_rate=2MB")
			case "hashsync":
				c.Settings = append(c.Settings, "dirty_rate=2MB")
			case "direct-mount", "managed-mount", "nbd-direct":
				c.Backend, c.Settings = "file", append(c.Settings, "dirty_rate=2MB")
			}
		}
		c := add("snapshot", OpSnapshot, "mode=cow", "dirty_rate=10MB")
		if quick {
			c.Budget = 2 * time.Second
		}
		return cells
	}
	return f
}
