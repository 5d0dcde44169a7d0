package lab

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestOffline: without a network, a filled cache is enough; without both, the tests
// fail with the command that mends it.
func TestOffline(t *testing.T) {
	kernel(t)
	again := func(env ...string) (string, error) {
		c := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestStatus$", "-test.v")
		c.Env = append(os.Environ(), env...)
		c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
		if os.Geteuid() != 0 {
			t.Skip("making a network namespace without a link needs root")
		}
		out, err := c.CombinedOutput()
		return string(out), err
	}
	if out, err := again(); err != nil || !strings.Contains(out, "--- PASS: TestStatus") {
		t.Errorf("with a filled cache: %v\n%s", err, out)
	}
	out, err := again("MEMSYNC_LAB_CACHE=" + t.TempDir())
	if err == nil {
		t.Errorf("went well without a network and a cache:\n%s", out)
	}
	for _, say := range []string{"apt-get", "is the network there?", "memsync lab --refresh", "LAB=0"} {
		if !strings.Contains(out, say) {
			t.Errorf("without a network and a cache it does not say %q:\n%s", say, out)
		}
	}
	if out, err := again("MEMSYNC_LAB_CACHE="+t.TempDir(), "LAB=0"); err != nil || !strings.Contains(out, "LAB=0 leaves the lab kernel out") {
		t.Errorf("with LAB=0: %v\n%s", err, out)
	}
}

// TestMake: make test tells what LAB=0 leaves out, in its last line, and passes
// the failure of the tests on. The commands that it would run are replaced.
func TestMake(t *testing.T) {
	if _, err := exec.LookPath("make"); err != nil {
		t.Skip(err)
	}
	last := func(args ...string) (string, error) {
		c := exec.CommandContext(t.Context(), "make", append([]string{"-C", "../..", "--no-print-directory", "test"}, args...)...)
		c.Env = os.Environ()
		for i, kv := range c.Env { // of a make that runs this test
			if strings.HasPrefix(kv, "MAKE") || strings.HasPrefix(kv, "LAB=") {
				c.Env[i] = "IGNORED="
			}
		}
		out, err := c.Output()
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		return lines[len(lines)-1], err
	}
	const left = "left out: the tests in the lab kernel (LAB=0)"
	if l, err := last("GO=true", "LAB=0"); err != nil || l != left {
		t.Errorf("LAB=0: %v, last line %q, want %q", err, l, left)
	}
	if l, err := last("GO=true"); err != nil || strings.Contains(l, "left out") {
		t.Errorf("with the lab: %v, last line %q", err, l)
	}
	if l, err := last("GO=false", "LAB=0"); err == nil || l == left {
		t.Errorf("failing tests: %v, last line %q", err, l)
	}
}

// TestOrdinaryUser: the lab needs no root, and what it writes belongs to its user.
func TestOrdinaryUser(t *testing.T) {
	k := kernel(t)
	if os.Geteuid() != 0 {
		t.Skip("this is an ordinary user already: the other tests were this test")
	}
	const nobody = 65534
	dir, err := os.MkdirTemp("", "lab-user-") // t.TempDir is for its owner only
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	home := filepath.Join(dir, "home")
	if err := errors.Join(os.Chmod(dir, 0o755), os.Mkdir(home, 0o755), os.Chown(home, nobody, nobody), //
		copyFile(filepath.Join(dir, "memsync"), "/proc/self/exe"), linkTree(filepath.Join(dir, "cache", "kernel"), k.Dir)); err != nil {
		t.Fatal(err)
	}
	c := exec.CommandContext(t.Context(), filepath.Join(dir, "memsync"))
	c.Dir = home
	c.Env = []string{"HOME=" + home, "TMPDIR=" + home, "PATH=" + os.Getenv("PATH"), "LAB_TEST_CHILD=" + filepath.Join(dir, "cache"),
		"LAB_TEST_SCRIPT=test -b /dev/nbd0 && modprobe dummy && unshare -n true && mount -t tmpfs none /mnt && id -u >result && exit 7"}
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	out, _ := c.CombinedOutput()
	if code := c.ProcessState.ExitCode(); code != 7 {
		t.Fatalf("exit status %d, want 7\n%s", code, out)
	}
	result := filepath.Join(home, "result")
	var st unix.Stat_t
	if err := unix.Stat(result, &st); err != nil || st.Uid != nobody {
		t.Errorf("the result belongs to %d, %v", st.Uid, err)
	}
	if b, _ := os.ReadFile(result); string(b) != "0\n" {
		t.Errorf("in the lab the user is %q, want root", b)
	}
	if err := os.Remove(result); err != nil {
		t.Error(err)
	}
	nothingLeft(t, home)
}

// linkTree makes a copy of a folder by hard links, or by copying across file systems.
func linkTree(to, from string) error {
	return filepath.WalkDir(from, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, p)
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.MkdirAll(filepath.Join(to, rel), 0o755)
		}
		if err := os.Link(p, filepath.Join(to, rel)); err == nil {
			return nil
		}
		return copyFile(filepath.Join(to, rel), p)
	})
}
