// Package cli is the command line: flags and output only. A program (memsync,
// or one with more strategies) is a Program and a call of Main.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"memsync/scenarios"
	"memsync/strategies"
	"memsync/strategies/probe"
)

// Program is what makes one program with this command line differ from another.
type Program struct {
	Name       string // as it is called
	Strategies strategies.Registry
	Figures    []scenarios.Figure
	Probes     []probe.Probe // beside those that every program has
}

// Exit codes (docs/cli.md). 2 is left to a Go crash.
const (
	exitOK           = 0
	exitFailed       = 1 // a run, action, claim or threshold failed
	exitCorrupt      = 3 // bytes differ
	exitUnsupported  = 4 // a feature is missing here
	exitNotPermitted = 5 // not permitted, uncalibrated, or could not tell
	exitUsage        = 6 // wrong usage
	exitInterrupted  = 130
)

// state is what a command may use of the process it runs in, so that a test
// can run a whole command with streams of its own.
type state struct {
	program              Program
	ctx                  context.Context // ends at the first SIGINT, SIGTERM or SIGHUP
	args                 []string        // without the program's name
	stdin                io.Reader
	stdout, stderr       io.Writer // data; words
	env                  func(string) string
	stdoutTTY, stderrTTY bool
}

// exitError is an error that carries the exit code it asks for.
type exitError struct {
	code int
	err  error // nil where everything has been said
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// exitWith gives err an exit code. A code already set is kept.
func exitWith(code int, err error) error {
	var e *exitError
	if errors.As(err, &e) {
		return err
	}
	return &exitError{code, err}
}

// Main runs the command line of this process and returns its exit code. It must
// be the first thing that the process does.
func Main(p Program) int {
	if code, ok := p.hidden(os.Args[1:]); ok {
		return code
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	s := &state{
		program: p, ctx: ctx, args: os.Args[1:],
		stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, env: os.Getenv,
		stdoutTTY: term.IsTerminal(int(os.Stdout.Fd())), stderrTTY: term.IsTerminal(int(os.Stderr.Fd())),
	}
	return run(s)
}

// run executes the command line in s and returns the exit code.
func run(s *state) int {
	root := newRootCmd(s)
	root.SetArgs(s.args)
	err := root.ExecuteContext(s.ctx)
	if err == nil {
		return exitOK
	}
	code := exitUsage // cobra's own errors are all of usage
	var e *exitError
	if errors.As(err, &e) {
		code, err = e.code, e.err
	} else if s.ctx.Err() != nil {
		code = exitInterrupted
	}
	if err != nil {
		fmt.Fprintf(s.stderr, "%s: %v\n", s.program.Name, err)
	}
	if code == exitUsage {
		fmt.Fprintf(s.stderr, "%s: see --help of the command\n", s.program.Name)
	}
	return code
}

// Commands returns the commands that users see, for tests of their texts.
func (p Program) Commands() []*cobra.Command {
	return newRootCmd(&state{program: p, stdin: strings.NewReader(""), stdout: io.Discard, stderr: io.Discard}).Commands()
}

func newRootCmd(s *state) *cobra.Command {
	root := &cobra.Command{
		Use:   s.program.Name,
		Short: "Which way of making memory available on another host is best, for this network, access pattern and kernel?",
		Long: `memsync implements the ways of making a Linux memory region available on
another host, runs each under the same measured network, checks every byte, and
writes tidy records and plots.`,
		Example: `  memsync doctor
  memsync measure --strategy userfaultfd --rtt 20ms --rate 1gbit --size 16MiB
  memsync run throughput-rttvar-1 --quick`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			var names []string
			for _, sub := range c.Commands() {
				if sub.IsAvailableCommand() {
					names = append(names, sub.Name())
				}
			}
			return fmt.Errorf("unknown command %q; valid: %s", args[0], strings.Join(names, ", "))
		},
		RunE: func(c *cobra.Command, _ []string) error {
			c.SetOut(s.stderr)
			_ = c.Help()
			return exitWith(exitUsage, errors.New("no command given"))
		},
	}
	root.SetIn(s.stdin)
	root.SetOut(s.stdout)
	root.SetErr(s.stderr)
	root.AddCommand(commands(s)...)
	for all := []*cobra.Command{root}; len(all) > 0; all = all[1:] {
		all[0].Example = strings.ReplaceAll(all[0].Example, "memsync ", s.program.Name+" ")
		all = append(all, all[0].Commands()...)
	}
	return root
}
