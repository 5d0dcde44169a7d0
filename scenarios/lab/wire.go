package lab

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
)

// The line between Run and the guest's init carries frames both ways: a kind,
// the payload's length (2 bytes, little endian) and the payload. The guest
// speaks first, once its end of the line passes bytes unchanged.
const (
	frameReady  = 'r' // guest: the kernel has booted
	frameSpec   = 'c' // host: the command, in several frames; an empty one ends it
	frameStdin  = 'i' // host: standard input; an empty one is its end
	frameCredit = 'w' // guest: that many bytes of the command or of input were taken (4 bytes)
	frameSignal = 's' // host: send the command's process group this signal (1 byte)
	frameStdout = 'o' // guest
	frameStderr = 'e' // guest
	frameFailed = 'f' // guest: the command could not be set up: why
	frameExit   = 'x' // guest: exit status (4 bytes); files are written back

	maxFrame = 4096

	// The guest's serial driver is slow to recover once its line discipline's
	// buffer (4096 bytes) is full: of the frames that may be long, the host
	// keeps less than that in flight and leaves room for signals.
	inputFrame  = 1 << 10
	inputWindow = 3 << 10
)

// writeFrame writes p as one frame, or as several if it is long, in one call:
// frames of different writers do not mix if their calls do not.
func writeFrame(w io.Writer, kind byte, p []byte) error {
	b := make([]byte, 0, len(p)+3+len(p)/maxFrame*3)
	for {
		n := min(len(p), maxFrame)
		b = append(b, kind)
		b = binary.LittleEndian.AppendUint16(b, uint16(n))
		b = append(b, p[:n]...)
		if p = p[n:]; len(p) == 0 {
			break
		}
	}
	_, err := w.Write(b)
	return err
}

type frameReader struct {
	r   *bufio.Reader
	buf [maxFrame]byte
}

func newFrameReader(r io.Reader) *frameReader {
	return &frameReader{r: bufio.NewReaderSize(r, 4*maxFrame)}
}

// next returns the next frame. The payload is valid until the next call.
func (f *frameReader) next() (kind byte, p []byte, err error) {
	var head [3]byte
	if _, err := io.ReadFull(f.r, head[:]); err != nil {
		return 0, nil, err
	}
	n := int(binary.LittleEndian.Uint16(head[1:]))
	if n > maxFrame {
		return 0, nil, fmt.Errorf("frame %q of %d bytes: at most %d", head[0], n, maxFrame)
	}
	_, err = io.ReadFull(f.r, f.buf[:n])
	return head[0], f.buf[:n], err
}

func encodeInt(n int) []byte { return binary.LittleEndian.AppendUint32(nil, uint32(n)) }

func decodeInt(p []byte) int {
	if len(p) != 4 {
		return -1
	}
	return int(binary.LittleEndian.Uint32(p))
}

// spec is the command as it crosses the line: it holds the environment, which
// may hold secrets, and so is never written to a file.
type spec struct {
	Args, Env          []string
	Dir, Work, Modules string
	Udevd              string // its program, empty for none
}

func (s spec) encode() []byte {
	var b bytes.Buffer
	for _, list := range [][]string{{s.Dir, s.Work, s.Modules, s.Udevd}, s.Args, s.Env} {
		b.Write(encodeInt(len(list)))
		for _, v := range list {
			b.Write(encodeInt(len(v)))
			b.WriteString(v)
		}
	}
	return b.Bytes()
}

func decodeSpec(b []byte) (s spec, err error) {
	r := bytes.NewReader(b)
	number := func() int {
		var p [4]byte
		if _, e := io.ReadFull(r, p[:]); e != nil {
			err = fmt.Errorf("command of %d bytes: %w", len(b), e)
			return 0
		}
		n := decodeInt(p[:])
		if n > r.Len() {
			err = fmt.Errorf("command of %d bytes: a length of %d with %d left", len(b), n, r.Len())
			return 0
		}
		return n
	}
	list := func() (l []string) {
		for n := number(); n > 0 && err == nil; n-- {
			p := make([]byte, number())
			_, _ = io.ReadFull(r, p)
			l = append(l, string(p))
		}
		return l
	}
	head := list()
	s.Args, s.Env = list(), list()
	if err == nil && (len(head) != 4 || len(s.Args) == 0 || r.Len() != 0) {
		err = fmt.Errorf("command of %d bytes: %d folders, %d arguments, %d bytes left over", len(b), len(head), len(s.Args), r.Len())
	}
	if err == nil {
		s.Dir, s.Work, s.Modules, s.Udevd = head[0], head[1], head[2], head[3]
	}
	return s, err
}
