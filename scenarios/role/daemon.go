package role

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"memsync/strategies"
	"memsync/strategies/all"
	"memsync/strategies/backend"
	"memsync/strategies/chunk"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/transport"
	"memsync/strategies/transport/cert"
)

// MountArgs says what to mount and where the source is.
type MountArgs struct {
	Setup  Setup  `json:"setup"`
	Source string `json:"source"` // host:port; empty with transport local
}

// Mounted is the answer to a mount.
type Mounted struct {
	Attachment strategies.Attachment `json:"attachment"`
	Start, End int64                 // CLOCK_MONOTONIC, ns: Mount was called, Mount returned
	Stats      strategies.Stats      `json:"stats"` // when Mount returned
}

// daemon is the process with the strategy's destination side.
type daemon struct {
	known strategies.Registry
	local region.Store // with transport local
	mount strategies.Mount
	hook  *Conn // op migrate: to the application

	acceptor // op sync: of destinations behind this one
	stop     context.CancelFunc
}

func (d *daemon) ops() map[string]handler {
	return map[string]handler{
		"hold": on(d.hold), "mount": d.doMount, "faults": d.faults, "relay": on(d.relay), "finalize": d.finalize, "complete": on(d.complete),
		"sync":     on(func(ctx context.Context, _ none) (none, error) { return none{}, d.mount.Sync(ctx) }),
		"stats":    on(func(context.Context, none) (strategies.Stats, error) { return d.mount.Stats(), nil }),
		"verify":   on(func(ctx context.Context, a verifyArgs) (Verified, error) { return verifyStore(ctx, d.local, a) }),
		"requests": on(func(context.Context, none) (Requests, error) { return requests(d.local) }),
		"trouble":  on(d.trouble),
		"images":   on(d.images), "verify-image": on(d.verifyImage),
		"unmount":  on(d.unmount),
		"counters": on(counters), "settle": on(settle), "floors": on(daemonFloors),
	}
}

// hold fills the region that the daemon itself holds (transport local), before any clock.
func (d *daemon) hold(ctx context.Context, s Setup) (_ none, err error) {
	d.local, err = backend.Open(ctx, s.Backend, s.Dir)
	return none{}, err
}

// remote implements strategies.Remote.
type remote struct {
	transport transport.Transport
	dialer    transport.Dialer
	options   transport.Options
	local     region.Store
	params    param.Values
	addr      string // host:port of the source; empty with a local store
}

// Addr implements strategies.Addressed.
func (r remote) Addr() string { return r.addr }

func (r remote) Open(ctx context.Context) (region.Store, error) {
	if r.local != nil {
		return chunk.Split(keepOpen{r.local}, chunk.SplitDestination, r.params), nil
	}
	s, err := r.transport.Open(ctx, r.dialer, r.options)
	if err != nil {
		return nil, err
	}
	return chunk.Split(s, chunk.SplitDestination, r.params), nil
}

// OpenBeside implements strategies.Beside.
func (r remote) OpenBeside(ctx context.Context, suffix string, writable bool) (region.Store, error) {
	if r.local != nil {
		return nil, fmt.Errorf("transport local has nothing beside the region: %w", region.ErrNotSupported)
	}
	o := r.options
	o.Name, o.Connections, o.ReadOnly, o.Writer, o.Together = o.Name+suffix, 1, !writable, "", true
	return r.transport.Open(ctx, r.dialer, o)
}

func (r remote) Dial(ctx context.Context) (net.Conn, error) {
	if r.local != nil {
		return nil, fmt.Errorf("transport local has no connections: %w", region.ErrNotSupported)
	}
	return r.dialer.Dial(ctx)
}

// keepOpen is the daemon's own store, which outlives a mount: it is verified afterwards.
type keepOpen struct{ region.Store }

func (keepOpen) Close() error { return nil }

// View passes the inner store's view on, so that a local store needs no copy.
func (k keepOpen) View(off, n int64) ([]byte, bool) {
	if v, ok := k.Store.(region.Viewer); ok {
		return v.View(off, n)
	}
	return nil, false
}

