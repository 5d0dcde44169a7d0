package scenarios

import (
	"fmt"
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
	return figures
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
		Note: "100 Mbit/s, 64 MiB; the managed mount pulls 64 KiB at a time, as much ahead as the path holds. " + u.note + " Its output is compared with that on the local file.",
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
