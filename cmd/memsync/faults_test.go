package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"memsync/results"
	"memsync/strategies/all"
	"memsync/strategies/region"
	"memsync/strategies/replay"
)

// patience is how long a wait may take in these tests before it counts as hung.
const patience = 40 * time.Second

// lockedBuffer can be read while a process writes to it.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// command is a memsync under way, with a temporary folder of its own. All its
// processes have that folder's path in their environment: so they are found.
type command struct {
	t      *testing.T
	cmd    *exec.Cmd
	dir    string // working folder
	tmp    string
	nbd    []string       // block devices that were attached when it started
	nets   map[netns]bool // network namespaces that its processes were seen in, but for our own
	seen   map[int]bool   // processes whose namespace has been looked at
	own    string         // our network namespace
	stdout lockedBuffer
	stderr lockedBuffer
	done   chan struct{}
}

// attached lists the kernel's nbd devices that have a client.
func attached() []string {
	devices, _ := filepath.Glob("/sys/block/nbd*/pid")
	return devices
}

// needNBD skips where the kernel has no nbd device, which the lab kernel must have.
func needNBD(t *testing.T) {
	t.Helper()
	switch err := all.ProbeDevice("nbd"); {
	case err == nil:
	case os.Getenv("MEMSYNC_LAB") == "1" || !errors.Is(err, region.ErrNotSupported):
		t.Fatal(err)
	default:
		t.Skipf("%v (TestKernelPackages of scenarios/lab runs this test in the lab kernel)", err)
	}
}

// launch starts memsync in dir.
func launch(t *testing.T, dir string, args ...string) *command {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = "memsync"
	return start(t, dir, cmd)
}

// launchIn starts memsync in a mount namespace, and with user in a user namespace, where
// a shell script has changed something first.
func launchIn(t *testing.T, script string, user bool, args ...string) *command {
	t.Helper()
	cmd := exec.Command("sh", append([]string{"-c", "set -e; " + script + `; exec memsync "$@"`, "memsync"}, args...)...) // in PATH by testscript
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}                                                // which keeps its mounts to itself
	if user = user || os.Geteuid() != 0; user {
		cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	return start(t, t.TempDir(), cmd)
}

func start(t *testing.T, dir string, cmd *exec.Cmd) *command {
	t.Helper()
	c := &command{t: t, cmd: cmd, dir: dir, tmp: t.TempDir(), nbd: attached(), nets: map[netns]bool{}, seen: map[int]bool{}, done: make(chan struct{})}
	var err error
	if c.own, err = os.Readlink("/proc/self/ns/net"); err != nil {
		t.Fatal(err)
	}
	c.cmd.Dir = dir
	c.cmd.Env = append(os.Environ(), "TMPDIR="+c.tmp)
	c.cmd.Stdout, c.cmd.Stderr = &c.stdout, &c.stderr
	if c.cmd.SysProcAttr == nil {
		c.cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	c.cmd.SysProcAttr.Setpgid = true
	c.cmd.WaitDelay = time.Second
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = c.cmd.Wait()
		close(c.done)
	}()
	t.Cleanup(func() {
		_ = unix.Kill(-c.cmd.Process.Pid, unix.SIGKILL)
		<-c.done
		if t.Failed() {
			t.Logf("%s\nstdout: %.2000s\nstderr: %s", strings.Join(c.cmd.Args, " "), c.stdout.String(), c.stderr.String())
		}
	})
	return c
}

// processes returns the command's processes, by number, with their arguments;
// those that have ended and wait to be collected are left out.
func (c *command) processes() map[int]string {
	m := map[int]string{}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		env, err := os.ReadFile(d + "/environ")
		if err != nil || !bytes.Contains(append([]byte{0}, env...), []byte("\x00TMPDIR="+c.tmp+"\x00")) {
			continue
		}
		args, _ := os.ReadFile(d + "/cmdline")
		pid, _ := strconv.Atoi(filepath.Base(d))
		if len(args) > 0 {
			m[pid] = strings.TrimSuffix(strings.ReplaceAll(string(args), "\x00", " "), " ")
			c.note(pid)
		}
	}
	return m
}

