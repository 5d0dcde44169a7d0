// Package keyedtest is the suite that every keyed.Table passes, alone and under
// keyed.Store.
package keyedtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"memsync/strategies/backend/keyed"
	"memsync/strategies/region"
)

// Run runs the suite. open makes a table without values; again opens the same
// values once more after Close, and is nil where they do not outlive it.
func Run(t *testing.T, open func(t *testing.T) (table keyed.Table, again func() keyed.Table)) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cases := map[string]func(t *testing.T, ctx context.Context, table keyed.Table, again func() keyed.Table){
		"Values": values, "Large": large, "Cancel": cancelled, "Atomic": atomic, "Program": program,
		"Damage": damage, "Missing": missing, "Reopen": reopen, "Closed": closedTable,
	}
	for name, f := range cases {
		t.Run(name, func(t *testing.T) {
			table, again := open(t)
			f(t, ctx, table, again)
		})
	}
}

func get(t *testing.T, ctx context.Context, table keyed.Table, numbers ...int64) map[int64]string {
	t.Helper()
	got := map[int64]string{}
	if err := table.Get(ctx, numbers, func(i int, v []byte) { got[numbers[i]] = string(v) }); err != nil {
		t.Fatal(err)
	}
	return got
}

func values(t *testing.T, ctx context.Context, table keyed.Table, _ func() keyed.Table) {
	defer table.Close()
	if got := get(t, ctx, table, 0, 1, 1<<40); len(got) != 0 {
		t.Fatalf("an empty table has %v", got)
	}
	put := func(numbers []int64, v ...string) {
		t.Helper()
		b := make([][]byte, len(v))
		for i := range v {
			b[i] = []byte(v[i])
		}
		if err := table.Put(ctx, numbers, b); err != nil {
			t.Fatal(err)
		}
	}
	put([]int64{7, 1 << 40, 0}, "seven", "\x00\xff\r\n", "a")
	put([]int64{7}, "7")
	put([]int64{7}, "7") // once more
	if got := get(t, ctx, table, 0, 3, 7, 1<<40); len(got) != 3 || got[7] != "7" || got[0] != "a" || got[1<<40] != "\x00\xff\r\n" {
		t.Errorf("got %v", got)
	}
	if err := table.Get(ctx, nil, nil); err != nil {
		t.Errorf("get nothing: %v", err)
	}
	if err := table.Flush(ctx); err != nil {
		t.Error(err)
	}
}

func large(t *testing.T, ctx context.Context, table keyed.Table, _ func() keyed.Table) {
	defer table.Close()
	const n, size = 12, 256<<10 + 8
	var numbers []int64
	var vals [][]byte
	for i := range int64(n) {
		b := make([]byte, size)
		region.Content{Seed: uint64(i)}.Fill(b, 0)
		numbers, vals = append(numbers, i*i), append(vals, b)
	}
	if err := table.Put(ctx, numbers, vals); err != nil {
		t.Fatal(err)
	}
	got := get(t, ctx, table, numbers...)
	for i, num := range numbers {
		if got[num] != string(vals[i]) {
			t.Errorf("value %d differs (%d bytes)", num, len(got[num]))
		}
	}
}

func cancelled(t *testing.T, _ context.Context, table keyed.Table, _ func() keyed.Table) {
	defer table.Close()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := table.Put(ctx, []int64{1}, [][]byte{[]byte("x")}); !errors.Is(err, context.Canceled) {
		t.Errorf("put: %v", err)
	}
	if err := table.Get(ctx, []int64{1}, func(int, []byte) {}); !errors.Is(err, context.Canceled) {
		t.Errorf("get: %v", err)
	}
}

