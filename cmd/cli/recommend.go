package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"memsync/results/recommend"
	"memsync/results/table"
	"memsync/scenarios/role"
	"memsync/strategies/all"
	"memsync/strategies/probe"
	"memsync/strategies/region"
)

type recommendOptions struct {
	rtt, maxDowntime time.Duration
	rate             int64
	size, change     int64
	access           string
	writes           float64
	destinations     int
	features         []string
	data             string
	json             bool
}

func newRecommendCmd(s *state) *cobra.Command {
	o := &recommendOptions{}
	c := &cobra.Command{
		Use:   "recommend --data DIR",
		Short: "Say which strategy is best for a link and a region, from what was measured",
		Long: `Answers from the runs of a result folder: which strategy has the region soonest, or,
with --write-fraction, is done soonest with everything at the source; with
--source-change-rate, shows a source that changes with the least delay; with
--destinations, has all of them equal soonest; with --max-downtime, moves an
application with the least downtime.

One scenario of the folder decides, the one whose cells are nearest, so that only
strategies that did the same are compared. Between its cells medians and intervals
are interpolated on logarithms (RTT, rate, size), and the cells are named. Where the
question lies beyond what was measured, the answer is for the nearest cells, the
confidence is low and the answer says so. Without measured data there is no answer.

Confidence: high, measured around the question and told apart; medium, too few runs,
not told apart, or measured under other conditions; low, measured elsewhere, or with nothing to compare.

Exit status: 0 there is an answer; 1 no strategy keeps to --max-downtime; 4 none works
with the features that there are; 5 the folder cannot tell; 6 wrong usage.`,
		Example: `  memsync run rtt-and-rate --out results/out/study
  memsync recommend --data results/out/study --rtt 40ms --rate 100mbit --size 1GiB
  memsync recommend --data results/out/study --rtt 20ms --rate 1gbit --max-downtime 300ms --features uffd,nbd --json`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return runRecommend(s, o) },
	}
	f := c.Flags()
	f.StringVar(&o.data, "data", "", "result `folder` to answer from (memsync run)")
	durationFlag(f, &o.rtt, "rtt", 0, "round-trip time")
	f.Var(unitValue[int64]{&o.rate, region.ParseRate, rateText, "rate"}, "rate", "link rate per direction; 0 is unlimited")
	sizeFlag(f, &o.size, "size", 64<<20, "of the region")
	f.StringVar(&o.access, "access", "seq", "seq, random, random:SIZE, reverse, zipf or trace:FILE")
	f.Var(unitValue[float64]{&o.writes, region.ParseFraction, func(f float64) string { return fmt.Sprintf("%g%%", f*100) }, "fraction"}, "write-fraction", "part of the accesses that write, 50% or 0.5")
	sizeFlag(f, &o.change, "source-change-rate", 0, "bytes that change at the source a second")
	f.IntVar(&o.destinations, "destinations", 1, "hosts that the region is for, from 1")
	durationFlag(f, &o.maxDowntime, "max-downtime", 0, "longest stop of an application that moves; 0 asks for no migration")
	f.StringSliceVar(&o.features, "features", []string{"auto"}, "what the destination's kernel has: auto (this machine's), all, none, or of "+strings.Join(recommend.Features(), ", "))
	f.BoolVar(&o.json, "json", false, "print one JSON object")
	completions(c, map[string]func() []string{"access": role.Accesses, "features": func() []string { return append([]string{"auto", "all", "none"}, recommend.Features()...) }})
	return c
}

// has returns what --features says.
func (o *recommendOptions) has() (func(string) bool, []string, error) {
	names := recommend.Features()
	if len(o.features) == 1 {
		switch o.features[0] {
		case "auto":
			have := machineFeatures()
			return func(f string) bool { return slices.Contains(have, f) }, have, nil
		case "all":
			return nil, names, nil
		case "none":
			return func(string) bool { return false }, []string{}, nil
		}
	}
	for _, f := range o.features {
		if !slices.Contains(names, f) {
			return nil, nil, fmt.Errorf("unknown feature %q; valid: auto, all or none alone, or of %s", f, strings.Join(names, ", "))
		}
	}
	return func(f string) bool { return slices.Contains(o.features, f) }, o.features, nil
}

// machineFeatures are those of recommend.Features that this machine has: devices as
// strategies open them, the others as doctor tries them.
func machineFeatures() []string {
	have := []string{}
	for _, f := range recommend.Features() {
		i := slices.IndexFunc(probe.Host(), func(p probe.Probe) bool { return p.Name == f })
		switch {
		case slices.Contains(all.DeviceNames(), f):
			if all.ProbeDevice(f) == nil {
				have = append(have, f)
			}
		case i >= 0 && probe.Host()[i].Run().Answer == probe.Works:
			have = append(have, f)
		}
	}
	return have
}

// recommendation is what recommend prints as JSON.
type recommendation struct {
	Data     string          `json:"data"`
	Asked    recommendAsked  `json:"asked"`
	Features []string        `json:"features"`
	Answer   json.RawMessage `json:"answer"`
}

