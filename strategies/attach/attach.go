// Package attach is the workload's side of every strategies.Attachment: it
// maps (or opens) the region and copies to and from it, and turns the signals
// that a lost server causes into errors.
//
// A thread that waits in a page fault still counts as running for the Go
// scheduler: it holds its P, and a collection waits for it. A process that
// attaches must therefore not serve, watch over or time out the region itself
// (docs/deadlocks.md, cases 1 and 3).
package attach

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"memsync/strategies"
	"memsync/strategies/device/uffd"
	"memsync/strategies/dirty"
	"memsync/strategies/region"
)

// The ways of access.
const (
	ViaMap  = "map"  // through a mapping; the default
	ViaFile = "file" // pread and pwrite on one handle
	ViaPath = "path" // open, pread or pwrite, close: for each operation
)

// Options say how to access. The zero value maps.
type Options struct {
	Via string // ViaMap (also ""), ViaFile or ViaPath; the last two need a path or a memfd
	// Advice is what the kernel is told of the accesses to come to a mapped path
	// or memfd: AdviceNone (also ""), AdviceSequential or AdviceRandom. Without
	// it the kernel reads its whole read-ahead window around a first touch; told
	// "sequential" it reads the window ahead of it; told "random" it reads a page.
	// Source: madvise(2); mm/filemap.c, do_sync_mmap_readahead.
	Advice string
	// Direct opens the path past the page cache (O_DIRECT): each access is a request
	// to the device, whose block offsets, lengths and buffers must be multiples of.
	// For ViaFile and ViaPath of a path only. Source: open(2).
	Direct bool
	// FileSystem, if it is neither "" nor "none", says that the device holds a file
	// system of this kind (FileSystems), which is mounted below Dir; the region is
	// then the content of its first Files files (FileName), one behind the other, of
	// Size bytes together. For ViaMap of one path only.
	FileSystem string
	Files      int
	Size       int64
	Dir        string // an existing folder
}

// The advices.
const (
	AdviceNone       = "none"
	AdviceSequential = "sequential"
	AdviceRandom     = "random"
)

// View is an attached region. ReadAt, WriteAt, Do and Sync may be called
// concurrently; Close waits for them.
type View struct {
	a      strategies.Attachment
	via    string
	advice string
	direct bool
	file   *os.File // nil where there is none
	mem    []byte   // the mapping, rounded up to pages; nil without one
	uffd   *os.File
	table  []byte // the versions of chunks, mapped

	parts   []*os.File // mapped one behind the other, in place of file
	o       Options
	loop    *os.File // between a device that is a file and its file system
	point   string   // where that is mounted
	mounted bool

	mu     sync.RWMutex
	closed bool
}

// Open attaches to a. It takes over a.File, which it closes with the View (also
// where it fails). With AttachFault nothing has been touched yet when it
// returns: hand Fault() to the daemon first. With AttachAnonymous it returns
// once all is copied. It may block as open(2), mmap(2) and read(2) do.
// Errors: region.ErrNotSupported, ErrNotPermitted (userfaultfd), ErrOutOfRange
// (a size of zero or below), or the system call's.
func Open(a strategies.Attachment, o Options) (*View, error) {
	v := &View{a: a, via: o.Via, advice: o.Advice, direct: o.Direct, file: a.File, o: o}
	if v.via == "" {
		v.via = ViaMap
	}
	if err := v.open(); err != nil {
		_ = v.Close()
		return nil, fmt.Errorf("attach %s of %d bytes: %w", a.Kind, a.Size, err)
	}
	return v, nil
}

