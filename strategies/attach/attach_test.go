package attach

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"memsync/strategies"
	"memsync/strategies/region"
)

func memfd(t *testing.T, content []byte) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("attach-test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "memfd")
	if _, err := f.WriteAt(content, 0); err != nil {
		t.Fatal(err)
	}
	return f
}

// TestAccess runs a random program of reads and writes against a plain slice,
// over every kind of attachment that needs no server and every way of access.
func TestAccess(t *testing.T) {
	for _, size := range []int64{1, 4095, 4096, 4097, 3*65536 + 17} {
		want := make([]byte, size)
		region.Content{Seed: 5}.Fill(want, 0)
		path := filepath.Join(t.TempDir(), "f")
		cases := map[string]func() (*View, error){}
		for _, via := range []string{"", ViaMap, ViaFile, ViaPath} {
			cases["path "+via] = func() (*View, error) {
				if err := os.WriteFile(path, want, 0o600); err != nil {
					return nil, err
				}
				return Open(strategies.Attachment{Kind: strategies.AttachPath, Path: path, Size: size, Populate: via == ViaMap}, Options{Via: via})
			}
		}
		for _, via := range []string{ViaMap, ViaFile} {
			cases["memfd "+via] = func() (*View, error) {
				return Open(strategies.Attachment{Kind: strategies.AttachMemfd, File: memfd(t, want), Size: size}, Options{Via: via})
			}
		}
		cases["anonymous"] = func() (*View, error) {
			return Open(strategies.Attachment{Kind: strategies.AttachAnonymous, File: memfd(t, want), Size: size}, Options{})
		}
		for name, open := range cases {
			t.Run(name, func(t *testing.T) {
				v, err := open()
				if err != nil {
					t.Fatal(err)
				}
				program(t, v, bytes.Clone(want))
				if err := errors.Join(v.Sync(), v.Close(), v.Close()); err != nil {
					t.Fatal(err)
				}
				for _, err := range []error{v.ReadAt(make([]byte, 1), 0), v.WriteAt(make([]byte, 1), 0), v.Sync(), v.Do(func([]byte) {})} {
					if !errors.Is(err, region.ErrClosed) {
						t.Fatalf("after Close: %v", err)
					}
				}
			})
		}
	}
}

func program(t *testing.T, v *View, model []byte) {
	t.Helper()
	r := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		off := r.Int64N(v.Size() + 1)
		p := make([]byte, r.Int64N(min(v.Size()-off, 9000)+1))
		if r.IntN(2) == 0 {
			for i := range p {
				p[i] = byte(r.Uint32())
			}
			copy(model[off:], p)
			if err := v.WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := v.ReadAt(p, off); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(p, model[off:off+int64(len(p))]) {
			t.Fatalf("read %d bytes at %d differ", len(p), off)
		}
	}
	if b := v.Bytes(); b != nil && !bytes.Equal(b, model) {
		t.Fatal("the mapping differs from what was written")
	}
	for _, off := range []int64{-1, v.Size(), v.Size() + 1} {
		if err := v.ReadAt(make([]byte, 1), off); !errors.Is(err, region.ErrOutOfRange) {
			t.Fatalf("read at %d: %v", off, err)
		}
	}
}

