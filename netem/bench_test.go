package netem

import (
	"fmt"
	"testing"
	"time"
)

// BenchmarkStream is one bulk TCP stream for half a second and more, unshaped by
// veth and by tun, and at 1 Gbit/s and 20 ms. forwarding-cores is the CPU time of
// the tun shaper's threads per second.
func BenchmarkStream(b *testing.B) {
	regional := Profile{RTT: 20 * time.Millisecond, Rate: 1e9}
	for _, bb := range []struct {
		s Shaper
		p Profile
	}{{ShaperNone, Profile{}}, {ShaperTun, Profile{}}, {ShaperTun, regional}, {ShaperNetem, regional}} {
		b.Run(fmt.Sprintf("%s/%v/%dMbit", bb.s, bb.p.RTT, bb.p.Rate/1e6), func(b *testing.B) {
			if err := Probe(bb.s); err != nil {
				b.Skip(err)
			}
			began := time.Now()
			l, err := Open(b.Context(), bb.s, bb.p, Options{Congestion: "bbr"})
			if err != nil {
				b.Fatal(err)
			}
			defer l.Close()
			b.ReportMetric(float64(time.Since(began).Microseconds())/1e3, "ms-open")
			var bits, cores float64
			for b.Loop() {
				before, began := l.CPU(), time.Now()
				goodput, err := l.stream(b.Context(), 1500*time.Millisecond)
				if err != nil {
					b.Fatal(err)
				}
				bits += goodput
				cores += float64(l.CPU()-before) / float64(time.Since(began))
			}
			b.ReportMetric(bits/1e6/float64(b.N), "Mbit/s")
			b.ReportMetric(cores/float64(b.N), "forwarding-cores")
		})
	}
}
