package nbd

import (
	"bufio"
	"context"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
	"memsync/strategies/transport"
)

const benchSize = 64 << 20

// startRole runs a role of this test binary, and returns the address it prints.
func startRole(t testing.TB, args ...string) transport.Dialer {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, append([]string{"nbd-test-role"}, args...)...)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		cmd.Wait()
	})
	addr, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return transport.DialFunc(func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", strings.TrimSpace(addr))
	})
}

// blockingFD returns a descriptor of c in blocking mode.
func blockingFD(t testing.TB, c net.Conn) int {
	f, err := c.(*net.TCPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close(); c.Close() })
	fd := int(f.Fd())
	if err := unix.SetNonblock(fd, false); err != nil {
		t.Fatal(err)
	}
	return fd
}

// floorRR is a request of 28 bytes and a reply of 4 KiB by blocking system calls.
func floorRR(t testing.TB, fd int, p []byte) {
	if _, err := unix.Write(fd, p[:requestSize]); err != nil {
		t.Fatal(err)
	}
	for n := 0; n < len(p); {
		k, err := unix.Read(fd, p[n:])
		if err != nil || k == 0 {
			t.Fatal(k, err)
		}
		n += k
	}
}

func report(b *testing.B, name string, d []time.Duration) time.Duration {
	slices.Sort(d)
	b.ReportMetric(float64(d[len(d)/2].Nanoseconds()), name+"-p50-ns")
	b.ReportMetric(float64(d[len(d)*99/100].Nanoseconds()), name+"-p99-ns")
	return d[len(d)/2]
}

// BenchmarkRoundTrip compares a 4 KiB read with a raw exchange of the same
// size, taken in turn.
func BenchmarkRoundTrip(b *testing.B) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	raw, err := startRole(b, "echo").Dial(ctx)
	if err != nil {
		b.Fatal(err)
	}
	fd := blockingFD(b, raw)
	c := open(b, &Transport{}, startRole(b, "serve", "67108864"), transport.Options{})
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	p := make([]byte, 4096)
	var floor, nbd []time.Duration
	i := int64(0)
	for b.Loop() {
		if i/256%2 == 0 { // alternate in runs: neither warms up the other
			t := time.Now()
			floorRR(b, fd, p)
			floor = append(floor, time.Since(t))
		} else {
			t := time.Now()
			if err := c.ReadAt(ctx, p, i*4096%benchSize); err != nil {
				b.Fatal(err)
			}
			nbd = append(nbd, time.Since(t))
		}
		i++
	}
	if len(nbd) > 0 {
		f, n := report(b, "floor", floor), report(b, "nbd", nbd)
		b.ReportMetric(float64(n)/float64(f), "ratio")
		b.ReportMetric(float64(n-f), "above-ns")
	}
}

// BenchmarkBulk compares 1 MiB reads, four at a time, with a raw stream.
func BenchmarkBulk(b *testing.B) {
	ctx := context.Background()
	dial := startRole(b, "stream")
	c := open(b, &Transport{}, startRole(b, "serve", "67108864"), transport.Options{})
	var floor, nbd []time.Duration
	for b.Loop() {
		raw, err := dial.Dial(ctx)
		if err != nil {
			b.Fatal(err)
		}
		t := time.Now()
		p := make([]byte, 1<<20)
		for n := 0; n < benchSize; {
			k, err := raw.Read(p)
			if err == io.EOF || err != nil {
				b.Fatal(n, err)
			}
			n += k
		}
		raw.Close()
		floor = append(floor, time.Since(t))

		t = time.Now()
		var wg sync.WaitGroup
		for w := range int64(4) {
			wg.Go(func() {
				p := make([]byte, 1<<20)
				for off := w << 20; off < benchSize; off += 4 << 20 {
					if err := c.ReadAt(ctx, p, off); err != nil {
						b.Error(err)
						return
					}
				}
				if err := (region.Content{Seed: 1}).Check(p, benchSize-(4-w)<<20); err != nil {
					b.Error(err)
				}
			})
		}
		wg.Wait()
		nbd = append(nbd, time.Since(t))
	}
	f, n := report(b, "floor", floor), report(b, "nbd", nbd)
	b.ReportMetric(float64(f)/float64(n), "throughput-ratio")
	b.ReportMetric(benchSize/n.Seconds()/1e6, "nbd-MB/s")
}

