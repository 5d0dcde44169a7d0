// Package torture is the fault campaign: random programs of reads, writes, syncs,
// reopenings and kills against a plain byte slice, while links, processes and
// backends fail (docs/torture.md). A program follows from its seed alone. It runs at one of three
// levels: Virtual and Machines on clocks of their own, which gives hours of schedule a
// second, and Processes with what users run.
package torture

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"memsync/strategies"
)

// Options say what to run.
type Options struct {
	Known    strategies.Registry
	Seed     uint64
	Time     time.Duration // how long; programs under way are finished
	Programs int           // stop after so many; 0 is no limit
	Levels   []string      // empty is all
	Only     Filter
	Scratch  string // an existing folder; empty is the temporary one. With level Processes this process is in the sandbox
	Jobs     int    // programs at once on virtual clocks; 0 is one for each CPU but one
	// Ended, unless nil, is told of each program, by one goroutine at a time.
	Ended func(Ended)
	// Soak: fail where a process that runs programs grows, by its trend (see grown).
	Soak bool
}

// Ended says how a program ended.
type Ended struct {
	Seed    uint64        `json:"seed"`
	Level   string        `json:"level"`
	Program string        `json:"program"` // what it is of
	Error   string        `json:"error,omitempty"`
	Differ  bool          `json:"bytes_differ,omitempty"`
	Trace   []string      `json:"trace,omitempty"`
	Only    Filter        `json:"-"`
	Took    time.Duration `json:"took_ns"`
	Counts  Counts        `json:"counts"`
}

// Replay is the command that runs the program again, without the name of the binary.
func (e Ended) Replay() string {
	s := fmt.Sprintf("torture --replay %d", e.Seed)
	if e.Only != (Filter{}) {
		s += " --only " + e.Only.String()
	}
	return s
}

// Report sums a campaign up.
type Report struct {
	Seed     uint64            `json:"seed"`
	Took     time.Duration     `json:"took_ns"`
	Programs map[string]int    `json:"programs"` // by level
	Counts   map[string]Counts `json:"counts"`
	Combos   map[string]int    `json:"combinations"` // programs with real processes, by strategy/device/transport/backend
	// Missing are combinations that cannot be had here, and why.
	Missing  map[string]string `json:"missing"`
	Failures []Ended           `json:"failures"`
	// Soaked are the first and the last sample of each process that ran programs on a virtual
	// clock, and how many there were.
	Soaked []Soaked `json:"soaked,omitempty"`
}

// Soaked is how a process changed while it ran programs.
type Soaked struct {
	Programs int    `json:"programs"`
	First    Sample `json:"first"`
	Last     Sample `json:"last"`
	Error    string `json:"error,omitempty"` // it grew
}

// ErrNothing: no combination passes the filter here.
var ErrNothing = errors.New("nothing to run")

// wallLimit is how long a program on a virtual clock may take on ours.
const wallLimit = 2 * time.Minute

// heapLimit is how much memory a child may hold between two programs.
const heapLimit = 256 << 20

// maxFailures ends a campaign early.
const maxFailures = 20

// campaign is a Run under way.
type campaign struct {
	o      Options
	dir    string
	combos []Combo
	end    time.Time

	mu     sync.Mutex
	rng    *rand.Rand
	given  int
	report *Report
}

