package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"memsync/scenarios"
	"memsync/scenarios/mount"
	"memsync/strategies/all"
	"memsync/strategies/region"
	"memsync/strategies/replay"
)

// needFUSE skips where this machine has no FUSE for this user, unless MEMSYNC_MUST_RUN says
// that it must. (The lab kernel has no part in it: what is tested are whole programs of the host.)
func needFUSE(t *testing.T) {
	t.Helper()
	err := all.ProbeDevice("fuse")
	if errors.Is(err, region.ErrNotSupported) || errors.Is(err, region.ErrNotPermitted) || err == nil && os.Geteuid() != 0 {
		replay.Missing(t, "fuse", "mounting for others needs root and FUSE:", err)
	} else if err != nil {
		t.Fatal(err)
	}
}

// mounting starts memsync mount and waits until it says that it is ready.
func mounting(t *testing.T, dir string, regions int, args ...string) *command {
	t.Helper()
	t.Cleanup(func() { scenarios.UnmountBelow(dir) }) // after the process is gone: of a test that failed
	c := launch(t, dir, append([]string{"mount"}, args...)...)
	c.until("it is mounted", func() bool { return strings.Count(c.stdout.String(), "\n") == regions })
	return c
}

// left fails where something is left in dir beside names, or in a temporary folder.
func left(t *testing.T, c *command, dir string, names ...string) {
	t.Helper()
	for d, want := range map[string][]string{dir: names, c.tmp: nil} {
		entries, err := os.ReadDir(d)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if !slices.Contains(want, e.Name()) {
				t.Errorf("%s is left in %s", e.Name(), d)
			}
		}
	}
}

func sqlite(t *testing.T, args ...string) string {
	t.Helper()
	return strings.TrimSpace(must(t, "sqlite3", "sqlite3", append([]string{"-cmd", ".timeout 20000"}, args...)...))
}

// database makes a database, and a larger file of it, as block devices have it.
func database(t *testing.T, path string) {
	t.Helper()
	sqlite(t, path, `create table t(k integer primary key, v text);
		with recursive c(x) as (values(1) union all select x+1 from c where x<3000) insert into t select x, printf('%0100d', x) from c;`)
	if err := os.Truncate(path, 2<<20); err != nil {
		t.Fatal(err)
	}
}

// TestMountSQLite: a real program reads and writes the mounted file; after Ctrl-C
// the served file has the same bytes, and nothing else is left.
func TestMountSQLite(t *testing.T) {
	needFUSE(t)
	for _, strategy := range []string{"managed-mount", "direct-mount"} {
		t.Run(strategy, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "here.db")
			database(t, filepath.Join(dir, "db"))
			server, uri := serving(t, dir, "db")
			c := mounting(t, dir, 1, uri["db"], "here.db", "--strategy", strategy, "--mode", "0640")
			if fi, err := os.Stat(path); err != nil || fi.Mode() != 0o640 || fi.Size() != 2<<20 {
				t.Errorf("%v, %v", fi, err)
			}
			if got := sqlite(t, path, "select count(*), v=printf('%0100d', 77) from t where k=77; select count(*) from t"); got != "1|1\n3000" {
				t.Errorf("read: %s", got)
			}
			sqlite(t, path, "update t set v='changed' where k%7=0; delete from t where k%11=0; insert into t values(5000,'new')")
			if got := sqlite(t, path, "pragma integrity_check; select v from t where k=5000"); got != "ok\nnew" {
				t.Errorf("after writes: %s", got)
			}
			mapped, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			second := launch(t, dir, "mount", uri["db"], "second", "--strategy", strategy)
			second.exit(5, patience)
			if !strings.Contains(second.stderr.String(), "has a writer already") {
				t.Errorf("a second writer: %s", second.stderr.String())
			}
			c.signal(c.cmd.Process.Pid, unix.SIGINT)
			c.exit(0, patience)
			served, err := os.ReadFile(filepath.Join(dir, "db"))
			if err != nil || !bytes.Equal(served, mapped) {
				t.Errorf("the served file differs from what was mounted: %v", err)
			}
			if got := sqlite(t, filepath.Join(dir, "db"), "pragma integrity_check; select count(*) from t where v='changed'"); got != "ok\n390" {
				t.Errorf("at the source: %s", got)
			}
			server.signal(server.cmd.Process.Pid, unix.SIGTERM)
			server.exit(130, patience)
			left(t, c, dir, "db")
		})
	}
}