type recommendAsked struct {
	RTTms         float64 `json:"rtt_ms"`
	RateMbit      float64 `json:"rate_mbit"` // 0 is unlimited
	Size          int64   `json:"region_bytes"`
	Access        string  `json:"access"`
	WriteFraction float64 `json:"write_fraction"`
	ChangeRate    float64 `json:"source_change_rate"` // B/s
	Destinations  int     `json:"destinations"`
	MaxDowntime   float64 `json:"max_downtime_s"` // 0: none asked for
}

func runRecommend(s *state, o *recommendOptions) error {
	if o.data == "" {
		return exitWith(exitUsage, errors.New("there is no data to answer from: this program brings no reference results; measure (memsync run rtt-and-rate --out DIR) and name the folder: --data DIR"))
	}
	if err := role.CheckAccess(o.access, 1); err != nil {
		return exitWith(exitUsage, err)
	}
	has, features, err := o.has()
	if err != nil {
		return exitWith(exitUsage, err)
	}
	ask := recommend.Ask{RTTms: float64(o.rtt) / 1e6, RateMbit: float64(o.rate) / 1e6, Size: o.size, Access: o.access, WriteFraction: o.writes,
		ChangeRate: float64(o.change), Destinations: o.destinations, MaxDowntime: o.maxDowntime.Seconds(), Has: has}
	if err := ask.Check(); err != nil {
		return exitWith(exitUsage, err)
	}
	rows, err := readRows(s, o.data)
	if err != nil {
		return err
	}
	a, err := recommend.From(rows, ask)
	if errors.Is(err, recommend.ErrNoData) {
		return exitWith(exitNotPermitted, fmt.Errorf("%s: %w", o.data, err))
	} else if err != nil {
		return exitWith(exitUsage, err)
	}
	if o.json {
		raw, merr := json.Marshal(a)
		if merr != nil {
			return exitWith(exitFailed, merr)
		}
		e := json.NewEncoder(s.stdout)
		e.SetIndent("", "  ")
		err = e.Encode(recommendation{o.data, recommendAsked{ask.RTTms, ask.RateMbit, ask.Size, ask.Access, ask.WriteFraction, ask.ChangeRate, ask.Destinations, ask.MaxDowntime}, features, raw})
	} else {
		err = printAnswer(s, a)
	}
	switch {
	case err != nil:
		return exitWith(exitFailed, err)
	case a.Best == "" && a.Late():
		return exitWith(exitFailed, fmt.Errorf("no strategy keeps to a downtime of %v", o.maxDowntime))
	case a.Best == "":
		return exitWith(exitUnsupported, errors.New("no strategy that was measured works with these features"))
	}
	return nil
}

// printAnswer prints what is recommended and what it rests on: lines of a word and its
// value, and the ranking.
func printAnswer(s *state, a recommend.Answer) error {
	var w io.Writer = s.stdout
	if s.stdoutTTY {
		aligned := tabwriter.NewWriter(s.stdout, 0, 0, 2, ' ', 0)
		defer aligned.Flush()
		w = aligned
	}
	clean := strings.NewReplacer("\n", " ", "\t", " ")
	line := func(fields ...string) { fmt.Fprintln(w, strings.Join(fields, "\t")) }
	best := a.Best
	if best == "" {
		best = "none"
	}
	line("recommended", best)
	line("confidence", string(a.Confidence))
	line("goal", a.Goal.Metric, a.Goal.Doc)
	for _, c := range a.Caveats {
		line("note", clean.Replace(c))
	}
	kernel := ""
	if a.Lab {
		kernel = ", in the lab kernel"
	}
	line("from", fmt.Sprintf("figure %s, access %s%s", a.Figure, a.Access, kernel))
	for _, c := range a.Cells {
		rate := "unlimited"
		if c.Rate > 0 {
			rate = fmt.Sprintf("%g Mbit/s", c.Rate)
		}
		words := fmt.Sprintf("RTT %g ms, %s, %.4g MiB", c.RTTms, rate, c.Size)
		if c.Other != "" {
			words += ", " + c.Other
		}
		line("cell", words, fmt.Sprintf("weight %.3g", c.Weight))
	}
	for _, f := range a.WhatIf {
		line("feature", clean.Replace(f))
	}
	for _, r := range a.Excluded {
		line("left out", r.Strategy, clean.Replace(r.Why))
	}
	line()
	line("rank", "strategy", "device", "median", "ci_low", "ci_high", "n", "unit", "remark", "settings")
	for i, o := range a.Ranking {
		number := func(n interface{ Get() (float64, bool) }) string {
			v, ok := n.Get()
			switch {
			case !ok && s.stdoutTTY:
				return "–"
			case !ok:
				return ""
			case s.stdoutTTY:
				return table.Human(v, a.Unit)
			}
			return fmt.Sprint(v)
		}
		var remarks []string
		if len(o.Missing) > 0 {
			remarks = append(remarks, "needs "+strings.Join(o.Missing, ", "))
		}
		if o.AtLeast {
			remarks = append(remarks, "at least: runs did not get to the end in their time")
		}
		if !o.Fits {
			remarks = append(remarks, "over the limit")
		}
		if o.Tied {
			remarks = append(remarks, "not told apart from the best")
		}
		line(fmt.Sprint(i+1), o.Strategy, o.Device, number(o.Median), number(o.CILow), number(o.CIHigh), fmt.Sprint(o.N), a.Unit, strings.Join(remarks, "; "), o.Settings)
	}
	return nil
}
