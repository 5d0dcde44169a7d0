package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"memsync/cmd/cli"
	"memsync/netem"
	"memsync/results"
	"memsync/scenarios"
	"memsync/scenarios/lab"
)

// TestMain makes this binary be memsync where it is called by that name: so do
// the scripts, and so does memsync itself (sandbox, roles).
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"memsync": main, "uncalibrated-figures": func() {
		p := program()
		p.Name, p.Figures = "uncalibrated-figures", []scenarios.Figure{uncalibrated()}
		os.Exit(cli.Main(p))
	}})
}

// uncalibrated is a figure whose link no shaper makes, and of one cell no machine.
func uncalibrated() scenarios.Figure {
	const name = "uncalibrated"
	return scenarios.Figure{
		Spec: results.FigureSpec{Name: name, Title: name, Kind: results.FigureLine, X: results.Axis{Column: "rtt_ms", Label: "RTT", Unit: "ms"},
			Y: results.Axis{Column: "throughput", Label: "Throughput", Unit: "B/s"}, Keys: []string{"strategy"}},
		Variants: []string{scenarios.Network},
		Cells: func(string, bool) []*scenarios.Cell {
			cell := func() *scenarios.Cell {
				return &scenarios.Cell{Figure: name, Strategy: "direct-mount", Size: 64 << 10, Limit: scenarios.WholeRegion, Budget: time.Second,
					Link: netem.Profile{RTT: time.Millisecond, Rate: 100e9}}
			}
			missing := cell()
			missing.Device = "uffd" // which this strategy does not have
			return []*scenarios.Cell{cell(), missing}
		},
	}
}

func underRaceDetector() bool {
	info, _ := debug.ReadBuildInfo()
	return slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// TestScripts runs testdata/script: the real program, in folders of its own.
//
// Beside testscript's own commands there are
//
//	exits CODE COMMAND...       run it; it must exit with CODE
//	report N STATUS [KEY=VALUE...]  stdout is the object of measure --json, valid by its
//	                            schema, with N runs of that status;
//	                            each cell.KEY is VALUE
//	metric NAME LOW HIGH        stdout is such an object; in every run the metric lies between;
//	                            "! metric NAME": no run has it
//	calibrated COMMAND...       run it; up to five times more where it says that the link was not
//	                            what it should be, as on a machine that is busy otherwise
//	lines N FILE                the file has N lines
//	awaits FILE                 until the file is there
//
// The condition lab is true unless LAB=0, or where this is the lab already; race is true under the
// race detector: what reads results and writes files in one goroutine is left out there.
func TestScripts(t *testing.T) {
	schema := compileSchema(t)
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error { // the lab kernel's cache
			if cache, err := lab.CacheDir(os.Getenv); err == nil {
				e.Setenv("MEMSYNC_LAB_CACHE", cache)
			}
			tmp := e.Getenv("TMPDIR")
			e.Defer(func() { // of a script that failed: servers outlive their command
				if left, _ := filepath.Glob(filepath.Join(tmp, "memsync-services-*")); len(left) > 0 {
					down := exec.Command("/proc/self/exe")
					down.Args, down.Env = []string{"memsync", "services", "down"}, append(os.Environ(), "TMPDIR="+tmp)
					if out, err := down.CombinedOutput(); err != nil {
						t.Errorf("services down: %v: %s", err, out)
					}
				}
			})
			return nil
		},
		Condition: func(c string) (bool, error) {
			switch c {
			case "lab":
				return os.Getenv("LAB") != "0" && os.Getenv("MEMSYNC_LAB") != "1", nil
			case "race":
				return underRaceDetector(), nil
			}
			return false, fmt.Errorf("unknown condition %q", c)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits": func(ts *testscript.TestScript, _ bool, args []string) {
				want, err := strconv.Atoi(args[0])
				ts.Check(err)
				code := 0
				if err := ts.Exec(args[1], args[2:]...); err != nil {
					var exit *exec.ExitError
					if !errors.As(err, &exit) {
						ts.Fatalf("%v", err)
					}
					code = exit.ExitCode()
				}
				if code != want {
					ts.Fatalf("exit status %d, want %d", code, want)
				}
			},
			"report": func(ts *testscript.TestScript, _ bool, args []string) {
				ts.Check(checkReport(schema, ts.ReadFile("stdout"), args[0], args[1], args[2:]))
			},
			"calibrated": func(ts *testscript.TestScript, _ bool, args []string) {
				var err error
				for range 6 {
					var exit *exec.ExitError
					if err = ts.Exec(args[0], args[1:]...); !errors.As(err, &exit) || exit.ExitCode() != 5 {
						break
					}
				}
				ts.Check(err)
			},
			"metric": func(ts *testscript.TestScript, absent bool, args []string) {
				o, err := jsonObject(schema, ts.ReadFile("stdout"))
				ts.Check(err)
				if absent {
					for i, run := range o.Runs {
						if m, ok := run.Metrics[args[0]]; ok {
							ts.Fatalf("run %d: %s is %v, want none", i+1, args[0], m.Value)
						}
					}
					return
				}
				low, err := strconv.ParseFloat(args[1], 64)
				ts.Check(err)
				high, err := strconv.ParseFloat(args[2], 64)
				ts.Check(err)
				for i, run := range o.Runs {
					if m, ok := run.Metrics[args[0]]; !ok || m.Value < low || m.Value > high {
						ts.Fatalf("run %d: %s is %v (there: %t), want %v to %v", i+1, args[0], m.Value, ok, low, high)
					}
				}
			},
			"awaits": func(ts *testscript.TestScript, _ bool, args []string) {
				for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
					if _, err := os.Lstat(ts.MkAbs(args[0])); err == nil {
						return
					} else if time.Now().After(end) {
						ts.Fatalf("%v", err)
					}
				}
			},
			"lines": func(ts *testscript.TestScript, _ bool, args []string) {
				if n := strings.Count(ts.ReadFile(args[1]), "\n"); strconv.Itoa(n) != args[0] {
					ts.Fatalf("%s has %d lines, want %s", args[1], n, args[0])
				}
			},
		},
	})
}

