package shm

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"memsync/strategies/region"
	"memsync/strategies/replay"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// shared is memory as two processes have it: outside of the Go heap, where the race
// detector does not take the protocols' unlocked copies for mistakes.
func shared(t testing.TB, n int64) []byte {
	t.Helper()
	m, err := unix.Mmap(-1, 0, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(m) })
	return m
}

func files(t testing.TB, l Layout) (control, mem []byte) {
	t.Helper()
	control, mem = shared(t, l.ControlLength()), shared(t, l.RegionLength())
	if err := l.Format(control, 0, nil); err != nil {
		t.Fatal(err)
	}
	got, err := ReadLayout(control)
	if err != nil || got != l {
		t.Fatalf("%+v, %v, want %+v", got, err, l)
	}
	return control, mem
}

type writer interface {
	Write(p []byte, off int64) error
	Publish(blob []byte) (uint64, error)
}

// step makes publication n: some ranges anywhere with its content.
func step(s, n uint64, size int64, write func(p []byte, off int64) error) error {
	r := rand.New(rand.NewPCG(s, n))
	for range r.IntN(4) {
		lo := r.Int64N(size)
		hi := min(size, lo+1+r.Int64N(9000))
		p := make([]byte, hi-lo)
		region.Content{Seed: s, Generation: n}.Fill(p, lo)
		if err := write(p, lo); err != nil {
			return err
		}
	}
	return nil
}

// playback checks states in ascending order.
type playback struct {
	seed, n uint64
	mem     []byte
}

func (r *playback) check(got []byte, sequence uint64, blob []byte) error {
	for ; r.n < sequence; r.n++ {
		_ = step(r.seed, r.n+1, int64(len(r.mem)), func(p []byte, off int64) error { copy(r.mem[off:], p); return nil })
	}
	if r.n != sequence || !bytes.Equal(got, r.mem) {
		return fmt.Errorf("state %d is not what was published (%d)", sequence, r.n)
	}
	if want := fmt.Append(nil, sequence); sequence > 0 && !bytes.Equal(blob, want) {
		return fmt.Errorf("blob %q with state %d", blob, sequence)
	}
	return nil
}

func publish(t *testing.T, w writer, s uint64, size int64, states uint64, pause func(n uint64)) {
	for n := uint64(1); n <= states; n++ {
		err := step(s, n, size, w.Write)
		if err == nil {
			var got uint64
			if got, err = w.Publish(fmt.Append(nil, n)); err == nil && got != n {
				err = fmt.Errorf("publication %d is %d", n, got)
			}
		}
		if err != nil {
			t.Error(err)
			return
		}
		pause(n)
	}
}

// TestQueue: whatever the host gets hold of is a state, also with a stream that is
// overrun again and again; and the last state is had when the client is gone.
func TestQueue(t *testing.T) {
	s := replay.Seed(t)
	l := Layout{Mode: Queue, Size: 100_001, Chunk: page, Page: page, Stream: MinStream}
	control, mem := files(t, l)
	own := make([]byte, l.Size)
	r, err := NewQueueReader(l, control, mem, own, func(int64, int64) {})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	done := make(chan struct{})
	const states = 30000
	wg.Go(func() {
		defer close(done)
		publish(t, NewQueueWriter(l, control, mem), s, l.Size, states, func(n uint64) {
			if n%64 == 0 {
				time.Sleep(100 * time.Microsecond)
			}
		})
	})
	want := &playback{seed: s, mem: make([]byte, l.Size)}
	moves, starvations := 0, 0
	poll := func() {
		moved, starved, err := r.Poll()
		if err != nil {
			t.Fatalf("TEST_SEED=%d: %v", s, err)
		}
		if starved {
			starvations++
		}
		if moved {
			moves++
			if err := want.check(own, r.Sequence, r.Blob); err != nil {
				t.Fatalf("TEST_SEED=%d: %v", s, err)
			}
		}
	}
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
			poll()
		}
	}
	wg.Wait()
	for range 3 {
		poll()
	}
	if r.Sequence != states {
		t.Errorf("state %d at the end, want %d", r.Sequence, states)
	}
	t.Logf("%d states seen of %d, starved %d times", moves, states, starvations)
}

