// Package hashsync is the strategy hashsync: the source's region is hashed chunk
// by chunk every interval, and what has changed is sent as deltas to one or many
// destinations, each with a full copy. The protocol is docs/hashsync-protocol.md.
package hashsync

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies"
	"memsync/strategies/delta"
	"memsync/strategies/dirty"
	"memsync/strategies/hash"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/transport"
)

// Strategy is hashsync.
type Strategy struct{}

var _ strategies.Strategy = Strategy{}
var _ strategies.Publisher = Strategy{}
var _ strategies.Relay = (*mount)(nil)
var _ strategies.Migrator = (*mount)(nil)
var _ strategies.Seeder = (*publication)(nil)

func params() []param.Spec {
	return []param.Spec{
		{Name: "hash", Kind: param.KindEnum, Default: "xxh3-128", Values: hash.Names(true), Doc: "algorithm of fingerprints (memsync list hashes)"},
		{Name: "content", Kind: param.KindEnum, Default: "trusted", Values: []string{"trusted", "hostile"}, Doc: "hostile: an adversary may choose the bytes; hashes that are not strong are refused"},
		{Name: "hash_workers", Kind: param.KindInt, Default: "2", Min: 1, Max: 256, Doc: "goroutines that hash"},
		{Name: "handle", Kind: param.KindEnum, Default: string(hash.MappedBytes), Values: hash.Handles(), Doc: "how workers read the source's file: its mapping, pread on one handle, on one each, or on one opened for each chunk"},
		{Name: "digest_of", Kind: param.KindEnum, Default: "chunk", Values: []string{"chunk", "file"}, Doc: "file: one digest of everything first, by one worker, and of chunks only where it changed"},
		{Name: "interval", Kind: param.KindDuration, Default: "100ms", Min: int64(time.Millisecond), Max: int64(time.Hour), Doc: "time between two looks for changes"},
		{Name: "dirty", Kind: param.KindEnum, Default: "hash", Values: dirty.Names(), Doc: "where to look for changes: everywhere (hash), or where the kernel says"},
		{Name: "lead_rounds", Kind: param.KindInt, Default: "1", Max: 100, Doc: "op migrate: rounds made right before the application is stopped, so that the last is short"},
		{Name: "suspend_timeout", Kind: param.KindDuration, Default: "10s", Min: int64(time.Millisecond), Max: int64(time.Hour), Doc: "op migrate: how long the application may take to stop; then it goes on"},
		{Name: "commit_timeout", Kind: param.KindDuration, Default: "30s", Min: int64(time.Millisecond), Max: int64(time.Hour), Doc: "op migrate: how long a round may take around that, and how long it stands still for a destination that does not take over; then it goes on"},
		{Name: "delta", Kind: param.KindEnum, Default: "auto", Values: delta.Modes(), Doc: "how changed chunks are encoded; runs keeps a copy of the region at the source"},
	}
}

// Info describes the strategy.
func (Strategy) Info() strategies.Info {
	return strategies.Info{
		Name:         "hashsync",
		Doc:          "polled hashing of a mapped file, deltas to full copies at the destinations",
		Capabilities: []strategies.Capability{strategies.Reads, strategies.Follows, strategies.Copies, strategies.Prefetch, strategies.Relays, strategies.Migrates},
		Devices:      []string{""},
		Transports:   []string{"nbd"}, // what the column says of its own protocol over TCP
		Params:       params(),
		DefaultChunk: 64 << 10,
		Consistency: "The source is the only writer. A destination has a full copy before a workload attaches. Rounds reach it in order; " +
			"a reader that uses the chunk's version sees round k or k+1 of it, never a mixture; plain loads may see a chunk half changed while it is being changed. " +
			"After the end of a round all chunks are of that round, which the digest of the whole region proves. " +
			"Where the region is taken over (op migrate) that holds until the source handles Commit; from then on the destination is the only writer.",
	}
}

