package role

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"golang.org/x/sys/unix"

	"memsync/scenarios/program"
	"memsync/strategies"
	"memsync/strategies/attach"
	"memsync/strategies/region"
)

// page is what the workload touches at once: 4 KiB, the MMU's unit, as in the thesis.
const page = 4096

// Work says what a workload does. The source replays it to know what was written.
type Work struct {
	Op      string        `json:"op"` // read, write, mixed (every second touch writes)
	Access  string        `json:"access"`
	Threads int           `json:"threads"` // each works on its own part of the region
	Think   time.Duration `json:"think"`   // pause after each touch
	Limit   int64         `json:"limit"`   // bytes to touch; -1 is the whole region; 0 only the first chunk
	Budget  time.Duration `json:"budget"`  // stop after this time
	Seed    uint64        `json:"seed"`
	Size    int64         `json:"size"` // bytes of the region
	// Warm: everything is read once, in order, before the clock starts, for at
	// most the budget; and the touches are made once more afterwards, in local memory.
	Warm    bool           `json:"warm"`
	Content region.Content `json:"content"`
	Input   string         `json:"input,omitempty"` // the file that the region must equal
	Via     string         `json:"via"`             // map, file or path
	Advice  string         `json:"advice"`          // none, sequential or random
	Direct  bool           `json:"direct"`          // past the page cache; not with a mapping
	// FileSystem, if not none, is on the device and holds the region as Files files;
	// it is mounted below Dir.
	FileSystem string `json:"file_system"`
	Files      int    `json:"files"`
	Dir        string `json:"dir"`
	// Program, if not nil, works on the region in place of touches.
	Program *program.Program `json:"program,omitempty"`
}

// Touched is what was done; ops counts the touches of each thread, in the order
// of its sequence.
type Touched struct {
	Ops   []int64 `json:"ops"`
	Bytes int64   `json:"bytes"`
	Start int64   `json:"start"` // CLOCK_MONOTONIC, ns: first touch begins
	End   int64   `json:"end"`   // last touch returned
	Local int64   `json:"local"` // ns the same touches took in local memory; 0 where not asked
	First int64   `json:"first"` // ns the first load took; 0 where none was made
	Last  bool    `json:"last"`  // all of the limit was reached within the budget
	// Program says how the program went; nil without one.
	Program *program.Result `json:"program,omitempty"`
	// Hist is the HDR histogram (ns) of all touches, V2 compressed, base64.
	Hist                []byte `json:"hist"`
	P50, P99, P999, Max int64  // ns
}

// written is the generation of content that the workload writes.
func (w Work) written() region.Content {
	return region.Content{Seed: w.Content.Seed, Generation: w.Content.Generation + 1}
}

// sequences returns each thread's order of pages.
func (w Work) sequences() ([]*sequence, error) {
	if strings.HasPrefix(w.Access, tracePrefix) {
		pages, err := TracePages(w.Access, w.Size)
		return []*sequence{{access: w.Access, n: int64(len(pages)), pages: pages}}, err
	}
	pages := region.Chunks(w.Size, page)
	s := make([]*sequence, w.Threads)
	for t := range s {
		first, n := split(pages, t, w.Threads)
		s[t] = newSequence(w.Access, first, n, w.Seed+uint64(t))
	}
	return s, nil
}

// writes reports whether a thread's i-th touch is a store.
func (w Work) writes(i int64) bool { return w.Op == "write" || w.Op == "mixed" && i%2 == 1 }

// pageRange is the byte range of a page; the region's last page may be short.
func (w Work) pageRange(p int64) (off, n int64) { return p * page, min(page, w.Size-p*page) }

// expect fills buf with the region's first content at off.
func (w Work) expect(in *os.File, buf []byte, off int64) error {
	if in == nil {
		w.Content.Fill(buf, off)
		return nil
	}
	if n, err := in.ReadAt(buf, off); n < len(buf) {
		return fmt.Errorf("input %s: %d bytes at %d, to compare with: it shrank or cannot be read: %w", w.Input, len(buf), off, err)
	}
	return nil
}

// workload is the process that maps the region and touches it.
type workload struct {
	view   *attach.View
	work   Work
	seqs   []*sequence // the threads'
	in     *os.File
	armed  *os.File // op sync: to be closed once the source has it
	model  *model   // op sync: what the region must have
	app    *app     // op migrate
	passed *os.File // op migrate: to be closed once it was sent
	snap   snapWriter
	prog   programRun
	// buf is where what is read goes, page p at p*page; out is what is written.
	buf, out []byte
	// seen[p] says what the last load of page p must have found: 0 not loaded,
	// 1 the first content, 2 what the workload itself wrote.
	seen, wrote []byte
}

func (w *workload) ops() map[string]handler {
	ops := map[string]handler{
		"prepare": on(w.prepare), "attach": w.attach, "run": on(w.run), "verify": on(w.verify),
		"sync":   on(func(context.Context, none) (none, error) { return none{}, w.view.Sync() }),
		"client": w.client, "write": on(w.write), "fork": on(w.fork),
		"ready": on(w.ready), "dirty": on(w.dirty), "pulse": on(w.pulse), "watch": on(w.watch), "equal": on(w.equal), "handed-over": on(w.handedOver),
		"load": on(w.load), "store": on(w.store),
		"detach":   on(w.detach),
		"counters": on(counters), "settle": on(forgetPeak), "floors": on(w.floors),
	}
	maps.Copy(ops, w.appOps())
	return ops
}

