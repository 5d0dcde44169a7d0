package peers

import "memsync/scenarios"

// Figures returns the figures of the peers.
func Figures() []scenarios.Figure { return nil }
