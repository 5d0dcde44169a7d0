package conformance_test

import (
	"errors"
	"slices"
	"testing"

	"memsync/strategies"
	"memsync/strategies/all"
	"memsync/strategies/conformance"
	"memsync/strategies/region"
	"memsync/strategies/transport/nbd"
)

func TestMain(m *testing.M) { conformance.Main(m) }

// TestRegistry runs the suite on every registered strategy x device, local and over NBD,
// and over the other transports on one device of each strategy: what is theirs does not
// depend on the device.
// A device that this kernel lacks is skipped with the probe's reason; one that
// could not be tried is a failure.
func TestRegistry(t *testing.T) {
	for _, s := range all.Registry() {
		info := s.Info()
		one := deviceOf(info)
		for _, device := range info.Devices {
			name := info.Name
			if device != "" {
				name += "/" + device
			}
			t.Run(name, func(t *testing.T) {
				if device != "" {
					err := all.ProbeDevice(device)
					if errors.Is(err, region.ErrNotSupported) {
						t.Skip(err)
					} else if err != nil {
						t.Fatalf("could not tell whether device %s works: %v", device, err)
					}
				}
				names := []string{"nbd"}
				if device == one {
					names = all.TransportNames()
				}
				transports(t, conformance.Factory{Strategy: s, Device: device}, names)
			})
		}
	}
}

// deviceOf is the strategy's quickest device that works here.
func deviceOf(info strategies.Info) string {
	for _, device := range append([]string{"uffd"}, info.Devices...) {
		if slices.Contains(info.Devices, device) && (device == "" || all.ProbeDevice(device) == nil) {
			return device
		}
	}
	return ""
}

func transports(t *testing.T, f conformance.Factory, names []string) {
	t.Run("local", func(t *testing.T) { conformance.Run(t, f) })
	if f.Strategy.Info().Can(strategies.LocalOnly) {
		return
	}
	for _, name := range names {
		if own := f.Strategy.Info().Transports; own != nil && !slices.Contains(own, name) {
			continue
		}
		for _, network := range []string{"tcp", "unix"} {
			if network == "unix" && name != "nbd" { // the others' own suite has what is theirs
				continue
			}
			t.Run(name+"-"+network, func(t *testing.T) {
				tr, err := all.Transport(name)
				if err != nil {
					t.Fatal(err)
				}
				f.Transport, f.Network = tr, network
				conformance.Run(t, f)
			})
		}
	}
}

// TestVariants runs the suite with settings that change how a strategy works.
func TestVariants(t *testing.T) {
	for _, v := range []struct {
		strategy, device string
		name             string
		f                conformance.Factory
	}{
		{"managed-mount", "fuse", "no-workers", conformance.Factory{NoWorkers: true}},
		{"managed-mount", "fuse", "page-chunks", conformance.Factory{Chunk: region.PageSize(), Settings: []string{"extent=16KiB", "window=32KiB", "order=reverse", "dirty_limit=64KiB"}}},
		{"managed-mount", "fuse", "file-cache", conformance.Factory{Settings: []string{"cache_kind=file", "order=random", "pull_first=100KiB", "writeback=true"}}},
		{"managed-mount", "fuse", "memfd-cache", conformance.Factory{Settings: []string{"cache_kind=memfd"}}},
		{"managed-mount", "fuse", "small-memfd-cache", conformance.Factory{Chunk: region.PageSize(), Settings: []string{"cache=64KiB", "cache_kind=memfd"}}},
		{"managed-mount", "uffd", "no-workers", conformance.Factory{NoWorkers: true, Settings: []string{"handlers=1"}}},
		{"managed-mount", "uffd", "page-chunks", conformance.Factory{Chunk: region.PageSize(), Settings: []string{"extent=16KiB", "window=32KiB", "order=random", "dirty_limit=64KiB"}}},
		{"managed-mount", "fuse", "small-cache", conformance.Factory{Chunk: region.PageSize(), Settings: []string{"cache=64KiB"}}},
		{"managed-mount", "uffd", "small-cache", conformance.Factory{Chunk: region.PageSize(), Settings: []string{"cache=64KiB"}}},
		{"managed-mount", "nbd", "small-cache", conformance.Factory{Chunk: region.PageSize(), Settings: []string{"cache=64KiB"}}},
		{"managed-mount", "fuse", "small-file-cache", conformance.Factory{Chunk: region.PageSize(), Settings: []string{"cache=64KiB", "cache_kind=file"}}},
		{"userfaultfd", "uffd", "parallel", conformance.Factory{Settings: []string{"handlers=4", "fault_around=64KiB"}, Block: 64 << 10}},
		{"userfaultfd", "uffd", "continue", conformance.Factory{Settings: []string{"memory=shared", "resolve=continue"}}},
		{"userfaultfd", "uffd", "prefetch-all", conformance.Factory{Transport: &nbd.Transport{}, Network: "tcp", Settings: []string{"prefetch=all"}, Eager: true}},
		{"direct-mount", "fuse", "no-read-ahead", conformance.Factory{Settings: []string{"read_ahead=0", "writeback=true"}}},
		{"direct-mount", "nbd", "netlink", conformance.Factory{Settings: []string{"nbd_setup=netlink", "nbd_ready=uevent", "nbd_connections=2"}}},
		{"nbd-direct", "nbd", "netlink", conformance.Factory{Transport: &nbd.Transport{}, Network: "tcp", Settings: []string{"nbd_setup=netlink", "nbd_timeout=1s", "nbd_connections=1"}}},
	} {
		t.Run(v.strategy+"/"+v.device+"/"+v.name, func(t *testing.T) {
			s, err := all.Registry().Get(v.strategy)
			if err != nil {
				t.Fatal(err)
			}
			if err := all.ProbeDevice(v.device); errors.Is(err, region.ErrNotSupported) {
				t.Skip(err)
			} else if err != nil {
				t.Fatal(err)
			}
			v.f.Strategy, v.f.Device = s, v.device
			conformance.Run(t, v.f)
		})
	}
}
