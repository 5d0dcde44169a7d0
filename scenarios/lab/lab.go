// Package lab boots the lab kernel: User Mode Linux from Debian's own packages,
// a real Linux kernel in an ordinary process, with the nbd driver, netem, veth,
// fuse and tun that the machine's own kernel may lack. It needs no root and
// installs nothing.
//
// A command runs in it as root, on the host's files (hostfs), with the caller's
// environment, working folder, standard streams and exit status. /proc, /sys,
// /dev, /run and /dev/shm are the guest's own; TMPDIR is a tmpfs; the network is
// lo alone; MEMSYNC_LAB=1 tells the command where it is, and MEMSYNC_LAB_KERNEL
// what the kernel is made from.
//
// There is one guest CPU and a system call costs about 8 us: measure shaped
// links up to 1 Gbit/s there, never CPU-bound or fault-bound figures.
//
// The guest's init is this program again (Main), which talks to Run over a
// serial line of the guest (wire.go).
package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// Memory limits of a guest, in bytes.
const (
	MinMemory     = 64 << 20
	DefaultMemory = 2 << 30
)

// ErrKernel: the lab kernel did not boot, or died while the command ran.
var ErrKernel = errors.New("lab kernel failed")

// Command is what to run in the lab.
type Command struct {
	Args   []string  // the program, looked up in PATH, and its arguments
	Env    []string  // "k=v"; nil means this process's
	Dir    string    // working folder; empty means this process's. Not below /run, /dev, /proc or /sys, which the guest hides
	Stdin  io.Reader // nil is empty. If it is a terminal or pipe, Run may leave one goroutine behind that reads it
	Stdout io.Writer // nil discards; written by one goroutine
	Stderr io.Writer // nil discards; written by the same goroutine as Stdout
	Memory int64     // bytes of guest memory, taken from the host as touched; 0 means DefaultMemory
	// CPU is the host CPU that the kernel and its processes stay on, which
	// spares a wake-up across CPUs for each system call. Empty means one that
	// no other lab kernel holds, "any" lets them wander (several times slower).
	CPU string
	// Udevd runs the machine's udevd in the guest before the command, as on a machine
	// of its own. Where there is none Run fails with region.ErrNotSupported.
	Udevd bool
}

// Run boots k, runs c in it and returns its exit status (128 + n if signal n
// ended it, 126 or 127 if it could not be started). It blocks until the command
// has ended, its files are written back and the kernel is gone; several may run
// at once. What the command left running ends with it. When ctx ends the
// command gets SIGTERM, two seconds later the kernel is killed, and ctx's error
// is returned. The kernel dies with this process, also by SIGKILL. A kernel
// that does not boot or dies gives ErrKernel and its last messages.
func (k *Kernel) Run(ctx context.Context, c Command) (status int, err error) {
	if os.Getenv("MEMSYNC_LAB") == "1" {
		return 0, fmt.Errorf("boot the lab kernel: this is the lab already: %w", region.ErrNotSupported)
	}
	if len(c.Args) == 0 {
		return 0, errors.New("boot the lab kernel: no command given")
	}
	if c.Memory == 0 {
		c.Memory = DefaultMemory
	}
	if c.Memory < MinMemory {
		return 0, fmt.Errorf("boot the lab kernel: memory of %s: want at least %s", region.FormatSize(c.Memory), region.FormatSize(MinMemory))
	}
	udevd := ""
	if c.Udevd {
		if udevd, err = findUdevd(); err != nil {
			return 0, fmt.Errorf("boot the lab kernel: %w", err)
		}
	}
	if c.Env == nil {
		c.Env = os.Environ()
	}
	if c.Dir == "" {
		if c.Dir, err = os.Getwd(); err != nil {
			return 0, err
		}
	}
	if err := visible(c.Dir); err != nil {
		return 0, err
	}
	if err := visible(k.Dir); err != nil {
		return 0, err
	}
	work, release, err := makeWork()
	if err != nil {
		return 0, err
	}
	defer release()
	cpu, freeCPU, err := claimCPU(c.CPU)
	if err != nil {
		return 0, err
	}
	defer freeCPU()
	if err := prepare(work); err != nil {
		return 0, err
	}
	c.Env = append(slices.Clone(c.Env), "MEMSYNC_LAB_KERNEL="+k.String())
	return k.boot(ctx, c, work, cpu, udevd)
}

