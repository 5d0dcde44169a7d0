package results

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
)

// Schema is the version of the records that this package writes and reads. It
// changes with every change of columns or of a metric's definition; docs.go says
// what each changed. Records of another one are refused, not read as what they are not.
const Schema = 2

// otherSchema says what is wrong with records of schema n, and what to do.
func otherSchema(n int) string {
	if n < 1 || n > Schema {
		return fmt.Sprintf("is %d; this program knows %d: they are a newer memsync's, or no records", n, Schema)
	}
	return fmt.Sprintf("is %d; this program knows %d, whose metrics are defined otherwise (docs/metrics.md): "+
		"read them with the memsync that made them (manifest.json has its commit), or measure again into another folder", n, Schema)
}

// RunMetric is the metric of the row that closes a run.
const RunMetric = "run"

// Status says how a run ended.
type Status string

// The statuses. Only the values of runs that are ok enter summaries.
const (
	StatusOK           Status = "ok"           // every byte that was read was right
	StatusCorrupt      Status = "corrupt"      // at least one byte was wrong
	StatusFailed       Status = "failed"       // an error ended it
	StatusTimeout      Status = "timeout"      // a deadline ended it
	StatusUnsupported  Status = "unsupported"  // this machine, kernel or strategy cannot do it
	StatusUncalibrated Status = "uncalibrated" // measured on a link that is not what it should be
	StatusInterrupted  Status = "interrupted"  // SIGINT or SIGTERM; resume runs it again
)

// Statuses lists all statuses.
func Statuses() []Status {
	return []Status{StatusOK, StatusCorrupt, StatusFailed, StatusTimeout, StatusUnsupported, StatusUncalibrated, StatusInterrupted}
}

// Number is a number that may be absent; the zero Number is. It is never NaN or infinite.
type Number struct {
	v  float64
	ok bool
}

// Num is the Number v. NaN and infinities give the absent Number.
func Num(v float64) Number {
	if math.IsNaN(v) || math.IsInf(v, 0) {
		return Number{}
	}
	return Number{v, true}
}

// Get returns the value, and whether there is one.
func (n Number) Get() (float64, bool) { return n.v, n.ok }

// Float returns the value, or NaN where there is none.
func (n Number) Float() float64 {
	if !n.ok {
		return math.NaN()
	}
	return n.v
}

// String returns the shortest text that reads back as the same value; "" where there is none.
func (n Number) String() string {
	if !n.ok {
		return ""
	}
	return strconv.FormatFloat(n.v, 'g', -1, 64)
}

// MarshalJSON writes the value, or null.
func (n Number) MarshalJSON() ([]byte, error) {
	if !n.ok {
		return []byte("null"), nil
	}
	return strconv.AppendFloat(nil, n.v, 'g', -1, 64), nil
}

// UnmarshalJSON reads a number or null.
func (n *Number) UnmarshalJSON(b []byte) error {
	if string(b) == "null" {
		*n = Number{}
		return nil
	}
	v, err := parseFloat(string(b))
	*n = Number{v, err == nil}
	return err
}

// LabPrefix begins the kernel column of rows made in the lab kernel.
const LabPrefix = "lab-"

// Lab reports whether the row was made in the lab kernel.
func (r Row) Lab() bool { return strings.HasPrefix(r.Kernel, LabPrefix) }

// Row is one observation: the cell it was made in, the run, and one metric.
// The table columns gives each field's column, unit and meaning.
type Row struct {
	Schema           int
	RunID            string
	Figure           string
	Variant          string
	Strategy         string
	Device           string
	Transport        string
	Backend          string
	Kernel           string
	Shaper           string
	RTTms            float64
	RTTMeasuredms    Number
	Jitterms         float64
	Loss             float64
	RateMbit         float64
	RateMeasuredMbit Number
	RegionBytes      int64
	ChunkBytes       int64
	Op               string
	Access           string
	PullWorkers      int
	PushWorkers      int
	CPUs             string
	Params           string
	Run              int
	Order            int
	Seed             uint64
	Metric           string
	Value            Number
	Unit             string
	Status           Status
	Error            string
}

// Column is one column of runs.csv, as the docs show it.
type Column struct {
	Name, Doc string
	cell      bool           // part of the cell: the same in all its runs
	field     func(*Row) any // pointer to the Row's field
}

