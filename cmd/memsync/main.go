// Command memsync measures, compares and uses the ways of making a Linux memory
// region available on another host. See README.md and docs/.
package main

import (
	"os"

	"memsync/cmd/cli"
	"memsync/scenarios"
	"memsync/strategies/all"
)

func main() { os.Exit(cli.Main(program())) }

func program() cli.Program {
	return cli.Program{Name: "memsync", Strategies: all.Registry(), Figures: scenarios.Figures()}
}
