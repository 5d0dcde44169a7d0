package userfaultfd

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"memsync/strategies"
	"memsync/strategies/attach"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/transport"
	"memsync/strategies/transport/nbd"
)

// The tests run the workload, and where it is to be killed the daemon, in
// processes of their own: this binary again, told by roleEnv what to be. A child
// answers one request at a time on a socket (descriptor 3).

const roleEnv = "MEMSYNC_UFFD_TEST_ROLE"

func TestMain(m *testing.M) {
	switch os.Getenv(roleEnv) {
	case "":
		code := m.Run()
		if err := goleak.Find(); err != nil && code == 0 {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
		if left := descriptors(); len(left) > 0 && code == 0 {
			fmt.Fprintln(os.Stderr, "descriptors leaked:", left)
			code = 1
		}
		os.Exit(code)
	case "workload":
		serveRole(&workload{})
	case "daemon":
		serveRole(&daemon{})
	case "source":
		serveRole(source{})
	}
}

// descriptors lists what is open of the kinds that these tests make.
func descriptors() (open []string) {
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil &&
			(strings.Contains(to, "userfaultfd") || strings.Contains(to, "memfd") || strings.Contains(to, "socket:")) {
			open = append(open, to)
		}
	}
	return open
}

// request is what a child is asked for; reply its answer. One file may go along.
type request struct {
	Op         string
	Attachment strategies.Attachment
	HasFile    bool
	Base       uint64
	Off, Len   int64
	Threads, N int
	Seed       uint64
	Content    region.Content
	Settings   []string
	Delay      time.Duration
	StallAt    int64
	Addr       string // of the source
}

type reply struct {
	Err    string
	EIO    bool
	Base   uint64
	Nanos  []int64
	Stats  strategies.Stats
	Attach strategies.Attachment
	Addr   string
}

type role interface {
	do(q request, f *os.File) (reply, *os.File)
}

func serveRole(r role) {
	runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + 1) // as the harness's roles (scenarios/role)
	conn := os.NewFile(3, "role")
	for {
		var q request
		f, err := receive(conn, &q)
		if err != nil {
			os.Exit(0) // the parent is gone
		}
		a, out := r.do(q, f)
		if err := send(conn, a, out); err != nil {
			os.Exit(1)
		}
	}
}

func send(conn *os.File, v any, f *os.File) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var rights []byte
	if f != nil {
		rights = unix.UnixRights(int(f.Fd()))
	}
	return unix.Sendmsg(int(conn.Fd()), b, rights, nil, unix.MSG_NOSIGNAL)
}

