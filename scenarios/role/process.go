package role

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies"
	"memsync/strategies/region"
)

// The roles' names.
const (
	Source   = "source"
	Daemon   = "daemon"
	Workload = "workload"
)

// socketFD is the descriptor on which a role finds its end of the protocol.
const socketFD = 3

// Main runs a role in this process until the runner closes the socket. args are
// the role's name and, optionally, the CPUs it may use ("0,2-3"); known are the
// strategies that a cell may name. It returns the process's exit status.
func Main(known strategies.Registry, args []string) int {
	if len(args) < 1 || len(args) > 2 {
		fmt.Fprintln(os.Stderr, "memsync role: started by memsync itself, not by hand")
		return 6
	}
	// A signal may reach the whole process group; the runner decides what it means.
	signal.Ignore(unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	err := func() error {
		if len(args) == 2 {
			if err := pinProcess(args[1]); err != nil {
				return err
			}
		}
		populateProgram()
		unix.CloseOnExec(socketFD)
		c, err := newConn(os.NewFile(socketFD, "role"), "runner")
		if err != nil {
			return err
		}
		defer c.Close()
		var ops map[string]handler
		switch args[0] {
		case Source:
			ops = (&source{known: known}).ops()
		case Daemon:
			d := &daemon{known: known}
			defer d.letGo()
			ops = d.ops()
		case Workload:
			ops = (&workload{}).ops()
		default:
			return fmt.Errorf("unknown role %q", args[0])
		}
		ops["hello"] = on(func(context.Context, none) (Hello, error) { return Hello{PID: os.Getpid()}, nil })
		return c.serve(ops)
	}()
	if err != nil {
		fmt.Fprintf(os.Stderr, "memsync role %s: %v\n", args[0], err)
		return 1
	}
	return 0
}

// populateProgram maps all pages of the program, which are in the page cache. A
// role is a fresh process that does everything for the first time; its first
// touch or first request should not be charged with the faults of its own code
// (about 100 us in all). Where the kernel cannot (before Linux 5.14), it is not done.
func populateProgram() {
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return
	}
	for line := range strings.Lines(string(maps)) {
		var lo, hi uintptr
		if strings.HasSuffix(strings.TrimSpace(line), exe) {
			if n, _ := fmt.Sscanf(line, "%x-%x", &lo, &hi); n == 2 {
				_, _, _ = unix.Syscall(unix.SYS_MADVISE, lo, hi-lo, unix.MADV_POPULATE_READ)
			}
		}
	}
}

// Hello is the first answer of a role.
type Hello struct {
	PID int `json:"pid"`
}

// ParseCPUs parses a list like "0,2-3".
func ParseCPUs(list string) ([]int, error) {
	var cpus []int
	for _, r := range strings.Split(list, ",") {
		lo, hi, ranged := strings.Cut(r, "-")
		a, err := strconv.Atoi(lo)
		b := a
		if err == nil && ranged {
			b, err = strconv.Atoi(hi)
		}
		if err != nil || a < 0 || b < a || b >= 1024 {
			return nil, fmt.Errorf("CPU list %q: want numbers and ranges like 0,2-3", list)
		}
		for ; a <= b; a++ {
			cpus = append(cpus, a)
		}
	}
	return cpus, nil
}

// pinProcess binds all threads of this process, and with them those to come, to
// the CPUs of the list.
func pinProcess(list string) error {
	cpus, err := ParseCPUs(list)
	if err != nil {
		return err
	}
	var set unix.CPUSet
	for _, c := range cpus {
		set.Set(c)
	}
	for range 3 { // a thread may begin while we look; its parent is pinned by then
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return err
		}
		for _, t := range tasks {
			tid, _ := strconv.Atoi(t.Name())
			if err := unix.SchedSetaffinity(tid, &set); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("pin to CPUs %s: %w", list, err)
			}
		}
	}
	// One more than there are CPUs: else the scheduler takes the processor away from a
	// thread that waits in a system call, 20 us on, and wakes its monitor, on the
	// same CPU, when the thread wants it back.
	runtime.GOMAXPROCS(len(cpus) + 1)
	return nil
}