// columns makes header, encoder, decoder and doc. Its order is the file's.
var columns = [...]Column{
	{"schema", "version of columns and metrics", false, func(r *Row) any { return &r.Schema }},
	{"run_id", "names the run; unique in the file", false, func(r *Row) any { return &r.RunID }},
	{"figure", "scenario that asked for it", true, func(r *Row) any { return &r.Figure }},
	{"variant", "thesis or network", true, func(r *Row) any { return &r.Variant }},
	{"strategy", "way of making the region available", true, func(r *Row) any { return &r.Strategy }},
	{"device", "what the workload maps: fuse, nbd, ublk, uffd; empty for baselines", true, func(r *Row) any { return &r.Device }},
	{"transport", "wire protocol between daemon and source, or local", true, func(r *Row) any { return &r.Transport }},
	{"backend", "where the source keeps the data", true, func(r *Row) any { return &r.Backend }},
	{"kernel", "release of the kernel it ran on; the lab kernel's begins with lab", true, func(r *Row) any { return &r.Kernel }},
	{"shaper", "what shaped the link: netem, tun, sleep, none", true, func(r *Row) any { return &r.Shaper }},
	{"rtt_ms", "configured round-trip time, ms", true, func(r *Row) any { return &r.RTTms }},
	{"rtt_measured_ms", "measured round-trip time of this link, ms; empty without a link", false, func(r *Row) any { return &r.RTTMeasuredms }},
	{"jitter_ms", "configured jitter (standard deviation) per direction, ms", true, func(r *Row) any { return &r.Jitterms }},
	{"loss", "configured loss per direction, 0..1", true, func(r *Row) any { return &r.Loss }},
	{"rate_mbit", "configured rate per direction, Mbit/s; 0 is unlimited", true, func(r *Row) any { return &r.RateMbit }},
	{"rate_measured_mbit", "measured L2 rate, Mbit/s; empty where not measured", false, func(r *Row) any { return &r.RateMeasuredMbit }},
	{"region_bytes", "size of the region, B", true, func(r *Row) any { return &r.RegionBytes }},
	{"chunk_bytes", "unit that the strategy tracks and moves, B", true, func(r *Row) any { return &r.ChunkBytes }},
	{"op", "read, write, mixed, migrate, sync or snapshot", true, func(r *Row) any { return &r.Op }},
	{"access", "seq, random, random:SIZE, reverse, zipf, trace:FILE or program:NAME", true, func(r *Row) any { return &r.Access }},
	{"pull_workers", "background pulls in flight, count", true, func(r *Row) any { return &r.PullWorkers }},
	{"push_workers", "background pushes in flight, count", true, func(r *Row) any { return &r.PushWorkers }},
	{"cpus", "placement of the roles, as --cpus; empty is free", true, func(r *Row) any { return &r.CPUs }},
	{"params", "what has no column, as k=v;k=v sorted by key", true, func(r *Row) any { return &r.Params }},
	{"run", "number of the run within its cell, from 1", false, func(r *Row) any { return &r.Run }},
	{"order", "position in the shuffled order of the sweep, from 0", false, func(r *Row) any { return &r.Order }},
	{"seed", "seed of this run's content and accesses", false, func(r *Row) any { return &r.Seed }},
	{"metric", "what was measured; run closes the run", false, func(r *Row) any { return &r.Metric }},
	{"value", "in base units; empty where there is none", false, func(r *Row) any { return &r.Value }},
	{"unit", "the metric's unit", false, func(r *Row) any { return &r.Unit }},
	{"status", "ok, corrupt, failed, timeout, unsupported, uncalibrated or interrupted", false, func(r *Row) any { return &r.Status }},
	{"error", "why the status is not ok; empty where it is", false, func(r *Row) any { return &r.Error }},
}

// Header returns the column names in the order of the file.
func Header() []string {
	h := make([]string, len(columns))
	for i, c := range columns {
		h[i] = c.Name
	}
	return h
}

// Record returns the row as CSV fields. Line breaks in text become "; ", so
// that one row is one line.
func (r Row) Record() []string {
	rec := make([]string, len(columns))
	for i, c := range columns {
		rec[i] = encodeField(c.field(&r))
	}
	return rec
}

var lineBreaks = strings.NewReplacer("\r\n", "; ", "\n", "; ", "\r", "; ")

func encodeField(f any) string {
	switch f := f.(type) {
	case *string:
		return lineBreaks.Replace(*f)
	case *Status:
		return string(*f)
	case *int:
		return strconv.Itoa(*f)
	case *int64:
		return strconv.FormatInt(*f, 10)
	case *uint64:
		return strconv.FormatUint(*f, 10)
	case *float64:
		return strconv.FormatFloat(*f, 'g', -1, 64)
	case *Number:
		return f.String()
	}
	panic(fmt.Sprintf("results: a Row has a field of type %T", f))
}

func decodeField(f any, s string) (err error) {
	switch f := f.(type) {
	case *string:
		*f = s
	case *Status:
		*f = Status(s)
		if !slices.Contains(Statuses(), *f) {
			return fmt.Errorf("%q is no status", s)
		}
	case *int:
		*f, err = strconv.Atoi(s)
	case *int64:
		*f, err = strconv.ParseInt(s, 10, 64)
	case *uint64:
		*f, err = strconv.ParseUint(s, 10, 64)
	case *float64:
		*f, err = parseFloat(s)
	case *Number:
		*f = Number{}
		if s != "" {
			f.v, err = parseFloat(s)
			f.ok = err == nil
		}
	}
	if err != nil {
		// The strconv error names its function, which tells the reader nothing.
		var ne *strconv.NumError
		if errors.As(err, &ne) {
			err = ne.Err
		}
		return fmt.Errorf("%q is no number: %w", s, err)
	}
	return nil
}

