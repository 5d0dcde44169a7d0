package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"memsync/results"
	"memsync/results/claims"
	"memsync/scenarios"
)

type claimsOptions struct {
	sets, ids []string
	variant   string
	checks    bool
	json      bool
}

func newClaimsCmd(s *state) *cobra.Command {
	o := &claimsOptions{}
	c := &cobra.Command{
		Use:   "claims DIR",
		Short: "Which claims of the thesis, its notes and our own bars hold in a result folder",
		Long: `Holds claims against the runs of a result folder: the 60 of the thesis and those of
its notes that a figure can decide, each for the runs of both variants, and the bars
of our own design. A claim "holds" or "does not hold" where the runs and at least
95 % of 2000 bootstrap draws of them say so; else the program "cannot tell", and
says why. The table shows the number that decides; --checks shows all of them.

Exit status: 0 all hold; 1 one does not; 5 none fails, but of one it cannot be told;
6 wrong usage.`,
		Example: `  memsync claims results/out/study
  memsync claims results/out/study --set bars --json
  memsync claims results/out/study --id C10 --checks`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error { return runClaims(s, o, args[0]) },
	}
	f := c.Flags()
	f.StringSliceVar(&o.sets, "set", claims.Sets(), "`set` of claims: "+strings.Join(claims.Sets(), ", ")+"; may be repeated")
	f.StringSliceVar(&o.ids, "id", nil, "claim, such as C10; may be repeated (default: all)")
	f.StringVar(&o.variant, "variant", "both", "of the runs: thesis, network or both; bars are of the network variant")
	f.BoolVar(&o.checks, "checks", false, "show every number of a claim")
	f.BoolVar(&o.json, "json", false, "print one JSON object")
	completions(c, map[string]func() []string{"set": claims.Sets, "id": claimIDs, "variant": func() []string {
		return append(scenarios.Variants(), "both")
	}})
	return c
}

func claimIDs() []string {
	var ids []string
	for _, c := range claims.All() {
		ids = append(ids, c.ID)
	}
	return ids
}

// judged is what claims prints as JSON.
type judged struct {
	Dir      string                 `json:"dir"`
	Count    map[claims.Verdict]int `json:"count"`
	Outcomes []claims.Outcome       `json:"outcomes"`
}

func runClaims(s *state, o *claimsOptions, dir string) error {
	for _, set := range o.sets {
		if !slices.Contains(claims.Sets(), set) {
			return exitWith(exitUsage, fmt.Errorf("no set of claims %q; valid: %s", set, strings.Join(claims.Sets(), ", ")))
		}
	}
	for _, id := range o.ids {
		if !slices.Contains(claimIDs(), id) {
			return exitWith(exitUsage, fmt.Errorf("no claim %q; valid: %s", id, strings.Join(claimIDs(), ", ")))
		}
	}
	variants, err := scenarios.CheckVariant(o.variant)
	if err != nil {
		return exitWith(exitUsage, err)
	}
	rows, err := readRows(s, dir)
	if err != nil {
		return err
	}
	out := judged{Dir: dir, Count: map[claims.Verdict]int{}, Outcomes: judge(s, o, rows, variants)}
	for _, v := range claims.Verdicts() {
		out.Count[v] = 0
	}
	for _, c := range out.Outcomes {
		out.Count[c.Verdict]++
	}
	if o.json {
		e := json.NewEncoder(s.stdout)
		e.SetIndent("", "  ")
		err = e.Encode(out)
	} else {
		err = printClaims(s, out, o.checks)
	}
	switch {
	case err != nil:
		return exitWith(exitFailed, err)
	case out.Count[claims.Fails] > 0:
		return exitWith(exitFailed, fmt.Errorf("%d of %d do not hold", out.Count[claims.Fails], len(out.Outcomes)))
	case out.Count[claims.CannotTell] > 0:
		return exitWith(exitNotPermitted, fmt.Errorf("of %d of %d it cannot be told", out.Count[claims.CannotTell], len(out.Outcomes)))
	case len(out.Outcomes) == 0:
		return exitWith(exitUsage, errors.New("no claim is of these sets and variants"))
	}
	return nil
}

// judge holds the chosen claims against rows, claim by claim, each for its variants.
func judge(s *state, o *claimsOptions, rows []results.Row, variants []string) []claims.Outcome {
	figures := map[string]results.FigureSpec{}
	for _, f := range s.program.Figures {
		for _, spec := range append([]results.FigureSpec{f.Spec}, f.More...) {
			figures[spec.Name] = spec
		}
	}
	var out []claims.Outcome
	for _, c := range claims.All() {
		if !slices.Contains(o.sets, c.Set) || len(o.ids) > 0 && !slices.Contains(o.ids, c.ID) {
			continue
		}
		for _, v := range variants {
			if c.Set == "bars" && v != scenarios.Network {
				continue
			}
			out = append(out, claims.Evaluate([]claims.Claim{c}, figures, rows, v)...)
		}
	}
	return out
}

func printClaims(s *state, j judged, all bool) error {
	var w io.Writer = s.stdout
	if s.stdoutTTY {
		aligned := tabwriter.NewWriter(s.stdout, 0, 0, 2, ' ', 0)
		defer aligned.Flush()
		w = aligned
	}
	text := func(n results.Number) string {
		v, ok := n.Get()
		if !ok {
			return "–"
		}
		return strconv.FormatFloat(v, 'g', 4, 64)
	}
	line := func(id, variant, verdict string, c claims.Check, words string) {
		ci := "–"
		if _, ok := c.Low.Get(); ok {
			ci = text(c.Low) + " .. " + text(c.High)
		}
		fmt.Fprintln(w, strings.Join([]string{id, variant, verdict, text(c.Thesis), text(c.Ours), ci, c.Unit, wanted(c), strconv.Itoa(c.N), c.What, words}, "\t"))
	}
	fmt.Fprintln(w, "id\tvariant\tverdict\tthesis\tours\t95 % CI\tunit\twanted\tn\twhat\tclaim")
	for _, o := range j.Outcomes {
		words := o.Text
		if o.Reason != "" {
			words += " [" + o.Reason + "]"
		}
		c := o.Deciding()
		if c == nil {
			fmt.Fprintln(w, strings.Join([]string{o.ID, o.Variant, string(o.Verdict), "–", "–", "–", "", "", "0", "", words}, "\t"))
			continue
		}
		line(o.ID, o.Variant, string(o.Verdict), *c, words)
		if all {
			for _, c := range o.Checks {
				verdict := "no"
				if c.Holds {
					verdict = "yes"
				}
				line("", "", verdict, c, "")
			}
		}
	}
	var counts []string
	for _, v := range claims.Verdicts() {
		counts = append(counts, fmt.Sprintf("%s: %d", v, j.Count[v]))
	}
	fmt.Fprintln(s.stderr, strings.Join(counts, ", "))
	return nil
}

func wanted(c claims.Check) string {
	s := c.Relation + " " + strconv.FormatFloat(c.Want, 'g', 4, 64)
	if c.Slack > 0 {
		s += fmt.Sprintf(" ± %g %%", 100*c.Slack)
	}
	return s
}
