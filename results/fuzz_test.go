package results

import (
	"bytes"
	"encoding/csv"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// FuzzRead reads damaged records. Whatever they hold: a fault is located, and
// what is accepted comes out the same once it is written again.
func FuzzRead(f *testing.F) {
	dir := f.TempDir()
	w, err := Create(dir, Manifest{})
	if err != nil {
		f.Fatal(err)
	}
	mustAppend(f, w, testRun(f, "a"))
	mustAppend(f, w, failedRun(f, "b", StatusInterrupted))
	mustAppend(f, w, testRun(f, "b"))
	w.Close()
	data, err := os.ReadFile(filepath.Join(dir, RunsFile))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add(data[:len(data)/2])
	f.Add(append(slices.Clone(data), data...))
	f.Add(bytes.ReplaceAll(data, []byte("\n"), []byte("\r\n")))
	f.Add([]byte(strings.Join(Header(), ",") + "\n\n"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		rec, err := parse("f", data)
		if err != nil {
			var se *SyntaxError
			if !errors.As(err, &se) || se.Line < 1 {
				t.Fatalf("fault without a place: %v", err)
			}
			return
		}
		if rec.tail != nil && !errors.Is(rec.tail, ErrUnclosed) {
			t.Fatalf("tail %v", rec.tail)
		}
		again, err := parse("f", data[:rec.closed])
		if err != nil || again.tail != nil || !slices.Equal(again.rows(), rec.rows()) {
			t.Fatalf("cut back to %d of %d bytes: %v, %v", rec.closed, len(data), err, again)
		}
		var b bytes.Buffer
		cw := csv.NewWriter(&b)
		cw.Write(Header())
		for _, r := range rec.rows() {
			cw.Write(r.Record())
		}
		cw.Flush()
		again, err = parse("f", b.Bytes())
		if err != nil || again.tail != nil {
			t.Fatalf("what was read cannot be written: %v\n%s", err, b.Bytes())
		}
		for i, r := range again.rows() {
			if want := rec.rows()[i]; !slices.Equal(r.Record(), want.Record()) {
				t.Fatalf("row %d:\n%q\n%q", i, r.Record(), want.Record())
			}
		}
	})
}

// FuzzSplitLine compares with the standard library on lines that it accepts.
func FuzzSplitLine(f *testing.F) {
	f.Add(`a,"b ""c"", d",,e`)
	f.Add(`"",`)
	f.Add(`a"b`)
	f.Fuzz(func(t *testing.T, line string) {
		if strings.ContainsAny(line, "\n\r") || line == "" {
			return
		}
		want, wantErr := csv.NewReader(strings.NewReader(line)).Read()
		got, err := splitLine(line, nil)
		if (err == nil) != (wantErr == nil) || err == nil && !slices.Equal(got, want) {
			t.Fatalf("%q: %q, %v; encoding/csv: %q, %v", line, got, err, want, wantErr)
		}
	})
}
