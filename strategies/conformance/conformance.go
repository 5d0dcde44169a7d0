// Package conformance is the one suite that every strategy passes, on every
// device and over every transport. It looks at a strategy as the runner does: a
// source in this process, the mount in this process, and the workload in
// another one, which maps the region and reads and writes it.
//
// A test package calls Run for each combination and gives its TestMain to Main.
package conformance

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"memsync/strategies"
	"memsync/strategies/device"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/transport"
)

// Factory says what to test.
type Factory struct {
	Strategy strategies.Strategy
	Device   string   // one of Info().Devices
	Settings []string // of the strategy's parameters, as for --set
	// Transport between source and daemon; nil is "local": the daemon holds the source.
	Transport transport.Transport
	Network   string // "unix" or "tcp", with a Transport
	// NoWorkers turns background pulls and pushes off; else the strategy's defaults count.
	NoWorkers bool
	Chunk     int64 // bytes; 0 is the strategy's default
	// Block is what the Settings make one demand pull cover, in bytes: it comes or fails as
	// a whole. 0 is the chunk.
	Block int64
	// Eager says that the Settings pull all of the region at once, whether it is read or not.
	Eager bool
}

const (
	deadline = 300 * time.Millisecond // of what must end by it
	slack    = 5 * time.Second        // by which it may be late on a busy machine
)

// patience is for what must succeed: 20 s. CONFORMANCE_PATIENCE=2s is for cases
// that are known to fail, which would take as long.
func patience() time.Duration {
	if d, err := time.ParseDuration(os.Getenv("CONFORMANCE_PATIENCE")); err == nil {
		return d
	}
	return 20 * time.Second
}

// suite is a Factory; its methods whose names begin with Test are the cases.
type suite struct{ Factory }

// Run runs all cases. It changes no global state, but looks at this process's
// descriptors, mounts and goroutines: nothing else may run in parallel.
func Run(t *testing.T, f Factory) {
	s := reflect.ValueOf(suite{f})
	for i := range s.NumMethod() {
		if name, ok := strings.CutPrefix(s.Type().Method(i).Name, "Test"); ok {
			t.Run(name, s.Method(i).Interface().(func(*testing.T)))
		}
	}
}

func (f Factory) can(c strategies.Capability) bool { return f.Strategy.Info().Can(c) }

func (f Factory) chunk() int64 {
	if f.Chunk > 0 {
		return f.Chunk
	}
	return f.Strategy.Info().DefaultChunk
}

// need leaves the case out where the strategy does not claim to do this.
func (f Factory) need(t *testing.T, c strategies.Capability) {
	if !f.can(c) {
		t.Skipf("%s does not declare %q", f.Strategy.Info().Name, c)
	}
}

// remote is a source and the way to it.
type remote struct {
	f      Factory
	store  region.Store
	values param.Values
	addr   net.Addr
	writer string // asks for the lease to write; empty does not
}

// Addr implements strategies.Addressed.
func (r remote) Addr() string {
	if r.addr == nil {
		return ""
	}
	return r.addr.String()
}

// Open implements strategies.Remote.
func (r remote) Open(ctx context.Context) (region.Store, error) {
	if r.f.Transport == nil {
		return open{r.store}, ctx.Err()
	}
	return r.f.Transport.Open(ctx, transport.DialFunc(r.Dial), transport.Options{Name: "region", Connections: 2, Writer: r.writer, ReadOnly: r.writer == ""})
}

// OpenBeside implements strategies.Beside.
func (r remote) OpenBeside(ctx context.Context, suffix string, writable bool) (region.Store, error) {
	if r.f.Transport == nil {
		return nil, region.ErrNotSupported
	}
	return r.f.Transport.Open(ctx, transport.DialFunc(r.Dial), transport.Options{Name: "region" + suffix, Connections: 1, ReadOnly: !writable, Together: true})
}

// Dial implements strategies.Remote.
func (r remote) Dial(ctx context.Context) (net.Conn, error) {
	if r.addr == nil {
		return nil, region.ErrNotSupported
	}
	if own, ok := r.f.Transport.(transport.Network); ok {
		return own.Dial(ctx, r.addr.String())
	}
	return new(net.Dialer).DialContext(ctx, r.addr.Network(), r.addr.String())
}

// open is a store whose Close leaves the source as it is.
type open struct{ region.Store }

