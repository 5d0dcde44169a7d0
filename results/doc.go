// Package results holds what a sweep leaves behind and what is read from it:
// tidy records (runs.csv), the manifest, the table of metrics, the statistics
// of series, figures as data, and the thesis's own values to compare with.
//
// A run is recorded as one row per metric and a last row with metric "run"
// that closes it. A run's rows are appended in one write and fsynced, so a kill
// at any moment loses at most the run in flight, and reopening the folder cuts
// what such a kill has left. Rows of a run that is not closed are never used.
//
// Values are in base units (s, B, B/s, bit/s, count, ratio) at full precision;
// only tables and plots scale them. The package is a leaf: it imports nothing
// of memsync.
package results
