package results

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var rewrite = flag.Bool("rewrite", false, "rewrite generated files")

const childEnv = "RESULTS_TEST_CHILD"

// TestMain runs the test binary as the child of a test where it is asked to.
func TestMain(m *testing.M) {
	switch os.Getenv(childEnv) {
	case "":
		os.Exit(m.Run())
	case "append":
		childAppend(os.Getenv("DIR"))
	case "full":
		childFull(os.Getenv("DIR"))
	}
	os.Exit(0)
}

func child(t *testing.T, mode, dir string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe)
	cmd.Env = append(os.Environ(), childEnv+"="+mode, "DIR="+dir)
	cmd.Stderr = os.Stderr
	return cmd
}

func die(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// bigRun is a run of some 30 KiB, so that its one write spans several pages:
// the kernel may stop a killed process's write between two of them.
func bigRun(id string) []Row {
	cell := Row{RunID: id, Figure: "f", Params: fmt.Sprintf("pad=%0600d", 0), Status: StatusOK}
	values := map[string]float64{}
	for i, m := range metrics {
		if m.Name != RunMetric {
			values[m.Name] = float64(i)
		}
	}
	rows, err := RunRows(cell, values, 1)
	if err != nil {
		die(err)
	}
	return rows
}

// childAppend goes on with a sweep of runs 0, 1, 2, ... and says each once it is recorded.
func childAppend(dir string) {
	w, err := Open(dir)
	if err != nil {
		die(err)
	}
	next := 0
	for ; ; next++ {
		if _, ok := w.Closed(strconv.Itoa(next)); !ok {
			break
		}
	}
	for ; ; next++ {
		if err := w.Append(bigRun(strconv.Itoa(next))...); err != nil {
			die(err)
		}
		fmt.Println(next)
	}
}

// TestKill kills a sweep with SIGKILL again and again and resumes it: a run
// that was reported as recorded is never lost, and none is recorded twice.
func TestKill(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	dir := t.TempDir()
	w, err := Create(dir, Manifest{})
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	perRun := len(bigRun("x"))
	last, torn, injected := -1, 0, false
	for range 40 {
		cmd := child(t, "append", dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		timer := time.AfterFunc(5*time.Millisecond+time.Duration(rnd.Int64N(int64(60*time.Millisecond))), func() { cmd.Process.Kill() })
		for s := bufio.NewScanner(out); s.Scan(); {
			n, err := strconv.Atoi(s.Text())
			if err != nil || n <= last {
				t.Fatalf("the child recorded run %q after %d", s.Text(), last)
			}
			last = n
		}
		cmd.Wait()
		timer.Stop()
		if !cmd.ProcessState.Sys().(interface{ Signaled() bool }).Signaled() {
			t.Fatalf("the child ended by itself: %v", cmd.ProcessState)
		}
		rows, err := Read(dir)
		if errors.Is(err, ErrUnclosed) {
			if !injected {
				torn++
			}
		} else if err != nil {
			t.Fatal(err)
		}
		// At most one run more than was reported: killed between fsync and report.
		runs := len(ClosedRuns(rows))
		if runs < last+1 || runs > last+2 || len(rows) != runs*perRun {
			t.Fatalf("%d rows of %d runs, but %d were reported", len(rows), runs, last+1)
		}
		if injected = rnd.IntN(2) == 0; injected { // tear more than the kernel does: cut within the run in flight
			f, err := os.OpenFile(filepath.Join(dir, RunsFile), os.O_WRONLY|os.O_APPEND, 0)
			if err != nil {
				t.Fatal(err)
			}
			line := fmt.Sprintf("%d,%d,f,,half", Schema, runs)
			if _, err := io.WriteString(f, line[:rnd.IntN(len(line))]); err != nil {
				t.Fatal(err)
			}
			f.Close()
		}
		last = runs - 1
	}
	if last < 1 {
		t.Fatalf("only %d runs were recorded in all", last+1)
	}
	t.Logf("%d runs, %d tails torn by the kill itself", last+1, torn)
}

// childFull appends under a file size limit that cuts a write in its midst, as a full disk does.
func childFull(dir string) {
	signal.Ignore(unix.SIGXFSZ)
	w, err := Open(dir)
	if err != nil {
		die(err)
	}
	if err := w.Append(bigRun("a")...); err != nil {
		die(err)
	}
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &old); err != nil {
		die(err)
	}
	limit := old
	limit.Cur = uint64(w.size) + 5000
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &limit); err != nil {
		die(err)
	}
	if err := w.Append(bigRun("b")...); !errors.Is(err, unix.EFBIG) {
		die(fmt.Errorf("append beyond the limit: %w", err))
	}
	if _, ok := w.Closed("b"); ok {
		die(errors.New("a run that could not be written counts as closed"))
	}
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &old); err != nil {
		die(err)
	}
	if err := errors.Join(w.Append(bigRun("b")...), w.Append(bigRun("c")...)); err != nil {
		die(err)
	}
}

