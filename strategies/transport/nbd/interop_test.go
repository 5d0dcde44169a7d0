package nbd

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"crypto/x509"

	"memsync/strategies/region"
	"memsync/strategies/replay"
	"memsync/strategies/transport"
)

// need skips the test where a foreign tool is missing, unless MEMSYNC_MUST_RUN
// says that the interoperability tests may not be skipped.
func need(t testing.TB, tool, pkg string) string {
	t.Helper()
	path, err := exec.LookPath(tool)
	if err == nil {
		return path
	}
	replay.Missing(t, "nbd-interop", tool, "is missing: apt-get install", pkg)
	return ""
}

// run runs a tool to its end and returns its stdout.
func run(t testing.TB, tool, pkg string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, need(t, tool, pkg), args...)
	cmd.Env = append(os.Environ(), "PATH=/usr/sbin:/usr/bin:/sbin:/bin") // nbdsh wants the system's python3
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %s: %v\n%s%s", tool, strings.Join(args, " "), err, out.String(), errs.String())
	}
	return out.String()
}

// daemon starts a foreign server that listens on a Unix socket, until the test ends.
func daemon(t testing.TB, sock, tool, pkg string, args ...string) transport.Dialer {
	t.Helper()
	cmd := exec.Command(need(t, tool, pkg), args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM)
		kill := time.AfterFunc(5*time.Second, func() { syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
		cmd.Wait()
		kill.Stop()
		if t.Failed() && errs.Len() > 0 {
			t.Logf("%s: %s", tool, errs.String())
		}
	})
	return patient("unix", sock)
}

// patient dials a server that may not listen yet.
func patient(network, addr string) transport.Dialer {
	return transport.DialFunc(func(ctx context.Context) (net.Conn, error) {
		for {
			c, err := (&net.Dialer{}).DialContext(ctx, network, addr)
			if err == nil || ctx.Err() != nil {
				return c, err
			}
			time.Sleep(time.Millisecond)
		}
	})
}

// shortDir is a folder whose name is short enough for a socket's path.
func shortDir(t testing.TB) string {
	d, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(d) })
	return d
}

const interopSize = 8 << 20

