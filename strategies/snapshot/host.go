// Package snapshot takes consistent images of a region while a client writes to
// it: the host's side of the queue, the triple buffer and copy-on-write
// (docs/strategies/snapshot.md), and the strategy that measures them. The client's side is
// package client, their shared memory package shm, the file package image.
//
// The host is another process than the client, and never touches a mapping that
// it protects (docs/deadlocks.md, case 1): it has its own.
package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
	"memsync/strategies/snapshot/image"
	"memsync/strategies/snapshot/shm"
)

// Options say how to take images. The zero value of a field means its default.
type Options struct {
	Mode shm.Mode
	// HugePage, if above 0, is the size of the huge pages that the region is made of
	// (MFD_HUGETLB), bytes.
	HugePage int64
	Stream   int64 // of mode queue, bytes; 0 is a quarter of the region, 1 to 64 MiB
	// Spare is the memory of mode cow for chunks that are written to while an image is saved,
	// bytes; a writer waits when it is used up. 0 is 16 MiB.
	Spare int64
	// Full has each image save all of the region, not what changed (mode cow).
	Full bool
	// Parts are the only ranges of the region that are saved, in bytes, made whole
	// chunks; empty is all.
	Parts []Part
	// Register is how long a client may take to open its region; 0 is 10 s.
	Register time.Duration
}

// Part is a range of the region, in bytes.
type Part struct{ Off, Length int64 }

// Result describes an image that was taken.
type Result struct {
	Fresh    bool   // false: nothing was published since the last image, and none was saved
	Sequence uint64 // of the client's publication
	Taken    time.Time
	Freeze   time.Duration // mode cow: protecting the mapping
	Save     time.Duration // from the beginning until it was on the disk
	Bytes    int64         // written to the image file
	Changed  int64         // bytes of the region that were saved
	Starved  int64         // mode queue: attempts that failed beside this one
}

// taker is a mode's way to a consistent state.
type taker interface {
	// follow does what must be done between images, often, and also while one is
	// being saved. starved: it came too late.
	follow() (starved bool, err error)
	// take gets hold of a state, calls held once it has it, and save for what
	// changed since the last state whose image was saved. last: the client is gone.
	take(ctx context.Context, last bool, held func(error), save func(p []byte, off int64) error) (taken, error)
	// saved says whether the state of the last take is on the disk.
	saved(bool)
	close() error
}

// taken is a state that a taker has hold of.
type taken struct {
	fresh    bool
	sequence uint64
	blob     []byte
	at       time.Time
	freeze   time.Duration
	starved  int64
}

// Host has a region in shared memory and the image of it. It serves one client
// process. Snapshot, Final and Follow may be called concurrently.
type Host struct {
	o      Options
	layout shm.Layout
	image  *image.Image

	region, control, status, socket, theirs *os.File
	mem, ctl, stat                          []byte
	taker                                   taker
	saves                                   []bool // chunks that are in Options.Parts; nil is all

	mu     sync.Mutex // of taking
	tell   sync.Mutex // of told
	told   shm.Status
	asks   chan func(error)
	broken chan error // a client that broke the protocol
}

// Open makes a region with the content of the image's last state, or zeroes. The
// image stays the caller's, and is the Host's alone until Close.
func Open(ctx context.Context, img *image.Image, o Options) (_ *Host, err error) {
	h := &Host{o: o, image: img, asks: make(chan func(error)), broken: make(chan error, 1)}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("host of a region of %d bytes: %w", img.Size(), err), h.Close())
		}
	}()
	if h.o.Register == 0 {
		h.o.Register = 10 * time.Second
	}
	if h.o.Spare == 0 {
		h.o.Spare = 16 << 20
	}
	h.layout = shm.Layout{Mode: o.Mode, Size: img.Size(), Chunk: img.Chunk(), Page: max(o.HugePage, region.PageSize())}
	if o.Mode == shm.Queue {
		h.layout.Stream = o.Stream
		if h.layout.Stream == 0 {
			h.layout.Stream = region.RoundUp(min(max(h.layout.Size/4, 1<<20), 64<<20), region.PageSize())
		}
	}
	if err := h.layout.Check(); err != nil {
		return nil, err
	}
	if h.layout.Page > h.layout.Chunk {
		return nil, fmt.Errorf("chunks of %d bytes on pages of %d: want a chunk of at least a page: %w", h.layout.Chunk, h.layout.Page, region.ErrOutOfRange)
	}
	if err := h.parts(); err != nil {
		return nil, err
	}
	if err := h.makeFiles(ctx); err != nil {
		return nil, err
	}
	switch o.Mode {
	case shm.OnExit:
		h.taker = &exitTaker{h}
	case shm.Queue:
		h.taker, err = newQueueTaker(h)
	case shm.Triple:
		h.taker = &tripleTaker{shm.NewTripleReader(h.layout, h.ctl, h.mem), false}
	case shm.Cow:
		h.taker, err = newCow(h)
	}
	return h, err
}

