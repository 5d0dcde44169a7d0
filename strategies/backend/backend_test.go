package backend

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"

	"memsync/strategies/region"
)

var bg = context.Background()

// without lists the backends that need no server; the others are tested in package services.
func without() []string {
	return slices.DeleteFunc(Names(), NeedsService)
}

// stores opens every backend but those of chunks (package keyedtest tests them), plain and delayed, with the same content.
func stores(t *testing.T, s Spec) map[string]region.Store {
	t.Helper()
	m := map[string]region.Store{}
	for _, name := range slices.DeleteFunc(without(), Chunked) {
		for _, delayed := range []bool{false, true} {
			s.Backend = name
			st, err := Open(context.Background(), s, t.TempDir())
			if err != nil {
				t.Fatalf("%s of %d bytes: %v", name, s.Size, err)
			}
			t.Cleanup(func() {
				if err := st.Close(); err != nil {
					t.Error(err)
				}
			})
			if delayed {
				name, st = name+", delayed", Delayed{Store: st, RTT: 10 * time.Microsecond}
			}
			m[name] = st
		}
	}
	return m
}

// sizes are those around a page and a block.
func sizes() []int64 {
	p := region.PageSize()
	return []int64{1, 2, 7, 8, 9, p - 1, p, p + 1, block - 1, block, block + 1, 3*block + 5}
}

