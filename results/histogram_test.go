package results

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/HdrHistogram/hdrhistogram-go"
)

func TestHistograms(t *testing.T) {
	dir := t.TempDir()
	if h, err := ReadHistograms(dir); h != nil || err != nil {
		t.Fatalf("no file: %v, %v", h, err)
	}
	f, err := os.Create(filepath.Join(dir, HistogramsFile))
	if err != nil {
		t.Fatal(err)
	}
	for run, sizes := range map[string][]int64{"a": {4096, 4096, 65536}, "b": {4096}} {
		h := hdrhistogram.New(1, 1<<30, 3)
		for _, n := range sizes {
			if err := h.RecordValue(n); err != nil {
				t.Fatal(err)
			}
		}
		b, err := h.Encode(hdrhistogram.V2CompressedEncodingCookieBase)
		if err == nil {
			err = json.NewEncoder(f).Encode(NewHistogramRecord(run, RequestHistogram, b))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.WriteString(`{"run_id":"c","of":"hist`); err != nil { // as a kill leaves it
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	h, err := ReadHistograms(dir)
	if err != nil {
		t.Fatal(err)
	}
	got, err := h.Merged(RequestHistogram, []string{"a", "b", "unknown"})
	if err != nil {
		t.Fatal(err)
	}
	for i := range got {
		if got[i].Value > 4096*1.001 { // three digits
			got[i].Value = 65536
		} else {
			got[i].Value = 4096
		}
	}
	if want := []Bar{{4096, 3}, {65536, 1}}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if got, err := h.Merged(TouchHistogram, []string{"a"}); len(got) > 0 || err != nil {
		t.Errorf("another histogram: %v, %v", got, err)
	}
	h[RequestHistogram]["a"] = "garbage"
	if _, err := h.Merged(RequestHistogram, []string{"a"}); err == nil {
		t.Error("garbage is taken")
	}
}
