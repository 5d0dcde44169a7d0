package nbd

import (
	"encoding/binary"
	"fmt"
)

// Names and values as in doc/proto.md of the NBD project; extended headers as
// in its branch extension-ext-header. Everything is big endian on the wire.
const (
	magicInit     = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption   = 0x49484156454f5054 // "IHAVEOPT"
	magicOld      = 0x00420281861253   // oldstyle servers send it in place of magicOption
	magicOptReply = 0x0003e889045565a9

	magicRequest         = 0x25609513
	magicReply           = 0x67446698
	magicStructuredReply = 0x668e33ef
	magicExtendedRequest = 0x21e41c71
	magicExtendedReply   = 0x6e8a278c
)

// Handshake and client flags.
const (
	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1
)

// Flags are the transmission flags of an export.
type Flags uint16

// The transmission flags.
const (
	FlagHasFlags      Flags = 1 << 0
	FlagReadOnly      Flags = 1 << 1
	FlagFlush         Flags = 1 << 2
	FlagFUA           Flags = 1 << 3
	FlagRotational    Flags = 1 << 4
	FlagTrim          Flags = 1 << 5
	FlagWriteZeroes   Flags = 1 << 6
	FlagDF            Flags = 1 << 7
	FlagMultiConn     Flags = 1 << 8
	FlagCache         Flags = 1 << 10
	FlagFastZero      Flags = 1 << 11
	flagStatusPayload Flags = 1 << 12
)

// Handshake values.
const (
	exportNameZeroes = 124

	repAck              = 1
	repServer           = 2
	repInfo             = 3
	repMetaContext      = 4
	repErr              = 1 << 31
	repErrUnsup         = repErr + 1
	repErrPolicy        = repErr + 2
	repErrInvalid       = repErr + 3
	repErrPlatform      = repErr + 4
	repErrTLSReqd       = repErr + 5
	repErrUnknown       = repErr + 6
	repErrShutdown      = repErr + 7
	repErrBlockSizeReqd = repErr + 8
	repErrTooBig        = repErr + 9
	repErrExtHeaderReqd = repErr + 10

	infoExport      = 0
	infoName        = 1
	infoDescription = 2
	infoBlockSize   = 3

	baseAllocation   = "base:allocation"
	baseAllocationID = 1 // our server's id of it
	stateHole        = 1
	stateZero        = 2
)

type option uint32

const (
	optExportName      option = 1
	optAbort           option = 2
	optList            option = 3
	optStartTLS        option = 5
	optInfo            option = 6
	optGo              option = 7
	optStructuredReply option = 8
	optListMetaContext option = 9
	optSetMetaContext  option = 10
	optExtendedHeaders option = 11
)

func (o option) String() string {
	names := map[option]string{optExportName: "EXPORT_NAME", optAbort: "ABORT", optList: "LIST", optStartTLS: "STARTTLS",
		optInfo: "INFO", optGo: "GO", optStructuredReply: "STRUCTURED_REPLY", optListMetaContext: "LIST_META_CONTEXT",
		optSetMetaContext: "SET_META_CONTEXT", optExtendedHeaders: "EXTENDED_HEADERS"}
	if n, ok := names[o]; ok {
		return "NBD_OPT_" + n
	}
	return fmt.Sprintf("option %d", uint32(o))
}

type command uint16

const (
	cmdRead        command = 0
	cmdWrite       command = 1
	cmdDisc        command = 2
	cmdFlush       command = 3
	cmdTrim        command = 4
	cmdCache       command = 5
	cmdWriteZeroes command = 6
	cmdBlockStatus command = 7
)

func (c command) String() string {
	names := [...]string{"read", "write", "disconnect", "flush", "trim", "cache", "write-zeroes", "block-status"}
	if int(c) < len(names) {
		return names[c]
	}
	return fmt.Sprintf("command %d", uint16(c))
}

// Command flags.
const (
	cmdFlagFUA        = 1 << 0
	cmdFlagNoHole     = 1 << 1
	cmdFlagDF         = 1 << 2
	cmdFlagReqOne     = 1 << 3
	cmdFlagFastZero   = 1 << 4
	cmdFlagPayloadLen = 1 << 5
)

