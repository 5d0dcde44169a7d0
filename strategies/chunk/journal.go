package chunk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// Journal remembers, in a file beside a cache in a file, which chunks hold bytes
// that the source may lack, so that they outlive the process.
//
// It is a map with one byte for each chunk, behind a header: 1 is marked. Nothing
// in it can be torn: a byte is written or it is not. A write of the region is
// answered after its bytes are in the cache and then its chunks are marked; a
// mark goes when the source has flushed what was pushed. So whenever the process
// is killed, a marked chunk has all bytes of every write that was answered, and
// an unmarked one has none that the source lacks.
//
// That holds because the kernel keeps what a dead process wrote. When the whole
// host goes down it does not: cache and journal reach the disk in any order.
// Marks from before a restart are therefore refused (ErrMismatch).
type Journal struct {
	grid
	f  *os.File
	mu sync.Mutex // of marks, and of marking against unmarking
	// marked is what the file says.
	marked *Set
	header []byte // the file's
	left   *Origin
}

// Origin says which content of the source a journal's marks belong to.
type Origin struct {
	Version region.Version
	Epoch   uint32 // of the lease with which the version was asked for
}

const (
	journalMagic  = "memsync cache 2\n"
	journalHeader = 4096 // bytes, of which the last 4 are their CRC-32C
	journalOrigin = 1024 // in it: 1 if it is known, then instance, changes, state, epoch, 8 bytes each
	journalName   = "journal"
)

// OpenJournal opens the journal in the existing folder dir, or makes one, for a
// region of size bytes in chunks of chunk bytes. The folder is this process's
// until Close: another gets region.ErrNotPermitted. With discard, marks are forgotten.
// A journal of another region, of another version, or that is damaged gives
// region.ErrMismatch.
func OpenJournal(dir string, size, chunk int64, discard bool) (_ *Journal, err error) {
	g, err := newGrid(size, chunk)
	if err != nil {
		return nil, err
	}
	j := &Journal{grid: g, marked: NewSet(g.n)}
	name := filepath.Join(dir, journalName)
	if j.f, err = os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, fmt.Errorf("open the cache's journal: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("cache journal %s: %w", name, err), j.f.Close())
		}
	}()
	if err := control(j.f, func(fd int) error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) }); err != nil {
		return nil, fmt.Errorf("another mount uses this folder: %w: %w", err, region.ErrNotPermitted)
	}
	fi, err := j.f.Stat()
	if err != nil {
		return nil, err
	}
	want, err := j.begin()
	if err != nil {
		return nil, err
	}
	j.header = want
	if fi.Size() > 0 && !discard {
		if err := j.load(want); err == nil || !errors.Is(err, errUnfinished) {
			return j, err
		}
	}
	// Emptied first and the header last: one that was not finished has no marks.
	if err := j.f.Truncate(0); err != nil {
		return nil, err
	}
	if err := control(j.f, func(fd int) error { return unix.Fallocate(fd, 0, 0, journalHeader+max(1, g.n)) }); err != nil {
		return nil, fmt.Errorf("reserve %d bytes: %w", journalHeader+g.n, err)
	}
	if _, err := j.f.WriteAt(want, 0); err != nil {
		return nil, err
	}
	return j, j.f.Sync()
}

var errUnfinished = errors.New("was not finished")

// begin is what a journal of this region begins with, in this life of the kernel.
func (j *Journal) begin() ([]byte, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, err
	}
	h := make([]byte, 0, journalHeader)
	h = append(h, journalMagic...)
	h = binary.LittleEndian.AppendUint64(h, uint64(j.size))
	h = binary.LittleEndian.AppendUint64(h, uint64(j.chunk()))
	h = append(h, strings.TrimSpace(string(boot))...)
	h = h[:journalHeader]
	seal(h)
	return h, nil
}

func seal(h []byte) {
	binary.LittleEndian.PutUint32(h[journalHeader-4:], sum(h))
}

func sum(h []byte) uint32 {
	return crc32.Checksum(h[:journalHeader-4], crc32.MakeTable(crc32.Castagnoli))
}

// Origin returns what an earlier mount said of the marks that it left; nil where
// it said nothing.
func (j *Journal) Origin() *Origin { return j.left }

// SetOrigin notes which content the marks belong to, from now on. One that was
// killed in the middle has the old note or the new one: the header is one page,
// which write(2) copies as a whole.
func (j *Journal) SetOrigin(o Origin) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	b := j.header[journalOrigin:journalOrigin]
	for _, v := range []uint64{1, o.Version.Instance, o.Version.Changes, o.Version.State, uint64(o.Epoch)} {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	seal(j.header)
	if _, err := j.f.WriteAt(j.header, 0); err != nil {
		return fmt.Errorf("note the source's version in the cache's journal: %w", err)
	}
	return nil
}

func originOf(h []byte) *Origin {
	word := func(i int) uint64 { return binary.LittleEndian.Uint64(h[journalOrigin+8*i:]) }
	if word(0) != 1 {
		return nil
	}
	return &Origin{region.Version{Instance: word(1), Changes: word(2), State: word(3)}, uint32(word(4))}
}

