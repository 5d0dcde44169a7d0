package results

import "testing"

func TestBest(t *testing.T) {
	of := func(name string, around float64, n int) Contender {
		var v []float64
		for i := range n {
			v = append(v, around+float64(i)/10)
		}
		return Contender{name, Summarize(v)}
	}
	for name, c := range map[string]struct {
		all    []Contender
		better Better
		first  string
		lead   int
	}{
		"none":         {nil, Lower, "", 0},
		"no values":    {[]Contender{of("a", 0, 0)}, Lower, "a", 0},
		"lower":        {[]Contender{of("a", 5, 6), of("b", 1, 6), of("c", 0, 0)}, Lower, "b", 1},
		"higher":       {[]Contender{of("b", 1, 6), of("a", 5, 6)}, Higher, "a", 1},
		"overlap":      {[]Contender{of("a", 1.2, 6), of("b", 1, 6), of("c", 9, 6)}, Lower, "b", 2},
		"overlap high": {[]Contender{of("a", 8.8, 6), of("b", 1, 6), of("c", 9, 6)}, Higher, "c", 2},
		"too few":      {[]Contender{of("a", 9, 5), of("b", 1, 5)}, Lower, "b", 2},
		"equal":        {[]Contender{of("b", 1, 6), of("a", 1, 6)}, Lower, "a", 2},
	} {
		if lead := Best(c.all, c.better); lead != c.lead || len(c.all) > 0 && c.all[0].Name != c.first {
			t.Errorf("%s: %d lead, %+v", name, lead, c.all)
		}
	}
}