// Run runs programs until the time is over, the programs are run, or ctx ends. The
// error is that of the campaign; broken invariants are in the Report.
func Run(ctx context.Context, o Options) (*Report, error) {
	dir, err := os.MkdirTemp(o.Scratch, "memsync-torture-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	c := &campaign{o: o, dir: dir, end: time.Now().Add(o.Time), rng: rand.New(rand.NewPCG(o.Seed, 0)),
		report: &Report{Seed: o.Seed, Programs: map[string]int{}, Counts: map[string]Counts{}, Combos: map[string]int{}, Missing: map[string]string{}, Failures: []Ended{}}}
	began := time.Now()
	want := func(level string) bool { return len(o.Levels) == 0 || slices.Contains(o.Levels, level) }
	var virtual []string
	if want(Virtual) && !virtualChoices().only(o.Only).empty() && o.Only.Device == "" {
		virtual = append(virtual, Virtual)
	}
	if want(Machines) && o.Only == (Filter{}) {
		virtual = append(virtual, Machines)
	}
	if want(Processes) {
		if c.combos, c.report.Missing, err = available(o); err != nil {
			return nil, err
		}
	}
	if len(virtual) == 0 && len(c.combos) == 0 {
		var why []string
		for combo, reason := range c.report.Missing {
			why = append(why, combo+": "+reason)
		}
		slices.Sort(why)
		return nil, fmt.Errorf("%w: %s with levels %v: %s", ErrNothing, o.Only, o.Levels, strings.Join(why, "; "))
	}
	jobs := o.Jobs
	if jobs == 0 {
		jobs = max(1, runtime.NumCPU()-1)
	}
	var workers sync.WaitGroup
	errs := make([]error, jobs+1)
	for i := range jobs {
		if len(virtual) > 0 {
			workers.Go(func() { errs[i] = c.virtual(ctx, virtual) })
		}
	}
	if len(c.combos) > 0 {
		workers.Go(func() { errs[jobs] = c.processes(ctx) })
	}
	workers.Wait()
	c.report.Took = time.Since(began)
	return c.report, errors.Join(errs...)
}

// next returns the seed of a program of one of the levels; ok is false where the campaign is over.
func (c *campaign) next(ctx context.Context, of []string) (seed uint64, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if ctx.Err() != nil || time.Now().After(c.end) || c.o.Programs > 0 && c.given >= c.o.Programs || len(c.report.Failures) >= maxFailures {
		return 0, false
	}
	c.given++
	level := of[0]
	if len(of) > 1 && c.rng.IntN(3) == 0 {
		level = of[1]
	}
	n := uint64(len(levels))
	return c.rng.Uint64N(1<<50)/n*n + uint64(slices.Index(levels[:], level)), true
}

func (c *campaign) ended(e Ended) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.report
	r.Programs[e.Level]++
	k := r.Counts[e.Level]
	k.add(e.Counts)
	r.Counts[e.Level] = k
	if e.Level == Processes {
		r.Combos[e.Program]++
	}
	if e.Error != "" {
		if e.Level != Processes { // else it is what this machine chose from
			e.Only = c.o.Only
		}
		r.Failures = append(r.Failures, e)
	}
	if c.o.Ended != nil {
		c.o.Ended(e)
	}
}

// virtual runs programs on virtual clocks, in children of this process.
func (c *campaign) virtual(ctx context.Context, of []string) error {
	var k *child
	var samples []Sample
	soaked := func() {
		if c.o.Soak && len(samples) > 0 {
			c.soaked(samples)
		}
		samples = nil
	}
	defer soaked()
	defer func() {
		if k != nil {
			k.stop()
		}
	}()
	for {
		seed, ok := c.next(ctx, of)
		if !ok {
			return nil
		}
		if k == nil {
			var err error
			if k, err = startChild(); err != nil {
				return err
			}
		}
		began := time.Now()
		r, err := k.run(ctx, job{Seed: seed, Only: c.o.Only, Dir: c.dir})
		if ctx.Err() != nil {
			return nil
		}
		e := Ended{Seed: seed, Level: LevelOf(seed), Counts: r.Counts, Error: r.Error, Differ: r.Differ, Trace: r.Trace, Took: time.Since(began)}
		switch {
		case err != nil: // it died: that is a finding, too
			e.Error = err.Error()
			k = nil
			soaked()
		case r.Sample.Heap > heapLimit:
			e.Error = broken("memory is bounded", "%.0f bytes are in use after the program, more than %d", r.Sample.Heap, heapLimit).Error()
		}
		if err == nil {
			samples = append(samples, r.Sample)
		}
		c.ended(e)
	}
}

