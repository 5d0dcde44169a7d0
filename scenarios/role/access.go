package role

import (
	"fmt"
	"math"
	"math/bits"
	"math/rand/v2"
	"slices"
	"strings"

	"memsync/strategies/order"
	"memsync/strategies/region"
)

// Accesses lists the access patterns, but for traces.
func Accesses() []string { return []string{"seq", "random", "reverse", "zipf"} }

// tracePrefix begins the access pattern "trace:FILE": the pages of a trace
// (docs/pull-order.md), in its order, as fast as they come.
const tracePrefix = "trace:"

// ProgramPrefix begins the access pattern "program:NAME": a real program works on the
// region (package program), in place of the workload's own touches.
const ProgramPrefix = "program:"

// ProgramOf returns the name in an access pattern "program:NAME".
func ProgramOf(access string) (name string, ok bool) {
	return strings.CutPrefix(access, ProgramPrefix)
}

// CheckAccess returns an error that lists the valid patterns unless name is one
// that threads threads can follow. It opens no file.
func CheckAccess(name string, threads int) error {
	if file, ok := ProgramOf(name); ok && file != "" {
		if threads > 1 {
			return fmt.Errorf("access pattern %s with %d threads: a program has its own", name, threads)
		}
		return nil
	}
	if file, ok := strings.CutPrefix(name, tracePrefix); ok && file != "" {
		if threads > 1 {
			return fmt.Errorf("access pattern %s with %d threads: a trace is one thread's", name, threads)
		}
		return nil
	}
	if _, ok := blockOf(name); ok || slices.Contains(Accesses(), name) {
		return nil
	}
	return fmt.Errorf("unknown access pattern %q; valid: %s, random:SIZE (whole pages), trace:FILE, program:NAME", name, strings.Join(Accesses(), ", "))
}

// blockOf returns the pages of a block of the pattern random:SIZE.
func blockOf(access string) (pages int64, ok bool) {
	text, ok := strings.CutPrefix(access, "random:")
	if !ok {
		return 1, false
	}
	size, err := region.ParseSize(text)
	return size / page, err == nil && size >= page && size%page == 0
}

// TracePages returns the pages that an access pattern "trace:FILE" visits in a
// region of size bytes; a page may stand there often. The error of a bad file
// names file and line.
func TracePages(access string, size int64) ([]int64, error) {
	entries, err := order.ReadFile(strings.TrimPrefix(access, tracePrefix), size, order.ParseTrace)
	if err != nil {
		return nil, err
	}
	var pages []int64
	for _, e := range entries {
		for p := e.Off / page; p*page < e.End; p++ {
			if len(pages) == maxTracePages {
				return nil, fmt.Errorf("access pattern %s: more than %d pages", access, maxTracePages)
			}
			pages = append(pages, p)
		}
	}
	return pages, nil
}

// maxTracePages bounds the memory of a trace: 128 MiB.
const maxTracePages = 16 << 20

// sequence gives the pages that one thread visits, in order: pages [first,
// first+n) of the region. It is a pure function of its fields, so that the
// source can tell afterwards which pages were written.
//
// seq, reverse and random visit each page once (random in the order of an affine
// permutation of full period; random:SIZE so by blocks, the pages of a block in order,
// what is left of a block at the end last); zipf visits n pages, rank r with a probability
// proportional to 1/r^0.99 as in YCSB, ranks scattered over the pages.
type sequence struct {
	access   string
	first, n int64
	block    int64 // pages that follow each other; 1 but for random:SIZE
	blocks   int64 // whole ones in n
	a, c     int64 // random: block i is (a*i + c) mod blocks
	zipf     *zipf
	pages    []int64 // of a trace
	i        int64
}

func newSequence(access string, first, n int64, seed uint64) *sequence {
	rng := rand.New(rand.NewPCG(seed, uint64(first)))
	s := &sequence{access: access, first: first, n: n, block: 1}
	if b, ok := blockOf(access); ok {
		s.access, s.block = "random", b
	}
	s.blocks = n / s.block
	if b := s.blocks; b > 0 {
		for s.a = 1 + rng.Int64N(b); gcd(s.a, b) != 1; s.a = 1 + rng.Int64N(b) {
		}
		s.c = rng.Int64N(b)
	}
	if access == "zipf" {
		s.zipf = newZipf(n, 0.99, rng)
	}
	return s
}

func gcd(a, b int64) int64 {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

// permute scatters i over [0, blocks).
func (s *sequence) permute(i int64) int64 {
	// 128-bit product, since a*i may overflow.
	return int64(mulmod(uint64(s.a), uint64(i), uint64(s.blocks))+uint64(s.c)) % s.blocks
}

func mulmod(a, b, n uint64) uint64 {
	hi, lo := bits.Mul64(a, b)
	_, r := bits.Div64(hi%n, lo, n)
	return r
}

// next returns the next page, or ok false at the end.
func (s *sequence) next() (page int64, ok bool) {
	if s.i >= s.n {
		return 0, false
	}
	i := s.i
	s.i++
	if s.pages != nil {
		return s.pages[i], true
	}
	switch s.access {
	case "reverse":
		i = s.n - 1 - i
	case "random":
		if i < s.blocks*s.block {
			i = s.permute(i/s.block)*s.block + i%s.block
		}
	case "zipf":
		i = s.permute(s.zipf.next())
	}
	return s.first + i, true
}

// zipf draws ranks in [0, n) by the method of Gray et al., "Quickly generating
// billion-record synthetic databases", SIGMOD 1994, as YCSB does.
type zipf struct {
	n, theta, alpha, zetan, eta float64
	rng                         *rand.Rand
}

func newZipf(n int64, theta float64, rng *rand.Rand) *zipf {
	// zeta(n) summed exactly up to 10,000 terms and by its integral beyond.
	zeta := func(n int64) float64 {
		sum, exact := 0.0, min(n, 10000)
		for i := int64(1); i <= exact; i++ {
			sum += math.Pow(float64(i), -theta)
		}
		if n > exact {
			sum += (math.Pow(float64(n), 1-theta) - math.Pow(float64(exact), 1-theta)) / (1 - theta)
		}
		return sum
	}
	z := &zipf{n: float64(n), theta: theta, alpha: 1 / (1 - theta), zetan: zeta(n), rng: rng}
	z.eta = (1 - math.Pow(2/z.n, 1-theta)) / (1 - zeta(2)/z.zetan)
	return z
}

func (z *zipf) next() int64 {
	u := z.rng.Float64()
	uz := u * z.zetan
	if uz < 1 {
		return 0
	}
	if uz < 1+math.Pow(0.5, z.theta) {
		return min(1, int64(z.n)-1)
	}
	// Rounding must not lead out of [0, n), nor must the NaN that eta is where n is 2.
	return min(max(int64(z.n*math.Pow(z.eta*u-z.eta+1, z.alpha)), 0), int64(z.n)-1)
}

// split gives thread t of n its share of the pages: [first, first+count).
func split(pages int64, t, n int) (first, count int64) {
	first = pages * int64(t) / int64(n)
	return first, pages*int64(t+1)/int64(n) - first
}
