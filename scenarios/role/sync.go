package role

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies"
	"memsync/strategies/all"
	"memsync/strategies/region"
)

// SyncWork says what the writer at the source does in op sync. The workload at
// the destination does the same to a copy of its own, to know what it must see.
type SyncWork struct {
	Size     int64          `json:"size"`
	Content  region.Content `json:"content"`
	Input    string         `json:"input,omitempty"`
	Fraction float64        `json:"fraction"`
	Pattern  string         `json:"pattern"` // scattered, clustered or insert
	Via      string         `json:"via"`     // map, file or path; empty is map
	Pulses   int            `json:"pulses"`
	Gap      time.Duration  `json:"gap"` // between two pulses, on average
}

// model is what the region must have after so many rounds and pulses.
type model struct {
	w   SyncWork
	mem []byte
}

func newModel(w SyncWork) (*model, error) {
	mem, err := anonymous(w.Size, unix.MAP_POPULATE)
	if err != nil {
		return nil, err
	}
	if w.Input == "" {
		w.Content.Fill(mem, 0)
		return &model{w, mem}, nil
	}
	f, err := os.Open(w.Input)
	if err != nil {
		return nil, fmt.Errorf("input: %w", err)
	}
	defer f.Close()
	if _, err := io.ReadFull(f, mem); err != nil {
		return nil, fmt.Errorf("input %s: %w", w.Input, err)
	}
	return &model{w, mem}, nil
}

// round changes the model as round n (from 1) does and calls store for each range.
func (m *model) round(n uint64, store func(off, length int64)) {
	r := rand.New(rand.NewPCG(m.w.Content.Seed, n))
	pages := region.Chunks(m.w.Size, page)
	count := min(int64(m.w.Fraction*float64(pages)+0.5), pages)
	if m.w.Fraction > 0 {
		count = max(count, 1)
	}
	next := region.Content{Seed: m.w.Content.Seed, Generation: m.w.Content.Generation + n}
	touch := func(lo, hi int64) {
		off, end := lo*page, min(hi*page, m.w.Size)
		next.Fill(m.mem[off:end], off)
		store(off, end-off)
	}
	switch {
	case count == 0:
	case m.w.Pattern == "clustered":
		lo := r.Int64N(pages - count + 1)
		touch(lo, lo+count)
	case m.w.Pattern == "insert":
		// Some bytes come in at one place and all behind them move up; the last are lost.
		n := min(max(count*page-int64(r.IntN(page)), 1), m.w.Size)
		off := r.Int64N(m.w.Size - n + 1)
		copy(m.mem[off+n:], m.mem[off:])
		next.Fill(m.mem[off:off+n], off)
		store(off, m.w.Size-off)
	default:
		s := newSequence("random", 0, pages, m.w.Content.Seed+n)
		for range count {
			p, _ := s.next()
			touch(p, p+1)
		}
	}
}

// pulse changes one word, a different page each time while there are enough.
func (m *model) pulse(i int64) (off int64) {
	off = m.place(i)
	copy(m.mem[off:min(off+8, m.w.Size)], m.word(i))
	return off
}

// place is where pulse i goes.
func (m *model) place(i int64) int64 {
	pages := max(m.w.Size/page, 1)
	s := newSequence("random", 0, pages, ^m.w.Content.Seed)
	return s.permute(i%pages) * page
}

// word is what pulse i writes.
func (m *model) word(i int64) []byte {
	var b [8]byte
	region.Content{Seed: ^m.w.Content.Seed, Generation: uint64(i)}.Fill(b[:], 8*i)
	return b[:min(8, m.w.Size)]
}

// SyncArgs names a round or, for pulses, none.
type SyncArgs struct {
	Work  SyncWork `json:"work"`
	Round uint64   `json:"round"`
}

// Times are CLOCK_MONOTONIC, ns: when pulse i was written, or was seen; 0 is never.
type Times struct {
	At    []int64 `json:"at"`
	Begin int64   `json:"begin"` // the first store of a round
	End   int64   `json:"end"`   // its last
}

// ready makes the model, before any clock.
func (w *workload) ready(_ context.Context, s SyncWork) (_ none, err error) {
	w.work.Via = s.Via
	w.model, err = newModel(s)
	return none{}, err
}

// handedOver closes the writer's copy of its userfaultfd: a source that dies must
// not leave it waiting in faults.
func (w *workload) handedOver(context.Context, none) (_ none, err error) {
	for _, f := range []*os.File{w.armed, w.passed} {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
	}
	w.armed, w.passed = nil, nil
	return none{}, err
}

// dirty stores a round's changes.
func (w *workload) dirty(_ context.Context, a SyncArgs) (t Times, err error) {
	type extent struct{ off, n int64 }
	var changed []extent
	w.model.round(a.Round, func(off, n int64) { changed = append(changed, extent{off, n}) })
	t.Begin = monotonic()
	for _, e := range changed {
		err = errors.Join(err, w.view.WriteAt(w.model.mem[e.off:e.off+e.n], e.off))
	}
	t.End = monotonic()
	return t, err
}

// pulse stores one word now and then and says when.
func (w *workload) pulse(ctx context.Context, _ none) (t Times, err error) {
	k := w.model.w
	r := rand.New(rand.NewPCG(k.Content.Seed, 99))
	for i := range k.Pulses {
		select {
		case <-ctx.Done():
			return t, ctx.Err()
		case <-time.After(k.Gap/2 + time.Duration(r.Int64N(int64(k.Gap)))):
		}
		off := w.model.pulse(int64(i))
		b := w.model.word(int64(i))
		at := monotonic()
		if err := w.view.WriteAt(b, off); err != nil {
			return t, err
		}
		t.At = append(t.At, at)
	}
	return t, nil
}

