package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"go.uber.org/goleak"

	"memsync/strategies/region"
	"memsync/strategies/replay"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// contents returns the region that the image has.
func contents(t testing.TB, i *Image) []byte {
	t.Helper()
	got := make([]byte, i.Size())
	if err := i.Restore(t.Context(), func(p []byte, off int64) error { copy(got[off:], p); return nil }); err != nil {
		t.Fatal(err)
	}
	return got
}

func commit(i *Image, s State, mem []byte, ranges ...[2]int64) error {
	c, err := i.Begin()
	if err != nil {
		return err
	}
	for _, r := range ranges {
		if err := c.Write(mem[r[0]:r[1]], r[0]); err != nil {
			return err
		}
	}
	_, err = c.Finish(s)
	return err
}

func TestFile(t *testing.T) {
	for _, size := range []int64{1, 4095, 4096, 4097, 3*8192 + 5, 100 * 8192} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "image")
			if _, err := Open(path, 0, 0); !errors.Is(err, region.ErrMissing) {
				t.Fatal(err)
			}
			i, err := Open(path, size, 8192)
			if err != nil {
				t.Fatal(err)
			}
			if s, ok := i.Latest(); ok {
				t.Fatalf("a new image has %+v", s)
			}
			if _, err := Open(path, size, 8192); !errors.Is(err, region.ErrNotPermitted) {
				t.Fatalf("opened twice: %v", err)
			}
			mem := make([]byte, size)
			region.Content{Seed: 7}.Fill(mem, 0)
			taken := time.Unix(12, 34)
			if err := commit(i, State{Sequence: 5, Taken: taken, Blob: []byte("blob")}, mem, [2]int64{0, size}); err != nil {
				t.Fatal(err)
			}
			if err := i.Close(); err != nil {
				t.Fatal(err)
			}
			for _, other := range [][2]int64{{size + 1, 8192}, {size, 4096}} {
				if _, err := Open(path, other[0], other[1]); !errors.Is(err, region.ErrMismatch) {
					t.Errorf("opened as %v: %v", other, err)
				}
			}
			if i, err = Open(path, 0, 0); err != nil {
				t.Fatal(err)
			}
			defer i.Close()
			s, ok := i.Latest()
			if !ok || s.Commit != 1 || s.Sequence != 5 || !s.Taken.Equal(taken) || string(s.Blob) != "blob" || !bytes.Equal(contents(t, i), mem) {
				t.Fatalf("%+v, %t", s, ok)
			}
		})
	}
}

func TestLimits(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	for _, g := range [][2]int64{{0, 4096}, {-1, 4096}, {1, 4095}, {1, 12288}, {1, 2048}, {1 << 62, 4096}, {1 << 50, 4096}} {
		if i, err := Open(path, g[0], g[1]); err == nil {
			i.Close()
			t.Errorf("%v accepted", g)
		}
	}
	i, err := Open(path, 3*4096+1, 4096)
	if err != nil {
		t.Fatal(err)
	}
	defer i.Close()
	c, err := i.Begin()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range [][2]int64{{1, 4096}, {0, 4095}, {0, 4 * 4096}, {3 * 4096, 2}, {-4096, 4096}} {
		if err := c.Write(make([]byte, r[1]), r[0]); !errors.Is(err, region.ErrOutOfRange) {
			t.Errorf("%v: %v", r, err)
		}
	}
	if _, err := c.Finish(State{Blob: make([]byte, MaxBlob+1)}); !errors.Is(err, region.ErrOutOfRange) {
		t.Error(err)
	}
	if _, err := c.Finish(State{Blob: make([]byte, MaxBlob)}); err != nil {
		t.Error(err)
	}
}

