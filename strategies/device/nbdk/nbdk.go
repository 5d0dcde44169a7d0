// Package nbdk makes a block device of the kernel's NBD client (/dev/nbdN) out of
// a region.Store, or out of NBD connections to another host.
//
// The kernel speaks NBD's transmission phase over sockets that it is handed after
// the handshake. Open serves a store on socket pairs, in this process; Connect
// hands the kernel sockets that lead to a server elsewhere, and no byte passes
// through this process then. Devices are set up by ioctl or by generic netlink (the
// kernel chooses a free one, or makes one); both without cgo. By ioctl a thread of
// this process holds the device: should the process be killed, the kernel ends it and
// fails what was in flight. By netlink nobody does that before nbd_timeout.
//
// The kernel's page cache lies between the workload and the sockets. A process
// must never touch a device that it serves itself (docs/deadlocks.md). A device
// whose server died fails requests with EIO after nbd_timeout; it never hangs.
//
// Source: drivers/block/nbd.c, include/uapi/linux/nbd.h and nbd-netlink.h. Linux 4.12.
package nbdk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/transport"
	"memsync/strategies/transport/nbd"
)

// Params are the device's parameters.
func Params() []param.Spec {
	return []param.Spec{
		{Name: "nbd_setup", Kind: param.KindEnum, Default: "auto", Values: []string{"auto", "netlink", "ioctl"},
			Doc: "how the kernel is told; auto is netlink (first network namespace only) where lost connections can be replaced (nbd-direct, nbd_dead_timeout above 0) or all devices are in use, else ioctl: requests in flight end at once when the daemon is killed, by netlink after nbd_timeout"},
		{Name: "nbd_connections", Kind: param.KindInt, Default: "4", Min: 1, Max: 16,
			Doc: "sockets, each with a queue of its own; fewer where the server does not allow several"},
		{Name: "nbd_timeout", Kind: param.KindDuration, Default: "30s", Min: int64(time.Second), Max: int64(time.Hour),
			Doc: "a request without an answer is given to the next connection after this time (up to twice as long), and fails with EIO after the last; whole seconds"},
		{Name: "nbd_dead_timeout", Kind: param.KindDuration, Default: "10s", Max: int64(time.Hour),
			Doc: "how long requests wait for a new connection to the source when all are lost, before they fail with EIO; whole seconds; netlink only"},
		{Name: "nbd_ready", Kind: param.KindEnum, Default: "poll", Values: []string{"poll", "uevent", "udev"},
			Doc: "how to learn that the device is ready: its size in sysfs, the kernel's uevent, or the event of udevd after its rules"},
		{Name: "nbd_scheduler", Kind: param.KindEnum, Default: "default", Values: []string{"default", "none", "mq-deadline", "kyber", "bfq"},
			Doc: "scheduler of the device's queue; default is the kernel's choice"},
		{Name: "nbd_queue_depth", Kind: param.KindInt, Default: "0", Max: 1024,
			Doc: "requests of the device's queue (nr_requests); 0 is the kernel's choice"},
		{Name: "nbd_max_request", Kind: param.KindSize, Default: "0", Max: 32 << 20,
			Doc: "largest request to the server (max_sectors_kb), whole KiB; 0 is the kernel's choice"},
		{Name: "read_ahead", Kind: param.KindSize, Default: "", Max: 1 << 30,
			Doc: "window of the kernel's read-ahead (default: the kernel's own, 128KiB or more; 0 is none)"},
	}
}

// Options say how to set a device up.
type Options struct {
	ReadOnly bool
	Params   param.Values // of Params; the zero value means the defaults
	// Redial, where not nil, replaces connections of Connect that are lost. It
	// needs netlink; with ioctl the device is lost with its last connection.
	Redial Redial
}

