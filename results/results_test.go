package results

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// testCell is a row with every cell column set.
func testCell(id string) Row {
	return Row{
		RunID: id, Figure: "throughput-rttvar-1", Variant: "network", Strategy: "managed-mount", Device: "fuse",
		Transport: "nbd", Backend: "memory", Kernel: "6.18.1", Shaper: "tun", RTTms: 20, RTTMeasuredms: Num(20.4),
		Jitterms: 0.1, Loss: 0.01, RateMbit: 1000, RateMeasuredMbit: Num(965.125), RegionBytes: 64 << 20, ChunkBytes: 65536,
		Op: "read", Access: "seq", PullWorkers: 4, PushWorkers: 2, CPUs: "source=0,daemon=1", Params: `a="x,y";handlers=4`,
		Run: 3, Order: 17, Seed: math.MaxUint64, Status: StatusOK,
	}
}

func testRun(t testing.TB, id string) []Row {
	t.Helper()
	rows, err := RunRows(testCell(id), map[string]float64{"throughput": 1.0 / 3 * 1e9, "cpu_daemon": 0, "rtt_measured": 5e-324}, 2.5)
	if err != nil {
		t.Fatal(err)
	}
	return rows
}

func mustAppend(t testing.TB, w *Writer, rows []Row) {
	t.Helper()
	if err := w.Append(rows...); err != nil {
		t.Fatal(err)
	}
}

// failedRun is a run that ended with an error of two lines.
func failedRun(t testing.TB, id string, s Status) []Row {
	t.Helper()
	cell := testCell(id)
	cell.Status, cell.Error = s, "dial source: \"10.0.0.1\", refused\nsecond line"
	rows, err := RunRows(cell, nil, 1)
	if err != nil {
		t.Fatal(err)
	}
	return rows
}

func TestRoundTrip(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	w, err := Create(dir, NewManifest())
	if err != nil {
		t.Fatal(err)
	}
	want := slices.Concat(testRun(t, "one"), failedRun(t, "two", StatusFailed), testRun(t, "three"))
	mustAppend(t, w, testRun(t, "one"))
	mustAppend(t, w, failedRun(t, "two", StatusFailed))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal("second Close:", err)
	}
	if w, err = Open(dir); err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if w.Dropped() != 0 {
		t.Errorf("dropped %d bytes of whole records", w.Dropped())
	}
	mustAppend(t, w, testRun(t, "three"))
	got, err := Read(dir)
	if err != nil {
		t.Fatal(err)
	}
	for i := range want {
		want[i].Error = strings.ReplaceAll(want[i].Error, "\n", "; ")
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("read\n%+v\nwrote\n%+v", got, want)
	}
	if v, ok := got[4].Value.Get(); ok || v != 0 || got[4].Status != StatusFailed {
		t.Errorf("failed run reads as %+v", got[4])
	}
	closed := ClosedRuns(got)
	if len(closed) != 3 || closed["two"] != StatusFailed {
		t.Errorf("closed runs: %v", closed)
	}
	if s, ok := w.Closed("two"); !ok || s != StatusFailed {
		t.Errorf("Closed(two) = %v, %v", s, ok)
	}
	if _, ok := w.Closed("four"); ok {
		t.Error("Closed(four) is true")
	}
}

func TestCreateAndOpenRefuse(t *testing.T) {
	dir := t.TempDir()
	if _, err := Open(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Open without records: %v", err)
	}
	w, err := Create(dir, Manifest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); !errors.Is(err, ErrLocked) {
		t.Errorf("second Open: %v", err)
	}
	if _, err := Create(dir, Manifest{}); !errors.Is(err, ErrLocked) {
		t.Errorf("second Create: %v", err)
	}
	w.Close()
	if _, err := Create(dir, Manifest{}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("Create over records: %v", err)
	}
	if err := w.Append(testRun(t, "late")...); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("Append after Close: %v", err)
	}
}