func TestInteropServer(t *testing.T) {
	mem, holes := newRAM(interopSize, 1), newSparse(interopSize, 2)
	s := serve(t, &Transport{}, exports{"": viewed{mem}, "mem": viewed{mem}, "holes": holes, "ro": frozen{viewed{mem}},
		"blocks": blocky{&slow{ram: newRAM(interopSize, 3)}, 4096}, "slow": &slow{ram: newRAM(interopSize, 4), max: time.Millisecond}, "sparse": newSparse(interopSize, 5)})
	uri := "nbd://" + s.addr + "/"
	dir := t.TempDir()
	file := func(name string, content []byte) string {
		p := filepath.Join(dir, name)
		if content != nil {
			if err := os.WriteFile(p, content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return p
	}
	same := func(t *testing.T, path string, want []byte) {
		t.Helper()
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s differs", path)
		}
	}

	t.Run("nbdinfo", func(t *testing.T) {
		var info struct {
			Exports []struct {
				Name string `json:"export-name"`
				Size int64  `json:"export-size"`
				RO   bool   `json:"is_read_only"`
				Min  int64  `json:"block_size_minimum"`
				MC   bool   `json:"can_multi_conn"`
			}
		}
		if err := json.Unmarshal([]byte(run(t, "nbdinfo", "libnbd-bin", "--json", "--list", "nbd://"+s.addr)), &info); err != nil {
			t.Fatal(err)
		}
		if len(info.Exports) != 7 {
			t.Errorf("%d exports: %+v", len(info.Exports), info)
		}
		for _, e := range info.Exports {
			if e.Size != interopSize || e.RO != (e.Name == "ro") || (e.Min == 4096) != (e.Name == "blocks") || !e.MC {
				t.Errorf("%+v", e)
			}
		}
	})
	t.Run("nbdinfo --map", func(t *testing.T) {
		var ext []struct{ Offset, Length, Type int64 }
		if err := json.Unmarshal([]byte(run(t, "nbdinfo", "libnbd-bin", "--json", "--map", uri+"holes")), &ext); err != nil {
			t.Fatal(err)
		}
		if len(ext) != interopSize/hole || ext[1].Offset != hole || ext[1].Length != hole || ext[1].Type != 3 || ext[2].Type != 0 {
			t.Errorf("%d extents: %v", len(ext), ext[:min(len(ext), 4)])
		}
	})
	for _, name := range []string{"mem", "holes", "slow", "blocks"} {
		t.Run("nbdcopy from "+name, func(t *testing.T) {
			p := file("copy-"+name, nil)
			run(t, "nbdcopy", "libnbd-bin", "--connections=4", uri+name, p)
			st, _ := s.exports.Open(name)
			same(t, p, contentOf(t, st))
		})
	}
	t.Run("nbdcopy to", func(t *testing.T) {
		want := make([]byte, interopSize)
		region.Content{Seed: 9}.Fill(want, 0)
		clear(want[1<<20 : 3<<20])
		p := file("up", want)
		for _, name := range []string{"mem", "holes", "slow", "blocks"} {
			run(t, "nbdcopy", "libnbd-bin", "--flush", p, uri+name)
			st, _ := s.exports.Open(name)
			if !bytes.Equal(contentOf(t, st), want) {
				t.Errorf("%s differs", name)
			}
		}
	})
	t.Run("nbdsh", func(t *testing.T) {
		need(t, "nbdsh", "python3-libnbd")
		// Every call that reaches a server; the list at the script's end holds it.
		host, port, _ := net.SplitHostPort(s.addr)
		run(t, "nbdsh", "python3-libnbd", "-c", fmt.Sprintf("URI, HOST, PORT, SOCKET = %q, %q, %q, %q\nexec(compile(open('testdata/libnbd.py').read(), 'libnbd.py', 'exec'))",
			uri, host, port, unixSocket(t, s)))
	})
	t.Run("qemu-img", func(t *testing.T) {
		var info struct {
			Size int64 `json:"virtual-size"`
		}
		if err := json.Unmarshal([]byte(run(t, "qemu-img", "qemu-utils", "info", "--output=json", uri+"mem")), &info); err != nil || info.Size != interopSize {
			t.Errorf("%+v, %v", info, err)
		}
		for _, name := range []string{"mem", "holes", "slow", "blocks"} {
			p := file("qemu-"+name, nil)
			run(t, "qemu-img", "qemu-utils", "convert", "-O", "raw", uri+name, p)
			st, _ := s.exports.Open(name)
			same(t, p, contentOf(t, st))
			run(t, "qemu-img", "qemu-utils", "compare", "-f", "raw", "-F", "raw", p, uri+name)
		}
		want := make([]byte, interopSize)
		region.Content{Seed: 10}.Fill(want, 0)
		clear(want[4<<20 : 5<<20])
		p := file("qemu-up", want)
		for _, name := range []string{"mem", "holes"} {
			run(t, "qemu-img", "qemu-utils", "convert", "-n", "-f", "raw", "-O", "raw", p, uri+name)
			st, _ := s.exports.Open(name)
			if !bytes.Equal(contentOf(t, st), want) {
				t.Errorf("%s differs", name)
			}
		}
	})
	t.Run("qemu-nbd", func(t *testing.T) { // re-exports ours; we are at both ends
		sock := filepath.Join(shortDir(t), "s")
		d := daemon(t, sock, "qemu-nbd", "qemu-utils", "--socket="+sock, "--persistent", "--shared=8", "--format=raw", uri+"mem")
		c := open(t, &Transport{}, d, transport.Options{Connections: 2})
		p := make([]byte, interopSize)
		if err := c.ReadAt(testContext(t), p, 0); err != nil || !bytes.Equal(p, mem.b) {
			t.Errorf("by qemu-nbd: %v", err)
		}
		if err := c.WriteAt(testContext(t), []byte("through"), 5000); err != nil {
			t.Error(err)
		}
		if err := c.Flush(testContext(t)); err != nil || string(contentOf(t, mem)[5000:5007]) != "through" {
			t.Errorf("write by qemu-nbd: %v", err)
		}
	})
	t.Run("nbdkit nbd plugin", func(t *testing.T) {
		sock := filepath.Join(shortDir(t), "s")
		d := daemon(t, sock, "nbdkit", "nbdkit", "-f", "-U", sock, "nbd", "uri="+uri+"mem")
		c := open(t, &Transport{}, d, transport.Options{})
		p := make([]byte, interopSize)
		if err := c.ReadAt(testContext(t), p, 0); err != nil || !bytes.Equal(p, contentOf(t, mem)) {
			t.Errorf("by nbdkit: %v", err)
		}
	})
}

// unixSocket has s answer on a Unix socket too.
func unixSocket(t testing.TB, s *server) string {
	path := filepath.Join(shortDir(t), "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { _ = (&Transport{}).Serve(ctx, c, s.exports) })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		cancel()
		wg.Wait()
	})
	return path
}