// findUdevd returns the program of systemd's udevd.
func findUdevd() (string, error) {
	for _, path := range []string{"/usr/lib/systemd/systemd-udevd", "/lib/systemd/systemd-udevd"} {
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("this machine has no udevd that could run in the guest (apt-get install udev): %w", region.ErrNotSupported)
}

// prepare puts what the guest starts from into the work folder.
func prepare(work string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	program := filepath.Join(work, "memsync")
	if _, err := os.Stat(self); err == nil && visible(self) == nil {
		err = os.Symlink(self, program)
		if err != nil {
			return err
		}
	} else if err := copyFile(program, "/proc/self/exe"); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(work, "bin"), 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(work, "bin", "modprobe"), []byte("#!"+program+" lab-modprobe\n"), 0o755)
}

func copyFile(to, from string) error {
	r, err := os.Open(from)
	if err != nil {
		return err
	}
	defer r.Close()
	w, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(w, r)
	return errors.Join(err, w.Close())
}

func (k *Kernel) boot(ctx context.Context, c Command, work, cpu, udevd string) (int, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	theirs := os.NewFile(uintptr(fds[1]), "lab line")
	defer theirs.Close()
	file := os.NewFile(uintptr(fds[0]), "lab line")
	line, err := net.FileConn(file)
	_ = file.Close()
	if err != nil {
		return 0, err
	}
	defer line.Close()

	messages := &tail{max: 64 << 10}
	uml := exec.Command(filepath.Join(k.Dir, "linux"),
		"mem="+strconv.FormatInt(c.Memory>>20, 10)+"M",
		"rootfstype=hostfs", "rootflags=/", "rw", "init="+filepath.Join(work, "memsync"),
		"con=null", "con0=null,fd:1", "ssl=null", "ssl1=fd:3",
		"uml_dir="+work+"/", "umid=lab", "seccomp=auto", "noreboot", "panic=-1",
		// Nine tenths of the boot are spent on timing RAID-6 routines for btrfs,
		// and on timing a delay loop that nothing here depends on.
		"initcall_blacklist=raid6_init,init_btrfs_fs", "lpj=30000000",
		"--", "lab-init", work)
	uml.Dir = k.Dir // the program names its loader relative to this
	uml.Env = []string{"LD_LIBRARY_PATH=lib", "TMPDIR=" + memoryFolder(work, c.Memory), "HOME=" + work, "PATH=/usr/bin:/bin"}
	uml.Stdout, uml.Stderr = messages, messages
	uml.ExtraFiles = []*os.File{theirs} // becomes descriptor 3
	uml.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	// A helper of the kernel may hold its output open for a moment longer.
	uml.WaitDelay = time.Second

	exited := make(chan error, 1)
	started := make(chan error)
	go func() {
		// Pdeathsig goes by the thread that starts the process, and the
		// process inherits that thread's CPU.
		runtime.LockOSThread()
		if cpu != "" {
			if err := pin(cpu); err != nil {
				started <- err
				return // locked still: a pinned thread must not be reused
			}
		}
		err := uml.Start()
		started <- err
		if err == nil {
			exited <- uml.Wait()
		}
		if cpu == "" {
			runtime.UnlockOSThread()
		}
	}()
	if err := <-started; err != nil {
		return 0, fmt.Errorf("start the lab kernel: %w", err)
	}
	_ = theirs.Close()
	kill := func() { _ = unix.Kill(-uml.Process.Pid, unix.SIGKILL) }

	s := &session{line: line, c: c, modules: filepath.Join(k.Dir, "modules", k.Release), udevd: udevd, credit: make(chan int, inputWindow), stop: make(chan struct{})}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.serve(work)
	}()
	alive := true
	select {
	case <-ended:
	case <-exited:
		alive = false
		// What the guest said last may still be in the line.
		_ = line.SetReadDeadline(time.Now().Add(time.Second))
		<-ended
	case <-ctx.Done():
		s.signal(unix.SIGTERM)
		grace := time.NewTimer(2 * time.Second)
		defer grace.Stop()
		select {
		case <-ended:
		case <-grace.C:
		}
	}
	kill()
	if alive {
		<-exited
	}
	_ = line.Close()
	<-ended
	close(s.stop)
	switch {
	case ctx.Err() != nil && !s.done:
		return 0, fmt.Errorf("the lab's command did not end: %w", context.Cause(ctx))
	case ctx.Err() != nil:
		return s.status, fmt.Errorf("the lab's command was told to end: %w", context.Cause(ctx))
	case s.err != nil:
		return 0, s.err
	case s.done:
		return s.status, nil
	case s.ready:
		return 0, fmt.Errorf("%w while the command ran; its last messages:\n%s", ErrKernel, messages.last(20))
	}
	return 0, fmt.Errorf("%w to boot; its last messages:\n%s", ErrKernel, messages.last(20))
}

