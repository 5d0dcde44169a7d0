package table

import (
	"errors"
	"strconv"
	"strings"
	"testing"

	"memsync/results"
)

func sample(t *testing.T) []results.Row {
	t.Helper()
	var rows []results.Row
	for i := range 7 {
		for s, strategy := range []string{"userfaultfd", "managed-mount"} {
			cell := results.Row{RunID: strconv.Itoa(2*i + s), Strategy: strategy, RTTms: 20, Status: results.StatusOK}
			values := map[string]float64{"throughput": 1e6 * float64((i+1)*(1+99*s)), "latency_first_chunk": 0.015625 + float64(i)/(1<<16)}
			if i == 6 && s == 0 {
				cell.Status, cell.Error, values = results.StatusTimeout, "no answer in 10s", nil
			}
			r, err := results.RunRows(cell, values, 1)
			if err != nil {
				t.Fatal(err)
			}
			rows = append(rows, r...)
		}
	}
	cell := results.Row{RunID: "none", Strategy: "nbd-direct", RTTms: 20, Status: results.StatusUnsupported, Error: "no nbd"}
	r, err := results.RunRows(cell, nil, 1)
	if err != nil {
		t.Fatal(err)
	}
	return append(rows, r...)
}

func TestTable(t *testing.T) {
	tab, err := FromRows(sample(t), []string{"strategy", "rtt_ms"}, []string{"throughput", "latency_first_chunk"})
	if err != nil {
		t.Fatal(err)
	}
	for terminal, want := range map[bool]string{
		true: `strategy       rtt_ms  throughput       95 % CI             n  latency_first_chunk       95 % CI             n
userfaultfd    20       3.50 MB/s  1.00 .. 6.00  6 (1 not ok)              15.7 ms  15.6 .. 15.7  6 (1 not ok)
managed-mount  20        400 MB/s    100 .. 700             7              15.7 ms  15.6 .. 15.7             7
nbd-direct     20               –                0 (1 not ok)                    –                0 (1 not ok)
`,
		false: "strategy\trtt_ms\tthroughput\tthroughput_ci_low\tthroughput_ci_high\tthroughput_n\tthroughput_not_ok\tlatency_first_chunk\tlatency_first_chunk_ci_low\tlatency_first_chunk_ci_high\tlatency_first_chunk_n\tlatency_first_chunk_not_ok\n" +
			"userfaultfd\t20\t3.5e+06\t1e+06\t6e+06\t6\t1\t0.01566314697265625\t0.015625\t0.0157012939453125\t6\t1\n" +
			"managed-mount\t20\t4e+08\t1e+08\t7e+08\t7\t0\t0.0156707763671875\t0.015625\t0.015716552734375\t7\t0\n" +
			"nbd-direct\t20\t\t\t\t0\t1\t\t\t\t0\t1\n",
	} {
		var b strings.Builder
		if err := tab.Write(&b, terminal); err != nil {
			t.Fatal(err)
		}
		if b.String() != want {
			t.Errorf("terminal %v:\n%s\nwant\n%s", terminal, b.String(), want)
		}
	}
	if _, err := FromRows(nil, nil, []string{"speed"}); err == nil {
		t.Error("an unknown metric is accepted")
	}
	if err := tab.Write(full{}, true); !errors.Is(err, errFull) {
		t.Errorf("write error: %v", err)
	}
}

var errFull = errors.New("full")

type full struct{}

func (full) Write([]byte) (int, error) { return 0, errFull }

func TestHuman(t *testing.T) {
	for _, tc := range []struct {
		v    float64
		unit string
		want string
	}{
		{0, "s", "0 s"}, {0.0204, "s", "20.4 ms"}, {999.6e-6, "s", "1.00 ms"}, {26e-6, "s", "26.0 us"}, {3e-10, "s", "0.300 ns"}, {12345, "s", "12345 s"},
		{64 << 20, "B", "64.0 MiB"}, {5, "B", "5.00 B"}, {1.2e8, "B/s", "120 MB/s"}, {965e6, "bit/s", "965 Mbit/s"},
		{0.97, "ratio", "0.970"}, {0, "count", "0"}, {12345678, "count", "1.23e+07"}, {-0.002, "s", "-2.00 ms"},
	} {
		if got := Human(tc.v, tc.unit); got != tc.want {
			t.Errorf("Human(%v, %s) = %q, want %q", tc.v, tc.unit, got, tc.want)
		}
	}
}