// parts marks the chunks that are saved.
func (h *Host) parts() error {
	if len(h.o.Parts) == 0 {
		return nil
	}
	h.saves = make([]bool, region.Chunks(h.layout.Size, h.layout.Chunk))
	for _, p := range h.o.Parts {
		if err := region.CheckRange(p.Off, p.Length, h.layout.Size); err != nil {
			return fmt.Errorf("part of the region: %w", err)
		}
		for idx := p.Off / h.layout.Chunk; idx*h.layout.Chunk < p.Off+p.Length; idx++ {
			h.saves[idx] = true
		}
	}
	return nil
}

// makeFiles makes the shared memory and restores it.
func (h *Host) makeFiles(ctx context.Context) (err error) {
	flags := 0
	if h.o.HugePage > 0 {
		flags = unix.MFD_HUGETLB | log2(h.o.HugePage)<<unix.MFD_HUGE_SHIFT
	}
	for _, f := range []struct {
		to     **os.File
		name   string
		length int64
		flags  int
	}{{&h.region, shm.RegionName, h.layout.RegionLength(), flags}, {&h.control, shm.ControlName, h.layout.ControlLength(), 0}, {&h.status, shm.StatusName, shm.StatusLength, 0}} {
		fd, err := unix.MemfdCreate("memsync-"+f.name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|f.flags)
		if err != nil {
			if f.flags != 0 {
				return fmt.Errorf("memory in huge pages of %d bytes: %w: %w", h.o.HugePage, err, region.ErrNotSupported)
			}
			return os.NewSyscallError("memfd_create", err)
		}
		*f.to = os.NewFile(uintptr(fd), f.name)
		if err := (*f.to).Truncate(f.length); err != nil {
			return fmt.Errorf("%s of %d bytes: %w", f.name, f.length, err)
		}
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW); err != nil {
			return fmt.Errorf("seal the size of %s: %w", f.name, err)
		}
	}
	const rw = unix.PROT_READ | unix.PROT_WRITE
	// Written to until the client starts; afterwards a mapping that can only be read.
	mem, err := h.mmap(h.region, rw)
	if err != nil {
		return err
	}
	for b := range int64(h.layout.Buffers()) {
		at := b * h.layout.Stride()
		err = errors.Join(err, h.image.Restore(ctx, func(p []byte, off int64) error { copy(mem[at+off:], p); return nil }))
	}
	if err = errors.Join(err, unix.Munmap(mem)); err != nil {
		return err
	}
	if h.mem, err = h.mmap(h.region, unix.PROT_READ); err != nil {
		return err
	}
	if h.ctl, err = h.mmap(h.control, rw); err != nil {
		return err
	}
	s, _ := h.image.Latest()
	if err := h.layout.Format(h.ctl, s.Sequence, s.Blob); err != nil {
		return err
	}
	if h.layout.Mode == shm.Queue {
		if err := unix.Mprotect(h.ctl, unix.PROT_READ); err != nil {
			return os.NewSyscallError("mprotect", err)
		}
	}
	if h.stat, err = h.mmap(h.status, rw); err != nil {
		return err
	}
	h.told.Sequence = s.Sequence
	shm.PutStatus(h.stat, h.told)
	return nil
}

func log2(n int64) int {
	k := 0
	for n > 1 {
		n >>= 1
		k++
	}
	return k
}

func (h *Host) mmap(f *os.File, prot int) ([]byte, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, int(fi.Size()), prot, unix.MAP_SHARED)
	if err != nil {
		if h.o.HugePage > 0 && errors.Is(err, unix.ENOMEM) {
			err = fmt.Errorf("%w: fewer than %d huge pages are free (vm.nr_hugepages): %w", err, h.layout.RegionLength()/h.layout.Page, region.ErrNotSupported)
		}
		return nil, fmt.Errorf("map %d bytes of %s: %w", fi.Size(), f.Name(), err)
	}
	return mem, nil
}

// Files returns what the client is to get, in the order of the LISTEN_FDS
// convention, and their names. They stay the Host's; its own end of the socket is another.
func (h *Host) Files() (files []*os.File, names []string) {
	files, names = []*os.File{h.region, h.control, h.status}, []string{shm.RegionName, shm.ControlName, shm.StatusName}
	if h.theirs != nil {
		files, names = append(files, h.theirs), append(names, shm.SocketName)
	}
	return files, names
}

// Started is called once the client's process has its files: the Host lets go of the
// client's end of the socket, so that it sees the client's end.
func (h *Host) Started() error {
	if h.theirs == nil {
		return nil
	}
	err := h.theirs.Close()
	h.theirs = nil
	return err
}

