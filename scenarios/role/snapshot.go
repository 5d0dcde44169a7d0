package role

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"memsync/strategies"
	"memsync/strategies/region"
	"memsync/strategies/snapshot/client"
)

// SnapWork says what the writer of op snapshot does: pages in an order that meets
// each once before any twice, each with the content of the round, Publish of them to a
// publication.
type SnapWork struct {
	Size    int64          `json:"size"`
	Content region.Content `json:"content"`
	Publish int64          `json:"publish"`
	Rate    int64          `json:"rate"` // B/s; 0 is as fast as it can
	Mode    string         `json:"mode"`
	Huge    bool           `json:"huge"` // the region is of huge pages
}

// order returns the writer's pages.
func (k SnapWork) order() (s *sequence, pages int64) {
	pages = region.Chunks(k.Size, page)
	return newSequence("random", 0, pages, k.Content.Seed), pages
}

// at is write i: its page, and the content that it gives it.
func (k SnapWork) at(s *sequence, pages, i int64) (off, n int64, c region.Content) {
	off = s.permute(i%pages) * page
	return off, min(page, k.Size-off), region.Content{Seed: k.Content.Seed, Generation: k.Content.Generation + 1 + uint64(i/pages)}
}

// snapWriter is the workload as a client.
type snapWriter struct {
	work   SnapWork
	region *client.Region
	done   int64     // writes
	plain  []float64 // seconds that writes took before
}

// client opens the region as a client does, after measuring what writing costs to
// memory that nobody tracks: the region's own, given the content that it has.
func (w *workload) client(_ context.Context, body json.RawMessage, files []*os.File) (_ any, _ []*os.File, err error) {
	var a struct {
		Work       SnapWork              `json:"work"`
		Attachment strategies.Attachment `json:"attachment"`
		Baseline   time.Duration         `json:"baseline"`
	}
	defer func() {
		for _, f := range files {
			if f != nil {
				f.Close()
			}
		}
	}()
	if err := json.Unmarshal(body, &a); err != nil || len(files) != len(a.Attachment.Client) {
		return nil, nil, errors.Join(err, fmt.Errorf("client: %d descriptors for %v", len(files), a.Attachment.Client))
	}
	w.snap = snapWriter{work: a.Work}
	runtime.GOMAXPROCS(3)  // a thread that waits at a page holds its P
	debug.SetGCPercent(-1) // and a collection would wait for it
	if err := w.snap.baseline(files[0], a.Baseline); err != nil {
		return nil, nil, err
	}
	var f client.Files
	for i, to := range []**os.File{&f.Region, &f.Control, &f.Status, &f.Socket} {
		if i < len(files) {
			*to, files[i] = files[i], nil
		}
	}
	if w.snap.region, err = client.Attach(f); err != nil {
		return nil, nil, err
	}
	if r := w.snap.region; r.Size() != a.Work.Size {
		return nil, nil, fmt.Errorf("region of %d bytes, not %d: %w", r.Size(), a.Work.Size, region.ErrMismatch)
	}
	return none{}, nil, nil
}

// baseline writes what is there already, at the rate of the run.
func (s *snapWriter) baseline(f *os.File, limit time.Duration) error {
	k := s.work
	length := region.RoundUp(k.Size, page)
	if k.Huge {
		length = region.RoundUp(k.Size, 2<<20)
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, int(length), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return fmt.Errorf("map the region for the baseline: %w", err)
	}
	seq, pages := k.order()
	p := newPace(k.Rate)
	for i := int64(0); p.since() < limit; i++ {
		off, n, _ := k.at(seq, pages, i)
		p.wait(i)
		t := monotonic()
		k.Content.Fill(mem[off:off+n], off)
		s.plain = append(s.plain, seconds(monotonic()-t))
	}
	return os.NewSyscallError("munmap", unix.Munmap(mem))
}

func seconds(ns int64) float64 { return float64(ns) / 1e9 }

// pace says when write i is due, whether or not those before are done.
type pace struct {
	began time.Time
	each  float64 // ns
}

func newPace(rate int64) pace {
	p := pace{began: time.Now()}
	if rate > 0 {
		p.each = page * 1e9 / float64(rate)
	}
	return p
}

func (p pace) since() time.Duration { return time.Since(p.began) }

func (p pace) wait(i int64) {
	for d := time.Duration(float64(i)*p.each) - p.since(); d > 0; d = time.Duration(float64(i)*p.each) - p.since() {
		if d > 200*time.Microsecond {
			time.Sleep(d - 100*time.Microsecond)
		} else {
			runtime.Gosched()
		}
	}
}

