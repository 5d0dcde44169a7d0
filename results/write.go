package results

import (
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrLocked: another process writes to the result folder.
var ErrLocked = errors.New("another memsync is writing there")

// Writer appends runs to the records of a result folder. It holds a lock on
// them until Close, which the kernel drops with the process. All methods may be
// called concurrently.
type Writer struct {
	dir string

	mu      sync.Mutex
	f       *os.File
	size    int64             // bytes up to the end of the last closed run
	closed  map[string]Status // all runs that are recorded
	dropped int64
	err     error // set once the file's state is unknown
}

// Create makes the result folder dir, if need be, with a manifest and empty
// records. It returns an error that matches fs.ErrExist where there are records
// already (see Open), and ErrLocked where another process is at work.
func Create(dir string, m Manifest) (*Writer, error) {
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return nil, fmt.Errorf("create results: %w", err)
	}
	w, err := lock(dir, os.O_CREATE)
	if err != nil {
		return nil, fmt.Errorf("create results: %w", err)
	}
	fi, err := w.f.Stat()
	if err == nil && fi.Size() > 0 {
		err = fmt.Errorf("%s: %w", w.f.Name(), fs.ErrExist)
	}
	// The manifest comes first: whoever finds a header finds a manifest too.
	if err == nil {
		err = WriteManifest(dir, m)
	}
	if err == nil {
		err = w.writeHeader()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("create results: %w", err), w.f.Close())
	}
	return w, nil
}

// Open opens the records of a result folder to go on with them. What a kill
// has left behind the last closed run is cut off; Dropped says how much.
// It returns an error that matches fs.ErrNotExist where there are no records,
// ErrLocked where another process is at work, and a *SyntaxError where the
// records were damaged otherwise; nothing is cut then.
func Open(dir string) (*Writer, error) {
	w, err := lock(dir, 0)
	if err != nil {
		return nil, fmt.Errorf("open results: %w", err)
	}
	if err := w.recover(); err != nil {
		return nil, errors.Join(fmt.Errorf("open results: %w", err), w.f.Close())
	}
	return w, nil
}

func lock(dir string, flag int) (*Writer, error) {
	f, err := os.OpenFile(filepath.Join(dir, RunsFile), os.O_RDWR|os.O_APPEND|flag, 0o666)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrLocked
		}
		return nil, errors.Join(fmt.Errorf("lock %s: %w", f.Name(), err), f.Close())
	}
	return &Writer{dir: dir, f: f, closed: map[string]Status{}}, nil
}

// recover reads what is there and cuts it back to the last closed run.
func (w *Writer) recover() error {
	data, err := io.ReadAll(w.f)
	if err != nil {
		return fmt.Errorf("read %s: %w", w.f.Name(), err)
	}
	rec, err := parse(w.f.Name(), data)
	if err != nil {
		return err
	}
	for id, i := range rec.byID {
		w.closed[id] = rec.runs[i][0].Status
	}
	w.size = int64(rec.closed)
	w.dropped = int64(len(data)) - w.size
	if w.dropped > 0 {
		if err := w.cut(); err != nil {
			return err
		}
	}
	if w.size == 0 {
		return w.writeHeader()
	}
	return nil
}

func (w *Writer) writeHeader() error {
	if err := w.append([][]string{Header()}); err != nil {
		return err
	}
	return syncDir(w.dir)
}

// cut removes what stands behind the last closed run.
func (w *Writer) cut() error {
	if err := w.f.Truncate(w.size); err != nil {
		return fmt.Errorf("cut %s back to %d bytes: %w", w.f.Name(), w.size, err)
	}
	if err := w.f.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", w.f.Name(), err)
	}
	return nil
}

// append writes all records in one write and syncs them.
func (w *Writer) append(recs [][]string) error {
	var b bytes.Buffer
	if err := csv.NewWriter(&b).WriteAll(recs); err != nil {
		return fmt.Errorf("encode rows: %w", err)
	}
	if _, err := w.f.Write(b.Bytes()); err != nil {
		// What was written of it must not stay. If that fails too, or once a
		// sync has failed, nobody knows what the file holds: see fsync(2).
		err = fmt.Errorf("append %d bytes to %s: %w", b.Len(), w.f.Name(), err)
		if cutErr := w.cut(); cutErr != nil {
			err = errors.Join(err, cutErr)
			w.err = err
		}
		return err
	}
	if err := w.f.Sync(); err != nil {
		w.err = fmt.Errorf("sync %s: %w", w.f.Name(), err)
		return w.err
	}
	w.size += int64(b.Len())
	return nil
}

// Append records one whole run: its metric rows and, last, the row that closes
// it (see RunRows). Once it returns nil, the run survives a kill and a power
// cut; if it returns an error, nothing of the run is recorded. The schema
// column is filled in. It blocks for one write and one fsync.
//
// Rows that do not make one run, or that belong to a run that is already
// recorded and was not interrupted, are refused. After a full disk (ENOSPC) the
// Writer can go on; after a failed sync it cannot.
func (w *Writer) Append(rows ...Row) error {
	if len(rows) == 0 {
		return errors.New("append run: there are no rows")
	}
	id := rows[0].RunID
	recs := make([][]string, len(rows))
	for i := range rows {
		r := rows[i]
		r.Schema = Schema
		err := r.check()
		if err == nil && i > 0 {
			r0 := rows[0]
			r0.Schema = Schema
			err = sameRun(append([]Row{r0}, rows[1:i]...), r)
		}
		if err == nil && (r.Metric == RunMetric) != (i == len(rows)-1) {
			err = fieldError("metric", RunMetric+" must stand in the last row, and only there")
		}
		if err != nil {
			return fmt.Errorf("append run %s: row %d of %d: %w", id, i+1, len(rows), err)
		}
		recs[i] = r.Record()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return fmt.Errorf("append run %s: records are unusable after: %w", id, w.err)
	}
	if s, ok := w.closed[id]; ok && s != StatusInterrupted {
		return fmt.Errorf("append run %s: it is recorded already, with status %s", id, s)
	}
	if err := w.append(recs); err != nil {
		return fmt.Errorf("append run %s: %w", id, err)
	}
	w.closed[id] = rows[0].Status
	return nil
}

// Closed reports whether a run is recorded and need not be run again, and its status.
func (w *Writer) Closed(runID string) (Status, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	s, ok := w.closed[runID]
	return s, ok && s != StatusInterrupted
}

// Dropped returns how many bytes behind the last closed run Open has cut off.
func (w *Writer) Dropped() int64 { return w.dropped }

// WriteManifest replaces the folder's manifest, as the function of that name does.
func (w *Writer) WriteManifest(m Manifest) error { return WriteManifest(w.dir, m) }

// Close releases the lock and the file. It may be called twice.
func (w *Writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if errors.Is(w.err, fs.ErrClosed) {
		return nil
	}
	w.err = fs.ErrClosed
	if err := w.f.Close(); err != nil {
		return fmt.Errorf("close records: %w", err)
	}
	return nil
}

// syncDir makes entries of a folder durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync folder: %w", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("sync folder %s: %w", dir, err)
	}
	return nil
}
