package scenarios

import (
	"fmt"
	"time"

	"memsync/results"
)

// deviceFigures compare devices, and what lies on them.
func deviceFigures() []Figure {
	return []Figure{
		deviceOverhead(),
		oneDeviceManyFiles(),
		concurrentAccess(),
		partialWrites(),
	}
}

// mounts are the mounts by strategy and device that the figures compare; with
// direct mounts, strategy userfaultfd stands for device uffd, which has no request to forward.
func mounts() []results.FigureSeries {
	return []results.FigureSeries{
		{Key: "managed-mount/fuse", Label: "managed mount, FUSE"},
		{Key: "managed-mount/nbd", Label: "managed mount, kernel NBD"},
		{Key: "managed-mount/uffd", Label: "managed mount, userfaultfd"},
		{Key: "direct-mount/fuse", Label: "direct mount, FUSE"},
		{Key: "direct-mount/nbd", Label: "direct mount, kernel NBD"},
		{Key: "userfaultfd/uffd", Label: "userfaultfd"},
	}
}

// onDevice is a cell of a strategy on a device, in variant network.
func onDevice(figure, strategy, device string, settings ...string) *Cell {
	c := cellOf(figure, Network, strategy, 0)
	c.Link.Rate = 0
	c.Device, c.Settings = device, settings
	c.Limit, c.Size = WholeRegion, 64<<20
	return c
}

func deviceOverhead() Figure {
	const name = "device-overhead"
	f := Figure{Spec: results.FigureSpec{
		Name: name, Title: "Devices: sequential read throughput", Kind: results.FigureBar,
		X:    results.Axis{Column: "transport", Label: "Transport", Category: true, Categories: []string{"local", "nbd"}},
		Y:    results.Axis{Column: "throughput", Label: "Read throughput", Unit: "MiB/s", Scale: 1.0 / (1 << 20)},
		Keys: []string{"strategy", "device"}, Series: mounts(),
		Note: "The same mounts on each device; local: the daemon has the region; nbd: over an unshaped link. Kernel NBD needs its module.",
	}, Variants: []string{Network}}
	more := func(suffix, title, column, label, unit string, scale float64) {
		f.More = append(f.More, alsoAs(f.Spec, name+"-"+suffix, func(s *results.FigureSpec) {
			s.Title, s.Y = "Devices: "+title, results.Axis{Column: column, Label: label, Unit: unit, Scale: scale}
		}))
	}
	more("latency", "first-chunk latency", "latency_first_chunk", "First-chunk latency", "us", 1e6)
	more("open", "time to open", "open_latency", "Open latency", "ms", 1e3)
	more("switches", "context switches of the daemon", "context_switches_daemon", "Context switches of the daemon", "", 1)
	more("cpu", "CPU time of all roles", "cpu_per_byte", "CPU time", "s/GiB", 1<<30)
	f.Cells = func(_ string, quick bool) []*Cell {
		var cells []*Cell
		for _, transport := range []string{"local", "nbd"} {
			for _, m := range [][2]string{{"managed-mount", "fuse"}, {"managed-mount", "nbd"}, {"managed-mount", "uffd"},
				{"direct-mount", "fuse"}, {"direct-mount", "nbd"}, {"userfaultfd", "uffd"}} {
				c := onDevice(name, m[0], m[1])
				if m[0] == "userfaultfd" {
					c.Settings = []string{"fault_around=64KiB", "prefetch=sequential"} // as the kernel's read-ahead does for the others
				}
				c.Transport, c.Size, c.Budget, c.Floors = transport, 256<<20, 10*time.Second, true
				if quick {
					c.Size, c.Budget = 64<<20, 2*time.Second
				}
				cells = append(cells, c)
			}
		}
		return cells
	}
	return f
}

