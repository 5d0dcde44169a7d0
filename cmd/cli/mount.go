package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"memsync/scenarios"
	"memsync/scenarios/mount"
	"memsync/strategies/all"
	"memsync/strategies/region"
)

// mountSync is the hidden command that writes a mounted file back, in a process
// that does not serve it.
const mountSync = "mount-sync"

// goneInterval is how often mount looks whether somebody else unmounted.
const goneInterval = 500 * time.Millisecond

type mountOptions struct {
	spec                  mount.Spec
	strategy, mode        string
	cache                 string
	cacheDir              string
	metrics               string
	relay                 relayFlags
	grace                 time.Duration
	asJSON                bool
	pullSet, pushSet      bool
	pullWorkers, pushWork int
}

func newMountCmd(s *state) *cobra.Command {
	var o mountOptions
	c := &cobra.Command{
		Use:   "mount ADDR[/NAME] PATH",
		Short: "Mount a served region as a file that any program can open",
		Long: `Makes the region NAME of the server at ADDR (memsync serve, or any NBD server) the file
PATH, which may not be there yet, and keeps it until SIGINT, SIGTERM or umount PATH.
Where PATH is a folder, all regions of the server become files in it, called by their
names, or the one that NAME is.

ADDR is HOST[:PORT], an NBD URI as memsync serve prints it, or unix:SOCKET.

stdout has a line for each file once it can be opened: path, bytes, region, device.
At the end everything that programs wrote is written back and pushed first. While a
source cannot be reached, whoever reads waits, for as long as --reconnect says.

Exit status: 0 unmounted, and every write reached the source; 1 not, or the source cannot
be reached; 4 the strategy or device has no path, or is missing here; 5 not permitted, or
another host writes the region; 6 wrong usage, a path in use, or no such region.`,
		Example: `  memsync mount 127.0.0.1/disk.img /mnt/disk.img
  memsync mount source.example:10809/db /srv/db --strategy managed-mount --tls /etc/memsync/tls --cache 1GiB
  memsync mount nbd://127.0.0.1 /srv/regions --read-only --mode 0444
  memsync mount source.example/db /srv/db --relay relay.example --relay-token token --tls /etc/memsync/tls
  memsync mount 10.0.0.1/vm /dev/shm/vm --strategy nbd-direct --reconnect 10m`,
		RunE: func(c *cobra.Command, args []string) error {
			o.pullSet, o.pushSet = c.Flags().Changed("pull-workers"), c.Flags().Changed("push-workers")
			return runMount(s, o, args)
		},
	}
	f := c.Flags()
	f.StringVar(&o.strategy, "strategy", "managed-mount", "`name` of the strategy: "+strings.Join(mount.Mountable(s.program.Strategies), ", "))
	f.StringVar(&o.spec.Device, "device", "", "fuse (a file) or nbd (a link to a block device); default: the strategy's first; there is no other one in its place where it is missing")
	f.StringVar(&o.spec.Transport, "transport", "", strings.Join(all.TransportNames(), ", ")+": as the server was told (default: what ADDR says, else nbd)")
	f.BoolVar(&o.spec.ReadOnly, "read-only", false, "nobody can write, and any number of hosts can mount the region")
	f.StringVar(&o.mode, "mode", "", "`permissions` of the files, octal (default 0600; without write bits with --read-only)")
	sizeFlag(f, &o.spec.Chunk, "chunk", 0, "unit of transfer, a power of two from a page on (default: the strategy's)")
	f.IntVar(&o.pullWorkers, "pull-workers", 0, "background pulls in flight; 0 is none (default: the strategy's)")
	f.IntVar(&o.pushWork, "push-workers", 0, "background pushes in flight; 0 is none (default: the strategy's)")
	f.StringVar(&o.cache, "cache", "", "most bytes that the local cache holds, as `SIZE` (managed-mount; default: all of the region)")
	f.StringVar(&o.cacheDir, "cache-dir", "", "existing `DIR` for the cache, from which the next mount pushes what this one could not (managed-mount; default: memory)")
	f.StringArrayVar(&o.spec.Settings, "set", nil, "`key=value`: a parameter of the strategy, device or transport (measure --explain lists them); may be repeated")
	f.StringVar(&o.spec.TLS, "tls", "", "TLS 1.3 with ca-cert.pem, client-cert.pem and client-key.pem of `DIR` (memsync certs)")
	o.relay.add(f)
	durationFlag(f, &o.spec.Reconnect, "reconnect", time.Minute, "how long a source that is gone is tried for, and whoever reads waits; 0: errors at once")
	durationFlag(f, &o.grace, "grace", 30*time.Second, "how long writing back and unmounting may take at the end")
	f.StringVar(&o.metrics, "metrics", "", "answer http://`ADDR`/metrics in the text format of Prometheus; a loopback address")
	f.BoolVar(&o.asJSON, "json", false, "print the lines as JSON objects")
	completions(c, map[string]func() []string{
		"strategy":  func() []string { return mount.Mountable(s.program.Strategies) },
		"device":    func() []string { return []string{"fuse", "nbd"} },
		"transport": all.TransportNames,
		"mode":      func() []string { return []string{"0600", "0640", "0644", "0444", "0755"} },
	})
	return c
}