// Ready waits until the client has opened its region. Mode on-exit needs no
// library, and is always ready. Errors: context.DeadlineExceeded, with advice, after
// Options.Register; what a client of mode cow did wrong.
func (h *Host) Ready(ctx context.Context) error {
	if h.layout.Mode == shm.OnExit {
		return nil
	}
	late := time.NewTimer(h.o.Register)
	defer late.Stop()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for shm.Attached(h.ctl) == 0 {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-h.broken:
			return err
		case <-late.C:
			return fmt.Errorf("the command has not opened its region (package client) within %v, so mode %v cannot take images of it; mode on-exit needs no library: %w",
				h.o.Register, h.layout.Mode, context.DeadlineExceeded)
		case <-tick.C:
		}
	}
	return nil
}

// Follow does what must be done between images: for mode queue it reads the stream. It is to be
// called every millisecond or so. An error is a client that broke the protocol.
func (h *Host) Follow() error {
	select {
	case err := <-h.broken:
		return err
	default:
	}
	starved, err := h.taker.follow()
	if starved {
		h.update(func(s *shm.Status) { s.Starved++ })
	}
	return err
}

// update changes what the client is told.
func (h *Host) update(change func(*shm.Status)) {
	h.tell.Lock()
	defer h.tell.Unlock()
	change(&h.told)
	shm.PutStatus(h.stat, h.told)
}

// Asks gives a function for each image that the client asks for, to be passed to Snapshot.
func (h *Host) Asks() <-chan func(error) { return h.asks }

// ErrNotSaved marks errors of the image file: the state was had, and was not saved. The
// image has the one before it; the next Snapshot tries again.
var ErrNotSaved = errors.New("the image was not saved")

// Snapshot takes an image of the last state that the client has published, or in mode cow of
// this instant. It returns once the image is on the disk. held, which may be nil, is called
// once when the state is held (nil), or cannot be had.
// Errors: ErrNotSaved; region.ErrMismatch of a client that broke the protocol.
func (h *Host) Snapshot(ctx context.Context, held func(error)) (Result, error) {
	return h.snapshot(ctx, false, held)
}

// Final takes the last image, once the client's process is gone. exited says that
// it ended by itself: only then is there a state in mode on-exit.
func (h *Host) Final(ctx context.Context, exited bool) (Result, error) {
	if h.layout.Mode == shm.OnExit && !exited {
		return Result{}, nil
	}
	return h.snapshot(ctx, true, nil)
}

func (h *Host) snapshot(ctx context.Context, last bool, held func(error)) (r Result, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var once sync.Once
	tell := func(err error) {
		once.Do(func() {
			if held != nil {
				held(err)
			}
		})
	}
	defer func() { tell(err) }()
	began := time.Now()
	var commit *image.Commit
	var fileErr error
	save := func(p []byte, off int64) error {
		if h.saves != nil && !h.saves[off/h.layout.Chunk] {
			return nil
		}
		if commit == nil && fileErr == nil {
			commit, fileErr = h.image.Begin()
		}
		if fileErr == nil {
			fileErr = commit.Write(p, off)
		}
		r.Changed += int64(len(p))
		return fileErr
	}
	t, err := h.taker.take(ctx, last, tell, save)
	r.Fresh, r.Sequence, r.Taken, r.Freeze, r.Starved = t.fresh, t.sequence, t.at, t.freeze, t.starved
	if err == nil && t.fresh {
		if commit == nil {
			commit, fileErr = h.image.Begin()
		}
		if fileErr == nil {
			r.Bytes, fileErr = commit.Finish(image.State{Sequence: t.sequence, Taken: t.at, Blob: t.blob})
		}
	}
	r.Save = time.Since(began)
	h.taker.saved(err == nil && fileErr == nil)
	if fileErr != nil {
		err = fmt.Errorf("%w: %w", ErrNotSaved, fileErr)
	}
	h.update(func(s *shm.Status) {
		s.Starved += uint64(t.starved)
		switch {
		case fileErr != nil:
			s.Failures++
		case err == nil && t.fresh:
			s.Sequence, s.Saved = t.sequence, time.Now()
			s.Images++
		}
	})
	if err != nil {
		return r, fmt.Errorf("image of a region of %d bytes, mode %v: %w", h.layout.Size, h.layout.Mode, err)
	}
	return r, nil
}

// Status is what the client is told.
func (h *Host) Status() shm.Status {
	h.tell.Lock()
	defer h.tell.Unlock()
	return h.told
}

// Close lets go of the region. A client that still has it goes on; nothing of it is saved any more.
func (h *Host) Close() (err error) {
	if h.taker != nil {
		err = h.taker.close()
		h.taker = nil
	}
	for _, m := range []*[]byte{&h.mem, &h.ctl, &h.stat} {
		if *m != nil {
			err = errors.Join(err, unix.Munmap(*m))
			*m = nil
		}
	}
	for _, f := range []**os.File{&h.region, &h.control, &h.status, &h.theirs} {
		if *f != nil {
			err = errors.Join(err, (*f).Close())
			*f = nil
		}
	}
	return err
}
