// Package direct is the strategy direct-mount: a local device whose every
// request is forwarded to the source.
package direct

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"memsync/strategies"
	"memsync/strategies/chunk"
	"memsync/strategies/device"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/transport"
	"memsync/strategies/watch"
)

// Strategy is direct-mount.
type Strategy struct{}

var _ strategies.Strategy = Strategy{}

// Info describes the strategy.
func (Strategy) Info() strategies.Info {
	devices := []string{"fuse", "nbd", "ublk"}
	return strategies.Info{
		Name:         "direct-mount",
		Doc:          "local device; each of its requests is one request to the source",
		Capabilities: []strategies.Capability{strategies.Reads, strategies.Writes, strategies.Leases},
		Devices:      devices,
		Params:       slices.Concat(watch.Params(true), chunk.SplitParams(), device.Params(devices...)),
		DefaultChunk: 64 << 10,
		Consistency: "One writing host at a time, by a lease; a second one is refused. Readers, any number, mount read-only. Readers of the device see its writers at once (one page cache). " +
			"Writes reach the source when the kernel writes them back: by msync or fsync and then Sync, or by Close. " +
			"Pages that were read stay cached. A source that another changes is noticed by its version, within check_interval and at Sync and Close: " +
			"then nothing more is read or written (on_change=fail), or, of a read-only mount, the page cache is dropped (invalidate).",
	}
}

// Serve hands the connection to the transport: the source only reads and writes.
func (Strategy) Serve(ctx context.Context, t transport.Transport, conn net.Conn, e transport.Exports, _ param.Values) error {
	return t.Serve(ctx, conn, e)
}

// Mount opens the remote region and a device in front of it. Options.Chunk is
// the largest read request, unless the device's parameters set another.
func (Strategy) Mount(ctx context.Context, r strategies.Remote, o strategies.Options) (strategies.Mount, error) {
	began := time.Now()
	m := &mount{readOnly: o.ReadOnly, front: o.Front != nil, closed: make(chan struct{}), warmed: make(chan struct{})}
	s, err := m.open(ctx, r, o.Params, o.Reopen)
	if err != nil {
		return nil, err
	}
	opened := time.Since(began)
	warmCtx, cool := context.WithCancel(context.WithoutCancel(ctx))
	m.cool = cool
	go func() {
		defer close(m.warmed)
		warm(warmCtx, s)
	}()
	maxRead := o.Chunk
	if _, ok := s.(region.Viewer); ok {
		maxRead = 0 // no round trip to keep small
	}
	m.dev, err = device.Open(ctx, o.Device, s, device.Options{Dir: o.Dir, File: o.File, Mode: o.Mode, Chunk: maxRead, ReadOnly: o.ReadOnly, Front: o.Front, Params: o.Params})
	if _, ok := m.dev.(device.Cacher); err == nil && !ok && o.Params.Text("on_change") == watch.Invalidate {
		err = errors.Join(fmt.Errorf("on_change=invalidate with device %s, whose page cache is the kernel's to drop: %w", o.Device, region.ErrNotSupported), m.dev.Close(ctx))
	}
	if err != nil {
		m.coolDown()
		return nil, errors.Join(err, m.watch.Close(), s.Close())
	}
	m.opened.Store(true)
	select { // opening took two round trips at least, so one more should be over by then
	case <-m.warmed:
	case <-time.After(opened):
	case <-ctx.Done():
	}
	return m, nil
}

// open opens the remote region and what watches it.
func (m *mount) open(ctx context.Context, r strategies.Remote, p param.Values, reopen bool) (s region.Store, err error) {
	invalidate := p.Text("on_change") == watch.Invalidate
	if invalidate && !m.readOnly {
		return nil, fmt.Errorf("on_change=invalidate with a mount that writes, whose dirty pages cannot be merged: %w", region.ErrNotSupported)
	}
	var opening errgroup.Group
	if b, ok := r.(strategies.Beside); ok {
		opening.Go(func() (err error) {
			m.watch, err = watch.Open(ctx, b.OpenBeside, p)
			return err
		})
	}
	if reopen {
		s, err = reopened(ctx, r)
	} else {
		s, err = r.Open(ctx)
	}
	if werr := opening.Wait(); err == nil && werr != nil {
		return nil, errors.Join(werr, s.Close())
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open the remote region: %w", err), m.watch.Close())
	}
	var follow watch.Options
	if e, ok := s.(region.Epocher); ok {
		follow.Epoch = e.Epoch
	}
	if invalidate {
		follow.Invalidate = m.invalidate
	}
	m.watch.Start(follow)
	m.store = m.watch.Wrap(s)
	return m.store, nil
}

