package role

import (
	"context"
	"errors"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/backend"
	"memsync/strategies/region"
)

func start(t *testing.T, role, cpus string) *Process {
	t.Helper()
	p, err := Start(short(t), role, cpus, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Stop(context.Background()); err != nil {
			t.Error(err)
		}
		if unix.Kill(p.PID(), 0) == nil {
			t.Errorf("%s (pid %d) is still there after Stop", role, p.PID())
		}
	})
	return p
}

func TestProcess(t *testing.T) {
	for _, role := range []string{Source, Daemon, Workload} {
		p := start(t, role, "0")
		var h Hello
		if _, err := p.Ask(short(t), "hello", none{}, &h); err != nil || h.PID != p.PID() {
			t.Errorf("%s: hello says pid %d, want %d: %v", role, h.PID, p.PID(), err)
		}
		var c Counters
		if _, err := p.Ask(short(t), "counters", none{}, &c); err != nil || c.CPU <= 0 || c.RSS < 1<<20 || c.MinorFaults == 0 || c.ContextSwitches == 0 || c.At > monotonic() {
			t.Errorf("%s: counters %+v: %v", role, c, err)
		}
		b, err := os.ReadFile("/proc/" + strconv.Itoa(p.PID()) + "/status")
		if err != nil || !strings.Contains(string(b), "Cpus_allowed_list:\t0\n") {
			t.Errorf("%s is not pinned to CPU 0: %v", role, err)
		}
		began := time.Now()
		if err := p.Stop(short(t)); err != nil || time.Since(began) > 1500*time.Millisecond {
			t.Errorf("%s: Stop took %v: %v", role, time.Since(began), err)
		}
	}
}

// TestSignals: the runner decides what Ctrl-C means, not the roles, which get it too.
func TestSignals(t *testing.T) {
	p := start(t, Source, "")
	for _, sig := range []unix.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP} {
		if err := unix.Kill(p.PID(), sig); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := p.Ask(short(t), "hello", none{}, nil); err != nil {
		t.Errorf("after SIGINT, SIGTERM and SIGHUP: %v", err)
	}
}

// TestKilled: what is asked of a killed role is told so, and so is who watches it.
func TestKilled(t *testing.T) {
	p := start(t, Source, "")
	ended := make(chan error, 1)
	p.Watch(short(t), func(err error) { ended <- err })
	if err := unix.Kill(p.PID(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_, err := p.Ask(short(t), "hello", none{}, nil)
	if !errors.Is(err, region.ErrPeerGone) || !strings.Contains(err.Error(), "signal: killed") {
		t.Errorf("ask: %v", err)
	}
	select {
	case err := <-ended:
		if !errors.Is(err, region.ErrPeerGone) || !strings.Contains(err.Error(), "source ended (signal: killed)") {
			t.Errorf("watch: %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("nobody tells the watcher")
	}
}

// TestHung: a role that does not answer ends with the context, and is killed by Stop.
func TestHung(t *testing.T) {
	p := start(t, Source, "")
	if err := unix.Kill(p.PID(), unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	// Its threads stop one after the other.
	if err := unix.Waitid(unix.P_PID, p.PID(), nil, unix.WSTOPPED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := p.Ask(ctx, "hello", none{}, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("ask of a stopped process: %v", err)
	}
	began := time.Now()
	if err := p.Stop(ctx); err != nil || time.Since(began) > 5*time.Second {
		t.Errorf("Stop took %v: %v", time.Since(began), err)
	}
}

func TestStartFails(t *testing.T) {
	for name, want := range map[string]string{"cook": `unknown role "cook"`, "": `unknown role ""`} {
		if _, err := Start(short(t), name, "", nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("role %q: %v", name, err)
		}
	}
	if _, err := Start(short(t), Source, "1000", nil); err == nil || !strings.Contains(err.Error(), "pin to CPUs 1000") {
		t.Errorf("a CPU that is not there: %v", err)
	}
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Start(ended, Source, "", nil); !errors.Is(err, context.Canceled) {
		t.Errorf("start with a context that ended: %v", err)
	}
}

func TestParseCPUs(t *testing.T) {
	for in, want := range map[string][]int{"0": {0}, "0,2-3": {0, 2, 3}, "5-5": {5}, "1023": {1023}} {
		if got, err := ParseCPUs(in); err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %v, %v", in, got, err)
		}
	}
	for _, in := range []string{"", ",", "a", "1-", "-1", "3-2", "1024", "0-99999999999", "0;1", "1--2"} {
		if got, err := ParseCPUs(in); err == nil {
			t.Errorf("%q is taken for %v", in, got)
		}
	}
}

// TestVerifyStore: the source compares every byte with what it must be.
func TestVerifyStore(t *testing.T) {
	for _, op := range []string{"write", "mixed"} {
		for _, access := range Accesses() {
			w := Work{Op: op, Access: access, Threads: 3, Size: 10*page + 100, Seed: 4, Content: region.Content{Seed: 4}}
			s, err := backend.Open(context.Background(), backend.Spec{Backend: "memory", Size: w.Size, Content: w.Content}, "")
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			args := verifyArgs{Work: w, Touched: Touched{Ops: []int64{3, 2, 4}}}
			p := make([]byte, page)
			seqs, err := w.sequences()
			if err != nil {
				t.Fatal(err)
			}
			for i, seq := range seqs {
				for k := range args.Touched.Ops[i] {
					pg, _ := seq.next()
					off, n := w.pageRange(pg)
					if w.writes(k) {
						w.written().Fill(p[:n], off)
						if err := s.WriteAt(t.Context(), p[:n], off); err != nil {
							t.Fatal(err)
						}
					}
				}
			}
			v, err := verifyStore(t.Context(), s, args)
			if err != nil || v.Bytes != w.Size {
				t.Errorf("%s %s: %d of %d bytes: %v", op, access, v.Bytes, w.Size, err)
			}
			for _, at := range []int64{0, 5*page + 17, w.Size - 1} { // one wrong byte, anywhere
				var b [1]byte
				_ = s.ReadAt(t.Context(), b[:], at)
				_ = s.WriteAt(t.Context(), []byte{b[0] ^ 1}, at)
				if _, err := verifyStore(t.Context(), s, args); !errors.Is(err, region.ErrMismatch) {
					t.Errorf("%s %s: a wrong byte at %d: %v", op, access, at, err)
				}
				_ = s.WriteAt(t.Context(), b[:], at)
			}
			args.Touched.Ops[0]-- // a write too many is as wrong as one too few
			if _, err := verifyStore(t.Context(), s, args); op == "write" && access != "zipf" && !errors.Is(err, region.ErrMismatch) {
				t.Errorf("%s %s: one page more was written than is said: %v", op, access, err)
			}
		}
	}
}
