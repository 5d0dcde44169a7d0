package netem

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Namespace is one end of a link: an anonymous network namespace, kept alive by a
// descriptor (and by whatever process or socket is in it). Its methods may be
// called from any goroutine.
type Namespace struct {
	name, dev string
	addr      netip.Addr

	mu       sync.RWMutex // guards fd against Close; held for setns only, not while inside
	fd       int
	launcher chan func()
	launched sync.Once
}

// newNamespace makes a namespace, without a device yet. It needs CAP_SYS_ADMIN.
func newNamespace(name string) (*Namespace, error) {
	n := &Namespace{name: name, fd: -1, launcher: make(chan func())}
	err := visit(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare a network namespace: %w", permission(err, "run as root, or as root of a user namespace: unshare --user --map-root-user --net"))
		}
		fd, err := openThreadNS()
		if err != nil {
			return err
		}
		n.fd = fd
		return nil
	})
	if err != nil {
		return nil, err
	}
	return n, nil
}

// permission marks the errnos that say no to this user rather than to this kernel.
func permission(err error, remedy string) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("%w: %w (%s)", ErrNotPermitted, err, remedy)
	}
	return err
}

func openThreadNS() (int, error) {
	fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open this thread's network namespace: %w", err)
	}
	return fd, nil
}

// locked runs f on a goroutine locked to an OS thread other than the process's
// first one: that thread stands for the process in /proc, and when its goroutine
// ends locked Go parks it instead of ending it. Where f returns false the thread ends with it.
func locked(f func() (reusable bool)) {
	run := func() {
		if f() {
			runtime.UnlockOSThread()
		}
	}
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			run()
			return
		}
		elsewhere := make(chan struct{})
		go func() { // cannot be on the first thread: that one is held until this runs
			runtime.LockOSThread()
			close(elsewhere)
			run()
		}()
		<-elsewhere
		runtime.UnlockOSThread()
	}()
}

var errExited = errors.New("the function ended its goroutine")

// visit runs fn on a locked thread and puts the thread back into its own network
// namespace, or ends the thread where that is refused (an owner outside of the
// user namespace that we are root of).
func visit(fn func() error) error {
	err := errExited // also what is left when fn calls runtime.Goexit
	done := make(chan struct{})
	locked(func() (reusable bool) {
		defer close(done)
		home, e := openThreadNS()
		if e != nil {
			err = e
			return true
		}
		defer func() {
			reusable = unix.Setns(home, unix.CLONE_NEWNET) == nil
			unix.Close(home)
		}()
		err = fn()
		return true
	})
	<-done
	return err
}

// enter moves the calling thread, which must be locked, into the namespace.
func (n *Namespace) enter() error {
	n.mu.RLock()
	defer n.mu.RUnlock()
	if n.fd < 0 {
		return fmt.Errorf("enter namespace %s: %w", n.name, ErrClosed)
	}
	if err := unix.Setns(n.fd, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter namespace %s: %w", n.name, err)
	}
	return nil
}

// Do runs fn inside the namespace, on an OS thread of its own, and returns what fn
// returns. What fn starts on other goroutines is outside. Sockets keep the
// namespace that they were made in. Do may be called concurrently; it blocks as
// long as fn does. It returns ErrClosed after the link's Close.
func (n *Namespace) Do(fn func() error) error {
	return visit(func() error {
		if err := n.enter(); err != nil {
			return err
		}
		return fn()
	})
}

// Start starts cmd inside the namespace. All children of one namespace are started
// by one thread that lives until the link's Close: a child that asked for a signal
// at its parent's end (SysProcAttr.Pdeathsig, which the kernel ties to the parent
// thread) gets it when the link closes or this process dies, and not before.
func (n *Namespace) Start(cmd *exec.Cmd) error {
	n.launched.Do(func() {
		// Whoever comes later finds the launcher at work, or ErrClosed from enter.
		jobs := n.launcher
		locked(func() bool {
			for job := range jobs {
				job()
			}
			return false // ends in the namespace, so the thread must go
		})
	})
	n.mu.RLock()
	defer n.mu.RUnlock() // Close waits for a start under way
	if n.fd < 0 {
		return fmt.Errorf("start %s in namespace %s: %w", cmd.Path, n.name, ErrClosed)
	}
	result := make(chan error)
	n.launcher <- func() {
		if err := unix.Setns(n.fd, unix.CLONE_NEWNET); err != nil {
			result <- fmt.Errorf("start %s: enter namespace %s: %w", cmd.Path, n.name, err)
			return
		}
		result <- cmd.Start()
	}
	return <-result
}

// Addr is the link's IPv4 address at this end.
func (n *Namespace) Addr() netip.Addr { return n.addr }

// Device is the name of the link's device at this end.
func (n *Namespace) Device() string { return n.dev }

// Listen listens inside the namespace. network and address are net.Listen's; the
// host must be an IP literal, and ":0" takes this end's Addr.
func (n *Namespace) Listen(ctx context.Context, network, address string) (l net.Listener, err error) {
	address = n.own(address)
	err = n.Do(func() error {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false) // Go's default for listeners; one link has one path
		l, err = lc.Listen(ctx, network, address)
		return err
	})
	return l, err
}

// ListenPacket is Listen for datagrams.
func (n *Namespace) ListenPacket(ctx context.Context, network, address string) (c net.PacketConn, err error) {
	address = n.own(address)
	err = n.Do(func() error {
		var lc net.ListenConfig
		c, err = lc.ListenPacket(ctx, network, address)
		return err
	})
	return c, err
}

func (n *Namespace) own(address string) string {
	if host, port, err := net.SplitHostPort(address); err == nil && host == "" {
		return net.JoinHostPort(n.addr.String(), port)
	}
	return address
}

// Dial connects from inside the namespace until it succeeds or ctx ends. The host
// must be an IP literal: names are looked up on other threads, outside.
func (n *Namespace) Dial(ctx context.Context, network, address string) (c net.Conn, err error) {
	if host, _, err := net.SplitHostPort(address); err == nil {
		if _, err := netip.ParseAddr(host); err != nil {
			return nil, fmt.Errorf("dial %s from namespace %s: %w: the host must be an IP address", address, n.name, ErrInvalid)
		}
	}
	err = n.Do(func() error {
		var d net.Dialer
		c, err = d.DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// Isolated makes a namespace that has a loopback device and no way out: for
// servers that only processes of this machine shall reach, by Dial, or by a
// socket that they make in it themselves (Path). Close it.
func Isolated(name string) (*Namespace, error) {
	n, err := newNamespace(name)
	if err != nil {
		return nil, err
	}
	if err := n.Do(loopbackUp); err != nil {
		return nil, errors.Join(fmt.Errorf("namespace %s: %w", name, err), n.close())
	}
	return n, nil
}

// loopbackUp brings the loopback device of this thread's namespace up.
func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring lo up: %w", err)
	}
	return nil
}

// Path names the namespace for setns in other processes of this PID namespace,
// as long as it is not closed.
func (n *Namespace) Path() string {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.fd)
}

// Close lets an Isolated namespace go; it lives on while processes or sockets
// are in it. It may be called twice. A link closes its own namespaces.
func (n *Namespace) Close() error { return n.close() }

func (n *Namespace) close() error {
	n.launched.Do(func() {}) // none starts from here on
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.fd < 0 {
		return nil
	}
	close(n.launcher)
	err := unix.Close(n.fd)
	n.fd = -1
	return err
}
