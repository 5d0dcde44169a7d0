package snapshot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
	"memsync/strategies/snapshot/client"
	"memsync/strategies/snapshot/image"
	"memsync/strategies/snapshot/shm"
)

// misuse is what a client of mode cow does that the host would not see, were it not refused.
func misuse(how string) error {
	dup := func(fd int) int {
		n, err := unix.Dup(fd)
		if err != nil {
			panic(err)
		}
		return n
	}
	file := func(fd int) *os.File { return os.NewFile(uintptr(fd), "dup") }
	refused := func(err error, by error) error {
		if !errors.Is(err, by) {
			return fmt.Errorf("%s: %v, want %v", how, err, by)
		}
		return nil
	}
	spare := []int{dup(3), dup(4), dup(5), dup(6)}
	mapped := func(prot int) error {
		m, err := unix.Mmap(spare[0], 0, pg, prot, unix.MAP_SHARED)
		if err == nil && how != "second-mapping" {
			_ = unix.Munmap(m)
		}
		return err
	}
	if how == "second-mapping" {
		if err := mapped(unix.PROT_READ | unix.PROT_WRITE); err != nil {
			return err
		}
		_, err := client.Open()
		return refused(err, region.ErrNotPermitted)
	}
	r, err := client.Open()
	if err != nil {
		return err
	}
	defer r.Close()
	switch how {
	case "later-mapping":
		return refused(mapped(unix.PROT_READ|unix.PROT_WRITE), unix.EPERM)
	case "pwrite":
		_, err := unix.Pwrite(spare[0], []byte{1}, 0)
		return refused(err, unix.EPERM)
	case "punch":
		return refused(unix.Fallocate(spare[0], unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, pg), unix.EPERM)
	case "second-client":
		_, err := client.Attach(client.Files{Region: file(spare[0]), Control: file(spare[1]), Status: file(spare[2]), Socket: file(spare[3])})
		return refused(err, unix.EPERM)
	case "garbage":
		_, err := unix.Write(spare[3], []byte("garbage"))
		if err != nil {
			return err
		}
		select {} // the host ends us
	}
	return fmt.Errorf("unknown misuse %q", how)
}

// TestMisuse: what write protection would not see is refused.
func TestMisuse(t *testing.T) {
	for _, how := range []string{"second-mapping", "later-mapping", "pwrite", "punch", "second-client", "garbage"} {
		t.Run(how, func(t *testing.T) {
			need(t, shm.Cow)
			j := newJob(t, shm.Cow)
			j.Do = "misuse:" + how
			img := j.openImage(t)
			defer img.Close()
			e, err := j.command().Run(t.Context(), img, j.Options)
			switch how {
			case "second-mapping":
				if !errors.Is(err, region.ErrNotPermitted) || !strings.Contains(err.Error(), "another mapping") {
					t.Errorf("%+v, %v", e, err)
				}
			case "garbage":
				if !errors.Is(err, region.ErrMismatch) {
					t.Errorf("%+v, %v", e, err)
				}
			default:
				if err != nil || e.Status != 0 {
					t.Errorf("%+v, %v", e, err)
				}
			}
		})
	}
}

// TestDiskFull: an image that does not fit is an error, the one before it stays, the
// client is told, and once there is room the next one has everything.
func TestDiskFull(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"); errors.Is(err, unix.EPERM) && os.Geteuid() != 0 {
		t.Skip("needs root to mount a tmpfs: ", err)
	} else if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	const size = 64 * pg
	img, err := image.Open(filepath.Join(dir, "image"), size, pg)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	h, err := Open(t.Context(), img, Options{Mode: shm.Triple})
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	var dups []*os.File
	files, _ := h.Files()
	for _, f := range files {
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		dups = append(dups, os.NewFile(uintptr(fd), f.Name()))
	}
	r, err := client.Attach(client.Files{Region: dups[0], Control: dups[1], Status: dups[2]})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	put := func(n uint64, bytes int64) {
		p := make([]byte, bytes)
		region.Content{Generation: n}.Fill(p, 0)
		if err := r.Write(p, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Publish(nil); err != nil {
			t.Fatal(err)
		}
	}
	put(1, 8*pg)
	if s, err := h.Snapshot(t.Context(), nil); err != nil || !s.Fresh {
		t.Fatalf("%+v, %v", s, err)
	}
	put(2, size)
	for range 2 {
		if _, err := h.Snapshot(t.Context(), nil); !errors.Is(err, ErrNotSaved) || !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
	}
	if s, _ := img.Latest(); s.Sequence != 1 {
		t.Errorf("image of publication %d", s.Sequence)
	}
	if s := r.Status(); s.Failures != 2 || s.Sequence != 1 || s.Images != 1 {
		t.Errorf("%+v", s)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, "size=4m"); err != nil {
		t.Fatal(err)
	}
	if s, err := h.Snapshot(t.Context(), nil); err != nil || s.Sequence != 2 {
		t.Fatalf("%+v, %v", s, err)
	}
	got := make([]byte, size)
	if err := img.Restore(t.Context(), func(p []byte, off int64) error { copy(got[off:], p); return nil }); err != nil {
		t.Fatal(err)
	}
	if err := (region.Content{Generation: 2}).Check(got, 0); err != nil {
		t.Error(err)
	}
}
