package results

import "strings"

// units are those in which parameters are written, with their size in base units.
var units = []struct {
	suffix string
	scale  float64
}{
	{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40}, {"kB", 1e3}, {"MB", 1e6}, {"GB", 1e9},
	{"ns", 1e-9}, {"us", 1e-6}, {"µs", 1e-6}, {"ms", 1e-3}, {"s", 1}, {"B", 1},
}

// Quantity is the number that text stands for, in base units: a plain number, or
// one with a unit, as parameters are written ("64KiB", "1.5ms").
func Quantity(text string) (float64, bool) {
	v, err := parseFloat(text)
	if err == nil {
		return v, true
	}
	for _, u := range units {
		if number, ok := strings.CutSuffix(text, u.suffix); ok {
			if v, err := parseFloat(number); err == nil {
				return v * u.scale, true
			}
		}
	}
	return 0, false
}
