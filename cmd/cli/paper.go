package cli

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"memsync/paper"
	"memsync/results/claims"
	"memsync/scenarios"
)

func newPaperCmd(s *state) *cobra.Command {
	var out string
	var sources bool
	c := &cobra.Command{
		Use:   "paper DIR",
		Short: "Make a paper (LaTeX, PDF) of a result folder",
		Long: `Makes a paper in two columns whose numbers, tables and figures all come from the
result folder: its LaTeX sources, and, where LaTeX is installed, paper.pdf. What was
not measured reads so.

Exit status: 4 where there is no LaTeX; the sources are written all the same.`,
		Example: `  memsync paper results/out/study
  memsync paper results/out/study --out paper --sources`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if out == "" {
				out = filepath.Join(args[0], "paper")
			}
			return runPaper(s, args[0], out, sources)
		},
	}
	c.Flags().StringVar(&out, "out", "", "`folder` to write (default: DIR/paper)")
	c.Flags().BoolVar(&sources, "sources", false, "write the LaTeX sources only")
	return c
}

func runPaper(s *state, dir, out string, sources bool) error {
	f, err := readFolder(s, dir)
	if err != nil {
		return err
	}
	in := paper.Input{Program: s.program.Name, Name: f.name, Variants: scenarios.Variants(), Manifest: f.manifest, Rows: f.rows, Histograms: f.histograms,
		Figures: pictures(s), Claims: judge(s, &claimsOptions{sets: claims.Sets()}, f.rows, scenarios.Variants())}
	if err := paper.Write(in, out); err != nil {
		return exitWith(exitFailed, err)
	}
	fmt.Fprintln(s.stdout, "sources:", filepath.Join(out, "paper.tex"))
	if sources {
		return nil
	}
	err = paper.Build(s.ctx, out, f.manifest.Start)
	switch {
	case s.ctx.Err() != nil:
		return exitWith(exitInterrupted, err)
	case errors.Is(err, paper.ErrNoLaTeX):
		return exitWith(exitUnsupported, err)
	case err != nil:
		return exitWith(exitFailed, err)
	}
	fmt.Fprintln(s.stdout, "paper:", filepath.Join(out, "paper.pdf"))
	return nil
}
