// Package image keeps images of one region in one file, which holds a complete
// image at every moment from the first commit on, whatever is killed or loses power.
//
// Each chunk has two places in the file, and so has the record that says which of
// them counts. A commit writes the chunks that changed to the places that the last
// record does not name, waits for the disk, writes the other record, and waits
// again. A record counts if its digest is right; of two that do, the later one. So
// a commit that was cut off at any point leaves the image before it. Chunks of
// zeroes take no space, and chunks that did not change are not written again.
//
//	0              header: magic, region bytes, chunk bytes, CRC-32C; written once
//	4096           record A: head with the blob, then of each chunk its place, then of each its digest
//	4096 + r       record B
//	d              places A of all chunks
//	d + n*chunk    places B
//
// All numbers are little-endian; digests are XXH3-128, which finds damage, not
// forgery. docs/strategies/snapshot.md has the offsets.
package image

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/zeebo/xxh3"
	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

const (
	magic      = "memsync image 1\n"
	block      = 4096
	headLength = 48 // of a record, before the blob
	digestSize = 16

	// MaxBlob is the largest blob, in bytes.
	MaxBlob = block - headLength
	// maxChunks bounds the memory that an image takes: 17 bytes a chunk, three times.
	maxChunks = 1 << 26
)

// What a chunk's place can be.
const (
	hole = iota // zeroes
	placeA
	placeB
)

// State describes an image.
type State struct {
	Commit   uint64    // counts the images of this file, from 1
	Sequence uint64    // the client's publication that it holds; what it means is the mode's
	Taken    time.Time // when the region was as the image has it
	Blob     []byte    // the client's, at most MaxBlob bytes
}

// file is what an image needs of its file; tests have one that forgets.
type file interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
	Close() error
}

type osFile struct{ *os.File }

// Sync waits until what was written is on the disk.
func (f osFile) Sync() error {
	for {
		if err := unix.Fdatasync(int(f.Fd())); err != unix.EINTR {
			return os.NewSyscallError("fdatasync", err)
		}
	}
}

// Image is an open image file. Its methods must not be called concurrently, but
// Latest may.
type Image struct {
	path        string
	f           file
	size, chunk int64
	n           int64 // chunks

	mu     sync.Mutex // of state and table, against Latest
	state  State
	table  table
	torn   bool // the place of the next record may hold one that counts
	onDisk [2][]byte
}

// table says where the chunks are.
type table struct {
	place  []byte
	digest [][digestSize]byte
}

func newTable(n int64) table {
	return table{make([]byte, n), make([][digestSize]byte, n)}
}

// Open opens the image of a region of size bytes in chunks of chunk bytes (a power
// of two, at least 4096), or makes the file. Where it is there, size and chunk may be 0:
// its own. The file is this process's until Close: region.ErrNotPermitted where
// another has it. A file of another region, of another version or that is damaged
// gives region.ErrMismatch, one that is no image too: it is not changed.
func Open(path string, size, chunk int64) (*Image, error) {
	i, err := open(path, size, chunk)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", path, err)
	}
	return i, nil
}

func open(path string, size, chunk int64) (*Image, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		if size == 0 {
			return nil, fmt.Errorf("it is not there, and no size was given to make it: %w", region.ErrMissing)
		}
		if err = create(path, size, chunk); err == nil || errors.Is(err, fs.ErrExist) {
			f, err = os.OpenFile(path, os.O_RDWR|unix.O_CLOEXEC, 0)
		}
	}
	if err != nil {
		return nil, err
	}
	if err := lock(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("not a regular file: %w", region.ErrMismatch)
	}
	var i *Image
	if err == nil {
		i, err = load(osFile{f}, fi.Size(), size, chunk)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	i.path = path
	return i, nil
}

func lock(f *os.File) error {
	err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("another process has it open: one region, one image: %w: %w", err, region.ErrNotPermitted)
	}
	return os.NewSyscallError("flock", err)
}

// create makes an image without a commit. The file gets its name when it is
// complete: a process that is killed leaves nothing.
func create(path string, size, chunk int64) (err error) {
	g, err := geometry(size, chunk)
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("create it in %s (needs a file system with O_TMPFILE, as ext4, xfs, btrfs, tmpfs): %w", dir, err)
	}
	f := os.NewFile(uintptr(fd), path)
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := g.begin(f); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW); err != nil {
		return &os.PathError{Op: "linkat", Path: path, Err: err}
	}
	return syncDir(dir)
}

