package chunk

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"memsync/strategies/region"
	"memsync/strategies/replay"
	"memsync/strategies/storetest"
)

// The region of the tests below.
const (
	keptChunk = 64
	keptSize  = 64*20 + 7
)

// kept opens a pipeline whose cache and journal are in dir. close ends it
// without pushing: as if killed, but for what only the kernel can do.
func kept(dir string, remote region.Store, limit int64, o PushOptions) (p *Pusher, recovered int64, abandon func() error, err error) {
	j, err := OpenJournal(dir, keptSize, keptChunk, false)
	if err != nil {
		return nil, 0, nil, err
	}
	f, err := OpenFile(dir, keptSize)
	if err != nil {
		return nil, 0, nil, errors.Join(err, j.Close())
	}
	s, err := NewSyncer(remote, f, keptChunk, 4*keptChunk)
	if err == nil && limit > 0 {
		err = s.Bound(limit)
	}
	if err == nil {
		recovered, err = s.Recover(j)
	}
	if err != nil {
		return nil, 0, nil, errors.Join(err, f.Close(), j.Close())
	}
	p = StartPusher(s, o)
	return p, recovered, func() error {
		p.cancel()
		<-p.done
		return errors.Join(s.Close(), f.Close(), j.Close())
	}, nil
}

// keptWrite is the i-th write of a sequence.
func keptWrite(r *rand.Rand, i int) (p []byte, off int64) {
	off = r.Int64N(keptSize)
	p = make([]byte, 1+r.Int64N(min(5*keptChunk, keptSize-off)))
	region.Content{Seed: 4, Generation: uint64(i) + 1}.Fill(p, off)
	return p, off
}

// plainFile is a store that survives the process, for a source.
type plainFile struct{ *File }

// playKilled plays the process that is killed, where the environment says so.
func playKilled() {
	if dir := os.Getenv("MEMSYNC_TEST_JOURNAL"); dir != "" {
		fmt.Println("error:", writeUntilKilled(dir))
		os.Exit(1)
	}
}

// writeUntilKilled writes, syncs now and then, and says what has returned.
func writeUntilKilled(dir string) error {
	n, err := strconv.ParseUint(os.Getenv("MEMSYNC_TEST_SEED"), 10, 64)
	if err != nil {
		return err
	}
	source, err := OpenFile(filepath.Join(dir, "source"), keptSize)
	if err != nil {
		return err
	}
	setup := rand.New(rand.NewPCG(n, 1))
	p, _, _, err := kept(dir, jitter{plainFile{source}}, int64(setup.IntN(2))*12*keptChunk,
		PushOptions{Workers: 2, Interval: time.Duration(100+setup.IntN(3000)) * time.Microsecond})
	if err != nil {
		return err
	}
	r := rand.New(rand.NewPCG(n, 2))
	for i := 0; ; i++ {
		b, off := keptWrite(r, i)
		if err := p.WriteAt(context.Background(), b, off); err != nil {
			return err
		}
		if _, err := fmt.Println("wrote", i); err != nil {
			return err
		}
		if setup.IntN(20) == 0 {
			if err := p.Flush(context.Background()); err != nil {
				return err
			}
		}
	}
}