// options are the parameters of a source.
func options(name string, chunk int64, p param.Values) (SourceOptions, dirty.Method, error) {
	f, err := hash.ByName(p.Text("hash"))
	if err != nil {
		return SourceOptions{}, dirty.Method{}, err
	}
	if p.Text("content") == "hostile" && !f.Strong {
		return SourceOptions{}, dirty.Method{}, fmt.Errorf("hash=%s: two inputs with the same digest can be made, so that a change of hostile content may be hidden; use blake3 or sha256: %w", f.Name, region.ErrNotSupported)
	}
	m, err := dirty.ByName(p.Text("dirty"))
	if err != nil {
		return SourceOptions{}, m, err
	}
	return SourceOptions{Name: name, Chunk: chunk, Hash: f, Workers: p.Int("hash_workers"), Interval: p.Duration("interval"), Delta: delta.Mode(p.Text("delta")), Whole: p.Text("digest_of") == "file",
		LeadRounds: p.Int("lead_rounds"), SuspendTimeout: p.Duration("suspend_timeout"), CommitTimeout: p.Duration("commit_timeout")}, m, nil
}

// storeBytes hashes a Store.
type storeBytes struct {
	ctx context.Context
	region.Store
}

func (s storeBytes) Open() (hash.Reader, error) { return storeReader{s.ctx, s.Store}, nil }

type storeReader struct {
	ctx context.Context
	s   region.Store
}

func (r storeReader) Chunk(off, n int64, buf []byte) ([]byte, error) {
	return buf[:n], r.s.ReadAt(r.ctx, buf[:n], off)
}

func (storeReader) Close() error { return nil }

// overStore makes a source of a Store: nothing tells who writes it, so all of it
// is hashed each interval.
func overStore(ctx context.Context, s region.Store, chunk int64, p param.Values) (*Source, error) {
	o, m, err := options("region", chunk, p)
	if err != nil {
		return nil, err
	}
	if m.Name != "hash" {
		return nil, fmt.Errorf("dirty=%s: this source has no mapped file and no writer that it could watch; use dirty=hash: %w", m.Name, region.ErrNotSupported)
	}
	// ctx bounds the opening; the source goes on reading until it is closed.
	reads, cancel := context.WithCancel(context.WithoutCancel(ctx))
	opening := context.AfterFunc(ctx, cancel)
	src, err := NewSource(ctx, storeBytes{reads, s}, s.ReadAt, o)
	if !opening() && err == nil {
		err = errors.Join(context.Cause(ctx), src.Close())
	}
	if err != nil {
		cancel()
		return nil, err
	}
	loop := src.cancel
	src.cancel = func() { loop(); cancel() }
	return src, nil
}

// Serve hashes the region for this one connection. Where the region is written at
// the source, and where there are several destinations, use Publish.
func (Strategy) Serve(ctx context.Context, _ transport.Transport, conn net.Conn, e transport.Exports, p param.Values) error {
	var sources []*Source
	defer func() {
		for _, s := range sources {
			_ = s.Close()
		}
	}()
	return serve(ctx, conn, func(name string, chunk int64) (*node, error) {
		st, err := e.Open(name)
		if err != nil {
			return nil, err
		}
		s, err := overStore(ctx, st, chunk, p)
		if err != nil {
			return nil, err
		}
		sources = append(sources, s)
		return s.node, nil
	})
}

// Mount copies the whole region and keeps the copy equal to the source's.
func (Strategy) Mount(ctx context.Context, r strategies.Remote, o strategies.Options) (_ strategies.Mount, err error) {
	m := &mount{readOnly: !o.Migrate}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close(ctx))
		}
	}()
	dial := r.Dial
	if conn, err := r.Dial(ctx); errors.Is(err, region.ErrNotSupported) {
		// The region is here: its source is a part of this mount.
		if m.store, err = r.Open(ctx); err != nil {
			return nil, err
		}
		if m.source, err = overStore(ctx, m.store, o.Chunk, o.Params); err != nil {
			return nil, err
		}
		dial = func(context.Context) (net.Conn, error) {
			here, there := net.Pipe()
			m.wg.Go(func() {
				_ = serve(context.WithoutCancel(ctx), there, func(string, int64) (*node, error) { return m.source.node, nil })
			})
			return here, nil
		}
	} else if err != nil {
		return nil, err
	} else {
		first := conn
		dial = func(ctx context.Context) (net.Conn, error) {
			if c := first; c != nil {
				first = nil
				return c, nil
			}
			return r.Dial(ctx)
		}
	}
	m.replica = NewReplica("region", o.Chunk, m.create)
	run, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	m.cancel = cancel
	m.taker = newTaker(run, m.replica, o.Params)
	m.wg.Go(func() {
		if err := Follow(run, dial, m.replica); run.Err() == nil {
			m.fail(err)
			cancel(err)
		}
	})
	first, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	defer context.AfterFunc(run, func() { stop(context.Cause(run)) })()
	if err := m.replica.Wait(first, 1); err != nil {
		return nil, fmt.Errorf("wait for the first round: %w", err)
	}
	return m, nil
}

