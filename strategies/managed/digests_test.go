package managed

import (
	"context"
	"crypto/sha256"
	"errors"
	"net"
	"strconv"
	"testing"
	"time"

	"memsync/strategies/backend"
	"memsync/strategies/region"
	"memsync/strategies/transport"
	"memsync/strategies/transport/nbd"
)

// TestDigestExports: over NBD, the digests of any chunk size are an export
// beside the region's; a plain server has none, and says so as a missing export.
func TestDigestExports(t *testing.T) {
	store, err := backend.Open(context.Background(), backend.Spec{Backend: "memory", Size: 70_000, Content: region.Content{Seed: 3}}, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	open := func(e transport.Exports, name string) (region.Store, error) {
		d := transport.DialFunc(func(context.Context) (net.Conn, error) {
			ours, theirs := net.Pipe()
			go func() { _ = (&nbd.Transport{}).Serve(ctx, theirs, e) }() // ends with the connection
			return ours, nil
		})
		return (&nbd.Transport{}).Open(ctx, d, transport.Options{Name: name, Connections: 1, ReadOnly: true})
	}
	plain := transport.One{Name: "region", Store: store}
	for _, size := range []int{4096, 65536} {
		name := "region" + digestSuffix + strconv.Itoa(size)
		s, err := open(digestExports(plain), name)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, s.Size())
		if err := errors.Join(s.ReadAt(ctx, got, 0), s.Close()); err != nil {
			t.Fatal(err)
		}
		all := make([]byte, 70_000)
		if err := store.ReadAt(ctx, all, 0); err != nil {
			t.Fatal(err)
		}
		for off := 0; off < len(all); off += size {
			sum := sha256.Sum256(all[off:min(off+size, len(all))])
			if string(got[:32]) != string(sum[:]) {
				t.Errorf("%s: the digest of the chunk at %d is wrong", name, off)
			}
			got = got[32:]
		}
		if len(got) != 0 {
			t.Errorf("%s: %d bytes too many", name, len(got))
		}
		if _, err := open(plain, name); !errors.Is(err, region.ErrMissing) {
			t.Errorf("a plain server: %v", err)
		}
	}
	for _, bad := range []string{"region.digests-", "region.digests-5", "region.digests-0", "region.digests-9999999999999", "other.digests-4096", "region.digests-134217728"} {
		if _, err := open(digestExports(plain), bad); !errors.Is(err, region.ErrMissing) {
			t.Errorf("%s: %v", bad, err)
		}
	}
	if s, err := open(digestExports(plain), "region"); err != nil || s.Size() != 70_000 {
		t.Errorf("the region itself: %v", err)
	} else if err := s.Close(); err != nil {
		t.Error(err)
	}
}
