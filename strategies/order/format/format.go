// Package format finds what is read first of a file whose format it knows: the
// metadata that every program reads before it gets to the content. It looks at
// the region itself, over the wire, and reads only what it needs.
package format

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"

	"memsync/strategies/order"
	"memsync/strategies/region"
)

// Format is a file format, or a file system, that is known.
type Format struct {
	Name string `json:"name"`
	Doc  string `json:"doc"` // one line: what comes first

	detect func(head []byte) bool // head is the region's first headSize bytes, fewer where it is smaller
	plan   func(s *scan) error
}

// Formats lists the formats.
func Formats() []Format {
	return []Format{
		{"ext4", "superblock, group descriptors, bitmaps, the used part of inode tables, directories, the journal's head", isExt4, planExt4},
		{"sqlite", "header, schema, and the interior pages of all b-trees", isSQLite, planSQLite},
		{"mp4", "the boxes' headers and the index (moov), also where it stands at the end", isMP4, planMP4},
		{"zip", "end-of-central-directory record and central directory", isZip, planZip},
		{"elf", "headers, section table, dynamic linking, symbols, the page of the entry point", isELF, planELF},
	}
}

const (
	headSize = 4096
	// Limits of a plan, whatever the content says.
	maxRead     = 64 << 20 // bytes that are read
	maxRequests = 1 << 15
	maxRanges   = 1 << 20
	parallel    = 16 // requests in flight
)

// errLimit ends a plan that asks for more than the limits; what was found until then counts.
var errLimit = errors.New("the format's metadata is larger than the limits of a plan")

// errFormat is of content that is not what its format says.
var errFormat = errors.New("malformed")

func malformed(text string, args ...any) error {
	return fmt.Errorf(text+": %w", append(args, errFormat)...)
}

// Plan finds out which format s has, and gives emit what is read first of it,
// in that order. Reads of s have the class of ctx. It returns the format's name,
// empty where it is none of Formats. Content that contradicts its format, or has
// more metadata than the limits (64 MiB, 32768 reads), ends the plan with what was
// found until then, and is no error; the errors are those of s and of emit.
func Plan(ctx context.Context, s region.Store, emit func(order.Range) error) (name string, err error) {
	sc := &scan{ctx: ctx, s: s, size: s.Size(), emit: emit}
	head, err := sc.read(0, min(headSize, sc.size))
	if err != nil {
		return "", err
	}
	for _, f := range Formats() {
		if f.detect(head) {
			if err = f.plan(sc); errors.Is(err, errFormat) || errors.Is(err, errLimit) {
				err = nil
			}
			if err != nil {
				err = fmt.Errorf("look for what is read first of %s: %w", f.Name, err)
			}
			return f.Name, err
		}
	}
	return "", nil
}

// Order is the order of what Plan finds in s, whose reads it makes as
// region.Demand while what is linear is pulled already. s must be the store that
// is being pulled into, so that what is read for the plan is there afterwards.
// Reads end with ctx, and with the sequence. A plan that fails is a linear order.
func Order(ctx context.Context, s region.Store) order.Order {
	return order.Func(func(size, extent int64) iter.Seq[order.Range] {
		return func(yield func(order.Range) bool) {
			ctx, cancel := context.WithCancel(region.WithClass(ctx, region.Demand))
			found := make(chan order.Range, 256)
			var wg sync.WaitGroup
			wg.Go(func() {
				defer close(found)
				_, _ = Plan(ctx, s, func(r order.Range) error { // the linear order needs no plan
					select {
					case found <- r:
						return nil
					case <-ctx.Done():
						return ctx.Err()
					}
				})
			})
			defer wg.Wait()
			defer cancel()
			for next := int64(0); ; {
				if next < size { // the link must not idle while the plan is made
					select {
					case r, ok := <-found:
						if !ok || !yield(r) {
							return
						}
					default:
						if !yield(order.Range{Off: next, End: min(next+extent, size)}) {
							return
						}
						next += extent
					}
				} else if r, ok := <-found; !ok || !yield(r) {
					return
				}
			}
		}
	})
}

// scan is a plan that is being made. Its methods may be called concurrently,
// but for want.
type scan struct {
	ctx  context.Context
	s    region.Store
	size int64
	emit func(order.Range) error

	mu            sync.Mutex
	bytes         int64
	reads, ranges int
}

// read returns the n bytes at off.
func (s *scan) read(off, n int64) ([]byte, error) {
	if region.CheckRange(off, n, s.size) != nil {
		return nil, malformed("bytes [%d, +%d) of %d", off, n, s.size)
	}
	s.mu.Lock()
	s.bytes += n
	s.reads++
	over := s.bytes > maxRead || s.reads > maxRequests
	s.mu.Unlock()
	if over {
		return nil, errLimit
	}
	b := make([]byte, n)
	if err := s.s.ReadAt(s.ctx, b, off); err != nil {
		return nil, err
	}
	return b, nil
}

// readAll reads ranges of n bytes each, several at a time.
func (s *scan) readAll(offs []int64, n int64) ([][]byte, error) {
	out, errs := make([][]byte, len(offs)), make([]error, len(offs))
	for at := 0; at < len(offs); at += parallel {
		var wg sync.WaitGroup
		end := min(at+parallel, len(offs))
		for i := at; i < end; i++ {
			wg.Go(func() { out[i], errs[i] = s.read(offs[i], n) })
		}
		wg.Wait()
		if err := errors.Join(errs[at:end]...); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// want says that [off, off+n) comes next. What lies beyond the region does not count.
func (s *scan) want(off, n int64) error {
	if off < 0 || n <= 0 || off >= s.size {
		return nil
	}
	if s.ranges++; s.ranges > maxRanges {
		return errLimit
	}
	return s.emit(order.Range{Off: off, End: off + min(n, s.size-off)})
}
