package role

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// The yardsticks of docs/metrics.md: what the same machine does without a
// strategy, measured by the same processes, at the same size and placement.

// FloorArgs says what the workload measures.
type FloorArgs struct {
	Size    int64 `json:"size"`    // bytes for floor_map and floor_fill
	Threads int   `json:"threads"` // of floor_fill
	// Daemon and Workload are the CPUs of the two threads of floor_wake; -1 leaves
	// the choice to the scheduler.
	Daemon, Workload int
}

// Floors holds yardsticks; 0 where one was not measured.
type Floors struct {
	Map  float64 `json:"map"`  // B/s
	Fill float64 `json:"fill"` // B/s
	Wake float64 `json:"wake"` // s, round trip, median
	TCP  float64 `json:"tcp"`  // B/s
	RR   float64 `json:"rr"`   // s, median
}

func (w *workload) floors(_ context.Context, a FloorArgs) (f Floors, err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	dst, err := anonymous(a.Size, unix.MAP_POPULATE)
	if err != nil {
		return f, err
	}
	defer unix.Munmap(dst)
	if f.Map, err = floorMap(a.Size, dst); err != nil {
		return f, err
	}
	if f.Fill, err = floorFill(a.Size, a.Threads, dst); err != nil {
		return f, err
	}
	f.Wake, err = floorWake(a.Daemon, a.Workload)
	return f, err
}

// floorMap is a mapped read of a cached tmpfs file, 4 KiB pages, cold page
// tables, copied out page by page.
func floorMap(size int64, dst []byte) (float64, error) {
	fd, err := unix.MemfdCreate("memsync-floor", unix.MFD_CLOEXEC)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	content := region.Content{Seed: 1}
	buf := make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(buf)) {
		p := buf[:min(int64(len(buf)), size-off)]
		content.Fill(p, off)
		if _, err := unix.Pwrite(fd, p, off); err != nil {
			return 0, err
		}
	}
	m, err := unix.Mmap(fd, 0, int(size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return 0, err
	}
	defer unix.Munmap(m)
	start := monotonic()
	for off := int64(0); off < size; off += page {
		end := min(off+page, size)
		copy(dst[off:end], m[off:end])
	}
	rate := float64(size) / (float64(monotonic()-start) / 1e9)
	if err := content.Check(dst, 0); err != nil {
		return 0, fmt.Errorf("floor_map: %w", err)
	}
	return rate, nil
}

// floorFill copies into fresh anonymous 4 KiB pages with the given number of threads.
func floorFill(size int64, threads int, src []byte) (float64, error) {
	m, err := anonymous(size, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Munmap(m)
	_ = unix.Madvise(m, unix.MADV_NOHUGEPAGE) // EINVAL: a kernel without huge pages needs no telling
	pages := region.Chunks(size, page)
	var ready, done sync.WaitGroup
	goAhead := make(chan struct{})
	for t := range threads {
		first, n := split(pages, t, threads)
		ready.Add(1)
		done.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			ready.Done()
			<-goAhead
			for off := first * page; off < min((first+n)*page, size); off += page {
				end := min(off+page, size)
				copy(m[off:end], src[off:end])
			}
		})
	}
	ready.Wait()
	start := monotonic()
	close(goAhead)
	done.Wait()
	return float64(size) / (float64(monotonic()-start) / 1e9), nil
}

// pin binds the calling thread, which must be locked, to a CPU; -1 does nothing.
func pin(cpu int) error {
	if cpu < 0 {
		return nil
	}
	var set unix.CPUSet
	set.Set(cpu)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("pin to CPU %d: %w", cpu, err)
	}
	return nil
}

// floorWake is a ping-pong through two pipes between two threads placed like
// daemon and workload: the median round trip in seconds.
func floorWake(daemon, workload int) (float64, error) {
	const rounds = 400
	var there, back [2]int
	if err := errors.Join(unix.Pipe2(there[:], unix.O_CLOEXEC), unix.Pipe2(back[:], unix.O_CLOEXEC)); err != nil {
		return 0, err
	}
	var wg sync.WaitGroup
	errs := make([]error, 2)
	// A thread that was pinned is not unlocked: it ends with its goroutine.
	wg.Go(func() {
		runtime.LockOSThread()
		defer unix.Close(back[1])
		errs[0] = pin(daemon)
		var b [1]byte
		for {
			if n, _ := unix.Read(there[0], b[:]); n != 1 {
				return
			}
			_, _ = unix.Write(back[1], b[:])
		}
	})
	samples := make([]int64, 0, rounds)
	wg.Go(func() {
		runtime.LockOSThread()
		defer unix.Close(there[1])
		errs[1] = pin(workload)
		var b [1]byte
		for range rounds {
			start := monotonic()
			if _, err := unix.Write(there[1], b[:]); err != nil {
				return
			}
			if n, _ := unix.Read(back[0], b[:]); n != 1 {
				return
			}
			samples = append(samples, monotonic()-start)
		}
	})
	wg.Wait()
	unix.Close(there[0])
	unix.Close(back[0])
	if err := errors.Join(errs...); err != nil {
		return 0, err
	}
	return medianSeconds(samples), nil
}

