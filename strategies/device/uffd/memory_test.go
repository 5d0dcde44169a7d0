package uffd_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/rpc"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync"
	"testing"
	"time"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"memsync/strategies/device/uffd"
	"memsync/strategies/region"
)

// The workload is this binary again: it maps the memfd (descriptor 4), registers
// the mapping with a userfaultfd and does what it is told on a socket (descriptor 3).
const childEnv = "MEMSYNC_UFFD_MEMORY_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) == "" {
		goleak.VerifyTestMain(m)
		return
	}
	conn, err := net.FileConn(os.NewFile(3, "commands"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	s := rpc.NewServer()
	if err := s.Register(&Child{}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	s.ServeConn(conn)
}

// Child is the workload; its methods have the form that net/rpc asks for.
type Child struct {
	mem  []byte
	uffd *os.File
	rng  *rand.Rand
	want []byte // what the region must hold
}

// Mapped is where the mapping is, and the number of the userfaultfd in the child.
type Mapped struct {
	Base uintptr
	FD   int
}

// Map maps size bytes of the memfd.
func (c *Child) Map(a struct {
	Size     int64
	ReadOnly bool
}, r *Mapped) error {
	prot, mode := unix.PROT_READ|unix.PROT_WRITE, uint64(uffd.UFFDIO_REGISTER_MODE_MISSING|uffd.UFFDIO_REGISTER_MODE_MINOR|uffd.UFFDIO_REGISTER_MODE_WP)
	if a.ReadOnly {
		prot, mode = unix.PROT_READ, mode&^uffd.UFFDIO_REGISTER_MODE_WP
	}
	mem, err := unix.MmapPtr(4, 0, nil, uintptr(a.Size), prot, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	c.mem = unsafe.Slice((*byte)(mem), a.Size)
	c.uffd, _, err = uffd.New(uffd.UFFD_FEATURE_MISSING_SHMEM | uffd.UFFD_FEATURE_MINOR_SHMEM | uffd.UFFD_FEATURE_POISON |
		uffd.UFFD_FEATURE_PAGEFAULT_FLAG_WP | uffd.UFFD_FEATURE_WP_UNPOPULATED | uffd.UFFD_FEATURE_WP_HUGETLBFS_SHMEM | uffd.UFFD_FEATURE_THREAD_ID)
	if err != nil {
		return err
	}
	*r = Mapped{uintptr(mem), int(c.uffd.Fd())}
	return uffd.Register(c.uffd, uintptr(mem), a.Size, mode)
}

func guarded(f func()) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("fault: %v", r)
		}
	}()
	f()
	return nil
}

// Range is bytes of the region; Data of a store.
type Range struct {
	Off, N int64
	Data   []byte
}

// Load copies out of the mapping.
func (c *Child) Load(a Range, out *[]byte) error {
	*out = make([]byte, a.N)
	return guarded(func() { copy(*out, c.mem[a.Off:]) })
}

// Store copies into the mapping.
func (c *Child) Store(a Range, _ *struct{}) error {
	return guarded(func() { copy(c.mem[a.Off:], a.Data) })
}

// Pwrite writes past the mapping, by the memfd's descriptor.
func (c *Child) Pwrite(a Range, _ *struct{}) error {
	_, err := unix.Pwrite(4, a.Data, a.Off)
	return err
}

