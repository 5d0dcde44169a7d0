package plots

import (
	"bytes"
	"encoding/xml"
	"errors"
	"flag"
	"fmt"
	"image/png"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"gonum.org/v1/plot"

	"memsync/results"
)

var keep = flag.String("keep", "", "folder in which to leave the drawn figures, to look at them")

// gen makes rows that resemble a sweep's.
type gen struct {
	t    *testing.T
	rnd  *rand.Rand
	rows []results.Row
}

func newGen(t *testing.T) *gen { return &gen{t: t, rnd: rand.New(rand.NewPCG(1, 2))} }

// add makes n runs of a cell whose metric is v, give or take some percent.
func (g *gen) add(cell results.Row, metric string, v, spread float64, n int) {
	g.t.Helper()
	for i := range n {
		c := cell
		c.RunID = fmt.Sprint(len(g.rows))
		c.Run, c.Status = i+1, results.StatusOK
		if c.Shaper != "" {
			c.RTTMeasuredms = results.Num(c.RTTms + 0.35 + g.rnd.Float64()*0.1)
		}
		rows, err := results.RunRows(c, map[string]float64{metric: v * math.Exp(spread*g.rnd.NormFloat64())}, 1)
		if err != nil {
			g.t.Fatal(err)
		}
		g.rows = append(g.rows, rows...)
	}
}

func (g *gen) fail(cell results.Row, s results.Status) {
	g.t.Helper()
	cell.RunID, cell.Status, cell.Error = fmt.Sprint(len(g.rows)), s, "reason"
	rows, err := results.RunRows(cell, nil, 1)
	if err != nil {
		g.t.Fatal(err)
	}
	g.rows = append(g.rows, rows...)
}

func cell(figure, strategy string, rtt float64) results.Row {
	return results.Row{
		Figure: figure, Variant: "network", Strategy: strategy, Device: "fuse", Transport: "nbd", Backend: "memory",
		Kernel: "6.18.1", Shaper: "tun", RTTms: rtt, RateMbit: 1000, RegionBytes: 64 << 20, ChunkBytes: 65536, Op: "read", Access: "seq",
		CPUs: "source=0,daemon=1,workload=1",
	}
}

const mib = 1 << 20

var rttAxis = results.Axis{Column: "rtt_ms", Position: "rtt_measured_ms", Label: "Measured RTT", Unit: "ms"}

var mounts = []results.FigureSeries{
	{Key: "userfaultfd", Thesis: "userfaultfd"}, {Key: "direct-mount", Thesis: "direct"}, {Key: "managed-mount", Thesis: "managed"},
	{Key: "memory", Label: "memory (local)", Baseline: true}, {Key: "disk", Label: "disk (local)", Baseline: true}, {Key: "nbd-direct"},
}