// begin makes an empty file an image without a commit.
func (i *Image) begin(f *os.File) error {
	if _, err := f.WriteAt(i.header(), 0); err != nil {
		return err
	}
	return f.Truncate(i.end())
}

// New makes an image in f, which is empty: a memfd, say, for an image that need not
// outlive the host. It takes f over.
func New(f *os.File, size, chunk int64) (*Image, error) {
	i, err := geometry(size, chunk)
	if err == nil {
		if err = i.begin(f); err == nil {
			i, err = load(osFile{f}, i.end(), size, chunk)
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("image in %s: %w", f.Name(), err), f.Close())
	}
	i.path = f.Name()
	return i, nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// geometry checks the sizes and returns an image of them without a file.
func geometry(size, chunk int64) (*Image, error) {
	if chunk < block || chunk&(chunk-1) != 0 || chunk > 1<<30 {
		return nil, fmt.Errorf("chunks of %d bytes: want a power of two, %d to 1 GiB: %w", chunk, block, region.ErrOutOfRange)
	}
	if size < 1 || size > math.MaxInt64/8 || region.Chunks(size, chunk) > maxChunks {
		return nil, fmt.Errorf("region of %d bytes in chunks of %d: want 1 to %d chunks: %w", size, chunk, maxChunks, region.ErrOutOfRange)
	}
	return &Image{size: size, chunk: chunk, n: region.Chunks(size, chunk)}, nil
}

// recordLength is the bytes of a record.
func (i *Image) recordLength() int64 {
	return region.RoundUp(block+region.RoundUp(i.n, digestSize)+i.n*digestSize, block)
}

func (i *Image) recordAt(k int) int64 { return block + int64(k)*i.recordLength() }

// dataAt is where a place of a chunk begins.
func (i *Image) dataAt(idx int64, place byte) int64 {
	return region.RoundUp(i.recordAt(2), i.chunk) + (int64(place-placeA)*i.n+idx)*i.chunk
}

// end is where the data begins: what a file has at least.
func (i *Image) end() int64 { return i.dataAt(0, placeA) }

func (i *Image) header() []byte {
	h := make([]byte, block)
	copy(h, magic)
	binary.LittleEndian.PutUint64(h[16:], uint64(i.size))
	binary.LittleEndian.PutUint64(h[24:], uint64(i.chunk))
	binary.LittleEndian.PutUint32(h[block-4:], crc32.Checksum(h[:block-4], crc32.MakeTable(crc32.Castagnoli)))
	return h
}

// load reads header and records.
func load(f file, length, size, chunk int64) (*Image, error) {
	h := make([]byte, block)
	if length < block {
		return nil, fmt.Errorf("%d bytes: not an image of memsync: %w", length, region.ErrMismatch)
	}
	if _, err := f.ReadAt(h, 0); err != nil {
		return nil, err
	}
	if !bytes.Equal(h[:len(magic)], []byte(magic)) {
		return nil, fmt.Errorf("not an image of this version of memsync: %w", region.ErrMismatch)
	}
	if crc32.Checksum(h[:block-4], crc32.MakeTable(crc32.Castagnoli)) != binary.LittleEndian.Uint32(h[block-4:]) {
		return nil, fmt.Errorf("its header is damaged: %w", region.ErrMismatch)
	}
	hs, hc := int64(binary.LittleEndian.Uint64(h[16:])), int64(binary.LittleEndian.Uint64(h[24:]))
	if size != 0 && size != hs || chunk != 0 && chunk != hc {
		return nil, fmt.Errorf("it is of a region of %d bytes in chunks of %d, not %d and %d: %w", hs, hc, size, chunk, region.ErrMismatch)
	}
	i, err := geometry(hs, hc)
	if err != nil {
		return nil, fmt.Errorf("its header is damaged: %w: %w", err, region.ErrMismatch)
	}
	if length < i.end() {
		return nil, fmt.Errorf("truncated: %d bytes, and its records end at %d: %w", length, i.end(), region.ErrMismatch)
	}
	i.f, i.table = f, newTable(i.n)
	for k := range 2 {
		b := make([]byte, i.recordLength())
		if _, err := f.ReadAt(b, i.recordAt(k)); err != nil {
			return nil, fmt.Errorf("read record %d: %w", k, err)
		}
		i.onDisk[k] = b
		s, t, ok, err := i.decode(b)
		if err != nil {
			return nil, fmt.Errorf("record %d: %w", k, err)
		}
		if ok && int(s.Commit%2) != k {
			return nil, fmt.Errorf("record %d has commit %d: %w", k, s.Commit, region.ErrMismatch)
		}
		if ok && s.Commit > i.state.Commit {
			i.state, i.table = s, t
		}
	}
	return i, nil
}

// encode makes a record. The last 16 bytes of what is not in use are zeroes.
func (i *Image) encode(s State, t table) []byte {
	b := make([]byte, i.recordLength())
	le := binary.LittleEndian
	le.PutUint64(b[16:], s.Commit)
	le.PutUint64(b[24:], s.Sequence)
	le.PutUint64(b[32:], uint64(s.Taken.UnixNano()))
	le.PutUint32(b[40:], uint32(len(s.Blob)))
	copy(b[headLength:], s.Blob)
	copy(b[block:], t.place)
	at := block + region.RoundUp(i.n, digestSize)
	for _, d := range t.digest {
		at += int64(copy(b[at:], d[:]))
	}
	d := digestOf(b[digestSize:])
	copy(b, d[:])
	return b
}

// decode takes a record apart; ok is false where there is none, or one that was
// not finished. An error is a record that no version of this program wrote.
func (i *Image) decode(b []byte) (s State, t table, ok bool, err error) {
	d := digestOf(b[digestSize:])
	if !bytes.Equal(d[:], b[:digestSize]) {
		return s, t, false, nil
	}
	le := binary.LittleEndian
	length := le.Uint32(b[40:])
	s = State{Commit: le.Uint64(b[16:]), Sequence: le.Uint64(b[24:]), Taken: time.Unix(0, int64(le.Uint64(b[32:])))}
	if s.Commit == 0 || length > MaxBlob {
		return s, t, false, fmt.Errorf("commit %d with a blob of %d bytes: %w", s.Commit, length, region.ErrMismatch)
	}
	s.Blob = bytes.Clone(b[headLength : headLength+length])
	t = newTable(i.n)
	copy(t.place, b[block:])
	at := block + region.RoundUp(i.n, digestSize)
	for k := range t.digest {
		if t.place[k] > placeB {
			return s, t, false, fmt.Errorf("chunk %d is in place %d: %w", k, t.place[k], region.ErrMismatch)
		}
		at += int64(copy(t.digest[k][:], b[at:]))
	}
	return s, t, true, nil
}

// Size is the region's, in bytes.
func (i *Image) Size() int64 { return i.size }

// Chunk is the unit of an image, in bytes.
func (i *Image) Chunk() int64 { return i.chunk }

// Latest returns the last image's state; ok is false where there is none yet. It may
// be called at any time.
func (i *Image) Latest() (s State, ok bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.state, i.state.Commit > 0
}

// Bytes is how much of the region the last image has that is not a hole.
func (i *Image) Bytes() (n int64) {
	for idx, p := range i.table.place {
		if p != hole {
			n += i.extent(int64(idx))
		}
	}
	return n
}

// extent is how many bytes chunk idx has.
func (i *Image) extent(idx int64) int64 { return min(i.chunk, i.size-idx*i.chunk) }

// Restore calls put for each chunk of the last image that is not all zeroes, in
// order, after checking it. p is not kept. A chunk that is damaged gives
// region.ErrMismatch.
func (i *Image) Restore(ctx context.Context, put func(p []byte, off int64) error) error {
	buf := make([]byte, i.chunk)
	for idx, place := range i.table.place {
		if place == hole {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		p := buf[:i.extent(int64(idx))]
		off := int64(idx) * i.chunk
		if _, err := i.f.ReadAt(p, i.dataAt(int64(idx), place)); err == io.EOF {
			return fmt.Errorf("image %s: truncated: chunk at %d is not all there: %w", i.path, off, region.ErrMismatch)
		} else if err != nil {
			return fmt.Errorf("image %s: read chunk at %d: %w", i.path, off, err)
		}
		if d := digestOf(p); d != i.table.digest[idx] {
			return fmt.Errorf("image %s: chunk at %d of commit %d has another digest than when it was written: %w", i.path, off, i.state.Commit, region.ErrMismatch)
		}
		if err := put(p, off); err != nil {
			return fmt.Errorf("restore chunk at %d: %w", off, err)
		}
	}
	return nil
}

// Commit is an image in the making. One at a time.
type Commit struct {
	i       *Image
	t       table
	written int64
}

// Begin begins a new image, which is the last one until chunks are written.
func (i *Image) Begin() (*Commit, error) {
	if i.torn {
		// What a failed commit may have left must not count, before the chunks it
		// names are written over.
		k := int((i.state.Commit + 1) % 2)
		i.onDisk[k] = nil
		if _, err := i.f.WriteAt(make([]byte, block), i.recordAt(k)); err != nil {
			return nil, fmt.Errorf("image %s: clear what a failed commit left: %w", i.path, err)
		}
		if err := i.f.Sync(); err != nil {
			return nil, fmt.Errorf("image %s: clear what a failed commit left: %w", i.path, err)
		}
		i.torn = false
	}
	c := &Commit{i: i, t: newTable(i.n)}
	copy(c.t.place, i.table.place)
	copy(c.t.digest, i.table.digest)
	return c, nil
}

// Write puts whole chunks: off is a multiple of the chunk size, and so is len(p),
// but at the region's end. A chunk may be written again. After an error the Commit
// is of no use, and the last image stays.
func (c *Commit) Write(p []byte, off int64) error {
	i := c.i
	if err := region.CheckRange(off, int64(len(p)), i.size); err != nil {
		return err
	}
	if end := off + int64(len(p)); off%i.chunk != 0 || end%i.chunk != 0 && end != i.size {
		return fmt.Errorf("write [%d, %d) of an image in chunks of %d: not whole chunks: %w", off, end, i.chunk, region.ErrOutOfRange)
	}
	for idx := off / i.chunk; len(p) > 0; idx++ {
		q := p[:i.extent(idx)]
		p = p[len(q):]
		if zero(q) {
			c.t.place[idx], c.t.digest[idx] = hole, [digestSize]byte{}
			continue
		}
		d := digestOf(q)
		if i.table.place[idx] != hole && i.table.digest[idx] == d {
			c.t.place[idx], c.t.digest[idx] = i.table.place[idx], d
			continue
		}
		place := byte(placeA)
		if i.table.place[idx] == placeA {
			place = placeB
		}
		if _, err := i.f.WriteAt(q, i.dataAt(idx, place)); err != nil {
			return fmt.Errorf("image %s: write chunk at %d: %w", i.path, idx*i.chunk, err)
		}
		c.written += int64(len(q))
		c.t.place[idx], c.t.digest[idx] = place, d
	}
	return nil
}

func zero(p []byte) bool {
	for len(p) >= 8 {
		if binary.LittleEndian.Uint64(p) != 0 {
			return false
		}
		p = p[8:]
	}
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// Finish makes this the last image, and returns once it is on the disk: how many bytes
// were written for it. s.Commit is not looked at. After an error the image before
// is the last one, now; the file may have either when it is opened anew.
func (c *Commit) Finish(s State) (written int64, err error) {
	i := c.i
	if len(s.Blob) > MaxBlob {
		return 0, fmt.Errorf("blob of %d bytes; the limit is %d: %w", len(s.Blob), MaxBlob, region.ErrOutOfRange)
	}
	if c.written > 0 {
		if err := i.f.Sync(); err != nil {
			return 0, fmt.Errorf("image %s: %w", i.path, err)
		}
	}
	s.Commit = i.state.Commit + 1
	s.Blob = bytes.Clone(s.Blob)
	b := i.encode(s, c.t)
	k := int(s.Commit % 2)
	i.torn = true
	n, err := i.writeRecord(k, b)
	if err == nil {
		err = i.f.Sync()
	}
	if err != nil {
		return 0, fmt.Errorf("image %s: write the record of commit %d: %w", i.path, s.Commit, err)
	}
	i.torn = false
	i.onDisk[k] = b
	i.mu.Lock()
	i.state, i.table = s, c.t
	i.mu.Unlock()
	return c.written + n, nil
}

// writeRecord writes the blocks of a record that differ from what is there.
func (i *Image) writeRecord(k int, b []byte) (written int64, err error) {
	old := i.onDisk[k]
	i.onDisk[k] = nil
	same := func(lo int64) bool { return old != nil && bytes.Equal(old[lo:lo+block], b[lo:lo+block]) }
	for lo := int64(0); lo < int64(len(b)); lo += block {
		hi := lo
		for hi < int64(len(b)) && !same(hi) {
			hi += block
		}
		if hi == lo {
			continue
		}
		if _, err := i.f.WriteAt(b[lo:hi], i.recordAt(k)+lo); err != nil {
			return 0, err
		}
		written += hi - lo
		lo = hi
	}
	return written, nil
}

// Close lets go of the file.
func (i *Image) Close() error { return i.f.Close() }

func digestOf(p []byte) [digestSize]byte { return xxh3.Hash128(p).Bytes() }
