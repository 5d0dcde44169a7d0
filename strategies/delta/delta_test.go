package delta

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"

	"go.uber.org/goleak"

	"memsync/strategies/region"
	"memsync/strategies/replay"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// change makes a new version of a region in one of the ways that regions change.
func change(r *rand.Rand, old []byte) []byte {
	p := bytes.Clone(old)
	n := len(p)
	switch r.IntN(7) {
	case 0: // nothing
	case 1: // few bytes
		for range 1 + r.IntN(20) {
			p[r.IntN(n)]++
		}
	case 2: // all
		for i := range p {
			p[i] = byte(r.Uint32())
		}
	case 3: // zeroes
		off := r.IntN(n)
		clear(p[off : off+r.IntN(n-off)])
	case 4: // an insertion
		off, k := r.IntN(n), 1+r.IntN(5000)
		p = append(append(bytes.Clone(old[:off]), bytes.Repeat([]byte("inserted"), k/8+1)[:k]...), old[off:]...)[:n]
	case 5: // a removal
		off := r.IntN(n)
		k := r.IntN(min(5000, n-off))
		p = append(append(bytes.Clone(old[:off]), old[off+k:]...), make([]byte, k)...)
	case 6: // compressible
		for i := range p {
			p[i] = byte(i / 500)
		}
	}
	return p
}

// Every change comes out of the decoder as it went into the encoder, in every
// mode, and no body is larger than its piece by more than the overhead.
func TestRoundTrip(t *testing.T) {
	r := rand.New(rand.NewPCG(replay.Seed(t), 1))
	d, err := NewDecoder()
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for _, mode := range Modes() {
		e, err := NewEncoder(Mode(mode))
		if err != nil {
			t.Fatal(err)
		}
		for range 150 {
			size := 1 + r.IntN(300<<10)
			old := make([]byte, size)
			region.Content{Seed: r.Uint64()}.Fill(old, 0)
			want := change(r, old)
			x := NewIndex(int64(size))
			x.Update(0, old)
			lo := r.IntN(size) / Block * Block
			p := Piece{New: want[lo:], Off: int64(lo), Index: x, Usable: func(off, n int64) bool { return off >= int64(lo) }}
			if mode == string(Runs) || r.IntN(2) == 0 {
				p.Old = old[lo:]
			}
			body := e.Encode(p, []float64{0, 1e4, 1e12}[r.IntN(3)])
			if len(body) > len(p.New)+MaxOverhead {
				t.Fatalf("%s: a body of %d bytes for a piece of %d", mode, len(body), len(p.New))
			}
			got := make([]byte, len(p.New))
			err := d.Decode(got, old[lo:], body, func(b []byte, off int64) error {
				if off < int64(lo) || off+int64(len(b)) > int64(size) {
					t.Fatalf("%s: copy of %d bytes from %d, beyond what is usable", mode, len(b), off)
				}
				copy(b, old[off:])
				return nil
			})
			if err != nil {
				t.Fatalf("%s: %v", mode, err)
			}
			if !bytes.Equal(got, p.New) {
				t.Fatalf("%s: another piece", mode)
			}
		}
		e.Close()
	}
}

// What each encoding is for is small.
func TestSmall(t *testing.T) {
	const size = 256 << 10
	old := make([]byte, size)
	region.Content{Seed: 1}.Fill(old, 0)
	x := NewIndex(size)
	x.Update(0, old)
	all := func(int64, int64) bool { return true }
	d, err := NewDecoder()
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	few := bytes.Clone(old)
	few[100], few[70000] = 1, 2
	inserted := append(append(bytes.Clone(old[:5000]), "nine byte"...), old[5000:size-9]...)
	const a, b, seam = 128 << 10, 192 << 10, Block - 1 // a piece in the middle, and what is around it
	text := bytes.Repeat([]byte("memory synchronisation "), size/23+1)[:size]
	for _, c := range []struct {
		name string
		mode Mode
		p    Piece
		most int
	}{
		{"same", Blocks, Piece{New: old, Index: x}, 8},
		{"two bytes, blocks", Blocks, Piece{New: few, Index: x}, 2*Block + 32},
		{"two bytes, runs", Runs, Piece{New: few, Old: old}, 40},
		{"insertion", Moved, Piece{New: inserted, Index: x, Usable: all}, 3*Block + 64},
		{"insertion, auto", Auto, Piece{New: inserted, Index: x, Usable: all}, 3*Block + 64},
		{"behind an insertion", Moved, Piece{New: inserted[a:b], Off: a, Around: inserted[a-seam : b+seam], Lead: seam, Index: x, Usable: all}, 32},
		{"text on a slow link", Auto, Piece{New: text, Index: x}, 4096},
		{"zeroes", Blocks, Piece{New: make([]byte, size), Index: x}, 8},
		{"new, whole", Whole, Piece{New: text, Index: x}, size + MaxOverhead},
	} {
		e, err := NewEncoder(c.mode)
		if err != nil {
			t.Fatal(err)
		}
		body := e.Encode(c.p, 1e6)
		if n := len(body); n > c.most {
			t.Errorf("%s: %d bytes, want at most %d", c.name, n, c.most)
		}
		got := make([]byte, len(c.p.New))
		err = d.Decode(got, old[c.p.Off:][:len(got)], body, func(p []byte, off int64) error { copy(p, old[off:]); return nil })
		if err != nil || !bytes.Equal(got, c.p.New) {
			t.Errorf("%s: decoded to the same bytes: %t, %v", c.name, bytes.Equal(got, c.p.New), err)
		}
		e.Close()
	}
	// On a link faster than the compressor nothing is compressed once that was measured.
	e, err := NewEncoder(Auto)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	e.Encode(Piece{New: text}, 1e12)
	if body := e.Encode(Piece{New: text}, 1e12); body[0] != packNone {
		t.Error("compressed for a link that is faster than compression")
	}
}

