// Package fuse makes one file out of a region.Store: a small FUSE server, straight
// on /dev/fuse, whose root inode is that file.
//
// The kernel's page cache lies between the workload and the store. Loads of
// pages that it lacks arrive as READ requests, enlarged by the kernel's
// read-ahead (parameter read_ahead); stores through a mapping arrive as WRITE
// requests when they are written back: by msync, fsync, munmap's last close,
// memory pressure, or about 30 s later. write(2) arrives at once, unless writeback=true.
//
// A process must never touch a file that it serves itself, neither through a
// mapping nor by read(2): the collector, or a held processor, would leave the
// request unanswered (docs/deadlocks.md).
package fuse

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/param"
	"memsync/strategies/region"
)

// Params are the device's parameters.
func Params() []param.Spec {
	return []param.Spec{
		{Name: "read_ahead", Kind: param.KindSize, Default: "", Max: 1 << 30,
			Doc: "window of the kernel's read-ahead; one random touch pulls as much, one with MADV_RANDOM a page; by default 128KiB, or 1MiB of a store in memory; above 128KiB needs root, else is 128KiB"},
		{Name: "max_read", Kind: param.KindSize, Default: "", Min: 4096, Max: 256 << 20,
			Doc: "largest read request; by default the chunk, or 512KiB of a store in memory; the kernel's limit is fs.fuse.max_pages_limit pages"},
		{Name: "max_write", Kind: param.KindSize, Default: "1MiB", Min: 4096, Max: 256 << 20,
			Doc: "largest write request; same limit"},
		{Name: "max_background", Kind: param.KindInt, Default: "64", Min: 1, Max: 65535,
			Doc: "read-ahead and write-back requests that the kernel keeps in flight"},
		{Name: "fuse_workers", Kind: param.KindInt, Default: "1", Min: 1, Max: 64,
			Doc: "readers of /dev/fuse, each with a device descriptor of its own"},
		{Name: "fuse_spin", Kind: param.KindDuration, Default: "50us", Max: int64(time.Second),
			Doc: "with a store in memory, how long a reader polls, yielding the CPU, before it sleeps"},
		{Name: "writeback", Kind: param.KindBool, Default: "false",
			Doc: "let write(2) end in the page cache too; its errors then come late, by fsync"},
		{Name: "request_timeout", Kind: param.KindDuration, Default: "30s",
			Doc: "a request that the store does not answer by then fails with EIO; 0 is never"},
	}
}

// Options say how to serve a file.
type Options struct {
	Dir  string // an existing folder, in which the mount point is made; absolute
	Name string // of the file in it; empty is "region"
	// Chunk is the largest read request in bytes, where Params do not set
	// max_read. 0 leaves it to the device: 128 KiB, or 512 KiB where the store is
	// a region.Viewer, whose reads cost no round trip.
	Chunk    int64
	ReadOnly bool
	// Mode has the file's permission bits, judged by the kernel, without x bits not even root executes it; the owner is who
	// mounts. 0 is 0600. ReadOnly takes the bits for writing away.
	Mode   os.FileMode
	Params param.Values // of Params; the zero value means the defaults
}

// Stats counts requests since Open. Bytes are those moved without an error.
type Stats struct {
	ReadRequests, ReadBytes   int64
	WriteRequests, WriteBytes int64
	Flushes                   int64
	Interrupts                int64 // signals that reached a waiting thread of the workload
	Errors                    int64 // requests that the store failed
}

// Device is a mounted file. All methods may be called concurrently.
type Device struct {
	store       region.Store
	viewer      region.Viewer // nil where the store has no views
	size        int64
	readOnly    bool
	timeout     time.Duration
	path        string
	minor       int // of the mount's device number
	attr        attr
	want        initOut
	requestSize int64 // of the largest request, a WRITE, in bytes

	ctx     context.Context // ends when requests shall fail
	cancel  context.CancelFunc
	ports   []*port
	spin    time.Duration // how long a reading thread polls before it sleeps
	stop    *os.File      // an eventfd that ends reading threads
	bufs    pool
	loops   sync.WaitGroup
	workers sync.WaitGroup
	jobs    chan func()   // to an idle worker
	quit    chan struct{} // closed when the loops have ended
	done    chan struct{} // closed when the workers have ended too
	ready   chan error    // result of FUSE_INIT

	inflight inflight
	counters struct {
		reads, readBytes, writes, writeBytes, flushes, interrupts, errors atomic.Int64
	}
	lastErr atomic.Pointer[error]

	closing  sync.Once
	closed   chan struct{}
	closeErr error
}

