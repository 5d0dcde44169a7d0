package claims

import (
	_ "embed"
	"encoding/csv"
	"fmt"
	"slices"
	"strings"
	"sync"
)

//go:embed thesis.csv
var thesisCSV string

//go:embed notes.csv
var notesCSV string

//go:embed bars.csv
var barsCSV string

// All returns all claims, in the order of Sets.
func All() []Claim { return all() }

var all = sync.OnceValue(func() []Claim {
	var out []Claim
	for set, text := range map[string]string{"thesis": thesisCSV, "notes": notesCSV, "bars": barsCSV} {
		c, err := parse(set, text)
		if err != nil {
			panic("claims: " + err.Error()) // a test reads all of the embedded files
		}
		out = append(out, c...)
	}
	slices.SortStableFunc(out, func(a, b Claim) int {
		return slices.Index(Sets(), a.Set) - slices.Index(Sets(), b.Set)
	})
	return out
})

// parse reads a table of claims: about figures where it has a column "kind", about
// cells where it has a column "where".
func parse(set, text string) ([]Claim, error) {
	lines, err := csv.NewReader(strings.NewReader(text)).ReadAll()
	if err != nil {
		return nil, fmt.Errorf("%s.csv: %w", set, err)
	}
	var out []Claim
	for i, l := range lines[1:] {
		f := map[string]string{}
		for j, name := range lines[0] {
			f[name] = l[j] // the reader holds all lines to the header's length
		}
		c := Claim{ID: f["id"], Set: set, Figure: f["figure"], Text: f["claim"], Source: f["source"]}
		if lines := f["source_lines"]; lines != "" {
			c.Source = "thesis, lines " + lines
		}
		var err error
		if f["where"] != "" {
			var k cellClaim
			k, err = parseCellClaim(f)
			c.checks = k.checks
		} else {
			var k figureClaim
			k, err = parseFigureClaim(f)
			c.checks = k.checks
		}
		switch {
		case err != nil:
			return nil, fmt.Errorf("%s.csv, claim %d (%s): %w", set, i+1, c.ID, err)
		case c.ID == "" || c.Text == "" || c.Source == "":
			return nil, fmt.Errorf("%s.csv, claim %d: id, claim and source must be set", set, i+1)
		case slices.ContainsFunc(out, func(o Claim) bool { return o.ID == c.ID }):
			return nil, fmt.Errorf("%s.csv: two claims %s", set, c.ID)
		}
		out = append(out, c)
	}
	return out, nil
}
