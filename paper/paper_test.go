package paper

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"memsync/results"
	"memsync/results/claims"
	"memsync/scenarios"
	"memsync/strategies/replay"
)

// nasty has every character that LaTeX takes for its own.
const nasty = `a_b {50%} $x$ #1 & ~^ \end{document} "<>|'` + "`"

// input is a folder with the two figures that the prose shows, of texts that LaTeX must not
// take for its own; all other figures are missing. In thesis only 2 runs were made.
func input() Input {
	in := Input{Program: "memsync", Name: nasty, Variants: scenarios.Variants(), Manifest: results.Manifest{Host: results.Host{CPUModel: nasty, CPUs: 2}, Start: time.Unix(1e9, 0),
		Features: []byte(`[{"name":"fuse","answer":"works"},{"name":"x_y","answer":"missing","detail":"50%"}]`)}}
	for _, f := range scenarios.Figures() {
		in.Figures = append(in.Figures, f.Pictures()...)
	}
	for i, f := range in.Figures {
		if f.Name != "latency-first-chunk-rttvar-1" && f.Name != "throughput-rttvar-1" {
			continue
		}
		in.Figures[i].Note = nasty
		scale := map[string]float64{"latency-first-chunk-rttvar-1": 1e-3, "throughput-rttvar-1": 1e6}[f.Name]
		for _, variant := range in.Variants {
			for s, strategy := range []string{"userfaultfd", "direct-mount", "managed-mount"} {
				for _, rtt := range []float64{0, 20, 40} {
					for run := range map[string]int{"thesis": 2, "network": 6}[variant] {
						row := results.Row{RunID: fmt.Sprint(f.Name, variant, strategy, rtt, run), Figure: f.Name, Variant: variant, Strategy: strategy, Kernel: nasty, RTTms: rtt,
							RTTMeasuredms: results.Num(rtt + 0.1), Order: run, Metric: f.Y.Column, Value: results.Num((1 + rtt + 0.1*float64(run)) * float64(s+1) * scale), Status: results.StatusOK}
						in.Rows = append(in.Rows, row)
						row.Metric, row.Value = results.RunMetric, results.Number{}
						in.Rows = append(in.Rows, row)
					}
				}
			}
		}
	}
	figures := map[string]results.FigureSpec{}
	for _, f := range in.Figures {
		figures[f.Name] = f
	}
	for _, v := range in.Variants {
		in.Claims = append(in.Claims, claims.Evaluate(claims.All(), figures, in.Rows, v)...)
	}
	in.Claims[0].Text = nasty
	return in
}

func write(t *testing.T, in Input) (dir, data string) {
	t.Helper()
	dir = t.TempDir()
	if err := Write(in, dir); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "data.tex"))
	if err != nil {
		t.Fatal(err)
	}
	return dir, string(b)
}

// TestComplete: data.tex defines all that the prose asks for, with numbers where there are
// runs; each figure that it shows is there.
func TestComplete(t *testing.T) {
	dir, data := write(t, input())
	tex, _ := files.ReadFile("paper.tex")
	_, body, _ := strings.Cut(string(tex), `\input{data}`)
	asked := 0
	for name, n := range arguments {
		for _, m := range regexp.MustCompile(`\\`+name+strings.Repeat(`\{([^{}]*)\}`, n)).FindAllStringSubmatch(body, -1) {
			asked++
			if want := `\memsyncset{` + strings.Join(append([]string{name}, m[1:]...), "/") + "}{"; !strings.Contains(data, want) {
				t.Errorf("data.tex lacks %s", want)
			}
		}
	}
	if asked < 50 {
		t.Errorf("the prose asks for %d texts only", asked)
	}
	shown := regexp.MustCompile(`\\shown\{([^{}]*)\}`).FindAllStringSubmatch(data, -1)
	if len(shown) != 4 {
		t.Errorf("%d figures, not 4", len(shown))
	}
	for _, m := range shown {
		b, err := os.ReadFile(filepath.Join(dir, m[1]))
		if err != nil || !strings.HasPrefix(string(b), "%PDF") {
			t.Errorf("%s is no PDF (%v)", m[1], err)
		}
	}
	for _, want := range []string{
		`\memsyncset{val/latency-first-chunk-rttvar-1/network/userfaultfd/20}{21.2~ms (21.0~ms to 21.5~ms, $n=6$)}`,
		`\memsyncset{thesisval/latency-first-chunk-rttvar-1/userfaultfd/20}{20.3~ms}`,
		`\memsyncset{fact/runs}{144}`,
		`\memsyncset{verdict/C29/network}{cannot tell (\notmeasured{})}`,
		`\memsyncset{fig/latency-first-chunk-rttvar-1/thesis}{Figure~\ref{fig:latency-first-chunk-rttvar-1:thesis}}`,
	} {
		if !strings.Contains(data, want) {
			t.Errorf("data.tex lacks %s", want)
		}
	}
	if _, again := write(t, input()); again != data {
		t.Error("the same input gives another data.tex")
	}
}

// TestEmpty: of a folder without runs all is "not measured", and nothing is made up.
func TestEmpty(t *testing.T) {
	in := input()
	in.Rows = nil
	in.Claims = claims.Evaluate(claims.All(), nil, nil, scenarios.Network)
	in.Claims = append(in.Claims, claims.Evaluate(claims.All(), nil, nil, scenarios.Thesis)...)
	_, data := write(t, in)
	for _, m := range regexp.MustCompile(`\\memsyncset\{(val|measured)/[^{}]*\}\{(.*)\}`).FindAllStringSubmatch(data, -1) {
		if m[2] != notMeasured {
			t.Errorf("%s without runs", m[0])
		}
	}
	if strings.Contains(data, `\shown`) {
		t.Error("a figure without runs")
	}
}

