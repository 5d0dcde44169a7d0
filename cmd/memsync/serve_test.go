package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
	"memsync/strategies/replay"
	"memsync/strategies/transport"
	"memsync/strategies/transport/nbd"
)

// foreign runs a program of others to its end; the test is left out where it is
// missing, unless MEMSYNC_MUST_RUN says that it may not be.
func foreign(t *testing.T, name, pkg string, args ...string) (stdout string, err error) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		replay.Missing(t, "nbd-interop", name, "is missing: apt-get install", pkg)
	}
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(t.Context(), path, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err = cmd.Run(); err != nil {
		err = fmt.Errorf("%s %s: %w\n%s%s", name, strings.Join(args, " "), err, out.String(), errs.String())
	}
	return out.String(), err
}

func must(t *testing.T, name, pkg string, args ...string) string {
	t.Helper()
	out, err := foreign(t, name, pkg, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// serving starts memsync serve on a free port and returns the URI of each region.
func serving(t *testing.T, dir string, args ...string) (c *command, uris map[string]string) {
	t.Helper()
	c = launch(t, dir, append([]string{"serve", "--listen", "127.0.0.1:0"}, args...)...)
	// stdout and stderr come by pipes of their own: wait for each region's line.
	regions := len(slices.DeleteFunc(slices.Clone(args), func(a string) bool { return strings.HasPrefix(a, "-") }))
	c.until("it serves", func() bool { return strings.Count(c.stdout.String(), "\n") == regions })
	uris = map[string]string{}
	for line := range strings.Lines(c.stdout.String()) {
		f := strings.Split(strings.TrimSpace(line), "\t")
		uris[f[0]] = f[2]
	}
	return c, uris
}

func address(uri string) string {
	_, rest, _ := strings.Cut(uri, "://")
	return strings.SplitN(rest, "/", 2)[0]
}

// image makes a file with a hole in the middle.
func image(t *testing.T, path string, seed uint64, size int64) []byte {
	t.Helper()
	want := make([]byte, size)
	region.Content{Seed: seed}.Fill(want, 0)
	lo, hi := size/4&^0xffff, size/2&^0xffff
	clear(want[lo:hi])
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, p := range [][2]int64{{0, lo}, {hi, size}} {
		if _, err := f.WriteAt(want[p[0]:p[1]], p[0]); err != nil {
			t.Fatal(err)
		}
	}
	return want
}

func TestServeInterop(t *testing.T) {
	dir := t.TempDir()
	const size = 4<<20 + 512
	one := image(t, filepath.Join(dir, "one"), 1, size)
	image(t, filepath.Join(dir, "two"), 2, size)
	c, uri := serving(t, dir, "one", "second region=two")
	image(t, filepath.Join(dir, "three"), 3, size)
	ro, roURI := serving(t, dir, "--read-only", "ro=three", "again=three")

	t.Run("nbdinfo", func(t *testing.T) {
		var info struct {
			Exports []struct {
				Name string `json:"export-name"`
				Size int64  `json:"export-size"`
				RO   bool   `json:"is_read_only"`
			}
		}
		if err := json.Unmarshal([]byte(must(t, "nbdinfo", "libnbd-bin", "--json", "--list", "nbd://"+address(uri["one"]))), &info); err != nil {
			t.Fatal(err)
		}
		if len(info.Exports) != 2 || info.Exports[0].Name != "one" || info.Exports[1].Name != "second region" || info.Exports[1].Size != size || info.Exports[0].RO {
			t.Errorf("%+v", info)
		}
		if out := must(t, "nbdinfo", "libnbd-bin", "--is", "readonly", roURI["ro"]); out != "" {
			t.Error(out)
		}
		if _, err := foreign(t, "nbdinfo", "libnbd-bin", "nbd://"+address(uri["one"])+"/nothing"); err == nil {
			t.Error("a missing region was opened")
		}
		if _, err := foreign(t, "nbdinfo", "libnbd-bin", "nbd://"+address(uri["one"])); err == nil {
			t.Error("the empty name is neither of two regions")
		}
	})
	t.Run("holes", func(t *testing.T) {
		var ext []struct{ Offset, Length, Type int64 }
		if err := json.Unmarshal([]byte(must(t, "nbdinfo", "libnbd-bin", "--json", "--map", uri["one"])), &ext); err != nil {
			t.Fatal(err)
		}
		if len(ext) != 3 || ext[1].Type != 3 || ext[1].Length != 1<<20 {
			t.Errorf("%+v", ext)
		}
	})
	t.Run("nbdcopy", func(t *testing.T) {
		down := filepath.Join(dir, "down")
		for _, u := range []string{uri["one"], roURI["ro"]} {
			must(t, "nbdcopy", "libnbd-bin", u, down)
		}
		must(t, "nbdcopy", "libnbd-bin", uri["one"], down)
		if got, err := os.ReadFile(down); err != nil || !bytes.Equal(got, one) {
			t.Errorf("copy differs, %v", err)
		}
		must(t, "nbdcopy", "libnbd-bin", "--flush", down, uri["second region"])
		if got, err := os.ReadFile(filepath.Join(dir, "two")); err != nil || !bytes.Equal(got, one) {
			t.Errorf("upload differs, %v", err)
		}
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(dir, "two"), &st); err != nil || st.Blocks*512 > size-1<<19 {
			t.Errorf("the hole is allocated at the destination: %d blocks, %v", st.Blocks, err)
		}
		if _, err := foreign(t, "nbdcopy", "libnbd-bin", down, roURI["ro"]); err == nil {
			t.Error("a read-only region was written")
		}
	})
	t.Run("qemu-img", func(t *testing.T) {
		out := filepath.Join(dir, "qemu")
		must(t, "qemu-img", "qemu-utils", "convert", "-f", "raw", "-O", "raw", uri["one"], out)
		must(t, "qemu-img", "qemu-utils", "compare", "-f", "raw", "-F", "raw", uri["one"], out)
		must(t, "qemu-img", "qemu-utils", "convert", "-n", "-f", "raw", "-O", "raw", roURI["again"], uri["second region"])
		must(t, "qemu-img", "qemu-utils", "compare", "-f", "raw", "-F", "raw", uri["second region"], roURI["ro"])
	})
	c.signal(c.cmd.Process.Pid, unix.SIGTERM)
	c.exit(130, 5*time.Second)
	ro.signal(ro.cmd.Process.Pid, unix.SIGINT)
	ro.exit(130, 5*time.Second)
}

// Garbage, silence and the limit of connections cost nobody else anything, and
// a signal ends serve though clients are connected.
func TestServeBadClients(t *testing.T) {
	dir := t.TempDir()
	want := image(t, filepath.Join(dir, "one"), 1, 1<<20)
	c, uri := serving(t, dir, "one", "--connections=4")
	addr := address(uri["one"])
	dial := transport.DialFunc(nbdDial(addr))
	for range 2 { // two that say nothing stay
		nc, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
	}
	garbage, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = garbage.Write(bytes.Repeat([]byte("GET / HTTP/1.1\r\n"), 100))
	c.until("it says what was wrong", func() bool { return strings.Contains(c.stderr.String(), "client flags") })
	garbage.Close()

	var wg sync.WaitGroup
	for range 6 { // more than there are places left: they take turns
		wg.Go(func() {
			s, err := (&nbd.Transport{}).Open(t.Context(), dial, transport.Options{Name: "one", Connections: 1})
			if err != nil {
				t.Error(err)
				return
			}
			defer s.Close()
			got := make([]byte, len(want))
			if err := s.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("read: %v", err)
			}
		})
	}
	wg.Wait()
	s, err := (&nbd.Transport{}).Open(t.Context(), dial, transport.Options{Name: "one", Connections: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.WriteAt(t.Context(), []byte("last words"), 5); err != nil {
		t.Error(err)
	}
	c.signal(c.cmd.Process.Pid, unix.SIGTERM)
	c.exit(130, 5*time.Second)
	if err := s.ReadAt(t.Context(), make([]byte, 1), 0); err == nil {
		t.Error("still served")
	}
	if got, err := os.ReadFile(filepath.Join(dir, "one")); err != nil || string(got[5:15]) != "last words" {
		t.Errorf("an acknowledged write is missing: %v", err)
	}
}

func nbdDial(addr string) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "tcp", addr) }
}