// TestMountServerKilled: the server is killed while a program commits, and comes
// back. The program waits meanwhile and sees no error; what it committed is there.
func TestMountServerKilled(t *testing.T) {
	needFUSE(t)
	for _, strategy := range []string{"managed-mount", "direct-mount"} {
		t.Run(strategy, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "here.db")
			database(t, filepath.Join(dir, "db"))
			addr := freeAddress(t)
			serve := func() *command {
				s := launch(t, dir, "serve", "db", "--listen", addr)
				s.until("it serves", func() bool { return strings.Contains(s.stdout.String(), "\n") })
				return s
			}
			s := serve()
			earlier := mounting(t, dir, 1, addr+"/db", "here.db") // so that the lease has another number than after a restart
			earlier.signal(earlier.cmd.Process.Pid, unix.SIGTERM)
			earlier.exit(0, patience)
			c := mounting(t, dir, 1, addr+"/db", "here.db", "--strategy", strategy, "--set", "check_interval=20ms")
			const commits = 12
			halfway, finished := make(chan struct{}), make(chan error, 1)
			go func() {
				for i := range commits {
					if i == commits/3 {
						close(halfway)
					}
					out, err := exec.Command("sqlite3", "-cmd", ".timeout 20000", path, fmt.Sprintf("insert into t values(%d,'kept')", 10000+i)).CombinedOutput()
					if err != nil {
						finished <- fmt.Errorf("commit %d: %w: %s", i, err, out)
						return
					}
				}
				finished <- nil
			}()
			<-halfway
			s.signal(s.cmd.Process.Pid, unix.SIGKILL)
			s.exit(-1, patience)
			c.until("it notices", func() bool { return strings.Contains(c.stderr.String(), "the source is gone") })
			s = serve()
			if err := <-finished; err != nil {
				t.Error(err)
			}
			if got := sqlite(t, path, "select count(*) from t where v='kept'; pragma integrity_check"); got != fmt.Sprintf("%d\nok", commits) {
				t.Errorf("on the mount: %s", got)
			}
			if got := statusOf(t, c).Regions[0]; got.Counters["reconnects"] < 1 || got.Gone != 0 {
				t.Errorf("status: %+v", got)
			}
			c.signal(c.cmd.Process.Pid, unix.SIGTERM)
			c.exit(0, patience)
			s.signal(s.cmd.Process.Pid, unix.SIGTERM)
			s.exit(130, patience)
			if got := sqlite(t, filepath.Join(dir, "db"), "select count(*) from t where v='kept'; pragma integrity_check"); got != fmt.Sprintf("%d\nok", commits) {
				t.Errorf("at the source: %s", got)
			}
			left(t, c, dir, "db")
		})
	}
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// beside runs memsync to its end where another one's temporary folder is.
func beside(t *testing.T, c *command, args ...string) (stdout string, code int) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = "memsync"
	cmd.Dir, cmd.Env = c.dir, append(os.Environ(), "TMPDIR="+c.tmp)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

func statusOf(t *testing.T, c *command) mount.Status {
	t.Helper()
	out, code := beside(t, c, "status", "--json")
	var all []mount.Status
	if err := json.Unmarshal([]byte(out), &all); err != nil || code != 0 || len(all) != 1 {
		t.Fatalf("exit status %d, %v: %s", code, err, out)
	}
	return all[0]
}

// TestMountKilled: what a mount leaves that was killed is found by the next mount at
// that path, and removed by clean; a living one is not touched.
func TestMountKilled(t *testing.T) {
	needFUSE(t)
	dir := t.TempDir()
	image(t, filepath.Join(dir, "one"), 1, 1<<20)
	_, uri := serving(t, dir, "one")
	c := mounting(t, dir, 1, uri["one"], "here", "--read-only")
	if out, code := beside(t, c, "clean"); out != "" || code != 0 {
		t.Errorf("clean touched a living mount: %d, %s", code, out)
	}
	again := launch(t, dir, "mount", uri["one"], "here", "--read-only")
	again.exit(6, patience)
	c.signal(c.cmd.Process.Pid, unix.SIGKILL)
	c.exit(-1, patience)
	if _, err := os.ReadFile(filepath.Join(dir, "here")); !errors.Is(err, unix.ENOTCONN) {
		t.Errorf("read what nobody serves: %v", err)
	}
	again = launch(t, dir, "mount", uri["one"], "here", "--read-only")
	again.exit(6, patience)
	if !strings.Contains(again.stderr.String(), "memsync clean") {
		t.Errorf("no advice: %s", again.stderr.String())
	}
	if out, code := beside(t, c, "status"); out != "" || code != 0 {
		t.Errorf("status of nothing: %d, %s", code, out)
	}
	if out, code := beside(t, c, "clean"); code != 0 || !strings.Contains(out, filepath.Join(dir, "here")) {
		t.Errorf("clean: %d, %s", code, out)
	}
	left(t, c, dir, "one")
	c = mounting(t, dir, 1, uri["one"], "here", "--read-only")
	if err := unix.Unmount(filepath.Join(dir, "here"), 0); err != nil { // as umount(8) does
		t.Fatal(err)
	}
	c.exit(0, patience)
	left(t, c, dir, "one")
}