func receive(conn *os.File, v any) (*os.File, error) {
	b, oob := make([]byte, 1<<20), make([]byte, 64)
	var n, on int
	var err error
	for {
		n, on, _, _, err = unix.Recvmsg(int(conn.Fd()), b, oob, unix.MSG_CMSG_CLOEXEC)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil || n == 0 {
		return nil, errors.Join(errors.New("the other side left"), err)
	}
	var f *os.File
	if on > 0 {
		m, err := unix.ParseSocketControlMessage(oob[:on])
		if err != nil {
			return nil, err
		}
		fds, err := unix.ParseUnixRights(&m[0])
		if err != nil {
			return nil, err
		}
		f = os.NewFile(uintptr(fds[0]), "passed")
	}
	return f, json.Unmarshal(b[:n], v)
}

type child struct {
	t    testing.TB
	cmd  *exec.Cmd
	conn *os.File
	once sync.Once

	ended chan struct{} // closed once it is reaped
}

// start runs a child on the given CPUs (none means all); files become its descriptors from 4 on.
func start(t testing.TB, role string, cpus []int, files ...*os.File) *child {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "theirs")
	defer theirs.Close()
	for _, fd := range fds {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 1<<20)
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^$")
	cmd.Env = append(os.Environ(), roleEnv+"="+role)
	cmd.ExtraFiles = append([]*os.File{theirs}, files...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	started, ended := make(chan error), make(chan struct{})
	go func() { // on a thread of its own: it lends the child its affinity, and lives as long
		runtime.LockOSThread()
		if len(cpus) > 0 {
			var set unix.CPUSet
			for _, c := range cpus {
				set.Set(c)
			}
			if err := unix.SchedSetaffinity(0, &set); err != nil {
				started <- err
				return
			}
		}
		started <- cmd.Start()
		_ = cmd.Wait()
		close(ended)
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	c := &child{t: t, cmd: cmd, conn: os.NewFile(uintptr(fds[0]), "ours"), ended: ended}
	t.Cleanup(func() { c.kill(); <-ended; c.conn.Close() })
	tv := unix.NsecToTimeval(int64(20 * time.Second))
	if err := unix.SetsockoptTimeval(fds[0], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *child) kill() { c.once.Do(func() { _ = c.cmd.Process.Kill() }) }

// try asks and waits for the answer, 20 s at most.
func (c *child) try(q request, f *os.File) (reply, *os.File, error) {
	q.HasFile = f != nil
	if err := send(c.conn, q, f); err != nil {
		return reply{}, nil, err
	}
	var r reply
	out, err := receive(c.conn, &r)
	return r, out, err
}

// ask fails the test unless the answer comes and is no error.
func (c *child) ask(q request) reply {
	c.t.Helper()
	r, f, err := c.try(q, nil)
	if f != nil {
		f.Close()
	}
	if err != nil || r.Err != "" {
		c.t.Fatalf("%s of %d bytes at %d: %v %s", q.Op, q.Len, q.Off, err, r.Err)
	}
	return r
}

// attachTo makes the workload child attach and hands its userfaultfd to serve.
// It returns a duplicate of the userfaultfd, as a guard holds it.
func (c *child) attachTo(a strategies.Attachment, serve func(f *os.File, base uintptr) error) (guard *os.File, base uintptr) {
	c.t.Helper()
	r, u, err := c.try(request{Op: "attach", Attachment: a}, a.File)
	if err != nil || r.Err != "" || u == nil {
		c.t.Fatalf("attach: %v %s", err, r.Err)
	}
	fd, err := unix.FcntlInt(u.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		c.t.Fatal(err)
	}
	guard = os.NewFile(uintptr(fd), "guard")
	c.t.Cleanup(func() { guard.Close() })
	if err := serve(u, uintptr(r.Base)); err != nil {
		c.t.Fatal(err)
	}
	return guard, uintptr(r.Base)
}

// ---- the workload's role

type workload struct{ view *attach.View }

func (w *workload) do(q request, f *os.File) (a reply, out *os.File) {
	var err error
	switch q.Op {
	case "attach":
		q.Attachment.File = f
		if w.view, err = attach.Open(q.Attachment, attach.Options{}); err == nil {
			u, base, _ := w.view.Fault()
			return reply{Base: uint64(base)}, u
		}
	case "detach":
		err = w.view.Close()
	case "read": // in order, in steps of N bytes
		err = w.each(q, func(i int, buf []byte) (int64, int64) {
			off := q.Off + int64(i)*int64(q.N)
			return off, min(int64(q.N), q.Off+q.Len-off)
		})
	case "program": // N random reads in each of Threads
		var wg sync.WaitGroup
		errs := make([]error, q.Threads)
		for i := range errs {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(q.Seed, uint64(i)))
				buf := make([]byte, 256<<10)
				for range q.N {
					off := r.Int64N(w.view.Size())
					n := min(w.view.Size()-off, 1+r.Int64N(1<<r.IntN(18)))
					if errs[i] = w.check(q.Content, buf[:n], off); errs[i] != nil {
						return
					}
				}
			})
		}
		wg.Wait()
		err = errors.Join(errs...)
	case "write":
		err = w.view.WriteAt(make([]byte, q.Len), q.Off)
	case "store": // past the check of WriteAt
		err = w.view.Do(func(mem []byte) { mem[q.Off] = 1 })
	case "discard":
		err = unix.Madvise(w.view.Bytes()[q.Off:q.Off+q.Len], unix.MADV_DONTNEED)
	case "fork": // what a child of this process sees at Off
		err = forked(w.view.Bytes(), q.Off)
	case "syscall": // a fault from within a system call
		var p [2]int
		if err = unix.Pipe2(p[:], unix.O_CLOEXEC); err == nil {
			_, err = unix.Write(p[1], w.view.Bytes()[q.Off:q.Off+q.Len])
			unix.Close(p[0])
			unix.Close(p[1])
		}
	default:
		return w.bench(q)
	}
	if err != nil {
		return reply{Err: err.Error(), EIO: errors.Is(err, unix.EIO) || errors.Is(err, unix.EFAULT)}, nil
	}
	return a, nil
}

func (w *workload) each(q request, at func(i int, buf []byte) (off, n int64)) error {
	buf := make([]byte, q.N)
	for i := range int((q.Len + int64(q.N) - 1) / int64(q.N)) {
		off, n := at(i, buf)
		if err := w.check(q.Content, buf[:n], off); err != nil {
			return err
		}
	}
	return nil
}

func (w *workload) check(c region.Content, buf []byte, off int64) error {
	if err := w.view.ReadAt(buf, off); err != nil {
		return err
	}
	return c.Check(buf, off)
}