// anonymous returns n bytes of memory whose pages are there already.
func anonymous(n int64, flags int) ([]byte, error) {
	b, err := unix.Mmap(-1, 0, int(region.RoundUp(max(n, 1), page)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|flags)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes of memory: %w", n, err)
	}
	return b[:n], nil
}

// prepare makes the buffers, before any clock runs.
func (w *workload) prepare(ctx context.Context, work Work) (none, error) {
	w.work = work
	// A thread that waits for a page holds its P, so there must be more of them.
	runtime.GOMAXPROCS(work.Threads + 2)
	debug.SetGCPercent(-1) // the collector must not run into a page that is not there yet
	if work.Input != "" {
		in, err := os.Open(work.Input)
		if err != nil {
			return none{}, fmt.Errorf("input: %w", err)
		}
		w.in = in
	}
	var err error
	if work.Program != nil {
		return none{}, w.prepareProgram(ctx)
	}
	if w.seqs, err = work.sequences(); err != nil {
		return none{}, err
	}
	pages := region.Chunks(work.Size, page)
	w.seen, w.wrote = make([]byte, pages), make([]byte, pages)
	touched := work.Size
	if work.Limit >= 0 && work.Access == "seq" && work.Threads == 1 {
		touched = min(work.Size, max(work.Limit, 2*page))
	}
	// Only what will be touched is populated; the rest is address space.
	if w.buf, err = anonymous(work.Size, unix.MAP_NORESERVE); err != nil {
		return none{}, err
	}
	if err = unix.Madvise(w.buf[:region.RoundUp(touched, page)], unix.MADV_POPULATE_WRITE); err != nil {
		return none{}, fmt.Errorf("populate the %d bytes that are read into: %w", touched, err)
	}
	if work.Op != "read" {
		if w.out, err = anonymous(work.Size, 0); err != nil {
			return none{}, err
		}
		work.written().Fill(w.out, 0)
	}
	return none{}, nil
}

// Attached says when and where the region became usable.
type Attached struct {
	Usable int64   `json:"usable"` // CLOCK_MONOTONIC, ns
	Fault  bool    `json:"fault"`  // a userfaultfd came back and wants serving at Base
	Base   uintptr `json:"base"`
	// Armed: the mapping is tracked, and its userfaultfd, where there is one, came back.
	Armed  bool  `json:"armed"`
	Length int64 `json:"length"` // of the mapping, bytes
	PID    int   `json:"pid"`
}

func (w *workload) attach(_ context.Context, body json.RawMessage, files []*os.File) (any, []*os.File, error) {
	var a strategies.Attachment
	if err := json.Unmarshal(body, &a); err != nil {
		closeAll(files)
		return nil, nil, err
	}
	if w.work.Program != nil {
		closeAll(files)
		r, err := w.attachProgram(a)
		return r, nil, err
	}
	if len(files) > 0 {
		a.File = files[0] // the view's from here on
		closeAll(files[1:])
	}
	v, err := attach.Open(a, attach.Options{Via: w.work.Via, Advice: w.work.Advice, Direct: w.work.Direct,
		FileSystem: w.work.FileSystem, Files: w.work.Files, Size: w.work.Size, Dir: w.work.Dir})
	if err != nil {
		return nil, nil, err
	}
	w.view = v
	if w.app != nil {
		w.app.view = v
	}
	r := Attached{Usable: monotonic(), PID: os.Getpid()}
	if f, base, length, ok := v.Armed(); ok {
		r.Armed, r.Base, r.Length = true, base, length
		if f == nil {
			return r, nil, nil
		}
		w.armed = f
		return r, []*os.File{f}, nil
	}
	if f, base, ok := v.Fault(); ok {
		r.Fault, r.Base = true, base
		return r, []*os.File{f}, nil
	}
	return r, nil, nil
}

func newHistogram() *hdrhistogram.Histogram { return hdrhistogram.New(10, int64(time.Hour), 3) }

