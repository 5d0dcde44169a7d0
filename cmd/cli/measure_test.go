package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"memsync/netem"
	"memsync/results"
	"memsync/scenarios"
	"memsync/strategies/region"
)

// TestExitCode: of several ways in which runs ended, 3 goes before 1 before 5 before 4,
// in whatever order they came, and 130 before all of them.
func TestExitCode(t *testing.T) {
	type run struct {
		status results.Status
		err    error
	}
	// From the one that goes before all others to the one that goes behind them.
	ranked := []struct {
		run
		code, listed int // of a run like this alone; where missing features are only listed
	}{
		{run{results.StatusInterrupted, errors.New("interrupted")}, exitInterrupted, exitInterrupted},
		{run{results.StatusCorrupt, region.ErrMismatch}, exitCorrupt, exitCorrupt},
		{run{results.StatusFailed, errors.New("the source is gone")}, exitFailed, exitFailed},
		{run{results.StatusTimeout, context.DeadlineExceeded}, exitFailed, exitFailed},
		{run{results.StatusFailed, fmt.Errorf("open: %w", region.ErrNotPermitted)}, exitNotPermitted, exitNotPermitted},
		{run{results.StatusFailed, fmt.Errorf("tun: %w", netem.ErrNotPermitted)}, exitNotPermitted, exitNotPermitted},
		{run{results.StatusUncalibrated, errors.New("RTT: 3 ms")}, exitNotPermitted, exitNotPermitted},
		{run{results.StatusUnsupported, region.ErrNotSupported}, exitUnsupported, exitOK},
		{run{results.StatusOK, nil}, exitOK, exitOK},
	}
	code := func(s *state, listed bool, runs ...run) int {
		st := &statuses{}
		for _, r := range runs {
			st.add(scenarios.Outcome{Status: r.status, Err: r.err})
		}
		err := st.err(s, listed)
		var e *exitError
		switch {
		case err == nil:
			return exitOK
		case !errors.As(err, &e):
			t.Fatalf("%v: an error without an exit code", err)
		case len(runs) == 1 && e.code != exitInterrupted && !errors.Is(err, runs[0].err):
			t.Errorf("%v does not say why: %v", err, runs[0].err)
		}
		return e.code
	}
	s := &state{ctx: context.Background()}
	if got := code(s, false); got != exitOK {
		t.Errorf("no run: %d", got)
	}
	for i, a := range ranked {
		if got := code(s, false, a.run); got != a.code {
			t.Errorf("%s (%v): %d, want %d", a.status, a.err, got, a.code)
		}
		if got := code(s, true, a.run); got != a.listed {
			t.Errorf("%s (%v), listed: %d, want %d", a.status, a.err, got, a.listed)
		}
		for _, b := range ranked[i:] {
			for _, runs := range [][]run{{a.run, b.run}, {b.run, a.run}, {b.run, b.run, a.run, b.run}} {
				if got := code(s, false, runs...); got != a.code {
					t.Errorf("%v: %d, want %d", runs, got, a.code)
				}
			}
			want := a.listed
			if want == exitOK {
				want = b.listed
			}
			if got := code(s, true, b.run, a.run); got != want {
				t.Errorf("%s and %s, listed: %d, want %d", a.status, b.status, got, want)
			}
		}
		stopped, cancel := context.WithCancel(context.Background())
		cancel()
		if got := code(&state{ctx: stopped}, false, a.run); got != exitInterrupted {
			t.Errorf("%s, after a signal: %d, want %d", a.status, got, exitInterrupted)
		}
	}
	// All at once, the worst in the middle.
	var all []run
	for _, r := range ranked[1:] {
		all = append(all, r.run)
	}
	all = append(all[3:], all[:3]...)
	if got := code(s, false, all...); got != exitCorrupt {
		t.Errorf("all: %d, want %d", got, exitCorrupt)
	}
}

// TestResolveError: what a cell cannot do has the exit code of the reason.
func TestResolveError(t *testing.T) {
	for _, p := range []struct {
		err  error
		code int
	}{
		{scenarios.ErrUsage, exitUsage},
		{region.ErrNotSupported, exitUnsupported},
		{region.ErrNotPermitted, exitNotPermitted},
		{errors.Join(region.ErrNotSupported, region.ErrNotPermitted), exitNotPermitted}, // one of several ways could be had
		{errors.New("it could not be told"), exitNotPermitted},
	} {
		var e *exitError
		if err := resolveError(fmt.Errorf("cell: %w", p.err)); !errors.As(err, &e) || e.code != p.code {
			t.Errorf("%v: %v, want %d", p.err, err, p.code)
		}
	}
	if err := resolveError(nil); err != nil {
		t.Error(err)
	}
}

// TestExitErrors: a code that is set is kept, and run prints the error once.
func TestExitErrors(t *testing.T) {
	inner := exitWith(exitCorrupt, errors.New("bytes differ"))
	var e *exitError
	if err := exitWith(exitFailed, fmt.Errorf("measure: %w", inner)); !errors.As(err, &e) || e.code != exitCorrupt {
		t.Errorf("%v: code %d, want %d", err, e.code, exitCorrupt)
	}
	var out, words strings.Builder
	s := &state{program: Program{Name: "memsync"}, ctx: context.Background(), args: []string{"list", "dishes"}, stdout: &out, stderr: &words}
	if code := run(s); code != exitUsage || out.Len() > 0 || !strings.HasPrefix(words.String(), "memsync: unknown word") {
		t.Errorf("exit %d, stdout %q, stderr %q", code, &out, &words)
	}
}
