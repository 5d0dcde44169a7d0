package transport

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"memsync/strategies/region"
)

// Right is what a client may do with a region.
type Right uint8

// The rights. A Right may be several.
const (
	Read    Right = 1 << iota // its bytes, its version and its digests
	Write                     // its bytes, and the lease to write
	Migrate                   // take it over (the export with MigrationSuffix)
)

var rightNames = []string{"read", "write", "migrate"} // by bit

// MigrationSuffix behind the name of a region makes the name of the export by which it
// is migrated.
const MigrationSuffix = ".migration"

func (r Right) String() string {
	var names []string
	for i, n := range rightNames {
		if r&(1<<i) != 0 {
			names = append(names, n)
		}
	}
	return strings.Join(names, ",")
}

// Rule gives Who, a name as Identity returns it, Rights to Region. "*" is everybody with
// a certificate, or every region.
type Rule struct {
	Who, Region string
	Rights      Right
}

const (
	maxRules    = 10_000
	maxRuleLine = 16 << 10
)

// ParseRules reads rules, one a line: who, region and rights, between tabs or, where no
// name has any, spaces. Empty lines and those that begin with # are none. Errors name the line.
func ParseRules(in io.Reader) ([]Rule, error) {
	var rules []Rule
	s := bufio.NewScanner(in)
	s.Buffer(nil, maxRuleLine)
	for n := 1; s.Scan(); n++ {
		line := strings.TrimSpace(s.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		f := strings.Fields(line)
		if strings.Contains(line, "\t") {
			f = slices.DeleteFunc(strings.Split(line, "\t"), func(s string) bool { return strings.TrimSpace(s) == "" })
			for i := range f {
				f[i] = strings.TrimSpace(f[i])
			}
		}
		if len(f) != 3 {
			return nil, fmt.Errorf("line %d: %d fields; want WHO REGION RIGHTS", n, len(f))
		}
		r := Rule{Who: f[0], Region: f[1]}
		for name := range strings.SplitSeq(f[2], ",") {
			i := slices.Index(rightNames, name)
			if i < 0 {
				return nil, fmt.Errorf("line %d: right %q; valid: %s", n, name, strings.Join(rightNames, ", "))
			}
			r.Rights |= 1 << i
		}
		if rules = append(rules, r); len(rules) > maxRules {
			return nil, fmt.Errorf("line %d: more than %d rules", n, maxRules)
		}
	}
	return rules, s.Err()
}

// Access is Exports of which each client sees what the rules give to the name in its
// certificate. Who has none sees nothing.
type Access struct {
	Exports
	rules []Rule
	who   string
}

// NewAccess returns e as the rules allow. Until As it is what somebody without a name sees.
func NewAccess(e Exports, rules []Rule) *Access {
	return &Access{Exports: e, rules: slices.Clone(rules)}
}

var (
	_ Identified = (*Access)(nil)
	_ Leaser     = (*Access)(nil)
)

// As implements Identified.
func (a *Access) As(name string) Exports {
	return &Access{Exports: a.Exports, rules: a.rules, who: name}
}

func (a *Access) rights(name string) (r Right) {
	if a.who == "" {
		return 0
	}
	for _, rule := range a.rules {
		if (rule.Who == "*" || rule.Who == a.who) && (rule.Region == "*" || rule.Region == name) {
			r |= rule.Rights
		}
	}
	return r
}

// of returns the region that an export belongs to, and the rights to use that.
func (a *Access) of(name string) (own string, r Right) {
	all := a.Exports.List()
	if len(all) == 1 && (name == "" || name[0] == '.' && name != all[0]) {
		name = all[0] + name
	}
	if slices.Contains(all, name) {
		return name, a.rights(name)
	}
	own = name // unless it is one beside a region: the longest name that fits
	for i := strings.LastIndexByte(name, '.'); i >= 0; i = strings.LastIndexByte(name[:i], '.') {
		if slices.Contains(all, name[:i]) {
			own = name[:i]
			break
		}
	}
	r = a.rights(own)
	if name == own+MigrationSuffix {
		if r&Migrate != 0 {
			return own, Read | Write
		}
		return own, 0
	}
	return own, r & Read // version, digests
}

// List implements Exports: those that the client has a right to.
func (a *Access) List() []string {
	return slices.DeleteFunc(slices.Clone(a.Exports.List()), func(n string) bool { return a.rights(n) == 0 })
}

func (a *Access) refuse(own, to string) error {
	if a.who == "" {
		return fmt.Errorf("no certificate, and so no right to %s region %q: %w", to, own, region.ErrNotPermitted)
	}
	return fmt.Errorf("%q has no right to %s region %q: %w", a.who, to, own, region.ErrNotPermitted)
}

// Open implements Exports. The region is read-only where the client may not write.
func (a *Access) Open(name string) (region.Store, error) {
	own, r := a.of(name)
	if r&(Read|Write) == 0 {
		return nil, a.refuse(own, "open")
	}
	s, err := a.Exports.Open(name)
	if err != nil || r&Read != 0 && r&Write != 0 {
		return s, err
	}
	return &allowed{Store: s, rights: r, a: a, own: own}, nil
}

// Lease implements Leaser.
func (a *Access) Lease(name, writer string) (*Grant, error) {
	own, r := a.of(name)
	if r&(Read|Write) == 0 || writer != "" && r&Write == 0 {
		return nil, a.refuse(own, "write to")
	}
	if l, ok := a.Exports.(Leaser); ok {
		return l.Lease(name, writer)
	}
	return nil, nil
}

// allowed is a store of which one may not do everything. What the store lacks of the
// optional interfaces gives region.ErrNotSupported.
type allowed struct {
	region.Store
	rights Right
	a      *Access
	own    string
}

func (s *allowed) may(r Right) error {
	if s.rights&r == 0 {
		return s.a.refuse(s.own, r.String())
	}
	return nil
}

func (s *allowed) lacks(what string) error {
	return fmt.Errorf("%s of %T: %w", what, s.Store, region.ErrNotSupported)
}

// ReadOnly implements region.ReadOnlyer.
func (s *allowed) ReadOnly() bool {
	r, ok := s.Store.(region.ReadOnlyer)
	return s.rights&Write == 0 || ok && r.ReadOnly()
}

// ReadAt implements region.Store.
func (s *allowed) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := s.may(Read); err != nil {
		return err
	}
	return s.Store.ReadAt(ctx, p, off)
}

