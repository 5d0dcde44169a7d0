package scenarios

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"memsync/results"
	"memsync/scenarios/inputs"
	"memsync/strategies/region"
)

// useCase is a case study on a region that is one file: a real program (package program)
// on a file as real programs write it (package inputs).
type useCase struct {
	name   string // of the figure, behind case-
	input  string // of package inputs; its program is the one that is run
	title  string // what is done
	first  string // what the first useful result is
	note   string
	orders []string // of the managed mount's background pulls, the right one first
	ranges bool     // the program speaks HTTP and asks for ranges itself: the usual tool of the job
}

func useCases() []useCase {
	return []useCase{
		{"sqlite", "sqlite", "A remote SQLite database", "20 rows found by the index",
			"sqlite3 of Debian looks up 20 of 180,000 rows by the index, then goes through the whole table.", []string{"format"}, false},
		{"video", "mp4", "A film whose index is at its end", "the first frame is decoded",
			"ffmpeg of Debian decodes the first frame, then plays ten seconds of a film of 13 Mbit/s.", []string{"format"}, true},
		{"game", "game", "A game's assets, level by level", "level 1 can be played",
			"unzip of Debian reads the assets of a level out of an archive (PK3), level 1, then 2 and 3. The trace is of level 1.", []string{"trace:" + inputs.Prefix + "game.trace", "format"}, false},
		{"remotefs", "ext4", "A tree of files on another host", "40 folders are listed and a file in each is read",
			"debugfs of e2fsprogs, without a mount of the kernel, lists 40 of 400 folders of a file system of 96 MiB and reads a file in each, then 40 others. Half of the image is empty, which is downloaded, too.", []string{"format"}, false},
		{"binary", "app", "A program with its data in one remote file", "it has run and found 20 rows",
			"The file is sqlite3 of Debian with a database behind it, executed from where it lies. The trace is of a run that looked up other rows.", []string{"trace:" + inputs.Prefix + "app.other", "format"}, false},
	}
}

// caseFigures are the case studies of N25.
func caseFigures() []Figure {
	var figures []Figure
	for _, u := range useCases() {
		figures = append(figures, u.figure())
	}
	return append(figures, caseTodo(), caseTape())
}

// caseTodo is an application whose state, a list of lines in a mapped region, goes on at
// another host while it is changed.
func caseTodo() Figure {
	const name = "case-todo"
	modes := []results.FigureSeries{
		{Key: "migration/stop-and-copy", Label: "stopped, copied, started"},
		{Key: "direct-mount/", Label: "direct mount, closed and reopened"}, {Key: "managed-mount/", Label: "managed mount, closed and reopened"},
		{Key: "hashsync/", Label: "hashsync"}, {Key: "migration/hybrid", Label: "migration, hybrid"},
	}
	spec := results.FigureSpec{
		Name: name, Title: "A TODO list that moves while it is used: downtime", Kind: results.FigureBar,
		X:    results.Axis{Column: "rtt_ms", Label: "RTT", Unit: "ms", Category: true},
		Y:    results.Axis{Column: "downtime", Label: "Last change here to first change there", Unit: "ms", Scale: 1e3, Log: true},
		Keys: []string{"strategy", "params.mode"}, Series: modes,
		Note: "100 Mbit/s; the state is text, lines of 512 bytes, 500 of which are changed a second, few of them often. Every line is compared afterwards.",
	}
	f := Figure{Spec: spec, Variants: []string{Network}, More: []results.FigureSpec{
		alsoAs(spec, name+"-blocktime", func(s *results.FigureSpec) {
			s.Title, s.Y = "A TODO list that moves while it is used: waits afterwards", results.Axis{Column: "blocktime", Label: "Sum of waits after the hand-over", Unit: "ms", Scale: 1e3}
		}),
		alsoAs(spec, name+"-total", func(s *results.FigureSpec) {
			s.Title, s.Y = "A TODO list that moves while it is used: until the source may exit", results.Axis{Column: "total_time", Label: "Total time", Unit: "s"}
		}),
	}}
	f.Cells = func(_ string, quick bool) []*Cell {
		rtts, size, settings := []int{5, 20, 80}, int64(inputs.Size), []string{"dirty_rate=256KB", "writer=todo"}
		if quick {
			rtts, size, settings = []int{20}, 16<<20, append(settings, quickSettle)
		}
		var cells []*Cell
		for _, ms := range rtts {
			for _, s := range modes {
				strategy, mode, _ := strings.Cut(s.Key, "/")
				c := migrateCell(name, cmp.Or(mode, strategy), size, settings...)
				if strategy == "direct-mount" {
					c.Strategy, c.Backend, c.Settings = strategy, "file", slices.Clone(settings)
				}
				c.Link.RTT, c.Link.Rate = time.Duration(ms)*time.Millisecond, 100e6
				c.Input, c.Seeds = inputs.Prefix+"todo", name
				cells = append(cells, c)
			}
		}
		return cells
	}
	return f
}

