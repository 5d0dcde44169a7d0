package netem

import (
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

// send sends size bytes over a TCP connection from host i to host k.
func send(t *testing.T, l *Link, i, k, size int) error {
	from, to := l.Hosts()[i], l.Hosts()[k]
	ln, err := to.Listen(t.Context(), "tcp", ":0")
	if err != nil {
		return err
	}
	defer ln.Close()
	tx, err := from.Dial(t.Context(), "tcp", ln.Addr().String())
	if err != nil {
		return err
	}
	defer tx.Close()
	rx, err := ln.Accept()
	if err != nil {
		return err
	}
	defer rx.Close()
	if host, _, _ := net.SplitHostPort(rx.RemoteAddr().String()); host != from.Addr().String() {
		return fmt.Errorf("from %s, not from %s", host, from.Addr())
	}
	go func() {
		_, _ = tx.Write(make([]byte, size)) // what is missing is missed below
		_ = tx.(*net.TCPConn).CloseWrite()
	}()
	_ = rx.SetReadDeadline(time.Now().Add(20 * time.Second))
	n, err := io.Copy(io.Discard, rx)
	if err == nil && n != int64(size) {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// Several hosts at one link: all reach each other, the bytes are counted where they
// leave, and a host's rate is shared by all that it sends and by nothing else.
func TestHosts(t *testing.T) {
	p := Profile{RTT: 10 * time.Millisecond, Rate: 100e6}
	for _, s := range append(shaping(), ShaperNone) {
		t.Run(string(s), func(t *testing.T) {
			if s == ShaperNone {
				p = Profile{}
			}
			const hosts, size = 4, 1 << 20
			l := open(t, s, p, Options{Hosts: hosts, Seed: 1})
			if n := len(l.Evidence().More); n != hosts-2 {
				t.Errorf("evidence of %d more hosts", n)
			}
			steady(t, func() error {
				c, err := l.Calibrate(t.Context())
				if err == nil && !c.Accepted {
					err = fmt.Errorf("not accepted: %v", c.Reasons)
				}
				return err
			})
			// Each counts what it sends, acknowledgements included.
			sent := func() (b [hosts]int64) {
				for i := range b {
					c, err := l.Sent(i)
					if err != nil {
						t.Fatal(err)
					}
					b[i] = c.Bytes
				}
				return b
			}
			before, all := sent(), func(pairs ...[2]int) time.Duration {
				begin := time.Now()
				var g errgroup.Group
				for _, k := range pairs {
					g.Go(func() error { return send(t, l, k[0], k[1], size) })
				}
				if err := g.Wait(); err != nil {
					t.Fatal(err)
				}
				return time.Since(begin)
			}
			all([2]int{0, 1}, [2]int{0, 2}, [2]int{0, 3})
			all([2]int{3, 2}, [2]int{2, 1}, [2]int{1, 0})
			c, err := l.Counters()
			if err != nil {
				t.Fatal(err)
			}
			after := sent()
			for i, want := range []int64{3, 1, 1, 1} {
				if got := after[i] - before[i]; got < want*size || got > want*size*5/4+200_000 {
					t.Errorf("host %d sent %d bytes, want %d times %d and headers", i, got, want, size)
				}
			}
			// The last acknowledgements may still be on their way between the two looks.
			if late := after[0] - c.SourceTx.Bytes; late < 0 || late > 20_000 || c.DestinationTx.Bytes < size {
				t.Errorf("counters of the source: %+v, it sent %d", c, after[0])
			}
			if p.Rate == 0 {
				return
			}
			alone := time.Duration(float64(size) * 8 / float64(p.Rate) * 1e9)
			steady(t, func() error {
				if d := all([2]int{0, 1}, [2]int{0, 2}, [2]int{0, 3}); d < 3*alone {
					t.Errorf("one host sent 3 times %d bytes in %v: faster than its rate", size, d)
				}
				if d := all([2]int{0, 1}, [2]int{1, 2}, [2]int{2, 3}); d > 3*alone {
					return fmt.Errorf("three hosts sent %d bytes each in %v, one takes %v: they hold each other up", size, d, alone)
				}
				return nil
			})
		})
	}
}

func TestHostsRefused(t *testing.T) {
	for _, n := range []int{-1, 1, MaxHosts + 1} {
		if _, err := Open(t.Context(), ShaperNone, Profile{}, Options{Hosts: n}); !errors.Is(err, ErrInvalid) {
			t.Errorf("%d hosts: %v", n, err)
		}
	}
}
