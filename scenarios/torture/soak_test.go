package torture

import (
	"math/rand/v2"
	"strings"
	"testing"
)

// TestGrown: a trend is found by its name, whatever the noise; noise, steps at the beginning and
// single peaks are none.
func TestGrown(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	series := func(each func(i int, s *Sample)) []Sample {
		var all []Sample
		for i := range 500 {
			s := Sample{Heap: 20e6 + r.Float64()*4e6, Resident: 200e6 + r.Float64()*80e6, Descriptors: 12, Goroutines: 3, Threads: float64(10 + r.IntN(3))}
			each(i, &s)
			all = append(all, s)
		}
		return all
	}
	for what, all := range map[string][]Sample{
		"": series(func(i int, s *Sample) {
			if i < 100 {
				s.Heap, s.Threads = 1<<20, 4
			}
			if i%50 == 0 {
				s.Heap, s.Resident, s.Goroutines = 500<<20, 2<<30, 900
			}
		}),
		"bytes of heap":            series(func(i int, s *Sample) { s.Heap += float64(i) * (60 << 10) }),
		"bytes of resident memory": series(func(i int, s *Sample) { s.Resident += float64(i) * (600 << 10) }),
		"descriptors":              series(func(i int, s *Sample) { s.Descriptors += float64(i / 50) }),
		"goroutines":               series(func(i int, s *Sample) { s.Goroutines += float64(i / 40) }),
		"threads":                  series(func(i int, s *Sample) { s.Threads += float64(i / 20) }),
	} {
		err := grown(all)
		if what == "" && err != nil {
			t.Errorf("what does not grow: %v", err)
		} else if what != "" && (err == nil || !strings.Contains(err.Error(), what)) {
			t.Errorf("%s grow: %v", what, err)
		}
	}
	var s Sample
	if err := s.sample(); err != nil || s.Resident < 1<<20 || s.Descriptors < 3 || s.Threads < 1 {
		t.Errorf("this process: %+v, %v", s, err)
	}
}