// WriteArgs says for how long.
type WriteArgs struct {
	For time.Duration `json:"for"`
}

// Wrote is what the writer did. Long are its longest writes, with the publication
// that was part of them, if one was.
type Wrote struct {
	Writes       int64   `json:"writes"`
	Publications uint64  `json:"publications"`
	Bytes        int64   `json:"bytes"`
	Begin        int64   `json:"begin"` // CLOCK_MONOTONIC, ns
	End          int64   `json:"end"`
	Mean         float64 `json:"mean"`  // s, of a write
	Plain        float64 `json:"plain"` // s, the same before anything was tracked
	Long         []Wait  `json:"long"`
}

// Wait is a write that took long.
type Wait struct {
	At   int64 `json:"at"` // CLOCK_MONOTONIC, ns
	Took int64 `json:"took"`
}

const (
	longWrite = 20 * time.Microsecond
	maxLong   = 1 << 16 // of which the longest are kept
)

// write writes and publishes.
func (w *workload) write(ctx context.Context, a WriteArgs) (o Wrote, err error) {
	s := &w.snap
	k := s.work
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	seq, pages := k.order()
	buf := make([]byte, page)
	sum := 0.0
	o.Begin = monotonic()
	p := newPace(k.Rate)
	for i := int64(0); (p.since() < a.For || s.done%k.Publish != 0) && ctx.Err() == nil; i++ {
		p.wait(i)
		off, n, c := k.at(seq, pages, s.done)
		t := monotonic()
		if k.Mode == "cow" {
			c.Fill(s.region.Mem()[off:off+n], off)
		} else {
			c.Fill(buf[:n], off)
			err = s.region.Write(buf[:n], off)
		}
		if s.done++; err == nil && s.done%k.Publish == 0 {
			if k.Mode == "cow" {
				o.Publications, err = s.region.Note(nil)
			} else {
				o.Publications, err = s.region.Publish(nil)
			}
		}
		if err != nil {
			return o, err
		}
		took := monotonic() - t
		sum += seconds(took)
		o.Writes++
		o.Bytes += n
		if took > int64(longWrite) {
			if o.Long = append(o.Long, Wait{t, took}); len(o.Long) == 2*maxLong {
				o.Long = longest(o.Long)
			}
		}
	}
	o.End = monotonic()
	o.Long = longest(o.Long)
	o.Mean = sum / float64(max(o.Writes, 1))
	for _, x := range s.plain {
		o.Plain += x / float64(len(s.plain))
	}
	return o, ctx.Err()
}

func longest(l []Wait) []Wait {
	slices.SortFunc(l, func(a, b Wait) int { return int(min(max(b.Took-a.Took, -1), 1)) })
	return l[:min(len(l), maxLong)]
}

// ImagesArgs says how many, and how far apart.
type ImagesArgs struct {
	Images   int           `json:"images"`
	Interval time.Duration `json:"interval"`
}

// Taken is an image, and when it was taken.
type Taken struct {
	strategies.Snapshot
	Begin int64 `json:"begin"` // CLOCK_MONOTONIC, ns
	End   int64 `json:"end"`
}

func (d *daemon) images(ctx context.Context, a ImagesArgs) (out []Taken, err error) {
	s, ok := d.mount.(strategies.Snapshotter)
	if !ok {
		return nil, fmt.Errorf("this mount takes no images: %w", region.ErrNotSupported)
	}
	for range a.Images {
		t := Taken{Begin: monotonic()}
		t.Snapshot, err = s.Snapshot(ctx)
		if t.End = monotonic(); err != nil {
			return nil, err
		}
		out = append(out, t)
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(a.Interval - time.Duration(t.End-t.Begin)):
		}
	}
	return out, nil
}

// ImageChecked says what the image has.
type ImageChecked struct {
	Bytes    int64  `json:"bytes"`
	Sequence uint64 `json:"sequence"`
}

// verifyImage compares every byte of the last image with the writer's state after the
// publication that the image says it has. In mode cow the next publication may have begun: whole
// writes of it, in order, and then part of one.
func (d *daemon) verifyImage(ctx context.Context, k SnapWork) (v ImageChecked, err error) {
	s, ok := d.mount.(strategies.Snapshotter)
	if !ok {
		return v, fmt.Errorf("this mount takes no images: %w", region.ErrNotSupported)
	}
	got, err := anonymous(k.Size, 0)
	if err != nil {
		return v, err
	}
	defer unix.Munmap(got[:cap(got)])
	last, err := s.Restore(ctx, func(p []byte, off int64) error { copy(got[off:], p); return nil })
	if err != nil {
		return v, err
	}
	if !last.Fresh {
		return v, fmt.Errorf("there is no image: %w", region.ErrMissing)
	}
	v.Sequence = last.Sequence
	return v, k.verify(ctx, got, last.Sequence, &v.Bytes)
}