// reopened opens the remote region, again whenever its connection is lost.
func reopened(ctx context.Context, r strategies.Remote) (region.Store, error) {
	s, err := chunk.OpenResending(ctx, r.Open)
	if err != nil {
		return nil, err
	}
	return s, nil
}

// invalidate drops the kernel's page cache.
func (m *mount) invalidate(context.Context) error {
	if !m.opened.Load() {
		return fmt.Errorf("it changed while the device was being opened: %w", region.ErrMismatch)
	}
	return m.dev.(device.Cacher).Invalidate(0, m.store.Size())
}

// warm reads a little from a remote store while the device is being opened, so
// that the first touch does not pay for what happens once: threads that start,
// and code and buffers that are touched, at both ends. It costs one round trip,
// beside the opening of the device. What it reads is thrown away, errors too:
// whoever needs the bytes will see them.
func warm(ctx context.Context, s region.Store) {
	if _, ok := s.(region.Viewer); ok {
		return // no path to warm
	}
	var wg sync.WaitGroup
	for i := range int64(warmReads) {
		if off := i * warmSize; off < s.Size() {
			wg.Go(func() { _ = s.ReadAt(ctx, make([]byte, min(warmSize, s.Size()-off)), off) })
		}
	}
	wg.Wait()
}

func (m *mount) coolDown() {
	m.cool()
	<-m.warmed
}

const (
	warmReads = 4 // side by side, as the device's workers
	warmSize  = 16 << 10
)

type mount struct {
	store    region.Store
	watch    *watch.Watch  // nil: the source has no version, or nobody asks
	opened   atomic.Bool   // dev is there
	cool     func()        // ends warm
	warmed   chan struct{} // closed when it has ended
	dev      device.Device
	readOnly bool
	front    bool // nobody counts the writes: there is no device
	closing  sync.Once
	closed   chan struct{}
	closeErr error
}

func (m *mount) Attachment() strategies.Attachment {
	return strategies.Attachment{Kind: strategies.AttachPath, Path: m.dev.Path(), Size: m.store.Size(), ReadOnly: m.readOnly}
}

// Sync flushes the source. It does not write the page cache back: that would
// be an fsync of our own mount. The workload does it first, by msync.
func (m *mount) Sync(ctx context.Context) error {
	if err := m.watch.Check(ctx); err != nil || m.readOnly {
		return err
	}
	return m.store.Flush(ctx)
}

// Err is the latest error behind an EIO or SIGBUS that the workload saw, and what
// is known of a source that changed.
func (m *mount) Err() error { return errors.Join(m.watch.Err(), m.dev.Err()) }

func (m *mount) Stats() strategies.Stats {
	d := m.dev.Stats()
	checks, changes := m.watch.Counts()
	return strategies.Stats{
		DemandRequests: d.ReadRequests, DemandBytes: d.ReadBytes,
		PushRequests: d.WriteRequests, PushBytes: d.WriteBytes,
		Extra: map[string]int64{"device_flushes": d.Flushes, "device_interrupts": d.Interrupts, "device_errors": d.Errors,
			"version_checks": checks, "source_changes": changes},
	}
}

// Close unmounts, which writes dirty pages back, flushes the source and
// disconnects. An error of the store that the workload has seen as EIO is not
// repeated, but explains an error of the device.
func (m *mount) Close(ctx context.Context) error {
	m.closing.Do(func() {
		defer close(m.closed)
		m.coolDown()
		changed := m.watch.Last(ctx)
		err := m.dev.Close(ctx)
		if err != nil {
			err = errors.Join(err, m.dev.Err())
		}
		err = errors.Join(changed, err)
		if !m.readOnly && (m.front || m.dev.Stats().WriteRequests > 0) {
			if ferr := m.store.Flush(ctx); ferr != nil {
				err = errors.Join(err, fmt.Errorf("flush the source: %w", ferr))
			}
		}
		m.closeErr = errors.Join(err, m.watch.Close(), m.store.Close())
	})
	<-m.closed
	return m.closeErr
}