func (v *View) open() error {
	if v.a.Size <= 0 || v.a.Size > 1<<46 {
		return region.ErrOutOfRange
	}
	prot := unix.PROT_READ | unix.PROT_WRITE
	if v.a.ReadOnly {
		prot = unix.PROT_READ
	}
	flags := unix.MAP_SHARED
	if v.a.Populate {
		flags |= unix.MAP_POPULATE
	}
	length := region.RoundUp(v.a.Size, region.PageSize())
	switch {
	case v.via != ViaMap && v.via != ViaFile && v.via != ViaPath:
		return fmt.Errorf("access via %q; valid: %s, %s, %s", v.via, ViaMap, ViaFile, ViaPath)
	case v.via == ViaPath && v.a.Kind != strategies.AttachPath,
		v.via == ViaFile && v.a.Kind != strategies.AttachPath && v.a.Kind != strategies.AttachMemfd:
		return fmt.Errorf("access via %s: %w", v.via, region.ErrNotSupported)
	case v.direct && (v.a.Kind != strategies.AttachPath || v.via == ViaMap):
		return fmt.Errorf("O_DIRECT needs a path, and access via %s or %s: %w", ViaFile, ViaPath, region.ErrNotSupported)
	case (v.fileSystem() || len(v.a.Paths) > 0) && (v.a.Kind != strategies.AttachPath || v.via != ViaMap):
		return fmt.Errorf("several files or devices in place of one can only be mapped: %w", region.ErrNotSupported)
	case (v.a.Kind == strategies.AttachMemfd || v.a.Kind == strategies.AttachAnonymous) && v.file == nil:
		return errors.New("the attachment's file is missing")
	}
	switch v.a.Kind {
	case strategies.AttachPath:
		if len(v.a.Paths) > 0 {
			return v.mapParts(v.a.Paths, prot, flags)
		}
		if v.fileSystem() {
			paths, err := v.mount()
			if err != nil {
				return err
			}
			return v.mapParts(paths, prot, flags)
		}
		f, err := v.openPath()
		if err != nil {
			return err
		}
		if v.via == ViaPath { // it can be opened: that is all we wanted to know
			return f.Close()
		}
		v.file = f
		if v.via == ViaFile {
			return nil
		}
		return v.mapFile(f, length, prot, flags)
	case strategies.AttachMemfd:
		if v.via == ViaFile {
			return nil
		}
		return v.mapFile(v.file, length, prot, flags)
	case strategies.AttachAnonymous:
		err := v.mmap(-1, length, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return err
		}
		if _, err = io.ReadFull(io.NewSectionReader(v.file, 0, v.a.Size), v.mem[:v.a.Size]); err != nil {
			return fmt.Errorf("fill from the attachment's file: %w", err)
		}
		return os.NewSyscallError("mprotect", unix.Mprotect(v.mem, prot))
	case strategies.AttachFault:
		if v.a.Fault == nil {
			return errors.New("the attachment does not say how to map")
		}
		return v.openFault(*v.a.Fault, prot)
	}
	return fmt.Errorf("attachment kind %q is unknown", v.a.Kind)
}

// mapFile maps f.
func (v *View) mapFile(f *os.File, length int64, prot, flags int) error {
	if err := v.mmap(int(f.Fd()), length, prot, flags); err != nil {
		return err
	}
	if t := v.a.Versions; t != nil {
		if t.Chunk < region.PageSize() || t.Offset%region.PageSize() != 0 {
			return fmt.Errorf("versions at %d for chunks of %d: %w", t.Offset, t.Chunk, region.ErrOutOfRange)
		}
		var err error
		if v.table, err = unix.Mmap(int(f.Fd()), t.Offset, int(8*region.Chunks(v.a.Size, t.Chunk)), unix.PROT_READ, unix.MAP_SHARED); err != nil {
			return fmt.Errorf("map the versions of chunks: %w", err)
		}
	}
	if v.a.Track != "" {
		var err error
		if v.uffd, err = dirty.Arm(v.a.Track, v.mem); err != nil {
			return fmt.Errorf("prepare the mapping for dirty=%s: %w", v.a.Track, err)
		}
	}
	return v.advise()
}

// advise passes the advice on.
func (v *View) advise() error {
	switch v.advice {
	case "", AdviceNone:
		return nil
	case AdviceSequential:
		return os.NewSyscallError("madvise", unix.Madvise(v.mem, unix.MADV_SEQUENTIAL))
	case AdviceRandom:
		return os.NewSyscallError("madvise", unix.Madvise(v.mem, unix.MADV_RANDOM))
	}
	return fmt.Errorf("advice %q; valid: %s, %s, %s", v.advice, AdviceNone, AdviceSequential, AdviceRandom)
}

