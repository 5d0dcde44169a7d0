// Package userfaultfd is the strategy userfaultfd: the workload's own memory,
// whose missing pages the daemon pulls from the source when they are touched.
package userfaultfd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"memsync/strategies"
	"memsync/strategies/device/uffd"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/transport"
	"memsync/strategies/watch"
)

// Strategy is userfaultfd. docs/strategies/userfaultfd.md describes it.
type Strategy struct{}

var (
	_ strategies.Strategy    = Strategy{}
	_ strategies.Defaulter   = Strategy{}
	_ strategies.FaultServer = (*mount)(nil)
)

// Info describes the strategy.
func (Strategy) Info() strategies.Info {
	return strategies.Info{
		Name:         "userfaultfd",
		Doc:          "pull on page fault: the workload's own memory, filled through userfaultfd",
		Capabilities: []strategies.Capability{strategies.Reads, strategies.Prefetch},
		Devices:      []string{"uffd"},
		DefaultChunk: region.PageSize(),
		PullWorkers:  pullWorkers,
		Params: append(watch.Params(false), []param.Spec{
			{Name: "handlers", Kind: param.KindInt, Default: "1", Min: 1, Max: 64, Doc: "threads that answer faults, each with one read of the source at a time; the thesis has 1"},
			{Name: "fault_around", Kind: param.KindSize, Min: region.PageSize(), Max: 2 << 20, Doc: "bytes that one fault fills, an aligned block of whole chunks; default the chunk, 2MiB with memory=huge or thp"},
			{Name: "prefetch", Kind: param.KindEnum, Default: "none", Values: []string{"none", "sequential", "all"}, Doc: "pull ahead of sequential readers, or all of the region in order"},
			{Name: "prefetch_window", Kind: param.KindSize, Default: "4MiB", Min: 64 << 10, Max: 1 << 30, Doc: "most bytes that are pulled ahead of a sequential reader; the link's BDP or more"},
			{Name: "extent", Kind: param.KindSize, Min: region.PageSize(), Max: 32 << 20, Doc: "bytes of one background pull, whole chunks; default 256KiB, 2MiB where the daemon has the bytes in memory (transport local) or memory=huge, and at least the chunk"},
			{Name: "copiers", Kind: param.KindInt, Default: "0", Max: 512, Doc: "background pulls in flight, in place of the pull workers; 0 means those: 16, or 2 where the daemon has the bytes in memory; none without prefetch"},
			{Name: "resolve", Kind: param.KindEnum, Default: "copy", Values: []string{"copy", "continue"}, Doc: "how pages are filled: UFFDIO_COPY, or a write to the memfd and UFFDIO_CONTINUE (memory=shared)"},
			{Name: "memory", Kind: param.KindEnum, Default: "anonymous", Values: []string{"anonymous", "shared", "huge", "thp"}, Doc: "what the workload maps: private memory, a memfd, a memfd of reserved 2 MiB pages, or private memory aligned and advised for 2 MiB pages"},
			{Name: "writes", Kind: param.KindEnum, Default: "refused", Values: []string{"refused", "private"}, Doc: "a read-only mapping, or stores that the source never sees"},
			{Name: "poll", Kind: param.KindDuration, Default: "50us", Max: 1e9, Doc: "how long a handler looks for the next fault before it sleeps, where the faulting thread is pinned to other CPUs and that has paid lately; 0 is never"},
			{Name: "cache", Kind: param.KindSize, Default: "0", Doc: "bytes of the region that may be local; less than the region is not supported, since nothing is evicted; 0 is the region"},
			{Name: "deadline", Kind: param.KindDuration, Default: "30s", Min: 1e6, Max: 3600e9, Doc: "of each read of the source; then the page raises SIGBUS"},
			{Name: "gc", Kind: param.KindEnum, Default: "on", Values: []string{"on", "off", "load"}, Doc: "the daemon's garbage collector: on, off, or under an allocation load of about 1 GB/s"},
		}...),
		Consistency: "Each page is as it was at the source when it was pulled, and stays so. " +
			"Stores are refused (SIGSEGV), or with writes=private seen by the workload only. " +
			"A source that another changes is noticed by its version, within check_interval and at Sync and Close: " +
			"pages that are local stay as they are, others raise SIGBUS from then on (on_change=fail).",
	}
}

// Serve hands the connection to the transport: the source only reads.
func (Strategy) Serve(ctx context.Context, t transport.Transport, conn net.Conn, e transport.Exports, _ param.Values) error {
	return t.Serve(ctx, conn, e)
}

// pullWorkers is how many background pulls are in flight, where the strategy prefetches:
// enough for the BDP of most links. pullCopies is that where they are copies from
// memory to memory, which the CPUs bound.
const (
	pullWorkers = 16
	pullCopies  = 2
)

// sizes are what one fault and one background pull fill, in bytes, and how many of
// these are in flight.
type sizes struct {
	around, extent int64
	pulls          int
}

