package delta

import (
	"fmt"
	"math/bits"
	"time"

	"encoding/binary"

	"github.com/klauspost/compress/zstd"
)

// Mode says which encodings an Encoder may use.
type Mode string

// The modes.
const (
	Auto   Mode = "auto"   // all, each where it pays by what was measured
	Whole  Mode = "whole"  // the piece as it is
	Blocks Mode = "blocks" // blocks of 4 KiB that changed
	Runs   Mode = "runs"   // bytes that changed, against a copy of the old version: what xor and zero runs leave
	Moved  Mode = "moved"  // blocks, and blocks found elsewhere (rolling checksum)
	Zstd   Mode = "zstd"   // blocks, always compressed
)

// Modes lists the modes.
func Modes() []string {
	return []string{string(Auto), string(Whole), string(Blocks), string(Runs), string(Moved), string(Zstd)}
}

// Piece is what is to be encoded.
type Piece struct {
	New []byte // the new version, 1 to MaxPiece bytes
	// Around is New with up to Block-1 bytes before it and behind it, as of the same
	// moment, and Lead how many before; nil is without any.
	Around []byte
	Lead   int
	Off    int64  // in the region; a multiple of Block
	Old    []byte // the old version where there is one here, else nil
	Index  *Index // of what the other side has, else nil
	// Usable says which part of the old region the other side can still copy
	// from; nil is none.
	Usable func(off, n int64) bool
}

// around is the piece with what is around it, and where in that it begins.
func (p Piece) around() ([]byte, int) {
	if p.Around == nil {
		return p.New, 0
	}
	return p.Around, p.Lead
}

// Encoder encodes pieces. It measures how fast it compresses and to what, to
// decide whether that pays on the link. It is used by one goroutine; Close frees it.
type Encoder struct {
	mode Mode
	z    *zstd.Encoder
	buf  [3][]byte

	zrate, zratio float64 // bytes compressed a second; compressed by uncompressed size
	samples       int
	srate         float64 // bytes of a piece searched a second
	barren        bool    // nothing that had moved was found in the last piece that was searched
}

// NewEncoder returns an encoder of the mode.
func NewEncoder(mode Mode) (*Encoder, error) {
	z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true),
		zstd.WithWindowSize(MaxPiece), zstd.WithLowerEncoderMem(true)) // else 8 MiB of history, for pieces of 1
	if err != nil {
		return nil, fmt.Errorf("zstd: %w", err)
	}
	return &Encoder{mode: mode, z: z}, nil
}

// Close frees what the encoder holds.
func (e *Encoder) Close() { _ = e.z.Close() }

// Encode returns the body of a piece, valid until the next call; link is the
// rate at which bodies leave, in bytes a second, 0 where it is not known.
func (e *Encoder) Encode(p Piece, link float64) []byte {
	s := e.stream(p, link)
	if len(s) > len(p.New)+MaxOverhead-1 {
		s = e.write(1, p, func(w *writer) { w.add(opNew, len(p.New), 0) })
	}
	if z := e.pack(s, link); z != nil {
		return z
	}
	e.buf[2] = append(append(e.buf[2][:0], packNone), s...)
	return e.buf[2]
}

// write makes a stream in buffer i.
func (e *Encoder) write(i int, p Piece, f func(*writer)) []byte {
	w := &writer{b: e.buf[i][:0], piec: p.New}
	f(w)
	w.flush()
	e.buf[i] = w.b
	return w.b
}