func (v *View) openPath() (*os.File, error) {
	mode := unix.O_RDWR
	if v.a.ReadOnly {
		mode = unix.O_RDONLY
	}
	if v.direct {
		mode |= unix.O_DIRECT
	}
	return os.OpenFile(v.a.Path, mode, 0)
}

func (v *View) mmap(fd int, length int64, prot, flags int) error {
	if int64(int(length)) != length {
		return region.ErrOutOfRange
	}
	mem, err := unix.MmapPtr(fd, 0, nil, uintptr(length), prot, flags)
	if err != nil {
		return os.NewSyscallError("mmap", err)
	}
	v.mem = unsafe.Slice((*byte)(mem), length)
	return nil
}

// openFault maps as f says and registers the mapping with a new userfaultfd.
func (v *View) openFault(f strategies.Fault, prot int) error {
	page := f.PageSize
	if page < region.PageSize() || page&(page-1) != 0 {
		return fmt.Errorf("page size %d: %w", page, region.ErrOutOfRange)
	}
	var mode, features uint64 = 0, uffd.UFFD_FEATURE_POISON | uffd.UFFD_FEATURE_THREAD_ID
	if f.Missing {
		mode |= uffd.UFFDIO_REGISTER_MODE_MISSING
	}
	if f.Minor {
		mode |= uffd.UFFDIO_REGISTER_MODE_MINOR
	}
	if f.WriteProtect {
		mode |= uffd.UFFDIO_REGISTER_MODE_WP
		features |= uffd.UFFD_FEATURE_PAGEFAULT_FLAG_WP | uffd.UFFD_FEATURE_WP_UNPOPULATED
		if v.file != nil {
			features |= uffd.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
		}
	}
	hugetlb := f.Memory == "huge" && v.file != nil
	switch {
	case f.Memory == "shared" && v.file != nil:
		features |= uffd.UFFD_FEATURE_MISSING_SHMEM
		if f.Minor {
			features |= uffd.UFFD_FEATURE_MINOR_SHMEM
		}
	case hugetlb:
		features |= uffd.UFFD_FEATURE_MISSING_HUGETLBFS
		if f.Minor {
			features |= uffd.UFFD_FEATURE_MINOR_HUGETLBFS
		}
	case f.Memory == "shared":
		return errors.New("shared memory needs the attachment's file")
	case f.Memory != "anonymous" && f.Memory != "huge":
		return fmt.Errorf("fault memory %q; valid: anonymous, shared, huge", f.Memory)
	}

	length := region.RoundUp(v.a.Size, page)
	if v.file != nil {
		if err := v.mmap(int(v.file.Fd()), length, prot, unix.MAP_SHARED); err != nil {
			return err
		}
		// Nothing may be written but through this mapping, which userfaultfd sees:
		// no descriptor is left for pwrite(2) or another mapping.
		err := v.file.Close()
		if v.file = nil; err != nil {
			return err
		}
	} else if err := v.mapAligned(length, page, prot); err != nil {
		return err
	}
	advice := unix.MADV_NOHUGEPAGE
	if f.Memory == "huge" {
		advice = unix.MADV_HUGEPAGE
	}
	if !hugetlb {
		// EINVAL: a kernel without transparent huge pages, which makes none.
		if err := unix.Madvise(v.mem, advice); err != nil && (err != unix.EINVAL || f.Memory == "huge") {
			return os.NewSyscallError("madvise", err)
		}
	}
	// A forked child would see the mapping unregistered, and unfilled pages as
	// zeroes: rather give it no mapping (docs/deadlocks.md, case 4).
	if err := unix.Madvise(v.mem, unix.MADV_DONTFORK); err != nil {
		return os.NewSyscallError("madvise", err)
	}
	u, _, err := uffd.New(features)
	if err != nil {
		return err
	}
	v.uffd = u
	return uffd.Register(u, v.base(), length, mode)
}