func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	w, err := Create(dir, Manifest{})
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	if err := child(t, "full", dir).Run(); err != nil {
		t.Fatal(err)
	}
	rows, err := Read(dir)
	if err != nil || len(ClosedRuns(rows)) != 3 {
		t.Errorf("%d runs, %v", len(ClosedRuns(rows)), err)
	}
}

// TestFailedSync uses a pipe, which can be written but neither synced nor cut:
// once that fails, nobody knows what a file holds, so the Writer must refuse.
func TestFailedSync(t *testing.T) {
	r, f, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	w := &Writer{f: f, closed: map[string]Status{}}
	if err := w.Append(testRun(t, "a")...); !errors.Is(err, unix.EINVAL) {
		t.Errorf("append that cannot be synced: %v", err)
	}
	if _, ok := w.Closed("a"); ok {
		t.Error("the run counts as closed")
	}
	if err := w.Append(testRun(t, "b")...); err == nil || !strings.Contains(err.Error(), "unusable") {
		t.Errorf("append after a failed sync: %v", err)
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
}

func TestWriterIsConcurrent(t *testing.T) {
	dir := t.TempDir()
	w, err := Create(dir, Manifest{})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	errs := make(chan error)
	for i := range 20 {
		go func() { errs <- w.Append(bigRun(strconv.Itoa(i % 10))...) }()
	}
	refused := 0
	for range 20 {
		if <-errs != nil {
			refused++
		}
	}
	rows, err := Read(dir)
	if err != nil || refused != 10 || len(ClosedRuns(rows)) != 10 {
		t.Errorf("%d refused, %d recorded, %v; want 10 and 10", refused, len(ClosedRuns(rows)), err)
	}
}

func TestMetricsPage(t *testing.T) {
	path := filepath.Join("..", "docs", "metrics.md")
	if *rewrite {
		if err := os.WriteFile(path, []byte(MetricsPage()), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil || string(got) != MetricsPage() {
		t.Errorf("%s is not what the tables make (%v); run go test ./results -run TestMetricsPage -rewrite", path, err)
	}
	seen := map[string]bool{}
	units := map[string]bool{"s": true, "B": true, "B/s": true, "bit/s": true, "count": true, "ratio": true, "s/B": true}
	for _, m := range metrics {
		if seen[m.Name] || !units[m.Unit] || m.From == "" || m.To == "" || m.Doc == "" {
			t.Errorf("metric %+v is not complete, or not the only one of its name", m)
		}
		seen[m.Name] = true
	}
}

func TestManifest(t *testing.T) {
	dir := t.TempDir()
	m := NewManifest()
	m.Seed = 1<<64 - 1
	m.Features = []byte(`{"fuse":"yes"}`)
	if err := WriteManifest(dir, m); err != nil {
		t.Fatal(err)
	}
	m.End = m.Start.Add(time.Hour)
	if err := WriteManifest(dir, m); err != nil {
		t.Fatal(err)
	}
	got, err := ReadManifest(dir)
	if err != nil || got.Seed != m.Seed || !got.End.Equal(m.End) || got.Host != m.Host || got.Schema != Schema {
		t.Errorf("read %+v, %v", got, err)
	}
	h := got.Host
	if h.Kernel == "" || h.CPUs < 1 || h.MemoryBytes < 1<<20 || h.OS == "" || h.Name == "" {
		t.Errorf("host %+v", h)
	}
	t.Logf("%+v", h)
	if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	for schema, say := range map[int]string{Schema - 1: "measure again into another folder", 99: "newer memsync"} {
		if err := os.WriteFile(filepath.Join(dir, ManifestFile), fmt.Appendf(nil, `{"schema":%d}`, schema), 0o666); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadManifest(dir); err == nil || !strings.Contains(err.Error(), say) {
			t.Errorf("a manifest of schema %d: %v, want %q", schema, err, say)
		}
	}
}

// TestStamp: what the linker set goes before what the go command knows.
func TestStamp(t *testing.T) {
	defer func(old string) { stamp = old }(stamp)
	for set, dirty := range map[string]bool{"0123abcd": false, "0123abcd+dirty": true} {
		stamp = set
		if m := NewManifest(); m.Commit != "0123abcd" || m.Dirty != dirty {
			t.Errorf("%s: commit %q, dirty %t", set, m.Commit, m.Dirty)
		}
	}
}

func TestThesis(t *testing.T) {
	figures, err := parseThesis(thesisCSV)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for name, series := range figures {
		for _, s := range series {
			n += len(s.Points)
			c := s.Curve()
			for i := 1; i < len(c); i++ {
				if c[i].X.v <= c[i-1].X.v {
					t.Errorf("%s, %s: curve goes back at %v", name, s.Name, c[i].X)
				}
			}
		}
	}
	if n != 747 {
		t.Errorf("%d values, want 747", n)
	}
	var managed ThesisSeries
	for _, s := range Thesis("throughput-rttvar-1") {
		if s.Name == "managed" {
			managed = s
		}
	}
	c := managed.Curve()
	if len(c) != 12 || c[11].X != Num(40) || c[11].Base() != 354<<20 || c[11].Printed {
		t.Errorf("managed: %+v", c)
	}
	if p, ok := Thesis("latency-first-chunk-rtt0-2")[1].Stat("median"); !ok || p.Base() != 93e-6 {
		t.Errorf("direct's median: %+v, %v", p, ok)
	}
	if p := Thesis("throughput-anyvar-1")[0].Points[0]; len(p.Bound) > 1 {
		t.Errorf("bound %+v", p)
	}
	if Thesis("nothing") != nil {
		t.Error("a figure that is not there has series")
	}
}

func TestFigureCheck(t *testing.T) {
	good := FigureSpec{
		Name: "throughput-rttvar-1", Title: "Throughput", Kind: FigureLine,
		X:      Axis{Column: "rtt_ms", Position: "rtt_measured_ms", Label: "RTT", Unit: "ms"},
		Y:      Axis{Column: "throughput", Label: "Throughput", Unit: "MiB/s", Scale: 1.0 / (1 << 20), Log: true},
		Keys:   []string{"strategy", "params.handlers"},
		Series: []FigureSeries{{Key: "managed-mount/", Label: "managed", Thesis: "managed"}},
		Thesis: "throughput-rttvar-1",
	}
	if err := good.Check(); err != nil {
		t.Error(err)
	}
	for name, f := range map[string]func(*FigureSpec){
		"kind":   func(f *FigureSpec) { f.Kind = "pie" },
		"metric": func(f *FigureSpec) { f.Y.Column = "speed" },
		"x":      func(f *FigureSpec) { f.X.Column = "" },
		"key":    func(f *FigureSpec) { f.Keys = []string{"colour"} },
		"thesis": func(f *FigureSpec) { f.Thesis = "throughput-rttvar-9" },
		"series": func(f *FigureSpec) { f.Series = []FigureSeries{{Key: "a", Thesis: "b"}} },
		"twice":  func(f *FigureSpec) { f.Series = []FigureSeries{{Key: "a"}, {Key: "a"}} },
		"title":  func(f *FigureSpec) { f.Title = "" },
	} {
		bad := good
		f(&bad)
		if err := bad.Check(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if s := good.Y.String(); s != "Throughput (MiB/s)" || good.Y.Shown(1<<20) != 1 || (Axis{}).Shown(3) != 3 {
		t.Errorf("axis %q", s)
	}
}