// note remembers the network namespace of a process, for gone. Only root may look at
// one; as an ordinary user, memsync has them in a user namespace of its own, too.
func (c *command) note(pid int) {
	if os.Geteuid() != 0 || c.seen[pid] {
		return
	}
	path := fmt.Sprintf("/proc/%d/ns/net", pid)
	link, err := os.Readlink(path)
	if err != nil {
		return
	}
	if c.seen[pid] = true; link == c.own {
		return
	}
	if n, err := openNetns(path); err == nil {
		c.nets[n] = true
	}
}

// find waits for a process: source, daemon, workload, outer or inner.
func (c *command) find(who string) int {
	c.t.Helper()
	pid := 0
	c.until("there is a process "+who, func() bool {
		for p, args := range c.processes() {
			switch {
			case strings.HasPrefix(args, "memsync role "+who),
				who == "outer" && p == c.cmd.Process.Pid,
				who == "inner" && c.isInner(p):
				pid = p
			}
		}
		return pid != 0
	})
	return pid
}

// isInner reports whether a process is the outer one's child, in the sandbox.
func (c *command) isInner(pid int) bool {
	status, err1 := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	env, err2 := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	return err1 == nil && err2 == nil && bytes.Contains(env, []byte("\x00MEMSYNC_SANDBOX=")) &&
		strings.Contains(string(status), fmt.Sprintf("\nPPid:\t%d\n", c.cmd.Process.Pid))
}

// until waits for a condition while the command runs.
func (c *command) until(what string, ok func() bool) {
	c.t.Helper()
	for end := time.Now().Add(patience); !ok(); {
		select {
		case <-c.done:
			if !ok() {
				c.t.Fatalf("memsync ended (%v) before %s", c.cmd.ProcessState, what)
			}
			return
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(end) {
			c.t.Fatalf("after %v still not: %s", patience, what)
		}
	}
}

func (c *command) signal(pid int, sig unix.Signal) {
	c.t.Helper()
	c.processes() // a last look at their namespaces
	if err := unix.Kill(pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
		c.t.Fatal(err)
	}
}

// exit waits for the command's end and checks its exit status; -1 is a signal.
func (c *command) exit(want int, within time.Duration) {
	c.t.Helper()
	select {
	case <-c.done:
	case <-time.After(within):
		for pid := range c.processes() {
			stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
			stack, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stack", pid))
			c.t.Logf("%.200s\n%s", stat, stack)
		}
		c.t.Fatalf("memsync does not end within %v", within)
	}
	if got := c.cmd.ProcessState.ExitCode(); got != want {
		c.t.Errorf("exit status %d (%v), want %d", got, c.cmd.ProcessState, want)
	}
}

// gone checks that the command left nothing: no process, hence none in D state, none of
// the network namespaces that its processes were seen in (they have no names, only
// processes, descriptors and mounts hold them), no mount, no block device, and after
// memsync clean no scratch folder.
func (c *command) gone() {
	c.t.Helper()
	left := c.processes()
	for end := time.Now().Add(patience / 2); len(left) > 0 && time.Now().Before(end); left = c.processes() {
		time.Sleep(5 * time.Millisecond)
	}
	for pid, args := range left {
		c.t.Errorf("process %d is left: %s", pid, args)
	}
	held := holders(c.nets)
	for end := time.Now().Add(patience / 2); len(held) > 0 && time.Now().Before(end); held = holders(c.nets) {
		time.Sleep(5 * time.Millisecond)
	}
	for _, h := range held {
		c.t.Errorf("network namespace is left: %s", h)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		c.t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, c.tmp) {
			c.t.Errorf("mount is left: %s", line)
		}
	}
	var devices []string
	for end := time.Now().Add(patience / 2); ; time.Sleep(5 * time.Millisecond) {
		devices = slices.DeleteFunc(attached(), func(d string) bool { return slices.Contains(c.nbd, d) })
		if len(devices) == 0 || time.Now().After(end) {
			break
		}
	}
	for _, d := range devices {
		c.t.Errorf("block device is left attached: %s", filepath.Dir(d))
	}
	// A folder that its process was killed before or after it owned it, in making or removing it,
	// could be one that is just being made: clean takes it a minute later.
	folders, _ := filepath.Glob(filepath.Join(c.tmp, "memsync-run-*"))
	for _, dir := range folders {
		if _, err := os.Stat(filepath.Join(dir, "owner")); errors.Is(err, fs.ErrNotExist) {
			old := time.Now().Add(-2 * time.Minute)
			if err := os.Chtimes(dir, old, old); err != nil && !errors.Is(err, fs.ErrNotExist) {
				c.t.Error(err)
			}
		}
	}
	clean := exec.Command("/proc/self/exe", "clean")
	clean.Args[0] = "memsync"
	clean.Env = append(os.Environ(), "TMPDIR="+c.tmp)
	if out, err := clean.CombinedOutput(); err != nil {
		c.t.Errorf("memsync clean: %v: %s", err, out)
	}
	if dirs, _ := os.ReadDir(c.tmp); len(dirs) > 0 {
		c.t.Errorf("%s is left in the temporary folder", dirs[0].Name())
	}
}

