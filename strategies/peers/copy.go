package peers

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"memsync/strategies"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/transport"
)

// address returns where the source answers.
func address(r strategies.Remote) (string, error) {
	if a, ok := r.(strategies.Addressed); ok && a.Addr() != "" {
		return a.Addr(), nil
	}
	return "", fmt.Errorf("the source has no address that another program could connect to: %w", region.ErrNotSupported)
}

// noServe is the source's side of one connection where a program has them all.
func noServe(name string) error {
	return fmt.Errorf("%s has a server of its own: %w", name, region.ErrNotSupported)
}

// NBDCopy is the strategy nbdcopy: nbdkit serves, nbdcopy downloads all of the
// region into memory before the workload may attach.
type NBDCopy struct{}

var _ strategies.Listener = NBDCopy{}

// Info describes the strategy.
func (NBDCopy) Info() strategies.Info {
	return strategies.Info{
		Name:         "nbdcopy",
		Doc:          "peer: download of the whole region by libnbd's nbdcopy from nbdkit, then local memory",
		Capabilities: []strategies.Capability{strategies.Reads, strategies.Prefetch},
		Devices:      []string{""},
		DefaultChunk: 64 << 10,
		Consistency:  "A copy, made while it is mounted. Stores stay in the workload's host; later changes at the source are not seen.",
	}
}

// Serve refuses.
func (NBDCopy) Serve(context.Context, transport.Transport, net.Conn, transport.Exports, param.Values) error {
	return noServe("nbdcopy")
}

// Listen starts nbdkit.
func (NBDCopy) Listen(ctx context.Context, host, path, dir string, _ param.Values) (strategies.Server, error) {
	s, err := nbdkit(ctx, host, path, dir)
	if err != nil {
		return nil, err
	}
	return s, nil
}

