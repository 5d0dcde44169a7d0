// Package dirty finds out which parts of a mapped file were written since one
// looked last. Each way is a Method, and says which kinds of writes it sees: one
// that would miss a kind that is to be expected is refused, not used in hope.
//
// All ways but "hash" answer with a superset of what was written, never less:
// a write that returned before Collect was called is reported by that call or by
// an earlier one; one that races it is reported by that call or by the next one.
// So: Collect first, then read the bytes.
package dirty

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// Kind is a way in which a file can be written.
type Kind string

// The kinds.
const (
	Store        Kind = "store"         // a store through the mapping that was armed
	OtherMapping Kind = "other-mapping" // through a second mapping of the same process
	OtherProcess Kind = "other-process" // through a mapping of another process
	Pwrite       Kind = "pwrite"        // pwrite(2) and the like
)

// Method is a way of finding out.
type Method struct {
	Name string
	Doc  string // one line
	Sees []Kind // kinds of writes that it reports; those left out it misses
	// Unit is what it reports at least: "page", or "region" for all or nothing.
	Unit string
	// Arms: the writer must call Arm in its own process and hand over a Writer.
	Arms bool
	// Probe tries whether it works here: nil, region.ErrNotSupported or "could not tell".
	Probe func() error
	open  func(Region) (Detector, error)
}

// Region is the file to watch.
type Region struct {
	File *os.File // open for reading
	Mem  []byte   // a mapping of it in this process, MAP_SHARED; Size bytes
	Unit int64    // bytes that "uffd-wp" makes writable at once; a power of two, at least a page
}

// Writer is an armed mapping, in any process.
type Writer struct {
	PID    int     // as this process sees it
	Base   uintptr // of the mapping in that process
	Length int64   // bytes, whole pages
	// Uffd is the userfaultfd that Arm returned; nil where it returned none. The
	// Detector takes it over.
	Uffd *os.File
}

// Detector watches one file. Add may be called at any time; Collect is not
// called concurrently with itself.
type Detector interface {
	// Add registers a writer's mapping. All of it counts as written once.
	Add(w Writer) error
	// Collect calls found for ranges that may have been written since the last
	// call, ascending, without overlap, within the region. It blocks for the time
	// of its system calls (msync: for the disk).
	Collect(ctx context.Context, found func(off, n int64)) error
	// Close ends the watch; a writer that waits in a fault goes on.
	Close() error
}

// Flusher is what a Detector may also be: one that writes the region back before it looks.
type Flusher interface {
	// Flushing is how long that took in the last Collect.
	Flushing() time.Duration
}

// Methods lists all ways.
func Methods() []Method {
	armed := []Kind{Store}
	return []Method{
		{Name: "hash", Doc: "everything is hashed each round", Unit: "region", Sees: []Kind{Store, OtherMapping, OtherProcess, Pwrite},
			Probe: func() error { return nil }, open: func(r Region) (Detector, error) { return &whole{size: int64(len(r.Mem))}, nil }},
		{Name: "mtime", Doc: "stat, msync, and hash everything where the modification time moved", Unit: "region", Sees: []Kind{Store, OtherMapping, OtherProcess, Pwrite},
			Probe: func() error { return nil }, open: openMtime},
		{Name: "inotify", Doc: "the negative control: events of pwrite, none of a mapped store", Unit: "region", Sees: []Kind{Pwrite},
			Probe: func() error { return nil }, open: openInotify},
		{Name: "soft-dirty", Doc: "/proc/PID/clear_refs and bit 55 of pagemap; stops the writer while it looks", Unit: "page", Sees: armed, Arms: true,
			Probe: probeSoftDirty, open: openSoftDirty},
		{Name: "pagemap", Doc: "PAGEMAP_SCAN over asynchronous write protection (userfaultfd WP_ASYNC)", Unit: "page", Sees: armed, Arms: true,
			Probe: probePagemap, open: openPagemap},
		{Name: "uffd-wp", Doc: "an event of userfaultfd for the first write to each unit", Unit: "page", Sees: armed, Arms: true,
			Probe: probeUffdWP, open: openUffdWP},
	}
}

// Names lists the methods.
func Names() []string {
	var names []string
	for _, m := range Methods() {
		names = append(names, m.Name)
	}
	return names
}

