// Package order says which bytes of a region are pulled first: the Order
// interface, the fixed orders, and orders that are read from a file, which any
// tool can write (docs/pull-order.md). Orders that know file formats are in
// package order/format.
package order

import (
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
	"strings"
)

// Range is the half-open range of bytes [Off, End).
type Range struct{ Off, End int64 }

// Order is an order of the bytes of a region.
type Order interface {
	// Ranges yields ranges of a region of size bytes, first things first. extent
	// is the most bytes that one request moves.
	//
	// A range may be of any length and alignment; whoever pulls cuts it to size,
	// rounds it out to whole chunks, and leaves out what is local by then. Ranges
	// may overlap, may reach beyond the region (the part beyond does not count)
	// and need not cover it: what is left is pulled at the end, from the first
	// byte to the last. The sequence is used once, from one goroutine at a time;
	// it may block only for as long as it takes to learn what comes next.
	Ranges(size, extent int64) iter.Seq[Range]
}

// Func is an Order made of a function.
type Func func(size, extent int64) iter.Seq[Range]

// Ranges implements Order.
func (f Func) Ranges(size, extent int64) iter.Seq[Range] { return f(size, extent) }

// Linear goes from the first byte to the last.
func Linear() Order {
	return Func(func(size, _ int64) iter.Seq[Range] {
		return func(yield func(Range) bool) { yield(Range{0, size}) }
	})
}

// Reverse goes by extents from the last to the first; within one, upwards.
func Reverse() Order {
	return Func(func(size, extent int64) iter.Seq[Range] {
		return func(yield func(Range) bool) {
			for off := (size - 1) / extent * extent; off >= 0 && size > 0 && yield(Range{off, min(off+extent, size)}); off -= extent {
			}
		}
	})
}

// Random goes by extents, in an order that depends on seed and sizes alone. It
// needs 8 bytes of memory for each extent.
func Random(seed uint64) Order {
	return Func(func(size, extent int64) iter.Seq[Range] {
		return func(yield func(Range) bool) {
			n := (size + extent - 1) / extent
			for _, i := range rand.New(rand.NewPCG(seed, 1)).Perm(int(n)) {
				off := int64(i) * extent
				if !yield(Range{off, min(off+extent, size)}) {
					return
				}
			}
		}
	})
}

// List yields the ranges, neighbours that follow each other as one.
func List(ranges []Range) Order {
	return Func(func(int64, int64) iter.Seq[Range] {
		return func(yield func(Range) bool) {
			for i := 0; i < len(ranges); {
				r := ranges[i]
				for i++; i < len(ranges) && r.Off <= ranges[i].Off && ranges[i].Off <= r.End; i++ {
					r.End = max(r.End, ranges[i].End)
				}
				if !yield(r) {
					return
				}
			}
		}
	})
}

// Then yields all of first and after it all of second.
func Then(first, second Order) Order {
	return Func(func(size, extent int64) iter.Seq[Range] {
		return func(yield func(Range) bool) {
			for _, o := range []Order{first, second} {
				for r := range o.Ranges(size, extent) {
					if !yield(r) {
						return
					}
				}
			}
		}
	})
}

// First yields the first n bytes of the region.
func First(n int64) Order {
	if n <= 0 {
		return List(nil)
	}
	return List([]Range{{0, n}})
}

// Kind is a kind of order as it is named on the command line.
type Kind struct {
	Name string `json:"name"`
	File bool   `json:"file"` // it is written NAME:FILE
	Doc  string `json:"doc"`  // one line
}

// FormatName is the kind of order that looks at the content; see package order/format.
const FormatName = "format"

// Kinds lists the kinds of orders.
func Kinds() []Kind {
	return []Kind{
		{"linear", false, "from the first byte to the last"},
		{"reverse", false, "from the last extent to the first"},
		{"random", false, "extents in a seeded random order"},
		{"trace", true, "as an earlier run asked for the bytes (record=FILE), then linear"},
		{"priority", true, "by the priorities of a file, highest first, then linear"},
		{FormatName, false, "what the file's format says is read first, found over the wire; then linear"},
	}
}

// Names lists the kinds as they are written: "linear", "trace:FILE".
func Names() []string {
	var names []string
	for _, k := range Kinds() {
		if k.File {
			k.Name += ":FILE"
		}
		names = append(names, k.Name)
	}
	return names
}

// Check returns an error that says what is valid unless spec is written as an
// order: one of Names. It opens no file.
func Check(spec string) error {
	name, file, _ := strings.Cut(spec, ":")
	i := slices.IndexFunc(Kinds(), func(k Kind) bool { return k.Name == name })
	switch {
	case i < 0:
		return fmt.Errorf("unknown order %q; valid: %s", spec, strings.Join(Names(), ", "))
	case Kinds()[i].File && file == "":
		return fmt.Errorf("order %q names no file; write it %s:FILE", spec, name)
	case !Kinds()[i].File && strings.Contains(spec, ":"):
		return fmt.Errorf("order %q: %s takes no file", spec, name)
	}
	return nil
}

// Parse returns the order that spec names, one of Names, for a region of size
// bytes; it reads the file. seed is that of "random". The error of a bad file
// names file and line, and what is valid. FormatName is not for Parse.
func Parse(spec string, size int64, seed uint64) (Order, error) {
	if err := Check(spec); err != nil {
		return nil, err
	}
	name, file, _ := strings.Cut(spec, ":")
	switch name {
	case "linear":
		return Linear(), nil
	case "reverse":
		return Reverse(), nil
	case "random":
		return Random(seed), nil
	}
	parse := ParseTrace
	switch name {
	case "trace":
	case "priority":
		parse = ParsePriority
	default:
		return nil, fmt.Errorf("order %q needs the content of the region", spec)
	}
	entries, err := ReadFile(file, size, parse)
	if err != nil {
		return nil, err
	}
	return List(Ranges(entries)), nil
}
