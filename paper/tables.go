package paper

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"memsync/results"
	"memsync/results/claims"
)

// fact is a small text about the sweep or the machine.
func (d *data) fact(name string) (string, error) {
	m, h := d.in.Manifest, d.in.Manifest.Host
	known := func(s string) string {
		if s == "" {
			return "(unknown)"
		}
		return Escape(s)
	}
	runs, ok := 0, 0
	for _, r := range d.in.Rows {
		if r.Metric == results.RunMetric {
			runs++
			if r.Status == results.StatusOK {
				ok++
			}
		}
	}
	drawn := 0
	for _, p := range d.pictures {
		if len(p) > 0 {
			drawn++
		}
	}
	switch name {
	case "program":
		return Escape(d.in.Program), nil
	case "folder":
		return Escape(d.in.Name), nil
	case "date":
		if m.Start.IsZero() {
			return "(unknown)", nil
		}
		return m.Start.UTC().Format("2 January 2006"), nil
	case "kernel":
		return known(h.Kernel), nil
	case "cpu":
		return known(h.CPUModel), nil
	case "cpus":
		return strconv.Itoa(h.CPUs), nil
	case "memory":
		return human(float64(h.MemoryBytes), "B"), nil
	case "os":
		return known(h.OS), nil
	case "governor":
		return known(h.Governor), nil
	case "thp":
		return known(h.THP), nil
	case "go":
		return known(m.GoVersion), nil
	case "commit":
		s := m.Commit
		if len(s) > 12 {
			s = s[:12]
		}
		if s != "" && m.Dirty {
			s += ", changed"
		}
		return known(s), nil
	case "seed":
		return strconv.FormatUint(m.Seed, 10), nil
	case "runs":
		return strconv.Itoa(runs), nil
	case "runs-ok":
		return strconv.Itoa(ok), nil
	case "figures":
		return strconv.Itoa(len(d.in.Figures)), nil
	case "figures-drawn":
		return strconv.Itoa(drawn), nil
	case "links":
		return strconv.Itoa(len(m.Links)), nil
	case "calibrations":
		return strconv.Itoa(len(m.Calibrations)), nil
	}
	if set, verdict, found := strings.Cut(name, ":"); found { // "thesis/network:holds"
		set, variant, _ := strings.Cut(set, "/")
		if slices.Contains(claims.Sets(), set) && slices.Contains(d.in.Variants, variant) && slices.Contains(claims.Verdicts(), claims.Verdict(verdict)) {
			return strconv.Itoa(len(d.outcomes(set, variant, claims.Verdict(verdict)))), nil
		}
	}
	return "", fmt.Errorf("no fact %q", name)
}

// outcomes returns those of a set, variant and verdict; an empty text is all.
func (d *data) outcomes(set, variant string, verdict claims.Verdict) []claims.Outcome {
	var out []claims.Outcome
	for _, o := range d.in.Claims {
		if (set == "" || o.Set == set) && (variant == "" || o.Variant == variant) && (verdict == "" || o.Verdict == verdict) {
			out = append(out, o)
		}
	}
	return out
}

// generated is a table or list of the records.
func (d *data) generated(name string) (string, error) {
	switch name {
	case "statuses":
		return d.statuses(), nil
	case "machines":
		return d.machines(), nil
	case "probes":
		return d.probes(), nil
	case "drifts":
		return d.drifts(), nil
	case "verdicts":
		return d.verdicts(), nil
	case "claims-fallen":
		return d.claimList(claims.Fails), nil
	case "claims-held":
		return d.claimList(claims.Holds), nil
	case "claims-open":
		return d.claimList(claims.CannotTell), nil
	case "thesis-figures":
		return d.gallery(func(f results.FigureSpec) bool { return f.Thesis != "" }), nil
	case "own-figures":
		return d.gallery(func(f results.FigureSpec) bool { return f.Thesis == "" }), nil
	}
	return "", fmt.Errorf("no table or list %q", name)
}

