package cli

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"memsync/scenarios/lab"
	"memsync/scenarios/mount"
	"memsync/scenarios/role"
	"memsync/scenarios/torture"
	"memsync/strategies/snapshot"
)

// commands lists all commands. Each is an options struct and a function.
func commands(s *state) []*cobra.Command {
	return []*cobra.Command{
		newListCmd(s), newMeasureCmd(s), newRunCmd(s), newPlotCmd(s), newCompareCmd(s), newMergeCmd(s), newClaimsCmd(s), newReportCmd(s), newPaperCmd(s), newRecommendCmd(s), newCleanCmd(s),
		newDoctorCmd(s), newLabCmd(s), newServeCmd(s), newMountCmd(s), newStatusCmd(s), newCertsCmd(s), newRelayCmd(s), newSnapshotCmd(s), newTortureCmd(s), newServicesCmd(s),
	}
}

// hidden runs the hidden commands that the program starts itself with (they must not
// install signal handlers or parse flags), and reports whether args was one.
func (p Program) hidden(args []string) (code int, ok bool) {
	if len(args) > 0 && args[0] == "role" {
		return role.Main(p.Strategies, args[1:]), true
	}
	if len(args) > 1 && args[0] == snapshotExec {
		fmt.Fprintf(os.Stderr, "%s: %v\n", p.Name, snapshot.Exec(args[1:]))
		return 126, true // as a shell that cannot run a command
	}
	if len(args) > 1 && args[0] == mountSync {
		if err := mount.SyncFile(args[1]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return exitFailed, true
		}
		return exitOK, true
	}
	if len(args) > 0 && args[0] == torture.Child {
		return torture.RunChild(p.Strategies), true
	}
	return lab.Main(args)
}
