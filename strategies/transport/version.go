package transport

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"

	"memsync/strategies/region"
)

// VersionSuffix behind the name of a region makes the name of the export that has
// its version: one record for each epoch of the lease, the version as the writer
// with that epoch sees it, to whom its own writes are no changes. Record 0 is a reader's.
const VersionSuffix = ".version"

// A record is four big-endian words: instance, changes, state, age in ns.
const versionRecord = 32

// VersionSize is the size of every version export, by which it is told from a server that has one export under whatever name.
const VersionSize int64 = versionRecord << 32

// maxEpochs is how many writers are remembered. To an earlier one its own writes are another's.
const maxEpochs = 1024

// versions is the export. It is read a whole record at a time, which is then of one moment.
type versions struct {
	l    *Leases
	name string
	s    region.Store
}

var (
	_ region.Store      = versions{}
	_ region.ReadOnlyer = versions{}
)

// Open implements Exports.
func (l *Leases) Open(name string) (region.Store, error) {
	s, err := l.Exports.Open(name)
	own, ok := strings.CutSuffix(name, VersionSuffix)
	if !ok || !errors.Is(err, region.ErrMissing) {
		return s, err
	}
	if s, err = l.Exports.Open(own); err != nil {
		return nil, err
	}
	return versions{l, own, s}, nil
}

func (v versions) Size() int64 { return VersionSize }

func (v versions) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := region.CheckRange(off, int64(len(p)), v.Size()); err != nil {
		return err
	}
	if len(p) != versionRecord || off%versionRecord != 0 {
		return fmt.Errorf("%d bytes at %d of a version: want one record of %d: %w", len(p), off, versionRecord, region.ErrOutOfRange)
	}
	now, err := v.l.version(ctx, v.name, v.s, uint32(off/versionRecord))
	if err != nil {
		return err
	}
	b := binary.BigEndian.AppendUint64(p[:0], now.Instance)
	b = binary.BigEndian.AppendUint64(b, now.Changes)
	b = binary.BigEndian.AppendUint64(b, now.State)
	binary.BigEndian.AppendUint64(b, uint64(now.Age))
	return nil
}

func (v versions) WriteAt(context.Context, []byte, int64) error { return region.ErrReadOnly }
func (v versions) ReadOnly() bool                               { return true }
func (v versions) Flush(context.Context) error                  { return nil }
func (v versions) Close() error                                 { return nil }

// version returns the version as the writer with an epoch sees it.
func (l *Leases) version(ctx context.Context, name string, s region.Store, epoch uint32) (region.Version, error) {
	v := region.Version{Age: time.Duration(1<<63 - 1)}
	if vs, ok := s.(region.Versioner); ok {
		own, err := vs.Version(ctx)
		if err == nil {
			v = own
		} else if !errors.Is(err, region.ErrNotSupported) {
			return v, err
		}
	}
	e := l.of(name)
	e.mu.Lock()
	defer e.mu.Unlock()
	v.Instance = l.instance
	v.Changes += e.writes - e.byEpoch[epoch]
	if e.writes > 0 {
		v.Age = min(v.Age, time.Since(e.written))
	}
	return v, nil
}

// ReadVersion asks an export of versions that was opened as s, which takes one
// round trip. epoch is of the asker's lease; 0 is a reader's.
func ReadVersion(ctx context.Context, s region.Store, epoch uint32) (region.Version, error) {
	var b [versionRecord]byte
	if s.Size() != versionRecord<<32 {
		return region.Version{}, fmt.Errorf("versions of %d bytes: %w", s.Size(), region.ErrMismatch)
	}
	if err := s.ReadAt(ctx, b[:], int64(epoch)*versionRecord); err != nil {
		return region.Version{}, fmt.Errorf("version of the source: %w", err)
	}
	word := func(i int) uint64 { return binary.BigEndian.Uint64(b[8*i:]) }
	return region.Version{Instance: word(0), Changes: word(1), State: word(2), Age: max(0, time.Duration(word(3)))}, nil
}
