package encrypt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"memsync/strategies/backend/directory"
	"memsync/strategies/backend/keyed"
	"memsync/strategies/backend/keyed/keyedtest"
	"memsync/strategies/backend/kv"
	"memsync/strategies/region"
)

var bg = context.Background()

func key(b byte) Key { return Key{[keySize]byte(bytes.Repeat([]byte{b}, keySize))} }

// must panics where what a test needs cannot be had.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// TestTable: the suite of all tables, over two that are files.
func TestTable(t *testing.T) {
	for name, inner := range map[string]func(dir string) (keyed.Table, error){
		"kv": func(dir string) (keyed.Table, error) { return kv.Open(filepath.Join(dir, "db")) },
		"directory": func(dir string) (keyed.Table, error) {
			d := filepath.Join(dir, "chunks")
			if err := os.MkdirAll(d, 0o700); err != nil {
				return nil, err
			}
			return directory.Open(d, 8)
		},
	} {
		t.Run(name, func(t *testing.T) {
			keyedtest.Run(t, func(t *testing.T) (keyed.Table, func() keyed.Table) {
				dir := t.TempDir()
				open := func() keyed.Table { return must(inner(dir)) }
				first := must(New(open(), key(1), nil))
				return first, func() keyed.Table { return must(New(open(), key(1), must(first.Record()))) }
			})
		})
	}
}

// store is a table that its owner may change at will.
type store map[int64][]byte

func (s store) Get(_ context.Context, numbers []int64, use func(int, []byte)) error {
	for i, n := range numbers {
		if v, ok := s[n]; ok {
			use(i, v)
		}
	}
	return nil
}

func (s store) Put(_ context.Context, numbers []int64, values [][]byte) error {
	for i, n := range numbers {
		s[n] = bytes.Clone(values[i])
	}
	return nil
}
func (store) Flush(context.Context) error { return nil }
func (store) Close() error                { return nil }

// TestTamper: whatever the owner of the store does to it is noticed by who reads, named,
// and not returned; also with zeroes for what is missing.
func TestTamper(t *testing.T) {
	const chunk, chunks = 4096, 4
	for name, c := range map[string]struct {
		change func(s store, old store)
		want   error
	}{
		"a bit of the data": {func(s, _ store) { s[1][headSize+100] ^= 1 }, ErrForged},
		"a bit of the tag":  {func(s, _ store) { s[1][len(s[1])-1] ^= 1 }, ErrForged},
		"the nonce":         {func(s, _ store) { s[1][headSize-1] ^= 1 }, ErrForged},
		"the version":       {func(s, _ store) { s[1][1+idSize+7] ^= 1 }, ErrForged},
		"the format":        {func(s, _ store) { s[1][0] = 2 }, ErrForged},
		"cut short":         {func(s, _ store) { s[1] = s[1][:Overhead-1] }, ErrForged},
		"longer":            {func(s, _ store) { s[1] = append(s[1], 0) }, ErrForged},
		"empty":             {func(s, _ store) { s[1] = nil }, ErrForged},
		"another chunk":     {func(s, _ store) { s[1], s[2] = s[2], s[1] }, ErrForged},
		"an older version":  {func(s, old store) { s[1] = old[1] }, ErrOld},
		"all older":         {func(s, old store) { maps.Copy(s, old) }, ErrOld},
		"gone":              {func(s, _ store) { delete(s, 1) }, ErrOld},
		"of another region": {func(s, _ store) {
			other, theirs := must(New(store{}, key(1), nil)), store{}
			other.inner = theirs
			_ = other.Put(bg, []int64{1}, [][]byte{make([]byte, chunk+8)})
			s[1] = theirs[1]
		}, ErrForged},
		"of another key": {func(s, _ store) {
			other, theirs := must(New(store{}, key(2), nil)), store{}
			other.inner = theirs
			_ = other.Put(bg, []int64{1}, [][]byte{make([]byte, chunk+8)})
			s[1] = theirs[1]
		}, ErrKey},
	} {
		t.Run(name, func(t *testing.T) {
			s := store{}
			table := must(New(s, key(1), nil))
			r := must(keyed.New(table, keyed.Options{Size: chunk * chunks, Chunk: chunk, Missing: keyed.MissingZero}))
			want := make([]byte, chunk*chunks)
			region.Content{Seed: 1}.Fill(want, 0)
			if err := r.WriteAt(bg, want, 0); err != nil {
				t.Fatal(err)
			}
			old := store{}
			for n, v := range s {
				old[n] = bytes.Clone(v)
			}
			region.Content{Seed: 2}.Fill(want, 0)
			if err := r.WriteAt(bg, want, 0); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(want))
			if err := r.ReadAt(bg, got, 0); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("before: %v", err)
			}
			for _, v := range s {
				if bytes.Contains(v, want[:64]) {
					t.Error("the store has the bytes in the clear")
				}
			}
			c.change(s, old)
			p := bytes.Repeat([]byte{0xEE}, chunk)
			err := r.ReadAt(bg, p, chunk)
			if !errors.Is(err, c.want) || !strings.Contains(fmt.Sprint(err), "chunk 1") {
				t.Errorf("%v, want %v of chunk 1", err, c.want)
			}
			if c.want != ErrKey && !errors.Is(err, region.ErrMismatch) {
				t.Errorf("%v is no mismatch", err)
			}
			if !bytes.Equal(p, bytes.Repeat([]byte{0xEE}, chunk)) {
				t.Error("bytes were returned")
			}
		})
	}
}