func (open) Close() error { return nil }

func (o open) View(off, n int64) ([]byte, bool) {
	if v, ok := o.Store.(region.Viewer); ok {
		return v.View(off, n)
	}
	return nil, false
}

// serve answers connections to store until stop is called.
func (f Factory) serve(t *testing.T, store region.Store, dir string, v param.Values) (_ remote, stop func()) {
	r := remote{f: f, store: store, values: v, writer: "the test's writer"}
	if f.Transport == nil {
		return r, func() {}
	}
	if own, ok := f.Strategy.(strategies.Listener); ok {
		return f.listen(t, own, r, dir)
	}
	addr := "127.0.0.1:0"
	if f.Network == "unix" {
		addr = filepath.Join(dir, "source.sock")
	}
	var l net.Listener
	var err error
	if own, ok := f.Transport.(transport.Network); ok {
		l, err = own.Listen(t.Context(), addr, transport.Limits{})
	} else {
		l, err = net.Listen(f.Network, addr)
	}
	if err != nil {
		t.Fatal(err)
	}
	r.addr = l.Addr()
	ctx, cancel := context.WithCancel(context.Background())
	exports := transport.NewLeases(transport.One{Name: "region", Store: store})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				// Its end is the mount's business: a connection may break while a case ends.
				_ = f.Strategy.Serve(ctx, f.Transport, conn, exports, v)
			})
		}
	})
	return r, func() {
		_ = l.Close()
		cancel()
		wg.Wait()
	}
}

// listen lets the strategy's own program serve the store, which it sees as a file
// that this process serves through FUSE.
func (f Factory) listen(t *testing.T, own strategies.Listener, r remote, dir string) (_ remote, stop func()) {
	v, err := param.New(device.Params("fuse"), []string{"read_ahead=0"})
	if err != nil {
		t.Fatal(err)
	}
	d, err := device.Open(t.Context(), "fuse", r.store, device.Options{Dir: dir, Params: v})
	if err != nil {
		t.Fatal(err)
	}
	end := func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience())
		defer cancel()
		_ = d.Close(ctx) // its store's errors are the case's own
	}
	s, err := own.Listen(t.Context(), "127.0.0.1", d.Path(), dir, r.values)
	if err == nil {
		r.addr, err = net.ResolveTCPAddr("tcp", s.Addr())
	}
	if err != nil {
		end()
		t.Fatal(err)
	}
	return r, sync.OnceFunc(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		end()
	})
}

// rig is a mount with a workload attached.
type rig struct {
	strategies.Mount
	*toucher
	t          *testing.T
	remote     remote
	options    strategies.Options
	ended      bool     // errors of the end are expected
	stop       []func() // in reverse order
	stopServer func()   // ends listener and connections; may be called twice
}

// options are those of the factory, with more settings.
func (f Factory) options(t *testing.T, dir string, settings ...string) strategies.Options {
	info := f.Strategy.Info()
	all := append([]string(nil), f.Settings...)
	for _, s := range settings {
		name, _, _ := strings.Cut(s, "=")
		for _, p := range info.Params {
			if p.Name == name {
				all = append(all, s)
				break
			}
		}
	}
	v, err := param.New(info.Params, all)
	if err != nil {
		t.Fatal(err)
	}
	o := strategies.Options{Device: f.Device, Chunk: f.chunk(), PullWorkers: info.PullWorkers, PushWorkers: info.PushWorkers, Dir: dir, Params: v}
	if f.NoWorkers {
		o.PullWorkers, o.PushWorkers = 0, 0
	}
	return o
}

// watch fails the test at the end of stop if anything is left that was not
// there when watch was called.
func watch(t *testing.T, dir string) (stop func()) {
	goroutines := goleak.IgnoreCurrent()
	before := held(t)
	return func() {
		if err := goleak.Find(goroutines); err != nil {
			t.Errorf("left over: %v", err)
		}
		after := held(t)
		for what, n := range after {
			if n > before[what] {
				t.Errorf("left over: %s, %d more", what, n-before[what])
			}
		}
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Error(err)
		}
		for _, e := range entries {
			t.Errorf("left over: file %s", e.Name())
		}
	}
}