// watchArgs says how long to look for pulses.
type watchArgs struct {
	Patience time.Duration `json:"patience"`
}

// watch looks for the pulses through the mapping and says when it saw each.
func (w *workload) watch(ctx context.Context, a watchArgs) (t Times, err error) {
	k := w.model.w
	t.At = make([]int64, k.Pulses)
	offs, words := make([]int64, k.Pulses), make([][]byte, k.Pulses)
	for i := range offs {
		offs[i], words[i] = w.model.place(int64(i)), w.model.word(int64(i))
	}
	var b [8]byte
	until := time.Now().Add(a.Patience)
	const ahead = 64 // pulses that may come into sight together
	for first := 0; first < k.Pulses && time.Now().Before(until) && ctx.Err() == nil; time.Sleep(50 * time.Microsecond) {
		for i := first; i < min(first+ahead, k.Pulses); i++ {
			if t.At[i] != 0 {
				continue
			}
			p := b[:len(words[i])]
			if err := w.view.ReadAt(p, offs[i]); err != nil {
				return t, err
			}
			if bytes.Equal(p, words[i]) {
				t.At[i] = monotonic()
			}
		}
		for first < k.Pulses && t.At[first] != 0 {
			first++
		}
	}
	return t, ctx.Err()
}

// equalArgs says how many rounds there were.
type equalArgs struct {
	Rounds uint64 `json:"rounds"`
	Pulses int    `json:"pulses"`
}

// equal compares every byte of the mapping with what it must be.
func (w *workload) equal(_ context.Context, a equalArgs) (v Verified, err error) {
	for n := uint64(1); n <= a.Rounds; n++ {
		w.model.round(n, func(int64, int64) {})
	}
	for i := range a.Pulses {
		w.model.pulse(int64(i))
	}
	const block = 1 << 20
	got := make([]byte, block)
	for off := int64(0); off < w.model.w.Size; off += block {
		n := min(block, w.model.w.Size-off)
		if err := w.view.ReadAt(got[:n], off); err != nil {
			return v, err
		}
		for i, b := range got[:n] {
			if b != w.model.mem[off+int64(i)] {
				return v, fmt.Errorf("verify the destination: byte at %d is %#x, not %#x: %w", off+int64(i), b, w.model.mem[off+int64(i)], region.ErrMismatch)
			}
		}
		v.Bytes += n
	}
	return v, nil
}

// publish makes the region that is written at the source; the answer is how the writer attaches.
func (s *source) publish(ctx context.Context, _ json.RawMessage, files []*os.File) (any, []*os.File, error) {
	closeAll(files)
	st, params, err := s.setup.Resolve(s.known)
	if err != nil {
		return nil, nil, err
	}
	tr, err := all.Transport(s.setup.Transport)
	if err != nil {
		return nil, nil, err
	}
	p, ok := st.(strategies.Publisher)
	if f, file := s.store.(interface{ Path() string }); !ok && file { // a program serves the file itself
		return strategies.Attachment{Kind: strategies.AttachPath, Path: f.Path(), Size: s.store.Size()}, nil, nil
	}
	if !ok {
		return nil, nil, fmt.Errorf("strategy %s publishes no region that is written at the source: %w", s.setup.Strategy, region.ErrNotSupported)
	}
	if s.publication, err = p.Publish(ctx, s.store, strategies.PublishOptions{Chunk: s.setup.Chunk, Dir: s.setup.Dir, Pwrite: s.setup.Pwrite, Device: s.setup.Device, Transport: tr, Params: params}); err != nil {
		return nil, nil, err
	}
	a := s.publication.Attachment()
	if a.File != nil {
		return a, []*os.File{a.File}, nil
	}
	return a, nil, nil
}

// TrackArgs is a writer's mapping; its userfaultfd is passed along.
type TrackArgs struct {
	PID    int     `json:"pid"`
	Base   uintptr `json:"base"`
	Length int64   `json:"length"`
}

func (s *source) track(_ context.Context, body json.RawMessage, files []*os.File) (any, []*os.File, error) {
	var a TrackArgs
	if err := json.Unmarshal(body, &a); err != nil || len(files) > 1 || s.publication == nil {
		closeAll(files)
		return nil, nil, errors.Join(err, fmt.Errorf("track: want at most one userfaultfd, got %d files, and a publication", len(files)))
	}
	w := strategies.Writer{PID: a.PID, Base: a.Base, Length: a.Length}
	if len(files) == 1 {
		w.Uffd = files[0]
	}
	return none{}, nil, s.publication.Track(w)
}

// pollArgs says whether the source looks for changes by itself.
type pollArgs struct {
	On bool `json:"on"`
}

func (s *source) poll(_ context.Context, a pollArgs) (none, error) {
	if s.publication != nil {
		s.publication.Poll(a.On)
	}
	return none{}, nil
}

func (s *source) sync(ctx context.Context, _ none) (none, error) {
	if s.publication == nil {
		return none{}, nil // the destination asks
	}
	return none{}, s.publication.Sync(ctx)
}

// Bandwidth is how fast the source reads the region with the workers that hash it, B/s.
type Bandwidth struct {
	Rate float64 `json:"rate"`
}

func (s *source) bandwidth(ctx context.Context, _ none) (b Bandwidth, err error) {
	if p, ok := s.publication.(interface {
		Bandwidth(ctx context.Context) (float64, error)
	}); ok {
		b.Rate, err = p.Bandwidth(ctx)
	}
	return b, err
}

func (s *source) stats(context.Context, none) (strategies.Stats, error) {
	if s.publication == nil {
		return strategies.Stats{}, nil
	}
	return s.publication.Stats(), nil
}
