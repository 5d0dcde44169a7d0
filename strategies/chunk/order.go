package chunk

import (
	"fmt"
	"iter"
	"math/rand/v2"
)

// Range is the half-open range of chunks [Lo, Hi).
type Range struct{ Lo, Hi int64 }

// Order says in which order to pull: given the number of chunks of a region and
// how many make a full extent, it yields ranges of chunks, first things first.
//
// A range may be of any length; the Puller cuts it into extents and leaves out
// what is local by then. Ranges may overlap and need not cover the region: what
// is left is pulled at the end, in linear order. An Order is called once for
// each Puller, from one goroutine at a time.
type Order func(chunks, extent int64) iter.Seq[Range]

// Linear pulls from the first chunk to the last.
func Linear(chunks, _ int64) iter.Seq[Range] {
	return func(yield func(Range) bool) { yield(Range{0, chunks}) }
}

// Reverse pulls extents from the last to the first; within one, upwards.
func Reverse(chunks, extent int64) iter.Seq[Range] {
	return func(yield func(Range) bool) {
		for lo := (chunks - 1) / extent * extent; lo >= 0 && chunks > 0 && yield(Range{lo, min(lo+extent, chunks)}); lo -= extent {
		}
	}
}

// Random pulls extents in an order that depends on seed alone.
func Random(seed uint64) Order {
	return func(chunks, extent int64) iter.Seq[Range] {
		return func(yield func(Range) bool) {
			n := (chunks + extent - 1) / extent
			for _, i := range rand.New(rand.NewPCG(seed, 1)).Perm(int(n)) {
				lo := int64(i) * extent
				if !yield(Range{lo, min(lo+extent, chunks)}) {
					return
				}
			}
		}
	}
}

// FirstThen yields the first n chunks of the region and then all that order yields.
func FirstThen(n int64, order Order) Order {
	return func(chunks, extent int64) iter.Seq[Range] {
		return func(yield func(Range) bool) {
			if n > 0 && !yield(Range{0, min(n, chunks)}) {
				return
			}
			order(chunks, extent)(yield)
		}
	}
}

// OrderNames are the names that OrderByName knows.
var orderNames = []string{"linear", "reverse", "random"}

// OrderNames returns the names that OrderByName knows.
func OrderNames() []string { return append([]string(nil), orderNames...) }

// OrderByName returns the order called name; seed is for "random".
func OrderByName(name string, seed uint64) (Order, error) {
	switch name {
	case "linear":
		return Linear, nil
	case "reverse":
		return Reverse, nil
	case "random":
		return Random(seed), nil
	}
	return nil, fmt.Errorf("unknown pull order %q; valid: %v", name, orderNames)
}