// MapAgain makes another writable mapping.
func (c *Child) MapAgain(_ struct{}, _ *struct{}) error {
	mem, err := unix.MmapPtr(4, 0, nil, uintptr(len(c.mem)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err == nil {
		err = unix.MunmapPtr(mem, uintptr(len(c.mem)))
	}
	return err
}

// Forget gives the page tables back (MADV_DONTNEED); the memory stays.
func (c *Child) Forget(_ struct{}, _ *struct{}) error { return unix.Madvise(c.mem, unix.MADV_DONTNEED) }

// Program makes n random loads, stores and MADV_DONTNEEDs, and checks each load
// against a slice of its own, which begins as Expect.
func (c *Child) Program(a struct {
	Seed   uint64
	N      int
	Expect []byte
}, out *[]byte) error {
	c.rng, c.want = rand.New(rand.NewPCG(a.Seed, 2)), a.Expect
	for i := range a.N {
		off := c.rng.Int64N(int64(len(c.want)))
		n := 1 + c.rng.Int64N(min(9000, int64(len(c.want))-off))
		var err error
		switch k := c.rng.IntN(20); {
		case k == 0:
			err = c.Forget(struct{}{}, nil)
		case k < 10:
			for j := range n {
				c.want[off+j] = byte(c.rng.Uint32())
			}
			err = guarded(func() { copy(c.mem[off:], c.want[off:off+n]) })
		default:
			err = guarded(func() {
				if !bytes.Equal(c.mem[off:off+n], c.want[off:off+n]) {
					panic(fmt.Sprintf("step %d: %d bytes at %d are not what was written", i, n, off))
				}
			})
		}
		if err != nil {
			return fmt.Errorf("step %d, %d bytes at %d: %w", i, n, off, err)
		}
	}
	*out = c.want
	return nil
}

// owner is the simplest Owner: a chunk is local or not, dirty or not.
type owner struct {
	m     *uffd.Memory
	chunk int64

	mu           sync.Mutex // of all below; not held over calls of m
	source       []byte
	local, dirty map[int64]bool
	pushing      map[int64]bool // its bytes are on their way to source
	pulling      map[int64]chan struct{}
	fail         error
	full         bool
	drops        int
	throttled    int
}

func (o *owner) each(off, n int64, f func(lo int64) bool) bool {
	for lo := off &^ (o.chunk - 1); lo < off+n; lo += o.chunk {
		if !f(lo) {
			return false
		}
	}
	return true
}

func (o *owner) Has(off, n int64) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.each(off, n, func(lo int64) bool { return o.local[lo] })
}

func (o *owner) Pull(ctx context.Context, off, n int64) (err error) {
	o.each(off, n, func(lo int64) bool { err = o.pull(ctx, lo); return err == nil })
	return err
}

func (o *owner) pull(ctx context.Context, lo int64) error {
	o.mu.Lock()
	for o.pulling[lo] != nil {
		wait := o.pulling[lo]
		o.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return ctx.Err()
		}
		o.mu.Lock()
	}
	if o.local[lo] || o.fail != nil {
		defer o.mu.Unlock()
		if o.local[lo] {
			return nil
		}
		return o.fail
	}
	done := make(chan struct{})
	o.pulling[lo] = done
	p := bytes.Clone(o.source[lo:min(lo+o.chunk, int64(len(o.source)))])
	o.mu.Unlock()
	err := o.m.WriteAt(ctx, p, lo)
	o.mu.Lock()
	defer o.mu.Unlock()
	o.local[lo] = err == nil
	delete(o.pulling, lo)
	close(done)
	return err
}

func (o *owner) Stored(off, n int64) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.local[off] {
		return false
	}
	o.dirty[off] = true
	return true
}

func (o *owner) Full() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.full
}

func (o *owner) Throttle(ctx context.Context) error {
	o.mu.Lock()
	o.throttled++
	o.mu.Unlock()
	for o.Full() && ctx.Err() == nil {
		time.Sleep(time.Millisecond)
	}
	return ctx.Err()
}

// push writes the chunk at lo back if it is dirty.
func (o *owner) push(t *testing.T, lo int64) {
	n := min(o.chunk, int64(len(o.source))-lo)
	o.mu.Lock()
	busy := o.pushing[lo]
	o.pushing[lo] = true
	o.mu.Unlock()
	if busy {
		return
	}
	taken := false
	err := o.m.Seal(lo, n, func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		taken, o.dirty[lo] = o.dirty[lo], false
	})
	p := make([]byte, n)
	if err = errors.Join(err, o.m.ReadAt(t.Context(), p, lo)); err != nil {
		t.Error(err)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if taken {
		copy(o.source[lo:], p)
	}
	o.pushing[lo] = false
}

func (o *owner) drop(t *testing.T, lo int64) {
	err := o.m.Drop(lo, min(o.chunk, int64(len(o.source))-lo), func() bool {
		o.mu.Lock()
		defer o.mu.Unlock()
		if !o.local[lo] || o.dirty[lo] || o.pushing[lo] || o.pulling[lo] != nil {
			return false
		}
		o.local[lo] = false
		o.drops++
		return true
	})
	if err != nil {
		t.Error(err)
	}
}

type rig struct {
	*owner
	*rpc.Client
}

