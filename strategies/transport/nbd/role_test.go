package nbd

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"

	"memsync/strategies/transport"
)

// role runs a test's other process: "serve SIZE" serves memory on a port that
// it prints; "echo" and "stream" are raw counterparts. All end with stdin.
func role(args []string) int {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	var handle func(c net.Conn)
	switch args[0] {
	case "serve":
		size, _ := strconv.Atoi(args[1])
		tr, store := &Transport{}, viewed{newRAM(size, 1)}
		handle = func(c net.Conn) {
			if err := tr.Serve(context.Background(), c, transport.One{Store: store}); err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
		}
	case "echo": // 4 KiB for each request, by blocking system calls on a thread of its own
		handle = func(c net.Conn) {
			runtime.LockOSThread()
			f, err := c.(*net.TCPConn).File()
			if err != nil {
				return
			}
			fd := int(f.Fd())
			unix.SetNonblock(fd, false)
			b := make([]byte, 4096)
			for {
				if n, err := unix.Read(fd, b[:requestSize]); n <= 0 || err != nil {
					return
				}
				if _, err := unix.Write(fd, b); err != nil {
					return
				}
			}
		}
	case "stream":
		handle = func(c net.Conn) {
			b := make([]byte, 1<<20)
			for {
				if _, err := c.Write(b); err != nil {
					return
				}
			}
		}
	default:
		return 2
	}
	fmt.Println(ln.Addr())
	go func() {
		os.Stdin.Read(make([]byte, 1))
		os.Exit(0)
	}()
	for {
		c, err := ln.Accept()
		if err != nil {
			return 1
		}
		go handle(c)
	}
}
