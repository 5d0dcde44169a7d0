package cli

import (
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"memsync/scenarios"
	"memsync/scenarios/lab"
	"memsync/scenarios/mount"
	"memsync/strategies/backend/services"
)

func newCleanCmd(s *state) *cobra.Command {
	return &cobra.Command{
		Use:   "clean",
		Short: "Remove what a killed run left behind",
		Long: `Removes what memsync mount left at its paths, scratch folders, mounts below them and
folders of lab kernels, if their memsync is gone, and folders of servers (memsync services)
that have ended. They are found in $TMPDIR. Nothing else can be left: network namespaces, their devices,
processes and most mounts end with the process that made them, by the kernel's
doing (docs/architecture.md). What belongs to a running memsync is not touched.`,
		Example: "  memsync clean",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			removed, err := mount.Clean()
			scratch, serr := scenarios.CleanScratch()
			left, lerr := services.Clean()
			err = errors.Join(err, serr, lerr)
			removed = slices.Concat(removed, scratch, left, lab.Clean())
			for _, dir := range removed {
				fmt.Fprintln(s.stdout, "removed", dir)
			}
			if err != nil {
				return exitWith(exitFailed, err)
			}
			if len(removed) == 0 {
				fmt.Fprintln(s.stderr, "nothing was left behind")
			}
			return nil
		},
	}
}
