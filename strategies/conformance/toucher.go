package conformance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/rpc"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"memsync/strategies"
	"memsync/strategies/attach"
	"memsync/strategies/region"
)

// roleEnv says what a copy of the test binary is: "" (start the tests in a
// namespace of their own), "tests", or "toucher".
const roleEnv = "MEMSYNC_CONFORMANCE_ROLE"

// Main is the TestMain of a package that calls Run. The binary starts itself
// again, with mounts of its own that vanish with it, and once more for each
// attachment: the toucher is the process that maps a region, since the one that
// serves it may not (docs/deadlocks.md).
func Main(m *testing.M) {
	switch os.Getenv(roleEnv) {
	case "toucher":
		if err := touch(); err != nil {
			fmt.Fprintln(os.Stderr, "toucher:", err)
			os.Exit(1)
		}
	case "tests":
		goleak.VerifyTestMain(m)
	default:
		os.Exit(rerun())
	}
}

func again(role string, args ...string) *exec.Cmd {
	c := exec.Command("/proc/self/exe", args...)
	c.Env = append(os.Environ(), roleEnv+"="+role)
	c.Stdout, c.Stderr = os.Stdout, os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return c
}

func rerun() int {
	runtime.LockOSThread() // Pdeathsig is sent when this thread ends
	c := again("tests", os.Args[1:]...)
	c.Stdin = os.Stdin
	c.SysProcAttr.Cloneflags = unix.CLONE_NEWNS
	if os.Getuid() != 0 {
		c.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		c.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		c.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	err := c.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return max(1, exit.ExitCode())
	} else if err != nil {
		fmt.Fprintln(os.Stderr, "run the tests in a mount namespace:", err)
		return 1
	}
	return 0
}

// The toucher's file descriptors: commands, and files that come along with them.
const (
	commandFD = 3
	fileFD    = 4
)

// Region is the toucher's side of the commands; its methods have the form that
// net/rpc asks for.
type Region struct {
	files *net.UnixConn
	mu    sync.Mutex
	view  *attach.View
}

// AttachArgs say what to attach.
type AttachArgs struct {
	Attachment []byte // JSON, as in the role protocol
	HasFile    bool   // the attachment's file is on the file socket
	Via        string
}

// AttachReply says where.
type AttachReply struct {
	Result
	Base     uintptr
	HasFault bool // the userfaultfd is on the file socket
}

// Access is a range of the region and, for a write, its bytes.
type Access struct {
	Off  int64
	N    int
	Data []byte
}

// Result is what came of an access; an error is not a failure of the command.
type Result struct {
	Data     []byte
	Err      string
	ReadOnly bool // Err is region.ErrReadOnly or the kernel's EROFS, EBADF, EACCES or EPERM
}

func (r *Result) set(err error) {
	if err != nil {
		r.Err = err.Error()
		for _, e := range []error{region.ErrReadOnly, unix.EROFS, unix.EBADF, unix.EACCES, unix.EPERM} {
			r.ReadOnly = r.ReadOnly || errors.Is(err, e)
		}
	}
}

// Attach attaches.
func (t *Region) Attach(a AttachArgs, r *AttachReply) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var to strategies.Attachment
	if err := json.Unmarshal(a.Attachment, &to); err != nil {
		return err
	}
	if a.HasFile {
		f, err := receive(t.files)
		if err != nil {
			return err
		}
		to.File = f
	}
	v, err := attach.Open(to, attach.Options{Via: a.Via})
	if err != nil {
		r.set(err)
		return nil
	}
	t.view = v
	if f, base, ok := v.Fault(); ok {
		r.Base, r.HasFault = base, true
		return send(t.files, f)
	}
	return nil
}

func (t *Region) get() (*attach.View, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.view == nil {
		return nil, errors.New("nothing is attached")
	}
	return t.view, nil
}

// Read reads.
func (t *Region) Read(a Access, r *Result) error {
	v, err := t.get()
	if err != nil {
		return err
	}
	r.Data = make([]byte, a.N)
	r.set(v.ReadAt(r.Data, a.Off))
	return nil
}

// Write writes.
func (t *Region) Write(a Access, r *Result) error {
	v, err := t.get()
	if err != nil {
		return err
	}
	r.set(v.WriteAt(a.Data, a.Off))
	return nil
}

// Sync flushes the workload's writes to the device.
func (t *Region) Sync(_ Access, r *Result) error {
	v, err := t.get()
	if err != nil {
		return err
	}
	r.set(v.Sync())
	return nil
}

// Detach detaches.
func (t *Region) Detach(_ Access, r *Result) error {
	t.mu.Lock()
	v := t.view
	t.view = nil
	t.mu.Unlock()
	if v != nil {
		r.set(v.Close())
	}
	return nil
}

func touch() error {
	commands, err := net.FileConn(os.NewFile(commandFD, "commands"))
	if err != nil {
		return err
	}
	files, err := net.FileConn(os.NewFile(fileFD, "files"))
	if err != nil {
		return err
	}
	s := rpc.NewServer()
	if err := s.Register(&Region{files: files.(*net.UnixConn)}); err != nil {
		return err
	}
	s.ServeConn(commands) // until the tests hang up
	return nil
}

// send passes f to the other end of c.
func send(c *net.UnixConn, f *os.File) error {
	_, _, err := c.WriteMsgUnix([]byte{1}, unix.UnixRights(int(f.Fd())), nil)
	return err
}

