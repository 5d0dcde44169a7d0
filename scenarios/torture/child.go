package torture

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"memsync/strategies"
	"memsync/strategies/region"
)

// Child is the hidden argument by which the program is started to run programs on a
// virtual clock: a panic, a deadlock or a loop in there costs that process only.
const Child = "torture-programs"

// job is a line to the child.
type job struct {
	Seed uint64 `json:"seed"`
	Only Filter `json:"only"`
	Dir  string `json:"dir"` // scratch
	Keep bool   `json:"keep"`
}

// result is its answer.
type result struct {
	Seed   uint64   `json:"seed"`
	Counts Counts   `json:"counts"`
	Error  string   `json:"error,omitempty"`
	Differ bool     `json:"differ,omitempty"` // the error is that bytes differ
	Trace  []string `json:"trace,omitempty"`  // of a program that failed, or of any with Keep
	Sample Sample   `json:"sample"`           // of the process, after it
}

// resultFD is where the child answers; its stdout is package testing's.
const resultFD = 3

// RunChild runs the programs that stdin names, until its end; else it returns the exit status.
// A clock of its own is to be had in a test only (testing/synctest), so this process
// is one.
func RunChild(known strategies.Registry) int {
	testing.Init()
	if err := flag.CommandLine.Parse(nil); err != nil {
		return 1
	}
	out := json.NewEncoder(os.NewFile(resultFD, "results"))
	jobs := make(chan job)
	go func() {
		in := json.NewDecoder(os.Stdin)
		for {
			var j job
			if in.Decode(&j) != nil {
				os.Exit(0) // whoever asked is gone, perhaps while a program hangs
			}
			jobs <- j
		}
	}()
	testing.Main(func(string, string) (bool, error) { return true, nil }, []testing.InternalTest{{Name: "torture", F: func(t *testing.T) {
		for j := range jobs {
			r := virtually(t, j, known)
			var m runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&m)
			r.Sample = Sample{Heap: float64(m.HeapAlloc), Goroutines: float64(runtime.NumGoroutine())}
			if err := r.Sample.sample(); err != nil {
				t.Error(err)
				return
			}
			if err := out.Encode(r); err != nil {
				return // nobody listens any more
			}
		}
	}}}, nil, nil) // ends the process
	return 1
}

// virtually runs a program on a virtual clock.
func virtually(t *testing.T, j job, known strategies.Registry) (r result) {
	r.Seed = j.Seed
	var trace []string
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		note := func(format string, a ...any) {
			trace = append(trace, fmt.Sprintf("%12v ", time.Since(began).Round(time.Millisecond))+fmt.Sprintf(format, a...))
		}
		lines := make(chan string, 1<<16) // accesses tell of themselves from goroutines of their own
		err := program(t.Context(), j, known, &r.Counts, func(format string, a ...any) {
			select {
			case lines <- fmt.Sprintf("%12v ", time.Since(began).Round(time.Millisecond)) + fmt.Sprintf(format, a...):
			default:
			}
		})
		close(lines)
		for l := range lines {
			trace = append(trace, l)
		}
		if err != nil {
			note("%v", err)
			r.Error, r.Differ = err.Error(), errors.Is(err, region.ErrMismatch)
		}
	})
	if r.Error != "" || j.Keep {
		r.Trace = trace
	}
	return r
}

// program runs the program of a seed.
func program(ctx context.Context, j job, known strategies.Registry, c *Counts, trace func(string, ...any)) error {
	if LevelOf(j.Seed) == Machines {
		return machines(j.Seed, c, trace)
	}
	p := Generate(j.Seed, virtualChoices().only(j.Only))
	trace("%s", p.describe())
	v, err := newVirtual(ctx, p, known, j.Dir)
	if err != nil {
		return fmt.Errorf("build the world: %w", err)
	}
	*c, err = execute(ctx, p, v, virtualLimits, trace)
	return errors.Join(err, v.end())
}

// describe says in a line what a program is of.
func (p Program) describe() string {
	tls := ""
	if p.TLS {
		tls = ", TLS"
	}
	return fmt.Sprintf("%s, %d bytes in chunks of %d, %d pull and %d push workers%s; %s",
		p.Combo(), p.Size, p.Chunk, p.Pull, p.Push, tls, strings.Join(p.Settings, " "))
}

// Combo is what the program is of.
func (p Program) Combo() Combo { return Combo{p.Strategy, p.Device, p.Transport, p.Backend} }
