package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"memsync/strategies/region"
	"memsync/strategies/snapshot"
	"memsync/strategies/snapshot/image"
	"memsync/strategies/snapshot/shm"
)

// snapshotExec is the hidden command between memsync and the client.
const snapshotExec = "snapshot-exec"

type snapshotOptions struct {
	image, mode, pages           string
	size, chunk, stream, spare   int64
	interval, openWithin, grace  time.Duration
	restarts                     int
	parts                        []string
	full, info                   bool
	sizeSet, chunkSet, streamSet bool
}

func newSnapshotCmd(s *state) *cobra.Command {
	var o snapshotOptions
	c := &cobra.Command{
		Use:   "snapshot --image FILE [flags] -- COMMAND [ARG]...",
		Short: "Run a command on a region of memory of which consistent images are kept",
		Long: `Starts COMMAND with a region of shared memory, restored from FILE, and keeps images
of it in FILE, which has a complete one at every moment, whatever is killed or
loses power. A COMMAND that is killed by SIGKILL is started again from the last one.

The region is descriptor 3 (LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES as in
sd_listen_fds(3)), a memfd to be mapped shared. When an image is taken:

  on-exit  when COMMAND has exited; needs nothing of it
  queue    each --interval, of the last state that it published; never waits for us;
           a COMMAND that is faster than we are for long has old images
  triple   the same, from three buffers: images are never old
  cow      each --interval, of that instant, and when COMMAND asks for one

All but on-exit need the library strategies/snapshot/client, or the layout in
docs/strategies/snapshot.md.

Exit status: COMMAND's own (128+n if signal n ended it); 1 the last image could not be
saved, or it did not open its region; 3 FILE is damaged; 4 cow or huge pages are
missing here; 5 another process has FILE; 6 wrong usage; 130 interrupted, after the last image.`,
		Example: `  memsync snapshot --image state.img --size 1MiB -- sh -c 'echo hello >&3'
  memsync snapshot --image state.img --mode triple --interval 100ms -- ./server
  memsync snapshot --image state.img --info`,
		RunE: func(c *cobra.Command, args []string) error {
			o.sizeSet, o.chunkSet, o.streamSet = c.Flags().Changed("size"), c.Flags().Changed("chunk"), c.Flags().Changed("stream")
			if o.image == "" {
				return exitWith(exitUsage, errors.New("snapshot: no --image FILE given"))
			}
			if o.info {
				return snapshotInfo(s, o)
			}
			return runSnapshot(s, o, args)
		},
	}
	f := c.Flags()
	f.SetInterspersed(false) // what follows COMMAND is its own
	f.StringVar(&o.image, "image", "", "`FILE` with the images of the region; made where it is not there (required)")
	f.StringVar(&o.mode, "mode", shm.OnExit.String(), "how a consistent image is had: "+strings.Join(shm.Modes(), ", "))
	sizeFlag(f, &o.size, "size", 64<<20, "of the region; by default that of FILE, else 64MiB")
	sizeFlag(f, &o.chunk, "chunk", 64<<10, "unit of images and of copying, a power of two from 4KiB on; by default that of FILE, else 64KiB")
	durationFlag(f, &o.interval, "interval", time.Second, "between images; 0 is when asked for, and when COMMAND has ended")
	f.StringVar(&o.pages, "pages", "4KiB", "memory of the region: 4KiB, or huge pages of 2MiB or 1GiB (vm.nr_hugepages), which need as large a chunk")
	sizeFlag(f, &o.stream, "stream", 0, "mode queue: what the client's stream holds (default a quarter of the region, 1MiB to 64MiB)")
	sizeFlag(f, &o.spare, "spare", 16<<20, "mode cow: memory for chunks that are written to while an image is saved; then writers wait")
	f.BoolVar(&o.full, "full", false, "mode cow: protect and read all of the region for each image, not what changed")
	f.StringArrayVar(&o.parts, "part", nil, "save only `OFFSET+LENGTH` of the region, made whole chunks; the rest is zeroes when restored; may be repeated")
	f.IntVar(&o.restarts, "restarts", 1000, "how often COMMAND is started again after SIGKILL")
	durationFlag(f, &o.openWithin, "open-within", 10*time.Second, "other modes than on-exit: how long COMMAND may take to open its region before it is ended")
	durationFlag(f, &o.grace, "grace", 10*time.Second, "how long COMMAND may take to end after SIGTERM before it is killed")
	f.BoolVar(&o.info, "info", false, "check FILE and print what it has, as JSON")
	return c
}

// openImage opens the image of --image, whose size counts unless others were asked for.
func openImage(o snapshotOptions) (*image.Image, error) {
	img, err := image.Open(o.image, 0, 0)
	if errors.Is(err, region.ErrMissing) && !o.info {
		img, err = image.Open(o.image, o.size, o.chunk)
	}
	switch {
	case err == nil:
	case errors.Is(err, region.ErrMismatch):
		return nil, exitWith(exitCorrupt, err)
	case errors.Is(err, region.ErrNotPermitted):
		return nil, exitWith(exitNotPermitted, err)
	case errors.Is(err, region.ErrOutOfRange), errors.Is(err, os.ErrNotExist), errors.Is(err, region.ErrMissing):
		return nil, exitWith(exitUsage, err)
	default:
		return nil, exitWith(exitFailed, err)
	}
	if o.sizeSet && img.Size() != o.size || o.chunkSet && img.Chunk() != o.chunk {
		err := fmt.Errorf("image %s is of a region of %s in chunks of %s: leave --size and --chunk out, or use another file",
			o.image, region.FormatSize(img.Size()), region.FormatSize(img.Chunk()))
		return nil, exitWith(exitUsage, errors.Join(err, img.Close()))
	}
	return img, nil
}

