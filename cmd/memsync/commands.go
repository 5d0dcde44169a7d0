package main

import "github.com/spf13/cobra"

// commands lists all commands. Each is an options struct and a function.
func commands(s *state) []*cobra.Command {
	return []*cobra.Command{}
}

// hidden runs the hidden commands that memsync starts itself with (they must not
// install signal handlers or parse flags), and reports whether args was one.
func hidden(args []string) (code int, ok bool) {
	return 0, false
}
