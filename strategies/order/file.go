package order

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"memsync/strategies/region"
)

// Limits of a file: a longer line, or more entries, is an error.
const (
	MaxLine    = 4096    // bytes
	MaxEntries = 4 << 20 // of 32 bytes each in memory
)

// Entry is a line of a file: a range, and when it was asked for (trace) or how
// important it is (priority).
type Entry struct {
	Range
	Time     time.Duration
	Priority int64
}

// Ranges returns the ranges of entries, in their order.
func Ranges(entries []Entry) []Range {
	ranges := make([]Range, len(entries))
	for i, e := range entries {
		ranges[i] = e.Range
	}
	return ranges
}

// ParseTrace reads a trace: lines "OFFSET LENGTH [SECONDS]" in the order in
// which the bytes were asked for. OFFSET and LENGTH are bytes (4096, 64KiB),
// LENGTH at least 1; SECONDS count from any moment and may be left out. Empty
// lines, and all from # on, do not count. Every range must lie within size
// bytes. Time and memory are linear in the entries; more than MaxEntries is an error.
func ParseTrace(r io.Reader, size int64) ([]Entry, error) {
	return parse(r, size, "OFFSET LENGTH [SECONDS]", func(e *Entry, field string) error {
		s, err := strconv.ParseFloat(field, 64)
		if err != nil || !(s >= 0 && s < 1e9) {
			return fmt.Errorf("%q is not a time in seconds", field)
		}
		e.Time = time.Duration(s * 1e9)
		return nil
	})
}

// ParsePriority reads priorities: lines "OFFSET LENGTH [PRIORITY]", as
// ParseTrace does. PRIORITY is a whole number, 0 where it is left out; higher
// ones come first, and lines of the same priority in the order of the file.
// Entries are returned sorted.
func ParsePriority(r io.Reader, size int64) ([]Entry, error) {
	entries, err := parse(r, size, "OFFSET LENGTH [PRIORITY]", func(e *Entry, field string) (err error) {
		if e.Priority, err = strconv.ParseInt(field, 10, 64); err != nil {
			return fmt.Errorf("%q is not a whole number", field)
		}
		return nil
	})
	slices.SortStableFunc(entries, func(a, b Entry) int { return cmp.Compare(b.Priority, a.Priority) })
	return entries, err
}

// parse reads lines of two or three fields; third takes the third.
func parse(r io.Reader, size int64, want string, third func(*Entry, string) error) ([]Entry, error) {
	var entries []Entry
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, MaxLine), MaxLine)
	n := 0
	for lines.Scan() {
		n++
		text, _, _ := strings.Cut(lines.Text(), "#")
		f := strings.Fields(text)
		if len(f) == 0 {
			continue
		}
		e, err := parseLine(f, size, third)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w; want %s", n, err, want)
		}
		if len(entries) == MaxEntries {
			return nil, fmt.Errorf("line %d: more than %d entries", n, MaxEntries)
		}
		entries = append(entries, e)
	}
	if err := lines.Err(); err != nil {
		if errors.Is(err, bufio.ErrTooLong) {
			err = fmt.Errorf("longer than %d bytes; want %s", MaxLine, want)
		}
		return nil, fmt.Errorf("line %d: %w", n+1, err)
	}
	return entries, nil
}

func parseLine(f []string, size int64, third func(*Entry, string) error) (e Entry, err error) {
	if len(f) < 2 || len(f) > 3 {
		return e, fmt.Errorf("%d fields", len(f))
	}
	off, err := region.ParseSize(f[0])
	if err != nil {
		return e, fmt.Errorf("offset: %w", err)
	}
	length, err := region.ParseSize(f[1])
	if err != nil {
		return e, fmt.Errorf("length: %w", err)
	}
	if length == 0 {
		return e, errors.New("length 0")
	}
	if err := region.CheckRange(off, length, size); err != nil {
		return e, err
	}
	e.Range = Range{off, off + length}
	if len(f) == 3 {
		err = third(&e, f[2])
	}
	return e, err
}

// ReadFile reads a file with ParseTrace or ParsePriority. Its errors name the file.
func ReadFile(name string, size int64, parse func(io.Reader, int64) ([]Entry, error)) ([]Entry, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("order file: %w", err)
	}
	defer f.Close()
	entries, err := parse(f, size)
	switch {
	case err != nil:
		return nil, fmt.Errorf("order file %s: %w", name, err)
	case len(entries) == 0:
		return nil, fmt.Errorf("order file %s: no entry", name)
	}
	return entries, nil
}

// WriteTrace writes entries as ParseTrace reads them, with a comment in front.
func WriteTrace(w io.Writer, comment string, entries []Entry) error {
	b := bufio.NewWriter(w)
	fmt.Fprintf(b, "# %s\n# OFFSET LENGTH SECONDS\n", strings.ReplaceAll(comment, "\n", " "))
	for _, e := range entries {
		fmt.Fprintf(b, "%d %d %.6f\n", e.Off, e.End-e.Off, e.Time.Seconds())
	}
	return b.Flush()
}
