// Package managed is the strategy managed-mount: a local device in front of a
// local cache, which is pulled and pushed in the background.
package managed

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"memsync/strategies"
	"memsync/strategies/backend"
	"memsync/strategies/chunk"
	"memsync/strategies/device"
	"memsync/strategies/device/uffd"
	"memsync/strategies/order"
	"memsync/strategies/order/format"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/transport"
	"memsync/strategies/watch"
)

// Strategy is managed-mount.
type Strategy struct{}

var (
	_ strategies.Strategy    = Strategy{}
	_ strategies.FaultServer = (*mount)(nil)
)

// syncWorkers is how many pushes Sync and Close have in flight at least: 8 MiB
// of the default extents, which fills 1 Gbit/s at 64 ms.
const syncWorkers = 16

// minCacheChunks is the smallest cache: a few requests of a few chunks at once.
const minCacheChunks = 16

// closeTimeout bounds a Close whose context has no deadline.
const closeTimeout = time.Minute

func params() []param.Spec {
	return []param.Spec{
		{Name: "order", Kind: param.KindString, Default: "linear", Check: order.Check, Doc: "order of background pulls: " + strings.Join(order.Names(), ", ") + " (docs/pull-order.md)"},
		{Name: "order_seed", Kind: param.KindInt, Default: "1", Doc: "of order=random"},
		{Name: "pull_first", Kind: param.KindSize, Default: "128KiB", Doc: "bytes at the region's start that are pulled first, and local once the mount is open; on device nbd by default at least the read-ahead window, up to 256KiB"},
		{Name: "pull_during_open", Kind: param.KindBool, Default: "true", Doc: "background pulls start while the device is being opened; false: once it is open"},
		{Name: "known", Kind: param.KindEnum, Default: "holes", Values: []string{"none", "holes", "same"}, Doc: "what need not cross the wire: holes by block status; same: also chunks whose digest is that of one in the cache"},
		{Name: "record", Kind: param.KindString, Doc: "file that gets the trace of what the device asked for when the mount is closed, for order=trace:FILE"},
		{Name: "extent", Kind: param.KindSize, Default: "512KiB", Min: 4096, Max: 32 << 20, Doc: "most bytes in one request, pull or push"},
		{Name: "window", Kind: param.KindSize, Default: "0", Max: 1 << 30, Doc: "bytes of background pulls in flight; at least bandwidth x RTT fills the link; 0 is pull workers x extent, within a window of the transport that follows the path"},
		{Name: "push_interval", Kind: param.KindDuration, Default: "1s", Min: int64(time.Millisecond), Max: int64(time.Hour), Doc: "pause between background pushes"},
		{Name: "dirty_limit", Kind: param.KindSize, Default: "256MiB", Doc: "bytes that may wait to be pushed before a writer has to; 0 is any"},
		{Name: "cache", Kind: param.KindSize, Default: "0", Doc: "most bytes that the local cache holds; what was not used for long makes room, what is dirty is pushed first; 0 is the region, else at least 16 chunks"},
		{Name: "cache_kind", Kind: param.KindEnum, Default: "auto", Values: []string{"auto", "memory", "memfd", "file"},
			Doc: "where local chunks are kept; auto is memory, and memfd where the kernel makes no huge pages: there the first touch of each page would be a fault"},
		{Name: "cache_dir", Kind: param.KindString, Doc: "existing folder for the cache and a journal of what waits to be pushed, which the next mount with the same folder pushes if this one is killed; by default nothing outlives the mount"},
		{Name: "recover", Kind: param.KindEnum, Default: "push", Values: []string{"push", "discard"}, Doc: "what to do with what an earlier mount left in cache_dir"},
		{Name: "cache_delay", Kind: param.KindDuration, Default: "0s", Max: int64(time.Minute), Doc: "that each access of the cache takes more, to imitate a slow disk"},
		{Name: "cache_rate", Kind: param.KindSize, Default: "0", Doc: "bytes per second that the cache reads and writes at most, to imitate a slow disk; 0 is any"},
	}
}

