package scenarios

import (
	"sync"

	"memsync/netem"
	"memsync/results"
	"memsync/strategies/all"
)

// What this machine can do is asked once a process: a sweep resolves hundreds of
// cells, and a probe makes devices and namespaces.
var (
	probeShaper   = once(netem.Probe)
	probeDevice   = once(all.ProbeDevice)
	kernelRelease = sync.OnceValue(func() string { return results.ReadHost().Kernel })
)

// once remembers what f says of each of its arguments. It may be called concurrently.
func once[K comparable](f func(K) error) func(K) error {
	var answers sync.Map // K to func() error
	return func(k K) error {
		answer, _ := answers.LoadOrStore(k, sync.OnceValue(func() error { return f(k) }))
		return answer.(func() error)()
	}
}
