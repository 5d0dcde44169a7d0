package torture

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"memsync/strategies/all"
	"memsync/strategies/region"
	"memsync/strategies/replay"
)

// run runs the program of a seed on a virtual clock, in this process.
func run(t *testing.T, seed uint64) (c Counts) {
	t.Helper()
	var trace bytes.Buffer
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		lines := make(chan string, 1<<16)
		err := program(t.Context(), job{Seed: seed, Dir: dir}, all.Registry(), &c, func(format string, a ...any) { lines <- fmt.Sprintf(format, a...) })
		close(lines)
		for l := range lines {
			fmt.Fprintln(&trace, l)
		}
		if err != nil {
			t.Errorf("%v\nreplay with memsync torture --replay %d\n%s", err, seed, trace.String())
		}
	})
	return c
}

// TestPrograms runs programs of a fixed seed and of a random one; TORTURE_TIME is how long (4s).
func TestPrograms(t *testing.T) {
	long := 4 * time.Second
	if d, err := time.ParseDuration(os.Getenv("TORTURE_TIME")); err == nil {
		long = d
	}
	var total Counts
	n := 0
	for i, seed := range []uint64{1, replay.Seed(t)} {
		for end := time.Now().Add(long / 2); time.Now().Before(end) && !t.Failed(); n++ {
			total.add(run(t, seed*6+uint64(i)%2)) // levels Virtual and Machines
			i++
			seed++
		}
	}
	t.Logf("%d programs: %+v", n, total)
	if n > 10 && (total.Reads == 0 || total.Writes == 0 || total.Faults == 0 || total.Kills == 0) {
		t.Error("the programs missed something")
	}
}

// TestHostileLink: whatever a link makes of what both ends of each protocol say, without TLS, no
// process dies, every call returns by its deadline, and no goroutine is left.
func TestHostileLink(t *testing.T) {
	c := virtualChoices()
	c.Hostile = true
	seed, n := replay.Seed(t), 0
	var total Counts
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end) && !t.Failed(); n++ {
		seed++
		p := Generate(seed, c)
		dir := t.TempDir()
		synctest.Test(t, func(t *testing.T) {
			v, err := newVirtual(t.Context(), p, all.Registry(), dir)
			if err != nil {
				t.Error(err)
				return
			}
			k, err := execute(t.Context(), p, v, virtualLimits, func(string, ...any) {})
			total.add(k)
			if err = errors.Join(err, v.end()); err != nil {
				t.Errorf("program %d, %s: %v", seed, p.describe(), err)
			}
		})
	}
	t.Logf("%d programs: %+v", n, total)
	if n > 20 && total.Failed == 0 {
		t.Error("nothing failed: was anything corrupted?")
	}
}

// TestGenerate: a program follows from its seed, and a filter that takes it changes nothing of it.
func TestGenerate(t *testing.T) {
	for seed := range uint64(200) {
		p := Generate(seed, virtualChoices())
		for _, q := range []Program{Generate(seed, virtualChoices()), Generate(seed, virtualChoices().only(Filter{Combo{Strategy: p.Strategy, Transport: p.Transport, Backend: p.Backend}}))} {
			a, _ := json.Marshal(p)
			b, _ := json.Marshal(q)
			if !bytes.Equal(a, b) {
				t.Fatalf("seed %d gives\n%s\nand\n%s", seed, a, b)
			}
		}
		for _, s := range p.Steps {
			if (s.Op == opRead || s.Op == opWrite) && region.CheckRange(s.Off, s.N, p.Size) != nil || s.String() == "" {
				t.Fatalf("seed %d: step %+v of a region of %d bytes", seed, s, p.Size)
			}
		}
	}
}

// liar is a world in memory that breaks an invariant, if told to.
type liar struct {
	b       []byte
	flaw    string
	writes  int
	durable []byte
}

func (l *liar) read(_ context.Context, p []byte, off int64) error { copy(p, l.b[off:]); return nil }
func (l *liar) write(_ context.Context, p []byte, off int64) error {
	l.writes++
	switch {
	case l.flaw == "forgets a write" && l.writes%5 == 0:
		return nil
	case l.flaw == "fails" && l.writes == 3:
		return errors.New("no reason")
	case l.flaw == "is late" && l.writes == 3:
		time.Sleep(time.Hour)
	case l.flaw == "tears a write" && len(p) > 100:
		p = p[:len(p)-100]
	}
	copy(l.b[off:], p)
	return nil
}

func (l *liar) sync(context.Context) error {
	if l.flaw != "syncs nothing" {
		copy(l.durable, l.b)
	}
	return nil
}
func (l *liar) open(context.Context) error       { return nil }
func (l *liar) close(ctx context.Context) error  { return l.sync(ctx) }
func (l *liar) killDaemon(context.Context) error { return nil }
func (l *liar) fault(Step) error                 { return nil }
func (l *liar) heal(context.Context) error       { return nil }
func (l *liar) stored(context.Context) ([]byte, error) {
	return bytes.Clone(l.durable), nil
}
func (l *liar) end() error { return nil }

// TestInvariants: what breaks an invariant is found, by its name; what does not is not.
func TestInvariants(t *testing.T) {
	p := Program{Seed: 5, Size: 64 << 10}
	for i := range int64(60) {
		p.Steps = append(p.Steps, Step{Op: opWrite, Off: i * 512, N: 1024}, Step{Op: opJoin}, Step{Op: opRead, Off: i * 512, N: 2048}, Step{Op: opJoin})
		if i%10 == 9 {
			p.Steps = append(p.Steps, Step{Op: opSync}, Step{Op: opJoin})
		}
	}
	for flaw, want := range map[string]string{"": "", "forgets a write": bytesEqual, "tears a write": bytesEqual, "fails": noError, "is late": byDeadline, "syncs nothing": syncSurvives} {
		synctest.Test(t, func(t *testing.T) {
			l := &liar{b: make([]byte, p.Size), flaw: flaw}
			p.content().Fill(l.b, 0)
			l.durable = bytes.Clone(l.b)
			_, err := execute(t.Context(), p, l, virtualLimits, func(string, ...any) {})
			switch {
			case want == "" && err != nil:
				t.Errorf("an honest world: %v", err)
			case want != "" && (!errors.Is(err, errBroken) || !strings.Contains(err.Error(), want)):
				t.Errorf("a world that %s: %v, want %q", flaw, err, want)
			}
		})
	}
}

// TestPipe: bytes come in order, an end is seen, and deadlines hold.
func TestPipe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newPipe()
		if err := b.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := b.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("read of nothing: %v", err)
		}
		if err := b.SetReadDeadline(time.Time{}); err != nil {
			t.Fatal(err)
		}
		go func() {
			time.Sleep(time.Minute)
			_, _ = a.Write([]byte("hello"))
			_ = a.Close()
		}()
		var got []byte
		p := make([]byte, 2)
		for {
			n, err := b.Read(p)
			got = append(got, p[:n]...)
			if err != nil {
				break
			}
		}
		if string(got) != "hello" {
			t.Errorf("read %q", got)
		}
		if _, err := b.Write(p); err == nil {
			t.Error("a write to an end that was closed")
		}
	})
}
