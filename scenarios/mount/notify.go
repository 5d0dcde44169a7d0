package mount

import (
	"fmt"
	"net"
	"strings"
)

// Notify tells the service manager that started this process how it is, for
// instance READY=1; socket is the environment's NOTIFY_SOCKET. It does nothing
// where that is empty. Source: sd_notify(3).
func Notify(socket string, state ...string) error {
	if socket == "" {
		return nil
	}
	c, err := net.Dial("unixgram", socket) // a leading @ is Go's way of writing an abstract one, too
	if err != nil {
		return fmt.Errorf("tell the service manager: %w", err)
	}
	defer c.Close()
	if _, err := c.Write([]byte(strings.Join(state, "\n"))); err != nil {
		return fmt.Errorf("tell the service manager: %w", err)
	}
	return nil
}
