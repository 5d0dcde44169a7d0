package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/spf13/cobra"

	"memsync/plots/report"
	"memsync/results"
	"memsync/results/claims"
	"memsync/scenarios"
)

func newReportCmd(s *state) *cobra.Command {
	var out string
	c := &cobra.Command{
		Use:   "report DIR",
		Short: "Make one HTML page of a result folder: decision map, figures, claims, links",
		Long: `Makes a page that needs no network: how the runs ended, whether the machine stayed
the same, which strategy wins at which RTT and rate, the claims, every figure to look
into (its data, and the command that makes it again), and the machine with its
calibrated links.`,
		Example: `  memsync report results/out/study
  memsync report results/out/study --out study.html`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if out == "" {
				out = filepath.Join(args[0], "report.html")
			}
			return runReport(s, args[0], out)
		},
	}
	c.Flags().StringVar(&out, "out", "", "`file` to write (default: DIR/report.html)")
	return c
}

func runReport(s *state, dir, out string) error {
	f, err := readFolder(s, dir)
	if err != nil {
		return err
	}
	in := report.Input{Program: s.program.Name, Name: f.name, Manifest: f.manifest, Rows: f.rows, Histograms: f.histograms, Figures: pictures(s),
		Claims: judge(s, &claimsOptions{sets: claims.Sets()}, f.rows, scenarios.Variants())}
	page, err := report.HTML(in)
	if err == nil {
		err = results.WriteFile(out, page)
	}
	if err != nil {
		return exitWith(exitFailed, err)
	}
	fmt.Fprintln(s.stdout, "report:", out)
	return nil
}

// folder is all that a result folder has.
type folder struct {
	name       string
	manifest   results.Manifest
	rows       []results.Row
	histograms results.Histograms
}

func readFolder(s *state, dir string) (f folder, err error) {
	if f.rows, err = readRows(s, dir); err != nil {
		return f, err
	}
	f.manifest, err = results.ReadManifest(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return f, exitWith(exitUsage, err)
	case err != nil:
		return f, exitWith(exitFailed, err)
	}
	if f.histograms, err = results.ReadHistograms(dir); err != nil {
		return f, exitWith(exitFailed, err)
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return f, exitWith(exitFailed, err)
	}
	f.name = filepath.Base(abs)
	return f, nil
}

// pictures lists the program's figures, as drawn.
func pictures(s *state) []results.FigureSpec {
	var out []results.FigureSpec
	for _, f := range s.program.Figures {
		out = append(out, f.Pictures()...)
	}
	return out
}
