package probe

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

func TestThreeAnswers(t *testing.T) {
	for _, c := range []struct {
		err    error
		answer Answer
		remedy string
	}{
		{nil, Works, ""},
		{fmt.Errorf("no: %w", region.ErrNotSupported), Missing, "own"},
		{fmt.Errorf("no: %w", region.ErrNotPermitted), Unknown, "own"},
		{errors.New("?"), Unknown, "own"},
		{No(errors.New("no")), Missing, "own"},
		{fmt.Errorf("wrapped: %w", Mend(missing("x"), "better")), Missing, "better"},
	} {
		r := Probe{Name: "n", Kernel: "1.0", Remedy: "own", Try: func() (string, error) { return "seen", c.err }}.Run()
		want := "seen"
		if c.err != nil {
			want = c.err.Error()
		}
		if r != (Result{"n", c.answer, want, "1.0", c.remedy}) {
			t.Errorf("%v: got %+v", c.err, r)
		}
	}
}

func modulesAndLinks(t *testing.T) string {
	m, err := os.ReadFile("/proc/modules")
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	n, err := os.ReadFile("/proc/net/dev")
	if err != nil {
		t.Fatal(err)
	}
	var links []string
	for _, l := range strings.Split(string(n), "\n")[2:] {
		name, _, _ := strings.Cut(l, ":")
		links = append(links, strings.TrimSpace(name))
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	return string(m) + strings.Join(links, " ") + string(mounts)
}

func TestHostLeavesNothing(t *testing.T) {
	before := modulesAndLinks(t)
	fds, _ := os.ReadDir("/proc/self/fd")
	seen := map[string]bool{}
	for _, r := range Run(Host()) {
		t.Logf("%-20s %-8s %-8s %s  [%s]", r.Name, r.Answer, r.Kernel, r.Detail, r.Remedy)
		if seen[r.Name] {
			t.Errorf("%s stands twice", r.Name)
		}
		seen[r.Name] = true
		if r.Answer != Works && r.Detail == "" {
			t.Errorf("%s says %s without a reason", r.Name, r.Answer)
		}
		if r.Answer == Works && r.Remedy != "" {
			t.Errorf("%s works and has a remedy", r.Name)
		}
	}
	if after := modulesAndLinks(t); after != before {
		t.Errorf("modules, links or mounts changed:\n%s\n%s", before, after)
	}
	if now, _ := os.ReadDir("/proc/self/fd"); len(now) > len(fds) {
		t.Errorf("%d descriptors open, %d before", len(now), len(fds))
	}
}

// TestUnprivileged runs the probes as nobody: none may fail the process, and
// what needs root must say that it could not tell.
func TestUnprivileged(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Log("not root: TestHostLeavesNothing was this test")
		return
	}
	if os.Getenv("PROBE_AS_NOBODY") != "" {
		if err := unix.Setuid(65534); err != nil {
			t.Fatal(err)
		}
		by := map[string]Result{}
		for _, r := range Run(Host()) {
			by[r.Name] = r
			t.Logf("%-20s %-8s %s", r.Name, r.Answer, r.Detail)
		}
		for name, want := range map[string]Answer{"cap-sys-admin": Missing, "network-namespaces": Unknown, "veth": Unknown, "kernel": Works} {
			if by[name].Answer != want {
				t.Errorf("%s: got %+v, want %s", name, by[name], want)
			}
		}
		return
	}
	c := exec.Command("/proc/self/exe", "-test.run=^TestUnprivileged$", "-test.v")
	c.Env = append(os.Environ(), "PROBE_AS_NOBODY=1")
	out, err := c.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatal(err)
	}
}