// sizesOf returns what o asks for, defaults filled in; o.PullWorkers is -1 for the default.
func sizesOf(o strategies.Options, inMemory bool) (sizes, error) {
	p, chunk, memory := o.Params, max(o.Chunk, region.PageSize()), o.Params.Text("memory")
	z := sizes{p.Size("fault_around"), p.Size("extent"), o.PullWorkers}
	least := chunk // that one fault can fill
	if memory == "huge" || memory == "thp" {
		least = max(chunk, uffd.HugePageSize)
	}
	if z.around == 0 {
		z.around = least
	}
	if z.around < least || z.around%chunk != 0 {
		return z, fmt.Errorf("fault_around=%s: with chunks of %s and memory=%s want a multiple of %s, at least %s: %w", region.FormatSize(z.around),
			region.FormatSize(chunk), memory, region.FormatSize(chunk), region.FormatSize(least), region.ErrOutOfRange)
	}
	if memory != "huge" {
		least = chunk
	}
	if z.extent == 0 {
		z.extent = max(256<<10, least)
		if inMemory {
			z.extent = max(2<<20, least)
		}
	}
	if z.extent < least || z.extent%least != 0 {
		return z, fmt.Errorf("extent=%s: with chunks of %s and memory=%s want a multiple of %s: %w", region.FormatSize(z.extent),
			region.FormatSize(chunk), memory, region.FormatSize(least), region.ErrOutOfRange)
	}
	if n := p.Int("copiers"); n > 0 {
		z.pulls = n
	}
	switch {
	case p.Text("prefetch") == "none":
		z.pulls = 0
	case z.pulls < 0 && inMemory:
		z.pulls = pullCopies
	case z.pulls < 0:
		z.pulls = pullWorkers
	}
	return z, nil
}

// Defaults says what is pulled in the background, and in which sizes.
func (Strategy) Defaults(o strategies.Options, inMemory bool) (int, []string, error) {
	z, err := sizesOf(o, inMemory)
	return z.pulls, []string{"fault_around=" + region.FormatSize(z.around), "extent=" + region.FormatSize(z.extent), fmt.Sprintf("copiers=%d", z.pulls)}, err
}

// Mount opens the remote region and says how to map it. Faults are served from
// the ServeFaults of the Mount on, prefetch begins then too. It needs Linux 6.6
// (UFFDIO_POISON); resolve=continue needs memory=shared, memory=huge a chunk or
// fault-around of 2 MiB at least and reserved huge pages.
func (Strategy) Mount(ctx context.Context, r strategies.Remote, o strategies.Options) (strategies.Mount, error) {
	m := &mount{}
	if err := m.open(ctx, r, o); err != nil {
		return nil, errors.Join(err, m.Close(ctx))
	}
	return m, nil
}

type mount struct {
	store  region.Store
	watch  *watch.Watch // nil: the source has no version, or nobody asks
	attach strategies.Attachment
	o      uffd.Options
	gc     func() // stops what startGC started

	mu     sync.Mutex
	server *uffd.Server
	closed bool
	err    error // of Close
}

func (m *mount) open(ctx context.Context, r strategies.Remote, o strategies.Options) error {
	p := o.Params
	f := &strategies.Fault{Memory: p.Text("memory"), PageSize: region.PageSize(), Missing: true}
	if f.Memory == "huge" || f.Memory == "thp" {
		f.PageSize = uffd.HugePageSize
	}
	chunk := max(o.Chunk, region.PageSize())
	m.o = uffd.Options{PageSize: f.PageSize, Handlers: p.Int("handlers"), Poll: p.Duration("poll"), Deadline: p.Duration("deadline"), Window: p.Size("prefetch_window")}
	switch p.Text("prefetch") {
	case "sequential":
		m.o.Prefetch = uffd.PrefetchSequential
	case "all":
		m.o.Prefetch = uffd.PrefetchAll
	}
	f.Minor = p.Text("resolve") == "continue"
	if f.Minor && f.Memory != "shared" {
		return fmt.Errorf("resolve=continue with memory=%s: it needs memory=shared: %w", f.Memory, region.ErrNotSupported)
	}
	if err := errors.Join(region.CheckChunk(chunk), check(f)); err != nil {
		return err
	}
	if _, err := sizesOf(o, false); err != nil { // before anything is opened
		return err
	}
	var opening errgroup.Group
	if b, ok := r.(strategies.Beside); ok {
		opening.Go(func() (err error) {
			m.watch, err = watch.Open(ctx, b.OpenBeside, p)
			return err
		})
	}
	var err error
	m.store, err = r.Open(ctx)
	if err = errors.Join(err, opening.Wait()); err != nil {
		return fmt.Errorf("open the remote region: %w", err)
	}
	if limit := p.Size("cache"); limit > 0 && limit < m.store.Size() {
		return fmt.Errorf("%d bytes of memory for a region of %d: userfaultfd alone evicts nothing; managed-mount on device uffd does: %w", limit, m.store.Size(), region.ErrNotSupported)
	}
	m.watch.Start(watch.Options{})
	m.store = m.watch.Wrap(m.store)
	m.attach = strategies.Attachment{Kind: strategies.AttachFault, Size: m.store.Size(), Fault: f,
		ReadOnly: o.ReadOnly || p.Text("writes") == "refused"}
	switch f.Memory {
	case "thp":
		f.Memory = "huge" // without a file
		m.o.PageSize = region.PageSize()
	case "huge", "shared":
		if m.attach.File, err = memfd(m.attach.Size, f); err != nil {
			return err
		}
	}
	z, err := sizesOf(o, uffd.InMemory(m.store))
	if err != nil {
		return err
	}
	m.o.FaultAround, m.o.Extent, m.o.Copiers = z.around, z.extent, z.pulls
	if z.pulls == 0 {
		m.o.Prefetch = uffd.PrefetchNone
	}
	if f.Minor {
		m.o.Memfd = m.attach.File
	}
	m.gc = startGC(p.Text("gc"))
	return nil
}

