package hashsync

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"memsync/strategies/delta"
	"memsync/strategies/region"
)

// The protocol, docs/hashsync-protocol.md. A frame is a header of 16 bytes, big
// endian, and a body.
const (
	magic      = "memsyncH"
	version    = 1
	headerSize = 16

	maxBody    = delta.MaxPiece + delta.MaxOverhead + deltaHead
	maxName    = 255
	maxText    = 1024
	maxRegions = 1024
	maxSize    = 1 << 46
	deltaHead  = 8 + 4 + checkSize
	checkSize  = 16
	digestSize = 32 // SHA-256
)

// The types of frames. Down is from the source's side to the destination's.
const (
	frameHello  = 1 + iota // both, first: magic, version
	frameOpen              // up: a region's name
	frameOpened            // down: size, chunk, name of the hash
	framePrints            // up: digests of what the destination has
	frameDelta             // down: a piece of a round
	frameEnd               // down: the round's end and the region's digest
	frameAck               // up: what became of the round
	frameStable            // down: all destinations have the round
	frameError             // both: why this region or connection ends
	framePing              // both: somebody is there
	frameTake              // up: a request of the hand-over
	frameTaken             // down: its answer
)

// Flags.
const (
	flagLast    = 1 // prints: no more follow
	flagEmpty   = 2 // prints: nothing is there, all is wanted
	flagPartial = 1 // end: more is to come before the region equals the source's
)

// What an ack says.
const (
	ackEqual    = 0 // the region has the digest
	ackPartial  = 1
	ackMismatch = 2 // it has another one; prints follow
)

// Codes of frameError.
const (
	codeProtocol = 1 + iota
	codeMissing
	codeResized
	codeFailed
)

type frame struct {
	kind, flags byte
	region      uint16
	round       uint64
	body        []byte
}

// errProtocol marks a peer that breaks the protocol; it matches region.ErrMismatch
// nowhere, since no byte of a region was touched.
var errProtocol = errors.New("hashsync protocol")

func protocol(format string, args ...any) error {
	return fmt.Errorf("%w: %w", errProtocol, fmt.Errorf(format, args...))
}

// remoteError is what the peer said in a frameError.
type remoteError struct {
	code uint16
	text string
}

func (e *remoteError) Error() string { return "the peer says: " + e.text }

func (e *remoteError) Is(target error) bool {
	return e.code == codeMissing && target == region.ErrMissing || e.code == codeResized && target == region.ErrMismatch
}

// encode appends a frame.
func (f frame) encode(b []byte) []byte {
	b = append(b, f.kind, f.flags)
	b = binary.BigEndian.AppendUint16(b, f.region)
	b = binary.BigEndian.AppendUint32(b, uint32(len(f.body)))
	b = binary.BigEndian.AppendUint64(b, f.round)
	return append(b, f.body...)
}

// readFrame reads a frame into buf, which grows to maxBody at most. The length
// is checked before memory is taken.
func readFrame(r io.Reader, buf []byte) (f frame, _ []byte, err error) {
	var h [headerSize]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return f, buf, err
	}
	f = frame{kind: h[0], flags: h[1], region: binary.BigEndian.Uint16(h[2:]), round: binary.BigEndian.Uint64(h[8:])}
	n := binary.BigEndian.Uint32(h[4:])
	lo, hi := uint32(0), uint32(0)
	switch f.kind {
	case frameHello:
		lo, hi = uint32(len(magic)+2), uint32(len(magic)+2)
	case frameOpen:
		hi = maxName
	case frameOpened:
		lo, hi = 12+1, 12+maxName
	case framePrints:
		hi = delta.MaxPiece
	case frameDelta:
		lo, hi = deltaHead+1, maxBody
	case frameEnd:
		hi = digestSize
	case frameAck:
		lo, hi = 1, 1
	case frameStable, framePing:
	case frameError:
		lo, hi = 2, 2+maxText
	case frameTake:
		lo, hi = takeSize, takeSize
	case frameTaken:
		lo, hi = takenSize, takenSize+maxText
	default:
		return f, buf, protocol("frame type %d", f.kind)
	}
	if n < lo || n > hi {
		return f, buf, protocol("length %d of a frame of type %d, want %d to %d", n, f.kind, lo, hi)
	}
	if uint32(cap(buf)) < n {
		buf = make([]byte, n)
	}
	f.body = buf[:n]
	if _, err := io.ReadFull(r, f.body); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return f, buf, fmt.Errorf("body of %d bytes of a frame of type %d: %w", n, f.kind, err)
	}
	return f, buf, nil
}