// cases are figures of every kind with data like that of real sweeps.
func cases(t *testing.T) map[string]func() (results.FigureSpec, []results.Row) {
	return map[string]func() (results.FigureSpec, []results.Row){
		"latency": func() (results.FigureSpec, []results.Row) {
			g, name := newGen(t), "latency-first-chunk-rttvar-1"
			for _, rtt := range []float64{0, 20, 40} {
				g.add(cell(name, "userfaultfd", rtt), "latency_first_chunk", 120e-6+rtt/1e3*1.01, 0.01, 6)
				g.add(cell(name, "direct-mount", rtt), "latency_first_chunk", 310e-6+rtt/1e3*1.02, 0.02, 6)
				g.add(cell(name, "managed-mount", rtt), "latency_first_chunk", 150e-6, 0.3, 6)
			}
			for _, s := range []string{"memory", "disk"} {
				c := cell(name, s, 0)
				c.Shaper, c.RateMbit, c.Device = "", 0, ""
				g.add(c, "latency_first_chunk", 2e-6, 0.2, 6)
			}
			return results.FigureSpec{
				Name: name, Title: "First-chunk latency against RTT", Kind: results.FigureLine, X: rttAxis,
				Y:    results.Axis{Column: "latency_first_chunk", Label: "First-chunk latency", Unit: "ms", Scale: 1e3},
				Keys: []string{"strategy"}, Series: mounts, Thesis: name,
			}, g.rows
		},
		"throughput-log": func() (results.FigureSpec, []results.Row) {
			g, name := newGen(t), "throughput-rttvar-1"
			for _, rtt := range []float64{0, 20, 40} {
				g.add(cell(name, "userfaultfd", rtt), "throughput", 65536/(rtt/1e3+100e-6), 0.04, 6)
				g.add(cell(name, "direct-mount", rtt), "throughput", min(117e6, 131072*4/(rtt/1e3+100e-6)), 0.05, 6)
				g.add(cell(name, "managed-mount", rtt), "throughput", 113e6-rtt*2e5, 0.03, 6)
				g.fail(cell(name, "nbd-direct", rtt), results.StatusUnsupported)
			}
			for _, s := range []string{"memory", "disk"} {
				c := cell(name, s, 0)
				c.Shaper, c.RateMbit, c.Device = "", 0, ""
				g.add(c, "throughput", 4.9e9, 0.1, 6)
			}
			return results.FigureSpec{
				Name: name, Title: "Sequential read throughput against RTT", Kind: results.FigureLine, X: rttAxis,
				Y:    results.Axis{Column: "throughput", Label: "Throughput", Unit: "MiB/s", Scale: 1.0 / mib, Log: true},
				Keys: []string{"strategy"}, Series: mounts, Thesis: name,
				Note: "The thesis reads without a limit of rate.",
			}, g.rows
		},
		"categorical": func() (results.FigureSpec, []results.Row) {
			g, name := newGen(t), "throughput-anyvar-2"
			var series []results.FigureSeries
			for i, b := range []string{"memory", "file", "directory", "redis", "s3", "cassandra", "kv", "extra"} {
				for _, rtt := range []float64{0, 2, 4, 6, 8, 10, 12, 14, 22, 28, 34, 40} {
					c := cell(name, "managed-mount", rtt)
					c.Backend = b
					g.add(c, "throughput", 2.4e9/float64(i+1)/(1+rtt/20), 0.06, 6)
				}
				fs := results.FigureSeries{Key: b}
				if i < 6 {
					fs.Thesis = b + "/managed"
				}
				series = append(series, fs)
			}
			x := rttAxis
			x.Category, x.Label = true, "RTT"
			return results.FigureSpec{
				Name: name, Title: "Managed mounts over six stores", Kind: results.FigureLine, X: x,
				Y:    results.Axis{Column: "throughput", Label: "Throughput", Unit: "MiB/s", Scale: 1.0 / mib},
				Keys: []string{"backend"}, Series: series, Thesis: name,
			}, g.rows
		},
		"bars": func() (results.FigureSpec, []results.Row) {
			g, name := newGen(t), "throughput-rtt0-1"
			for s, v := range map[string]float64{"memory": 4.9e9, "disk": 4.2e9, "userfaultfd": 1.1e9, "direct-mount": 0.9e9, "managed-mount": 0.7e9} {
				g.rnd = rand.New(rand.NewPCG(uint64(v), 1))
				g.add(cell(name, s, 0), "throughput", v, 0.08, 10)
			}
			return results.FigureSpec{
				Name: name, Title: "Sequential read throughput at RTT 0", Kind: results.FigureBar,
				Y: results.Axis{Column: "throughput", Label: "Throughput", Unit: "MiB/s", Scale: 1.0 / mib}, Keys: []string{"strategy"},
				Series: []results.FigureSeries{{Key: "memory", Thesis: "memory"}, {Key: "disk", Thesis: "disk"}, {Key: "userfaultfd", Thesis: "userfaultfd"}, {Key: "direct-mount", Thesis: "direct"}, {Key: "managed-mount", Thesis: "managed"}},
				Thesis: name,
			}, g.rows
		},
		"bars-log-grouped": func() (results.FigureSpec, []results.Row) {
			g, name := newGen(t), "throughput-backendvar-1"
			for i, b := range []string{"memory", "file", "directory", "redis", "s3", "cassandra"} {
				for j, s := range []string{"direct-mount", "managed-mount"} {
					c := cell(name, s, 0)
					c.Backend = b
					g.add(c, "throughput", 1.7e9/math.Pow(4, float64(i))*float64(1+3*j), 0.1, 6)
				}
			}
			return results.FigureSpec{
				Name: name, Title: "Throughput over six stores at RTT 0", Kind: results.FigureBar,
				X:    results.Axis{Column: "backend", Label: "Backend", Categories: []string{"memory", "file", "directory"}},
				Y:    results.Axis{Column: "throughput", Label: "Throughput", Unit: "MiB/s", Scale: 1.0 / mib, Log: true},
				Keys: []string{"strategy"}, Thesis: name,
				Series: []results.FigureSeries{{Key: "direct-mount", Thesis: "{x}/direct"}, {Key: "managed-mount", Thesis: "{x}/managed"}},
			}, g.rows
		},
		"boxes": func() (results.FigureSpec, []results.Row) {
			g, name := newGen(t), "latency-first-chunk-rtt0-2"
			for i, s := range []string{"userfaultfd", "direct-mount", "managed-mount"} {
				g.add(cell(name, s, 0), "latency_first_chunk", 60e-6*float64(1+i), 0.5, 100)
			}
			return results.FigureSpec{
				Name: name, Title: "First-chunk latency at RTT 0", Kind: results.FigureBox,
				Y:    results.Axis{Column: "latency_first_chunk", Label: "First-chunk latency", Unit: "µs", Scale: 1e6},
				Keys: []string{"strategy"}, Series: mounts, Thesis: name,
			}, g.rows
		},
		"density": func() (results.FigureSpec, []results.Row) {
			g, name := newGen(t), "latency-polling-udev-1"
			for i, s := range []string{"polling", "udev"} {
				c := cell(name, "direct-mount", 0)
				c.Params = "readiness=" + s
				g.add(c, "open_latency", 9e-3+float64(i)*3e-3, 0.25, 100)
			}
			return results.FigureSpec{
				Name: name, Title: "Time until a device is ready", Kind: results.FigureDensity,
				Y:    results.Axis{Column: "open_latency", Label: "Open latency", Unit: "ms", Scale: 1e3},
				Keys: []string{"params.readiness"}, Series: []results.FigureSeries{{Key: "polling", Label: "polling sysfs", Thesis: "polling"}, {Key: "udev", Label: "udev event", Thesis: "udev"}},
				Thesis: name,
			}, g.rows
		},
		"cdf": func() (results.FigureSpec, []results.Row) {
			g := newGen(t)
			for i, s := range []string{"userfaultfd", "direct-mount", "managed-mount"} {
				g.add(cell("fault-cdf", s, 20), "fault_latency_p50", 26e-6*math.Pow(3, float64(i)), 0.4, 30)
			}
			return results.FigureSpec{
				Name: "fault-cdf", Title: "Fault latency over 30 runs", Kind: results.FigureCDF,
				Y:    results.Axis{Column: "fault_latency_p50", Label: "Median fault latency", Unit: "µs", Scale: 1e6, Log: true},
				Keys: []string{"strategy"}, Series: mounts,
			}, g.rows
		},
		"density-log": func() (results.FigureSpec, []results.Row) {
			g := newGen(t)
			for i, s := range []string{"userfaultfd", "direct-mount", "managed-mount"} {
				g.add(cell("fault-density", s, 20), "fault_latency_p50", 26e-6*math.Pow(3, float64(i)), 0.4, 30)
			}
			return results.FigureSpec{
				Name: "fault-density", Title: "Fault latency over 30 runs", Kind: results.FigureDensity,
				Y:    results.Axis{Column: "fault_latency_p50", Label: "Median fault latency", Unit: "µs", Scale: 1e6, Log: true},
				Keys: []string{"strategy"}, Series: mounts,
			}, g.rows
		},
		"heat": func() (results.FigureSpec, []results.Row) {
			g := newGen(t)
			for i, s := range []string{"userfaultfd", "direct-mount", "managed-mount"} {
				for _, rate := range []float64{10, 100, 1000} {
					for _, rtt := range []float64{0, 1, 20, 50, 100} {
						if s == "direct-mount" && rtt == 50 { // a cell that was not measured
							continue
						}
						c := cell("rtt-rate", s, rtt)
						c.RateMbit = rate
						g.add(c, "rate_utilisation", 0.97/(1+rtt*rate/1000/math.Pow(10, float64(i))), 0.01, 6)
					}
				}
			}
			g.fail(cell("rtt-rate", "nbd-direct", 20), results.StatusUnsupported)
			return results.FigureSpec{
				Name: "rtt-rate", Title: "Share of the link used, by RTT and rate", Kind: results.FigureHeat,
				X: results.Axis{Column: "rtt_ms", Label: "RTT", Unit: "ms"}, Rows: results.Axis{Column: "rate_mbit", Label: "Rate", Unit: "Mbit/s"},
				Y:    results.Axis{Column: "rate_utilisation", Label: "Share of the rate"},
				Keys: []string{"strategy"}, Series: mounts,
			}, g.rows
		},
		"map": func() (results.FigureSpec, []results.Row) {
			g := newGen(t)
			for i, s := range []string{"userfaultfd", "direct-mount", "managed-mount"} {
				for _, rate := range []float64{10, 1000} {
					for _, rtt := range []float64{0, 20, 50} {
						c := cell("rtt-map", s, rtt)
						c.RateMbit = rate
						switch {
						case rtt == 50 && rate == 10: // not measured at all
						case rtt == 0: // not told apart
							g.add(c, "latency_first_chunk", 0.001, 0.3, 6)
						case rtt == 20: // the managed mount, twice as soon as the next
							g.add(c, "latency_first_chunk", []float64{0.04, 0.02, 0.01}[i], 0.001, 6)
						default:
							g.add(c, "latency_first_chunk", []float64{0.01, 0.03, 0.09}[i], 0.001, 6)
						}
					}
				}
			}
			g.fail(cell("rtt-map", "nbd-direct", 20), results.StatusUnsupported)
			lab := cell("rtt-map", "nbd-direct", 20)
			lab.RateMbit, lab.Kernel = 10, results.LabPrefix+"7"
			g.add(lab, "latency_first_chunk", 1e-6, 0, 6) // of another kernel: no rival
			return results.FigureSpec{
				Name: "rtt-map", Title: "Which strategy wins where", Kind: results.FigureMap,
				X: results.Axis{Column: "rtt_ms", Label: "RTT", Unit: "ms"}, Rows: results.Axis{Column: "rate_mbit", Label: "Rate", Unit: "Mbit/s"},
				Y:    results.Axis{Column: "latency_first_chunk", Label: "First-chunk latency", Unit: "ms", Scale: 1e3},
				Keys: []string{"strategy"}, Series: mounts,
			}, g.rows
		},
		"versus": func() (results.FigureSpec, []results.Row) {
			g := newGen(t)
			for _, rate := range []int{1, 4, 16, 64} {
				c := cell("slow-cache", "managed-mount", 20)
				c.Params = fmt.Sprintf("cache_rate=%dMiB", rate)
				g.add(c, "throughput", float64(rate)*1e6, 0, 6)
			}
			g.add(cell("slow-cache", "direct-mount", 20), "throughput", 8e6, 0, 6)
			return results.FigureSpec{
				Name: "slow-cache", Title: "A slow cache", Kind: results.FigureLine, Versus: "direct-mount",
				X:    results.Axis{Column: "params.cache_rate", Label: "Rate of the cache", Unit: "MiB/s", Scale: 1.0 / (1 << 20), Log: true},
				Y:    results.Axis{Column: "throughput", Label: "Read throughput", Unit: "MB/s", Scale: 1e-6},
				Keys: []string{"strategy"}, Series: []results.FigureSeries{{Key: "managed-mount", Label: "managed"}, {Key: "direct-mount", Label: "direct", Baseline: true}},
			}, g.rows
		},
		"few-runs": func() (results.FigureSpec, []results.Row) {
			g := newGen(t)
			for _, size := range []float64{4, 16, 64, 256, 1024} {
				c := cell("chunk-size", "managed-mount", 20)
				c.ChunkBytes = int64(size) * 1024
				g.add(c, "cpu_daemon", 0.3+2/size, 0.1, 3)
			}
			return results.FigureSpec{
				Name: "chunk-size", Title: "CPU time of the daemon against the size of a chunk, a long title that needs a second line", Kind: results.FigureLine,
				X:    results.Axis{Column: "chunk_bytes", Label: "Chunk", Unit: "KiB", Scale: 1.0 / 1024, Log: true},
				Y:    results.Axis{Column: "cpu_daemon", Label: "CPU time", Unit: "s"},
				Keys: []string{"strategy"},
			}, g.rows
		},
	}
}