// TestSlips: what nothing can give is an error.
func TestSlips(t *testing.T) {
	in := input()
	in.Rows = nil
	for _, tex := range []string{`\val{no-figure}{network}{userfaultfd}{20}`, `\val{throughput-rttvar-1}{nowhere}{userfaultfd}{20}`, `\val{throughput-rttvar-1}{network}{userfault}{20}`,
		`\val{throughput-rttvar-1}{network}{userfaultfd}`, `\thesisval{throughput-rttvar-1}{managed-mount}{41}`, `\thesisval{throughput-rttvar-1}{memory}{40}`, `\verdict{C99}{network}`, `\measured{C10}{both}`, `\fact{weather}`,
		`\fact{thesis/network:perhaps}`, `\plot{no-figure}{thesis}`, `\fig{throughput-rttvar-1}{n}`, `\values{x}{network}`, `\generated{wisdom}`, `\why{C99}{any}{because}`, `\why{C10}{never}{because}`} {
		if text, err := newData(in).define(tex); err == nil {
			t.Errorf("%s gives %q", tex, text)
		}
	}
	if text, err := newData(in).define("% \\fact{weather}\n\\newcommand\\fact[1]{\\x{#1}}"); err != nil || strings.Contains(text, "weather") {
		t.Errorf("a comment or a definition is taken for a request: %q, %v", text, err)
	}
}

func TestEscape(t *testing.T) {
	for text, want := range map[string]string{
		"a_b": `a\_\allowbreak{}b`, `\x{}`: `\textbackslash{}x\{\}`, "50 % & #1": `50 \% \& \#1`, "≥ 1 µs": `$\geq$ 1 µs`, "a\nb": "a b", "日": `\texttt{U+65E5}`, "$~^": `\$\textasciitilde{}\textasciicircum{}`,
	} {
		if got := Escape(text); got != want {
			t.Errorf("Escape(%q) is %q, want %q", text, got, want)
		}
	}
}

// FuzzEscape: no text ends a group, begins a comment, or is a command of its own.
func FuzzEscape(f *testing.F) {
	f.Add(nasty)
	f.Add("–—…≥\x00\u00ad日本\xff")
	f.Fuzz(func(t *testing.T, text string) {
		out := Escape(text)
		plain := regexp.MustCompile(`\\(textbackslash|textasciicircum|textasciitilde|textless|textgreater|textbar|textquotedbl|textasciigrave|textquotesingle|allowbreak|ldots)\{\}|\\[{}$&#_%]|\$(\\[a-z]+|-)\$|\\texttt\{U\+[0-9A-F]{4,6}\}`).ReplaceAllString(out, "")
		if i := strings.IndexAny(plain, "\\{}$&#_%^<>|\"\x00\n"); i >= 0 {
			t.Errorf("Escape(%q) is %q: %q is left as it was", text, out, plain[i])
		}
	})
}

// TestBuild makes the PDF where LaTeX is installed.
func TestBuild(t *testing.T) {
	for _, name := range []string{"pdflatex", "bibtex"} {
		if _, err := exec.LookPath(name); err != nil {
			replay.Missing(t, "latex", err, "; to install:", strings.Join(Packages, " "))
		}
	}
	for name, in := range map[string]Input{"full": input(), "empty": {Program: "memsync", Variants: scenarios.Variants(), Figures: input().Figures, Claims: input().Claims}} {
		dir, _ := write(t, in)
		if err := Build(t.Context(), dir, in.Manifest.Start); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		pdf, err := os.ReadFile(filepath.Join(dir, "paper.pdf"))
		if err != nil || !strings.HasPrefix(string(pdf), "%PDF") || len(pdf) < 50_000 {
			t.Errorf("%s: paper.pdf of %d bytes (%v)", name, len(pdf), err)
		}
		log, _ := os.ReadFile(filepath.Join(dir, "paper.log"))
		if m := regexp.MustCompile(`(?i).*(undefined|multiply defined|memsync Error|no such|Missing character).*`).Find(log); m != nil {
			t.Errorf("%s: LaTeX says %s", name, m)
		}
		if bbl, err := os.ReadFile(filepath.Join(dir, "paper.bbl")); err != nil || strings.Count(string(bbl), `\bibitem`) != strings.Count(string(must(files.ReadFile("refs.bib"))), "\n@")+1 {
			t.Errorf("%s: not all of refs.bib is cited (%v)", name, err)
		}
	}
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

func TestRanges(t *testing.T) {
	if got := ranges([]string{"C01", "C02", "C03", "C07", "C08", "M09", "M10", "M11", "B12"}); got != "C01--C03, C07, C08, M09--M11, B12" {
		t.Error(got)
	}
}

// TestSaid: of LaTeX's output the line that matters, and whether a package is missing.
func TestSaid(t *testing.T) {
	err := said([]byte("blah\n./paper.tex:14: LaTeX Error: File `booktabs.sty' not found.\n"), fmt.Errorf("exit status 1"))
	if !strings.Contains(err.Error(), "texlive-latex-recommended") || !strings.Contains(err.Error(), "booktabs") {
		t.Error(err)
	}
	if err := said([]byte("odd"), fmt.Errorf("exit status 1")); !strings.Contains(err.Error(), "odd") {
		t.Error(err)
	}
}
