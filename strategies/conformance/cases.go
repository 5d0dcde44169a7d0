package conformance

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies"
	"memsync/strategies/region"
	"memsync/strategies/replay"
	"memsync/strategies/storetest"
)

// TestBytes: at every size, all bytes and those around every edge are the source's.
func (s suite) TestBytes(t *testing.T) {
	page, chunk := region.PageSize(), s.chunk()
	sizes := []int64{1, page - 1, page, page + 1, chunk - 1, chunk, chunk + 1, 3 * chunk, 5*chunk + page + 7, 2<<20 + chunk + 5}
	slices.Sort(sizes)
	for _, size := range slices.Compact(sizes) {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			ctx := within(t)
			source := storetest.Seeded(region.Content{Seed: uint64(size)}, size)
			want := source.Snapshot()
			g := s.mount(t, source, nil)
			edges := []int64{0, 1, 7, page - 1, page, page + 1, chunk - 1, chunk, chunk + 1, 2*chunk - 1, 2*chunk + 1, size / 2, size - 1}
			for _, off := range edges {
				for _, n := range []int64{1, 2, page - 1, page + 1, chunk + 2} {
					if off >= 0 && off < size {
						g.expect(ctx, want, off, min(n, size-off))
					}
				}
			}
			g.expect(ctx, want, 0, size)
			if err := same(source.Snapshot(), want, 0); err != nil {
				t.Errorf("reading changed the source: %v", err)
			}
		})
	}
}

// TestProgram: a random program of reads, writes and barriers does to the
// region what it does to a plain slice.
func (s suite) TestProgram(t *testing.T) {
	r := rand.New(rand.NewPCG(replay.Seed(t), 1))
	ctx := within(t)
	size := 9*s.chunk() + 1 + r.Int64N(2*s.chunk())
	source := storetest.Seeded(region.Content{Seed: 3}, size)
	want := source.Snapshot()
	g := s.mount(t, source, nil, "push_interval=5ms")
	for i := range 400 {
		off := r.Int64N(size)
		n := 1 + r.Int64N(min(3*s.chunk(), size-off))
		if r.IntN(3) > 0 {
			n = min(n, 1+r.Int64N(100))
		}
		switch k := r.IntN(12); {
		case k < 5 && s.can(strategies.Writes):
			p := make([]byte, n)
			region.Content{Seed: 3, Generation: uint64(i) + 1}.Fill(p, off)
			copy(want[off:], p)
			if err := g.write(ctx, p, off); err != nil {
				t.Fatal(err)
			}
		case k == 5 && s.can(strategies.Writes):
			g.barrier(ctx)
			if err := same(source.Snapshot(), want, 0); err != nil {
				t.Fatalf("step %d: source after Sync: %v", i, err)
			}
		default:
			g.expect(ctx, want, off, n)
		}
	}
	g.expect(ctx, want, 0, size)
	g.close(ctx)
	if err := same(source.Snapshot(), want, 0); err != nil {
		t.Errorf("source after Close: %v", err)
	}
}

// TestWriteSizes: writes of every size at every alignment arrive, and nothing beside them changes.
func (s suite) TestWriteSizes(t *testing.T) {
	s.need(t, strategies.Writes)
	page, chunk := region.PageSize(), s.chunk()
	size := 6*chunk + 11
	lengths := []int64{1, page - 1, page, page + 1, chunk - 1, chunk, chunk + 1, 3*chunk + 5}
	for _, off := range []int64{0, 1, page - 1, page, chunk - 1, chunk, chunk + 1, size - 1} {
		ctx := within(t)
		source := storetest.Seeded(region.Content{Seed: 9}, size)
		want := source.Snapshot()
		g := s.mount(t, source, nil)
		for i, n := range lengths {
			p := make([]byte, min(n, size-off))
			region.Content{Seed: 9, Generation: uint64(i) + 1}.Fill(p, off)
			copy(want[off:], p)
			if err := g.write(ctx, p, off); err != nil {
				t.Fatal(err)
			}
			g.barrier(ctx)
			if err := same(source.Snapshot(), want, 0); err != nil {
				t.Fatalf("write of %d at %d: source: %v", n, off, err)
			}
			g.expect(ctx, want, 0, size)
		}
		g.end()
	}
}

