// Package probe says what this machine can do. Each probe has three answers:
// it works; it is missing, and why; it could not be told, and why. An answer is
// made by trying, in a namespace of its own where that leaves traces, and never
// loads a module or sets a sysctl. `memsync doctor` prints the list and each
// record's manifest stores it.
package probe

import (
	"errors"

	"memsync/strategies/region"
)

// Answer is what a probe found.
type Answer string

// The three answers. Only the first two are conclusive.
const (
	Works   Answer = "works"
	Missing Answer = "missing"
	Unknown Answer = "unknown" // could not tell: no permission, or the attempt would change the machine
)

// Probe is one thing to try. Try blocks for milliseconds at most and returns
// what it saw (version, mode, amount; may be empty) and nil if the thing works,
// an error that matches region.ErrNotSupported if it is missing for certain, and
// any other error if it could not tell. It may be called concurrently.
type Probe struct {
	Name   string
	Kernel string // the minimum kernel version, or empty where any will do
	Remedy string // the command that would mend it, unless the error says a better one (Mend)
	Try    func() (detail string, err error)
}

// Result is a probe's answer. It is plain data, stored in the manifest.
type Result struct {
	Name   string `json:"name"`
	Answer Answer `json:"answer"`
	Detail string `json:"detail"`               // what was seen, or why not
	Kernel string `json:"min_kernel,omitempty"` // the minimum kernel version
	Remedy string `json:"remedy,omitempty"`     // the command that would mend it; empty where it works or nothing would
}

// Run tries p.
func (p Probe) Run() Result {
	detail, err := p.Try()
	r := Result{Name: p.Name, Answer: Works, Detail: detail, Kernel: p.Kernel}
	if err == nil {
		return r
	}
	r.Answer, r.Detail, r.Remedy = Unknown, err.Error(), p.Remedy
	if errors.Is(err, region.ErrNotSupported) {
		r.Answer = Missing
	}
	var m *mend
	if errors.As(err, &m) {
		r.Remedy = m.command
	}
	return r
}

// Run tries all probes, one after the other.
func Run(probes []Probe) []Result {
	results := make([]Result, len(probes))
	for i, p := range probes {
		results[i] = p.Run()
	}
	return results
}

type mend struct {
	err     error
	command string
}

func (m *mend) Error() string { return m.err.Error() }
func (m *mend) Unwrap() error { return m.err }

// Mend attaches to err the command that would mend it, in place of the probe's own.
func Mend(err error, command string) error { return &mend{err, command} }

type certain struct{ error }

func (c certain) Unwrap() error        { return c.error }
func (c certain) Is(target error) bool { return target == region.ErrNotSupported }

// No marks err as a certain no, for errors of packages that have a sentinel of
// their own for it.
func No(err error) error { return certain{err} }