// TestKilled kills a process with SIGKILL in the middle of writing and pushing;
// the next one finds in cache and journal all that was answered.
// MEMSYNC_TEST_KILLS sets how often; by default 25.
func TestKilled(t *testing.T) {
	first := replay.Seed(t)
	kills := 25
	if v := os.Getenv("MEMSYNC_TEST_KILLS"); v != "" {
		var err error
		if kills, err = strconv.Atoi(v); err != nil {
			t.Fatal(err)
		}
	}
	if testing.Short() {
		kills = 5
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var writes, recovered int64
	for k := range uint64(kills) {
		n, bytes := killOnce(t, exe, first+k)
		writes, recovered = writes+n, recovered+bytes
	}
	t.Logf("%d processes killed after %d writes; %d bytes recovered", kills, writes, recovered)
	if writes == 0 || recovered == 0 {
		t.Error("no process got as far as to leave something")
	}
}

func killOnce(t *testing.T, exe string, seed uint64) (writes, recovered int64) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "source"), 0o700); err != nil {
		t.Fatal(err)
	}
	initial := make([]byte, keptSize)
	region.Content{Seed: 4}.Fill(initial, 0)
	if err := os.WriteFile(filepath.Join(dir, "source", "cache"), initial, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe)
	cmd.Env = append(os.Environ(), "MEMSYNC_TEST_JOURNAL="+dir, fmt.Sprintf("MEMSYNC_TEST_SEED=%d", seed))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(seed, 3))
	stop, last := r.IntN(300), -1
	lines := bufio.NewScanner(out)
	for killed := false; lines.Scan(); {
		i, ok := strings.CutPrefix(lines.Text(), "wrote ")
		if !ok {
			t.Errorf("seed %d: %s", seed, lines.Text())
			continue
		}
		if last, err = strconv.Atoi(i); err != nil {
			t.Fatal(err)
		}
		if last >= stop && !killed {
			killed = true
			time.Sleep(time.Duration(r.IntN(1000)) * time.Microsecond)
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	_ = cmd.Wait() // it was killed

	// What all answered writes made, and what the one under way may have made of it.
	want := bytes.Clone(initial)
	w := rand.New(rand.NewPCG(seed, 2))
	for i := range last + 1 {
		b, off := keptWrite(w, i)
		copy(want[off:], b)
	}
	next := bytes.Clone(want)
	b, off := keptWrite(w, last+1)
	copy(next[off:], b)

	source, err := OpenFile(filepath.Join(dir, "source"), keptSize)
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	p, recovered, abandon, err := kept(dir, source, 0, PushOptions{})
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, keptSize)
	check := func(where string) {
		for i := range got {
			if got[i] != want[i] && got[i] != next[i] {
				t.Fatalf("seed %d, killed after write %d: byte %d of the %s is %#x, want %#x or %#x", seed, last, i, where, got[i], want[i], next[i])
			}
		}
	}
	if err := p.ReadAt(t.Context(), got, 0); err != nil {
		t.Fatal(err)
	}
	check("region")
	if err := p.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := source.ReadAt(t.Context(), got, 0); err != nil {
		t.Fatal(err)
	}
	check("source")
	if err := abandon(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, journalName)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the journal stays although all was pushed: %v", err)
	}
	return int64(last + 1), recovered
}

