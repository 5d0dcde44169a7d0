package results

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// HistogramsFile is the name of the raw histograms within a result folder: a JSON
// object a line, written and synced before the rows of its run.
const HistogramsFile = "histograms.jsonl"

// The histograms that a run may have. Figures of kind cdf name them as Y.Column.
const (
	TouchHistogram   = "histogram.touch"   // s: each touch of the workload
	RequestHistogram = "histogram.request" // B: each read request that reached the store that holds the region
)

// histogramUnits are the stored unit of each histogram, and what its counts are
// multiplied with to give base units.
var histogramUnits = map[string]struct {
	unit  string
	scale float64
}{TouchHistogram: {"ns", 1e-9}, RequestHistogram: {"B", 1}}

// HistogramRecord is a line of HistogramsFile.
type HistogramRecord struct {
	RunID string `json:"run_id"`
	Of    string `json:"of"` // one of the names above
	HDR   string `json:"hdr_v2"`
	Unit  string `json:"unit"`
}

// NewHistogramRecord makes a record of an encoded histogram (HDR, V2 compressed, base64).
func NewHistogramRecord(runID, of string, hdr []byte) HistogramRecord {
	return HistogramRecord{runID, of, string(hdr), histogramUnits[of].unit}
}

// Bar is a value in base units and how often it was seen, to three digits.
type Bar struct {
	Value float64
	Count int64
}

// Histograms are those of a result folder, by name and run, decoded when asked for.
// A nil one has none.
type Histograms map[string]map[string]string

// HistogramWriter appends to the histograms of a result folder. Its methods must not be
// called concurrently, and only by who holds the folder's Writer: that has the lock.
type HistogramWriter struct {
	f    *os.File
	size int64 // bytes up to the end of the last whole line
}

// OpenHistograms opens the histograms of a result folder to go on with them, and makes
// the file where there is none. A last line that a kill or a full disk has cut short is
// removed: the next one would be glued to it, and both would be lost.
func OpenHistograms(dir string) (*HistogramWriter, error) {
	f, err := os.OpenFile(filepath.Join(dir, HistogramsFile), os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o666)
	if err != nil {
		return nil, fmt.Errorf("open histograms: %w", err)
	}
	w := &HistogramWriter{f: f}
	var size int64
	if w.size, size, err = wholeLines(f); err == nil && size > w.size {
		err = w.cut()
	}
	if err == nil {
		err = syncDir(dir)
	}
	if err != nil {
		return nil, fmt.Errorf("open histograms: %w", errors.Join(err, f.Close()))
	}
	return w, nil
}

// wholeLines returns how many bytes of a file end in its last newline, and its size.
func wholeLines(f *os.File) (whole, size int64, err error) {
	if size, err = f.Seek(0, io.SeekEnd); err != nil {
		return 0, 0, err
	}
	for end := size; end > 0; {
		b := make([]byte, min(end, 64<<10))
		end -= int64(len(b))
		if _, err := f.ReadAt(b, end); err != nil {
			return 0, size, err
		}
		if i := bytes.LastIndexByte(b, '\n'); i >= 0 {
			return end + int64(i) + 1, size, nil
		}
	}
	return 0, size, nil
}

// cut removes what stands behind the last whole line.
func (w *HistogramWriter) cut() error {
	if err := errors.Join(w.f.Truncate(w.size), w.f.Sync()); err != nil {
		return fmt.Errorf("cut %s back to %d bytes: %w", w.f.Name(), w.size, err)
	}
	return nil
}

// Append writes records, in one write, and syncs them; it blocks for that long. Where it
// returns an error, none of them is kept.
func (w *HistogramWriter) Append(records ...HistogramRecord) error {
	var b bytes.Buffer
	lines := json.NewEncoder(&b)
	for _, r := range records {
		if err := lines.Encode(r); err != nil {
			return fmt.Errorf("append histograms: %w", err)
		}
	}
	if b.Len() == 0 {
		return nil
	}
	_, err := w.f.Write(b.Bytes())
	if err == nil {
		err = w.f.Sync()
	}
	if err != nil {
		return errors.Join(fmt.Errorf("append %d bytes to %s: %w", b.Len(), w.f.Name(), err), w.cut())
	}
	w.size += int64(b.Len())
	return nil
}

// Close closes the file.
func (w *HistogramWriter) Close() error { return w.f.Close() }

// ReadHistograms reads the histograms of a result folder; none where it has no such
// file. A last line that is cut short, as a kill leaves it, belongs to a run that is not
// recorded, and is left out; any other that this program would not write gives a
// *SyntaxError.
func ReadHistograms(dir string) (Histograms, error) {
	h := Histograms{}
	err := eachHistogram(dir, func(r HistogramRecord, _ []byte) {
		if r.Of == "" { // written before there were several
			r.Of = TouchHistogram
		}
		if h[r.Of] == nil {
			h[r.Of] = map[string]string{}
		}
		h[r.Of][r.RunID] = r.HDR
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read histograms: %w", err)
	}
	return h, nil
}

// eachHistogram calls f for each whole line of a folder's histograms, newline included.
func eachHistogram(dir string, f func(r HistogramRecord, line []byte)) error {
	path := filepath.Join(dir, HistogramsFile)
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	n := 0
	for line := range bytes.Lines(b) {
		n++
		var r HistogramRecord
		switch err := json.Unmarshal(line, &r); {
		case !bytes.HasSuffix(line, []byte("\n")):
			return nil // the cut end
		case err != nil:
			return &SyntaxError{path, n, "", err}
		}
		f(r, line)
	}
	return nil
}

// Merged returns the histogram called of over several runs, values ascending.
func (h Histograms) Merged(of string, runs []string) ([]Bar, error) {
	var all *hdrhistogram.Histogram
	for _, run := range runs {
		text, ok := h[of][run]
		if !ok {
			continue
		}
		one, err := hdrhistogram.Decode([]byte(text))
		if err != nil {
			return nil, fmt.Errorf("histogram %s of run %s: %w", of, run, err)
		}
		if all == nil {
			all = one
		} else {
			all.Merge(one)
		}
	}
	if all == nil {
		return nil, nil
	}
	var bars []Bar
	for _, b := range all.Distribution() {
		if b.Count > 0 {
			bars = append(bars, Bar{float64(b.To) * histogramUnits[of].scale, b.Count})
		}
	}
	return bars, nil
}
