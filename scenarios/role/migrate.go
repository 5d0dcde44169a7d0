package role

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies"
	"memsync/strategies/region"
)

// AppWork says what the application does whose region migrates: numbered
// writes, the number of the last of which stands in the region's first 8 bytes.
// Where write i goes and what it writes follow from i alone, so that whoever knows the number
// of the last knows every byte.
type AppWork struct {
	Size    int64          `json:"size"`
	Content region.Content `json:"content"`
	Input   string         `json:"input,omitempty"`
	Rate    int64          `json:"rate"`   // bytes a second; 0 writes once where it starts at a destination
	Writer  string         `json:"writer"` // random, zipf, burst, log, kv or todo
}

// record is how many bytes one write has.
func (k AppWork) record() int64 {
	switch k.Writer {
	case "kv", "todo":
		return 512
	}
	return page
}

// places is how many records the region has behind its first page.
func (k AppWork) places() int64 { return max(k.Size-page, 0) / k.record() }

// sequence gives the place of one write after the other, without end.
func (k AppWork) sequence() func() int64 {
	access := map[string]string{"random": "random", "burst": "random", "log": "seq", "zipf": "zipf", "kv": "zipf", "todo": "zipf"}[k.Writer]
	n, s := k.places(), (*sequence)(nil)
	return func() int64 {
		for {
			if s == nil {
				s = newSequence(access, 0, n, k.Content.Seed)
			}
			if p, ok := s.next(); ok {
				return p
			}
			if s.i = 0; s.zipf == nil { // the same order again; a zipf goes on drawing
				s = nil
			}
		}
	}
}

// fill makes what write i writes at a place.
func (k AppWork) fill(p []byte, i uint64, off int64) {
	if k.Writer == "todo" {
		done := " x"[i%2]
		copy(p, fmt.Sprintf("[%c] item %d, changed by change %d", done, off/int64(len(p)), i)+strings.Repeat(" ", len(p)))
		p[len(p)-1] = '\n'
		return
	}
	region.Content{Seed: ^k.Content.Seed, Generation: i}.Fill(p, off)
}

// due is how many writes should have been made after so long.
func (k AppWork) due(d time.Duration) int64 {
	perSecond := float64(k.Rate) / float64(k.record())
	if k.Writer != "burst" {
		return int64(d.Seconds() * perSecond)
	}
	whole := d.Truncate(time.Second)
	return int64(perSecond * (whole.Seconds() + min(float64(d-whole)/float64(burstTime), 1)))
}

// burstTime is the part of each second in which the writer of bursts writes.
const burstTime = time.Second / 5

// quiet says whether, so long after its start, the application has a while in which it does not
// write: it announces that in the first half of the pause between two bursts.
func (k AppWork) quiet(d time.Duration) bool {
	in := d % time.Second
	return k.Writer == "burst" && in > burstTime+maxLag && in < (burstTime+time.Second)/2
}

// appBin is the unit of time in which writes are counted.
const appBin = 10 * time.Millisecond

const (
	// maxLag is what the application tries to make up for after it was held up.
	maxLag = 20 * time.Millisecond
	// localWrite is above what a write takes to memory that is here, a minor fault included.
	localWrite = 100 * time.Microsecond
)

// AppReport is what an application did since it was started or resumed here.
type AppReport struct {
	Seq     uint64  `json:"seq"`     // number of the last write, by whomever
	Writes  int64   `json:"writes"`  // made here
	Due     int64   `json:"due"`     // that should have been made here
	Began   int64   `json:"began"`   // CLOCK_MONOTONIC, ns
	First   int64   `json:"first"`   // the first write here returned; 0 is none
	Last    int64   `json:"last"`    // the last
	Wait    int64   `json:"wait"`    // ns in writes that took longer than to local memory, but for the first
	MaxWait int64   `json:"maxWait"` // the longest of them
	Bins    []int32 `json:"bins"`    // writes in each 10 ms from Began on
	Err     string  `json:"err,omitempty"`
}

