package results

import (
	"slices"

	"github.com/montanaflynn/stats"
	"gonum.org/v1/gonum/stat/distuv"
)

// MinCI is the smallest sample of which the median has a 95 % confidence interval.
const MinCI = 6

// Summary describes a sample without assuming a distribution. All numbers are
// absent for an empty sample.
type Summary struct {
	N      int    `json:"n"`
	Median Number `json:"median"`
	CILow  Number `json:"ci_low"` // 95 % confidence interval of the median; absent where n < MinCI
	CIHigh Number `json:"ci_high"`
	Q1     Number `json:"q1"` // median of the lower half; absent where n < 2
	Q3     Number `json:"q3"`
	Min    Number `json:"min"`
	Max    Number `json:"max"`
}

// Summarize describes a sample. The interval is the narrowest pair of order
// statistics, equally far from both ends, that covers the median with at least
// 95 % whatever the distribution: x(k) and x(n+1-k) cover it with probability
// 1 - 2 P(B < k), B ~ Binomial(n, 1/2). With n = 6 it is the whole range (96.9 %).
// Source: David and Nagaraja, Order Statistics, section 7.1.
// NaN and infinities are no values; they are left out.
func Summarize(values []float64) Summary {
	x := make([]float64, 0, len(values))
	for _, v := range values {
		if Num(v).ok {
			x = append(x, v)
		}
	}
	slices.Sort(x)
	s := Summary{N: len(x)}
	if s.N == 0 {
		return s
	}
	median, _ := stats.Median(x) // fails for an empty sample only
	s.Median, s.Min, s.Max = Num(median), Num(x[0]), Num(x[s.N-1])
	if q, err := stats.Quartile(x); err == nil {
		s.Q1, s.Q3 = Num(q.Q1), Num(q.Q3)
	}
	if k := ciRank(s.N); k > 0 {
		s.CILow, s.CIHigh = Num(x[k-1]), Num(x[s.N-k])
	}
	return s
}

// ciRank returns the largest k with 2 P(B < k) <= 5 %, or 0.
func ciRank(n int) int {
	b := distuv.Binomial{N: float64(n), P: 0.5}
	k := 0
	for k < n/2 && 2*b.CDF(float64(k)) <= 0.05 {
		k++
	}
	return k
}
