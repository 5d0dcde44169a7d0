// Package tape keeps a region on a linear, append-only medium: a file that stands for a
// tape, on which records are written one behind the other and never changed. An index in
// memory says which record has a chunk; beside the tape it is kept on disk, so that
// opening does not read the tape from its beginning.
//
// A file system on tape must give files and folders that can be had at random; a region
// needs only numbers (the notes of the thesis, "go-nbd": an offset is mapped to a record number, and
// to a new one where it is written again). There is one head: calls wait for each
// other, and where the head must move first, for that; who waits is served in the order of the tape.
package tape

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/zeebo/xxh3"

	"memsync/strategies/backend/keyed"
	"memsync/strategies/region"
)

// Options say how slow the medium is. The zero value is as fast as the file.
type Options struct {
	Turn time.Duration // to stop, and to begin again where the head is not at the record that is wanted next
	Wind int64         // bytes of tape that pass in a second while the head moves; 0 is any
	Rate int64         // bytes that are read or written in a second; 0 is any
}

// Table is a tape with its index: a folder with the files tape and index.
type Table struct {
	o    Options
	dir  string
	tape *os.File

	// Of who has the head.
	at   int64         // where the head is
	debt time.Duration // of waiting that is not worth a timer yet
	held []held        // what was read last, which the drive still has; the oldest first

	mu      sync.Mutex
	busy    bool // somebody has the head
	waiting []*waiter
	end     int64 // of the last record
	index   map[int64]record
	done    bool
}

// waiter is a call that waits for the head.
type waiter struct {
	off   int64 // where on the tape it begins
	ready chan struct{}
}

var _ keyed.Table = (*Table)(nil)

// held is a record in the drive's buffer.
type held struct {
	record
	value []byte
}

// buffered is how many bytes of records the drive keeps: who reads several a piece at a
// time must not have the head go back for each piece.
const buffered = 4 << 20

// record is where a value is on the tape.
type record struct{ off, n int64 } // of the value, behind its header

// The header of a record, little endian: magic, number, length of the value, and a hash
// of both and of the value.
const (
	magic      = 0x3130455041544d4d // "MMTAPE01"
	headerSize = 32
	maxValue   = 64 << 20 // bytes; a longer one is no record
	maxRecords = 1 << 28
)

func hash(number int64, value []byte) uint64 {
	return xxh3.HashSeed(value, uint64(number)*0x9e3779b97f4a7c15+uint64(len(value)))
}

// Open opens the tape in the folder dir, which it makes where it is not there. What was
// written after the index was is found on the tape; a record at its end that a crash cut
// off is dropped. A tape must be open once at a time.
func Open(dir string, o Options) (*Table, error) {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "tape"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	t := &Table{o: o, dir: dir, tape: f, index: map[int64]record{}}
	if err = t.load(); err == nil {
		err = t.scan()
	}
	if err != nil {
		return nil, fmt.Errorf("open tape %s: %w", dir, errors.Join(err, f.Close()))
	}
	t.at = t.end
	return t, nil
}

// load reads the index, if there is one that fits the tape. One that does not is not used:
// the tape has all that it has.
func (t *Table) load() error {
	b, err := os.ReadFile(filepath.Join(t.dir, "index"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	fi, err := t.tape.Stat()
	if err != nil {
		return err
	}
	index, end, ok := parseIndex(b, fi.Size())
	if ok {
		t.index, t.end = index, end
	}
	return nil
}

// The index: the tape's end, then number, offset and length of each record, little endian, then a hash of all.
func parseIndex(b []byte, tape int64) (index map[int64]record, end int64, ok bool) {
	if len(b) < 16 || (len(b)-16)%24 != 0 || binary.LittleEndian.Uint64(b[len(b)-8:]) != xxh3.Hash(b[:len(b)-8]) {
		return nil, 0, false
	}
	word := func(i int) int64 { return int64(binary.LittleEndian.Uint64(b[8*i:])) }
	if end = word(0); end < 0 || end > tape {
		return nil, 0, false
	}
	index = make(map[int64]record, (len(b)-16)/24)
	for i := 1; 8*(i+3) < len(b); i += 3 {
		r := record{word(i + 1), word(i + 2)}
		if r.n < 0 || r.n > maxValue || r.off < headerSize || r.off > end-r.n {
			return nil, 0, false
		}
		index[word(i)] = r
	}
	return index, end, true
}

// save writes the index aside and renames it.
func (t *Table) save() (err error) {
	b := binary.LittleEndian.AppendUint64(make([]byte, 0, 16+24*len(t.index)), uint64(t.end))
	for number, r := range t.index {
		for _, v := range []int64{number, r.off, r.n} {
			b = binary.LittleEndian.AppendUint64(b, uint64(v))
		}
	}
	b = binary.LittleEndian.AppendUint64(b, xxh3.Hash(b))
	f, err := os.CreateTemp(t.dir, "index-")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(t.dir, "index"))
	}
	if err != nil {
		err = errors.Join(err, os.Remove(f.Name()))
	}
	return err
}

