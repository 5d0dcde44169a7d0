package chunk

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"memsync/strategies/region"
)

// pipe is a source behind a link with a rate and an RTT; replies leave one
// after the other, demand before the rest. Its content is seeded, so that it needs no memory.
type pipe struct {
	size    int64
	rtt     time.Duration
	rate    float64 // bytes a second; 0 is no limit
	content region.Content

	mu       sync.Mutex
	free     time.Time // when the link is free again
	requests int
	bytes    int64
	inFlight int64
	peak     int64 // most bytes in flight
	fail     func(off, n int64) error
}

func (p *pipe) Size() int64                                  { return p.size }
func (p *pipe) WriteAt(context.Context, []byte, int64) error { return region.ErrReadOnly }
func (p *pipe) Flush(context.Context) error                  { return nil }
func (p *pipe) Close() error                                 { return nil }

func (p *pipe) ReadAt(ctx context.Context, b []byte, off int64) error {
	n := int64(len(b))
	p.mu.Lock()
	p.requests++
	p.bytes += n
	p.inFlight += n
	p.peak = max(p.peak, p.inFlight)
	begin := time.Now().Add(p.rtt / 2)
	var sending time.Duration
	if p.rate > 0 {
		sending = time.Duration(float64(n) / p.rate * 1e9)
	}
	var arrive time.Time
	if begin.Before(p.free) && region.ClassOf(ctx) == region.Demand {
		arrive = begin.Add(sending + p.rtt/2) // it overtakes all that waits
		p.free = p.free.Add(sending)
	} else {
		if begin.Before(p.free) {
			begin = p.free
		}
		p.free = begin.Add(sending)
		arrive = p.free.Add(p.rtt / 2)
	}
	fail := p.fail
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		p.inFlight -= n
		p.mu.Unlock()
	}()
	t := time.NewTimer(time.Until(arrive))
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	if fail != nil {
		if err := fail(off, n); err != nil {
			return err
		}
	}
	p.content.Fill(b, off)
	return nil
}

// mountPipe makes a syncer on p, in chunks of 64 KiB and extents of 512 KiB.
func mountPipe(t testing.TB, p *pipe) *Syncer {
	mem, err := NewMemory(p.size)
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewSyncer(p, mem, 64<<10, 512<<10)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = errors.Join(s.Close(), mem.Close()) })
	return s
}

// TestPullTime: in the time of a simulated clock, a pull is as quick as window
// and RTT, or the link's rate, allow.
func TestPullTime(t *testing.T) {
	for _, c := range []struct {
		size int64
		rtt  time.Duration
		rate float64 // bit/s
	}{
		{64 << 20, 20 * time.Millisecond, 0},
		{64 << 20, 20 * time.Millisecond, 1e8},
		{64 << 20, 100 * time.Millisecond, 1e8},
		{64<<20 + 12345, 40 * time.Millisecond, 1e9},
	} {
		t.Run(fmt.Sprintf("%v/%.0f Mbit", c.rtt, c.rate/1e6), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := &pipe{size: c.size, rtt: c.rtt, rate: c.rate / 8}
				s := mountPipe(t, p)
				begun := time.Now()
				const workers, window = 16, 8 << 20
				puller := StartPuller(s, PullOptions{Workers: workers, Window: window})
				<-puller.Done()
				took := time.Since(begun)
				bound := time.Duration(float64(c.size)/window*float64(c.rtt)) + c.rtt // window/RTT
				if c.rate > 0 {
					bound = max(bound, time.Duration(float64(c.size)/(c.rate/8)*1e9)+c.rtt)
				}
				t.Logf("%v, the bound is %v; %d requests, at most %d bytes in flight", took, bound, p.requests, p.peak)
				if took > bound*105/100+c.rtt { // one more RTT while extents grow
					t.Errorf("pulled in %v, the bound is %v", took, bound)
				}
				if p.peak > window || p.bytes != c.size || p.requests > int(c.size>>19)+16 {
					t.Errorf("%d bytes in flight, %d bytes in %d requests", p.peak, p.bytes, p.requests)
				}
				if s.LocalBytes() != c.size {
					t.Errorf("%d bytes are local", s.LocalBytes())
				}
			})
		})
	}
}

// TestReaderBehindPuller: a sequential reader that is quicker than the link
// waits for what is on its way and hardly asks for anything twice.
func TestReaderBehindPuller(t *testing.T) {
	for _, rate := range []float64{1e8, 1e9} {
		synctest.Test(t, func(t *testing.T) {
			p := &pipe{size: 32 << 20, rtt: 40 * time.Millisecond, rate: rate / 8, content: region.Content{Seed: 5}}
			s := mountPipe(t, p)
			puller := StartPuller(s, PullOptions{Workers: 16})
			begun := time.Now()
			b := make([]byte, 128<<10)
			for off := int64(0); off < p.size; off += int64(len(b)) {
				if err := s.ReadAt(t.Context(), b, off); err != nil {
					t.Fatal(err)
				}
				if err := p.content.Check(b, off); err != nil {
					t.Fatal(err)
				}
				if off == 0 && time.Since(begun) > p.rtt*115/100+2300*time.Microsecond+time.Duration(2*float64(len(b))/p.rate*1e9) {
					t.Errorf("the first bytes came after %v", time.Since(begun))
				}
			}
			took, ideal := time.Since(begun), time.Duration(float64(p.size)/p.rate*1e9)+p.rtt
			st := s.Stats()
			t.Logf("%.0f Mbit/s: %v, ideal %v; %d bytes twice; %+v", rate/1e6, took, ideal, p.bytes-p.size, st)
			if p.bytes > p.size*102/100+5*64<<10 || took > ideal*103/100+p.rtt {
				t.Errorf("%v for an ideal of %v, %d bytes asked for more than once", took, ideal, p.bytes-p.size)
			}
			puller.Close()
		})
	}
}

