package inputs

import (
	"errors"
	"os"
	"strings"
	"testing"

	"memsync/strategies/order"
	"memsync/strategies/region"
)

// TestPath makes every input and its traces: the file has its format, the
// program's reads lie within it and are a small part of it, and two variants differ.
func TestPath(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	for _, in := range All() {
		t.Run(in.Name, func(t *testing.T) {
			file, err := Path(t.Context(), Prefix+in.Name)
			if errors.Is(err, region.ErrNotSupported) {
				t.Skip(err)
			}
			if err != nil {
				t.Fatal(err)
			}
			fi, err := os.Stat(file)
			if err != nil || fi.Size() < Size*3/4 || fi.Size() > Size*2 {
				t.Fatalf("%d bytes, %v", fi.Size(), err)
			}
			var traces [2]string
			for i, suffix := range []string{".trace", ".other"} {
				path, err := Path(t.Context(), Prefix+in.Name+suffix)
				if errors.Is(err, region.ErrNotPermitted) || errors.Is(err, region.ErrNotSupported) {
					t.Skip(err) // FUSE
				}
				if err != nil {
					t.Fatal(err)
				}
				entries, err := order.ReadFile(path, fi.Size(), order.ParseTrace)
				if err != nil {
					t.Fatal(err)
				}
				b, _ := os.ReadFile(path)
				traces[i] = string(b)
				pages := map[int64]bool{}
				for _, e := range entries {
					for p := e.Off / 4096; p*4096 < e.End; p++ {
						pages[p] = true
					}
				}
				t.Logf("%s of %d bytes: %d reads of %d pages", path, fi.Size(), len(entries), len(pages))
				if len(pages) < 10 || int64(len(pages))*4096 > fi.Size()/4 {
					t.Errorf("%d pages were read of %d bytes", len(pages), fi.Size())
				}
			}
			if traces[0] == traces[1] {
				t.Error("both variants read the same")
			}
			if again, err := Path(t.Context(), Prefix+in.Name); again != file || err != nil {
				t.Errorf("%s, %v the second time", again, err)
			}
		})
	}
	for _, bad := range []string{"made:", "made:nothing", "made:zip.", "made:zip.x", "zip"} {
		if _, err := Path(t.Context(), bad); err == nil || !strings.Contains(err.Error(), "made:sqlite") {
			t.Errorf("Path(%q) = %v", bad, err)
		}
	}
}