// slow are flags of a run over the wire that reads for many seconds.
var slow = []string{"--size", "32MiB", "--think", "2ms", "--runs", "1", "--budget", "30s", "--json"}

func measureArgs(strategy string, more ...string) []string {
	return slices.Concat([]string{"measure", "--strategy", strategy}, slow, more)
}

// TestInterrupt: SIGINT, SIGTERM and SIGHUP in each phase end with 130, a valid
// object, and nothing left over.
func TestInterrupt(t *testing.T) {
	schema := compileSchema(t)
	seed := replay.Seed(t)
	calibrating := func(c *command) {
		c.until("it calibrates", func() bool { return strings.Contains(c.stderr.String(), "calibrating") })
	}
	// A phase, and for how long after its beginning the signal may come.
	type phase struct {
		begins func(*command)
		within time.Duration
	}
	atOnce := phase{func(*command) {}, 0}
	after := func(who string, d time.Duration) phase {
		return phase{func(c *command) { c.find(who) }, d}
	}
	for name, p := range map[string]struct {
		args  []string
		phase phase
		sig   unix.Signal
		group bool // to all processes, as a terminal does
	}{
		"start":                {measureArgs("direct-mount"), atOnce, unix.SIGINT, true},
		"start later":          {measureArgs("direct-mount"), phase{func(*command) {}, 100 * time.Millisecond}, unix.SIGTERM, false},
		"calibration":          {measureArgs("direct-mount", "--rtt", "20ms"), phase{calibrating, 500 * time.Millisecond}, unix.SIGINT, true},
		"calibration, SIGTERM": {measureArgs("userfaultfd", "--shaper", "tun", "--rtt", "20ms", "--rate", "1gbit"), phase{calibrating, 500 * time.Millisecond}, unix.SIGTERM, false},
		"mount": {measureArgs("managed-mount", "--transport", "local", "--shaper", "sleep", "--rtt", "10s", "--set", "pull_first=1MiB"),
			after("workload", 500*time.Millisecond), unix.SIGTERM, false},
		"measuring, direct":          {measureArgs("direct-mount", "--transport", "local"), after("workload", time.Second), unix.SIGINT, true},
		"measuring, managed":         {measureArgs("managed-mount", "--transport", "local", "--op", "write"), after("workload", time.Second), unix.SIGTERM, false},
		"measuring, faults":          {measureArgs("userfaultfd", "--transport", "local"), after("workload", time.Second), unix.SIGHUP, false},
		"measuring, faults over tun": {measureArgs("userfaultfd", "--shaper", "tun", "--rtt", "20ms"), after("workload", time.Second), unix.SIGINT, true},
		"in a fault":                 {measureArgs("userfaultfd", "--transport", "local", "--shaper", "sleep", "--rtt", "10s"), after("workload", time.Second), unix.SIGINT, false},
		"in a fault, fuse":           {measureArgs("direct-mount", "--transport", "local", "--shaper", "sleep", "--rtt", "10s"), after("workload", time.Second), unix.SIGINT, true},
		"mount, nbd": {measureArgs("managed-mount", "--device", "nbd", "--transport", "local", "--shaper", "sleep", "--rtt", "10s", "--set", "pull_first=1MiB"),
			after("workload", 500*time.Millisecond), unix.SIGTERM, false},
		"measuring, nbd, direct":     {measureArgs("direct-mount", "--device", "nbd", "--rtt", "2ms"), after("workload", time.Second), unix.SIGINT, true},
		"measuring, nbd, managed":    {measureArgs("managed-mount", "--device", "nbd", "--op", "write"), after("workload", time.Second), unix.SIGTERM, false},
		"measuring, nbd, nbd-direct": {measureArgs("nbd-direct", "--op", "write", "--rtt", "2ms"), after("workload", time.Second), unix.SIGHUP, true},
		"in a fault, nbd":            {measureArgs("direct-mount", "--device", "nbd", "--transport", "local", "--shaper", "sleep", "--rtt", "10s"), after("workload", time.Second), unix.SIGINT, true},
	} {
		t.Run(name, func(t *testing.T) {
			if strings.Contains(name, "nbd") {
				needNBD(t)
			}
			t.Parallel()
			c := launch(t, t.TempDir(), p.args...)
			p.phase.begins(c)
			h := fnv.New64a()
			h.Write([]byte(name))
			time.Sleep(time.Duration(rand.New(rand.NewPCG(seed, h.Sum64())).Int64N(int64(p.phase.within) + 1))) // any moment of the phase will do
			pid := c.cmd.Process.Pid
			if p.group {
				pid = -pid
			}
			if strings.HasPrefix(name, "start") { // before that, Go's own handler ends it
				c.find("inner")
			}
			c.signal(pid, p.sig)
			c.exit(130, patience)
			if strings.HasPrefix(name, "start") && c.stdout.String() == "" { // before there was anything to say
				c.gone()
				return
			}
			if err := checkReport(schema, c.stdout.String(), "1", "interrupted", nil); err != nil && !strings.Contains(err.Error(), "0 runs") {
				t.Error(err)
			}
			c.gone()
		})
	}
}