// BenchmarkInterop reads 256 MiB over loopback TCP, in turn: nbdcopy from our
// server and from nbdkit's memory plugin, our client and nbdcopy from nbdkit.
func BenchmarkInterop(b *testing.B) {
	const size = 256 << 20
	need(b, "nbdcopy", "libnbd-bin")
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	addr := ln.Addr().String()
	ln.Close()
	_, port, _ := net.SplitHostPort(addr)
	cmd := exec.Command(need(b, "nbdkit", "nbdkit"), "-f", "-i", "127.0.0.1", "-p", port, "memory", strconv.Itoa(size))
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	kit := open(b, &Transport{}, patient("tcp", addr), transport.Options{Connections: 4})
	p := make([]byte, 4<<20)
	for off := int64(0); off < size; off += int64(len(p)) { // no holes
		region.Content{Seed: 1}.Fill(p, off)
		if err := kit.WriteAt(context.Background(), p, off); err != nil {
			b.Fatal(err)
		}
	}
	ours := startRole(b, "serve", strconv.Itoa(size))
	conn, err := ours.Dial(context.Background())
	if err != nil {
		b.Fatal(err)
	}
	oursAddr := conn.RemoteAddr().String()
	conn.Close()
	took := map[string][]time.Duration{}
	measure := func(name string, f func()) {
		t := time.Now()
		f()
		took[name] = append(took[name], time.Since(t))
	}
	copyFrom := func(addr string) func() {
		return func() { run(b, "nbdcopy", "libnbd-bin", "nbd://"+addr, "null:") }
	}
	for b.Loop() {
		measure("nbdcopy-ours", copyFrom(oursAddr))
		measure("nbdcopy-nbdkit", copyFrom(addr))
		measure("client-nbdkit", func() {
			var wg sync.WaitGroup
			for w := range int64(4) {
				wg.Go(func() {
					p := make([]byte, 4<<20)
					for off := w * int64(len(p)); off < size; off += 4 * int64(len(p)) {
						if err := kit.ReadAt(context.Background(), p, off); err != nil {
							b.Error(err)
						}
					}
				})
			}
			wg.Wait()
		})
	}
	median := func(name string) float64 {
		d := took[name]
		slices.Sort(d)
		b.ReportMetric(size/d[len(d)/2].Seconds()/1e6, name+"-MB/s")
		return d[len(d)/2].Seconds()
	}
	kitTime := median("nbdcopy-nbdkit")
	b.ReportMetric(kitTime/median("nbdcopy-ours"), "server-ratio")
	b.ReportMetric(kitTime/median("client-nbdkit"), "client-ratio")
}

// BenchmarkFilePayload sends replies whose payload is in a file that the page cache
// has, over loopback, in the two ways that a server can: a copy into a buffer, then
// one sendmsg for header and payload, as the server does; or the header, and the
// pages of the cache by sendfile(2) (splice(2) through a pipe is what that does inside).
func BenchmarkFilePayload(b *testing.B) {
	const fileSize = 64 << 20
	f, err := os.Create(b.TempDir() + "/payload")
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	content := make([]byte, fileSize)
	region.Content{Seed: 1}.Fill(content, 0)
	if _, err := f.Write(content); err != nil {
		b.Fatal(err)
	}
	in, header := int(f.Fd()), make([]byte, dataHeadSize)
	for _, size := range []int{4 << 10, 64 << 10, 1 << 20} {
		buf := make([]byte, size)
		for name, send := range map[string]func(out int, off int64) error{
			"copy": func(out int, off int64) error {
				if _, err := unix.Pread(in, buf, off); err != nil {
					return err
				}
				_, err := unix.Writev(out, [][]byte{header, buf}) // blocking: all of it
				return err
			},
			"sendfile": func(out int, off int64) error {
				if err := unix.Sendto(out, header, unix.MSG_MORE, nil); err != nil {
					return err
				}
				for left := size; left > 0; {
					n, err := unix.Sendfile(out, in, &off, left)
					if err != nil {
						return err
					}
					left -= n
				}
				return nil
			},
		} {
			b.Run(name+"/"+region.FormatSize(int64(size)), func(b *testing.B) {
				ours, theirs := pair(b, "tcp")
				defer ours.Close()
				defer theirs.Close()
				from, to := blockingFD(b, ours), blockingFD(b, theirs)
				read := make(chan int64, 1)
				go func() {
					p, sum := make([]byte, 1<<20), int64(0)
					for {
						n, err := unix.Read(to, p)
						if n <= 0 || err != nil {
							read <- sum
							return
						}
						sum += int64(n)
					}
				}()
				b.SetBytes(int64(size))
				var i int64
				for b.Loop() {
					if err := send(from, i*int64(size)%fileSize); err != nil {
						b.Fatal(err)
					}
					i++
				}
				if err := unix.Shutdown(from, unix.SHUT_WR); err != nil {
					b.Fatal(err)
				}
				if got, want := <-read, i*int64(size+len(header)); got != want {
					b.Errorf("%d bytes arrived, want %d", got, want)
				}
			})
		}
	}
}

const dataHeadSize = 40 // header of a data chunk, extended
