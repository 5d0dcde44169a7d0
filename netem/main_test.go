package netem

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// childRole names what this binary does instead of testing, when it runs as a child
// of one of its tests.
const childRole = "MEMSYNC_NETEM_CHILD"

func TestMain(m *testing.M) {
	switch role := os.Getenv(childRole); role {
	case "":
	case "hold":
		os.Exit(report(hold()))
	case "userns":
		os.Exit(report(unprivileged()))
	default:
		os.Exit(report(fmt.Errorf("no role %q", role)))
	}
	before := descriptors()
	code := m.Run()
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, "leaked:", err)
		code = 1
	}
	if after := descriptors(); code == 0 && len(after) > len(before) {
		fmt.Fprintf(os.Stderr, "leaked descriptors: %v, had %v\n", after, before)
		code = 1
	}
	os.Exit(code)
}

func report(err error) int {
	if err != nil {
		fmt.Fprintln(os.Stderr, "child:", err)
		return 1
	}
	return 0
}

// descriptors lists this process's open files, but for Go's own poller.
func descriptors() []string {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil
	}
	var open []string
	for _, e := range entries {
		name, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil && name != "anon_inode:[eventpoll]" && name != "anon_inode:[eventfd]" {
			open = append(open, e.Name()+" "+name)
		}
	}
	return open
}

func inLab() bool { return os.Getenv("MEMSYNC_LAB") == "1" }

// need skips where the kernel lacks what the shaper needs, and fails where it must
// have it: netem in the lab kernel, tun and veth for root outside of containers.
func need(t *testing.T, s Shaper) {
	t.Helper()
	err := Probe(s)
	switch {
	case err == nil:
	case s == ShaperNetem && !inLab() && errors.Is(err, ErrNotSupported):
		t.Skipf("this kernel has no sch_netem (run the test binary in the lab kernel): %v", err)
	case errors.Is(err, ErrNotPermitted):
		t.Skipf("not permitted here: %v", err)
	default:
		t.Fatal(err)
	}
}

// open opens a link that closes with the test.
func open(t *testing.T, s Shaper, p Profile, o Options) *Link {
	t.Helper()
	need(t, s)
	l, err := Open(t.Context(), s, p, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// shaping are the shapers that a test of shaping runs on. In the lab kernel a system
// call costs 8 us and there is one CPU, so the userspace shaper is left to the
// machine's own.
func shaping() []Shaper {
	if inLab() {
		return []Shaper{ShaperNetem}
	}
	return []Shaper{ShaperNetem, ShaperTun}
}

// steady runs a check that depends on time until it passes, at most four times. Where
// it fails although this machine was quiet, the test fails; where every failure saw
// a plain sleep of 1 ms end 3 ms late or more, the machine was too busy to tell, and
// the test is skipped with those numbers.
func steady(t *testing.T, check func() error) {
	t.Helper()
	const late = 3 * time.Millisecond
	var err error
	var worst time.Duration
	for range 4 {
		stop, found := make(chan struct{}), make(chan time.Duration)
		locked(func() bool { found <- latest(stop); return true })
		err = check()
		close(stop)
		if worst = <-found; err == nil {
			return
		}
		t.Logf("sleeps ended up to %v late: %v", worst, err)
		if worst < late {
			t.Fatal(err)
		}
	}
	t.Skipf("machine too busy: a sleep of 1 ms ended %v late; then: %v", worst, err)
}

// latest sleeps for 1 ms again and again, and returns by how much the worst was late.
func latest(stop chan struct{}) (worst time.Duration) {
	for {
		select {
		case <-stop:
			return worst
		default:
		}
		began, ts := time.Now(), unix.NsecToTimespec(int64(time.Millisecond))
		_, _ = unix.Ppoll(nil, &ts, nil)
		worst = max(worst, time.Since(began)-time.Millisecond)
	}
}

func seed(t *testing.T) uint64 {
	t.Helper()
	n := uint64(unix.Getpid())
	if s := os.Getenv("TEST_SEED"); s != "" {
		v, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("TEST_SEED: %v", err)
		}
		n = v
	}
	t.Logf("TEST_SEED=%d", n)
	return n
}

// hold opens a link with a child inside, tells which namespaces it made, and stays.
func hold() error {
	l, err := Open(context.Background(), Shaper(os.Getenv("SHAPER")), Profile{}, Options{})
	if err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childRole+"=none")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := l.Source().Start(cmd); err != nil {
		return err
	}
	_ = cmd.Wait() // it ends with an error about its role, and has been inside
	for _, n := range l.ends() {
		var st unix.Stat_t
		if err := unix.Fstat(n.fd, &st); err != nil {
			return err
		}
		fmt.Printf("net:[%d]\n", st.Ino)
	}
	fmt.Println("ready")
	return unix.Pause()
}

// unprivileged is what a user who is root of nothing but a user namespace can do.
func unprivileged() error {
	if node := os.Getenv("TUN_NODE"); node != "" {
		if err := unix.Mount(node, tunPath, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind %s: %w", node, err)
		}
	}
	shaper := Shaper(os.Getenv("SHAPER"))
	if err := Probe(shaper); err != nil {
		return err
	}
	p := Profile{}
	if shaper != ShaperNone {
		p = Profile{RTT: 10e6, Rate: 100e6}
	}
	l, err := Open(context.Background(), shaper, p, Options{Congestion: "reno"})
	if err != nil {
		return err
	}
	c, err := l.Calibrate(context.Background())
	if err == nil && !c.Accepted {
		err = fmt.Errorf("not accepted: %v", c.Reasons)
	}
	return errors.Join(err, l.Close())
}