func (o *mountOptions) resolve(s *state, args []string) (err error) {
	if len(args) != 2 {
		return errors.New("mount: want a server and a path: memsync mount ADDR[/NAME] PATH")
	}
	p := &o.spec
	if p.Address, err = mount.ParseAddress(args[0]); err != nil {
		return err
	}
	p.Path = args[1]
	name := p.Transport
	if name == "" {
		name = p.Address.Transport
	}
	if name == "" {
		name = "nbd"
	}
	t, err := all.Transport(name)
	if err != nil {
		t = nil // as Open will say
	}
	if p.Via, err = o.relay.dialer(s, t); err != nil {
		return err
	}
	if p.Strategy, err = s.program.Strategies.Get(o.strategy); err != nil {
		return err
	}
	p.PullWorkers, p.PushWorkers = -1, -1
	if o.pullSet {
		p.PullWorkers = o.pullWorkers
	}
	if o.pushSet {
		p.PushWorkers = o.pushWork
	}
	if o.pullWorkers < 0 || o.pushWork < 0 || o.grace <= 0 {
		return errors.New("workers: 0 means none, a negative number nothing; --grace: want more than 0")
	}
	if o.mode != "" {
		bits, err := strconv.ParseUint(o.mode, 8, 32)
		if err != nil || bits == 0 || bits > 0o777 {
			return fmt.Errorf("--mode %s: want permission bits, octal, such as 0640", o.mode)
		}
		p.Mode = fs.FileMode(bits)
	}
	for name, value := range map[string]string{"cache": o.cache, "cache_dir": o.cacheDir} {
		if value != "" {
			p.Settings = append(p.Settings, name+"="+value)
		}
	}
	return nil
}

// mountError gives an error of opening its exit code.
func mountError(s *state, err error) error {
	switch {
	case s.ctx.Err() != nil:
		return exitWith(exitInterrupted, err)
	case errors.Is(err, scenarios.ErrUsage), errors.Is(err, region.ErrMissing):
		return exitWith(exitUsage, err)
	case errors.Is(err, region.ErrNotPermitted), errors.Is(err, region.ErrReadOnly), errors.Is(err, fs.ErrPermission):
		return exitWith(exitNotPermitted, err)
	case errors.Is(err, region.ErrNotSupported):
		return exitWith(exitUnsupported, err)
	case errors.Is(err, region.ErrOutOfRange):
		return exitWith(exitUsage, err)
	}
	return exitWith(exitFailed, err)
}

func runMount(s *state, o mountOptions, args []string) error {
	if err := o.resolve(s, args); err != nil {
		return exitWith(exitUsage, err)
	}
	log := func(format string, args ...any) {
		fmt.Fprintf(s.stderr, s.program.Name+": "+format+"\n", args...)
	}
	o.spec.Log = log
	publish, err := metrics(s, o.metrics)
	if err != nil {
		return err
	}
	m, err := mount.Open(s.ctx, o.spec)
	if err != nil {
		return mountError(s, err)
	}
	stop := publish(m.Status)
	defer stop()
	for _, r := range m.Status().Regions {
		if o.asJSON {
			line, err := json.Marshal(map[string]any{"path": r.Path, "bytes": r.Bytes, "region": r.Name, "strategy": r.Strategy, "device": r.Device, "read_only": r.ReadOnly})
			if err != nil {
				return exitWith(exitFailed, err)
			}
			fmt.Fprintf(s.stdout, "%s\n", line)
		} else {
			fmt.Fprintf(s.stdout, "%s\t%d\t%s\t%s\n", r.Path, r.Bytes, r.Name, r.Device)
		}
	}
	notify(s, "READY=1", "STATUS=mounted "+o.spec.Address.String())
	gone := time.NewTicker(goneInterval)
	defer gone.Stop()
	unmounted := false
	for !unmounted {
		select {
		case <-gone.C:
			unmounted = m.Gone()
			continue
		case <-s.ctx.Done():
		}
		break
	}
	signal.Reset(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP) // a second one ends us at once
	notify(s, "STOPPING=1")
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.ctx), o.grace)
	defer cancel()
	var syncErr error
	if !unmounted { // else the kernel has written everything back
		syncErr = m.Sync(ctx, func(ctx context.Context, path string) *exec.Cmd {
			cmd := exec.CommandContext(ctx, "/proc/self/exe", mountSync, path)
			cmd.Args[0] = os.Args[0] // by which a test knows what it is
			return cmd
		})
	}
	if err := errors.Join(syncErr, m.Close(ctx)); err != nil {
		return exitWith(exitFailed, fmt.Errorf("unmount %s: %w", o.spec.Path, err))
	}
	return nil
}