// TestInterruptAnywhere: verification, floors, start and end of processes are too
// short to be aimed at, so signals come at random moments of many short runs.
func TestInterruptAnywhere(t *testing.T) {
	schema := compileSchema(t)
	rng := rand.New(rand.NewPCG(replay.Seed(t), 1))
	for i, strategy := range []string{"memory", "direct-mount", "managed-mount", "userfaultfd", "nbd-direct"} {
		wait := time.Duration(300+rng.IntN(500)) * time.Millisecond
		t.Run(strategy, func(t *testing.T) {
			if strategy == "nbd-direct" {
				needNBD(t)
			}
			t.Parallel()
			args := []string{"measure", "--strategy", strategy, "--transport", "local", "--size", "16MiB", "--runs", "1000", "--json"}
			if i%2 == 1 {
				args = append(args, "--op", "write")
			}
			if strategy == "userfaultfd" {
				args = args[:len(args)-2]
			}
			c := launch(t, t.TempDir(), args...)
			c.find("workload")
			time.Sleep(wait)
			c.signal(c.cmd.Process.Pid, unix.SIGINT)
			c.exit(130, patience)
			v, err := jsonObject(schema, c.stdout.String())
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range v.Runs {
				if r.Status != "ok" && r.Status != "interrupted" {
					t.Errorf("a run is %s: %s", r.Status, r.Error)
				}
			}
			c.gone()
		})
	}
}