// run touches the region as told and times each touch.
func (w *workload) run(ctx context.Context, _ none) (Touched, error) {
	k := w.work
	if k.Program != nil {
		return w.runProgram(ctx)
	}
	if k.Warm {
		if err := w.warm(ctx); err != nil {
			return Touched{}, err
		}
	}
	start, began := time.Now(), monotonic()
	clock := func() int64 { return began + int64(time.Since(start)) }
	t := Touched{Ops: make([]int64, k.Threads), Start: monotonic()}
	if k.Op != "write" {
		// The second page, as in the thesis; the only one where there is no second.
		p := min(1, region.Chunks(k.Size, page)-1)
		off, n := k.pageRange(p)
		if err := w.view.ReadAt(w.buf[off:off+n], off); err != nil {
			return t, err
		}
		t.End = monotonic()
		t.First = t.End - t.Start
		w.seen[p] = 1
	}
	deadline := t.Start + int64(k.Budget)
	type part struct {
		bytes, end int64
		all        bool
		hist       *hdrhistogram.Histogram
		err        error
	}
	parts := make([]part, k.Threads)
	var wg sync.WaitGroup
	for i, seq := range w.seqs {
		limit := seq.n
		if k.Limit >= 0 {
			_, limit = split(min(region.Chunks(k.Limit, page), region.Chunks(k.Size, page)), i, k.Threads)
		}
		parts[i].hist = newHistogram()
		wg.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			p := &parts[i]
			now := clock()
			for p.all = true; t.Ops[i] < limit; {
				if now > deadline || ctx.Err() != nil {
					p.all = false
					break
				}
				pg, ok := seq.next()
				if !ok {
					break
				}
				off, n := k.pageRange(pg)
				if k.writes(t.Ops[i]) {
					p.err = w.view.WriteAt(w.out[off:off+n], off)
					w.wrote[pg] = 1
				} else {
					p.err = w.view.ReadAt(w.buf[off:off+n], off)
					w.seen[pg] = 1 + w.wrote[pg]
				}
				if p.err != nil {
					p.all = false
					break
				}
				end := clock()
				_ = p.hist.RecordValue(end - now)
				now = end
				t.Ops[i]++
				p.bytes += n
				p.end = end
				if k.Think > 0 {
					time.Sleep(k.Think)
					now = clock()
				}
			}
		})
	}
	wg.Wait()
	if k.Warm {
		d, err := w.rehearse(t.Ops)
		if err != nil {
			return t, err
		}
		t.Local = int64(d)
	}
	hist := newHistogram()
	t.Last = true
	var errs []error
	for _, p := range parts {
		t.Bytes += p.bytes
		t.End = max(t.End, p.end)
		t.Last = t.Last && p.all
		hist.Merge(p.hist)
		errs = append(errs, p.err)
	}
	if t.First > 0 {
		// A first chunk that has been timed on its own is a touch like the others.
		_ = hist.RecordValue(t.First)
	}
	t.P50, t.P99, t.P999, t.Max = hist.ValueAtQuantile(50), hist.ValueAtQuantile(99), hist.ValueAtQuantile(99.9), hist.Max()
	var err error
	if t.Hist, err = hist.Encode(hdrhistogram.V2CompressedEncodingCookieBase); err != nil {
		errs = append(errs, err)
	}
	if err := ctx.Err(); err != nil {
		errs = append(errs, err)
	}
	return t, errors.Join(errs...)
}

// warm reads the region once, in order, within the budget.
func (w *workload) warm(ctx context.Context) error {
	until := time.Now().Add(w.work.Budget)
	for p := range region.Chunks(w.work.Size, page) {
		if ctx.Err() != nil || time.Now().After(until) {
			return ctx.Err()
		}
		off, n := w.work.pageRange(p)
		if err := w.view.ReadAt(w.buf[off:off+n], off); err != nil {
			return fmt.Errorf("warm up: %w", err)
		}
		w.seen[p] = 1
	}
	return nil
}

// rehearse makes the touches that were made once more in memory that is all
// local, with the same pauses, and returns how long that took.
func (w *workload) rehearse(ops []int64) (time.Duration, error) {
	seqs, err := w.work.sequences()
	if err != nil {
		return 0, err
	}
	var wg sync.WaitGroup
	start := time.Now()
	for i, seq := range seqs {
		wg.Go(func() {
			var here [page]byte
			hist, now := newHistogram(), time.Since(start) // each touch is timed, as those were
			for range ops[i] {
				pg, _ := seq.next()
				off, n := w.work.pageRange(pg)
				copy(here[:n], w.buf[off:off+n])
				end := time.Since(start)
				_ = hist.RecordValue(int64(end - now))
				if now = end; w.work.Think > 0 {
					time.Sleep(w.work.Think)
					now = time.Since(start)
				}
			}
		})
	}
	wg.Wait()
	return time.Since(start), nil
}

// Verified says how many bytes were compared.
type Verified struct {
	Bytes int64 `json:"bytes"`
}

// verify compares every byte that was read with what it must be.
func (w *workload) verify(ctx context.Context, _ none) (v Verified, err error) {
	k := w.work
	if k.Program != nil {
		return w.verifyProgram()
	}
	want := make([]byte, page)
	for p, s := range w.seen {
		if s == 0 {
			continue
		}
		off, n := k.pageRange(int64(p))
		got := w.buf[off : off+n]
		v.Bytes += n
		switch {
		case s == 2:
			err = k.written().Check(got, off)
		case w.in == nil:
			err = k.Content.Check(got, off)
		default:
			if err = k.expect(w.in, want[:n], off); err == nil && !bytes.Equal(got, want[:n]) {
				err = fmt.Errorf("page at offset %d differs from %s: %w", off, k.Input, region.ErrMismatch)
			}
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return v, fmt.Errorf("verify what was read: %w", err)
		}
	}
	return v, nil
}

func (w *workload) detach(context.Context, none) (none, error) {
	if w.view == nil {
		return none{}, nil
	}
	return none{}, w.view.Close()
}