// serve makes a memory of the content, and a child that has mapped it.
func serve(t *testing.T, size, chunk int64, o uffd.MemoryOptions) rig {
	t.Helper()
	if err := uffd.ProbeMemory(); errors.Is(err, region.ErrNotSupported) {
		if _, has := os.Stat("/proc/sys/vm/unprivileged_userfaultfd"); has == nil && runtime.GOARCH == "amd64" && os.Getenv("MEMSYNC_LAB_KERNEL") == "" {
			t.Fatalf("a kernel that has userfaultfd has write-protection of shared memory too, from Linux 5.19 on: %v", err)
		}
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	o.Chunk = chunk
	m, err := uffd.NewMemory(size, o)
	if err != nil {
		t.Fatal(err)
	}
	own := &owner{m: m, chunk: chunk, source: make([]byte, size), local: map[int64]bool{}, dirty: map[int64]bool{}, pushing: map[int64]bool{}, pulling: map[int64]chan struct{}{}}
	region.Content{Seed: uint64(size)}.Fill(own.source, 0)
	m.Own(own)
	if err := own.Pull(t.Context(), 0, 1); err != nil { // one chunk is there before the workload is
		t.Fatal(err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	mine, theirs := os.NewFile(uintptr(pair[0]), "mine"), os.NewFile(uintptr(pair[1]), "theirs")
	defer mine.Close()
	defer theirs.Close()
	conn, err := net.FileConn(mine)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"=1", "GODEBUG=asyncpreemptoff=1", "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{theirs, m.File()}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	client := rpc.NewClient(conn)
	t.Cleanup(func() {
		stuck := time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() })
		_ = client.Close()
		_ = cmd.Wait()
		stuck.Stop()
		if err := m.Close(); err != nil {
			t.Error("close:", err)
		}
	})
	var at Mapped
	if err := client.Call("Child.Map", struct {
		Size     int64
		ReadOnly bool
	}{region.RoundUp(size, region.PageSize()), o.ReadOnly}, &at); err != nil {
		t.Fatal(err)
	}
	// pidfd_getfd(2) instead of SCM_RIGHTS: the child is ours.
	pidfd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	fd, err := unix.PidfdGetfd(pidfd, at.FD, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.ServeFaults(os.NewFile(uintptr(fd), "userfaultfd"), at.Base); err != nil {
		t.Fatal(err)
	}
	return rig{own, client}
}

// call calls with a deadline, since a fault that nobody answers is for ever.
func (r rig) call(t *testing.T, method string, args, reply any) error {
	t.Helper()
	c := r.Go("Child."+method, args, reply, make(chan *rpc.Call, 1))
	select {
	case <-c.Done:
		return c.Error
	case <-time.After(15 * time.Second):
		t.Fatalf("%s hangs", method)
		return nil
	}
}

// TestMemoryProgram: whatever is pushed and dropped meanwhile, the workload reads
// what it wrote, and what was written is at the source in the end. TEST_SEED
// replays one schedule; MEMORY_SCHEDULES says how many (8).
func TestMemoryProgram(t *testing.T) {
	seed, n := rand.Uint64N(1<<32), 8
	if v, err := strconv.ParseUint(os.Getenv("TEST_SEED"), 10, 64); err == nil {
		seed, n = v, 1
	}
	if v, err := strconv.Atoi(os.Getenv("MEMORY_SCHEDULES")); err == nil {
		n = v
	}
	var drops, stores int64
	for range n {
		r := rand.New(rand.NewPCG(seed, 1))
		chunk := region.PageSize() << r.IntN(4)
		size := 1 + r.Int64N(12*chunk)
		g := serve(t, size, chunk, uffd.MemoryOptions{Evicts: true})
		stop := make(chan struct{})
		var wg sync.WaitGroup
		for k := range uint64(2) {
			r := rand.New(rand.NewPCG(seed, 10+k))
			wg.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					lo := r.Int64N(region.Chunks(size, chunk)) * chunk
					if r.IntN(2) == 0 {
						g.push(t, lo)
					} else {
						g.drop(t, lo)
					}
				}
			})
		}
		var want []byte
		err := g.call(t, "Program", struct {
			Seed   uint64
			N      int
			Expect []byte
		}{seed, 300, bytes.Clone(g.source)}, &want)
		close(stop)
		wg.Wait()
		if err != nil {
			t.Fatalf("TEST_SEED=%d: %v", seed, err)
		}
		for lo := int64(0); lo < size; lo += chunk {
			g.push(t, lo)
		}
		if !bytes.Equal(g.source, want) {
			t.Fatalf("TEST_SEED=%d: the source lacks what was written", seed)
		}
		drops += int64(g.drops)
		stores += g.m.Stats().Stores
		seed++
	}
	t.Logf("%d schedules, %d chunks dropped, %d first stores", n, drops, stores)
	if drops == 0 || stores == 0 {
		t.Error("nothing was dropped or stored: the test shows nothing")
	}
}