// metrics prepares to answer on addr, and returns what begins to, which returns
// what ends it. It does nothing where addr is empty.
func metrics(s *state, addr string) (publish func(status func() mount.Status) (stop func()), err error) {
	if addr == "" {
		return func(func() mount.Status) func() { return func() {} }, nil
	}
	network, at, err := listenAddress(s.ctx, addr, false)
	if err != nil {
		return nil, exitWith(exitUsage, fmt.Errorf("--metrics %s: %w", addr, err))
	}
	l, err := net.Listen(network, at)
	if err != nil {
		return nil, exitWith(exitFailed, fmt.Errorf("--metrics %s: %w", addr, err))
	}
	fmt.Fprintf(s.stderr, "metrics on http://%s/metrics\n", l.Addr())
	return func(status func() mount.Status) func() {
		mux := http.NewServeMux()
		mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/plain; version=0.0.4")
			_, _ = w.Write(status().Prometheus())
		})
		server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 10 * time.Second}
		done := make(chan struct{})
		go func() { defer close(done); _ = server.Serve(l) }()
		return func() { _ = server.Close(); <-done }
	}, nil
}

type statusOptions struct{ asJSON bool }

func newStatusCmd(s *state) *cobra.Command {
	var o statusOptions
	c := &cobra.Command{
		Use:   "status [PATH]",
		Short: "Show the live counters of the mounts and servers of this user",
		Long: `Asks each memsync mount and memsync serve of this user on this host, or the one whose
file is PATH (or one of its files is below PATH), how it is: bytes pulled, dirty and
pushed, requests, reconnections, since when its source is gone. They are found in $TMPDIR.`,
		Example: `  memsync status
  memsync status /mnt/disk.img --json`,
		RunE: func(_ *cobra.Command, args []string) error { return runStatus(s, o, args) },
	}
	c.Flags().BoolVar(&o.asJSON, "json", false, "print a JSON array of objects")
	return c
}

func runStatus(s *state, o statusOptions, args []string) error {
	if len(args) > 1 {
		return exitWith(exitUsage, errors.New("status: want one path at most"))
	}
	found, err := mount.All(s.ctx)
	if err != nil {
		return exitWith(exitFailed, err)
	}
	if len(args) == 1 {
		if found, err = mount.At(found, args[0]); err != nil {
			return exitWith(exitUsage, err)
		}
	}
	if o.asJSON {
		if found == nil {
			found = []mount.Status{}
		}
		enc := json.NewEncoder(s.stdout)
		enc.SetIndent("", "  ")
		return enc.Encode(found)
	}
	if len(found) == 0 {
		fmt.Fprintln(s.stderr, "nothing is mounted or served")
		return nil
	}
	var w io.Writer = s.stdout
	if s.stdoutTTY {
		aligned := tabwriter.NewWriter(s.stdout, 0, 8, 2, ' ', 0)
		defer aligned.Flush()
		w = aligned
	}
	fmt.Fprintln(w, "KIND\tPID\tREGION\tPATH\tBYTES\tPULLED\tDIRTY\tPUSHED\tREQUESTS\tRECONNECTS\tSOURCE")
	for _, x := range found {
		for _, r := range x.Regions {
			source := "there"
			if r.Gone > 0 {
				source = fmt.Sprintf("gone for %.0f s", r.Gone)
			}
			if x.Kind == "serve" {
				source = "-"
			}
			c := r.Counters
			fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%d\t%d\t%d\t%d\t%d\t%d\t%s\n", x.Kind, x.PID, r.Name, cmp.Or(r.Path, "-"), r.Bytes,
				c["pulled_bytes"], c["dirty_bytes"], c["pushed_bytes"], c["pull_requests"]+c["push_requests"], c["reconnects"], source)
		}
	}
	return nil
}
