// Package replay gives random tests their seed, and says what tests need of a machine.
package replay

import (
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
)

// Seed returns the number in the environment variable TEST_SEED, or a random one, and logs
// it, so that a failure tells how to run the same schedule again. A value that is no
// number fails the test.
func Seed(t testing.TB) uint64 {
	t.Helper()
	s := rand.Uint64N(1 << 32)
	if v := os.Getenv("TEST_SEED"); v != "" {
		n, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			t.Fatalf("TEST_SEED: %v", err)
		}
		s = n
	}
	t.Logf("TEST_SEED=%d", s)
	return s
}