// bench measures; the answers are in Nanos.
func (w *workload) bench(q request) (a reply, out *os.File) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	switch q.Op {
	case "scan": // copy the region out, N bytes a step; one time
		mem, buf := w.view.Bytes(), make([]byte, q.N)
		t := time.Now()
		for off := int64(0); off < int64(len(mem)); off += int64(q.N) {
			copy(buf, mem[off:])
		}
		a.Nanos = []int64{int64(time.Since(t))}
	case "touch": // N loads of distinct pages in random order; a time each
		mem := w.view.Bytes()
		order := rand.New(rand.NewPCG(q.Seed, 1)).Perm(len(mem) / 4096)[:q.N]
		var sum byte
		for _, p := range order {
			t := time.Now()
			sum += mem[p*4096]
			a.Nanos = append(a.Nanos, int64(time.Since(t)))
		}
		a.Base = uint64(sum)
	case "floor_fill": // copy Len bytes into fresh 4 KiB pages with Threads
		src := freshPages(q.Len)
		for i := range src {
			src[i] = byte(i)
		}
		dst := freshPages(q.Len)
		part := len(dst) / q.Threads
		t := time.Now()
		var wg sync.WaitGroup
		for i := range q.Threads {
			wg.Go(func() { copy(dst[i*part:(i+1)*part], src[i*part:]) })
		}
		wg.Wait()
		a.Nanos = []int64{int64(time.Since(t))}
		_ = unix.Munmap(src)
		_ = unix.Munmap(dst)
	case "floor_wake": // N round trips through the pipes 4 (out) and 5 (in)
		var b [1]byte
		for range q.N {
			t := time.Now()
			if err := pong(4, 5, &b); err != nil {
				return reply{Err: err.Error()}, nil
			}
			a.Nanos = append(a.Nanos, int64(time.Since(t)))
		}
	default:
		a.Err = "unknown request " + q.Op
	}
	return a, nil
}

func freshPages(n int64) []byte {
	p, err := unix.Mmap(-1, 0, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		panic(err)
	}
	_ = unix.Madvise(p, unix.MADV_NOHUGEPAGE)
	return p
}

func pong(out, in int, b *[1]byte) error {
	if out >= 0 {
		if n, _, e := unix.Syscall(unix.SYS_WRITE, uintptr(out), uintptr(unsafe.Pointer(b)), 1); n != 1 {
			return e
		}
	}
	if n, _, e := unix.Syscall(unix.SYS_READ, uintptr(in), uintptr(unsafe.Pointer(b)), 1); n != 1 {
		return e
	}
	return nil
}

// forked forks without exec, which Go cannot do safely: the child only loads one
// byte and exits. It returns an error that says how the child ended.
func forked(mem []byte, off int64) error {
	pid, e := rawFork(&mem[off])
	if e != 0 {
		return e
	}
	var ws unix.WaitStatus
	if _, err := unix.Wait4(int(pid), &ws, 0, nil); err != nil {
		return err
	}
	if ws.Exited() {
		return fmt.Errorf("the forked child read %#x", ws.ExitStatus())
	}
	return nil // a signal: it could not read
}

//go:norace
//go:noinline
//go:nocheckptr
func rawFork(p *byte) (uintptr, unix.Errno) {
	pid, _, e := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if e != 0 || pid != 0 {
		return pid, e
	}
	// Let a signal end it rather than the Go runtime.
	var dfl [4]uint64
	unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(unix.SIGSEGV), uintptr(unsafe.Pointer(&dfl)), 0, 8, 0, 0)
	b := *p
	for {
		unix.RawSyscall(unix.SYS_EXIT_GROUP, uintptr(b), 0, 0)
	}
}

// ---- the daemon's role

type daemon struct {
	mount strategies.Mount
	store *store
}

func (d *daemon) do(q request, f *os.File) (a reply, out *os.File) {
	var err error
	switch q.Op {
	case "mount":
		d.store = newStore(q.Content, q.Len)
		d.store.view(q.Seed == 1)
		d.store.delay = q.Delay
		if q.StallAt > 0 {
			d.store.stallAt.Store(q.StallAt)
		}
		d.store.addr = q.Addr
		d.mount, err = mountStore(d.store, q.Settings...)
		if err == nil {
			a.Attach = d.mount.Attachment()
			return a, a.Attach.File
		}
	case "serve":
		err = d.mount.(strategies.FaultServer).ServeFaults(f, uintptr(q.Base))
	case "stalled":
		a.Base = uint64(d.store.stalled.Load())
	case "stats":
		a.Stats = d.mount.Stats()
	case "pong": // the other end of floor_wake, pipes 4 (in) and 5 (out)
		go func() {
			runtime.LockOSThread()
			var b [1]byte
			if pong(-1, 4, &b) != nil {
				return
			}
			for pong(5, 4, &b) == nil {
			}
		}()
	case "read_store": // N reads of 4 KiB, without faults
		st := newStore(q.Content, q.Len)
		st.addr = q.Addr
		var r region.Store
		if r, err = (remote{st}).Open(context.Background()); err == nil {
			runtime.LockOSThread()
			buf := make([]byte, 4096)
			for _, i := range rand.New(rand.NewPCG(1, 1)).Perm(int(q.Len / 4096))[:q.N] {
				t := time.Now()
				if err = r.ReadAt(context.Background(), buf, int64(i)*4096); err != nil {
					break
				}
				a.Nanos = append(a.Nanos, int64(time.Since(t)))
			}
			runtime.UnlockOSThread()
			r.Close()
		}
	case "floor_tcp", "floor_rr":
		a.Nanos, err = rawFloor(q)
	case "close":
		err = d.mount.Close(context.Background())
	default:
		err = errors.New("unknown request " + q.Op)
	}
	if err != nil {
		a.Err = err.Error()
	}
	return a, nil
}

