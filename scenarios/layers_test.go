package scenarios

import (
	"encoding/json"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// layers lists the packages of docs/architecture.md from the top down. A package
// may import those of lines below its own, and its own line where that is marked.
// The longest matching prefix counts.
var layers = []struct {
	prefix string
	level  int
	same   bool // packages of this line may import each other
}{
	{"cmd", 0, true},
	{"scenarios", 1, true},
	{"paper", 1, false},
	{"plots", 2, false},
	{"strategies/conformance", 2, false},
	{"strategies/all", 3, false},
	{"strategies/attach", 4, false},
	{"strategies/probe", 4, false},
	{"strategies/baseline", 4, false},
	{"strategies/direct", 4, false},
	{"strategies/download", 4, false},
	{"strategies/hashsync", 4, false},
	{"strategies/managed", 4, false},
	{"strategies/migration", 4, false},
	{"strategies/migration/handover", 6, false},
	{"strategies/nbddirect", 4, false},
	{"strategies/snapshot", 4, false},
	{"strategies/userfaultfd", 4, false},
	{"strategies", 5, false}, // the interface itself
	{"strategies/device", 6, false},
	{"strategies/device/fuse", 7, false},
	{"strategies/device/nbdk", 7, false},
	{"strategies/device/uffd", 7, false},
	{"strategies/dirty", 6, false},
	{"strategies/snapshot/client", 6, false},
	{"strategies/watch", 6, false},
	{"strategies/transport/grpc", 7, false},
	{"strategies/transport/drpc", 7, false},
	{"strategies/transport/quic", 7, false},
	{"strategies/transport/jsonrpc", 7, false},
	{"strategies/transport/transporttest", 7, false},
	{"strategies/transport/relay", 8, false},
	{"strategies/transport/rpc", 8, false},
	{"strategies/transport/nbd", 8, false},
	{"strategies/transport", 9, false},
	{"strategies/transport/flow", 12, false},
	{"strategies/transport/cert", 12, false},
	{"strategies/chunk", 10, false},
	{"strategies/delta", 10, false},
	{"strategies/hash", 10, false},
	{"strategies/snapshot/shm", 10, false},
	{"strategies/snapshot/image", 11, false},
	{"strategies/backend", 11, false},
	{"strategies/backend/directory", 12, false},
	{"strategies/backend/kv", 12, false},
	{"strategies/backend/redis", 12, false},
	{"strategies/backend/s3", 12, false},
	{"strategies/backend/services", 12, false},
	{"strategies/backend/tape", 12, false},
	{"strategies/backend/cassandra", 13, false},
	{"strategies/backend/encrypt", 13, false},
	{"strategies/backend/keyed", 14, false},
	{"strategies/backend/keyed/keyedtest", 12, false},
	{"strategies/storetest", 12, false},
	{"strategies/replay", 15, false},
	{"strategies/order/format", 12, false},
	{"strategies/order", 13, false},
	{"strategies/mountinfo", 13, false},
	{"strategies/param", 13, false},
	{"strategies/region", 15, false},
	{"results", 16, true},
	{"netem", 16, false},
}

// leaves import nothing of memsync but themselves.
var leaves = []string{"results", "netem"}

func layerOf(t *testing.T, pkg string) (prefix string, level int, same bool) {
	t.Helper()
	for _, l := range layers {
		if (pkg == l.prefix || strings.HasPrefix(pkg, l.prefix+"/")) && len(l.prefix) > len(prefix) {
			prefix, level, same = l.prefix, l.level, l.same
		}
	}
	if prefix == "" {
		t.Errorf("package %s has no place in the list of layers", pkg)
	}
	return prefix, level, same
}

// TestLayers holds docs/architecture.md: imports point down. Imports of test files are not looked at.
func TestLayers(t *testing.T) {
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports", "./...")
	cmd.Dir = ".."
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for dec := json.NewDecoder(strings.NewReader(string(out))); dec.More(); {
		var p struct {
			ImportPath string
			Imports    []string
		}
		if err := dec.Decode(&p); err != nil {
			t.Fatal(err)
		}
		seen++
		from := strings.TrimPrefix(p.ImportPath, "memsync/")
		fp, fl, same := layerOf(t, from)
		for _, imp := range p.Imports {
			to, ok := strings.CutPrefix(imp, "memsync/")
			if !ok {
				continue
			}
			tp, tl, _ := layerOf(t, to)
			if slices.Contains(leaves, fp) && tp != fp {
				t.Errorf("%s is a leaf but imports %s", from, to)
			}
			if tl < fl || tl == fl && !(same && tp == fp) {
				t.Errorf("%s (layer %s) may not import %s (layer %s)", from, fp, to, tp)
			}
			if strings.HasPrefix(from, "strategies") && (tp == "netem" || tp == "results") {
				t.Errorf("%s may not import %s: strategies know no network and no records", from, to)
			}
			if fp == "plots" && tp != "results" {
				t.Errorf("plots imports results only, not %s", to)
			}
		}
	}
	if seen < 10 {
		t.Fatalf("saw only %d packages", seen)
	}
}
