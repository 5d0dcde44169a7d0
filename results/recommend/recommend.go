// Package recommend answers which strategy is best for a link, a region and a use of it,
// from the records of a sweep. It interpolates between measured cells and names them;
// where it is asked beyond them it answers for the nearest ones, and says so.
package recommend

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"memsync/results"
)

// Ask is what somebody wants to do with a region.
type Ask struct {
	RTTms         float64 // round-trip time, ms, from 0
	RateMbit      float64 // of the link in each direction, Mbit/s; 0 is unlimited
	Size          int64   // of the region, B, from 1
	Access        string  // as in records: seq, random, random:SIZE, reverse, zipf, trace:FILE
	WriteFraction float64 // of the accesses, 0 to 1
	ChangeRate    float64 // bytes that change at the source a second, from 0
	Destinations  int     // from 1
	MaxDowntime   float64 // s; above 0 asks for a migration
	// Has reports whether the host has a feature, one of Features; nil has all.
	Has func(feature string) bool
}

// Features lists those that strategies may need, in the names of memsync doctor.
func Features() []string { return []string{"fuse", "nbd", "ublk", "uffd", "uffd-wp", "pagemap-scan"} }

// needs are the features that the runs of a row's cell needed.
func needs(r results.Row) []string {
	var out []string
	if r.Device != "" {
		out = append(out, r.Device)
	}
	switch text(r, "params.dirty") {
	case "pagemap":
		out = append(out, "pagemap-scan")
	case "uffd-wp":
		out = append(out, "uffd-wp")
	}
	return out
}

// Goal is what is to be good, and how it is measured.
type Goal struct {
	Ops    []string `json:"ops"`
	Metric string   `json:"metric"`
	Doc    string   `json:"doc"`
	// bounded: a run that is ok without the metric's value took longer than its budget.
	bounded bool
}

// pace is what reading is compared by where no strategy read all of a region in its time.
var pace = Goal{[]string{"read"}, "rate_utilisation", "share of the link's rate at which the region is read, from opening it on", false}

// higher reports whether more of the goal's metric is better.
func (g Goal) higher() bool {
	m, _ := results.MetricByName(g.Metric)
	return m.Better == results.Higher
}

// Goal returns what the asker wants to be good, which is to be small.
func (a Ask) Goal() Goal {
	switch {
	case a.MaxDowntime > 0:
		return Goal{[]string{"migrate"}, "downtime", "downtime of an application that moves", false}
	case a.Destinations > 1:
		return Goal{[]string{"sync"}, "last_equal_time", "time until the last destination has a change", false}
	case a.ChangeRate > 0:
		return Goal{[]string{"sync"}, "staleness", "age of what a destination sees of a source that changes", false}
	case a.WriteFraction > 0:
		return Goal{[]string{"mixed", "write"}, "total_time", "time until all is done and the source has what was written", false}
	}
	return Goal{[]string{"read"}, "time_to_last_byte", "time from opening the region to having read all of it", true}
}

// Check returns an error where what is asked for is out of range or does not go together.
func (a Ask) Check() error {
	finite := func(v float64) bool { return v >= 0 && !math.IsInf(v, 0) }
	switch {
	case !finite(a.RTTms) || !finite(a.RateMbit) || !finite(a.ChangeRate) || !finite(a.MaxDowntime):
		return fmt.Errorf("RTT, rate, change rate and downtime must be 0 or more")
	case a.Size < 1:
		return fmt.Errorf("size %d: a region has at least 1 byte", a.Size)
	case !(a.WriteFraction >= 0 && a.WriteFraction <= 1):
		return fmt.Errorf("write fraction %g: want 0 to 1", a.WriteFraction)
	case a.Destinations < 1:
		return fmt.Errorf("%d destinations: want at least 1", a.Destinations)
	case a.MaxDowntime > 0 && a.Destinations > 1:
		return fmt.Errorf("a region migrates to one destination, not to %d: leave the downtime or the destinations out", a.Destinations)
	case a.WriteFraction > 0 && (a.MaxDowntime > 0 || a.Destinations > 1 || a.ChangeRate > 0):
		return fmt.Errorf("one host writes a region: a write fraction is of one destination, a change rate (and a downtime, or several destinations) of the source")
	}
	return nil
}

// axis is a property that answers are interpolated over.
type axis struct {
	name, unit string
	at         float64
	of         func(results.Row) (float64, bool)
	place      func(float64) float64 // where distances are measured
}

// unlimited is where a link without a rate lies.
const unlimited = math.MaxFloat64