// Info describes the strategy.
func (Strategy) Info() strategies.Info {
	devices := []string{"fuse", "nbd", "uffd", "ublk"}
	return strategies.Info{
		Name:         "managed-mount",
		Doc:          "local device on a local cache, with background pull and push",
		Capabilities: []strategies.Capability{strategies.Reads, strategies.Writes, strategies.Leases, strategies.Prefetch},
		Devices:      devices,
		Params:       slices.Concat(params(), watch.Params(true), chunk.SplitParams(), device.Params(devices...)),
		DefaultChunk: 64 << 10,
		PullWorkers:  16, // x extent is the window
		PushWorkers:  4,
		Consistency: "One writing host at a time, by a lease that the source grants with an epoch; a second one is refused, and one that comes back after another refuses to go on. " +
			"Foreign servers grant no lease: one writer is the user's to ensure there. Readers, any number, mount read-only. " +
			"Each chunk is read from the source once, and again only after it left a cache smaller than the region. " +
			"Readers of the device see its writers at once (one page cache, one cache). " +
			"Writes are pushed in the background, a chunk at a time and in no particular order, so that the source is consistent only after " +
			"Sync or Close: all that the workload wrote back (msync, fsync) before is at the source then. " +
			"A source that another changes is noticed by its version, within check_interval and at Sync and Close: " +
			"then nothing more is read or pushed (on_change=fail), or what is cached is dropped (invalidate).",
	}
}

// Serve hands the connection to the transport: the source only reads and writes.
func (Strategy) Serve(ctx context.Context, t transport.Transport, conn net.Conn, e transport.Exports, _ param.Values) error {
	return t.Serve(ctx, conn, digestExports(e))
}

// digestSuffix, and the chunk's size in bytes, make the name of the export that
// has the digests of another's chunks (chunk.Digests).
const digestSuffix = ".digests-"

// digestExports offers beside each export of e the digests of its chunks.
func digestExports(e transport.Exports) transport.Exports {
	return transport.With(e, func(name string) (region.Store, error) {
		s, err := e.Open(name)
		i := strings.LastIndex(name, digestSuffix)
		if i < 0 || !errors.Is(err, region.ErrMissing) {
			return s, err
		}
		size, bad := strconv.ParseInt(name[i+len(digestSuffix):], 10, 64)
		if bad != nil || region.CheckChunk(size) != nil || size > maxDigestChunk {
			return nil, err
		}
		if s, err = e.Open(name[:i]); err != nil {
			return nil, err
		}
		return chunk.NewDigests(s, size)
	}, func(name string) string { return name })
}

// maxDigestChunk bounds the memory that a client can make a source take for a digest.
const maxDigestChunk = 64 << 20

// openDigests opens the export of the digests beside the region.
func openDigests(ctx context.Context, r strategies.Remote, size int64) (region.Store, error) {
	b, ok := r.(strategies.Beside)
	if !ok {
		return nil, fmt.Errorf("known=same needs a source across a link: %w", region.ErrNotSupported)
	}
	s, err := b.OpenBeside(ctx, digestSuffix+strconv.FormatInt(size, 10), false)
	if errors.Is(err, region.ErrMissing) {
		err = fmt.Errorf("known=same needs a source that offers digests (memsync's): %w: %w", err, region.ErrNotSupported)
	}
	return s, err
}

