package peers

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/pojntfx/go-nbd/pkg/client"
	gonbd "github.com/pojntfx/go-nbd/pkg/server"
	"golang.org/x/sys/unix"

	"memsync/strategies"
	"memsync/strategies/device/nbdk"
	"memsync/strategies/direct"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/transport"
)

// exportName is what the region is called on the wire.
const exportName = "region"

// serveGoNBD answers one connection with go-nbd's server and its default options.
func serveGoNBD(ctx context.Context, conn net.Conn, e transport.Exports) error {
	s, err := e.Open(exportName)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() }) // it knows no context
	defer stop()
	b := goBackend{ctx, s}
	// The first export answers also for the name that stands for "any".
	return gonbd.Handle(conn, []*gonbd.Export{{Name: exportName, Backend: b}, {Name: "", Backend: b}}, nil)
}

// goBackend is a store as go-nbd wants it.
type goBackend struct {
	ctx context.Context
	s   region.Store
}

func (b goBackend) ReadAt(p []byte, off int64) (int, error) {
	if err := b.s.ReadAt(b.ctx, p, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (b goBackend) WriteAt(p []byte, off int64) (int, error) {
	if err := b.s.WriteAt(b.ctx, p, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (b goBackend) Size() (int64, error) { return b.s.Size(), nil }
func (b goBackend) Sync() error          { return b.s.Flush(b.ctx) }

// DirectGoNBD is direct-mount-go-nbd: go-nbd's server and memsync's direct mount.
type DirectGoNBD struct{ direct.Strategy }

// Info describes the strategy.
func (d DirectGoNBD) Info() strategies.Info {
	i := d.Strategy.Info()
	i.Name, i.Doc = "direct-mount-go-nbd", "direct-mount of memsync on a region that the peer go-nbd serves"
	i.Devices = []string{"fuse"}
	return i
}

// Serve answers one connection.
func (DirectGoNBD) Serve(ctx context.Context, _ transport.Transport, conn net.Conn, e transport.Exports, _ param.Values) error {
	return serveGoNBD(ctx, conn, e)
}

// GoNBD is the strategy go-nbd: the library's server and its client, which hands
// one connection to the kernel (by ioctl) and polls until the device has its size.
type GoNBD struct{}

var _ strategies.Strategy = GoNBD{}

// goBlock is go-nbd's block size where neither side asks for another.
const goBlock = 4096

// Info describes the strategy.
func (GoNBD) Info() strategies.Info {
	return strategies.Info{
		Name:         "go-nbd",
		Doc:          "peer: server and client of go-nbd, the thesis's library; one connection, one request at a time at the source",
		Capabilities: []strategies.Capability{strategies.Reads, strategies.Writes},
		Devices:      []string{"nbd"},
		DefaultChunk: 64 << 10,
		Whole:        goBlock, // what is beyond the last whole block would be cut off
		Consistency: "One reader and writer host, through the kernel's page cache. A write is answered when the source has it; " +
			"there is no flush. Later changes at the source are not seen.",
	}
}

// Serve answers one connection.
func (GoNBD) Serve(ctx context.Context, _ transport.Transport, conn net.Conn, e transport.Exports, _ param.Values) error {
	return serveGoNBD(ctx, conn, e)
}

// Mount connects and waits until the device is ready.
func (GoNBD) Mount(ctx context.Context, r strategies.Remote, o strategies.Options) (strategies.Mount, error) {
	if err := nbdk.Probe(); err != nil {
		return nil, err
	}
	node, err := freeDevice()
	if err != nil {
		return nil, err
	}
	conn, err := r.Dial(ctx)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("connect to the source: %w", err), node.Close())
	}
	m := &goMount{node: node, conn: conn, readOnly: o.ReadOnly, ended: make(chan error, 1)}
	ready := make(chan struct{})
	go func() {
		m.ended <- client.Connect(conn, node, &client.Options{
			ExportName: exportName, Timeout: 30, // seconds; without it a lost source would hang the workload for good
			OnConnected: func() { close(ready) },
		})
	}()
	select {
	case <-ready:
		m.size, err = deviceSize(node.Name())
	case err = <-m.ended:
		m.ended <- err
		err = fmt.Errorf("go-nbd: connect %s: %w", node.Name(), errors.Join(err, errors.New("it ended")))
	case <-ctx.Done():
		err = fmt.Errorf("go-nbd: connect %s: %w", node.Name(), context.Cause(ctx))
	}
	if err != nil {
		return nil, errors.Join(err, m.Close(context.WithoutCancel(ctx)))
	}
	return m, nil
}

// freeDevice opens an nbd device that nobody uses, and locks it.
func freeDevice() (*os.File, error) {
	nodes, err := filepath.Glob("/sys/block/nbd*")
	if err != nil {
		return nil, err
	}
	for i := range nodes {
		if _, err := os.Stat(fmt.Sprintf("/sys/block/nbd%d/pid", i)); err == nil {
			continue
		}
		f, err := os.OpenFile(fmt.Sprintf("/dev/nbd%d", i), os.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("open an nbd device: %w", err)
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			return f, nil
		}
		_ = f.Close()
	}
	return nil, fmt.Errorf("all %d nbd devices are in use", len(nodes))
}

func deviceSize(path string) (size int64, err error) {
	b, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(path), "size"))
	if err == nil {
		_, err = fmt.Sscan(strings.TrimSpace(string(b)), &size)
	}
	return size * 512, err
}

type goMount struct {
	node     *os.File
	conn     net.Conn
	size     int64
	readOnly bool
	ended    chan error // what client.Connect returned

	once sync.Once
	err  error
}

func (m *goMount) Attachment() strategies.Attachment {
	return strategies.Attachment{Kind: strategies.AttachPath, Path: m.node.Name(), Size: m.size, ReadOnly: m.readOnly}
}

// Sync writes the kernel's dirty pages back; the source has what was answered.
func (m *goMount) Sync(ctx context.Context) error {
	if m.readOnly {
		return nil
	}
	done := make(chan error, 1)
	go func() { done <- m.node.Sync() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Stats are none: neither library nor ioctl counts.
func (m *goMount) Stats() strategies.Stats { return strategies.Stats{} }

// Close writes back and disconnects.
func (m *goMount) Close(ctx context.Context) error {
	m.once.Do(func() {
		var errs []error
		if m.size > 0 {
			errs = append(errs, m.Sync(ctx))
		}
		errs = append(errs, client.Disconnect(m.node), m.conn.Close())
		select {
		case <-m.ended: // how the connection ended
		case <-time.After(5 * time.Second):
			errs = append(errs, fmt.Errorf("go-nbd: the client of %s does not end", m.node.Name()))
		}
		m.err = errors.Join(append(errs, m.node.Close())...)
	})
	return m.err
}
