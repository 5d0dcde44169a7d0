// Package report makes one HTML file of a result folder that needs no network: what
// was run, where and how well, the map of which strategy wins where, every figure with
// its data and the command that makes it again, claims, links and their calibration.
//
// The page is drawn by a script of its own from data within it; without scripts the
// tables remain.
package report

import (
	"bytes"
	"cmp"
	"embed"
	"encoding/json"
	"fmt"
	"html/template"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"memsync/results"
	"memsync/results/claims"
)

//go:embed page.html page.css page.js
var files embed.FS

// Input is what a report is made of.
type Input struct {
	Program    string // name of the program that the commands call
	Name       string // of the result folder
	Manifest   results.Manifest
	Rows       []results.Row
	Histograms results.Histograms
	Figures    []results.FigureSpec // in the order of the report
	Claims     []claims.Outcome
}

// HTML makes the page. The same input gives the same bytes.
func HTML(in Input) ([]byte, error) {
	p, err := newPage(in)
	if err != nil {
		return nil, err
	}
	t, err := template.New("page.html").Funcs(template.FuncMap{"number": number, "percent": percent}).ParseFS(files, "page.html")
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := t.Execute(&b, p); err != nil {
		return nil, fmt.Errorf("write the report: %w", err)
	}
	return b.Bytes(), nil
}

// page is what the template shows.
type page struct {
	Title                string
	CSS                  template.CSS
	JS                   template.JS
	Data                 template.JS // the figures as JSON
	In                   Input
	Hosts                []results.Manifest // the manifest and its parts
	Statuses             []count
	Broken               []broken
	Drifts               []results.Drift
	Maps                 []decisionMap
	Figures              []figure
	Verdicts             []count
	Measured, Unmeasured []claims.Outcome
	Absent               []string // figures that the folder has no runs of
	Links                string
	Features             []feature
}

type count struct {
	Name string
	N    int
}

// broken is a cell whose runs did not end well.
type broken struct {
	Figure, What, Status, Error string
	N                           int
}

type feature struct {
	Name, Answer, Detail string
}

// figure is a picture with its data, in shown units.
type figure struct {
	Name     string    `json:"name"`
	Title    string    `json:"title"`
	Kind     string    `json:"kind"`
	Note     string    `json:"note"`
	X        axis      `json:"x"`
	Y        axis      `json:"y"`
	Rows     axis      `json:"rows"`
	Variants []variant `json:"variants"`
	Command  string    `json:"-"`
}

type axis struct {
	Label    string   `json:"label"`
	Log      bool     `json:"log"`
	Category bool     `json:"category"`
	Names    []string `json:"names,omitempty"` // of categories, in order
}

type variant struct {
	Name   string   `json:"name"`
	Series []series `json:"series"`
}

type series struct {
	Label    string  `json:"label"`
	Style    int     `json:"style"` // the same in all variants
	Baseline bool    `json:"baseline,omitempty"`
	Points   []point `json:"points"`
	Thesis   []xy    `json:"thesis,omitempty"`
}

type point struct {
	X      string         `json:"x"`
	Pos    results.Number `json:"pos"`
	Row    string         `json:"row,omitempty"`
	Median results.Number `json:"y"`
	Low    results.Number `json:"lo"`
	High   results.Number `json:"hi"`
	N      int            `json:"n"`
	Failed int            `json:"failed,omitempty"`
	Values []float64      `json:"values,omitempty"` // of the runs
	Counts []bar          `json:"counts,omitempty"` // of a histogram
}

type xy struct {
	X float64 `json:"x"`
	Y float64 `json:"y"`
}

type bar struct {
	V float64 `json:"v"`
	N int64   `json:"n"`
}

