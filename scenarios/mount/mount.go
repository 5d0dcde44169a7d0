// Package mount makes the regions of a server files on this host that any program
// can open, and keeps them for as long as somebody wants them: any strategy whose
// device has a path, over any transport. It has what a benchmark does not need and
// a user does: names, reconnection, status, and clean-up after SIGKILL.
package mount

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"memsync/scenarios"
	"memsync/strategies"
	"memsync/strategies/all"
	"memsync/strategies/device"
	"memsync/strategies/mountinfo"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/transport"
	"memsync/strategies/transport/cert"
	"memsync/strategies/watch"
)

// Spec says what to mount, where and how.
type Spec struct {
	Address Address
	// Path is the file to make, which may not be there, in a folder that is; or a
	// folder that is there: then the region is a file below it, called by its name, or
	// all regions of the server are where Address has no name.
	Path        string
	Strategy    strategies.Strategy
	Device      string // empty: the strategy's first
	Transport   string // empty: the strategy's first, else "nbd"
	ReadOnly    bool
	Chunk       int64       // bytes; 0 is the strategy's
	PullWorkers int         // -1 is the strategy's
	PushWorkers int         // -1 is the strategy's
	Settings    []string    // name=value of the parameters of strategy, device and transport
	TLS         string      // folder with the certificates of cert.Authority; empty: none
	Mode        os.FileMode // permission bits of the files; 0 is 0600
	// Via makes the connections, unless nil, in place of dialling Address, whose host is
	// still the one of the source's certificate.
	Via transport.Dialer
	// Reconnect is how long a source that is gone is tried for; until then whoever
	// reads waits. 0: errors at once.
	Reconnect time.Duration
	Log       func(format string, args ...any) // unless nil, gets what a user wants to know; may be called concurrently
}

// Mountable returns the strategies of r whose region is a path that programs can open.
func Mountable(r strategies.Registry) (names []string) {
	for _, s := range r {
		if unfit(s.Info()) == nil {
			names = append(names, s.Info().Name)
		}
	}
	return names
}

// unfit says why a strategy cannot be mounted.
func unfit(i strategies.Info) error {
	const instead = "use direct-mount or managed-mount"
	why := ""
	switch paths := slices.Contains(i.Devices, "fuse") || slices.Contains(i.Devices, "nbd"); {
	case i.Can(strategies.LocalOnly):
		why = "it has no source on another host; " + instead
	case !i.Can(strategies.Reads) || !paths && i.Can(strategies.Follows):
		why = "it keeps a copy in memory that has no path; " + instead
	case !paths && i.Can(strategies.Copies):
		why = "it copies the region first, from a source of a run that speaks HTTP; " + instead
	case i.Can(strategies.Migrates):
		why = "its source must be a memory that a program gives away, not a served file; " + instead
	case !paths:
		why = "its region is a mapping whose faults it serves, of one program that hands over a userfaultfd, and has no path; " + instead
	default:
		return nil
	}
	return fmt.Errorf("strategy %s cannot be mounted: %s: %w", i.Name, why, region.ErrNotSupported)
}

// Mount is what Open made. Its methods may be called concurrently.
type Mount struct {
	spec    Spec
	regions []*mounted
	began   time.Time
	dir     string // with the record; owned by this process
	disown  func()
	stop    func() // answering status
}

// mounted is one region of it.
type mounted struct {
	name, path string
	link       string // target of the symbolic link that path is, for a block device
	remote     *remote
	mount      strategies.Mount
}

// undo is how long taking back what Open had made may take where it fails.
const undo = 30 * time.Second

