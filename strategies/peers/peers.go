// Package peers has other projects' ways of making remote memory available as
// strategies, so that they run under the same network, checks and records as
// memsync's own. It is a module of its own: nothing of it is in memsync itself.
//
// A strategy that is a peer on both sides has the peer's name (nbdkit, nbd-server,
// go-nbd, userfaultfd-go, nbdcopy, rsync). One of which only the source's side is the peer's,
// read by memsync's direct mount, is called direct-mount-NAME. docs/peers.md says
// what each one consists of, what it cannot do, and how it compares.
package peers

import (
	"fmt"
	"os/exec"
	"runtime/debug"
	"strings"

	"memsync/strategies"
	"memsync/strategies/all"
	"memsync/strategies/probe"
	"memsync/strategies/region"
)

// Registry returns memsync's own strategies and the peers.
func Registry() strategies.Registry { return append(all.Registry(), Peers()...) }

// Peers returns the peers alone.
func Peers() strategies.Registry {
	return strategies.Registry{
		GoNBD{}, DirectGoNBD{}, UserfaultfdGo{},
		NBDKit(), NBDServer(), DirectNBDKit(), DirectNBDServer(),
		NBDCopy{}, Rsync{},
	}
}

// Probes says which peers are installed, and their versions.
func Probes() []probe.Probe {
	list := []probe.Probe{module("github.com/pojntfx/go-nbd"), module("github.com/loopholelabs/userfaultfd-go")}
	for _, p := range []struct{ name, pkg string }{
		{"nbdkit", "nbdkit"}, {"nbd-server", "nbd-server"}, {"nbdcopy", "libnbd-bin"}, {"rsync", "rsync"},
	} {
		list = append(list, probe.Probe{Name: "peer-" + p.name, Remedy: "sudo apt-get install " + p.pkg, Try: func() (string, error) {
			path, err := find(p.name, p.pkg)
			if err != nil {
				return "", err
			}
			out, err := exec.Command(path, "--version").CombinedOutput()
			version, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
			return version, err
		}})
	}
	return list
}

// module says which version of a library this program was built with.
func module(path string) probe.Probe {
	return probe.Probe{Name: "peer-" + path[strings.LastIndexByte(path, '/')+1:], Try: func() (string, error) {
		b, ok := debug.ReadBuildInfo()
		if !ok {
			return "", fmt.Errorf("the program does not know what it was built from")
		}
		for _, m := range b.Deps {
			if m.Path == path {
				return path + " " + m.Version, nil
			}
		}
		return "", fmt.Errorf("%s is not part of this program: %w", path, region.ErrNotSupported)
	}}
}
