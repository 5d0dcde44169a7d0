// Package migration is the strategy migration: a region moves to another host
// together with the application that writes it. docs/strategies/migration.md
// describes mechanism and protocol; who owns the region is decided in package handover.
package migration

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies"
	"memsync/strategies/device"
	"memsync/strategies/device/uffd"
	"memsync/strategies/dirty"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/transport"
)

// Strategy is migration.
type Strategy struct{}

var (
	_ strategies.Strategy    = Strategy{}
	_ strategies.Publisher   = Strategy{}
	_ strategies.Seeder      = (*publication)(nil)
	_ strategies.Publication = (*publication)(nil)
	_ strategies.FaultServer = (*leecher)(nil)
	_ strategies.Migrator    = (*leecher)(nil)
	_ strategies.Troubled    = (*leecher)(nil)
)

// regionName is the region's at the source.
const regionName = "region"

func params() []param.Spec {
	return []param.Spec{
		{Name: "mode", Kind: param.KindEnum, Default: string(Hybrid), Values: Modes(), Doc: "what is pulled before the application stops, and what after"},
		{Name: "finalize", Kind: param.KindEnum, Default: policyPercent, Values: []string{policyPercent, policyAdaptive, policyCycle, policyQuiet}, Doc: "when to stop the application: a share of the region is here, the downtime that is foreseen is within max_downtime, or that share is here and a quiet phase is foreseen from what it wrote (cycle) or announced by it (quiet)"},
		{Name: "finalize_at", Kind: param.KindFloat, Default: "1", Doc: "of the region, 0 to 1, that must have been pulled, but for finalize=adaptive, which wants all"},
		{Name: "max_downtime", Kind: param.KindDuration, Default: "300ms", Min: int64(time.Millisecond), Max: int64(time.Hour), Doc: "what finalize=adaptive aims at"},
		{Name: "unmet", Kind: param.KindEnum, Default: "finalize", Values: []string{unmetFinalize, unmetAbort, unmetThrottle}, Doc: "where max_downtime cannot be met, or no quiet phase comes: take over all the same, give up, or (finalize=adaptive with mode=pre-copy) slow the application down until it can"},
		{Name: "quiet_wait", Kind: param.KindDuration, Default: "10s", Min: int64(time.Millisecond), Max: int64(time.Hour), Doc: "how long finalize=cycle and finalize=quiet postpone"},
		{Name: "interval", Kind: param.KindDuration, Default: "100ms", Min: int64(time.Millisecond), Max: int64(time.Hour), Doc: "between two looks for dirty pages"},
		{Name: "extent", Kind: param.KindSize, Default: "512KiB", Min: 4096, Max: 32 << 20, Doc: "most bytes in one request"},
		{Name: "fault_around", Kind: param.KindSize, Default: "64KiB", Min: 4096, Max: 2 << 20, Doc: "bytes that a fault pulls, an aligned block"},
		{Name: "suspend_timeout", Kind: param.KindDuration, Default: "10s", Min: int64(time.Millisecond), Max: int64(time.Hour), Doc: "how long the application may take to stop; then it goes on"},
		{Name: "commit_timeout", Kind: param.KindDuration, Default: "30s", Min: int64(time.Millisecond), Max: int64(time.Hour), Doc: "how long it stands still for a destination that does not take over; then it goes on"},
		{Name: "patience", Kind: param.KindDuration, Default: "30s", Min: int64(time.Millisecond), Max: int64(time.Hour), Doc: "how long the other end may be out of reach"},
		{Name: "journal", Kind: param.KindString, Doc: "existing folder in which each end keeps, across a crash, who owns the region; by default nothing outlives the processes"},
	}
}