// TestKill: SIGKILL of any process ends the command with an error, within a
// deadline; nothing is left and nothing counts as measured.
func TestKill(t *testing.T) {
	schema := compileSchema(t)
	rng := rand.New(rand.NewPCG(replay.Seed(t), 2))
	for _, name := range []string{"userfaultfd", "direct-mount", "managed-mount", "direct-mount, nbd", "managed-mount, nbd", "nbd-direct"} {
		strategy, device, _ := strings.Cut(name, ", ")
		for _, victim := range []string{"source", "daemon", "workload", "inner", "outer"} {
			if strategy != "direct-mount" && (victim == "inner" || victim == "outer") {
				continue
			}
			wait := time.Duration(50+rng.IntN(500)) * time.Millisecond
			t.Run(name+"/"+victim, func(t *testing.T) {
				if strings.Contains(name, "nbd") {
					needNBD(t)
				}
				t.Parallel()
				c := launch(t, t.TempDir(), measureArgs(strategy, "--pull-workers", "0", "--device", cmp.Or(device, "auto"))...)
				pid := c.find(victim)
				c.find("workload")
				time.Sleep(wait)
				if victim == "source" { // first stopped: the workload then waits in a fault
					c.signal(pid, unix.SIGSTOP)
					time.Sleep(300 * time.Millisecond)
				}
				c.signal(pid, unix.SIGKILL)
				if os.Geteuid() == 0 && len(c.nets) < 2 { // the source's and the destination's
					t.Errorf("its processes were seen in %d network namespaces of their own", len(c.nets))
				}
				switch victim {
				case "outer":
					c.exit(-1, patience)
				case "inner":
					c.exit(1, patience)
					if !strings.Contains(c.stderr.String(), "the measuring process ended: signal: killed") {
						t.Error("the error does not name the cause")
					}
				default:
					began := time.Now()
					c.exit(1, patience)
					if took := time.Since(began); took > patience/2 {
						t.Errorf("the error took %v", took)
					}
					if err := checkReport(schema, c.stdout.String(), "1", "failed", nil); err != nil {
						t.Error(err)
					}
					if !strings.Contains(c.stderr.String(), victim) {
						t.Errorf("the error does not name the %s", victim)
					}
				}
				c.gone()
			})
		}
	}
}