// Mount opens the remote region, starts to pull it, and opens a device on the
// cache. The remote region is opened again when its connection is lost.
func (Strategy) Mount(ctx context.Context, r strategies.Remote, o strategies.Options) (_ strategies.Mount, err error) {
	p := o.Params
	if err := region.CheckChunk(o.Chunk); err != nil {
		return nil, err
	}
	m := &mount{readOnly: o.ReadOnly, closed: make(chan struct{})}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close(ctx))
		}
	}()
	background, stop := context.WithCancel(region.WithClass(context.WithoutCancel(ctx), region.Prefetch))
	m.stopPulling = stop
	var opening errgroup.Group
	if b, ok := r.(strategies.Beside); ok {
		opening.Go(func() (err error) {
			m.watch, err = watch.Open(ctx, b.OpenBeside, p)
			return err
		})
	}
	if p.Text("known") == "same" {
		opening.Go(func() (err error) {
			m.digests, err = openDigests(ctx, r, o.Chunk)
			return err
		})
	}
	m.remote, err = chunk.OpenAgain(ctx, r.Open, func() { m.pusher.Lost() })
	if err = errors.Join(err, opening.Wait()); err != nil {
		return nil, fmt.Errorf("open the remote region: %w", err)
	}
	size := m.remote.Size()
	limit, err := cacheLimit(o, size)
	if err != nil {
		return nil, err
	}
	if m.cache, err = m.openCache(o, size, limit); err != nil {
		return nil, err
	}
	if delay, rate := p.Duration("cache_delay"), p.Size("cache_rate"); delay > 0 || rate > 0 {
		m.cache = &backend.Slow{Store: m.cache, Delay: delay, Rate: rate}
	}
	extent, window := max(p.Size("extent"), o.Chunk), p.Size("window")
	var remote region.Store = m.remote
	if p.Text("known") != "none" {
		if m.known, err = chunk.NewKnown(m.remote, m.cache, o.Chunk); err != nil {
			return nil, err
		}
		remote = m.known
	}
	remote = m.watch.Wrap(remote)
	syncer, err := chunk.NewSyncer(remote, m.cache, o.Chunk, extent)
	if err != nil {
		return nil, err
	}
	if limit > 0 {
		if err := syncer.Bound(limit); err != nil {
			return nil, err
		}
	}
	m.syncer = syncer
	follow := watch.Options{Epoch: m.remote.Epoch}
	if p.Text("on_change") == watch.Invalidate {
		follow.Invalidate = func(ctx context.Context) error {
			if m.known != nil {
				m.known.Forget()
			}
			return syncer.Invalidate(ctx)
		}
	}
	if m.journal != nil {
		if m.recovered, err = syncer.Recover(m.journal); err != nil {
			return nil, fmt.Errorf("recover the cache in %s: %w", p.Text("cache_dir"), err)
		}
		if m.recovered > 0 && o.ReadOnly {
			return nil, fmt.Errorf("%d bytes in %s wait to be pushed, and this mount is read-only: %w", m.recovered, p.Text("cache_dir"), region.ErrReadOnly)
		}
		if err := m.compare(ctx, &follow, p); err != nil {
			return nil, fmt.Errorf("recover the cache in %s: %w", p.Text("cache_dir"), err)
		}
	}
	m.pusher = chunk.StartPusher(syncer, chunk.PushOptions{
		Workers: o.PushWorkers, Interval: p.Duration("push_interval"), DirtyLimit: p.Size("dirty_limit"),
		SyncWorkers: max(syncWorkers, o.PushWorkers),
	})
	// Only from here on may the remote region be read: opening it again needs the pusher.
	m.watch.Start(follow)
	if m.known != nil {
		// What is not learnt crosses the wire, so that an error is no reason to fail.
		learn := func(f func() error) {
			m.learning.Go(func() {
				if m.watch.Ready(background) == nil {
					_ = f()
				}
			})
		}
		learn(func() error { return m.known.Holes(background, m.remote) })
		if m.digests != nil {
			learn(func() error { return m.known.Same(background, m.digests) })
		}
	}
	var wanted order.Order
	if name := p.Text("order"); name == order.FormatName {
		wanted = format.Order(background, m.pusher)
	} else if wanted, err = order.Parse(name, size, uint64(p.Int("order_seed"))); err != nil {
		return nil, err
	}
	first := min(pullFirst(o), size)
	pull := func() {
		m.puller = chunk.StartPuller(syncer, chunk.PullOptions{
			Workers: o.PullWorkers, Window: window, Order: order.Then(order.First(first), wanted),
		})
	}
	var front region.Store = m.pusher
	var owner uffd.Owner = m.pusher
	if name := p.Text("record"); name != "" {
		m.record, m.recorder = name, order.NewRecorder(m.pusher)
		front, owner = m.recorder, recordedOwner{m.pusher, m.recorder}
	}
	if limit > 0 {
		front = struct{ region.Store }{front} // it has no views: the device need not look for them
	}
	if m.memory != nil {
		m.memory.Own(owner)
	}
	if p.Bool("pull_during_open") {
		pull()
	}
	g, gctx := errgroup.WithContext(ctx)
	if m.journal != nil {
		g.Go(func() error { return m.watch.Ready(gctx) }) // it is in the journal before the first mark
	}
	g.Go(func() error {
		if err := m.pusher.Pull(region.WithClass(gctx, region.Prefetch), 0, first); err != nil {
			return fmt.Errorf("pull the first %d bytes: %w", first, err)
		}
		return nil
	})
	g.Go(func() (err error) {
		if m.memory != nil {
			m.dev = device.OfMemory(m.memory)
			return nil
		}
		m.dev, err = device.Open(gctx, o.Device, front, device.Options{Dir: o.Dir, File: o.File, Mode: o.Mode, Chunk: o.Chunk, ReadOnly: o.ReadOnly, Front: o.Front, Params: p})
		return err
	})
	if err = g.Wait(); err != nil {
		return nil, err
	}
	if m.puller == nil {
		pull()
	}
	if c, ok := m.dev.(device.Cacher); ok {
		syncer.OnDrop(c.Invalidate)
	} else if follow.Invalidate != nil && m.memory == nil {
		return nil, fmt.Errorf("on_change=invalidate with device %s, whose page cache is the kernel's to drop: %w", o.Device, region.ErrNotSupported)
	}
	m.preemptive = m.pusher.LocalBytes()
	return m, nil
}

