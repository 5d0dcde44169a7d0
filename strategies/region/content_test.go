package region

import (
	"encoding/binary"
	"errors"
	"strings"
	"testing"
)

// slow is Content computed the obvious way.
func slow(c Content, off int64) byte {
	var w [8]byte
	binary.LittleEndian.PutUint64(w[:], uint64(off>>3)*contentK+c.base())
	return w[off&7]
}

func TestContent(t *testing.T) {
	c := Content{Seed: 7, Generation: 3}
	for off := int64(0); off < 17; off++ {
		for n := 0; n < 150; n++ {
			p := make([]byte, n)
			c.Fill(p, off)
			for i := range p {
				if p[i] != slow(c, off+int64(i)) {
					t.Fatalf("Fill(off %d, n %d) byte %d is wrong", off, n, i)
				}
			}
			if err := c.Check(p, off); err != nil {
				t.Fatal(err)
			}
			for i := range p {
				p[i] ^= 0x40
				if err := c.Check(p, off); !errors.Is(err, ErrMismatch) {
					t.Fatalf("Check(off %d, n %d) missed a flip of byte %d: %v", off, n, i, err)
				}
				p[i] ^= 0x40
			}
		}
	}
}

func TestContentExplains(t *testing.T) {
	c := Content{Seed: 1, Generation: 2}
	p := make([]byte, 64)
	Content{Seed: 1, Generation: 1}.Fill(p, 4096)
	err := c.Check(p, 0)
	if err == nil || !strings.Contains(err.Error(), "offset 4096, generation 1") {
		t.Fatalf("want the origin of the bytes named, got %v", err)
	}
}

func TestCheckRange(t *testing.T) {
	for _, c := range []struct {
		off, n, size int64
		ok           bool
	}{{0, 0, 0, true}, {0, 1, 1, true}, {1, 0, 1, true}, {1, 1, 1, false}, {-1, 1, 9, false},
		{0, -1, 9, false}, {1<<63 - 1, 1, 9, false}, {5, 1<<63 - 1, 9, false}} {
		if err := CheckRange(c.off, c.n, c.size); (err == nil) != c.ok {
			t.Errorf("CheckRange(%d, %d, %d) = %v", c.off, c.n, c.size, err)
		}
	}
}

func BenchmarkFill(b *testing.B) {
	p := make([]byte, 1<<20)
	b.SetBytes(1 << 20)
	for i := 0; i < b.N; i++ {
		Content{1, 0}.Fill(p, 4096)
	}
}

func BenchmarkCheck(b *testing.B) {
	p := make([]byte, 1<<20)
	Content{1, 0}.Fill(p, 4096)
	b.SetBytes(1 << 20)
	for i := 0; i < b.N; i++ {
		if Content.Check(Content{1, 0}, p, 4096) != nil {
			b.Fatal()
		}
	}
}
