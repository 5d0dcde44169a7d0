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
	rows, err := readRows(s, dir)
	if err != nil {
		return err
	}
	manifest, err := results.ReadManifest(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return exitWith(exitUsage, err)
	case err != nil:
		return exitWith(exitFailed, err)
	}
	histograms, err := results.ReadHistograms(dir)
	if err != nil {
		return exitWith(exitFailed, err)
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return exitWith(exitFailed, err)
	}
	in := report.Input{Program: s.program.Name, Name: filepath.Base(abs), Manifest: manifest, Rows: rows, Histograms: histograms,
		Claims: judge(s, &claimsOptions{sets: claims.Sets()}, rows, scenarios.Variants())}
	for _, f := range s.program.Figures {
		in.Figures = append(in.Figures, f.Pictures()...)
	}
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
