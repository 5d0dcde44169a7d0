package fuse

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/param"
	"memsync/strategies/region"
)

const (
	settingsEnv = "MEMSYNC_FUSE_BENCH" // "k=v k=v": parameters for the benchmarks' daemon; BenchmarkMappedRead compares several, split by "|"
	dirEnv      = "MEMSYNC_FUSE_TEST_DIR"
	sizeEnv     = "MEMSYNC_FUSE_TEST_SIZE"
)

// arena is a region in anonymous memory, read without a copy.
type arena struct{ *mem }

func (a arena) View(off, n int64) ([]byte, bool) { return a.b[off : off+n], true }

// daemon serves an arena of seeded content until its stdin ends. It prints the
// path, and at the end its counters.
func daemon() error {
	var size int64
	if _, err := fmt.Sscan(os.Getenv(sizeEnv), &size); err != nil {
		return err
	}
	b, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return err
	}
	_ = unix.Madvise(b, unix.MADV_HUGEPAGE)
	content.Fill(b, 0)
	p, err := param.New(Params(), strings.Fields(os.Getenv(settingsEnv)))
	if err != nil {
		return err
	}
	var s region.Store = arena{&mem{b: b}}
	if os.Getenv("MEMSYNC_FUSE_BENCH_COPY") != "" {
		s = struct{ region.Store }{s} // hides View
	}
	d, err := Open(context.Background(), s, Options{Dir: os.Getenv(dirEnv), ReadOnly: true, Params: p})
	if err != nil {
		return err
	}
	fmt.Println(d.Path())
	_, _ = io.Copy(io.Discard, os.Stdin)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	err = d.Close(ctx)
	st, _ := json.Marshal(d.Stats())
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	fmt.Printf("%s cpu user=%.3f sys=%.3f csw=%d/%d\n", st, tv(u.Utime), tv(u.Stime), u.Nvcsw, u.Nivcsw)
	return err
}

func tv(t syscall.Timeval) float64 { return float64(t.Sec) + float64(t.Usec)/1e6 }

// reader maps the file named by its first argument n times with a cold page
// table, drops clean cached pages first if asked, reads it page by page into a buffer,
// prints the nanoseconds of each, and checks the bytes with the clock stopped.
func reader() error {
	path, drop := os.Args[1], os.Args[2] == "cold"
	var n int
	_, _ = fmt.Sscan(os.Args[3], &n)
	mode := os.Args[4] // seq, touch
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return err
	}
	size := int(st.Size)
	buf := make([]byte, 4096)
	var took []int64 // printed at the end: a write wakes others up
	for range n {
		fd, err := unix.Open(path, unix.O_RDONLY, 0)
		if err != nil {
			return err
		}
		if drop {
			if err := unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED); err != nil {
				return err
			}
		}
		m, err := unix.Mmap(fd, 0, size, unix.PROT_READ, unix.MAP_SHARED)
		if err != nil {
			return err
		}
		if mode == "touch" {
			_ = unix.Madvise(m, unix.MADV_RANDOM)
			for i := range 2000 {
				off := (i * 7919 % (size / 4096)) * 4096
				start := time.Now()
				copy(buf[:8], m[off:])
				took = append(took, time.Since(start).Nanoseconds())
			}
		} else {
			runtime.GC()
			start := time.Now()
			for off := 0; off+4096 <= size; off += 4096 {
				copy(buf, m[off:off+4096])
			}
			took = append(took, time.Since(start).Nanoseconds())
			if err := content.Check(m, 0); err != nil {
				return err
			}
		}
		if err := errors.Join(unix.Munmap(m), unix.Close(fd)); err != nil {
			return err
		}
	}
	for _, ns := range took {
		fmt.Println(ns)
	}
	return nil
}

// pinned starts c with its threads on the CPU; -1 is anywhere.
func pinned(c *exec.Cmd, cpu int) error {
	if cpu < 0 {
		return c.Start()
	}
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocks: the thread goes, with its mask
		var set unix.CPUSet
		set.Set(cpu)
		err := unix.SchedSetaffinity(0, &set)
		if err == nil {
			c.SysProcAttr.Pdeathsig = 0
			err = c.Start()
		}
		result <- err
	}()
	return <-result
}

// bench is a running daemon.
type bench struct {
	path string
	stop func() string
}

func startDaemon(t testing.TB, size int64, cpu int) bench {
	t.Helper()
	c := command("daemon")
	c.Env = append(c.Env, fmt.Sprintf("%s=%d", sizeEnv, size), dirEnv+"="+t.TempDir())
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := pinned(c, cpu); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(out)
	path, err := r.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return bench{strings.TrimSpace(path), func() string {
		in.Close()
		last, _ := r.ReadString('\n')
		if err := c.Wait(); err != nil {
			t.Error(err)
		}
		return strings.TrimSpace(last)
	}}
}

func read(t testing.TB, path, cache, mode string, n, cpu int) []time.Duration {
	t.Helper()
	c := command("reader", path, cache, fmt.Sprint(n), mode)
	var out strings.Builder
	c.Stdout = &out
	if err := pinned(c, cpu); err != nil {
		t.Fatal(err)
	}
	if err := c.Wait(); err != nil {
		t.Fatal(err)
	}
	var took []time.Duration
	for _, f := range strings.Fields(out.String()) {
		var ns int64
		if _, err := fmt.Sscan(f, &ns); err != nil {
			t.Fatal(err)
		}
		took = append(took, time.Duration(ns))
	}
	slices.Sort(took)
	return took
}

