// Package keyed makes a region.Store of a Table: chunks that a store keeps under
// their numbers, as files, keys, objects or rows.
//
// Every value ends in a seal, 8 bytes of XXH3 over the chunk, seeded with its
// number. So a chunk that was truncated, corrupted, or stands under another
// chunk's number is found when it is read, and named; it is never returned.
package keyed

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/zeebo/xxh3"
	"golang.org/x/sync/errgroup"

	"memsync/strategies/region"
)

// Table keeps values, each at most one chunk and a seal, under the numbers of
// their chunks. Both Get and Put are idempotent, so a failed call may be made
// again, and end early with ctx's error. Calls may be made concurrently; a
// Get beside a Put of the same number sees either value, whole.
type Table interface {
	// Get calls use for each of the numbers that has a value, with its place in
	// numbers. The value is only valid during the call; calls come one at a time.
	Get(ctx context.Context, numbers []int64, use func(i int, value []byte)) error
	// Put stores values under numbers, all of them distinct. It does not retain values.
	Put(ctx context.Context, numbers []int64, values [][]byte) error
	// Flush returns when the values of earlier Puts are as durable as the store promises.
	Flush(ctx context.Context) error
	Close() error
}

// ErrPermanent marks errors of a Table that no repetition mends, such as wrong
// credentials. The region package's sentinels are permanent too.
var ErrPermanent = errors.New("not worth another try")

// Missing says what a chunk reads as that the table does not have.
type Missing string

// The choices.
const (
	MissingError Missing = "error" // region.ErrMissing
	MissingZero  Missing = "zero"  // zeroes
)

// Options of a Store.
type Options struct {
	Size    int64   // of the region, bytes
	Chunk   int64   // bytes, a power of two from a page on
	Missing Missing // empty is MissingError
	// Batch is how many chunks one call of the Table moves, Parallel how many
	// calls run at once for one request. 0 is a batch of 1 MiB, and 4.
	Batch, Parallel int
	// Retry is how long a failing call is repeated, with a pause that doubles
	// from 20 ms to 1 s, of which a random half to whole is waited; 0 is 10 s, below 0 never.
	Retry time.Duration
}

// sealSize is the length of a value's seal.
const sealSize = 8

// Seal returns what ends the value of a chunk.
func Seal(number int64, chunk []byte) uint64 { return xxh3.HashSeed(chunk, uint64(number)) }

// Store is a region kept in a Table. All methods may be called concurrently;
// writes of one process to the same chunk are ordered. Two processes must not
// write to one table.
type Store struct {
	table Table
	o     Options
	locks [128]chan struct{} // by chunk number: a chunk that is written in part is read first
	gone  chan struct{}
	last  chan struct{} // holds a token while the store is open
}

var _ region.Store = (*Store)(nil)

// New makes a store of a table, which it takes over.
func New(t Table, o Options) (*Store, error) {
	if o.Size < 1 {
		return nil, fmt.Errorf("region of %d bytes: %w", o.Size, region.ErrOutOfRange)
	}
	if err := region.CheckChunk(o.Chunk); err != nil {
		return nil, err
	}
	if o.Missing == "" {
		o.Missing = MissingError
	}
	if o.Batch == 0 {
		o.Batch = int(max(1, (1<<20)/o.Chunk))
	}
	if o.Parallel == 0 {
		o.Parallel = 4
	}
	if o.Retry == 0 {
		o.Retry = 10 * time.Second
	}
	s := &Store{table: t, o: o, gone: make(chan struct{}), last: make(chan struct{}, 1)}
	for i := range s.locks {
		s.locks[i] = make(chan struct{}, 1)
	}
	s.last <- struct{}{}
	return s, nil
}

// Size implements region.Store.
func (s *Store) Size() int64 { return s.o.Size }

// length is how many bytes a chunk has; only the last may be short.
func (s *Store) length(number int64) int64 {
	return min(s.o.Chunk, s.o.Size-number*s.o.Chunk)
}

// part is what a request wants of one chunk.
type part struct {
	number int64
	at     int64  // first byte within the chunk
	p      []byte // of the request
}

func (s *Store) parts(p []byte, off int64) []part {
	var parts []part
	for len(p) > 0 {
		n, at := off/s.o.Chunk, off%s.o.Chunk
		take := min(int64(len(p)), s.o.Chunk-at)
		parts = append(parts, part{n, at, p[:take]})
		p, off = p[take:], off+take
	}
	return parts
}

func (s *Store) check(ctx context.Context, p []byte, off int64) error {
	select {
	case <-s.gone:
		return region.ErrClosed
	default:
	}
	if err := region.CheckRange(off, int64(len(p)), s.o.Size); err != nil {
		return err
	}
	return ctx.Err()
}

// ReadAt implements region.Store. A chunk that is not what was written gives
// region.ErrMismatch.
func (s *Store) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := s.check(ctx, p, off); err != nil {
		return err
	}
	if err := s.batches(ctx, s.parts(p, off), s.get); err != nil {
		return fmt.Errorf("read %d bytes at %d: %w", len(p), off, err)
	}
	return nil
}

