package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// BenchmarkLab measures what docs/bars.md says of the lab kernel and of NBD devices
// in it, with bin/memsync-peers (make peers): how long a lab takes to start, how
// long a device takes to open by RTT, and the sequential read of a managed mount
// against nbdkit's with the same settings of the kernel's, in turn, in one guest.
// The values are medians of -benchtime Nx rounds.
func BenchmarkLab(b *testing.B) {
	k := kernel(b)
	program, err := filepath.Abs("../../bin/memsync-peers")
	if err != nil {
		b.Fatal(err)
	}
	if _, err := os.Stat(program); err != nil {
		b.Skipf("%v: make peers builds it", err)
	}
	inside := func(b *testing.B, args ...string) []byte {
		b.Helper()
		ctx, cancel := context.WithTimeout(b.Context(), 2*time.Minute)
		defer cancel()
		var out, words bytes.Buffer
		if status, err := k.Run(ctx, Command{Args: args, Stdout: &out, Stderr: &words}); err != nil || status != 0 {
			b.Fatalf("%q: status %d, %v\n%s%s", args, status, err, out.String(), words.String())
		}
		return out.Bytes()
	}
	b.Run("start", func(b *testing.B) {
		var took []float64
		for b.Loop() {
			start := time.Now()
			inside(b, "true")
			took = append(took, time.Since(start).Seconds())
		}
		b.ReportMetric(median(took), "s/start")
	})
	for _, rtt := range []int{1, 20, 40, 100} {
		b.Run(fmt.Sprintf("open/rtt=%dms", rtt), func(b *testing.B) {
			out := inside(b, program, "measure", "--strategy", "nbd-direct", "--device", "nbd", "--shaper", "netem", "--rtt", fmt.Sprintf("%dms", rtt),
				"--rate", "1gbit", "--size", "4MiB", "--runs", fmt.Sprint(b.N), "--json")
			b.ReportMetric(median(values(b, out, "open_latency"))*1e3, "ms/open")
			b.ReportMetric(float64(3*rtt+200), "ms-allowed")
		})
	}
	for name, set := range map[string]string{"read_ahead=1MiB": "--set read_ahead=1MiB", "read_ahead=kernel": ""} {
		b.Run("sequential/"+name, func(b *testing.B) {
			measure := program + " measure --shaper netem --rtt 20ms --rate 1gbit --size 64MiB --backend file --runs 1 --json " + set
			out := inside(b, "sh", "-ec", fmt.Sprintf("n=%d; while test $n -gt 0; do n=$((n-1)); %s --strategy nbdkit; %s --strategy managed-mount --device nbd; done", b.N, measure, measure))
			all := values(b, out, "throughput")
			var theirs, ours []float64
			for i, v := range all {
				if i%2 == 0 {
					theirs = append(theirs, v)
				} else {
					ours = append(ours, v)
				}
			}
			b.ReportMetric(median(theirs)/1e6, "MB/s-nbdkit")
			b.ReportMetric(median(ours)/1e6, "MB/s-managed")
			b.ReportMetric(median(ours)/median(theirs), "ratio")
		})
	}
}

// values returns a metric of each run in the objects that measure --json printed.
func values(b *testing.B, text []byte, metric string) (all []float64) {
	b.Helper()
	for d := json.NewDecoder(bytes.NewReader(text)); d.More(); {
		var o struct {
			Runs []struct {
				Status  string
				Metrics map[string]struct{ Value float64 }
			}
		}
		if err := d.Decode(&o); err != nil {
			b.Fatal(err)
		}
		for _, r := range o.Runs {
			m, ok := r.Metrics[metric]
			if r.Status != "ok" || !ok {
				b.Fatal(errors.New("a run is " + r.Status + ", or lacks " + metric))
			}
			all = append(all, m.Value)
		}
	}
	return all
}

func median(v []float64) float64 {
	slices.Sort(v)
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}
