package scenarios

import (
	"bufio"
	"flag"
	"fmt"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"memsync/strategies"
	"memsync/strategies/all"
)

var rewriteEase = flag.Bool("rewrite-ease", false, "write docs/ease.md anew")

// source is what a package of ours is made of.
type source struct {
	lines int             // of code: not blank, not comment, no tests
	ours  map[string]bool // packages of memsync that it imports, transitively, and itself
	other map[string]bool // modules of others, by these
}

// count reads a package of memsync below the root and all that it imports.
func count(t *testing.T, pkg string, seen *source) {
	t.Helper()
	if seen.ours[pkg] {
		return
	}
	seen.ours[pkg] = true
	files, err := filepath.Glob(filepath.Join("..", strings.TrimPrefix(pkg, "memsync/"), "*.go"))
	if err != nil || len(files) == 0 {
		t.Fatalf("package %s: %d files, %v", pkg, len(files), err)
	}
	for _, f := range files {
		if strings.HasSuffix(f, "_test.go") {
			continue
		}
		seen.lines += codeLines(t, f)
		ast, err := parser.ParseFile(token.NewFileSet(), f, nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range ast.Imports {
			path, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			host, _, _ := strings.Cut(path, "/")
			switch {
			case host == "memsync":
				count(t, path, seen)
			case strings.Contains(host, "."):
				parts := 2
				if host == "github.com" || host == "golang.org" {
					parts = 3
				}
				seen.other[strings.Join(strings.Split(path, "/")[:min(parts, strings.Count(path, "/")+1)], "/")] = true
			}
		}
	}
}

func codeLines(t *testing.T, file string) (n int) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if line := strings.TrimSpace(s.Text()); line != "" && !strings.HasPrefix(line, "//") {
			n++
		}
	}
	return n
}

// easePage makes docs/ease.md.
func easePage(t *testing.T) string {
	needs := map[string]string{"": "none", "fuse": "FUSE: Linux 5.4, /dev/fuse, a mount namespace", "uffd": "userfaultfd: Linux 6.6; root, /dev/userfaultfd or a sysctl for faults of the kernel",
		"nbd": "the nbd module, root", "ublk": "ublk_drv: Linux 6.0, root"}
	var b strings.Builder
	b.WriteString(`# Ease of implementation (N17)

<!-- Made from the source by: go test ./scenarios -run TestEasePage -rewrite-ease -->

Lines of code without blanks, comments and tests: of the strategy's own package, and of all packages of ours that it is built on. Modules of
others are those that these import. Lines are of the day the page was made; a test holds them within a quarter, and the rest exactly.

| strategy | own lines | with all below | modules of others | can | devices, and what they need | limits |
|---|---|---|---|---|---|---|
`)
	for _, s := range all.Registry() {
		i := s.Info()
		pkg := reflect.TypeOf(s).PkgPath()
		whole := &source{ours: map[string]bool{}, other: map[string]bool{}}
		count(t, pkg, whole)
		own := 0
		files, _ := filepath.Glob(filepath.Join("..", strings.TrimPrefix(pkg, "memsync/"), "*.go")) // count has read it
		for _, f := range files {
			if !strings.HasSuffix(f, "_test.go") {
				own += codeLines(t, f)
			}
		}
		var devices, can, limits []string
		for _, d := range i.Devices {
			devices = append(devices, strings.TrimPrefix(d+": ", ": ")+needs[d])
		}
		for _, c := range i.Capabilities {
			can = append(can, string(c))
		}
		for cap, limit := range map[strategies.Capability]string{strategies.Writes: "nothing is written back", strategies.Follows: "does not follow the source's changes", strategies.Migrates: "no hand-over of a running application"} {
			if !i.Can(cap) {
				limits = append(limits, limit)
			}
		}
		if i.Can(strategies.LocalOnly) {
			limits = append(limits, "one host")
		}
		if i.Can(strategies.Copies) {
			limits = append(limits, "a full copy before the first access")
		}
		if i.Transports != nil {
			limits = append(limits, "a protocol of its own")
		}
		slices.Sort(limits)
		fmt.Fprintf(&b, "| %s | %d lines | %d lines | %s | %s | %s | %s |\n", i.Name, own, whole.lines, strings.Join(slices.Sorted(maps.Keys(whole.other)), ", "),
			strings.Join(can, ", "), strings.Join(devices, "; "), strings.Join(limits, "; "))
	}
	b.WriteString("\nBeside the figure `all-strategies` of `memsync run`, which says what each costs while it runs. Parameters and contracts: docs/strategies.\n")
	return b.String()
}

// TestEasePage holds docs/ease.md: lines within a quarter, all else as it is made.
func TestEasePage(t *testing.T) {
	path := filepath.Join("..", "docs", "ease.md")
	want := easePage(t)
	if *rewriteEase {
		if err := os.WriteFile(path, []byte(want), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := regexp.MustCompile(`\d+ lines`)
	if lines.ReplaceAllString(string(got), "") != lines.ReplaceAllString(want, "") {
		t.Fatalf("%s is not what the source makes; run go test ./scenarios -run TestEasePage -rewrite-ease", path)
	}
	is, was := lines.FindAllString(want, -1), lines.FindAllString(string(got), -1)
	for i := range is {
		var a, b float64
		if _, err := fmt.Sscanf(is[i]+" "+was[i], "%g lines %g lines", &a, &b); err != nil || a > 1.25*b || b > 1.25*a {
			t.Errorf("%s says %s where there are %s (%v); run go test ./scenarios -run TestEasePage -rewrite-ease", path, was[i], is[i], err)
		}
	}
}
