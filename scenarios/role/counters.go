package role

import (
	"bytes"
	"context"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// Counters is what a process has used since it began (getrusage(2), /proc/self).
type Counters struct {
	CPU             float64 `json:"cpu"` // s, user + system
	RSS             int64   `json:"rss"` // bytes now
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
	if b, err := os.ReadFile("/proc/self/statm"); err == nil {
		if f := bytes.Fields(b); len(f) > 1 {
			pages, _ := strconv.ParseInt(string(f[1]), 10, 64)
			c.RSS = pages * int64(os.Getpagesize())
		}
	}
	return c, nil
}