// scan finds the records behind the index's end, and cuts off what is none.
func (t *Table) scan() error {
	fi, err := t.tape.Stat()
	if err != nil {
		return err
	}
	r := bufio.NewReaderSize(io.NewSectionReader(t.tape, t.end, fi.Size()-t.end), 1<<20)
	for {
		number, value, err := readRecord(r, fi.Size()-t.end-headerSize)
		if errors.Is(err, errNoRecord) {
			break
		}
		if err != nil {
			return err
		}
		if len(t.index) == maxRecords {
			return fmt.Errorf("more than %d records: %w", maxRecords, region.ErrOutOfRange)
		}
		t.index[number] = record{t.end + headerSize, int64(len(value))}
		t.end += headerSize + int64(len(value))
	}
	if t.end < fi.Size() {
		return t.tape.Truncate(t.end)
	}
	return nil
}

// errNoRecord: the tape ends here, or in the middle of a record.
var errNoRecord = errors.New("no whole record")

// readRecord reads a record whose value has at most most bytes.
func readRecord(r io.Reader, most int64) (number int64, value []byte, err error) {
	var h [headerSize]byte
	if _, err := io.ReadFull(r, h[:]); err == io.EOF || err == io.ErrUnexpectedEOF {
		return 0, nil, errNoRecord
	} else if err != nil {
		return 0, nil, err
	}
	number = int64(binary.LittleEndian.Uint64(h[8:]))
	n := binary.LittleEndian.Uint64(h[16:])
	if binary.LittleEndian.Uint64(h[:]) != magic || n > maxValue || int64(n) > most {
		return 0, nil, errNoRecord
	}
	value = make([]byte, n)
	if _, err := io.ReadFull(r, value); err != nil {
		return 0, nil, err
	}
	if binary.LittleEndian.Uint64(h[24:]) != hash(number, value) {
		return 0, nil, errNoRecord
	}
	return number, value, nil
}

// take waits for the head, for a call that begins at off.
func (t *Table) take(ctx context.Context, off int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	t.mu.Lock()
	if t.done {
		t.mu.Unlock()
		return region.ErrClosed
	}
	if !t.busy {
		t.busy = true
		t.mu.Unlock()
		return nil
	}
	w := &waiter{off: off, ready: make(chan struct{})}
	t.waiting = append(t.waiting, w)
	t.mu.Unlock()
	select {
	case <-w.ready:
	case <-ctx.Done():
		t.mu.Lock()
		i := slices.Index(t.waiting, w)
		if i >= 0 {
			t.waiting = slices.Delete(t.waiting, i, i+1)
		}
		t.mu.Unlock()
		if i < 0 { // it was our turn in the same moment
			t.release()
		}
		return ctx.Err()
	}
	t.mu.Lock()
	closed := t.done
	t.mu.Unlock()
	if closed {
		t.release()
		return region.ErrClosed
	}
	return nil
}

// release lets the next one have the head: who begins soonest on the way to the end, or
// else soonest from the beginning, so that nobody waits for longer than two such ways.
func (t *Table) release() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.waiting) == 0 {
		t.busy = false
		return
	}
	behind := func(w *waiter) bool { return w.off < t.at }
	next := 0
	for i, w := range t.waiting {
		if best := t.waiting[next]; behind(w) == behind(best) && w.off < best.off || !behind(w) && behind(best) {
			next = i
		}
	}
	w := t.waiting[next]
	t.waiting = slices.Delete(t.waiting, next, next+1)
	close(w.ready)
}

// pass moves the head to off, and then n bytes on. What lies ahead is reached by reading
// on where that is sooner.
func (t *Table) pass(ctx context.Context, off, n int64) error {
	if d := max(off-t.at, t.at-off); d != 0 {
		move := t.o.Turn + duration(d, t.o.Wind)
		if off > t.at {
			move = min(move, duration(d, t.o.Rate))
		}
		t.debt += move
	}
	t.debt += duration(n, t.o.Rate)
	t.at = off + n
	if t.debt < time.Millisecond {
		return ctx.Err()
	}
	timer := time.NewTimer(t.debt)
	defer timer.Stop()
	began := time.Now()
	select {
	case <-timer.C:
		t.debt -= time.Since(began) // a timer that was late is made up for
		return nil
	case <-ctx.Done():
		t.debt = 0
		return ctx.Err()
	}
}

