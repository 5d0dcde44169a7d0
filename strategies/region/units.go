package region

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// units, longest suffix first where one ends in another.
var (
	sizeUnits = []unit{{"kib", 1 << 10}, {"mib", 1 << 20}, {"gib", 1 << 30}, {"tib", 1 << 40},
		{"kb", 1e3}, {"mb", 1e6}, {"gb", 1e9}, {"tb", 1e12}, {"b", 1}}
	rateUnits     = []unit{{"kbit", 1e3}, {"mbit", 1e6}, {"gbit", 1e9}, {"bit", 1}}
	durationUnits = []unit{{"ns", 1}, {"us", 1e3}, {"µs", 1e3}, {"ms", 1e6}, {"s", 1e9}, {"m", 60e9}, {"h", 3600e9}}
)

type unit struct {
	suffix string
	factor float64
}

func parseUnit(s string, units []unit, bare bool, example string) (float64, error) {
	t := strings.ToLower(strings.TrimSpace(s))
	if t == "0" {
		return 0, nil
	}
	factor := 0.0
	for _, u := range units {
		if strings.HasSuffix(t, u.suffix) {
			t, factor = strings.TrimSpace(strings.TrimSuffix(t, u.suffix)), u.factor
			break
		}
	}
	if factor == 0 {
		if !bare {
			return 0, fmt.Errorf("%q has no unit; write it like %s", s, example)
		}
		factor = 1
	}
	f, err := strconv.ParseFloat(t, 64)
	if err != nil || strings.ContainsAny(t, "xXpPnN_") {
		return 0, fmt.Errorf("%q is not a number with a unit; write it like %s", s, example)
	}
	f *= factor
	if f < 0 || f > math.MaxInt64/2 {
		return 0, fmt.Errorf("%q is out of range", s)
	}
	return f, nil
}

// ParseSize parses a size in bytes: 64MiB, 1GB, 4096. 1 MB is 10^6 bytes, 1 MiB
// is 2^20. It may be 0 but not negative, and must be a whole number of bytes.
func ParseSize(s string) (int64, error) {
	f, err := parseUnit(s, sizeUnits, true, "64MiB")
	if err == nil && f != math.Trunc(f) {
		err = fmt.Errorf("%q is not a whole number of bytes", s)
	}
	return int64(f), err
}

// ParseRate parses a link rate in bit/s: 1gbit, 100mbit. A unit is required but for 0.
func ParseRate(s string) (int64, error) {
	f, err := parseUnit(s, rateUnits, false, "100mbit")
	return int64(f), err
}

// ParseDuration parses a time: 20ms, 1.5s, 10us. A unit is required but for 0.
func ParseDuration(s string) (time.Duration, error) {
	f, err := parseUnit(s, durationUnits, false, "20ms")
	return time.Duration(math.Round(f)), err
}

// ParseFraction parses 1% or 0.01 into 0.01; the result lies in 0..1.
func ParseFraction(s string) (float64, error) {
	t, percent := strings.CutSuffix(strings.TrimSpace(s), "%")
	f, err := strconv.ParseFloat(t, 64)
	if err != nil || math.IsNaN(f) {
		return 0, fmt.Errorf("%q is not a fraction; write it like 1%% or 0.01", s)
	}
	if percent {
		f /= 100
	}
	if f < 0 || f > 1 {
		return 0, errors.New(s + " is not between 0 and 100%")
	}
	return f, nil
}

// FormatSize writes n bytes in the largest binary unit that divides it: 64MiB, 4096 as 4KiB, 5 as 5.
func FormatSize(n int64) string {
	for i := 3; i >= 0; i-- {
		if u := sizeUnits[i]; n != 0 && n%int64(u.factor) == 0 {
			return strconv.FormatInt(n/int64(u.factor), 10) + [...]string{"KiB", "MiB", "GiB", "TiB"}[i]
		}
	}
	return strconv.FormatInt(n, 10)
}