// stream makes the shortest stream that the mode allows.
func (e *Encoder) stream(p Piece, link float64) []byte {
	s := e.write(0, p, func(w *writer) {
		switch {
		case e.mode == Whole:
			w.add(opNew, len(p.New), 0)
		case p.Old != nil && (e.mode == Auto || e.mode == Runs):
			runs(w, p.Old)
		default:
			blocks(w, p)
		}
	})
	if !e.Searches() || p.Index == nil || p.Usable == nil || len(s) < min(len(p.New)/2, searched) {
		return s
	}
	p.Index.refresh()
	// Each byte is looked at where something has moved lately, or where that takes less time than
	// to send it. Else every now and then, which is enough to find long runs.
	if e.barren && (link == 0 || link > e.srate/2) {
		p.Index.probe(p.New, p.Off, func(_ int, from int64) bool {
			e.barren = !p.Usable(from, Block)
			return e.barren
		})
		if e.barren {
			return s
		}
	}
	begin, found := time.Now(), 0
	m := e.write(1, p, func(w *writer) { found = p.Index.moved(w, p) })
	e.barren = found == 0
	if took := time.Since(begin).Seconds(); e.barren && took > 0 { // what is found is skipped, and takes no time
		e.srate = float64(len(p.New)) / took
	}
	if len(m) < len(s) {
		return m
	}
	return s
}

// searched is how many new bytes are worth a search for where they may come from.
const searched = 64 << 10

// Searches reports whether pieces of which much has changed are searched for blocks that have moved.
func (e *Encoder) Searches() bool { return e.mode == Auto || e.mode == Moved }

// blocks leaves out the blocks that the other side has in the same place, and zeroes.
func blocks(w *writer, p Piece) {
	for at := 0; at < len(p.New); at += Block {
		b := p.New[at:min(at+Block, len(p.New))]
		switch {
		case p.Index != nil && p.Index.same((p.Off+int64(at))/Block, b):
			w.add(opSame, len(b), 0)
		case zeroes(b):
			w.add(opZero, len(b), 0)
		default:
			w.add(opNew, len(b), 0)
		}
	}
}

// least is the shortest run of equal bytes that is worth an instruction of its own.
const least = 8

// runs leaves out runs of bytes that are as before.
func runs(w *writer, old []byte) {
	p := w.piec
	for at := 0; at < len(p); {
		n := equal(p[at:], old[at:])
		if n >= least || at+n == len(p) {
			w.add(opSame, n, 0)
			at += n
			n = 0
		}
		from := at
		for at += n; at < len(p); at++ { // to the next run of equal bytes
			if p[at] == old[at] && (len(p)-at < least || equal(p[at:at+least], old[at:]) == least) {
				break
			}
		}
		w.add(opNew, at-from, 0)
	}
}

// equal is the length of the longest common prefix; b is at least as long as a.
func equal(a, b []byte) (n int) {
	for len(a)-n >= 8 {
		if x := binary.LittleEndian.Uint64(a[n:]) ^ binary.LittleEndian.Uint64(b[n:]); x != 0 {
			return n + bits.TrailingZeros64(x)/8
		}
		n += 8
	}
	for n < len(a) && a[n] == b[n] {
		n++
	}
	return n
}

// worth is the shortest stream that is compressed.
const worth = 512

// pack compresses a stream where that pays: the time to compress and to send
// what is left is below the time to send it as it is. It returns nil where not.
func (e *Encoder) pack(s []byte, link float64) []byte {
	switch {
	case e.mode != Zstd && (e.mode != Auto || len(s) < worth):
		return nil
	case e.mode == Auto && e.samples > 0 && e.samples%64 != 0:
		// Unknown rates look like a fast link: sending is never made slower on a guess.
		if link == 0 || 1/e.zrate+e.zratio/link >= 1/link {
			e.samples++
			return nil
		}
	}
	e.samples++
	begin := time.Now()
	e.buf[2] = e.z.EncodeAll(s, append(e.buf[2][:0], packZstd))
	took := time.Since(begin).Seconds()
	ratio := float64(len(e.buf[2])) / float64(len(s))
	if took > 0 {
		const weight = 0.3
		rate := float64(len(s)) / took
		if e.zrate == 0 {
			e.zrate, e.zratio = rate, ratio
		}
		e.zrate += weight * (rate - e.zrate)
		e.zratio += weight * (ratio - e.zratio)
	}
	if len(e.buf[2]) > len(s) { // one byte says how it is packed either way
		return nil
	}
	return e.buf[2]
}