func duration(n, rate int64) time.Duration {
	if rate <= 0 {
		return 0
	}
	return time.Duration(float64(n) / float64(rate) * 1e9)
}

// Get implements keyed.Table: in the order in which the records are on the tape.
func (t *Table) Get(ctx context.Context, numbers []int64, use func(i int, value []byte)) error {
	if err := t.take(ctx, t.first(numbers)); err != nil {
		return err
	}
	defer t.release()
	type wanted struct {
		record
		i int
	}
	var order []wanted
	t.mu.Lock()
	for i, n := range numbers {
		if r, ok := t.index[n]; ok {
			order = append(order, wanted{r, i})
		}
	}
	t.mu.Unlock()
	slices.SortFunc(order, func(a, b wanted) int { return cmp.Compare(a.off, b.off) })
	for _, w := range order {
		value, err := t.read(ctx, w.record)
		if err != nil {
			return err
		}
		use(w.i, value)
	}
	return nil
}

// read returns the value of a record, which is valid until the next call.
func (t *Table) read(ctx context.Context, r record) ([]byte, error) {
	if i := slices.IndexFunc(t.held, func(h held) bool { return h.record == r }); i >= 0 {
		return t.held[i].value, ctx.Err()
	}
	if err := t.pass(ctx, r.off-headerSize, headerSize+r.n); err != nil {
		return nil, err
	}
	total, drop := r.n, 0
	for _, h := range t.held {
		total += h.n
	}
	for ; drop < len(t.held) && total > buffered; drop++ {
		total -= t.held[drop].n
	}
	t.held = slices.Delete(t.held, 0, drop)
	value := make([]byte, r.n)
	if _, err := t.tape.ReadAt(value, r.off); err != nil {
		return nil, fmt.Errorf("read the tape at %d: %w", r.off, err)
	}
	t.held = append(t.held, held{r, value})
	return value, nil
}

// first is where the first record of numbers begins; 0 where there is none.
func (t *Table) first(numbers []int64) (off int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, n := range numbers {
		if r, ok := t.index[n]; ok && (off == 0 || r.off < off) {
			off = r.off
		}
	}
	return max(off-headerSize, 0)
}

// Put implements keyed.Table: behind the last record. What stood under the numbers before stays on the tape.
func (t *Table) Put(ctx context.Context, numbers []int64, values [][]byte) error {
	t.mu.Lock()
	end := t.end
	t.mu.Unlock()
	if err := t.take(ctx, end); err != nil {
		return err
	}
	defer t.release()
	for i, number := range numbers {
		v := values[i]
		if len(v) > maxValue || len(t.index) >= maxRecords {
			return fmt.Errorf("write %d bytes as one of %d records: %w", len(v), len(t.index)+1, region.ErrOutOfRange)
		}
		if err := t.pass(ctx, t.end, headerSize+int64(len(v))); err != nil {
			return err
		}
		var b bytes.Buffer
		b.Grow(headerSize + len(v))
		for _, w := range []uint64{magic, uint64(number), uint64(len(v)), hash(number, v)} {
			_ = binary.Write(&b, binary.LittleEndian, w)
		}
		b.Write(v)
		if _, err := t.tape.WriteAt(b.Bytes(), t.end); err != nil { // the next one overwrites what there is of it
			return fmt.Errorf("write the tape at %d: %w", t.end, err)
		}
		t.mu.Lock()
		t.index[number] = record{t.end + headerSize, int64(len(v))}
		t.end += int64(b.Len())
		t.mu.Unlock()
	}
	return nil
}

// Flush implements keyed.Table: the tape is on its disk, and so is the index.
func (t *Table) Flush(ctx context.Context) error {
	if err := t.take(ctx, 0); err != nil {
		return err
	}
	defer t.release()
	return t.flush()
}

func (t *Table) flush() error {
	if err := t.tape.Sync(); err != nil {
		return err
	}
	return t.save()
}

// Close flushes, and closes the tape. It may be called twice.
func (t *Table) Close() error {
	if err := t.take(context.Background(), 0); errors.Is(err, region.ErrClosed) {
		return nil
	}
	defer t.release()
	t.mu.Lock()
	t.done = true
	t.mu.Unlock()
	return errors.Join(t.flush(), t.tape.Close())
}
