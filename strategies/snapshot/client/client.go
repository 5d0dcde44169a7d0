// Package client is the client's side of memsync snapshot: a program that is started by it
// opens its region, writes to it, and publishes states of which images are taken.
//
//	r, err := client.Open()
//	...
//	err = r.Write(bytes, offset)      // any number of them
//	sequence, err := r.Publish(blob)  // they are a state now, all or none
//
// What Publish does is the mode's, which the user of memsync snapshot chooses:
//
//   - queue: the stores go into a stream that the host follows. Never waits. When the client is
//     faster than the host for long, images become old: Status says so.
//   - triple: the stores are in one of three buffers, which is handed over. Never waits.
//   - cow: the host protects the mapping and copies pages before they are written to. Images are of
//     one instant, also between publications; Publish waits until the state is held, some
//     microseconds to milliseconds, and for an image that is being saved.
//   - on-exit: the image is what the region is when the process has exited.
//
// A program in another language needs no library for on-exit, and some atomic
// operations for the others: docs/strategies/snapshot.md has the layout.
package client

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"memsync/strategies/device/uffd"
	"memsync/strategies/region"
	"memsync/strategies/snapshot/shm"
)

// MaxBlob is the largest blob that goes with a state, in bytes.
const MaxBlob = shm.MaxBlob

// Status is what the host tells of images.
type Status = shm.Status

// Files are the descriptors that a host hands to its client. Socket is nil but in mode cow.
type Files struct{ Region, Control, Status, Socket *os.File }

// firstFD is the first descriptor of the LISTEN_FDS convention, sd_listen_fds(3).
const firstFD = 3

// Region is an open region. Write, Touch, Publish and Note may be called
// concurrently; what of them comes before a Publish is part of it.
type Region struct {
	layout               shm.Layout
	mem, control, status []byte
	socket               *os.File
	queue                *shm.QueueWriter
	triple               *shm.TripleWriter

	mu     sync.Mutex
	closed bool
}

// Open opens the region that memsync snapshot passed to this process.
// Errors: region.ErrMissing where it passed none; region.ErrMismatch where it is of
// another version; of mode cow also region.ErrNotSupported and ErrNotPermitted (userfaultfd).
func Open() (*Region, error) {
	if pid := os.Getenv("LISTEN_PID"); pid != strconv.Itoa(os.Getpid()) {
		return nil, fmt.Errorf("open the region: LISTEN_PID=%q is not this process, %d: start it by memsync snapshot: %w", pid, os.Getpid(), region.ErrMissing)
	}
	names := strings.Split(os.Getenv("LISTEN_FDNAMES"), ":")
	if n := os.Getenv("LISTEN_FDS"); n != strconv.Itoa(len(names)) {
		return nil, fmt.Errorf("open the region: LISTEN_FDS=%q and %d names: %w", n, len(names), region.ErrMissing)
	}
	var f Files
	for i, name := range names {
		for want, to := range map[string]**os.File{shm.RegionName: &f.Region, shm.ControlName: &f.Control, shm.StatusName: &f.Status, shm.SocketName: &f.Socket} {
			if name == want {
				unix.CloseOnExec(firstFD + i)
				*to = os.NewFile(uintptr(firstFD+i), name)
			}
		}
	}
	return Attach(f)
}

