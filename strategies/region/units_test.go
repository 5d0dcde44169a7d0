package region

import (
	"testing"
	"time"
)

func TestUnits(t *testing.T) {
	size := func(s string, want int64) {
		t.Helper()
		if n, err := ParseSize(s); n != want || err != nil {
			t.Errorf("ParseSize(%q) = %d, %v", s, n, err)
		}
	}
	size("64MiB", 64<<20)
	size("1GB", 1e9)
	size("4096", 4096)
	size("1.5kib", 1536)
	size("10b", 10)
	size("0", 0)
	for _, s := range []string{"", "MiB", "-1", "1.5", "0x10", "1e400", "nan", "inf", "1 zib", "1e30"} {
		if n, err := ParseSize(s); err == nil {
			t.Errorf("ParseSize(%q) = %d, want an error", s, n)
		}
	}
	if r, err := ParseRate("1Gbit"); r != 1e9 || err != nil {
		t.Error(r, err)
	}
	if _, err := ParseRate("100"); err == nil {
		t.Error("a rate without a unit must be refused")
	}
	if d, err := ParseDuration("1.5ms"); d != 1500*time.Microsecond || err != nil {
		t.Error(d, err)
	}
	if _, err := ParseDuration("20"); err == nil {
		t.Error("a time without a unit must be refused")
	}
	if f, err := ParseFraction("1%"); f != 0.01 || err != nil {
		t.Error(f, err)
	}
	if _, err := ParseFraction("101%"); err == nil {
		t.Error("a loss above 100% must be refused")
	}
}

func FuzzParseSize(f *testing.F) {
	f.Add("64MiB")
	f.Fuzz(func(t *testing.T, s string) {
		n, err := ParseSize(s)
		if err != nil {
			return
		}
		if n < 0 {
			t.Fatalf("ParseSize(%q) = %d", s, n)
		}
		if m, err := ParseSize(FormatSize(n)); m != n || err != nil {
			t.Fatalf("FormatSize(%d) = %q does not come back: %d, %v", n, FormatSize(n), m, err)
		}
	})
}
