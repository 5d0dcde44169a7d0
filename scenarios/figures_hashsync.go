package scenarios

import (
	"fmt"
	"time"

	"memsync/results"
)

// hashsyncFigures are those of hashing, deltas and fan-out: benchmarks N01 to N04 and N21,
// and N15 and N16 of copies that follow (of all strategies: all-strategies).
func hashsyncFigures() []Figure {
	return []Figure{hashAlgorithms(), hashWorkers(), dirtyDetection(), pollInterval(), pollIntervalDowntime(), deltaVersusRsync(), syncCost(), fanout()}
}

// syncCell is a cell of op sync on a link that does not bind, unless link says otherwise.
func syncCell(figure string, size int64, settings ...string) *Cell {
	return &Cell{Figure: figure, Variant: Network, Strategy: "hashsync", Op: OpSync, Size: size, PullWorkers: -1, PushWorkers: -1,
		Limit: WholeRegion, Budget: 5 * time.Second, Settings: append([]string{"interval=1h"}, settings...)}
}

// algorithms are those drawn.
func algorithms() []string {
	return []string{"xxh3-64", "xxh3-128", "xxhash64", "crc32c", "sha1", "sha256", "blake3", "crc64", "fnv1a", "md5"}
}

func hashAlgorithms() Figure {
	spec := func(name, label string, y results.Axis) results.FigureSpec {
		return results.FigureSpec{
			Name: name, Figure: "hash-algorithms", Title: "Hashing a mapped region: " + label, Kind: results.FigureBar,
			X: results.Axis{Column: "params.hash", Label: "Algorithm", Category: true, Categories: algorithms()}, Y: y,
			Keys:   []string{"chunk_bytes"},
			Series: []results.FigureSeries{{Key: "4096", Label: "4 KiB chunks"}, {Key: "65536", Label: "64 KiB chunks"}, {Key: "1048576", Label: "1 MiB chunks"}},
			Note:   "Two workers, whole region each time. Strength and odds of a miss: memsync list hashes.",
		}
	}
	return Figure{
		Spec:     spec("hash-algorithms", "rate", results.Axis{Column: "hash_rate", Label: "Rate", Unit: "GB/s", Scale: 1e-9, Log: true}),
		More:     []results.FigureSpec{spec("hash-algorithms-ratio", "rate by memory bandwidth", results.Axis{Column: "hash_ratio", Label: "Rate by that of plain reading with as many workers"})},
		Variants: []string{Network},
		Cells: func(_ string, quick bool) []*Cell {
			size := int64(256 << 20)
			names, chunks := algorithms(), []int64{4 << 10, 64 << 10, 1 << 20}
			if quick {
				size, chunks = 64<<20, []int64{4 << 10, 64 << 10}
				names = []string{"xxh3-128", "crc32c", "sha256", "blake3", "md5"}
			}
			var cells []*Cell
			for _, name := range names {
				for _, chunk := range chunks {
					c := syncCell("hash-algorithms", size, "hash="+name, "pulses=0", "sync_rounds=5", "dirty_fraction=0")
					c.Chunk = chunk
					cells = append(cells, c)
				}
			}
			return cells
		},
	}
}

