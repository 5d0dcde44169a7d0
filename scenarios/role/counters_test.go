package role

import (
	"context"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// TestCountersOfPrograms: what a role started counts as the role's own.
func TestCountersOfPrograms(t *testing.T) {
	before, err := counters(context.Background(), none{})
	if err != nil {
		t.Fatal(err)
	}
	// Two levels: the outer shell waits for the inner one, which computes and then waits.
	cmd := exec.Command("sh", "-c", `sh -c 'i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; echo done; read x'; exit 0`)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { in.Close(); _ = cmd.Wait() }()
	if _, err := out.Read(make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	after, err := counters(context.Background(), none{})
	if err != nil {
		t.Fatal(err)
	}
	pids := descendants("self")
	if len(pids) != 2 || !slices.Contains(pids, strconv.Itoa(cmd.Process.Pid)) {
		t.Errorf("descendants %v, want %d and its child", pids, cmd.Process.Pid)
	}
	// A loop of 300000 rounds takes far more than this test does between the two looks.
	if cpu := after.CPU - before.CPU; cpu < 0.05 {
		t.Errorf("%v s of CPU, want the shell's", cpu)
	}
	if after.MinorFaults-before.MinorFaults < 100 || after.ContextSwitches <= before.ContextSwitches {
		t.Errorf("before %+v, after %+v", before, after)
	}
}

// TestCountersOfEnded: what a program used counts also once it has ended, and
// where another that runs on has waited for it.
func TestCountersOfEnded(t *testing.T) {
	look := func() float64 {
		t.Helper()
		c, err := counters(context.Background(), none{})
		if err != nil {
			t.Fatal(err)
		}
		return c.CPU
	}
	const computes = `sh -c 'i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done'`
	before := look()
	if err := exec.Command("sh", "-c", computes+"; exit 0").Run(); err != nil {
		t.Fatal(err)
	}
	if cpu := look() - before; cpu < 0.05 {
		t.Errorf("a program that has ended: %v s of CPU", cpu)
	}
	cmd := exec.Command("sh", "-c", computes+"; echo done; read x; exit 0")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	before = look()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { in.Close(); _ = cmd.Wait() }()
	if _, err := out.Read(make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	if cpu := look() - before; cpu < 0.05 {
		t.Errorf("a program that waited for another: %v s of CPU", cpu)
	}
}

// TestPeak: memory that came and went counts, until the peak is forgotten.
func TestPeak(t *testing.T) {
	const size = 256 << 20
	look := func() int64 {
		t.Helper()
		c, err := counters(context.Background(), none{})
		if err != nil {
			t.Fatal(err)
		}
		return c.RSS
	}
	before := look()
	m, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Munmap(m); err != nil {
		t.Fatal(err)
	}
	// All of the test's own memory is far less than what is asked for here.
	peak := look()
	if peak < size {
		t.Errorf("%d B at %d B mapped, populated and unmapped (%d B before)", peak, size, before)
	}
	if _, err := forgetPeak(context.Background(), none{}); err != nil {
		t.Fatal(err)
	}
	_, err = os.Stat("/proc/self/clear_refs") // not there: this kernel cannot
	if now := look(); err == nil && now > peak-size/2 {
		t.Errorf("%d B after the peak of %d B was forgotten", now, peak)
	}
}
