package scenarios

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/mountinfo"
	"memsync/strategies/region"
)

// The sandbox: before it measures, memsync starts itself once more in a mount
// namespace and a PID namespace of its own (and, where it is not root, in a user
// namespace). That is what makes clean-up sure. When the inner process ends,
// however it ends, the kernel kills all that it started and drops its mounts,
// and with the last process go the anonymous network namespaces and their
// devices. The outer process only waits, passes signals on and removes the
// scratch folder.
//
// A signal is passed on only once the inner process says that it listens, by
// closing a pipe: before that, the first process of a PID namespace loses it.

const (
	sandboxEnv    = "MEMSYNC_SANDBOX" // the scratch folder; set for the inner process only
	scratchPrefix = "memsync-run-"
	ownerFile     = "owner" // locked by the outer process as long as it lives
	readyFD       = 3       // of the inner process: the pipe that it closes
)

// Sandboxed reports whether this process is the inner one, and its scratch folder.
func Sandboxed() (scratch string, ok bool) {
	scratch = os.Getenv(sandboxEnv)
	return scratch, scratch != ""
}

// EnterSandbox runs this program with the same arguments once more, inside a
// sandbox, and returns its exit status. It returns an error that matches
// region.ErrNotPermitted where the kernel refuses to make one.
// When ctx ends, the inner process gets SIGINT; a second signal (SIGINT, SIGTERM,
// SIGHUP) kills it. Where that was its end, the error is ctx's.
func EnterSandbox(ctx context.Context) (status int, err error) {
	scratch, unlock, err := newScratch()
	if err != nil {
		return 0, err
	}
	defer unlock()
	readyR, readyW, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer readyR.Close()
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), sandboxEnv+"="+scratch)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{readyW} // as readyFD
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID,
		Pdeathsig:  unix.SIGKILL,
		Setpgid:    true, // a terminal's Ctrl-C comes from us only, when it listens
	}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer signal.Stop(signals)
	done := make(chan error, 1)
	started := make(chan error, 1)
	go func() {
		// Pdeathsig fires when the starting thread ends, so it must not.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			done <- cmd.Wait()
		}
	}()
	err = <-started
	readyW.Close()
	if err != nil {
		return 0, fmt.Errorf("start in a sandbox (mount and PID namespaces): %w: %w; "+
			"run as root, or allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, user.max_user_namespaces, max_mnt_namespaces and max_pid_namespaces above 0, kernel.apparmor_restrict_unprivileged_userns=0), "+
			"or use the lab kernel (memsync lab -- COMMAND)", err, region.ErrNotPermitted)
	}
	go func() {
		<-ctx.Done()
		_, _ = readyR.Read(make([]byte, 1)) // it listens, or has ended
		_ = cmd.Process.Signal(unix.SIGINT)
	}()
	for n := 0; ; {
		select {
		case <-signals:
			if n++; n > 1 {
				_ = cmd.Process.Kill()
			}
		case err := <-done:
			var exit *exec.ExitError
			if !errors.As(err, &exit) {
				return 0, err
			}
			if exit.ExitCode() < 0 { // by a signal
				err = fmt.Errorf("the measuring process ended: %w", exit)
				return 0, errors.Join(context.Cause(ctx), err)
			}
			return exit.ExitCode(), nil
		}
	}
}

// newScratch makes the scratch folder, locked by this process, and sweeps away
// those whose owner is gone.
func newScratch() (dir string, remove func(), err error) {
	if _, err := CleanScratch(); err != nil {
		return "", nil, err
	}
	return NewOwned(scratchPrefix)
}

// NewOwned makes a folder in the temporary directory whose name begins with
// prefix, owned (locked) by this process until it ends or calls remove.
func NewOwned(prefix string) (dir string, remove func(), err error) {
	dir, err = os.MkdirTemp("", prefix)
	if err != nil {
		return "", nil, fmt.Errorf("make a scratch folder: %w", err)
	}
	// Locked before it has its name, so that no other process finds it unlocked.
	owner := filepath.Join(dir, ownerFile)
	f, err := os.OpenFile(owner+".new", os.O_CREATE|os.O_RDWR, 0o600)
	if err == nil {
		err = errors.Join(unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB), os.Rename(f.Name(), owner))
	}
	if err != nil {
		return "", nil, errors.Join(fmt.Errorf("lock the scratch folder: %w", err), os.RemoveAll(dir))
	}
	return dir, func() { os.RemoveAll(dir); f.Close() }, nil
}

// CleanScratch removes the scratch folders that killed runs of this user left
// behind and returns their paths. A folder whose owner lives is not touched.
func CleanScratch() (removed []string, err error) { return CleanOwned(scratchPrefix, nil) }

// CleanOwned does so for the folders of NewOwned with that prefix. It calls before,
// unless nil, with each, and leaves it where that gives an error.
func CleanOwned(prefix string, before func(dir string) error) (removed []string, err error) {
	dirs, err := filepath.Glob(filepath.Join(os.TempDir(), prefix+"*"))
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, dir := range dirs {
		var st unix.Stat_t
		if unix.Lstat(dir, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() {
			continue
		}
		f, err := os.OpenFile(filepath.Join(dir, ownerFile), os.O_RDWR, 0)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			// Just being made, or half removed: old enough is gone.
			if fi, err := os.Stat(dir); err != nil || time.Since(fi.ModTime()) < time.Minute {
				continue
			}
		case errors.Is(err, fs.ErrPermission):
			continue // another user's
		case err != nil:
			errs = append(errs, err)
			continue
		default:
			defer f.Close()
			if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
				continue
			}
		}
		if before != nil {
			if err := before(dir); err != nil {
				errs = append(errs, err)
				continue
			}
		}
		UnmountBelow(dir)
		if err := os.RemoveAll(dir); err != nil {
			errs = append(errs, fmt.Errorf("remove %s: %w", dir, err))
			continue
		}
		removed = append(removed, dir)
	}
	return removed, errors.Join(errs...)
}

// SetUpSandbox is what the inner process does first, once it listens for
// signals: it says so, makes mounts private and shows itself a /proc of its PID
// namespace.
func SetUpSandbox() error {
	_ = unix.Close(readyFD)
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w: %w", err, region.ErrNotPermitted)
	}
	// Refused where /proc is masked (some containers). The old one serves as well:
	// /proc/self is right in both.
	_ = unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	return nil
}

// UnmountBelow detaches every mount below dir; for what a killed daemon left.
func UnmountBelow(dir string) {
	mounts, err := mountinfo.Read()
	if err != nil {
		return
	}
	for _, m := range mounts {
		if m.Point == dir || strings.HasPrefix(m.Point, dir+"/") {
			_ = unix.Unmount(m.Point, unix.MNT_DETACH)
		}
	}
}