func hashWorkers() Figure {
	series := []results.FigureSeries{
		{Key: "xxh3-128/mapped/chunk", Label: "xxh3-128, mapped"}, {Key: "xxh3-128/one/chunk", Label: "xxh3-128, pread on one handle"},
		{Key: "xxh3-128/worker/chunk", Label: "xxh3-128, a handle each"}, {Key: "xxh3-128/chunk/chunk", Label: "xxh3-128, opened for each chunk"},
		{Key: "xxh3-128/mapped/file", Label: "xxh3-128, one digest of the file"},
		{Key: "blake3/mapped/chunk", Label: "blake3, mapped"}, {Key: "sha256/mapped/chunk", Label: "sha256, mapped"},
	}
	return Figure{
		Spec: results.FigureSpec{
			Name: "hash-workers", Title: "Hashing by workers, file handles, and per chunk or file", Kind: results.FigureLine,
			X:    results.Axis{Column: "params.hash_workers", Label: "Workers", Category: true},
			Y:    results.Axis{Column: "hash_rate", Label: "Rate", Unit: "GB/s", Scale: 1e-9, Log: true},
			Keys: []string{"params.hash", "params.handle", "params.digest_of"}, Series: series,
			Note: "64 KiB chunks. One digest of the file: one worker, where nothing changed.",
		},
		Variants: []string{Network},
		Cells: func(_ string, quick bool) []*Cell {
			size, workers := int64(256<<20), []int{1, 2, 4, 8, 16}
			if quick {
				size, workers = 64<<20, []int{1, 2, 4}
			}
			var cells []*Cell
			for _, s := range [][3]string{{"xxh3-128", "mapped", "chunk"}, {"xxh3-128", "one", "chunk"}, {"xxh3-128", "worker", "chunk"}, {"xxh3-128", "chunk", "chunk"},
				{"xxh3-128", "mapped", "file"}, {"blake3", "mapped", "chunk"}, {"sha256", "mapped", "chunk"}} {
				if quick && (s[0] == "sha256" || s[1] == "worker") {
					continue
				}
				for _, n := range workers {
					cells = append(cells, syncCell("hash-workers", size, "hash="+s[0], "handle="+s[1], "digest_of="+s[2], fmt.Sprintf("hash_workers=%d", n),
						"pulses=0", "sync_rounds=5", "dirty_fraction=0"))
				}
			}
			return cells
		},
	}
}

func dirtyDetection() Figure {
	spec := func(name, label string, y results.Axis, note string) results.FigureSpec {
		return results.FigureSpec{
			Name: name, Figure: "dirty-detection", Title: "Finding what changed: " + label, Kind: results.FigureLine,
			X: results.Axis{Column: "params.dirty_fraction", Label: "Changed part of the region, as a fraction", Category: true}, Y: y,
			Keys:   []string{"params.dirty"},
			Series: []results.FigureSeries{{Key: "hash", Label: "hash everything (xxh3-128, 2 workers)"}, {Key: "mtime", Label: "mtime, msync, hash"}, {Key: "pagemap", Label: "PAGEMAP_SCAN"}, {Key: "uffd-wp", Label: "userfaultfd events"}},
			Note:   note,
		}
	}
	return Figure{
		Spec: spec("dirty-detection", "one look", results.Axis{Column: "detection_time", Label: "Time", Unit: "ms", Scale: 1e3, Log: true}, "From the question to the list of chunks. inotify is not drawn: a mapped store makes no event."),
		More: []results.FigureSpec{spec("dirty-detection-writer", "what it costs the writer", results.Axis{Column: "store_time", Label: "Time of the stores", Unit: "ms", Scale: 1e3, Log: true}, "All stores between two looks; the first to a page after a look pays."),
			spec("dirty-detection-arming", "arming the writer's mapping, once", results.Axis{Column: "arm_time", Label: "Time", Unit: "ms", Scale: 1e3}, "Write protection of all pages, at the source. The other ways need none."),
			spec("dirty-detection-msync", "msync", results.Axis{Column: "msync_time", Label: "Time", Unit: "ms", Scale: 1e3, Log: true}, "Part of the look by mtime: each must clean the pages, or the time would not move again. On the file system that has the run's scratch folder.")},
		Variants: []string{Network},
		Cells: func(_ string, quick bool) []*Cell {
			size, fractions := int64(1<<30), []float64{0.0001, 0.001, 0.01, 0.1, 1}
			if quick {
				size, fractions = 64<<20, []float64{0.001, 0.1, 1}
			}
			var cells []*Cell
			for _, how := range []string{"hash", "mtime", "pagemap", "uffd-wp"} {
				for _, f := range fractions {
					cells = append(cells, syncCell("dirty-detection", size, "dirty="+how, fmt.Sprintf("dirty_fraction=%g", f), "pulses=0", "sync_rounds=3"))
				}
			}
			return cells
		},
	}
}

