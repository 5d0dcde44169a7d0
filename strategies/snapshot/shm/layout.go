// Package shm is the shared memory between a client, which writes a region, and
// its host, which takes images of it: the layout, and both sides of the queue
// and of the triple buffer. It makes no system call.
//
// There are three files. The region has the client's bytes (with the triple buffer
// three times, Layout.Stride apart). The control file is written by the client, but
// for page 0 and the restored blob, which are there before the client starts, and the
// word of the triple buffer, which both exchange. The status page is written by the
// host and only read by the client. docs/strategies/snapshot.md has the offsets.
package shm

import (
	"encoding/binary"
	"fmt"
	"math"
	"sync/atomic"
	"time"
	"unsafe"

	"memsync/strategies/region"
	"memsync/strategies/snapshot/image"
)

// Mode is a way to have an image that is consistent.
type Mode uint32

// The modes.
const (
	OnExit Mode = iota // when the client has exited; nothing before
	Queue              // the client appends its stores to a stream and marks where they are complete
	Triple             // the client works on one of three buffers and hands over complete ones
	Cow                // the host protects the client's mapping and copies what is written to before it is
)

// Modes lists the names of the modes, in the order of their numbers.
func Modes() []string { return []string{"on-exit", "queue", "triple", "cow"} }

func (m Mode) String() string {
	if int(m) < len(Modes()) {
		return Modes()[m]
	}
	return fmt.Sprintf("mode %d", uint32(m))
}

// ModeByName returns a mode, or an error that lists the valid names.
func ModeByName(name string) (Mode, error) {
	for i, n := range Modes() {
		if n == name {
			return Mode(i), nil
		}
	}
	return 0, fmt.Errorf("unknown mode %q; valid: %v", name, Modes())
}

// The names of the descriptors, in their order from 3 on, as in LISTEN_FDNAMES.
const (
	RegionName  = "region"
	ControlName = "control"
	StatusName  = "status"
	SocketName  = "socket" // mode cow only
)

const (
	page    = 4096
	version = 1

	controlMagic = 0x534E59534D454D01 // "\x01MEMSYNS"
	statusMagic  = 0x534E59534D454D02

	// MaxBlob is the largest blob, in bytes.
	MaxBlob = image.MaxBlob
	blobMax = 8 + MaxBlob // a blob with its length, in a page

	// Offsets in the control file.
	wordsAt    = page     // words of the client, a cache line each
	restoredAt = 2 * page // the blob that was restored: length, bytes
	notesAt    = 3 * page // two blobs that come with an image, see noteWord
	slotsAt    = 5 * page // triple: of each buffer sequence, blob
	moreAt     = 8 * page // queue: the stream; triple: of each buffer a word for each chunk

	// Words at wordsAt.
	reservedWord  = 0   // queue: the stream is being written up to here
	publishedWord = 64  // queue: the stream is complete up to here
	appliedWord   = 128 // queue: the region has all of the stream up to this mark
	middleWord    = 192 // triple: buffer that changes hands, and fresh
	attachedWord  = 256 // the client's process
	noteWord      = 320 // on-exit, cow: which note counts, 1 or 2; 0 is none
	sequenceWord  = 384 // on-exit, cow: publications

	fresh = 4 // in the middle word: its buffer has not been seen by the host

	// MinStream is the least size of a queue's stream, in bytes.
	MinStream = 16 * page
)

// Layout says how the files are divided.
type Layout struct {
	Mode   Mode
	Size   int64 // of the region, bytes
	Chunk  int64 // bytes, a power of two, at least 4096: what the triple buffer tracks
	Page   int64 // of the region's memory, bytes; 4096 or that of huge pages
	Stream int64 // bytes of the queue's stream, a multiple of 4096; 0 in other modes
}