// Open mounts store as the file Path, of exactly store.Size() bytes, and serves
// it until Close. The store must have at least one byte; it is not closed by
// the device. ctx bounds only the opening. The errors wrap region.ErrNotSupported
// or region.ErrNotPermitted where the kernel lacks FUSE or refuses. Linux 5.4.
func Open(ctx context.Context, store region.Store, o Options) (*Device, error) {
	if !o.Params.Has("read_ahead") {
		var err error
		if o.Params, err = param.New(Params(), nil); err != nil {
			return nil, err
		}
	}
	if store.Size() < 1 {
		return nil, fmt.Errorf("serve a region of %d bytes through FUSE: %w", store.Size(), region.ErrOutOfRange)
	}
	if o.Name == "" {
		o.Name = "region"
	}
	dir, err := filepath.EvalSymlinks(o.Dir) // mountinfo has resolved paths
	if err != nil {
		return nil, fmt.Errorf("serve through FUSE: folder of the mount point: %w", err)
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	limit := maxPagesLimit()
	page := region.PageSize()
	pages := func(n int64) int64 { return max(1, min(n/page, limit)) }
	viewer, _ := store.(region.Viewer)
	readAhead, request := int64(kernelReadAhead), int64(128<<10)
	if viewer != nil && o.Chunk == 0 {
		readAhead, request = 1<<20, 512<<10 // no round trip to keep small
	}
	if o.Params.IsSet("read_ahead") {
		readAhead = o.Params.Size("read_ahead")
	}
	readPages := pages(cmp.Or(o.Params.Size("max_read"), o.Chunk, request))
	writePages := pages(o.Params.Size("max_write"))
	background := o.Params.Int("max_background")
	d := &Device{
		store: store, viewer: viewer, size: store.Size(), readOnly: o.ReadOnly,
		timeout: o.Params.Duration("request_timeout"), spin: o.Params.Duration("fuse_spin"),
		path: filepath.Join(dir, o.Name),
		attr: attr{size: store.Size(), mode: unix.S_IFREG | uint32(cmp.Or(o.Mode.Perm(), 0o600)), uid: uint32(os.Geteuid()),
			gid: uint32(os.Getegid()), time: time.Now().Unix()},
		want: initOut{
			maxReadahead: uint32(min(readAhead, math.MaxUint32)),
			// No FUSE_ASYNC_DIO: with it a thread in an O_DIRECT read cannot be
			// killed, nor sends an INTERRUPT (fs/fuse/file.c, fuse_direct_IO).
			flags:    flagAsyncRead | flagBigWrites | flagMaxPages | flagExplicitInval,
			maxWrite: uint32(writePages * page),
			maxPages: uint16(max(readPages, writePages)),
			// Not congested before the queue is full: the kernel skips
			// read-ahead when it is.
			maxBackground: uint16(background), congestion: uint16(background),
		},
		jobs: make(chan func()), quit: make(chan struct{}),
		done: make(chan struct{}), ready: make(chan error, 1), closed: make(chan struct{}),
	}
	if o.ReadOnly {
		d.attr.mode &^= 0o222
	}
	if o.Params.Bool("writeback") && !o.ReadOnly {
		d.want.flags |= flagWritebackCache
	}
	d.requestSize = max(8192, inHeaderSize+rwInSize+writePages*page)
	d.bufs.keep = background
	if viewer == nil { // the first touches of a page-in are of the buffers of a window
		d.bufs.warm(readPages*page, int(max(1, min(kernelReadAhead/(readPages*page), 8))))
	}
	d.ctx, d.cancel = context.WithCancel(context.WithoutCancel(ctx))
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		d.bufs.close()
		return nil, fmt.Errorf("serve through FUSE: eventfd: %w", err)
	}
	d.stop = os.NewFile(uintptr(stop), "eventfd")
	if err := d.start(ctx, o, readPages*page); err != nil {
		d.cancel()
		_ = d.stop.Close()
		d.bufs.close()
		return nil, err
	}
	return d, nil
}