// tabular is a small table; cells are LaTeX already.
func tabular(columns string, head []string, lines [][]string) string {
	if len(lines) == 0 {
		return notMeasured
	}
	var b strings.Builder
	fmt.Fprintf(&b, `\begin{tabular}{%s}\toprule %s\\\midrule `, columns, strings.Join(head, " & "))
	for _, l := range lines {
		b.WriteString(strings.Join(l, " & ") + `\\ `)
	}
	b.WriteString(`\bottomrule\end{tabular}`)
	return b.String()
}

func (d *data) statuses() string {
	n := map[results.Status]int{}
	for _, r := range d.in.Rows {
		if r.Metric == results.RunMetric {
			n[r.Status]++
		}
	}
	var lines [][]string
	for _, s := range results.Statuses() {
		if n[s] > 0 {
			lines = append(lines, []string{Escape(string(s)), strconv.Itoa(n[s])})
		}
	}
	return tabular("@{}lr@{}", []string{"Runs that ended as", "n"}, lines)
}

// machines lists the machine, and those of the parts that were merged.
func (d *data) machines() string {
	var lines [][]string
	for _, m := range append([]results.Manifest{d.in.Manifest}, d.in.Manifest.Parts...) {
		h := m.Host
		kernel := h.Kernel
		if h.Lab != "" {
			kernel += " (lab)"
		}
		lines = append(lines, []string{Escape(cmp.Or(h.CPUModel, "unknown")), strconv.Itoa(h.CPUs), human(float64(h.MemoryBytes), "B"), Escape(cmp.Or(kernel, "unknown"))})
	}
	return tabular(`@{}>{\raggedright\arraybackslash}p{0.32\columnwidth}rr>{\raggedright\arraybackslash}p{0.27\columnwidth}@{}`, []string{"CPU", "n", "Memory", "Kernel"}, lines)
}

// probes lists what the machine can do, as the program found out by trying.
func (d *data) probes() string {
	var probes []struct{ Name, Answer, Detail string }
	_ = json.Unmarshal(d.in.Manifest.Features, &probes) // a folder of an older version has another form; then there is no table
	var lines [][]string
	for _, p := range probes {
		if p.Answer != "" {
			lines = append(lines, []string{Escape(p.Name), Escape(p.Answer)})
		}
	}
	half := (len(lines) + 1) / 2
	for i := range lines[:half] { // two columns of them
		if i+half < len(lines) {
			lines[i] = append(lines[i], lines[i+half]...)
		} else {
			lines[i] = append(lines[i], "", "")
		}
	}
	return tabular("@{}llll@{}", []string{"Probe", "Answer", "Probe", "Answer"}, lines[:half])
}

// drifts lists the metrics that moved between the halves of the sweep.
func (d *data) drifts() string {
	drawn := map[string][]string{}
	for _, f := range d.in.Figures {
		name := cmp.Or(f.Figure, f.Name)
		drawn[name] = append(drawn[name], f.Y.Column)
	}
	all := results.Drifts(d.in.Rows, func(figure, metric string) bool { return slices.Contains(drawn[figure], metric) })
	var out []string
	for _, x := range all {
		if x.Disturbed() {
			out = append(out, fmt.Sprintf(`%s by %+.0f\,\%%`, Escape(x.Metric), 100*x.Change.Float()))
		}
	}
	switch {
	case len(all) == 0:
		return `Whether the machine stayed the same is ` + notMeasured + `: there are too few runs.`
	case len(out) == 0:
		return fmt.Sprintf("Of %d metrics none moved by 5\\,\\%% or more between the first half of the sweep and the second.", len(all))
	}
	return fmt.Sprintf("Of %d metrics, %d moved between the first half of the sweep and the second, so that the machine was disturbed: %s.", len(all), len(out), strings.Join(out, ", "))
}