// TestFaultBecomesError shrinks the mapped file: the kernel then raises SIGBUS.
func TestFaultBecomesError(t *testing.T) {
	f := memfd(t, make([]byte, 16384))
	v, err := Open(strategies.Attachment{Kind: strategies.AttachMemfd, File: f, Size: 16384}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	if err := f.Truncate(8192); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			buf := make([]byte, 16384)
			for _, err := range []error{v.ReadAt(buf, 0), v.WriteAt(buf, 0), v.Do(func(mem []byte) { buf[0] = mem[8192] })} {
				var off int // memmove may touch its last bytes first
				if err != nil {
					_, tail, _ := strings.Cut(err.Error(), "fault at offset ")
					off, _ = strconv.Atoi(strings.Split(tail, ":")[0])
				}
				if !errors.Is(err, unix.EIO) || off < 8192 || off >= 16384 {
					t.Errorf("want EIO at an offset that was cut off, got %v", err)
				}
			}
			if err := v.ReadAt(buf[:8192], 0); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// TestForeignPanic: Do hides nothing but faults in the mapping.
func TestForeignPanic(t *testing.T) {
	v, err := Open(strategies.Attachment{Kind: strategies.AttachMemfd, File: memfd(t, make([]byte, 10)), Size: 10}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	defer func() {
		if recover() == nil {
			t.Error("an index out of range was swallowed")
		}
	}()
	_ = v.Do(func(mem []byte) { _ = mem[len(mem)] })
}

func TestReadOnly(t *testing.T) {
	for _, kind := range []strategies.AttachKind{strategies.AttachMemfd, strategies.AttachAnonymous} {
		v, err := Open(strategies.Attachment{Kind: kind, File: memfd(t, make([]byte, 100)), Size: 100, ReadOnly: true}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if err := v.WriteAt([]byte{1}, 3); !errors.Is(err, region.ErrReadOnly) {
			t.Errorf("%s: %v", kind, err)
		}
		if err := v.Do(func(mem []byte) { mem[3] = 1 }); !errors.Is(err, unix.EIO) {
			t.Errorf("%s: a store into a read-only mapping gave %v", kind, err)
		}
		if err := v.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		a strategies.Attachment
		o Options
	}{
		"size 0":            {strategies.Attachment{Kind: strategies.AttachMemfd}, Options{}},
		"no file":           {strategies.Attachment{Kind: strategies.AttachMemfd, Size: 1}, Options{}},
		"no path":           {strategies.Attachment{Kind: strategies.AttachPath, Size: 1}, Options{}},
		"unknown kind":      {strategies.Attachment{Kind: "tape", Size: 1}, Options{}},
		"unknown via":       {strategies.Attachment{Kind: strategies.AttachPath, Size: 1}, Options{Via: "mail"}},
		"anonymous by path": {strategies.Attachment{Kind: strategies.AttachAnonymous, Size: 1}, Options{Via: ViaPath}},
		"no fault":          {strategies.Attachment{Kind: strategies.AttachFault, Size: 1}, Options{}},
		"odd page":          {strategies.Attachment{Kind: strategies.AttachFault, Size: 1, Fault: &strategies.Fault{Memory: "anonymous", PageSize: 5000}}, Options{}},
		"O_DIRECT, mapped":  {strategies.Attachment{Kind: strategies.AttachPath, Path: "/dev/null", Size: 1}, Options{Direct: true}},
		"O_DIRECT, memfd":   {strategies.Attachment{Kind: strategies.AttachMemfd, File: memfd(t, []byte{1}), Size: 1}, Options{Via: ViaFile, Direct: true}},
		"no memfd":          {strategies.Attachment{Kind: strategies.AttachFault, Size: 1, Fault: &strategies.Fault{Memory: "shared", PageSize: 4096}}, Options{}},
	} {
		if v, err := Open(c.a, c.o); err == nil {
			t.Errorf("%s: opened %v", name, v.a)
		}
	}
	short := strategies.Attachment{Kind: strategies.AttachAnonymous, File: memfd(t, make([]byte, 10)), Size: 11}
	if _, err := Open(short, Options{}); err == nil {
		t.Error("an anonymous region was filled from a file that is too short")
	}
}

// TestFaultMapping opens the variants of AttachFault; serving them is tested in package userfaultfd.
func TestFaultMapping(t *testing.T) {
	for _, f := range []strategies.Fault{
		{Memory: "anonymous", PageSize: 4096, Missing: true},
		{Memory: "anonymous", PageSize: 4096, Missing: true, WriteProtect: true},
		{Memory: "huge", PageSize: 2 << 20, Missing: true},
		{Memory: "shared", PageSize: 4096, Missing: true, Minor: true},
	} {
		a := strategies.Attachment{Kind: strategies.AttachFault, Size: 5000, Fault: &f}
		if f.Memory == "shared" {
			a.File = memfd(t, nil)
			if err := a.File.Truncate(8192); err != nil {
				t.Fatal(err)
			}
		}
		v, err := Open(a, Options{})
		if err != nil {
			t.Fatalf("%+v: %v", f, err)
		}
		u, base, ok := v.Fault()
		if !ok || u == nil || base%uintptr(f.PageSize) != 0 || len(v.Bytes()) != 5000 {
			t.Errorf("%+v: base %#x, ok %v", f, base, ok)
		}
		if err := v.Close(); err != nil {
			t.Error(err)
		}
	}
}
