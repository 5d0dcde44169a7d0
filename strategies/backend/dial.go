package backend

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// dialIn makes connections in the network namespace at path, such as
// /proc/PID/fd/N: a socket keeps the namespace that it was made in. It needs
// CAP_SYS_ADMIN there.
func dialIn(path string) func(ctx context.Context, network, addr string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (c net.Conn, err error) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			// The thread is in another namespace from here on, so it ends with
			// this goroutine. The first thread cannot: it stands for the process.
			runtime.LockOSThread()
			if unix.Gettid() == unix.Getpid() {
				defer runtime.UnlockOSThread()
				c, err = dialIn(path)(ctx, network, addr)
				return
			}
			var ns *os.File
			if ns, err = os.Open(path); err != nil {
				return
			}
			defer ns.Close()
			if err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				err = fmt.Errorf("enter the network namespace of the server (for one that runs already: as root): %w", err)
				return
			}
			// One address, so that the dialer needs no goroutine of its own.
			var d net.Dialer
			c, err = d.DialContext(ctx, network, addr)
		}()
		<-done
		return c, err
	}
}