// Info describes the strategy.
func (Strategy) Info() strategies.Info {
	devices := []string{"uffd", "fuse", "nbd"}
	return strategies.Info{
		Name:         "migration",
		Doc:          "a region moves with its application: tracked, pulled, handed over at one point",
		Capabilities: []strategies.Capability{strategies.Reads, strategies.Migrates, strategies.Prefetch},
		Devices:      devices,
		Params:       slices.Concat(params(), device.Params(devices...)),
		DefaultChunk: region.PageSize(),
		PullWorkers:  16,
		Consistency: "One owner at a time: the source until it handles Commit, the destination afterwards. " +
			"The destination has, from its first access on, what the application had stored when it was suspended, and later changes are its own. " +
			"Every access before the hand-over waits. With op read there is no application at the source: the region is taken over at once.",
	}
}

// Serve answers a connection to a region that no application writes.
func (Strategy) Serve(ctx context.Context, t transport.Transport, conn net.Conn, e transport.Exports, p param.Values) error {
	store, err := e.Open(regionName)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	s, err := NewSeeder(store, nil, seederOptions(p))
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	return errors.Join(t.Serve(ctx, conn, s.Exports(regionName)), s.Close())
}

func seederOptions(p param.Values) SeederOptions {
	o := SeederOptions{SuspendTimeout: p.Duration("suspend_timeout"), CommitTimeout: p.Duration("commit_timeout"), Silence: p.Duration("patience")}
	if dir := p.Text("journal"); dir != "" {
		o.Journal = dir + "/source.json"
	}
	return o
}

// Publish makes the region of which the application at the source maps a memfd,
// with content in it.
func (Strategy) Publish(ctx context.Context, content region.Store, o strategies.PublishOptions) (_ strategies.Publication, err error) {
	if o.Pwrite {
		return nil, fmt.Errorf("an application that writes by pwrite: it is tracked through its mapping: %w", region.ErrNotSupported)
	}
	if o.Transport == nil {
		return nil, fmt.Errorf("no transport: %w", region.ErrNotSupported)
	}
	p := &publication{transport: o.Transport}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Close())
		}
	}()
	if p.memory, err = newShared(ctx, content); err != nil {
		return nil, err
	}
	method, err := dirty.ByName("pagemap")
	if err != nil {
		return nil, err
	}
	if p.detector, err = method.Open(dirty.Region{File: p.memory.file, Mem: p.memory.mem, Unit: region.PageSize()}); err != nil {
		return nil, err
	}
	p.seeder, err = NewSeeder(p.memory, p, seederOptions(o.Params))
	return p, err
}

// publication is a Seeder of a memfd whose writer is tracked by PAGEMAP_SCAN.
type publication struct {
	transport transport.Transport
	memory    *shared
	seeder    *Seeder

	mu       sync.Mutex // of the detector
	detector dirty.Detector
}

// Collect implements tracker.
func (p *publication) Collect(ctx context.Context, found func(off, n int64)) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.detector.Collect(ctx, found)
}

// Attachment implements strategies.Publication.
func (p *publication) Attachment() strategies.Attachment {
	return strategies.Attachment{Kind: strategies.AttachMemfd, File: p.memory.file, Size: p.memory.size, Track: "pagemap"}
}

// Track implements strategies.Publication.
func (p *publication) Track(w strategies.Writer) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.detector.Add(dirty.Writer{PID: w.PID, Base: w.Base, Length: w.Length, Uffd: w.Uffd})
}

// Control implements strategies.Seeder.
func (p *publication) Control(h strategies.Hooks) { p.seeder.Control(h) }

// Done implements strategies.Seeder.
func (p *publication) Done() <-chan struct{} { return p.seeder.Done() }

// Serve implements strategies.Publication.
func (p *publication) Serve(ctx context.Context, conn net.Conn) error {
	return p.transport.Serve(ctx, conn, p.seeder.Exports(regionName))
}

// Poll and Sync do nothing: the destination asks.
func (*publication) Poll(bool)                  {}
func (*publication) Sync(context.Context) error { return nil }

// Stats implements strategies.Publication.
func (p *publication) Stats() strategies.Stats { return strategies.Stats{} }

