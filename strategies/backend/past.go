package backend

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// past notices when a regular file is changed past the store that has it open, by
// what stat(2) says of it: device, inode, size, modification and change times. The
// store's own writes change these too, so they are looked at before the first of
// the writes under way and after the last.
//
// Not seen: what another program writes while a write of the store is under way;
// stores through a mapping, on tmpfs at all, and elsewhere but for the first to a
// page since it was written back; on kernels before 6.13 (multigrain timestamps), a
// change within the same tick (1 to 10 ms) as one that was seen; changes of a block device.
type past struct {
	mu      sync.Mutex
	writing int    // writes of the store under way
	seen    uint64 // the file's stamp; 0 is unknown
	changes uint64
}

// stamp sums stat(2) up; 0 where the file is none that has such times.
func stamp(f *os.File) (sum uint64, changed time.Time, err error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return 0, changed, err
	}
	var st unix.Stat_t
	var serr error
	if err := rc.Control(func(fd uintptr) { serr = unix.Fstat(int(fd), &st) }); err != nil {
		return 0, changed, err
	}
	if serr != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return 0, changed, serr
	}
	h := fnv.New64a()
	for _, v := range []int64{int64(st.Dev), int64(st.Ino), st.Size, st.Mtim.Nano(), st.Ctim.Nano()} {
		_, _ = h.Write(binary.LittleEndian.AppendUint64(nil, uint64(v))) // never fails
	}
	return max(1, h.Sum64()), time.Unix(0, st.Ctim.Nano()), nil
}

func (p *past) begin(f *os.File) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.seen, _, _ = stamp(f)
}

// look compares the file with what was seen, under mu.
func (p *past) look(f *os.File) (changed time.Time, err error) {
	now, changed, err := stamp(f)
	if err == nil && now != p.seen {
		p.changes++
		p.seen = now
	}
	return changed, err
}

// write says that the store begins to write, and returns what to call when it has.
func (p *past) write(f *os.File) (end func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.seen == 0 {
		return func() {}
	}
	if p.writing == 0 {
		_, _ = p.look(f) // an error is the write's to meet
	}
	p.writing++
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.writing--; p.writing == 0 {
			if now, _, err := stamp(f); err == nil {
				p.seen = now
			}
		}
	}
}

func (p *past) version(f *os.File) (region.Version, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.seen == 0 {
		return region.Version{}, fmt.Errorf("version of %s, which is no regular file: %w", f.Name(), region.ErrNotSupported)
	}
	if p.writing > 0 {
		return region.Version{Changes: p.changes}, nil
	}
	changed, err := p.look(f)
	if err != nil {
		return region.Version{}, fmt.Errorf("version of %s: %w", f.Name(), err)
	}
	return region.Version{Changes: p.changes, State: p.seen, Age: max(0, time.Since(changed))}, nil
}
