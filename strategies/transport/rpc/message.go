// Package rpc is what those transports share that are made of a library for
// remote procedure calls (gRPC, dRPC, JSON-RPC) or of its own streams (QUIC): the
// messages, the client as a region.Store over one or more connections, and the
// source's side of a connection. A transport adds how a message travels.
package rpc

import (
	"fmt"
	"math"

	"google.golang.org/protobuf/encoding/protowire"

	"memsync/strategies/region"
)

// Op is what a Request asks for.
type Op uint8

// The operations.
const (
	OpOpen Op = iota + 1
	OpRead
	OpWrite
	OpFlush
	OpTrim
	OpZero
	OpCache
	OpExtents
)

var opNames = [...]string{OpOpen: "open", OpRead: "read", OpWrite: "write", OpFlush: "flush", OpTrim: "trim", OpZero: "write zeroes", OpCache: "cache", OpExtents: "extents"}

func (o Op) String() string {
	if o > 0 && int(o) < len(opNames) {
		return opNames[o]
	}
	return fmt.Sprintf("operation %d", uint8(o))
}

// writes reports whether the operation changes the region.
func (o Op) writes() bool { return o == OpWrite || o == OpTrim || o == OpZero }

// Limits of all messages, in bytes. Both sides refuse what is beyond.
const (
	MaxData  = 4 << 20  // of a read or write
	MaxHead  = 64 << 10 // of all but its data
	maxName  = 4096
	maxText  = 512  // of an error's message
	maxRuns  = 4096 // extents in one reply
	dataTag  = 15
	maxField = 15
)

// Request is one request.
type Request struct {
	ID     uint64 `json:"-"` // of a stream of requests
	Op     Op     `json:"op"`
	Off    int64  `json:"off"`    // bytes
	Length int64  `json:"length"` // bytes
	Hole   bool   `json:"hole,omitempty"`
	Name   string `json:"name,omitempty"`
	Writer string `json:"writer,omitempty"`
	Data   []byte `json:"data,omitempty"`

	Free func() `json:"-"` // gives back what Session.Admit gave, for transports that admit a request before its method is called
}

// Reply is the answer.
type Reply struct {
	ID       uint64          `json:"-"`
	Status   Status          `json:"status"`
	Message  string          `json:"message,omitempty"`
	Size     int64           `json:"size,omitempty"` // bytes
	Epoch    uint32          `json:"epoch,omitempty"`
	Offers   uint32          `json:"offers,omitempty"` // bit n: Op n
	ReadOnly bool            `json:"read_only,omitempty"`
	Extents  []region.Extent `json:"extents,omitempty"`
	Data     []byte          `json:"data,omitempty"`

	// Into, where it is not nil, is where a read's data go on the client's side. Data
	// of another length are an error.
	Into []byte `json:"-"`

	release func() // gives Data back; nil where they are nobody's
}

// Release gives back the memory of a reply that the source made. Data must not
// be used any more. It may be called twice.
func (r *Reply) Release() {
	if r.release != nil {
		r.release()
		r.release = nil
	}
}

// After makes Release call f too.
func (r *Reply) After(f func()) {
	first := r.release
	r.release = func() {
		if first != nil {
			first()
		}
		f()
	}
}

func appendUint(b []byte, field protowire.Number, v uint64) []byte {
	if v == 0 {
		return b
	}
	return protowire.AppendVarint(protowire.AppendTag(b, field, protowire.VarintType), v)
}

func appendText(b []byte, field protowire.Number, s string) []byte {
	if s == "" {
		return b
	}
	return protowire.AppendString(protowire.AppendTag(b, field, protowire.BytesType), s)
}

func appendData(b []byte, n int) []byte {
	if n == 0 {
		return b
	}
	return protowire.AppendVarint(protowire.AppendTag(b, dataTag, protowire.BytesType), uint64(n))
}

func flag(b bool) uint64 {
	if b {
		return 1
	}
	return 0
}

// fields appends all but the data.
func (q *Request) fields(b []byte) []byte {
	b = appendUint(b, 1, q.ID)
	b = appendUint(b, 2, uint64(q.Op))
	b = appendUint(b, 3, uint64(q.Off))
	b = appendUint(b, 4, uint64(q.Length))
	b = appendUint(b, 5, flag(q.Hole))
	b = appendText(b, 6, q.Name)
	return appendText(b, 7, q.Writer)
}

// AppendHead appends the message up to its data, which must follow.
func (q *Request) AppendHead(b []byte) []byte { return appendData(q.fields(b), len(q.Data)) }

// fields appends all but the data.
func (r *Reply) fields(b []byte) []byte {
	b = appendUint(b, 1, r.ID)
	b = appendUint(b, 2, uint64(r.Status))
	b = appendText(b, 3, r.Message)
	b = appendUint(b, 4, uint64(r.Size))
	b = appendUint(b, 5, uint64(r.Epoch))
	b = appendUint(b, 6, uint64(r.Offers))
	b = appendUint(b, 7, flag(r.ReadOnly))
	if len(r.Extents) > 0 {
		var runs []byte
		for _, e := range r.Extents {
			runs = protowire.AppendVarint(runs, uint64(e.Length)<<2|flag(e.Hole)|flag(e.Zero)<<1)
		}
		b = protowire.AppendBytes(protowire.AppendTag(b, 8, protowire.BytesType), runs)
	}
	return b
}