func compileSchema(t *testing.T) *jsonschema.Schema {
	t.Helper()
	s, err := jsonschema.NewCompiler().Compile("../../docs/measure.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// object is the part of measure's JSON object that tests look into.
type object struct {
	Cell map[string]any
	Runs []struct {
		Status, Error string
		Verified      bool
		Metrics       map[string]struct{ Value float64 }
	}
}

// jsonObject decodes what measure --json printed, if it is valid by its schema.
func jsonObject(schema *jsonschema.Schema, text string) (o object, err error) {
	v, err := jsonschema.UnmarshalJSON(strings.NewReader(text))
	if err != nil {
		return o, err
	}
	if err := schema.Validate(v); err != nil {
		return o, err
	}
	dec := json.NewDecoder(strings.NewReader(text))
	dec.UseNumber()
	return o, dec.Decode(&o)
}

func checkReport(schema *jsonschema.Schema, text, runs, status string, cell []string) error {
	r, err := jsonObject(schema, text)
	if err != nil {
		return err
	}
	if strconv.Itoa(len(r.Runs)) != runs {
		return fmt.Errorf("%d runs, want %s", len(r.Runs), runs)
	}
	for i, run := range r.Runs {
		if run.Status != status {
			return fmt.Errorf("run %d is %s (%s), want %s", i+1, run.Status, run.Error, status)
		}
	}
	for _, kv := range cell {
		k, want, _ := strings.Cut(kv, "=")
		if got := fmt.Sprint(r.Cell[k]); got != want {
			return fmt.Errorf("cell.%s is %s, want %s", k, got, want)
		}
	}
	return nil
}

// eachCommand calls f for every command that users see.
func eachCommand(f func(*cobra.Command)) {
	for _, c := range program().Commands() {
		if c.Name() != "help" && c.Name() != "completion" && !c.Hidden {
			f(c)
		}
	}
}

// TestCommands: every command has a script that calls it, an example, and lines
// in docs/cli.md for itself and for each of its flags.
func TestCommands(t *testing.T) {
	doc, err := os.ReadFile("../../docs/cli.md")
	if err != nil {
		t.Fatal(err)
	}
	eachCommand(func(c *cobra.Command) {
		script, err := os.ReadFile(filepath.Join("testdata", "script", c.Name()+".txtar"))
		if err != nil || !strings.Contains(string(script), "memsync "+c.Name()) {
			t.Errorf("command %s has no script that calls it: %v", c.Name(), err)
		}
		if !strings.Contains(c.Example, "memsync "+c.Name()) || c.Short == "" {
			t.Errorf("command %s lacks an example or a description", c.Name())
		}
		_, section, ok := strings.Cut(string(doc), "\n## memsync "+c.Name())
		if !ok {
			t.Errorf("docs/cli.md has no section on %s", c.Name())
			return
		}
		section, _, _ = strings.Cut(section, "\n## ")
		c.LocalFlags().VisitAll(func(f *pflag.Flag) {
			if f.Name != "help" && !strings.Contains(section, "`--"+f.Name) {
				t.Errorf("docs/cli.md, section on %s, lacks --%s", c.Name(), f.Name)
			}
			if f.Usage == "" {
				t.Errorf("%s --%s has no description", c.Name(), f.Name)
			}
		})
	})
}