// TestJournalRefuses: what a journal cannot vouch for is an error that says why.
func TestJournalRefuses(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, journalName)
	source := storetest.New(make([]byte, keptSize))
	f := storetest.NewFaulty(source)
	f.Fail(storetest.Write, errors.New("no"), 0)
	p, _, abandon, err := kept(dir, f, 0, PushOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.WriteAt(t.Context(), []byte("x"), 100); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenJournal(dir, keptSize, keptChunk, false); !errors.Is(err, region.ErrNotPermitted) {
		t.Errorf("a second mount in the same folder: %v", err)
	}
	if err := abandon(); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	open := func(b []byte, size, chunk int64) (marks int64, err error) {
		t.Helper()
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		j, err := OpenJournal(dir, size, chunk, false)
		if err != nil {
			return 0, err
		}
		marks = j.marked.Count()
		if err := j.f.Close(); err != nil {
			t.Fatal(err)
		}
		return marks, nil
	}
	if n, err := open(good, keptSize, keptChunk); n != 1 || err != nil {
		t.Fatalf("%d marks, %v; want 1", n, err)
	}
	for at, what := range map[int]string{0: "version", 20: "header", 60: "boot", journalOrigin + 3: "origin", journalHeader - 1: "checksum", journalHeader + 5: "mark"} {
		bad := bytes.Clone(good)
		bad[at] ^= 0x40
		if _, err := open(bad, keptSize, keptChunk); !errors.Is(err, region.ErrMismatch) {
			t.Errorf("damaged %s: %v, want ErrMismatch", what, err)
		}
	}
	if _, err := open(good[:journalHeader+3], keptSize, keptChunk); !errors.Is(err, region.ErrMismatch) {
		t.Errorf("cut short: %v, want ErrMismatch", err)
	}
	if _, err := open(good, keptSize+keptChunk, keptChunk); !errors.Is(err, region.ErrMismatch) {
		t.Errorf("another region: %v, want ErrMismatch", err)
	}
	if n, err := open(make([]byte, journalHeader+30), keptSize, keptChunk); n != 0 || err != nil {
		t.Errorf("one that was not finished: %d marks, %v", n, err)
	}
	if err := os.WriteFile(name, good, 0o600); err != nil {
		t.Fatal(err)
	}
	j, err := OpenJournal(dir, keptSize, keptChunk, true)
	if err != nil || !j.Empty() {
		t.Fatalf("discard: %v", err)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestOrigin: what a mount notes of the source is there for the next one, and the latest counts.
func TestOrigin(t *testing.T) {
	dir := t.TempDir()
	j, err := OpenJournal(dir, keptSize, keptChunk, false)
	if err != nil {
		t.Fatal(err)
	}
	if j.Origin() != nil {
		t.Error("a new journal has an origin")
	}
	var last Origin
	for i := range uint64(3) {
		last = Origin{region.Version{Instance: 1 << 63, Changes: i, State: 9}, 7}
		if err := j.SetOrigin(last); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(j.mark(1, 2, func() {}), j.f.Close()); err != nil {
		t.Fatal(err)
	}
	if j, err = OpenJournal(dir, keptSize, keptChunk, false); err != nil {
		t.Fatal(err)
	}
	if o := j.Origin(); o == nil || *o != last || j.Empty() {
		t.Errorf("%+v, want %+v", o, last)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
}

// FuzzJournal: no content of the file makes OpenJournal do anything but succeed or refuse.
func FuzzJournal(f *testing.F) {
	dir := f.TempDir()
	name := filepath.Join(dir, journalName)
	j, err := OpenJournal(dir, keptSize, keptChunk, false)
	if err != nil {
		f.Fatal(err)
	}
	if err := j.mark(2, 5, func() {}); err != nil {
		f.Fatal(err)
	}
	good, err := os.ReadFile(name)
	if err := errors.Join(err, j.Close()); err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:journalHeader])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		j, err := OpenJournal(dir, keptSize, keptChunk, false)
		if err != nil {
			if !errors.Is(err, region.ErrMismatch) {
				t.Errorf("%v, want ErrMismatch", err)
			}
			return
		}
		if err := j.f.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestDiskFull: a cache file that cannot grow is an error of that write, and nothing is lost.
func TestDiskFull(t *testing.T) {
	dir := t.TempDir()
	source := storetest.New(make([]byte, keptSize))
	p, _, abandon, err := kept(dir, source, 0, PushOptions{})
	if err != nil {
		t.Fatal(err)
	}
	local := p.local
	if err := p.WriteAt(t.Context(), []byte("kept"), 10); err != nil {
		t.Fatal(err)
	}
	full := storetest.NewFaulty(local)
	p.local = full
	full.Fail(storetest.Write, errors.New("no space"), 0)
	if err := p.WriteAt(t.Context(), make([]byte, keptChunk), 5*keptChunk); err == nil {
		t.Error("a write that the cache refused was answered")
	}
	if p.State(5) != Remote {
		t.Errorf("the chunk is %d", p.State(5))
	}
	full.Pass(storetest.Write)
	if err := p.WriteAt(t.Context(), []byte("later"), 5*keptChunk); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(p.Flush(t.Context()), abandon()); err != nil {
		t.Fatal(err)
	}
	b := source.Snapshot()
	if string(b[10:14]) != "kept" || string(b[5*keptChunk:5*keptChunk+5]) != "later" {
		t.Error("bytes are lost")
	}
}