// BenchmarkMappedRead reads a cold file through a mapping, page by page, in turns
// with a cached tmpfs file, read the same way from the same place (floor_map). A
// ratio is of two neighbours in time; best_ratio is of the best of each. With
// several settings each has a daemon, and they take turns too.
func BenchmarkMappedRead(b *testing.B) {
	settings := strings.Split(os.Getenv(settingsEnv), "|")
	for _, place := range []struct {
		name             string
		daemon, workload int
	}{{"daemon=0,workload=0", 0, 0}, {"daemon=0,workload=1", 0, 1}, {"unpinned", -1, -1}} {
		for _, size := range []int64{64 << 20, 256 << 20} {
			b.Run(fmt.Sprintf("%s/%s", place.name, region.FormatSize(size)), func(b *testing.B) {
				file := filepath.Join("/dev/shm", fmt.Sprintf("memsync-floor-%d", os.Getpid()))
				defer os.Remove(file)
				p := make([]byte, size)
				content.Fill(p, 0)
				if err := os.WriteFile(file, p, 0o600); err != nil {
					b.Fatal(err)
				}
				p = nil
				runtime.GC()
				var daemons []bench
				for _, s := range settings {
					b.Setenv(settingsEnv, s)
					d := startDaemon(b, size, place.daemon)
					read(b, d.path, "cold", "seq", 1, place.workload) // first touch of the machine's memory
					daemons = append(daemons, d)
				}
				const runs = 9
				var floor []time.Duration
				ratios, best := make([][]float64, len(daemons)), make([]time.Duration, len(daemons))
				b.ResetTimer()
				for range b.N {
					for range runs {
						f := read(b, file, "warm", "seq", 1, place.workload)[0]
						floor = append(floor, f)
						for i, d := range daemons {
							took := read(b, d.path, "cold", "seq", 1, place.workload)[0]
							ratios[i] = append(ratios[i], f.Seconds()/took.Seconds())
							best[i] = min(cmp.Or(best[i], took), took)
						}
					}
				}
				b.StopTimer()
				slices.Sort(floor)
				b.ReportMetric(float64(size)/floor[len(floor)/2].Seconds()/1e9, "floor_GB/s")
				b.ReportMetric(0, "ns/op")
				for i, d := range daemons {
					r := ratios[i]
					slices.Sort(r)
					ratio, bestRatio := r[len(r)/2], floor[0].Seconds()/best[i].Seconds()
					if i == 0 {
						b.ReportMetric(ratio, "ratio")
						b.ReportMetric(bestRatio, "best_ratio")
					}
					b.Logf("%q: ratio %.2f (quartiles %.2f, %.2f), best_ratio %.2f; %s", settings[i], ratio, r[len(r)/4], r[len(r)*3/4], bestRatio, d.stop())
				}
			})
		}
	}
}

// wakeup measures a round trip between two threads through pipes (floor_wake).
func wakeup(t testing.TB, a, b int) []time.Duration {
	t.Helper()
	var p [4]int
	if err := errors.Join(unix.Pipe2(p[:2], unix.O_CLOEXEC), unix.Pipe2(p[2:], unix.O_CLOEXEC)); err != nil {
		t.Fatal(err)
	}
	pin := func(cpu int) {
		runtime.LockOSThread()
		var set unix.CPUSet
		set.Set(cpu)
		_ = unix.SchedSetaffinity(0, &set)
	}
	go func() {
		pin(a)
		var c [1]byte
		for {
			if n, err := unix.Read(p[0], c[:]); n != 1 || err != nil {
				unix.Close(p[0])
				unix.Close(p[3])
				return
			}
			_, _ = unix.Write(p[3], c[:])
		}
	}()
	result := make(chan []time.Duration)
	go func() {
		pin(b)
		var took []time.Duration
		var c [1]byte
		for range 2000 {
			start := time.Now()
			_, _ = unix.Write(p[1], c[:])
			_, _ = unix.Read(p[2], c[:])
			took = append(took, time.Since(start))
		}
		unix.Close(p[1])
		unix.Close(p[2])
		result <- took
	}()
	took := <-result
	slices.Sort(took)
	return took
}

// BenchmarkTouch loads single pages of a cold mapping in random order with
// MADV_RANDOM: one request each.
func BenchmarkTouch(b *testing.B) {
	for _, place := range []struct {
		name             string
		daemon, workload int
	}{{"daemon=0,workload=0", 0, 0}, {"daemon=0,workload=1", 0, 1}} {
		b.Run(place.name, func(b *testing.B) {
			d := startDaemon(b, 64<<20, place.daemon)
			var took, floor []time.Duration
			for range b.N {
				took, floor = nil, nil
				for range 3 {
					floor = append(floor, wakeup(b, place.daemon, place.workload)...)
					took = append(took, read(b, d.path, "cold", "touch", 1, place.workload)...)
				}
			}
			slices.Sort(took)
			slices.Sort(floor)
			b.ReportMetric(float64(floor[len(floor)/2].Nanoseconds())/1e3, "floor_wake_us")
			b.ReportMetric(took[len(took)/2].Seconds()/floor[len(floor)/2].Seconds(), "ratio")
			b.ReportMetric(float64(took[len(took)/2].Nanoseconds())/1e3, "p50_us")
			b.ReportMetric(float64(took[len(took)*99/100].Nanoseconds())/1e3, "p99_us")
			b.ReportMetric(0, "ns/op")
			b.Log(d.stop())
		})
	}
}
