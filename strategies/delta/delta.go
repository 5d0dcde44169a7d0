// Package delta encodes a new version of a piece of a region by what the other
// side has already: bytes that stay, bytes found elsewhere in the old region,
// zeroes, and the rest as they are, perhaps compressed.
//
// A stream is a sequence of instructions, each a varint (LEB128) of length<<2|kind:
//
//	0 same   the next length bytes stay
//	1 new    length bytes follow
//	2 copy   a varint follows: the offset in the old region that they are at
//	3 zero   length zeroes
//
// and makes exactly as many bytes as the piece has. A body is one byte that says
// how the stream is packed (0 as it is, 1 zstd) and the packed stream. An encoder
// never makes a body larger than the piece plus MaxOverhead.
package delta

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/klauspost/compress/zstd"

	"memsync/strategies/region"
)

// The instructions.
const (
	opSame = iota
	opNew
	opCopy
	opZero
)

// The packings.
const (
	packNone = 0
	packZstd = 1
)

// MaxPiece is the most bytes a piece has.
const MaxPiece = 1 << 20

// MaxOverhead is what a body may have more than its piece: the packing and one instruction.
const MaxOverhead = 1 + binary.MaxVarintLen64

// ErrCorrupt: a body that no encoder makes. The piece it was to change is unharmed.
var ErrCorrupt = errors.New("corrupt delta")

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrCorrupt, fmt.Errorf(format, args...))
}

// Decoder decodes bodies. It is used by one goroutine; Close frees it.
type Decoder struct {
	z      *zstd.Decoder
	stream []byte
}

// NewDecoder returns a Decoder that never unpacks more than a piece can need.
func NewDecoder() (*Decoder, error) {
	z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxStream(MaxPiece)), zstd.WithDecoderMaxWindow(8<<20))
	if err != nil {
		return nil, err
	}
	return &Decoder{z: z}, nil
}

// Close frees what the decoder holds.
func (d *Decoder) Close() { d.z.Close() }

// maxStream bounds the stream of a piece of n bytes: the worst is one byte an instruction.
func maxStream(n int) uint64 { return uint64(n)*(1+2*binary.MaxVarintLen64) + MaxOverhead }

// Decode makes the new version of a piece in dst from its body. old is the old
// version, as long as dst; copyOld fills p from offset off of the old region and
// refuses what is out of range or not old any more. dst must not overlap old. On
// an error the content of dst is unspecified.
func (d *Decoder) Decode(dst, old, body []byte, copyOld func(p []byte, off int64) error) error {
	if len(body) == 0 {
		return corrupt("empty body")
	}
	if len(dst) > MaxPiece || len(old) != len(dst) {
		return fmt.Errorf("piece of %d bytes, old version of %d: %w", len(dst), len(old), region.ErrOutOfRange)
	}
	s := body[1:]
	switch body[0] {
	case packNone:
	case packZstd:
		var h zstd.Header
		if err := h.Decode(s); err != nil {
			return corrupt("zstd header: %w", err)
		}
		// Refused before memory is taken: a stream is not longer than its piece and some.
		if !h.HasFCS || h.FrameContentSize > uint64(len(dst)+MaxOverhead) {
			return corrupt("zstd stream of %d bytes (known: %t) for a piece of %d", h.FrameContentSize, h.HasFCS, len(dst))
		}
		var err error
		if d.stream, err = d.z.DecodeAll(s, d.stream[:0]); err != nil {
			return corrupt("zstd: %w", err)
		}
		s = d.stream
	default:
		return corrupt("packing %d", body[0])
	}
	at := 0
	for len(s) > 0 {
		v, k := binary.Uvarint(s)
		if k <= 0 {
			return corrupt("instruction at byte %d of the piece", at)
		}
		s = s[k:]
		n := v >> 2
		if n == 0 || n > uint64(len(dst)-at) {
			return corrupt("length %d at byte %d of a piece of %d", n, at, len(dst))
		}
		p := dst[at : at+int(n)]
		switch v & 3 {
		case opSame:
			copy(p, old[at:])
		case opNew:
			if uint64(len(s)) < n {
				return corrupt("%d new bytes at byte %d, but %d follow", n, at, len(s))
			}
			copy(p, s)
			s = s[n:]
		case opCopy:
			off, k := binary.Uvarint(s)
			if k <= 0 || off > 1<<62 {
				return corrupt("offset of a copy at byte %d of the piece", at)
			}
			s = s[k:]
			if err := copyOld(p, int64(off)); err != nil {
				return corrupt("copy of %d bytes from %d: %w", n, off, err)
			}
		case opZero:
			clear(p)
		}
		at += int(n)
	}
	if at != len(dst) {
		return corrupt("%d bytes of a piece of %d", at, len(dst))
	}
	return nil
}

// writer appends instructions, joining those that continue each other.
type writer struct {
	b    []byte
	piec []byte // the new version
	kind uint64
	from int // first byte of the pending run
	to   int
	off  int64 // of a pending copy
}

func (w *writer) add(kind uint64, n int, off int64) {
	if n == 0 {
		return
	}
	if kind == w.kind && (kind != opCopy || off == w.off+int64(w.to-w.from)) {
		w.to += n
		return
	}
	w.flush()
	w.kind, w.off, w.to = kind, off, w.from+n
}

func (w *writer) flush() {
	if w.to > w.from {
		w.b = binary.AppendUvarint(w.b, uint64(w.to-w.from)<<2|w.kind)
		switch w.kind {
		case opNew:
			w.b = append(w.b, w.piec[w.from:w.to]...)
		case opCopy:
			w.b = binary.AppendUvarint(w.b, uint64(w.off))
		}
	}
	w.from = w.to
}
