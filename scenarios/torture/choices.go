package torture

import (
	"fmt"
	"slices"
	"strings"
)

// virtualChoices are what a program in one process may be drawn from. quic needs a
// socket; the backends that are servers need a network.
func virtualChoices() Choices {
	return Choices{
		Level:      Virtual,
		Strategies: []string{"managed-mount", "managed-mount", "direct-mount"},
		Transports: []string{"nbd", "nbd", "grpc", "drpc", "jsonrpc"},
		Backends:   []string{"memory", "memory", "memory", "file", "directory", "kv"},
	}
}

// Filter is strategy/device/transport/backend; an empty part, or *, is any.
type Filter struct{ Combo }

// ParseFilter parses a filter, whose last parts may be left out.
func ParseFilter(s string) (f Filter, err error) {
	parts := strings.Split(s, "/")
	if len(parts) > 4 {
		return f, fmt.Errorf("%q: want strategy/device/transport/backend, of which any may be * or left out at the end", s)
	}
	for i, p := range parts {
		if p == "*" {
			p = ""
		}
		*[]*string{&f.Strategy, &f.Device, &f.Transport, &f.Backend}[i] = p
	}
	return f, nil
}

// String is what ParseFilter parses.
func (f Filter) String() string {
	parts := []string{f.Strategy, f.Device, f.Transport, f.Backend}
	for i, p := range parts {
		if p == "" {
			parts[i] = "*"
		}
	}
	return strings.Join(parts, "/")
}

// Takes reports whether a combination passes.
func (f Filter) Takes(c Combo) bool {
	for _, p := range [][2]string{{f.Strategy, c.Strategy}, {f.Device, c.Device}, {f.Transport, c.Transport}, {f.Backend, c.Backend}} {
		if p[0] != "" && p[0] != p[1] {
			return false
		}
	}
	return true
}

func keep(all []string, want string) []string {
	return slices.DeleteFunc(slices.Clone(all), func(s string) bool { return want != "" && s != want })
}

// only leaves out what a filter does not take. With level Virtual there is no device.
func (c Choices) only(f Filter) Choices {
	c.Strategies, c.Transports, c.Backends = keep(c.Strategies, f.Strategy), keep(c.Transports, f.Transport), keep(c.Backends, f.Backend)
	c.Combos = slices.DeleteFunc(slices.Clone(c.Combos), func(k Combo) bool { return !f.Takes(k) })
	return c
}

// empty reports whether there is nothing to draw from.
func (c Choices) empty() bool {
	if c.Level == Processes {
		return len(c.Combos) == 0
	}
	return len(c.Strategies) == 0 || len(c.Transports) == 0 || len(c.Backends) == 0
}

// LevelOf is the level of a program, by its seed.
func LevelOf(seed uint64) string { return levels[seed%uint64(len(levels))] }

// levels, by the remainder of a seed.
var levels = [...]string{Virtual, Machines, Processes}

// Levels returns the names of the levels.
func Levels() []string { return append([]string(nil), levels[:]...) }