// receive takes one file from c.
func receive(c *net.UnixConn) (*os.File, error) {
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := c.ReadMsgUnix(make([]byte, 1), oob)
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return nil, err
	}
	if len(messages) != 1 {
		return nil, fmt.Errorf("%d control messages, want one file", len(messages))
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return nil, err
	}
	unix.CloseOnExec(fds[0])
	// Blocking, so that a userfaultfd is not put on the network poller.
	return os.NewFile(uintptr(fds[0]), "received"), nil
}

// toucher is the tests' side.
type toucher struct {
	cmd     *exec.Cmd
	rpc     *rpc.Client
	files   *net.UnixConn
	stopped sync.Once
}

func startToucher() (_ *toucher, err error) {
	c := again("toucher")
	var own [2]net.Conn
	for i := range own {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		mine, theirs := os.NewFile(uintptr(pair[0]), "mine"), os.NewFile(uintptr(pair[1]), "theirs")
		defer mine.Close()
		defer theirs.Close()
		if own[i], err = net.FileConn(mine); err != nil {
			return nil, err
		}
		c.ExtraFiles = append(c.ExtraFiles, theirs)
	}
	// Pdeathsig is bound to the thread that forks, which Go may end: do without;
	// the toucher leaves when its socket is closed, which happens in any case.
	c.SysProcAttr = nil
	// The runtime preempts a thread that waits in a page fault with SIGURG, every
	// 10 ms; a fault that is interrupted is taken again from the start instead of
	// ending in SIGBUS, so that a device's error would never be seen (Linux 6.18, FUSE).
	c.Env = append(c.Env, "GODEBUG=asyncpreemptoff=1",
		"GORACE=atexit_sleep_ms=0") // else each process ends a second late under -race
	if err := c.Start(); err != nil {
		return nil, err
	}
	return &toucher{cmd: c, rpc: rpc.NewClient(own[0]), files: own[1].(*net.UnixConn)}, nil
}

// errAccess is an access that the toucher tried and that failed.
var errAccess = errors.New("the workload got an error")

type accessError struct {
	what     string
	text     string
	readOnly bool
}

func (e *accessError) Error() string { return e.what + ": " + e.text }
func (e *accessError) Is(target error) bool {
	return target == errAccess || e.readOnly && target == region.ErrReadOnly
}

// call makes the toucher do something. When ctx ends first the toucher may be
// stuck in it: stop kills it.
func (t *toucher) call(ctx context.Context, method string, args, reply any) error {
	call := t.rpc.Go("Region."+method, args, reply, make(chan *rpc.Call, 1))
	select {
	case <-call.Done:
		return call.Error
	case <-ctx.Done():
		return fmt.Errorf("workload's %s: %w", method, ctx.Err())
	}
}

func (t *toucher) access(ctx context.Context, method string, a Access) ([]byte, error) {
	var r Result
	if err := t.call(ctx, method, a, &r); err != nil {
		return nil, err
	}
	if r.Err != "" {
		return nil, &accessError{fmt.Sprintf("workload's %s of %d bytes at %d", method, max(a.N, len(a.Data)), a.Off), r.Err, r.ReadOnly}
	}
	return r.Data, nil
}

// attach attaches and hands over the userfaultfd, if there is one.
func (t *toucher) attach(ctx context.Context, m strategies.Mount, via string) error {
	to := m.Attachment()
	text, err := json.Marshal(to)
	if err != nil {
		return err
	}
	args := AttachArgs{Attachment: text, HasFile: to.File != nil, Via: via}
	if f := to.File; f != nil {
		if err := send(t.files, f); err != nil {
			return err
		}
	}
	var r AttachReply
	if err := t.call(ctx, "Attach", args, &r); err != nil {
		return err
	}
	if r.Err != "" {
		return &accessError{"workload's Attach", r.Err, r.ReadOnly}
	}
	if !r.HasFault {
		return nil
	}
	f, err := receive(t.files)
	if err != nil {
		return err
	}
	s, ok := m.(strategies.FaultServer)
	if !ok {
		return errors.Join(fmt.Errorf("a mount with attachment %q is no FaultServer", m.Attachment().Kind), f.Close())
	}
	return s.ServeFaults(f, r.Base)
}

func (t *toucher) read(ctx context.Context, off int64, n int) ([]byte, error) {
	return t.access(ctx, "Read", Access{Off: off, N: n})
}

func (t *toucher) write(ctx context.Context, p []byte, off int64) error {
	_, err := t.access(ctx, "Write", Access{Off: off, Data: p})
	return err
}

func (t *toucher) sync(ctx context.Context) error {
	_, err := t.access(ctx, "Sync", Access{})
	return err
}

func (t *toucher) detach(ctx context.Context) error {
	_, err := t.access(ctx, "Detach", Access{})
	return err
}

// kill ends the process without waiting for it.
func (t *toucher) kill() { _ = t.cmd.Process.Kill() }

// stop hangs up and waits for the process, which it kills if it does not leave before ctx ends.
func (t *toucher) stop(ctx context.Context) (err error) {
	t.stopped.Do(func() {
		_ = t.rpc.Close()
		_ = t.files.Close()
		ended := make(chan error, 1)
		go func() { ended <- t.cmd.Wait() }()
		select {
		case err = <-ended:
		case <-ctx.Done():
			t.kill()
			<-ended
			err = fmt.Errorf("the workload did not end by itself: %w", ctx.Err())
		}
	})
	return err
}