// AppendHead appends the message up to its data, which must follow.
func (r *Reply) AppendHead(b []byte) []byte { return appendData(r.fields(b), len(r.Data)) }

// decoder takes a message apart. What it gives belongs to the message.
type decoder struct {
	what string
	b    []byte
	err  error
}

func (d *decoder) fail(format string, a ...any) {
	if d.err == nil {
		d.err = fmt.Errorf("%s: %s: %w", d.what, fmt.Sprintf(format, a...), ErrProtocol)
	}
}

// next returns the next field: a number or bytes. Unknown fields are skipped.
func (d *decoder) next() (field protowire.Number, v uint64, p []byte, ok bool) {
	for d.err == nil && len(d.b) > 0 {
		num, typ, n := protowire.ConsumeTag(d.b)
		if n < 0 {
			d.fail("no field where one is due")
			break
		}
		d.b = d.b[n:]
		switch typ {
		case protowire.VarintType:
			v, n = protowire.ConsumeVarint(d.b)
		case protowire.BytesType:
			p, n = protowire.ConsumeBytes(d.b)
		default:
			n = protowire.ConsumeFieldValue(num, typ, d.b)
			num = maxField + 1
		}
		if n < 0 {
			d.fail("field %d is cut short", num)
			break
		}
		d.b = d.b[n:]
		if num > maxField || (typ == protowire.BytesType) != isBytes(num, d.what) {
			v, p = 0, nil
			continue
		}
		return num, v, p, true
	}
	return 0, 0, nil, false
}

const (
	requestName = "request"
	replyName   = "reply"
)

// isBytes reports whether a field is a text, bytes or packed numbers.
func isBytes(field protowire.Number, what string) bool {
	if what == requestName {
		return field == 6 || field == 7 || field == dataTag
	}
	return field == 3 || field == 8 || field == dataTag
}

func (d *decoder) size(field string, v uint64) int64 {
	if v > math.MaxInt64 {
		d.fail("%s %d", field, v)
		return 0
	}
	return int64(v)
}

func (d *decoder) small(field string, v, most uint64) uint64 {
	if v > most {
		d.fail("%s %d, at most %d", field, v, most)
		return 0
	}
	return v
}

func (d *decoder) text(field string, p []byte, most int) string {
	if len(p) > most {
		d.fail("%s of %d bytes, the limit is %d", field, len(p), most)
		return ""
	}
	return string(p)
}

// Decode takes a request from b, which Data then points into.
func (q *Request) Decode(b []byte) error {
	*q = Request{}
	d := decoder{what: requestName, b: b}
	for {
		field, v, p, ok := d.next()
		if !ok {
			return d.err
		}
		switch field {
		case 1:
			q.ID = v
		case 2:
			q.Op = Op(d.small("op", v, math.MaxUint8))
		case 3:
			q.Off = d.size("offset", v)
		case 4:
			q.Length = d.size("length", v)
		case 5:
			q.Hole = v != 0
		case 6:
			q.Name = d.text("name", p, maxName)
		case 7:
			q.Writer = d.text("writer", p, maxName)
		case dataTag:
			if len(p) > MaxData {
				d.fail("data of %d bytes, the limit is %d", len(p), MaxData)
			}
			q.Data = p
		}
	}
}

// Decode takes a reply from b. Data are copied to Into where that is set, and
// point into b else.
func (r *Reply) Decode(b []byte) error {
	*r = Reply{Into: r.Into}
	d := decoder{what: replyName, b: b}
	for {
		field, v, p, ok := d.next()
		if !ok {
			if d.err == nil && r.Status == 0 && r.Into != nil && len(r.Data) != len(r.Into) {
				d.fail("%d bytes of data where %d were asked for", len(r.Data), len(r.Into))
			}
			return d.err
		}
		switch field {
		case 1:
			r.ID = v
		case 2:
			r.Status = Status(d.small("status", v, math.MaxUint8))
		case 3:
			r.Message = d.text("message", p, MaxHead)
		case 4:
			r.Size = d.size("size", v)
		case 5:
			r.Epoch = uint32(d.small("epoch", v, math.MaxUint32))
		case 6:
			r.Offers = uint32(d.small("offers", v, math.MaxUint32))
		case 7:
			r.ReadOnly = v != 0
		case 8:
			r.runs(&d, p)
		case dataTag:
			switch {
			case len(p) > MaxData:
				d.fail("data of %d bytes, the limit is %d", len(p), MaxData)
			case r.Into == nil:
				r.Data = p
			case len(p) == len(r.Into):
				copy(r.Into, p)
				r.Data = r.Into
			default:
				d.fail("%d bytes of data where %d were asked for", len(p), len(r.Into))
			}
		}
	}
}

func (r *Reply) runs(d *decoder, p []byte) {
	for len(p) > 0 && d.err == nil {
		v, n := protowire.ConsumeVarint(p)
		if n < 0 || v>>2 == 0 || len(r.Extents) == maxRuns {
			d.fail("extents")
			return
		}
		p = p[n:]
		r.Extents = append(r.Extents, region.Extent{Length: int64(v >> 2), Hole: v&1 != 0, Zero: v&2 != 0})
	}
}