// TestMountUnreachable: a source that goes and does not come back: readers get
// errors once --reconnect has passed, and the exit status says what was lost.
func TestMountUnreachable(t *testing.T) {
	needFUSE(t)
	dir := t.TempDir()
	image(t, filepath.Join(dir, "one"), 1, 4<<20)
	s, uri := serving(t, dir, "one")
	c := mounting(t, dir, 1, uri["one"], "here", "--reconnect", "1s", "--grace", "3s", "--set", "push_interval=1h", "--pull-workers", "0", "--set", "pull_first=0")
	s.signal(s.cmd.Process.Pid, unix.SIGKILL)
	s.exit(-1, patience)
	if _, err := os.ReadFile(filepath.Join(dir, "here")); !errors.Is(err, unix.EIO) {
		t.Errorf("read without a source: %v", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "here"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(bytes.Repeat([]byte("lost"), 32<<10)); err != nil { // two whole chunks: into the cache
		t.Error(err)
	}
	f.Close()
	if got := statusOf(t, c).Regions[0]; got.Counters["dirty_bytes"] != 128<<10 || got.Error == "" {
		t.Errorf("status: %+v", got)
	}
	c.signal(c.cmd.Process.Pid, unix.SIGTERM)
	c.exit(1, patience)
	left(t, c, dir, "one")
}

// TestMountFolder: all regions of a server as files of a folder, with modes, status and metrics.
func TestMountFolder(t *testing.T) {
	needFUSE(t)
	dir := t.TempDir()
	one, two := image(t, filepath.Join(dir, "one"), 1, 1<<20), image(t, filepath.Join(dir, "two"), 2, 3<<20+5)
	_, uri := serving(t, dir, "one", "second one=two")
	for _, d := range []string{"all", "single"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	c := mounting(t, dir, 2, address(uri["one"]), "all", "--read-only", "--mode", "0666", "--json", "--metrics", "127.0.0.1:0")
	for name, want := range map[string][]byte{"one": one, "second one": two} {
		path := filepath.Join(dir, "all", name)
		fi, err := os.Stat(path)
		if err != nil || fi.Mode() != 0o444 || fi.Size() != int64(len(want)) {
			t.Errorf("%s: %v, %v", name, fi, err)
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
		if f, err := os.OpenFile(path, os.O_WRONLY, 0); !errors.Is(err, unix.EROFS) {
			t.Errorf("%s: opened for writing: %v, %v", name, f, err)
		}
	}
	var line struct {
		Path, Region, Device string
		Bytes                int64
	}
	if err := json.Unmarshal([]byte(strings.SplitN(c.stdout.String(), "\n", 2)[0]), &line); err != nil || line.Path != filepath.Join(dir, "all", "one") || line.Bytes != 1<<20 || line.Device != "fuse" {
		t.Errorf("%+v, %v", line, err)
	}
	if s := statusOf(t, c); s.Kind != "mount" || len(s.Regions) != 2 || s.Regions[1].Name != "second one" || s.Regions[1].Counters["pulled_bytes"] < 1<<20 {
		t.Errorf("%+v", s)
	}
	_, rest, _ := strings.Cut(c.stderr.String(), "metrics on ")
	text := must(t, "curl", "curl", "-sS", "--max-time", "20", strings.TrimSpace(rest))
	for _, want := range []string{"# TYPE memsync_mount_pulled_bytes_total counter\n", `memsync_mount_region_bytes{region="second one",path="` + filepath.Join(dir, "all", "second one") + `"} 3145733`} {
		if !strings.Contains(text, want) {
			t.Errorf("metrics lack %s:\n%s", want, text)
		}
	}
	single := mounting(t, dir, 1, address(uri["one"])+"/second one", "single", "--read-only")
	if got, err := os.ReadFile(filepath.Join(dir, "single", "second one")); err != nil || !bytes.Equal(got, two) {
		t.Errorf("alone: %d bytes, %v", len(got), err)
	}
	for _, c := range []*command{c, single} {
		c.signal(c.cmd.Process.Pid, unix.SIGTERM)
		c.exit(0, patience)
	}
	left(t, c, filepath.Join(dir, "all"))
	left(t, single, filepath.Join(dir, "single"))
}

// TestMountNotify: the service manager is told, and --tls and a Unix socket work.
func TestMountNotify(t *testing.T) {
	needFUSE(t)
	dir := t.TempDir()
	want := image(t, filepath.Join(dir, "one"), 1, 1<<20)
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: filepath.Join(dir, "notify")})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	certs := launch(t, dir, "certs", "tls")
	certs.exit(0, patience)
	_, uri := serving(t, dir, "one", "--tls=tls")
	t.Setenv("NOTIFY_SOCKET", filepath.Join(dir, "notify"))
	c := mounting(t, dir, 1, uri["one"], "here", "--tls", "tls")
	heard := func(want string) {
		t.Helper()
		b := make([]byte, 1000)
		if n, err := manager.Read(b); err != nil || !strings.Contains(string(b[:n]), want) {
			t.Errorf("the manager heard %q, %v; want %s", b[:n], err, want)
		}
	}
	heard("READY=1")
	if got, err := os.ReadFile(filepath.Join(dir, "here")); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	c.signal(c.cmd.Process.Pid, unix.SIGTERM)
	heard("STOPPING=1")
	c.exit(0, patience)
}

// TestMountTransports: each transport serves and mounts; status and metrics of the
// server count what it gave.
func TestMountTransports(t *testing.T) {
	needFUSE(t)
	for _, name := range all.TransportNames() {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			want := image(t, filepath.Join(dir, "one"), 1, 1<<20)
			s := launch(t, dir, "serve", "one", "--transport", name, "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0")
			s.until("it serves", func() bool { return strings.Contains(s.stdout.String(), "\n") })
			uri := strings.Split(strings.TrimSpace(s.stdout.String()), "\t")[2]
			if !strings.HasPrefix(uri, name+"://") {
				t.Errorf("URI %s", uri)
			}
			c := mounting(t, dir, 1, uri, "here", "--strategy", "direct-mount")
			if got, err := os.ReadFile(filepath.Join(dir, "here")); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
			f, err := os.OpenFile(filepath.Join(dir, "here"), os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt([]byte("written"), 4321); err != nil {
				t.Error(err)
			}
			if err := errors.Join(f.Sync(), f.Close()); err != nil {
				t.Error(err)
			}
			if st := statusOf(t, s); st.Kind != "serve" || st.Regions[0].Counters["pulled_bytes"] < 512<<10 || st.Regions[0].Counters["pushed_bytes"] < 7 {
				t.Errorf("%+v", st)
			}
			_, rest, _ := strings.Cut(s.stderr.String(), "metrics on ")
			if text := must(t, "curl", "curl", "-sS", "--max-time", "20", strings.Fields(rest)[0]); !strings.Contains(text, "# TYPE memsync_serve_pushed_bytes_total counter") {
				t.Errorf("metrics: %s", text)
			}
			c.signal(c.cmd.Process.Pid, unix.SIGTERM)
			c.exit(0, patience)
			s.signal(s.cmd.Process.Pid, unix.SIGTERM)
			s.exit(130, patience)
			copy(want[4321:], "written")
			if got, err := os.ReadFile(filepath.Join(dir, "one")); err != nil || !bytes.Equal(got, want) {
				t.Errorf("the served file differs: %v", err)
			}
			left(t, c, dir, "one")
		})
	}
}

// TestServePassedSocket: the service manager's socket is served, and it is told so.
func TestServePassedSocket(t *testing.T) {
	dir := t.TempDir()
	image(t, filepath.Join(dir, "one"), 1, 1<<20)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// The shell's process becomes memsync, so that its number is the one that LISTEN_PID names.
	cmd := exec.Command("sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec memsync serve one --listen systemd`)
	cmd.ExtraFiles = []*os.File{f}
	c := start(t, dir, cmd)
	c.until("it serves", func() bool { return strings.Contains(c.stdout.String(), "\n") })
	if !strings.Contains(c.stdout.String(), "nbd://"+l.Addr().String()+"/one") {
		t.Errorf("%s", c.stdout.String())
	}
	must(t, "nbdinfo", "libnbd-bin", "nbd://"+l.Addr().String()+"/one")
	c.signal(c.cmd.Process.Pid, unix.SIGTERM)
	c.exit(130, patience)
}