// atomic: beside writers, a value is always one that was written, whole.
func atomic(t *testing.T, ctx context.Context, table keyed.Table, _ func() keyed.Table) {
	defer table.Close()
	var wg sync.WaitGroup
	const size = 64 << 10
	if err := table.Put(ctx, []int64{5}, [][]byte{bytes.Repeat([]byte{0}, size)}); err != nil {
		t.Fatal(err)
	}
	for w := range 3 {
		wg.Go(func() {
			for i := range 20 {
				if err := table.Put(ctx, []int64{5}, [][]byte{bytes.Repeat([]byte{byte(w*20 + i)}, size)}); err != nil {
					t.Error(err)
				}
			}
		})
		wg.Go(func() {
			for range 20 {
				err := table.Get(ctx, []int64{5}, func(_ int, v []byte) {
					if len(v) != size || bytes.Count(v, v[:1]) != size {
						t.Errorf("a torn value of %d bytes", len(v))
					}
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func newStore(t *testing.T, table keyed.Table, o keyed.Options) *keyed.Store {
	t.Helper()
	s, err := keyed.New(table, o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// program: random reads and writes against a plain slice.
func program(t *testing.T, ctx context.Context, table keyed.Table, _ func() keyed.Table) {
	const size, chunk = 5<<14 + 123, 1 << 12
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	s := newStore(t, table, keyed.Options{Size: size, Chunk: chunk, Batch: 3, Parallel: 2})
	defer s.Close()
	model := make([]byte, size)
	c := region.Content{Seed: seed}
	c.Fill(model, 0)
	if err := s.Fill(ctx, func(p []byte, off int64) error { c.Fill(p, off); return nil }); err != nil {
		t.Fatal(err)
	}
	for step := range 150 {
		off := r.Int64N(size + 1)
		n := min(r.Int64N(4*chunk), size-off)
		if r.IntN(3) == 0 {
			off, n = off&^(chunk-1), min(n&^(chunk-1), size-off&^(chunk-1))
		}
		p := make([]byte, n)
		switch r.IntN(8) {
		case 0:
			if err := s.Flush(ctx); err != nil {
				t.Fatal(err)
			}
		case 1, 2, 3:
			region.Content{Seed: seed + uint64(step)}.Fill(p, off)
			if err := s.WriteAt(ctx, p, off); err != nil {
				t.Fatal(err)
			}
			copy(model[off:], p)
		default:
			if err := s.ReadAt(ctx, p, off); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(p, model[off:off+n]) {
				t.Fatalf("seed %d step %d: %d bytes at %d differ", seed, step, n, off)
			}
		}
	}
	// Writers of neighbouring bytes of one chunk lose nothing of each other.
	var wg sync.WaitGroup
	for w := range int64(4) {
		p := bytes.Repeat([]byte{byte(w + 1)}, 100)
		copy(model[chunk+100*w:], p)
		wg.Go(func() {
			if err := s.WriteAt(ctx, p, chunk+100*w); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	p := make([]byte, size)
	if err := s.ReadAt(ctx, p, 0); err != nil || !bytes.Equal(p, model) {
		t.Errorf("seed %d: the whole differs: %v", seed, err)
	}
	for _, bad := range [][2]int64{{-1, 1}, {size, 1}, {0, size + 1}, {1 << 62, 4096}} {
		if err := s.ReadAt(ctx, make([]byte, min(bad[1], size+1)), bad[0]); !errors.Is(err, region.ErrOutOfRange) {
			t.Errorf("read %v: %v", bad, err)
		}
	}
}

// damage: what is not what was written is named and never returned.
func damage(t *testing.T, ctx context.Context, table keyed.Table, _ func() keyed.Table) {
	const chunk = 1 << 12
	s := newStore(t, table, keyed.Options{Size: 4 * chunk, Chunk: chunk, Retry: 2 * time.Second})
	defer s.Close()
	if err := s.Fill(ctx, func(p []byte, off int64) error { region.Content{Seed: 1}.Fill(p, off); return nil }); err != nil {
		t.Fatal(err)
	}
	var first []byte
	if err := table.Get(ctx, []int64{0}, func(_ int, v []byte) { first = bytes.Clone(v) }); err != nil {
		t.Fatal(err)
	}
	flipped := bytes.Clone(first)
	flipped[17] ^= 4
	for name, v := range map[string][]byte{"truncated": first[:len(first)-1], "longer": append(bytes.Clone(first), 0), "another's": first, "empty": {}, "flipped": flipped} {
		number := int64(2)
		if name == "flipped" {
			number = 0
		}
		if err := table.Put(ctx, []int64{number}, [][]byte{v}); err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 10)
		err := s.ReadAt(ctx, p, number*chunk+5)
		if !errors.Is(err, region.ErrMismatch) || !bytes.Contains([]byte(err.Error()), fmt.Appendf(nil, "chunk %d", number)) {
			t.Errorf("%s: %v", name, err)
		}
		if !bytes.Equal(p, make([]byte, 10)) {
			t.Errorf("%s: bytes were returned", name)
		}
		// A whole write mends it, one of a part does not hide it.
		if err := s.WriteAt(ctx, []byte{1}, number*chunk); !errors.Is(err, region.ErrMismatch) {
			t.Errorf("%s: written in part: %v", name, err)
		}
		if err := s.WriteAt(ctx, make([]byte, chunk), number*chunk); err != nil {
			t.Errorf("%s: written whole: %v", name, err)
		}
		if err := s.ReadAt(ctx, p, number*chunk+5); err != nil {
			t.Errorf("%s, mended: %v", name, err)
		}
	}
}

func missing(t *testing.T, ctx context.Context, table keyed.Table, _ func() keyed.Table) {
	defer table.Close()
	p := []byte{1, 2}
	strict := newStore(t, table, keyed.Options{Size: 1 << 14, Chunk: 1 << 12})
	if err := strict.ReadAt(ctx, p, 4095); !errors.Is(err, region.ErrMissing) {
		t.Errorf("a chunk that is not there: %v", err)
	}
	sparse := newStore(t, table, keyed.Options{Size: 1 << 14, Chunk: 1 << 12, Missing: keyed.MissingZero})
	if err := sparse.ReadAt(ctx, p, 4095); err != nil || p[0] != 0 || p[1] != 0 {
		t.Errorf("%v, %v", p, err)
	}
	if err := sparse.WriteAt(ctx, []byte{9}, 4096); err != nil {
		t.Fatal(err)
	}
	if err := sparse.ReadAt(ctx, p, 4095); err != nil || p[0] != 0 || p[1] != 9 {
		t.Errorf("%v, %v", p, err)
	}
}

func reopen(t *testing.T, ctx context.Context, table keyed.Table, again func() keyed.Table) {
	if again == nil {
		table.Close()
		t.Skip("values of this table end with it")
	}
	o := keyed.Options{Size: 10000, Chunk: 1 << 12}
	s := newStore(t, table, o)
	c := region.Content{Seed: 3}
	err := s.Fill(ctx, func(p []byte, off int64) error { c.Fill(p, off); return nil })
	if err = errors.Join(err, s.Flush(ctx), s.Close()); err != nil {
		t.Fatal(err)
	}
	s = newStore(t, again(), o)
	defer s.Close()
	got, want := make([]byte, o.Size), make([]byte, o.Size)
	c.Fill(want, 0)
	if err := s.ReadAt(ctx, got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("content differs after it was opened again: %v", err)
	}
}

func closedTable(t *testing.T, ctx context.Context, table keyed.Table, _ func() keyed.Table) {
	s := newStore(t, table, keyed.Options{Size: 1 << 14, Chunk: 1 << 12})
	if err := errors.Join(s.Close(), s.Close()); err != nil {
		t.Error(err)
	}
	for _, err := range []error{s.ReadAt(ctx, make([]byte, 1), 0), s.WriteAt(ctx, make([]byte, 1), 0), s.Flush(ctx)} {
		if !errors.Is(err, region.ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
	}
}
