package scenarios

import (
	"errors"
	"strings"
	"testing"
	"time"

	"memsync/netem"
	"memsync/strategies/region"
)

// In the lab kernel, a figure's cell that the lab would bind is refused with the
// reason; what measure is asked for is not.
func TestLabDistorts(t *testing.T) {
	link := func(rtt time.Duration, rate int64) netem.Profile { return netem.Profile{RTT: rtt, Rate: rate} }
	for name, c := range map[string]struct {
		cell Cell
		why  string // "" is that it runs
	}{
		"20 ms":                      {Cell{Link: link(20*time.Millisecond, 1e9)}, ""},
		"20 ms, no rate":             {Cell{Link: link(20*time.Millisecond, 0)}, ""},
		"1 ms":                       {Cell{Link: link(time.Millisecond, 1e9)}, ""},
		"rate alone, 100 Mbit/s":     {Cell{Link: link(0, 1e8)}, ""},
		"first chunk on uffd":        {Cell{Strategy: "userfaultfd", Link: link(20*time.Millisecond, 1e9)}, ""},
		"a figure of the lab":        {Cell{InLab: true}, ""},
		"unshaped":                   {Cell{}, "no shaped link"},
		"unshaped, said so":          {Cell{Shaper: netem.ShaperNone}, "no shaped link"},
		"local":                      {Cell{Transport: "local", Limit: WholeRegion}, "no shaped link"},
		"10 Gbit/s":                  {Cell{Link: link(20*time.Millisecond, 1e10)}, "10000 Mbit/s is too fast"},
		"1 Gbit/s, no delay":         {Cell{Link: link(0, 1e9), Limit: WholeRegion}, "neither an RTT of 0s"},
		"0.9 ms":                     {Cell{Link: link(900*time.Microsecond, 1e9)}, "neither an RTT of 900"},
		"loss alone":                 {Cell{Link: netem.Profile{Loss: 0.01}}, "neither an RTT of 0s"},
		"all pages of a uffd":        {Cell{Strategy: "userfaultfd", Link: link(20*time.Millisecond, 1e9), Limit: WholeRegion}, "each page that is read faults"},
		"all pages of a mount there": {Cell{Strategy: "managed-mount", Device: "uffd", Link: link(20*time.Millisecond, 1e8), Limit: WholeRegion}, "each page that is read faults"},
	} {
		for _, lab := range []string{"1", ""} {
			for _, figure := range []string{"f", ""} {
				t.Setenv("MEMSYNC_LAB", lab)
				cell := c.cell
				cell.Figure, cell.Size, cell.PullWorkers, cell.PushWorkers, cell.Budget = figure, 1<<20, -1, -1, time.Second
				if cell.Strategy == "" {
					cell.Strategy = "direct-mount"
				}
				err := cell.Resolve() // may also lack a device or netem here
				refused := err != nil && strings.Contains(err.Error(), "the lab kernel distorts")
				if want := lab == "1" && figure != "" && c.why != ""; refused != want || refused && (!errors.Is(err, region.ErrNotSupported) || !strings.Contains(err.Error(), c.why)) {
					t.Errorf("%s, lab %q, figure %q: %v; want %q", name, lab, figure, err, c.why)
				}
				// measure asks itself, and warns.
				if err := cell.LabDistorts(); !cell.InLab && (err != nil) != (lab == "1" && c.why != "") {
					t.Errorf("%s, lab %q: measure is told %v", name, lab, err)
				}
			}
		}
	}
}

// Of the figures on kernel NBD, the points with a delay run in the lab, and that
// without one says why it does not.
func TestLabFigures(t *testing.T) {
	t.Setenv("MEMSYNC_LAB", "1")
	for _, f := range labFigures() {
		for _, v := range Variants() {
			for _, c := range f.Cells(v, true) {
				err := c.Resolve()
				distorted := err != nil && strings.Contains(err.Error(), "the lab kernel distorts")
				if want := c.Link.RTT == 0 && !c.InLab; distorted != want {
					t.Errorf("%s, %s, %s at %v: %v", f.Spec.Name, v, c.Strategy, c.Link.RTT, err)
				}
			}
		}
	}
}
