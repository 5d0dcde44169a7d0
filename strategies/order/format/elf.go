package format

import (
	"bytes"
	"encoding/binary"
)

// ELF: elf(5), and the System V ABI, chapters 4 and 5.

const (
	elfMaxTable = 1 << 20 // bytes of one table of headers

	ptLoad, ptDynamic, ptInterp, ptNote, ptEhFrame = 1, 2, 3, 4, 0x6474e550

	shtSymtab, shtStrtab, shtRela, shtHash, shtDynamic, shtNobits, shtRel, shtDynsym = 2, 3, 4, 5, 6, 8, 9, 11
	shtGnuHash, shtVerneed, shtVersym                                                = 0x6ffffff6, 0x6ffffffe, 0x6fffffff
)

func isELF(head []byte) bool {
	return len(head) >= 64 && bytes.HasPrefix(head, []byte("\x7fELF")) && (head[4] == 1 || head[4] == 2) && (head[5] == 1 || head[5] == 2)
}

func planELF(s *scan) error {
	h, err := s.read(0, 64)
	if err != nil {
		return err
	}
	wide := h[4] == 2
	var o binary.ByteOrder = binary.LittleEndian
	if h[5] == 2 {
		o = binary.BigEndian
	}
	// word reads an address or offset: at byte a of a 32-bit header, b of a 64-bit one.
	word := func(p []byte, a, b int) int64 {
		if wide {
			return int64(min(o.Uint64(p[b:]), 1<<62))
		}
		return int64(o.Uint32(p[a:]))
	}
	half := func(p []byte, a, b int) int64 {
		if wide {
			a = b
		}
		return int64(o.Uint16(p[a:]))
	}
	entry, phoff, shoff := word(h, 24, 24), word(h, 28, 32), word(h, 32, 40)
	phsize, phnum, shsize, shnum := half(h, 42, 54), half(h, 44, 56), half(h, 46, 58), half(h, 48, 60)
	phmin, shmin := int64(32), int64(40)
	if wide {
		phmin, shmin = 56, 64
	}
	if phnum > 0 && phsize < phmin || shnum > 0 && shsize < shmin || phnum*phsize > elfMaxTable || shnum*shsize > elfMaxTable {
		return malformed("%d program headers of %d bytes, %d sections of %d", phnum, phsize, shnum, shsize)
	}
	if err := s.want(0, 64); err != nil {
		return err
	}
	var first, code, data [][2]int64 // offset and length
	if phnum > 0 {
		p, err := s.read(phoff, phnum*phsize)
		if err != nil {
			return err
		}
		if err := s.want(phoff, phnum*phsize); err != nil {
			return err
		}
		for ; len(p) > 0; p = p[phsize:] {
			at, addr, n := word(p, 4, 8), word(p, 8, 16), word(p, 16, 32)
			flags := o.Uint32(p[4:])
			if !wide {
				flags = o.Uint32(p[24:])
			}
			switch o.Uint32(p) {
			case ptInterp, ptDynamic, ptNote, ptEhFrame:
				first = append(first, [2]int64{at, n})
			case ptLoad:
				if entry >= addr && entry-addr < n {
					code = append(code, [2]int64{at + (entry-addr)&^4095, 4096})
				}
				if flags&2 != 0 { // writable: relocated before the program starts
					data = append(data, [2]int64{at, n})
				}
			}
		}
	}
	var link, symbols [][2]int64
	if shnum > 0 {
		p, err := s.read(shoff, shnum*shsize)
		if err != nil {
			return err
		}
		if err := s.want(shoff, shnum*shsize); err != nil {
			return err
		}
		// The names of sections; those of dynamic symbols are loaded, others not.
		for i := int64(0); i < shnum; i++ {
			q := p[i*shsize:]
			flags, at, n := word(q, 8, 8), word(q, 16, 24), word(q, 20, 32)
			loaded := flags&2 != 0
			switch kind := o.Uint32(q[4:]); {
			case i == half(h, 50, 62):
				first = append(first, [2]int64{at, n})
			case kind == shtSymtab, kind == shtStrtab && !loaded:
				symbols = append(symbols, [2]int64{at, n})
			case kind == shtStrtab, kind == shtRela, kind == shtRel, kind == shtHash, kind == shtGnuHash,
				kind == shtDynamic, kind == shtDynsym, kind == shtVerneed, kind == shtVersym:
				link = append(link, [2]int64{at, n})
			}
		}
	}
	for _, list := range [][][2]int64{first, link, data, code, symbols} {
		for _, r := range list {
			if err := s.want(r[0], r[1]); err != nil {
				return err
			}
		}
	}
	return nil
}