// A body that would make too much, too little, or read beyond is refused.
func TestCorrupt(t *testing.T) {
	d, err := NewDecoder()
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	op := func(kind, n uint64) []byte { return binary.AppendUvarint([]byte{packNone}, n<<2|kind) }
	bomb, err := NewEncoder(Zstd)
	if err != nil {
		t.Fatal(err)
	}
	defer bomb.Close()
	for name, body := range map[string][]byte{
		"empty": nil, "packing": {7}, "too little": op(opSame, 99), "too much": op(opZero, 101), "nothing": op(opZero, 0),
		"endless": op(opZero, 1<<61), "cut": op(opNew, 100), "cut varint": {packNone, 0x80}, "copy without offset": op(opCopy, 100),
		"copy far": append(op(opCopy, 100), 0xff, 0xff, 0x03), "zstd garbage": {packZstd, 1, 2, 3, 4, 5, 6, 7, 8, 9},
		"bomb": bytes.Clone(bomb.z.EncodeAll(make([]byte, 64<<20), []byte{packZstd})),
	} {
		err := d.Decode(make([]byte, 100), make([]byte, 100), body, func(p []byte, off int64) error { return region.CheckRange(off, int64(len(p)), 100) })
		if !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if cap(d.stream) > 1<<20 {
		t.Errorf("a bomb took %d bytes", cap(d.stream))
	}
}

func FuzzDecode(f *testing.F) {
	old := make([]byte, 3*Block+100)
	region.Content{Seed: 1}.Fill(old, 0)
	x := NewIndex(int64(len(old)))
	x.Update(0, old)
	r := rand.New(rand.NewPCG(1, 1))
	for _, m := range Modes() {
		e, err := NewEncoder(Mode(m))
		if err != nil {
			f.Fatal(err)
		}
		for range 8 {
			f.Add(bytes.Clone(e.Encode(Piece{New: change(r, old), Old: old, Index: x, Usable: func(int64, int64) bool { return true }}, 1)))
		}
		e.Close()
	}
	d, err := NewDecoder()
	if err != nil {
		f.Fatal(err)
	}
	defer d.Close()
	before := bytes.Clone(old)
	f.Fuzz(func(t *testing.T, body []byte) {
		dst := make([]byte, len(old))
		err := d.Decode(dst, old, body, func(p []byte, off int64) error {
			if err := region.CheckRange(off, int64(len(p)), int64(len(old))); err != nil {
				return err
			}
			copy(p, old[off:])
			return nil
		})
		if err != nil && !errors.Is(err, ErrCorrupt) {
			t.Error(err)
		}
		if !bytes.Equal(old, before) {
			t.Fatal("the old version was changed")
		}
	})
}

func BenchmarkEncode(b *testing.B) {
	const size = 1 << 20
	old := make([]byte, size)
	region.Content{Seed: 1}.Fill(old, 0)
	x := NewIndex(size)
	x.Update(0, old)
	next := make([]byte, size)
	region.Content{Seed: 2}.Fill(next, 0)
	moved := append([]byte("x"), old[:size-1]...)
	for _, c := range []struct {
		name string
		mode Mode
		p    Piece
	}{
		{"blocks-same", Blocks, Piece{New: old, Index: x}}, {"blocks-new", Blocks, Piece{New: next, Index: x}},
		{"runs-same", Runs, Piece{New: old, Old: old}}, {"runs-new", Runs, Piece{New: next, Old: old}},
		{"moved", Moved, Piece{New: moved, Index: x, Usable: func(int64, int64) bool { return true }}},
		{"zstd-new", Zstd, Piece{New: next, Index: x}},
	} {
		b.Run(c.name, func(b *testing.B) {
			e, err := NewEncoder(c.mode)
			if err != nil {
				b.Fatal(err)
			}
			defer e.Close()
			b.SetBytes(size)
			for b.Loop() {
				e.Encode(c.p, 1e6)
			}
		})
	}
}
