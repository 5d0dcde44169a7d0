package lab

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Main runs the guest's side if args (without the program's name) ask for it:
// lab-init is process 1, lab-modprobe loads modules. Every program that calls
// Run must call Main first of all.
func Main(args []string) (code int, ok bool) {
	if len(args) == 0 {
		return 0, false
	}
	switch args[0] {
	case "lab-init":
		if os.Getpid() != 1 || len(args) < 2 { // the kernel appends arguments of its own
			fmt.Fprintln(os.Stderr, "memsync: lab-init is for the lab kernel")
			return 6, true
		}
		guestInit(args[1])
		return 1, true
	case "lab-modprobe":
		if err := modprobe(args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, "modprobe:", err)
			return 1, true
		}
		return 0, true
	}
	return 0, false
}

// modulesFile tells modprobe where the modules are.
const modulesFile = "/run/memsync-lab-modules"

// preload is loaded at boot: what has a device node, and what probes look for
// and must not load themselves. The rest comes on demand, through modprobe.
func preload() []string {
	return []string{"nbd", "fuse", "tun", "loop", "veth", "sch_netem", "sch_tbf", "tcp_bbr"}
}

// guestInit is process 1. It ends by switching the machine off.
func guestInit(work string) {
	debug.SetGCPercent(-1) // a few MB at most; collecting costs page faults
	runtime.GOMAXPROCS(4)  // on the one CPU: the scheduler needs 10 ms to take a blocked thread's turn away
	err := guestMain(work)
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab-init:", err) // the console, which the host shows
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func guestMain(work string) error {
	if err := mountAll(); err != nil {
		return err
	}
	line, err := openLine("/dev/ttyS1")
	if err != nil {
		return err
	}
	g := &guest{line: line, input: make(chan []byte, inputWindow+1), pid: make(chan int, 1)}
	if err := g.send(frameReady, nil); err != nil {
		return fmt.Errorf("greet the host: %w", err)
	}
	r := newFrameReader(line)
	s, err := g.readSpec(r)
	if err != nil {
		return err
	}
	if err := configure(work, s.Modules); err != nil {
		return err
	}
	if s.Udevd != "" {
		if err := startUdevd(s.Udevd); err != nil {
			return g.send(frameFailed, []byte(err.Error()))
		}
	}
	status, err := g.run(s, r)
	if err != nil {
		return g.send(frameFailed, []byte(err.Error()))
	}
	return g.send(frameExit, encodeInt(status))
}

func mountAll() error {
	for _, m := range []struct {
		kind, at, data string
		flags          uintptr
	}{
		{"proc", "/proc", "", 0},
		{"sysfs", "/sys", "", 0},
		{"cgroup2", "/sys/fs/cgroup", "", 0},
		{"tmpfs", "/run", "mode=755", 0},
		{"devpts", "/dev/pts", "mode=620,ptmxmode=666", 0},
		{"tmpfs", "/dev/shm", "mode=1777", 0},
	} {
		if strings.HasPrefix(m.at, "/dev/") { // the guest's own devtmpfs
			_ = os.MkdirAll(m.at, 0o755)
		}
		if err := unix.Mount(m.kind, m.at, m.kind, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s at %s: %w", m.kind, m.at, err)
		}
	}
	for _, d := range []string{"/run/lock", "/run/netns", "/dev/net", "/run/tmp"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	if err := os.Chmod("/run/tmp", 0o1777); err != nil {
		return err
	}
	for to, from := range map[string]string{"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"} {
		if err := os.Symlink(from, "/dev/"+to); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

// openLine opens a serial line that passes bytes unchanged.
func openLine(path string) (*os.File, error) {
	// Non-blocking: a goroutine that waits in the poller holds up no other.
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("TCGETS %s: %w", path, err)
	}
	t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
	t.Cflag |= unix.CS8 | unix.CREAD | unix.CLOCAL
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, t); err != nil {
		return nil, fmt.Errorf("TCSETS %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// configure does what does not need the host: names, limits, lo, modules.
func configure(work, modules string) error {
	if err := unix.Sethostname([]byte("memsync-lab")); err != nil {
		return err
	}
	if err := os.WriteFile(modulesFile, []byte(modules), 0o644); err != nil {
		return err
	}
	helper := filepath.Join(work, "bin", "modprobe")
	if err := os.WriteFile("/proc/sys/kernel/modprobe", []byte(helper), 0); err != nil {
		return fmt.Errorf("set kernel.modprobe: %w", err)
	}
	for which, n := range map[int]uint64{unix.RLIMIT_NOFILE: 1 << 20, unix.RLIMIT_MEMLOCK: unix.RLIM_INFINITY} {
		if err := syscall.Setrlimit(which, &syscall.Rlimit{Cur: n, Max: n}); err != nil {
			return fmt.Errorf("set limit %d: %w", which, err)
		}
	}
	if err := linkUp("lo"); err != nil {
		return err
	}
	m, err := readModules(modules)
	if err != nil {
		return err
	}
	for _, name := range preload() {
		if err := m.load(name, ""); err != nil {
			fmt.Fprintln(os.Stderr, "lab-init:", err) // the command will say what it misses
		}
	}
	return nil
}

// startUdevd starts the machine's udevd and waits until it listens. It ends with the guest.
func startUdevd(path string) error {
	c := exec.Command(path)
	c.Stderr = os.Stderr // the console
	if err := c.Start(); err != nil {
		return fmt.Errorf("start %s: %w", path, err)
	}
	const control = "/run/udev/control"
	for until := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(control); err == nil {
			return nil
		}
		if time.Now().After(until) {
			return fmt.Errorf("%s does not listen on %s after 10 s", path, control)
		}
	}
}

func linkUp(name string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	r, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	r.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, r); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

func (g *guest) readSpec(r *frameReader) (spec, error) {
	var b []byte
	for {
		kind, p, err := r.next()
		if err != nil {
			return spec{}, fmt.Errorf("read the command: %w", err)
		}
		switch {
		case kind != frameSpec:
		case len(p) == 0:
			return decodeSpec(b)
		default:
			b = append(b, p...)
			if err := g.send(frameCredit, encodeInt(len(p))); err != nil {
				return spec{}, err
			}
		}
	}
}

// guest is the guest's end of the line.
type guest struct {
	line  *os.File
	write sync.Mutex
	input chan []byte // standard input; bounded by the window, so sending never blocks
	pid   chan int
}

func (g *guest) send(kind byte, p []byte) error {
	g.write.Lock()
	defer g.write.Unlock()
	return writeFrame(g.line, kind, p)
}

// run starts the command and returns its exit status once it, all that it left
// running and the write-back of the host's files have ended.
func (g *guest) run(s spec, r *frameReader) (status int, err error) {
	env := guestEnv(s)
	if err := os.Chdir(s.Dir); err != nil {
		return 0, err
	}
	path, err := lookPath(s.Args[0], env)
	if err != nil {
		_ = g.send(frameStderr, []byte("memsync lab: "+err.Error()+"\n"))
		if errors.Is(err, fs.ErrPermission) {
			return 126, nil
		}
		return 127, nil
	}
	var pipes [3][2]*os.File
	for i := range pipes {
		a, b, err := os.Pipe()
		if err != nil {
			return 0, err
		}
		pipes[i] = [2]*os.File{a, b}
	}
	pid, err := syscall.ForkExec(path, s.Args, &syscall.ProcAttr{
		Env:   env,
		Files: []uintptr{pipes[0][0].Fd(), pipes[1][1].Fd(), pipes[2][1].Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	for _, f := range []*os.File{pipes[0][0], pipes[1][1], pipes[2][1]} {
		_ = f.Close()
	}
	if err != nil {
		_ = g.send(frameStderr, []byte("memsync lab: run "+path+": "+err.Error()+"\n"))
		return 126, nil
	}
	go g.listen(r, pid)
	go g.feed(pipes[0][1])
	output := make(chan struct{}, 2)
	go g.pump(frameStdout, pipes[1][0], output)
	go g.pump(frameStderr, pipes[2][0], output)

	status = reap(pid)
	// What is left would keep the output open. A process that waits for a dead
	// block device outlives even this: do not wait for it.
	_ = unix.Kill(-1, unix.SIGKILL)
	patience := time.After(time.Second)
	for range 2 {
		select {
		case <-output:
		case <-patience:
			patience = time.After(0)
		}
	}
	syncRoot()
	return status, nil
}

// listen obeys the host until it goes away, which ends the machine.
func (g *guest) listen(r *frameReader, pid int) {
	for {
		kind, p, err := r.next()
		if err != nil {
			_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
			return
		}
		switch {
		case kind == frameStdin:
			g.input <- append([]byte(nil), p...)
		case kind == frameSignal && len(p) == 1:
			_ = unix.Kill(-pid, syscall.Signal(p[0]))
		}
	}
}

func (g *guest) feed(w *os.File) {
	defer w.Close()
	open := true
	for p := range g.input {
		if len(p) == 0 {
			return
		}
		if open {
			_, err := w.Write(p)
			open = err == nil // a command that does not read: take it all the same
		}
		if g.send(frameCredit, encodeInt(len(p))) != nil {
			return
		}
	}
}

func (g *guest) pump(kind byte, r io.Reader, done chan<- struct{}) {
	buf := make([]byte, 4*maxFrame)
	for {
		n, err := r.Read(buf)
		if n > 0 && g.send(kind, buf[:n]) != nil {
			break
		}
		if err != nil {
			break
		}
	}
	done <- struct{}{}
}

// reap waits for pid, and for all the orphans that process 1 inherits.
func reap(pid int) (status int) {
	for {
		var w unix.WaitStatus
		p, err := unix.Wait4(-1, &w, 0, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return 255 // cannot be: pid is our child
		case p == pid && w.Signaled():
			return 128 + int(w.Signal())
		case p == pid && w.Exited():
			return w.ExitStatus()
		}
	}
}

// syncRoot writes the host's files back. Only those: a sync of everything could
// wait for a dead block device.
func syncRoot() {
	done := make(chan struct{})
	go func() {
		defer close(done)
		if f, err := os.Open("/"); err == nil {
			_ = unix.Syncfs(int(f.Fd()))
			_ = f.Close()
		}
	}()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
	}
}

// guestEnv is the caller's environment with what differs in the guest.
func guestEnv(s spec) []string {
	path := "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	var env []string
	for _, kv := range s.Env {
		k, v, _ := strings.Cut(kv, "=")
		switch k {
		case "PATH":
			path = v + ":" + path
		case "TMPDIR", "PWD", "OLDPWD", "MEMSYNC_LAB":
		default:
			env = append(env, kv)
		}
	}
	return append(env, "PATH="+filepath.Join(s.Work, "bin")+":"+path, "PWD="+s.Dir, "TMPDIR=/run/tmp", "MEMSYNC_LAB=1")
}

func lookPath(name string, env []string) (string, error) {
	for _, kv := range env {
		if v, ok := strings.CutPrefix(kv, "PATH="); ok {
			if err := os.Setenv("PATH", v); err != nil {
				return "", err
			}
		}
	}
	return exec.LookPath(name)
}