// Stats counts the device's requests since Open, as the kernel counts them.
type Stats struct {
	ReadRequests, ReadBytes   int64
	WriteRequests, WriteBytes int64
	Flushes                   int64
	Interrupts                int64 // always 0: the kernel's client has none
	Errors                    int64 // requests that the store failed; 0 after Connect
}

// Device is an attached block device. All methods may be called concurrently.
type Device struct {
	index  int
	node   *os.File // keeps the device: the kernel lets go when it is closed, also by SIGKILL
	detach func(ctx context.Context) error
	before Stats
	store  *counted // nil after Connect

	stop       func()                // ends the supervisor; nil without one
	lost       atomic.Pointer[error] // the latest trouble with a connection
	reconnects atomic.Int64
	detached   sync.Once
	detachErr  error

	cancel context.CancelFunc // ends the servers
	served sync.WaitGroup

	closing  sync.Once
	closed   chan struct{}
	closeErr error
	mu       sync.Mutex
	last     Stats // after Close
	done     bool
}

// Block is the block size of a device of size bytes: a page where that divides
// it, else a sector.
func Block(size int64) int64 {
	if size%4096 == 0 {
		return 4096
	}
	return 512
}

// Open attaches store as a block device of its size rounded up to 512 bytes; the
// bytes beyond read as zeroes and do not keep what is written. The store is not
// closed by the device. ctx bounds only the opening. Errors wrap
// region.ErrNotSupported or ErrNotPermitted where the kernel lacks nbd or refuses.
func Open(ctx context.Context, store region.Store, o Options) (*Device, error) {
	p, err := o.values()
	if err != nil {
		return nil, err
	}
	if store.Size() < 1 {
		return nil, fmt.Errorf("attach a region of %d bytes to an nbd device: %w", store.Size(), region.ErrOutOfRange)
	}
	c := newCounted(store, o.ReadOnly)
	serve, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var servers sync.WaitGroup
	t := &nbd.Transport{}
	var conns []net.Conn
	end := func() {
		cancel()
		closeAll(conns)
		servers.Wait()
	}
	var e nbd.Export
	for range p.Int("nbd_connections") {
		ours, theirs, err := socketPair()
		if err != nil {
			end()
			return nil, err
		}
		conns = append(conns, theirs)
		servers.Go(func() { _ = t.Serve(serve, ours, transport.One{Store: c}) })
		if e, err = t.Negotiate(ctx, theirs, ""); err != nil {
			end()
			return nil, fmt.Errorf("attach an nbd device: %w", err)
		}
	}
	if o.ReadOnly {
		e.Flags |= nbd.FlagReadOnly
	}
	d, err := attach(ctx, conns, e, p, nil)
	if err != nil {
		end()
		return nil, err
	}
	d.store, d.cancel = c, cancel
	d.served.Go(servers.Wait)
	return d, nil
}

// Connect attaches an export whose server is at the other end of conns, each of
// them negotiated by nbd.Transport.Negotiate with the result e; they are sockets
// without TLS. It takes over and closes conns, also after an error. The export's
// size must be a multiple of 512 bytes. More than one connection needs
// nbd.FlagMultiConn in e. ctx bounds only the opening.
func Connect(ctx context.Context, conns []net.Conn, e nbd.Export, o Options) (*Device, error) {
	p, err := o.values()
	if err == nil && o.ReadOnly {
		e.Flags |= nbd.FlagReadOnly
	}
	if err != nil {
		closeAll(conns)
		return nil, err
	}
	d, err := attach(ctx, conns, e, p, o.Redial)
	if err != nil {
		closeAll(conns)
	}
	return d, err
}

func (o Options) values() (param.Values, error) {
	if o.Params.Has("nbd_setup") {
		return o.Params, nil
	}
	return param.New(Params(), nil)
}

func closeAll(conns []net.Conn) {
	for _, c := range conns {
		_ = c.Close()
	}
}

// pairBuffer is how much may be on its way to the kernel, or from it, in bytes.
const pairBuffer = 4 << 20

