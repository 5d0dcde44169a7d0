package services

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// State is how a standing server is.
type State string

// The states.
const (
	Running State = "running" // it answers
	Mute    State = "mute"    // its process runs but does not answer
	Gone    State = "gone"    // its process has ended, and its folder is left
)

// Standing is a server that outlives the process that started it, and has a
// folder in the temporary directory ($TMPDIR), where other processes of this user
// find it: data, configuration, the file password, the file log, and a record.
type Standing struct {
	Endpoint
	Dir   string    `json:"-"`
	Since time.Time `json:"since"`
	ID    process   `json:"process"`
	State State     `json:"-"` // when it was found
}

// process is one process for ever: numbers come again, but not with the same
// start time of the same boot.
type process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks since boot
	Boot  string `json:"boot"`
}

const (
	standingPrefix = "memsync-services-" // of the folder
	standingRecord = "record.json"
	passwordFile   = "password"
	logFile        = "log"
)

// PasswordFile returns the path of the file that has the server's password.
func (s Standing) PasswordFile() string { return filepath.Join(s.Dir, passwordFile) }

// Stand starts a server that stays when this process ends, on loopback of this
// process's network, and waits until it answers. Where one of that name runs
// already, it returns that with started false. log and errors are as of Start.
// Without success nothing is left, nor when this process is killed meanwhile: the
// server's process begins only once there is a record by which it can be found.
func Stand(ctx context.Context, name string, log func(string)) (st Standing, started bool, err error) {
	if _, err := byName(name); err != nil {
		return st, false, err
	}
	all, err := Standings(ctx)
	if err != nil {
		return st, false, err
	}
	for _, st := range all {
		switch {
		case st.Kind != name:
		case st.State == Running:
			return st, false, nil
		default: // it cannot be used; this one takes its place
			if err := st.Down(); err != nil {
				return st, false, err
			}
		}
	}
	dir, err := os.MkdirTemp("", standingPrefix)
	if err != nil {
		return st, false, err
	}
	st, err = stand(ctx, name, dir, log)
	if err != nil {
		return st, false, errors.Join(err, os.RemoveAll(dir))
	}
	return st, true, nil
}

func stand(ctx context.Context, name, dir string, log func(string)) (st Standing, err error) {
	s, err := prepare(ctx, name, dir, Here(), log)
	if err != nil {
		return st, err
	}
	words, err := os.OpenFile(filepath.Join(dir, logFile), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return st, err
	}
	defer words.Close()
	gateR, gateW, err := os.Pipe()
	if err != nil {
		return st, err
	}
	defer gateR.Close()
	defer gateW.Close()
	// The shell becomes the server when a line comes through the gate, and ends when
	// the gate is closed without.
	c := exec.Command("/bin/sh", append([]string{"-c", `read -r go <&3 && exec "$0" "$@" 3<&-`, s.cmd.Path}, s.cmd.Args[1:]...)...)
	c.Env, c.Dir, c.SysProcAttr = s.cmd.Env, s.cmd.Dir, s.cmd.SysProcAttr
	c.SysProcAttr.Setsid = true // no terminal's signals
	c.Stdout, c.Stderr, c.ExtraFiles = words, words, []*os.File{gateR}
	s.cmd, s.log = c, fileTail(words.Name())
	s.net.Start = func(c *exec.Cmd) error {
		if err := c.Start(); err != nil {
			return err
		}
		id, err := identify(c.Process.Pid)
		if err == nil {
			st = Standing{Endpoint: s.Endpoint, Dir: dir, Since: time.Now().UTC().Truncate(time.Second), ID: id, State: Running}
			err = st.record()
		}
		if err == nil {
			_, err = gateW.WriteString("go\n")
		}
		if err != nil {
			gateW.Close()
			return errors.Join(err, c.Wait())
		}
		return nil
	}
	err = s.run(ctx) // which sets st
	return st, err
}

// record writes the password and the record, whole or not at all.
func (s Standing) record() error {
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	path := filepath.Join(s.Dir, standingRecord)
	return errors.Join(os.WriteFile(s.PasswordFile(), []byte(s.Password+"\n"), 0o600),
		os.WriteFile(path+".new", b, 0o600), os.Rename(path+".new", path))
}

// Standings returns the standing servers of this user, asked how they are, in the
// order of Kinds.
func Standings(ctx context.Context) ([]Standing, error) {
	dirs, err := filepath.Glob(filepath.Join(os.TempDir(), standingPrefix+"*"))
	if err != nil {
		return nil, err
	}
	var all []Standing
	for _, dir := range dirs {
		st, err := load(dir)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
			continue // being made or removed, or another user's
		}
		if err != nil {
			return nil, err
		}
		k, err := byName(st.Kind)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", dir, err)
		}
		if st.State = Gone; st.ID.alive() {
			st.State = Mute
			asked, cancel := context.WithTimeout(ctx, 5*time.Second)
			if k.ready(asked, Here(), st.Endpoint) == nil {
				st.State = Running
			}
			cancel()
		}
		all = append(all, st)
	}
	slices.SortStableFunc(all, func(a, b Standing) int {
		return slices.Index(Kinds(), a.Kind) - slices.Index(Kinds(), b.Kind)
	})
	return all, ctx.Err()
}

