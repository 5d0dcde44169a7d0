package cli

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"memsync/netem"
	"memsync/scenarios"
	"memsync/strategies"
	"memsync/strategies/all"
	"memsync/strategies/backend"
	"memsync/strategies/hash"
	"memsync/strategies/order"
	"memsync/strategies/order/format"
	"memsync/strategies/param"
)

// listing is one kind of thing that can be listed: its entries as data, and as
// columns for people.
type listing struct {
	name string
	make func() (data any, head []string, lines [][]string)
}

func listings(p Program) []listing {
	return []listing{
		{"strategies", func() (any, []string, [][]string) {
			type entry struct {
				Name         string                  `json:"name"`
				Doc          string                  `json:"doc"`
				Capabilities []strategies.Capability `json:"capabilities"`
				Devices      []string                `json:"devices"`
				Params       []param.Spec            `json:"params"`
				Consistency  string                  `json:"consistency"`
			}
			var data []entry
			var lines [][]string
			for _, st := range p.Strategies {
				i := st.Info()
				e := entry{i.Name, i.Doc, i.Capabilities, i.Devices, all.Specs(st, i.Devices[0], "nbd", "memory"), i.Consistency}
				data = append(data, e)
				var caps, params []string
				for _, c := range i.Capabilities {
					caps = append(caps, string(c))
				}
				for _, p := range i.Params {
					params = append(params, p.Name)
				}
				lines = append(lines, []string{i.Name, strings.Join(i.Devices, ","), strings.Join(caps, ","), i.Doc, strings.Join(params, ",")})
			}
			return data, []string{"NAME", "DEVICES", "CAN", "WHAT", "PARAMETERS"}, lines
		}},
		{"figures", func() (any, []string, [][]string) {
			type entry struct {
				Name   string `json:"name"`
				Title  string `json:"title"`
				Thesis string `json:"thesis,omitempty"`
				Of     string `json:"of,omitempty"` // the figure whose records it shows
				Cells  int    `json:"cells"`
				Quick  int    `json:"quick_cells"`
			}
			var data []entry
			var lines [][]string
			for _, f := range p.Figures {
				variant := scenarios.Network
				if !f.Has(variant) {
					variant = scenarios.Thesis
				}
				cells, quick := len(f.Cells(variant, false)), len(f.Cells(variant, true))
				for i, spec := range f.Pictures() {
					e := entry{Name: spec.Name, Title: spec.Title, Thesis: spec.Thesis, Cells: cells, Quick: quick}
					columns := []string{e.Name, fmt.Sprint(cells), fmt.Sprint(quick), e.Title}
					if i > 0 {
						e.Of = f.Spec.Name
						columns = []string{e.Name, "-", "-", e.Title + " (records of " + e.Of + ")"}
					}
					data, lines = append(data, e), append(lines, columns)
				}
			}
			return data, []string{"NAME", "CELLS", "QUICK", "WHAT"}, lines
		}},
		{"profiles", func() (any, []string, [][]string) {
			var lines [][]string
			for _, p := range netem.Profiles() {
				lines = append(lines, []string{p.Name, p.RTT.String(), rateText(p.Rate), p.Jitter.String(), fmt.Sprintf("%g%%", p.Loss*100), p.Doc})
			}
			return netem.Profiles(), []string{"NAME", "RTT", "RATE", "JITTER", "LOSS", "WHAT"}, lines
		}},
		{"devices", named(all.DeviceNames)}, {"transports", named(func() []string { return append(all.TransportNames(), "local") })},
		{"backends", named(backend.Names)},
		{"hashes", func() (any, []string, [][]string) {
			const chunks = 1 << 18 // 1 GiB in chunks of 4 KiB
			type entry struct {
				Name     string  `json:"name"`
				Bits     int     `json:"bits"`
				Strong   bool    `json:"strong"`
				Portable bool    `json:"portable"`
				Missed   float64 `json:"missed"`
				Collides float64 `json:"collides"`
				Doc      string  `json:"doc"`
			}
			var data []entry
			var lines [][]string
			for _, f := range hash.Funcs() {
				e := entry{f.Name, f.Bits(), f.Strong, f.Portable, f.Missed(chunks), f.Collides(chunks), f.Doc}
				data = append(data, e)
				lines = append(lines, []string{e.Name, fmt.Sprint(e.Bits), yesNo(e.Strong), yesNo(e.Portable), fmt.Sprintf("%.2g", e.Missed), fmt.Sprintf("%.2g", e.Collides), e.Doc})
			}
			// MISSED: a change among 2^18 changed chunks (1 GiB in 4 KiB) goes unseen. COLLIDES: two of them have the same digest.
			return data, []string{"NAME", "BITS", "STRONG", "PORTABLE", "MISSED/2^18", "COLLIDES/2^18", "WHAT"}, lines
		}},
		{"heuristics", func() (any, []string, [][]string) {
			type entry struct {
				Name string `json:"name"`
				Doc  string `json:"doc"`
			}
			var data []entry
			var lines [][]string
			for i, k := range order.Kinds() {
				data = append(data, entry{order.Names()[i], k.Doc})
			}
			for _, f := range format.Formats() {
				data = append(data, entry{order.FormatName + ", " + f.Name, f.Doc})
			}
			for _, e := range data {
				lines = append(lines, []string{e.Name, e.Doc})
			}
			return data, []string{"ORDER", "WHAT COMES FIRST"}, lines
		}},
	}
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func named(names func() []string) func() (any, []string, [][]string) {
	return func() (any, []string, [][]string) {
		var lines [][]string
		for _, n := range names() {
			lines = append(lines, []string{n})
		}
		return names(), []string{"NAME"}, lines
	}
}

// writeColumns aligns columns on a terminal and separates them by tabs elsewhere.
func writeColumns(s *state, lines [][]string) error {
	w, flush := s.stdout, func() error { return nil }
	if s.stdoutTTY {
		t := tabwriter.NewWriter(s.stdout, 0, 0, 2, ' ', 0)
		w, flush = t, t.Flush
	}
	for _, l := range lines {
		if _, err := fmt.Fprintln(w, strings.Join(l, "\t")); err != nil {
			return err
		}
	}
	return flush()
}

func newListCmd(s *state) *cobra.Command {
	var asJSON bool
	var names []string
	for _, l := range listings(s.program) {
		names = append(names, l.name)
	}
	c := &cobra.Command{
		Use:     "list [" + strings.Join(names, "|") + "]",
		Short:   "List what there is: " + strings.Join(names, ", "),
		Example: "  memsync list strategies\n  memsync list profiles --json",
		Args: func(_ *cobra.Command, args []string) error {
			switch {
			case len(args) > 1:
				return fmt.Errorf("%d words given: want at most one of: %s", len(args), strings.Join(names, ", "))
			case len(args) == 1 && !slices.Contains(names, args[0]):
				return fmt.Errorf("unknown word %q; valid: %s", args[0], strings.Join(names, ", "))
			}
			return nil
		},
		ValidArgs: names,
		RunE: func(_ *cobra.Command, args []string) error {
			all := map[string]any{}
			for _, l := range listings(s.program) {
				if len(args) == 1 && args[0] != l.name {
					continue
				}
				data, head, lines := l.make()
				all[l.name] = data
				if asJSON {
					continue
				}
				if s.stdoutTTY {
					fmt.Fprintf(s.stdout, "%s\n", l.name)
				}
				if err := writeColumns(s, append([][]string{head}, lines...)); err != nil {
					return exitWith(exitFailed, err)
				}
			}
			if !asJSON {
				return nil
			}
			enc := json.NewEncoder(s.stdout)
			enc.SetIndent("", "  ")
			var v any = all
			if len(args) == 1 {
				v = all[args[0]]
			}
			return enc.Encode(v)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}
