package results

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// HistogramsFile is the name of the raw histograms within a result folder: a JSON
// object a line, written before the rows of its run.
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

// ReadHistograms reads the histograms of a result folder; none where it has no such
// file. A line that is cut short, as a kill leaves it, belongs to a run that is not
// recorded, and is left out.
func ReadHistograms(dir string) (Histograms, error) {
	f, err := os.Open(filepath.Join(dir, HistogramsFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read histograms: %w", err)
	}
	defer f.Close()
	h := Histograms{}
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 64<<20)
	for lines.Scan() {
		var r HistogramRecord
		if json.Unmarshal(lines.Bytes(), &r) != nil {
			continue
		}
		if r.Of == "" { // written before there were several
			r.Of = TouchHistogram
		}
		if h[r.Of] == nil {
			h[r.Of] = map[string]string{}
		}
		h[r.Of][r.RunID] = r.HDR
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read histograms: %w", err)
	}
	return h, nil
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