func socketPair() (a, b net.Conn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a socket pair: %w", err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		// So that a large reply goes out in one piece and not in turns with who reads
		// it. More than net.core.wmem_max needs CAP_NET_ADMIN; less will do too.
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, pairBuffer) != nil {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, pairBuffer)
		}
		f := os.NewFile(uintptr(fd), "nbd socket")
		c, e := net.FileConn(f)
		_ = f.Close()
		if e != nil {
			err = e
			continue
		}
		conns[i] = c
	}
	if err != nil {
		for _, c := range conns {
			if c != nil {
				_ = c.Close()
			}
		}
		return nil, nil, err
	}
	return conns[0], conns[1], nil
}

// kernelFlags are those that the kernel is told, by the protocol's numbers: what every
// kernel with nbd knows. NBD_FLAG_SEND_WRITE_ZEROES is left out: kernels before 6.12
// ignore it, and nothing that uses a region zeroes a range of its device.
const kernelFlags = nbd.FlagHasFlags | nbd.FlagReadOnly | nbd.FlagFlush | nbd.FlagFUA | nbd.FlagTrim | nbd.FlagMultiConn

// settings is what both ways of setting up tell the kernel.
type settings struct {
	size, block   int64
	timeout, dead time.Duration
	flags         nbd.Flags
	sockets       []*os.File
}

// attach hands the sockets to the kernel. On success they are the kernel's and
// conns are closed.
func attach(ctx context.Context, conns []net.Conn, e nbd.Export, p param.Values, redial Redial) (*Device, error) {
	if e.Size%512 != 0 {
		return nil, fmt.Errorf("attach an NBD export of %d bytes: a block device is whole sectors of 512 bytes: %w", e.Size, region.ErrOutOfRange)
	}
	if err := module(); err != nil {
		return nil, err
	}
	s := settings{size: e.Size, block: Block(e.Size), timeout: p.Duration("nbd_timeout"), flags: e.Flags & kernelFlags}
	if redial != nil {
		s.dead = p.Duration("nbd_dead_timeout")
	}
	defer func() { closeFiles(s.sockets) }()
	for _, c := range conns {
		f, err := socketFile(c)
		if err != nil {
			return nil, err
		}
		s.sockets = append(s.sockets, f)
	}
	var events *uevents
	if how := p.Text("nbd_ready"); how != "poll" {
		var err error
		if events, err = listenUevents(how == "udev"); err != nil {
			return nil, err
		}
		defer events.Close()
	}

	d := &Device{index: -1, closed: make(chan struct{}), cancel: func() {}}
	var err error
	setup := p.Text("nbd_setup")
	byNetlink := setup == "netlink" || setup == "auto" && s.dead > 0
	if byNetlink {
		if err = d.byNetlink(s); setup == "auto" && errors.Is(err, errNoFamily) {
			byNetlink = false
		}
	}
	if !byNetlink {
		if err = d.byIoctl(ctx, s); setup == "auto" && errors.Is(err, errAllInUse) {
			if e := d.byNetlink(s); !errors.Is(e, errNoFamily) { // the kernel makes another one
				byNetlink, err = true, e
			}
		}
	}
	if err != nil {
		return nil, err
	}
	err = d.ready(ctx, s, events)
	if err == nil && d.node == nil {
		d.node, err = os.OpenFile(d.Path(), os.O_RDONLY|syscall.O_CLOEXEC, 0)
	}
	if err == nil && byNetlink {
		err = d.letGoOnClose()
	}
	if err == nil && p.IsSet("read_ahead") { // else what the kernel derived from the queue's limits
		sectors := (p.Size("read_ahead") + 511) / 512
		err = blockIoctl(int(d.node.Fd()), unix.BLKRASET, uintptr(sectors))
	}
	if err == nil {
		err = d.tune(p)
	}
	if err == nil && byNetlink {
		if err = d.supervise(s.sockets, e, redial, s); err == nil {
			s.sockets = nil // the supervisor's now
		}
	}
	if err != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		err = errors.Join(fmt.Errorf("attach %s: %w", d.Path(), err), d.detachOnce(ctx))
		if d.node != nil {
			_ = d.node.Close()
		}
		return nil, errors.Join(err, d.idle(ctx))
	}
	d.before = d.kernelStats()
	closeAll(conns)
	return d, nil
}