// Mount downloads the region into a memfd.
func (NBDCopy) Mount(ctx context.Context, r strategies.Remote, o strategies.Options) (strategies.Mount, error) {
	tool, err := find("nbdcopy", "libnbd-bin")
	if err != nil {
		return nil, err
	}
	addr, err := address(r)
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("nbdcopy", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	m := &copied{file: os.NewFile(uintptr(fd), "memfd"), readOnly: o.ReadOnly}
	const passed = "/proc/self/fd/3"
	if err := run(ctx, []*os.File{m.file}, tool, "nbd://"+addr+"/"+exportName, passed); err != nil {
		return nil, errors.Join(err, m.file.Close())
	}
	return m.measured()
}

// copied is a downloaded region.
type copied struct {
	file     *os.File
	size     int64
	readOnly bool
	push     func(context.Context) error // nil: stores stay here
	pull     func(context.Context) error // of a read-only copy: what the source has now; nil: never again

	mu     sync.Mutex
	pushed int64
	closed bool
	err    error
}

func (m *copied) measured() (*copied, error) {
	fi, err := m.file.Stat()
	if err != nil {
		return nil, errors.Join(err, m.file.Close())
	}
	m.size = fi.Size()
	return m, nil
}

func (m *copied) Attachment() strategies.Attachment {
	return strategies.Attachment{Kind: strategies.AttachMemfd, File: m.file, Size: m.size, ReadOnly: m.readOnly}
}

func (m *copied) Sync(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pull != nil && m.readOnly && !m.closed {
		return m.pull(ctx)
	}
	if m.push == nil || m.readOnly || m.closed {
		return nil
	}
	m.pushed++
	return m.push(ctx)
}

func (m *copied) Stats() strategies.Stats {
	m.mu.Lock()
	defer m.mu.Unlock()
	return strategies.Stats{PrefetchRequests: 1, PrefetchBytes: m.size, PreemptiveBytes: m.size, PushRequests: m.pushed}
}

// Close pushes what the workload wrote and forgets the copy.
func (m *copied) Close(ctx context.Context) error {
	var err error
	if !m.readOnly {
		err = m.Sync(ctx)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.closed {
		m.closed = true
		m.err = errors.Join(err, m.file.Close())
	}
	return m.err
}

// Rsync is the strategy rsync: a daemon at the source; the region is downloaded
// before the workload may attach, and what it wrote goes back, as a delta, by Sync.
type Rsync struct{}

var _ strategies.Listener = Rsync{}

// Info describes the strategy.
func (Rsync) Info() strategies.Info {
	return strategies.Info{
		Name:         "rsync",
		Doc:          "peer: download of the whole region by rsync from an rsync daemon, then a local file; Sync sends the difference back",
		Capabilities: []strategies.Capability{strategies.Reads, strategies.Writes, strategies.Follows, strategies.Prefetch},
		Devices:      []string{""},
		DefaultChunk: 64 << 10,
		Params: []param.Spec{
			{Name: "block", Kind: param.KindSize, Default: "0", Max: 128 << 10, Doc: "rsync's block size (--block-size); 0 leaves it to rsync"},
			{Name: "compress", Kind: param.KindBool, Default: "false", Doc: "rsync's --compress"},
		},
		Consistency: "A copy, made while it is mounted. Sync of a read-only copy brings what changed at the source; else it compares both sides whole and sends the blocks that differ; two writers overwrite each other.",
	}
}

// Serve refuses.
func (Rsync) Serve(context.Context, transport.Transport, net.Conn, transport.Exports, param.Values) error {
	return noServe("rsync")
}

// Listen starts an rsync daemon whose module "region" has one file, the region's,
// under a second name. It needs a file system with hard links.
func (Rsync) Listen(ctx context.Context, host, path, dir string, _ param.Values) (strategies.Server, error) {
	tool, err := find("rsync", "rsync")
	if err != nil {
		return nil, err
	}
	top := filepath.Join(dir, "rsync-source")
	if err := os.Mkdir(top, 0o700); err != nil {
		return nil, err
	}
	if err := os.Link(path, filepath.Join(top, exportName)); err != nil {
		return nil, fmt.Errorf("rsync serves a folder: %w", err)
	}
	conf := filepath.Join(dir, "rsyncd.conf")
	text := fmt.Sprintf("use chroot = false\nuid = %d\ngid = %d\nlog file = /dev/null\n[%s]\n\tpath = %s\n\tread only = false\n", os.Geteuid(), os.Getegid(), exportName, top)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		return nil, err
	}
	s, err := listen(ctx, host, tool, func(port int) ([]string, error) {
		return []string{"--daemon", "--no-detach", "--config", conf, "--address", host, "--port", fmt.Sprint(port)}, nil
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// Mount downloads the region into a file of o.Dir.
func (Rsync) Mount(ctx context.Context, r strategies.Remote, o strategies.Options) (strategies.Mount, error) {
	tool, err := find("rsync", "rsync")
	if err != nil {
		return nil, err
	}
	addr, err := address(r)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(o.Dir, "rsync-")
	if err != nil {
		return nil, err
	}
	path, url := filepath.Join(dir, exportName), "rsync://"+addr+"/"+exportName+"/"+exportName
	args := []string{"--inplace", "--ignore-times"}
	if b := o.Params.Size("block"); b > 0 {
		args = append(args, fmt.Sprintf("--block-size=%d", b))
	}
	if o.Params.Bool("compress") {
		args = append(args, "--compress")
	}
	fail := func(err error) (strategies.Mount, error) { return nil, errors.Join(err, os.RemoveAll(dir)) }
	if err := run(ctx, nil, tool, slices.Concat(args, []string{url, path})...); err != nil {
		return fail(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return fail(err)
	}
	m := &copied{file: f, readOnly: o.ReadOnly}
	// --no-whole-file: rsync would otherwise send all where both ends are on one host.
	m.push = func(ctx context.Context) error {
		return run(ctx, nil, tool, slices.Concat(args, []string{"--no-whole-file", path, url})...)
	}
	m.pull = func(ctx context.Context) error {
		return run(ctx, nil, tool, slices.Concat(args, []string{"--no-whole-file", url, path})...)
	}
	if m, err = m.measured(); err != nil {
		return fail(err)
	}
	return folder{m, dir}, nil
}

// folder is a copy that has a folder of its own.
type folder struct {
	*copied
	dir string
}

func (f folder) Close(ctx context.Context) error {
	return errors.Join(f.copied.Close(ctx), os.RemoveAll(f.dir))
}