type mount struct {
	store    region.Store // with transport local
	source   *Source
	replica  *Replica
	taker    *taker
	file     *os.File
	readOnly bool
	cancel   context.CancelCauseFunc
	wg       sync.WaitGroup

	mu   sync.Mutex
	err  error
	once sync.Once
	cerr error
}

// create makes the copy's memfd. Its pages are taken now, so that a destination
// without room says so here and not by SIGBUS in a round.
func (m *mount) create(size int64) (*os.File, error) {
	fd, err := unix.MemfdCreate("hashsync", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	m.file = os.NewFile(uintptr(fd), "hashsync")
	if err := m.file.Truncate(size); err != nil {
		return nil, err
	}
	if err := unix.Fallocate(fd, 0, 0, size); err != nil {
		return nil, fmt.Errorf("no room for a copy of %d bytes: %w", size, err)
	}
	return m.file, nil
}

func (m *mount) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.err = err
}

// Err is why the copy is not kept equal any more.
func (m *mount) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

func (m *mount) Attachment() strategies.Attachment {
	n := m.replica.node
	return strategies.Attachment{Kind: strategies.AttachMemfd, File: m.file, Size: n.size, ReadOnly: m.readOnly,
		Versions: &strategies.Versions{Offset: versionsAt(n.size), Chunk: n.chunk}}
}

// Sync does nothing: nobody writes here.
func (m *mount) Sync(ctx context.Context) error { return ctx.Err() }

// Finalize implements strategies.Migrator.
func (m *mount) Finalize(ctx context.Context, h strategies.Hooks) (strategies.Handover, error) {
	if m.readOnly {
		return strategies.Handover{}, fmt.Errorf("take over a region that was not mounted for it: %w", region.ErrReadOnly)
	}
	return m.taker.Finalize(ctx, h)
}

// Complete implements strategies.Migrator.
func (m *mount) Complete(ctx context.Context) (strategies.Handover, error) {
	return m.taker.Complete(ctx)
}

// Serve answers a destination that follows this one.
func (m *mount) Serve(ctx context.Context, conn net.Conn) error { return m.replica.Serve(ctx, conn) }

func (m *mount) Stats() strategies.Stats {
	s := m.replica.node.statistics()
	return strategies.Stats{PrefetchRequests: s.Rounds, PrefetchBytes: s.DeltaBytes, PreemptiveBytes: m.replica.node.size,
		Extra: map[string]int64{"rounds": s.Rounds, "delta_bytes": s.DeltaBytes, "changed_bytes": s.Changed, "digest_mismatches": s.Mismatches, strategies.EqualAt: m.replica.equalAt.Load()}}
}

func (m *mount) Close(context.Context) error {
	m.once.Do(func() {
		if m.cancel != nil {
			m.cancel(region.ErrClosed)
		}
		if m.source != nil {
			m.cerr = m.source.Close()
		}
		m.wg.Wait()
		if m.replica != nil {
			m.cerr = errors.Join(m.cerr, m.replica.Close())
		}
		if m.file != nil {
			m.cerr = errors.Join(m.cerr, m.file.Close())
		}
		if m.store != nil {
			m.cerr = errors.Join(m.cerr, m.store.Close())
		}
	})
	return m.cerr
}
