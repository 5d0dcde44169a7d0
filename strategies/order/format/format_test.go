package format

import (
	"archive/zip"
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"memsync/strategies/order"
	"memsync/strategies/region"
	"memsync/strategies/replay"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// file is a Store in a slice that counts what is read of it.
type file struct {
	region.Store
	b []byte

	mu     sync.Mutex
	bytes  int64
	demand bool // all reads so far were demand
	fail   error
	block  <-chan struct{} // reads wait for it, or for their context
}

func (f *file) Size() int64 { return int64(len(f.b)) }

func (f *file) ReadAt(ctx context.Context, p []byte, off int64) error {
	if f.block != nil {
		select {
		case <-f.block:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.bytes += int64(len(p))
	f.demand = region.ClassOf(ctx) == region.Demand
	if err := region.CheckRange(off, int64(len(p)), f.Size()); err != nil {
		return err
	}
	copy(p, f.b[off:])
	return f.fail
}

// tool runs a program, or skips the test where it is missing, unless
// MEMSYNC_MUST_RUN says that it may not be.
func tool(t testing.TB, dir, stdin, name string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		replay.Missing(t, "formats", name, "is not installed")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c := exec.CommandContext(ctx, path, args...)
	c.Dir, c.Stdin = dir, strings.NewReader(stdin)
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// plan returns the ranges that come first, as a set of bytes, and their sum.
func plan(t testing.TB, b []byte, want string) (set []bool, total, read int64) {
	t.Helper()
	f := &file{b: b}
	set = make([]bool, len(b))
	name, err := Plan(t.Context(), f, func(r order.Range) error {
		if r.Off < 0 || r.End <= r.Off || r.End > int64(len(b)) {
			t.Errorf("range %v of %d bytes", r, len(b))
		}
		for x := r.Off; x < r.End; x++ {
			if !set[x] {
				total++
			}
			set[x] = true
		}
		return nil
	})
	if err != nil || name != want {
		t.Fatalf("Plan says %q, %v; want %q", name, err, want)
	}
	if !f.demand {
		t.Error("reads of a plan are demand")
	}
	t.Logf("%s of %d bytes: %d come first, %d were read for that", name, len(b), total, f.bytes)
	return set, total, f.bytes
}

// missing returns the first byte of [off, off+n) that is not in set, or -1.
func missing(set []bool, off, n int64) int64 {
	for x := off; x < off+n; x++ {
		if !set[x] {
			return x
		}
	}
	return -1
}

func readFile(t testing.TB, name string) []byte {
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestSQLite: of a real database, every interior page comes first (sqlite3's own
// dbstat names them), and few bytes beside.
func TestSQLite(t *testing.T) {
	for _, page := range []int{1024, 4096, 65536} {
		dir := t.TempDir()
		tool(t, dir, fmt.Sprintf(`pragma page_size=%d;
create table a(id integer primary key, v text); create table b(k text primary key, v blob) without rowid; create table empty(x);
create index av on a(v); create view w as select * from a;
with recursive c(x) as (select 1 union all select x+1 from c where x<20000)
insert into a select x, hex(randomblob(20)) from c;
insert into b select v, randomblob(50) from a;`, page), "sqlite3", "db")
		b := readFile(t, filepath.Join(dir, "db"))
		set, total, read := plan(t, b, "sqlite")
		out := strings.TrimSpace(tool(t, dir, "select pageno from dbstat where pagetype='internal' union select rootpage from sqlite_schema where rootpage>0 and name='none' union select 1;", "sqlite3", "db"))
		pages := strings.Fields(out)
		if len(pages) < 2 {
			t.Fatalf("the test needs interior pages: %q", out)
		}
		for _, p := range pages {
			n, err := strconv.ParseInt(p, 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			if x := missing(set, (n-1)*int64(page), int64(page)); x >= 0 {
				t.Errorf("interior page %d is not among the first", n)
			}
		}
		if total > int64(len(pages)+1)*int64(page) || read > total+8*int64(page)+headSize {
			t.Errorf("pages of %d: %d bytes come first and %d were read, for %d interior pages", page, total, read, len(pages))
		}
	}
}

// watched logs where a file is read.
type watched struct {
	*bytes.Reader
	read func(off int64, n int)
}

func (w watched) ReadAt(p []byte, off int64) (int, error) {
	n, err := w.Reader.ReadAt(p, off)
	w.read(off, n)
	return n, err
}

// TestZip: what the standard library reads to list an archive comes first, also
// with something before the archive, with a comment, and in zip64.
func TestZip(t *testing.T) {
	for _, c := range []struct {
		name            string
		files           int
		prefix, comment int
	}{{"plain", 500, 0, 0}, {"comment", 50, 0, 65000}, {"prefix", 50, 70000, 10}, {"zip64", 70000, 0, 0}, {"empty", 0, 0, 0}} {
		t.Run(c.name, func(t *testing.T) {
			var b bytes.Buffer
			w := zip.NewWriter(&b)
			if c.prefix > 0 {
				b.WriteString("PK\x03\x04" + strings.Repeat("x", c.prefix-4)) // as a self-extracting archive, but still known by its head
			}
			for i := range c.files {
				e, err := w.Create(fmt.Sprintf("folder/file%d", i))
				if err != nil {
					t.Fatal(err)
				}
				fmt.Fprintf(e, "content %d %0100d", i, i)
			}
			if err := errors.Join(w.SetComment(strings.Repeat("c", c.comment)), w.Close()); err != nil {
				t.Fatal(err)
			}
			set, total, read := plan(t, b.Bytes(), "zip")
			r, err := zip.NewReader(bytes.NewReader(b.Bytes()), int64(b.Len()))
			if err != nil || len(r.File) != c.files {
				t.Fatalf("%d files, %v", len(r.File), err)
			}
			// The directory is from after the last file's data to the end.
			from := int64(c.prefix)
			for _, f := range r.File {
				off, err := f.DataOffset()
				if err != nil {
					t.Fatal(err)
				}
				from = max(from, off+int64(f.CompressedSize64)+16) // and its data descriptor
			}
			if x := missing(set, from, int64(b.Len()-c.comment)-from); x >= 0 {
				t.Errorf("byte %d of the directory, which begins at %d, is not among the first", x, from)
			}
			if total > int64(b.Len())-from+64 || read > headSize+2*(1<<16)+200 {
				t.Errorf("%d bytes come first and %d were read; the directory has %d", total, read, int64(b.Len())-from)
			}
		})
	}
}

// TestELF: what debug/elf reads of this very program to link it comes first.
func TestELF(t *testing.T) {
	name, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{name, "/bin/sh"} {
		b := readFile(t, name)
		set, total, read := plan(t, b, "elf")
		f, err := elf.NewFile(watched{bytes.NewReader(b), func(off int64, n int) {
			if x := missing(set, off, int64(n)); x >= 0 {
				t.Errorf("%s: byte %d, which debug/elf reads, is not among the first", name, x)
			}
		}})
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.ImportedSymbols()
		if err != nil && !errors.Is(err, elf.ErrNoSymbols) {
			t.Fatal(err)
		}
		_, _ = f.Symbols()
		if entry := f.Entry; total >= int64(len(b)) || entry == 0 || read > 1<<20 {
			t.Errorf("%d of %d bytes come first, %d were read", total, len(b), read)
		}
	}
}

// box returns an MP4 box.
func box(kind string, n int, wide bool) []byte {
	if wide {
		b := binary.BigEndian.AppendUint64(append([]byte{0, 0, 0, 1}, kind...), uint64(n+16))
		return append(b, make([]byte, n)...)
	}
	return append(append(binary.BigEndian.AppendUint32(nil, uint32(n+8)), kind...), make([]byte, n)...)
}

// TestMP4: the index comes first wherever it stands.
func TestMP4(t *testing.T) {
	for _, wide := range []bool{false, true} {
		for _, boxes := range [][]string{{"ftyp", "moov", "mdat"}, {"ftyp", "free", "mdat", "moov"}} {
			var b []byte
			at := map[string]int64{}
			for _, k := range boxes {
				at[k] = int64(len(b))
				n := map[string]int{"ftyp": 24, "moov": 70_000, "free": 9, "mdat": 9 << 20}[k]
				b = append(b, box(k, n, wide && k == "mdat")...)
			}
			set, total, read := plan(t, b, "mp4")
			if missing(set, at["moov"], 70_000) >= 0 || missing(set, 0, 24) >= 0 {
				t.Errorf("%v: the index is not among the first", boxes)
			}
			if total > 70_000+1<<20+100 || read > headSize+16*5 {
				t.Errorf("%v: %d bytes come first, %d were read", boxes, total, read)
			}
		}
	}
	// A box that goes to the end of the file.
	b := append(box("ftyp", 8, false), "\x00\x00\x00\x00mdat"...)
	plan(t, append(b, make([]byte, 5000)...), "mp4")
}

// TestMP4FromFFmpeg looks at a file that a real program made.
func TestMP4FromFFmpeg(t *testing.T) {
	dir := t.TempDir()
	if _, err := exec.LookPath("ffmpeg"); err != nil {
		t.Skip("ffmpeg is not installed")
	}
	tool(t, dir, "", "ffmpeg", "-v", "error", "-f", "lavfi", "-i", "testsrc=duration=5", "out.mp4")
	b := readFile(t, filepath.Join(dir, "out.mp4"))
	set, _, _ := plan(t, b, "mp4")
	at := int64(bytes.LastIndex(b, []byte("moov"))) - 4
	if missing(set, at, int64(binary.BigEndian.Uint32(b[at:]))) >= 0 {
		t.Error("the index is not among the first")
	}
}

// TestExt4: of a real file system, all blocks of directories (debugfs names
// them) and the inode tables in use come first.
func TestExt4(t *testing.T) {
	for _, options := range [][]string{{"-b", "4096"}, {"-b", "1024"}, {"-b", "4096", "-O", "^64bit,^metadata_csum"}, {"-O", "none,filetype", "-b", "2048"}} {
		dir := t.TempDir()
		tree := filepath.Join(dir, "tree")
		folders := []string{"/"}
		for i := range 40 {
			name := fmt.Sprintf("/d%d/sub", i)
			folders = append(folders, fmt.Sprintf("/d%d", i), name)
			if err := os.MkdirAll(tree+name, 0o700); err != nil {
				t.Fatal(err)
			}
			for j := range 30 {
				if err := os.WriteFile(fmt.Sprintf("%s%s/file with a long name %d", tree, name, j), make([]byte, 5000), 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}
		image := filepath.Join(dir, "image")
		args := append([]string{"-q", "-F", "-d", tree}, options...)
		tool(t, dir, "", "mkfs.ext4", append(args, image, "64m")...)
		b := readFile(t, image)
		set, total, read := plan(t, b, "ext4")
		block := int64(1024) << binary.LittleEndian.Uint32(b[1024+24:])
		n := 0
		for _, f := range folders {
			for _, s := range strings.Fields(tool(t, dir, "", "debugfs", "-R", "blocks "+f, image)) {
				if k, err := strconv.ParseInt(s, 10, 64); err == nil && k > 0 {
					n++
					if missing(set, k*block, block) >= 0 {
						t.Errorf("%v: block %d of %s is not among the first", options, k, f)
					}
				}
			}
		}
		if n < len(folders) || total > 8<<20 || read > 2<<20 {
			t.Errorf("%v: %d blocks of directories; %d bytes come first, %d were read", options, n, total, read)
		}
	}
}

// TestUnknown: content without a format has no plan.
func TestUnknown(t *testing.T) {
	for _, n := range []int{0, 1, 11, 100, 5000} {
		if _, total, _ := plan(t, bytes.Repeat([]byte{'x'}, n), ""); total != 0 {
			t.Errorf("%d bytes come first of %d without a format", total, n)
		}
	}
	bad := errors.New("bad sector")
	if _, err := Plan(t.Context(), &file{b: []byte("SQLite format 3\x00" + strings.Repeat("x", 200)), fail: bad}, nil); !errors.Is(err, bad) {
		t.Errorf("an error of the store: %v", err)
	}
}

// TestOrder: the order pulls linearly while the plan is made, ends where its
// reader stops, and leaves no goroutine behind even if a read hangs.
func TestOrder(t *testing.T) {
	b := append(box("ftyp", 24, false), append(box("mdat", 3<<20, false), box("moov", 1000, false)...)...)
	free := make(chan struct{})
	f := &file{b: b, block: free}
	var got []order.Range
	linear := 0
	for r := range Order(t.Context(), f).Ranges(f.Size(), 512<<10) {
		got = append(got, r)
		if r.End-r.Off == 512<<10 {
			linear++
		}
		if linear == 3 && free != nil {
			close(free)
			free = nil
		}
		if linear < 3 && r.Off != int64(len(got)-1)*512<<10 {
			t.Fatalf("%v is not linear", got)
		}
	}
	moov := int64(len(b) - 1008)
	found := false
	for _, r := range got {
		found = found || r.Off == moov
	}
	if !found || linear < 3 {
		t.Errorf("the index, at %d, is not in %v", moov, got)
	}

	for range Order(t.Context(), &file{b: b, block: make(chan struct{})}).Ranges(f.Size(), 512<<10) {
		break // TestMain finds the goroutine that stays
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	for range Order(ctx, &file{b: b, block: make(chan struct{})}).Ranges(f.Size(), 512<<10) {
	} // ends with ctx
}

// seeds are small files of each format.
func seeds(t testing.TB) [][]byte {
	var z bytes.Buffer
	w := zip.NewWriter(&z)
	e, _ := w.Create("a")
	_, _ = io.WriteString(e, "b")
	_ = w.Close()
	db := make([]byte, 2048)
	copy(db, "SQLite format 3\x00\x02\x00")
	db[100], db[104], db[108] = interiorTable, 1, 0
	db[112], db[113], db[111] = 1, 0, 2
	db[259] = 3
	ext := make([]byte, 16<<10)
	copy(ext[1024:], []byte{64, 0, 0, 0, 16})
	copy(ext[1024+0x20:], []byte{0, 32})
	ext[1024+0x14], ext[1024+0x28], ext[1024+0x38], ext[1024+0x39], ext[1024+0x4C] = 1, 64, 0x53, 0xEF, 1
	ext[1024+0x58], ext[1024+0x60] = 128, 0x40
	ext[2048+8] = 4
	copy(ext[4096+128+0x28:], []byte{0x0A, 0xF3, 1, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 9})
	ext[4096+128], ext[4096+129], ext[4096+128+5], ext[4096+128+0x22] = 0, 0x40, 4, 8
	bin := make([]byte, 512)
	copy(bin, "\x7fELF\x02\x01\x01")
	bin[32], bin[40], bin[54], bin[56], bin[58], bin[60] = 64, 128, 56, 1, 64, 2
	return [][]byte{z.Bytes(), db, ext, bin, append(box("ftyp", 8, false), box("mdat", 8, true)...), nil}
}

// FuzzPlan: whatever the content is, a plan ends, within its limits, without an
// error, and its ranges lie within the region.
func FuzzPlan(f *testing.F) {
	for _, b := range seeds(f) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s := &file{b: b}
		ranges := 0
		if _, err := Plan(t.Context(), s, func(r order.Range) error {
			if r.Off < 0 || r.End <= r.Off || r.End > s.Size() {
				t.Fatalf("range %v of %d bytes", r, len(b))
			}
			ranges++
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if ranges > maxRanges || s.bytes > maxRead {
			t.Fatalf("%d ranges, %d bytes read", ranges, s.bytes)
		}
	})
}

// TestDamaged: real files with bytes changed at random end as well.
func TestDamaged(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, b := range seeds(t) {
		for range 3000 {
			c := bytes.Clone(b)
			for range 1 + r.IntN(4) {
				if len(c) > 64 {
					c[r.IntN(min(len(c), 5000))] = byte(r.Uint32() >> r.IntN(8))
				}
			}
			if _, err := Plan(t.Context(), &file{b: c}, func(order.Range) error { return nil }); err != nil {
				t.Fatal(err)
			}
		}
	}
}
