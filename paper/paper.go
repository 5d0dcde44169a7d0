// Package paper makes a paper of a result folder: hand-written LaTeX (paper.tex, refs.bib)
// beside generated LaTeX (data.tex) and figures that hold every number of it.
//
// The prose asks for numbers by name, as in \val{FIGURE}{VARIANT}{SERIES}{X}; Write reads
// it, and defines what it asks for from the records. What it asks for and the records do
// not have reads "not measured". What no figure, series, claim or table can give is an
// error, so that a slip of the pen is found here and not in print.
package paper

import (
	"bytes"
	"cmp"
	"embed"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"memsync/plots"
	"memsync/results"
	"memsync/results/claims"
	"memsync/results/table"
)

//go:embed paper.tex refs.bib
var files embed.FS

// Input is what a paper is made of.
type Input struct {
	Program    string // name of the program that the commands call
	Name       string // of the result folder
	Variants   []string
	Manifest   results.Manifest
	Rows       []results.Row
	Histograms results.Histograms
	Figures    []results.FigureSpec // in the order of the paper
	Claims     []claims.Outcome
}

// notMeasured stands wherever the records have no number.
const notMeasured = `\notmeasured{}`

// Write writes the paper's sources into dir, which it makes if need be: paper.tex and
// refs.bib as they are, data.tex, and figures/*.pdf.
func Write(in Input, dir string) error {
	tex, err := files.ReadFile("paper.tex")
	if err != nil {
		return err
	}
	bib, err := files.ReadFile("refs.bib")
	if err != nil {
		return err
	}
	d := newData(in)
	text, err := d.define(string(tex))
	if err != nil {
		return fmt.Errorf("write paper: %w", err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "figures"), 0o777); err != nil {
		return fmt.Errorf("write paper: %w", err)
	}
	for name, p := range d.pdfs {
		if err := results.WriteFile(filepath.Join(dir, "figures", name), p); err != nil {
			return err
		}
	}
	for name, b := range map[string][]byte{"paper.tex": tex, "refs.bib": bib, "data.tex": []byte(text)} {
		if err := results.WriteFile(filepath.Join(dir, name), b); err != nil {
			return err
		}
	}
	return nil
}

// data answers what the prose asks for.
type data struct {
	in       Input
	figures  map[string]results.FigureSpec
	pictures map[string][]plots.Picture // by figure
	pdfs     map[string][]byte          // by name of the file
	placed   map[string]bool            // pictures that the prose shows itself
}

func newData(in Input) *data {
	d := &data{in: in, figures: map[string]results.FigureSpec{}, pictures: map[string][]plots.Picture{}, pdfs: map[string][]byte{}, placed: map[string]bool{}}
	for _, f := range in.Figures {
		d.figures[f.Name] = f
	}
	return d
}

// request is a macro of the prose whose text comes from the records.
var request = regexp.MustCompile(`\\(val|thesisval|verdict|measured|why|fact|plot|fig|values|generated)((?:\{[^{}]*\})+)`)

// argument is how many arguments each takes that count here.
var arguments = map[string]int{"val": 4, "thesisval": 3, "verdict": 2, "measured": 2, "why": 2, "fact": 1, "plot": 2, "fig": 2, "values": 2, "generated": 1}