// TestResume: a sweep that is ended again and again, by SIGKILL, SIGINT or SIGTERM, ends
// with every planned run recorded exactly once, and at no moment has records of a link
// without its calibration.
func TestResume(t *testing.T) {
	t.Parallel()
	seed := replay.Seed(t)
	rng := rand.New(rand.NewPCG(seed, 3))
	dir := t.TempDir()
	out := filepath.Join(dir, "r")
	args := []string{"run", "gc-tail", "--quick", "--runs", "3", "--budget", "5ms", "--shard", "1/2", "--out", "r"}
	const planned = 9 // of 6 cells
	// overLink are the recorded runs that crossed the link; cut says that the last run may be torn.
	overLink := func(cut bool) (n int) {
		t.Helper()
		rows, err := results.Read(out)
		if err != nil && !(cut && errors.Is(err, results.ErrUnclosed)) {
			t.Fatal(err)
		}
		for _, r := range rows {
			if r.Metric == results.RunMetric && r.Transport == "nbd" && r.Status != results.StatusInterrupted {
				n++
			}
		}
		return n
	}
	evidence := func(sweeps int, cut bool) {
		t.Helper()
		m, err := results.ReadManifest(out)
		if err != nil {
			t.Fatal(err)
		}
		if n := overLink(cut); n > 0 && len(m.Calibrations) == 0 {
			t.Errorf("%d runs are recorded over a link that has no calibration", n)
		}
		seen := map[string]bool{}
		for _, c := range m.Calibrations {
			if seen[string(c)] {
				t.Errorf("a calibration is in the manifest twice: %.200s", c)
			}
			seen[string(c)] = true
		}
		if len(m.Calibrations) > sweeps || len(m.Links) != len(m.Calibrations) {
			t.Errorf("after %d sweeps over one link: %d links and %d calibrations", sweeps, len(m.Links), len(m.Calibrations))
		}
	}
	sweeps := 0
	for i, sig := range []unix.Signal{unix.SIGKILL, unix.SIGINT, unix.SIGTERM, unix.SIGKILL} {
		sweeps++
		c := launch(t, dir, args...)
		pid := c.find("inner")
		if i == 0 { // the first one ends with evidence to keep
			c.until("a run over the link is recorded", func() bool {
				_, err := os.Stat(filepath.Join(out, results.RunsFile))
				return err == nil && overLink(true) > 0
			})
		}
		select {
		case <-c.done:
		case <-time.After(time.Duration(rng.IntN(700)) * time.Millisecond):
		}
		if sig != unix.SIGKILL || rng.IntN(2) == 0 {
			pid = c.cmd.Process.Pid
		}
		c.signal(pid, sig)
		<-c.done
		switch code := c.cmd.ProcessState.ExitCode(); {
		case code == 0: // all was recorded before the signal came
		case sig != unix.SIGKILL && code != 130:
			t.Errorf("%v: exit status %d, want 130", sig, code)
		}
		c.gone()
		if _, err := os.Stat(filepath.Join(out, results.RunsFile)); err == nil {
			evidence(sweeps, sig == unix.SIGKILL)
		}
	}
	sweeps++
	c := launch(t, dir, args...)
	c.exit(0, 2*patience)
	c.gone()
	evidence(sweeps, false)
	rows, err := results.Read(out)
	if err != nil {
		t.Fatal(err)
	}
	closed := map[string]int{}
	for _, r := range rows {
		if r.Metric == results.RunMetric && r.Status != results.StatusInterrupted {
			closed[r.RunID]++
		}
		if r.Status != results.StatusOK {
			t.Errorf("run %s is %s: %s", r.RunID, r.Status, r.Error)
		}
	}
	if len(closed) != planned {
		t.Errorf("%d runs are recorded, want %d", len(closed), planned)
	}
	for id, n := range closed {
		if n != 1 {
			t.Errorf("run %s is recorded %d times", id, n)
		}
	}
	histograms, err := results.ReadHistograms(out)
	if err != nil {
		t.Fatal(err)
	}
	for id := range closed {
		if histograms[results.TouchHistogram][id] == "" {
			t.Errorf("run %s is recorded without its histogram", id)
		}
	}
}

// TestTogether: two at once do not disturb each other in folders of their own;
// in one folder the second is told so.
func TestTogether(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	args := func(out string) []string {
		return []string{"run", "gc-tail", "--quick", "--runs", "1", "--budget", "5ms", "--shard", "1/3", "--out", out}
	}
	first := launch(t, dir, args("a")...)
	first.until("records begin", func() bool { _, err := os.Stat(filepath.Join(dir, "a", "runs.csv")); return err == nil })
	first.signal(first.find("inner"), unix.SIGSTOP) // so that it does not end before the second looks
	second := launch(t, dir, args("a")...)
	second.exit(1, patience)
	if !strings.Contains(second.stderr.String(), "another memsync is writing there") {
		t.Error("the second in one folder is not told why it cannot")
	}
	first.signal(first.find("inner"), unix.SIGCONT)
	other := launch(t, dir, args("b")...)
	other.exit(0, 2*patience)
	first.exit(0, 2*patience)
	for _, c := range []*command{first, second, other} {
		c.gone()
	}
}