// Process is a running role, seen by the runner.
type Process struct {
	*Conn
	Role string
	cmd  *exec.Cmd
	done chan struct{} // closed once the process has been waited for
	tail *tail
	err  error
	once sync.Once
}

// starter starts a command; a network namespace does so inside itself.
type starter interface{ Start(*exec.Cmd) error }

// Start starts a role as a process of its own, in the network namespace ns (nil
// is the runner's own), on the given CPUs ("" is any), and waits for its first answer.
func Start(ctx context.Context, role, cpus string, ns starter) (*Process, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", role, err)
	}
	mine, theirs := os.NewFile(uintptr(pair[0]), "role"), os.NewFile(uintptr(pair[1]), "role")
	conn, err := newConn(mine, role)
	if err != nil {
		theirs.Close()
		return nil, err
	}
	args := []string{"role", role}
	if cpus != "" {
		args = append(args, cpus)
	}
	p := &Process{Conn: conn, Role: role, done: make(chan struct{}), tail: &tail{}}
	p.cmd = exec.Command("/proc/self/exe", args...)
	p.cmd.Args[0] = "memsync"
	if role == Workload {
		// A thread that waits for a page is no use to preempt, and the signal makes
		// the kernel give up the wait and fault again, over and over.
		p.cmd.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1")
	}
	p.cmd.ExtraFiles = []*os.File{theirs}
	p.cmd.Stderr = p.tail
	// A role may have started helpers that hold its stderr; do not wait for them.
	p.cmd.WaitDelay = time.Second
	if ns == nil {
		err = p.cmd.Start()
	} else {
		err = ns.Start(p.cmd)
	}
	theirs.Close() // else a role that dies would not close the connection
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("start %s: %w", role, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	if _, err := p.Ask(ctx, "hello", none{}, nil); err != nil {
		return nil, errors.Join(err, p.Stop(ctx))
	}
	return p, nil
}

// Ask is Call; where the process died, the error says how and with what last words.
func (p *Process) Ask(ctx context.Context, op string, body, reply any, files ...*os.File) ([]*os.File, error) {
	got, err := p.Call(ctx, op, body, reply, files...)
	if errors.Is(err, region.ErrPeerGone) {
		var remote *RemoteError
		if !errors.As(err, &remote) {
			select {
			case <-p.done:
				err = fmt.Errorf("%w (%v)%s", err, p.cmd.ProcessState, p.tail)
			case <-time.After(time.Second):
			}
		}
	}
	return got, err
}

// PID returns the process's number.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Watch calls ended, with what became of it, when the process ends before ctx
// does. It returns at once.
func (p *Process) Watch(ctx context.Context, ended func(error)) {
	go func() {
		select {
		case <-p.done:
			if ctx.Err() != nil { // both: its end was meant
				return
			}
			ended(fmt.Errorf("%s ended (%v)%s: %w", p.Role, p.cmd.ProcessState, p.tail, region.ErrPeerGone))
		case <-ctx.Done():
		}
	}()
}

// Kill sends the process SIGKILL and does not wait; Stop does.
func (p *Process) Kill() { _ = p.cmd.Process.Kill() }

// Stop closes the socket, which ends the role, and kills the process where it
// does not end within two seconds. It returns once the process is gone or, for
// one that cannot even be killed, with an error. It may be called twice.
func (p *Process) Stop(ctx context.Context) error {
	var err error
	p.once.Do(func() {
		p.Conn.Close()
		select {
		case <-p.done:
			return
		case <-time.After(2 * time.Second):
		case <-ctx.Done():
		}
		_ = p.cmd.Process.Kill()
		select {
		case <-p.done:
		case <-time.After(5 * time.Second):
			err = fmt.Errorf("%s (pid %d) does not end although it was killed", p.Role, p.PID())
		}
	})
	return err
}

// tail keeps the last words that a process wrote to stderr.
type tail struct {
	mu sync.Mutex
	b  []byte
}

const tailSize = 4096

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	if len(t.b) > tailSize {
		t.b = t.b[len(t.b)-tailSize:]
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.b) == 0 {
		return ""
	}
	return ": " + strings.TrimSpace(string(t.b))
}

var _ io.Writer = (*tail)(nil)
