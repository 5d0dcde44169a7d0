package managed_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"memsync/strategies/managed"
	"memsync/strategies/region"
)

// seeded is a region that needs no memory.
type seeded struct {
	region.Content
	size int64
}

func (s seeded) Size() int64 { return s.size }
func (s seeded) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := region.CheckRange(off, int64(len(p)), s.size); err != nil {
		return err
	}
	s.Fill(p, off)
	return ctx.Err()
}
func (seeded) WriteAt(context.Context, []byte, int64) error { return region.ErrReadOnly }
func (seeded) Flush(context.Context) error                  { return nil }
func (seeded) Close() error                                 { return nil }

// resident is the memory of this process, in bytes.
func resident(t *testing.T) int64 {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.ParseInt(strings.Fields(string(b))[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return pages * region.PageSize()
}

// TestTerabyte: a region of 1 TiB is read far and wide by another process, and
// the daemon's memory stays below the formula of docs/strategies/managed-mount.md.
func TestTerabyte(t *testing.T) {
	const size, cache, window, touches = 1 << 40, 32 << 20, 8 << 20, 400
	source := seeded{region.Content{Seed: 8}, size}
	o := options(t, "cache=32MiB", "pull_first=1MiB")
	o.PullWorkers = 4
	before := resident(t)
	m, err := managed.Strategy{}.Mount(t.Context(), local{source}, o)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	}()
	// One process that reads pages all over the region, and the last one; dd
	// reads through the page cache, as a mapping would.
	script := &strings.Builder{}
	r := rand.New(rand.NewPCG(9, 9))
	pages := []int64{0, size/4096 - 1}
	for range touches {
		pages = append(pages, r.Int64N(size/4096))
	}
	for _, p := range pages {
		fmt.Fprintf(script, "dd if=%s bs=4096 skip=%d count=1 status=none || exit 1\n", m.Attachment().Path, p)
	}
	fmt.Fprintf(script, "dd if=%s bs=4096 skip=%d count=1 status=none || exit 1\n", m.Attachment().Path, int64(size/4096)) // beyond the end: nothing
	cmd := exec.CommandContext(t.Context(), "sh", "-c", script.String())
	var got, words bytes.Buffer
	cmd.Stdout, cmd.Stderr = &got, &words
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %s %v", err, words.String(), m.(interface{ Err() error }).Err())
	}
	if got.Len() != len(pages)*4096 {
		t.Fatalf("%d bytes were read, want %d", got.Len(), len(pages)*4096)
	}
	for i, p := range pages {
		if err := source.Check(got.Bytes()[i*4096:(i+1)*4096], p*4096); err != nil {
			t.Fatal(err)
		}
	}
	st := m.Stats()
	const states = touches * 3 * 2 * 4096 // a page of states of each kind for each touch, at most
	limit := int64(cache + 2*window + 64*(512<<10) + states + 20<<20)
	switch used := resident(t) - before; {
	case raceEnabled:
		t.Logf("%d bytes of memory; the detector's own, several times what it watches, are in it", used)
	case used > limit:
		t.Errorf("%d bytes of memory for a cache of %d, the formula allows %d", used, cache, limit)
	default:
		t.Logf("%d bytes of memory, the formula allows %d; %d evicted", used, limit, st.Extra["evicted_bytes"])
	}
	if st.Extra["local_bytes"] > cache || st.Extra["evicted_bytes"] == 0 {
		t.Errorf("%d bytes are local and %d were evicted, with a cache of %d", st.Extra["local_bytes"], st.Extra["evicted_bytes"], cache)
	}
}
