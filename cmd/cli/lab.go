package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"memsync/scenarios/lab"
	"memsync/strategies/region"
)

// Exit codes of lab beside the command's own, as timeout(1) and container
// runtimes have them, so that they do not look like the command's.
const (
	exitLabTimeout = 124
	exitLabFailed  = 125
)

func newLabCmd(s *state) *cobra.Command {
	var o struct {
		mem, cpu      string
		timeout       time.Duration
		refresh, info bool
		udevd         bool
	}
	c := &cobra.Command{
		Use:   "lab [flags] -- COMMAND [ARG]...",
		Short: "Run a command in the lab kernel: real nbd, netem, veth, fuse and tun without root",
		Long: `Boots User Mode Linux, a real Linux kernel in an ordinary process, runs COMMAND in
it as root, and exits with its status. The command sees the host's files and this
environment, folder, standard input, output and error; /proc, /sys, /dev, /run and
/dev/shm are the lab's own, TMPDIR is a tmpfs, the network is lo alone, and
MEMSYNC_LAB=1 is set. Nothing is left behind.

The kernel comes from Debian's packages, fetched once by the archive that this
machine's apt uses into $MEMSYNC_LAB_CACHE (default memsync-lab in the user's cache folder;
187 MB), and stays at its version until --refresh. Nothing is installed and no root is needed.
A system call costs about 8 us there: measure shaped links up to 1 Gbit/s, never
CPU-bound or fault-bound figures.

Exit status: COMMAND's own (128+n if signal n ended it, 126 or 127 if it cannot be
run); 124 after --timeout; 125 if the lab kernel cannot be had or dies; 6 wrong usage;
130 interrupted.`,
		Example: `  memsync lab -- uname -r
  memsync lab --timeout 60s -- memsync measure --strategy direct-mount --device nbd --shaper netem --rtt 20ms --size 4MiB
  memsync lab --udevd -- memsync run latency-polling-udev-1 --quick
  memsync lab --info`,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 0 && !o.info && !o.refresh {
				return exitWith(exitUsage, errors.New("lab: no command given: memsync lab -- COMMAND"))
			}
			mem, err := region.ParseSize(o.mem)
			if err != nil {
				return exitWith(exitUsage, fmt.Errorf("--mem %s: %w", o.mem, err))
			}
			if mem < lab.MinMemory {
				return exitWith(exitUsage, fmt.Errorf("--mem %s: want at least %s", o.mem, region.FormatSize(lab.MinMemory)))
			}
			if err := lab.CheckCPU(o.cpu); err != nil {
				return exitWith(exitUsage, fmt.Errorf("--cpu: %w", err))
			}
			k, err := labKernel(s, o.refresh)
			if err != nil {
				if s.ctx.Err() != nil {
					return exitWith(exitInterrupted, err)
				}
				return exitWith(exitLabFailed, err)
			}
			if o.info {
				if err := k.Verify(); err != nil {
					return exitWith(exitLabFailed, err)
				}
				enc := json.NewEncoder(s.stdout)
				enc.SetIndent("", "  ")
				return enc.Encode(k)
			}
			if len(args) == 0 {
				return nil
			}
			ctx := s.ctx
			if o.timeout > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, o.timeout)
				defer cancel()
			}
			// Without this, output into a closed pipe would end memsync on the
			// spot: its work folder would stay, the command would not know.
			pipe := make(chan os.Signal, 1)
			signal.Notify(pipe, syscall.SIGPIPE)
			defer signal.Stop(pipe)
			status, err := k.Run(ctx, lab.Command{Args: args, Stdin: s.stdin, Stdout: s.stdout, Stderr: s.stderr, Memory: mem, CPU: o.cpu, Udevd: o.udevd})
			switch {
			case s.ctx.Err() != nil:
				return exitWith(exitInterrupted, err)
			case errors.Is(err, context.DeadlineExceeded):
				return exitWith(exitLabTimeout, fmt.Errorf("--timeout %v: %w", o.timeout, err))
			case err != nil:
				return exitWith(exitLabFailed, err)
			case status != 0:
				return exitWith(status, nil)
			}
			return nil
		},
	}
	f := c.Flags()
	f.SetInterspersed(false) // what follows COMMAND is its own
	f.StringVar(&o.mem, "mem", region.FormatSize(lab.DefaultMemory), "guest memory, at least 64MiB; taken from the host as it is touched")
	f.StringVar(&o.cpu, "cpu", "", "host CPU to stay on, or any (default: one that no other lab kernel holds)")
	durationFlag(f, &o.timeout, "timeout", 0, "end the command after this time, boot included; 0 is never")
	f.BoolVar(&o.udevd, "udevd", false, "run this machine's udevd in the guest first (package udev): its events and its rules")
	f.BoolVar(&o.refresh, "refresh", false, "fetch the kernel anew first")
	f.BoolVar(&o.info, "info", false, "check the cached kernel's files and print its manifest (versions, SHA-256) as JSON")
	return c
}

// labKernel finds or fetches the kernel; a fetch may take five minutes.
func labKernel(s *state, refresh bool) (*lab.Kernel, error) {
	dir, err := lab.CacheDir(s.env)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(s.ctx, 5*time.Minute)
	defer cancel()
	if refresh {
		return lab.Fetch(ctx, dir, s.stderr)
	}
	return lab.Ensure(ctx, dir, s.stderr)
}
