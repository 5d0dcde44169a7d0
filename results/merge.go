package results

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// Merged is what Merge did.
type Merged struct {
	Runs     int      // in the new folder
	Repeated int      // left out: the same run, with the same rows, was in an earlier folder
	Notes    []string // such as the cut end of one of the folders
}

// Merge joins the result folders dirs, the shards of one sweep, into the new
// folder out. Every folder must have a manifest and records of this schema and
// the seed of the first. A run that stands in several folders is taken once; if
// its rows differ, that is an error which names it, and nothing is kept of out.
// An interrupted run gives way to one that is complete. Manifests are kept whole,
// as parts of the new one.
func Merge(out string, dirs ...string) (m Merged, err error) {
	if len(dirs) == 0 {
		return m, errors.New("merge results: no folder is given")
	}
	if _, err := os.Stat(filepath.Join(out, RunsFile)); err == nil {
		return m, fmt.Errorf("merge results: %s has records already: %w", out, fs.ErrExist)
	}
	var (
		manifest Manifest
		runs     [][]Row
		index    = map[string]int{}
		from     = map[string]string{}
		hist     = map[string][]byte{}
	)
	for i, dir := range dirs {
		part, err := ReadManifest(dir)
		if err != nil {
			return m, fmt.Errorf("merge results: %w", err)
		}
		if i == 0 {
			manifest = part
			manifest.Parts = nil
		}
		if part.Seed != manifest.Seed {
			return m, fmt.Errorf("merge results: %s was made with seed %d, %s with %d: they are not shards of one sweep", dirs[0], manifest.Seed, dir, part.Seed)
		}
		if len(part.Parts) > 0 {
			manifest.Parts = append(manifest.Parts, part.Parts...)
		} else {
			manifest.Parts = append(manifest.Parts, part)
		}
		if part.Start.Before(manifest.Start) {
			manifest.Start = part.Start
		}
		if part.End.After(manifest.End) {
			manifest.End = part.End
		}
		rows, err := Read(dir)
		if errors.Is(err, ErrUnclosed) {
			m.Notes = append(m.Notes, err.Error())
		} else if err != nil {
			return m, fmt.Errorf("merge results: %w", err)
		}
		for run := range runsOf(rows) {
			id := run[0].RunID
			at, seen := index[id]
			switch {
			case !seen:
				index[id], from[id] = len(runs), dir
				runs = append(runs, run)
			case slices.Equal(runs[at], run):
				m.Repeated++
			case runs[at][0].Status == StatusInterrupted:
				runs[at], from[id] = run, dir
			case run[0].Status == StatusInterrupted:
				m.Repeated++
			default:
				return m, fmt.Errorf("merge results: run %s is in %s and in %s, with different rows; take one of the folders", id, from[id], dir)
			}
		}
		if err := readHistograms(dir, hist); err != nil {
			return m, fmt.Errorf("merge results: %w", err)
		}
	}
	return m, m.write(out, manifest, runs, hist)
}

func (m *Merged) write(out string, manifest Manifest, runs [][]Row, hist map[string][]byte) (err error) {
	w, err := Create(out, manifest)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, w.Close())
		if err != nil {
			_ = os.Remove(filepath.Join(out, RunsFile))
			_ = os.Remove(filepath.Join(out, ManifestFile))
		}
	}()
	var lines bytes.Buffer
	var recs [][]string
	for _, run := range runs {
		for _, r := range run {
			recs = append(recs, r.Record())
		}
		lines.Write(hist[run[0].RunID])
	}
	if lines.Len() > 0 {
		if err := WriteFile(filepath.Join(out, HistogramsFile), lines.Bytes()); err != nil {
			return err
		}
	}
	m.Runs = len(runs)
	return w.append(recs) // they were checked as they were read
}

// runsOf yields the rows of each run; they stand together, as Read returns them.
func runsOf(rows []Row) func(yield func([]Row) bool) {
	return func(yield func([]Row) bool) {
		for len(rows) > 0 {
			n := 1
			for n < len(rows) && rows[n].RunID == rows[0].RunID {
				n++
			}
			if !yield(rows[:n]) {
				return
			}
			rows = rows[n:]
		}
	}
}

// readHistograms puts the lines of a folder's histograms, if it has any, in place
// of those of the same runs.
func readHistograms(dir string, byRun map[string][]byte) error {
	mine := map[string]bool{}
	err := eachHistogram(dir, func(r HistogramRecord, line []byte) {
		if !mine[r.RunID] {
			mine[r.RunID], byRun[r.RunID] = true, nil
		}
		byRun[r.RunID] = slices.Concat(byRun[r.RunID], line) // a run has several
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