// Attach is Open for a process that got the descriptors in another way. It takes them over.
func Attach(f Files) (_ *Region, err error) {
	r := &Region{socket: f.Socket}
	defer func() {
		for _, f := range []*os.File{f.Region, f.Control, f.Status} {
			if f != nil {
				err = errors.Join(err, f.Close()) // no second mapping, no pwrite
			}
		}
		if err != nil {
			err = errors.Join(fmt.Errorf("open the region: %w", err), r.Close())
		}
	}()
	if f.Region == nil || f.Control == nil || f.Status == nil {
		return r, fmt.Errorf("want the descriptors %s, %s and %s in LISTEN_FDNAMES: %w", shm.RegionName, shm.ControlName, shm.StatusName, region.ErrMissing)
	}
	if r.control, err = mapAll(f.Control, unix.PROT_READ|unix.PROT_WRITE); err != nil {
		return r, err
	}
	if r.layout, err = shm.ReadLayout(r.control); err != nil {
		return r, err
	}
	if r.status, err = mapAll(f.Status, unix.PROT_READ); err != nil {
		return r, err
	}
	if len(r.status) < shm.StatusLength {
		return r, fmt.Errorf("status page of %d bytes: %w", len(r.status), region.ErrMismatch)
	}
	if r.mem, err = mapAll(f.Region, unix.PROT_READ|unix.PROT_WRITE); err != nil {
		return r, err
	}
	if int64(len(r.mem)) < r.layout.RegionLength() {
		return r, fmt.Errorf("file of %d bytes for %d: %w", len(r.mem), r.layout.RegionLength(), region.ErrMismatch)
	}
	switch r.layout.Mode {
	case shm.Queue:
		r.queue = shm.NewQueueWriter(r.layout, r.control, r.mem)
	case shm.Triple:
		r.triple = shm.NewTripleWriter(r.layout, r.control, r.mem)
	case shm.Cow:
		if err := r.register(); err != nil {
			return r, err
		}
	}
	shm.Attach(r.control, os.Getpid())
	return r, nil
}

func mapAll(f *os.File, prot int) ([]byte, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if fi.Size() <= 0 || int64(int(fi.Size())) != fi.Size() {
		return nil, fmt.Errorf("%s of %d bytes: %w", f.Name(), fi.Size(), region.ErrMismatch)
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, int(fi.Size()), prot, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", f.Name(), err)
	}
	return mem, nil
}

func base(mem []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(mem))) }

// register makes the mapping one that the host can protect, and hands it over.
// This process keeps no descriptor of it: when the host dies, the kernel lets all
// threads go that wait.
func (r *Region) register() error {
	if r.socket == nil {
		return fmt.Errorf("mode cow wants the descriptor %s: %w", shm.SocketName, region.ErrMissing)
	}
	// A forked child would have the mapping without its protection.
	for _, m := range [][]byte{r.mem, r.control} {
		if err := unix.Madvise(m, unix.MADV_DONTFORK); err != nil {
			return os.NewSyscallError("madvise", err)
		}
	}
	u, _, err := uffd.New(uffd.UFFD_FEATURE_WP_UNPOPULATED | uffd.UFFD_FEATURE_WP_HUGETLBFS_SHMEM | uffd.UFFD_FEATURE_PAGEFAULT_FLAG_WP)
	if err != nil {
		return err
	}
	defer u.Close()
	off, n := shm.ProtectedControl()
	h := shm.Hello{Base: base(r.mem), Length: r.layout.Stride(), ControlBase: base(r.control) + uintptr(off), ControlLength: n}
	if err := uffd.Register(u, h.Base, h.Length, uffd.UFFDIO_REGISTER_MODE_WP); err != nil {
		return err
	}
	if err := uffd.Register(u, h.ControlBase, n, uffd.UFFDIO_REGISTER_MODE_WP); err != nil {
		return err
	}
	if err := unix.Sendmsg(int(r.socket.Fd()), h.Encode(), unix.UnixRights(int(u.Fd())), nil, 0); err != nil {
		return fmt.Errorf("register the mapping with the host: %w", err)
	}
	return r.answer("register the mapping")
}