// TestMemoryOtherWriters: writes that userfaultfd does not see are refused by the kernel.
func TestMemoryOtherWriters(t *testing.T) {
	for _, readOnly := range []bool{false, true} {
		g := serve(t, 200000, 65536, uffd.MemoryOptions{ReadOnly: readOnly})
		err := g.call(t, "Pwrite", Range{Off: 10, Data: []byte("x")}, nil)
		if err == nil || err.Error() != unix.EPERM.Error() {
			t.Errorf("pwrite to the memfd: %v, want EPERM", err)
		}
		if err := g.call(t, "MapAgain", struct{}{}, nil); err == nil || err.Error() != unix.EPERM.Error() {
			t.Errorf("another writable mapping: %v, want EPERM", err)
		}
		if err := g.m.Drop(0, 65536, func() bool { return true }); !errors.Is(err, region.ErrNotSupported) {
			t.Errorf("Drop of a sealed memory: %v", err)
		}
		var got []byte
		if err := g.call(t, "Load", Range{Off: 0, N: 200000}, &got); err != nil || !bytes.Equal(got, g.source) {
			t.Errorf("the region is not what it was: %v", err)
		}
		if readOnly {
			if err := g.call(t, "Store", Range{Off: 5, Data: []byte("x")}, nil); err == nil {
				t.Error("a store to a read-only region is possible")
			}
		}
	}
}

// TestMemoryRepair: a chunk that cannot be had raises SIGBUS, others do not; it
// can be read when the source works again, without the workload's doing.
func TestMemoryRepair(t *testing.T) {
	g := serve(t, 300000, 65536, uffd.MemoryOptions{})
	g.mu.Lock()
	g.fail = errors.New("no source")
	g.mu.Unlock()
	var got []byte
	if err := g.call(t, "Load", Range{Off: 70000, N: 10}, &got); err == nil {
		t.Fatal("a chunk that cannot be had can be read")
	}
	if g.m.Err() == nil {
		t.Error("Err does not say why")
	}
	if err := g.call(t, "Load", Range{Off: 10, N: 10}, &got); err != nil {
		t.Errorf("another chunk: %v", err)
	}
	g.mu.Lock()
	g.fail = nil
	g.mu.Unlock()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		err := g.call(t, "Load", Range{Off: 65536, N: 65536}, &got)
		if err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the source works again, but the chunk does not: %v", err)
		}
	}
	if !bytes.Equal(got, g.source[65536:2*65536]) {
		t.Error("the chunk came back with other bytes")
	}
	if err := g.call(t, "Store", Range{Off: 65536, Data: []byte("new")}, nil); err != nil {
		t.Error(err)
	}
	g.push(t, 65536)
	if !bytes.HasPrefix(g.source[65536:], []byte("new")) {
		t.Error("a store to a repaired chunk was not seen")
	}
}

// TestMemoryThrottle: a first store waits while too much is dirty; a later one
// to the same chunk, and a load, do not.
func TestMemoryThrottle(t *testing.T) {
	g := serve(t, 4*65536, 65536, uffd.MemoryOptions{})
	if err := g.call(t, "Store", Range{Off: 0, Data: []byte("a")}, nil); err != nil {
		t.Fatal(err)
	}
	g.mu.Lock()
	g.full = true
	g.mu.Unlock()
	if err := g.call(t, "Store", Range{Off: 1, Data: []byte("b")}, nil); err != nil {
		t.Fatal(err)
	}
	waiting := g.Go("Child.Store", Range{Off: 65536, Data: []byte("c")}, nil, make(chan *rpc.Call, 1))
	for throttled := 0; throttled == 0; time.Sleep(time.Millisecond) {
		g.mu.Lock()
		throttled = g.throttled
		g.mu.Unlock()
	}
	select {
	case <-waiting.Done:
		t.Error("the store did not wait")
	case <-time.After(20 * time.Millisecond):
	}
	g.mu.Lock()
	g.full = false
	g.mu.Unlock()
	if c := <-waiting.Done; c.Error != nil {
		t.Error(c.Error)
	}
}