// TestDraw draws every case, some twice, and checks what a machine can: both
// files are there and whole, the same each time, and say what they must.
func TestDraw(t *testing.T) {
	for name, make := range cases(t) {
		t.Run(name, func(t *testing.T) {
			spec, rows := make()
			drawn := []map[string][]byte{nil}
			if slices.Contains([]string{"latency", "bars", "density"}, name) {
				drawn = append(drawn, nil)
			}
			for i := range drawn {
				dir := t.TempDir()
				if *keep != "" {
					dir = filepath.Join(*keep, name)
				}
				paths, err := Draw(rows, nil, spec, dir)
				if err != nil || len(paths) != 2 {
					t.Fatalf("%v, %v", paths, err)
				}
				drawn[i] = map[string][]byte{}
				for _, p := range paths {
					if drawn[i][filepath.Ext(p)], err = os.ReadFile(p); err != nil {
						t.Fatal(err)
					}
				}
			}
			for ext, b := range drawn[0] {
				if !bytes.Equal(b, drawn[len(drawn)-1][ext]) {
					t.Errorf("%s differs between two runs", ext)
				}
			}
			img, err := png.Decode(bytes.NewReader(drawn[0][".png"]))
			if err != nil || img.Bounds().Dx() != 1050 {
				t.Errorf("png: %v", err)
			}
			text := strings.Join(strings.Fields(svgText(t, drawn[0][".svg"])), " ")
			want := []string{"n = ", "network", "6.18.1", "source=0", spec.Y.Label}
			if spec.Kind == results.FigureMap { // which names the best and has no axis of values
				want = want[:len(want)-1]
			} else if spec.Y.Unit != "" && spec.Kind != results.FigureDensity {
				want = append(want, spec.Y.String())
			}
			if spec.Thesis != "" {
				want = append(want, "(pale, same colour)", "Pojtinger 2023")
			}
			switch name {
			case "heat":
				want = append(want, "RTT (ms)", "Rate (Mbit/s)", "1000", "0.97", "–", "No run is ok: nbd-direct")
			case "map":
				want = append(want, "RTT (ms)", "Rate (Mbit/s)", "2×", "3×", " or", "–", "No run is ok: nbd-direct")
				if strings.Contains(text, "lab") {
					t.Errorf("runs of the lab kernel are rivals of the machine's own: %s", text)
				}
			case "versus": // between 4 and 16 MiB/s, at 4 x 4^(1/3) in the logarithm
				want = append(want, "Against direct (interpolated medians): managed above it from 6.35 MiB/s")
			}
			for _, w := range want {
				if !strings.Contains(text, w) {
					t.Errorf("the figure does not say %q: %s", w, text)
				}
			}
		})
	}
}