// TestQueueKilled: a client that stops at any record leaves its last state.
func TestQueueKilled(t *testing.T) {
	s := replay.Seed(t)
	l := Layout{Mode: Queue, Size: 50_000, Chunk: page, Page: page, Stream: MinStream}
	for round := range uint64(50) {
		control, mem := files(t, l)
		own := make([]byte, l.Size)
		r, err := NewQueueReader(l, control, mem, own, func(int64, int64) {})
		if err != nil {
			t.Fatal(err)
		}
		w := NewQueueWriter(l, control, mem)
		rng := rand.New(rand.NewPCG(s, round))
		states := uint64(rng.IntN(200))
		publish(t, w, s, l.Size, states, func(n uint64) {
			if rng.IntN(10) == 0 { // and thinks better of something
				_ = step(s, n+1000, l.Size, w.Write)
				w.Abort()
			}
		})
		for range rng.IntN(6) { // and dies with stores that are not published
			_ = step(s, states+1, l.Size, w.Write)
		}
		for range 3 {
			if _, _, err := r.Poll(); err != nil {
				t.Fatal(err)
			}
		}
		want := &playback{seed: s, mem: make([]byte, l.Size)}
		if err := want.check(own, r.Sequence, r.Blob); err != nil || r.Sequence != states {
			t.Fatalf("TEST_SEED=%d round %d: state %d, want %d: %v", s, round, r.Sequence, states, err)
		}
	}
}

func TestQueueLimits(t *testing.T) {
	l := Layout{Mode: Queue, Size: 1 << 20, Chunk: page, Page: page, Stream: MinStream}
	control, mem := files(t, l)
	w := NewQueueWriter(l, control, mem)
	if err := w.Write(make([]byte, w.Limit()-recordHead), 0); err != nil {
		t.Error(err)
	}
	for _, r := range [][2]int64{{8, 0}, {1, 1 << 20}, {2, 1<<20 - 1}, {1, -1}} {
		if err := w.Write(make([]byte, r[0]), r[1]); !errors.Is(err, region.ErrOutOfRange) {
			t.Errorf("%v: %v", r, err)
		}
	}
	if _, err := w.Publish(make([]byte, MaxBlob+1)); !errors.Is(err, region.ErrOutOfRange) {
		t.Error(err)
	}
	if _, err := w.Publish(make([]byte, MaxBlob)); err != nil {
		t.Error(err)
	}
}

// TestTriple: what the host takes is a state, newer each time, and what changed is
// all that changed.
func TestTriple(t *testing.T) {
	s := replay.Seed(t)
	l := Layout{Mode: Triple, Size: 100_001, Chunk: page, Page: page}
	control, mem := files(t, l)
	r := NewTripleReader(l, control, mem)
	var wg sync.WaitGroup
	done := make(chan struct{})
	const states = 20000
	wg.Go(func() {
		defer close(done)
		publish(t, NewTripleWriter(l, control, mem), s, l.Size, states, func(n uint64) {
			if n%64 == 0 {
				time.Sleep(50 * time.Microsecond)
			}
		})
	})
	want := &playback{seed: s, mem: make([]byte, l.Size)}
	own := make([]byte, l.Size)
	taken, last := 0, uint64(0)
	take := func() {
		fresh, err := r.Take()
		if err != nil {
			t.Fatalf("TEST_SEED=%d: %v", s, err)
		}
		if !fresh {
			return
		}
		taken++
		n, blob, err := r.State()
		if err != nil || n <= last {
			t.Fatalf("TEST_SEED=%d: state %d after %d, %v", s, n, last, err)
		}
		last = n
		if err := r.Changed(func(p []byte, off int64) error { copy(own[off:], p); return nil }); err != nil {
			t.Fatal(err)
		}
		if taken%3 > 0 { // else it could not be saved: the next has it too
			r.Saved()
		}
		if err := want.check(own, n, blob); err != nil {
			t.Fatalf("TEST_SEED=%d: %v", s, err)
		}
	}
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
			take()
		}
	}
	wg.Wait()
	take()
	if last != states {
		t.Errorf("state %d at the end, want %d", last, states)
	}
	t.Logf("%d states seen of %d", taken, states)
}

