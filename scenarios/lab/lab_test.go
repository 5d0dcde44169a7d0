package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

func TestMain(m *testing.M) {
	if code, ok := Main(os.Args[1:]); ok {
		os.Exit(code)
	}
	if os.Getenv("LAB_TEST_CHILD") != "" {
		os.Exit(child())
	}
	goleak.VerifyTestMain(m)
}

// kernel returns the lab kernel, fetched if need be.
func kernel(t testing.TB) *Kernel {
	t.Helper()
	if os.Getenv("LAB") == "0" {
		t.Skip("LAB=0 leaves the lab kernel out")
	}
	if os.Getenv("MEMSYNC_LAB") == "1" {
		t.Skip("this is the lab already")
	}
	dir, err := CacheDir(os.Getenv)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	k, err := Ensure(ctx, dir, os.Stderr)
	if err != nil {
		t.Fatalf("%v\nmend it with: memsync lab --refresh (needs the network), or leave these tests out with LAB=0", err)
	}
	return k
}

// run runs a command and checks that nothing is left.
func run(t *testing.T, c Command) (status int, stdout, stderr string, err error) {
	t.Helper()
	k := kernel(t)
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	var out, words bytes.Buffer
	c.Stdout, c.Stderr = &out, &words
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	status, err = k.Run(ctx, c)
	nothingLeft(t, tmp)
	return status, out.String(), words.String(), err
}

// kernels returns the processes of lab kernels whose work folder is below tmp.
func kernels(tmp string) (pids []int) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		b, _ := os.ReadFile(d + "/cmdline")
		if bytes.Contains(b, []byte("rootfstype=hostfs")) && bytes.Contains(b, []byte(tmp+"/"+workPrefix)) {
			pid, _ := strconv.Atoi(filepath.Base(d))
			pids = append(pids, pid)
		}
	}
	return pids
}

// session lists the processes of a session: the kernel's own and its guests'.
func sessionOf(sid int) (pids []string) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		b, _ := os.ReadFile(d + "/stat")
		_, rest, _ := strings.Cut(string(b), ") ")
		if f := strings.Fields(rest); len(f) > 3 && f[3] == strconv.Itoa(sid) && f[0] != "Z" {
			pids = append(pids, filepath.Base(d))
		}
	}
	return pids
}

