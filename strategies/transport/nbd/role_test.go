package nbd

import (
	"context"
	"fmt"
	"net"
	"os"
	"strconv"

	"memsync/strategies/transport"
)

// role runs a test's other process: "serve SIZE" serves memory on a port that
// it prints, until stdin ends.
func role(args []string) int {
	switch args[0] {
	case "serve":
		size, _ := strconv.Atoi(args[1])
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		fmt.Println(ln.Addr())
		go func() {
			os.Stdin.Read(make([]byte, 1))
			os.Exit(0)
		}()
		tr := &Transport{}
		store := viewed{newRAM(size, 1)}
		for {
			c, err := ln.Accept()
			if err != nil {
				return 1
			}
			go func() {
				if err := tr.Serve(context.Background(), c, transport.One{Store: store}); err != nil {
					fmt.Fprintln(os.Stderr, err)
				}
			}()
		}
	}
	return 2
}
