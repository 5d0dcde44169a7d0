package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"memsync/scenarios"
	"memsync/strategies/peers"
)

// TestMain makes this binary be memsync-peers where it is called by that name, or
// by the one under which it starts itself (roles, the lab's init).
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"memsync-peers": main, "memsync": main})
}

// TestScripts runs testdata/script with the real program. The condition lab is
// true unless LAB=0; needs PROGRAM... skips a script where a peer's program is
// missing, and fails it where MEMSYNC_MUST_RUN names peers; exits CODE COMMAND
// wants that exit status.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error { // the lab kernel's cache
			for _, k := range []string{"HOME", "XDG_CACHE_HOME", "MEMSYNC_LAB_CACHE", "MEMSYNC_MUST_RUN"} {
				if v, ok := os.LookupEnv(k); ok {
					e.Setenv(k, v)
				}
			}
			e.Setenv("PATH", e.Getenv("PATH")+":/usr/sbin:/sbin")
			return nil
		},
		Condition: func(c string) (bool, error) {
			if c == "lab" {
				return os.Getenv("LAB") != "0", nil
			}
			return false, fmt.Errorf("unknown condition %q", c)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"needs": func(ts *testscript.TestScript, _ bool, programs []string) {
				for _, p := range programs {
					if _, err := exec.LookPath(p); err == nil {
						continue
					}
					if _, err := os.Stat("/usr/sbin/" + p); err == nil {
						continue
					}
					if strings.Contains(ts.Getenv("MEMSYNC_MUST_RUN"), "peers") {
						ts.Fatalf("%s is not installed", p)
					}
					t.Skipf("%s is not installed", p)
				}
			},
			"exits": func(ts *testscript.TestScript, _ bool, args []string) {
				code := 0
				if err := ts.Exec(args[1], args[2:]...); err != nil {
					var exit *exec.ExitError
					if !errors.As(err, &exit) {
						ts.Fatalf("%v", err)
					}
					code = exit.ExitCode()
				}
				if fmt.Sprint(code) != args[0] {
					ts.Fatalf("exit status %d, want %s", code, args[0])
				}
			},
		},
	})
}

// TestDocs: docs/peers.md has every strategy and figure that memsync has not.
func TestDocs(t *testing.T) {
	doc, err := os.ReadFile("../../../../docs/peers.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range peers.Peers().Names() {
		if !strings.Contains(string(doc), "| `"+n+"` |") {
			t.Errorf("docs/peers.md has no line on %s", n)
		}
	}
	for _, f := range peers.Figures() {
		if err := f.Spec.Check(); err != nil {
			t.Error(err)
		}
		for _, s := range f.More {
			if err := s.Check(); err != nil {
				t.Error(err)
			}
		}
		if !strings.Contains(string(doc), "run "+f.Spec.Name) {
			t.Errorf("docs/peers.md does not say how to run %s", f.Spec.Name)
		}
		for _, c := range f.Cells(scenarios.Network, false) {
			c.Strategies = program().Strategies
			if err := c.Resolve(); errors.Is(err, scenarios.ErrUsage) {
				t.Errorf("%s, %s: %v", f.Spec.Name, c.Strategy, err)
			}
		}
	}
}

// TestIndependence: nothing of the peers is a dependency of the main module.
func TestIndependence(t *testing.T) {
	cmd := exec.Command("go", "list", "-m", "all")
	cmd.Dir = "../../../.."
	cmd.Env = append(os.Environ(), "GOWORK=off")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if m := regexp.MustCompile(`(?m)^.*(go-nbd|userfaultfd-go|strategies/peers).*$`).Find(out); m != nil {
		t.Errorf("the main module depends on %s", m)
	}
}