func within(t *testing.T, what string, limit time.Duration, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !ok(); {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v", what, limit)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func nothingLeft(t *testing.T, tmp string) {
	t.Helper()
	if e, _ := os.ReadDir(tmp); len(e) != 0 {
		t.Errorf("left behind: %v", e)
	}
	within(t, "the kernel's processes are gone", 3*time.Second, func() bool { return len(kernels(tmp)) == 0 })
}

func TestStatus(t *testing.T) {
	for _, c := range []struct {
		args []string
		want int
	}{
		{[]string{"true"}, 0},
		{[]string{"sh", "-c", "exit 77"}, 77},
		{[]string{"sh", "-c", "kill -TERM $$"}, 128 + 15},
		{[]string{"no-such-program"}, 127},
		{[]string{"/etc/passwd"}, 126},
		// A background process must not hold the lab up.
		{[]string{"sh", "-c", "sleep 100 & exit 3"}, 3},
	} {
		status, out, words, err := run(t, Command{Args: c.args})
		if err != nil || status != c.want || out != "" || (words == "") != (c.want < 126 || c.want > 127) {
			t.Errorf("%q: status %d, want %d; %q %q %v", c.args, status, c.want, out, words, err)
		}
	}
}

func TestStreamsEnvironmentFolder(t *testing.T) {
	dir := t.TempDir()
	input := make([]byte, 100_001) // every byte value, and more than all buffers
	for i := range input {
		input[i] = byte(i * 7)
	}
	status, out, words, err := run(t, Command{
		Args:  []string{"sh", "-c", `cat; printf 'to stderr' >&2; printf '%s|%s|%s|%s' "$PWD" "$EMPTY" "$ODD" "$MEMSYNC_LAB" >result; id -u >>result; uname -r >>result; df -P "$TMPDIR" | tail -1 | cut -d' ' -f1 >>result`},
		Env:   []string{"PATH=" + os.Getenv("PATH"), "EMPTY=", "ODD=a'b\n\"$x=y"},
		Dir:   dir,
		Stdin: bytes.NewReader(input),
	})
	if err != nil || status != 0 {
		t.Fatalf("status %d, %v, %s", status, err, words)
	}
	if out != string(input) || words != "to stderr" {
		t.Errorf("%d bytes of output, want %d; stderr %q", len(out), len(input), words)
	}
	// The results folder is the host's own.
	b, err := os.ReadFile(filepath.Join(dir, "result"))
	want := dir + "||a'b\n\"$x=y|10\n" + kernel(t).Release + "\ntmpfs\n"
	if err != nil || string(b) != want {
		t.Errorf("result %q, want %q, %v", b, want, err)
	}
}

func TestKernelFeatures(t *testing.T) {
	status, out, words, err := run(t, Command{Args: []string{"sh", "-ec", `
		test -b /dev/nbd0; test -c /dev/fuse; test -c /dev/net/tun
		modprobe dummy; test -d /sys/module/dummy; modprobe -r dummy; ! test -d /sys/module/dummy
		modprobe btrfs; ! modprobe no-such-module
		mount -t overlay -o lowerdir=/etc,upperdir=$TMPDIR/a,workdir=$TMPDIR/b x /mnt 2>/dev/null || true
		test -d /sys/module/overlay; grep -q bbr /proc/sys/net/ipv4/tcp_available_congestion_control`}})
	if err != nil || status != 0 {
		t.Errorf("status %d, %v\n%s%s", status, err, out, words)
	}
}

func TestLongOutputAndClosedPipe(t *testing.T) {
	status, out, _, err := run(t, Command{Args: []string{"head", "-c", "1000000", "/dev/zero"}})
	if err != nil || status != 0 || len(out) != 1000000 {
		t.Errorf("status %d, %d bytes, %v", status, len(out), err)
	}
	k := kernel(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	defer w.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	status, err = k.Run(ctx, Command{Args: []string{"yes"}, Stdout: w})
	if err != nil || status != 128+int(unix.SIGPIPE) {
		t.Errorf("yes into a closed pipe: status %d, %v", status, err)
	}
}

func TestTimeout(t *testing.T) {
	k, tmp := kernel(t), t.TempDir()
	t.Setenv("TMPDIR", tmp)
	for _, script := range []string{"sleep 60", "trap '' TERM; while :; do sleep 1; done"} {
		ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
		start := time.Now()
		_, err := k.Run(ctx, Command{Args: []string{"sh", "-c", script}})
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 5*time.Second {
			t.Errorf("%s: %v after %v", script, err, time.Since(start))
		}
		nothingLeft(t, tmp)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // during the boot
	if _, err := k.Run(ctx, Command{Args: []string{"true"}}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled at once: %v", err)
	}
	nothingLeft(t, tmp)
}

func TestSeveralAtOnce(t *testing.T) {
	k, tmp := kernel(t), t.TempDir()
	t.Setenv("TMPDIR", tmp)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var group sync.WaitGroup
	for i := range 3 {
		group.Go(func() {
			var out bytes.Buffer
			status, err := k.Run(ctx, Command{Args: []string{"sh", "-c", "read x; sleep 0.2; echo $x; exit " + strconv.Itoa(i)}, Stdin: strings.NewReader(fmt.Sprintln("in", i)), Stdout: &out})
			if err != nil || status != i || out.String() != fmt.Sprintln("in", i) {
				t.Errorf("kernel %d: status %d, %q, %v", i, status, out.String(), err)
			}
		})
	}
	group.Wait()
	nothingLeft(t, tmp)
}

// child is a process that a test kills.
func child() int {
	k, err := Find(os.Getenv("LAB_TEST_CHILD"))
	if err != nil {
		panic(err)
	}
	status, err := k.Run(context.Background(), Command{Args: []string{"sh", "-c", os.Getenv("LAB_TEST_SCRIPT")}, Stdout: os.Stdout, Stderr: os.Stderr})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return status
}

func TestSIGKILL(t *testing.T) {
	kernel(t)
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	cache, _ := CacheDir(os.Getenv)
	c := exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), "LAB_TEST_CHILD="+cache, "LAB_TEST_SCRIPT=echo up; sleep 100")
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	up := make([]byte, 3)
	if _, err := io.ReadFull(out, up); err != nil {
		t.Fatal(err)
	}
	pids := kernels(tmp)
	if len(pids) == 0 {
		t.Fatal("no kernel process found")
	}
	sid, err := unix.Getsid(pids[0])
	if err != nil {
		t.Fatal(err)
	}
	if n := len(sessionOf(sid)); n < 2 {
		t.Errorf("%d processes in the kernel's session: the test looks at the wrong ones", n)
	}
	if s := Stale(); len(s) != 0 {
		t.Errorf("in use, yet stale: %v", s)
	}
	if err := c.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = c.Wait()
	within(t, "the kernel goes with its parent", 3*time.Second, func() bool { return len(sessionOf(sid)) == 0 })
	var stale []string
	within(t, "the folder is stale", time.Second, func() bool { stale = Stale(); return len(stale) == 1 })
	if cleaned := Clean(); !slices.Equal(cleaned, stale) {
		t.Errorf("cleaned %v, stale %v", cleaned, stale)
	}
	nothingLeft(t, tmp)
}

func TestKernelDies(t *testing.T) {
	k := kernel(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	_, err := k.Run(ctx, Command{Args: []string{"sh", "-c", "echo c >/proc/sysrq-trigger; sleep 10"}})
	if !errors.Is(err, ErrKernel) || !strings.Contains(err.Error(), "Kernel panic") {
		t.Errorf("crash: %v", err)
	}
	_, err = k.Run(ctx, Command{Args: []string{"true"}, Dir: "/nowhere"})
	if err == nil || !strings.Contains(err.Error(), "/nowhere") {
		t.Errorf("no such folder: %v", err)
	}
}

func TestRefused(t *testing.T) {
	k := &Kernel{Dir: "/tmp"}
	for what, c := range map[string]Command{
		"no command":      {},
		"at least 64MiB":  {Args: []string{"true"}, Memory: 1 << 20},
		"does not see":    {Args: []string{"true"}, Dir: "/run"},
		`CPU "many"`:      {Args: []string{"true"}, Dir: "/", CPU: "many"},
		`CPU "123456789"`: {Args: []string{"true"}, Dir: "/", CPU: "123456789"},
	} {
		if _, err := k.Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: %v", what, err)
		}
	}
	t.Setenv("MEMSYNC_LAB", "1")
	if _, err := k.Run(t.Context(), Command{Args: []string{"true"}}); !errors.Is(err, region.ErrNotSupported) {
		t.Errorf("in the lab: %v", err)
	}
}

func TestCacheMovesAndIsChecked(t *testing.T) {
	k := kernel(t)
	moved := filepath.Join(t.TempDir(), "a b", "kernel")
	if err := os.MkdirAll(moved+"/lib", 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range append(hostFiles(), "manifest.json") {
		if err := copyFile(filepath.Join(moved, name), filepath.Join(k.Dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(filepath.Join(k.Dir, "modules"), moved+"/modules"); err != nil {
		t.Fatal(err)
	}
	m, err := Find(filepath.Dir(moved))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if status, err := m.Run(ctx, Command{Args: []string{"modprobe", "dummy"}}); status != 0 || err != nil {
		t.Errorf("in a moved cache: status %d, %v", status, err)
	}
	if err := k.Verify(); err != nil {
		t.Error(err)
	}
	if m.Pinned != pinned(k.Packages) {
		t.Errorf("pinned: %t", m.Pinned)
	}
	// A cache that another memsync filled says what this one's pins make of it.
	path := filepath.Join(moved, "manifest.json")
	for _, recorded := range []bool{true, false} {
		other := m.Manifest
		other.Pinned = recorded
		if recorded {
			other.Packages = []Package{{"user-mode-linux", "9.9um1", strings.Repeat("0", 64), 1}}
		} else {
			other.Packages = pins()
		}
		b, err := json.Marshal(other)
		if err == nil {
			err = os.WriteFile(path, b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		if got, err := Find(filepath.Dir(moved)); err != nil || got.Pinned == recorded {
			t.Errorf("packages %v recorded as pinned %t: %v, %v", other.Packages, recorded, got, err)
		}
	}
	f, err := os.OpenFile(moved+"/linux", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt([]byte{0xff}, 1<<20)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Find(filepath.Dir(moved)); !errors.Is(err, region.ErrMismatch) {
		t.Errorf("changed kernel: %v", err)
	}
	if _, err := Find(t.TempDir()); !errors.Is(err, region.ErrMissing) {
		t.Errorf("empty cache: %v", err)
	}
}

// TestFetchFails checks the words when apt or the network is missing, and that
// a cache that was filled is not harmed.
func TestFetchFails(t *testing.T) {
	cache := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	tools := t.TempDir()
	t.Setenv("PATH", tools)
	if _, err := Ensure(ctx, cache, nil); !errors.Is(err, region.ErrNotSupported) || !strings.Contains(err.Error(), "apt-get is missing") {
		t.Errorf("without apt: %v", err)
	}
	fake := func(name, script string) {
		if err := os.WriteFile(filepath.Join(tools, name), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	fake("dpkg-deb", "exit 1")
	fake("apt-get", `case "$*" in
		*indextargets*) echo http://192.0.2.1/debian/ bookworm main ;;
		*) echo 'E: Failed to fetch http://192.0.2.1/debian/dists/sid/InRelease  Could not connect' >&2; exit 100 ;;
		esac`)
	_, err := Ensure(ctx, cache, nil)
	if err == nil || !strings.Contains(err.Error(), "Could not connect") || !strings.Contains(err.Error(), "MEMSYNC_LAB_CACHE") {
		t.Errorf("without network: %v", err)
	}
	fake("apt-get", "echo http://192.0.2.1/ubuntu noble main")
	if _, err := Ensure(ctx, cache, nil); err == nil || !strings.Contains(err.Error(), "MEMSYNC_LAB_APT_URI") {
		t.Errorf("without a Debian archive: %v", err)
	}
	fake("apt-get", "while :; do :; done")
	ctx, cancel = context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := Ensure(ctx, cache, nil); err == nil {
		t.Error("a hanging apt went well")
	}
	if e, _ := filepath.Glob(cache + "/.fetch*"); len(e) != 0 {
		t.Errorf("left behind: %v", e)
	}
}

// TestDownload: a package that is not what its pin says is refused; where the archive
// does not have the pins any more, its newest are taken, and are not called pinned.
func TestDownload(t *testing.T) {
	tools := t.TempDir()
	t.Setenv("PATH", tools)
	for name, script := range map[string]string{
		// Its packages are files of one line: name and version.
		"apt-get": `for last; do :; done
			case "$*" in
			*=*) test -n "$PINS" || exit 100
				echo user-mode-linux 7.2um1 >uml.deb; echo libc6 2.43-7 >libc.deb ;;
			*) echo user-mode-linux 9.9um1 >uml.deb; echo libc6 9.9 >libc.deb; test -n "$MISSING" || exit 0
				: >libc.deb ;;
			esac`,
		"dpkg-deb": `for last; do :; done; read -r line <"$last" && printf %s "$line"`,
	} {
		if err := os.WriteFile(filepath.Join(tools, name), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	download := func() ([]Package, string, error) {
		var words bytes.Buffer
		a := &apt{dir: t.TempDir(), conf: "none", uri: "http://192.0.2.1/debian", suite: "sid"}
		got, err := a.download(t.Context(), &words)
		return got, words.String(), err
	}
	got, words, err := download()
	if err != nil || len(got) != 2 || got[1].Version != "9.9um1" || pinned(got) || !strings.Contains(words, "not tested with") {
		t.Errorf("without the pins: %v, %v, %q", got, err, words)
	}
	t.Setenv("MISSING", "1")
	if got, _, err := download(); err == nil {
		t.Errorf("an unreadable package: %v", got)
	}
	t.Setenv("PINS", "1")
	if got, _, err := download(); !errors.Is(err, region.ErrMismatch) || !strings.Contains(err.Error(), "want "+pins()[1].SHA256) {
		t.Errorf("the pinned version with another content: %v, %v", got, err)
	}
	if !pinned(pins()) || pinned(pins()[:1]) || pinned(append(pins(), Package{Name: "more"})) || pinned([]Package{pins()[0], {Name: "libc6"}}) {
		t.Error("pinned: other than all pins")
	}
}

func FuzzSpec(f *testing.F) {
	f.Add(spec{Args: []string{"a", ""}, Env: []string{"k=v"}, Dir: "/", Work: "/w", Modules: "/m", Udevd: "/u"}.encode())
	f.Add([]byte{1, 0, 0, 0, 255, 255, 255, 255})
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := decodeSpec(b)
		if err == nil && !bytes.Equal(s.encode(), b) {
			t.Errorf("%x decodes to %+v, which encodes to %x", b, s, s.encode())
		}
	})
}

func FuzzFrames(f *testing.F) {
	f.Add(byte('o'), []byte("text"))
	f.Fuzz(func(t *testing.T, kind byte, p []byte) {
		var b bytes.Buffer
		if err := writeFrame(&b, kind, p); err != nil {
			t.Fatal(err)
		}
		var got []byte
		r := newFrameReader(&b)
		for {
			k, q, err := r.next()
			if err == io.EOF {
				break
			}
			if err != nil || k != kind {
				t.Fatal(k, err)
			}
			got = append(got, q...)
		}
		if !bytes.Equal(got, p) {
			t.Errorf("%d bytes became %d", len(p), len(got))
		}
		r = newFrameReader(bytes.NewReader(p)) // garbage must end, not panic
		for {
			if _, _, err := r.next(); err != nil {
				break
			}
		}
	})
}
