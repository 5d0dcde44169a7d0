package claims

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"testing"

	"memsync/results"
)

func values(s *sample) []float64 { return s.values }

// The thesis's claims against the thesis's own figures: where its text and its figures
// are known to disagree, and only there, a claim fails.
func TestThesisAgainstItself(t *testing.T) {
	disagree := []string{"C14", "C32", "C51"}
	// Curves that lie under others, or too low to be read off the figure.
	unread := []string{"C22", "C23", "C27", "C29", "C31", "C38", "C58"}
	seen := 0
	for _, c := range All() {
		if c.Set != "thesis" {
			continue
		}
		seen++
		checks, err := c.checks(thesis{})
		if (err != nil) != slices.Contains(unread, c.ID) {
			t.Errorf("%s: %v", c.ID, err)
		}
		holds := true
		for _, k := range checks {
			holds = holds && k.holds(k.value(values))
		}
		if holds == slices.Contains(disagree, c.ID) {
			t.Errorf("%s (%s): holds %v in the thesis's own figure", c.ID, c.Text, holds)
		}
	}
	if seen != 60 {
		t.Errorf("%d claims of the thesis, not 60", seen)
	}
}

// figure is a figure with an x axis and one without, both of two series.
func figure() map[string]results.FigureSpec {
	s := results.FigureSpec{Name: "f", Title: "f", Kind: results.FigureLine, X: results.Axis{Column: "rtt_ms", Label: "RTT"},
		Y: results.Axis{Column: "throughput", Label: "t"}, Keys: []string{"strategy"},
		Series: []results.FigureSeries{{Key: "a", Thesis: "alpha"}, {Key: "b"}, {Key: "base", Baseline: true}}}
	return map[string]results.FigureSpec{"f": s}
}

// rows are n runs of a cell whose values lie around v, spread apart by the share of it.
func rows(strategy string, rtt, v, spread float64, n int) []results.Row {
	var out []results.Row
	for i := range n {
		id := fmt.Sprintf("%s-%g-%d", strategy, rtt, i)
		at := v * (1 + spread*(float64(i)-float64(n-1)/2)/float64(n))
		for _, m := range []struct {
			name string
			v    float64
		}{{"throughput", at}, {"floor_tcp", 2 * at}} {
			out = append(out, results.Row{RunID: id, Figure: "f", Variant: "network", Strategy: strategy, RTTms: rtt, Params: "order=linear;window=8MiB",
				Metric: m.name, Value: results.Num(m.v), Status: results.StatusOK})
		}
	}
	return out
}

func claim(t *testing.T, f map[string]string) Claim {
	t.Helper()
	if f["where"] != "" {
		c, err := parseCellClaim(f)
		if err != nil {
			t.Fatal(err)
		}
		return Claim{ID: "T", checks: c.checks}
	}
	f["figure"] = "f"
	c, err := parseFigureClaim(f)
	if err != nil {
		t.Fatal(err)
	}
	return Claim{ID: "T", checks: c.checks}
}

