package format

import (
	"bytes"
	"encoding/binary"
)

// The SQLite database file: https://www.sqlite.org/fileformat2.html. Big endian.

const (
	sqliteMagic    = "SQLite format 3\x00"
	sqliteHeader   = 100
	interiorIndex  = 2
	interiorTable  = 5
	leafTable      = 13
	sqliteMaxRoots = 4096
	sqliteMaxDepth = 20
)

func isSQLite(head []byte) bool {
	return len(head) >= sqliteHeader && bytes.HasPrefix(head, []byte(sqliteMagic))
}

// sqlite is a database that is being looked at.
type sqlite struct {
	*scan
	page, usable, pages int64
}

// planSQLite walks all b-trees by level. Leaves are not read, but for the first
// of each tree, since all leaves are at the same depth, and those of the schema.
func planSQLite(s *scan) error {
	h, err := s.read(0, sqliteHeader)
	if err != nil {
		return err
	}
	d := &sqlite{scan: s, page: int64(binary.BigEndian.Uint16(h[16:]))}
	if d.page == 1 {
		d.page = 65536
	}
	d.usable = d.page - int64(h[20])
	if d.page < 512 || d.page&(d.page-1) != 0 || d.usable < 480 {
		return malformed("page size %d", d.page)
	}
	d.pages = s.size / d.page
	if err := s.want(0, d.page); err != nil {
		return err
	}
	var roots []int64
	if err := d.walk([]int64{1}, func(leaf []byte, header int) { roots = append(roots, rootPages(leaf, header)...) }); err != nil {
		return err
	}
	return d.walk(roots[:min(len(roots), sqliteMaxRoots)], nil)
}

// walk goes down from pages (numbers from 1), all trees together, and wants
// their interior pages. With leaf it reads the leaves too, and calls it for each.
func (d *sqlite) walk(pages []int64, leaf func(page []byte, header int)) error {
	seen := map[int64]bool{}
	type tree struct{ pages []int64 }
	var level []tree
	for _, p := range pages {
		level = append(level, tree{[]int64{p}})
	}
	for range sqliteMaxDepth {
		// One page of each tree says whether this is the level of its leaves.
		var first []int64
		var trees []tree
		for _, t := range level {
			t.pages = d.valid(t.pages, seen)
			if len(t.pages) > 0 {
				first = append(first, (t.pages[0]-1)*d.page)
				trees = append(trees, t)
			}
		}
		if len(trees) == 0 {
			return nil
		}
		firsts, err := d.readAll(first, d.page)
		if err != nil {
			return err
		}
		level = nil
		for i, t := range trees {
			header := headerAt(t.pages[0])
			if kind := firsts[i][header]; kind != interiorIndex && kind != interiorTable && leaf == nil {
				continue
			}
			var rest []int64
			for _, p := range t.pages[1:] {
				rest = append(rest, (p-1)*d.page)
			}
			bodies, err := d.readAll(rest, d.page)
			if err != nil {
				return err
			}
			var children tree
			for j, b := range append([][]byte{firsts[i]}, bodies...) {
				if err := d.want((t.pages[j]-1)*d.page, d.page); err != nil {
					return err
				}
				header := headerAt(t.pages[j])
				switch kind := b[header]; {
				case kind == interiorIndex, kind == interiorTable:
					children.pages = append(children.pages, d.children(b, header)...)
					if len(children.pages) > maxRanges {
						return errLimit
					}
				case leaf != nil:
					leaf(b, header)
				}
			}
			level = append(level, children)
		}
	}
	return nil
}

// headerAt is where a page's b-tree header begins: page 1 has the file's before it.
func headerAt(page int64) int {
	if page == 1 {
		return sqliteHeader
	}
	return 0
}

// valid keeps the pages that are in the file and were not met before.
func (d *sqlite) valid(pages []int64, seen map[int64]bool) []int64 {
	var out []int64
	for _, p := range pages {
		if p >= 1 && p <= d.pages && !seen[p] && len(seen) < maxRanges {
			seen[p] = true
			out = append(out, p)
		}
	}
	return out
}

// children returns the child pages of an interior page.
func (d *sqlite) children(b []byte, header int) []int64 {
	var out []int64
	cells := int(binary.BigEndian.Uint16(b[header+3:]))
	for i := range cells {
		at := header + 12 + 2*i
		if at+2 > len(b) {
			break
		}
		cell := int(binary.BigEndian.Uint16(b[at:]))
		if cell+4 <= len(b) {
			out = append(out, int64(binary.BigEndian.Uint32(b[cell:])))
		}
	}
	return append(out, int64(binary.BigEndian.Uint32(b[header+8:])))
}

// rootPages returns the rootpage column of the rows of sqlite_schema in a leaf:
// type, name, tbl_name, rootpage, sql.
func rootPages(b []byte, header int) []int64 {
	if b[header] != leafTable {
		return nil
	}
	var out []int64
	cells := int(binary.BigEndian.Uint16(b[header+3:]))
	for i := range cells {
		at := header + 8 + 2*i
		if at+2 > len(b) {
			break
		}
		cell := b[min(int(binary.BigEndian.Uint16(b[at:])), len(b)):]
		_, cell = varint(cell) // payload length
		_, cell = varint(cell) // row id
		length, rest := varint(cell)
		used := int64(len(cell) - len(rest))
		if length < used || length > int64(len(cell)) {
			continue
		}
		types, body := cell[used:length], cell[length:]
		var kind int64
		for column := range 4 {
			if len(types) == 0 {
				kind = -1
				break
			}
			kind, types = varint(types)
			n := columnSize(kind)
			if n < 0 || n > int64(len(body)) {
				kind = -1 // the column is on an overflow page
				break
			}
			if column < 3 {
				body = body[n:]
			}
		}
		if kind < 1 || kind > 6 {
			continue
		}
		var v int64
		for _, c := range body[:columnSize(kind)] {
			v = v<<8 | int64(c)
		}
		if v > 0 { // views and triggers have 0
			out = append(out, v)
		}
	}
	return out
}

// columnSize is the bytes of a value of a serial type, or -1.
func columnSize(kind int64) int64 {
	switch {
	case kind < 0, kind == 10, kind == 11:
		return -1
	case kind < 10:
		return [...]int64{0, 1, 2, 3, 4, 6, 8, 8, 0, 0}[kind]
	}
	return (kind - 12) / 2
}

// varint cuts a variable-length integer off the front of b; 0 where b is too short.
func varint(b []byte) (v int64, rest []byte) {
	for i, c := range b[:min(len(b), 9)] {
		if i == 8 {
			return v<<8 | int64(c), b[9:]
		}
		v = v<<7 | int64(c&0x7f)
		if c < 0x80 {
			return v, b[i+1:]
		}
	}
	return 0, nil
}
