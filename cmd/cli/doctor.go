package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"memsync/netem"
	"memsync/scenarios/lab"
	"memsync/strategies/probe"
)

func newDoctorCmd(s *state) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Say what this machine can do, why not, and the command that would mend it",
		Long: `Tries what the strategies, devices and shapers need, without loading a module,
setting a sysctl or leaving anything behind, and prints a line for each: its name;
works, missing or unknown (could not tell); the minimum kernel; what was seen or
why not; the command that would mend it. In a pipe: the same fields, tab-separated.`,
		Example: `  memsync doctor
  sudo memsync doctor --json | jq '.probes[] | select(.answer != "works")'
  memsync lab -- memsync doctor`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			results := probe.Run(machineProbes(s))
			if asJSON {
				enc := json.NewEncoder(s.stdout)
				enc.SetIndent("", "  ")
				return enc.Encode(map[string]any{"probes": results})
			}
			var b bytes.Buffer
			w := io.Writer(&b)
			if s.stdoutTTY {
				w = tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
			}
			fmt.Fprintln(w, "NAME\tANSWER\tKERNEL\tDETAIL\tREMEDY")
			clean := strings.NewReplacer("\n", " ", "\t", " ")
			for _, r := range results {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", r.Name, r.Answer, r.Kernel, clean.Replace(r.Detail), r.Remedy)
			}
			if t, ok := w.(*tabwriter.Writer); ok {
				_ = t.Flush() // to memory
			}
			if _, err := b.WriteTo(s.stdout); err != nil {
				return exitWith(exitFailed, err)
			}
			return nil
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

// machineProbes is the whole list: the host's, the shapers', the lab kernel's.
func machineProbes(s *state) []probe.Probe {
	list := probe.Host()
	for _, sh := range []struct {
		shaper  netem.Shaper
		kernel  string
		modules []string
		remedy  string
	}{
		{netem.ShaperNetem, "2.6.16", []string{"veth", "sch_netem"}, "memsync lab -- memsync doctor"},
		{netem.ShaperTun, "2.6.27", []string{"tun"}, "sudo memsync doctor"},
		{netem.ShaperNone, "2.6.24", []string{"veth"}, "sudo memsync doctor"},
	} {
		list = append(list, probe.Probe{Name: "shaper-" + string(sh.shaper), Kernel: sh.kernel, Remedy: sh.remedy, Try: func() (string, error) {
			for _, m := range sh.modules {
				if err := probe.Unloaded(m); err != nil {
					return "", err
				}
			}
			err := netem.Probe(sh.shaper)
			if errors.Is(err, netem.ErrNotSupported) {
				err = probe.No(err)
			}
			return "", err
		}})
	}
	return append(append(list, lab.Probe(s.env)), s.program.Probes...)
}
