package program

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"memsync/strategies/region"
)

func sh(script string) Step { return Step{Argv: []string{"sh", "-c", script, "sh", Path}} }

func file(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "region")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// What a program prints is compared with what it prints of another file, all of it
// or as far as it went.
func TestCompare(t *testing.T) {
	p := Program{Name: "test", Steps: []Step{sh(`head -c 3 "$1"`), {Argv: []string{"cat"}, Stdin: "path " + Path + "\n"}, sh(`cat "$1"; sleep 60`)}}
	p.Steps[1].Stdin = "fixed\n"
	whole := p
	whole.Steps = append([]Step{}, p.Steps[:2]...)
	whole.Steps = append(whole.Steps, sh(`cat "$1"; echo more`))
	want, got := t.TempDir(), t.TempDir()
	good := file(t, "some content\n")
	r, err := Run(t.Context(), whole, good, want, 0)
	if err != nil || !r.All || r.Steps != 3 || r.First <= 0 || r.First > r.Took {
		t.Fatalf("%+v, %v", r, err)
	}
	if r, err = Run(t.Context(), p, good, got, 2*time.Second); err != nil || r.All || r.Steps != 3 {
		t.Fatalf("a step beyond the budget: %+v, %v", r, err)
	}
	if n, err := Compare(p, r, got, want); err != nil || n != 3+6+13 {
		t.Errorf("as far as it went: %d bytes, %v", n, err)
	}
	r.All = true
	if _, err := Compare(p, r, got, want); !errors.Is(err, region.ErrMismatch) {
		t.Errorf("output that is too short: %v", err)
	}
	for _, content := range []string{"some contents", "some", "sOme content\n"} {
		r, err := Run(t.Context(), whole, file(t, content), got, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Compare(whole, r, got, want); !errors.Is(err, region.ErrMismatch) {
			t.Errorf("%q: %v", content, err)
		}
	}
}

// The first step ends whatever the budget is, and what it is that failed is said.
func TestRunErrors(t *testing.T) {
	r, err := Run(t.Context(), Program{Steps: []Step{sh("sleep 0.2"), sh("sleep 60")}}, "x", t.TempDir(), time.Millisecond)
	if err != nil || r.First < 200*time.Millisecond || r.All {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := Run(t.Context(), Program{Name: "gone", Steps: []Step{{Argv: []string{"no-such-program"}}}}, "x", t.TempDir(), 0); !errors.Is(err, region.ErrNotSupported) {
		t.Error(err)
	}
	if _, err := Run(t.Context(), Program{Name: "bad", Steps: []Step{sh("echo why >&2; exit 3")}}, "x", t.TempDir(), 0); err == nil || !strings.Contains(err.Error(), "status 3: why") {
		t.Error(err)
	}
}

// Who looks at 20 lines a second waits where one comes late, and not where they come early.
func TestStalls(t *testing.T) {
	early := sh("echo 1; echo 2; echo 3; sleep 0.01")
	early.Rate = 0.1
	late := sh("echo 1; echo 2; sleep 3; echo 3; echo 4")
	late.Rate = 2
	for _, c := range []struct {
		step Step
		wait time.Duration
	}{{early, 0}, {late, 500 * time.Millisecond}} { // two lines are for a second, and a busy machine may be late to read the first
		r, err := Run(t.Context(), Program{Steps: []Step{c.step}}, "x", t.TempDir(), 0)
		if err != nil || !r.Rated {
			t.Fatalf("%+v, %v", r, err)
		}
		if r.Stalled < c.wait || (c.wait == 0) != (r.Stalled == 0) {
			t.Errorf("waited %v, want %v", r.Stalled, c.wait)
		}
	}
}
