package dirty

import (
	"bytes"
	"encoding/binary"
	"encoding/gob"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"memsync/strategies/region"
	"memsync/strategies/replay"
)

const page = 4096

// The writer is a process of its own (docs/deadlocks.md, case 1): this test
// binary with an argument.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "writer" {
		if err := child(); err != nil {
			fmt.Fprintln(os.Stderr, "writer:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

type command struct {
	Op, Method string
	Off        int64
	For        time.Duration // of a storm
	Seed       uint64
}

type answer struct {
	Base uintptr
	Err  string
}

// child maps descriptor 4 twice and does as told over the socket, descriptor 3.
func child() error {
	c, err := net.FileConn(os.NewFile(3, "socket"))
	if err != nil {
		return err
	}
	f := os.NewFile(4, "region")
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	var mem [2][]byte
	for i := range mem {
		if mem[i], err = unix.Mmap(4, 0, int(fi.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
			return err
		}
	}
	in, out := gob.NewDecoder(c), gob.NewEncoder(c)
	for {
		var cmd command
		if err := in.Decode(&cmd); err != nil {
			return nil
		}
		a := answer{Base: addressOf(mem[0])}
		var err error
		switch cmd.Op {
		case "arm":
			u, aerr := Arm(cmd.Method, mem[0])
			if err = aerr; u != nil {
				_, _, err = c.(*net.UnixConn).WriteMsgUnix([]byte{1}, unix.UnixRights(int(u.Fd())), nil)
				u.Close()
			} else {
				_, _ = c.Write([]byte{0})
			}
		case "store":
			mem[0][cmd.Off]++
		case "other-mapping":
			mem[1][cmd.Off]++
		case "pwrite":
			_, err = f.WriteAt([]byte{mem[0][cmd.Off] + 1}, cmd.Off)
		case "map":
			var m []byte
			if m, err = unix.Mmap(4, 0, int(fi.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
				err = unix.Munmap(m)
			}
		case "storm":
			r := rand.New(rand.NewPCG(cmd.Seed, 1))
			// By time: how long a store takes depends on who looks meanwhile.
			for i, end := 0, time.Now().Add(cmd.For); i%16 > 0 || time.Now().Before(end); i++ {
				off := r.Int64N(int64(len(mem[0])) / 8)
				binary.LittleEndian.PutUint64(mem[0][8*off:], uint64(i)+1)
			}
		}
		if err != nil {
			a.Err = err.Error()
		}
		if err := out.Encode(a); err != nil {
			return err
		}
	}
}

// peer is the writer's process, seen by the test.
type peer struct {
	t    *testing.T
	conn *net.UnixConn
	out  *gob.Encoder
	in   *gob.Decoder
	cmd  *exec.Cmd
}

func startWriter(t *testing.T, f *os.File) *peer {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	mine, theirs := os.NewFile(uintptr(pair[0]), "mine"), os.NewFile(uintptr(pair[1]), "theirs")
	c, err := net.FileConn(mine)
	mine.Close()
	if err != nil {
		t.Fatal(err)
	}
	p := &peer{t: t, conn: c.(*net.UnixConn), out: gob.NewEncoder(c), cmd: exec.Command("/proc/self/exe", "writer")}
	p.in = gob.NewDecoder(oneByOne{c})
	p.cmd.ExtraFiles = []*os.File{theirs, f}
	p.cmd.Stderr = os.Stderr
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	t.Cleanup(func() {
		p.conn.Close()
		if err := p.cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	return p
}

// oneByOne keeps gob from reading ahead, past the byte that carries a descriptor.
type oneByOne struct{ net.Conn }

func (o oneByOne) ReadByte() (byte, error) {
	var b [1]byte
	_, err := o.Read(b[:])
	return b[0], err
}

// ask may be called from any goroutine.
func (p *peer) ask(c command) (answer, error) {
	_ = p.conn.SetDeadline(time.Now().Add(20 * time.Second))
	if err := p.out.Encode(c); err != nil {
		return answer{}, fmt.Errorf("%s: %w", c.Op, err)
	}
	var a answer
	if err := p.in.Decode(&a); err != nil {
		return answer{}, fmt.Errorf("%s: %w", c.Op, err)
	}
	if a.Err != "" {
		return a, errors.New(a.Err)
	}
	return a, nil
}

func (p *peer) do(c command) answer {
	p.t.Helper()
	a, err := p.ask(c)
	if err != nil {
		p.t.Fatalf("%s: %v", c.Op, err)
	}
	return a
}

// arm has the writer arm itself and returns what to register.
func (p *peer) arm(method string, size int64) Writer {
	p.t.Helper()
	if err := p.out.Encode(command{Op: "arm", Method: method}); err != nil {
		p.t.Fatal(err)
	}
	_ = p.conn.SetDeadline(time.Now().Add(20 * time.Second))
	var b [1]byte
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := p.conn.ReadMsgUnix(b[:], oob)
	if err != nil {
		p.t.Fatal(err)
	}
	w := Writer{PID: p.cmd.Process.Pid, Length: size}
	if n > 0 {
		m, err := unix.ParseSocketControlMessage(oob[:n])
		if err != nil {
			p.t.Fatal(err)
		}
		fds, err := unix.ParseUnixRights(&m[0])
		if err != nil {
			p.t.Fatal(err)
		}
		w.Uffd = os.NewFile(uintptr(fds[0]), "uffd")
	}
	var a answer
	if err := p.in.Decode(&a); err != nil || a.Err != "" {
		p.t.Fatal(err, a.Err)
	}
	w.Base = a.Base
	return w
}

// watched is a region with a writer and a detector.
type watched struct {
	Region
	Detector
	*peer
	method Method
}

// watch makes them; a method that this machine lacks is skipped, with the reason.
func watch(t *testing.T, m Method, size int64) *watched {
	t.Helper()
	if err := m.Probe(); errors.Is(err, region.ErrNotSupported) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	var f *os.File
	var err error
	if !m.Arms && m.Name != "hash" {
		f, err = os.Create(filepath.Join(t.TempDir(), "region"))
	} else {
		var fd int
		if fd, err = unix.MemfdCreate("region", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING); err == nil {
			f = os.NewFile(uintptr(fd), "region")
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(mem) })
	w := &watched{Region: Region{File: f, Mem: mem, Unit: page}, method: m}
	if w.Detector, err = m.Open(w.Region); errors.Is(err, region.ErrNotSupported) {
		t.Fatalf("the probe says that it works: %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	w.peer = startWriter(t, f)
	if m.Arms {
		if err := w.Add(w.arm(m.Name, region.RoundUp(size, page))); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

// pages returns the numbers of the pages that Collect reports.
func (w *watched) pages(t *testing.T) (found []int64) {
	t.Helper()
	last := int64(-1)
	err := w.Collect(t.Context(), func(off, n int64) {
		if off <= last || n <= 0 || off+n > int64(len(w.Mem)) {
			t.Fatalf("range [%d, +%d) after %d", off, n, last)
		}
		last = off + n
		for p := off / page; p*page < off+n; p++ {
			found = append(found, p)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// settle collects until there is nothing (mtime looks again while the time is fresh).
func (w *watched) settle(t *testing.T) {
	t.Helper()
	for until := time.Now().Add(5 * time.Second); time.Now().Before(until); time.Sleep(5 * time.Millisecond) {
		if len(w.pages(t)) == 0 || w.method.Name == "hash" {
			return
		}
	}
	t.Fatal("still dirty although nobody writes")
}

// Each method sees the kinds of writes that it says, and misses or forbids the others.
func TestSees(t *testing.T) {
	for _, m := range Methods() {
		t.Run(m.Name, func(t *testing.T) {
			w := watch(t, m, 64*page+100)
			if got := w.pages(t); len(got) != 65 {
				t.Errorf("the first look reports %d pages of 65", len(got))
			}
			for i, k := range []Kind{Store, OtherMapping, OtherProcess, Pwrite} {
				w.settle(t)
				off := int64(i+3) * 5 * page
				before := w.Mem[off]
				var err error
				if k == OtherProcess {
					w.Mem[off]++ // the test's own mapping
				} else {
					_, err = w.ask(command{Op: string(k), Off: off})
				}
				if err != nil {
					if k == Pwrite && m.Arms && bytes.Contains([]byte(err.Error()), []byte("not permitted")) {
						continue // sealed
					}
					t.Fatalf("%s: %v", k, err)
				}
				if w.Mem[off] == before {
					t.Fatalf("%s did not write", k)
				}
				got := w.pages(t)
				if sees := slices.Contains(m.Sees, k); sees != slices.Contains(got, off/page) {
					t.Errorf("%s: reported pages %v; the method says it sees it: %t", k, got, sees)
				}
				if m.Unit == "page" && len(got) > 1 {
					t.Errorf("%s: one page was written, %d are reported", k, len(got))
				}
			}
			if m.Arms {
				if a, err := w.ask(command{Op: "map"}); err == nil || a.Base == 0 {
					t.Errorf("a new writable mapping is possible, whose stores the method would miss (%v)", err)
				}
				if err := w.File.Truncate(page); err == nil {
					t.Error("the region can be truncated")
				}
			}
		})
	}
}

// Random stores: exactly the pages written are reported, each time.
func TestExact(t *testing.T) {
	for _, m := range Methods() {
		if m.Unit != "page" {
			continue
		}
		t.Run(m.Name, func(t *testing.T) {
			const n = 700
			w := watch(t, m, n*page)
			w.settle(t)
			r := rand.New(rand.NewPCG(replay.Seed(t), 2))
			for round := range 30 {
				var want []int64
				for range r.IntN(60) {
					p := r.Int64N(n)
					want = append(want, p)
					w.do(command{Op: "store", Off: p*page + r.Int64N(page)})
				}
				slices.Sort(want)
				want = slices.Compact(want)
				if got := w.pages(t); !slices.Equal(got, want) {
					t.Fatalf("round %d: pages %v, want %v", round, got, want)
				}
			}
		})
	}
}

// A copy that takes only what is reported, while the writer writes as fast as it
// can, equals the region once the writer has stopped: no update is lost.
func TestNoLostUpdate(t *testing.T) {
	for _, m := range Methods() {
		if slices.Contains(m.Sees, Store) {
			t.Run(m.Name, func(t *testing.T) {
				w := watch(t, m, 300*page)
				shadow := make([]byte, len(w.Mem))
				take := func() {
					if err := w.Collect(t.Context(), func(off, n int64) { copy(shadow[off:off+n], w.Mem[off:off+n]) }); err != nil {
						t.Fatal(err)
					}
				}
				done := make(chan error, 1)
				go func() {
					_, err := w.ask(command{Op: "storm", For: time.Second, Seed: replay.Seed(t)})
					done <- err
				}()
				for rounds := 0; ; rounds++ {
					take()
					select {
					case err := <-done:
						if err != nil {
							t.Fatal(err)
						}
						take()
						if !bytes.Equal(shadow, w.Mem) {
							t.Errorf("an update was lost in %d rounds", rounds)
						}
						return
					default:
					}
				}
			})
		}
	}
}

// A method is refused where it would miss writes.
func TestRefused(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "region"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	memfd, err := unix.MemfdCreate("region", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(memfd)
	mem := make([]byte, page)
	for _, m := range Methods() {
		switch m.Name {
		case "mtime":
			if _, err := m.Open(Region{File: os.NewFile(uintptr(dup(t, memfd)), "tmpfs"), Mem: mem}); !errors.Is(err, region.ErrNotSupported) {
				t.Errorf("mtime on tmpfs: %v", err)
			}
		case "pagemap", "uffd-wp":
			if _, err := m.Open(Region{File: f, Mem: mem}); !errors.Is(err, region.ErrNotSupported) {
				t.Errorf("%s on a named file: %v", m.Name, err)
			}
			if err := m.Check(Store, Pwrite); !errors.Is(err, region.ErrNotSupported) {
				t.Errorf("%s with pwrite: %v", m.Name, err)
			}
		case "inotify":
			if err := m.Check(Store); !errors.Is(err, region.ErrNotSupported) {
				t.Errorf("inotify with stores: %v", err)
			}
			if err := m.Check(Pwrite); err != nil {
				t.Errorf("inotify with pwrite: %v", err)
			}
		case "hash":
			if err := m.Check(Store, OtherMapping, OtherProcess, Pwrite); err != nil {
				t.Error(err)
			}
		}
	}
	if _, err := ByName("mtime2"); err == nil {
		t.Error("an unknown name is accepted")
	}
}

func dup(t *testing.T, fd int) int {
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// The entries of a page map, as softDirty reads them.
func TestSoftDirtyRuns(t *testing.T) {
	entries := make([]byte, 8*10)
	for _, i := range []int{0, 3, 4, 9} {
		binary.LittleEndian.PutUint64(entries[8*i:], softDirtyBit|1<<63)
	}
	binary.LittleEndian.PutUint64(entries[8*6:], 1<<63|1<<61)
	var got [][2]int64
	softDirtyRuns(entries, func(lo, hi int64) { got = append(got, [2]int64{lo, hi}) })
	if want := [][2]int64{{0, 1}, {3, 5}, {9, 10}}; !slices.Equal(got, want) {
		t.Errorf("runs %v, want %v", got, want)
	}
	if unsafe.Sizeof(pmScanArg{}) != 96 {
		t.Error("struct pm_scan_arg has 96 bytes")
	}
}
