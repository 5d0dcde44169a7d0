package backend

import (
	"bytes"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

func newImage(t *testing.T, size int64) *Image {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	m, err := OpenImage(path, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() })
	return m
}

// TestImageProgram compares random programs with a plain slice: what an extent
// calls zero is zero, and the extents cover what was asked for.
func TestImageProgram(t *testing.T) {
	for seed := range uint64(20) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		size := 1 + rnd.Int64N(300<<10)
		m, model := newImage(t, size), make([]byte, size)
		for range 60 {
			off := rnd.Int64N(size)
			n := rnd.Int64N(size - off + 1)
			part := model[off : off+n]
			var err error
			switch rnd.IntN(5) {
			case 0, 1:
				n = min(n, 5000)
				part = part[:n]
				region.Content{Seed: rnd.Uint64()}.Fill(part, off)
				err = m.WriteAt(bg, part, off)
			case 2:
				if err = m.WriteZeroes(bg, off, n, rnd.IntN(2) == 0); err == nil {
					clear(part)
				} else if errors.Is(err, region.ErrNotSupported) {
					err = nil // and nothing has changed
				}
			case 3:
				if err = m.Trim(bg, off, n); err == nil { // may have done nothing
					err = m.ReadAt(bg, part, off)
				}
			case 4:
				err = errors.Join(m.Cache(bg, off, n), m.Flush(bg))
			}
			if err != nil {
				t.Fatalf("seed %d: [%d, +%d) of %d: %v", seed, off, n, size, err)
			}
			got := make([]byte, size)
			if err := m.ReadAt(bg, got, 0); err != nil || !bytes.Equal(got, model) {
				t.Fatalf("seed %d: after [%d, +%d) of %d the content differs: %v", seed, off, n, size, err)
			}
			for at := off; at < off+n; {
				ext, err := m.Extents(bg, at, off+n-at)
				if err != nil || len(ext) == 0 {
					t.Fatalf("seed %d: extents at %d: %v, %v", seed, at, ext, err)
				}
				for _, e := range ext {
					if e.Length < 1 || at+e.Length > off+n {
						t.Fatalf("seed %d: extent %+v at %d of [%d, +%d)", seed, e, at, off, n)
					}
					if e.Zero && bytes.Count(model[at:at+e.Length], []byte{0}) != int(e.Length) {
						t.Fatalf("seed %d: extent %+v at %d is not zero", seed, e, at)
					}
					at += e.Length
				}
			}
		}
	}
}

func TestImageRefused(t *testing.T) {
	m := newImage(t, 8192)
	if _, err := OpenImage(m.Path(), true); !errors.Is(err, region.ErrNotPermitted) {
		t.Errorf("a locked file: %v", err)
	}
	if _, err := m.Extents(bg, 8000, 200); !errors.Is(err, region.ErrOutOfRange) {
		t.Errorf("past the end: %v", err)
	}
	if err := os.Truncate(m.Path(), 4096); err != nil {
		t.Fatal(err)
	}
	if ext, err := m.Extents(bg, 4096, 4096); err == nil {
		t.Errorf("of a file that shrank: %v", ext)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"read": m.ReadAt(bg, make([]byte, 1), 0), "zero": m.WriteZeroes(bg, 0, 1, true), "trim": m.Trim(bg, 0, 1), "cache": m.Cache(bg, 0, 1),
	} {
		if !errors.Is(err, region.ErrClosed) {
			t.Errorf("%s after Close: %v", name, err)
		}
	}
	ro, err := OpenImage(m.Path(), true)
	if err != nil {
		t.Fatal(err)
	}
	defer ro.Close()
	again, err := OpenImage(m.Path(), true)
	if err != nil {
		t.Fatalf("two readers: %v", err)
	}
	defer again.Close()
	if _, err := OpenImage(m.Path(), false); !errors.Is(err, region.ErrNotPermitted) {
		t.Errorf("a writer beside readers: %v", err)
	}
	for name, err := range map[string]error{
		"write": ro.WriteAt(bg, []byte("x"), 0), "zero": ro.WriteZeroes(bg, 0, 1, false), "trim": ro.Trim(bg, 0, 1),
	} {
		if !errors.Is(err, region.ErrReadOnly) {
			t.Errorf("%s of a read-only image: %v", name, err)
		}
	}
	if err := ro.Flush(bg); err != nil {
		t.Error(err)
	}

	dir := t.TempDir()
	empty, fifo := filepath.Join(dir, "empty"), filepath.Join(dir, "fifo")
	if err := errors.Join(os.WriteFile(empty, nil, 0o600), unix.Mkfifo(fifo, 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		location string
		want     error
	}{{empty, region.ErrOutOfRange}, {fifo, region.ErrNotSupported}, {dir, region.ErrNotSupported}, {"/dev/null", region.ErrNotSupported},
		{filepath.Join(dir, "nothing"), fs.ErrNotExist}, {"ftp://host/x", region.ErrNotSupported}, {"file://" + empty, region.ErrOutOfRange}} {
		if _, err := OpenLocation(bg, c.location, true); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.location, err, c.want)
		}
	}
}