// answer waits for the host's answer. A host that is gone is an answer.
func (r *Region) answer(what string) error {
	b := make([]byte, shm.MaxMessage)
	n, err := eintr(func() (int, error) { return unix.Read(int(r.socket.Fd()), b) })
	if err != nil {
		return fmt.Errorf("%s: the host's answer: %w", what, err)
	}
	if n == 0 {
		return fmt.Errorf("%s: the host: %w", what, region.ErrPeerGone)
	}
	if err := shm.DecodeAnswer(b[:n]); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

func eintr(call func() (int, error)) (int, error) {
	for {
		if n, err := call(); err != unix.EINTR {
			return n, err
		}
	}
}

// Mode is the name of the mode.
func (r *Region) Mode() string { return r.layout.Mode.String() }

// Size is the region's, in bytes.
func (r *Region) Size() int64 { return r.layout.Size }

// Restored returns what the region had when this process started: the sequence of
// the publication and its blob. Where there was no image, the sequence is 0 and
// the region zeroes.
func (r *Region) Restored() (sequence uint64, blob []byte, err error) { return shm.Restored(r.control) }

// Mem is the region, to be read; what Write stored is in it after Publish, at the latest.
// In modes on-exit and cow it may be written to at any time; in mode triple after
// Touch, and until Publish, after which Mem is other memory. In mode queue only
// Write may store.
func (r *Region) Mem() []byte {
	if r.triple != nil {
		return r.triple.Mem()
	}
	return r.mem[:r.layout.Size]
}

// Touch says that [off, off+n) of Mem is about to be written to. Errors:
// region.ErrOutOfRange; region.ErrNotSupported in mode queue.
func (r *Region) Touch(off, n int64) error {
	switch r.layout.Mode {
	case shm.Queue:
		return fmt.Errorf("stores to the memory of a queue are not seen: use Write: %w", region.ErrNotSupported)
	case shm.Triple:
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.triple.Touch(off, n)
	}
	return region.CheckRange(off, n, r.layout.Size)
}

// Write stores p at off, as part of the next publication. Errors: region.ErrOutOfRange
// beyond the region and, in mode queue, where the stores since the last
// publication are more than the stream holds.
func (r *Region) Write(p []byte, off int64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return region.ErrClosed
	}
	switch r.layout.Mode {
	case shm.Queue:
		return r.queue.Write(p, off)
	case shm.Triple:
		return r.triple.Write(p, off)
	}
	if err := region.CheckRange(off, int64(len(p)), r.layout.Size); err != nil {
		return err
	}
	copy(r.mem[off:], p)
	return nil
}

// Publish makes all stores so far a state, with blob (at most MaxBlob bytes), and
// returns its sequence, which counts from what was restored. In modes queue and
// triple it never waits; in mode cow it waits until the host holds that state, or
// says why it cannot (region.ErrPeerGone where it died). That the state is on the
// disk is another thing, which Status tells.
func (r *Region) Publish(blob []byte) (sequence uint64, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return 0, region.ErrClosed
	}
	switch r.layout.Mode {
	case shm.Queue:
		return r.queue.Publish(blob)
	case shm.Triple:
		return r.triple.Publish(blob)
	}
	if sequence, err = shm.Note(r.control, blob); err != nil || r.layout.Mode == shm.OnExit {
		return sequence, err
	}
	if _, err := eintr(func() (int, error) { return unix.Write(int(r.socket.Fd()), shm.EncodeAsk()) }); err != nil {
		if errors.Is(err, unix.EPIPE) {
			err = region.ErrPeerGone
		}
		return sequence, fmt.Errorf("ask for an image: %w", err)
	}
	return sequence, r.answer("ask for an image")
}

// Note makes blob the one that goes with images of modes on-exit and cow from now on,
// without asking for an image. Errors: region.ErrNotSupported in other modes.
func (r *Region) Note(blob []byte) (sequence uint64, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.layout.Mode != shm.OnExit && r.layout.Mode != shm.Cow {
		return 0, fmt.Errorf("a note in mode %v, whose blobs come with Publish: %w", r.layout.Mode, region.ErrNotSupported)
	}
	return shm.Note(r.control, blob)
}

// Status says what is on the disk. A client whose Status.Sequence falls behind, or in whose
// Status Starved grows, may publish less, or ask for a larger stream.
func (r *Region) Status() Status { return shm.GetStatus(r.status) }

// Close unmaps the region: Mem is invalid then. It may be called twice. What was
// published stays.
func (r *Region) Close() (err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil
	}
	r.closed = true
	for _, m := range [][]byte{r.mem, r.control, r.status} {
		if m != nil {
			err = errors.Join(err, unix.Munmap(m))
		}
	}
	if r.socket != nil {
		err = errors.Join(err, r.socket.Close())
	}
	return err
}
