package userfaultfd

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// BenchmarkLocal takes the ratios of the bars (docs/bars.md) for transport
// local: each floor is measured beside the thing itself, in the same processes,
// interleaved. Run it with -benchtime=20x: one iteration is one new mapping.
//
//	go test ./strategies/userfaultfd -run '^$' -bench Local -benchtime 20x
func BenchmarkLocal(b *testing.B) {
	places := []struct {
		name             string
		daemon, workload []int
	}{{"same-cpu", []int{0}, []int{0}}, {"two-cpus", []int{0}, []int{1}}, {"unpinned", nil, nil}}
	for _, p := range places {
		b.Run(p.name, func(b *testing.B) {
			for _, c := range []struct{ name, op, settings string }{
				{"fault-around", "scan", "fault_around=64KiB"},
				{"fault-around-copy", "scan", "fault_around=64KiB view=false"},
				{"sequential", "scan", "prefetch=sequential"},
				{"fault-around-2M", "scan", "fault_around=2MiB"},
				{"fault-around-sleep", "scan", "fault_around=64KiB poll=0"},
				{"populate", "populate", "prefetch=all"},
				{"fault", "touch", ""},
				{"fault-sleep", "touch", "poll=0"},
				{"fault-4", "touch", "handlers=4"},
			} {
				b.Run(c.name, func(b *testing.B) { benchLocal(b, p.daemon, p.workload, c.op, strings.Fields(c.settings)) })
			}
		})
	}
}

// BenchmarkLink takes the ratios of the bars over TCP on the loopback device,
// unshaped, with our NBD between daemon and source.
func BenchmarkLink(b *testing.B) {
	for _, p := range []struct {
		name                     string
		source, daemon, workload []int
	}{{"same-cpu", []int{0}, []int{0}, []int{0}}, {"two-cpus", []int{0}, []int{1}, []int{1}}, {"daemon-alone", []int{0}, []int{1}, []int{0}}, {"unpinned", nil, nil, nil}} {
		b.Run(p.name, func(b *testing.B) {
			for _, c := range []struct{ name, op, settings string }{
				{"sequential", "scan", "prefetch=sequential"},
				{"sequential-64k", "scan", "prefetch=sequential fault_around=64KiB"},
				{"all", "scan", "prefetch=all"},
				{"fault-around", "scan", "fault_around=64KiB"},
				{"fault", "touch", ""},
			} {
				b.Run(c.name, func(b *testing.B) { benchLink(b, p.source, p.daemon, p.workload, c.op, strings.Fields(c.settings)) })
			}
		})
	}
}

func benchLink(b *testing.B, sourceCPU, daemonCPU, workloadCPU []int, op string, settings []string) {
	const size = 64 << 20
	w, d, wake := startPair(b, daemonCPU, workloadCPU)
	served := start(b, "source", sourceCPU)
	raw := served.ask(request{Op: "raw", Len: size}).Addr
	addr := served.ask(request{Op: "nbd", Content: content, Len: size}).Addr
	var floors, wakes, got []time.Duration
	for i := range b.N + 1 {
		var floor, mine time.Duration
		if op == "touch" {
			floor = median(d.ask(request{Op: "floor_rr", N: 2000, Addr: raw}).Nanos)
			wakes = append(wakes, wake())
		} else {
			floor = median(d.ask(request{Op: "floor_tcp", Len: size, Addr: raw}).Nanos)
		}
		mine = once(b, w, d, op, request{Op: "mount", Content: content, Len: size, Settings: settings, Addr: addr}, uint64(i))
		if i > 0 {
			floors, got = append(floors, floor), append(got, mine)
		}
	}
	f, g := middle(floors), middle(got)
	b.ReportMetric(0, "ns/op")
	if op == "touch" {
		r := d.ask(request{Op: "read_store", Content: content, Len: size, Settings: settings, Addr: addr, N: 2000})
		b.ReportMetric(float64(median(r.Nanos))/1e3, "nbd_rr-us")
		fw := middle(wakes)
		b.ReportMetric(float64(g)/1e3, "us")
		b.ReportMetric(float64(f)/1e3, "floor_rr-us")
		b.ReportMetric(float64(fw)/1e3, "floor_wake-us")
		b.ReportMetric(float64(g-f)/float64(fw), "x-floor_wake-above-rr")
		b.ReportMetric(float64(got[0]-floors[0])/float64(wakes[0]), "x-of-minima")
		b.ReportMetric(float64(got[0])/1e3, "min-us")
		b.ReportMetric(float64(floors[0])/1e3, "min-rr-us")
		return
	}
	b.ReportMetric(size/g.Seconds()/1e9, "GB/s")
	b.ReportMetric(size/f.Seconds()/1e9, "floor_tcp-GB/s")
	b.ReportMetric(float64(f)/float64(g), "of-floor")
	b.ReportMetric(float64(floors[0])/float64(got[0]), "of-floor-minima")
}

