// Package all lists every strategy, device and transport of this binary in one place.
package all

import (
	"errors"
	"fmt"
	"strings"

	"memsync/strategies"
	"memsync/strategies/attach"
	"memsync/strategies/backend"
	"memsync/strategies/baseline"
	"memsync/strategies/device"
	"memsync/strategies/device/uffd"
	"memsync/strategies/direct"
	"memsync/strategies/download"
	"memsync/strategies/hashsync"
	"memsync/strategies/managed"
	"memsync/strategies/migration"
	"memsync/strategies/nbddirect"
	"memsync/strategies/param"
	"memsync/strategies/snapshot"
	"memsync/strategies/transport"
	"memsync/strategies/transport/drpc"
	"memsync/strategies/transport/grpc"
	"memsync/strategies/transport/jsonrpc"
	"memsync/strategies/transport/nbd"
	"memsync/strategies/transport/quic"
	"memsync/strategies/transport/rpc"
	"memsync/strategies/userfaultfd"
)

// Registry returns all strategies, baselines first.
func Registry() strategies.Registry {
	return strategies.Registry{
		baseline.Memory{},
		baseline.Disk{},
		userfaultfd.Strategy{},
		direct.Strategy{},
		managed.Strategy{},
		nbddirect.Strategy{},
		hashsync.Strategy{},
		migration.Strategy{},
		snapshot.Strategy{},
		download.Strategy{},
	}
}

// TransportNames lists the transports; "local", which is none, is not among them.
func TransportNames() []string { return []string{"nbd", "grpc", "drpc", "quic", "jsonrpc"} }

// Transport returns a transport by name, without TLS, or an error that lists the valid names.
func Transport(name string) (transport.Transport, error) {
	return SecureTransport(name, transport.TLS{})
}

// SecureTransport is Transport with the connections secured by t.
func SecureTransport(name string, t transport.TLS) (transport.Transport, error) {
	switch name {
	case "nbd":
		return &nbd.Transport{ServerTLS: t.Server, RequireTLS: t.Server != nil, ClientTLS: t.Client}, nil
	case "grpc":
		return &grpc.Transport{TLS: t}, nil
	case "drpc":
		return &drpc.Transport{TLS: t}, nil
	case "quic":
		return &quic.Transport{TLS: t}, nil
	case "jsonrpc":
		return &jsonrpc.Transport{TLS: t}, nil
	}
	return nil, fmt.Errorf("unknown transport %q; valid: %s, local", name, strings.Join(TransportNames(), ", "))
}

// MountSpecs returns the parameters of a strategy over a transport that mean
// something where no run is measured: its own, with those of its devices, and the transport's.
func MountSpecs(s strategies.Strategy, transportName string) []param.Spec {
	return append(append([]param.Spec{}, s.Info().Params...), transportParams(transportName)...)
}

// transportParams are the parameters that a transport has.
func transportParams(name string) []param.Spec {
	specs := nbd.Params()
	if name != "nbd" {
		specs = rpc.Params(name)
	}
	return append(specs,
		param.Spec{Name: "pool", Kind: param.KindInt, Default: "0", Max: 16, Doc: "another name of connections, which it comes before"})
}

// TransportOptions returns the options of a transport that parameters set.
func TransportOptions(p param.Values) transport.Options {
	o := transport.Options{Connections: p.Int("connections"), Window: p.Size("window")}
	if n := p.Int("pool"); n > 0 {
		o.Connections = n
	}
	if p.Has("calls") {
		o.Calls, o.Message, o.Stream = p.Int("calls"), p.Size("message"), p.TextOr("rpc", "unary") == "stream"
	}
	return o
}

// Specs returns the parameters that a strategy has with a device, a transport and
// a backend: its own, with those of all its devices, and those that come with these.
func Specs(s strategies.Strategy, deviceName, transportName, backendName string) []param.Spec {
	specs := append([]param.Spec{}, s.Info().Params...)
	if s.Info().Can(strategies.Follows) {
		specs = append(specs, strategies.SyncParams()...)
	}
	if s.Info().Can(strategies.Migrates) || s.Info().Can(strategies.Writes) {
		specs = append(specs, strategies.MigrateParams()...)
	}
	if deviceName != "" && deviceName != "uffd" {
		specs = append(specs, param.Spec{Name: "advice", Kind: param.KindEnum, Default: attach.AdviceNone, Values: []string{attach.AdviceNone, attach.AdviceSequential, attach.AdviceRandom},
			Doc: "madvise(2) of the workload's mapping; told random, a touch reads one page and not the read-ahead window around it"},
			param.Spec{Name: "o_direct", Kind: param.KindBool, Default: "false",
				Doc: "the workload opens the device past the page cache, so that each 4 KiB access is a request; with --via file or path"},
			param.Spec{Name: "files", Kind: param.KindInt, Default: "1", Min: 1, Max: 256,
				Doc: "mappings that the region is divided into, one behind the other: as many devices, or files of one file_system"},
			param.Spec{Name: "file_system", Kind: param.KindEnum, Default: "none", Values: attach.FileSystems(),
				Doc: "the source has an image of it with the region as its files, which the workload mounts from the device and maps; reads only"})
	}
	if transportName != "local" {
		specs = append(append(specs, transportParams(transportName)...),
			param.Spec{Name: "tls", Kind: param.KindBool, Default: "false", Doc: "mutual TLS 1.3 between daemon and source, with certificates that are made for the run"})
		if transportName != "quic" {
			specs = append(specs, param.Spec{Name: "congestion", Kind: param.KindString,
				Doc: "TCP congestion control of both ends (default: the kernel's, which the links of manifest.json name)"},
				param.Spec{Name: "initial_window", Kind: param.KindInt, Default: "0", Max: 1000,
					Doc: "segments that a TCP connection sends before the first acknowledgement, both ends (initcwnd of the route); 0 is the kernel's own, 10"})
		}
	}
	return append(specs, backend.Params(backendName)...)
}

// DeviceNames lists the kinds of devices.
func DeviceNames() []string {
	var names []string
	for _, k := range device.Kinds() {
		names = append(names, k.Name)
	}
	return names
}

// ProbeDevice tries whether a kind of device works here: nil, an error that
// matches region.ErrNotSupported, or another one where it could not tell.
func ProbeDevice(name string) error {
	if name == "uffd" {
		return errors.Join(uffd.ProbeMissing(), uffd.ProbePoison())
	}
	k, err := device.Get(name)
	if err != nil {
		return err
	}
	return k.Probe()
}