// session is the host's end of the line to the guest's init.
type session struct {
	line    net.Conn
	write   sync.Mutex
	c       Command
	modules string // their folder
	udevd   string // its program, empty for none

	// Set by serve, read after it returned.
	ready, done bool
	status      int
	err         error

	credit chan int      // bytes of standard input that the guest has taken
	stop   chan struct{} // closed when the session is over
}

func (s *session) send(kind byte, p []byte) error {
	s.write.Lock()
	defer s.write.Unlock()
	return writeFrame(s.line, kind, p)
}

func (s *session) signal(n syscall.Signal) { _ = s.send(frameSignal, []byte{byte(n)}) }

// serve answers the guest until it reports the command's end or the line closes.
func (s *session) serve(work string) {
	r := newFrameReader(s.line)
	for {
		kind, p, err := r.next()
		if err != nil {
			return
		}
		switch kind {
		case frameReady:
			s.ready = true
			go s.feed(spec{Args: s.c.Args, Env: s.c.Env, Dir: s.c.Dir, Work: work, Modules: s.modules, Udevd: s.udevd}.encode())
		case frameStdout:
			s.copy(s.c.Stdout, p)
		case frameStderr:
			s.copy(s.c.Stderr, p)
		case frameCredit:
			select {
			case s.credit <- decodeInt(p):
			default: // more credits than bytes sent: not our guest
				s.err = fmt.Errorf("%w: it acknowledges what was not sent", ErrKernel)
				return
			}
		case frameFailed:
			s.err = fmt.Errorf("start %q in the lab: %s", s.c.Args[0], p)
			return
		case frameExit:
			s.status, s.done = decodeInt(p), true
			return
		}
	}
}

// copy passes output on. A reader that went away (EPIPE) ends the command the
// way it would outside.
func (s *session) copy(w io.Writer, p []byte) {
	if w == nil {
		return
	}
	_, err := w.Write(p)
	if errors.Is(err, unix.EPIPE) {
		s.signal(unix.SIGPIPE)
	} else if err != nil && s.err == nil {
		s.err = fmt.Errorf("pass on the command's output: %w", err)
		s.signal(unix.SIGTERM)
	}
}

// feed sends the command, then standard input, never more than the guest has
// room for, so that a signal is not stuck behind input that nobody reads.
func (s *session) feed(command []byte) {
	room := inputWindow
	pass := func(kind byte, r io.Reader) (ok bool) {
		buf := make([]byte, inputFrame)
		for {
			for room < len(buf) {
				select {
				case n := <-s.credit:
					room += n
				case <-s.stop:
					return false
				}
			}
			n, err := r.Read(buf)
			if n > 0 && s.send(kind, buf[:n]) != nil {
				return false
			}
			room -= n
			if err != nil {
				return s.send(kind, nil) == nil
			}
		}
	}
	if !pass(frameSpec, bytes.NewReader(command)) {
		return
	}
	if s.c.Stdin == nil {
		_ = s.send(frameStdin, nil)
		return
	}
	pass(frameStdin, s.c.Stdin)
}

