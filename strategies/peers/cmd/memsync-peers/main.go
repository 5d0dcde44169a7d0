// Command memsync-peers is memsync with other projects' programs and libraries as
// further strategies. Commands, flags, records and roles are the same (docs/cli.md, docs/peers.md).
package main

import (
	"os"

	"memsync/cmd/cli"
	"memsync/scenarios"
	"memsync/strategies/peers"
)

func main() { os.Exit(cli.Main(program())) }

func program() cli.Program {
	return cli.Program{Name: "memsync-peers", Strategies: peers.Registry(), Figures: append(scenarios.Figures(), peers.Figures()...), Probes: peers.Probes()}
}
