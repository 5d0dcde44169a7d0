package shm

import (
	"encoding/binary"
	"fmt"

	"memsync/strategies/region"
)

// Messages of mode cow, each one packet of the socket: the client says hello once,
// with its userfaultfd beside (SCM_RIGHTS), and then asks for images; the host answers each.
const (
	// MaxMessage bounds a message, in bytes.
	MaxMessage = 1024

	helloKind  = 1
	askKind    = 2
	answerKind = 3

	messageHead = 16 // magic, version, kind
	helloLength = messageHead + 32
)

// Hello is where the client has its mappings.
type Hello struct {
	Base          uintptr // of the region
	Length        int64   // bytes, whole pages
	ControlBase   uintptr // of ProtectedControl
	ControlLength int64
}

func head(kind uint32) []byte {
	b := make([]byte, 0, helloLength)
	b = binary.LittleEndian.AppendUint64(b, controlMagic)
	b = binary.LittleEndian.AppendUint32(b, version)
	return binary.LittleEndian.AppendUint32(b, kind)
}

// Encode makes the message.
func (h Hello) Encode() []byte {
	b := head(helloKind)
	for _, v := range []uint64{uint64(h.Base), uint64(h.Length), uint64(h.ControlBase), uint64(h.ControlLength)} {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return b
}

// EncodeAsk makes the message that asks for an image.
func EncodeAsk() []byte { return head(askKind) }

// EncodeAnswer makes an answer; nil is yes.
func EncodeAnswer(err error) []byte {
	b := head(answerKind)
	if err != nil {
		b = append(b, err.Error()...)
	}
	return b[:min(len(b), MaxMessage)]
}

// Decode takes a client's message apart: a hello, or none where it asks for an image.
// Errors: region.ErrMismatch.
func Decode(b []byte) (h *Hello, err error) {
	kind, err := decodeHead(b)
	if err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	switch {
	case kind == askKind && len(b) == messageHead:
		return nil, nil
	case kind == helloKind && len(b) == helloLength:
		return &Hello{Base: uintptr(le.Uint64(b[16:])), Length: int64(le.Uint64(b[24:])),
			ControlBase: uintptr(le.Uint64(b[32:])), ControlLength: int64(le.Uint64(b[40:]))}, nil
	}
	return nil, fmt.Errorf("message of kind %d with %d bytes: %w", kind, len(b), region.ErrMismatch)
}

func decodeHead(b []byte) (kind uint32, err error) {
	le := binary.LittleEndian
	if len(b) < messageHead || le.Uint64(b) != controlMagic {
		return 0, fmt.Errorf("%d bytes that are no message: %w", len(b), region.ErrMismatch)
	}
	if v := le.Uint32(b[8:]); v != version {
		return 0, fmt.Errorf("message of version %d, not %d: %w", v, version, region.ErrMismatch)
	}
	return le.Uint32(b[12:]), nil
}

// DecodeAnswer returns the host's error; nil where it said yes.
func DecodeAnswer(b []byte) error {
	kind, err := decodeHead(b)
	if err == nil && kind != answerKind {
		err = fmt.Errorf("an answer of kind %d: %w", kind, region.ErrMismatch)
	}
	if err == nil && len(b) > messageHead {
		err = fmt.Errorf("the host says: %s: %w", b[messageHead:], region.ErrNotPermitted)
	}
	return err
}