// Chunks of structured and extended replies.
const (
	replyFlagDone = 1

	chunkNone           = 0
	chunkOffsetData     = 1
	chunkOffsetHole     = 2
	chunkBlockStatus    = 5
	chunkBlockStatusExt = 6
	chunkError          = 1<<15 + 1
	chunkErrorOffset    = 1<<15 + 2
)

// Limits. A length beyond its limit is refused before memory is taken for it.
const (
	maxString      = 4096     // of a name, query or message (proto.md, "Conventions")
	maxOption      = 1 << 16  // data of one option; more is skipped and answered with TOO_BIG
	maxOptionSkip  = 1 << 20  // beyond this the peer is cut off
	maxOptions     = 1024     // options of one handshake
	maxOptReply    = 1 << 16  // data of one option reply
	maxOptReplies  = 1 << 16  // replies to one option
	maxListed      = 16 << 20 // bytes of all names in a list
	maxPayload     = 32 << 20
	maxStatusChunk = 4 + 8*(1<<20) // bytes of a block status chunk that a client takes
	maxExtents     = 1 << 12       // that our server sends in one chunk

	requestSize         = 28
	extendedRequestSize = 32
	simpleReplySize     = 16
	structuredReplySize = 20
	extendedReplySize   = 32
	optionSize          = 16
	optReplySize        = 20
)

var be = binary.BigEndian

// request is the header of one command, compact or extended.
type request struct {
	flags  uint16
	cmd    command
	cookie uint64
	off    uint64
	length uint64
}

func (r request) append(b []byte, extended bool) []byte {
	if extended {
		b = be.AppendUint32(b, magicExtendedRequest)
	} else {
		b = be.AppendUint32(b, magicRequest)
	}
	b = be.AppendUint16(b, r.flags)
	b = be.AppendUint16(b, uint16(r.cmd))
	b = be.AppendUint64(b, r.cookie)
	b = be.AppendUint64(b, r.off)
	if extended {
		return be.AppendUint64(b, r.length)
	}
	return be.AppendUint32(b, uint32(r.length))
}

// parseRequest decodes a header of requestLen(extended) bytes.
func parseRequest(b []byte, extended bool) (r request, err error) {
	want := uint32(magicRequest)
	if extended {
		want = magicExtendedRequest
	}
	if m := be.Uint32(b); m != want {
		return r, protocolError("request magic 0x%08x is not 0x%08x", m, want)
	}
	r = request{be.Uint16(b[4:]), command(be.Uint16(b[6:])), be.Uint64(b[8:]), be.Uint64(b[16:]), 0}
	if extended {
		r.length = be.Uint64(b[24:])
	} else {
		r.length = uint64(be.Uint32(b[24:]))
	}
	return r, nil
}

func requestLen(extended bool) int {
	if extended {
		return extendedRequestSize
	}
	return requestSize
}

// payload is the number of bytes that follow the header.
func (r request) payload(extended bool) uint64 {
	if extended && r.flags&cmdFlagPayloadLen != 0 || !extended && r.cmd == cmdWrite {
		return r.length
	}
	return 0
}

// reply is the header of a simple reply, or of one chunk.
type reply struct {
	simple bool
	errno  uint32 // of a simple reply
	flags  uint16
	typ    uint16
	cookie uint64
	off    uint64 // of an extended reply
	length uint64 // bytes of payload that follow a chunk's header
}

// replyStyle is which reply headers were negotiated.
type replyStyle uint8

const (
	simple replyStyle = iota
	structured
	extended
)

func (r reply) append(b []byte, style replyStyle) []byte {
	switch {
	case r.simple:
		b = be.AppendUint32(b, magicReply)
		b = be.AppendUint32(b, r.errno)
		return be.AppendUint64(b, r.cookie)
	case style == extended:
		b = be.AppendUint32(b, magicExtendedReply)
		b = be.AppendUint16(b, r.flags)
		b = be.AppendUint16(b, r.typ)
		b = be.AppendUint64(b, r.cookie)
		b = be.AppendUint64(b, r.off)
		return be.AppendUint64(b, r.length)
	}
	b = be.AppendUint32(b, magicStructuredReply)
	b = be.AppendUint16(b, r.flags)
	b = be.AppendUint16(b, r.typ)
	b = be.AppendUint64(b, r.cookie)
	return be.AppendUint32(b, uint32(r.length))
}