func newPage(in Input) (*page, error) {
	p := &page{Title: "memsync: " + in.Name, In: in, Hosts: append([]results.Manifest{in.Manifest}, in.Manifest.Parts...)}
	for name, to := range map[string]func(string){"page.css": func(s string) { p.CSS = template.CSS(s) }, "page.js": func(s string) { p.JS = template.JS(s) }} {
		b, err := files.ReadFile(name)
		if err != nil {
			return nil, err
		}
		to(string(b))
	}
	p.count()
	drawn := map[string][]string{}
	for _, spec := range in.Figures {
		name := cmp.Or(spec.Figure, spec.Name)
		drawn[name] = append(drawn[name], spec.Y.Column)
	}
	p.Drifts = results.Drifts(in.Rows, func(figure, metric string) bool { return slices.Contains(drawn[figure], metric) })
	p.Maps = decisionMaps(in.Rows)
	for _, spec := range in.Figures {
		if spec.Kind == results.FigureMap { // the page has tables of these (decisionMaps)
			continue
		}
		f, err := newFigure(in, spec)
		if err != nil {
			return nil, fmt.Errorf("report figure %s: %w", spec.Name, err)
		}
		if len(f.Variants) == 0 {
			p.Absent = append(p.Absent, spec.Name)
			continue
		}
		p.Figures = append(p.Figures, f)
	}
	data, err := json.Marshal(p.Figures)
	if err != nil {
		return nil, err
	}
	p.Data = template.JS(data) // json escapes <, > and &: no text can end the script
	for _, v := range claims.Verdicts() {
		n := 0
		for _, o := range in.Claims {
			if o.Verdict == v {
				n++
			}
		}
		p.Verdicts = append(p.Verdicts, count{string(v), n})
	}
	for _, o := range in.Claims {
		if o.Deciding() != nil {
			p.Measured = append(p.Measured, o)
		} else {
			p.Unmeasured = append(p.Unmeasured, o)
		}
	}
	links, err := json.MarshalIndent(map[string]any{"links": in.Manifest.Links, "calibrations": in.Manifest.Calibrations}, "", " ")
	if err != nil {
		return nil, err
	}
	p.Links = string(links)
	var probes []struct{ Name, Answer, Detail, Remedy string }
	_ = json.Unmarshal(in.Manifest.Features, &probes) // a folder of an older version has another form; then there is no table
	for _, f := range probes {
		p.Features = append(p.Features, feature{f.Name, f.Answer, strings.TrimSpace(f.Detail + " " + f.Remedy)})
	}
	return p, nil
}

// count counts runs by status, and lists the cells that did not end well.
func (p *page) count() {
	byStatus := map[results.Status]int{}
	type key struct{ figure, what, status, err string }
	bad := map[key]int{}
	var order []key
	for _, r := range p.In.Rows {
		if r.Metric != results.RunMetric {
			continue
		}
		byStatus[r.Status]++
		if r.Status == results.StatusOK {
			continue
		}
		k := key{r.Figure, strings.Trim(r.Strategy+" "+r.Device+" "+r.Variant, " "), string(r.Status), r.Error}
		if bad[k] == 0 {
			order = append(order, k)
		}
		bad[k]++
	}
	for _, s := range results.Statuses() {
		if n := byStatus[s]; n > 0 {
			p.Statuses = append(p.Statuses, count{string(s), n})
		}
	}
	for _, k := range order {
		p.Broken = append(p.Broken, broken{k.figure, k.what, k.status, k.err, bad[k]})
	}
}

func newFigure(in Input, spec results.FigureSpec) (figure, error) {
	f := figure{Name: spec.Name, Title: spec.Title, Kind: string(spec.Kind), Note: spec.Note, Command: in.Program + " run " + cmp.Or(spec.Figure, spec.Name),
		X: axis{Label: spec.X.String(), Log: spec.X.Log, Category: spec.X.Category}, Y: axis{Label: spec.Y.String(), Log: spec.Y.Log}, Rows: axis{Label: spec.Rows.String()}}
	rows := map[string][]results.Row{}
	for _, r := range spec.Select(in.Rows) {
		rows[r.Variant] = append(rows[r.Variant], r)
	}
	styles := map[string]int{}
	for i, s := range spec.Series {
		styles[s.Key] = i
	}
	names := map[string]bool{}
	for _, v := range slices.Sorted(maps.Keys(rows)) {
		groups := map[bool][]results.Row{}
		for _, r := range rows[v] {
			groups[r.Lab()] = append(groups[r.Lab()], r)
		}
		out := variant{Name: v}
		for _, lab := range []bool{false, true} {
			all, err := results.Group(groups[lab], spec.Query())
			if err != nil {
				return f, err
			}
			for _, s := range all {
				made, err := newSeries(in, spec, s)
				if err != nil {
					return f, err
				}
				style, ok := styles[s.Key]
				if !ok {
					style = len(styles)
					styles[s.Key] = style
				}
				made.Style = style
				if lab {
					made.Label += ", lab kernel"
				}
				for _, pt := range made.Points {
					names[pt.X] = true
				}
				if slices.ContainsFunc(made.Points, func(p point) bool { return p.N > 0 }) {
					out.Series = append(out.Series, made)
				}
			}
		}
		slices.SortStableFunc(out.Series, func(a, b series) int { return a.Style - b.Style })
		if len(out.Series) > 0 {
			f.Variants = append(f.Variants, out)
		}
	}
	if spec.X.Category || spec.Kind != results.FigureLine {
		f.X.Names = order(names, spec.X.Categories)
	}
	return f, nil
}