// caseKeys tell the ways apart in which a case's user can have the region.
var caseKeys = []string{"strategy", "params.fetch", "params.order"}

func (u useCase) series() []results.FigureSeries {
	s := []results.FigureSeries{{Key: "download/whole/", Label: "download first (HTTP)"}}
	if u.ranges {
		s = append(s, results.FigureSeries{Key: "download/ranges/", Label: "HTTP ranges by the program itself"})
	}
	s = append(s, results.FigureSeries{Key: "direct-mount//", Label: "direct mount"})
	for _, order := range u.orders {
		label, _, _ := strings.Cut(order, ":")
		s = append(s, results.FigureSeries{Key: "managed-mount//" + order, Label: "managed mount, order=" + label})
	}
	return append(s, results.FigureSeries{Key: "managed-mount//linear", Label: "managed mount, order=linear"})
}

func (u useCase) figure() Figure {
	name := "case-" + u.name
	spec := results.FigureSpec{
		Name: name, Title: u.title + ": time to the first useful result", Kind: results.FigureBar,
		X:    results.Axis{Column: "rtt_ms", Label: "RTT", Unit: "ms", Category: true},
		Y:    results.Axis{Column: "time_to_first_result", Label: "Open until " + u.first, Unit: "s", Log: true},
		Keys: caseKeys, Series: u.series(),
		Note: "100 Mbit/s; the managed mount pulls 64 KiB at a time, as much ahead as the path holds. " + u.note + " Its output is compared with that on the local file.",
	}
	f := Figure{Spec: spec, Variants: []string{Network}, More: []results.FigureSpec{
		alsoAs(spec, name+"-all", func(s *results.FigureSpec) {
			s.Title, s.Y = u.title+": time until all is done", results.Axis{Column: "time_to_result", Label: "Open until all is done", Unit: "s"}
		}),
		alsoAs(spec, name+"-wire", func(s *results.FigureSpec) {
			s.Title, s.Y = u.title+": bytes sent", results.Axis{Column: "wire_tx_bytes", Label: "Sent by the source", Unit: "MB", Scale: 1e-6}
		}),
	}}
	if u.name == "video" {
		f.More = append(f.More, alsoAs(spec, name+"-stalls", func(s *results.FigureSpec) {
			s.Title, s.Y = u.title+": waits while it plays", results.Axis{Column: "stall_time", Label: "Waits of who looks at it", Unit: "s"}
		}))
	}
	f.Cells = func(_ string, quick bool) []*Cell {
		rtts, budget := []int{5, 20, 80}, time.Minute
		if quick {
			rtts, budget = []int{20}, 2*time.Second
		}
		var cells []*Cell
		for _, ms := range rtts {
			for _, s := range spec.Series {
				strategy, rest, _ := strings.Cut(s.Key, "/")
				fetch, order, _ := strings.Cut(rest, "/")
				if quick && order != "" && order != u.orders[0] {
					continue
				}
				c := cellOf(name, Network, strategy, time.Duration(ms)*time.Millisecond)
				c.Link.Rate, c.Budget = 100e6, budget
				c.Chunk = 64 << 10
				c.Access, c.Seeds = "program:"+u.input, name
				switch strategy {
				case "download":
					c.Settings = append(c.Settings, "fetch="+fetch)
				case "managed-mount":
					// What the path holds and no more: who waits stands behind little.
					window := region.RoundUp(int64(float64(c.Link.Rate)/8*c.Link.RTT.Seconds()), c.Chunk)
					c.Settings = append(c.Settings, "order="+order, fmt.Sprintf("window=%d", window), fmt.Sprintf("extent=%d", c.Chunk))
					fallthrough
				default:
					c.Device = "fuse"
				}
				cells = append(cells, c)
			}
		}
		return cells
	}
	return f
}