// A file that shrinks gives errors, not made-up bytes.
func TestServeFileShrinks(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "one")
	image(t, path, 1, 1<<20)
	_, uri := serving(t, dir, "one")
	s, err := (&nbd.Transport{}).Open(t.Context(), transport.DialFunc(nbdDial(address(uri["one"]))), transport.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := os.Truncate(path, 4096); err != nil {
		t.Fatal(err)
	}
	if err := s.ReadAt(t.Context(), make([]byte, 8192), 900<<10); err == nil {
		t.Error("bytes that are gone were read")
	}
	if err := s.ReadAt(t.Context(), make([]byte, 4096), 0); err != nil {
		t.Error(err)
	}
}

// A block device is served like a file, by its own size.
func TestServeBlockDevice(t *testing.T) {
	dir := t.TempDir()
	want := image(t, filepath.Join(dir, "one"), 1, 1<<20)
	loop, err := exec.Command("losetup", "--find", "--show", filepath.Join(dir, "one")).Output()
	if err != nil {
		if _, missing := os.Stat("/dev/loop-control"); missing == nil && os.Geteuid() == 0 {
			t.Fatalf("this kernel has loop devices: %v", err)
		}
		t.Skipf("no loop device can be had here: %v", err)
	}
	dev := strings.TrimSpace(string(loop))
	t.Cleanup(func() { _ = exec.Command("losetup", "--detach", dev).Run() })
	_, uri := serving(t, dir, "disk="+dev)
	s, err := (&nbd.Transport{}).Open(t.Context(), transport.DialFunc(nbdDial(address(uri["disk"]))), transport.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	got := make([]byte, len(want))
	if err := s.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, want) || s.Size() != int64(len(want)) {
		t.Errorf("%d bytes, %v", s.Size(), err)
	}
	z := s.(region.Zeroer)
	if err := z.WriteZeroes(t.Context(), 1000, 70000, true); err != nil { // not aligned
		t.Error(err)
	}
	clear(want[1000:71000])
	if err := s.WriteAt(t.Context(), []byte("x"), 3); err != nil {
		t.Error(err)
	}
	want[3] = 'x'
	if err := s.Flush(t.Context()); err != nil {
		t.Error(err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "one")); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the device's file differs, %v", err)
	}
}
