package results

import (
	"math"
	"testing"
)

func TestQuantity(t *testing.T) {
	for text, want := range map[string]float64{"0": 0, "1.5": 1.5, "64KiB": 65536, "2MB": 2e6, "20ms": 0.02, "100us": 1e-4, "1e3": 1000, "7B": 7, "3s": 3} {
		if v, ok := Quantity(text); !ok || math.Abs(v-want) > 1e-12 {
			t.Errorf("%q: %v, %t", text, v, ok)
		}
	}
	for _, text := range []string{"", "ms", "linear", "1 h", "KiB1", "0x1", "1m30s", "NaN"} {
		if v, ok := Quantity(text); ok {
			t.Errorf("%q: %v", text, v)
		}
	}
}

func TestCrossings(t *testing.T) {
	line := func(values ...float64) (s Series) {
		for i, v := range values {
			p := Point{X: string(rune('a' + i)), Pos: math.Pow(10, float64(i)), Summary: Summarize([]float64{v})}
			s.Points = append(s.Points, p)
		}
		return s
	}
	flat := line(5)
	for name, c := range map[string]struct {
		a, b       Series
		logX, logY bool
		want       []Crossing
	}{
		"up":           {line(1, 3, 7, 9), flat, true, false, []Crossing{{math.Pow(10, 1.5), true}}},
		"linear":       {line(1, 3, 7, 9), flat, false, false, []Crossing{{55, true}}},
		"there, back":  {line(1, 7, 3), flat, true, false, []Crossing{{math.Pow(10, 2.0/3), true}, {math.Pow(10, 1.5), false}}},
		"never":        {line(1, 2, 3), flat, true, false, nil},
		"on the point": {line(1, 5, 9), flat, true, false, []Crossing{{10, true}}},
		"two lines":    {line(0, 10), line(10, 0), true, false, []Crossing{{math.Sqrt(10), true}}},
		"both log":     {line(1, 100), line(10), true, true, []Crossing{{math.Sqrt(10), true}}},
		"a zero":       {line(0, 100), line(10), true, true, nil},
		"no values":    {line(), flat, true, false, nil},
	} {
		got := Crossings(c.a, c.b, c.logX, c.logY)
		if len(got) != len(c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
			continue
		}
		for i := range got {
			if got[i].Above != c.want[i].Above || math.Abs(got[i].Pos-c.want[i].Pos) > 1e-9*c.want[i].Pos {
				t.Errorf("%s: %v, want %v", name, got, c.want)
			}
		}
	}
}

func TestSelect(t *testing.T) {
	rows := []Row{{Figure: "f", Strategy: "a"}, {Figure: "f", Strategy: "b"}, {Figure: "g", Strategy: "a"}}
	if got := (FigureSpec{Name: "picture", Figure: "f", Where: map[string][]string{"strategy": {"a", "c"}}}).Select(rows); len(got) != 1 || got[0] != rows[0] {
		t.Errorf("%v", got)
	}
	if got := (FigureSpec{Name: "f"}).Select(rows); len(got) != 2 {
		t.Errorf("%v", got)
	}
}