// Check returns an error where the layout cannot be.
func (l Layout) Check() error {
	switch {
	case l.Mode > Cow:
		return fmt.Errorf("%v: %w", l.Mode, region.ErrOutOfRange)
	case l.Size < 1 || l.Size > 1<<46:
		return fmt.Errorf("region of %d bytes: want 1 to 64 TiB: %w", l.Size, region.ErrOutOfRange)
	case l.Chunk < page || l.Chunk&(l.Chunk-1) != 0 || l.Chunk > 1<<30:
		return fmt.Errorf("chunks of %d bytes: want a power of two, 4096 to 1 GiB: %w", l.Chunk, region.ErrOutOfRange)
	case l.Page < page || l.Page&(l.Page-1) != 0 || l.Page > 1<<30:
		return fmt.Errorf("pages of %d bytes: %w", l.Page, region.ErrOutOfRange)
	case l.Mode == Queue && (l.Stream < MinStream || l.Stream%page != 0 || l.Stream > 1<<40):
		return fmt.Errorf("stream of %d bytes: want at least %d and whole pages: %w", l.Stream, MinStream, region.ErrOutOfRange)
	case l.Mode != Queue && l.Stream != 0:
		return fmt.Errorf("a stream of %d bytes in mode %v: %w", l.Stream, l.Mode, region.ErrOutOfRange)
	}
	return nil
}

// Buffers is how often the region's file has the region.
func (l Layout) Buffers() int {
	if l.Mode == Triple {
		return 3
	}
	return 1
}

// Stride is from one buffer to the next, in bytes: the size in whole pages.
func (l Layout) Stride() int64 { return region.RoundUp(l.Size, l.Page) }

// RegionLength is the bytes of the region's file.
func (l Layout) RegionLength() int64 { return l.Stride() * int64(l.Buffers()) }

// ControlLength is the bytes of the control file.
func (l Layout) ControlLength() int64 {
	switch l.Mode {
	case Queue:
		return moreAt + l.Stream
	case Triple:
		return moreAt + 3*l.versionsLength()
	}
	return moreAt
}

func (l Layout) versionsLength() int64 {
	return region.RoundUp(8*region.Chunks(l.Size, l.Chunk), page)
}

// StatusLength is the bytes of the status page.
const StatusLength = page

// ProtectedControl is the range of the control file that a client of mode cow
// registers beside the region, so that its blob is of the same instant.
func ProtectedControl() (off, n int64) { return wordsAt, slotsAt - wordsAt }

// Format writes page 0 of the control file, and what was restored.
func (l Layout) Format(control []byte, sequence uint64, blob []byte) error {
	if err := l.Check(); err != nil {
		return err
	}
	if int64(len(control)) < l.ControlLength() || len(blob) > MaxBlob {
		return fmt.Errorf("control file of %d bytes and a blob of %d: %w", len(control), len(blob), region.ErrOutOfRange)
	}
	le := binary.LittleEndian
	le.PutUint64(control, controlMagic)
	le.PutUint32(control[8:], version)
	le.PutUint32(control[12:], uint32(l.Mode))
	le.PutUint64(control[16:], uint64(l.Size))
	le.PutUint64(control[24:], uint64(l.Stride()))
	le.PutUint64(control[32:], uint64(l.Chunk))
	le.PutUint64(control[40:], uint64(l.Page))
	le.PutUint64(control[48:], uint64(l.Stream))
	le.PutUint64(control[56:], sequence)
	putBlob(control[restoredAt:], blob)
	for b := range 3 {
		le.PutUint64(control[slotsAt+b*page:], sequence)
	}
	if l.Mode == Queue {
		// The stream begins with the mark of what was restored, as after a publication.
		n := putRecord(control[moreAt:moreAt+l.Stream], 0, record{kind: kindMark, at: sequence, data: blob})
		for _, w := range []int{reservedWord, publishedWord} {
			le.PutUint64(control[wordsAt+w:], n)
		}
	}
	le.PutUint64(control[wordsAt+sequenceWord:], sequence)
	le.PutUint64(control[wordsAt+middleWord:], 1) // the client begins with buffer 0, the host with 2
	return nil
}

// ReadLayout reads page 0 of a control file. Errors: region.ErrMismatch where it
// is none, or of another version.
func ReadLayout(control []byte) (l Layout, err error) {
	le := binary.LittleEndian
	if len(control) < moreAt || le.Uint64(control) != controlMagic {
		return l, fmt.Errorf("no control file of memsync snapshot: %w", region.ErrMismatch)
	}
	if v := le.Uint32(control[8:]); v != version {
		return l, fmt.Errorf("control file of version %d, not %d: %w", v, version, region.ErrMismatch)
	}
	l = Layout{Mode: Mode(le.Uint32(control[12:])), Size: int64(le.Uint64(control[16:])), Chunk: int64(le.Uint64(control[32:])),
		Page: int64(le.Uint64(control[40:])), Stream: int64(le.Uint64(control[48:]))}
	if err := l.Check(); err != nil {
		return l, fmt.Errorf("control file: %w: %w", err, region.ErrMismatch)
	}
	if le.Uint64(control[24:]) != uint64(l.Stride()) || int64(len(control)) < l.ControlLength() {
		return l, fmt.Errorf("control file of %d bytes, with a stride of %d, for %+v: %w", len(control), le.Uint64(control[24:]), l, region.ErrMismatch)
	}
	return l, nil
}