// soaked notes how a process changed.
func (c *campaign) soaked(samples []Sample) {
	s := Soaked{Programs: len(samples), First: samples[0], Last: samples[len(samples)-1]}
	if err := grown(samples); err != nil {
		s.Error = err.Error()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report.Soaked = append(c.report.Soaked, s)
}

// Replay runs one program again and returns how it ended, with its trace. One with
// processes is run on what the machine has that passes the filter.
func Replay(ctx context.Context, o Options, seed uint64) (Ended, error) {
	dir, err := os.MkdirTemp(o.Scratch, "memsync-torture-")
	if err != nil {
		return Ended{}, err
	}
	defer os.RemoveAll(dir)
	if LevelOf(seed) == Processes {
		combos, _, err := available(o)
		if err != nil {
			return Ended{}, err
		}
		if len(combos) == 0 {
			return Ended{}, fmt.Errorf("%w: %s", ErrNothing, o.Only)
		}
		return runProcesses(ctx, o, seed, combos, dir, true), nil
	}
	if LevelOf(seed) == Virtual && virtualChoices().only(o.Only).empty() {
		return Ended{}, fmt.Errorf("%w: %s", ErrNothing, o.Only)
	}
	k, err := startChild()
	if err != nil {
		return Ended{}, err
	}
	began := time.Now()
	r, err := k.run(ctx, job{Seed: seed, Only: o.Only, Dir: dir, Keep: true})
	e := Ended{Seed: seed, Level: LevelOf(seed), Counts: r.Counts, Error: r.Error, Differ: r.Differ, Trace: r.Trace, Only: o.Only, Took: time.Since(began)}
	if err != nil {
		e.Error = err.Error()
		return e, ctx.Err()
	}
	k.stop()
	return e, ctx.Err()
}

// child is a process that runs programs on virtual clocks.
type child struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *json.Decoder
	end *os.File
	log *bytes.Buffer // its last words; not to be looked at before it has ended
}

func startChild() (_ *child, err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer w.Close()
	k := &child{cmd: exec.Command("/proc/self/exe", Child), end: r, out: json.NewDecoder(r), log: &bytes.Buffer{}}
	k.cmd.Args[0] = "memsync"
	k.cmd.ExtraFiles = []*os.File{w}
	k.cmd.Stdout, k.cmd.Stderr = k.log, k.log
	// A process group of its own: a terminal's Ctrl-C is for the campaign to deal with.
	k.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if k.in, err = k.cmd.StdinPipe(); err == nil {
		err = k.cmd.Start()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start a process for programs: %w", err), r.Close())
	}
	return k, nil
}

// stop ends the child, which is idle.
func (k *child) stop() {
	_ = k.in.Close()
	t := time.AfterFunc(5*time.Second, func() { _ = k.cmd.Process.Kill() })
	defer t.Stop()
	_ = k.cmd.Wait() // what it had to say it has said
	_ = k.end.Close()
}

// run has the child run a program. An error says that the child is no more, and with what words.
func (k *child) run(ctx context.Context, j job) (r result, err error) {
	line, err := json.Marshal(j)
	if err != nil {
		return r, err
	}
	if _, err = k.in.Write(append(line, '\n')); err == nil {
		done := make(chan error, 1)
		go func() { done <- k.out.Decode(&r) }()
		t := time.NewTimer(wallLimit)
		defer t.Stop()
		select {
		case err = <-done:
			if err == nil {
				return r, nil
			}
		case <-t.C:
			err = broken(byDeadline, "the program still runs after %v", wallLimit)
			_ = k.cmd.Process.Signal(syscall.SIGQUIT) // which has it print what its goroutines do
			k.kill()
			<-done
		case <-ctx.Done():
			err = ctx.Err()
			_ = k.cmd.Process.Kill()
			<-done
		}
	}
	k.kill()
	_ = k.in.Close()
	_ = k.cmd.Wait()
	_ = k.end.Close()
	words := k.log.String()
	if len(words) > 8000 {
		words = words[:8000] + "\n..."
	}
	if !errors.Is(err, errBroken) && ctx.Err() == nil {
		err = broken("the process lives", "it ended (%v)", k.cmd.ProcessState)
	}
	return result{Seed: j.Seed}, fmt.Errorf("%w\n%s", err, strings.TrimSpace(words))
}

// kill ends the child, which gets a moment to end by itself.
func (k *child) kill() {
	time.AfterFunc(2*time.Second, func() { _ = k.cmd.Process.Kill() })
}
