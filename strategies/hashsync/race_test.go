//go:build race

package hashsync

const raceEnabled = true