// define returns data.tex: a definition for each request of tex.
func (d *data) define(tex string) (string, error) {
	for _, spec := range d.in.Figures {
		made, err := plots.Pictures(d.in.Rows, d.in.Histograms, spec)
		if err != nil && !errors.Is(err, plots.ErrNoData) {
			return "", err
		}
		d.pictures[spec.Name] = made
		for _, p := range made {
			d.pdfs[pictureFile(spec.Name, p.Variant)] = p.PDF
		}
	}
	var asked [][]string
	seen := map[string]bool{}
	for _, m := range request.FindAllStringSubmatch(uncomment(tex), -1) {
		args := strings.Split(strings.Trim(m[2], "{}"), "}{")
		if strings.Contains(m[2], "#") { // its own definition
			continue
		}
		n := arguments[m[1]]
		if len(args) < n {
			return "", fmt.Errorf(`\%s%s has %d arguments, not %d`, m[1], m[2], len(args), n)
		}
		key := append([]string{m[1]}, args[:n]...)
		if id := strings.Join(key, "/"); !seen[id] {
			seen[id] = true
			asked = append(asked, key)
		}
		if m[1] == "plot" {
			d.placed[args[0]+"/"+args[1]] = true
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%% Made by %s paper from the result folder %s. Do not edit.\n", d.in.Program, strings.NewReplacer("\n", " ", "%", "").Replace(d.in.Name))
	for _, key := range asked {
		text, err := d.answer(key[0], key[1:])
		if err != nil {
			return "", fmt.Errorf(`\%s{%s}: %w`, key[0], strings.Join(key[1:], "}{"), err)
		}
		fmt.Fprintf(&b, "\\memsyncset{%s}{%s}\n", strings.Join(key, "/"), text)
	}
	return b.String(), nil
}

// uncomment drops what LaTeX does not read.
func uncomment(tex string) string {
	return regexp.MustCompile(`(^|[^\\])%[^\n]*`).ReplaceAllString(tex, "$1")
}

func (d *data) answer(macro string, a []string) (string, error) {
	switch macro {
	case "val":
		return d.value(a[0], a[1], a[2], a[3])
	case "thesisval":
		return d.thesis(a[0], a[1], a[2])
	case "verdict", "measured":
		return d.claim(macro, a[0], a[1])
	case "why":
		if !slices.ContainsFunc(d.in.Claims, func(o claims.Outcome) bool { return o.ID == a[0] }) {
			return "", fmt.Errorf("no claim %q", a[0])
		}
		if a[1] != "any" && !slices.Contains(d.in.Variants, a[1]) {
			return "", fmt.Errorf("no variant %q; valid: any, %s", a[1], strings.Join(d.in.Variants, ", "))
		}
		return "", nil
	case "fact":
		return d.fact(a[0])
	case "plot", "fig":
		if err := d.known(a[0], a[1]); err != nil {
			return "", err
		}
		for _, p := range d.pictures[a[0]] {
			if p.Variant != a[1] {
				continue
			}
			if macro == "fig" {
				return `Figure~\ref{` + label(a[0], a[1]) + `}`, nil
			}
			return shown(a[0], p), nil
		}
		return `\missing{` + Escape(a[0]) + `}{` + Escape(a[1]) + `}`, nil
	case "values":
		return d.values(a[0], a[1])
	}
	return d.generated(a[0])
}

// known returns an error unless there can be such a figure.
func (d *data) known(figure, variant string) error {
	if _, ok := d.figures[figure]; !ok {
		return fmt.Errorf("no figure %q", figure)
	}
	if !slices.Contains(d.in.Variants, variant) {
		return fmt.Errorf("no variant %q; valid: %s", variant, strings.Join(d.in.Variants, ", "))
	}
	return nil
}

// series returns the named series of a figure: of the machine's own kernel, or, where
// that has none, of the lab kernel.
func (d *data) series(spec results.FigureSpec, variant string) ([]results.Series, error) {
	rows := results.Filter(spec.Select(d.in.Rows), func(r results.Row) bool { return r.Variant == variant })
	own := results.Filter(rows, func(r results.Row) bool { return !r.Lab() })
	all, err := results.Group(own, spec.Query())
	if err != nil {
		return nil, err
	}
	lab, err := results.Group(results.Filter(rows, results.Row.Lab), spec.Query())
	for _, s := range lab {
		if !slices.ContainsFunc(all, func(o results.Series) bool { return o.Key == s.Key }) {
			all = append(all, s)
		}
	}
	return all, err
}

func (d *data) value(figure, variant, key, x string) (string, error) {
	if err := d.known(figure, variant); err != nil {
		return "", err
	}
	spec := d.figures[figure]
	all, err := d.series(spec, variant)
	if err != nil {
		return "", err
	}
	has := func(k string) bool { return k == key }
	if !slices.ContainsFunc(spec.Series, func(s results.FigureSeries) bool { return has(s.Key) }) && !slices.ContainsFunc(all, func(s results.Series) bool { return has(s.Key) }) {
		return "", fmt.Errorf("no series %q", key)
	}
	metric, _ := results.MetricByName(spec.Y.Column) // figures are checked before they are drawn
	for _, s := range all {
		for _, p := range s.Points {
			if s.Key == key && p.X == x {
				return summary(p.Summary, metric.Unit), nil
			}
		}
	}
	return notMeasured, nil
}

// summary is a median with its interval and n.
func summary(s results.Summary, unit string) string {
	m, ok := s.Median.Get()
	if !ok {
		return notMeasured
	}
	low, ok := s.CILow.Get()
	if !ok {
		return fmt.Sprintf("%s ($n=%d$)", human(m, unit), s.N)
	}
	return fmt.Sprintf("%s (%s to %s, $n=%d$)", human(m, unit), human(low, unit), human(s.CIHigh.Float(), unit), s.N)
}

func human(v float64, unit string) string {
	return strings.ReplaceAll(strings.ReplaceAll(Escape(table.Human(v, unit)), " us", " µs"), " ", "~")
}

func (d *data) thesis(figure, key, x string) (string, error) {
	spec, ok := d.figures[figure]
	if !ok {
		return "", fmt.Errorf("no figure %q", figure)
	}
	at, err := strconv.ParseFloat(x, 64)
	if err != nil {
		return "", fmt.Errorf("x is %q, not an RTT in ms", x)
	}
	i := slices.IndexFunc(spec.Series, func(s results.FigureSeries) bool { return s.Key == key && s.Thesis != "" })
	if i < 0 {
		return "", fmt.Errorf("no series %q of the thesis", key)
	}
	metric, _ := results.MetricByName(spec.Y.Column)
	for _, s := range results.Thesis(spec.Thesis) {
		for _, p := range s.Curve() {
			if s.Name == spec.Series[i].Thesis && p.X.Float() == at {
				return human(p.Base(), metric.Unit), nil
			}
		}
	}
	return "", fmt.Errorf("the thesis has no value at %s ms", x)
}

func (d *data) claim(macro, id, variant string) (string, error) {
	if !slices.Contains(d.in.Variants, variant) {
		return "", fmt.Errorf("no variant %q; valid: %s", variant, strings.Join(d.in.Variants, ", "))
	}
	for _, o := range d.in.Claims {
		if o.ID != id || o.Variant != variant {
			continue
		}
		c := o.Deciding()
		switch {
		case macro == "verdict" && c == nil:
			return `cannot tell (` + notMeasured + `)`, nil
		case macro == "verdict":
			return Escape(string(o.Verdict)), nil
		case c == nil:
			return notMeasured, nil
		}
		return measured(*c), nil
	}
	return "", fmt.Errorf("no claim %q", id)
}

// measured is the number that decides a claim.
func measured(c claims.Check) string {
	unit := c.Unit
	if unit == "ratio" {
		unit = ""
	}
	number := func(n results.Number) string { return short(n.Float()) }
	out := number(c.Ours)
	if _, ok := c.Low.Get(); ok {
		out += " (" + number(c.Low) + " to " + number(c.High) + ")"
	}
	return Escape(strings.TrimSpace(out+" "+unit)) + fmt.Sprintf(", $n=%d$", c.N)
}

// short writes three significant digits, without an exponent where a reader does better.
func short(v float64) string {
	s := strconv.FormatFloat(v, 'g', 3, 64)
	if a := math.Abs(v); a >= 1e-4 && a < 1e7 {
		v, _ = strconv.ParseFloat(s, 64) // of a number that was just written
		s = strconv.FormatFloat(v, 'f', -1, 64)
	}
	return s
}

func pictureFile(figure, variant string) string { return figure + "." + variant + ".pdf" }

func label(figure, variant string) string { return "fig:" + figure + ":" + variant }

// shown is a picture with its words.
func shown(figure string, p plots.Picture) string {
	return fmt.Sprintf(`\shown{figures/%s}{%s}{%s}{%s}`, pictureFile(figure, p.Variant), Escape(p.Title), Escape(p.Subtitle+". "+p.Caption), label(figure, p.Variant))
}

// values is a table of the medians of a figure: a row a series, a column a place.
func (d *data) values(figure, variant string) (string, error) {
	if err := d.known(figure, variant); err != nil {
		return "", err
	}
	spec := d.figures[figure]
	all, err := d.series(spec, variant)
	if err != nil || len(all) == 0 {
		return `\missing{` + Escape(figure) + `}{` + Escape(variant) + `}`, err
	}
	place := func(s results.Series) int { // as in the legend; what is not named there comes last
		i := slices.IndexFunc(spec.Series, func(fs results.FigureSeries) bool { return fs.Key == s.Key })
		return (i + len(spec.Series) + 1) % (len(spec.Series) + 1)
	}
	slices.SortStableFunc(all, func(a, b results.Series) int { return cmp.Or(place(a)-place(b), cmp.Compare(a.Key, b.Key)) })
	metric, _ := results.MetricByName(spec.Y.Column)
	var xs []results.Point
	for _, s := range all {
		for _, p := range s.Points {
			if !slices.ContainsFunc(xs, func(x results.Point) bool { return x.X == p.X }) {
				xs = append(xs, p)
			}
		}
	}
	quantity := func(p results.Point) float64 { v, _ := results.Quantity(p.X); return v }
	slices.SortStableFunc(xs, func(a, b results.Point) int { return cmp.Compare(quantity(a), quantity(b)) })
	for len(xs) > 6 { // what a page is wide enough for: the ends stay
		xs = slices.Delete(xs, len(xs)/2, len(xs)/2+1)
	}
	var b strings.Builder
	fmt.Fprintf(&b, `\begin{tabular}{@{}l*{%d}{r}@{}}\toprule %s`, len(xs), Escape(spec.X.String()))
	for _, x := range xs {
		b.WriteString(" & " + Escape(x.X))
	}
	b.WriteString(`\\\midrule `)
	for _, s := range all {
		name := s.Key
		for _, fs := range spec.Series {
			if fs.Key == s.Key {
				name = cmp.Or(fs.Label, name)
			}
		}
		b.WriteString(Escape(cmp.Or(name, "all")))
		for _, x := range xs {
			b.WriteString(" & ")
			i := slices.IndexFunc(s.Points, func(p results.Point) bool { return p.X == x.X })
			if i < 0 {
				b.WriteString("--")
				continue
			}
			b.WriteString(cellText(s.Points[i], metric.Unit))
		}
		b.WriteString(`\\\addlinespace `)
	}
	b.WriteString(`\bottomrule\end{tabular}`)
	return b.String(), nil
}

func cellText(p results.Point, unit string) string {
	m, ok := p.Median.Get()
	if !ok {
		return `\emph{none}`
	}
	if low, ok := p.CILow.Get(); ok {
		return fmt.Sprintf(`\cellci{%s}{%s}{%s}`, human(m, unit), human(low, unit), human(p.CIHigh.Float(), unit))
	}
	return human(m, unit)
}

// Escape writes text so that LaTeX shows it as it is, in a font with Latin-1 and the
// usual dashes and signs; of any other character it shows the number.
func Escape(text string) string {
	var b bytes.Buffer
	for _, r := range text {
		if s, ok := escapes[r]; ok {
			b.WriteString(s)
			continue
		}
		switch {
		case r < ' ' || r == 0x7f:
			b.WriteByte(' ')
		case r < 0x7f || r >= 0xa1 && r <= 0xff && r != 0xad:
			b.WriteRune(r)
		default:
			fmt.Fprintf(&b, `\texttt{U+%04X}`, r)
		}
	}
	return b.String()
}

var escapes = map[rune]string{
	'\\': `\textbackslash{}`, '{': `\{`, '}': `\}`, '$': `\$`, '&': `\&`, '#': `\#`, '_': `\_\allowbreak{}`, '%': `\%`, '^': `\textasciicircum{}`, '~': `\textasciitilde{}`,
	'<': `\textless{}`, '>': `\textgreater{}`, '|': `\textbar{}`, '"': `\textquotedbl{}`, '`': `\textasciigrave{}`, '\'': `\textquotesingle{}`,
	'/': `/\allowbreak{}`,
	'–': `--`, '—': `---`, '…': `\ldots{}`, '≥': `$\geq$`, '≤': `$\leq$`, '×': `$\times$`, '·': `$\cdot$`, '±': `$\pm$`, '→': `$\to$`, '\u00a0': `~`,
	'‘': "`", '’': "'", '“': "``", '”': "''", '−': `$-$`, 'μ': "µ", '≈': `$\approx$`,
}
