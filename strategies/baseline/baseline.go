// Package baseline holds the strategies that move nothing: "memory", a populated
// anonymous mapping, and "disk", a mapped local file. They are what the others
// are compared with.
package baseline

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"memsync/strategies"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/transport"
)

var _ = []strategies.Strategy{Memory{}, Disk{}}

// step is how many bytes are copied at once.
const step = 1 << 20

func cacheParam(warm, cold string) []param.Spec {
	return []param.Spec{{Name: "cache", Kind: param.KindEnum, Default: "warm", Values: []string{"warm", "cold"},
		Doc: "warm: " + warm + "; cold: " + cold}}
}

// noServe is the source's side of a baseline: there is none.
func noServe(name string) error {
	return fmt.Errorf("strategy %s has no source: use transport local: %w", name, region.ErrNotSupported)
}

// Memory is the "memory" baseline.
type Memory struct{}

// Info describes the strategy.
func (Memory) Info() strategies.Info {
	return strategies.Info{
		Name: "memory", Doc: "baseline: a populated anonymous mapping, nothing is moved",
		Capabilities: []strategies.Capability{strategies.Reads, strategies.LocalOnly},
		Devices:      []string{""}, DefaultChunk: region.PageSize(),
		Params:      cacheParam("page tables are populated", "a memfd whose pages are in memory but not mapped yet"),
		Consistency: "one process; its own memory",
	}
}

// Serve refuses: there is no source.
func (m Memory) Serve(context.Context, transport.Transport, net.Conn, transport.Exports, param.Values) error {
	return noServe(m.Info().Name)
}

// Mount fills a memfd with the region.
func (Memory) Mount(ctx context.Context, r strategies.Remote, o strategies.Options) (strategies.Mount, error) {
	fd, err := unix.MemfdCreate("memsync-region", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	f := os.NewFile(uintptr(fd), "memfd")
	size, err := fill(ctx, r, f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	a := strategies.Attachment{Kind: strategies.AttachAnonymous, File: f, Size: size, Populate: true}
	if o.Params.Text("cache") == "cold" {
		a.Kind, a.Populate = strategies.AttachMemfd, false
	}
	return &mount{a: a, size: size, close: f.Close}, nil
}

// Disk is the "disk" baseline.
type Disk struct{}

// Info describes the strategy.
func (Disk) Info() strategies.Info {
	return strategies.Info{
		Name: "disk", Doc: "baseline: a mapped local file, nothing is moved",
		Capabilities: []strategies.Capability{strategies.Reads, strategies.LocalOnly},
		Devices:      []string{""}, DefaultChunk: region.PageSize(),
		Params:      cacheParam("the file is in the page cache", "the file was written back and dropped from the page cache"),
		Consistency: "one host; the kernel's page cache",
	}
}

// Serve refuses: there is no source.
func (d Disk) Serve(context.Context, transport.Transport, net.Conn, transport.Exports, param.Values) error {
	return noServe(d.Info().Name)
}

// Mount writes the region to a file without a name in o.Dir, which the kernel
// removes with its last descriptor, whatever happens to the processes.
func (Disk) Mount(ctx context.Context, r strategies.Remote, o strategies.Options) (strategies.Mount, error) {
	fd, err := unix.Open(o.Dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create a temporary file in %s: %w", o.Dir, err)
	}
	f := os.NewFile(uintptr(fd), "disk")
	size, err := fill(ctx, r, f)
	if err == nil && o.Params.Text("cache") == "cold" {
		// Only clean pages can be dropped, so write them back first.
		if err = f.Sync(); err == nil {
			err = unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED)
		}
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &mount{a: strategies.Attachment{Kind: strategies.AttachMemfd, File: f, Size: size}, size: size, close: f.Close}, nil
}

func fill(ctx context.Context, r strategies.Remote, f *os.File) (int64, error) {
	s, err := r.Open(ctx)
	if err != nil {
		return 0, err
	}
	defer s.Close()
	buf := make([]byte, step)
	for off := int64(0); off < s.Size(); off += step {
		p := buf[:min(step, s.Size()-off)]
		if err := s.ReadAt(ctx, p, off); err != nil {
			return 0, err
		}
		if _, err := f.WriteAt(p, off); err != nil {
			return 0, fmt.Errorf("fill the region at %d: %w", off, err)
		}
	}
	return s.Size(), nil
}

type mount struct {
	a     strategies.Attachment
	size  int64
	once  sync.Once
	close func() error
	err   error
}

func (m *mount) Attachment() strategies.Attachment { return m.a }
func (m *mount) Sync(context.Context) error        { return nil }
func (m *mount) Stats() strategies.Stats           { return strategies.Stats{PreemptiveBytes: m.size} }
func (m *mount) Close(context.Context) error {
	m.once.Do(func() { m.err = m.close() })
	return m.err
}