func TestContent(t *testing.T) {
	input := filepath.Join(t.TempDir(), "input")
	file := make([]byte, 4*block)
	rand.NewChaCha8([32]byte{1}).Read(file)
	if err := os.WriteFile(input, file, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, size := range sizes() {
		seeded := make([]byte, size)
		region.Content{Seed: 7}.Fill(seeded, 0)
		for _, c := range []struct {
			spec Spec
			want []byte
		}{{Spec{Size: size, Content: region.Content{Seed: 7}}, seeded}, {Spec{Size: size, Input: input}, file[:size]}} {
			for name, s := range stores(t, c.spec) {
				got := make([]byte, size)
				if err := s.ReadAt(bg, got, 0); err != nil || !bytes.Equal(got, c.want) || s.Size() != size {
					t.Errorf("%s of %d bytes (input %q): wrong content: %v", name, size, c.spec.Input, err)
				}
			}
		}
	}
}

// TestProgram compares random programs of reads and writes with a plain slice.
func TestProgram(t *testing.T) {
	for _, size := range sizes() {
		model := make([]byte, size)
		region.Content{Seed: 3}.Fill(model, 0)
		for name, s := range stores(t, Spec{Size: size, Content: region.Content{Seed: 3}}) {
			model, rng := slices.Clone(model), rand.New(rand.NewPCG(1, uint64(size)))
			for i := range 60 {
				off := rng.Int64N(size + 1)
				p := make([]byte, rng.Int64N(size-off+1))
				if i%2 == 0 {
					region.Content{Seed: uint64(i)}.Fill(p, off)
					copy(model[off:], p)
					if err := s.WriteAt(bg, p, off); err != nil {
						t.Fatalf("%s of %d bytes: write %d at %d: %v", name, size, len(p), off, err)
					}
				} else if err := s.ReadAt(bg, p, off); err != nil || !bytes.Equal(p, model[off:off+int64(len(p))]) {
					t.Fatalf("%s of %d bytes: read %d at %d is wrong: %v", name, size, len(p), off, err)
				}
			}
			if err := s.Flush(bg); err != nil {
				t.Errorf("%s: flush: %v", name, err)
			}
		}
	}
}

func TestRanges(t *testing.T) {
	const size = block + 5
	for name, s := range stores(t, Spec{Size: size}) {
		before := make([]byte, size)
		if err := s.ReadAt(bg, before, 0); err != nil {
			t.Fatal(err)
		}
		for _, r := range []struct{ off, n int64 }{{-1, 1}, {-1, 0}, {0, size + 1}, {size, 1}, {size - 1, 2}, {size + 1, 0}, {1 << 62, 1}, {-1 << 63, 8}} {
			p := bytes.Repeat([]byte{0xEE}, int(r.n))
			for op, err := range map[string]error{"read": s.ReadAt(bg, p, r.off), "write": s.WriteAt(bg, p, r.off)} {
				if !errors.Is(err, region.ErrOutOfRange) {
					t.Errorf("%s: %s of %d bytes at %d: %v, want out of range", name, op, r.n, r.off, err)
				}
			}
			if v, ok := s.(region.Viewer); ok {
				if _, ok := v.View(r.off, r.n); ok {
					t.Errorf("%s: a view of %d bytes at %d", name, r.n, r.off)
				}
			}
		}
		for _, off := range []int64{0, 1, size} {
			if err := errors.Join(s.ReadAt(bg, nil, off), s.WriteAt(bg, []byte{}, off)); err != nil {
				t.Errorf("%s: empty at %d: %v", name, off, err)
			}
		}
		after := make([]byte, size)
		if err := s.ReadAt(bg, after, 0); err != nil || !bytes.Equal(before, after) {
			t.Errorf("%s: a refused request moved bytes: %v", name, err)
		}
	}
}

func TestClosedAndCanceled(t *testing.T) {
	ended, cancel := context.WithCancel(bg)
	cancel()
	for name, s := range stores(t, Spec{Size: 100}) {
		do := func(ctx context.Context, p []byte) map[string]error {
			return map[string]error{"read": s.ReadAt(ctx, p, 0), "write": s.WriteAt(ctx, p, 0), "flush": s.Flush(ctx)}
		}
		for op, err := range do(ended, make([]byte, 3)) {
			if !errors.Is(err, context.Canceled) {
				t.Errorf("%s: %s with a context that ended: %v", name, op, err)
			}
		}
		for range 2 {
			if err := s.Close(); err != nil {
				t.Errorf("%s: close: %v", name, err)
			}
		}
		for _, p := range [][]byte{make([]byte, 3), nil} {
			for op, err := range do(bg, p) {
				if !errors.Is(err, region.ErrClosed) {
					t.Errorf("%s: %s of %d bytes after close: %v", name, op, len(p), err)
				}
			}
		}
	}
}

// TestConcurrent is for the race detector: readers, writers of parts of their
// own, flushes and a close at once.
func TestConcurrent(t *testing.T) {
	const size, parts = 8*block + 3, 8
	for name, s := range stores(t, Spec{Size: size, Content: region.Content{Seed: 1}}) {
		var wg sync.WaitGroup
		for i := range int64(parts) {
			wg.Go(func() {
				old, next := region.Content{Seed: 1}, region.Content{Seed: 1, Generation: 1}
				p := make([]byte, block)
				for off := i * block; off < (i+1)*block; off += block / 4 {
					q := p[:block/4]
					if err := s.ReadAt(bg, q, off); err != nil || old.Check(q, off) != nil {
						t.Errorf("%s: read at %d: %v, %v", name, off, err, old.Check(q, off))
					}
					next.Fill(q, off)
					if err := errors.Join(s.WriteAt(bg, q, off), s.Flush(bg)); err != nil {
						t.Errorf("%s: write at %d: %v", name, off, err)
					}
				}
				if err := s.ReadAt(bg, p, i*block); err != nil || next.Check(p, i*block) != nil {
					t.Errorf("%s: what was written at %d: %v, %v", name, i*block, err, next.Check(p, i*block))
				}
			})
		}
		wg.Wait()
		for range 4 { // readers that meet the close get the bytes or ErrClosed
			wg.Go(func() {
				p := make([]byte, 4096)
				for range 100 {
					if err := s.ReadAt(bg, p, 0); err != nil && !errors.Is(err, region.ErrClosed) {
						t.Errorf("%s: read while it closes: %v", name, err)
					}
				}
			})
		}
		if err := s.Close(); err != nil {
			t.Errorf("%s: close: %v", name, err)
		}
		wg.Wait()
	}
}

// TestLazy reads and writes here and there in a region of 1 TiB, which must cost
// no more memory than what was touched, and fills each block once.
func TestLazy(t *testing.T) {
	const size = 1<<40 + 12345
	s, err := Open(context.Background(), Spec{Backend: "memory", Size: size, Content: region.Content{Seed: 9}}, "")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	c := region.Content{Seed: 9}
	p := make([]byte, 3*block/2)
	for _, off := range []int64{0, eager - 5, eager + 17, size / 2, size - int64(len(p))} {
		if err := s.ReadAt(bg, p, off); err != nil {
			t.Fatal(err)
		}
		if err := c.Check(p, off); err != nil {
			t.Error(err)
		}
		v, ok := s.(region.Viewer).View(off, 100)
		if !ok || c.Check(v, off) != nil {
			t.Errorf("view at %d: %v", off, ok)
		}
	}
	const at = size/3 + 1
	if err := s.WriteAt(bg, []byte("hello"), at); err != nil { // into a block that is not there yet
		t.Fatal(err)
	}
	q := make([]byte, 15)
	if err := s.ReadAt(bg, q, at-5); err != nil || string(q[5:10]) != "hello" || c.Check(q[:5], at-5) != nil || c.Check(q[10:], at+5) != nil {
		t.Errorf("around a write into a lazy block: %q, %v", q, err)
	}
	var wg sync.WaitGroup
	for i := range 8 { // all fill the same block
		wg.Go(func() {
			p, off := make([]byte, 4096), int64(700<<30+i*4096)
			if err := s.ReadAt(bg, p, off); err != nil || c.Check(p, off) != nil {
				t.Errorf("block filled by several: %v, %v", err, c.Check(p, off))
			}
		})
	}
	wg.Wait()
	m := s.(*Memory)
	filled := 0
	for i := range m.filled {
		if m.filled[i].Load() {
			filled++
		}
	}
	if want := eager/block + 16; filled > want {
		t.Errorf("%d blocks are filled, want at most %d", filled, want)
	}
}

func TestInputThatShrinks(t *testing.T) {
	in := filepath.Join(t.TempDir(), "input")
	if err := os.WriteFile(in, make([]byte, 3*block), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range without() { // before it is opened
		dir := t.TempDir()
		_, err := Open(context.Background(), Spec{Backend: name, Size: 4 * block, Chunk: 4096, Input: in}, dir)
		if err == nil || !strings.Contains(err.Error(), "shrank") || !strings.Contains(err.Error(), in) {
			t.Errorf("%s: input shorter than the region: %v", name, err)
		}
		if left, _ := os.ReadDir(dir); len(left) > 0 {
			t.Errorf("%s: left %s behind", name, left[0].Name())
		}
	}
	// After it was opened, in a block that is filled later.
	if err := os.Truncate(in, eager+10*block); err != nil {
		t.Fatal(err)
	}
	s, err := Open(context.Background(), Spec{Backend: "memory", Size: eager + 10*block, Input: in}, "")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := os.Truncate(in, eager); err != nil {
		t.Fatal(err)
	}
	p := bytes.Repeat([]byte{0xAA}, 100)
	if err := s.ReadAt(bg, p, eager+block); err == nil || !strings.Contains(err.Error(), "shrank") {
		t.Errorf("read beyond the end of a shrunken input: %v", err)
	}
	if _, ok := s.(region.Viewer).View(eager+block, 1); ok {
		t.Error("a view of bytes that the input lost")
	}
	if err := s.ReadAt(bg, p, 0); err != nil {
		t.Errorf("what was filled before must still be there: %v", err)
	}
}

func TestBadSpec(t *testing.T) {
	for _, c := range []struct {
		spec Spec
		want string
	}{
		{Spec{Backend: "memory"}, "at least 1 byte"},
		{Spec{Backend: "file", Size: -1}, "at least 1 byte"},
		{Spec{Backend: "floppy", Size: 1}, `unknown backend "floppy"; valid: memory, file`},
		{Spec{Backend: "memory", Size: 1, Input: "/does/not/exist"}, "no such file"},
		{Spec{Backend: "memory", Size: 1 << 62}, "reserve"},
	} {
		if _, err := Open(context.Background(), c.spec, t.TempDir()); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", c.spec, err, c.want)
		}
	}
	if _, err := Open(context.Background(), Spec{Backend: "file", Size: 1}, "/does/not/exist"); err == nil {
		t.Error("a file in a folder that does not exist")
	}
}

// TestNoDescriptorLeak opens and closes, well and badly, and counts descriptors.
func TestNoDescriptorLeak(t *testing.T) {
	in := filepath.Join(t.TempDir(), "input")
	if err := os.WriteFile(in, []byte("1234"), 0o600); err != nil {
		t.Fatal(err)
	}
	count := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	dir := t.TempDir()
	before := count()
	for range 20 {
		for _, s := range []Spec{{Backend: "memory", Size: 4, Input: in}, {Backend: "file", Size: 4, Input: in}, {Backend: "memory", Size: 5, Input: in},
			{Backend: "file", Size: 5, Input: in}, {Backend: "floppy", Size: 4, Input: in}, {Backend: "memory", Size: 1 << 62, Input: in}} {
			if st, err := Open(context.Background(), s, dir); err == nil {
				st.Close()
			}
		}
	}
	if after := count(); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func TestDelayed(t *testing.T) {
	s, err := Open(context.Background(), Spec{Backend: "memory", Size: 4096}, "")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	const rtt = 20 * time.Millisecond
	d := Delayed{Store: s, RTT: rtt}
	ops := map[string]func(context.Context) error{
		"read":  func(ctx context.Context) error { return d.ReadAt(ctx, make([]byte, 4096), 0) },
		"write": func(ctx context.Context) error { return d.WriteAt(ctx, make([]byte, 1), 0) },
		"flush": func(ctx context.Context) error { return d.Flush(ctx) },
	}
	for name, op := range ops {
		start := time.Now()
		if err := op(bg); err != nil || time.Since(start) < rtt {
			t.Errorf("%s: took %v, want at least %v: %v", name, time.Since(start), rtt, err)
		}
		ctx, cancel := context.WithTimeout(bg, time.Millisecond)
		d.RTT = time.Hour
		if err := op(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s with a deadline: %v", name, err)
		}
		d.RTT = rtt
		cancel()
	}
	if _, ok := any(d).(region.Viewer); ok {
		t.Error("a delayed store offers views, which would cost no delay")
	}
	start := time.Now() // calls sleep side by side
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() { _ = ops["read"](bg) })
	}
	wg.Wait()
	if took := time.Since(start); took > 25*rtt {
		t.Errorf("50 calls at once took %v; one takes %v", took, rtt)
	}
}