// TestConcurrent: several threads of the workload at once, each the writer of
// words of its own between those of the others.
func (s suite) TestConcurrent(t *testing.T) {
	seed := replay.Seed(t)
	ctx := within(t)
	const threads, word = 4, 24 // bytes; words of one thread lie threads x word apart
	size := 4*s.chunk() + 1000
	source := storetest.Seeded(region.Content{Seed: 5}, size)
	want := source.Snapshot()
	g := s.mount(t, source, nil, "push_interval=1ms")
	var wg sync.WaitGroup
	for k := range int64(threads) {
		r := rand.New(rand.NewPCG(seed, uint64(k)))
		wg.Go(func() {
			for i := range 150 {
				off := (r.Int64N(size/(threads*word))*threads + k) * word
				p := want[off:min(off+word, size)] // this thread's own
				switch {
				case r.IntN(2) == 0 && s.can(strategies.Writes):
					region.Content{Seed: 5, Generation: uint64(i) + 1}.Fill(p, off)
					if err := g.write(ctx, p, off); err != nil {
						t.Error(err)
						return
					}
				case r.IntN(30) == 0 && s.can(strategies.Writes):
					if err := errors.Join(g.toucher.sync(ctx), g.Mount.Sync(ctx)); err != nil {
						t.Error(err)
						return
					}
				case r.IntN(10) == 0:
					if _, err := g.read(ctx, 0, int(size)); err != nil {
						t.Error(err)
						return
					}
				default:
					got, err := g.read(ctx, off, len(p))
					if err == nil {
						err = same(got, p, off)
					}
					if err != nil {
						t.Error(err)
						return
					}
				}
				_ = g.Stats()
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	g.expect(ctx, want, 0, size)
	g.close(ctx)
	if err := same(source.Snapshot(), want, 0); err != nil {
		t.Errorf("source after Close: %v", err)
	}
}

// TestSync: after msync and Sync the source has what was written before; after
// Close, all. Stats say so.
func (s suite) TestSync(t *testing.T) {
	s.need(t, strategies.Writes)
	ctx := within(t)
	size := 3*s.chunk() + 77
	source := storetest.Seeded(region.Content{Seed: 1}, size)
	want := source.Snapshot()
	g := s.mount(t, source, nil, "push_interval=1h")
	for i := range 5 {
		p := want[100*i : int(size)-100*i]
		region.Content{Seed: 1, Generation: uint64(i) + 1}.Fill(p, int64(100*i))
		if err := g.write(ctx, p, int64(100*i)); err != nil {
			t.Fatal(err)
		}
		g.barrier(ctx)
		if err := same(source.Snapshot(), want, 0); err != nil {
			t.Fatalf("source after Sync %d: %v", i, err)
		}
	}
	if st := g.Stats(); st.PushBytes < size || st.PushRequests == 0 {
		t.Errorf("%d bytes were written, but Stats says %+v", size, st)
	}
	region.Content{Seed: 1, Generation: 9}.Fill(want[5:50], 5)
	if err := g.write(ctx, want[5:50], 5); err != nil {
		t.Fatal(err)
	}
	g.close(ctx)
	if err := same(source.Snapshot(), want, 0); err != nil {
		t.Errorf("source after Close: %v", err)
	}
}

// TestClose: an unused mount closes, a second Close is harmless, and the
// workload's late access gets an error or its own memory, but does not hang.
func (s suite) TestClose(t *testing.T) {
	ctx := within(t)
	g := s.mount(t, storetest.Seeded(region.Content{}, 3*s.chunk()), nil)
	if _, err := g.read(ctx, 0, 1); err != nil {
		t.Fatal(err)
	}
	g.close(ctx)
	if err := g.Mount.Close(ctx); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if err := g.Mount.Sync(ctx); err != nil && !errors.Is(err, region.ErrClosed) {
		t.Errorf("Sync after Close: %v, want nil or ErrClosed", err)
	}
	for range 3 { // nothing builds up
		s.mount(t, storetest.Seeded(region.Content{}, s.chunk()), nil).end()
	}
}

// TestReadOnly: stores to a region that was mounted read-only are refused.
func (s suite) TestReadOnly(t *testing.T) {
	ctx := within(t)
	source := storetest.Seeded(region.Content{Seed: 8}, 2*s.chunk()+9)
	want := source.Snapshot()
	g := s.mount(t, source, func(o *strategies.Options) { o.ReadOnly = true })
	if a := g.Attachment(); !a.ReadOnly && s.can(strategies.Writes) {
		t.Error("the attachment does not say that it is read-only")
	}
	g.expect(ctx, want, 0, source.Size())
	if g.Attachment().ReadOnly {
		if err := g.write(ctx, []byte("x"), 1); !errors.Is(err, region.ErrReadOnly) {
			t.Errorf("write: %v, want ErrReadOnly", err)
		}
		if g.Attachment().Kind == strategies.AttachPath {
			if err := mapWritable(g.Attachment().Path); err == nil {
				t.Error("the device can be mapped for writing")
			}
		}
	}
	g.close(ctx)
	if err := same(source.Snapshot(), want, 0); err != nil {
		t.Errorf("source: %v", err)
	}
}

// mapWritable tries to get a writable shared mapping, of which it touches no byte.
// (A block device that is read-only can be opened for writing, but not mapped or written.)
func mapWritable(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	p, err := unix.Mmap(int(f.Fd()), 0, 1, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	return unix.Munmap(p)
}

// TestErrors: a source that fails reads gives the workload an error, not wrong
// bytes and no hang; when it works again, so does the mount.
func (s suite) TestErrors(t *testing.T) {
	ctx := within(t)
	size := 64*s.chunk() + 4<<20
	source := storetest.Seeded(region.Content{Seed: 4}, size)
	want := source.Snapshot()
	f := storetest.NewFaulty(source)
	f.Fail(storetest.Read, errInjected, 0)
	g, err := s.tryMount(t, f, nil, "pull_first=0")
	if s.can(strategies.LocalOnly) || s.can(strategies.Copies) {
		if err == nil {
			t.Error("Mount reads all of the source and returned no error")
		}
		return
	}
	if err != nil {
		t.Fatalf("Mount of a source that cannot be read for the moment: %v", err)
	}
	g.ended = true // a mount may report the error once more when it is closed
	if _, err := g.read(ctx, 10, 100); !errors.Is(err, errAccess) {
		t.Fatalf("read of a source that fails: %v", err)
	}
	f.Pass(storetest.Read)
	for off := int64(10); ; {
		p, err := g.read(ctx, off, 100)
		if err == nil {
			if err := same(p, want[off:off+100], off); err != nil {
				t.Fatal(err)
			}
			break
		}
		if !errors.Is(err, errAccess) {
			t.Fatalf("the source works again, but the mount does not: %v", err)
		}
		if g.Attachment().Kind == strategies.AttachFault {
			off = size - 200 // a page that could not be filled stays poisoned in that mapping; others work
		}
		time.Sleep(time.Millisecond) // a retry may be due first
	}
	if g.Attachment().Kind != strategies.AttachFault {
		g.expect(ctx, want, 0, size)
	}
	g.close(ctx)
}

// TestStalledRead: a source that does not answer blocks a reader until it does,
// or until the device's own deadline; Close ends in time nevertheless.
func (s suite) TestStalledRead(t *testing.T) {
	if s.can(strategies.LocalOnly) || s.can(strategies.Copies) {
		t.Skip("reads nothing after Mount")
	}
	ctx := within(t)
	size := 64*s.chunk() + 4<<20
	source := storetest.Seeded(region.Content{Seed: 6}, size)
	want := source.Snapshot()
	f := storetest.NewFaulty(source)
	f.Stall(storetest.Read)
	g := s.mount(t, f, nil, "pull_first=0")
	first := make(chan error, 1)
	go func() {
		p, err := g.read(ctx, 5, 100)
		if err == nil {
			err = same(p, want[5:105], 5)
		}
		first <- err
	}()
	for f.Count(storetest.Read) == 0 && ctx.Err() == nil {
		time.Sleep(time.Millisecond)
	}
	select {
	case err := <-first:
		t.Fatalf("the read did not wait for the source: %v", err)
	default:
	}
	f.Pass(storetest.Read)
	if err := <-first; err != nil {
		t.Fatalf("read of a source that is late: %v", err)
	}
	g.close(ctx)
}

// TestStalledReadDeadline: the device's deadline, where it has one, ends a read of a stalled source.
func (s suite) TestStalledReadDeadline(t *testing.T) {
	name, deadline, more := "", deadline, []string(nil)
	for _, p := range s.Strategy.Info().Params {
		switch {
		case s.Device == "nbd" && p.Name == "nbd_timeout": // whole seconds, for each connection; a new one would ask again
			name, deadline, more = p.Name, time.Second, []string{"nbd_connections=1", "nbd_dead_timeout=0s"}
		case s.Device != "nbd" && (p.Name == "request_timeout" || p.Name == "deadline"):
			name = p.Name
		}
	}
	if name == "" {
		t.Skip("has no parameter for it")
	}
	ctx := within(t)
	source := storetest.Seeded(region.Content{Seed: 6}, 8*s.chunk())
	f := storetest.NewFaulty(source)
	f.Stall(storetest.Read)
	g := s.mount(t, f, nil, append(more, "pull_first=0", name+"="+deadline.String())...)
	g.ended = true // a mount may report the error once more when it is closed
	begun := time.Now()
	if _, err := g.read(ctx, 5, 100); !errors.Is(err, errAccess) {
		t.Errorf("read of a stalled source: %v, want an error", err)
	}
	if d := time.Since(begun); d < deadline/2 || d > deadline+slack {
		t.Errorf("it ended after %v, want %v", d, deadline)
	}
	g.close(ctx)
}

// TestCloseStalled: Close in the middle of a read of a stalled source ends by its deadline, and so does the read.
func (s suite) TestCloseStalled(t *testing.T) {
	if s.can(strategies.LocalOnly) || s.can(strategies.Copies) {
		t.Skip("reads nothing after Mount")
	}
	ctx := within(t)
	f := storetest.NewFaulty(storetest.Seeded(region.Content{Seed: 6}, 8*s.chunk()))
	f.Stall(storetest.Read)
	g := s.mount(t, f, nil, "pull_first=0")
	g.ended = true // Close may return an error here
	read := make(chan error, 1)
	go func() {
		_, err := g.read(ctx, 5, 100)
		read <- err
	}()
	for f.Count(storetest.Read) == 0 && ctx.Err() == nil {
		time.Sleep(time.Millisecond)
	}
	begun := time.Now()
	closing, cancel := context.WithTimeout(ctx, deadline)
	defer cancel()
	err := g.Mount.Close(closing)
	if d := time.Since(begun); d > deadline+slack {
		t.Errorf("Close took %v with a deadline of %v: %v", d, deadline, err)
	}
	select {
	case err := <-read:
		if !errors.Is(err, errAccess) {
			t.Errorf("read during Close: %v, want an error", err)
		}
	case <-time.After(slack):
		t.Error("the read goes on after Close")
	}
	f.Pass(storetest.Read)
}

// TestSyncDeadline: Sync to a source that does not answer ends by its deadline,
// loses nothing, and succeeds later.
func (s suite) TestSyncDeadline(t *testing.T) {
	s.need(t, strategies.Writes)
	ctx := within(t)
	source := storetest.Seeded(region.Content{Seed: 2}, 4*s.chunk())
	want := source.Snapshot()
	f := storetest.NewFaulty(source)
	g := s.mount(t, f, nil, "push_interval=1h")
	region.Content{Seed: 2, Generation: 1}.Fill(want[10:5000], 10)
	if err := g.write(ctx, want[10:5000], 10); err != nil {
		t.Fatal(err)
	}
	f.Stall(storetest.Flush)
	flushed := make(chan error, 1)
	go func() { flushed <- g.toucher.sync(ctx) }() // may wait for the source, by fsync
	begun := time.Now()
	syncing, cancel := context.WithTimeout(ctx, deadline)
	defer cancel()
	err := g.Mount.Sync(syncing)
	if !errors.Is(err, context.DeadlineExceeded) && err != nil {
		t.Errorf("Sync: %v, want DeadlineExceeded", err)
	}
	if d := time.Since(begun); d > deadline+slack {
		t.Errorf("Sync took %v with a deadline of %v", d, deadline)
	}
	f.Pass(storetest.Flush)
	if err := <-flushed; err != nil {
		t.Fatal(err)
	}
	g.barrier(ctx)
	if err := same(source.Snapshot(), want, 0); err != nil {
		t.Errorf("source after Sync: %v", err)
	}
	g.close(ctx)
}

// TestWriteErrors: a source that fails writes makes Sync fail; the bytes are kept and arrive when it works again.
func (s suite) TestWriteErrors(t *testing.T) {
	s.need(t, strategies.Writes)
	ctx := within(t)
	source := storetest.Seeded(region.Content{Seed: 2}, 4*s.chunk())
	want := source.Snapshot()
	f := storetest.NewFaulty(source)
	g := s.mount(t, f, nil, "push_interval=1h")
	f.Fail(storetest.Write, errInjected, 0)
	region.Content{Seed: 2, Generation: 1}.Fill(want[10:5000], 10)
	if err := g.write(ctx, want[10:5000], 10); err != nil {
		t.Fatal(err)
	}
	// The kernel forgets a page that it could not write back; so the workload must learn of it.
	if err := errors.Join(g.toucher.sync(ctx), g.Mount.Sync(ctx)); err == nil {
		t.Error("neither msync nor Sync says that the source refused the bytes")
	}
	f.Pass(storetest.Write)
	if err := g.write(ctx, want[10:5000], 10); err != nil {
		t.Fatal(err)
	}
	g.barrier(ctx)
	if err := same(source.Snapshot(), want, 0); err != nil {
		t.Errorf("source after Sync: %v", err)
	}
	g.close(ctx)
}

// TestMountDeadline: Mount of a source that does not answer ends by its
// deadline or does without; Mount with a context that has ended does nothing.
func (s suite) TestMountDeadline(t *testing.T) {
	f := storetest.NewFaulty(storetest.Seeded(region.Content{}, 4*s.chunk()))
	f.Stall(storetest.Read)
	f.Stall(storetest.Flush)
	for _, d := range []time.Duration{0, deadline} {
		dir := t.TempDir()
		left := watch(t, dir)
		o := s.options(t, dir, "pull_first=1MiB")
		r, stop := s.serve(t, f, t.TempDir(), o.Params)
		ctx, cancel := context.WithTimeout(t.Context(), d)
		begun := time.Now()
		m, err := s.Strategy.Mount(ctx, r, o)
		if took := time.Since(begun); took > d+slack {
			t.Errorf("Mount took %v with a deadline of %v", took, d)
		}
		if err == nil {
			closing, cancel := context.WithTimeout(t.Context(), patience())
			if err := m.Close(closing); err != nil {
				t.Errorf("close the mount: %v", err)
			}
			cancel()
		} else if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Mount: %v, want DeadlineExceeded", err)
		}
		cancel()
		stop()
		left()
	}
}

// TestGone: a source that is gone ends the mount in an error, never in a hang, and leaves nothing over.
func (s suite) TestGone(t *testing.T) {
	if s.Transport == nil {
		t.Skip("needs a connection that can be lost")
	}
	ctx := within(t)
	size := 64*s.chunk() + 4<<20
	f := storetest.NewFaulty(storetest.Seeded(region.Content{Seed: 6}, size))
	g := s.mount(t, f, nil, "pull_first=0")
	g.ended = true
	if _, err := g.read(ctx, 5, 100); err != nil {
		t.Fatal(err)
	}
	f.Stall(storetest.Read)
	read := make(chan error, 1)
	go func() {
		_, err := g.read(ctx, 0, int(size))
		read <- err
	}()
	n := f.Count(storetest.Read)
	for end := time.Now().Add(time.Second); f.Count(storetest.Read) == n && time.Now().Before(end); {
		time.Sleep(time.Millisecond) // by then all may be local
	}
	g.stopServer()
	select {
	case err := <-read:
		if err != nil && !errors.Is(err, errAccess) {
			t.Errorf("read of a source that is gone: %v", err)
		}
	case <-ctx.Done():
		t.Error("the read waits for a source that is gone")
	}
	begun := time.Now()
	closing, cancel := context.WithTimeout(ctx, deadline)
	defer cancel()
	err := g.Mount.Close(closing)
	if d := time.Since(begun); d > deadline+slack {
		t.Errorf("Close took %v with a deadline of %v: %v", d, deadline, err)
	}
}
