package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// netns is a network namespace. The kernel gives the inode of one that is gone to the
// next, within milliseconds; a cookie (SO_NETNS_COOKIE, Linux 5.14) never.
type netns struct {
	link   string // net:[INODE]
	cookie uint64
}

// openNetns identifies the network namespace at path, a link below /proc. It must enter
// it for that, which only root may.
func openNetns(path string) (n netns, err error) {
	if n.link, err = os.Readlink(path); err != nil {
		return n, err
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return n, err
	}
	defer unix.Close(fd)
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		own, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			done <- err
			return
		}
		defer unix.Close(own)
		if err = unix.Setns(fd, unix.CLONE_NEWNET); err == nil {
			var s int
			if s, err = unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err == nil {
				n.cookie, err = unix.GetsockoptUint64(s, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
				unix.Close(s)
			}
			if unix.Setns(own, unix.CLONE_NEWNET) != nil {
				done <- err
				return // and the thread ends with it
			}
		}
		runtime.UnlockOSThread()
		done <- err
	}()
	err = <-done
	return n, err
}

// holders lists who holds one of the namespaces: a process or thread in it, a descriptor
// of it, or a mount of it that this process sees.
func holders(of map[netns]bool) (found []string) {
	links := map[string]bool{}
	for n := range of {
		links[n.link] = true
	}
	var paths []string
	for _, pattern := range []string{"/proc/[0-9]*/task/[0-9]*/ns/net", "/proc/[0-9]*/fd/[0-9]*"} {
		some, _ := filepath.Glob(pattern)
		paths = append(paths, some...)
	}
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err == nil {
		for line := range strings.Lines(string(mounts)) {
			if f := strings.Fields(line); len(f) > 4 && links[f[3]] { // the root within nsfs
				paths = append(paths, f[4])
			}
		}
	}
	for _, path := range paths {
		if link, err := os.Readlink(path); err == nil && !links[link] {
			continue
		}
		if n, err := openNetns(path); err == nil && of[n] {
			found = append(found, path+" -> "+n.link)
		}
	}
	return found
}

// TestHolders: what gone relies on sees a namespace as long as someone holds it.
func TestHolders(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root may enter the network namespaces of others")
	}
	own, err := openNetns("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("cat")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	runtime.LockOSThread() // Pdeathsig is of the thread
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	path := fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid)
	n, err := openNetns(path)
	if err != nil {
		t.Fatal(err)
	}
	if n.cookie == own.cookie || n.link == own.link {
		t.Fatalf("%v is this process's own", n)
	}
	of := map[netns]bool{n: true}
	if got := holders(of); len(got) != 1 || !strings.HasPrefix(got[0], fmt.Sprintf("/proc/%d/", cmd.Process.Pid)) {
		t.Errorf("held by %v", got)
	}
	fd, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	in.Close()
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if got := holders(of); len(got) != 1 || !strings.HasPrefix(got[0], fmt.Sprintf("/proc/%d/fd/", os.Getpid())) {
		t.Errorf("after its process has ended, held by %v", got)
	}
	if err := fd.Close(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(patience); len(holders(of)) > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("still held by %v", holders(of))
		}
	}
}