// caseTape is a region on a medium that can only be wound and appended to.
func caseTape() Figure {
	const name = "case-tape"
	spec := results.FigureSpec{
		Name: name, Title: "A region on a tape: reading", Kind: results.FigureBar,
		X:    results.Axis{Column: "access", Label: "Access", Category: true, Categories: []string{"seq", "random:64KiB"}},
		Y:    results.Axis{Column: "throughput", Label: "Read", Unit: "MB/s", Scale: 1e-6, Log: true},
		Keys: []string{"strategy"}, Series: []results.FigureSeries{{Key: "download", Label: "all of it first, as from an archive"}, {Key: "direct-mount", Label: "direct mount"}, {Key: "managed-mount", Label: "managed mount"}},
		Where: map[string][]string{"op": {"read"}},
		Note:  "20 ms, 100 Mbit/s. The tape takes 50 ms to stop and begin at another record, and reads and writes 100 MB/s; it is appended to only. From the first load on: what came before is in the picture of the time from open.",
	}
	written := func(s *results.FigureSpec) { s.Where = map[string][]string{"op": {"write"}} }
	f := Figure{Spec: spec, Variants: []string{Network}, More: []results.FigureSpec{
		alsoAs(spec, name+"-all", func(s *results.FigureSpec) {
			s.Title, s.Y = "A region on a tape: open to the last byte", results.Axis{Column: "time_to_last_byte", Label: "Open to the last byte", Unit: "s"}
		}),
		alsoAs(spec, name+"-first", func(s *results.FigureSpec) {
			s.Title, s.Y = "A region on a tape: opening", results.Axis{Column: "open_latency", Label: "Open", Unit: "s", Log: true}
		}),
		alsoAs(spec, name+"-written", func(s *results.FigureSpec) {
			written(s)
			s.Title, s.Y = "A region on a tape: until what was written is on it", results.Axis{Column: "total_time", Label: "First write to the end of Sync", Unit: "s", Log: true}
		}),
		alsoAs(spec, name+"-writer", func(s *results.FigureSpec) {
			written(s)
			s.Title, s.Y = "A region on a tape: what the writer sees", results.Axis{Column: "throughput", Label: "Written", Unit: "MB/s", Scale: 1e-6, Log: true}
		}),
	}}
	f.Cells = func(_ string, quick bool) []*Cell {
		size, budget := int64(inputs.Size), 20*time.Second
		if quick {
			size, budget = 8<<20, 2*time.Second
		}
		var cells []*Cell
		for _, access := range spec.X.Categories {
			for _, s := range spec.Series {
				for _, op := range []string{"read", "write"} {
					if op == "write" && s.Key == "download" {
						continue
					}
					c := cellOf(name, Network, s.Key, 20*time.Millisecond)
					c.Link.Rate, c.Budget, c.Size = 100e6, budget, size
					c.Backend, c.Op, c.Access, c.Seeds = "tape", op, access, name
					if s.Key != "download" {
						c.Device = "fuse"
					}
					if s.Key == "managed-mount" { // few long requests: there is one head
						c.PullWorkers, c.Settings = 2, append(c.Settings, "extent=1MiB")
					}
					cells = append(cells, c)
				}
			}
		}
		return cells
	}
	return f
}
