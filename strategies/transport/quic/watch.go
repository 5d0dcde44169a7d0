package quic

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// watchEvery is how often a client asks whether there is still a socket at the
// source's port.
const watchEvery = 2 * time.Second

// watch calls gone, once, when the host at a says that nobody listens on its port
// (ICMP port unreachable), as after a source was killed: QUIC itself would wait for
// its idle timeout. The socket of QUIC is not connected and so does not hear of it;
// this one is, and sends a byte now and then, which QUIC drops. Where such messages
// are filtered the idle timeout remains. end waits for the end of that.
func watch(a *net.UDPAddr, gone func(error)) (end func(), err error) {
	c, err := net.DialUDP("udp", nil, a)
	if err != nil {
		return nil, err
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		var b [16]byte
		for {
			_, err := c.Write(b[:1])
			for err == nil {
				_ = c.SetReadDeadline(time.Now().Add(watchEvery))
				_, err = c.Read(b[:]) // what comes is not for us
			}
			switch {
			case errors.Is(err, os.ErrDeadlineExceeded):
			case errors.Is(err, net.ErrClosed):
				return
			case errors.Is(err, unix.ECONNREFUSED):
				gone(fmt.Errorf("%w: %w", region.ErrPeerGone, err))
				return
			default: // a link that is down for the moment, say
				time.Sleep(watchEvery / 20)
			}
		}
	})
	return func() {
		_ = c.Close()
		wg.Wait()
	}, nil
}