// Open mounts. ctx bounds the opening; the mount lives until Close. Errors match
// scenarios.ErrUsage, region.ErrMissing (no such region; the error names those that
// there are), region.ErrNotSupported and region.ErrNotPermitted.
func Open(ctx context.Context, s Spec) (_ *Mount, err error) {
	if s.Log == nil {
		s.Log = func(string, ...any) {}
	}
	params, err := s.resolve()
	if err != nil {
		return nil, err
	}
	var security transport.TLS
	if s.TLS != "" {
		host, _, _ := net.SplitHostPort(s.Address.Host)
		if security.Client, err = cert.ClientConfig(s.TLS, cmp.Or(host, "localhost")); err != nil {
			return nil, fmt.Errorf("certificates: %w: %w", err, scenarios.ErrUsage)
		}
	}
	t, err := all.SecureTransport(s.Transport, security)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, scenarios.ErrUsage)
	}
	dialer, err := s.Address.dialer(t)
	if err != nil {
		return nil, err
	}
	if s.Via != nil {
		dialer = s.Via
	}
	m := &Mount{spec: s, began: time.Now()}
	if err := m.place(ctx, t, dialer); err != nil {
		return nil, err
	}
	if m.dir, m.disown, err = scenarios.NewOwned(folderPrefix); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undo)
			defer cancel()
			err = errors.Join(err, m.Close(ctx))
		}
	}()
	if err := m.record(); err != nil {
		return nil, err
	}
	g, gctx := errgroup.WithContext(ctx)
	for i, r := range m.regions {
		r.remote = &remote{transport: t, dialer: dialer, options: all.TransportOptions(params), reconnect: s.Reconnect, log: s.Log}
		o := &r.remote.options
		o.Name, o.ReadOnly = r.name, s.ReadOnly
		if !s.ReadOnly {
			o.Writer = rand.Text()
		}
		g.Go(func() (err error) {
			r.mount, err = m.open(gctx, r, params, i)
			if err == nil {
				r.remote.ready.Store(true)
			} else if errors.Is(err, region.ErrMissing) {
				if names, lerr := list(ctx, t, dialer); lerr == nil {
					err = fmt.Errorf("no region %q at %s; it has: %s: %w", r.name, s.Address.Host, strings.Join(quoted(names), ", "), region.ErrMissing)
				}
			} else if _, why := r.remote.outage(); why != nil {
				err = fmt.Errorf("%s cannot be reached: %w", s.Address.Host, why) // once, whoever else found out
			} else {
				err = fmt.Errorf("region %q: %w", r.name, err)
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	if err := m.record(); err != nil { // now with the targets of links
		return nil, err
	}
	if m.stop, err = answer(m.dir, func() any { return m.Status() }); err != nil {
		return nil, err
	}
	return m, nil
}

func quoted(names []string) (q []string) {
	for _, n := range names {
		q = append(q, fmt.Sprintf("%q", n))
	}
	return q
}

// resolve fills in defaults and checks what needs nobody's answer.
func (s *Spec) resolve() (param.Values, error) {
	usage := func(err error) (param.Values, error) {
		return param.Values{}, fmt.Errorf("%w: %w", err, scenarios.ErrUsage)
	}
	info := s.Strategy.Info()
	if err := unfit(info); err != nil {
		return param.Values{}, err
	}
	switch {
	case s.Device == "":
		s.Device = info.Devices[0]
	case !slices.Contains(append(all.DeviceNames(), device.Auto), s.Device):
		return usage(fmt.Errorf("unknown device %q; valid: %s", s.Device, strings.Join(paths(info), ", ")))
	}
	if !slices.Contains(paths(info), s.Device) {
		return param.Values{}, fmt.Errorf("device %s is no path that programs open; for %s use: %s: %w", s.Device, info.Name, strings.Join(paths(info), ", "), region.ErrNotSupported)
	}
	transports := all.TransportNames()
	if len(info.Transports) > 0 {
		transports = info.Transports
	}
	if a := s.Address.Transport; a != "" && s.Transport != "" && a != s.Transport {
		return usage(fmt.Errorf("the address is of transport %s, and %s was asked for", a, s.Transport))
	}
	s.Transport = cmp.Or(s.Transport, s.Address.Transport, transports[0])
	if !slices.Contains(transports, s.Transport) {
		return usage(fmt.Errorf("transport %q with %s; valid: %s", s.Transport, info.Name, strings.Join(transports, ", ")))
	}
	s.Chunk = cmp.Or(s.Chunk, info.DefaultChunk)
	if err := region.CheckChunk(s.Chunk); err != nil {
		return usage(err)
	}
	if s.PullWorkers < 0 {
		s.PullWorkers = info.PullWorkers
	}
	if s.PushWorkers < 0 {
		s.PushWorkers = info.PushWorkers
	}
	if s.Reconnect < 0 {
		return usage(fmt.Errorf("reconnect for %v", s.Reconnect))
	}
	if s.Address.TLS != (s.TLS != "") {
		if s.Address.TLS {
			return usage(errors.New("the address is of a server with TLS: give the folder of certificates (--tls DIR)"))
		}
		s.Address.TLS = true
	}
	if s.TLS != "" && info.Name == "nbd-direct" {
		return param.Values{}, fmt.Errorf("nbd-direct hands its connections to the kernel, which has no TLS for NBD; use direct-mount: %w", region.ErrNotSupported)
	}
	specs := all.MountSpecs(s.Strategy, s.Transport)
	params, err := param.New(specs, s.Settings)
	if err != nil {
		return usage(err)
	}
	// What stands for how long somebody waits follows Reconnect, where it was not said.
	settings := slices.Clone(s.Settings)
	def := func(name, value string) {
		if params.Has(name) && !params.IsSet(name) {
			settings = append(settings, name+"="+value)
		}
	}
	wait := (s.Reconnect + 30*time.Second).Round(time.Second)
	def("request_timeout", fmt.Sprintf("%ds", int64(wait.Seconds())))
	def("nbd_timeout", fmt.Sprintf("%ds", int64(min(wait, time.Hour).Seconds())))
	def("nbd_dead_timeout", fmt.Sprintf("%ds", int64(min(s.Reconnect.Round(time.Second), time.Hour).Seconds())))
	if !s.ReadOnly && s.Reconnect > 0 {
		def("on_change", watch.Restart)
	}
	if params, err = param.New(specs, settings); err != nil {
		return usage(err)
	}
	return params, nil
}

// paths are the devices of a strategy that have a path.
func paths(i strategies.Info) (names []string) {
	for _, d := range i.Devices {
		if d != "uffd" && d != "ublk" {
			names = append(names, d)
		}
	}
	return names
}

// place finds out which regions become which files, and that there is room for them.
func (m *Mount) place(ctx context.Context, t transport.Transport, d transport.Dialer) error {
	s := m.spec
	path, err := filepath.Abs(s.Path)
	if err != nil || s.Path == "" {
		return fmt.Errorf("path %q: %w: %w", s.Path, cmp.Or(err, errors.New("empty")), scenarios.ErrUsage)
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("folder of %s: %w: %w", s.Path, err, scenarios.ErrUsage)
	}
	path = filepath.Join(parent, filepath.Base(path))
	if err := unmounted(path); err != nil {
		return err
	}
	fi, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if _, lerr := os.Lstat(path); lerr == nil {
			return fmt.Errorf("%s is in use: a link that leads nowhere: %w", s.Path, scenarios.ErrUsage)
		}
		m.regions = []*mounted{{name: s.Address.Name, path: path}}
		return nil
	case err != nil:
		return fmt.Errorf("%s: %w: %w", s.Path, err, scenarios.ErrUsage)
	case !fi.IsDir():
		return fmt.Errorf("%s is in use: name a file that is not there yet, or a folder: %w", s.Path, scenarios.ErrUsage)
	}
	names := []string{s.Address.Name}
	if s.Address.Name == "" {
		names, err = list(ctx, t, d)
		if errors.Is(err, errors.ErrUnsupported) {
			return fmt.Errorf("%s is a folder, and the address names no region: %w: %w", s.Path, err, scenarios.ErrUsage)
		} else if err != nil {
			return fmt.Errorf("ask %s for its regions: %w", s.Address.Host, err)
		}
	}
	if len(names) == 0 {
		return fmt.Errorf("%s has no regions: %w", s.Address.Host, region.ErrMissing)
	}
	for _, n := range names {
		if n == "" || n == "." || n == ".." || strings.ContainsAny(n, "/\x00") || len(n) > 255 {
			return fmt.Errorf("region %q cannot be the name of a file: mount it alone, to a path: %w", n, scenarios.ErrUsage)
		}
		p := filepath.Join(path, n)
		if err := unmounted(p); err != nil {
			return err
		}
		if _, err := os.Lstat(p); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%s is in use: %w", p, scenarios.ErrUsage)
		}
		m.regions = append(m.regions, &mounted{name: n, path: p})
	}
	return nil
}

// unmounted says so where something is mounted at path, without touching that.
func unmounted(path string) error {
	mounts, err := mountinfo.Read()
	if err != nil {
		return err
	}
	for _, x := range mounts {
		if x.Point == path && x.Type == fuseType {
			return fmt.Errorf("%s is in use by a memsync mount; if that was killed, memsync clean removes it: %w", path, scenarios.ErrUsage)
		}
	}
	return nil
}

// open mounts one region.
func (m *Mount) open(ctx context.Context, r *mounted, params param.Values, i int) (strategies.Mount, error) {
	s := m.spec
	dir := filepath.Join(m.dir, fmt.Sprintf("region-%d", i))
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	o := strategies.Options{Device: s.Device, Chunk: s.Chunk, PullWorkers: s.PullWorkers, PushWorkers: s.PushWorkers,
		ReadOnly: s.ReadOnly, Dir: dir, File: r.path, Mode: s.Mode, Reopen: s.Reconnect > 0, Params: params}
	x, err := s.Strategy.Mount(ctx, r.remote, o)
	if err != nil {
		return nil, err
	}
	if at := x.Attachment().Path; at != r.path { // a block device
		if err := os.Symlink(at, r.path); err != nil {
			return nil, errors.Join(err, x.Close(ctx))
		}
		r.link = at
	}
	return x, nil
}

// Gone reports whether somebody else unmounted all of it.
func (m *Mount) Gone() bool {
	if m.spec.Device != "fuse" {
		return false
	}
	mounts, err := mountinfo.Read()
	if err != nil {
		return false
	}
	return !slices.ContainsFunc(mounts, func(x mountinfo.Mount) bool {
		return slices.ContainsFunc(m.regions, func(r *mounted) bool { return x.Point == r.path })
	})
}

// Sync returns once everything that programs wrote to the files is at the source and
// flushed there, also what they stored through mappings. writer makes the command
// that calls SyncFile: another process, since no process may touch what it serves.
func (m *Mount) Sync(ctx context.Context, writer func(ctx context.Context, path string) *exec.Cmd) error {
	if m.spec.ReadOnly {
		return nil
	}
	g, gctx := errgroup.WithContext(ctx)
	for _, r := range m.regions {
		g.Go(func() error {
			cmd := writer(gctx, r.path)
			cmd.WaitDelay = time.Second
			if out, err := cmd.CombinedOutput(); err != nil {
				return fmt.Errorf("write %s back: %w: %s%s", r.path, err, bytes.TrimSpace(out), r.trouble())
			}
			if err := r.mount.Sync(gctx); err != nil {
				return fmt.Errorf("push what was written to %s: %w", r.path, err)
			}
			return nil
		})
	}
	return g.Wait()
}

// trouble is what the process that serves a region knows of an error.
func (r *mounted) trouble() string {
	if t, ok := r.mount.(strategies.Troubled); ok {
		if err := t.Err(); err != nil {
			return fmt.Sprintf(" (%v)", err)
		}
	}
	return ""
}

// SyncFile writes back what the kernel has of the file or block device at path that
// another process serves. It is to be called in a process of its own.
func SyncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// Close unmounts, which writes back and pushes what is dirty, and removes all that
// Open made. The error says what did not reach the source. ctx bounds it.
func (m *Mount) Close(ctx context.Context) error {
	if m.stop != nil {
		m.stop()
	}
	errs := make([]error, len(m.regions))
	var g errgroup.Group
	for i, r := range m.regions {
		g.Go(func() error {
			if r.link != "" {
				if at, err := os.Readlink(r.path); err == nil && at == r.link {
					errs[i] = os.Remove(r.path)
				}
			}
			if r.mount != nil {
				errs[i] = errors.Join(errs[i], r.mount.Close(ctx))
			}
			return nil
		})
	}
	_ = g.Wait()
	m.disown()
	return errors.Join(errs...)
}
