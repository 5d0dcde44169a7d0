package userfaultfd

import (
	"runtime"
	"runtime/debug"
	"time"
)

// startGC gives the daemon's collector the mode of parameter gc, for the whole
// process, and returns what restores it. The load is about 1 GB/s of short-lived
// objects beside 64 MiB of live ones that hold pointers, so that marking has work.
func startGC(mode string) (stop func()) {
	switch mode {
	case "off":
		old := debug.SetGCPercent(-1)
		return func() { debug.SetGCPercent(old) }
	case "load":
		end, ended := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(ended)
			load(end)
		}()
		return func() { close(end); <-ended }
	}
	return func() {}
}

func load(end <-chan struct{}) {
	type leaf [1024]byte
	live := make([]*[2]*leaf, 32<<10)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for i := 0; ; {
		select {
		case <-end:
			runtime.KeepAlive(live)
			return
		case <-tick.C:
			for range 500 { // 1 MB each millisecond
				i = (i + 1) % len(live)
				live[i] = &[2]*leaf{{}, {}}
			}
		}
	}
}
