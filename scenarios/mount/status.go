package mount

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"memsync/scenarios"
	"memsync/strategies"
)

// Status is what a mount or a server says of itself.
type Status struct {
	Kind    string         `json:"kind"` // mount, serve
	PID     int            `json:"pid"`
	Address string         `json:"address"`
	Seconds float64        `json:"seconds"` // since it began
	Regions []RegionStatus `json:"regions"`
}

// RegionStatus is of one region. Counters are since the beginning; bytes and seconds.
type RegionStatus struct {
	Name     string `json:"name"`
	Path     string `json:"path,omitempty"`
	Strategy string `json:"strategy,omitempty"`
	Device   string `json:"device,omitempty"`
	Bytes    int64  `json:"bytes"`
	ReadOnly bool   `json:"read_only"`
	// Counters by name: of a mount pulled_bytes, pushed_bytes, pull_requests,
	// push_requests, local_bytes, dirty_bytes, reconnects and the strategy's own; of
	// a server pulled and pushed are what its clients read and wrote.
	Counters map[string]int64 `json:"counters"`
	Gone     float64          `json:"source_gone_seconds"` // for how long the source has been; 0: it is there
	Error    string           `json:"error,omitempty"`     // the latest behind an EIO
}

// Status says how the mount is.
func (m *Mount) Status() Status {
	s := Status{Kind: "mount", PID: os.Getpid(), Address: m.spec.Address.String(), Seconds: time.Since(m.began).Seconds()}
	for _, r := range m.regions {
		x := r.mount.Stats()
		gone, why := r.remote.outage()
		rs := RegionStatus{Name: r.name, Path: r.path, Strategy: m.spec.Strategy.Info().Name, Device: m.spec.Device, ReadOnly: m.spec.ReadOnly,
			Bytes: r.mount.Attachment().Size, Gone: gone.Seconds(), Counters: map[string]int64{}}
		for k, v := range x.Extra {
			rs.Counters[k] = v
		}
		for k, v := range map[string]int64{
			"pulled_bytes": x.DemandBytes + x.PrefetchBytes, "pull_requests": x.DemandRequests + x.PrefetchRequests,
			"pushed_bytes": x.PushBytes, "push_requests": x.PushRequests, "local_requests": x.LocalRequests,
			"reconnects": r.remote.reconnects.Load() + x.Extra["reconnects"],
		} {
			rs.Counters[k] = v
		}
		if t, ok := r.mount.(strategies.Troubled); ok {
			why = errors.Join(why, t.Err())
		}
		if why != nil {
			rs.Error = why.Error()
		}
		s.Regions = append(s.Regions, rs)
	}
	return s
}

// Prometheus is s in the text format of Prometheus (version 0.0.4).
func (s Status) Prometheus() []byte {
	var b bytes.Buffer
	series := map[string][]string{}
	add := func(r RegionStatus, name string, v any) {
		series[name] = append(series[name], fmt.Sprintf("%s{region=%q,path=%q} %v\n", name, r.Name, r.Path, v))
	}
	for _, r := range s.Regions {
		prefix := "memsync_" + s.Kind + "_"
		add(r, prefix+"region_bytes", r.Bytes)
		add(r, prefix+"source_gone_seconds", r.Gone)
		for k, v := range r.Counters {
			if !slices.Contains(gauges, k) {
				k += "_total"
			}
			add(r, prefix+k, v)
		}
	}
	var names []string
	for n := range series {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, n := range names {
		kind := "gauge"
		if strings.HasSuffix(n, "_total") {
			kind = "counter"
		}
		fmt.Fprintf(&b, "# TYPE %s %s\n%s", n, kind, strings.Join(series[n], ""))
	}
	return b.Bytes()
}

// gauges are the counters that may also fall.
var gauges = []string{"local_bytes", "dirty_bytes", "connections"}

const socketName = "status"

// atFolder calls f with a name of the folder short enough for a socket's address (108 bytes).
func atFolder(dir string, f func(short string) error) error {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", dir, err)
	}
	defer unix.Close(fd)
	return f(fmt.Sprintf("/proc/self/fd/%d", fd))
}

// answer tells whoever connects to the socket in dir what status gives, as JSON.
func answer(dir string, status func() any) (stop func(), err error) {
	var l net.Listener
	if err := atFolder(dir, func(short string) (err error) {
		l, err = net.Listen("unix", filepath.Join(short, socketName))
		return err
	}); err != nil {
		return nil, fmt.Errorf("answer for status: %w", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // the folder goes as a whole
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(2 * time.Second))
				_ = json.NewEncoder(c).Encode(status())
			})
		}
	})
	return sync.OnceFunc(func() { l.Close(); wg.Wait() }), nil
}

// Announce makes this process, which is no Mount, one that All finds.
func Announce(status func() Status) (stop func(), err error) {
	dir, disown, err := scenarios.NewOwned(folderPrefix)
	if err != nil {
		return nil, err
	}
	quiet, err := answer(dir, func() any { return status() })
	if err != nil {
		disown()
		return nil, err
	}
	return func() { quiet(); disown() }, nil
}

// All asks every mount and server of this user that lives, by their folders in the
// temporary directory.
func All(ctx context.Context) (all []Status, err error) {
	dirs, err := filepath.Glob(filepath.Join(os.TempDir(), folderPrefix+"*"))
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, dir := range dirs {
		var s Status
		err := atFolder(dir, func(short string) error {
			c, err := new(net.Dialer).DialContext(ctx, "unix", filepath.Join(short, socketName))
			if err != nil {
				return err
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(5 * time.Second))
			return json.NewDecoder(io.LimitReader(c, 64<<20)).Decode(&s)
		})
		switch {
		case err == nil:
			all = append(all, s)
		case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, os.ErrNotExist), errors.Is(err, os.ErrPermission):
			// Killed, not begun, just ended, or another user's.
		default:
			errs = append(errs, fmt.Errorf("ask %s: %w", dir, err))
		}
	}
	return all, errors.Join(errs...)
}

// At picks from all those that serve the file at path, or one below it. The error
// lists the paths that there are.
func At(all []Status, path string) (found []Status, err error) {
	at, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if parent, err := filepath.EvalSymlinks(filepath.Dir(at)); err == nil {
		at = filepath.Join(parent, filepath.Base(at))
	}
	var paths []string
	for _, s := range all {
		mine := false
		for _, r := range s.Regions {
			mine = mine || r.Path == at || strings.HasPrefix(r.Path, at+"/")
			paths = append(paths, r.Path)
		}
		if mine {
			found = append(found, s)
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("%s is no memsync mount of this user; there are: %s", path, cmp.Or(strings.Join(paths, ", "), "none"))
	}
	return found, nil
}
