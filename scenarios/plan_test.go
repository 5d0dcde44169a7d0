package scenarios

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"memsync/netem"
	"memsync/strategies/region"
)

// localCells are resolved cells that need nothing of the machine.
func localCells(t *testing.T) []*Cell {
	t.Helper()
	var cells []*Cell
	for _, strategy := range []string{"memory", "disk"} {
		for _, size := range []int64{1, 4096, 1 << 20} {
			c := &Cell{Strategy: strategy, Size: size, PullWorkers: -1, PushWorkers: -1, Budget: time.Second, Limit: WholeRegion}
			if err := c.Resolve(); err != nil {
				t.Fatal(err)
			}
			cells = append(cells, c)
		}
	}
	return cells
}

func ids(items []Item) []string {
	var v []string
	for _, it := range items {
		v = append(v, it.ID)
	}
	return v
}

func TestPlan(t *testing.T) {
	cells := localCells(t)
	plan := Plan(cells, 6, 1)
	seen, seeds := map[string]bool{}, map[uint64]string{}
	for i, it := range plan {
		if seen[it.ID] || seeds[it.Seed] != "" || it.Order != i || it.Run < 1 || it.Run > 6 || it.ID != fmt.Sprintf("%s-%d", it.Cell.Key(), it.Run) {
			t.Errorf("item %d: %+v (seen before: %t, its seed: %q)", i, it, seen[it.ID], seeds[it.Seed])
		}
		seen[it.ID], seeds[it.Seed] = true, it.ID
	}
	if len(seen) != 6*len(cells) {
		t.Errorf("%d runs for %d cells", len(seen), len(cells))
	}
	if got := ids(Plan(localCells(t), 6, 1)); !slices.Equal(got, ids(plan)) {
		t.Error("the same plan twice differs")
	}
	other := Plan(cells, 6, 2)
	if slices.Equal(ids(other), ids(plan)) {
		t.Error("another seed gives the same order")
	}
	slices.Reverse(cells) // seeds and ids hang on the cell, not on its place
	byID := map[string]uint64{}
	for _, it := range plan {
		byID[it.ID] = it.Seed
	}
	for _, it := range Plan(cells, 3, 1) {
		if byID[it.ID] != it.Seed {
			t.Errorf("run %s has seed %d in one plan and %d in another", it.ID, byID[it.ID], it.Seed)
		}
	}
}

// TestSeeds: cells that share seeds have the same ones in the same run, and names of their own.
func TestSeeds(t *testing.T) {
	cells := localCells(t)
	for _, c := range cells {
		c.Seeds = "all"
	}
	seeds, names := map[int]map[uint64]bool{}, map[string]bool{}
	for _, it := range Plan(cells, 3, 1) {
		if seeds[it.Run] == nil {
			seeds[it.Run] = map[uint64]bool{}
		}
		seeds[it.Run][it.Seed], names[it.ID] = true, true
	}
	one := map[uint64]bool{}
	for _, s := range seeds {
		maps.Copy(one, s)
		if len(s) != 1 {
			t.Errorf("a run has %d seeds", len(s))
		}
	}
	if len(one) != 3 || len(names) != 3*len(cells) {
		t.Errorf("%d seeds for 3 runs, %d names for %d", len(one), len(names), 3*len(cells))
	}
}

// TestShard: over all shards, every run is there exactly once.
func TestShard(t *testing.T) {
	plan := Plan(localCells(t), 5, 3)
	for _, n := range []int{1, 2, 3, 7, 30, 31, 100} {
		count := map[string]int{}
		sizes := map[int]bool{}
		for i := 1; i <= n; i++ {
			part := Shard(plan, i, n)
			sizes[len(part)] = true
			for _, it := range part {
				count[it.ID]++
				if plan[it.Order].ID != it.ID {
					t.Errorf("shard %d/%d: run %s has lost its place", i, n, it.ID)
				}
			}
		}
		if len(count) != len(plan) || slices.Max(slices.Collect(maps.Values(count))) != 1 {
			t.Errorf("%d shards have %d of %d runs, at most %d times each", n, len(count), len(plan), slices.Max(slices.Collect(maps.Values(count))))
		}
		if len(sizes) > 2 {
			t.Errorf("%d shards are of %d different sizes", n, len(sizes))
		}
	}
}

