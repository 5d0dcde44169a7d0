package paper

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// ErrNoLaTeX: the machine has no LaTeX, or it lacks a package.
var ErrNoLaTeX = errors.New("there is no LaTeX here that can make it; on Debian: sudo apt-get install --no-install-recommends " + strings.Join(Packages, " "))

// Packages are Debian's that Build needs.
var Packages = []string{"texlive-latex-recommended", "texlive-fonts-recommended"}

// Build makes paper.pdf in a folder that Write wrote. It blocks for some seconds. The
// same sources give the same bytes where the TeX is the same: the time that stands in
// the file is made. The error matches ErrNoLaTeX where programs or packages are missing,
// and else holds what LaTeX said.
func Build(ctx context.Context, dir string, made time.Time) error {
	for _, name := range []string{"pdflatex", "bibtex"} {
		if _, err := exec.LookPath(name); err != nil {
			return fmt.Errorf("make paper.pdf: %w (%s)", ErrNoLaTeX, err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	latex := []string{"pdflatex", "-no-shell-escape", "-halt-on-error", "-interaction=nonstopmode", "-file-line-error", "paper"}
	for _, args := range [][]string{latex, {"bibtex", "-terse", "paper"}, latex, latex} {
		c := exec.CommandContext(ctx, args[0], args[1:]...)
		c.Dir = dir
		c.Env = append(os.Environ(), "max_print_line=1000", "FORCE_SOURCE_DATE=1", "openout_any=p", fmt.Sprintf("SOURCE_DATE_EPOCH=%d", max(made.Unix(), 0)))
		c.WaitDelay = 5 * time.Second
		if out, err := c.CombinedOutput(); err != nil {
			return fmt.Errorf("make paper.pdf: %s: %w", args[0], said(out, err))
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "paper.pdf")); err != nil {
		return fmt.Errorf("make paper.pdf: %w", err)
	}
	return nil
}

// said picks what matters of LaTeX's output.
func said(out []byte, err error) error {
	var lines []string
	for l := range strings.Lines(string(out)) {
		if strings.Contains(l, ".sty' not found") || strings.Contains(l, ".cls' not found") || strings.Contains(l, "not loadable") {
			err = ErrNoLaTeX
		}
		if strings.HasPrefix(l, "!") || strings.Contains(l, ".tex:") || strings.HasPrefix(l, "l.") {
			lines = append(lines, strings.TrimSpace(l))
		}
	}
	if len(lines) == 0 {
		lines = []string{string(bytes.TrimSpace(out[max(len(out)-500, 0):]))}
	}
	return fmt.Errorf("%w: %s", err, strings.Join(lines[:min(len(lines), 6)], "; "))
}