// mapAligned maps anonymous memory aligned to align, which may exceed the page size.
func (v *View) mapAligned(length, align int64, prot int) error {
	const flags = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_NORESERVE
	if align == region.PageSize() {
		return v.mmap(-1, length, prot, flags)
	}
	// Find room for length+align, then map over its aligned part.
	room, err := unix.MmapPtr(-1, 0, nil, uintptr(length+align), unix.PROT_NONE, flags)
	if err != nil {
		return os.NewSyscallError("mmap", err)
	}
	skip := uintptr(region.RoundUp(int64(uintptr(room)), align)) - uintptr(room)
	start := unsafe.Add(room, skip)
	if skip > 0 {
		_ = unix.MunmapPtr(room, skip)
	}
	if rest := uintptr(align) - skip; rest > 0 {
		_ = unix.MunmapPtr(unsafe.Add(start, length), rest)
	}
	v.mem = unsafe.Slice((*byte)(start), length)
	return os.NewSyscallError("mprotect", unix.Mprotect(v.mem, prot))
}

func (v *View) base() uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(v.mem))) }

// Fault returns, for AttachFault, the userfaultfd and the mapping's address,
// to be handed to the daemon (FaultServer.ServeFaults) before any access. ok is
// false for other kinds. The View keeps uffd open until Close: while any
// descriptor of it lives, a page that the daemon did not fill is never zeroes.
func (v *View) Fault() (uffd *os.File, base uintptr, ok bool) {
	if v.uffd == nil || v.a.Track != "" {
		return nil, 0, false
	}
	return v.uffd, v.base(), true
}

// Size is the region's size in bytes.
func (v *View) Size() int64 { return v.a.Size }

// Bytes is the mapping, Size() long; nil without one (ViaFile, ViaPath). It is
// valid until Close. Touching it may block in a page fault, for as long as the
// strategy's deadline, and raise SIGBUS where the daemon cannot fill a page,
// which crashes the process unless it happens within Do.
func (v *View) Bytes() []byte {
	if v.mem == nil {
		return nil
	}
	return v.mem[:v.a.Size:v.a.Size]
}

// Do calls f with the mapping. A SIGBUS or SIGSEGV that f runs into on its own
// goroutine ends f and becomes an error that wraps EIO and names the region's offset.
func (v *View) Do(f func(mem []byte)) error {
	v.mu.RLock()
	defer v.mu.RUnlock()
	if v.closed {
		return region.ErrClosed
	}
	if v.mem == nil {
		return fmt.Errorf("access via %s has no mapping: %w", v.via, region.ErrNotSupported)
	}
	return v.guarded(func() { f(v.Bytes()) })
}

func (v *View) guarded(f func()) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		r := recover()
		if r == nil {
			return
		}
		fault, ok := r.(interface {
			error
			Addr() uintptr
		})
		// Only a fault inside the mapping is the server's doing.
		if !ok || fault.Addr() < v.base() || fault.Addr() >= v.base()+uintptr(len(v.mem)) {
			panic(r)
		}
		err = fmt.Errorf("memory fault at offset %d: %w", fault.Addr()-v.base(), unix.EIO)
	}()
	f()
	return nil
}

// ReadAt copies [off, off+len(p)) of the region to p. On an error (EIO where
// the daemon or a device could not deliver) the content of p is unspecified.
func (v *View) ReadAt(p []byte, off int64) error {
	if v.table != nil {
		return v.access("read", p, off, func(mem []byte) { v.versioned(p, mem, off) }, (*os.File).ReadAt)
	}
	return v.access("read", p, off, func(mem []byte) { copy(p, mem) }, (*os.File).ReadAt)
}

// versioned copies chunk by chunk, each of one version.
func (v *View) versioned(p, mem []byte, off int64) {
	chunk := v.a.Versions.Chunk
	for len(p) > 0 {
		n := min(int64(len(p)), chunk-off%chunk)
		word := (*uint64)(unsafe.Pointer(&v.table[8*(off/chunk)]))
		region.ReadVersion(word, p[:n], mem[:n])
		p, mem, off = p[n:], mem[n:], off+n
	}
}

