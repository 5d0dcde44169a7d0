// Package claims holds sentences of the thesis, of its notes and of our own design in
// a form that records can decide: does the sentence hold, does it not, or can these
// runs not tell?
//
// Every claim becomes checks: a number made from samples (a ratio of medians, a slope,
// the count of outliers), a relation, and the number it is held against. The samples
// are the runs of a cell. What the runs can tell is asked by the bootstrap (Efron and
// Tibshirani, An Introduction to the Bootstrap, chapter 13): every sample is drawn anew
// with replacement, and all checks of a claim are made again. A claim holds when it
// does so for the runs as they are and in at least 95 % of the draws; it does not
// when it fails as they are and in at least 95 % of the draws.
package claims

import (
	"fmt"
	"hash/fnv"
	"math"
	"math/rand/v2"
	"slices"

	"memsync/results"
)

// Verdict is the answer to a claim.
type Verdict string

// The verdicts.
const (
	Holds      Verdict = "holds"
	Fails      Verdict = "does not hold"
	CannotTell Verdict = "cannot tell"
)

// Verdicts lists all verdicts.
func Verdicts() []Verdict { return []Verdict{Holds, Fails, CannotTell} }

// Claim is a sentence that records can decide.
type Claim struct {
	ID     string `json:"id"`
	Set    string `json:"set"`    // one of Sets
	Figure string `json:"figure"` // whose records decide it; empty for those of any figure
	Text   string `json:"claim"`
	Source string `json:"source"` // where the sentence stands

	checks func(data) ([]check, error)
}

// Sets are the sets of claims: those of the thesis, those of the notes that it was
// made from, and the bars of our own design.
func Sets() []string { return []string{"thesis", "notes", "bars"} }

// Outcome is a claim held against records.
type Outcome struct {
	Claim
	Variant string  `json:"variant"`
	Verdict Verdict `json:"verdict"`
	Reason  string  `json:"reason,omitempty"` // why it cannot be told
	Checks  []Check `json:"checks"`
	Agree   float64 `json:"agree"` // share of the draws in which all checks hold
}

// Check is one number of a claim, and what it was held against.
type Check struct {
	What     string         `json:"what"` // "userfaultfd / disk at 0 ms"
	Unit     string         `json:"unit"` // of the numbers; "ratio" where they are one of two values
	Thesis   results.Number `json:"thesis"`
	Ours     results.Number `json:"ours"`
	Low      results.Number `json:"ci_low"` // 95 % of the draws lie between
	High     results.Number `json:"ci_high"`
	Relation string         `json:"relation"`
	Want     float64        `json:"want"`
	Slack    float64        `json:"tolerance"` // share of Want that is allowed beyond it
	Holds    bool           `json:"holds"`
	N        int            `json:"n"` // runs of the smallest sample
}

// sample is what the runs of a cell measured.
type sample struct {
	pos    float64 // place on the x axis, measured where it was
	values []float64
}

// draw returns the values that stand for a sample: its own, or drawn from them.
type draw func(*sample) []float64

// check is a Check before its numbers are known.
type check struct {
	what, unit, relation string
	want, slack          float64
	samples              []*sample
	value                func(draw) float64
}

func (c check) holds(v float64) bool {
	near := c.slack * math.Abs(c.want)
	switch c.relation {
	case "~=":
		return math.Abs(v-c.want) <= near
	case "<":
		return v < c.want+near
	case "<=":
		return v <= c.want+near
	case ">":
		return v > c.want-near
	case ">=":
		return v >= c.want-near
	}
	panic("claims: relation " + c.relation) // the parsers let no other pass
}

// draws is how often samples are drawn; confident is the share of draws that decides.
const (
	draws     = 2000
	confident = 0.95
)

// Evaluate holds claims against the rows of one variant. Figures are those the rows were
// made for, by name. The same rows give the same outcomes.
func Evaluate(claims []Claim, figures map[string]results.FigureSpec, rows []results.Row, variant string) []Outcome {
	d := newRecords(figures, rows, variant)
	var out []Outcome
	for _, c := range claims {
		out = append(out, evaluate(c, d, variant))
	}
	return out
}

func evaluate(c Claim, d data, variant string) Outcome {
	o := Outcome{Claim: c, Variant: variant, Verdict: CannotTell, Checks: []Check{}}
	checks, err := c.checks(d)
	if err != nil {
		o.Reason = err.Error()
		return o
	}
	theirs := thesisNumbers(c)
	own := func(s *sample) []float64 { return s.values }
	all := true
	few := math.MaxInt
	for _, k := range checks {
		n := math.MaxInt
		for _, s := range k.samples {
			n = min(n, len(s.values))
		}
		few = min(few, n)
		v := k.value(own)
		all = all && k.holds(v)
		o.Checks = append(o.Checks, Check{What: k.what, Unit: k.unit, Thesis: theirs[k.what], Ours: results.Num(v), Relation: k.relation,
			Want: k.want, Slack: k.slack, Holds: k.holds(v), N: n})
	}
	if few < results.MinCI {
		o.Reason = fmt.Sprintf("a cell has %d runs, %d are needed", few, results.MinCI)
		return o
	}
	o.Agree = bootstrap(c.ID+variant, checks, o.Checks)
	switch {
	case all && o.Agree >= confident:
		o.Verdict = Holds
	case !all && o.Agree <= 1-confident:
		o.Verdict = Fails
	default:
		o.Reason = fmt.Sprintf("it holds in %.0f %% of the draws", 100*o.Agree)
	}
	return o
}

// bootstrap draws the samples anew, fills in the intervals of made, and returns the
// share of draws in which all checks hold.
func bootstrap(seed string, checks []check, made []Check) float64 {
	h := fnv.New64a()
	_, _ = h.Write([]byte(seed)) // never fails
	rng := rand.New(rand.NewPCG(h.Sum64(), 1))
	seen := make([][]float64, len(checks))
	agree := 0
	for range draws {
		drawn := map[*sample][]float64{}
		redraw := func(s *sample) []float64 {
			v, ok := drawn[s]
			if !ok {
				v = make([]float64, len(s.values))
				for i := range v {
					v[i] = s.values[rng.IntN(len(v))]
				}
				drawn[s] = v
			}
			return v
		}
		all := true
		for i, k := range checks {
			v := k.value(redraw)
			seen[i] = append(seen[i], v)
			all = all && k.holds(v)
		}
		if all {
			agree++
		}
	}
	for i, v := range seen {
		slices.Sort(v)
		made[i].Low, made[i].High = results.Num(v[draws/40]), results.Num(v[draws-1-draws/40])
	}
	return float64(agree) / draws
}

// Deciding returns the check that says most about the verdict: one that fails where the
// claim does not hold, and of several the clearest; else the one nearest to failing. It
// is nil where nothing was measured.
func (o Outcome) Deciding() *Check {
	best, at := math.Inf(1), -1
	for i, c := range o.Checks {
		v, ok := c.Ours.Get()
		if !ok || c.Holds != (o.Verdict != Fails) && slices.ContainsFunc(o.Checks, func(k Check) bool { return k.Holds == (o.Verdict != Fails) }) {
			continue
		}
		margin := math.Abs(v-c.Want) / max(math.Abs(c.Want), math.Abs(v), math.SmallestNonzeroFloat64)
		if o.Verdict == Fails {
			margin = -margin // the clearest failure
		}
		if margin < best {
			best, at = margin, i
		}
	}
	if at < 0 {
		return nil
	}
	return &o.Checks[at]
}