// word is a 64-bit word that both processes see; off is a multiple of 8.
func word(mem []byte, off int) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(&mem[off : off+8 : off+8][0]))
}

// clientWord is one at wordsAt.
func clientWord(control []byte, w int) *atomic.Uint64 { return word(control, wordsAt+w) }

func putBlob(p, blob []byte) {
	binary.LittleEndian.PutUint64(p, uint64(len(blob)))
	copy(p[8:], blob)
}

// getBlob copies a blob; its length is not to be trusted.
func getBlob(p []byte) ([]byte, error) {
	n := word(p, 0).Load()
	if n > MaxBlob {
		return nil, fmt.Errorf("blob of %d bytes; the limit is %d: %w", n, MaxBlob, region.ErrMismatch)
	}
	return append([]byte{}, p[8:8+n]...), nil
}

// Restored returns what the region was restored from: the sequence, 0 where
// nothing was, and the blob.
func Restored(control []byte) (sequence uint64, blob []byte, err error) {
	blob, err = getBlob(control[restoredAt:])
	return binary.LittleEndian.Uint64(control[56:]), blob, err
}

// Attach tells the host which process the client is.
func Attach(control []byte, pid int) { clientWord(control, attachedWord).Store(uint64(pid)) }

// Attached returns that process; 0 before.
func Attached(control []byte) int {
	return int(min(clientWord(control, attachedWord).Load(), math.MaxInt32))
}

// Note makes blob the one of images from now on, and counts a publication (modes
// on-exit and cow). One goroutine at a time. It returns the sequence.
func Note(control, blob []byte) (uint64, error) {
	if len(blob) > MaxBlob {
		return 0, fmt.Errorf("blob of %d bytes; the limit is %d: %w", len(blob), MaxBlob, region.ErrOutOfRange)
	}
	which := clientWord(control, noteWord)
	next := which.Load()%2 + 1
	p := control[notesAt+int(next-1)*page:]
	n := clientWord(control, sequenceWord).Load() + 1
	// The sequence goes with the blob, behind it in the page's last 8 bytes.
	putBlob(p[:page-8], blob)
	word(p, page-8).Store(n)
	which.Store(next)
	clientWord(control, sequenceWord).Store(n)
	return n, nil
}

// Noted returns the note that counts; without one, what was restored.
func Noted(control []byte) (sequence uint64, blob []byte, err error) {
	which := clientWord(control, noteWord).Load()
	if which == 0 {
		return Restored(control)
	}
	if which > 2 {
		return 0, nil, fmt.Errorf("note %d: %w", which, region.ErrMismatch)
	}
	p := control[notesAt+int(which-1)*page:]
	blob, err = getBlob(p)
	return word(p, page-8).Load(), blob, err
}

// Status is what the host tells the client.
type Status struct {
	Sequence uint64    // of the last image that is on the disk; what was restored, before
	Images   uint64    // on the disk since the client started
	Saved    time.Time // when the last of them was; zero before
	Starved  uint64    // queue: how often the client had overwritten what the host had not read
	Failures uint64    // images that could not be saved
}

// PutStatus writes the status page. One goroutine at a time.
func PutStatus(p []byte, s Status) {
	word(p, 0).Store(statusMagic)
	saved := uint64(0)
	if !s.Saved.IsZero() {
		saved = uint64(s.Saved.UnixNano())
	}
	for i, v := range []uint64{s.Sequence, s.Images, saved, s.Starved, s.Failures} {
		word(p, 8+8*i).Store(v)
	}
}

// GetStatus reads the status page; each word for itself is current.
func GetStatus(p []byte) Status {
	v := func(i int) uint64 { return word(p, 8+8*i).Load() }
	s := Status{Sequence: v(0), Images: v(1), Starved: v(3), Failures: v(4)}
	if ns := v(2); ns != 0 {
		s.Saved = time.Unix(0, int64(ns))
	}
	return s
}