// pullFirst is the parameter, by default at least the window of read-ahead around a
// first touch of an nbd device, which is there only when all of it is.
func pullFirst(o strategies.Options) int64 {
	first := o.Params.Size("pull_first")
	if o.Device != "nbd" || o.Params.IsSet("pull_first") {
		return first
	}
	const window = 256 << 10 // the kernel's: twice its io_opt for nbd. More would make opening slow
	if o.Params.IsSet("read_ahead") {
		return max(first, min(o.Params.Size("read_ahead"), window))
	}
	return max(first, window)
}

// compare refuses to push what an earlier mount left onto a source that another
// changed since, and has the journal say what this mount's marks belong to.
func (m *mount) compare(ctx context.Context, follow *watch.Options, p param.Values) error {
	left := m.journal.Origin()
	if m.recovered == 0 {
		left = nil
	}
	if m.watch == nil {
		if left != nil && p.Text("on_change") != watch.Ignore {
			return fmt.Errorf("%d bytes wait to be pushed, and the source does not tell any more whether it is what it was; recover=discard forgets them: %w", m.recovered, region.ErrMismatch)
		}
		return nil
	}
	follow.Noted = func(v region.Version) error {
		return m.journal.SetOrigin(chunk.Origin{Version: v, Epoch: follow.Epoch()})
	}
	if left == nil {
		return nil
	}
	// First what this mount is to be compared by, then what the earlier one was: no change falls between the two.
	base, err := m.watch.At(ctx, follow.Epoch())
	if err != nil {
		return err
	}
	now, err := m.watch.At(ctx, left.Epoch)
	if err != nil {
		return err
	}
	if !left.Version.Same(now) {
		return fmt.Errorf("%d bytes wait to be pushed, and another changed the source since, or it was started anew after it was written; recover=discard forgets them: %w", m.recovered, region.ErrMismatch)
	}
	follow.Base = &base
	return follow.Noted(base)
}

// recordedOwner notes the faults that had to wait for their bytes.
type recordedOwner struct {
	uffd.Owner
	recorder *order.Recorder
}

func (o recordedOwner) Pull(ctx context.Context, off, n int64) error {
	o.recorder.Note(off, n)
	return o.Owner.Pull(ctx, off, n)
}

// cacheLimit returns how many bytes the cache may hold; 0 is all, which never go.
func cacheLimit(o strategies.Options, size int64) (int64, error) {
	limit := o.Params.Size("cache")
	switch {
	case limit == 0 || limit >= size:
		if o.Params.Text("on_change") == watch.Invalidate {
			return size, nil
		}
		return 0, nil
	case limit < minCacheChunks*o.Chunk:
		return 0, fmt.Errorf("cache of %d bytes: want at least %d chunks of %d bytes, or 0 for all of the region: %w", limit, minCacheChunks, o.Chunk, region.ErrOutOfRange)
	}
	return limit, nil
}