// held counts this process's descriptors by what they are, its mounts and its children.
func held(t *testing.T) map[string]int {
	h := map[string]int{}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil {
			to = strings.TrimRight(to, "0123456789]") // socket:[1234]
			h["descriptor of "+to]++
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for l := range strings.Lines(string(mounts)) {
		if f := strings.Fields(l); len(f) > 4 {
			h["mount "+f[4]]++
		}
	}
	tasks, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		if c, err := os.ReadFile(task); err == nil {
			h["child process"] += len(strings.Fields(string(c)))
		}
	}
	return h
}

// mount serves source, mounts it and attaches a workload. The end of the test
// detaches and closes, and fails it if something is left over.
func (f Factory) mount(t *testing.T, source region.Store, change func(*strategies.Options), settings ...string) *rig {
	t.Helper()
	g, err := f.tryMount(t, source, change, settings...)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func (f Factory) tryMount(t *testing.T, source region.Store, change func(*strategies.Options), settings ...string) (*rig, error) {
	t.Helper()
	// Not t.TempDir: its clean-up would hide what is left over, or fail on a mount.
	top, err := os.MkdirTemp("", "conformance")
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(top, "run")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	g := &rig{t: t}
	g.stop = append(g.stop, func() { _ = os.RemoveAll(top) }, watch(t, dir))
	t.Cleanup(g.end)
	o := f.options(t, dir, settings...)
	if change != nil {
		change(&o)
	}
	r, stop := f.serve(t, source, top, o.Params)
	if o.ReadOnly {
		r.writer = ""
	}
	g.remote, g.options, g.stopServer = r, o, stop
	g.stop = append(g.stop, stop)
	ctx, cancel := context.WithTimeout(t.Context(), patience())
	defer cancel()
	m, err := f.Strategy.Mount(ctx, r, o)
	if err != nil {
		return g, err
	}
	g.Mount = m
	g.stop = append(g.stop, func() { // also after a case that closed it: the second Close
		ctx, cancel := context.WithTimeout(context.Background(), patience())
		defer cancel()
		if err := m.Close(ctx); err != nil && !g.ended {
			t.Errorf("close the mount: %v", err)
		}
	})
	if g.toucher, err = startToucher(); err != nil {
		return g, err
	}
	g.stop = append(g.stop, func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience())
		defer cancel()
		if err := g.toucher.stop(ctx); err != nil && !g.ended {
			t.Errorf("stop the workload: %v", err)
		}
	})
	return g, g.attach(ctx, m, "")
}

// end undoes all, last thing first.
func (g *rig) end() {
	for i := len(g.stop) - 1; i >= 0; i-- {
		g.stop[i]()
	}
	g.stop = nil
}

// close detaches the workload and closes the mount, which must succeed, unless the case says otherwise.
func (g *rig) close(ctx context.Context) {
	g.t.Helper()
	if err := g.detach(ctx); err != nil {
		g.t.Errorf("detach: %v", err)
	}
	if err := g.Mount.Close(ctx); err != nil && !g.ended {
		g.t.Errorf("close the mount: %v", err)
	}
}

// barrier makes what the workload wrote reach the source.
func (g *rig) barrier(ctx context.Context) {
	g.t.Helper()
	if err := g.toucher.sync(ctx); err != nil {
		g.t.Fatalf("msync: %v", err)
	}
	if err := g.Mount.Sync(ctx); err != nil {
		g.t.Fatalf("Sync: %v", err)
	}
}

// expect reads [off, off+n) in the workload and compares it with want[off:].
func (g *rig) expect(ctx context.Context, want []byte, off, n int64) {
	g.t.Helper()
	p, err := g.read(ctx, off, int(n))
	if err != nil {
		g.t.Fatal(err)
	}
	if err := same(p, want[off:off+n], off); err != nil {
		g.t.Fatal(err)
	}
}

// same returns an error that names the first byte that differs; got begins at off.
func same(got, want []byte, off int64) error {
	if len(got) != len(want) {
		return fmt.Errorf("%d bytes, want %d: %w", len(got), len(want), region.ErrMismatch)
	}
	for i := range got {
		if got[i] != want[i] {
			return fmt.Errorf("byte at %d is %#x, want %#x: %w", off+int64(i), got[i], want[i], region.ErrMismatch)
		}
	}
	return nil
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience())
	t.Cleanup(cancel)
	return ctx
}

var errInjected = errors.New("injected by the test")