// TestPullRetries: a request that fails is tried again and nothing else stops;
// a reader of those bytes gets the error.
func TestPullRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &pipe{size: 4 << 20, rtt: time.Millisecond}
		bad := errors.New("bad sector")
		broken := true
		p.fail = func(off, n int64) error {
			p.mu.Lock()
			defer p.mu.Unlock()
			if broken && off <= 1<<20 && 1<<20 < off+n {
				return bad
			}
			return nil
		}
		s := mountPipe(t, p)
		puller := StartPuller(s, PullOptions{Workers: 2})
		time.Sleep(5 * time.Second)
		if puller.Retries() < 5 || puller.Retries() > 40 || s.LocalBytes() < 3<<20 {
			t.Errorf("%d retries, %d bytes local", puller.Retries(), s.LocalBytes())
		}
		if err := s.ReadAt(t.Context(), make([]byte, 9), 1<<20); !errors.Is(err, bad) {
			t.Errorf("read of what cannot be pulled: %v", err)
		}
		p.mu.Lock()
		broken = false
		p.mu.Unlock()
		<-puller.Done()
		if s.LocalBytes() != p.size {
			t.Errorf("%d bytes are local at the end", s.LocalBytes())
		}
		puller.Close()
	})
}

// TestNoWorkers: 0 workers pull nothing.
func TestNoWorkers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &pipe{size: 1 << 20}
		s := mountPipe(t, p)
		puller := StartPuller(s, PullOptions{})
		pusher := StartPusher(s, PushOptions{})
		if err := pusher.WriteAt(t.Context(), make([]byte, 64<<10), 0); err != nil { // a whole chunk
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		if <-puller.Done(); p.requests != 0 || s.DirtyBytes() != 64<<10 {
			t.Errorf("%d requests, %d bytes dirty", p.requests, s.DirtyBytes())
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := pusher.Shutdown(ctx); !errors.Is(err, region.ErrReadOnly) {
			t.Errorf("Shutdown: %v, want the source's error", err)
		}
	})
}

func benchSyncer(b *testing.B) *Pusher {
	p := &pipe{size: 64 << 20}
	s := mountPipe(b, p)
	if err := s.Pull(b.Context(), 0, p.size); err != nil {
		b.Fatal(err)
	}
	return StartPusher(s, PushOptions{})
}

// BenchmarkLocal is the hot path: a chunk that is local.
func BenchmarkLocal(b *testing.B) {
	for _, n := range []int{64, 4096, 128 << 10} {
		buf := make([]byte, n)
		b.Run(fmt.Sprintf("read/%d", n), func(b *testing.B) {
			s := benchSyncer(b)
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for i := int64(0); b.Loop(); i++ {
				if err := s.ReadAt(b.Context(), buf, i*4096%(32<<20)); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(fmt.Sprintf("copy/%d", n), func(b *testing.B) { // the floor of read
			s := benchSyncer(b)
			v, _ := s.View(0, s.Size())
			b.SetBytes(int64(n))
			for i := int64(0); b.Loop(); i++ {
				copy(buf, v[i*4096%(32<<20):])
			}
		})
		b.Run(fmt.Sprintf("view/%d", n), func(b *testing.B) {
			s := benchSyncer(b)
			b.ReportAllocs()
			for i := int64(0); b.Loop(); i++ {
				if _, ok := s.View(i*4096%(32<<20), int64(n)); !ok {
					b.Fatal("not local")
				}
			}
		})
		b.Run(fmt.Sprintf("write/%d", n), func(b *testing.B) {
			s := benchSyncer(b)
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for i := int64(0); b.Loop(); i++ {
				if err := s.WriteAt(b.Context(), buf, i*4096%(32<<20)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkPull pulls 256 MiB at 20 ms RTT with a window of 8 MiB: 400 MiB/s is the bound.
func BenchmarkPull(b *testing.B) {
	for _, rtt := range []time.Duration{0, 20 * time.Millisecond} {
		b.Run(rtt.String(), func(b *testing.B) {
			const size = 256 << 20
			b.SetBytes(size)
			for b.Loop() {
				s := mountPipe(b, &pipe{size: size, rtt: rtt})
				puller := StartPuller(s, PullOptions{Workers: 16})
				<-puller.Done()
			}
		})
	}
}