// ByName returns a method, or an error that lists the valid names.
func ByName(name string) (Method, error) {
	for _, m := range Methods() {
		if m.Name == name {
			return m, nil
		}
	}
	return Method{}, fmt.Errorf("unknown way of finding dirty pages %q; valid: %s", name, strings.Join(Names(), ", "))
}

// Check refuses a method that would miss one of the kinds of writes that are to
// be expected: region.ErrNotSupported, with what it would miss.
func (m Method) Check(writes ...Kind) error {
	for _, k := range writes {
		if !slices.Contains(m.Sees, k) {
			return fmt.Errorf("dirty=%s does not see a write by %s: %w", m.Name, k, region.ErrNotSupported)
		}
	}
	return nil
}

// Open begins to watch r, of which everything counts as written once. Methods
// that see stores of an armed mapping only want a memfd, which is sealed against
// new writable mappings, pwrite, and a change of size (F_SEAL_FUTURE_WRITE, Linux
// 5.1) when the first writer is added: what they would miss cannot happen then.
// Errors: region.ErrNotSupported where the method, the kernel or the file system
// would miss writes.
func (m Method) Open(r Region) (Detector, error) {
	if len(r.Mem) == 0 {
		return nil, fmt.Errorf("dirty=%s: an empty region: %w", m.Name, region.ErrOutOfRange)
	}
	if err := m.Probe(); err != nil {
		return nil, fmt.Errorf("dirty=%s: %w", m.Name, err)
	}
	if m.Arms {
		if _, err := seals(r.File); err != nil {
			return nil, fmt.Errorf("dirty=%s wants a memfd: another process could open the file and write unseen: %w: %w", m.Name, err, region.ErrNotSupported)
		}
	}
	d, err := m.open(r)
	if err != nil {
		return nil, fmt.Errorf("dirty=%s: %w", m.Name, err)
	}
	return d, nil
}

func seals(f *os.File) (int, error) {
	s, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	if err != nil {
		return 0, os.NewSyscallError("F_GET_SEALS", err)
	}
	return s, nil
}

// seal refuses what an armed mapping does not show.
func seal(f *os.File) error {
	_, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_FUTURE_WRITE|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW)
	if err != nil {
		return fmt.Errorf("seal the region's memfd (was it made with MFD_ALLOW_SEALING?): %w", err)
	}
	return nil
}

// whole is "hash": everything may have been written.
type whole struct{ size int64 }

func (w *whole) Add(Writer) error { return nil }

func (w *whole) Collect(_ context.Context, found func(off, n int64)) error {
	found(0, w.size)
	return nil
}

func (w *whole) Close() error { return nil }

// pages is what the armed methods share: their writers, and pages to be
// reported by the next Collect whatever the kernel says.
type pages struct {
	r       Region
	writers []Writer
	all     bool // report everything once
}

func newPages(r Region) pages { return pages{r: r, all: true} }

// add checks and keeps a writer.
func (p *pages) add(w Writer) error {
	if w.PID <= 0 || w.Base == 0 || w.Length < int64(len(p.r.Mem)) || w.Length%region.PageSize() != 0 {
		return fmt.Errorf("writer's mapping of %d bytes at %#x in process %d: %w", w.Length, w.Base, w.PID, region.ErrOutOfRange)
	}
	if err := seal(p.r.File); err != nil {
		return err
	}
	p.writers = append(p.writers, w)
	p.all = true
	return nil
}

// everything reports all of the region once after a writer was added.
func (p *pages) everything(found func(off, n int64)) bool {
	if !p.all {
		return false
	}
	p.all = false
	found(0, int64(len(p.r.Mem)))
	return true
}

// merge sorts the ranges of several writers, joins them and cuts them at the region's end.
func merge(ranges [][2]int64, size int64, found func(off, n int64)) {
	slices.SortFunc(ranges, func(a, b [2]int64) int { return int(min(max(a[0]-b[0], -1), 1)) })
	for i := 0; i < len(ranges); {
		lo, hi := ranges[i][0], ranges[i][1]
		for i++; i < len(ranges) && ranges[i][0] <= hi; i++ {
			hi = max(hi, ranges[i][1])
		}
		if hi = min(hi, size); lo < hi {
			found(lo, hi-lo)
		}
	}
}

func closeUffds(ws []Writer) (err error) {
	for _, w := range ws {
		if w.Uffd != nil {
			err = errors.Join(err, w.Uffd.Close())
		}
	}
	return err
}
