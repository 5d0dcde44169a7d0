package mount

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"memsync/scenarios"
	"memsync/strategies/mountinfo"
)

const (
	folderPrefix = "memsync-live-" // of the folder in the temporary directory that a mount or server owns
	recordFile   = "record.json"
	fuseType     = "fuse.memsync" // as package fuse mounts
)

// recorded is what there is to clean up after a mount that was killed.
type recorded struct {
	PID   int            `json:"pid"`
	Files []recordedFile `json:"files"`
}

type recordedFile struct {
	Path string `json:"path"`
	Link string `json:"link,omitempty"` // where Path is a symbolic link to
}

// record says on disk what the mount is about to make, or has made.
func (m *Mount) record() error {
	r := recorded{PID: os.Getpid()}
	for _, x := range m.regions {
		r.Files = append(r.Files, recordedFile{x.path, x.link})
	}
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	path := filepath.Join(m.dir, recordFile)
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// Clean removes what mounts of this user that were killed left behind, and returns
// the paths. What belongs to a living mount is not touched. Folders are found in
// the temporary directory ($TMPDIR).
func Clean() (removed []string, err error) {
	dirs, err := scenarios.CleanOwned(folderPrefix, func(dir string) error {
		b, err := os.ReadFile(filepath.Join(dir, recordFile))
		if errors.Is(err, fs.ErrNotExist) {
			return nil // nothing was mounted yet
		}
		if err != nil {
			return err
		}
		var r recorded
		if err := json.Unmarshal(b, &r); err != nil {
			return fmt.Errorf("%s: %w", filepath.Join(dir, recordFile), err)
		}
		var errs []error
		for _, f := range r.Files {
			did, err := f.remove()
			if did {
				removed = append(removed, f.Path)
			}
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	})
	return append(removed, dirs...), err
}

func (f recordedFile) remove() (did bool, err error) {
	mounts, err := mountinfo.Read()
	if err != nil {
		return false, err
	}
	for _, m := range mounts {
		if m.Point != f.Path || m.Type != fuseType {
			continue
		}
		if !dead(f.Path) {
			return did, nil // a later mount has the path
		}
		if err := unix.Unmount(f.Path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return did, fmt.Errorf("unmount %s: %w", f.Path, err)
		}
		did = true
	}
	fi, err := os.Lstat(f.Path)
	switch {
	case err != nil:
		return did, nil
	case fi.Mode()&fs.ModeSymlink != 0:
		if at, err := os.Readlink(f.Path); err != nil || at != f.Link {
			return did, nil
		}
	case !fi.Mode().IsRegular() || fi.Size() != 0: // not the file that we mounted over
		return did, nil
	}
	if err := os.Remove(f.Path); err != nil {
		return did, err
	}
	return true, nil
}

// dead reports whether nobody serves the FUSE mount at path any more.
func dead(path string) bool {
	answer := make(chan error, 1) // a server that lives and hangs keeps the goroutine
	go func() {
		var st unix.Statfs_t
		answer <- unix.Statfs(path, &st)
	}()
	select {
	case err := <-answer:
		return errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNABORTED)
	case <-time.After(2 * time.Second):
		return false
	}
}
