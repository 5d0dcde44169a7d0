package snapshot

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
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/snapshot/image"
	"memsync/strategies/snapshot/shm"
	"memsync/strategies/transport"
)

// Strategy is "snapshot": the region is on this host; what is measured is what
// images of it cost.
type Strategy struct{}

var _ strategies.Strategy = Strategy{}

// Info describes the strategy.
func (Strategy) Info() strategies.Info {
	return strategies.Info{
		Name: "snapshot", Doc: "consistent images of a region on this host while its writer goes on",
		Capabilities: []strategies.Capability{strategies.Reads, strategies.Snapshots, strategies.LocalOnly, strategies.Copies},
		Devices:      []string{""}, DefaultChunk: 64 << 10,
		Params: []param.Spec{
			{Name: "mode", Kind: param.KindEnum, Default: "cow", Values: shm.Modes()[1:], Doc: "how a consistent image is had"},
			{Name: "pages", Kind: param.KindEnum, Default: "4KiB", Values: []string{"4KiB", "2MiB"}, Doc: "of the region's memory; 2MiB needs vm.nr_hugepages and --chunk of at least that"},
			{Name: "stream", Kind: param.KindSize, Default: "0", Doc: "mode queue: bytes of the stream; 0 is a quarter of the region, 1 to 64 MiB"},
			{Name: "spare", Kind: param.KindSize, Default: "16MiB", Min: 1 << 16, Max: 1 << 40, Doc: "mode cow: memory for chunks that are written to while an image is saved"},
			{Name: "full", Kind: param.KindBool, Default: "false", Doc: "mode cow: protect and read all of the region for each image, not what changed"},
			{Name: "store", Kind: param.KindEnum, Default: "memory", Values: []string{"memory", "disk"}, Doc: "where the image is; disk is the run's scratch folder, and its speed is in snapshot_time"},
			{Name: "images", Kind: param.KindInt, Default: "5", Min: 1, Max: 10000, Doc: "of op snapshot: images in one run"},
			{Name: "interval", Kind: param.KindDuration, Default: "200ms", Min: int64(time.Millisecond), Max: int64(time.Hour), Doc: "of op snapshot: from the beginning of one image to that of the next, at least"},
			{Name: "dirty_rate", Kind: param.KindSize, Default: "20MB", Doc: "of op snapshot: distinct page-bytes that the writer dirties a second, one aligned 4 KiB page a write; 0 is as fast as it can"},
			{Name: "publish", Kind: param.KindInt, Default: "16", Min: 1, Max: 1 << 20, Doc: "of op snapshot: writes in one publication"},
		},
		Consistency: "an image is one state that the writer published (queue, triple), or the memory at one instant (cow)",
	}
}

// Serve refuses: there is no source.
func (Strategy) Serve(context.Context, transport.Transport, net.Conn, transport.Exports, param.Values) error {
	return fmt.Errorf("strategy snapshot has no source: use transport local: %w", region.ErrNotSupported)
}

// Mount makes a region with the content, of which there is an image already.
func (Strategy) Mount(ctx context.Context, r strategies.Remote, o strategies.Options) (_ strategies.Mount, err error) {
	m := &mount{}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close(ctx))
		}
	}()
	content, err := r.Open(ctx)
	if err != nil {
		return nil, err
	}
	defer content.Close()
	// The kernel frees it with its last descriptor, whatever happens.
	var fd int
	if o.Params.Text("store") == "disk" {
		fd, err = unix.Open(o.Dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	} else {
		fd, err = unix.MemfdCreate("memsync-image", unix.MFD_CLOEXEC)
	}
	if err != nil {
		return nil, fmt.Errorf("make the image's file: %w", err)
	}
	if m.image, err = image.New(os.NewFile(uintptr(fd), "image"), content.Size(), o.Chunk); err != nil {
		return nil, err
	}
	if err := first(ctx, m.image, content); err != nil {
		return nil, err
	}
	h := Options{Stream: o.Params.Size("stream"), Spare: o.Params.Size("spare"), Full: o.Params.Bool("full")}
	if h.Mode, err = shm.ModeByName(o.Params.Text("mode")); err != nil {
		return nil, err
	}
	if o.Params.Text("pages") != "4KiB" {
		h.HugePage = 2 << 20
	}
	if m.host, err = Open(ctx, m.image, h); err != nil {
		return nil, err
	}
	life, stop := context.WithCancel(context.Background())
	m.stop = stop
	m.wg.Go(func() {
		if err := follow(life, m.host); err != nil {
			m.mu.Lock()
			m.err = err
			m.mu.Unlock()
		}
	})
	return m, nil
}

// first saves the content.
func first(ctx context.Context, img *image.Image, content region.Store) error {
	c, err := img.Begin()
	if err != nil {
		return err
	}
	buf := make([]byte, max(img.Chunk(), 1<<20))
	for off := int64(0); off < content.Size(); off += int64(len(buf)) {
		p := buf[:min(int64(len(buf)), content.Size()-off)]
		if err := content.ReadAt(ctx, p, off); err != nil {
			return err
		}
		if err := c.Write(p, off); err != nil {
			return err
		}
	}
	_, err = c.Finish(image.State{Taken: time.Now()})
	return err
}

type mount struct {
	image *image.Image
	host  *Host
	stop  context.CancelFunc
	wg    sync.WaitGroup

	mu  sync.Mutex
	err error // of the client

	once     sync.Once
	closeErr error
}

var (
	_ strategies.Snapshotter = (*mount)(nil)
	_ strategies.Troubled    = (*mount)(nil)
)

// Attachment is the region's memfd, and what a client needs beside it.
func (m *mount) Attachment() strategies.Attachment {
	files, names := m.host.Files()
	return strategies.Attachment{Kind: strategies.AttachMemfd, File: files[0], Size: m.image.Size(), Client: names, Beside: append([]*os.File{}, files[1:]...)}
}

func (m *mount) Sync(context.Context) error { return m.Err() }

func (m *mount) Stats() strategies.Stats {
	s := strategies.Stats{PreemptiveBytes: m.image.Size()}
	if c, ok := m.host.taker.(*cow); ok {
		c.mu.Lock()
		s.Faults = c.events
		c.mu.Unlock()
	}
	return s
}

// Err is what the client did wrong.
func (m *mount) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// Snapshot implements strategies.Snapshotter.
func (m *mount) Snapshot(ctx context.Context) (strategies.Snapshot, error) {
	r, err := m.host.Snapshot(ctx, nil)
	return strategies.Snapshot{Fresh: r.Fresh, Sequence: r.Sequence, Written: r.Bytes, Changed: r.Changed, Freeze: r.Freeze,
		Save: r.Save, Starved: int64(m.host.Status().Starved)}, err
}

// Restore implements strategies.Snapshotter.
func (m *mount) Restore(ctx context.Context, put func(p []byte, off int64) error) (strategies.Snapshot, error) {
	s, ok := m.image.Latest()
	return strategies.Snapshot{Fresh: ok, Sequence: s.Sequence}, m.image.Restore(ctx, put)
}

func (m *mount) Close(context.Context) error {
	m.once.Do(func() {
		if m.stop != nil {
			m.stop()
			m.wg.Wait()
		}
		if m.host != nil {
			m.closeErr = m.host.Close()
		}
		if m.image != nil {
			m.closeErr = errors.Join(m.closeErr, m.image.Close())
		}
	})
	return m.closeErr
}