// detachOnce detaches the device, also where nothing is to be saved.
func (d *Device) detachOnce(ctx context.Context) error {
	d.detached.Do(func() { d.detachErr = d.detach(ctx) })
	return d.detachErr
}

// Path is the block device.
func (d *Device) Path() string { return "/dev/nbd" + strconv.Itoa(d.index) }

func (d *Device) sysfs(name string) string {
	return filepath.Join("/sys/block", "nbd"+strconv.Itoa(d.index), name)
}

// kernelStats reads the counters. Source: Documentation/block/stat.rst.
func (d *Device) kernelStats() (s Stats) {
	b, err := os.ReadFile(d.sysfs("stat"))
	if err != nil {
		return s
	}
	var f [17]int64
	for i, v := range strings.Fields(string(b)) {
		if i < len(f) {
			f[i], _ = strconv.ParseInt(v, 10, 64)
		}
	}
	return Stats{ReadRequests: f[0], ReadBytes: f[2] * 512, WriteRequests: f[4], WriteBytes: f[6] * 512, Flushes: f[15]}
}

// Stats counts the device's requests since it was opened; after Close, until then.
func (d *Device) Stats() Stats {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.done {
		return d.last
	}
	return d.stats()
}

func (d *Device) stats() Stats {
	now := d.kernelStats()
	s := Stats{
		ReadRequests: now.ReadRequests - d.before.ReadRequests, ReadBytes: now.ReadBytes - d.before.ReadBytes,
		WriteRequests: now.WriteRequests - d.before.WriteRequests, WriteBytes: now.WriteBytes - d.before.WriteBytes,
		Flushes: now.Flushes - d.before.Flushes,
	}
	if d.store != nil {
		s.Errors = d.store.errors.Load()
	}
	return s
}

// Err is what the workload may have seen as EIO: the store's latest error or,
// after Connect, the latest trouble with a connection; nil where there was none.
func (d *Device) Err() error {
	if d.store != nil {
		if e := d.store.last.Load(); e != nil {
			return *e
		}
	}
	if e := d.lost.Load(); e != nil {
		return *e
	}
	return nil
}

// writeBack is fsync, but asks the server to flush only if it was given anything.
// A fresh descriptor reports the errors of write-back that nobody was told of
// (mm/filemap.c, errseq_t); ours would repeat those that the workload has seen.
func (d *Device) writeBack() error {
	f, err := os.Open(d.Path())
	if err != nil {
		return err
	}
	defer f.Close()
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var sync error
	err = c.Control(func(fd uintptr) {
		sync = unix.SyncFileRange(int(fd), 0, 0, unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER)
	})
	if err := errors.Join(err, sync); err != nil || d.stats().WriteRequests == 0 {
		return err
	}
	return f.Sync()
}