// batches calls do for every batch of parts, some at once.
func (s *Store) batches(ctx context.Context, parts []part, do func(context.Context, []part) error) error {
	if len(parts) <= s.o.Batch {
		return do(ctx, parts)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(s.o.Parallel)
	for batch := range slices.Chunk(parts, s.o.Batch) {
		g.Go(func() error { return do(ctx, batch) })
	}
	return g.Wait()
}

// get reads parts of chunks.
func (s *Store) get(ctx context.Context, parts []part) error {
	numbers := make([]int64, len(parts))
	for i, q := range parts {
		numbers[i] = q.number
	}
	return s.retry(ctx, "get", numbers, func() error {
		found := make([]bool, len(parts))
		var wrong error
		err := s.table.Get(ctx, numbers, func(i int, value []byte) {
			q := parts[i]
			chunk, err := s.open(q.number, value)
			if err != nil {
				wrong = err
				return
			}
			found[i] = true
			copy(q.p, chunk[q.at:])
		})
		if err = errors.Join(err, wrong); err != nil {
			return err
		}
		for i, ok := range found {
			switch {
			case ok:
			case s.o.Missing == MissingZero:
				clear(parts[i].p)
			default:
				return fmt.Errorf("chunk %d: %w", parts[i].number, region.ErrMissing)
			}
		}
		return nil
	})
}

// open takes the seal off a value and checks it.
func (s *Store) open(number int64, value []byte) ([]byte, error) {
	if want := s.length(number) + sealSize; int64(len(value)) != want {
		return nil, fmt.Errorf("chunk %d: the store returned %d bytes, not %d: %w", number, len(value), want, region.ErrMismatch)
	}
	chunk, seal := value[:len(value)-sealSize], binary.LittleEndian.Uint64(value[len(value)-sealSize:])
	if Seal(number, chunk) != seal {
		return nil, fmt.Errorf("chunk %d: its bytes are not those that were written: %w", number, region.ErrMismatch)
	}
	return chunk, nil
}

// WriteAt implements region.Store. A chunk that is written in part is read first.
func (s *Store) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := s.check(ctx, p, off); err != nil {
		return err
	}
	parts := s.parts(p, off)
	unlock, err := s.lock(ctx, parts)
	if err == nil {
		defer unlock()
		err = s.batches(ctx, parts, s.put)
	}
	if err != nil {
		return fmt.Errorf("write %d bytes at %d: %w", len(p), off, err)
	}
	return nil
}

// lock keeps other writers from the chunks of parts.
func (s *Store) lock(ctx context.Context, parts []part) (unlock func(), err error) {
	var which []int
	for _, q := range parts {
		which = append(which, int(q.number%int64(len(s.locks))))
	}
	slices.Sort(which) // one order for all, so that no two wait for each other
	which = slices.Compact(which)
	for i, w := range which {
		select {
		case s.locks[w] <- struct{}{}:
		case <-ctx.Done():
			for _, w := range which[:i] {
				<-s.locks[w]
			}
			return nil, ctx.Err()
		}
	}
	return func() {
		for _, w := range which {
			<-s.locks[w]
		}
	}, nil
}

// put writes parts of chunks, whose locks are held.
func (s *Store) put(ctx context.Context, parts []part) error {
	numbers, values := make([]int64, len(parts)), make([][]byte, len(parts))
	var partial []part // the first and the last part only
	for i, q := range parts {
		n := s.length(q.number)
		values[i] = make([]byte, n+sealSize)
		numbers[i] = q.number
		if int64(len(q.p)) < n {
			partial = append(partial, part{q.number, 0, values[i][:n]})
		}
	}
	if len(partial) > 0 {
		if err := s.get(ctx, partial); err != nil {
			return err
		}
	}
	for i, q := range parts {
		chunk := values[i][:len(values[i])-sealSize]
		copy(chunk[q.at:], q.p)
		binary.LittleEndian.PutUint64(values[i][len(chunk):], Seal(q.number, chunk))
	}
	return s.retry(ctx, "put", numbers, func() error { return s.table.Put(ctx, numbers, values) })
}

// retry repeats call until it succeeds, its error is permanent, or the time for it is over.
func (s *Store) retry(ctx context.Context, what string, numbers []int64, call func() error) error {
	const first, most = 20 * time.Millisecond, time.Second
	deadline := time.Now().Add(s.o.Retry)
	for pause, tries := first, 1; ; pause, tries = min(2*pause, most), tries+1 {
		err := call()
		wait := pause/2 + rand.N(pause/2+1)
		if err == nil {
			return nil
		}
		err = fmt.Errorf("%s %d chunks from %d, try %d: %w", what, len(numbers), numbers[0], tries, err)
		if permanent(err) || ctx.Err() != nil || time.Now().Add(wait).After(deadline) {
			return err
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-s.gone:
			return errors.Join(region.ErrClosed, err)
		}
	}
}

func permanent(err error) bool {
	for _, e := range []error{ErrPermanent, region.ErrMissing, region.ErrMismatch, region.ErrReadOnly, region.ErrClosed,
		region.ErrNotPermitted, region.ErrNotSupported, region.ErrOutOfRange} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// Flush implements region.Store.
func (s *Store) Flush(ctx context.Context) error {
	if err := s.check(ctx, nil, 0); err != nil {
		return err
	}
	if err := s.retry(ctx, "flush", []int64{0}, func() error { return s.table.Flush(ctx) }); err != nil {
		return fmt.Errorf("flush: %w", err)
	}
	return nil
}

// Close implements region.Store.
func (s *Store) Close() error {
	select {
	case <-s.last:
		close(s.gone)
		return s.table.Close()
	default:
		return nil
	}
}

// Fill writes the region's whole content, several batches at once. fill writes
// the content at off to p and may be called concurrently.
func (s *Store) Fill(ctx context.Context, fill func(p []byte, off int64) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(s.o.Parallel)
	step := int64(s.o.Batch) * s.o.Chunk
	for off := int64(0); off < s.o.Size; off += step {
		g.Go(func() error {
			p := make([]byte, min(step, s.o.Size-off))
			if err := fill(p, off); err != nil {
				return err
			}
			return s.WriteAt(ctx, p, off)
		})
	}
	if err := g.Wait(); err != nil {
		return fmt.Errorf("fill the region: %w", err)
	}
	return nil
}
