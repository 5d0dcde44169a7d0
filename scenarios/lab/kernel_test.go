package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"memsync/netem"
	"memsync/strategies/device/nbdk"
	"memsync/strategies/region"
	"memsync/strategies/replay"
)

// native says whether the machine's own kernel has what tests need: then they
// were not skipped there, and the lab need not run them.
func native(t *testing.T, probe func() error) bool {
	err := probe()
	if err != nil && !errors.Is(err, region.ErrNotSupported) && !errors.Is(err, netem.ErrNotSupported) {
		t.Logf("could not tell what this machine's kernel has: %v", err)
	}
	return err == nil
}

// TestKernelPackages runs in the lab kernel the tests that need the kernel's nbd
// or netem, where the machine's own has none and they were skipped: those of the
// packages, the whole conformance suite on the NBD device, and the tests of faults,
// which check that nothing is left. There nothing may skip but for a reason in skips.
//
// Under the race detector the programs are built with it, too (cgo, hence gcc), and
// what has both ends of a kernel device is run: all of nbddirect; nbdk without
// half of the set-ups that TestReadAndStore repeats; and the concurrent cases of
// the conformance suite over TCP. A process start costs some tenths of a second there.
func TestKernelPackages(t *testing.T) {
	k := kernel(t)
	nbd, shaped := native(t, nbdk.Probe), native(t, func() error { return netem.Probe(netem.ShaperNetem) })
	// Cases that a strategy does not have, whatever the kernel.
	const inapplicable = "does not declare|needs a connection that can be lost|nobody else|has no on_change|one request of a migration covers chunks"
	var builds sync.Map // package -> func() (program string, err error)
	dir := t.TempDir()
	for name, tests := range map[string]struct {
		native          bool
		pkg, run, skips string   // skips: expression for the reasons that are none of the kernel's
		race            []string // the flags that choose tests under the race detector; nil chooses none
	}{
		"nbdk":               {nbd, "strategies/device/nbdk", "", "nbd-client is missing", []string{"-test.skip=^TestReadAndStore$/(poll|uevent)$"}},
		"nbdk, udevd":        {nbd, "strategies/device/nbdk", "^TestUdev$", "\x00", nil},
		"nbddirect":          {nbd, "strategies/nbddirect", "", "\x00", []string{}},
		"netem":              {shaped, "netem", "", "machine too busy", nil},
		"conformance, local": {nbd, "strategies/conformance", "^TestRegistry$/./^nbd$/^local$", inapplicable, nil},
		"conformance, TCP": {nbd, "strategies/conformance", "^TestRegistry$/./^nbd$/^nbd-tcp$", inapplicable,
			[]string{"-test.run=^TestRegistry$/./^nbd$/^nbd-tcp$/^(CloseStalled|Concurrent|Gone|OneBadChunk|Program|Sync)$"}},
		"conformance, Unix":     {nbd, "strategies/conformance", "^TestRegistry$/./^nbd$/^nbd-unix$", inapplicable, nil},
		"conformance, variants": {nbd, "strategies/conformance", "^TestVariants$/./^nbd$", inapplicable, nil},
		"faults":                {nbd, "cmd/memsync", "^Test(Interrupt|InterruptAnywhere|Kill)$/nbd", "\x00", nil},
	} {
		flags := []string{"-test.run=" + tests.run}
		if raceDetector {
			if flags = tests.race; flags == nil {
				continue
			}
		}
		t.Run(name, func(t *testing.T) {
			if tests.native {
				t.Skip("this machine's kernel has what it needs: the tests ran natively")
			}
			udevd := strings.HasSuffix(name, ", udevd")
			if _, err := findUdevd(); udevd && err != nil {
				replay.Missing(t, "udevd", err)
			}
			t.Parallel()
			build, _ := builds.LoadOrStore(tests.pkg, sync.OnceValues(func() (string, error) { return build(dir, tests.pkg) }))
			program, err := build.(func() (string, error))()
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
			defer cancel()
			var out bytes.Buffer
			status, err := k.Run(ctx, Command{
				Args: append([]string{program, "-test.v", "-test.timeout=280s"}, flags...),
				Dir:  folder(t, tests.pkg), Stdout: &out, Stderr: &out, Udevd: udevd,
			})
			if err != nil || status != 0 || strings.Count(out.String(), "--- SKIP") > len(regexp.MustCompile(tests.skips).FindAll(out.Bytes(), -1)) ||
				strings.Contains(out.String(), "no tests to run") {
				t.Errorf("status %d, %v\n%s", status, err, out.String())
			}
		})
	}
}

// folder is where go test would run a package's tests.
func folder(t *testing.T, pkg string) string {
	dir, err := filepath.Abs(filepath.Join("../..", pkg))
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// build makes the test program of a package, with the race detector where it is in this one.
func build(dir, pkg string) (program string, err error) {
	program = filepath.Join(dir, strings.ReplaceAll(pkg, "/", "-"))
	c := exec.Command("go", "test", "-c", "-o", program, fmt.Sprintf("-race=%t", raceDetector), "memsync/"+pkg)
	c.Env = append(os.Environ(), map[bool]string{false: "CGO_ENABLED=0", true: "CGO_ENABLED=1"}[raceDetector])
	if out, err := c.CombinedOutput(); err != nil {
		return "", errors.Join(err, errors.New(string(out)))
	}
	return program, nil
}
