package role

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Counters is what a role has used since it began: its process (getrusage(2),
// /proc/self) and the programs that it started, those that have ended among them once
// they were waited for (rsync, which runs for one round). Memory is of those that run.
type Counters struct {
	CPU             float64 `json:"cpu"` // s, user + system
	RSS             int64   `json:"rss"` // bytes; the peak since forgetPeak, summed over the processes
	MinorFaults     int64   `json:"minor_faults"`
	MajorFaults     int64   `json:"major_faults"`
	ContextSwitches int64   `json:"context_switches"` // voluntary + involuntary
	At              int64   `json:"at"`               // CLOCK_MONOTONIC, ns
}

func counters(context.Context, none) (Counters, error) {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		return Counters{}, err
	}
	c := Counters{
		CPU:         float64(r.Utime.Nano()+r.Stime.Nano()) / 1e9,
		MinorFaults: r.Minflt, MajorFaults: r.Majflt, ContextSwitches: r.Nvcsw + r.Nivcsw, At: monotonic(),
	}
	if err := unix.Getrusage(unix.RUSAGE_CHILDREN, &r); err != nil {
		return Counters{}, err
	}
	c.CPU += float64(r.Utime.Nano()+r.Stime.Nano()) / 1e9
	c.MinorFaults, c.MajorFaults, c.ContextSwitches = c.MinorFaults+r.Minflt, c.MajorFaults+r.Majflt, c.ContextSwitches+r.Nvcsw+r.Nivcsw
	c.RSS = peak("self")
	for _, pid := range descendants("self") {
		c.add(pid)
	}
	return c, nil
}

// peak is the most memory that a process had resident since it began, or since
// forgetPeak; 0 where it has ended. Source: VmHWM of proc_pid_status(5).
func peak(pid string) int64 {
	b, _ := os.ReadFile("/proc/" + pid + "/status")
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 10, 64)
			return kib << 10
		}
	}
	return 0
}

// settle collects what was needed until now, so that the cycle that this process's start
// makes due does not fall into the first request of a run, where it took a
// millisecond; and forgets the peak. The workload only forgets: it must not collect at
// all (docs/deadlocks.md).
func settle(ctx context.Context, n none) (none, error) {
	runtime.GC()
	return forgetPeak(ctx, n)
}

// forgetPeak makes what is resident now the peak of this process and of those that it
// started. A kernel without CONFIG_PROC_PAGE_MONITOR cannot: there the peak is that
// since the process began. Source: 5 in clear_refs of proc_pid_clear_refs(5); Linux 4.0.
// Soft-dirty bits stay.
func forgetPeak(context.Context, none) (none, error) {
	for _, pid := range append(descendants("self"), "self") {
		f, err := os.OpenFile("/proc/"+pid+"/clear_refs", os.O_WRONLY, 0)
		if err == nil {
			_, err = f.WriteString("5")
			err = errors.Join(err, f.Close())
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ESRCH) {
			return none{}, fmt.Errorf("forget the peak of resident memory: %w", err)
		}
	}
	return none{}, nil
}

// descendants lists the processes that pid started, and so on. Linux 4.2
// (CONFIG_PROC_CHILDREN); none where the kernel does not tell.
func descendants(pid string) (pids []string) {
	tasks, _ := filepath.Glob("/proc/" + pid + "/task/*/children")
	for _, t := range tasks {
		b, _ := os.ReadFile(t) // it may have ended
		for _, child := range strings.Fields(string(b)) {
			pids = append(append(pids, child), descendants(child)...)
		}
	}
	return pids
}

// add counts another process in, and those that it has waited for (their CPU time in
// units of 10 ms). One that has ended counts with the process that waited for it.
// Source: proc_pid_stat(5), proc_pid_status(5).
func (c *Counters) add(pid string) {
	n, err := strconv.Atoi(pid)
	if err != nil {
		return
	}
	var t unix.Timespec
	if unix.ClockGettime(int32(^n<<3|2), &t) == nil { // the clock of another process: clock_getcpuclockid(3)
		c.CPU += float64(t.Nano()) / 1e9
	}
	b, _ := os.ReadFile("/proc/" + pid + "/stat")
	if i := bytes.LastIndexByte(b, ')'); i >= 0 {
		if f := strings.Fields(string(b[i+1:])); len(f) > 21 { // f[0] is field 3
			number := func(field int) int64 { v, _ := strconv.ParseInt(f[field-3], 10, 64); return v }
			const ticks = 100 // USER_HZ of all architectures that Go runs on
			c.CPU += float64(number(16)+number(17)) / ticks
			c.MinorFaults += number(10) + number(11)
			c.MajorFaults += number(12) + number(13)
		}
	}
	c.RSS += peak(pid)
	statuses, _ := filepath.Glob("/proc/" + pid + "/task/*/status")
	for _, s := range statuses {
		b, _ := os.ReadFile(s)
		for line := range strings.Lines(string(b)) {
			if _, v, ok := strings.Cut(line, "ctxt_switches:"); ok {
				k, _ := strconv.ParseInt(strings.TrimSpace(v), 10, 64)
				c.ContextSwitches += k
			}
		}
	}
}