func medianSeconds(ns []int64) float64 {
	if len(ns) == 0 {
		return 0
	}
	slices.Sort(ns)
	return float64(ns[len(ns)/2]) / 1e9
}

// A yardstick connection begins with 16 bytes: what is asked ('B' bulk, 'R'
// request and reply), 7 unused, and for bulk the number of bytes, big endian.
const (
	yardHead    = 16
	yardRequest = 28 // an NBD request's size
	yardReply   = 16 + page
)

// serveYard answers one yardstick connection at the source.
func serveYard(c net.Conn) {
	_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
	var head [yardHead]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return
	}
	switch head[0] {
	case 'B':
		buf := make([]byte, 256<<10)
		region.Content{Seed: 1}.Fill(buf, 0)
		for left := int64(binary.BigEndian.Uint64(head[8:])); left > 0; {
			n, err := c.Write(buf[:min(left, int64(len(buf)))])
			if err != nil {
				return
			}
			left -= int64(n)
		}
	case 'R':
		_ = blocking(c, func(fd int) error {
			req, reply := make([]byte, yardRequest), make([]byte, yardReply)
			for {
				if err := readFull(fd, req); err != nil {
					return err
				}
				if _, err := unix.Write(fd, reply); err != nil {
					return err
				}
			}
		})
	}
}

// blocking runs f on a locked thread with a blocking descriptor of the
// connection, which it closes: raw sockets, out of the Go poller, in which each
// arrival would wake another thread, on a CPU that is being measured.
func blocking(c net.Conn, f func(fd int) error) error {
	t, ok := c.(*net.TCPConn)
	if !ok {
		return errors.New("not a TCP connection")
	}
	raw, err := t.SyscallConn()
	if err != nil {
		return err
	}
	fd, dupErr := -1, error(nil)
	if err := raw.Control(func(old uintptr) { fd, dupErr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
		return err
	}
	if dupErr != nil {
		return os.NewSyscallError("fcntl", dupErr)
	}
	defer unix.Close(fd)
	c.Close()
	if err := unix.SetNonblock(fd, false); err != nil {
		return os.NewSyscallError("fcntl", err)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	tv := unix.Timeval{Sec: 120}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return err
	}
	return f(fd)
}

func readFull(fd int, p []byte) error {
	for len(p) > 0 {
		n, err := unix.Read(fd, p)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
		p = p[n:]
	}
	return nil
}

// DaemonFloorArgs says what the daemon measures against the source's yardstick port.
type DaemonFloorArgs struct {
	Addr string `json:"addr"`
	Bulk int64  `json:"bulk"` // bytes of floor_tcp; 0 leaves it out
	RR   int    `json:"rr"`   // round trips of floor_rr; 0 leaves it out
}

func daemonFloors(ctx context.Context, a DaemonFloorArgs) (f Floors, err error) {
	if a.Bulk > 0 {
		if f.TCP, err = floorTCP(ctx, a.Addr, a.Bulk); err != nil {
			return f, fmt.Errorf("floor_tcp: %w", err)
		}
	}
	if a.RR > 0 {
		if f.RR, err = floorRR(ctx, a.Addr, a.RR); err != nil {
			return f, fmt.Errorf("floor_rr: %w", err)
		}
	}
	return f, nil
}

func dialYard(ctx context.Context, addr string, kind byte, n int64) (net.Conn, error) {
	if _, err := netip.ParseAddrPort(addr); err != nil {
		return nil, err
	}
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	if d, ok := ctx.Deadline(); ok {
		_ = c.SetDeadline(d)
	}
	var head [yardHead]byte
	head[0] = kind
	binary.BigEndian.PutUint64(head[8:], uint64(n))
	if _, err := c.Write(head[:]); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// floorTCP is one bulk stream from source to daemon: bytes over the time from
// connect to the last byte.
func floorTCP(ctx context.Context, addr string, n int64) (float64, error) {
	start := monotonic()
	c, err := dialYard(ctx, addr, 'B', n)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	buf := make([]byte, 256<<10)
	for left := n; left > 0; {
		m, err := c.Read(buf)
		if err != nil {
			return 0, err
		}
		left -= int64(m)
	}
	return float64(n) / (float64(monotonic()-start) / 1e9), nil
}

// floorRR is a 4 KiB request and reply over one TCP connection, raw sockets.
func floorRR(ctx context.Context, addr string, rounds int) (float64, error) {
	c, err := dialYard(ctx, addr, 'R', 0)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	var samples []int64
	err = blocking(c, func(fd int) error {
		req, reply := make([]byte, yardRequest), make([]byte, yardReply)
		for range rounds {
			if err := ctx.Err(); err != nil {
				return err
			}
			start := monotonic()
			if _, err := unix.Write(fd, req); err != nil {
				return err
			}
			if err := readFull(fd, reply); err != nil {
				return err
			}
			samples = append(samples, monotonic()-start)
		}
		return nil
	})
	return medianSeconds(samples), err
}
