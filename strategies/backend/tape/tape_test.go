package tape

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"memsync/strategies/backend/keyed"
	"memsync/strategies/backend/keyed/keyedtest"
)

func open(t *testing.T, dir string, o Options) *Table {
	t.Helper()
	table, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	return table
}

func TestTable(t *testing.T) {
	keyedtest.Run(t, func(t *testing.T) (keyed.Table, func() keyed.Table) {
		dir := filepath.Join(t.TempDir(), "tape")
		again := func() keyed.Table { return open(t, dir, Options{}) }
		return again(), again
	})
}

func put(t *testing.T, table *Table, number int64, value string) {
	t.Helper()
	if err := table.Put(t.Context(), []int64{number}, [][]byte{[]byte(value)}); err != nil {
		t.Fatal(err)
	}
}

func get(t *testing.T, table *Table, number int64) (value string) {
	t.Helper()
	if err := table.Get(t.Context(), []int64{number}, func(_ int, v []byte) { value = string(v) }); err != nil {
		t.Fatal(err)
	}
	return value
}

// TestCrash: what is on the tape is there, with or without an index, whatever the index
// says, and wherever the last record was cut off; and the tape can be written on.
func TestCrash(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tape")
	table := open(t, dir, Options{})
	put(t, table, 1, "one")
	put(t, table, 2, "two")
	if err := table.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	put(t, table, 1, "newer")
	put(t, table, 3, "three")
	// Nothing is closed: as after a kill.
	tape, err := os.ReadFile(filepath.Join(dir, "tape"))
	if err != nil {
		t.Fatal(err)
	}
	index, err := os.ReadFile(filepath.Join(dir, "index"))
	if err != nil {
		t.Fatal(err)
	}
	if err := table.Close(); err != nil {
		t.Fatal(err)
	}
	bad := bytes.Clone(index)
	bad[9] ^= 1
	last := headerSize + len("three")
	for cut := 0; cut <= last; cut++ {
		for name, ix := range map[string][]byte{"index": index, "none": nil, "damaged": bad, "short": index[:20]} {
			dir := filepath.Join(t.TempDir(), "tape")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			err := os.WriteFile(filepath.Join(dir, "tape"), tape[:len(tape)-cut], 0o600)
			if ix != nil {
				err = errors.Join(err, os.WriteFile(filepath.Join(dir, "index"), ix, 0o600))
			}
			if err != nil {
				t.Fatal(err)
			}
			again := open(t, dir, Options{})
			three := "three"
			if cut > 0 {
				three = ""
			}
			if a, b, c := get(t, again, 1), get(t, again, 2), get(t, again, 3); a != "newer" || b != "two" || c != three {
				t.Errorf("%s, %d bytes cut off: %q, %q, %q", name, cut, a, b, c)
			}
			put(t, again, 4, "four")
			if err := again.Close(); err != nil {
				t.Fatal(err)
			}
			if again = open(t, dir, Options{}); get(t, again, 4) != "four" || get(t, again, 1) != "newer" {
				t.Errorf("%s, %d bytes cut off: written on in vain", name, cut)
			}
			if err := again.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestHead: what is read in the tape's order needs no turn of the head, what is not does,
// and a wait for it ends with the context.
func TestHead(t *testing.T) {
	const turn = 50 * time.Millisecond
	table := open(t, filepath.Join(t.TempDir(), "tape"), Options{Turn: turn})
	defer table.Close()
	var numbers []int64
	for n := range int64(20) {
		put(t, table, n, fmt.Sprintf("value %d", n))
		numbers = append(numbers, 19-n)
	}
	timed := func(f func()) time.Duration {
		began := time.Now()
		f()
		return time.Since(began)
	}
	// One turn to the beginning, whatever the order in which they are asked for at once.
	together := timed(func() {
		if err := table.Get(t.Context(), numbers, func(int, []byte) {}); err != nil {
			t.Error(err)
		}
	})
	alone := timed(func() {
		for _, n := range numbers {
			table.held = nil
			get(t, table, n)
		}
	})
	table.held = nil
	get(t, table, 3)
	get(t, table, 1)
	at := table.at
	if get(t, table, 3) != "value 3" || get(t, table, 1) != "value 1" || table.at != at {
		t.Errorf("the head went from %d to %d for what the drive has", at, table.at)
	}
	table.held = nil
	if together < turn || alone < 19*turn || together > alone/2 {
		t.Errorf("20 records took %v together, %v one after another from the last", together, alone)
	}
	// Calls that wait for the head have it in the order of the tape, and each gets what it asked for.
	table.o.Turn = turn / 5
	var wg sync.WaitGroup
	errs := make(chan error, 20)
	took := timed(func() {
		for _, n := range numbers {
			wg.Go(func() {
				err := table.Get(t.Context(), []int64{n}, func(_ int, v []byte) {
					if string(v) != fmt.Sprintf("value %d", n) {
						errs <- fmt.Errorf("record %d is %q", n, v)
					}
				})
				if err != nil {
					errs <- err
				}
			})
		}
		wg.Wait()
	})
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	t.Logf("20 at once: %v", took)
	table.o.Turn, table.held = time.Hour, nil
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := table.Get(ctx, []int64{7}, func(int, []byte) {}); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	table.o.Turn = 0
}

// FuzzOpen: whatever the two files have, a tape opens, has only whole records, and can be written.
func FuzzOpen(f *testing.F) {
	dir := filepath.Join(f.TempDir(), "seed")
	table, err := Open(dir, Options{})
	if err != nil {
		f.Fatal(err)
	}
	for n := range int64(3) {
		err = errors.Join(err, table.Put(f.Context(), []int64{n}, [][]byte{bytes.Repeat([]byte{byte(n)}, int(10*n))}))
	}
	err = errors.Join(err, table.Close())
	tape, err1 := os.ReadFile(filepath.Join(dir, "tape"))
	index, err2 := os.ReadFile(filepath.Join(dir, "index"))
	if err = errors.Join(err, err1, err2); err != nil {
		f.Fatal(err)
	}
	f.Add(tape, index)
	f.Add(tape[:50], index)
	f.Add(tape, []byte{})
	f.Fuzz(func(t *testing.T, tape, index []byte) {
		dir := t.TempDir()
		err := errors.Join(os.WriteFile(filepath.Join(dir, "tape"), tape, 0o600), os.WriteFile(filepath.Join(dir, "index"), index, 0o600))
		if err != nil {
			t.Fatal(err)
		}
		table := open(t, dir, Options{})
		for n, r := range table.index {
			if r.off+r.n > table.end || int64(len(get(t, table, n))) != r.n {
				t.Errorf("record %d: %+v of a tape of %d", n, r, table.end)
			}
		}
		put(t, table, 5, "five")
		if err := table.Close(); err != nil {
			t.Fatal(err)
		}
		if table = open(t, dir, Options{}); get(t, table, 5) != "five" {
			t.Error("what was written is not there")
		}
		_ = table.Close()
	})
}