func (o snapshotOptions) options() (p snapshot.Options, err error) {
	p = snapshot.Options{Stream: o.stream, Spare: o.spare, Full: o.full, Register: o.openWithin}
	if p.Mode, err = shm.ModeByName(o.mode); err != nil {
		return p, err
	}
	switch pages, err := region.ParseSize(o.pages); {
	case err != nil:
		return p, fmt.Errorf("--pages: %w", err)
	case pages == region.PageSize():
	case pages == 2<<20 || pages == 1<<30:
		p.HugePage = pages
	default:
		return p, fmt.Errorf("--pages %s: want 4KiB, 2MiB or 1GiB", o.pages)
	}
	for _, text := range o.parts {
		off, length, ok := strings.Cut(text, "+")
		var part snapshot.Part
		if ok {
			if part.Off, err = region.ParseSize(off); err == nil {
				part.Length, err = region.ParseSize(length)
			}
		}
		if !ok || err != nil || part.Length == 0 {
			return p, fmt.Errorf("--part %s: want OFFSET+LENGTH, as 0+1MiB", text)
		}
		p.Parts = append(p.Parts, part)
	}
	switch {
	case o.streamSet && p.Mode != shm.Queue:
		return p, fmt.Errorf("--stream goes with --mode %v only", shm.Queue)
	case o.full && p.Mode != shm.Cow:
		return p, fmt.Errorf("--full goes with --mode %v only", shm.Cow)
	case o.restarts < 0 || o.interval < 0 || o.interval > 0 && o.interval < time.Millisecond:
		return p, errors.New("want --restarts of 0 or more, and an --interval of 0 or from 1ms on")
	}
	return p, nil
}

func runSnapshot(s *state, o snapshotOptions, args []string) (err error) {
	if len(args) == 0 {
		return exitWith(exitUsage, errors.New("snapshot: no command given: memsync snapshot --image FILE -- COMMAND"))
	}
	p, err := o.options()
	if err != nil {
		return exitWith(exitUsage, err)
	}
	if _, err := exec.LookPath(args[0]); err != nil {
		return exitWith(exitUsage, fmt.Errorf("snapshot: %w", err))
	}
	img, err := openImage(o)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := img.Close(); cerr != nil && err == nil {
			err = exitWith(exitFailed, cerr)
		}
	}()
	if st, ok := img.Latest(); ok {
		fmt.Fprintf(s.stderr, "restoring image %d, taken %s\n", st.Commit, st.Taken.Format(time.RFC3339))
	}
	c := snapshot.Command{Args: args, Shim: []string{"/proc/self/exe", snapshotExec}, Stdin: s.stdin, Stdout: s.stdout, Stderr: s.stderr,
		Interval: o.interval, Restarts: o.restarts, Grace: o.grace,
		Log: func(format string, args ...any) { fmt.Fprintf(s.stderr, format+"\n", args...) }}
	e, err := c.Run(s.ctx, img, p)
	if st, ok := img.Latest(); ok && e.Images > 0 {
		starved := ""
		if e.Starved > 0 {
			starved = fmt.Sprintf("; starved %d times", e.Starved)
		}
		fmt.Fprintf(s.stderr, "images: %d, the last is %d%s\n", e.Images, st.Commit, starved)
	}
	switch {
	case err == nil && s.ctx.Err() != nil:
		return exitWith(exitInterrupted, nil)
	case err == nil && e.Status == 0:
		return nil
	case err == nil:
		return exitWith(e.Status, nil)
	case errors.Is(err, snapshot.ErrNotSaved):
		return exitWith(exitFailed, err)
	case errors.Is(err, region.ErrNotSupported):
		return exitWith(exitUnsupported, err)
	case errors.Is(err, region.ErrOutOfRange) && e.Status == 0:
		return exitWith(exitUsage, err)
	case errors.Is(err, region.ErrMismatch) && e.Status == 0:
		return exitWith(exitCorrupt, err)
	case errors.Is(err, region.ErrPeerGone) && e.Status != 0: // killed too often
		return exitWith(e.Status, err)
	}
	return exitWith(exitFailed, err)
}

// snapshotInfo checks every byte of an image and says what it has.
func snapshotInfo(s *state, o snapshotOptions) error {
	img, err := openImage(o)
	if err != nil {
		return err
	}
	defer img.Close()
	st, ok := img.Latest()
	if err := img.Restore(s.ctx, func([]byte, int64) error { return nil }); err != nil {
		if errors.Is(err, region.ErrMismatch) {
			return exitWith(exitCorrupt, err)
		}
		return exitWith(exitFailed, err)
	}
	info := map[string]any{"size": img.Size(), "chunk": img.Chunk(), "commit": st.Commit, "sequence": st.Sequence, "blob": st.Blob, "bytes": img.Bytes()}
	if ok {
		info["taken"] = st.Taken.UTC()
	}
	enc := json.NewEncoder(s.stdout)
	enc.SetIndent("", "  ")
	return enc.Encode(info)
}
