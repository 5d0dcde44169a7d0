package conformance

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"memsync/strategies"
	"memsync/strategies/attach"
	"memsync/strategies/region"
	"memsync/strategies/replay"
	"memsync/strategies/storetest"
)

// FileSystemArgs say what Region.FileSystem does.
type FileSystemArgs struct {
	Path  string // of the device
	Size  int64  // of the device
	Dir   string
	Files int
	Data  []byte // of all files together, one behind the other
}

// FileSystem formats the device with ext4, mounts it, maps its files, stores
// Data through the mappings, reads it back, flushes and unmounts.
func (t *Region) FileSystem(a FileSystemArgs, r *Result) error {
	r.set(func() error {
		from := filepath.Join(a.Dir, "empty")
		if err := os.Mkdir(from, 0o700); err != nil {
			return err
		}
		size := int64(len(a.Data))
		part := region.PartSize(size, a.Files)
		for i := range a.Files {
			name := filepath.Join(from, attach.FileName(i))
			if err := errors.Join(os.WriteFile(name, nil, 0o600), os.Truncate(name, size-int64(a.Files-1)*part)); err != nil {
				return err
			}
		}
		if err := errors.Join(attach.Format(a.Path, a.Size, from), os.RemoveAll(from)); err != nil {
			return err
		}
		v, err := attach.Open(strategies.Attachment{Kind: strategies.AttachPath, Path: a.Path, Size: a.Size}, attach.Options{FileSystem: "ext4", Files: a.Files, Size: size, Dir: a.Dir})
		if err != nil {
			return err
		}
		got := make([]byte, size)
		err = errors.Join(v.WriteAt(a.Data, 0), v.Sync(), v.ReadAt(got, 0), v.Close())
		if err == nil {
			err = same(got, a.Data, 0)
		}
		return err
	}())
	return nil
}

// TestFileSystem: a file system can be made on the device; what is stored through
// mappings of its files is at the source after Sync, in a file system without faults.
func (s suite) TestFileSystem(t *testing.T) {
	s.need(t, strategies.Writes)
	if _, err := exec.LookPath("mke2fs"); err != nil {
		replay.Missing(t, "formats", "needs mke2fs (e2fsprogs):", err)
	}
	ctx := within(t)
	const size, files = 16 << 20, 3
	source := storetest.Seeded(region.Content{Seed: 11}, size)
	g := s.mount(t, source, nil)
	a := g.Attachment()
	if a.Kind != strategies.AttachPath {
		t.Skipf("attachment %q has no path to make a file system on", a.Kind)
	}
	if err := g.detach(ctx); err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 3<<20+12345)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(data)
	dir := t.TempDir()
	var result Result
	if err := g.call(ctx, "FileSystem", FileSystemArgs{Path: a.Path, Size: a.Size, Dir: dir, Files: files, Data: data}, &result); err != nil {
		t.Fatal(err)
	}
	if result.Err != "" {
		t.Fatal(result.Err)
	}
	if err := g.Mount.Sync(ctx); err != nil {
		t.Fatalf("Sync: %v", err)
	}
	image := filepath.Join(dir, "image")
	if err := os.WriteFile(image, source.Snapshot(), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(ctx, "e2fsck", "-fn", image).CombinedOutput(); err != nil {
		t.Errorf("e2fsck of the source: %v\n%s", err, out)
	}
	// The copy of the source is an ordinary file: this process may.
	v, err := attach.Open(strategies.Attachment{Kind: strategies.AttachPath, Path: image, Size: size, ReadOnly: true},
		attach.Options{FileSystem: "ext4", Files: files, Size: int64(len(data)), Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(data))
	if err := errors.Join(v.ReadAt(got, 0), v.Close()); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, data) {
		t.Error("the files of the source are not what was stored")
	}
	g.close(ctx)
}
