package torture

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
)

// Sample is what a process holds between two programs.
type Sample struct {
	Heap        float64 `json:"heap_bytes"` // after a collection
	Resident    float64 `json:"rss_bytes"`
	Descriptors float64 `json:"descriptors"`
	Goroutines  float64 `json:"goroutines"`
	Threads     float64 `json:"threads"`
}

// bounds of what a process may grow by between the middle of a soak and its end, by the trend.
// Go keeps freed memory and threads for a while, so those are wide; the others are a leak's first signs.
var bounds = []struct {
	what  string
	of    func(Sample) float64
	bound float64
}{
	{"bytes of heap", func(s Sample) float64 { return s.Heap }, 8 << 20},
	{"bytes of resident memory", func(s Sample) float64 { return s.Resident }, 64 << 20},
	{"descriptors", func(s Sample) float64 { return s.Descriptors }, 2},
	{"goroutines", func(s Sample) float64 { return s.Goroutines }, 2},
	{"threads", func(s Sample) float64 { return s.Threads }, 8},
}

// minSamples are needed before a trend is looked at.
const minSamples = 20

// grown returns an error where a process grew. It looks at the second half of the samples,
// when caches are full: the trend is the median of the slopes of all pairs (Theil 1950, Sen
// 1968), which single large programs do not move.
func grown(samples []Sample) error {
	if len(samples) < minSamples {
		return nil
	}
	half := samples[len(samples)/2:]
	step := max(1, len(half)/400) // 80,000 pairs at most
	for _, b := range bounds {
		var slopes []float64
		for i := 0; i < len(half); i += step {
			for j := i + step; j < len(half); j += step {
				slopes = append(slopes, (b.of(half[j])-b.of(half[i]))/float64(j-i))
			}
		}
		slices.Sort(slopes)
		if more := slopes[len(slopes)/2] * float64(len(half)); more > b.bound {
			return broken("nothing grows", "%.0f %s more over the last %d programs, by the trend; %.0f is the bound", more, b.what, len(half), b.bound)
		}
	}
	return nil
}

// sample fills in what the kernel knows of this process.
func (s *Sample) sample() error {
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	s.Descriptors = float64(len(fds))
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		f := strings.Fields(value)
		var to *float64
		unit := 1.0
		switch name {
		case "VmRSS":
			to, unit = &s.Resident, 1024
		case "Threads":
			to = &s.Threads
		default:
			continue
		}
		n, err := strconv.ParseFloat(f[0], 64)
		if err != nil {
			return fmt.Errorf("/proc/self/status: %s: %w", name, err)
		}
		*to = n * unit
	}
	return nil
}
