package uffd

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// TestProbes: each answer agrees with the features that the kernel announces.
func TestProbes(t *testing.T) {
	have, err := Features()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		probe   func() error
		feature uint64
	}{
		"missing": {ProbeMissing, 0},
		"shared":  {ProbeShared, UFFD_FEATURE_MISSING_SHMEM},
		"minor":   {ProbeMinor, UFFD_FEATURE_MINOR_SHMEM},
		"wp":      {ProbeWriteProtect, UFFD_FEATURE_WP_UNPOPULATED},
		"poison":  {ProbePoison, UFFD_FEATURE_POISON},
	} {
		err := c.probe()
		if has := have&c.feature == c.feature; has != (err == nil) || !has && !errors.Is(err, region.ErrNotSupported) {
			t.Errorf("%s: the kernel announces %v, the probe says %v", name, has, err)
		}
	}
	// Huge pages depend on what is reserved; the answer must be one of three.
	if err := ProbeHuge(); err != nil && !errors.Is(err, unix.ENOMEM) && !errors.Is(err, region.ErrNotSupported) {
		t.Errorf("huge: %v", err)
	}
	if err := ProbeKernelFaults(); (err == nil) != (os.Getuid() == 0) && err != nil && !errors.Is(err, region.ErrNotPermitted) {
		t.Errorf("kernel faults: %v", err)
	}
	if _, _, err := New(1 << 63); !errors.Is(err, region.ErrNotSupported) {
		t.Errorf("a feature that does not exist: %v", err)
	}
}

func TestBitmap(t *testing.T) {
	const n = 200
	b := newBitmap(n)
	var model [n]bool
	for lo := int64(0); lo < n; lo += 7 {
		for hi := lo; hi <= n; hi += 13 {
			v := (lo+hi)%3 != 0
			want := int64(0)
			for i := lo; i < hi; i++ {
				if model[i] != v {
					want++
				}
				model[i] = v
			}
			if got := b.set(lo, hi, v); got != want {
				t.Fatalf("set(%d, %d, %v) changed %d bits, not %d", lo, hi, v, got, want)
			}
			for i := range model {
				if b.get(int64(i)) != model[i] {
					t.Fatalf("bit %d is wrong after set(%d, %d, %v)", i, lo, hi, v)
				}
			}
		}
	}
}