// openCache makes the cache, for limit bytes of the region where that is not 0. With device uffd it is what the workload maps.
func (m *mount) openCache(o strategies.Options, size, limit int64) (region.Store, error) {
	kind := o.Params.Text("cache_kind")
	switch {
	case o.Device == "uffd" && o.Params.Text("cache_dir") != "":
		return nil, fmt.Errorf("cache_dir with device uffd, whose stores no file sees: %w", region.ErrNotSupported)
	case o.Device == "uffd" && kind != "auto" && kind != "memory":
		return nil, fmt.Errorf("cache_kind=%s with device uffd, whose cache is the memory that the workload maps: %w", kind, region.ErrNotSupported)
	case o.Device == "uffd":
		memory, err := uffd.NewMemory(size, uffd.MemoryOptions{Chunk: o.Chunk, ReadOnly: o.ReadOnly, Evicts: limit > 0, Params: o.Params})
		if err != nil {
			return nil, err
		}
		m.memory = memory
		return memory, nil
	case o.Params.Text("cache_dir") != "":
		return m.openKept(o, size)
	case kind == "file":
		f, err := chunk.NewFile(o.Dir, size)
		if err != nil {
			return nil, err
		}
		return f, nil
	case kind == "memfd" || kind == "auto" && limit == 0 && !chunk.HugePages():
		f, err := chunk.NewMemfd(size)
		if err != nil {
			return nil, err
		}
		return f, nil
	}
	if limit > 0 {
		slots, err := chunk.NewSlots(size, o.Chunk, region.RoundUp(limit, o.Chunk))
		if err != nil {
			return nil, err
		}
		return slots, nil
	}
	mem, err := chunk.NewMemory(size)
	if err != nil {
		return nil, err
	}
	return mem, nil
}

// openKept opens the cache that outlives the mount, and its journal.
func (m *mount) openKept(o strategies.Options, size int64) (region.Store, error) {
	dir := o.Params.Text("cache_dir")
	journal, err := chunk.OpenJournal(dir, size, o.Chunk, o.Params.Text("recover") == "discard")
	if err != nil {
		return nil, err
	}
	m.journal = journal
	f, err := chunk.OpenFile(dir, size)
	if err != nil {
		return nil, err
	}
	m.kept = f
	return f, nil
}

type mount struct {
	journal     *chunk.Journal // with cache_dir; else nil
	kept        *chunk.File    // the same
	recovered   int64          // bytes that an earlier mount left
	remote      *chunk.Reopen
	cache       region.Store
	syncer      *chunk.Syncer
	pusher      *chunk.Pusher // with the syncer in it
	puller      *chunk.Puller
	dev         device.Device
	memory      *uffd.Memory // cache and dev, with device uffd; else nil
	record      string       // where the trace goes; empty: there is none
	recorder    *order.Recorder
	readOnly    bool
	preemptive  int64
	stopPulling func() // ends what an order still reads, and learning

	watch    *watch.Watch // nil: the source has no version, or nobody asks
	known    *chunk.Known // nil: nothing is known beforehand
	digests  region.Store // of the source's chunks; nil where they are not used
	learning sync.WaitGroup

	closing  sync.Once
	closed   chan struct{}
	closeErr error
}

func (m *mount) Attachment() strategies.Attachment {
	if m.memory != nil {
		f := &strategies.Fault{Memory: "shared", PageSize: region.PageSize(), Missing: true, Minor: true, WriteProtect: !m.readOnly}
		return strategies.Attachment{Kind: strategies.AttachFault, File: m.memory.File(), Size: m.remote.Size(), ReadOnly: m.readOnly, Fault: f}
	}
	return strategies.Attachment{Kind: strategies.AttachPath, Path: m.dev.Path(), Size: m.remote.Size(), ReadOnly: m.readOnly}
}