// ---- the source's role: an NBD server, and raw sockets for the floors

type source struct{}

func (source) do(q request, _ *os.File) (a reply, out *os.File) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return reply{Err: err.Error()}, nil
	}
	var t nbd.Transport
	exports := transport.One{Store: newStore(q.Content, q.Len).view(true)}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				if q.Op == "raw" {
					serveRaw(c, q.Len)
				} else {
					_ = t.Serve(context.Background(), c, exports)
				}
			}()
		}
	}()
	return reply{Addr: l.Addr().String()}, nil
}

// rawSocket returns c's descriptor, blocking and out of the network poller.
func rawSocket(c net.Conn) (int, func()) {
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		panic(err)
	}
	fd := -1
	if cerr := raw.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) }); err != nil || cerr != nil {
		panic(errors.Join(err, cerr))
	}
	c.Close()
	_ = unix.SetNonblock(fd, false)
	return fd, func() { unix.Close(fd) }
}

func transfer(trap uintptr, fd int, p []byte) bool {
	for len(p) > 0 {
		n, _, _ := unix.Syscall(trap, uintptr(fd), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)))
		if int(n) <= 0 {
			return false
		}
		p = p[n:]
	}
	return true
}

// serveRaw answers each 8 bytes with as many bytes as they say.
func serveRaw(c net.Conn, size int64) {
	runtime.LockOSThread()
	fd, done := rawSocket(c)
	defer done()
	mem := make([]byte, size)
	var q [8]byte
	for transfer(unix.SYS_READ, fd, q[:]) && transfer(unix.SYS_WRITE, fd, mem[:binary.LittleEndian.Uint64(q[:])]) {
	}
}

func rawFloor(q request) (ns []int64, err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	n, step, rounds := q.Len, int64(256<<10), 1
	if q.Op == "floor_rr" {
		n, step, rounds = 4096, 4096, q.N
	}
	begin := time.Now() // a stream's time includes connect(2)
	c, err := net.Dial("tcp", q.Addr)
	if err != nil {
		return nil, err
	}
	fd, done := rawSocket(c)
	defer done()
	var ask [8]byte
	binary.LittleEndian.PutUint64(ask[:], uint64(n))
	buf := make([]byte, step)
	for range rounds {
		if rounds > 1 {
			begin = time.Now()
		}
		if !transfer(unix.SYS_WRITE, fd, ask[:]) {
			return nil, errors.New("floor: write")
		}
		for left := n; left > 0; left -= step {
			if !transfer(unix.SYS_READ, fd, buf[:min(left, step)]) {
				return nil, errors.New("floor: read")
			}
		}
		ns = append(ns, int64(time.Since(begin)))
	}
	return ns, nil
}

// ---- what the tests mount

type remote struct{ region.Store }

// Open returns the store, or where it has an address, what NBD finds there.
func (r remote) Open(ctx context.Context) (region.Store, error) {
	s, ok := r.Store.(*store)
	if !ok || s.addr == "" {
		return r.Store, nil
	}
	var t nbd.Transport
	return t.Open(ctx, transport.DialFunc(func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", s.addr)
	}), transport.Options{})
}

func (r remote) Dial(context.Context) (net.Conn, error) { return nil, region.ErrNotSupported }

func mountStore(s region.Store, settings ...string) (strategies.Mount, error) {
	o := strategies.Options{PullWorkers: -1}
	settings = slices.Clone(settings)
	for i := 0; i < len(settings); {
		if n, ok := strings.CutPrefix(settings[i], "chunk="); ok {
			size, err := region.ParseSize(n)
			if err != nil {
				return nil, err
			}
			o.Chunk = size
			settings = slices.Delete(settings, i, i+1)
			continue
		}
		i++
	}
	p, err := param.New(Strategy{}.Info().Params, settings)
	if err != nil {
		return nil, err
	}
	o.Device, o.Params = "uffd", p
	return Strategy{}.Mount(context.Background(), remote{s}, o)
}