// load reads the header and the marks.
func (j *Journal) load(want []byte) error {
	h := make([]byte, journalHeader)
	if _, err := j.f.ReadAt(h, 0); err != nil && err != io.EOF {
		return err
	}
	const identity = len(journalMagic) + 16
	switch {
	case bytes.Count(h, []byte{0}) == len(h):
		return errUnfinished
	case !bytes.Equal(h[:len(journalMagic)], want[:len(journalMagic)]):
		return fmt.Errorf("it is no journal of this version: %w", region.ErrMismatch)
	case sum(h) != binary.LittleEndian.Uint32(h[journalHeader-4:]):
		return fmt.Errorf("its header is damaged: %w", region.ErrMismatch)
	case !bytes.Equal(h[:identity], want[:identity]):
		return fmt.Errorf("it is of a region of %d bytes in chunks of %d, not %d and %d: %w",
			binary.LittleEndian.Uint64(h[len(journalMagic):]), binary.LittleEndian.Uint64(h[len(journalMagic)+8:]), j.size, j.chunk(), region.ErrMismatch)
	}
	b := make([]byte, 1<<20)
	for at := int64(0); at < j.n; {
		p := b[:min(int64(len(b)), j.n-at)]
		if _, err := j.f.ReadAt(p, journalHeader+at); err != nil {
			return fmt.Errorf("read the marks of %d chunks: %w: %w", j.n, err, region.ErrMismatch)
		}
		for i, v := range p {
			switch v {
			case 0:
			case 1:
				j.marked.Mark(at+int64(i), at+int64(i)+1)
			default:
				return fmt.Errorf("chunk %d is marked with %d: %w", at+int64(i), v, region.ErrMismatch)
			}
		}
		at += int64(len(p))
	}
	sameLife := bytes.Equal(h[:journalOrigin], want[:journalOrigin])
	if n := j.marked.Count(); n > 0 && !sameLife {
		return fmt.Errorf("%d chunks were not pushed before the host went down, and their bytes may not have reached the disk; recover=discard forgets them: %w", n, region.ErrMismatch)
	}
	if !sameLife {
		return errUnfinished
	}
	j.header, j.left = h, originOf(h)
	return nil
}

// mark marks chunks [lo, hi) and calls also, before anybody can unmark them.
func (j *Journal) mark(lo, hi int64, also func()) error {
	if j == nil {
		also()
		return nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	defer also()
	return j.write(lo, hi, 1, func(i int64) bool { return !j.marked.Has(i) }, j.marked.Mark)
}

// unmark takes the marks of chunks [lo, hi) away, but for those that keep names.
func (j *Journal) unmark(lo, hi int64, keep func(idx int64) bool) error {
	if j == nil {
		return nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.write(lo, hi, 0, func(i int64) bool { return j.marked.Has(i) && !keep(i) }, j.marked.Clear)
}

// write writes v for the chunks of [lo, hi) that need it, neighbours at once.
func (j *Journal) write(lo, hi int64, v byte, need func(int64) bool, done func(lo, hi int64) int64) error {
	for ; lo < hi; lo++ {
		end := lo
		for end < hi && end-lo < 4096 && need(end) {
			end++
		}
		if end == lo {
			continue
		}
		if _, err := j.f.WriteAt(bytes.Repeat([]byte{v}, int(end-lo)), journalHeader+lo); err != nil {
			return fmt.Errorf("note %d in the cache's journal for chunks %d to %d: %w", v, lo, end-1, err)
		}
		done(lo, end)
		lo = end - 1
	}
	return nil
}

// Empty reports whether nothing is marked.
func (j *Journal) Empty() bool {
	_, _, marked := j.marked.Next(0, 1)
	return !marked
}

// Close lets go of the folder. Where nothing is marked, it removes the file.
func (j *Journal) Close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	var err error
	if j.Empty() {
		if err = os.Remove(j.f.Name()); errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrClosed) {
			err = nil
		}
	}
	if cerr := j.f.Close(); !errors.Is(cerr, os.ErrClosed) {
		err = errors.Join(err, cerr)
	}
	return err
}

// Recover gives the Syncer a journal, to be called before anything else but
// Bound. The cache must be the file that goes with it. The chunks that are
// marked become local and dirty; all others lose what the file has of them.
// It returns how many bytes were recovered, in whole chunks.
func (s *Syncer) Recover(j *Journal) (int64, error) {
	t, ok := s.local.(region.Trimmer)
	if !ok {
		return 0, fmt.Errorf("recover a cache that cannot give space back: %w", region.ErrNotSupported)
	}
	count := j.marked.Count()
	if b := s.bound; b != nil && count > b.limit {
		return 0, fmt.Errorf("the journal has %d bytes that wait to be pushed, and the cache may hold %d: %w", count<<s.shift, b.limit<<s.shift, region.ErrOutOfRange)
	}
	s.journal = j
	for at := int64(0); at < s.n; {
		lo, hi, ok := j.marked.Next(at, s.n)
		if !ok {
			lo, hi = s.n, s.n
		}
		if lo > at {
			if err := t.Trim(s.ctx, s.at(at), s.at(lo)-s.at(at)); err != nil {
				return 0, err
			}
		}
		for i := lo; i < hi; i++ {
			s.words[i].Store(uint32(Filling))
		}
		s.dirty.Mark(lo, hi)
		if b := s.bound; b != nil {
			b.mu.Lock()
			b.used += hi - lo
			b.mu.Unlock()
		}
		s.publish(lo, hi, true)
		at = hi
	}
	return count << s.shift, nil
}
