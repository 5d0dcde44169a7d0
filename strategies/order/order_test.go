package order

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"memsync/strategies/region"
	"memsync/strategies/replay"
)

// firsts returns, for each byte in the order in which o yields it for the first
// time, its offset; a last linear sweep ends it, as in a puller.
func firsts(o Order, size, extent int64) []int64 {
	var all []int64
	seen := make([]bool, size)
	take := func(r Range) {
		for x := max(r.Off, 0); x < min(r.End, size); x++ {
			if !seen[x] {
				seen[x] = true
				all = append(all, x)
			}
		}
	}
	for r := range o.Ranges(size, extent) {
		take(r)
	}
	take(Range{0, size})
	return all
}

// TestPermutation: with the sweep at its end every order is a permutation of
// the region's bytes; the fixed orders are one by themselves, and each is in its order.
func TestPermutation(t *testing.T) {
	r := rand.New(rand.NewPCG(replay.Seed(t), 1))
	for range 2000 {
		size, extent := r.Int64N(60), 1+r.Int64N(9)
		var list []Range
		for range r.IntN(8) {
			off := r.Int64N(70)
			list = append(list, Range{off, off + 1 + r.Int64N(20)})
		}
		n := r.Int64N(20)
		for name, o := range map[string]Order{"linear": Linear(), "reverse": Reverse(), "random": Random(r.Uint64()),
			"list": List(list), "first": First(n), "first, then random": Then(First(n), Random(7))} {
			all := firsts(o, size, extent)
			seen := map[int64]bool{}
			for _, x := range all {
				if x < 0 || x >= size || seen[x] {
					t.Fatalf("%s of %d bytes by %d yields %v", name, size, extent, all)
				}
				seen[x] = true
			}
			if int64(len(all)) != size {
				t.Fatalf("%s yields %d of %d bytes", name, len(all), size)
			}
			switch {
			case name == "linear" && size > 0 && (all[0] != 0 || all[size-1] != size-1):
				t.Fatalf("linear is %v", all)
			case name == "reverse" && size > 0 && (all[0] != (size-1)/extent*extent || all[size-1] != min(extent, size)-1):
				t.Fatalf("reverse by %d is %v", extent, all)
			case name == "list" && len(list) > 0 && list[0].Off < size && all[0] != list[0].Off:
				t.Fatalf("list %v is %v", list, all)
			case name == "first, then random":
				for i := range min(n, size) {
					if all[i] != i {
						t.Fatalf("the first %d bytes do not come first: %v", n, all)
					}
				}
			}
		}
		var total int64
		for _, o := range []Order{Linear(), Reverse(), Random(3)} {
			total = 0
			for r := range o.Ranges(size, extent) {
				total += r.End - r.Off
			}
			if total != size {
				t.Fatalf("an order yields %d of %d bytes by itself", total, size)
			}
		}
	}
}