// app is the application.
type app struct {
	work AppWork
	view interface {
		ReadAt([]byte, int64) error
		WriteAt([]byte, int64) error
		Sync() error
	}

	throttle atomic.Int64 // most bytes to write in a second; 0 is no limit

	mu      sync.Mutex
	stop    context.CancelFunc // of the loop; nil where it does not run
	stopped chan struct{}      // closed when the loop has ended
	report  AppReport
}

// appOps are the workload's operations of op migrate.
func (w *workload) appOps() map[string]handler {
	return map[string]handler{
		"app": on(w.newApp), "app-hooks": w.appHooks,
		"app-start":   on(func(context.Context, none) (none, error) { return none{}, w.app.start(false) }),
		"app-resume":  on(func(context.Context, none) (none, error) { return none{}, w.app.start(true) }),
		"app-suspend": on(func(ctx context.Context, _ none) (AppReport, error) { return w.app.suspend(ctx) }),
		"app-flush":   on(func(context.Context, none) (none, error) { return none{}, w.view.Sync() }),
		"app-equal":   on(w.appEqual),
	}
}

func (w *workload) newApp(_ context.Context, k AppWork) (none, error) {
	if k.places() < 1 {
		return none{}, fmt.Errorf("a region of %d bytes: the application needs two pages: %w", k.Size, region.ErrOutOfRange)
	}
	runtime.GOMAXPROCS(3)  // a thread that waits for a page holds its P
	debug.SetGCPercent(-1) // and the collector must not wait for it
	w.work.Via = "map"
	w.app = &app{work: k}
	return none{}, nil
}

// quietArgs says how long to wait for a quiet point, ns.
type quietArgs struct {
	Within time.Duration `json:"within"`
}

// throttleArgs is the most that the application may write in a second, bytes; 0 is no limit.
type throttleArgs struct {
	Rate int64 `json:"rate"`
}

// quiet waits for a quiet point.
func (a *app) quiet(ctx context.Context, q quietArgs) (quiet bool, err error) {
	for until := time.Now().Add(q.Within); ; {
		a.mu.Lock()
		runs, began := a.stop != nil, a.report.Began
		a.mu.Unlock()
		if !runs || a.work.quiet(time.Duration(monotonic()-began)) {
			return true, nil
		}
		if time.Now().After(until) {
			return false, nil
		}
		if err := ctx.Err(); err != nil {
			return false, err
		}
		time.Sleep(time.Millisecond)
	}
}

// appHooks gives a socket to control the application: suspend, flush, resume, quiet, throttle, each once at a time.
func (w *workload) appHooks(_ context.Context, _ json.RawMessage, files []*os.File) (any, []*os.File, error) {
	closeAll(files)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	mine, theirs := os.NewFile(uintptr(pair[0]), "hooks"), os.NewFile(uintptr(pair[1]), "hooks")
	c, err := newConn(mine, "controller")
	if err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	ops := map[string]handler{
		"suspend": on(func(ctx context.Context, _ none) (none, error) { _, err := w.app.suspend(ctx); return none{}, err }),
		"flush":   on(func(context.Context, none) (none, error) { return none{}, w.view.Sync() }),
		"resume":  on(func(context.Context, none) (none, error) { return none{}, w.app.start(true) }),
		"quiet":   on(func(ctx context.Context, q quietArgs) (bool, error) { return w.app.quiet(ctx, q) }),
		"throttle": on(func(_ context.Context, t throttleArgs) (none, error) {
			w.app.throttle.Store(t.Rate)
			return none{}, nil
		}),
	}
	go func() { _ = c.serve(ops) }() // ends with this process or its other end
	w.passed = theirs
	return none{}, []*os.File{theirs}, nil
}

// hooksOver makes hooks of the other end of such a socket, which it takes over.
func hooksOver(f *os.File) (strategies.Hooks, *Conn, error) {
	c, err := newConn(f, "application")
	if err != nil {
		return strategies.Hooks{}, nil, err
	}
	var mu sync.Mutex
	ask := func(ctx context.Context, op string, body, reply any) error {
		mu.Lock()
		defer mu.Unlock()
		_, err := c.Call(ctx, op, body, reply)
		return err
	}
	call := func(op string) func(context.Context) error {
		return func(ctx context.Context) error { return ask(ctx, op, none{}, nil) }
	}
	return strategies.Hooks{Suspend: call("suspend"), Flush: call("flush"), Resume: call("resume"),
		Quiet: func(ctx context.Context, within time.Duration) (quiet bool, err error) {
			err = ask(ctx, "quiet", quietArgs{within}, &quiet)
			return quiet, err
		},
		Throttle: func(ctx context.Context, rate int64) error { return ask(ctx, "throttle", throttleArgs{rate}, nil) },
	}, c, nil
}