func newSeries(in Input, spec results.FigureSpec, s results.Series) (series, error) {
	out := series{Label: cmp.Or(s.Key, "all")}
	var of results.FigureSeries
	for _, named := range spec.Series {
		if named.Key == s.Key {
			of = named
			out.Label, out.Baseline = cmp.Or(named.Label, named.Key), named.Baseline
		}
	}
	scaled := func(n results.Number) results.Number { return results.Num(short(spec.Y.Shown(n.Float()))) }
	for _, pt := range s.Points {
		made := point{X: pt.X, Pos: results.Num(short(spec.X.Shown(pt.Pos))), Median: scaled(pt.Median), Low: scaled(pt.CILow), High: scaled(pt.CIHigh), N: pt.N, Failed: pt.Failed}
		for _, v := range pt.Values {
			made.Values = append(made.Values, short(spec.Y.Shown(v)))
		}
		if spec.Kind == results.FigureHeat {
			key := s.Key
			i := strings.LastIndex(key, "/")
			made.Row = key[i+1:]
			out.Label = key[:max(i, 0)]
			for _, named := range spec.Series {
				if named.Key == out.Label {
					out.Label = cmp.Or(named.Label, named.Key)
				}
			}
		}
		if spec.Kind == results.FigureCDF {
			counts, err := in.Histograms.Merged(spec.Y.Column, pt.Runs)
			if err != nil {
				return out, err
			}
			for _, c := range counts {
				made.Counts = append(made.Counts, bar{short(spec.Y.Shown(c.Value)), c.Count})
			}
		}
		out.Points = append(out.Points, made)
	}
	for _, t := range results.Thesis(spec.Thesis) {
		if of.Thesis == "" || t.Name != of.Thesis {
			continue
		}
		for _, pt := range t.Curve() {
			out.Thesis = append(out.Thesis, xy{pt.X.Float(), short(spec.Y.Shown(pt.Base()))})
		}
	}
	return out, nil
}

// order sorts categories: the figure's first, then numbers, then texts.
func order(names map[string]bool, first []string) []string {
	out := slices.Sorted(maps.Keys(names))
	slices.SortStableFunc(out, func(a, b string) int {
		ia, ib := slices.Index(first, a), slices.Index(first, b)
		switch {
		case ia >= 0 && ib >= 0:
			return ia - ib
		case ia >= 0:
			return -1
		case ib >= 0:
			return 1
		}
		va, okA := results.Quantity(a)
		vb, okB := results.Quantity(b)
		if okA && okB {
			return cmp.Compare(va, vb)
		}
		return cmp.Compare(a, b)
	})
	return out
}

// short cuts a number to five digits, so that the page stays small.
func short(v float64) float64 {
	if math.IsNaN(v) || math.IsInf(v, 0) {
		return v
	}
	out, _ := strconv.ParseFloat(strconv.FormatFloat(v, 'g', 5, 64), 64) // of a number that was just written
	return out
}

func number(n results.Number) string {
	v, ok := n.Get()
	if !ok {
		return "–"
	}
	return strconv.FormatFloat(v, 'g', 4, 64)
}

func percent(n results.Number) string {
	v, ok := n.Get()
	if !ok {
		return "–"
	}
	return strconv.FormatFloat(100*v, 'f', 1, 64) + " %"
}