// svgText returns the text of an SVG, which must be well formed.
func svgText(t *testing.T, b []byte) string {
	t.Helper()
	var out strings.Builder
	for d := xml.NewDecoder(bytes.NewReader(b)); ; {
		tok, err := d.Token()
		if errors.Is(err, io.EOF) {
			return out.String()
		}
		if err != nil {
			t.Fatal(err)
		}
		if c, ok := tok.(xml.CharData); ok {
			out.WriteString(strings.TrimSpace(string(c)) + " ")
		}
	}
}

func TestDrawReports(t *testing.T) {
	spec := results.FigureSpec{
		Name: "f", Title: "F", Kind: results.FigureLine, X: rttAxis, Keys: []string{"strategy"},
		Y: results.Axis{Column: "throughput", Label: "Throughput", Unit: "B/s", Log: true},
	}
	dir := t.TempDir()
	if _, err := Draw(nil, nil, spec, dir); !errors.Is(err, ErrNoData) {
		t.Errorf("no rows: %v", err)
	}
	g := newGen(t)
	g.fail(cell("f", "direct-mount", 0), results.StatusFailed)
	if _, err := Draw(g.rows, nil, spec, dir); !errors.Is(err, ErrNoData) {
		t.Errorf("only failed runs: %v", err)
	}
	thesis := cell("f", "direct-mount", 0)
	thesis.Variant = "thesis"
	g.add(thesis, "throughput", 0, 0, 6) // a log axis cannot show it, and must not mind
	g.add(cell("other", "direct-mount", 0), "throughput", 1, 0, 6)
	paths, err := Draw(g.rows, nil, spec, dir)
	if !errors.Is(err, ErrNoData) || len(paths) != 2 || filepath.Base(paths[0]) != "f.thesis.png" {
		t.Errorf("one of two variants has data: %v, %v", paths, err)
	}
	second := spec
	second.Name, second.Figure = "f-second", "f"
	paths, err = Draw(g.rows, nil, second, dir)
	if !errors.Is(err, ErrNoData) || len(paths) != 2 || filepath.Base(paths[0]) != "f-second.thesis.png" {
		t.Errorf("a second picture of the records: %v, %v", paths, err)
	}
	bad := spec
	bad.Keys = []string{"colour"}
	if _, err := Draw(g.rows, nil, bad, dir); err == nil || errors.Is(err, ErrNoData) {
		t.Errorf("a figure with an unknown column: %v", err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	if _, err := Draw(g.rows, nil, spec, file); err == nil {
		t.Error("a file is accepted as the folder")
	}
}

// TestExtremes draws every kind with samples that have no spread, one value, or
// none that the axis can show.
func TestExtremes(t *testing.T) {
	for _, kind := range []results.FigureKind{results.FigureLine, results.FigureBar, results.FigureBox, results.FigureDensity, results.FigureCDF} {
		for _, log := range []bool{false, true} {
			for _, v := range []float64{0, 1e-9, 5, 1e18} {
				for _, n := range []int{1, 2, 6} {
					g := newGen(t)
					g.add(cell("f", "direct-mount", 0), "throughput", v, 0, n)
					spec := results.FigureSpec{
						Name: "f", Title: "F", Kind: kind, X: results.Axis{Column: "rtt_ms", Log: log}, Keys: []string{"strategy"},
						Y: results.Axis{Column: "throughput", Label: "Throughput", Log: log},
					}
					fig, err := newFigure(g.rows, nil, spec)
					var b []byte
					if err == nil {
						b, err = fig.svg()
					}
					if err != nil || strings.Contains(string(b), "NaN") || strings.Contains(string(b), "Inf") {
						t.Errorf("%s, log %v, %d values of %v: %v", kind, log, n, v, err)
					}
				}
			}
		}
	}
}

func TestTicks(t *testing.T) {
	texts := func(ticks []plot.Tick) string {
		var out []string
		for _, t := range ticks {
			if t.Label != "" {
				out = append(out, t.Label)
			}
		}
		return strings.Join(out, " ")
	}
	for _, tc := range []struct {
		ticker plot.Ticker
		lo, hi float64
		want   string
	}{
		{linearTicks(6), 0, 42, "0 10 20 30 40"},
		{linearTicks(6), -0.15, 0.16, "-0.1 0 0.1"},
		{linearTicks(5), 0, 1, "0 0.2 0.4 0.6 0.8 1"},
		{logTicks{}, 1.2, 3500, "10 100 1000"},
		{logTicks{}, 8, 150, "10 20 50 100"},
		{logTicks{}, 0.5, 200, "1 3 10 30 100"},
		{logTicks{}, 1e-9, 1e9, "1e-09 1e-06 0.001 1 1000 1e+06 1e+09"},
	} {
		if got := texts(tc.ticker.Ticks(tc.lo, tc.hi)); got != tc.want {
			t.Errorf("%T %v..%v: %s, want %s", tc.ticker, tc.lo, tc.hi, got, tc.want)
		}
	}
}

// Records of the lab kernel make series of their own beside the machine's, and are marked.
func TestLabIsMarked(t *testing.T) {
	spec := results.FigureSpec{Name: "f", Title: "T", Kind: results.FigureLine, X: results.Axis{Column: "rtt_ms", Label: "RTT", Unit: "ms"},
		Y: results.Axis{Column: "throughput", Label: "Throughput", Unit: "B/s"}, Keys: []string{"strategy"}, Series: []results.FigureSeries{{Key: "a", Label: "A"}}}
	row := func(kernel string, rtt, v float64) results.Row {
		return results.Row{Figure: "f", Strategy: "a", Kernel: kernel, RTTms: rtt, Metric: "throughput", Value: results.Num(v), Status: results.StatusOK}
	}
	own := []results.Row{row("6.18", 1, 10), row("6.18", 2, 20)}
	lab := []results.Row{row("lab-7.2.7", 1, 1000), row("lab-7.2.7", 2, 2000)}
	for _, c := range []struct {
		rows   []results.Row
		names  []string
		marked bool
	}{
		{own, []string{"A"}, false},
		{lab, []string{"A"}, true},
		{slices.Concat(lab, own), []string{"A", "A, lab"}, true},
	} {
		f, err := newFigure(c.rows, results.Histograms{}, spec)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, e := range f.entries {
			names = append(names, e.name())
			for _, p := range e.Points {
				if p.N != 1 {
					t.Errorf("%s: a point of %d runs of both kernels", e.name(), p.N)
				}
			}
		}
		if !slices.Equal(names, c.names) || strings.Contains(f.subtitle, "lab kernel") != c.marked {
			t.Errorf("series %q, want %q; below the title: %q", names, c.names, f.subtitle)
		}
	}
}

// TestPictures: a PDF of each figure, small since it holds no font, with the words beside it.
func TestPictures(t *testing.T) {
	for name, make := range cases(t) {
		spec, rows := make()
		made, err := Pictures(rows, results.Histograms{}, spec)
		if err != nil && !errors.Is(err, ErrNoData) || len(made) == 0 {
			t.Errorf("%s: %d pictures (%v)", name, len(made), err)
		}
		for _, p := range made {
			if !bytes.HasPrefix(p.PDF, []byte("%PDF")) || len(p.PDF) > 120_000 || bytes.Contains(p.PDF, []byte("/FontFile")) {
				t.Errorf("%s: a PDF of %d bytes", name, len(p.PDF))
			}
			if p.Title != spec.Title || p.Subtitle == "" || p.Caption == "" || strings.Contains(p.Caption, noBreak) {
				t.Errorf("%s: words are missing: %q, %q, %q", name, p.Title, p.Subtitle, p.Caption)
			}
		}
	}
}