func pollInterval() Figure {
	spec := func(name, label string, y results.Axis) results.FigureSpec {
		return results.FigureSpec{
			Name: name, Figure: "poll-interval", Title: "Poll interval: " + label, Kind: results.FigureLine,
			X: results.Axis{Column: "params.interval", Label: "Interval", Category: true, Categories: []string{"10ms", "30ms", "100ms", "300ms", "1s"}}, Y: y,
			Keys:   []string{"params.dirty"},
			Series: []results.FigureSeries{{Key: "hash", Label: "hash everything"}, {Key: "pagemap", Label: "PAGEMAP_SCAN"}},
			Note:   "Single words are written at random moments.",
		}
	}
	return Figure{
		Spec: spec("poll-interval", "staleness", results.Axis{Column: "staleness", Label: "Staleness", Unit: "ms", Scale: 1e3, Log: true}),
		More: []results.FigureSpec{spec("poll-interval-max", "greatest staleness", results.Axis{Column: "staleness_max", Label: "Greatest staleness", Unit: "ms", Scale: 1e3, Log: true}),
			spec("poll-interval-load", "CPU load", results.Axis{Column: "poll_load", Label: "CPU seconds of the source a second", Log: true})},
		Variants: []string{Network},
		Cells: func(_ string, quick bool) []*Cell {
			intervals := []string{"10ms", "30ms", "100ms", "300ms", "1s"}
			if quick {
				intervals = []string{"10ms", "100ms", "1s"}
			}
			var cells []*Cell
			for _, how := range []string{"hash", "pagemap"} {
				for _, i := range intervals {
					c := syncCell("poll-interval", 64<<20, "dirty="+how, "interval="+i, "sync_rounds=1")
					c.Link.RTT, c.Link.Rate = 20*time.Millisecond, 100_000_000
					if quick {
						c.Size, c.Budget, c.Settings = 4<<20, time.Second, append(c.Settings, "pulses=20")
					}
					cells = append(cells, c)
				}
			}
			return cells
		},
	}
}

func pollIntervalDowntime() Figure {
	spec := func(name, label string, y results.Axis) results.FigureSpec {
		return results.FigureSpec{
			Name: name, Figure: "poll-interval-downtime", Title: "Poll interval: " + label, Kind: results.FigureLine,
			X: results.Axis{Column: "params.interval", Label: "Interval", Category: true, Categories: []string{"10ms", "30ms", "100ms", "300ms", "1s"}}, Y: y,
			Keys: []string{"params.dirty", "params.lead_rounds"},
			Series: []results.FigureSeries{{Key: "hash/0", Label: "hash everything, stopped at once"}, {Key: "pagemap/0", Label: "PAGEMAP_SCAN, stopped at once"},
				{Key: "hash/1", Label: "hash everything, a round before"}, {Key: "pagemap/1", Label: "PAGEMAP_SCAN, a round before"}},
			Note: "The application writes 20 MB/s in random order, is stopped, and goes on at the destination after a last round.",
		}
	}
	return Figure{
		Spec:     spec("poll-interval-downtime", "downtime of a migration", results.Axis{Column: "downtime", Label: "Last write here to first write there", Unit: "ms", Scale: 1e3, Log: true}),
		More:     []results.FigureSpec{spec("poll-interval-downtime-bytes", "bytes sent after the application has stopped", results.Axis{Column: "needed_bytes", Label: "Last round", Unit: "kB", Scale: 1e-3, Log: true})},
		Variants: []string{Network},
		Cells: func(_ string, quick bool) []*Cell {
			size, intervals := int64(64<<20), []string{"10ms", "30ms", "100ms", "300ms", "1s"}
			if quick {
				size, intervals = 16<<20, []string{"10ms", "100ms", "1s"}
			}
			var cells []*Cell
			for _, how := range []string{"hash", "pagemap"} {
				for _, lead := range []int{0, 1} {
					if quick && lead == 0 {
						continue
					}
					for _, i := range intervals {
						c := syncCell("poll-interval-downtime", size)
						c.Op, c.Settings = OpMigrate, []string{"dirty=" + how, "interval=" + i, fmt.Sprintf("lead_rounds=%d", lead), "dirty_rate=20MB"}
						c.Link.RTT, c.Link.Rate = 20*time.Millisecond, NetworkRate
						if quick {
							c.Settings = append(c.Settings, quickSettle)
						}
						cells = append(cells, c)
					}
				}
			}
			return cells
		},
	}
}