// Armed returns, for an attachment that is tracked, what the source needs to
// watch the mapping. The caller closes the file, the View's own copy included,
// once it was handed over (dirty.Arm); it is nil where the way needs none.
func (v *View) Armed() (f *os.File, base uintptr, length int64, ok bool) {
	if v.a.Track == "" || v.mem == nil {
		return nil, 0, 0, false
	}
	f, v.uffd = v.uffd, nil
	return f, v.base(), int64(len(v.mem)), true
}

// WriteAt copies p to the region at off. A read-only region gives ErrReadOnly.
// Through a mapping, the bytes are at the daemon's device only after Sync.
func (v *View) WriteAt(p []byte, off int64) error {
	if v.a.ReadOnly {
		return fmt.Errorf("write %d bytes at %d: %w", len(p), off, region.ErrReadOnly)
	}
	return v.access("write", p, off, func(mem []byte) { copy(mem, p) }, (*os.File).WriteAt)
}

func (v *View) access(verb string, p []byte, off int64, mapped func(mem []byte), file func(*os.File, []byte, int64) (int, error)) error {
	v.mu.RLock()
	defer v.mu.RUnlock()
	if v.closed {
		return region.ErrClosed
	}
	err := region.CheckRange(off, int64(len(p)), v.a.Size)
	switch {
	case err != nil || len(p) == 0:
	case v.mem != nil:
		err = v.guarded(func() { mapped(v.mem[off : off+int64(len(p))]) })
	case v.via == ViaPath:
		var f *os.File
		if f, err = v.openPath(); err == nil {
			_, err = file(f, p, off)
			if cerr := f.Close(); err == nil {
				err = cerr // FUSE reports write errors on close
			}
		}
	default:
		_, err = file(v.file, p, off)
	}
	if err != nil {
		return fmt.Errorf("%s %d bytes at %d: %w", verb, len(p), off, err)
	}
	return nil
}

// Sync makes all earlier writes reach the device: msync(MS_SYNC) of a shared
// mapping, then fsync. It does nothing for private memory or read-only regions.
func (v *View) Sync() error {
	v.mu.RLock()
	defer v.mu.RUnlock()
	if v.closed {
		return region.ErrClosed
	}
	if v.a.ReadOnly || v.a.Kind == strategies.AttachAnonymous || v.a.Kind == strategies.AttachFault {
		return nil
	}
	if v.mem != nil {
		if err := unix.Msync(v.mem, unix.MS_SYNC); err != nil {
			return fmt.Errorf("msync %d bytes: %w", len(v.mem), err)
		}
	}
	if len(v.parts) > 0 {
		for _, f := range v.parts {
			if err := f.Sync(); err != nil {
				return fmt.Errorf("fsync: %w", err)
			}
		}
		return v.syncFileSystem()
	}
	f := v.file
	if f == nil {
		var err error
		if f, err = v.openPath(); err != nil {
			return err
		}
		defer f.Close()
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("fsync: %w", err)
	}
	return nil
}

// Close unmaps and closes. It waits for calls in flight, may be called twice,
// and does not Sync. The slice from Bytes must not be used afterwards.
func (v *View) Close() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.closed {
		return nil
	}
	v.closed = true
	var errs []error
	if v.mem != nil { // first: then no page can be faulted in as zeroes
		errs = append(errs, os.NewSyscallError("munmap", unix.MunmapPtr(unsafe.Pointer(unsafe.SliceData(v.mem)), uintptr(len(v.mem)))))
		v.mem = nil
	}
	if v.table != nil {
		errs = append(errs, os.NewSyscallError("munmap", unix.Munmap(v.table)))
		v.table = nil
	}
	for _, f := range append(v.parts, v.uffd, v.file) {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	errs = append(errs, v.unmount())
	return errors.Join(errs...)
}
