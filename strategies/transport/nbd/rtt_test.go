package nbd

import (
	"context"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"memsync/strategies/transport"
)

// far dials as if the server were delay away: connecting takes a round trip,
// and each byte arrives delay after it was sent.
func far(t testing.TB, d transport.Dialer, delay time.Duration) transport.Dialer {
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	return transport.DialFunc(func(ctx context.Context) (net.Conn, error) {
		up, err := d.Dial(ctx)
		if err != nil {
			return nil, err
		}
		a, b := socketpair(t)
		carry := func(dst, src net.Conn) {
			type packet struct {
				due  time.Time
				data []byte
			}
			queue := make(chan packet, 1000)
			wg.Go(func() {
				defer close(queue)
				for {
					p := make([]byte, 64<<10)
					n, err := src.Read(p)
					if err != nil {
						return
					}
					queue <- packet{time.Now().Add(delay), p[:n]}
				}
			})
			wg.Go(func() {
				defer dst.Close()
				for p := range queue {
					time.Sleep(time.Until(p.due))
					if _, err := dst.Write(p.data); err != nil {
						io.Copy(io.Discard, src)
					}
				}
			})
		}
		time.Sleep(2 * delay)
		carry(up, a)
		carry(a, up)
		return b, nil
	})
}

// Opening takes two round trips, and two more with TLS; a read takes one.
func TestRoundTrips(t *testing.T) {
	const rtt = 100 * time.Millisecond
	srv, cli := testTLS(t)
	for name, c := range map[string]struct {
		tr   *Transport
		o    transport.Options
		rtts int
	}{
		"plain":                  {&Transport{}, transport.Options{Connections: 1}, 2},
		"plain, 8 connections":   {&Transport{}, transport.Options{Connections: 8}, 2},
		"plain, chosen for us":   {&Transport{}, transport.Options{}, 2},
		"TLS":                    {&Transport{ServerTLS: srv, ClientTLS: cli}, transport.Options{Connections: 1}, 4},
		"no TLS where it is had": {&Transport{ServerTLS: srv}, transport.Options{Connections: 1}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := far(t, serve(t, c.tr, transport.One{Store: viewed{newRAM(1<<20, 1)}}), rtt/2)
			// A busy machine only adds: the shortest of several counts.
			opened, read := time.Hour, time.Hour
			for try := 0; try < 5 && (opened > time.Duration(c.rtts)*rtt+rtt*9/10 || read > rtt*18/10); try++ {
				start := time.Now()
				s, err := c.tr.Open(testContext(t), d, c.o)
				if err != nil {
					t.Fatal(err)
				}
				opened = min(opened, time.Since(start))
				start = time.Now()
				if err := s.ReadAt(testContext(t), make([]byte, 4096), 0); err != nil {
					t.Fatal(err)
				}
				read = min(read, time.Since(start))
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			}
			if least := time.Duration(c.rtts) * rtt; opened < least-10*time.Millisecond || opened > least+rtt*9/10 {
				t.Errorf("open took %v, want %d round trips of %v", opened, c.rtts, rtt)
			}
			if read > rtt*18/10 {
				t.Errorf("read took %v, want one round trip of %v", read, rtt)
			}
		})
	}
}