// TestInputChanges: an input file that shrinks or changes under a run.
func TestInputChanges(t *testing.T) {
	schema := compileSchema(t)
	const size = 8 << 20
	for name, p := range map[string]struct {
		change func(path string) error
		exit   int
		status string
		say    string
	}{
		"shrinks": {func(path string) error { return os.Truncate(path, 100) }, 1, "failed", "shrank"},
		"changes": {func(path string) error { // one byte in the middle of what is read
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			_, err = f.WriteAt([]byte{0xFF}, 5000)
			return errors.Join(err, f.Close())
		}, 3, "corrupt", "offset 4096"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			in := filepath.Join(dir, "input")
			if err := os.WriteFile(in, make([]byte, size), 0o600); err != nil {
				t.Fatal(err)
			}
			c := launch(t, dir, "measure", "--strategy", "direct-mount", "--transport", "local", "--input", in, "--runs", "1", "--budget", "1s", "--think", "1ms", "--json")
			c.find("workload")
			time.Sleep(500 * time.Millisecond) // it reads; the daemon has had the file in memory since before
			if err := p.change(in); err != nil {
				t.Fatal(err)
			}
			c.exit(p.exit, patience)
			if err := checkReport(schema, c.stdout.String(), "1", p.status, nil); err != nil {
				t.Error(err)
			}
			if !strings.Contains(c.stderr.String(), p.say) {
				t.Errorf("the error does not say %q", p.say)
			}
			c.gone()
		})
	}
}

// TestInputShrinksInFault: the source cannot read what a fault of the workload
// asks for (a block that it fills only when it is needed): an error that names
// the cause across three processes, never zeroes.
func TestInputShrinksInFault(t *testing.T) {
	schema := compileSchema(t)
	const eager, more = 512 << 20, 64 << 20 // backend.Memory fills the first 512 MiB at once
	for _, strategy := range []string{"userfaultfd"} {
		t.Run(strategy, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			in := filepath.Join(dir, "input")
			if err := errors.Join(os.WriteFile(in, nil, 0o600), os.Truncate(in, eager+more)); err != nil { // sparse
				t.Fatal(err)
			}
			c := launch(t, dir, "measure", "--strategy", strategy, "--input", in, "--pull-workers", "0", "--access", "reverse", "--think", "1ms",
				"--budget", "20s", "--runs", "1", "--json")
			c.find("workload")
			time.Sleep(time.Second)
			if err := os.Truncate(in, eager); err != nil {
				t.Fatal(err)
			}
			c.exit(1, patience)
			if err := checkReport(schema, c.stdout.String(), "1", "failed", nil); err != nil {
				t.Error(err)
			}
			if !strings.Contains(c.stderr.String(), "shrank") {
				t.Error("the error does not name the cause")
			}
			c.gone()
		})
	}
}

// TestMissingDevice: a device that is not there, or in whose place something else lies,
// is told with what to do about it, by exit status and object.
func TestMissingDevice(t *testing.T) {
	schema := compileSchema(t)
	for name, p := range map[string]struct {
		hide   string // shell
		args   []string
		exit   int
		status string
		say    string
	}{
		"fuse": {"mount --bind /dev/null /dev/fuse", []string{"--strategy", "direct-mount", "--device", "fuse"}, 5, "failed",
			"open /dev/fuse: it is device 1:3 .*mknod -m 666 /dev/fuse c 10 229"},
		"tun": {"mount --bind /dev/null /dev/net/tun", []string{"--strategy", "direct-mount", "--shaper", "tun", "--rtt", "1ms"}, 5, "failed",
			"open /dev/net/tun: .*it is device 1:3 .*mknod -m 666 /dev/net/tun c 10 200"},
		"tun, none": {"mount -t tmpfs none /dev/net", []string{"--strategy", "direct-mount", "--shaper", "tun", "--rtt", "1ms"}, 4, "unsupported",
			"open /dev/net/tun: .*modprobe tun.*--device /dev/net/tun"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, format := range [][]string{{"--json"}, nil} {
				c := launchIn(t, p.hide, false, slices.Concat([]string{"measure", "--size", "64KiB", "--runs", "2"}, p.args, format)...)
				c.exit(p.exit, patience)
				if !regexp.MustCompile(p.say).MatchString(c.stderr.String()) {
					t.Errorf("stderr does not say %q: %s", p.say, c.stderr.String())
				}
				if format == nil {
					if c.stdout.String() != "" {
						t.Errorf("stdout: %s", c.stdout.String())
					}
				} else if err := checkReport(schema, c.stdout.String(), "2", p.status, nil); err != nil {
					t.Error(err)
				} else if o, _ := jsonObject(schema, c.stdout.String()); !regexp.MustCompile(p.say).MatchString(o.Runs[1].Error) {
					t.Errorf("the run does not say %q: %s", p.say, o.Runs[1].Error)
				}
				c.gone()
			}
		})
	}
}