func deltaVersusRsync() Figure {
	spec := func(name, label string, y results.Axis) results.FigureSpec {
		return results.FigureSpec{
			Name: name, Figure: "delta-vs-rsync", Title: "hashsync and rsync: " + label, Kind: results.FigureLine,
			X: results.Axis{Column: "params.dirty_fraction", Label: "Changed part of the region, as a fraction", Category: true}, Y: y,
			Keys: []string{"strategy", "params.dirty_pattern"},
			Series: []results.FigureSeries{
				{Key: "hashsync/scattered", Label: "hashsync, scattered"}, {Key: "rsync/scattered", Label: "rsync, scattered"},
				{Key: "hashsync/clustered", Label: "hashsync, clustered"}, {Key: "rsync/clustered", Label: "rsync, clustered"},
				{Key: "hashsync/insert", Label: "hashsync, insertion"}, {Key: "rsync/insert", Label: "rsync, insertion"},
			},
			Note: "A round after the change, both sides equal before; chunks and blocks of 64 KiB. rsync: memsync-peers run delta-vs-rsync.",
		}
	}
	return Figure{
		Spec: spec("delta-vs-rsync", "time", results.Axis{Column: "total_time", Label: "Time until equal", Unit: "s", Log: true}),
		More: []results.FigureSpec{spec("delta-vs-rsync-bytes", "bytes to the destination", results.Axis{Column: "round_tx_bytes", Label: "Bytes", Unit: "kB", Scale: 1e-3, Log: true}),
			spec("delta-vs-rsync-bytes-back", "bytes to the source", results.Axis{Column: "round_rx_bytes", Label: "Bytes", Unit: "kB", Scale: 1e-3, Log: true})},
		Variants: []string{Network},
		Cells: func(_ string, quick bool) []*Cell {
			size, fractions := int64(64<<20), []float64{0.0001, 0.001, 0.01, 0.1, 1}
			if quick {
				size, fractions = 8<<20, []float64{0.001, 0.01, 0.1}
			}
			var cells []*Cell
			for _, pattern := range []string{"scattered", "clustered", "insert"} {
				for _, f := range fractions {
					shape := []string{"dirty_pattern=" + pattern, fmt.Sprintf("dirty_fraction=%g", f), "pulses=0"}
					c := syncCell("delta-vs-rsync", size, append([]string{"dirty=pagemap"}, shape...)...)
					r := &Cell{Figure: "delta-vs-rsync", Variant: Network, Strategy: "rsync", Peer: true, Op: OpSync, Size: size, PullWorkers: -1, PushWorkers: -1,
						Limit: WholeRegion, Budget: 5 * time.Second, Settings: append([]string{"block=64KiB"}, shape...)}
					for _, c := range []*Cell{c, r} {
						c.Link.RTT, c.Link.Rate = 20*time.Millisecond, 100_000_000
					}
					cells = append(cells, c, r)
				}
			}
			return cells
		},
	}
}