func TestKey(t *testing.T) {
	base := func() *Cell {
		return &Cell{Strategy: "memory", Size: 4096, PullWorkers: -1, PushWorkers: -1, Budget: time.Second, Limit: WholeRegion}
	}
	keys := map[string]string{}
	for name, change := range map[string]func(*Cell){
		"base": func(*Cell) {}, "size": func(c *Cell) { c.Size++ }, "strategy": func(c *Cell) { c.Strategy = "disk" },
		"backend": func(c *Cell) { c.Backend = "file" }, "access": func(c *Cell) { c.Access = "zipf" }, "threads": func(c *Cell) { c.Threads = 2 },
		"cpus": func(c *Cell) { c.CPUs = "daemon=0" }, "budget": func(c *Cell) { c.Budget++ }, "limit": func(c *Cell) { c.Limit = 0 },
		"set": func(c *Cell) { c.Settings = []string{"cache=cold"} }, "think": func(c *Cell) { c.Think = 1 }, "figure": func(c *Cell) { c.Figure = "f" },
		"rtt": func(c *Cell) { c.Link.RTT = time.Millisecond }, "via": func(c *Cell) { c.Via = "file" }, "chunk": func(c *Cell) { c.Chunk = 8192 },
		"pull": func(c *Cell) { c.PullWorkers = 3 }, "variant": func(c *Cell) { c.Variant = Thesis },
	} {
		c := base()
		change(c)
		if err := c.Resolve(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if other := keys[c.Key()]; other != "" {
			t.Errorf("cells that differ in %s and %s have one key", name, other)
		}
		keys[c.Key()] = name
	}
}

// TestEffective: a record says what a cell left open, and its key does not depend on
// whether that was written out.
func TestEffective(t *testing.T) {
	resolve := func(workers int, settings ...string) *Cell {
		t.Helper()
		c := &Cell{Strategy: "userfaultfd", Size: 1 << 20, PullWorkers: workers, PushWorkers: -1, Budget: time.Second, Limit: WholeRegion, Settings: settings}
		if err := c.Resolve(); err != nil && !errors.Is(err, region.ErrNotSupported) && !errors.Is(err, region.ErrNotPermitted) {
			t.Fatal(err)
		}
		return c
	}
	c := resolve(-1, "prefetch=all")
	if r := c.Row(); r.PullWorkers != 16 || !strings.Contains(r.Params, "copiers=16;") || !strings.Contains(r.Params, ";extent=256KiB;fault_around=4KiB;") {
		t.Errorf("%d pull workers, %s", r.PullWorkers, r.Params)
	}
	if same := resolve(16, "extent=256KiB", "prefetch=all", "fault_around=4KiB"); same.Key() != c.Key() {
		t.Errorf("defaults that are written out make another cell: %s, %s", same.Params(), c.Params())
	}
	if r := resolve(16).Row(); r.PullWorkers != 0 {
		t.Errorf("%d pull workers without prefetch", r.PullWorkers)
	}
	key := c.Key()
	if err := c.Resolve(); err != nil && errors.Is(err, ErrUsage) || c.Key() != key {
		t.Errorf("resolved again: %v, %s", err, c.Params())
	}
	small := &Cell{Strategy: "userfaultfd", Size: 1 << 20, Chunk: 64 << 10, Budget: time.Second, Settings: []string{"fault_around=4KiB"}}
	if err := small.Resolve(); !errors.Is(err, ErrUsage) {
		t.Errorf("a fault-around below the chunk: %v", err)
	}
}

func TestParsePlacement(t *testing.T) {
	for in, want := range map[string]map[string]string{
		"": {}, "daemon=0": {"daemon": "0"}, "source=0,daemon=1,workload=0-1": {"source": "0", "daemon": "1", "workload": "0-1"},
		"daemon=0,1,source=1": {"daemon": "0,1", "source": "1"},
	} {
		if got, err := ParsePlacement(in); err != nil || !maps.Equal(got, want) {
			t.Errorf("%q: %v, %v", in, got, err)
		}
	}
	for _, in := range []string{"0", "cook=0", "daemon", "daemon=", "daemon=x", "daemon=0,", ",daemon=0", "daemon=9999", "daemon=1023", "daemon=0;source=0",
		"daemon=0,daemon=1", "daemon=1-0", " daemon=0", "daemon==0"} {
		if got, err := ParsePlacement(in); !errors.Is(err, ErrUsage) {
			t.Errorf("%q: %v, %v; want a usage error", in, got, err)
		}
	}
}

// TestResolve: what was asked wrongly is told apart from what the machine lacks.
func TestResolve(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*Cell)
		is     error
		text   string
	}{
		"strategy":        {func(c *Cell) { c.Strategy = "magic" }, ErrUsage, "valid: memory, disk, userfaultfd, direct-mount, managed-mount"},
		"size 0":          {func(c *Cell) { c.Size = 0 }, ErrUsage, "at least 1 byte"},
		"size -1":         {func(c *Cell) { c.Size = -1 }, ErrUsage, "at least 1 byte"},
		"chunk 5000":      {func(c *Cell) { c.Chunk = 5000 }, ErrUsage, "power of two"},
		"chunk 2048":      {func(c *Cell) { c.Chunk = 2048 }, ErrUsage, "at least the page size"},
		"op":              {func(c *Cell) { c.Op = "dance" }, ErrUsage, "valid: read, write, mixed"},
		"access":          {func(c *Cell) { c.Access = "dance" }, ErrUsage, "valid: seq, random, reverse, zipf"},
		"via":             {func(c *Cell) { c.Via = "dance" }, ErrUsage, "valid: map, file, path"},
		"backend":         {func(c *Cell) { c.Backend = "floppy" }, ErrUsage, "valid: memory, file"},
		"transport":       {func(c *Cell) { c.Strategy, c.Transport = "userfaultfd", "pigeon" }, ErrUsage, "valid: nbd, grpc, drpc, quic, jsonrpc, local"},
		"device":          {func(c *Cell) { c.Device = "floppy" }, ErrUsage, "valid: auto, fuse, nbd, ublk, uffd"},
		"its device":      {func(c *Cell) { c.Device = "fuse" }, region.ErrNotSupported, "has no device fuse"},
		"parameter":       {func(c *Cell) { c.Settings = []string{"x=1"} }, ErrUsage, "valid here: cache"},
		"budget":          {func(c *Cell) { c.Budget = 0 }, ErrUsage, "time budget"},
		"think":           {func(c *Cell) { c.Think = -1 }, ErrUsage, "not be negative"},
		"limit":           {func(c *Cell) { c.Limit = -2 }, ErrUsage, "not be negative"},
		"rtt":             {func(c *Cell) { c.Link.RTT = time.Minute }, ErrUsage, "must be 0 to 10s"},
		"loss":            {func(c *Cell) { c.Link.Loss = 2 }, ErrUsage, "must be 0 to 1"},
		"rate":            {func(c *Cell) { c.Link.Rate = 1 }, ErrUsage, "must be 0 (unlimited) or"},
		"rate of local":   {func(c *Cell) { c.Link.Rate = 1e6 }, ErrUsage, "has no link"},
		"shaper of local": {func(c *Cell) { c.Shaper = netem.ShaperTun }, ErrUsage, "use --shaper sleep or none"},
		"sleep and nbd":   {func(c *Cell) { c.Strategy, c.Shaper = "userfaultfd", netem.ShaperSleep }, ErrUsage, "--transport local only"},
		"none and rtt":    {func(c *Cell) { c.Strategy, c.Shaper, c.Link.RTT = "userfaultfd", netem.ShaperNone, 1e6 }, ErrUsage, "does not shape"},
		"shaper":          {func(c *Cell) { c.Strategy, c.Shaper = "userfaultfd", "magic" }, ErrUsage, "valid: auto, netem, tun, sleep, none"},
		"writes":          {func(c *Cell) { c.Op = "write" }, region.ErrNotSupported, "does not write back"},
		"follows":         {func(c *Cell) { c.Strategy, c.Op = "userfaultfd", OpSync }, region.ErrNotSupported, "no destination follows"},
		"input missing":   {func(c *Cell) { c.Input = "/does/not/exist" }, ErrUsage, "no such file"},
		"input empty":     {func(c *Cell) { c.Input = empty }, ErrUsage, "is empty"},
		"input folder":    {func(c *Cell) { c.Input = "/" }, ErrUsage, "not a regular file"},
		"input too small": {func(c *Cell) { c.Input = "/proc/version" }, ErrUsage, ""},
		"both":            {func(c *Cell) { c.Op, c.Settings = "write", []string{"x=1"} }, ErrUsage, "valid here"}, // usage first
	} {
		cell := &Cell{Strategy: "memory", Size: 4096, PullWorkers: -1, PushWorkers: -1, Budget: time.Second, Limit: WholeRegion}
		c.change(cell)
		err := cell.Resolve()
		if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.text) || errors.Is(err, ErrUsage) != (c.is == ErrUsage) {
			t.Errorf("%s: %v, want %v with %q", name, err, c.is, c.text)
		}
		if err != nil && c.is != ErrUsage { // complete enough to be recorded
			if row := cell.Row(); row.Kernel == "" || row.Shaper == "" || row.Transport == "" || !strings.Contains(row.Params, "cache=") {
				t.Errorf("%s: its record is incomplete: %+v", name, row)
			}
		}
	}
}