// startPair starts workload and daemon, with pipes between them for floor_wake.
func startPair(b *testing.B, daemonCPU, workloadCPU []int) (w, d *child, wake func() time.Duration) {
	var pipes [4]*os.File // to the daemon, to the workload
	for i := range 2 {
		r, w, err := os.Pipe()
		if err != nil {
			b.Fatal(err)
		}
		pipes[2*i], pipes[2*i+1] = r, w
	}
	w = start(b, "workload", workloadCPU, pipes[1], pipes[2])
	d = start(b, "daemon", daemonCPU, pipes[0], pipes[3])
	for _, f := range pipes {
		f.Close()
	}
	d.ask(request{Op: "pong"})
	return w, d, func() time.Duration { return median(w.ask(request{Op: "floor_wake", N: 2000}).Nanos) }
}

// once mounts as q says, attaches, measures op and takes all down.
func once(b *testing.B, w, d *child, op string, q request, seed uint64) (took time.Duration) {
	r, _, err := d.try(q, nil)
	if err != nil || r.Err != "" {
		b.Fatal(err, r.Err)
	}
	begin := time.Now()
	guard, _ := w.attachTo(r.Attach, func(f *os.File, base uintptr) error {
		begin = time.Now()
		_, _, err := d.try(request{Op: "serve", Base: uint64(base)}, f)
		f.Close()
		return err
	})
	guard.Close()
	switch op {
	case "populate":
		for d.ask(request{Op: "stats"}).Stats.Extra["bytes_resident"] < q.Len {
			time.Sleep(200 * time.Microsecond)
		}
		took = time.Since(begin)
	case "scan":
		took = median(w.ask(request{Op: "scan", N: 4096}).Nanos)
	case "touch":
		took = median(w.ask(request{Op: "touch", N: 2000, Seed: seed}).Nanos)
	}
	w.ask(request{Op: "detach"})
	d.ask(request{Op: "close"})
	return took
}

func middle(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

func benchLocal(b *testing.B, daemonCPU, workloadCPU []int, op string, settings []string) {
	const size = 64 << 20
	w, d, wake := startPair(b, daemonCPU, workloadCPU)
	threads := 1
	if op == "populate" {
		threads = 2
	}
	settings = append([]string{"fault_around=4KiB"}, settings...)
	seed := uint64(1)
	if i := slices.Index(settings, "view=false"); i >= 0 {
		seed, settings = 0, slices.Delete(settings, i, i+1)
	}
	var floors, got []time.Duration
	for i := range b.N + 1 {
		var floor, mine time.Duration
		if op == "touch" {
			floor = wake()
		} else {
			floor = median(w.ask(request{Op: "floor_fill", Len: size, Threads: threads}).Nanos)
		}
		mine = once(b, w, d, op, request{Op: "mount", Content: content, Len: size, Settings: settings, Seed: seed}, uint64(i))
		if i > 0 { // the first run touches the machine's memory
			floors, got = append(floors, floor), append(got, mine)
		}
	}
	f, g := middle(floors), middle(got)
	b.ReportMetric(0, "ns/op")
	if op == "touch" {
		b.ReportMetric(float64(g)/1e3, "us")
		b.ReportMetric(float64(f)/1e3, "floor_wake-us")
		b.ReportMetric(float64(g)/float64(f), "x-floor_wake")
		return
	}
	b.ReportMetric(size/g.Seconds()/1e9, "GB/s")
	b.ReportMetric(size/f.Seconds()/1e9, fmt.Sprintf("floor_fill%d-GB/s", threads))
	b.ReportMetric(float64(f)/float64(g), "of-floor")
	b.ReportMetric(float64(floors[0])/float64(got[0]), "of-floor-minima")
}

func median(ns []int64) time.Duration {
	slices.Sort(ns)
	return time.Duration(ns[len(ns)/2])
}