func TestVerdicts(t *testing.T) {
	line := func(strategy string, of func(rtt float64) float64, spread float64) []results.Row {
		var out []results.Row
		for rtt := 0.0; rtt <= 40; rtt += 10 {
			out = append(out, rows(strategy, rtt, of(rtt), spread, 6)...)
		}
		return out
	}
	constant := func(v float64) func(float64) float64 { return func(float64) float64 { return v } }
	figureClaim := func(kind, left, x, relation, right, rightX, tolerance string) map[string]string {
		return map[string]string{"kind": kind, "left_series": left, "left_x": x, "relation": relation, "right_series_or_value": right, "right_x": rightX, "tolerance": tolerance}
	}
	for _, tt := range []struct {
		name  string
		claim map[string]string
		rows  []results.Row
		want  Verdict
	}{
		{"above everywhere", figureClaim("compare", "alpha", ">=10", ">", "b", "same", "0"), slices.Concat(line("a", constant(2), 0.1), line("b", constant(1), 0.1)), Holds},
		{"below at one place", figureClaim("compare", "alpha", ">=10", ">", "b", "same", "0"), slices.Concat(line("a", func(x float64) float64 {
			if x == 30 {
				return 0.5
			}
			return 2
		}, 0.1), line("b", constant(1), 0.1)), Fails},
		{"the same, noisy", figureClaim("compare", "alpha", "10", ">", "b", "same", "0"), slices.Concat(line("a", constant(1.001), 1), line("b", constant(1), 1)), CannotTell},
		{"too few runs", figureClaim("compare", "alpha", "10", ">", "b", "same", "0"), slices.Concat(rows("a", 10, 2, 0.1, 5), rows("b", 10, 1, 0.1, 6)), CannotTell},
		{"no such place", figureClaim("bound", "alpha", "7", "<", "5", "", "0"), line("a", constant(1), 0.1), CannotTell},
		{"no such series", figureClaim("bound", "b", "10", "<", "5", "", "0"), line("a", constant(1), 0.1), CannotTell},
		{"interpolated", figureClaim("bound", "alpha", "15 (interpolate)", ">", "14", "", "0"), line("a", func(x float64) float64 { return x }, 0.01), Holds},
		{"a baseline is everywhere", figureClaim("compare", "alpha", ">=10", ">", "base", "same", "0"), slices.Concat(line("a", constant(2), 0.1), rows("base", 0, 1, 0.1, 6)), Holds},
		{"bound", figureClaim("bound", "alpha", "all", "<", "3", "", "0"), line("a", constant(2), 0.1), Holds},
		{"bound with tolerance", figureClaim("bound", "alpha", "all", "<", "3", "", "10%"), line("a", constant(3.2), 0.01), Holds},
		{"bound broken", figureClaim("bound", "alpha", "all", "<", "3", "", "10%"), line("a", constant(3.4), 0.01), Fails},
		{"value", figureClaim("value", "alpha|b", "10", "~=", "2|1", "", "15%"), slices.Concat(line("a", constant(2.1), 0.1), line("b", constant(1), 0.1)), Holds},
		{"ratio", figureClaim("ratio", "alpha|b", "10", "~=", "15", "", "15%"), slices.Concat(line("a", constant(15), 0.1), line("b", constant(1), 0.1)), Holds},
		{"order", figureClaim("order", "b|alpha", "10", "increasing", "", "", "0"), slices.Concat(line("a", constant(2), 0.1), line("b", constant(1), 0.1)), Holds},
		{"order reversed", figureClaim("order", "b|alpha", "10", "decreasing", "", "", "0"), slices.Concat(line("a", constant(2), 0.1), line("b", constant(1), 0.1)), Fails},
		{"linear", figureClaim("linear", "alpha", "0..40", "slope~=", "1", "ms/ms", "10%"), line("a", func(x float64) float64 { return 0.005 + x/1000 }, 0.01), Holds},
		{"too steep", figureClaim("linear", "alpha", "0..40", "slope~=", "1", "ms/ms", "10%"), line("a", func(x float64) float64 { return 1.3 * x / 1000 }, 0.01), Fails},
		{"flat", figureClaim("flat", "alpha", "all", "range/mean<", "0.10", "", "0"), line("a", constant(7), 0.01), Holds},
		{"not flat", figureClaim("flat", "alpha", "all", "range/mean<", "0.10", "", "0"), line("a", func(x float64) float64 { return 10 + x }, 0.01), Fails},
		{"rises before it falls", figureClaim("trend", "alpha", "max over 0..40", ">", "alpha", "0", "0"), line("a", func(x float64) float64 { return 1 + x*(40-x) }, 0.01), Holds},
		{"lower at the end", figureClaim("trend", "alpha", "40", "<", "same series", "max over 0..40", "0"), line("a", func(x float64) float64 { return 1 + x*(40-x) }, 0.01), Holds},
		{"peak below the others", figureClaim("compare", "alpha", "argmax over 0..40", "<", "b", "same", "0"), slices.Concat(line("a", func(x float64) float64 { return 1 + x }, 0.01), line("b", constant(50), 0.01)), Holds},
		{"spread", figureClaim("compare", "alpha", "iqr", "<", "b", "iqr", "0"), slices.Concat(rows("a", 0, 1, 0.01, 12), rows("b", 0, 1, 0.5, 12)), Holds},
		{"cells", map[string]string{"where": `strategy == "a" && rtt_ms > 0`, "value": "throughput / floor_tcp", "relation": ">=", "want": "0.4"}, line("a", constant(2), 0.1), Holds},
		{"cells below", map[string]string{"where": `strategy == "a" && params.order == "linear"`, "value": "throughput / floor_tcp", "relation": ">=", "want": "0.6"}, line("a", constant(2), 0.1), Fails},
		{"no such cell", map[string]string{"where": `params.window == 8192`, "value": "throughput", "relation": ">=", "want": "0"}, line("a", constant(2), 0.1), CannotTell},
		{"a quantity", map[string]string{"where": `params.window == 8*1024*1024`, "value": "throughput", "relation": ">=", "want": "0"}, line("a", constant(2), 0.1), Holds},
		{"not recorded", map[string]string{"where": "true", "value": "downtime", "relation": ">=", "want": "0"}, line("a", constant(2), 0.1), CannotTell},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := Evaluate([]Claim{claim(t, tt.claim)}, figure(), tt.rows, "network")[0]
			if o.Verdict != tt.want || (o.Reason == "") != (tt.want != CannotTell) {
				t.Fatalf("%s (%s), want %s: %+v", o.Verdict, o.Reason, tt.want, o.Checks)
			}
			again := Evaluate([]Claim{claim(t, tt.claim)}, figure(), tt.rows, "network")[0]
			if again.Agree != o.Agree {
				t.Errorf("the same rows agree %v and %v", o.Agree, again.Agree)
			}
			d := o.Deciding()
			if (d != nil) != (len(o.Checks) > 0) || d != nil && tt.want == Fails && d.Holds {
				t.Errorf("deciding is %+v of %+v", d, o.Checks)
			}
			for _, c := range o.Checks {
				low, okLow := c.Low.Get()
				if v := c.Ours.Float(); okLow && c.Unit == "ratio" && tt.claim["kind"] != "flat" && (v < low-1e-9 || v > c.High.Float()+1e-9) {
					t.Errorf("%+v lies outside of its interval", c)
				}
			}
		})
	}
	if o := Evaluate([]Claim{claim(t, map[string]string{"where": "true", "value": "throughput", "relation": ">", "want": "0"})}, figure(), line("a", constant(1), 0), "thesis")[0]; o.Verdict != CannotTell {
		t.Errorf("rows of another variant decide: %+v", o)
	}
}