// TestRecord: after a restart too nothing older is taken for the last, unless the record
// is older as well, which is said in docs/backends.md.
func TestRecord(t *testing.T) {
	s := store{}
	table := must(New(s, key(1), nil))
	put := func(v string) {
		t.Helper()
		if err := table.Put(bg, []int64{3}, [][]byte{[]byte(v)}); err != nil {
			t.Fatal(err)
		}
	}
	put("one")
	oldRecord, oldStore := must(table.Record()), maps.Clone(s)
	put("two")
	record := must(table.Record())
	read := func(s store, record []byte) (v string, err error) {
		t.Helper()
		again, err := New(s, key(1), record)
		if err != nil {
			return "", err
		}
		err = again.Get(bg, []int64{3}, func(_ int, b []byte) { v = string(b) })
		return v, err
	}
	if v, err := read(s, record); v != "two" || err != nil {
		t.Errorf("%q, %v", v, err)
	}
	if _, err := read(oldStore, record); !errors.Is(err, ErrOld) {
		t.Errorf("an older store: %v", err)
	}
	if _, err := read(store{}, record); !errors.Is(err, ErrOld) {
		t.Errorf("an empty store: %v", err)
	}
	if _, err := read(s, oldRecord); !errors.Is(err, ErrOld) { // newer than it can be
		t.Errorf("an older record: %v", err)
	}
	if v, err := read(oldStore, oldRecord); v != "one" || err != nil { // what cannot be noticed
		t.Errorf("an older store with the record of then: %q, %v", v, err)
	}
	if _, err := New(s, key(2), record); !errors.Is(err, ErrKey) {
		t.Errorf("another key: %v", err)
	}
	for i := range record {
		bad := bytes.Clone(record)
		bad[i] ^= 1
		if _, err := New(s, key(1), bad); err == nil {
			t.Errorf("byte %d of the record was changed", i)
		}
	}
}

// failing is a store whose Put fails, after it was done or before.
type failing struct {
	store
	after bool
}

func (f *failing) Put(ctx context.Context, numbers []int64, values [][]byte) error {
	if f.after {
		_ = f.store.Put(ctx, numbers, values)
	}
	return errors.New("no")
}

// TestFailedPut: after a write that failed either value is right, until one succeeds.
func TestFailedPut(t *testing.T) {
	for _, after := range []bool{false, true} {
		s := store{}
		table := must(New(s, key(1), nil))
		if err := table.Put(bg, []int64{0}, [][]byte{[]byte("old")}); err != nil {
			t.Fatal(err)
		}
		table.inner = &failing{s, after}
		if table.Put(bg, []int64{0}, [][]byte{[]byte("new")}) == nil {
			t.Error("it went well")
		}
		want := map[bool]string{false: "old", true: "new"}[after]
		for _, tb := range []*Table{table, must(New(s, key(1), must(table.Record())))} {
			if err := tb.Get(bg, []int64{0}, func(_ int, b []byte) {
				if string(b) != want {
					t.Errorf("%q, want %q", b, want)
				}
			}); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestReadKey(t *testing.T) {
	dir := t.TempDir()
	write := func(text string) string {
		p := filepath.Join(dir, "key")
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	for _, text := range []string{strings.Repeat("a", 32), strings.Repeat("61", 32) + "\n", "YWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWE=\n"} {
		k, err := ReadKey(write(text))
		if err != nil || k != key('a') {
			t.Errorf("%q: %v", text, err)
		}
	}
	for _, text := range []string{"", "secretsecret", strings.Repeat("z", 64), strings.Repeat("61", 33)} {
		if _, err := ReadKey(write(text)); err == nil || text != "" && strings.Contains(err.Error(), text) {
			t.Errorf("%q: %v", text, err)
		}
	}
	t.Setenv(KeyEnv, strings.Repeat("61", 32))
	if k, err := ReadKey("env"); err != nil || k != key('a') {
		t.Error(err)
	}
	if s := fmt.Sprintf("%v %+v %#v %s", key('a'), key('a'), key('a'), key('a')); strings.Contains(s, "97") || strings.Contains(s, "aaa") || strings.Contains(s, "0x61") {
		t.Errorf("a key is printed: %s", s)
	}
}

// FuzzOpen: a value that opens is one that was sealed.
func FuzzOpen(f *testing.F) {
	table := must(New(store{}, key(1), nil))
	good, err := table.seal(5, 7, []byte("a chunk"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:Overhead])
	f.Add([]byte{formatOne})
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, _, err := table.open(5, b); err == nil && !bytes.Equal(b, good) {
			t.Fatalf("%x opens", b)
		}
	})
}

// FuzzRecord: what is decoded is written the same again.
func FuzzRecord(f *testing.F) {
	f.Add([]byte{})
	f.Add(make([]byte, 24))
	f.Add(append(append(append(make([]byte, 7), 1), append(make([]byte, 7), 2)...), append(make([]byte, 7), 3)...))
	f.Add(bytes.Repeat([]byte{0xff}, 48))
	f.Fuzz(func(t *testing.T, plain []byte) {
		table := must(New(store{}, key(1), nil))
		if table.decode(plain) != nil {
			return
		}
		record := must(table.Record())
		again := must(New(store{}, key(1), record))
		if len(again.versions) != len(plain)/24 {
			t.Fatalf("%d versions of %d bytes", len(again.versions), len(plain))
		}
		for n, v := range table.versions {
			if *again.versions[n] != *v {
				t.Fatalf("chunk %d: %v, %v", n, *v, *again.versions[n])
			}
		}
	})
}
