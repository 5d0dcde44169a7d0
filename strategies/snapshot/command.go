package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
	"memsync/strategies/snapshot/image"
	"memsync/strategies/snapshot/shm"
)

// Command is a client that is started with its region, and again when it was killed.
type Command struct {
	Args []string // the program and its arguments
	// Shim is a program, with arguments, that calls Exec with Args behind its own: LISTEN_PID
	// must be the client's own process, which it alone knows before it is the client.
	Shim           []string
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Interval       time.Duration // between images; 0 is none but the last
	Restarts       int           // after SIGKILL, at most
	// Grace is how long the client may take to end after ctx has and it got SIGTERM,
	// before it is killed; 0 is 10 s.
	Grace time.Duration
	Log   func(format string, args ...any)
}

// Ended says how the client has.
type Ended struct {
	Status   int // as of a shell: its exit status, or 128 and the signal's number
	Restarts int
	Images   int64
	Starved  int64
}

// Exec makes this process the program args[0], with the environment of the LISTEN_FDS
// convention (sd_listen_fds(3)) completed by its own number. It returns with an error only.
func Exec(args []string) error {
	path, err := exec.LookPath(args[0])
	if err != nil {
		return err
	}
	env := append(os.Environ(), "LISTEN_PID="+strconv.Itoa(os.Getpid()))
	return &os.PathError{Op: "exec", Path: path, Err: unix.Exec(path, args, env)}
}

// Run restores the region from img and starts the client, takes images as the mode
// has it, and starts it again when SIGKILL ended it. It returns when the client
// has ended in another way, after the last image, or when ctx has ended and the client too.
// Errors: ErrNotSaved where the last state could not be; what the client did wrong.
func (c Command) Run(ctx context.Context, img *image.Image, o Options) (e Ended, err error) {
	if len(c.Args) == 0 {
		return e, errors.New("no command")
	}
	if _, err := exec.LookPath(c.Args[0]); err != nil {
		return e, err
	}
	if c.Log == nil {
		c.Log = func(string, ...any) {}
	}
	if c.Grace == 0 {
		c.Grace = 10 * time.Second
	}
	// PR_SET_PDEATHSIG fires when the starting thread ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for {
		killed, err := c.once(ctx, img, o, &e)
		if err != nil || !killed || ctx.Err() != nil {
			return e, err
		}
		if e.Restarts >= c.Restarts {
			return e, fmt.Errorf("the command was killed by SIGKILL, and has been started again %d times: %w", e.Restarts, region.ErrPeerGone)
		}
		e.Restarts++
		s, ok := img.Latest()
		c.Log("the command was killed; starting it again from publication %d (image %d, there is one: %t)", s.Sequence, s.Commit, ok)
	}
}

// once is one life of the client.
func (c Command) once(ctx context.Context, img *image.Image, o Options, e *Ended) (killed bool, err error) {
	h, err := Open(ctx, img, o)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, h.Close()) }()
	files, names := h.Files()
	cmd := exec.Command(c.Shim[0], append(c.Shim[1:len(c.Shim):len(c.Shim)], c.Args...)...)
	cmd.Args[0] = "memsync" // whatever its file is called, as /proc/self/exe
	cmd.Stdin, cmd.Stdout, cmd.Stderr = c.Stdin, c.Stdout, c.Stderr
	cmd.ExtraFiles = files
	cmd.Env = append(os.Environ(), "LISTEN_FDS="+strconv.Itoa(len(files)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		return false, err
	}
	err = h.Started()
	ended := make(chan struct{})
	var waitErr error
	var wg sync.WaitGroup
	wg.Go(func() {
		waitErr = cmd.Wait()
		close(ended)
	})
	err = errors.Join(err, c.watch(ctx, h, cmd, ended, e))
	wg.Wait()
	var exit *exec.ExitError
	if waitErr != nil && !errors.As(waitErr, &exit) && !errors.Is(waitErr, exec.ErrWaitDelay) {
		err = errors.Join(err, waitErr)
	}
	ws, _ := cmd.ProcessState.Sys().(syscall.WaitStatus)
	e.Status = ws.ExitStatus()
	if ws.Signaled() {
		e.Status = 128 + int(ws.Signal())
	}
	if err != nil && !errors.Is(err, ErrNotSaved) {
		return false, err // its state is not to be trusted, or was not to be had
	}
	// Also of a client that was interrupted the last state is saved.
	r, ferr := h.Final(context.WithoutCancel(ctx), ws.Exited())
	if r.Fresh && ferr == nil {
		e.Images++
	}
	e.Starved += int64(h.Status().Starved)
	return ws.Signaled() && ws.Signal() == unix.SIGKILL, ferr
}

// watch takes images until the client has ended.
func (c Command) watch(ctx context.Context, h *Host, cmd *exec.Cmd, ended <-chan struct{}, e *Ended) error {
	life, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	bad := make(chan error, 3)
	wg.Go(func() {
		if err := h.Ready(life); err != nil {
			if life.Err() == nil {
				bad <- err
			}
			return
		}
		if c.Interval > 0 || h.o.Mode == shm.Cow {
			wg.Go(func() { bad <- c.images(life, h, e) })
		}
		if h.o.Mode == shm.Queue || h.o.Mode == shm.Cow {
			wg.Go(func() { bad <- follow(life, h) })
		}
	})
	stop := func(sig syscall.Signal) { _ = cmd.Process.Signal(sig) }
	var result error
	interrupted, grace := ctx.Done(), (<-chan time.Time)(nil)
	for running := true; running; {
		select {
		case <-ended:
			running = false
		case err := <-bad:
			if err != nil {
				result = errors.Join(result, err)
				c.Log("%v: ending the command", err)
				interrupted, grace = nil, time.After(c.Grace)
				stop(unix.SIGTERM)
			}
		case <-interrupted:
			interrupted, grace = nil, time.After(c.Grace)
			stop(unix.SIGTERM)
		case <-grace:
			c.Log("the command has not ended within %v: killing it", c.Grace)
			stop(unix.SIGKILL)
		}
	}
	cancel()
	wg.Wait()
	for {
		select {
		case err := <-bad:
			result = errors.Join(result, err)
			continue
		default:
		}
		return result
	}
}

// images takes one each interval, and when it is asked for. That one could not be saved is told, and
// tried again; a client that broke the protocol is an error.
func (c Command) images(ctx context.Context, h *Host, e *Ended) error {
	var tick <-chan time.Time
	if c.Interval > 0 {
		t := time.NewTicker(c.Interval)
		defer t.Stop()
		tick = t.C
	}
	for {
		var held func(error)
		select {
		case <-ctx.Done():
			return nil
		case held = <-h.Asks():
		case <-tick:
		}
		r, err := h.Snapshot(ctx, held)
		switch {
		case ctx.Err() != nil || errors.Is(err, region.ErrPeerGone):
			// The last image follows.
		case errors.Is(err, ErrNotSaved):
			c.Log("%v", err)
		case err != nil:
			return err
		case r.Fresh:
			e.Images++
		}
	}
}

// follow calls Host.Follow until ctx ends.
func follow(ctx context.Context, h *Host) error {
	t := time.NewTicker(time.Millisecond)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
			if err := h.Follow(); err != nil {
				return err
			}
		}
	}
}