func ExampleOpen() {
	s, err := Open(context.Background(), Spec{Backend: "memory", Size: 5, Content: region.Content{Seed: 1}}, "")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer s.Close()
	fmt.Println(s.Size(), s.ReadAt(context.Background(), make([]byte, 2), 4))
	// Output: 5 range [4, +2) of 5 bytes: out of range
}

func TestSlow(t *testing.T) {
	s, err := Open(context.Background(), Spec{Backend: "memory", Size: 1 << 20}, "")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	buf := make([]byte, 64<<10)
	for name, c := range map[string]struct {
		slow  *Slow
		least time.Duration // for eight reads, one after another
	}{
		"rate":  {&Slow{Store: s, Rate: 10 << 20}, 50*time.Millisecond - slowSlack},
		"delay": {&Slow{Store: s, Delay: 5 * time.Millisecond}, 40 * time.Millisecond},
		"both":  {&Slow{Store: s, Rate: 10 << 20, Delay: 5 * time.Millisecond}, 50*time.Millisecond - slowSlack},
	} {
		start := time.Now()
		for range 4 {
			if err := errors.Join(c.slow.ReadAt(bg, buf, 0), c.slow.WriteAt(bg, buf, 0)); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(start); took < c.least {
			t.Errorf("%s: took %v, want at least %v", name, took, c.least)
		}
		ctx, cancel := context.WithCancel(bg)
		cancel()
		if err := c.slow.ReadAt(ctx, buf, 0); !errors.Is(err, context.Canceled) {
			t.Errorf("%s, canceled: %v", name, err)
		}
	}
	if _, ok := any(&Slow{Store: s}).(region.Viewer); ok {
		t.Error("a slow store offers views, which would cost nothing")
	}
}

func TestSizes(t *testing.T) {
	for _, name := range without() {
		s, err := Open(context.Background(), Spec{Backend: name, Size: 1 << 20, Chunk: 4096}, t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		c, ok := s.(Counter)
		if !ok {
			t.Errorf("%s does not count its reads", name)
			continue
		}
		if b, err := c.ReadSizes(); b != nil || err != nil {
			t.Errorf("%s, before any: %q, %v", name, b, err)
		}
		want := int64(1)
		if err := s.ReadAt(bg, make([]byte, 4096), 0); err != nil {
			t.Fatal(err)
		}
		if v, ok := s.(region.Viewer); ok {
			if _, ok := v.View(0, 100); ok {
				want++
			}
			if _, ok := v.View(1<<20, 1); ok {
				t.Errorf("%s: a view beyond the end", name)
			}
		}
		b, err := c.ReadSizes()
		if err != nil {
			t.Fatal(err)
		}
		h, err := hdrhistogram.Decode(b)
		if err != nil || h.TotalCount() != want || h.Max()>>3 != 4096>>3 {
			t.Errorf("%s: %d reads, the largest of %d bytes: %v", name, h.TotalCount(), h.Max(), err)
		}
	}
}
