package dirty

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// softDirty reads bit 55 of each page's entry in /proc/PID/pagemap and clears
// all of them through /proc/PID/clear_refs. A store between the two would be
// lost, so the writer is stopped meanwhile (SIGSTOP).
// Source: Documentation/admin-guide/mm/soft-dirty.rst. Linux 3.11, CONFIG_MEM_SOFT_DIRTY.
type softDirty struct{ pages }

const softDirtyBit = 1 << 55

func probeSoftDirty() error {
	p, err := unix.Mmap(-1, 0, int(region.PageSize()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("map a page: %w", err)
	}
	defer func() { _ = unix.Munmap(p) }()
	p[0] = 1
	base := addressOf(p)
	found := false
	err = readPagemap("/proc/self/pagemap", base, region.PageSize(), func(int64, int64) { found = true })
	if err == nil && !found {
		err = fmt.Errorf("a page that was just written has no soft-dirty bit (CONFIG_MEM_SOFT_DIRTY is off): %w", region.ErrNotSupported)
	}
	return err
}

func openSoftDirty(r Region) (Detector, error) { return &softDirty{newPages(r)}, nil }

func (d *softDirty) Add(w Writer) error { return d.add(w) }

func (d *softDirty) Close() error { return closeUffds(d.writers) }

func (d *softDirty) Collect(ctx context.Context, found func(off, n int64)) error {
	var ranges [][2]int64
	for _, w := range d.writers {
		if err := d.look(ctx, w, func(lo, hi int64) { ranges = append(ranges, [2]int64{lo, hi}) }); err != nil {
			return err
		}
	}
	if !d.everything(found) {
		merge(ranges, int64(len(d.r.Mem)), found)
	}
	return nil
}

func (d *softDirty) look(ctx context.Context, w Writer, found func(lo, hi int64)) (err error) {
	if err := unix.Kill(w.PID, unix.SIGSTOP); err != nil {
		return fmt.Errorf("stop the writer: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Kill(w.PID, unix.SIGCONT)) }()
	for { // all its threads have stopped once its state says so
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", w.PID))
		if err != nil {
			return err
		}
		if i := bytes.LastIndexByte(b, ')'); i >= 0 && len(b) > i+2 && b[i+2] == 'T' {
			break
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Microsecond):
		}
	}
	if err := readPagemap(fmt.Sprintf("/proc/%d/pagemap", w.PID), w.Base, w.Length, found); err != nil {
		return err
	}
	return os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", w.PID), []byte("4"), 0)
}

// readPagemap calls found for the runs of pages with the soft-dirty bit.
func readPagemap(path string, base uintptr, length int64, found func(lo, hi int64)) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	page := region.PageSize()
	buf := make([]byte, 8*min(length/page, 1<<16))
	for off := int64(0); off < length; {
		b := buf[:min(int64(len(buf)), 8*((length-off)/page))]
		if _, err := f.ReadAt(b, (int64(base)+off)/page*8); err != nil {
			return fmt.Errorf("read %s: %w", path, err)
		}
		softDirtyRuns(b, func(lo, hi int64) { found(off+lo*page, off+hi*page) })
		off += int64(len(b)) / 8 * page
	}
	return nil
}

// softDirtyRuns calls found for the runs [lo, hi) of page map entries with the bit.
func softDirtyRuns(entries []byte, found func(lo, hi int64)) {
	n := int64(len(entries) / 8)
	for i := int64(0); i < n; i++ {
		lo := i
		for i < n && binary.LittleEndian.Uint64(entries[8*i:])&softDirtyBit != 0 {
			i++
		}
		if i > lo {
			found(lo, i)
		}
	}
}