// parseFloat accepts finite decimal numbers only.
func parseFloat(s string) (float64, error) {
	if strings.ContainsAny(s, "xXpP_nN") {
		return 0, strconv.ErrSyntax
	}
	v, err := strconv.ParseFloat(s, 64)
	if err == nil && math.IsInf(v, 0) {
		err = strconv.ErrRange
	}
	return v, err
}

// Get returns the text of a column, or of one of the params as "params.NAME"
// (empty where the row does not have it). An unknown column gives an error that lists all.
func (r Row) Get(column string) (string, error) {
	if name, ok := strings.CutPrefix(column, "params."); ok {
		for kv := range strings.SplitSeq(r.Params, ";") {
			if k, v, _ := strings.Cut(kv, "="); k == name {
				return v, nil
			}
		}
		return "", nil
	}
	for _, c := range columns {
		if c.Name == column {
			return encodeField(c.field(&r)), nil
		}
	}
	return "", fmt.Errorf("no column %q; there are %s and params.NAME", column, strings.Join(Header(), ", "))
}

// CellKey returns the cell's columns as one text: equal for all runs of a cell.
func (r Row) CellKey() string {
	var kv []string
	for _, c := range columns {
		if c.cell {
			kv = append(kv, c.Name+"="+encodeField(c.field(&r)))
		}
	}
	return strings.Join(kv, ",")
}

// check returns an error unless the row is one that may stand in runs.csv.
func (r Row) check() error {
	m, ok := MetricByName(r.Metric)
	switch {
	case r.Schema != Schema:
		return fieldError("schema", otherSchema(r.Schema))
	case r.RunID == "":
		return fieldError("run_id", "is empty")
	case !ok:
		return fieldError("metric", fmt.Sprintf("%q has no entry in the metric table", r.Metric))
	case r.Unit != m.Unit:
		return fieldError("unit", fmt.Sprintf("of %s is %q, not %q", r.Metric, m.Unit, r.Unit))
	case !slices.Contains(Statuses(), r.Status):
		return fieldError("status", fmt.Sprintf("%q is no status", r.Status))
	case r.Status == StatusOK && r.Error != "":
		return fieldError("error", "is set though the status is ok")
	case r.Status != StatusOK && r.Error == "":
		return fieldError("error", fmt.Sprintf("is empty though the status is %s", r.Status))
	case r.Status == StatusOK && !r.Value.ok:
		return fieldError("value", "is empty though the status is ok")
	case r.Status != StatusOK && r.Metric == RunMetric && r.Value.ok:
		return fieldError("value", fmt.Sprintf("of the closing row is set though the status is %s", r.Status))
	}
	for _, c := range columns {
		if f, ok := c.field(&r).(*float64); ok && (math.IsNaN(*f) || math.IsInf(*f, 0)) {
			return fieldError(c.Name, "is not a finite number")
		}
	}
	return nil
}

// columnError is a fault in one column of a row.
type columnError struct {
	column, what string
}

func fieldError(column, what string) error { return &columnError{column, what} }

func (e *columnError) Error() string { return "column " + e.column + ": " + e.what }

// RunRows makes the rows of one run: a row for each of values, in the order of
// the metric table, then the row that closes it. cell gives all columns but
// metric, value and unit; its status and error hold for all rows. took is the
// duration of the whole run in seconds; it is left out where the status is not
// ok. A value that is NaN or infinite is left out.
// An unknown metric gives an error, so that none is lost in silence.
func RunRows(cell Row, values map[string]float64, took float64) ([]Row, error) {
	cell.Schema = Schema
	var rows []Row
	known := 0
	for _, m := range metrics {
		v, ok := values[m.Name]
		if m.Name == RunMetric || !ok {
			continue
		}
		known++
		n := Num(v)
		if !n.ok {
			continue
		}
		cell.Metric, cell.Value, cell.Unit = m.Name, n, m.Unit
		rows = append(rows, cell)
	}
	if known != len(values) {
		for name := range values {
			if _, ok := MetricByName(name); !ok || name == RunMetric {
				return nil, fmt.Errorf("make rows of run %s: %w", cell.RunID, fieldError("metric", fmt.Sprintf("%q has no entry in the metric table", name)))
			}
		}
	}
	cell.Metric, cell.Value, cell.Unit = RunMetric, Number{}, "s"
	if cell.Status == StatusOK {
		cell.Value = Num(took)
	}
	return append(rows, cell), nil
}