// Close implements strategies.Publication.
func (p *publication) Close() (err error) {
	if p.seeder != nil {
		err = errors.Join(p.seeder.Err(), p.seeder.Close())
	}
	if p.detector != nil {
		p.mu.Lock()
		err = errors.Join(err, p.detector.Close())
		p.mu.Unlock()
		p.detector = nil
	}
	if p.memory != nil {
		err = errors.Join(err, p.memory.Close())
		p.memory = nil
	}
	return err
}

// shared is a region in a memfd that an application maps too. Reads take the
// bytes as they are. It tells holes, which no page was ever touched of.
type shared struct {
	file *os.File
	mem  []byte
	size int64
	// holes: at first there were some; else none has to be looked for.
	holes bool
}

var (
	_ region.Store    = (*shared)(nil)
	_ region.Viewer   = (*shared)(nil)
	_ region.Extenter = (*shared)(nil)
)

// newShared makes a memfd with content, but for pages of zeroes, which it leaves out.
func newShared(ctx context.Context, content region.Store) (_ *shared, err error) {
	size := content.Size()
	fd, err := unix.MemfdCreate("migrates", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	s := &shared{file: os.NewFile(uintptr(fd), "migrates"), size: size}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	page := region.PageSize()
	if err := s.file.Truncate(region.RoundUp(size, page)); err != nil {
		return nil, err
	}
	if s.mem, err = unix.Mmap(fd, 0, int(region.RoundUp(size, page)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return nil, fmt.Errorf("map %d bytes: %w", size, err)
	}
	buf := make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(buf)) {
		p := buf[:min(int64(len(buf)), size-off)]
		if err := content.ReadAt(ctx, p, off); err != nil {
			return nil, err
		}
		for at := int64(0); at < int64(len(p)); at += page {
			if b := p[at:min(at+page, int64(len(p)))]; zero(b) {
				s.holes = true
			} else {
				copy(s.mem[off+at:], b)
			}
		}
	}
	return s, nil
}

func zero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// Size implements region.Store.
func (s *shared) Size() int64 { return s.size }

// ReadAt implements region.Store. It allocates nothing for a hole.
func (s *shared) ReadAt(_ context.Context, p []byte, off int64) error {
	if err := region.CheckRange(off, int64(len(p)), s.size); err != nil {
		return err
	}
	if _, err := s.file.ReadAt(p, off); err != nil {
		return fmt.Errorf("read %d bytes of the memfd at %d: %w", len(p), off, err)
	}
	return nil
}

// View implements region.Viewer.
func (s *shared) View(off, n int64) ([]byte, bool) {
	if region.CheckRange(off, n, s.size) != nil {
		return nil, false
	}
	return s.mem[off : off+n : off+n], true
}

// Extents implements region.Extenter.
func (s *shared) Extents(_ context.Context, off, n int64) ([]region.Extent, error) {
	if err := region.CheckRange(off, n, s.size); err != nil {
		return nil, err
	}
	if !s.holes {
		return []region.Extent{{Length: n}}, nil
	}
	var out []region.Extent
	fd := int(s.file.Fd())
	for end := off + n; off < end; {
		data, err := unix.Seek(fd, off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			data, err = end, nil
		}
		if err != nil {
			return nil, os.NewSyscallError("lseek", err)
		}
		if data = min(data, end); data > off {
			out = append(out, region.Extent{Length: data - off, Hole: true, Zero: true})
			off = data
			continue
		}
		hole, err := unix.Seek(fd, off, unix.SEEK_HOLE)
		if err != nil {
			return nil, os.NewSyscallError("lseek", err)
		}
		hole = min(hole, end)
		out = append(out, region.Extent{Length: hole - off})
		off = hole
	}
	return out, nil
}

// WriteAt implements region.Store.
func (s *shared) WriteAt(context.Context, []byte, int64) error { return region.ErrReadOnly }

// Flush implements region.Store.
func (s *shared) Flush(context.Context) error { return nil }

// Close implements region.Store.
func (s *shared) Close() (err error) {
	if s.mem != nil {
		err = unix.Munmap(s.mem)
		s.mem = nil
	}
	return errors.Join(err, s.file.Close())
}

// Mount connects to the source, begins to track and, as the mode says, to pull.
// Without Options.Migrate it takes the region over at once.
func (Strategy) Mount(ctx context.Context, r strategies.Remote, o strategies.Options) (strategies.Mount, error) {
	p := o.Params
	if err := region.CheckChunk(o.Chunk); err != nil {
		return nil, err
	}
	if f := p.Float("finalize_at"); f > 1 {
		return nil, fmt.Errorf("finalize_at=%g: want 0 to 1: %w", f, region.ErrOutOfRange)
	}
	lo := leecherOptions{mode: Mode(p.Text("mode")), device: o.Device, chunk: o.Chunk, extent: p.Size("extent"), workers: o.PullWorkers,
		around: p.Size("fault_around"), interval: p.Duration("interval"), patience: p.Duration("patience"),
		policy: policy{p.Text("finalize"), p.Float("finalize_at"), p.Duration("max_downtime"), p.Duration("quiet_wait"), p.Text("unmet")},
		dev:    device.Options{Dir: o.Dir, ReadOnly: o.ReadOnly, Params: p},
		params: uffd.MemoryOptions{Chunk: o.Chunk, ReadOnly: true, Evicts: true, Params: p}}
	if dir := p.Text("journal"); dir != "" {
		lo.journal = dir + "/destination.json"
	}
	if pl := lo.policy; pl.unmet == unmetThrottle && (pl.kind != policyAdaptive || lo.mode != PreCopy) {
		return nil, fmt.Errorf("unmet=throttle: want finalize=adaptive and mode=pre-copy, in which what is left gets less while the application is slow: %w", region.ErrNotSupported)
	}
	if lo.around&(lo.around-1) != 0 {
		return nil, fmt.Errorf("fault_around %d: want a power of two: %w", lo.around, region.ErrOutOfRange)
	}
	openRegion, openControl := r.Open, func(ctx context.Context) (region.Store, error) {
		b, ok := r.(strategies.Beside)
		if !ok {
			return nil, fmt.Errorf("a migration's source has a control beside the region: %w", region.ErrNotSupported)
		}
		return b.OpenBeside(ctx, controlSuffix, true)
	}
	var here *Seeder
	if a, ok := r.(strategies.Addressed); ok && a.Addr() == "" { // the region is here
		store, err := r.Open(ctx)
		if err != nil {
			return nil, err
		}
		if here, err = NewSeeder(store, nil, SeederOptions{}); err != nil {
			return nil, errors.Join(err, store.Close())
		}
		e := here.Exports(regionName)
		openRegion = func(context.Context) (region.Store, error) { return e.Open(regionName) }
		openControl = func(context.Context) (region.Store, error) { return e.Open(regionName + controlSuffix) }
	}
	if !o.Migrate {
		lo.mode = PostCopy
	}
	l, err := openLeecher(ctx, openRegion, openControl, lo)
	if err != nil {
		if here != nil {
			err = errors.Join(err, here.Close())
		}
		return nil, err
	}
	m := mount{l, here, o.ReadOnly}
	if !o.Migrate {
		if _, err := l.Finalize(ctx, strategies.Hooks{}); err != nil {
			return nil, errors.Join(err, m.Close(ctx))
		}
	}
	return m, nil
}

// mount is a leecher, with its source where that is in this process.
type mount struct {
	*leecher
	here     *Seeder
	readOnly bool
}

// Attachment implements strategies.Mount.
func (m mount) Attachment() strategies.Attachment {
	a := m.leecher.Attachment()
	a.ReadOnly = m.readOnly
	return a
}

// Close implements strategies.Mount.
func (m mount) Close(ctx context.Context) error {
	err := m.leecher.Close(ctx)
	if m.here != nil {
		err = errors.Join(err, m.here.Close(), m.here.store.Close())
	}
	return err
}