// WriteAt implements region.Store.
func (s *allowed) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := s.may(Write); err != nil {
		return err
	}
	return s.Store.WriteAt(ctx, p, off)
}

// View implements region.Viewer.
func (s *allowed) View(off, n int64) ([]byte, bool) {
	if v, ok := s.Store.(region.Viewer); ok && s.rights&Read != 0 {
		return v.View(off, n)
	}
	return nil, false
}

// Extents implements region.Extenter.
func (s *allowed) Extents(ctx context.Context, off, n int64) ([]region.Extent, error) {
	e, ok := s.Store.(region.Extenter)
	if err := s.may(Read); err != nil || !ok {
		return nil, errors.Join(err, s.lacks("extents"))
	}
	return e.Extents(ctx, off, n)
}

// WriteZeroes implements region.Zeroer.
func (s *allowed) WriteZeroes(ctx context.Context, off, n int64, hole bool) error {
	z, ok := s.Store.(region.Zeroer)
	if err := s.may(Write); err != nil {
		return err
	} else if !ok {
		return s.lacks("zeroes")
	}
	return z.WriteZeroes(ctx, off, n, hole)
}

// Trim implements region.Trimmer.
func (s *allowed) Trim(ctx context.Context, off, n int64) error {
	t, ok := s.Store.(region.Trimmer)
	if err := s.may(Write); err != nil {
		return err
	} else if !ok {
		return s.lacks("trim")
	}
	return t.Trim(ctx, off, n)
}

// Cache implements region.Cacher.
func (s *allowed) Cache(ctx context.Context, off, n int64) error {
	c, ok := s.Store.(region.Cacher)
	if err := s.may(Read); err != nil {
		return err
	} else if !ok {
		return s.lacks("cache")
	}
	return c.Cache(ctx, off, n)
}
