package nbd

import (
	"net"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// A reader spins only for small exchanges with a peer on another CPU, and only
// where that has paid lately.
func TestSpinner(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	peer, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	runtime.LockOSThread()
	var all unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = unix.SchedSetaffinity(0, &all)
		runtime.UnlockOSThread()
	}()
	run := func(cpu int) {
		var one unix.CPUSet
		one.Set(cpu)
		if err := unix.SchedSetaffinity(0, &one); err != nil {
			t.Fatal(err)
		}
	}
	send := func(cpu int) {
		run(cpu)
		if _, err := peer.Write([]byte{1}); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	var cpus []int
	for i := range 1024 {
		if all.IsSet(i) {
			cpus = append(cpus, i)
		}
	}
	if len(cpus) < 2 {
		t.Skip("needs two CPUs")
	}
	send(cpus[0])
	if (&spinner{soon: true}).worth(raw) {
		t.Error("spins on the CPU that the peer sends from")
	}
	run(cpus[1])
	if (&spinner{}).worth(raw) {
		t.Error("spins though nothing small is expected")
	}
	s := &spinner{soon: true}
	for range spinMisses {
		if !s.worth(raw) {
			t.Fatal("does not spin with the peer on another CPU")
		}
		s.spun(false)
	}
	again := 0
	for range 10 * spinRetry {
		if s.worth(raw) {
			again++
			s.spun(false)
		}
	}
	if again == 0 || again > 10 {
		t.Errorf("spun in %d of %d waits after %d in vain", again, 10*spinRetry, spinMisses)
	}
	s.spun(true)
	if !s.worth(raw) {
		t.Error("does not spin after it paid")
	}
}
