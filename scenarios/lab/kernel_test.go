package lab

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"memsync/strategies/device/nbdk"
)

// TestKernelPackages runs the tests that need the kernel's nbd in the lab kernel,
// where the machine's own has none and they were skipped. There nothing may skip.
func TestKernelPackages(t *testing.T) {
	k := kernel(t)
	if nbdk.Probe() == nil {
		t.Skip("this machine's kernel has nbd: the tests ran natively")
	}
	for _, pkg := range []string{"strategies/device/nbdk", "strategies/nbddirect"} {
		t.Run(pkg, func(t *testing.T) {
			program := filepath.Join(t.TempDir(), "test")
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			build := exec.CommandContext(ctx, "go", "test", "-c", "-o", program, "memsync/"+pkg)
			build.Env = append(os.Environ(), "CGO_ENABLED=0")
			if out, err := build.CombinedOutput(); err != nil {
				t.Fatalf("build: %v\n%s", err, out)
			}
			var out bytes.Buffer
			status, err := k.Run(ctx, Command{Args: []string{program, "-test.v", "-test.timeout=60s"}, Stdout: &out, Stderr: &out})
			if err != nil || status != 0 || strings.Contains(out.String(), "--- SKIP") {
				t.Errorf("status %d, %v\n%s", status, err, out.String())
			}
		})
	}
}
