package results

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// RunsFile is the name of the records within a result folder.
const RunsFile = "runs.csv"

// ErrUnclosed: the records end in a run that is not closed, as a kill or a full
// disk leaves it. Read returns the closed runs with it; Open cuts the rest off.
var ErrUnclosed = errors.New("records end in a run that is not closed")

// SyntaxError says where records are not what this program writes.
type SyntaxError struct {
	File   string
	Line   int    // from 1
	Column string // name; empty where the whole line is meant
	Err    error
}

func (e *SyntaxError) Error() string {
	if e.Column == "" {
		return fmt.Sprintf("%s line %d: %v", e.File, e.Line, e.Err)
	}
	return fmt.Sprintf("%s line %d, column %s: %v", e.File, e.Line, e.Column, e.Err)
}

func (e *SyntaxError) Unwrap() error { return e.Err }

// Read returns the rows of all closed runs of a result folder, or of a file of
// records, in the order in which they were recorded. A run that was interrupted
// and later repeated under the same name appears once, as repeated.
//
// Anything that this program would not write gives a *SyntaxError that names
// line and column. Only an unclosed run at the end is no such fault: its rows
// are left out, and the rows come together with an error that matches ErrUnclosed.
func Read(path string) ([]Row, error) {
	if fi, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("read records: %w", err)
	} else if fi.IsDir() {
		path = filepath.Join(path, RunsFile)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read records: %w", err)
	}
	rec, err := parse(path, data)
	if err != nil {
		return nil, err
	}
	return rec.rows(), rec.tail
}

// ClosedRuns returns the status of every run that is closed and need not be
// run again: all but the interrupted ones. Resume leaves these out.
func ClosedRuns(rows []Row) map[string]Status {
	closed := map[string]Status{}
	for _, r := range rows {
		if r.Metric == RunMetric && r.Status != StatusInterrupted {
			closed[r.RunID] = r.Status
		}
	}
	return closed
}

// records is a parsed runs.csv.
type records struct {
	runs   [][]Row        // closed runs; nil where a later one replaced it
	byID   map[string]int // index of each closed run
	closed int            // bytes up to the end of the last closed run; 0 where not even the header is whole
	tail   error          // matches ErrUnclosed: there is more than that
}

func (rec *records) rows() []Row { return slices.Concat(rec.runs...) }

// parse reads records. It goes by lines, because a row is one line, so a
// broken quote spoils its own line only.
func parse(file string, data []byte) (*records, error) {
	rec := &records{byID: map[string]int{}}
	header := strings.Join(Header(), ",")
	if bytes.IndexByte(data, '\n') < 0 && strings.HasPrefix(header, string(data)) {
		if len(data) > 0 {
			rec.tail = &SyntaxError{file, 1, "", fmt.Errorf("the header is cut short: %w", ErrUnclosed)}
		}
		return rec, nil
	}
	var (
		run    []Row // the rows of the run that is being read
		lineNo int
		pos    int
		fields []string
	)
	for pos < len(data) {
		lineNo++
		line, whole := data[pos:], false
		if i := bytes.IndexByte(line, '\n'); i >= 0 {
			line, whole = line[:i], true
		}
		end := pos + len(line)
		if whole {
			end++
		}
		text := strings.TrimSuffix(string(line), "\r")
		var err error
		switch {
		case lineNo == 1:
			if err := checkHeader(text, header, whole); err != nil {
				return nil, locate(err, file, 1)
			}
			rec.closed = end
		case !whole:
			err = errors.New("the line is cut short")
		case text == "" && run == nil:
			rec.closed = end
		default:
			fields, err = splitLine(text, fields[:0])
			if err == nil {
				run, err = rec.add(run, fields)
			}
			if err == nil && run == nil {
				rec.closed = end
			}
		}
		if err != nil {
			// A fault behind which no run is closed is the end of a cut file. Any
			// other was made by hand, and cutting there would lose runs.
			err = locate(err, file, lineNo)
			if closesRun(data[pos:]) {
				return nil, err
			}
			rec.tail = fmt.Errorf("%w: %w", ErrUnclosed, err)
			return rec, nil
		}
		pos = end
	}
	if run != nil {
		rec.tail = &SyntaxError{file, lineNo, "", fmt.Errorf("the file ends within run %s: %w", run[0].RunID, ErrUnclosed)}
	}
	return rec, nil
}

