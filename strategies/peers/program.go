package peers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
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
)

// program is a running program of another project and all that it starts. It is
// the first process of a PID namespace, which the kernel empties when it ends; and
// it ends with this process.
type program struct {
	cmd   *exec.Cmd
	words *words
	done  chan struct{} // closed when it has ended
	err   error         // how, set before done is closed
}

// find looks for a program of a Debian package.
func find(name, pkg string) (string, error) {
	path, err := exec.LookPath(name)
	for _, dir := range []string{"/usr/sbin", "/usr/bin"} { // sbin is not in everybody's PATH
		if err == nil {
			break
		}
		path, err = exec.LookPath(dir + "/" + name)
	}
	if err != nil {
		return "", fmt.Errorf("%s is not installed (apt-get install %s): %w", name, pkg, region.ErrNotSupported)
	}
	return path, nil
}

// command makes a command that ends with this process, in a PID namespace of its
// own (and, where this process is not root, a user namespace).
func command(path string, args ...string) (*exec.Cmd, *words) {
	w := &words{}
	cmd := exec.Command(path, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.Stdout, cmd.Stderr = w, w
	cmd.WaitDelay = time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID, Pdeathsig: unix.SIGKILL}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	return cmd, w
}

// start starts a command made by command.
func start(cmd *exec.Cmd, w *words) (*program, error) {
	p := &program{cmd: cmd, words: w, done: make(chan struct{})}
	started := make(chan error)
	go func() {
		// Pdeathsig fires when the starting thread ends, so it must not.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			p.err = cmd.Wait()
			close(p.done)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	return p, nil
}

// run runs a program to its end, which ctx may hasten.
func run(ctx context.Context, files []*os.File, path string, args ...string) error {
	cmd, w := command(path, args...)
	cmd.ExtraFiles = files
	p, err := start(cmd, w)
	if err != nil {
		return err
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		_ = p.Close()
		return fmt.Errorf("%s: %w", cmd, context.Cause(ctx))
	}
	if p.err != nil {
		return fmt.Errorf("%s: %w%s", cmd, p.err, w)
	}
	return nil
}

// Close kills the program and all that it started. What it has written into files
// is there. It may be called twice.
func (p *program) Close() error {
	_ = p.cmd.Process.Kill()
	select {
	case <-p.done:
		return nil
	case <-time.After(5 * time.Second):
		return fmt.Errorf("%s (pid %d) does not end although it was killed", p.cmd.Path, p.cmd.Process.Pid)
	}
}

// server is a program that listens.
type server struct {
	*program
	addr string
}

func (s *server) Addr() string { return s.addr }

// freePort returns a port of host on which nobody listens now.
func freePort(host string) (int, error) {
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		return 0, fmt.Errorf("look for a free port: %w", err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// listen starts a program that shall listen on a port of host and returns once it
// does, or an error with its last words. args makes its arguments.
func listen(ctx context.Context, host, path string, args func(port int) ([]string, error)) (*server, error) {
	port, err := freePort(host)
	if err != nil {
		return nil, err
	}
	a, err := args(port)
	if err != nil {
		return nil, err
	}
	p, err := start(command(path, a...))
	if err != nil {
		return nil, err
	}
	s := &server{program: p, addr: net.JoinHostPort(host, strconv.Itoa(port))}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		// Looked up and not connected to: a server may take a connection that says nothing ill.
		ok, err := listening(port)
		if err != nil || ok {
			if err != nil {
				return nil, errors.Join(err, s.Close())
			}
			return s, nil
		}
		select {
		case <-tick.C:
		case <-p.done:
			return nil, fmt.Errorf("%s ended before it listened: %w%s", path, p.err, p.words)
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("%s does not listen: %w%s", path, context.Cause(ctx), p.words), s.Close())
		}
	}
}

// listening reports whether a TCP socket of this network namespace listens on a
// port. Source: proc_net(5), /proc/net/tcp: local address, remote address, state (0A is LISTEN).
func listening(port int) (bool, error) {
	for _, table := range []string{"/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"} {
		b, err := os.ReadFile(table)
		if err != nil {
			if errors.Is(err, os.ErrNotExist) && strings.HasSuffix(table, "6") {
				continue // no IPv6 here
			}
			return false, err
		}
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if len(f) > 3 && f[3] == "0A" && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", port)) {
				return true, nil
			}
		}
	}
	return false, nil
}

// words keeps the last words of a program.
type words struct {
	mu sync.Mutex
	b  []byte
}

func (w *words) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.b = append(w.b, p...)
	if over := len(w.b) - 2048; over > 0 {
		w.b = append(w.b[:0], w.b[over:]...)
	}
	return len(p), nil
}

func (w *words) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(bytes.TrimSpace(w.b)) == 0 {
		return ""
	}
	return ": " + string(bytes.TrimSpace(w.b))
}