func (a Ask) axes() []axis {
	log := func(v float64) float64 { return math.Log2(v) }
	rate := func(v float64) float64 {
		if v == 0 {
			return unlimited
		}
		return v
	}
	out := []axis{
		{"RTT", "ms", a.RTTms, func(r results.Row) (float64, bool) { return r.RTTms, true }, func(v float64) float64 { return math.Log2(1 + v) }},
		{"rate", "Mbit/s", rate(a.RateMbit), func(r results.Row) (float64, bool) { return rate(r.RateMbit), true }, log},
		{"size", "MiB", float64(a.Size) / (1 << 20), func(r results.Row) (float64, bool) { return float64(r.RegionBytes) / (1 << 20), true }, log},
	}
	param := func(name string, none float64) func(results.Row) (float64, bool) {
		return func(r results.Row) (float64, bool) {
			s := text(r, "params."+name)
			if s == "" {
				return none, true
			}
			return results.Quantity(s)
		}
	}
	linear := func(v float64) float64 { return v }
	switch op := a.Goal().Ops[0]; {
	case op == "mixed":
		out = append(out, axis{"write fraction", "", a.WriteFraction, func(r results.Row) (float64, bool) { return map[string]float64{"mixed": 0.5, "write": 1}[r.Op], true }, linear})
	case op == "migrate" && a.ChangeRate > 0:
		out = append(out, axis{"change rate", "B/s", a.ChangeRate, param("dirty_rate", 0), func(v float64) float64 { return math.Log2(1e6 + v) }})
	case op == "sync":
		out = append(out, axis{"destinations", "", float64(a.Destinations), param("destinations", 1), log})
	}
	return out
}

// place is a cell's position on all axes.
type place []float64

func (p place) key() string { return fmt.Sprint([]float64(p)) }

// scenario is a set of cells in which only the axes and the strategies differ.
type scenario struct {
	figure, access string
	lab            bool
	conditions     []string // that are not the usual ones
	places         []place
	goal           Goal
	cells          map[string]map[string]*cell // by candidate, by place
	candidates     []string                    // in order of appearance
}

type cell struct {
	row    results.Row
	values []float64
	runs   int // that are ok
	failed results.Row
}

// ranked are the params that are no part of a candidate: those of the axes, and how long a run may take.
var ranked = []string{"budget", "destinations", "dirty_rate"}

// settings are a row's params without those of ranked.
func settings(r results.Row) string {
	var kept []string
	for kv := range strings.SplitSeq(r.Params, ";") {
		if name, _, _ := strings.Cut(kv, "="); !slices.Contains(ranked, name) {
			kept = append(kept, kv)
		}
	}
	return strings.Join(kept, ";")
}

// world are the params that belong to a use of a region and not to a strategy, by the
// ops that they mean something to (empty: all), with what is usual.
var world = [...]struct{ op, name, usual string }{
	{"", "threads", "1"}, {"", "think", "0s"}, {"", "via", "map"}, {"", "o_direct", "false"}, {"", "files", "1"}, {"", "file_system", "none"},
	{"", "input", ""}, {"", "warm", ""}, {"", "tls", "false"}, {"", "cache_rate", "0"}, {"", "cache_delay", "0s"},
	{"sync", "dirty_fraction", "-"}, {"sync", "dirty_pattern", "-"}, {"sync", "event", "none"}, {"migrate", "writer", "random"},
}

// conditions are a row's params of world, as name=value, in which it is not as usual.
func conditions(r results.Row) []string {
	var out []string
	for _, w := range world {
		if v := text(r, "params."+w.name); (w.op == "" || w.op == r.Op) && v != "" && v != w.usual {
			out = append(out, w.name+"="+v)
		}
	}
	return out
}

// accessed reports whether the access pattern means something to what is asked for.
func (a Ask) accessed() bool { op := a.Goal().Ops[0]; return op == "read" || op == "mixed" }

func text(r results.Row, column string) string {
	s, _ := r.Get(column) // params.NAME never fails; other columns are named right
	return s
}