// exercise checks a foreign server's export as a Store.
func exercise(t *testing.T, c *Client) {
	t.Helper()
	ctx := testContext(t)
	if c.Size() != interopSize {
		t.Fatalf("export of %d bytes", c.Size())
	}
	want := make([]byte, c.Size())
	region.Content{Seed: 5}.Fill(want, 0)
	if err := c.WriteAt(ctx, want, 0); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range int64(8) {
		wg.Go(func() {
			lo := c.Size() / 8 * i
			for j := range int64(10) {
				off, n := lo+j*1000, int64(1+j*7777)
				region.Content{Seed: uint64(j)}.Fill(want[off:off+n], off)
				if err := c.WriteAt(ctx, want[off:off+n], off); err != nil {
					t.Error(err)
				}
				p := make([]byte, n)
				if err := c.ReadAt(ctx, p, off); err != nil || !bytes.Equal(p, want[off:off+n]) {
					t.Errorf("[%d, +%d): %v", off, n, err)
				}
			}
		})
	}
	wg.Wait()
	if err := c.WriteZeroes(ctx, 12345, 54321, true); err == nil {
		clear(want[12345 : 12345+54321])
	} else if !errors.Is(err, region.ErrNotSupported) {
		t.Error(err)
	}
	if err := c.WriteFUA(ctx, []byte("sync"), 77); err != nil {
		t.Error(err)
	}
	copy(want[77:], "sync")
	if err := c.Flush(ctx); err != nil {
		t.Error(err)
	}
	got := make([]byte, c.Size())
	if err := c.ReadAt(ctx, got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("whole region: %v", err)
	}
	for off := int64(0); off < c.Size(); {
		ext, err := c.Extents(ctx, off, c.Size()-off)
		if errors.Is(err, region.ErrNotSupported) {
			break
		}
		if err != nil || len(ext) == 0 {
			t.Fatalf("extents at %d: %v, %v", off, ext, err)
		}
		for _, e := range ext {
			if e.Zero && bytes.ContainsFunc(want[off:off+e.Length], func(r rune) bool { return r != 0 }) {
				t.Errorf("extent %+v at %d is not zero", e, off)
			}
			off += e.Length
		}
	}
	if err := c.Trim(ctx, 0, 4096); err != nil && !errors.Is(err, region.ErrNotSupported) {
		t.Error(err)
	}
	if err := c.Cache(ctx, 0, 1<<20); err != nil && !errors.Is(err, region.ErrNotSupported) {
		t.Error(err)
	}
}