// load reads a folder's record. It must be this user's: the record names a process to end.
func load(dir string) (st Standing, err error) {
	path := filepath.Join(dir, standingRecord)
	for _, p := range []string{dir, path} {
		var fi unix.Stat_t
		if err := unix.Lstat(p, &fi); err != nil {
			return st, &fs.PathError{Op: "lstat", Path: p, Err: err}
		}
		if int(fi.Uid) != os.Geteuid() {
			return st, fmt.Errorf("%s belongs to user %d: %w", p, fi.Uid, fs.ErrPermission)
		}
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return st, err
	}
	if err := json.Unmarshal(b, &st); err != nil {
		return st, fmt.Errorf("%s: %w", path, err)
	}
	st.Dir = dir
	return st, nil
}

// Down ends the server, politely and after a while by SIGKILL, and removes its
// folder. One that has ended already loses its folder only.
func (s Standing) Down() error {
	k, err := byName(s.Kind)
	if err != nil {
		return err
	}
	if err := s.ID.end(k.stopTime()); err != nil {
		return fmt.Errorf("end %s, process %d: %w", s.Kind, s.ID.PID, err)
	}
	return os.RemoveAll(s.Dir)
}

// Clean removes the folders of this user's standing servers that have ended
// without Down, and returns their paths. Servers that run stay.
func Clean() (removed []string, err error) {
	dirs, err := filepath.Glob(filepath.Join(os.TempDir(), standingPrefix+"*"))
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, dir := range dirs {
		st, err := load(dir)
		switch {
		case errors.Is(err, fs.ErrPermission):
			continue
		case errors.Is(err, fs.ErrNotExist):
			// Where the record is missing no server has begun; a minute is more than
			// a command needs from the folder to the record.
			if fi, err := os.Lstat(dir); err != nil || time.Since(fi.ModTime()) < time.Minute {
				continue
			}
		case err != nil:
			errs = append(errs, err)
			continue
		case st.ID.alive():
			continue
		}
		if err := os.RemoveAll(dir); err != nil {
			errs = append(errs, err)
			continue
		}
		removed = append(removed, dir)
	}
	return removed, errors.Join(errs...)
}

// identify returns the process that has the number now.
func identify(pid int) (process, error) {
	start, _, err := procStat(pid)
	if err != nil {
		return process{}, err
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return process{PID: pid, Start: start, Boot: strings.TrimSpace(string(boot))}, err
}

// procStat returns a process's start time and whether it runs (and is no zombie), from proc_pid_stat(5).
func procStat(pid int) (start uint64, runs bool, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, false, err
	}
	_, rest, _ := strings.Cut(string(b[max(0, strings.LastIndexByte(string(b), ')')):]), " ")
	f := strings.Fields(rest)
	const state, starttime = 0, 19 // counted from the field after the name
	if len(f) <= starttime {
		return 0, false, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(f))
	}
	start, err = strconv.ParseUint(f[starttime], 10, 64)
	return start, f[state] != "Z" && f[state] != "X", err
}

func (p process) alive() bool {
	start, runs, err := procStat(p.PID)
	if err != nil || !runs || start != p.Start {
		return false
	}
	now, err := identify(p.PID)
	return err == nil && now == p
}

// end asks the process to end, and kills it after the time for that. A process
// that only has its number is not touched.
func (p process) end(patience time.Duration) error {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(fd)
	if !p.alive() { // fd is of the process that has the number now
		return nil
	}
	for _, try := range []struct {
		signal syscall.Signal
		wait   time.Duration
	}{{unix.SIGTERM, patience}, {unix.SIGKILL, 10 * time.Second}} {
		if err := unix.PidfdSendSignal(fd, try.signal, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return os.NewSyscallError("pidfd_send_signal", err)
		}
		for end := time.Now().Add(try.wait); ; {
			left := time.Until(end)
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(max(0, left.Milliseconds())))
			if n > 0 {
				return nil
			}
			if err != nil && !errors.Is(err, unix.EINTR) {
				return os.NewSyscallError("poll", err)
			}
			if left <= 0 {
				break
			}
		}
	}
	return errors.New("it does not end")
}

// fileTail is a file whose last lines are a server's last words.
type fileTail string

func (f fileTail) String() string {
	b, err := os.ReadFile(string(f))
	if err != nil {
		return err.Error()
	}
	t := &tail{}
	_, _ = t.Write(b) // never fails
	return t.String()
}
