package scenarios

import (
	"cmp"
	"strings"
	"time"

	"memsync/results"
	"memsync/strategies/backend"
)

// backendFigures compare the places where the source's content lives.
func backendFigures() []Figure {
	return []Figure{
		firstChunkByBackend(),
		throughputByBackend(),
		throughputByBackendAndRTT(),
	}
}

// storeNames are the thesis's stores, in its order, and kv, which it does not have.
func storeNames() []string {
	return []string{"memory", "file", "directory", "kv", "redis", "s3", "cassandra"}
}

// serverStores are those of storeNames that talk to a server.
func serverStores() []string {
	var names []string
	for _, n := range storeNames() {
		if backend.NeedsService(n) {
			names = append(names, n)
		}
	}
	return names
}

func storeLabel(name string) string {
	return map[string]string{"kv": "bbolt", "redis": "Redis", "s3": "S3", "cassandra": "Cassandra"}[name]
}

// storeSeries are the stores as series; keys and series of the thesis go on with suffix.
func storeSeries(names []string, suffix string) []results.FigureSeries {
	var series []results.FigureSeries
	for _, n := range names {
		s := results.FigureSeries{Key: n, Label: storeLabel(n)}
		if n != "kv" {
			s.Thesis = n + suffix
		}
		series = append(series, s)
	}
	return series
}

// storeNote says what differs between the thesis's stores and ours.
const storeNote = " The thesis: stores that were never filled, MinIO for S3, ScyllaDB for Cassandra."

func storeCell(figure, variant, strategy, store string, rtt time.Duration) *Cell {
	c := cellOf(figure, variant, strategy, rtt)
	c.Backend = store
	return c
}

// firstChunkByBackend is latency-first-chunk-backendvar-1 and -2.
func firstChunkByBackend() Figure {
	const name = "latency-first-chunk-backendvar-1"
	f := Figure{Spec: results.FigureSpec{
		Name: name, Title: "First-chunk latency by backend", Kind: results.FigureBar,
		Y:    results.Axis{Column: "latency_first_chunk", Label: "First-chunk latency", Unit: "us", Scale: 1e6, Log: true},
		Keys: []string{"backend"}, Series: storeSeries(storeNames(), ""), Thesis: name,
		Note: "Direct mount, one load of the second page after open, no delay." + storeNote + " 4 GiB, mean of 5 runs.",
	}}
	f.More = []results.FigureSpec{alsoAs(f.Spec, "latency-first-chunk-backendvar-2", func(s *results.FigureSpec) {
		s.Title, s.Kind = "Spread of the first-chunk latency by backend", results.FigureBox
	})}
	f.Cells = func(variant string, quick bool) []*Cell {
		var cells []*Cell
		for _, store := range storeNames() {
			c := storeCell(name, variant, "direct-mount", store, 0)
			// A real store must be filled: not with the thesis's 4 GiB for one page of it.
			if c.Limit, c.Size = 0, 64<<20; quick {
				c.Size = 4 << 20
			}
			cells = append(cells, c)
		}
		return cells
	}
	return f
}