func (d *data) verdicts() string {
	var lines [][]string
	for _, set := range claims.Sets() {
		for _, variant := range d.in.Variants {
			all := d.outcomes(set, variant, "")
			if len(all) == 0 {
				continue
			}
			line := []string{Escape(set), Escape(variant)}
			for _, v := range claims.Verdicts() {
				line = append(line, strconv.Itoa(len(d.outcomes(set, variant, v))))
			}
			lines = append(lines, append(line, strconv.Itoa(len(all))))
		}
	}
	head := []string{"Claims of", "variant"}
	for _, v := range claims.Verdicts() {
		head = append(head, Escape(string(v)))
	}
	return tabular("@{}ll"+strings.Repeat("r", len(claims.Verdicts())+1)+"@{}", append(head, "all"), lines)
}

// claimList is a paragraph for each claim of a verdict; those that nothing was measured
// of are counted and named at the end.
func (d *data) claimList(v claims.Verdict) string {
	var b strings.Builder
	unmeasured := map[string][]string{} // by variant
	for _, o := range d.outcomes("", "", v) {
		c := o.Deciding()
		if c == nil {
			unmeasured[o.Variant] = append(unmeasured[o.Variant], o.ID)
			continue
		}
		theirs := ""
		if t, ok := c.Thesis.Get(); ok {
			theirs = short(t)
		}
		wanted := c.Relation + " " + short(c.Want)
		if c.Slack > 0 {
			wanted += fmt.Sprintf(" ± %g %%", 100*c.Slack)
		}
		wanted = strings.NewReplacer("~=", "≈", ">=", "≥", "<=", "≤").Replace(wanted)
		macro, args := `\claimitem`, []string{Escape(o.ID), Escape(o.Variant), Escape(o.Text), Escape(c.What), measured(*c), Escape(wanted), theirs, Escape(o.Reason)}
		if v == claims.Fails { // with the reason that the prose gives
			macro, args = `\fallen`, args[:7]
		}
		b.WriteString(macro + "{" + strings.Join(args, "}{") + "}")
		b.WriteByte('\n')
	}
	for _, variant := range d.in.Variants {
		if ids := unmeasured[variant]; len(ids) > 0 {
			fmt.Fprintf(&b, `\unmeasured{%d}{%s}{%s}`, len(ids), Escape(variant), ranges(ids))
		}
	}
	if b.Len() == 0 {
		return `None.`
	}
	return b.String()
}

// ranges writes C01, C02, C03, C07 as C01--C03, C07.
func ranges(ids []string) string {
	number := func(id string) int {
		n, _ := strconv.Atoi(strings.TrimLeft(id, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
		return n
	}
	var parts []string
	for i := 0; i < len(ids); {
		j := i
		for j+1 < len(ids) && ids[j+1][0] == ids[i][0] && number(ids[j+1]) == number(ids[j])+1 {
			j++
		}
		switch {
		case j > i+1:
			parts = append(parts, Escape(ids[i])+"--"+Escape(ids[j]))
		default:
			for _, id := range ids[i : j+1] {
				parts = append(parts, Escape(id))
			}
		}
		i = j + 1
	}
	return strings.Join(parts, ", ")
}

// gallery shows all figures that the prose does not show itself, both variants one after
// the other, and names those that are missing.
func (d *data) gallery(want func(results.FigureSpec) bool) string {
	var b strings.Builder
	var absent []string
	for _, f := range d.in.Figures {
		if !want(f) {
			continue
		}
		for _, p := range d.pictures[f.Name] {
			if !d.placed[f.Name+"/"+p.Variant] {
				b.WriteString(shown(f.Name, p) + "\n")
			}
		}
		if len(d.pictures[f.Name]) == 0 {
			absent = append(absent, `\texttt{`+Escape(f.Name)+`}`)
		}
	}
	if len(absent) > 0 {
		fmt.Fprintf(&b, `\absent{%d}{%s}`, len(absent), strings.Join(absent, ", "))
	}
	return b.String()
}