// TestRefused: where the kernel makes no sandbox, nothing is measured: exit status 5, what
// to do, and an object whose runs all failed.
func TestRefused(t *testing.T) {
	schema := compileSchema(t)
	for _, kind := range []string{"mnt", "pid"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			forbid := "echo 0 >/proc/sys/user/max_" + kind + "_namespaces"
			c := launchIn(t, forbid, true, "measure", "--strategy", "direct-mount", "--size", "64KiB", "--runs", "3", "--json")
			c.exit(5, patience)
			const say = "start in a sandbox .*; run as root, or allow user namespaces .*max_mnt_namespaces"
			if !regexp.MustCompile(say).MatchString(c.stderr.String()) {
				t.Errorf("stderr does not say %q: %s", say, c.stderr.String())
			}
			if err := checkReport(schema, c.stdout.String(), "3", "failed", []string{"strategy=direct-mount", "region_bytes=65536"}); err != nil {
				t.Error(err)
			}
			c.gone()
			c = launchIn(t, forbid, true, "run", "gc-tail", "--quick", "--out", "r")
			c.exit(5, patience)
			if _, err := os.Stat(filepath.Join(c.dir, "r")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("records were begun: %v", err)
			}
			c.gone()
		})
	}
}

// TestUnprivileged: an ordinary user gets the same where user namespaces are
// allowed, else exit status 5 and what to do.
func TestUnprivileged(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Log("this test runs as an ordinary user already")
	}
	t.Parallel()
	schema := compileSchema(t)
	for _, args := range [][]string{
		{"--strategy", "memory"}, {"--strategy", "userfaultfd", "--transport", "local"}, {"--strategy", "direct-mount"},
	} {
		t.Run(args[1], func(t *testing.T) {
			dir, err := os.MkdirTemp("", "memsync-test-")
			if err != nil {
				t.Fatal(err)
			}
			defer os.RemoveAll(dir)
			self, err := os.ReadFile("/proc/self/exe")
			if err != nil {
				t.Fatal(err)
			}
			binary := filepath.Join(dir, "memsync")
			if err := errors.Join(os.WriteFile(binary, self, 0o755), os.Chmod(dir, 0o777)); err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), binary, append([]string{"measure", "--size", "1MiB", "--runs", "1", "--json"}, args...)...)
			cmd.Dir, cmd.Env = dir, []string{"HOME=" + dir, "TMPDIR=" + dir, "PATH=" + os.Getenv("PATH")}
			cmd.WaitDelay = time.Second
			if os.Geteuid() == 0 {
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
			}
			var stdout, stderr bytes.Buffer
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			err = cmd.Run()
			switch code := cmd.ProcessState.ExitCode(); code {
			case 0:
				if err := checkReport(schema, stdout.String(), "1", "ok", nil); err != nil {
					t.Error(err)
				}
			case 5:
				t.Logf("not permitted here: %s", &stderr)
				if !strings.Contains(stderr.String(), "root") && !strings.Contains(stderr.String(), "sysctl") && !strings.Contains(stderr.String(), "chmod") {
					t.Error("the error has no remedy")
				}
			default:
				t.Errorf("exit status %d: %v: %s", code, err, &stderr)
			}
			if dirs, _ := filepath.Glob(filepath.Join(dir, "memsync-run-*")); len(dirs) > 0 {
				t.Errorf("%s is left", dirs[0])
			}
		})
	}
}