func (d *daemon) doMount(ctx context.Context, body json.RawMessage, files []*os.File) (any, []*os.File, error) {
	closeAll(files)
	var a MountArgs
	if err := json.Unmarshal(body, &a); err != nil {
		return nil, nil, err
	}
	st, params, err := a.Setup.Resolve(d.known)
	if err != nil {
		return nil, nil, err
	}
	r := remote{params: params, addr: a.Source}
	if d.local != nil {
		r.local = chunk.Split(d.local, chunk.SplitSource, params)
		if a.Setup.Sleep > 0 {
			r.local = backend.Delayed{Store: r.local, RTT: time.Duration(a.Setup.Sleep)}
		}
	} else {
		var security transport.TLS
		if params.Bool("tls") {
			host, _, _ := net.SplitHostPort(a.Source)
			if security.Client, err = cert.ClientConfig(a.Setup.certificateDir(), host); err != nil {
				return nil, nil, err
			}
		}
		if r.transport, err = all.SecureTransport(a.Setup.Transport, security); err != nil {
			return nil, nil, err
		}
		r.options = all.TransportOptions(params)
		r.options.Name, r.options.ReadOnly = "region", a.Setup.ReadOnly || a.Setup.Migrate
		if !r.options.ReadOnly {
			r.options.Writer = rand.Text()
		}
		r.dialer = transport.DialerTo(r.transport, a.Source)
	}
	m := Mounted{Start: monotonic()}
	o := strategies.Options{
		Device: a.Setup.Device, Chunk: a.Setup.Chunk, PullWorkers: a.Setup.PullWorkers, PushWorkers: a.Setup.PushWorkers,
		ReadOnly: a.Setup.ReadOnly, Migrate: a.Setup.Migrate, Reopen: a.Setup.Reopen, Dir: a.Setup.Dir, Mode: a.Setup.Mode, Params: params,
	}
	if k := params.IntOr("files", 1); k > 1 && params.TextOr("file_system", "none") == "none" {
		d.mount, err = strategies.MountParts(ctx, st, r, o, k)
	} else {
		d.mount, err = st.Mount(ctx, r, o)
	}
	if err != nil {
		return nil, nil, err
	}
	m.End, m.Stats, m.Attachment = monotonic(), d.mount.Stats(), d.mount.Attachment()
	if f := m.Attachment.File; f != nil {
		return m, append([]*os.File{f}, m.Attachment.Beside...), nil
	}
	return m, nil, nil
}

// faultsArgs says where the workload mapped what the passed userfaultfd watches.
type faultsArgs struct {
	Base uintptr `json:"base"`
}

func (d *daemon) faults(_ context.Context, body json.RawMessage, files []*os.File) (any, []*os.File, error) {
	var a faultsArgs
	if err := json.Unmarshal(body, &a); err != nil || len(files) != 1 {
		closeAll(files)
		return nil, nil, errors.Join(err, fmt.Errorf("faults: want one userfaultfd, got %d files", len(files)))
	}
	s, ok := d.mount.(strategies.FaultServer)
	if !ok {
		closeAll(files)
		return nil, nil, fmt.Errorf("this mount serves no faults: %w", region.ErrNotSupported)
	}
	return none{}, nil, s.ServeFaults(files[0], a.Base)
}

// relay answers other destinations from here on.
func (d *daemon) relay(_ context.Context, a listenArgs) (l Listening, err error) {
	m, ok := d.mount.(strategies.Relay)
	if !ok {
		return l, fmt.Errorf("this mount serves no other destinations: %w", region.ErrNotSupported)
	}
	ctx, cancel := context.WithCancel(context.Background())
	d.stop = cancel
	l.Region, err = d.accept(ctx, Daemon, a.Addr, func(c net.Conn) {
		if err := m.Serve(ctx, c); err != nil && ctx.Err() == nil {
			fmt.Fprintln(os.Stderr, "daemon: serve:", err)
		}
	})
	return l, err
}

func (d *daemon) unmount(ctx context.Context, _ none) (_ none, err error) {
	if d.stop != nil {
		d.stop()
		err = d.acceptor.close()
	}
	if d.mount != nil {
		err = errors.Join(err, d.mount.Close(ctx))
	}
	if d.hook != nil {
		err = errors.Join(err, d.hook.Close())
		d.hook = nil
	}
	return none{}, err
}

// letGo closes a mount that the runner did not ask to be unmounted, as after a
// failure: what the kernel holds of it must not outlive the process. It is
// shorter than Process.Stop waits.
func (d *daemon) letGo() {
	ctx, cancel := context.WithTimeout(context.Background(), 1500*time.Millisecond)
	defer cancel()
	_, _ = d.unmount(ctx, none{})
}

// Trouble is the daemon's side of a read or write that failed in the workload.
type Trouble struct {
	Text string `json:"text,omitempty"`
}

func (d *daemon) trouble(context.Context, none) (t Trouble, _ error) {
	if m, ok := d.mount.(strategies.Troubled); ok {
		if err := m.Err(); err != nil {
			t.Text = err.Error()
		}
	}
	return t, nil
}