// scenarios sorts the rows that can answer a into scenarios.
func scenarios(rows []results.Row, a Ask, axes []axis, goal Goal) []*scenario {
	byKey := map[string]*scenario{}
	var out []*scenario
	for _, r := range rows {
		closes := r.Metric == results.RunMetric
		if !slices.Contains(goal.Ops, r.Op) || r.Variant != "network" || r.Transport == "local" || r.Loss != 0 || r.Jitterms != 0 ||
			text(r, "params.limit") != "" || !closes && (r.Metric != goal.Metric || r.Status != results.StatusOK) {
			continue
		}
		at := make(place, len(axes))
		known := true
		for i, x := range axes {
			v, ok := x.of(r)
			at[i], known = v, known && ok
		}
		if !known {
			continue
		}
		conditions := conditions(r)
		if r.Op == "migrate" && a.ChangeRate == 0 { // else an axis
			conditions = append(conditions, "dirty_rate="+text(r, "params.dirty_rate"))
		}
		parts := append([]string{r.Figure, fmt.Sprint(r.Lab()), r.CPUs}, conditions...)
		if a.accessed() {
			parts = append(parts, r.Access)
		}
		key := strings.Join(parts, "\x00")
		s := byKey[key]
		if s == nil {
			s = &scenario{figure: r.Figure, goal: goal, access: r.Access, lab: r.Lab(), conditions: conditions, cells: map[string]map[string]*cell{}}
			byKey[key] = s
			out = append(out, s)
		}
		candidate := strings.Join([]string{r.Strategy, r.Device, r.Transport, r.Backend, strconv.FormatInt(r.ChunkBytes, 10),
			strconv.Itoa(r.PullWorkers), strconv.Itoa(r.PushWorkers), settings(r)}, "\x00")
		if s.cells[candidate] == nil {
			s.cells[candidate] = map[string]*cell{}
			s.candidates = append(s.candidates, candidate)
		}
		c := s.cells[candidate][at.key()]
		if c == nil {
			c = &cell{row: r}
			s.cells[candidate][at.key()] = c
			if !slices.ContainsFunc(s.places, func(p place) bool { return slices.Equal(p, at) }) {
				s.places = append(s.places, at)
			}
		}
		switch {
		case closes && r.Status == results.StatusOK:
			c.runs++
		case closes:
			c.failed = r
		default:
			if v, ok := r.Value.Get(); ok {
				c.values = append(c.values, v)
			}
		}
	}
	// A scenario without a value says only why something does not work.
	return slices.DeleteFunc(out, func(s *scenario) bool {
		for _, cells := range s.cells {
			for _, c := range cells {
				if len(c.values) > 0 {
					return false
				}
			}
		}
		return true
	})
}

// support is a measured place with the share that it has in the answer.
type support struct {
	place
	weight float64
}

// beyond says how a scenario's cells do not reach what was asked for on an axis.
type beyond struct {
	axis     axis
	nearest  float64 // that was measured
	distance float64 // on the axis's scale: doublings, on most
}

// around returns the measured places around what is asked for, axis by axis, and
// where there are none on one side.
func around(places []place, axes []axis, i int) (out []support, off []beyond) {
	if i == len(axes) {
		return []support{{places[0], 1}}, nil
	}
	x := axes[i]
	low, high := math.Inf(-1), math.Inf(1)
	for _, p := range places {
		if p[i] <= x.at {
			low = max(low, p[i])
		}
		if p[i] >= x.at {
			high = min(high, p[i])
		}
	}
	only := func(v float64) []place {
		return slices.DeleteFunc(slices.Clone(places), func(p place) bool { return p[i] != v })
	}
	if high == unlimited && x.at != unlimited && !math.IsInf(low, -1) { // there is nothing between a rate and none
		high = math.Inf(1)
	}
	switch {
	case low == x.at:
		return around(only(low), axes, i+1)
	case math.IsInf(low, -1) || math.IsInf(high, 1):
		v := cmp.Or(map[bool]float64{true: high, false: low}[math.IsInf(low, -1)])
		out, off = around(only(v), axes, i+1)
		d := math.Abs(x.place(v) - x.place(x.at))
		if v == unlimited || x.at == unlimited {
			d = 1
		}
		return out, append([]beyond{{x, v, d}}, off...)
	}
	share := (x.place(x.at) - x.place(low)) / (x.place(high) - x.place(low))
	a, offA := around(only(low), axes, i+1)
	b, offB := around(only(high), axes, i+1)
	for _, s := range a {
		out = append(out, support{s.place, s.weight * (1 - share)})
	}
	for _, s := range b {
		out = append(out, support{s.place, s.weight * share})
	}
	off = offA
	for _, o := range offB { // of an axis that both do not reach, the worse
		j := slices.IndexFunc(off, func(p beyond) bool { return p.axis.name == o.axis.name })
		switch {
		case j < 0:
			off = append(off, o)
		case off[j].distance < o.distance:
			off[j] = o
		}
	}
	return out, off
}

// mix interpolates between values with weights that add up to 1: as straight lines
// between logarithms where all values are positive, else between the values.
func mix(values, weights []float64) float64 {
	if len(values) == 1 {
		return values[0]
	}
	log := slices.Min(values) > 0
	sum := 0.0
	for i, v := range values {
		if log {
			v = math.Log(v)
		}
		sum += weights[i] * v
	}
	if log {
		return math.Exp(sum)
	}
	return sum
}
