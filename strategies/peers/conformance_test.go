package peers

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"memsync/strategies"
	"memsync/strategies/conformance"
	"memsync/strategies/transport"
	"memsync/strategies/transport/nbd"
)

const suiteEnv = "PEERS_SUITE" // the peer on which TestSuite runs the suite

func TestMain(m *testing.M) { conformance.Main(m) }

// need skips the test where a peer's program is missing, unless MEMSYNC_MUST_RUN
// says that peers may not be skipped.
func need(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := find(p, p); err != nil {
			if strings.Contains(os.Getenv("MEMSYNC_MUST_RUN"), "peers") {
				t.Fatal(err)
			}
			t.Skip(err)
		}
	}
}

// suites are the peers that the suite runs on where the kernel has no NBD devices.
// The others: testdata/script.
func suites() map[string]struct {
	programs []string
	factory  conformance.Factory
} {
	tcp := func(s strategies.Strategy, device string) conformance.Factory {
		var t transport.Transport = &nbd.Transport{}
		return conformance.Factory{Strategy: s, Device: device, Transport: t, Network: "tcp"}
	}
	return map[string]struct {
		programs []string
		factory  conformance.Factory
	}{
		"userfaultfd-go":          {nil, tcp(UserfaultfdGo{}, "uffd")},
		"direct-mount-go-nbd":     {nil, tcp(DirectGoNBD{}, "fuse")},
		"direct-mount-nbdkit":     {[]string{"nbdkit"}, tcp(DirectNBDKit(), "fuse")},
		"direct-mount-nbd-server": {[]string{"nbd-server"}, tcp(DirectNBDServer(), "fuse")},
	}
}

// TestSuite is run by TestConformance, in a process of its own.
func TestSuite(t *testing.T) {
	name := os.Getenv(suiteEnv)
	if name == "" {
		t.Skip("run by TestConformance")
	}
	conformance.Run(t, suites()[name].factory)
}

// TestConformance runs memsync's suite on the peers. testdata/conformance says of
// each case whether the peer passes it, and why not: known facts, held here. Set
// UPDATE=1 to write what was found (reasons are kept; a new failure needs one).
func TestConformance(t *testing.T) {
	for name, s := range suites() {
		t.Run(name, func(t *testing.T) {
			need(t, s.programs...)
			path := filepath.Join("testdata", "conformance", name)
			known, _ := os.ReadFile(path)
			want, reasons := parse(string(known))
			var fails []string
			for c, r := range want {
				if r == "fail" {
					fails = append(fails, c)
				}
			}
			failing := "^TestSuite$/^(" + strings.Join(fails, "|") + ")$"
			got, out := suite(t, name, "-test.run=^TestSuite$", "-test.skip="+failing)
			if len(fails) > 0 { // what fails mostly waits
				more, words := suite(t, name, "-test.run="+failing, "CONFORMANCE_PATIENCE=3s")
				maps.Copy(got, more)
				out += words
			}
			if len(got) < 10 {
				t.Fatalf("only %d cases\n%s", len(got), out)
			}
			order := slices.Sorted(maps.Keys(got))
			if os.Getenv("UPDATE") != "" {
				var b bytes.Buffer
				for _, c := range order {
					line := fmt.Sprintf("%s %s", got[c], c)
					if r := reasons[c]; r != "" && got[c] != "pass" {
						line += " # " + r
					}
					fmt.Fprintln(&b, line)
				}
				if err := os.WriteFile(path, b.Bytes(), 0o666); err != nil {
					t.Fatal(err)
				}
				t.Logf("%s", out)
				return
			}
			ok := true
			for _, c := range order {
				if got[c] != want[c] {
					t.Errorf("%s: %s, want %q", c, got[c], want[c])
					ok = false
				}
				if got[c] == "fail" && reasons[c] == "" {
					t.Errorf("%s fails and %s does not say why", c, path)
				}
				delete(want, c)
			}
			if len(want) > 0 {
				t.Errorf("did not run: %v", want)
			}
			if !ok {
				t.Logf("%s", out)
			}
		})
	}
}

// suite runs TestSuite on a peer in a process of its own and returns what became
// of its cases. Arguments with a letter first are of the environment.
func suite(t *testing.T, name string, args ...string) (got map[string]string, out string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "-test.v", "-test.timeout=170s")
	cmd.Env = append(os.Environ(), suiteEnv+"="+name)
	for _, a := range args {
		if strings.HasPrefix(a, "-") {
			cmd.Args = append(cmd.Args, a)
		} else {
			cmd.Env = append(cmd.Env, a)
		}
	}
	b, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		t.Fatalf("%v\n%s", err, b)
	}
	got = map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^    --- (PASS|FAIL|SKIP): TestSuite/(\w+) `).FindAllStringSubmatch(string(b), -1) {
		got[m[2]] = strings.ToLower(m[1])
	}
	return got, string(b)
}

// parse reads lines of "RESULT CASE # REASON".
func parse(text string) (results, reasons map[string]string) {
	results, reasons = map[string]string{}, map[string]string{}
	for line := range strings.Lines(text) {
		line, reason, _ := strings.Cut(line, "#")
		if f := strings.Fields(line); len(f) == 2 {
			results[f[1]], reasons[f[1]] = f[0], strings.TrimSpace(reason)
		}
	}
	return results, reasons
}