// throughputByBackend is throughput-backendvar-1, -2, -3, -5 and -6; the thesis's -4 is the same picture as -3.
func throughputByBackend() Figure {
	const name = "throughput-backendvar-1"
	var series []results.FigureSeries
	for _, store := range storeNames() {
		for _, mount := range []string{"direct", "managed"} {
			one := results.FigureSeries{Key: store + "/" + mount + "-mount", Label: cmp.Or(storeLabel(store), store) + ", " + mount}
			if store != "kv" {
				one.Thesis = store + "/" + mount
			}
			series = append(series, one)
		}
	}
	f := Figure{Spec: results.FigureSpec{
		Name: name, Title: "Sequential read throughput by backend", Kind: results.FigureBar,
		Y:    throughputAxis("Read throughput"),
		Keys: []string{"backend", "strategy"}, Series: series, Thesis: name,
		Note: "Without delay, from the first load to the last byte copied out." + storeNote + " 4 MiB direct and 40 MiB managed, much of it pulled before the clock starts, mean of 5 runs.",
	}}
	servers := func(i, strategy, title string, kind results.FigureKind) results.FigureSpec {
		return alsoAs(f.Spec, "throughput-backendvar-"+i, func(s *results.FigureSpec) {
			s.Title, s.Kind = title, kind
			s.Where = map[string][]string{"strategy": {strategy}, "backend": serverStores()}
			s.Keys, s.Series = []string{"backend"}, storeSeries(serverStores(), "/"+strings.TrimSuffix(strategy, "-mount"))
		})
	}
	f.More = []results.FigureSpec{
		servers("2", "direct-mount", "Stores behind a server, direct mount: sequential read throughput", results.FigureBar),
		servers("3", "managed-mount", "Stores behind a server, managed mount: sequential read throughput", results.FigureBar),
		servers("5", "direct-mount", "Stores behind a server, direct mount: density of the read throughput", results.FigureDensity),
		servers("6", "managed-mount", "Stores behind a server, managed mount: spread of the read throughput", results.FigureBox),
	}
	f.Cells = func(variant string, quick bool) []*Cell {
		var cells []*Cell
		for _, store := range storeNames() {
			for _, strategy := range []string{"direct-mount", "managed-mount"} {
				c := storeCell(name, variant, strategy, store, 0)
				switch {
				case variant == Network: // one size for both
					if c.Size = 40 << 20; quick {
						c.Size, c.Budget = 16<<20, time.Second
					}
				case strategy == "direct-mount":
					c.Size = 4 << 20
				default:
					c.Size = 40 << 20
				}
				cells = append(cells, c)
			}
		}
		return cells
	}
	return f
}

// throughputByBackendAndRTT is throughput-anyvar-1 to -4.
func throughputByBackendAndRTT() Figure {
	const name = "throughput-anyvar-1"
	spec := results.FigureSpec{
		Name: name, Title: "Direct mount: sequential read throughput by RTT and backend", Kind: results.FigureLine,
		X: rttAxis(), Y: throughputAxis("Read throughput"),
		Where: map[string][]string{"strategy": {"direct-mount"}}, Keys: []string{"backend"}, Series: storeSeries(storeNames(), "/direct"), Thesis: name,
		Note: "The RTT is between source and destination; store and source are on one host." + storeNote + " 4 MiB direct and 40 MiB managed, a pause before each call paid twice, mean of 2 runs.",
	}
	picture := func(i, strategy, title string, stores []string) results.FigureSpec {
		return alsoAs(spec, "throughput-anyvar-"+i, func(s *results.FigureSpec) {
			s.Title = title
			s.Where = map[string][]string{"strategy": {strategy}, "backend": stores}
			s.Series = storeSeries(stores, "/"+strings.TrimSuffix(strategy, "-mount"))
		})
	}
	f := Figure{Spec: spec}
	f.More = []results.FigureSpec{
		picture("2", "managed-mount", "Managed mount: sequential read throughput by RTT and backend", storeNames()),
		picture("3", "direct-mount", "Stores behind a server, direct mount: sequential read throughput by RTT", serverStores()),
		picture("4", "managed-mount", "Stores behind a server, managed mount: sequential read throughput by RTT", serverStores()),
	}
	f.Cells = func(variant string, quick bool) []*Cell {
		rtts := []int{0, 2, 4, 6, 8, 10, 12, 14, 22, 28, 34, 40}
		if quick {
			rtts = []int{0, 20}
		}
		var cells []*Cell
		for _, ms := range rtts {
			for _, store := range storeNames() {
				for _, strategy := range []string{"direct-mount", "managed-mount"} {
					if quick && store != "memory" && !backend.NeedsService(store) {
						continue // one without a server is enough to see what the RTT does to all
					}
					c := storeCell(name, variant, strategy, store, time.Duration(ms)*time.Millisecond)
					switch {
					case strategy == "direct-mount" && variant == Thesis:
						c.Size = 4 << 20
					default:
						c.Size = 40 << 20
					}
					if quick {
						c.Size, c.Budget = 4<<20, 500*time.Millisecond
					}
					cells = append(cells, c)
				}
			}
		}
		return cells
	}
	return f
}