// tail keeps the last bytes written to it.
type tail struct {
	mu  sync.Mutex
	max int
	b   []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	if over := len(t.b) - t.max; over > 0 {
		t.b = append(t.b[:0], t.b[over:]...)
	}
	return len(p), nil
}

// last returns the last n lines; those up to a panic, if there was one, since
// what follows it are addresses.
func (t *tail) last(n int) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	lines := strings.Split(string(bytes.TrimSpace(t.b)), "\n")
	if i := slices.IndexFunc(lines, func(l string) bool { return strings.Contains(l, "Kernel panic") }); i >= 0 {
		lines = lines[:i+1]
	}
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// visible returns an error if the guest's own file systems hide path.
func visible(path string) error {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	for _, top := range []string{"/run", "/dev", "/proc", "/sys"} {
		if path == top || strings.HasPrefix(path, top+"/") {
			return fmt.Errorf("the lab does not see the host's %s: choose a folder that is not below /run, /dev, /proc or /sys", path)
		}
	}
	return nil
}

// Lost tells, in the lab kernel, whether what is written at path goes when the
// lab ends: it is not on the host's file system.
func Lost(path string) bool {
	const hostfs = 0x00c0ffee // fs/hostfs/hostfs_kern.c
	var st unix.Statfs_t
	return os.Getenv("MEMSYNC_LAB") == "1" && unix.Statfs(path, &st) == nil && st.Type != hostfs
}

// pin keeps the calling thread, and what it starts, on one CPU.
func pin(cpu string) error {
	n, err := strconv.Atoi(cpu)
	if err != nil {
		return err
	}
	var set unix.CPUSet
	set.Set(n)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("pin the lab kernel to CPU %d: %w", n, err)
	}
	return nil
}

// CheckCPU returns an error unless cpu is legal in Command.CPU.
func CheckCPU(cpu string) error {
	if n, err := strconv.Atoi(cpu); cpu != "" && cpu != "any" && (err != nil || n < 0 || n >= len(unix.CPUSet{})*64) {
		return fmt.Errorf("CPU %q: want a number, or any", cpu)
	}
	return nil
}

// claimCPU chooses the host CPU for a kernel; empty means any. A claim is an
// abstract Unix socket: it ends with the process and leaves no file.
func claimCPU(want string) (cpu string, free func(), err error) {
	free = func() {}
	if want == "any" {
		return "", free, nil
	}
	if want != "" {
		return want, free, CheckCPU(want)
	}
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return "", free, fmt.Errorf("read the allowed CPUs: %w", err)
	}
	var allowed []int
	for n := len(set)*64 - 1; n >= 0; n-- { // CPU 0 last: interrupts prefer it
		if set.IsSet(n) {
			allowed = append(allowed, n)
		}
	}
	for _, n := range allowed {
		if l, err := net.Listen("unix", fmt.Sprintf("@memsync-lab-%d-cpu%d", os.Getuid(), n)); err == nil {
			return strconv.Itoa(n), func() { _ = l.Close() }, nil
		}
	}
	return strconv.Itoa(allowed[os.Getpid()%len(allowed)]), free, nil
}

// memoryFolder is where the guest's memory is kept as an unlinked file: best a
// file system that is memory itself, lets code in it run and has room.
func memoryFolder(work string, size int64) string {
	var s unix.Statfs_t
	const shm = "/dev/shm"
	if unix.Statfs(shm, &s) == nil && s.Type == unix.TMPFS_MAGIC && s.Flags&unix.ST_NOEXEC == 0 &&
		int64(s.Bavail)*s.Bsize >= size && unix.Access(shm, unix.W_OK) == nil {
		return shm
	}
	return work
}
