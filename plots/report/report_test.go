package report

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"memsync/results"
	"memsync/results/claims"
	"memsync/strategies/replay"
)

// input has a figure of each kind, in both variants, with texts that a page must not take for its own.
func input() Input {
	in := Input{Program: "memsync", Name: "a <b>", Manifest: results.Manifest{CommandLine: []string{"memsync", "run", "</script><script>alert(1)"}}}
	r := rand.New(rand.NewPCG(1, 2))
	kinds := []results.FigureKind{results.FigureLine, results.FigureBar, results.FigureBox, results.FigureDensity, results.FigureCDF, results.FigureHeat}
	for _, kind := range kinds {
		spec := results.FigureSpec{Name: "f-" + string(kind), Title: "Of kind " + string(kind), Kind: kind, Keys: []string{"strategy"},
			X: results.Axis{Column: "rtt_ms", Label: "RTT", Unit: "ms"}, Y: results.Axis{Column: "throughput", Label: "Throughput", Unit: "MB/s", Scale: 1e-6},
			Series: []results.FigureSeries{{Key: "x", Label: "the x"}, {Key: "memory", Baseline: true}}, Note: "</script>"}
		if kind == results.FigureHeat {
			spec.Rows = results.Axis{Column: "rate_mbit", Label: "Rate", Unit: "Mbit/s"}
		}
		in.Figures = append(in.Figures, spec)
	}
	in.Figures = append(in.Figures, results.FigureSpec{Name: "absent", Title: "Absent", Kind: results.FigureBar, Keys: []string{"strategy"},
		Y: results.Axis{Column: "throughput", Label: "t"}})
	add := func(figure, variant, strategy string, rtt, rate float64, metric string, v func() float64) {
		for run := range 6 {
			row := results.Row{RunID: fmt.Sprint(figure, variant, strategy, rtt, rate, run), Figure: figure, Variant: variant, Strategy: strategy, RTTms: rtt,
				RateMbit: rate, RegionBytes: 64 << 20, Order: r.IntN(1000), Metric: metric, Value: results.Num(v()), Status: results.StatusOK}
			in.Rows = append(in.Rows, row)
			row.Metric, row.Value = results.RunMetric, results.Number{}
			in.Rows = append(in.Rows, row)
		}
	}
	for _, spec := range in.Figures[:len(kinds)] {
		for _, variant := range []string{"network", "thesis"} {
			for _, strategy := range []string{"x", "y", "memory"} {
				for _, rtt := range []float64{0, 20, 40} {
					for _, rate := range []float64{100, 1000} {
						if spec.Kind == results.FigureHeat || rate == 100 {
							add(spec.Name, variant, strategy, rtt, rate, "throughput", func() float64 { return 1e7 * (1 + r.Float64()) })
						}
					}
				}
			}
		}
	}
	for _, s := range []struct {
		name string
		v    float64
	}{{"x", 1}, {"y", 3}, {"z", 1.02}} {
		add(mapFigure, "network", s.name, 20, 100, "time_to_last_byte", func() float64 { return s.v * (1 + 0.1*r.Float64()) })
	}
	in.Rows = append(in.Rows, results.Row{RunID: "bad", Figure: "f-line", Strategy: "x", Metric: results.RunMetric, Status: results.StatusFailed, Error: "the <link> broke"})
	figures := map[string]results.FigureSpec{}
	for _, f := range in.Figures {
		figures[f.Name] = f
	}
	in.Claims = claims.Evaluate(claims.All(), figures, in.Rows, "network")
	return in
}

func TestHTML(t *testing.T) {
	in := input()
	page, err := HTML(in)
	if err != nil {
		t.Fatal(err)
	}
	text := string(page)
	for _, want := range []string{"Of kind heat", "memsync run f-line", "the &lt;link&gt; broke", "<code>absent</code>", "Which strategy wins where", "<b>x</b> or <b>z</b>", "2.9", ">C01<", "does not hold"} {
		if !strings.Contains(text, want) {
			t.Errorf("the page has no %q", want)
		}
	}
	if strings.Contains(text, "alert(1)</script") || strings.Count(text, "</script>") != 2 || strings.Contains(text, "<b>\"") {
		t.Error("a text of the records ends an element")
	}
	if m := regexp.MustCompile(`(src|href|url)\s*[=(]\s*"?https?:`).FindString(text); m != "" {
		t.Errorf("the page needs the network: %s", m)
	}
	again, err := HTML(input())
	if err != nil || !bytes.Equal(page, again) {
		t.Errorf("the same input gives another page (%v)", err)
	}
	if empty, err := HTML(Input{Program: "memsync", Name: "empty"}); err != nil || !bytes.Contains(empty, []byte("</html>")) {
		t.Errorf("of nothing: %v", err)
	}
}

// TestBrowser opens the page in a real browser: the script draws every figure of every
// variant and says nothing on the console.
func TestBrowser(t *testing.T) {
	browser := ""
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome"} {
		if p, err := exec.LookPath(name); err == nil {
			browser = p
			break
		}
	}
	if browser == "" {
		replay.Missing(t, "browser", "no browser to open the page in: apt-get install chromium")
	}
	page, err := HTML(input())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "report.html")
	if err := os.WriteFile(file, page, 0o666); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--user-data-dir="+filepath.Join(dir, "profile"),
		"--enable-logging=stderr", "--dump-dom", "file://"+file)
	cmd.WaitDelay = 5 * time.Second
	var words bytes.Buffer
	cmd.Stderr = &words
	dom, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, words.String())
	}
	if !bytes.Contains(dom, []byte(`data-drawn="12"`)) {
		t.Errorf("not all of 6 figures were drawn in 2 variants: %s", regexp.MustCompile(`data-drawn="\d*"`).Find(dom))
	}
	if n := bytes.Count(dom, []byte("<svg")); n != 10 {
		t.Errorf("%d drawings, want 10 (the heat maps are tables)", n)
	}
	for line := range strings.Lines(words.String()) {
		if strings.Contains(line, "CONSOLE") {
			t.Error(line)
		}
	}
	if bytes.Contains(dom, []byte("NaN")) {
		t.Error("a drawing has a place that is no number")
	}
}

// TestMapOfCutRuns: who did not finish every run cannot be soonest to finish.
func TestMapOfCutRuns(t *testing.T) {
	var rows []results.Row
	for _, s := range []struct {
		name     string
		finished int // of 6 runs
		took     float64
	}{{"whole", 6, 2}, {"cut", 5, 1}, {"never", 0, 0}} {
		for run := range 6 {
			row := results.Row{RunID: fmt.Sprint(s.name, run), Figure: mapFigure, Strategy: s.name, RTTms: 20, RateMbit: 100, RegionBytes: 1 << 20,
				Metric: results.RunMetric, Value: results.Num(1), Status: results.StatusOK}
			rows = append(rows, row)
			if row.Metric, row.Value = "time_to_last_byte", results.Num(s.took); run < s.finished {
				rows = append(rows, row)
			}
		}
	}
	d, ok := newMap(rows, "time_to_last_byte", "t")
	if !ok || len(d.Lines) != 1 || len(d.Lines[0].Cells) != 1 || strings.Join(d.Lines[0].Cells[0].Best, " ") != "whole" {
		t.Errorf("%t, %+v", ok, d)
	}
	if _, ok := newMap(rows[len(rows)-6:], "time_to_last_byte", "t"); ok {
		t.Error("a map of nothing")
	}
}