func oneDeviceManyFiles() Figure {
	const name = "one-device-many-files"
	f := Figure{Spec: results.FigureSpec{
		Name: name, Title: "k mapped files on one ext4 device, or k devices", Kind: results.FigureLine,
		X:    results.Axis{Column: "params.files", Label: "Mapped files or devices", Category: true},
		Y:    results.Axis{Column: "time_to_last_byte", Label: "Open to last byte", Unit: "ms", Scale: 1e3},
		Keys: []string{"device", "params.file_system"}, Series: []results.FigureSeries{
			{Key: "fuse/none", Label: "k devices, FUSE"},
			{Key: "fuse/ext4", Label: "one device with ext4, FUSE and loop"},
			{Key: "nbd/none", Label: "k devices, kernel NBD"},
			{Key: "nbd/ext4", Label: "one device with ext4, kernel NBD"},
		},
		Note: "Managed mounts of 64 MiB at 5 ms and 1 Gbit/s, read by 4 threads. Kernel NBD needs its module, or the lab kernel.",
	}, Variants: []string{Network}}
	f.More = []results.FigureSpec{
		alsoAs(f.Spec, name+"-open", func(s *results.FigureSpec) {
			s.Title = "Opening k mapped files on one ext4 device, or k devices"
			s.Y = results.Axis{Column: "open_latency", Label: "Open latency", Unit: "ms", Scale: 1e3}
		}),
		alsoAs(f.Spec, name+"-memory", func(s *results.FigureSpec) {
			s.Title = "Memory of the daemon for one device or k"
			s.Y = results.Axis{Column: "rss_daemon", Label: "Peak resident memory of the daemon", Unit: "MiB", Scale: 1.0 / (1 << 20)}
		}),
	}
	f.Cells = func(_ string, quick bool) []*Cell {
		ks := []int{1, 2, 4, 8, 16}
		if quick {
			ks = []int{1, 4, 16}
		}
		var cells []*Cell
		for _, device := range []string{"fuse", "nbd"} {
			for _, k := range ks {
				for _, fs := range []string{"none", "ext4"} {
					c := onDevice(name, "managed-mount", device, fmt.Sprintf("files=%d", k), "file_system="+fs)
					c.Link.RTT, c.Link.Rate = 5*time.Millisecond, NetworkRate
					c.Threads, c.Budget = 4, 5*time.Second
					cells = append(cells, c)
				}
			}
		}
		return cells
	}
	return f
}

// concurrentAccess is benchmark N23.
func concurrentAccess() Figure {
	const name = "concurrent-access"
	f := Figure{Spec: results.FigureSpec{
		Name: name, Title: "Sequential reads by several threads", Kind: results.FigureLine,
		X:     results.Axis{Column: "params.threads", Label: "Threads", Category: true},
		Y:     results.Axis{Column: "throughput", Label: "Read throughput", Unit: "MiB/s", Scale: 1.0 / (1 << 20), Log: true},
		Where: map[string][]string{"access": {"seq"}},
		Keys:  []string{"strategy", "device"}, Series: mounts(),
		Note: "64 MiB at 5 ms and 1 Gbit/s, each thread in a part of its own; 2 s at most. Kernel NBD needs its module, or the lab kernel.",
	}, Variants: []string{Network}}
	random := map[string][]string{"access": {"random"}}
	f.More = []results.FigureSpec{
		alsoAs(f.Spec, name+"-random", func(s *results.FigureSpec) {
			s.Title, s.Where = "Random 4 KiB reads by several threads", random
		}),
		alsoAs(f.Spec, name+"-random-p99", func(s *results.FigureSpec) {
			s.Title, s.Where = "Tail of random 4 KiB reads by several threads", random
			s.Y = results.Axis{Column: "fault_latency_p99", Label: "99th percentile of a read", Unit: "ms", Scale: 1e3, Log: true}
		}),
	}
	f.Cells = func(_ string, quick bool) []*Cell {
		threads := []int{1, 2, 4, 8, 16}
		if quick {
			threads = []int{1, 4, 16}
		}
		var cells []*Cell
		for _, access := range []string{"seq", "random"} {
			for _, m := range [][2]string{{"managed-mount", "fuse"}, {"managed-mount", "nbd"}, {"managed-mount", "uffd"},
				{"direct-mount", "fuse"}, {"direct-mount", "nbd"}, {"userfaultfd", "uffd"}} {
				for _, n := range threads {
					if quick && m == [2]string{"managed-mount", "uffd"} { // device-overhead and far-memory-uffd have it
						continue
					}
					if quick && access == "seq" && n == 4 { // where the kernel's read-ahead leads, the ends tell
						continue
					}
					c := onDevice(name, m[0], m[1])
					if quick {
						c.Size, c.Budget = c.Size/4, time.Second
					}
					c.Link.RTT, c.Link.Rate = 5*time.Millisecond, NetworkRate
					c.Access, c.Threads = access, n
					if m[1] == "uffd" { // one handler answers one fault at a time
						c.Settings = []string{fmt.Sprintf("handlers=%d", max(4, n))}
					}
					cells = append(cells, c)
				}
			}
		}
		return cells
	}
	return f
}

