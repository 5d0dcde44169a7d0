package role

import (
	"os"
	"testing"

	"go.uber.org/goleak"

	"memsync/strategies/all"
)

// TestMain also plays the roles: Start runs this binary as "memsync role ...".
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "role" {
		os.Exit(Main(all.Registry(), os.Args[2:]))
	}
	goleak.VerifyTestMain(m)
}