// ServeFaults implements strategies.FaultServer, for device uffd.
func (m *mount) ServeFaults(f *os.File, base uintptr) error {
	if m.memory == nil {
		return errors.Join(fmt.Errorf("this device serves no faults: %w", region.ErrNotSupported), f.Close())
	}
	return m.memory.ServeFaults(f, base)
}

// Sync pushes what is dirty and flushes the source. It does not write the page
// cache back: that would be an fsync of our own mount. The workload does it first.
// Nothing is pushed onto a source that another changed.
func (m *mount) Sync(ctx context.Context) error {
	if err := m.watch.Check(ctx); err != nil || m.readOnly {
		return err
	}
	return m.pusher.Flush(ctx)
}

// Err is the latest error behind an EIO or SIGBUS that the workload saw, and what
// is known of a source that changed.
func (m *mount) Err() error { return errors.Join(m.watch.Err(), m.dev.Err()) }

func (m *mount) Stats() strategies.Stats {
	s, d := m.pusher.Stats(), m.dev.Stats()
	requests, bytes, failures := m.pusher.Pushed()
	var faults int64
	if m.memory != nil {
		faults = m.memory.Stats().Faults
	}
	var zero, same int64
	if m.known != nil {
		zero, same = m.known.Saved()
	}
	checks, changes := m.watch.Counts()
	return strategies.Stats{
		Faults:         faults,
		DemandRequests: s.DemandRequests, DemandBytes: s.DemandBytes,
		PrefetchRequests: s.PrefetchRequests, PrefetchBytes: s.PrefetchBytes,
		PushRequests: requests, PushBytes: bytes,
		LocalRequests: s.LocalRequests, LocalBytes: s.LocalBytes,
		PreemptiveBytes: m.preemptive,
		Extra: map[string]int64{
			"local_bytes": m.pusher.LocalBytes(), "dirty_bytes": m.pusher.DirtyBytes(),
			"zero_bytes": zero, "duplicate_bytes": same,
			"dropped_pull_bytes": s.DroppedBytes, "evicted_bytes": m.pusher.Evicted(), "recovered_bytes": m.recovered, "repeated_requests": s.Repeated,
			"version_checks": checks, "source_changes": changes,
			"pull_retries": m.puller.Retries(), "push_failures": failures,
			"device_reads": d.ReadRequests, "device_writes": d.WriteRequests, "device_flushes": d.Flushes, "device_errors": d.Errors,
		},
	}
}

// Close stops pulling, removes the device, which writes back what the kernel
// has, pushes what is dirty and disconnects. Where ctx has no deadline it gets
// one of a minute.
func (m *mount) Close(ctx context.Context) error {
	m.closing.Do(func() {
		defer close(m.closed)
		if _, ok := ctx.Deadline(); !ok {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, closeTimeout)
			defer cancel()
		}
		m.closeErr = m.close(ctx)
	})
	<-m.closed
	return m.closeErr
}

// close undoes what Mount has done so far.
func (m *mount) close(ctx context.Context) (err error) {
	if m.dev != nil {
		err = m.watch.Last(ctx)
	}
	if m.stopPulling != nil {
		m.stopPulling()
		m.learning.Wait()
	}
	if m.digests != nil {
		err = errors.Join(err, m.digests.Close())
	}
	if m.puller != nil {
		m.puller.Close()
	}
	if m.dev != nil {
		if e := m.dev.Close(ctx); e != nil {
			err = errors.Join(err, e, m.dev.Err())
		}
	}
	if m.recorder != nil {
		err = errors.Join(err, m.recorder.Save(m.record))
	}
	switch {
	case m.pusher != nil:
		err = errors.Join(err, m.pusher.Shutdown(ctx))
	case m.syncer != nil:
		err = errors.Join(err, m.syncer.Close())
	}
	err = errors.Join(err, m.watch.Close())
	if m.remote != nil {
		err = errors.Join(err, m.remote.Close())
	}
	if m.cache != nil {
		err = errors.Join(err, m.cache.Close())
	}
	if m.journal != nil {
		if m.kept != nil && m.journal.Empty() {
			err = errors.Join(err, m.kept.Remove())
		}
		err = errors.Join(err, m.journal.Close())
	}
	return err
}