func (d *Device) start(ctx context.Context, o Options, maxRead int64) (err error) {
	f, err := os.OpenFile(d.path, os.O_CREATE|os.O_EXCL|os.O_RDONLY|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("make the FUSE mount point: %w", err)
	}
	f.Close()
	defer func() {
		if err != nil {
			_ = os.Remove(d.path)
		}
	}()
	fd, err := openDevice()
	if err != nil {
		return err
	}
	if err := mountFile(fd, d.path, d.readOnly, d.attr.mode, maxRead); err != nil {
		_ = unix.Close(fd)
		return err
	}
	// Only now: epoll learns nothing of a descriptor that was added before it
	// had a connection (fs/fuse/dev.c, fuse_dev_poll).
	first, err := newPort(fd)
	if err != nil {
		return errors.Join(err, unix.Unmount(d.path, unix.MNT_FORCE|unix.MNT_DETACH))
	}
	d.ports = []*port{first}
	d.serve(first)
	go func() {
		d.loops.Wait()
		close(d.quit)
		d.workers.Wait()
		close(d.done)
	}()
	if err = d.handshake(ctx, o); err != nil {
		_ = d.Close(ctx)
	}
	return err
}

// handshake waits for FUSE_INIT and finishes what can only be done after it.
func (d *Device) handshake(ctx context.Context, o Options) (err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	select {
	case err = <-d.ready:
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("FUSE_INIT on %s: %w", d.path, err)
	}
	if d.minor, err = deviceOf(d.path); err != nil {
		return err
	}
	if err := d.setReadAhead(o, int64(d.want.maxReadahead)); err != nil {
		return err
	}
	if d.want.flags&flagWritebackCache != 0 {
		// With it the kernel never takes a size from us, and a root inode
		// begins with 0 (fs/fuse/inode.c, fuse_get_cache_mask), but it believes
		// the answer to a truncate. This thread waits in the kernel, without a
		// page or a lock that the answer needs.
		if err := unix.Truncate(d.path, d.size); err != nil {
			return fmt.Errorf("tell the kernel the size of %s: %w", d.path, err)
		}
	}
	for len(d.ports) < o.Params.Int("fuse_workers") {
		p, err := d.ports[0].clone()
		if err != nil {
			return fmt.Errorf("clone the FUSE device: %w", err)
		}
		d.ports = append(d.ports, p)
		d.serve(p)
	}
	return nil
}

// setReadAhead sets the window of files opened from now on. The reply to
// FUSE_INIT can only make it smaller than the kernel's 128 KiB; larger ones go
// through the backing device's attribute, which only root may write. Where that
// fails the default stays, unless the user asked for the size.
func (d *Device) setReadAhead(o Options, want int64) error {
	if want <= int64(kernelReadAhead) {
		return nil
	}
	err := os.WriteFile(bdiPath(d.minor), []byte(strconv.FormatInt(want>>10, 10)), 0)
	if err != nil && o.Params.IsSet("read_ahead") {
		return fmt.Errorf("set read_ahead=%s: %w (needs root and a writable /sys; at most 128KiB works without): %w",
			region.FormatSize(want), err, region.ErrNotPermitted)
	}
	return nil
}

const kernelReadAhead = 128 << 10 // VM_READAHEAD_PAGES, mm/readahead.c

// Path returns the file to open and map. It may be mapped shared, read and
// written; it cannot be truncated or extended.
func (d *Device) Path() string { return d.path }

// Stats returns the counters.
func (d *Device) Stats() Stats {
	c := &d.counters
	return Stats{c.reads.Load(), c.readBytes.Load(), c.writes.Load(), c.writeBytes.Load(),
		c.flushes.Load(), c.interrupts.Load(), c.errors.Load()}
}

// Err returns the store's latest error that the workload saw as EIO (SIGBUS in
// a mapping), or nil.
func (d *Device) Err() error {
	if e := d.lastErr.Load(); e != nil {
		return *e
	}
	return nil
}