func TestAppendRefuses(t *testing.T) {
	w, err := Create(t.TempDir(), Manifest{})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	mustAppend(t, w, testRun(t, "done"))
	edit := func(f func([]Row) []Row) []Row { return f(testRun(t, "new")) }
	for name, tc := range map[string]struct {
		rows []Row
		want string
	}{
		"none":           {nil, "no rows"},
		"again":          {testRun(t, "done"), "recorded already"},
		"not closed":     {edit(func(r []Row) []Row { return r[:2] }), "last row"},
		"two runs":       {slices.Concat(testRun(t, "x"), testRun(t, "y")), "last row"},
		"mixed":          {edit(func(r []Row) []Row { r[1].RunID = "z"; return r }), "run_id"},
		"metric twice":   {edit(func(r []Row) []Row { r[1] = r[0]; return r }), "appears twice"},
		"unknown metric": {edit(func(r []Row) []Row { r[0].Metric = "speed"; return r }), "no entry"},
		"unit":           {edit(func(r []Row) []Row { r[0].Unit = "MB/s"; return r }), "unit"},
		"cell differs":   {edit(func(r []Row) []Row { r[1].RTTms = 40; return r }), "rtt_ms"},
		"no status":      {edit(func(r []Row) []Row { r[0].Status = ""; return r }), "status"},
		"empty value":    {edit(func(r []Row) []Row { r[0].Value = Number{}; return r }), "value"},
		"ok with error":  {edit(func(r []Row) []Row { r[0].Error = "x"; return r }), "error"},
		"no run_id":      {edit(func(r []Row) []Row { r[0].RunID = ""; return r }), "run_id"},
		"NaN":            {edit(func(r []Row) []Row { r[0].Loss = math.NaN(); return r }), "loss"},
	} {
		if err := w.Append(tc.rows...); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: error %v, want one with %q", name, err, tc.want)
		}
	}
	failed := failedRun(t, "f", StatusFailed)
	failed[0].Value = Num(0)
	if err := w.Append(failed...); err == nil {
		t.Error("a failed run with the value 0 was accepted")
	}
	if _, err := RunRows(testCell("x"), map[string]float64{"speed": 1}, 1); err == nil {
		t.Error("RunRows accepts an unknown metric")
	}
	if rows, err := Read(w.dir); err != nil || len(ClosedRuns(rows)) != 1 {
		t.Errorf("after refusals: %d rows, %v", len(rows), err)
	}
}

func TestInterruptedRunIsRepeated(t *testing.T) {
	dir := t.TempDir()
	w, err := Create(dir, Manifest{})
	if err != nil {
		t.Fatal(err)
	}
	mustAppend(t, w, failedRun(t, "a", StatusInterrupted))
	w.Close()
	if rows, _ := Read(dir); len(rows) != 1 || len(ClosedRuns(rows)) != 0 {
		t.Errorf("rows %v", rows)
	}
	if w, err = Open(dir); err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, ok := w.Closed("a"); ok {
		t.Error("an interrupted run counts as closed")
	}
	mustAppend(t, w, testRun(t, "a"))
	rows, err := Read(dir)
	if err != nil || !reflect.DeepEqual(rows, testRun(t, "a")) {
		t.Errorf("after the repeat: %v, %v", rows, err)
	}
}

// TestCutAtEveryByte cuts records at each byte, as a kill could, and goes on.
func TestCutAtEveryByte(t *testing.T) {
	base := t.TempDir()
	w, err := Create(base, Manifest{})
	if err != nil {
		t.Fatal(err)
	}
	run := func(i int) []Row { // short, since every byte costs an fsync
		rows, err := RunRows(Row{RunID: strconv.Itoa(i), Params: `"`, Status: StatusOK}, map[string]float64{"throughput": 1}, 1)
		if err != nil {
			t.Fatal(err)
		}
		return rows
	}
	ends := []int64{}
	for i := range 2 {
		mustAppend(t, w, run(i))
		ends = append(ends, w.size)
	}
	w.Close()
	whole, err := os.ReadFile(filepath.Join(base, RunsFile))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	path := filepath.Join(dir, RunsFile)
	for n := range len(whole) + 1 {
		if err := os.WriteFile(path, whole[:n], 0o666); err != nil {
			t.Fatal(err)
		}
		want := 0
		for _, e := range ends {
			if int64(n) >= e {
				want++
			}
		}
		rows, err := Read(path)
		if err != nil && !errors.Is(err, ErrUnclosed) {
			t.Fatalf("cut at %d: %v", n, err)
		}
		atEnd := n == 0 || n == len(strings.Join(Header(), ","))+1 || slices.Contains(ends, int64(n))
		if atEnd != (err == nil) || len(ClosedRuns(rows)) != want || len(rows) != 2*want {
			t.Fatalf("cut at %d: %d rows of %d runs, want %d; %v", n, len(rows), len(ClosedRuns(rows)), want, err)
		}
		w, err := Open(dir)
		if err != nil {
			t.Fatalf("cut at %d: %v", n, err)
		}
		for i := range 2 {
			if _, ok := w.Closed(strconv.Itoa(i)); ok != (i < want) {
				t.Fatalf("cut at %d: run %d closed: %v", n, i, ok)
			} else if !ok {
				mustAppend(t, w, run(i))
			}
		}
		w.Close()
		if got, err := os.ReadFile(path); err != nil || string(got) != string(whole) {
			t.Fatalf("cut at %d and resumed: the file differs from one that was not cut; %v", n, err)
		}
	}
}