// Flush writes the page cache back and flushes the store, by fsync of the device.
// When ctx ends first, it returns and the kernel goes on.
func (d *Device) Flush(ctx context.Context) error {
	select {
	case <-d.closed:
		return fmt.Errorf("write %s back: %w", d.Path(), region.ErrClosed)
	default:
	}
	written := make(chan error, 1)
	go func() { written <- d.writeBack() }()
	select {
	case err := <-written:
		if err != nil {
			return fmt.Errorf("write %s back: %w", d.Path(), err)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("write %s back: %w", d.Path(), context.Cause(ctx))
	}
}

// Close writes the page cache back, detaches the device and joins all goroutines.
// When ctx ends first, it detaches at once: what was not written back is lost, and
// the error says so. It may be called twice and returns the first error.
func (d *Device) Close(ctx context.Context) error {
	d.closing.Do(func() {
		defer close(d.closed)
		d.closeErr = d.close(ctx)
	})
	<-d.closed
	return d.closeErr
}

func (d *Device) close(ctx context.Context) error {
	written := make(chan error, 1)
	go func() { written <- d.writeBack() }()
	var err error
	select {
	case err = <-written:
		written = nil
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err != nil {
		err = fmt.Errorf("write %s back: %w", d.Path(), errors.Join(err, d.Err()))
	}
	if d.stop != nil {
		d.stop()
	}
	d.mu.Lock()
	d.last, d.done = d.stats(), true
	d.mu.Unlock()
	// Detaching must not be cut short: the device would stay.
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	err = errors.Join(err, d.detachOnce(last))
	if written != nil {
		<-written // fails now, with the requests it waits for
	}
	err = errors.Join(err, d.node.Close(), d.idle(last))
	d.cancel()
	d.served.Wait()
	return err
}

// module tells whether the driver is there.
func module() error {
	b, err := os.ReadFile("/proc/devices")
	if err != nil {
		return fmt.Errorf("look for the nbd driver: %w", err)
	}
	if !bytes.Contains(b, []byte(" nbd\n")) {
		return fmt.Errorf("the kernel has no nbd driver loaded (modprobe nbd, or the lab kernel: memsync lab): %w", region.ErrNotSupported)
	}
	return nil
}

// Probe tells whether a device can be attached: nil; region.ErrNotSupported
// where the driver is not loaded; another error where it could not tell. It
// opens a device and attaches nothing. The error names the remedy.
func Probe() error {
	if err := module(); err != nil {
		return err
	}
	if _, err := family(); err == nil && unix.Geteuid() == 0 {
		return nil // the kernel makes another device where all are in use
	}
	_, node, err := free()
	if err != nil {
		return err
	}
	return node.Close()
}

// Sectors rounds a store up to whole sectors of 512 bytes, for a server whose
// export becomes a block device: the bytes beyond the store read as zeroes and do
// not keep what is written.
func Sectors(s region.Store) region.Store { return newCounted(s, false) }

// counted is the store as the device serves it: whole sectors, errors counted.
type counted struct {
	region.Store
	size     int64 // of the store
	readOnly bool
	errors   atomic.Int64
	last     atomic.Pointer[error]
}

func newCounted(s region.Store, readOnly bool) *counted {
	return &counted{Store: s, size: s.Size(), readOnly: readOnly}
}

func (c *counted) note(err error) error {
	if err != nil {
		c.errors.Add(1)
		c.last.Store(&err)
	}
	return err
}

func (c *counted) Size() int64 { return region.RoundUp(c.size, 512) }

// inside is how much of n bytes at off the store has.
func (c *counted) inside(off, n int64) int64 { return max(0, min(n, c.size-off)) }

func (c *counted) ReadAt(ctx context.Context, p []byte, off int64) error {
	n := c.inside(off, int64(len(p)))
	clear(p[n:])
	if n == 0 {
		return nil
	}
	return c.note(c.Store.ReadAt(ctx, p[:n], off))
}

func (c *counted) WriteAt(ctx context.Context, p []byte, off int64) error {
	if c.readOnly {
		return c.note(region.ErrReadOnly)
	}
	n := c.inside(off, int64(len(p)))
	if n == 0 {
		return nil
	}
	return c.note(c.Store.WriteAt(ctx, p[:n], off))
}

func (c *counted) Flush(ctx context.Context) error { return c.note(c.Store.Flush(ctx)) }

func (c *counted) View(off, n int64) ([]byte, bool) {
	v, ok := c.Store.(region.Viewer)
	if !ok || c.inside(off, n) != n {
		return nil, false
	}
	return v.View(off, n)
}
