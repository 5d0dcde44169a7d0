package claims

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"memsync/results"
)

// cellClaim is a sentence about every cell that a condition chooses: a value made from
// what each run recorded, held against a number.
type cellClaim struct {
	figure       string // empty: any
	where, value expr
	unit         string
	relation     string
	want         float64
}

func parseCellClaim(f map[string]string) (cellClaim, error) {
	c := cellClaim{figure: f["figure"], unit: f["unit"], relation: f["relation"]}
	var err error
	if c.where, err = parseExpr(f["where"]); err != nil {
		return c, err
	}
	if c.value, err = parseExpr(f["value"]); err != nil {
		return c, err
	}
	if c.want, err = strconv.ParseFloat(f["want"], 64); err != nil {
		return c, fmt.Errorf("want is %q, no number", f["want"])
	}
	if !slices.Contains([]string{"<", "<=", ">", ">="}, c.relation) {
		return c, fmt.Errorf("no relation %q; there are < <= > >=", c.relation)
	}
	return c, nil
}

func (c cellClaim) checks(d data) ([]check, error) {
	cells, err := d.cells(c.figure, c.where)
	if err != nil {
		return nil, err
	}
	var out []check
	var absent error
	for _, k := range cells {
		s := &sample{}
		for _, r := range k.runs {
			v, err := c.value.number(r)
			switch {
			case errors.Is(err, errAbsent): // such as a yardstick of a cell whose time was over first
				absent = fmt.Errorf("%s: %w", r.row.RunID, err)
				continue
			case err != nil:
				return nil, err
			}
			s.values = append(s.values, v)
		}
		if len(s.values) == 0 {
			continue
		}
		out = append(out, check{describe(k.row), c.unit, c.relation, c.want, 0, []*sample{s}, func(d draw) float64 { return median(d(s)) }})
	}
	if len(out) == 0 && absent != nil {
		return nil, absent
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("no run is of such a cell: %s", c.where.text)
	}
	return out, nil
}

// describe names a cell as short as a reader can tell it from others.
func describe(r results.Row) string {
	parts := []string{r.Strategy}
	for _, s := range []string{r.Device, r.Transport} {
		if s != "" {
			parts = append(parts, s)
		}
	}
	if r.RTTms > 0 {
		parts = append(parts, fmt.Sprintf("%g ms", r.RTTms))
	}
	if r.RateMbit > 0 {
		parts = append(parts, fmt.Sprintf("%g Mbit/s", r.RateMbit))
	}
	if r.Loss > 0 {
		parts = append(parts, fmt.Sprintf("%g %% loss", 100*r.Loss))
	}
	parts = append(parts, fmt.Sprintf("%g MiB", float64(r.RegionBytes)/(1<<20)))
	if r.CPUs != "" {
		parts = append(parts, r.CPUs)
	}
	return strings.Join(parts, ", ")
}