func TestDamageIsLocated(t *testing.T) {
	dir := t.TempDir()
	w, err := Create(dir, Manifest{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		mustAppend(t, w, testRun(t, strconv.Itoa(i)))
	}
	w.Close()
	path := filepath.Join(dir, RunsFile)
	data, _ := os.ReadFile(path)
	lines := strings.SplitAfter(string(data), "\n")
	edit := func(n int, old, new string) string {
		l := slices.Clone(lines)
		if !strings.Contains(l[n-1], old) {
			t.Fatalf("line %d has no %q: %s", n, old, l[n-1])
		}
		l[n-1] = strings.Replace(l[n-1], old, new, 1)
		return strings.Join(l, "")
	}
	for name, tc := range map[string]struct {
		data   string
		line   int
		column string
	}{
		"header column":  {edit(1, "rtt_ms", "rtt"), 1, "rtt_ms"},
		"no header":      {strings.Join(lines[1:], ""), 1, "schema"},
		"empty lines":    {"\n\n", 1, "schema"},
		"byte order":     {"\ufeff" + string(data), 1, "schema"},
		"extra column":   {edit(1, "error", "error,more"), 1, ""},
		"schema":         {edit(2, fmt.Sprint(Schema, ","), fmt.Sprint(Schema+1, ",")), 2, "schema"},
		"old schema":     {edit(2, fmt.Sprint(Schema, ","), fmt.Sprint(Schema-1, ",")), 2, "schema"},
		"number":         {edit(4, ",20,", ",2O,"), 4, "rtt_ms"},
		"value comma":    {edit(3, "1000", "1,000"), 3, ""},
		"status":         {edit(3, ",ok,", ",OK,"), 3, "status"},
		"metric":         {edit(3, "throughput", "troughput"), 3, ""},
		"unit":           {edit(2, "B/s", "MB/s"), 2, "unit"},
		"quote":          {edit(2, `handlers=4"`, `handlers=4`), 2, "params"},
		"stray quote":    {edit(2, "nbd", `n"bd`), 2, "transport"},
		"after quote":    {edit(2, `handlers=4"`, `handlers=4"x`), 2, "params"},
		"closing row":    {strings.Join(slices.Delete(slices.Clone(lines), 4, 5), ""), 5, "run_id"},
		"run twice":      {string(data) + strings.Join(lines[1:5], ""), 14, "run_id"},
		"merged twice":   {string(data) + string(data), 14, "schema"},
		"cell differs":   {edit(3, "managed-mount", "direct-mount"), 3, "strategy"},
		"infinite value": {edit(2, "3.333333333333333e+08", "1e999"), 2, "value"},
	} {
		if name == "metric" {
			tc.data = edit(2, "throughput,3", "troughput,3")
			tc.line, tc.column = 2, "metric"
		}
		if err := os.WriteFile(path, []byte(tc.data), 0o666); err != nil {
			t.Fatal(err)
		}
		_, err := Read(path)
		var se *SyntaxError
		if !errors.As(err, &se) || se.Line != tc.line || se.Column != tc.column || errors.Is(err, ErrUnclosed) {
			t.Errorf("%s: error %v, want line %d, column %q", name, err, tc.line, tc.column)
			continue
		}
		t.Logf("%s: %v", name, err)
		if _, err := Open(dir); !errors.As(err, &se) {
			t.Errorf("%s: Open: %v", name, err)
		}
		if after, _ := os.ReadFile(path); string(after) != tc.data {
			t.Errorf("%s: Open changed a damaged file", name)
		}
	}
}

func TestSummarize(t *testing.T) {
	if s := Summarize(nil); s != (Summary{}) {
		t.Errorf("empty: %+v", s)
	}
	if s := Summarize([]float64{7}); s != (Summary{N: 1, Median: Num(7), Min: Num(7), Max: Num(7)}) {
		t.Errorf("one: %+v", s)
	}
	if s := Summarize([]float64{5, 1, math.NaN(), 4, 2, 3}); s.N != 5 || s.CILow.ok || s.Median != Num(3) || s.Q1 != Num(1.5) || s.Q3 != Num(4.5) {
		t.Errorf("five: %+v", s)
	}
	// Ranks of the 95 % interval of a median as in the printed tables (Conover,
	// Practical Nonparametric Statistics, table A3).
	for n, k := range map[int]int{1: 0, 5: 0, 6: 1, 8: 1, 9: 2, 10: 2, 12: 3, 15: 4, 20: 6, 25: 8, 30: 10, 50: 18, 100: 40} {
		x := make([]float64, n)
		for i := range x {
			x[i] = float64(n - i)
		}
		s := Summarize(x)
		low, high := Num(float64(k)), Num(float64(n+1-k))
		if k == 0 {
			low, high = Number{}, Number{}
		}
		if s.CILow != low || s.CIHigh != high {
			t.Errorf("n = %d: interval %v..%v, want %v..%v", n, s.CILow, s.CIHigh, low, high)
		}
	}
}

func TestGroup(t *testing.T) {
	var rows []Row
	for i, rtt := range []float64{40, 0, 0, 40} {
		cell := testCell(strconv.Itoa(i))
		cell.RTTms, cell.RTTMeasuredms, cell.PullWorkers = rtt, Num(rtt+float64(i)), i%2
		r, err := RunRows(cell, map[string]float64{"throughput": float64(i)}, 1)
		if err != nil {
			t.Fatal(err)
		}
		rows = append(rows, r...)
	}
	fail := failedRun(t, "f", StatusTimeout)
	fail[0].RTTms = 40
	rows = append(rows, fail...)
	s, err := Group(rows, Query{Metric: "throughput", Keys: []string{"strategy", "params.handlers"}, X: "rtt_ms", Position: "rtt_measured_ms"})
	if err != nil {
		t.Fatal(err)
	}
	if len(s) != 1 || s[0].Key != "managed-mount/4" || len(s[0].Points) != 2 {
		t.Fatalf("series %+v", s)
	}
	p := s[0].Points[1]
	if p.X != "40" || p.Pos != 41.5 || p.Failed != 1 || !slices.Equal(p.Values, []float64{0, 3}) || p.Median != Num(1.5) {
		t.Errorf("point %+v", p)
	}
	if v := Varying(rows, "rtt_ms"); !reflect.DeepEqual(v, map[string][]string{"pull_workers": {"0", "1", "4"}}) {
		t.Errorf("varying %v", v)
	}
	if _, err := Group(rows, Query{Metric: "throughput", Keys: []string{"nope"}}); err == nil {
		t.Error("an unknown column is accepted")
	}
	if _, err := Group(rows, Query{Metric: "nope"}); err == nil {
		t.Error("an unknown metric is accepted")
	}
}

func BenchmarkParse(b *testing.B) {
	dir := b.TempDir()
	w, err := Create(dir, Manifest{})
	if err != nil {
		b.Fatal(err)
	}
	for i := range 50 {
		mustAppend(b, w, bigRun(strconv.Itoa(i)))
	}
	w.Close()
	data, err := os.ReadFile(filepath.Join(dir, RunsFile))
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := parse("f", data); err != nil {
			b.Fatal(err)
		}
	}
}
