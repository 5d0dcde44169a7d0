package role

import (
	"bytes"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func visits(s *sequence) []int64 {
	var v []int64
	for p, ok := s.next(); ok; p, ok = s.next() {
		v = append(v, p)
	}
	return v
}

var lengths = []int64{0, 1, 2, 3, 4, 5, 16, 17, 1000, 1021, 4096}

func TestPermutations(t *testing.T) {
	for _, n := range lengths {
		for _, first := range []int64{0, 5000} {
			for seed := range uint64(5) {
				for _, access := range []string{"seq", "reverse", "random"} {
					v := visits(newSequence(access, first, n, seed))
					sorted := slices.Sorted(slices.Values(v))
					for i, p := range sorted {
						if p != first+int64(i) {
							t.Fatalf("%s of %d pages from %d: visits %v", access, n, first, v)
						}
					}
					if int64(len(v)) != n {
						t.Fatalf("%s of %d pages: %d visits", access, n, len(v))
					}
					if access == "seq" && !slices.IsSorted(v) {
						t.Errorf("seq goes %v", v)
					}
					slices.Reverse(v)
					if access == "reverse" && !slices.IsSorted(v) {
						t.Errorf("reverse does not go backwards over %d pages", n)
					}
				}
			}
		}
	}
}

func TestRandomIsNotSequential(t *testing.T) {
	const n = 4096
	for seed := range uint64(20) {
		v := visits(newSequence("random", 0, n, seed))
		next := 0
		for i := 1; i < n; i++ {
			if d := v[i] - v[i-1]; d == 1 || d == -1 {
				next++
			}
		}
		if next > n/10 {
			t.Errorf("seed %d: %d of %d steps go to a neighbour", seed, next, n)
		}
	}
}

// TestHuge: no overflow in regions of 2^40 pages (4 PiB).
func TestHuge(t *testing.T) {
	const n = 1<<40 + 7
	for _, access := range Accesses() {
		s, seen := newSequence(access, 0, n, 1), map[int64]bool{}
		for range 1000 {
			p, ok := s.next()
			if !ok || p < 0 || p >= n || access != "zipf" && seen[p] {
				t.Fatalf("%s: page %d of %d (again: %t)", access, p, int64(n), seen[p])
			}
			seen[p] = true
		}
	}
}

func TestDeterministic(t *testing.T) {
	for _, access := range Accesses() {
		one := visits(newSequence(access, 10, 500, 42))
		if !slices.Equal(one, visits(newSequence(access, 10, 500, 42))) {
			t.Errorf("%s differs from itself", access)
		}
		other := slices.Equal(one, visits(newSequence(access, 10, 500, 43)))
		if random := access == "random" || access == "zipf"; random == other {
			t.Errorf("%s: another seed gives the same order: %t", access, other)
		}
	}
}

// TestZipf compares the ranks' frequencies with 1/r^0.99 and the pages with
// their range.
func TestZipf(t *testing.T) {
	for _, n := range lengths[1:] {
		v := visits(newSequence("zipf", 100, n, 3))
		if int64(len(v)) != n {
			t.Errorf("zipf over %d pages: %d visits", n, len(v))
		}
		for _, p := range v {
			if p < 100 || p >= 100+n {
				t.Fatalf("zipf over %d pages visits %d", n, p)
			}
		}
	}
	const n, draws = 1000, 200000
	z := newZipf(n, 0.99, rand.New(rand.NewPCG(1, 2)))
	var count [n]float64
	for range draws {
		count[z.next()]++
	}
	sum := 0.0
	for r := 1; r <= n; r++ {
		sum += math.Pow(float64(r), -0.99)
	}
	for _, r := range []int{1, 2} { // exact; the others follow a continuous curve
		want := draws * math.Pow(float64(r), -0.99) / sum
		if got := count[r-1]; math.Abs(got-want) > 0.05*want {
			t.Errorf("rank %d: %g draws, want about %g", r, got, want)
		}
	}
	head, want := 0.0, 0.0
	for r := 1; r <= 100; r++ {
		head += count[r-1]
		want += draws * math.Pow(float64(r), -0.99) / sum
	}
	if math.Abs(head-want) > 0.05*want {
		t.Errorf("the first 100 of 1000 ranks: %g draws, want about %g", head, want)
	}
}

func TestSplit(t *testing.T) {
	for _, pages := range []int64{0, 1, 2, 7, 4096, 1 << 40} {
		for _, n := range []int{1, 2, 3, 8, 256} {
			at := int64(0)
			for i := range n {
				first, count := split(pages, i, n)
				if first != at || count < 0 || count > pages/int64(n)+1 {
					t.Fatalf("part %d of %d of %d pages: [%d, +%d), want it to begin at %d", i, n, pages, first, count, at)
				}
				at += count
			}
			if at != pages {
				t.Errorf("%d parts of %d pages cover %d", n, pages, at)
			}
		}
	}
}

// TestSequencesCover: all threads together visit every page once.
func TestSequencesCover(t *testing.T) {
	for _, access := range []string{"seq", "random", "random:4KiB", "random:8KiB", "random:1MiB", "reverse"} {
		for _, threads := range []int{1, 3, 8} {
			w := Work{Access: access, Threads: threads, Size: 5*page + 1, Seed: 5}
			var all []int64
			seqs, err := w.sequences()
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range seqs {
				all = append(all, visits(s)...)
			}
			slices.Sort(all)
			if !slices.Equal(all, []int64{0, 1, 2, 3, 4, 5}) {
				t.Errorf("%s, %d threads: pages %v", access, threads, all)
			}
			off, n := w.pageRange(5)
			if off != 5*page || n != 1 {
				t.Errorf("the last page is [%d, +%d)", off, n)
			}
		}
	}
}

func TestCheckAccess(t *testing.T) {
	for _, a := range append(Accesses(), "trace:x", "program:x", "random:64KiB", "random:4096") {
		if err := CheckAccess(a, 1); err != nil {
			t.Error(err)
		}
	}
	if err := CheckAccess("zipf", 4); err != nil {
		t.Error(err)
	}
	for _, a := range []string{"trace:x", "program:x"} {
		if err := CheckAccess(a, 2); err == nil {
			t.Errorf("%s has threads of its own", a)
		}
	}
	for _, bad := range []string{"sideways", "trace:", "trace", "program:", "program", "random:", "random:1", "random:0", "random:5000", "seq:4KiB"} {
		if err := CheckAccess(bad, 1); err == nil || !strings.HasSuffix(err.Error(), `; valid: seq, random, reverse, zipf, random:SIZE (whole pages), trace:FILE, program:NAME`) {
			t.Errorf("CheckAccess(%q) = %v", bad, err)
		}
	}
}

// TestTracePages: a trace visits the pages that its ranges touch, again and again if it says so.
func TestTracePages(t *testing.T) {
	file := filepath.Join(t.TempDir(), "trace")
	if err := os.WriteFile(file, []byte("8192 1\n4095 2 # two pages\n0 12288\n8192 5\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	w := Work{Access: "trace:" + file, Size: 12288 + 5, Threads: 1}
	s, err := w.sequences()
	if err != nil {
		t.Fatal(err)
	}
	if got, want := visits(s[0]), []int64{2, 0, 1, 0, 1, 2, 2}; !slices.Equal(got, want) {
		t.Errorf("visits %v, want %v", got, want)
	}
	w.Size = 8192
	if _, err := w.sequences(); err == nil || !strings.Contains(err.Error(), file+": line 1") {
		t.Errorf("a trace of a larger region: %v", err)
	}
}

// TestTodo: the lines of a TODO list are text of one length, and each change is another line.
func TestTodo(t *testing.T) {
	k := AppWork{Size: 1 << 20, Writer: "todo"}
	p, q := make([]byte, k.record()), make([]byte, k.record())
	k.fill(p, 3, 10*k.record())
	k.fill(q, 4, 10*k.record())
	if got := strings.TrimRight(string(p), " \n"); got != "[x] item 10, changed by change 3" || p[len(p)-1] != '\n' || bytes.Equal(p, q) {
		t.Errorf("%q, %q", p, q)
	}
}