// partialWrites is benchmark N24: what a chunk costs that is larger than a write.
func partialWrites() Figure {
	const name = "partial-chunk-writes"
	f := Figure{Spec: results.FigureSpec{
		Name: name, Title: "Partial-chunk writes: bytes pushed for each written", Kind: results.FigureLine,
		X:    results.Axis{Column: "chunk_bytes", Label: "Chunk", Category: true},
		Y:    results.Axis{Column: "pushed_per_written", Label: "Bytes pushed by bytes written", Log: true},
		Keys: []string{"device", "access"}, Series: []results.FigureSeries{
			{Key: "uffd/random:4KiB", Label: "userfaultfd, 4 KiB at random"},
			{Key: "uffd/random:64KiB", Label: "userfaultfd, 64 KiB at random"},
			{Key: "fuse/random:4KiB", Label: "FUSE, 4 KiB at random"},
			{Key: "fuse/random:64KiB", Label: "FUSE, 64 KiB at random"},
		},
		Note: "Stores through the mapping of a managed mount without background pulls and pushes, 4 MiB of 64 MiB, 5 ms, 1 Gbit/s, then Sync. FUSE reads around a store by the kernel's window.",
	}, Variants: []string{Network}}
	f.More = []results.FigureSpec{
		alsoAs(f.Spec, name+"-read", func(s *results.FigureSpec) {
			s.Title = "Partial-chunk writes: bytes read for each written"
			s.Y = results.Axis{Column: "read_per_written", Label: "Bytes read by bytes written", Log: true}
		}),
		alsoAs(f.Spec, name+"-time", func(s *results.FigureSpec) {
			s.Title = "Partial-chunk writes: throughput of the writer"
			s.Y = results.Axis{Column: "throughput", Label: "Write throughput", Unit: "MiB/s", Scale: 1.0 / (1 << 20), Log: true}
		}),
	}
	f.Cells = func(_ string, quick bool) []*Cell {
		chunks := []int64{4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20}
		if quick {
			chunks = []int64{4 << 10, 64 << 10, 1 << 20}
		}
		var cells []*Cell
		for _, device := range []string{"fuse", "uffd"} {
			for _, access := range []string{"random:4KiB", "random:64KiB"} {
				for _, chunk := range chunks {
					c := onDevice(name, "managed-mount", device, "pull_first=0")
					c.Link.RTT, c.Link.Rate = 5*time.Millisecond, NetworkRate
					c.Op, c.Access, c.Chunk = "write", access, chunk
					c.PullWorkers, c.PushWorkers, c.Limit, c.Budget = 0, 0, 4<<20, 10*time.Second
					cells = append(cells, c)
				}
			}
		}
		return cells
	}
	return f
}