func TestNote(t *testing.T) {
	l := Layout{Mode: Cow, Size: 1, Chunk: page, Page: page}
	control := shared(t, l.ControlLength())
	if err := l.Format(control, 7, []byte("seven")); err != nil {
		t.Fatal(err)
	}
	for n := uint64(7); n < 12; n++ {
		blob := fmt.Append(nil, "blob ", n)
		if n == 7 {
			blob = []byte("seven")
		} else if got, err := Note(control, blob); err != nil || got != n {
			t.Fatal(got, err)
		}
		if s, b, err := Noted(control); err != nil || s != n || !bytes.Equal(b, blob) {
			t.Errorf("%d, %q, %v, want %d, %q", s, b, err, n, blob)
		}
	}
	if _, err := Note(control, make([]byte, MaxBlob+1)); !errors.Is(err, region.ErrOutOfRange) {
		t.Error(err)
	}
}

func TestStatus(t *testing.T) {
	p := make([]byte, StatusLength)
	for _, s := range []Status{{}, {Sequence: 1, Images: 2, Saved: time.Unix(3, 4), Starved: 5, Failures: 6}} {
		if PutStatus(p, s); GetStatus(p) != s {
			t.Errorf("%+v, want %+v", GetStatus(p), s)
		}
	}
}

// FuzzStream: a client that writes anything into its stream gets an error or a
// state, and the host stays within its memory.
func FuzzStream(f *testing.F) {
	l := Layout{Mode: Queue, Size: 9000, Chunk: page, Page: page, Stream: MinStream}
	control, mem := files(f, l)
	w := NewQueueWriter(l, control, mem)
	_ = w.Write([]byte("store"), 8000)
	_, _ = w.Publish([]byte("blob"))
	f.Add(control[moreAt:moreAt+200], uint64(16), uint64(w.pos), uint64(w.pos))
	f.Add([]byte{}, uint64(0), uint64(1<<63), uint64(1<<62))
	f.Fuzz(func(t *testing.T, stream []byte, applied, published, reserved uint64) {
		control, mem := files(t, l)
		own := make([]byte, l.Size)
		r, err := NewQueueReader(l, control, mem, own, func(off, n int64) {
			if err := region.CheckRange(off, n, l.Size); err != nil {
				t.Fatal(err)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		copy(control[moreAt:], stream)
		clientWord(control, appliedWord).Store(applied)
		clientWord(control, publishedWord).Store(published)
		clientWord(control, reservedWord).Store(reserved)
		for range 3 {
			if _, _, err := r.Poll(); err != nil {
				return
			}
		}
	})
}

// FuzzMessage: what a client sends to the host's socket.
func FuzzMessage(f *testing.F) {
	f.Add(Hello{Base: 1 << 40, Length: 4096, ControlBase: 1 << 41, ControlLength: 8192}.Encode())
	f.Add(EncodeAsk())
	f.Add(EncodeAnswer(errors.New("no")))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := Decode(b)
		if err != nil && !errors.Is(err, region.ErrMismatch) {
			t.Fatal(err)
		}
		if err == nil && h != nil && !bytes.Equal(h.Encode(), b) {
			t.Fatalf("%+v from %x", h, b)
		}
		_ = DecodeAnswer(b)
	})
}

// FuzzControl: a control file, as a client finds it.
func FuzzControl(f *testing.F) {
	l := Layout{Mode: Triple, Size: 10000, Chunk: page, Page: page}
	control, _ := files(f, l)
	f.Add(control[:page])
	f.Fuzz(func(t *testing.T, b []byte) {
		c := make([]byte, 1<<17)
		copy(c, b)
		if l, err := ReadLayout(c); err == nil && l.ControlLength() > int64(len(c)) {
			t.Fatalf("%+v in %d bytes", l, len(c))
		}
		_, _, _ = Restored(c)
		_, _, _ = Noted(c)
	})
}