// parseReply decodes the header at the start of b and returns its length, or 0
// where b does not hold all of it yet.
func parseReply(b []byte, style replyStyle) (r reply, n int, err error) {
	if len(b) < 4 {
		return r, 0, nil
	}
	switch m := be.Uint32(b); {
	case m == magicReply && style != extended:
		if len(b) < simpleReplySize {
			return r, 0, nil
		}
		return reply{simple: true, errno: be.Uint32(b[4:]), cookie: be.Uint64(b[8:])}, simpleReplySize, nil
	case m == magicStructuredReply && style == structured:
		if len(b) < structuredReplySize {
			return r, 0, nil
		}
		return reply{flags: be.Uint16(b[4:]), typ: be.Uint16(b[6:]), cookie: be.Uint64(b[8:]), length: uint64(be.Uint32(b[16:]))}, structuredReplySize, nil
	case m == magicExtendedReply && style == extended:
		if len(b) < extendedReplySize {
			return r, 0, nil
		}
		return reply{flags: be.Uint16(b[4:]), typ: be.Uint16(b[6:]), cookie: be.Uint64(b[8:]), off: be.Uint64(b[16:]), length: be.Uint64(b[24:])}, extendedReplySize, nil
	default:
		return r, 0, protocolError("reply magic 0x%08x does not belong to this connection", m)
	}
}

func appendOption(b []byte, o option, data []byte) []byte {
	b = be.AppendUint64(b, magicOption)
	b = be.AppendUint32(b, uint32(o))
	b = be.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

func appendOptReply(b []byte, o option, typ uint32, data []byte) []byte {
	b = be.AppendUint64(b, magicOptReply)
	b = be.AppendUint32(b, uint32(o))
	b = be.AppendUint32(b, typ)
	b = be.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

func appendString(b []byte, s string) []byte {
	b = be.AppendUint32(b, uint32(len(s)))
	return append(b, s...)
}

// takeString cuts a string with a 32-bit length off the front of b.
func takeString(b []byte) (s string, rest []byte, ok bool) {
	if len(b) < 4 {
		return "", nil, false
	}
	n := be.Uint32(b)
	if n > maxString || uint64(n) > uint64(len(b)-4) {
		return "", nil, false
	}
	return string(b[4 : 4+n]), b[4+n:], true
}

// parseGo decodes the data of NBD_OPT_GO and NBD_OPT_INFO.
func parseGo(b []byte) (name string, infos []uint16, ok bool) {
	name, b, ok = takeString(b)
	if !ok || len(b) < 2 {
		return "", nil, false
	}
	n := int(be.Uint16(b))
	if b = b[2:]; len(b) != 2*n {
		return "", nil, false
	}
	for ; n > 0; n-- {
		infos = append(infos, be.Uint16(b))
		b = b[2:]
	}
	return name, infos, true
}

// parseMeta decodes the data of NBD_OPT_LIST_META_CONTEXT and SET_META_CONTEXT.
func parseMeta(b []byte) (name string, queries []string, ok bool) {
	name, b, ok = takeString(b)
	if !ok || len(b) < 4 {
		return "", nil, false
	}
	n := be.Uint32(b)
	b = b[4:]
	for ; n > 0; n-- { // each takes at least 4 bytes of b, so this ends
		var q string
		if q, b, ok = takeString(b); !ok {
			return "", nil, false
		}
		queries = append(queries, q)
	}
	return name, queries, len(b) == 0
}

// leaseContext begins the name of the metadata context by which a client asks to
// be the only writer; the rest is the writer's name. The id in the answer is the
// epoch of its lease. Nothing else is offered with it. It is memsync's own: other servers
// leave a context that they do not know out, as the protocol has it.
const leaseContext = "memsync:writer:"
