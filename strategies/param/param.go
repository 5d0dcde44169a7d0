// Package param holds the parameters that strategies, devices, transports and
// backends declare and that --set fills: their kinds, validation and canonical text.
package param

import (
	"fmt"
	"math"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	"memsync/strategies/region"
)

// Kind is the type of a parameter.
type Kind string

// The kinds, with their notation on the command line.
const (
	KindInt      Kind = "int"      // 4
	KindFloat    Kind = "float"    // 0.01
	KindBool     Kind = "bool"     // true, false
	KindSize     Kind = "size"     // 64KiB; digits alone are bytes
	KindDuration Kind = "duration" // 100ms; 0 may stand alone
	KindEnum     Kind = "enum"     // one of Values
	KindString   Kind = "string"
)

// Spec describes one --set parameter.
type Spec struct {
	Name     string
	Kind     Kind
	Default  string   // in the notation of Kind
	Values   []string // of an enum
	Min, Max int64    // of int, size (bytes) and duration (ns); both 0 means any that is not negative
	Doc      string   // one line, with the unit
	// Check, of a string, returns an error that says what is valid; nil takes any.
	Check func(string) error `json:"-"`
}

// check returns the canonical form of v, or an error that says what is valid.
func (p Spec) check(v string) (string, error) {
	bad := func(want string) error { return fmt.Errorf("parameter %s=%s: want %s", p.Name, v, want) }
	limits := func(n int64, show func(int64) string) error {
		lo, hi := p.Min, p.Max
		if lo == 0 && hi == 0 {
			hi = math.MaxInt64
		}
		if n < lo || n > hi {
			if hi == math.MaxInt64 {
				return bad("at least " + show(lo))
			}
			return bad(show(lo) + " to " + show(hi))
		}
		return nil
	}
	switch p.Kind {
	case KindInt:
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			return "", bad("a whole number")
		}
		return strconv.FormatInt(n, 10), limits(n, func(n int64) string { return strconv.FormatInt(n, 10) })
	case KindFloat:
		f, err := strconv.ParseFloat(v, 64)
		if err != nil || math.IsNaN(f) || math.IsInf(f, 0) || f < 0 {
			return "", bad("a number that is not negative")
		}
		return strconv.FormatFloat(f, 'g', -1, 64), nil
	case KindBool:
		b, err := strconv.ParseBool(v)
		if err != nil {
			return "", bad("true or false")
		}
		return strconv.FormatBool(b), nil
	case KindSize:
		n, err := region.ParseSize(v)
		if err != nil {
			return "", bad(err.Error())
		}
		return region.FormatSize(n), limits(n, region.FormatSize)
	case KindDuration:
		d, err := region.ParseDuration(v)
		if err != nil {
			return "", bad(err.Error())
		}
		return formatDuration(d), limits(int64(d), func(n int64) string { return formatDuration(time.Duration(n)) })
	case KindEnum:
		if !slices.Contains(p.Values, v) {
			return "", bad("one of " + strings.Join(p.Values, ", "))
		}
		return v, nil
	case KindString:
		if strings.ContainsAny(v, ";\n\r") {
			return "", bad("no ';' and no line break")
		}
		if p.Check != nil {
			if err := p.Check(v); err != nil {
				return "", fmt.Errorf("parameter %s=%s: %w", p.Name, v, err)
			}
		}
		return v, nil
	}
	panic("param: parameter " + p.Name + " has no kind")
}

// formatDuration writes d with a single unit, as region.ParseDuration reads it
// (time.Duration's own text has several from a minute on: 1m30s).
func formatDuration(d time.Duration) string {
	switch {
	case d < time.Minute:
		return d.String()
	case d%time.Second == 0:
		return strconv.FormatInt(int64(d/time.Second), 10) + "s"
	}
	return strconv.FormatInt(int64(d), 10) + "ns"
}

// Values is a validated set of parameters, defaults filled in.
// The zero value has none. A Values never changes once made.
type Values struct {
	values map[string]string
	set    map[string]bool
}

// New checks key=value settings against specs and fills in defaults.
// A name may stand in several specs; the first one counts.
// An unknown name gives an error that lists the valid ones.
func New(specs []Spec, settings []string) (Values, error) {
	p := Values{values: map[string]string{}, set: map[string]bool{}}
	byName := map[string]Spec{}
	for _, s := range specs {
		if _, ok := byName[s.Name]; ok {
			continue
		}
		byName[s.Name] = s
		v, err := s.check(s.Default)
		if err != nil && s.Default != "" {
			panic("param: default: " + err.Error())
		}
		p.values[s.Name] = v
	}
	for _, kv := range settings {
		k, v, ok := strings.Cut(kv, "=")
		if !ok {
			return Values{}, fmt.Errorf("setting %q: want key=value", kv)
		}
		s, ok := byName[k]
		if !ok {
			var names []string
			for n := range byName {
				names = append(names, n)
			}
			sort.Strings(names)
			return Values{}, fmt.Errorf("unknown parameter %q; valid here: %s", k, strings.Join(names, ", "))
		}
		c, err := s.check(v)
		if err != nil {
			return Values{}, err
		}
		p.values[k], p.set[k] = c, true
	}
	return p, nil
}

// String returns all parameters as a canonical "k=v;k=v", sorted by key.
func (p Values) String() string {
	var kv []string
	for k, v := range p.values {
		kv = append(kv, k+"="+v)
	}
	sort.Strings(kv)
	return strings.Join(kv, ";")
}

// IsSet reports whether the user set the parameter.
func (p Values) IsSet(name string) bool { return p.set[name] }

// Settings returns what the user set, as key=value, sorted: New with the
// same specs and these settings makes p again.
func (p Values) Settings() []string {
	var kv []string
	for k := range p.set {
		kv = append(kv, k+"="+p.values[k])
	}
	sort.Strings(kv)
	return kv
}

func (p Values) get(name string) string {
	v, ok := p.values[name]
	if !ok {
		panic("param: parameter " + name + " is not declared")
	}
	return v
}

// Has reports whether the parameter is declared here.
func (p Values) Has(name string) bool { _, ok := p.values[name]; return ok }

// Text returns a parameter of kind enum or string.
func (p Values) Text(name string) string { return p.get(name) }

// Int returns a parameter of kind int.
func (p Values) Int(name string) int { n, _ := strconv.ParseInt(p.get(name), 10, 64); return int(n) }

// IntOr is Int, or other where the parameter is not declared.
func (p Values) IntOr(name string, other int) int {
	if !p.Has(name) {
		return other
	}
	return p.Int(name)
}

// TextOr is Text, or other where the parameter is not declared.
func (p Values) TextOr(name, other string) string {
	if !p.Has(name) {
		return other
	}
	return p.Text(name)
}

// Float returns a parameter of kind float.
func (p Values) Float(name string) float64 { f, _ := strconv.ParseFloat(p.get(name), 64); return f }

// Bool returns a parameter of kind bool.
func (p Values) Bool(name string) bool { return p.get(name) == "true" }

// Size returns a parameter of kind size, in bytes; 0 where its default is empty and it is not set.
func (p Values) Size(name string) int64 { n, _ := region.ParseSize(p.get(name)); return n }

// Duration returns a parameter of kind duration.
func (p Values) Duration(name string) time.Duration {
	d, _ := region.ParseDuration(p.get(name))
	return d
}
