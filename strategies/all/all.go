// Package all lists every strategy of this binary in one place.
package all

import (
	"memsync/strategies"
	"memsync/strategies/baseline"
)

// Registry returns all strategies, baselines first.
func Registry() strategies.Registry {
	return strategies.Registry{
		baseline.Memory{},
		baseline.Disk{},
	}
}