func (k SnapWork) verify(ctx context.Context, got []byte, sequence uint64, checked *int64) error {
	seq, pages := k.order()
	writes := int64(sequence) * k.Publish
	want, next := make([]byte, page), make([]byte, page)
	began := true // as far as we have seen, the writes of the next publication had been made
	for j := range pages {
		// From the page that is next to be written on, the writes of the next publication
		// come first, then those that were made longest ago.
		i := writes + j
		off, n, c := k.at(seq, pages, i)
		c.Fill(next[:n], off)
		if before := i - pages; before >= 0 {
			_, _, c = k.at(seq, pages, before)
		} else {
			c = k.Content
		}
		c.Fill(want[:n], off)
		p := got[off : off+n]
		*checked += n
		if k.Mode == "cow" && j < k.Publish && began {
			began = string(p) == string(next[:n])
			if began || mixed(p, want[:n], next[:n]) {
				continue
			}
		}
		if string(p) != string(want[:n]) {
			return fmt.Errorf("image of publication %d: page at %d: %w", sequence, off, errors.Join(c.Check(p, off), region.ErrMismatch))
		}
		if j%4096 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return nil
}

// mixed reports whether each word of p is the old one or the new one.
func mixed(p, was, is []byte) bool {
	for i := 0; i < len(p); i += 8 {
		w := p[i:min(i+8, len(p))]
		if string(w) != string(was[i:i+len(w)]) && string(w) != string(is[i:i+len(w)]) {
			return false
		}
	}
	return true
}

// ForkArgs says of how much memory.
type ForkArgs struct {
	Size int64 `json:"size"`
	Huge bool  `json:"huge"` // in transparent huge pages
}

// Forked is the yardstick floor_fork, s.
type Forked struct {
	Fork float64 `json:"fork"`
}

// fork measures how long fork(2) stops this process: what a snapshot by a forked
// child costs that has private memory of the region's size.
func (w *workload) fork(_ context.Context, a ForkArgs) (f Forked, err error) {
	const huge = 2 << 20
	room, err := unix.Mmap(-1, 0, int(region.RoundUp(a.Size, huge)+huge), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return f, fmt.Errorf("fork: map %d bytes: %w", a.Size, err)
	}
	defer unix.Munmap(room)
	base := int64(uintptr(unsafe.Pointer(unsafe.SliceData(room))))
	mem := room[region.RoundUp(base, huge)-base:][:region.RoundUp(a.Size, huge)]
	advice := unix.MADV_NOHUGEPAGE
	if a.Huge {
		advice = unix.MADV_HUGEPAGE
	}
	if err := unix.Madvise(mem, advice); err != nil && (err != unix.EINVAL || a.Huge) { // EINVAL: a kernel without huge pages
		return f, os.NewSyscallError("madvise", err)
	}
	if err := unix.Madvise(mem, unix.MADV_POPULATE_WRITE); err != nil {
		return f, fmt.Errorf("fork: populate %d bytes: %w", len(mem), err)
	}
	var took []float64
	for range 5 {
		t, err := forkOnce()
		if err != nil {
			return f, err
		}
		took = append(took, seconds(t))
	}
	slices.Sort(took)
	f.Fork = took[len(took)/2]
	return f, nil
}

// forkOnce forks a child that ends at once, by raw system calls alone: nothing of
// the Go runtime runs in it but this function, with all signals blocked.
func forkOnce() (ns int64, err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var old, all unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^uint64(0)
	}
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, &old); err != nil {
		return 0, os.NewSyscallError("rt_sigprocmask", err)
	}
	begin := monotonic()
	pid, _, e := syscall.RawSyscall6(syscall.SYS_CLONE, uintptr(syscall.SIGCHLD), 0, 0, 0, 0, 0)
	if e == 0 && pid == 0 {
		for {
			_, _, _ = syscall.RawSyscall(syscall.SYS_EXIT_GROUP, 0, 0, 0)
		}
	}
	ns = monotonic() - begin
	err = unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil)
	if e != 0 {
		return 0, os.NewSyscallError("clone", e)
	}
	_, werr := waitFor(int(pid))
	return ns, errors.Join(err, werr)
}

func waitFor(pid int) (status unix.WaitStatus, err error) {
	for {
		if _, err = unix.Wait4(pid, &status, 0, nil); err != unix.EINTR {
			return status, os.NewSyscallError("wait4", err)
		}
	}
}