// Store puts p at off into the kernel's page cache, as if the workload had read
// it, so that its loads find the bytes there. Whole pages only, but at the
// region's end; a dirty page would lose the workload's stores. It blocks while
// the kernel holds one of the pages for a READ that is under way, so it must not
// be called from the store's ReadAt. Source: FUSE_NOTIFY_STORE, Linux 2.6.36.
func (d *Device) Store(off int64, p []byte) error {
	if err := region.CheckRange(off, int64(len(p)), d.size); err != nil {
		return err
	}
	b := make([]byte, 24)
	le.PutUint64(b, rootID)
	le.PutUint64(b[8:], uint64(off))
	le.PutUint32(b[16:], uint32(len(p)))
	if err := d.ports[0].notify(notifyStore, b, p); err != nil {
		return fmt.Errorf("store %d bytes at %d in the page cache: %w", len(p), off, err)
	}
	return nil
}

// Invalidate drops [off, off+n) from the kernel's page cache, after writing
// dirty pages of it back, and from all mappings, so that the next load asks the
// store again. It blocks for those WRITEs and must not be called from the store.
// Source: FUSE_NOTIFY_INVAL_INODE, Linux 2.6.31.
func (d *Device) Invalidate(off, n int64) error {
	if err := region.CheckRange(off, n, d.size); err != nil || n == 0 {
		return err
	}
	b := make([]byte, 24)
	le.PutUint64(b, rootID)
	le.PutUint64(b[8:], uint64(off))
	le.PutUint64(b[16:], uint64(n))
	if err := d.ports[0].notify(notifyInvalInode, b, nil); err != nil {
		return fmt.Errorf("invalidate %d bytes at %d in the page cache: %w", n, off, err)
	}
	return nil
}

// Close writes dirty pages back, unmounts, removes the mount point and joins all
// goroutines. The workload should have let go: while it has the file open, Close
// waits up to 500 ms, then cuts the connection, after which the workload's
// accesses fail (SIGBUS in a mapping), and returns an error. When ctx ends, requests
// under way and later ones fail with EIO. It may be called twice and returns the first error.
func (d *Device) Close(ctx context.Context) error {
	d.closing.Do(func() {
		defer close(d.closed)
		d.closeErr = d.close(ctx)
	})
	<-d.closed
	return d.closeErr
}

func (d *Device) close(ctx context.Context) error {
	const (
		busy  = 500 * time.Millisecond // for the workload to let go
		grace = 2 * time.Second        // for what only the kernel can delay
	)
	stop := context.AfterFunc(ctx, d.cancel) // the store gives up; the kernel gets EIO
	defer stop()
	defer d.cancel()
	result := make(chan error, 1)
	go func() { result <- unmount(ctx, d.path, busy) }() // blocks for write-back, which we serve meanwhile
	var err error
	select {
	case err = <-result:
	case <-d.ctx.Done():
		select {
		case err = <-result:
		case <-time.After(grace):
			err = fmt.Errorf("unmount %s: still blocked %v after %w", d.path, grace, ctx.Err())
		}
	}
	// The kernel ends the connection with the last mount. Another mount namespace
	// may hold a copy, so do not count on it: it ends with our last descriptor too.
	// (Never abort it by its number, through fusectl: once unmounted, the number
	// may be another mount's.)
	select {
	case <-d.done:
	case <-time.After(busy):
	}
	d.cancel()
	_, _ = d.stop.Write([]byte{1, 0, 0, 0, 0, 0, 0, 0}) // an eventfd takes 8 bytes
	for _, p := range d.ports {
		p.close() // wakes the loops, and with the last one the kernel aborts too
	}
	select {
	case <-d.done:
		_ = d.stop.Close()
	case <-time.After(grace):
		err = errors.Join(err, fmt.Errorf("close %s: requests are still in the store after %v", d.path, grace))
	}
	d.bufs.close()
	if rerr := os.Remove(d.path); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
		err = errors.Join(err, fmt.Errorf("remove the FUSE mount point: %w", rerr))
	}
	return err
}