func TestStatistics(t *testing.T) {
	v := []float64{1, 2, 3, 4, 5, 100}
	for name, want := range map[string]float64{"median": 3.5, "iqr": 3, "outlier_count": 1, "outlier_max": 100} {
		if got := statistics[name](v); math.Abs(got-want) > 1e-9 {
			t.Errorf("%s of %v is %v, not %v", name, v, got, want)
		}
	}
}

func TestParseErrors(t *testing.T) {
	good := map[string]string{"kind": "bound", "left_series": "a", "left_x": "0", "relation": "<", "right_series_or_value": "5"}
	for column, text := range map[string]string{"kind": "odd", "relation": "≈", "right_series_or_value": "b", "left_x": "0..x", "tolerance": "5"} {
		f := map[string]string{column: text}
		for k, v := range good {
			if k != column {
				f[k] = v
			}
		}
		if _, err := parseFigureClaim(f); err == nil {
			t.Errorf("%s %q is accepted", column, text)
		}
	}
	for column, text := range map[string]string{"where": "a &&", "value": ")", "relation": "~=", "want": "much"} {
		f := map[string]string{"where": "true", "value": "throughput", "relation": "<", "want": "1"}
		f[column] = text
		if _, err := parseCellClaim(f); err == nil {
			t.Errorf("%s %q is accepted", column, text)
		}
	}
}

// FuzzExpr holds expressions: whatever the text, an error or a number, never a panic.
func FuzzExpr(f *testing.F) {
	for _, c := range []string{`1 + 2*rtt_ms`, `strategy == "a" && (loss > 0.01 || !true)`, `params.window/1024`, `-throughput`, `"x" + 1`, `f(1)`, `1 < 2 < 3`} {
		f.Add(c)
	}
	r := run{results.Row{Strategy: "a", Params: "window=8MiB"}, map[string]float64{"throughput": 5}}
	f.Fuzz(func(t *testing.T, text string) {
		e, err := parseExpr(text)
		if err != nil {
			return
		}
		_, errN := e.number(r)
		_, errB := e.bool(r)
		if errN == nil && errB == nil {
			t.Errorf("%q is a number and a condition", text)
		}
	})
}

func TestExpr(t *testing.T) {
	r := run{results.Row{Strategy: "a", RTTms: 20, Params: "window=8MiB"}, map[string]float64{"throughput": 6}}
	for text, want := range map[string]any{
		"throughput / 2 - 1": 2.0, "-(throughput)": -6.0, "1000*throughput <= 6000": true, `strategy != "b" && rtt_ms == 20`: true,
		`params.window == 8388608`: true, `params.nothing == ""`: true, `params.window == ""`: false, `!(strategy == "a")`: false,
		`rtt_ms == 0 && downtime > 1`: false, // what is decided asks no more
	} {
		e, err := parseExpr(text)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := eval(e.root, r); err != nil || got != want {
			t.Errorf("%s is %v (%v), not %v", text, got, err, want)
		}
	}
	for _, text := range []string{"nothing + 1", "throughput + strategy", "throughput()", `"a"`} {
		e, err := parseExpr(text)
		if err != nil {
			t.Fatal(err)
		}
		if v, err := e.number(r); err == nil {
			t.Errorf("%s is %v", text, v)
		}
	}
	e, _ := parseExpr("downtime")
	if _, err := e.number(r); !errors.Is(err, errAbsent) {
		t.Errorf("a metric that is not recorded: %v", err)
	}
}