func hello() frame {
	return frame{kind: frameHello, body: binary.BigEndian.AppendUint16([]byte(magic), version)}
}

func (f frame) checkHello() error {
	switch {
	case f.kind != frameHello:
		return protocol("frame of type %d before hello", f.kind)
	case string(f.body[:len(magic)]) != magic:
		return protocol("magic %q, want %q", f.body[:len(magic)], magic)
	case binary.BigEndian.Uint16(f.body[len(magic):]) != version:
		return protocol("version %d, want %d", binary.BigEndian.Uint16(f.body[len(magic):]), version)
	}
	return nil
}

// opened is the body of frameOpened.
type opened struct {
	size, chunk int64
	hash        string
}

func (o opened) encode() []byte {
	b := binary.BigEndian.AppendUint64(nil, uint64(o.size))
	b = binary.BigEndian.AppendUint32(b, uint32(o.chunk))
	return append(b, o.hash...)
}

func parseOpened(b []byte) (o opened, err error) {
	size, chunk := binary.BigEndian.Uint64(b), int64(binary.BigEndian.Uint32(b[8:]))
	if size < 1 || size > maxSize {
		return o, protocol("size %d, want 1 to %d", size, int64(maxSize))
	}
	if err := checkChunk(chunk); err != nil {
		return o, protocol("%w", err)
	}
	if n := region.Chunks(int64(size), chunk); n > maxChunks {
		return o, protocol("%d chunks, want at most %d", n, maxChunks)
	}
	return opened{int64(size), chunk, string(b[12:])}, nil
}

// maxChunks bounds the table of digests: 16 Mi chunks are 64 GiB in pages.
const maxChunks = 16 << 20

func checkChunk(chunk int64) error {
	if err := region.CheckChunk(chunk); err != nil {
		return err
	}
	if chunk > delta.MaxPiece {
		return fmt.Errorf("chunk size %d: at most %d", chunk, delta.MaxPiece)
	}
	return nil
}

// piece is the body of frameDelta.
type piece struct {
	off   int64
	n     int
	check [checkSize]byte // of the digests of its chunks
	body  []byte
}

func (p piece) encode() []byte {
	b := make([]byte, 0, deltaHead+len(p.body))
	b = binary.BigEndian.AppendUint64(b, uint64(p.off))
	b = binary.BigEndian.AppendUint32(b, uint32(p.n))
	b = append(b, p.check[:]...)
	return append(b, p.body...)
}

func parsePiece(b []byte, size, chunk int64) (p piece, err error) {
	off, n := binary.BigEndian.Uint64(b), int64(binary.BigEndian.Uint32(b[8:]))
	if off >= uint64(size) || int64(off)%chunk != 0 {
		return p, protocol("offset %d of a piece: want a multiple of %d below %d", off, chunk, size)
	}
	end := int64(off) + n
	if n < 1 || n > delta.MaxPiece || end > size || end%chunk != 0 && end != size {
		return p, protocol("length %d of a piece at %d: want whole chunks of %d, at most %d", n, off, chunk, delta.MaxPiece)
	}
	copy(p.check[:], b[12:])
	p.off, p.n, p.body = int64(off), int(n), b[deltaHead:]
	return p, nil
}

func errorFrame(id uint16, err error) frame {
	code := uint16(codeFailed)
	switch {
	case errors.Is(err, errProtocol):
		code = codeProtocol
	case errors.Is(err, region.ErrMissing):
		code = codeMissing
	case errors.Is(err, errResized):
		code = codeResized
	}
	text := err.Error()
	return frame{kind: frameError, region: id, body: append(binary.BigEndian.AppendUint16(nil, code), text[:min(len(text), maxText)]...)}
}

func (f frame) remoteError() error {
	return &remoteError{binary.BigEndian.Uint16(f.body), string(f.body[2:])}
}

// Deadlines of a connection: silence means that it is lost.
const (
	pingEvery = time.Second
	silence   = 10 * time.Second
)

// gone makes errors of a lost connection match region.ErrPeerGone.
func gone(err error) error {
	if err == nil || errors.Is(err, errProtocol) || errors.Is(err, region.ErrPeerGone) {
		return err
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.ErrClosedPipe) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, syscall.ETIMEDOUT) {
		return fmt.Errorf("%w: %w", err, region.ErrPeerGone)
	}
	return err
}
