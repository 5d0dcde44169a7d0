package transport

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"memsync/strategies/region"
	"memsync/strategies/storetest"
)

// TestAccess: each right by itself, for the region and for what is beside it.
func TestAccess(t *testing.T) {
	store := func() region.Store { return storetest.New(make([]byte, 64)) }
	inner := NewLeases(Named{{"a", store()}, {"a.b", store()}, {"a.b" + MigrationSuffix, store()}, {"secret", store()}})
	rules, err := ParseRules(strings.NewReader("# a comment\n\nreader a read\nwriter a read,write\nblind a write\nmover a.b migrate\n* a.b read\nroot * read,write,migrate\n"))
	if err != nil {
		t.Fatal(err)
	}
	a := NewAccess(inner, rules)
	for _, c := range []struct {
		who, name           string
		open, read, write   bool
		lease, regionListed bool
	}{
		{"reader", "a", true, true, false, false, true},
		{"writer", "a", true, true, true, true, true},
		{"blind", "a", true, false, true, true, true},
		{"reader", "secret", false, false, false, false, false},
		{"reader", "a.version", true, true, false, false, false},
		{"blind", "a.version", false, false, false, false, false},
		{"reader", "a.b.version", true, true, false, false, false},
		{"reader", "a.b", true, true, false, false, true},
		{"", "a.b", false, false, false, false, false},
		{"", "a", false, false, false, false, false},
		{"root", "secret", true, true, true, true, true},
		{"nobody", "secret.version", false, false, false, false, false},
	} {
		t.Run(fmt.Sprintf("%s %s", c.who, c.name), func(t *testing.T) {
			e := As(a, c.who)
			if got := slices.Contains(e.List(), c.name); got != c.regionListed {
				t.Errorf("listed: %t", got)
			}
			s, err := e.Open(c.name)
			if (err == nil) != c.open || err != nil && !errors.Is(err, region.ErrNotPermitted) {
				t.Fatalf("open: %v", err)
			}
			g, err := e.(Leaser).Lease(c.name, "w")
			if (err == nil) != c.lease || err != nil && !errors.Is(err, region.ErrNotPermitted) {
				t.Errorf("lease: %v", err)
			}
			g.End()
			if s == nil {
				return
			}
			p := make([]byte, min(32, s.Size()))
			if err := s.ReadAt(t.Context(), p, 0); (err == nil) != c.read {
				t.Errorf("read: %v", err)
			}
			if v, ok := s.(region.Viewer); ok {
				if _, ok := v.View(0, 8); ok && !c.read {
					t.Error("a view of what may not be read")
				}
			}
			if err := s.WriteAt(t.Context(), p, 0); (err == nil) != c.write {
				t.Errorf("write: %v", err)
			}
			if ro, ok := s.(region.ReadOnlyer); ok && ro.ReadOnly() == c.write {
				t.Errorf("read-only: %t", ro.ReadOnly())
			}
		})
	}
}

// TestAccessMigrate: the export that migrates a region needs a right of its own, and
// that is no right to the region's bytes.
func TestAccessMigrate(t *testing.T) {
	migrating := exportsOf{"r": storetest.New(make([]byte, 8)), "r" + MigrationSuffix: storetest.New(make([]byte, 8))}
	a := NewAccess(migrating, []Rule{{"mover", "r", Migrate}, {"both", "r", Migrate | Read}, {"writer", "r", Read | Write}})
	for who, want := range map[string][2]bool{"mover": {false, true}, "both": {true, true}, "writer": {true, false}, "": {false, false}, "else": {false, false}} {
		for i, name := range []string{"r", "r" + MigrationSuffix} {
			s, err := As(a, who).Open(name)
			if (err == nil) != want[i] {
				t.Errorf("%q opens %s: %v", who, name, err)
			}
			if i == 1 && err == nil {
				if err := s.WriteAt(t.Context(), []byte{1}, 0); err != nil {
					t.Errorf("%q calls: %v", who, err)
				}
			}
		}
	}
}

// exportsOf is the exports of a migration's source: its control is not listed.
type exportsOf map[string]region.Store

func (e exportsOf) Open(name string) (region.Store, error) {
	if s := e[name]; s != nil {
		return s, nil
	}
	return nil, region.ErrMissing
}
func (exportsOf) List() []string { return []string{"r"} }

func TestParseRules(t *testing.T) {
	rules, err := ParseRules(strings.NewReader("memsync client\tmy disk\tread\n"))
	if err != nil || len(rules) != 1 || rules[0] != (Rule{"memsync client", "my disk", Read}) {
		t.Errorf("%+v, %v", rules, err)
	}
	for text, want := range map[string]string{
		"a b": "line 1: 2 fields", "\na b c": `line 2: right "c"; valid: read, write, migrate`, "a b read c": "4 fields",
		"a b " + strings.Repeat("x", maxRuleLine): "too long", strings.Repeat("a b read\n", maxRules+1): "more than",
	} {
		if _, err := ParseRules(strings.NewReader(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.20q: %v, want %q", text, err, want)
		}
	}
}

// FuzzParseRules: what is accepted gives each of its rules, and to nobody else.
func FuzzParseRules(f *testing.F) {
	for _, s := range []string{"", "#\n", "a b read,write", "*\t*\tmigrate\n\n", "a  b\tread", "a\t\tread\tb"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		rules, err := ParseRules(strings.NewReader(s))
		if err != nil {
			return
		}
		for _, r := range rules {
			if r.Who == "" || r.Region == "" || r.Rights == 0 || r.Rights > Read|Write|Migrate {
				t.Fatalf("%+v of %q", r, s)
			}
			a := NewAccess(Named{{r.Region, storetest.New(make([]byte, 1))}}, []Rule{r})
			who := r.Who
			if who == "*" {
				who = "x"
			}
			if _, err := As(a, who).Open(r.Region); (err == nil) != (r.Rights&(Read|Write) != 0) {
				t.Fatalf("%+v: %v", r, err)
			}
			if _, err := a.Open(r.Region); err == nil {
				t.Fatalf("%+v lets anybody in", r)
			}
		}
	})
}