func TestInteropClient(t *testing.T) {
	nbdkit := func(t *testing.T, args ...string) transport.Dialer {
		sock := filepath.Join(shortDir(t), "s")
		return daemon(t, sock, "nbdkit", "nbdkit", append([]string{"-f", "-U", sock}, args...)...)
	}
	image := func(t *testing.T) string {
		p := filepath.Join(t.TempDir(), "image")
		if err := os.WriteFile(p, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(p, interopSize); err != nil {
			t.Fatal(err)
		}
		return p
	}
	t.Run("nbdkit memory", func(t *testing.T) {
		c := open(t, &Transport{}, nbdkit(t, "memory", "8M"), transport.Options{Connections: 4})
		if !c.Export().Structured || !c.Export().Allocation || c.Connections() != 4 {
			t.Errorf("%+v, %d connections", c.Export(), c.Connections())
		}
		exercise(t, c)
	})
	t.Run("nbdkit file", func(t *testing.T) {
		exercise(t, open(t, &Transport{}, nbdkit(t, "file", image(t)), transport.Options{Connections: 2}))
	})
	t.Run("nbdkit without structured replies", func(t *testing.T) {
		c := open(t, &Transport{}, nbdkit(t, "--no-sr", "memory", "8M"), transport.Options{})
		if c.Export().Structured || c.Export().Allocation {
			t.Errorf("%+v", c.Export())
		}
		exercise(t, c)
	})
	t.Run("nbdkit blocksize-policy", func(t *testing.T) {
		c := open(t, &Transport{}, nbdkit(t, "--filter=blocksize-policy", "memory", "8M", "blocksize-minimum=4096",
			"blocksize-preferred=65536", "blocksize-maximum=128k", "blocksize-error-policy=error"), transport.Options{Connections: 2})
		if c.Blocks() != (region.Blocks{Minimum: 4096, Preferred: 65536, Maximum: 128 << 10}) {
			t.Errorf("%+v", c.Blocks())
		}
		exercise(t, c)
	})
	t.Run("nbdkit pattern", func(t *testing.T) {
		c := open(t, &Transport{}, nbdkit(t, "pattern", "8M"), transport.Options{})
		p := make([]byte, c.Size())
		if err := c.ReadAt(testContext(t), p, 0); err != nil {
			t.Fatal(err)
		}
		for off := 0; off < len(p); off += 8 {
			if be.Uint64(p[off:]) != uint64(off) {
				t.Fatalf("offset %d holds %x", off, p[off:off+8])
			}
		}
		if err := c.WriteAt(testContext(t), p[:1], 0); !errors.Is(err, region.ErrReadOnly) {
			t.Errorf("write: %v", err)
		}
	})
	t.Run("nbdkit error", func(t *testing.T) {
		c := open(t, &Transport{}, nbdkit(t, "--filter=error", "memory", "8M", "error-pread=ENOSPC", "error-pread-rate=50%"), transport.Options{})
		good, bad := 0, 0
		for range 200 {
			switch err := c.ReadAt(testContext(t), make([]byte, 4096), 0); {
			case err == nil:
				good++
			case errors.Is(err, syscall.ENOSPC):
				bad++
			default:
				t.Fatal(err)
			}
		}
		if good == 0 || bad == 0 {
			t.Errorf("%d good, %d bad", good, bad)
		}
	})
	t.Run("nbdkit delay", func(t *testing.T) {
		c := open(t, &Transport{}, nbdkit(t, "--filter=delay", "memory", "8M", "rdelay=50ms"), transport.Options{})
		start := time.Now()
		var wg sync.WaitGroup
		for i := range int64(16) {
			wg.Go(func() {
				if err := c.ReadAt(testContext(t), make([]byte, 4096), i*4096); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if d := time.Since(start); d > 16*50*time.Millisecond/2 {
			t.Errorf("16 reads of 50 ms took %v: they are not in flight together", d)
		}
	})
	t.Run("nbdkit exports", func(t *testing.T) {
		dir := t.TempDir()
		for _, n := range []string{"a", "b"} {
			if err := os.WriteFile(filepath.Join(dir, n), make([]byte, 4096*len(n)), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		d := nbdkit(t, "file", "dir="+dir)
		conn, err := d.Dial(testContext(t))
		if err != nil {
			t.Fatal(err)
		}
		names, err := (&Transport{}).List(testContext(t), conn)
		if slices.Sort(names); err != nil || !slices.Equal(names, []string{"a", "b"}) {
			t.Errorf("%q, %v", names, err)
		}
		if conn, err = d.Dial(testContext(t)); err != nil {
			t.Fatal(err)
		}
		if e, err := (&Transport{}).Info(testContext(t), conn, "b"); err != nil || e.Size != 4096 {
			t.Errorf("info: %+v, %v", e, err)
		}
		open(t, &Transport{}, d, transport.Options{Name: "b"})
		if _, err := (&Transport{}).Open(testContext(t), d, transport.Options{Name: "c"}); err == nil {
			t.Error("no error for a missing export")
		}
	})
	t.Run("nbdkit killed", func(t *testing.T) {
		sock := filepath.Join(shortDir(t), "s")
		cmd := exec.Command(need(t, "nbdkit", "nbdkit"), "-f", "-U", sock, "--filter=delay", "memory", "8M", "rdelay=1000")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		d := transport.DialFunc(func(ctx context.Context) (net.Conn, error) { return net.Dial("unix", sock) })
		waitFor(t, "nbdkit listens", func() bool {
			c, err := d.Dial(context.Background())
			if err == nil {
				c.Close()
			}
			return err == nil
		})
		c := open(t, &Transport{}, d, transport.Options{Connections: 1})
		errs := make(chan error)
		go func() { errs <- c.ReadAt(testContext(t), make([]byte, 4096), 0) }()
		waitFor(t, "request in flight", func() bool { return c.conns[0].load.Load() > 0 })
		cmd.Process.Kill()
		cmd.Wait()
		if err := <-errs; !errors.Is(err, region.ErrPeerGone) {
			t.Error(err)
		}
	})
	t.Run("qemu-nbd", func(t *testing.T) {
		sock := filepath.Join(shortDir(t), "s")
		exercise(t, open(t, &Transport{}, daemon(t, sock, "qemu-nbd", "qemu-utils", "--socket="+sock, "--persistent", "--shared=8", "--format=raw", image(t)), transport.Options{Connections: 2}))
	})
	t.Run("nbd-server", func(t *testing.T) {
		tool := need(t, "nbd-server", "nbd-server")
		ln, err := net.Listen("tcp", "127.0.0.1:0") // a port that is free, with luck still when nbd-server takes it
		if err != nil {
			t.Fatal(err)
		}
		port := ln.Addr().(*net.TCPAddr).Port
		ln.Close()
		dir := t.TempDir()
		conf, pidFile := filepath.Join(dir, "conf"), filepath.Join(dir, "pid")
		if err := os.WriteFile(conf, fmt.Appendf(nil, "[generic]\nport = %d\nlistenaddr = 127.0.0.1\nallowlist = true\n[image]\nexportname = %s\n", port, image(t)), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(tool, "-C", conf, "-p", pidFile).CombinedOutput(); err != nil { // it goes to the background
			t.Fatalf("%v\n%s", err, out)
		}
		t.Cleanup(func() {
			if b, err := os.ReadFile(pidFile); err == nil {
				if pid, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && pid > 1 {
					syscall.Kill(pid, syscall.SIGTERM)
				}
			}
		})
		var pid []byte
		waitFor(t, "nbd-server runs", func() bool { pid, _ = os.ReadFile(pidFile); return len(pid) > 0 })
		d := patient("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		exercise(t, open(t, &Transport{}, d, transport.Options{Name: "image", Connections: 2}))
		conn, err := d.Dial(testContext(t))
		if err != nil {
			t.Fatal(err)
		}
		if names, err := (&Transport{}).List(testContext(t), conn); err != nil || !slices.Equal(names, []string{"image"}) {
			t.Errorf("list: %q, %v", names, err)
		}
		if conn, err = d.Dial(testContext(t)); err != nil {
			t.Fatal(err)
		}
		// Version 3.24 has not opened the file then, and says that the size is 0.
		if e, err := (&Transport{}).Info(testContext(t), conn, "image"); err != nil || e.Name != "image" || e.Flags&FlagFlush == 0 && e.Flags&FlagMultiConn == 0 {
			t.Errorf("info: %+v, %v", e, err)
		}
	})
}

func TestInteropTLS(t *testing.T) {
	srv, cli := testTLS(t)
	dir := t.TempDir()
	key, err := x509.MarshalPKCS8PrivateKey(srv.Certificates[0].PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificates[0].Certificate[0]})
	for name, b := range map[string][]byte{"ca-cert.pem": cert, "server-cert.pem": cert, "server-key.pem": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("client", func(t *testing.T) {
		sock := filepath.Join(shortDir(t), "s")
		d := daemon(t, sock, "nbdkit", "nbdkit", "-f", "-U", sock, "--tls=require", "--tls-certificates="+dir, "memory", "8M")
		exercise(t, open(t, &Transport{ClientTLS: cli}, d, transport.Options{Connections: 2}))
		if _, err := (&Transport{}).Open(testContext(t), d, transport.Options{}); !errors.Is(err, region.ErrNotPermitted) {
			t.Errorf("without TLS: %v", err)
		}
	})
	t.Run("server", func(t *testing.T) {
		need(t, "nbdsh", "python3-libnbd")
		s := serve(t, &Transport{ServerTLS: srv, RequireTLS: true}, transport.One{Name: "x", Store: viewed{newRAM(1<<20, 1)}})
		host, port, _ := net.SplitHostPort(s.addr)
		run(t, "nbdsh", "python3-libnbd", "-c", fmt.Sprintf(`
h.set_tls(nbd.TLS_REQUIRE)
h.set_tls_certificates(%q)
h.set_tls_verify_peer(False)
h.set_export_name("x")
h.connect_tcp(%q, %q)
assert h.get_tls_negotiated()
b = h.pread(1 << 20, 0)
h.pwrite(b, 0)
h.shutdown()
`, dir, host, port))
	})
}