// check tries what the mapping needs, so that it fails here and not in the workload.
func check(f *strategies.Fault) error {
	probes := map[string]func() error{"userfaultfd": uffd.ProbeMissing, "UFFDIO_POISON": uffd.ProbePoison}
	switch {
	case f.Minor:
		probes["minor faults of shared memory"] = uffd.ProbeMinor
	case f.Memory == "shared":
		probes["faults of shared memory"] = uffd.ProbeShared
	case f.Memory == "huge":
		probes["faults of huge pages"] = uffd.ProbeHuge
	}
	for what, probe := range probes {
		if err := probe(); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
	}
	return nil
}

func memfd(size int64, f *strategies.Fault) (*os.File, error) {
	flags := unix.MFD_CLOEXEC
	if f.Memory == "huge" {
		flags |= unix.MFD_HUGETLB | unix.MFD_HUGE_2MB
	}
	fd, err := unix.MemfdCreate("memsync-region", flags)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	file := os.NewFile(uintptr(fd), "memfd")
	if err := file.Truncate(region.RoundUp(size, f.PageSize)); err != nil {
		return nil, errors.Join(fmt.Errorf("size the memfd to %d bytes: %w", size, err), file.Close())
	}
	if f.Memory != "huge" {
		return file, nil
	}
	// Reserve now: a lack of huge pages would kill the workload later. Allocate
	// nothing: a page that is there would not fault.
	length := uintptr(region.RoundUp(size, f.PageSize))
	mem, err := unix.MmapPtr(fd, 0, nil, length, unix.PROT_NONE, unix.MAP_SHARED)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("reserve %d huge pages of 2 MiB (sysctl vm.nr_hugepages): %w: %w", length/uffd.HugePageSize, err, region.ErrNotSupported), file.Close())
	}
	if err := unix.MunmapPtr(mem, length); err != nil {
		return nil, errors.Join(os.NewSyscallError("munmap", err), file.Close())
	}
	return file, nil
}

// Err is the first error behind a SIGBUS that the workload saw.
func (m *mount) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.server == nil {
		return m.watch.Err()
	}
	return errors.Join(m.watch.Err(), m.server.Err())
}

func (m *mount) Attachment() strategies.Attachment { return m.attach }

// ServeFaults takes uffd over and serves from its own threads on.
func (m *mount) ServeFaults(f *os.File, base uintptr) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.closed:
		return errors.Join(region.ErrClosed, f.Close())
	case m.server != nil:
		return errors.Join(errors.New("the mount serves a workload already"), f.Close())
	}
	s, err := uffd.Serve(f, base, m.store, m.o)
	m.server = s
	return err
}

// Sync looks whether the source is what it was: no store of the workload ever goes there.
func (m *mount) Sync(ctx context.Context) error {
	m.mu.Lock()
	closed := m.closed
	m.mu.Unlock()
	if closed {
		return region.ErrClosed
	}
	return m.watch.Check(ctx)
}

func (m *mount) Stats() strategies.Stats {
	m.mu.Lock()
	server := m.server
	m.mu.Unlock()
	if server == nil {
		return strategies.Stats{}
	}
	s := server.Stats()
	out := strategies.Stats{Faults: s.Faults, PrefetchRequests: s.Prefetches, PrefetchBytes: s.PrefetchBytes,
		Extra: map[string]int64{"faults_coalesced": s.Coalesced, "faults_trip": s.Trips, "fault_errors": s.Errors, "bytes_resident": s.Resident}}
	if server.Local() {
		out.LocalRequests, out.LocalBytes = s.Fills, s.FillBytes
	} else {
		out.DemandRequests, out.DemandBytes = s.Fills, s.FillBytes
	}
	return out
}

// Close ends serving. A workload that still has the mapping gets SIGBUS on
// pages that are not local. It returns the first error of the source too.
func (m *mount) Close(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return m.err
	}
	m.closed = true
	if m.server != nil {
		m.err = m.watch.Last(ctx)
	}
	if m.server != nil {
		m.err = errors.Join(m.err, m.server.Err(), m.server.Close())
	}
	m.err = errors.Join(m.err, m.watch.Close())
	if m.store != nil {
		m.err = errors.Join(m.err, m.store.Close())
	}
	if m.attach.File != nil {
		m.err = errors.Join(m.err, m.attach.File.Close())
	}
	if m.gc != nil {
		m.gc()
	}
	return m.err
}
