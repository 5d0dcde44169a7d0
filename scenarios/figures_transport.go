package scenarios

import (
	"fmt"
	"time"

	"memsync/results"
	"memsync/strategies/all"
)

// transportFigures compare the transports.
func transportFigures() []Figure {
	return []Figure{
		rpcByRTT(),
		firstChunksByTransport(),
		poolAndConcurrency(),
		quicAgainstTCP(),
	}
}

func transportSeries() []results.FigureSeries {
	labels := map[string]string{"nbd": "NBD", "grpc": "gRPC", "drpc": "dRPC", "quic": "QUIC", "jsonrpc": "JSON-RPC"}
	var series []results.FigureSeries
	for _, name := range all.TransportNames() {
		series = append(series, results.FigureSeries{Key: name, Label: labels[name]})
	}
	return series
}

// rpcByRTT is the thesis's comparison of frameworks for remote procedure calls.
func rpcByRTT() Figure {
	const name = "rpc-rttvar-1"
	var series []results.FigureSeries
	for _, mount := range []struct{ key, label string }{{"direct-mount", "direct"}, {"managed-mount", "managed"}} {
		for _, t := range transportSeries() {
			s := results.FigureSeries{Key: mount.key + "/" + t.Key, Label: t.Label + ", " + mount.label}
			if t.Key == "grpc" {
				s.Thesis = "grpc/" + mount.label
			}
			series = append(series, s)
		}
	}
	// The thesis slept in the client, before calls that went over loopback: no shaper of ours does.
	f := Figure{Variants: []string{Network}, Spec: results.FigureSpec{
		Name: name, Title: "Transports: sequential read throughput by RTT", Kind: results.FigureLine,
		X: rttAxis(), Y: throughputAxis("Read throughput"), Keys: []string{"strategy", "transport"}, Series: series, Thesis: name,
		Note: "40 MiB, 1 Gbit/s, each transport with its own settings. The thesis has gRPC, Dudirekta and fRPC over loopback with a pause before each call, mean of 2 runs; only gRPC is the same library.",
	}}
	only := func(i int, strategy, title string) results.FigureSpec {
		return alsoAs(f.Spec, fmt.Sprintf("rpc-rttvar-%d", i), func(s *results.FigureSpec) {
			s.Title, s.Where, s.Series = "Transports, "+title+": sequential read throughput by RTT", map[string][]string{"strategy": {strategy}}, nil
			for _, one := range series {
				if len(one.Key) > len(strategy) && one.Key[:len(strategy)] == strategy {
					s.Series = append(s.Series, one)
				}
			}
		})
	}
	f.More = []results.FigureSpec{only(2, "direct-mount", "direct mount"), only(3, "managed-mount", "managed mount")}
	f.Cells = func(variant string, quick bool) []*Cell {
		rtts := []int{0, 2, 4, 6, 8, 10, 14, 18, 22, 28, 34, 40}
		if quick {
			rtts = []int{0, 10, 40}
		}
		var cells []*Cell
		for _, ms := range rtts {
			for _, strategy := range []string{"direct-mount", "managed-mount"} {
				for _, t := range all.TransportNames() {
					if quick && strategy == "direct-mount" && (t == "quic" || t == "jsonrpc") {
						continue
					}
					c := cellOf(name, variant, strategy, time.Duration(ms)*time.Millisecond)
					if c.Transport, c.Size = t, 40<<20; quick {
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

// firstChunksByTransport is N09 of the thesis's notes.
func firstChunksByTransport() Figure {
	const name = "first-chunks-transport"
	sizes := []int64{4 << 10, 64 << 10, 1 << 20, 16 << 20}
	f := Figure{Variants: []string{Network}, Spec: results.FigureSpec{
		Name: name, Title: "Transports (N09): from open to the first n bytes", Kind: results.FigureBar,
		X: results.Axis{Column: "params.limit", Label: "Bytes read", Category: true, Categories: []string{"4KiB", "64KiB", "1MiB", "16MiB"}},
		Y: results.Axis{Column: "time_to_last_byte", Label: "Open and read", Unit: "ms", Scale: 1e3, Log: true}, Keys: []string{"transport"}, Series: transportSeries(),
		Note: "Managed mount at 20 ms and 1 Gbit/s, connections and handshakes included; read in sequence.",
	}}
	f.Cells = func(variant string, quick bool) []*Cell {
		var cells []*Cell
		for i, n := range sizes {
			for _, t := range all.TransportNames() {
				if quick && i == 1 {
					continue
				}
				c := cellOf(name, variant, "managed-mount", 20*time.Millisecond)
				c.Transport, c.Size, c.Limit = t, 64<<20, n
				cells = append(cells, c)
			}
		}
		return cells
	}
	return f
}

// poolAndConcurrency is N10.
func poolAndConcurrency() Figure {
	const name = "rpc-pool"
	names := []string{"grpc", "drpc", "quic", "jsonrpc"}
	var series []results.FigureSeries
	for _, t := range transportSeries() {
		if t.Key == "nbd" {
			continue
		}
		series = append(series, results.FigureSeries{Key: t.Key + "/1", Label: t.Label + ", one at a time"}, results.FigureSeries{Key: t.Key + "/0", Label: t.Label + ", concurrent"})
	}
	f := Figure{Variants: []string{Network}, Spec: results.FigureSpec{
		Name: name, Title: "Connections and calls under way on each (N10): read throughput", Kind: results.FigureLine,
		X: results.Axis{Column: "params.connections", Label: "Connections", Category: true, Categories: []string{"1", "2", "4", "8", "16"}}, Y: throughputAxis("Read throughput"),
		Keys: []string{"transport", "params.calls"}, Series: series,
		Note: "Managed mount, 64 MiB at 20 ms and 1 Gbit/s. dRPC has one call at a time on a connection in any case; its concurrent form is one stream (rpc=stream).",
	}}
	f.Cells = func(variant string, quick bool) []*Cell {
		pools := []int{1, 2, 4, 8, 16}
		if quick {
			pools = []int{1, 4, 16}
		}
		var cells []*Cell
		for _, n := range pools {
			for _, t := range names {
				for _, calls := range []int{1, 0} {
					if quick && calls == 1 && n > 1 { // of one call after another, a connection is enough to know
						continue
					}
					c := cellOf(name, variant, "managed-mount", 20*time.Millisecond)
					if c.Transport, c.Size = t, 64<<20; quick {
						c.Size = 16 << 20
					}
					c.Settings = append(c.Settings, fmt.Sprintf("connections=%d", n), fmt.Sprintf("calls=%d", calls))
					if t == "drpc" && calls == 0 {
						c.Settings = append(c.Settings, "rpc=stream")
					}
					cells = append(cells, c)
				}
			}
		}
		return cells
	}
	return f
}

// quicAgainstTCP is N22.
func quicAgainstTCP() Figure {
	const name = "quic-tcp"
	f := Figure{Variants: []string{Network}, Spec: results.FigureSpec{
		Name: name, Title: "QUIC against TCP (N22): read throughput with and without loss", Kind: results.FigureBar,
		X: results.Axis{Column: "loss", Label: "Loss in each direction", Category: true}, Y: throughputAxis("Read throughput"),
		Keys: []string{"transport"}, Series: transportSeries(),
		Note: "Managed mount, 16 MiB at 100 ms and 100 Mbit/s. TCP with the kernel's congestion control, QUIC with its library's (CUBIC).",
	}}
	f.More = []results.FigureSpec{alsoAs(f.Spec, "quic-tcp-tail", func(s *results.FigureSpec) {
		s.Title = "QUIC against TCP (N22): 99.9th percentile of the touches"
		s.Y = results.Axis{Column: "fault_latency_p999", Label: "Touch, 99.9th percentile", Unit: "ms", Scale: 1e3, Log: true}
	})}
	f.Cells = func(variant string, quick bool) []*Cell {
		losses := []float64{0, 0.001, 0.01}
		if quick {
			losses = []float64{0, 0.01}
		}
		var cells []*Cell
		for _, loss := range losses {
			for _, t := range all.TransportNames() {
				if quick && (t == "drpc" || t == "jsonrpc") { // TCP has two others
					continue
				}
				c := cellOf(name, variant, "managed-mount", 100*time.Millisecond)
				c.Link.Rate, c.Link.Loss = 100_000_000, loss
				c.Transport, c.Size, c.Budget = t, 16<<20, 10*time.Second
				if quick {
					c.Size = 4 << 20
				}
				cells = append(cells, c)
			}
		}
		return cells
	}
	return f
}
