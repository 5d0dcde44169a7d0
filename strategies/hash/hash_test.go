package hash

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"math"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The published digests of known input.
func TestVectors(t *testing.T) {
	for name, want := range map[string]string{
		"xxh3-64":  "78af5f94892f3950", // "abc", from xxHash's xxhsum -H3
		"xxhash64": "44bc2cf5ad770999",
		"crc32c":   "364b3fb7",
		"sha256":   "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
		"sha1":     "a9993e364706816aba3e25717850c26c9cd0d89d",
		"md5":      "900150983cd24fb0d6963f7d28e17f72",
		"fnv1a":    "e71fa2190541574b",
		"blake3":   "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85",
		"xxh3-128": "06b05ab6733a618578af5f94892f3950",
	} {
		f, err := ByName(name)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, f.Size)
		f.Sum(got, []byte("abc"))
		if hex.EncodeToString(got) != want {
			t.Errorf("%s(abc) = %x, want %s", name, got, want)
		}
	}
	if _, err := ByName("sha3"); err == nil {
		t.Error("an unknown name is accepted")
	}
}

// Stream and one-shot digests agree at every length around the block sizes, and
// a change of any one bit changes them.
func TestStream(t *testing.T) {
	for _, f := range Funcs() {
		for _, n := range []int{0, 1, 3, 8, 16, 63, 64, 240, 241, 1023, 1024, 1025, 4096, 70001} {
			p := make([]byte, n)
			region.Content{Seed: 7}.Fill(p, 3)
			one := make([]byte, f.Size+1)
			f.Sum(one, p)
			if one[f.Size] != 0 {
				t.Fatalf("%s writes beyond its digest", f.Name)
			}
			h := f.New()
			h.Write(p[:n/3])
			h.Write(p[n/3:])
			if got := h.Sum(nil); !bytes.Equal(got, one[:f.Size]) {
				t.Errorf("%s of %d bytes: stream %x, at once %x", f.Name, n, got, one[:f.Size])
			}
			if n == 0 {
				continue
			}
			for _, i := range []int{0, n / 2, n - 1} {
				p[i] ^= 4
				two := make([]byte, f.Size)
				f.Sum(two, p)
				if bytes.Equal(one[:f.Size], two) {
					t.Errorf("%s of %d bytes: byte %d does not matter", f.Name, n, i)
				}
				p[i] ^= 4
			}
		}
	}
}

func TestOdds(t *testing.T) {
	for _, c := range []struct {
		bits         int
		n            int64
		missed, pair float64
	}{
		{32, 1, 1.0 / (1 << 32), 0},
		{32, 1 << 18, 6.1033e-05, 0.99966}, // 1 GiB in chunks of 4 KiB
		{64, 1 << 18, 1.4211e-14, 1.8626e-09},
		{128, 1 << 18, 7.7037e-34, 1.0097e-28},
	} {
		f := Func{Size: c.bits / 8}
		if m := f.Missed(c.n); math.Abs(m-c.missed) > 1e-4*c.missed {
			t.Errorf("%d bits, %d chunks: missed %g, want %g", c.bits, c.n, m, c.missed)
		}
		if p := f.Collides(c.n); math.Abs(p-c.pair) > 1e-3*c.pair {
			t.Errorf("%d bits, %d chunks: collides %g, want %g", c.bits, c.n, p, c.pair)
		}
	}
}

// Every way to the bytes gives the same table, whatever the number of workers.
func TestTable(t *testing.T) {
	for _, size := range []int64{1, 4095, 4096, 4097, 3<<20 + 5} {
		mem := make([]byte, size)
		region.Content{Seed: 1}.Fill(mem, 0)
		path := filepath.Join(t.TempDir(), "region")
		if err := os.WriteFile(path, mem, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, f := range Funcs()[:3] {
			const chunk = 4096
			n := region.Chunks(size, chunk)
			want := make([]byte, n*int64(f.Size))
			for i := range n {
				f.Sum(want[i*int64(f.Size):], mem[i*chunk:min((i+1)*chunk, size)])
			}
			for _, workers := range []int{1, 2, 7} {
				for _, b := range []Bytes{Mapped(mem), &File{Path: path, Length: size, How: OneHandle}, &File{Path: path, Length: size, How: WorkerOwn}, &File{Path: path, Length: size, How: ChunkOpens}} {
					got := make([]byte, len(want))
					if err := Table(t.Context(), f, b, chunk, workers, got); err != nil {
						t.Fatal(err)
					}
					if !bytes.Equal(got, want) {
						t.Errorf("%s, %d bytes, %d workers, %T: another table", f.Name, size, workers, b)
					}
					whole, err := Whole(t.Context(), f, b)
					one := make([]byte, f.Size)
					f.Sum(one, mem)
					if err != nil || !bytes.Equal(whole, one) {
						t.Errorf("%s, %d bytes, %T: whole %x, %v, want %x", f.Name, size, b, whole, err, one)
					}
					if c, ok := b.(*File); ok {
						if err := c.Close(); err != nil {
							t.Error(err)
						}
					}
				}
			}
		}
		zeros, err := Scan(t.Context(), mem, 2)
		if want := bytes.Count(mem, []byte{0}); err != nil || zeros != int64(want) {
			t.Errorf("Scan: %d, %v, want %d", zeros, err, want)
		}
	}
}

// A file that ends too early, a cancelled context, and a mapping whose file was
// truncated are errors, not wrong digests, crashes or hangs.
func TestTableErrors(t *testing.T) {
	path := filepath.Join(t.TempDir(), "region")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	f := Funcs()[0]
	digests := make([]byte, 512*f.Size)
	if err := Table(t.Context(), f, &File{Path: path, Length: 2 << 20, How: WorkerOwn}, 4096, 2, digests); err == nil {
		t.Error("a short file is no error")
	}
	if err := Table(t.Context(), f, &File{Path: path + "x", Length: 2 << 20, How: ChunkOpens}, 4096, 2, digests); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
	if err := Table(t.Context(), f, Mapped(make([]byte, 3<<20)), 4096, 2, digests); !errors.Is(err, region.ErrOutOfRange) {
		t.Errorf("a table too small: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Table(ctx, f, Mapped(make([]byte, 2<<20)), 4096, 2, digests); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	h, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	mem, err := unix.Mmap(int(h.Fd()), 0, 1<<20, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	if err := h.Truncate(8192); err != nil {
		t.Fatal(err)
	}
	if err := Table(t.Context(), f, Mapped(mem), 4096, 2, digests); !errors.Is(err, unix.EIO) {
		t.Errorf("a truncated mapping: %v", err)
	}
}

func BenchmarkSum(b *testing.B) {
	mem := make([]byte, 256<<20)
	region.Content{Seed: 1}.Fill(mem, 0)
	for _, f := range Funcs() {
		digests := make([]byte, f.Size*len(mem)/4096)
		b.Run(f.Name, func(b *testing.B) {
			b.SetBytes(int64(len(mem)))
			for b.Loop() {
				if err := Table(b.Context(), f, Mapped(mem), 64<<10, 2, digests); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("scan", func(b *testing.B) {
		b.SetBytes(int64(len(mem)))
		for b.Loop() {
			if _, err := Scan(b.Context(), mem, 2); err != nil {
				b.Fatal(err)
			}
		}
	})
}