// TestCleanScratch: folders of the dead go, those of the living and of others stay.
func TestCleanScratch(t *testing.T) {
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	live, remove, err := newScratch()
	if err != nil {
		t.Fatal(err)
	}
	make := func(name string, owner bool, age time.Duration) string {
		dir := filepath.Join(tmp, name)
		if err := os.MkdirAll(filepath.Join(dir, "run-1", "deep"), 0o700); err != nil {
			t.Fatal(err)
		}
		if owner {
			if err := os.WriteFile(filepath.Join(dir, ownerFile), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		old := time.Now().Add(-age)
		if err := os.Chtimes(dir, old, old); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	dead := make(scratchPrefix+"dead", true, 0)
	half := make(scratchPrefix+"half", false, time.Hour)
	stay := []string{live, make(scratchPrefix+"new", false, 0), make("other", true, time.Hour)}
	if err := os.WriteFile(filepath.Join(tmp, scratchPrefix+"file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(stay[2], filepath.Join(tmp, scratchPrefix+"link")); err != nil {
		t.Fatal(err)
	}
	stay = append(stay, filepath.Join(tmp, scratchPrefix+"file"), filepath.Join(tmp, scratchPrefix+"link"), filepath.Join(stay[2], "run-1"))
	gone := []string{dead, half}
	if os.Geteuid() == 0 {
		foreign := make(scratchPrefix+"foreign", true, time.Hour)
		if err := os.Lchown(foreign, 65534, 65534); err != nil {
			t.Fatal(err)
		}
		stay = append(stay, foreign)
		mounted := make(scratchPrefix+"mounted", true, 0)
		if err := unix.Mount("tmpfs", filepath.Join(mounted, "run-1"), "tmpfs", 0, "size=4k"); err != nil {
			t.Logf("no mount in this test: %v", err)
		}
		gone = append(gone, mounted)
	}
	removed, err := CleanScratch()
	slices.Sort(removed)
	slices.Sort(gone)
	if err != nil || !slices.Equal(removed, gone) {
		t.Errorf("removed %v, want %v: %v", removed, gone, err)
	}
	for _, p := range stay {
		if _, err := os.Lstat(p); err != nil {
			t.Errorf("%s must stay: %v", p, err)
		}
	}
	for _, p := range gone {
		if _, err := os.Lstat(p); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s must be gone: %v", p, err)
		}
	}
	if removed, err := CleanScratch(); err != nil || len(removed) > 0 {
		t.Errorf("a second time: %v, %v", removed, err)
	}
	remove()
	if _, err := os.Lstat(live); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s outlives its owner: %v", live, err)
	}
}