// add decodes a row and adds it to run. It returns nil once the row closes the run.
func (rec *records) add(run []Row, fields []string) ([]Row, error) {
	if len(fields) != len(columns) {
		return nil, fmt.Errorf("has %d columns, not %d", len(fields), len(columns))
	}
	var r Row
	for i, c := range columns {
		if err := decodeField(c.field(&r), fields[i]); err != nil {
			return nil, fieldError(c.Name, err.Error())
		}
	}
	if err := r.check(); err != nil {
		return nil, err
	}
	if run == nil {
		if i, ok := rec.byID[r.RunID]; ok && rec.runs[i][0].Status != StatusInterrupted {
			return nil, fieldError("run_id", fmt.Sprintf("run %s is recorded twice", r.RunID))
		}
	} else if err := sameRun(run, r); err != nil {
		return nil, err
	}
	run = append(run, r)
	if r.Metric != RunMetric {
		return run, nil
	}
	if i, ok := rec.byID[r.RunID]; ok {
		rec.runs[i] = nil
	}
	rec.byID[r.RunID] = len(rec.runs)
	rec.runs = append(rec.runs, run)
	return nil, nil
}

// sameRun returns an error unless r may follow the rows of run.
func sameRun(run []Row, r Row) error {
	first := run[0]
	if r.RunID != first.RunID {
		return fieldError("run_id", fmt.Sprintf("run %s begins before run %s is closed", r.RunID, first.RunID))
	}
	for _, seen := range run {
		if seen.Metric == r.Metric {
			return fieldError("metric", fmt.Sprintf("%s appears twice in run %s", r.Metric, r.RunID))
		}
	}
	first.Metric, first.Value, first.Unit = r.Metric, r.Value, r.Unit
	if first == r {
		return nil
	}
	for _, c := range columns {
		if a, b := encodeField(c.field(&first)), encodeField(c.field(&r)); a != b {
			return fieldError(c.Name, fmt.Sprintf("is %q, but %q in the first row of run %s", b, a, r.RunID))
		}
	}
	return nil // differs in text that encodes alike, such as a line break
}

// closesRun reports whether any line of data closes a run.
func closesRun(data []byte) bool {
	for len(data) > 0 {
		line, rest, whole := bytes.Cut(data, []byte("\n"))
		if fields, err := splitLine(strings.TrimSuffix(string(line), "\r"), nil); whole && err == nil {
			if run, err := (&records{byID: map[string]int{}}).add(nil, fields); err == nil && run == nil {
				return true
			}
		}
		data = rest
	}
	return false
}

func checkHeader(text, header string, whole bool) error {
	if text == header && whole {
		return nil
	}
	got, err := splitLine(text, nil)
	if err != nil {
		return err
	}
	for i, want := range Header() {
		if i >= len(got) {
			return fmt.Errorf("the header has %d columns, not %d: %s is missing; was it written by another version?", len(got), len(columns), want)
		}
		if got[i] != want {
			return fieldError(want, fmt.Sprintf("the header says %q here; was it written by another version, or is it no file of records?", got[i]))
		}
	}
	return fmt.Errorf("the header has %d columns, not %d; was it written by another version?", len(got), len(columns))
}

func locate(err error, file string, line int) error {
	var ce *columnError
	if errors.As(err, &ce) {
		return &SyntaxError{file, line, ce.column, errors.New(ce.what)}
	}
	return &SyntaxError{file, line, "", err}
}

// splitLine splits one line of RFC 4180 CSV into fields, which it appends to dst.
func splitLine(line string, dst []string) ([]string, error) {
	fault := func(what string) error {
		name := fmt.Sprintf("number %d", len(dst)+1)
		if len(dst) < len(columns) {
			name = columns[len(dst)].Name
		}
		return fieldError(name, what)
	}
	for {
		var field string
		if rest, ok := strings.CutPrefix(line, `"`); ok {
			var b strings.Builder
			for {
				i := strings.IndexByte(rest, '"')
				if i < 0 {
					return nil, fault("the quote is not closed")
				}
				b.WriteString(rest[:i])
				rest = rest[i+1:]
				if !strings.HasPrefix(rest, `"`) {
					break
				}
				b.WriteByte('"')
				rest = rest[1:]
			}
			if rest != "" && rest[0] != ',' {
				return nil, fault("text follows the closing quote")
			}
			field, line = b.String(), rest
		} else {
			i := strings.IndexByte(line, ',')
			if i < 0 {
				i = len(line)
			}
			field, line = line[:i], line[i:]
			if strings.Contains(field, `"`) {
				return nil, fault("a quote stands within a field that is not quoted")
			}
		}
		dst = append(dst, field)
		if line == "" {
			return dst, nil
		}
		line = line[1:] // the comma
	}
}