// syncCost is CPU time and bytes of the ways to keep a copy equal.
func syncCost() Figure {
	spec := func(name, label string, y results.Axis) results.FigureSpec {
		return results.FigureSpec{
			Name: name, Figure: "sync-cost", Title: "Keeping a copy equal: " + label, Kind: results.FigureBar,
			X: results.Axis{Column: "params.dirty_fraction", Label: "Changed part of the region, as a fraction", Category: true}, Y: y,
			Keys: []string{"strategy", "params.dirty"},
			Series: []results.FigureSeries{{Key: "hashsync/hash", Label: "hashsync, hash everything"}, {Key: "hashsync/mtime", Label: "hashsync, mtime"},
				{Key: "hashsync/pagemap", Label: "hashsync, PAGEMAP_SCAN"}, {Key: "hashsync/uffd-wp", Label: "hashsync, userfaultfd events"}, {Key: "rsync/", Label: "rsync"}},
			Note: "Left: the part of the region that changed, as a fraction. Scattered pages; chunks and blocks of 64 KiB. rsync: memsync-peers run sync-cost.",
		}
	}
	cpu := func(column string) results.Axis {
		return results.Axis{Column: column, Label: "CPU time of three rounds", Unit: "ms", Scale: 1e3, Log: true}
	}
	bytes := func(column string) results.Axis {
		return results.Axis{Column: column, Label: "Bytes a round", Unit: "kB", Scale: 1e-3, Log: true}
	}
	return Figure{
		Spec: spec("sync-cost", "CPU time of the source", cpu("cpu_source")),
		More: []results.FigureSpec{spec("sync-cost-destination", "CPU time of the destination", cpu("cpu_daemon")), spec("sync-cost-writer", "CPU time of the writer", cpu("cpu_writer")),
			spec("sync-cost-bytes", "bytes to the destination", bytes("round_tx_bytes")), spec("sync-cost-bytes-back", "bytes to the source", bytes("round_rx_bytes"))},
		Variants: []string{Network},
		Cells: func(_ string, quick bool) []*Cell {
			size, fractions := int64(256<<20), []float64{0.001, 0.01, 0.1}
			if quick {
				size, fractions = 64<<20, []float64{0.001, 0.1}
			}
			var cells []*Cell
			for _, how := range []string{"hash", "mtime", "pagemap", "uffd-wp", "rsync"} {
				for _, f := range fractions {
					shape := []string{fmt.Sprintf("dirty_fraction=%g", f), "pulses=0"}
					c := syncCell("sync-cost", size, append([]string{"dirty=" + how}, shape...)...)
					if how == "rsync" {
						c.Strategy, c.Peer, c.Settings = "rsync", true, append([]string{"block=64KiB"}, shape...)
					}
					c.Link.RTT, c.Link.Rate = 20*time.Millisecond, NetworkRate
					cells = append(cells, c)
				}
			}
			return cells
		},
	}
}

func fanout() Figure {
	spec := func(name, label string, y results.Axis) results.FigureSpec {
		return results.FigureSpec{
			Name: name, Figure: "fanout", Title: "One source, several destinations: " + label, Kind: results.FigureLine,
			X: results.Axis{Column: "params.destinations", Label: "Destinations", Category: true}, Y: y,
			Keys: []string{"strategy", "params.topology"},
			Series: []results.FigureSeries{{Key: "hashsync/direct", Label: "hashsync, direct"}, {Key: "hashsync/hub", Label: "hashsync, hub"},
				{Key: "hashsync/chain", Label: "hashsync, chain"}, {Key: "rsync/direct", Label: "rsync, each from the source"}},
			Note: "Each host has a link of 100 Mbit/s, 10 ms RTT between any two; a tenth of the pages changes. rsync: memsync-peers run fanout.",
		}
	}
	mb := func(column string) results.Axis {
		return results.Axis{Column: column, Label: "Bytes a round", Unit: "MB", Scale: 1e-6}
	}
	return Figure{
		Spec: spec("fanout", "time until the last one has the round", results.Axis{Column: "last_equal_time", Label: "Time", Unit: "s"}),
		More: []results.FigureSpec{spec("fanout-first", "time until the first one has the round", results.Axis{Column: "first_equal_time", Label: "Time", Unit: "s"}),
			spec("fanout-source", "what the source sends", mb("round_tx_bytes")), spec("fanout-busiest", "what the busiest host sends", mb("round_tx_bytes_max")),
			spec("fanout-open", "opening, until the last one has all of it", results.Axis{Column: "open_latency", Label: "Time", Unit: "s"})},
		Variants: []string{Network},
		Cells: func(_ string, quick bool) []*Cell {
			size, counts := int64(16<<20), []int{1, 2, 4, 8, 16}
			if quick {
				size, counts = 2<<20, []int{1, 2, 8}
			}
			var cells []*Cell
			for _, n := range counts {
				for _, topology := range []string{"direct", "hub", "chain", "rsync"} {
					shape := []string{fmt.Sprintf("destinations=%d", n), "dirty_fraction=0.1", "pulses=0"}
					c := syncCell("fanout", size, append([]string{"dirty=pagemap", "topology=" + topology}, shape...)...)
					if topology == "rsync" {
						c.Strategy, c.Peer, c.Settings = "rsync", true, append([]string{"block=64KiB", "topology=direct"}, shape...)
					}
					c.Link.RTT, c.Link.Rate = 10*time.Millisecond, 100_000_000
					cells = append(cells, c)
				}
			}
			return cells
		},
	}
}
