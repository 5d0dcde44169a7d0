package results

import "math"

// Crossing is a place at which one series begins to lie above another, or below.
type Crossing struct {
	Pos   float64 // interpolated between the two points around it
	Above bool    // the first series lies above from there on
}

// Crossings returns where the medians of a begin to lie above or below those of b,
// from the left. Between points, a and b are the lines that a figure with such axes
// draws: logX and logY say whether an axis is logarithmic, and shows nothing that is not
// above 0. A series of one point holds everywhere; others are compared where both have points of the same X.
func Crossings(a, b Series, logX, logY bool) []Crossing {
	type place struct{ x, diff float64 }
	var places []place
	for _, p := range a.Points {
		other, ok := b.at(p.X)
		va, okA := p.Median.Get()
		vb, okB := other.Median.Get()
		if !ok || !okA || !okB || logX && p.Pos <= 0 || logY && (va <= 0 || vb <= 0) {
			continue
		}
		x := p.Pos
		if logX {
			x = math.Log(x)
		}
		if logY {
			va, vb = math.Log(va), math.Log(vb)
		}
		places = append(places, place{x, va - vb})
	}
	var out []Crossing
	for i := 1; i < len(places); i++ {
		l, r := places[i-1], places[i]
		if l.diff < 0 == (r.diff < 0) {
			continue
		}
		x := l.x + (r.x-l.x)*l.diff/(l.diff-r.diff)
		if logX {
			x = math.Exp(x)
		}
		out = append(out, Crossing{x, r.diff >= 0})
	}
	return out
}

// at returns the point at x, or the only point.
func (s Series) at(x string) (Point, bool) {
	if len(s.Points) == 1 {
		return s.Points[0], true
	}
	for _, p := range s.Points {
		if p.X == x {
			return p, true
		}
	}
	return Point{}, false
}
