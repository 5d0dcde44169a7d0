package torture

import (
	"context"
)

// available returns the combinations that work here, and why others do not.
func available(Options) ([]Combo, map[string]string, error) { return nil, map[string]string{}, nil }

func (c *campaign) processes(context.Context) error { return nil }

func runProcesses(context.Context, Options, uint64, []Combo, string, bool) Ended { return Ended{} }
