package param

import (
	"slices"
	"strings"
	"testing"
	"time"
)

func specs() []Spec {
	return []Spec{
		{Name: "workers", Kind: KindInt, Default: "4", Min: 1, Max: 64},
		{Name: "any", Kind: KindInt, Default: "0"},
		{Name: "fraction", Kind: KindFloat, Default: "0.5"},
		{Name: "on", Kind: KindBool, Default: "true"},
		{Name: "window", Kind: KindSize, Default: "64KiB", Min: 4096, Max: 1 << 40},
		{Name: "unset", Kind: KindSize},
		{Name: "wait", Kind: KindDuration, Default: "90s", Max: int64(time.Hour)},
		{Name: "order", Kind: KindEnum, Default: "linear", Values: []string{"linear", "reverse"}},
		{Name: "name", Kind: KindString},
		{Name: "workers", Kind: KindInt, Default: "9"}, // a second one of the same name does not count
	}
}

func TestDefaults(t *testing.T) {
	p, err := New(specs(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if p.Int("workers") != 4 || p.Float("fraction") != 0.5 || !p.Bool("on") || p.Size("window") != 64<<10 ||
		p.Size("unset") != 0 || p.Duration("wait") != 90*time.Second || p.Text("order") != "linear" || p.Text("name") != "" {
		t.Errorf("defaults: %s", p)
	}
	const want = "any=0;fraction=0.5;name=;on=true;order=linear;unset=;wait=90s;window=64KiB;workers=4"
	if p.String() != want {
		t.Errorf("canonical text\n%s, want\n%s", p, want)
	}
	if len(p.Settings()) != 0 || p.IsSet("workers") || !p.Has("workers") || p.Has("absent") {
		t.Errorf("nothing is set, but Settings gives %v", p.Settings())
	}
}

func TestSettings(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"workers=64", "workers=64"}, {"workers=+7", "workers=7"}, {"fraction=1e-2", "fraction=0.01"}, {"on=F", "on=false"},
		{"window=65536", "window=64KiB"}, {"window=1mib", "window=1MiB"}, {"window=4097", "window=4097"},
		{"wait=1500ms", "wait=1.5s"}, {"wait=2m", "wait=120s"}, {"wait=0", "wait=0s"}, {"wait=60.25s", "wait=60250000000ns"}, {"wait=1h", "wait=3600s"},
		{"wait=5us", "wait=5µs"}, {"order=reverse", "order=reverse"}, {"name=a=b", "name=a=b"}, {"name=", "name="},
	} {
		p, err := New(specs(), []string{c.in})
		if err != nil {
			t.Errorf("%s: %v", c.in, err)
			continue
		}
		if got := p.Settings(); !slices.Equal(got, []string{c.want}) {
			t.Errorf("%s: settings are %q, want %q", c.in, got, c.want)
		}
		name, _, _ := strings.Cut(c.in, "=")
		if !p.IsSet(name) || !strings.Contains(p.String(), c.want) {
			t.Errorf("%s: not in %s", c.in, p)
		}
	}
	p, err := New(specs(), []string{"wait=1m30s"})
	if err == nil {
		t.Errorf("several units in one time are accepted: %s", p)
	}
	p, err = New(specs(), []string{"workers=2", "workers=3"})
	if err != nil || p.Int("workers") != 3 {
		t.Errorf("the last setting of a name must count: %s, %v", p, err)
	}
}

func TestBad(t *testing.T) {
	for in, want := range map[string]string{
		"workers":                 `want key=value`,
		"":                        `want key=value`,
		"worker=1":                `unknown parameter "worker"; valid here: any, fraction, name, on, order, unset, wait, window, workers`,
		"workers=0":               "want 1 to 64",
		"workers=65":              "want 1 to 64",
		"any=-1":                  "want at least 0",
		"workers=4.5":             "a whole number",
		"workers=":                "a whole number",
		"any=9999999999999999999": "a whole number",
		"fraction=-0.1":           "not negative",
		"fraction=NaN":            "not negative",
		"fraction=1e999":          "not negative",
		"on=perhaps":              "true or false",
		"window=4095":             "want 4KiB to 1TiB",
		"window=-1":               "out of range",
		"window=big":              "not a number",
		"wait=5":                  "has no unit",
		"wait=2h":                 "want 0s to 3600s",
		"order=sideways":          "one of linear, reverse",
		"name=a;b":                "no ';'",
		"name=a\nb":               "no ';'",
	} {
		if p, err := New(specs(), []string{in}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v (%s), want %q", in, err, p, want)
		}
	}
}

func TestBadSpecPanics(t *testing.T) {
	for name, f := range map[string]func(){
		"default that its own limits refuse": func() { _, _ = New([]Spec{{Name: "x", Kind: KindInt, Default: "0", Min: 1, Max: 2}}, nil) },
		"undeclared parameter":               func() { Values{}.Int("x") },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", name)
				}
			}()
			f()
		}()
	}
}

// FuzzNew holds what every accepted setting must keep: its canonical form is
// accepted and is its own canonical form, and the typed value is in its limits.
func FuzzNew(f *testing.F) {
	for _, s := range []string{"workers=7", "window=1.5MiB", "wait=61.5s", "wait=100.000000001s", "name=x", "fraction=.1", "any=0x1", "on=1", "wait=1e3s", "window=1e15"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := New(specs(), []string{s})
		if err != nil {
			return
		}
		if w := p.Int("workers"); w < 1 || w > 64 {
			t.Fatalf("%q: workers is %d", s, w)
		}
		if w := p.Size("window"); w < 4096 || w > 1<<40 {
			t.Fatalf("%q: window is %d", s, w)
		}
		if d := p.Duration("wait"); d < 0 || d > time.Hour {
			t.Fatalf("%q: wait is %v", s, d)
		}
		again, err := New(specs(), p.Settings())
		if err != nil || again.String() != p.String() || !slices.Equal(again.Settings(), p.Settings()) {
			t.Fatalf("%q: %s became %s: %v", s, p, again, err)
		}
		if strings.Count(p.String(), ";") != 8 {
			t.Fatalf("%q: text %q cannot be split again", s, p)
		}
	})
}
