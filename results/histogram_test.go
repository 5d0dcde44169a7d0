package results

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
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

// TestHistogramsGoOn: what a kill or a full disk has left of a line is cut off before the
// next one is written, so that only the run that was never recorded is without histograms.
func TestHistogramsGoOn(t *testing.T) {
	one := hdrhistogram.New(1, 1000, 3)
	if err := one.RecordValue(7); err != nil {
		t.Fatal(err)
	}
	hdr, err := one.Encode(hdrhistogram.V2CompressedEncodingCookieBase)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	add := func(run string) {
		t.Helper()
		w, err := OpenHistograms(dir)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Append(NewHistogramRecord(run, TouchHistogram, hdr), NewHistogramRecord(run, RequestHistogram, hdr)); err != nil {
			t.Fatal(err)
		}
		if err := w.Append(); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, HistogramsFile)
	add("first")
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	line := whole[:bytes.IndexByte(whole, '\n')+1]
	for i, torn := range [][]byte{line[:1], line[:len(line)/2], line[:len(line)-1], bytes.Repeat([]byte("x"), 200<<10)} {
		before, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, slices.Concat(before, torn), 0o600); err != nil {
			t.Fatal(err)
		}
		if h, err := ReadHistograms(dir); err != nil || len(h[TouchHistogram]) != i+1 {
			t.Fatalf("with %d bytes of a line at the end: %d runs, %v; want %d", len(torn), len(h[TouchHistogram]), err, i+1)
		}
		add(fmt.Sprint("next ", i))
		h, err := ReadHistograms(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, of := range []string{TouchHistogram, RequestHistogram} {
			if h[of]["first"] == "" || h[of][fmt.Sprint("next ", i)] == "" || len(h[of]) != i+2 {
				t.Fatalf("after %d bytes of a line, %s has %d runs, want %d", len(torn), of, len(h[of]), i+2)
			}
		}
		if now, err := os.ReadFile(path); err != nil || !bytes.HasPrefix(now, before) {
			t.Fatalf("whole lines were lost: %v", err)
		}
	}
	// A file that is nothing but the beginning of a line.
	if err := os.WriteFile(path, line[:9], 0o600); err != nil {
		t.Fatal(err)
	}
	add("alone")
	if h, err := ReadHistograms(dir); err != nil || len(h[TouchHistogram]) != 1 {
		t.Fatalf("%v, %v", h, err)
	}
	// Two lines glued together were damaged otherwise: said, not left out.
	if err := os.WriteFile(path, slices.Concat(line, line[:9], line, line), 0o600); err != nil {
		t.Fatal(err)
	}
	var syntax *SyntaxError
	if _, err := ReadHistograms(dir); !errors.As(err, &syntax) || syntax.Line != 2 {
		t.Errorf("a damaged line: %v", err)
	}
	if err := readHistograms(dir, map[string][]byte{}); !errors.As(err, &syntax) || syntax.Line != 2 {
		t.Errorf("merge of a damaged line: %v", err)
	}
}
