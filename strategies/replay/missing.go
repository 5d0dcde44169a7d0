package replay

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

// Missing skips a test for which this machine lacks something, and says why; it fails it where the
// environment variable MEMSYNC_MUST_RUN, a list with commas, names the test's group, as in CI.
func Missing(t testing.TB, group string, why ...any) {
	t.Helper()
	if slices.Contains(strings.Split(os.Getenv("MEMSYNC_MUST_RUN"), ","), group) {
		t.Fatal(append(why, fmt.Sprintf("(and MEMSYNC_MUST_RUN has %s)", group))...)
	}
	t.Skip(why...)
}
