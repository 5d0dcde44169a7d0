// Package program runs real programs on a region that is a file to them, and says how
// long their user waited. What is run is data, so that the same can be run on a
// local file and the outputs compared.
package program

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// Path stands in a step's arguments and standard input for the path of the region.
const Path = "{}"

// Program is what a user does with a region: commands, one after another. The first
// one's end is what the user waits for before anything else: the first useful result.
type Program struct {
	Name  string `json:"name"`
	Steps []Step `json:"steps"`
}

// Step is one command.
type Step struct {
	Argv  []string `json:"argv"`            // with Path for the region's; Argv[0] too, to execute the region itself
	Stdin string   `json:"stdin,omitempty"` // with Path, too
	// Rate, if not 0, is how many lines of its output a second somebody looks at, as at the
	// frames of a film; where one comes late, all behind it are looked at so much later.
	Rate float64 `json:"rate,omitempty"`
}

// Result is what a run of a program gave. Durations are from its start.
type Result struct {
	First   time.Duration `json:"first"`   // the first step's end
	Took    time.Duration `json:"took"`    // the last step's end, or when it was stopped
	All     bool          `json:"all"`     // nothing was left out because of the budget
	Steps   int           `json:"steps"`   // begun; of these only the last may have been stopped
	Rated   bool          `json:"rated"`   // one of them has a rate
	Stalled time.Duration `json:"stalled"` // how long who looks at the output had to wait after the first line, together
}

// errBudget ends a step whose time is over.
var errBudget = errors.New("the time budget is over")

// Run runs the program's steps on the region at path, one after another, and writes
// what each prints to a file in the existing folder dir, which is its working folder,
// too. Where budget is not 0, nothing but the first step is begun after it, or goes on.
// ctx kills all. The programs are children of this process, each with a process group
// of its own, and get SIGKILL when the calling thread ends. A program that is not installed gives
// region.ErrNotSupported; one that fails, an error with its last words.
func Run(ctx context.Context, p Program, path, dir string, budget time.Duration) (Result, error) {
	start := time.Now()
	r := Result{All: true}
	for i, s := range p.Steps {
		sctx, cancel := ctx, func() {}
		if i > 0 && budget > 0 {
			sctx, cancel = context.WithDeadlineCause(ctx, start.Add(budget), errBudget)
		}
		r.Steps++
		stalled, err := s.run(sctx, path, dir, outputName(i))
		stopped := errors.Is(context.Cause(sctx), errBudget)
		cancel()
		r.Took = time.Since(start)
		if i == 0 {
			r.First = r.Took
		}
		r.Rated = r.Rated || s.Rate > 0
		r.Stalled += stalled
		if err != nil && !stopped {
			return r, fmt.Errorf("program %s, step %d: %w", p.Name, i+1, err)
		}
		if err != nil {
			r.All = false
			break
		}
	}
	return r, nil
}

func outputName(step int) string { return fmt.Sprintf("output-%d", step+1) }

// Compare compares what the programs wrote in the folder got with what they wrote in want, where
// nothing was stopped; of what r says was stopped, so far as it went. It returns how many
// bytes were the same, and region.ErrMismatch where some are not.
func Compare(p Program, r Result, got, want string) (n int64, err error) {
	for i := range r.Steps {
		name := outputName(i)
		stopped := i == r.Steps-1 && !r.All
		same, err := compareFiles(filepath.Join(got, name), filepath.Join(want, name), stopped)
		n += same
		if err != nil {
			return n, fmt.Errorf("program %s, output of step %d: %w", p.Name, i+1, err)
		}
	}
	return n, nil
}

// compareFiles compares two files; with prefix, got may be shorter.
func compareFiles(got, want string, prefix bool) (n int64, err error) {
	a, err := os.Open(got)
	if err != nil {
		return 0, err
	}
	defer a.Close()
	b, err := os.Open(want)
	if err != nil {
		return 0, err
	}
	defer b.Close()
	p, q := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		k, err := io.ReadFull(a, p)
		if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
			return n, err
		}
		l, errB := io.ReadFull(b, q)
		if errB != nil && errB != io.EOF && errB != io.ErrUnexpectedEOF {
			return n, errB
		}
		if !bytes.Equal(p[:k], q[:min(k, l)]) || k < l && !prefix {
			return n, fmt.Errorf("differs from that on the local file, after %d bytes: %w", n, region.ErrMismatch)
		}
		n += int64(k)
		if err != nil {
			return n, nil
		}
	}
}

// run runs one step.
func (s Step) run(ctx context.Context, path, dir, name string) (stalled time.Duration, err error) {
	out, err := os.Create(filepath.Join(dir, name))
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	argv := make([]string, len(s.Argv))
	for i, a := range s.Argv {
		argv[i] = strings.ReplaceAll(a, Path, path)
	}
	c := exec.CommandContext(ctx, argv[0], argv[1:]...)
	c.Dir, c.WaitDelay = dir, time.Second
	c.Env = append(os.Environ(), "LC_ALL=C")
	c.Stdin = strings.NewReader(strings.ReplaceAll(s.Stdin, Path, path))
	c.SysProcAttr = &unix.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	c.Cancel = func() error { return unix.Kill(-c.Process.Pid, unix.SIGKILL) } // a shell's children, too
	words := &tail{}
	c.Stderr, c.Stdout = words, out
	var lines io.Reader
	if s.Rate > 0 {
		c.Stdout = nil
		if lines, err = c.StdoutPipe(); err != nil {
			return 0, err
		}
	}
	if err = c.Start(); err == nil {
		if lines != nil {
			stalled = look(io.TeeReader(lines, out), s.Rate) // until it ends or is killed
		}
		err = c.Wait()
	}
	switch {
	case errors.Is(err, exec.ErrNotFound):
		err = fmt.Errorf("%s is missing: %w", argv[0], region.ErrNotSupported)
	case err != nil && ctx.Err() != nil:
		err = fmt.Errorf("%s: %w (%v)%s", filepath.Base(argv[0]), context.Cause(ctx), err, words)
	case err != nil:
		err = fmt.Errorf("%s: %w%s", filepath.Base(argv[0]), err, words)
	}
	return stalled, err
}

// look reads lines at a rate a second from the first one on, and returns how long it had to wait.
func look(r io.Reader, rate float64) (stalled time.Duration) {
	every := time.Duration(float64(time.Second) / rate)
	var due time.Time // of the next line
	b := bufio.NewReader(r)
	for {
		if _, err := b.ReadSlice('\n'); err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return stalled
		} else if err != nil {
			continue // the rest of a long line
		}
		now := time.Now()
		switch {
		case due.IsZero():
			due = now
		case now.After(due):
			stalled += now.Sub(due)
			due = now
		}
		due = due.Add(every)
	}
}

// tail keeps the last words that a program wrote to stderr.
type tail struct{ b []byte }

const tailSize = 1000

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if len(t.b) > tailSize {
		t.b = t.b[len(t.b)-tailSize:]
	}
	return len(p), nil
}

func (t *tail) String() string {
	if len(t.b) == 0 {
		return ""
	}
	return ": " + strings.TrimSpace(string(t.b))
}