// TestUnchanged: what did not change, and what is zero, is not written.
func TestUnchanged(t *testing.T) {
	const size = 1000 * 4096
	i, err := Open(filepath.Join(t.TempDir(), "image"), size, 4096)
	if err != nil {
		t.Fatal(err)
	}
	defer i.Close()
	mem := make([]byte, size)
	write := func() int64 {
		c, err := i.Begin()
		if err == nil {
			err = c.Write(mem, 0)
		}
		if err != nil {
			t.Fatal(err)
		}
		n, err := c.Finish(State{})
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	write()
	if n := write(); n > 2*i.recordLength() {
		t.Errorf("%d bytes written for zeroes", n)
	}
	region.Content{}.Fill(mem[:size/2], 0)
	write()
	write()
	if n := write(); n > 4096 {
		t.Errorf("%d bytes written for no change", n)
	}
	mem[5]++
	if n := write(); n > 4*4096 {
		t.Errorf("%d bytes written for one change", n)
	}
	if i.Bytes() != size/2 || !bytes.Equal(contents(t, i), mem) {
		t.Error("another region")
	}
}

// disk is a file whose writes reach the disk in any order, in parts or not at
// all until Sync; it dies when its operations are used up.
type disk struct {
	durable, cached []byte
	pending         []write
	rng             *rand.Rand
	left            int // operations
	fail            error
}

type write struct {
	off int64
	p   []byte
}

var errDead = errors.New("the machine is dead")

func (d *disk) op() error {
	if d.left--; d.left < 0 {
		return d.fail
	}
	return nil
}

func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	if off >= int64(len(d.cached)) {
		return 0, io.EOF
	}
	n := copy(p, d.cached[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (d *disk) WriteAt(p []byte, off int64) (int, error) {
	if err := d.op(); err != nil {
		// Part of it may have come through.
		n := d.rng.IntN(len(p) + 1)
		d.put(&d.cached, write{off, p[:n]})
		d.pending = append(d.pending, write{off, bytes.Clone(p[:n])})
		return n, err
	}
	d.put(&d.cached, write{off, p})
	d.pending = append(d.pending, write{off, bytes.Clone(p)})
	return len(p), nil
}

func (d *disk) put(to *[]byte, w write) {
	if need := w.off + int64(len(w.p)); need > int64(len(*to)) {
		*to = append(*to, make([]byte, need-int64(len(*to)))...)
	}
	copy((*to)[w.off:], w.p)
}

func (d *disk) Sync() error {
	if err := d.op(); err != nil {
		return err
	}
	for _, w := range d.pending {
		d.put(&d.durable, w)
	}
	d.pending = nil
	return nil
}

func (d *disk) Close() error { return nil }

// crash returns what the disk has after power was lost: of each pending write
// any of its sectors, in any order.
func (d *disk) crash() []byte {
	const sector = 512
	b := bytes.Clone(d.durable)
	d.rng.Shuffle(len(d.pending), func(i, j int) { d.pending[i], d.pending[j] = d.pending[j], d.pending[i] })
	how := d.rng.IntN(3) // nothing, all, some
	for _, w := range d.pending {
		for lo := 0; lo < len(w.p); lo += sector {
			if how == 1 || how == 2 && d.rng.IntN(2) == 0 {
				d.put(&b, write{w.off + int64(lo), w.p[lo:min(lo+sector, len(w.p))]})
			}
		}
	}
	return b
}

// TestCrash: random programs of commits whose disk dies or fails at any
// operation. What is found then is the last image that was finished, or the one
// that was being finished. MEMSYNC_CRASHES=10000 makes it that many programs.
func TestCrash(t *testing.T) {
	s := replay.Seed(t)
	rounds := 500
	if v := os.Getenv("MEMSYNC_CRASHES"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil {
			t.Fatal(err)
		}
		rounds = n
	}
	recovered, advanced, failures := 0, 0, 0
	for round := range rounds {
		rng := rand.New(rand.NewPCG(s, uint64(round)))
		size := 1 + rng.Int64N(40*4096)
		g, err := geometry(size, 4096)
		if err != nil {
			t.Fatal(err)
		}
		d := &disk{rng: rng, fail: errDead, left: 1 << 30, durable: make([]byte, g.end())}
		copy(d.durable, g.header())
		d.cached = bytes.Clone(d.durable)
		mem := make([]byte, size)
		type saved struct {
			seq uint64
			mem []byte
		}
		done := saved{0, bytes.Clone(mem)}
		var tries []saved // since done: one that failed may have reached the disk, until the next one begins
		i, err := load(d, int64(len(d.cached)), size, 4096)
		if err != nil {
			t.Fatal(err)
		}
		for life := range 3 { // of the machine
			died := false
			d.left = rng.IntN(60)
			for !died {
				// Some chunks change. A failed commit owes its chunks to the next one.
				next := done.seq + 1
				if k := len(tries); k > 0 {
					next = tries[k-1].seq + 1
				}
				changed := bytes.Clone(mem)
				for range rng.IntN(6) {
					lo := rng.Int64N(size)
					hi := min(size, lo+rng.Int64N(3*4096))
					if rng.IntN(4) == 0 {
						clear(changed[lo:hi])
					} else {
						region.Content{Seed: next}.Fill(changed[lo:hi], lo)
					}
				}
				tries = append(tries, saved{next, changed})
				c, err := i.Begin()
				for lo := int64(0); err == nil && lo < size; lo += 4096 {
					if hi := min(size, lo+4096); !bytes.Equal(changed[lo:hi], done.mem[lo:hi]) || rng.IntN(8) == 0 {
						err = c.Write(changed[lo:hi], lo)
					}
				}
				if err == nil {
					_, err = c.Finish(State{Sequence: next, Blob: fmt.Append(nil, next)})
				}
				mem = changed
				switch {
				case err == nil:
					done, tries = tries[len(tries)-1], nil
				case errors.Is(err, errDead) && rng.IntN(2) == 0:
					died = true
				case errors.Is(err, errDead): // the disk was full, say, and is not any more
					failures++
					d.left = rng.IntN(60)
				default:
					t.Fatalf("round %d: %v", round, err)
				}
			}
			after := d.crash()
			d = &disk{rng: rng, fail: errDead, left: 1 << 30, durable: after, cached: bytes.Clone(after)}
			if i, err = load(d, int64(len(after)), size, 4096); err != nil {
				t.Fatalf("TEST_SEED=%d round %d life %d: %v", s, round, life, err)
			}
			st, _ := i.Latest()
			got := make([]byte, size)
			if err := i.Restore(t.Context(), func(p []byte, off int64) error { copy(got[off:], p); return nil }); err != nil {
				t.Fatalf("TEST_SEED=%d round %d life %d: %v", s, round, life, err)
			}
			k := slices.IndexFunc(tries, func(w saved) bool { return w.seq == st.Sequence && bytes.Equal(got, w.mem) })
			switch {
			case st.Sequence == done.seq && bytes.Equal(got, done.mem):
				recovered++
			case k >= 0:
				advanced++
			default:
				t.Fatalf("TEST_SEED=%d round %d life %d: image of publication %d, want %d or one of %d later ones, with its bytes", s, round, life, st.Sequence, done.seq, len(tries))
			}
			if want := fmt.Append(nil, st.Sequence); st.Sequence > 0 && !bytes.Equal(st.Blob, want) {
				t.Fatalf("blob %q, want %q", st.Blob, want)
			}
			done, tries, mem = saved{st.Sequence, got}, nil, bytes.Clone(got)
		}
	}
	t.Logf("%d rounds: %d crashes left the last image, %d the one that was being finished; %d failed commits", rounds, recovered, advanced, failures)
	if recovered == 0 || advanced == 0 || failures == 0 {
		t.Error("the test did not see all outcomes")
	}
}

// TestDamage: any byte of the file that is changed is noticed, or does not matter.
func TestDamage(t *testing.T) {
	const size = 5*4096 + 100
	path := filepath.Join(t.TempDir(), "image")
	i, err := Open(path, size, 4096)
	if err != nil {
		t.Fatal(err)
	}
	first, second := make([]byte, size), make([]byte, size)
	region.Content{Seed: 1}.Fill(first, 0)
	region.Content{Seed: 2}.Fill(second, 0)
	for k, m := range [][]byte{first, second} {
		if err := commit(i, State{Sequence: uint64(k + 1), Blob: []byte{byte(k)}}, m, [2]int64{0, size}); err != nil {
			t.Fatal(err)
		}
	}
	if err := i.Close(); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	noticed := 0
	for at := 0; at < len(whole); at += 7 {
		b := bytes.Clone(whole)
		b[at] ^= 1 << (at % 8)
		noticed += check(t, b, first, second)
	}
	if noticed == 0 {
		t.Error("no damage was noticed")
	}
	noticed = 0
	for n := 0; n < len(whole); n += 4096 + 13 {
		noticed += check(t, whole[:n], first, second)
	}
	if noticed == 0 {
		t.Error("no truncation was noticed")
	}
}

// check opens the bytes as an image; it must be one of two regions or an error.
func check(t testing.TB, b, first, second []byte) (noticed int) {
	t.Helper()
	d := &disk{cached: b, left: 1}
	i, err := load(d, int64(len(b)), int64(len(first)), 4096)
	if err == nil {
		got := make([]byte, len(first))
		if err = i.Restore(context.Background(), func(p []byte, off int64) error { copy(got[off:], p); return nil }); err == nil {
			s, _ := i.Latest()
			want := [][]byte{make([]byte, len(first)), first, second}[s.Sequence]
			if !bytes.Equal(got, want) {
				t.Fatalf("a damaged image of publication %d was taken for a good one", s.Sequence)
			}
			return 0
		}
	}
	if !errors.Is(err, region.ErrMismatch) && !errors.Is(err, io.EOF) {
		t.Fatalf("not a mismatch: %v", err)
	}
	return 1
}

// FuzzImage: bytes that are no image give an error, in bounded memory.
func FuzzImage(f *testing.F) {
	g, err := geometry(3*4096+7, 4096)
	if err != nil {
		f.Fatal(err)
	}
	mem := make([]byte, g.size)
	region.Content{Seed: 3}.Fill(mem, 0)
	d := &disk{left: 1 << 30, cached: make([]byte, g.end())}
	copy(d.cached, g.header())
	i, err := load(d, int64(len(d.cached)), g.size, g.chunk)
	if err != nil {
		f.Fatal(err)
	}
	if err := commit(i, State{Sequence: 9, Blob: []byte("b")}, mem, [2]int64{0, g.size}); err != nil {
		f.Fatal(err)
	}
	f.Add(d.cached, false)
	f.Add(d.cached[:5000], true)
	f.Add([]byte(magic), false)
	f.Fuzz(func(t *testing.T, b []byte, mend bool) {
		if mend && len(b) >= 2*block { // so that the fuzzer gets past the digests
			if h, err := geometry(int64(len(b))/8+1, block); err == nil && int64(len(b)) >= h.end() {
				b = bytes.Clone(b)
				copy(b, h.header())
				r := b[h.recordAt(1) : h.recordAt(1)+h.recordLength()]
				d := digestOf(r[digestSize:])
				copy(r, d[:])
			}
		}
		i, err := load(&disk{cached: b, left: 1 << 30}, int64(len(b)), 0, 0)
		if err != nil {
			return
		}
		s, ok := i.Latest()
		err = i.Restore(t.Context(), func(p []byte, off int64) error { return region.CheckRange(off, int64(len(p)), i.Size()) })
		if err == nil && ok && len(s.Blob) > MaxBlob {
			t.Fatal("blob too long")
		}
	})
}
