// Package nbddirect is the strategy nbd-direct: a block device of the kernel
// whose server sits across the network. The kernel's own client speaks to the
// source; after the handshake no byte passes through the daemon.
package nbddirect

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"memsync/strategies"
	"memsync/strategies/device/nbdk"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/transport"
	"memsync/strategies/transport/nbd"
)

// Strategy is nbd-direct.
type Strategy struct{}

var _ strategies.Strategy = Strategy{}

// Info describes the strategy.
func (Strategy) Info() strategies.Info {
	return strategies.Info{
		Name:         "nbd-direct",
		Doc:          "the kernel's NBD client, connected straight to the source",
		Capabilities: []strategies.Capability{strategies.Reads, strategies.Writes},
		Devices:      []string{"nbd"},
		Transports:   []string{"nbd"},
		Params:       nbdk.Params(),
		DefaultChunk: 64 << 10,
		Consistency: "One reader and writer host. Readers of the device see its writers at once (one page cache). " +
			"Writes reach the source when the kernel writes them back: by msync or fsync, Sync or Close. " +
			"Pages that were read stay cached: later changes at the source are not seen.",
	}
}

// exportName is what sources call the region (strategies.Exported).
const exportName = "region"

// wholeSectors marks the name of an export that the daemon wants rounded up to
// the device's sectors. No export's own name begins with it.
const wholeSectors = "memsync sectors: "

// exports offers each region of e rounded up, too. Its lease is the region's.
func exports(e transport.Exports) transport.Exports {
	own := func(name string) string { return strings.TrimPrefix(name, wholeSectors) }
	return transport.With(e, func(name string) (region.Store, error) {
		s, err := e.Open(own(name))
		if err == nil && own(name) != name {
			s = nbdk.Sectors(s)
		}
		return s, err
	}, own)
}

// Serve speaks NBD, whatever the transport is: the other end is a kernel.
func (Strategy) Serve(ctx context.Context, t transport.Transport, conn net.Conn, e transport.Exports, _ param.Values) error {
	if t == nil || t.Name() != "nbd" {
		t = &nbd.Transport{}
	}
	return t.Serve(ctx, conn, exports(e))
}

// Mount connects and hands the connections to the kernel; two round trips, four
// where the region is no multiple of 512 bytes. Options.Chunk is not used: the
// kernel chooses the size of requests.
func (Strategy) Mount(ctx context.Context, r strategies.Remote, o strategies.Options) (strategies.Mount, error) {
	n := 4
	if o.Params.Has("nbd_connections") {
		n = o.Params.Int("nbd_connections")
	}
	if err := nbdk.Probe(); err != nil {
		return nil, err
	}
	own := exportName
	if x, ok := r.(strategies.Exported); ok {
		own = x.Export()
	}
	conns, e, err := connect(ctx, r, n, own)
	if errors.Is(err, region.ErrNotSupported) {
		return mountLocal(ctx, r, o, err)
	}
	if err != nil {
		return nil, err
	}
	size, name := e.Size, own
	if size%512 != 0 {
		closeAll(conns)
		name = wholeSectors + own
		if conns, e, err = connect(ctx, r, n, name); err != nil {
			return nil, err
		}
	}
	redial := func(ctx context.Context) (net.Conn, nbd.Export, error) {
		conns, e, err := connect(ctx, r, 1, name)
		if err != nil {
			return nil, e, err
		}
		return conns[0], e, nil
	}
	d, err := nbdk.Connect(ctx, conns, e, nbdk.Options{ReadOnly: o.ReadOnly, Params: o.Params, Redial: redial})
	if err != nil {
		return nil, err
	}
	return &mount{dev: d, size: size, readOnly: o.ReadOnly}, nil
}

// mountLocal is for a region that the daemon holds itself: there is nothing to
// connect to, so the kernel is connected to the daemon.
func mountLocal(ctx context.Context, r strategies.Remote, o strategies.Options, why error) (strategies.Mount, error) {
	s, err := r.Open(ctx)
	if err != nil {
		return nil, errors.Join(why, err)
	}
	d, err := nbdk.Open(ctx, s, nbdk.Options{ReadOnly: o.ReadOnly, Params: o.Params})
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return &mount{dev: d, size: s.Size(), readOnly: o.ReadOnly, local: s}, nil
}

// connect makes n connections to an export, in parallel; one if the server does
// not allow several.
func connect(ctx context.Context, r strategies.Remote, n int, name string) (conns []net.Conn, e nbd.Export, err error) {
	made := make([]net.Conn, n)
	got := make([]nbd.Export, n)
	g, gctx := errgroup.WithContext(ctx)
	for i := range n {
		g.Go(func() (err error) {
			if made[i], err = r.Dial(gctx); err != nil {
				return fmt.Errorf("connect to the source: %w", err)
			}
			got[i], err = (&nbd.Transport{}).Negotiate(gctx, made[i], name)
			return err
		})
	}
	err = g.Wait()
	if err == nil && got[0].Flags&nbd.FlagMultiConn == 0 {
		closeAll(made[1:])
		made = made[:1]
	}
	for i := range made {
		if err == nil && got[i].Size != got[0].Size {
			err = fmt.Errorf("the source's export has %d bytes on one connection and %d on another: %w", got[0].Size, got[i].Size, region.ErrMismatch)
		}
	}
	if err != nil {
		closeAll(made)
		return nil, nbd.Export{}, err
	}
	return made, got[0], nil
}

func closeAll(conns []net.Conn) {
	for _, c := range conns {
		if c != nil {
			_ = c.Close()
		}
	}
}

type mount struct {
	dev      *nbdk.Device
	size     int64
	readOnly bool
	local    region.Store // nil where there is a source

	closing sync.Once
	err     error
}

func (m *mount) Attachment() strategies.Attachment {
	return strategies.Attachment{Kind: strategies.AttachPath, Path: m.dev.Path(), Size: m.size, ReadOnly: m.readOnly}
}

// Sync writes the kernel's dirty pages back and flushes the source: one fsync of
// the device, which the source, not this process, serves.
func (m *mount) Sync(ctx context.Context) error {
	if m.readOnly {
		return nil
	}
	return m.dev.Flush(ctx)
}

func (m *mount) Stats() strategies.Stats {
	s := m.dev.Stats()
	return strategies.Stats{
		DemandRequests: s.ReadRequests, DemandBytes: s.ReadBytes, PushRequests: s.WriteRequests, PushBytes: s.WriteBytes,
		Extra: map[string]int64{"device_flushes": s.Flushes, "reconnects": m.dev.Reconnects()},
	}
}

// Err is the latest trouble with the connections to the source.
func (m *mount) Err() error { return m.dev.Err() }

// Close writes back, flushes the source and detaches the device.
func (m *mount) Close(ctx context.Context) error {
	m.closing.Do(func() {
		m.err = m.dev.Close(ctx)
		if m.local != nil {
			m.err = errors.Join(m.err, m.local.Close())
		}
	})
	return m.err
}