// TestListMerges: neighbours that follow each other are one range, so that they are one request.
func TestListMerges(t *testing.T) {
	var got []Range
	for r := range List([]Range{{0, 4}, {4, 8}, {6, 9}, {20, 21}, {8, 12}, {0, 2}}).Ranges(100, 4) {
		got = append(got, r)
	}
	if want := []Range{{0, 9}, {20, 21}, {8, 12}, {0, 2}}; !reflect.DeepEqual(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// TestRandomIsSeeded: the same seed gives the same order, another seed another.
func TestRandomIsSeeded(t *testing.T) {
	a, b, c := firsts(Random(1), 1000, 10), firsts(Random(1), 1000, 10), firsts(Random(2), 1000, 10)
	if !reflect.DeepEqual(a, b) || reflect.DeepEqual(a, c) {
		t.Error("random must depend on its seed, and on nothing else")
	}
}

func TestParse(t *testing.T) {
	file := filepath.Join(t.TempDir(), "order")
	write := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("# a comment\n8 4 0.5\n\n0 1KiB # the start\n")
	o, err := Parse("trace:"+file, 2048, 0)
	if err != nil {
		t.Fatal(err)
	}
	if all := firsts(o, 2048, 512); all[0] != 8 || all[4] != 0 || all[1024] != 1024 {
		t.Errorf("the trace's order is %v...", all[:8])
	}
	write("0 4 -1\n4 4 7\n8 4\n12 4 7\n")
	if o, err = Parse("priority:"+file, 16, 0); err != nil {
		t.Fatal(err)
	}
	if all := firsts(o, 16, 4); all[0] != 4 || all[4] != 12 || all[8] != 8 || all[12] != 0 {
		t.Errorf("the priorities' order is %v", all)
	}
	for _, c := range []struct{ spec, text, want string }{
		{"sideways", "", `unknown order "sideways"; valid: linear, reverse, random, trace:FILE, priority:FILE, format`},
		{"trace", "", "trace:FILE"},
		{"trace:", "", "trace:FILE"},
		{"linear:x", "", "takes no file"},
		{"trace:/does/not/exist", "", "/does/not/exist"},
		{"trace:" + file, "", file + ": no entry"},
		{"trace:" + file, "0 1\nx 1\n", file + ": line 2: offset: \"x\""},
		{"trace:" + file, "0 1\n\n0 0\n", "line 3: length 0"},
		{"trace:" + file, "0\n", "line 1: 1 fields; want OFFSET LENGTH [SECONDS]"},
		{"trace:" + file, "0 1 2 3\n", "4 fields"},
		{"trace:" + file, "0 1 soon\n", `"soon" is not a time`},
		{"trace:" + file, "0 1 NaN\n", "not a time"},
		{"trace:" + file, "0 17\n", "line 1: range [0, +17) of 16 bytes: out of range"},
		{"trace:" + file, "-1 4\n", "offset"},
		{"priority:" + file, "0 1 high\n", `line 1: "high" is not a whole number; want OFFSET LENGTH [PRIORITY]`},
		{"trace:" + file, "0 1\n" + strings.Repeat("9", 5000), "line 2: longer than 4096 bytes"},
	} {
		write(c.text)
		if _, err := Parse(c.spec, 16, 0); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s with %.20q: %v; want %q in it", c.spec, c.text, err, c.want)
		}
	}
	write("0 17\n")
	if _, err := Parse("trace:"+file, 16, 0); !errors.Is(err, region.ErrOutOfRange) {
		t.Errorf("a range beyond the region: %v", err)
	}
	if _, err := Parse("format", 16, 0); err == nil {
		t.Error("format is not Parse's")
	}
}

// endless gives lines for ever.
type endless struct{ n int64 }

func (e *endless) Read(p []byte) (int, error) {
	n := copy(p, strings.Repeat("0 1\n", len(p)/4+1))
	n -= n % 4
	e.n += int64(n)
	return max(n, 1), nil
}

// TestTooMany: a file without an end is refused, and takes bounded memory.
func TestTooMany(t *testing.T) {
	e := &endless{}
	_, err := ParseTrace(e, 1)
	if err == nil || !strings.Contains(err.Error(), "more than") || e.n > 5*MaxEntries {
		t.Errorf("%v after %d bytes", err, e.n)
	}
}

// FuzzFile: whatever a file holds, parsing it ends in an error or in ranges of
// the region, and a trace that is written is read again.
func FuzzFile(f *testing.F) {
	for _, s := range []string{"", "0 4096\n", "0 4KiB 0.25 # x\n64KiB 1MiB\n", "1 1 -5\n", "9223372036854775807 1", "0 1 1e300", "\x00", "0\t1\r\n", "0 1.5"} {
		f.Add([]byte(s), int64(1<<20))
	}
	f.Fuzz(func(t *testing.T, b []byte, size int64) {
		for _, parse := range []func(io.Reader, int64) ([]Entry, error){ParseTrace, ParsePriority} {
			entries, err := parse(bytes.NewReader(b), size)
			for i, e := range entries {
				if e.Off < 0 || e.End <= e.Off || e.End > size || e.Time < 0 {
					t.Fatalf("entry %v in %d bytes", e, size)
				}
				if i > 0 && entries[i-1].Priority < e.Priority {
					t.Fatal("not sorted")
				}
			}
			if err != nil {
				continue
			}
			var out bytes.Buffer
			if err := WriteTrace(&out, "again\nand again", entries); err != nil {
				t.Fatal(err)
			}
			again, err := ParseTrace(&out, size)
			if err != nil || !reflect.DeepEqual(Ranges(again), Ranges(entries)) {
				t.Fatalf("%v comes back as %v, %v", entries, again, err)
			}
		}
	})
}

// memory is a Store in a slice, with views.
type memory struct {
	region.Store
	b []byte
}

func (m memory) Size() int64                      { return int64(len(m.b)) }
func (m memory) View(off, n int64) ([]byte, bool) { return m.b[off : off+n], off > 0 }

func TestRecorder(t *testing.T) {
	r := NewRecorder(memory{b: make([]byte, 100)})
	if _, ok := r.View(7, 3); !ok {
		t.Error("a view is lost")
	}
	if _, ok := r.View(0, 3); ok {
		t.Error("a view that the store refuses")
	}
	r.Note(50, 9)
	file := filepath.Join(t.TempDir(), "trace")
	if err := r.Save(file); err != nil {
		t.Fatal(err)
	}
	entries, err := ReadFile(file, 100, ParseTrace)
	if err != nil {
		t.Fatal(err)
	}
	if want := []Range{{7, 10}, {50, 59}}; !reflect.DeepEqual(Ranges(entries), want) {
		t.Errorf("recorded %v, want %v", entries, want)
	}
	if entries[1].Time < entries[0].Time || entries[1].Time > time.Minute {
		t.Errorf("times %v, %v", entries[0].Time, entries[1].Time)
	}
	if err := r.Save(filepath.Join(file, "no", "folder")); err == nil {
		t.Error("a folder that is not there must be an error")
	}
	if left, _ := filepath.Glob(fmt.Sprintf("%s.*", file)); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
