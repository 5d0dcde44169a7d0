package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"
)

const workPrefix = "memsync-lab-"

// plainPath is what the kernel's command line, a #! line and the path of a
// socket (108 bytes) can carry.
var plainPath = regexp.MustCompile(`^[A-Za-z0-9/._+@-]{1,70}$`)

// workParent is the folder for work folders: the user's temporary one if the guest can use it.
func workParent() string {
	if tmp := os.TempDir(); plainPath.MatchString(tmp) && visible(tmp) == nil {
		return tmp
	}
	return "/tmp"
}

// makeWork makes a work folder. Its lock, held until release, tells Clean that
// it is in use.
func makeWork() (dir string, release func(), err error) {
	for {
		dir, err = os.MkdirTemp(workParent(), workPrefix)
		if err != nil {
			return "", nil, fmt.Errorf("make a folder for the lab kernel: %w", err)
		}
		lock, err := lockFolder(dir)
		if err == nil {
			return dir, func() {
				_ = os.RemoveAll(dir)
				_ = lock.Close()
			}, nil
		}
		if !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.EWOULDBLOCK) {
			_ = os.RemoveAll(dir)
			return "", nil, err
		}
		// Clean came between; take another.
	}
}

func lockFolder(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	if _, err := os.Stat(dir); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// Stale returns the work folders that a killed Run of this user left behind.
func Stale() []string { return eachStale(func(string) error { return nil }) }

// Clean removes them and returns those that it removed. It leaves alone what a
// Run in progress uses.
func Clean() []string { return eachStale(os.RemoveAll) }

func eachStale(f func(dir string) error) (done []string) {
	entries, _ := os.ReadDir(workParent())
	for _, e := range entries {
		dir := filepath.Join(workParent(), e.Name())
		var st unix.Stat_t
		if !strings.HasPrefix(e.Name(), workPrefix) || unix.Lstat(dir, &st) != nil ||
			st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Getuid() {
			continue
		}
		lock, err := lockFolder(dir)
		if err != nil {
			continue
		}
		if f(dir) == nil {
			done = append(done, dir)
		}
		_ = lock.Close()
	}
	return done
}