// start lets the application write. resume: it takes up what the region says.
func (a *app) start(resume bool) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.stop != nil {
		return nil // it runs
	}
	ctx, cancel := context.WithCancel(context.Background())
	a.stop, a.stopped = cancel, make(chan struct{})
	before := a.report
	a.report = AppReport{Began: monotonic(), Seq: before.Seq}
	go a.run(ctx, a.stopped, resume)
	return nil
}

// suspend ends the loop and reports what it did.
func (a *app) suspend(ctx context.Context) (AppReport, error) {
	a.mu.Lock()
	stop, stopped := a.stop, a.stopped
	a.mu.Unlock()
	if stop != nil {
		stop()
		select {
		case <-stopped:
		case <-ctx.Done():
			return AppReport{}, fmt.Errorf("the application does not stop: %w", ctx.Err())
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stop = nil
	return a.report, nil
}

func (a *app) run(ctx context.Context, stopped chan struct{}, resume bool) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer close(stopped)
	a.mu.Lock()
	r := a.report
	a.mu.Unlock()
	if err := a.loop(ctx, &r, resume); err != nil {
		r.Err = err.Error()
	}
	a.mu.Lock()
	a.report = r
	a.mu.Unlock()
}

func (a *app) loop(ctx context.Context, r *AppReport, resume bool) error {
	k := a.work
	var head [8]byte
	if resume {
		if err := a.view.ReadAt(head[:], 0); err != nil {
			return err
		}
		r.Seq = binary.LittleEndian.Uint64(head[:])
	} else if err := a.view.WriteAt(head[:], 0); err != nil {
		return err
	}
	next := k.sequence()
	for range r.Seq {
		next()
	}
	out := make([]byte, k.record())
	origin, began := time.Now(), monotonic()
	now := func() int64 { return began + int64(time.Since(origin)) }
	r.Began = began
	lag := int64(float64(k.Rate) / float64(k.record()) * maxLag.Seconds())
	var skipped int64      // writes that are not made up for
	var last, barred int64 // due at the last turn; due writes that a throttle takes away
	timer := time.NewTimer(0)
	defer timer.Stop()
	for ctx.Err() == nil {
		due := k.due(time.Since(origin))
		if k.Rate == 0 && resume {
			due = 1
		}
		r.Due = due
		if limit := a.throttle.Load(); limit > 0 && limit < k.Rate && due > last {
			kept := int64(float64(due)*float64(limit)/float64(k.Rate)) - int64(float64(last)*float64(limit)/float64(k.Rate))
			barred += due - last - kept
		}
		last = due
		due -= barred
		if late := due - skipped - r.Writes; late > max(lag, 1) {
			skipped += late - max(lag, 1)
		}
		if r.Writes+skipped >= due {
			timer.Reset(100 * time.Microsecond)
			select {
			case <-timer.C:
			case <-ctx.Done():
			}
			continue
		}
		i := r.Seq + 1
		off := page + next()*k.record()
		k.fill(out, i, off)
		before := now()
		if err := a.view.WriteAt(out, off); err != nil {
			return err
		}
		binary.LittleEndian.PutUint64(head[:], i)
		if err := a.view.WriteAt(head[:], 0); err != nil {
			return err
		}
		r.Last = now() // from here on the write is acknowledged
		r.Seq = i
		r.Writes++
		if took := r.Last - before; r.First == 0 {
			r.First = r.Last
		} else if took > int64(localWrite) {
			r.Wait += took
			r.MaxWait = max(r.MaxWait, took)
		}
		bin := int((r.Last - began) / int64(appBin))
		for len(r.Bins) <= bin && len(r.Bins) < 1<<16 {
			r.Bins = append(r.Bins, 0)
		}
		if bin < len(r.Bins) {
			r.Bins[bin]++
		}
	}
	return nil
}

// appEqualArgs says how many writes there were in all.
type appEqualArgs struct {
	Seq uint64 `json:"seq"`
}

// appEqual compares every byte of the region with what so many writes leave.
func (w *workload) appEqual(ctx context.Context, a appEqualArgs) (v Verified, err error) {
	k := w.app.work
	wrote := make([]uint64, k.places())
	next := k.sequence()
	for i := range a.Seq {
		wrote[next()] = i + 1
	}
	var in *os.File
	if k.Input != "" {
		if in, err = os.Open(k.Input); err != nil {
			return v, err
		}
		defer in.Close()
	}
	got, want := make([]byte, page), make([]byte, page)
	rec := k.record()
	for off := int64(0); off < k.Size; off += page {
		n := min(page, k.Size-off)
		if err := errors.Join(w.view.ReadAt(got[:n], off), ctx.Err()); err != nil {
			return v, err
		}
		if in == nil {
			k.Content.Fill(want[:n], off)
		} else if _, err := in.ReadAt(want[:n], off); err != nil {
			return v, fmt.Errorf("input %s at %d: %w", k.Input, off, err)
		}
		if off == 0 {
			binary.LittleEndian.PutUint64(want, a.Seq)
		}
		for at := int64(0); off > 0 && at+rec <= n; at += rec {
			if i := wrote[(off-page+at)/rec]; i > 0 {
				k.fill(want[at:at+rec], i, off+at)
			}
		}
		if !bytes.Equal(got[:n], want[:n]) {
			at := 0
			for got[at] == want[at] {
				at++
			}
			return v, fmt.Errorf("verify after %d writes: byte at %d is %#x, not %#x (last written there: %s): %w", a.Seq, off+int64(at), got[at], want[at], k.lastAt(wrote, off+int64(at)), region.ErrMismatch)
		}
		v.Bytes += n
	}
	return v, nil
}

func (k AppWork) lastAt(wrote []uint64, off int64) string {
	if i := (off - page) / k.record(); off >= page && i < int64(len(wrote)) && wrote[i] > 0 {
		return fmt.Sprintf("write %d", wrote[i])
	}
	return "nothing"
}

// control gives the source the application's hooks.
func (s *source) control(_ context.Context, _ json.RawMessage, files []*os.File) (any, []*os.File, error) {
	m, ok := s.publication.(strategies.Seeder)
	if !ok || len(files) != 1 {
		closeAll(files)
		return nil, nil, fmt.Errorf("control: want a publication that migrates and one socket, got %d: %w", len(files), region.ErrNotSupported)
	}
	h, c, err := hooksOver(files[0])
	if err != nil {
		return nil, nil, err
	}
	s.hook = c
	m.Control(h)
	return none{}, nil, nil
}

// released waits until the source may exit.
func (s *source) released(ctx context.Context, _ none) (none, error) {
	m, ok := s.publication.(strategies.Seeder)
	if !ok {
		return none{}, nil
	}
	select {
	case <-m.Done():
		return none{}, nil
	case <-ctx.Done():
		return none{}, ctx.Err()
	}
}

// finalize takes the region over, with the hooks of the application at this side.
func (d *daemon) finalize(ctx context.Context, _ json.RawMessage, files []*os.File) (any, []*os.File, error) {
	m, ok := d.mount.(strategies.Migrator)
	if !ok || len(files) != 1 {
		closeAll(files)
		return nil, nil, fmt.Errorf("finalize: want a mount that migrates and one socket, got %d: %w", len(files), region.ErrNotSupported)
	}
	h, c, err := hooksOver(files[0])
	if err != nil {
		return nil, nil, err
	}
	d.hook = c
	r, err := m.Finalize(ctx, strategies.Hooks{Resume: h.Resume})
	return r, nil, err
}

func (d *daemon) complete(ctx context.Context, _ none) (strategies.Handover, error) {
	m, ok := d.mount.(strategies.Migrator)
	if !ok {
		return strategies.Handover{}, fmt.Errorf("complete: the mount does not migrate: %w", region.ErrNotSupported)
	}
	return m.Complete(ctx)
}
