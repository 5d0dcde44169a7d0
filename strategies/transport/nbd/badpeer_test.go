package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"memsync/strategies/region"
	"memsync/strategies/transport"
)

// script is a net.Conn whose other side has said everything already.
type script struct {
	in  *bytes.Reader
	out bytes.Buffer
	mu  sync.Mutex
}

func newScript(in []byte) *script { return &script{in: bytes.NewReader(in)} }

func (s *script) Read(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.in.Read(p)
}

func (s *script) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.out.Len() < 64<<20 {
		s.out.Write(p)
	}
	return len(p), nil
}

func (s *script) Close() error                     { return nil }
func (s *script) LocalAddr() net.Addr              { return nil }
func (s *script) RemoteAddr() net.Addr             { return nil }
func (s *script) SetDeadline(time.Time) error      { return nil }
func (s *script) SetReadDeadline(time.Time) error  { return nil }
func (s *script) SetWriteDeadline(time.Time) error { return nil }

// hello is what a client sends up to transmission of the export "" in a style.
func hello(style replyStyle) []byte {
	b := be.AppendUint32(nil, flagFixedNewstyle|flagNoZeroes)
	if style != simple {
		o := optStructuredReply
		if style == extended {
			o = optExtendedHeaders
		}
		b = appendOption(b, o, nil)
		b = appendOption(b, optSetMetaContext, appendString(be.AppendUint32(appendString(nil, ""), 1), baseAllocation))
	}
	return appendOption(b, optGo, be.AppendUint16(be.AppendUint16(appendString(nil, ""), 1), infoBlockSize))
}

// afterHello is the number of bytes that our server answers hello with.
func afterHello(t testing.TB, style replyStyle, e transport.Exports) int {
	s := newScript(hello(style))
	if err := (&Transport{}).Serve(context.Background(), s, e); err != nil {
		t.Fatal(err)
	}
	return s.out.Len()
}

func TestServerHandshakeFields(t *testing.T) {
	flags := be.AppendUint32(nil, flagFixedNewstyle|flagNoZeroes)
	opt := func(o option, data []byte) []byte { return appendOption(slices.Clone(flags), o, data) }
	length := func(o option, n uint32) []byte { // an option that only says that data follows
		b := opt(o, nil)
		be.PutUint32(b[len(b)-4:], n)
		return b
	}
	goData := func(nameLen uint32, name string, n uint16, infos int) []byte {
		b := append(be.AppendUint32(nil, nameLen), name...)
		return append(be.AppendUint16(b, n), make([]byte, 2*infos)...)
	}
	metaData := func(n uint32, queries ...string) []byte {
		b := be.AppendUint32(appendString(nil, ""), n)
		for _, q := range queries {
			b = appendString(b, q)
		}
		return b
	}
	withSR := func(b []byte) []byte { // structured replies first
		return append(opt(optStructuredReply, nil), b[4:]...)
	}
	store := viewed{newRAM(1<<20, 1)}
	for name, c := range map[string]struct {
		in    []byte
		reply uint32 // of the last option reply; 0 is none
		err   string // of Serve; "" is nil
	}{
		"nothing":                     {nil, 0, ""},
		"half of the flags":           {flags[:2], 0, "unexpected EOF"},
		"unknown client flags":        {be.AppendUint32(nil, 1<<5), 0, "client flags 0x00000020"},
		"bad option magic":            {append(slices.Clone(flags), make([]byte, 16)...), 0, "option magic 0x0000000000000000"},
		"unknown option":              {opt(77, nil), repErrUnsup, ""},
		"peek export":                 {opt(4, nil), repErrUnsup, ""},
		"abort":                       {opt(optAbort, []byte("why")), repAck, ""},
		"list with data":              {opt(optList, []byte("x")), repErrInvalid, ""},
		"structured with data":        {opt(optStructuredReply, []byte("x")), repErrInvalid, ""},
		"extended with data":          {opt(optExtendedHeaders, []byte("x")), repErrInvalid, ""},
		"structured after extended":   {append(opt(optExtendedHeaders, nil), opt(optStructuredReply, nil)[4:]...), repErrExtHeaderReqd, ""},
		"starttls without TLS":        {opt(optStartTLS, nil), repErrPolicy, ""},
		"data of 2^32-1 bytes":        {length(optGo, math.MaxUint32), 0, "4294967295 bytes"},
		"data that is cut off":        {length(optGo, 100), 0, "unexpected EOF"},
		"data over the limit":         {opt(optGo, make([]byte, maxOption+1)), repErrTooBig, ""},
		"export name over the limit":  {length(optExportName, maxOption+1), 0, "name of 65537 bytes"},
		"export name too long":        {opt(optExportName, make([]byte, maxString+1)), 0, "missing"},
		"export name that is missing": {opt(optExportName, []byte("nothing")), 0, "missing"},
		"export name after extended":  {append(opt(optExtendedHeaders, nil), opt(optExportName, nil)[4:]...), 0, "EXTENDED_HEADERS"},
		"go without data":             {opt(optGo, nil), repErrInvalid, ""},
		"go with name beyond data":    {opt(optGo, goData(5, "abc", 0, 0)), repErrInvalid, ""},
		"go with name of 2^32-1":      {opt(optGo, goData(math.MaxUint32, "abc", 0, 0)), repErrInvalid, ""},
		"go with too many infos":      {opt(optGo, goData(0, "", 9, 1)), repErrInvalid, ""},
		"go with too few infos":       {opt(optGo, goData(0, "", 0, 1)), repErrInvalid, ""},
		"go for a missing export":     {opt(optGo, goData(3, "abc", 0, 0)), repErrUnknown, ""},
		"info for a missing export":   {opt(optInfo, goData(3, "abc", 0, 0)), repErrUnknown, ""},
		"meta without structured":     {opt(optSetMetaContext, metaData(1, baseAllocation)), repErrInvalid, ""},
		"meta without data":           {withSR(opt(optSetMetaContext, nil)), repErrInvalid, ""},
		"meta with missing queries":   {withSR(opt(optSetMetaContext, metaData(2, baseAllocation))), repErrInvalid, ""},
		"meta with 2^32-1 queries":    {withSR(opt(optSetMetaContext, metaData(math.MaxUint32, baseAllocation))), repErrInvalid, ""},
		"meta with trailing bytes":    {withSR(opt(optSetMetaContext, metaData(0, "x"))), repErrInvalid, ""},
		"meta without namespace":      {withSR(opt(optSetMetaContext, metaData(1, "allocation"))), repErrInvalid, ""},
		"meta of another namespace":   {withSR(opt(optSetMetaContext, metaData(1, "qemu:dirty"))), repAck, ""},
		"options without end":         {append(slices.Clone(flags), bytes.Repeat(appendOption(nil, optList, nil), maxOptions+1)...), 0, "more than 1024 options"},
		"option without fixed flag":   {appendOption(make([]byte, 4), optList, nil), 0, "fixed newstyle"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, kind := range kinds {
				s := play(t, kind, c.in)
				err := (&Transport{}).Serve(testContext(t), s.conn, transport.One{Name: "r", Store: store})
				if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
					t.Errorf("%s: Serve: %v, want %q", kind, err, c.err)
				}
				l := newLink(newScript(s.heard()[18:]))
				last := uint32(0)
				for l.need(optReplySize, 0) == nil {
					h := l.buffered()
					last = be.Uint32(h[12:])
					n := be.Uint32(h[16:])
					l.consume(optReplySize)
					if err := l.skip(uint64(n), 0); err != nil {
						t.Fatal(err)
					}
				}
				if last != c.reply {
					t.Errorf("%s: last reply 0x%x, want 0x%x", kind, last, c.reply)
				}
			}
		})
	}
}

func TestServerRequestFields(t *testing.T) {
	const size = 1 << 20
	e := exports{"": viewed{newRAM(size, 1)}}
	all := []replyStyle{simple, structured, extended}
	for name, c := range map[string]struct {
		styles []replyStyle
		req    request
		data   int // bytes of payload that follow
		errno  Errno
		err    string // of Serve, which then ends
	}{
		"read at the end":            {all, request{cmd: cmdRead, off: size - 1, length: 1}, 0, 0, ""},
		"read of nothing":            {all, request{cmd: cmdRead, off: size}, 0, 0, ""},
		"read past the end":          {all, request{cmd: cmdRead, off: size - 1, length: 2}, 0, EINVAL, ""},
		"read beyond the end":        {all, request{cmd: cmdRead, off: size + 1}, 0, EINVAL, ""},
		"read whose end overflows":   {all, request{cmd: cmdRead, off: math.MaxUint64 - 5, length: 10}, 0, EINVAL, ""},
		"read of 32 MiB":             {all, request{cmd: cmdRead, length: 32 << 20}, 0, EINVAL, ""},
		"read of 2^32-1":             {all, request{cmd: cmdRead, length: math.MaxUint32}, 0, EINVAL, ""},
		"read of 2^64-1":             {all[2:], request{cmd: cmdRead, length: math.MaxUint64}, 0, EINVAL, ""},
		"read with an unknown flag":  {all, request{flags: 1 << 12, cmd: cmdRead, length: 1}, 0, EINVAL, ""},
		"read with a foreign flag":   {all, request{flags: cmdFlagReqOne, cmd: cmdRead, length: 1}, 0, EINVAL, ""},
		"DF without structured":      {all[:1], request{flags: cmdFlagDF, cmd: cmdRead, length: 1}, 0, EINVAL, ""},
		"DF":                         {all[1:], request{flags: cmdFlagDF, cmd: cmdRead, length: 1}, 0, 0, ""},
		"write past the end":         {all[:2], request{cmd: cmdWrite, off: size - 1, length: 2}, 2, ENOSPC, ""},
		"write past the end, ext":    {all[2:], request{flags: cmdFlagPayloadLen, cmd: cmdWrite, off: size - 1, length: 2}, 2, ENOSPC, ""},
		"write of nothing":           {all, request{cmd: cmdWrite}, 0, 0, ""},
		"write of 2^32-1":            {all[:2], request{cmd: cmdWrite, length: math.MaxUint32}, 0, 0, "payload of 4294967295 bytes"},
		"write of 2^64-1":            {all[2:], request{flags: cmdFlagPayloadLen, cmd: cmdWrite, length: math.MaxUint64}, 0, 0, "payload of 18446744073709551615 bytes"},
		"write of 32 MiB and a byte": {all[:2], request{cmd: cmdWrite, length: 32<<20 + 1}, 0, 0, "payload of 33554433 bytes"},
		"write of 32 MiB":            {all[:2], request{cmd: cmdWrite, length: 32 << 20}, 32 << 20, ENOSPC, ""},
		"write whose payload is cut": {all[:2], request{cmd: cmdWrite, length: 100}, 50, 0, "peer is gone"},
		"write without payload flag": {all[2:], request{cmd: cmdWrite, length: 100}, 0, EINVAL, ""},
		"payload of another command": {all[2:], request{flags: cmdFlagPayloadLen, cmd: cmdRead, length: 100}, 100, EINVAL, ""},
		"flush of a range":           {all, request{cmd: cmdFlush, length: 1}, 0, EINVAL, ""},
		"flush":                      {all, request{cmd: cmdFlush}, 0, 0, ""},
		"trim that is not offered":   {all, request{cmd: cmdTrim, length: 1}, 0, EINVAL, ""},
		"cache that is not offered":  {all, request{cmd: cmdCache, length: 1}, 0, EINVAL, ""},
		"zeroes past the end":        {all, request{cmd: cmdWriteZeroes, length: size + 1}, 0, ENOSPC, ""},
		"fast zeroes":                {all, request{flags: cmdFlagFastZero, cmd: cmdWriteZeroes, length: 1}, 0, ENOTSUP, ""},
		"status without context":     {all[:1], request{cmd: cmdBlockStatus, length: 1}, 0, EINVAL, ""},
		"status of nothing":          {all[1:], request{cmd: cmdBlockStatus}, 0, EINVAL, ""},
		"status past the end":        {all[1:], request{cmd: cmdBlockStatus, length: size + 1}, 0, EINVAL, ""},
		"status payload of 3 bytes":  {all[2:], request{flags: cmdFlagPayloadLen, cmd: cmdBlockStatus, length: 3}, 3, EINVAL, ""},
		"status payload of zeroes":   {all[2:], request{flags: cmdFlagPayloadLen, cmd: cmdBlockStatus, length: 12}, 12, EINVAL, ""},
		"resize":                     {all, request{cmd: 8}, 0, EINVAL, ""},
		"unknown command":            {all, request{cmd: 777, length: 5}, 0, EINVAL, ""},
		"disconnect":                 {all, request{cmd: cmdDisc}, 0, 0, "-"},
	} {
		t.Run(name, func(t *testing.T) {
			for i := range len(c.styles) * len(kinds) {
				style, kind := c.styles[i/len(kinds)], kinds[i%len(kinds)]
				c.req.cookie = 0x1234567890
				in := append(c.req.append(hello(style), style == extended), make([]byte, c.data)...)
				if c.err == "" { // the others are still served: a good read follows
					in = request{cmd: cmdRead, cookie: 42, off: 7, length: 9}.append(in, style == extended)
					in = request{cmd: cmdDisc}.append(in, style == extended) // all is answered first
				}
				s := play(t, kind, in)
				err := (&Transport{}).Serve(testContext(t), s.conn, e)
				if strings.Trim(c.err, "-") == "" && err != nil || strings.Trim(c.err, "-") != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
					t.Errorf("%s, style %d: Serve: %v, want %q", kind, style, err, c.err)
				}
				out := s.heard()[afterHello(t, style, e):]
				got := map[uint64]Errno{}
				for len(out) > 0 {
					r, n, err := parseReply(out, style)
					if err != nil || n == 0 {
						t.Fatalf("%s, style %d: reply %x: %v", kind, style, out, err)
					}
					out = out[n:]
					no := Errno(r.errno)
					length := r.length
					if r.simple && r.errno == 0 && (r.cookie == 42 || c.req.cmd == cmdRead) && style == simple {
						if length = c.req.length; r.cookie == 42 {
							length = 9
						}
					}
					if !r.simple && r.typ&(1<<15) != 0 {
						no = Errno(be.Uint32(out))
					}
					if _, ok := got[r.cookie]; ok {
						t.Errorf("%s, style %d: two replies to %d", kind, style, r.cookie)
					}
					got[r.cookie] = no
					out = out[length:]
				}
				want := map[uint64]Errno{c.req.cookie: c.errno, 42: 0}
				if c.err != "" {
					want = map[uint64]Errno{}
				}
				if fmt.Sprint(got) != fmt.Sprint(want) {
					t.Errorf("%s, style %d: replies %v, want %v", kind, style, got, want)
				}
			}
		})
	}
}

// dialScripts dials connections on which the server has said everything already.
func dialScripts(in []byte) transport.Dialer {
	return transport.DialFunc(func(context.Context) (net.Conn, error) { return newScript(in), nil })
}

// greeting is what our server says until transmission begins, in a style.
func greeting(t testing.TB, style replyStyle) []byte {
	b := be.AppendUint16(be.AppendUint64(be.AppendUint64(nil, magicInit), magicOption), flagFixedNewstyle)
	yes := map[bool]uint32{true: repAck, false: repErrUnsup}
	b = appendOptReply(b, optStructuredReply, yes[style != simple], nil)
	b = appendOptReply(b, optExtendedHeaders, yes[style == extended], nil)
	if style != simple {
		b = appendOptReply(b, optSetMetaContext, repMetaContext, append(be.AppendUint32(nil, 5), baseAllocation...))
	}
	b = appendOptReply(b, optSetMetaContext, yes[style != simple], nil)
	info := be.AppendUint64(be.AppendUint16(nil, infoExport), 1<<20)
	b = appendOptReply(b, optGo, repInfo, be.AppendUint16(info, uint16(FlagHasFlags|FlagFlush|FlagMultiConn)))
	return appendOptReply(b, optGo, repAck, nil)
}

func TestClientHandshakeFields(t *testing.T) {
	good := greeting(t, structured)
	change := func(at int, b ...byte) []byte {
		g := slices.Clone(good)
		copy(g[at:], b)
		return g
	}
	srOff := 18 // the first option reply
	goOff := len(good) - optReplySize - optReplySize - 12
	for name, c := range map[string]struct {
		in   []byte
		want error
	}{
		"nothing":                      {nil, region.ErrPeerGone},
		"another protocol":             {[]byte("SSH-2.0-OpenSSH_9.2p1 Debian"), ErrProtocol},
		"bad second magic":             {change(8, 1), ErrProtocol},
		"oldstyle":                     {append(be.AppendUint64(be.AppendUint64(nil, magicInit), magicOld), make([]byte, 136)...), region.ErrNotSupported},
		"not fixed":                    {change(16, 0, 0), region.ErrNotSupported},
		"bad reply magic":              {change(srOff, 1), ErrProtocol},
		"reply to another option":      {change(srOff+11, 9), ErrProtocol},
		"reply of 2^32-1 bytes":        {change(srOff+16, 255, 255, 255, 255), ErrProtocol},
		"acknowledgement with data":    {change(srOff+16, 0, 0, 0, 1), ErrProtocol},
		"reply of an unknown type":     {change(srOff+12, 0, 0, 0, 9), ErrProtocol},
		"go with short info":           {change(goOff+16, 0, 0, 0, 1), ErrProtocol},
		"go with an info of 11 bytes":  {change(goOff+16, 0, 0, 0, 11), ErrProtocol},
		"go with a size of 2^64-1":     {change(goOff+22, 255, 255, 255, 255, 255, 255, 255, 255), ErrProtocol},
		"go without flags":             {change(goOff+30, 0, 0), ErrProtocol},
		"go without info":              {append(slices.Clone(good[:goOff]), good[len(good)-optReplySize:]...), ErrProtocol},
		"go refused":                   {append(slices.Clone(good[:goOff]), appendOptReply(nil, optGo, repErrUnknown, []byte("no"))...), region.ErrMissing},
		"shutting down":                {append(slices.Clone(good[:goOff]), appendOptReply(nil, optGo, repErrShutdown, nil)...), region.ErrPeerGone},
		"replies without end":          {append(slices.Clone(good[:goOff]), bytes.Repeat(appendOptReply(nil, optGo, repInfo, []byte{0, 9}), maxOptReplies+1)...), ErrProtocol},
		"block size that is no power":  {withBlocks(good, goOff, 3, 4096, 1<<20), ErrProtocol},
		"block size of 0":              {withBlocks(good, goOff, 0, 4096, 1<<20), ErrProtocol},
		"block size of 2^17":           {withBlocks(good, goOff, 1<<17, 1<<17, 1<<20), ErrProtocol},
		"preferred below minimum":      {withBlocks(good, goOff, 4096, 512, 1<<20), ErrProtocol},
		"maximum below minimum":        {withBlocks(good, goOff, 4096, 4096, 512), ErrProtocol},
		"metadata context not asked":   {bytes.Replace(good, []byte(baseAllocation), []byte("base:allocatioM"), 1), ErrProtocol},
		"option reply of 64 KiB and 1": {change(srOff+16, 0, 1, 0, 1), ErrProtocol},
	} {
		t.Run(name, func(t *testing.T) {
			for _, kind := range kinds {
				s, err := (&Transport{}).Open(testContext(t), dialPlayed(t, kind, c.in), transport.Options{Connections: 1})
				if !errors.Is(err, c.want) {
					t.Errorf("%s: got %v, want %v", kind, err, c.want)
				}
				if err == nil {
					s.Close()
				}
			}
		})
	}
	c := open(t, &Transport{}, dialScripts(good), transport.Options{Connections: 1})
	if c.Size() != 1<<20 || !c.Export().Allocation {
		t.Errorf("%+v", c.Export())
	}
}

func withBlocks(good []byte, goOff int, sizes ...uint32) []byte {
	info := be.AppendUint16(nil, infoBlockSize)
	for _, n := range sizes {
		info = be.AppendUint32(info, n)
	}
	return slices.Concat(good[:goOff], appendOptReply(nil, optGo, repInfo, info), good[goOff:])
}

func TestClientReplyFields(t *testing.T) {
	data := bytes.Repeat([]byte{7}, 100)
	chunk := func(style replyStyle, last bool, typ uint16, body ...[]byte) []byte {
		b := slices.Concat(body...)
		r := reply{typ: typ, cookie: 1, off: 1000, length: uint64(len(b))}
		if last {
			r.flags = replyFlagDone
		}
		return append(r.append(nil, style), b...)
	}
	u32 := func(n uint32) []byte { return be.AppendUint32(nil, n) }
	u64 := func(n uint64) []byte { return be.AppendUint64(nil, n) }
	read := func(c *Client) error { return c.ReadAt(context.Background(), make([]byte, 100), 1000) }
	status := func(c *Client) error { _, err := c.Extents(context.Background(), 1000, 100); return err }
	flush := func(c *Client) error { return c.Flush(context.Background()) }
	raw := func(r reply, style replyStyle, more ...byte) []byte { return append(r.append(nil, style), more...) }
	for name, c := range map[string]struct {
		style replyStyle
		do    func(*Client) error
		in    []byte
		want  error
	}{
		"good simple":                {simple, read, raw(reply{simple: true, cookie: 1}, simple, data...), nil},
		"good data":                  {structured, read, chunk(structured, true, chunkOffsetData, u64(1000), data), nil},
		"good data, extended":        {extended, read, chunk(extended, true, chunkOffsetData, u64(1000), data), nil},
		"good in three, any order":   {structured, read, slices.Concat(chunk(structured, false, chunkOffsetData, u64(1050), data[:50]), chunk(structured, false, chunkOffsetHole, u64(1010), u32(40)), chunk(structured, true, chunkOffsetData, u64(1000), data[:10])), nil},
		"good status":                {structured, status, chunk(structured, true, chunkBlockStatus, u32(5), u32(40), u32(3), u32(200), u32(0)), nil},
		"error":                      {structured, read, chunk(structured, true, chunkError, u32(28), []byte{0, 2}, []byte("no")), syscall.ENOSPC},
		"error of an unknown kind":   {structured, read, chunk(structured, true, 1<<15+9, u32(28), []byte{0, 2}, []byte("no"), u64(7)), syscall.ENOSPC},
		"error with an offset":       {structured, read, chunk(structured, true, chunkErrorOffset, u32(28), []byte{0, 0}, u64(1000)), syscall.ENOSPC},
		"data and error":             {structured, read, slices.Concat(chunk(structured, false, chunkOffsetData, u64(1000), data), chunk(structured, true, chunkError, u32(28), []byte{0, 0})), syscall.ENOSPC},
		"shutdown":                   {simple, read, raw(reply{simple: true, errno: uint32(ESHUTDOWN), cookie: 1}, simple), region.ErrPeerGone},
		"bad magic":                  {simple, read, make([]byte, 16), ErrProtocol},
		"magic of another style":     {simple, read, chunk(structured, true, chunkNone), ErrProtocol},
		"simple where extended":      {extended, flush, raw(reply{simple: true, cookie: 1}, simple), ErrProtocol},
		"reply to no request":        {simple, read, raw(reply{simple: true, cookie: 2}, simple), ErrProtocol},
		"simple reply to a read":     {structured, read, raw(reply{simple: true, cookie: 1}, simple, data...), ErrProtocol},
		"two replies to one":         {simple, func(c *Client) error { flush(c); return flush(c) }, slices.Concat(raw(reply{simple: true, cookie: 1}, simple), raw(reply{simple: true, cookie: 1}, simple)), ErrProtocol},
		"extended with wrong offset": {extended, read, raw(reply{flags: 1, typ: chunkNone, cookie: 1, off: 1}, extended), ErrProtocol},
		"none without done":          {structured, flush, chunk(structured, false, chunkNone), ErrProtocol},
		"none with payload":          {structured, flush, chunk(structured, true, chunkNone, data), ErrProtocol},
		"unknown chunk":              {structured, flush, chunk(structured, true, 77), ErrProtocol},
		"data in reply to flush":     {structured, flush, chunk(structured, true, chunkOffsetData, u64(0), data), ErrProtocol},
		"hole in reply to flush":     {structured, flush, chunk(structured, true, chunkOffsetHole, u64(0), u32(1)), ErrProtocol},
		"data of no bytes":           {structured, read, chunk(structured, true, chunkOffsetData, u64(1000)), ErrProtocol},
		"data before the range":      {structured, read, chunk(structured, true, chunkOffsetData, u64(999), data), ErrProtocol},
		"data beyond the range":      {structured, read, chunk(structured, true, chunkOffsetData, u64(1001), data), ErrProtocol},
		"data at 2^64-1":             {structured, read, chunk(structured, true, chunkOffsetData, u64(math.MaxUint64), data[:5]), ErrProtocol},
		"data longer than asked":     {structured, read, chunk(structured, true, chunkOffsetData, u64(1000), data, data), ErrProtocol},
		"data of 32 MiB":             {structured, read, raw(reply{flags: 1, typ: chunkOffsetData, cookie: 1, length: 32 << 20}, structured, u64(1000)...), ErrProtocol},
		"hole of 32 MiB":             {structured, read, chunk(structured, true, chunkOffsetHole, u64(1000), u32(32<<20)), ErrProtocol},
		"none of 32 MiB":             {structured, flush, raw(reply{flags: 1, typ: chunkNone, cookie: 1, length: 32 << 20}, structured), ErrProtocol},
		"error of 32 MiB":            {structured, read, raw(reply{flags: 1, typ: chunkError, cookie: 1, length: 32 << 20}, structured), ErrProtocol},
		"status of 32 MiB":           {structured, status, raw(reply{flags: 1, typ: chunkBlockStatus, cookie: 1, length: 32<<20 + 4}, structured), ErrProtocol},
		"data of 2^32-1":             {structured, read, raw(reply{flags: 1, typ: chunkOffsetData, cookie: 1, length: math.MaxUint32}, structured, u64(1000)...), ErrProtocol},
		"data of 2^64-1":             {extended, read, raw(reply{flags: 1, typ: chunkOffsetData, cookie: 1, off: 1000, length: math.MaxUint64}, extended, u64(1000)...), ErrProtocol},
		"data twice":                 {structured, read, slices.Concat(chunk(structured, false, chunkOffsetData, u64(1000), data[:50]), chunk(structured, true, chunkOffsetData, u64(1049), data[:50])), ErrProtocol},
		"scattered data twice":       {structured, read, slices.Concat(chunk(structured, false, chunkOffsetData, u64(1050), data[:10]), chunk(structured, true, chunkOffsetData, u64(1045), data[:10])), ErrProtocol},
		"data missing":               {structured, read, chunk(structured, true, chunkOffsetData, u64(1000), data[:99]), ErrProtocol},
		"data missing in front":      {structured, read, chunk(structured, true, chunkOffsetData, u64(1001), data[:99]), ErrProtocol},
		"all missing":                {structured, read, chunk(structured, true, chunkNone), ErrProtocol},
		"hole of nothing":            {structured, read, chunk(structured, true, chunkOffsetHole, u64(1000), u32(0)), ErrProtocol},
		"hole of 2^32-1":             {structured, read, chunk(structured, true, chunkOffsetHole, u64(1000), u32(math.MaxUint32)), ErrProtocol},
		"hole of 13 bytes":           {structured, read, chunk(structured, true, chunkOffsetHole, u64(1000), u32(100), []byte{0}), ErrProtocol},
		"error of 2^32-1":            {structured, read, raw(reply{flags: 1, typ: chunkError, cookie: 1, length: math.MaxUint32}, structured), ErrProtocol},
		"error of 5 bytes":           {structured, read, chunk(structured, true, chunkError, data[:5]), ErrProtocol},
		"error with long message":    {structured, read, chunk(structured, true, chunkError, u32(5), []byte{1, 0}, []byte("no")), ErrProtocol},
		"error without error":        {structured, read, chunk(structured, true, chunkError, u32(0), []byte{0, 0}), ErrProtocol},
		"status in reply to a read":  {structured, read, chunk(structured, true, chunkBlockStatus, u32(5), u32(40), u32(3)), ErrProtocol},
		"status of another context":  {structured, status, chunk(structured, true, chunkBlockStatus, u32(6), u32(40), u32(3)), ErrProtocol},
		"status without extents":     {structured, status, chunk(structured, true, chunkBlockStatus, u32(5)), ErrProtocol},
		"status of no length":        {structured, status, chunk(structured, true, chunkBlockStatus, u32(5), u32(0), u32(3)), ErrProtocol},
		"status beyond the range":    {structured, status, chunk(structured, true, chunkBlockStatus, u32(5), u32(100), u32(3), u32(1), u32(0)), ErrProtocol},
		"status of half an extent":   {structured, status, chunk(structured, true, chunkBlockStatus, u32(5), u32(100), u32(3), u32(1)), ErrProtocol},
		"status twice":               {structured, status, slices.Concat(chunk(structured, false, chunkBlockStatus, u32(5), u32(100), u32(3)), chunk(structured, true, chunkBlockStatus, u32(5), u32(100), u32(3))), ErrProtocol},
		"status missing":             {structured, status, chunk(structured, true, chunkNone), ErrProtocol},
		"status of 2^32-1":           {structured, status, raw(reply{flags: 1, typ: chunkBlockStatus, cookie: 1, length: math.MaxUint32 - 3}, structured), ErrProtocol},
		"status count wrong":         {extended, status, chunk(extended, true, chunkBlockStatusExt, u32(5), u32(2), u64(100), u64(0)), ErrProtocol},
		"compact status, extended":   {extended, status, chunk(extended, true, chunkBlockStatus, u32(5), u32(100), u32(0)), ErrProtocol},
		"cut in the header":          {structured, read, chunk(structured, true, chunkNone)[:9], region.ErrPeerGone},
		"cut in the data":            {structured, read, chunk(structured, true, chunkOffsetData, u64(1000), data)[:77], region.ErrPeerGone},
	} {
		t.Run(name, func(t *testing.T) {
			for _, kind := range kinds {
				cl := open(t, &Transport{}, dialPlayed(t, kind, append(greeting(t, c.style), c.in...)), transport.Options{Connections: 1})
				var err error
				if n := grown(func() { err = c.do(cl) }); n > 8<<20 {
					t.Errorf("%s: heap grew by %d KiB", kind, n>>10)
				}
				if !errors.Is(err, c.want) || c.want == nil && err != nil {
					t.Errorf("%s: got %v, want %v", kind, err, c.want)
				}
				if errors.Is(c.want, ErrProtocol) && !errors.Is(err, region.ErrPeerGone) {
					t.Errorf("%s: %v does not say that the connection is lost", kind, err)
				}
			}
		})
	}
}

// wholeSession is a whole session as bytes: what the client says, what the server says.
func wholeSession(t testing.TB, style replyStyle) (client, server []byte, e exports) {
	e = exports{"": newSparse(256<<10, 1)}
	ext := style == extended
	client = hello(style)
	w := request{cmd: cmdWrite, cookie: 1, off: 5, length: 300}
	if ext {
		w.flags = cmdFlagPayloadLen
	}
	client = append(w.append(client, ext), make([]byte, 300)...)
	client = request{cmd: cmdRead, cookie: 2, off: hole - 50, length: 100}.append(client, ext)
	client = request{cmd: cmdBlockStatus, cookie: 3, length: 200000}.append(client, ext)
	client = request{cmd: cmdFlush, cookie: 4}.append(client, ext)
	client = request{cmd: cmdDisc}.append(client, ext)
	s := newScript(client)
	if err := (&Transport{}).Serve(context.Background(), s, e); err != nil {
		t.Fatal(err)
	}
	return client, s.out.Bytes(), e
}

// messageEnds are the places in a client's session at which it may end in peace:
// before it has said anything, and behind each whole message.
func messageEnds(client []byte, style replyStyle) map[int]bool {
	ends, at := map[int]bool{0: true, 4: true}, 4
	for start := len(hello(style)); at < start; {
		at += optionSize + int(be.Uint32(client[at+12:]))
		ends[at] = true
	}
	for at < len(client) {
		write := command(be.Uint16(client[at+6:])) == cmdWrite
		if at += requestLen(style == extended); write {
			at += 300
		}
		ends[at] = true
	}
	return ends
}

// A connection that is cut after any byte ends that session, with an error unless
// it was between two messages, and no other one.
func TestCutAtEveryByte(t *testing.T) {
	for _, style := range []replyStyle{simple, structured, extended} {
		client, _, e := wholeSession(t, style)
		ends := messageEnds(client, style)
		if len(ends) < 8 || !ends[len(client)] {
			t.Fatalf("style %d: messages end at %v of %d", style, ends, len(client))
		}
		// On the same server, beside all that, one client is served all the time.
		s := serve(t, &Transport{}, e)
		living := open(t, &Transport{}, s, transport.Options{})
		for n := range len(client) + 1 {
			for _, kind := range kinds {
				var err error
				if kind != "tcp" {
					err = (&Transport{}).Serve(testContext(t), play(t, kind, client[:n]).conn, e)
				} else {
					nc, dialErr := s.Dial(testContext(t))
					if dialErr != nil {
						t.Fatal(dialErr)
					}
					_, writeErr := nc.Write(client[:n])
					if err := errors.Join(writeErr, nc.(*net.TCPConn).CloseWrite()); err != nil {
						t.Fatal(err)
					}
					err = s.await()
					nc.Close()
				}
				if (err == nil) != ends[n] {
					t.Errorf("style %d, %s, cut at %d: %v", style, kind, n, err)
				}
				if err != nil && !errors.Is(err, region.ErrPeerGone) {
					t.Errorf("style %d, %s, cut at %d: %v, want ErrPeerGone", style, kind, n, err)
				}
			}
			if err := living.ReadAt(testContext(t), make([]byte, 100), hole-50); err != nil {
				t.Fatalf("style %d: another client, after a cut at %d: %v", style, n, err)
			}
		}
		g := greeting(t, style)
		full := append(slices.Clone(g), reply{simple: true, cookie: 1}.append(nil, simple)...)
		if style == extended {
			full = append(slices.Clone(g), reply{flags: 1, cookie: 1}.append(nil, extended)...)
		}
		for n := range full {
			for _, kind := range kinds {
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				c, err := (&Transport{}).Open(ctx, dialPlayed(t, kind, full[:n]), transport.Options{Connections: 1})
				if err == nil {
					if n < len(g) {
						t.Errorf("style %d, %s, cut at %d: the handshake went well", style, kind, n)
					}
					err = c.Flush(ctx)
					c.Close()
				} else if n >= len(g) {
					t.Errorf("style %d, %s, cut at %d: %v", style, kind, n, err)
				}
				if !errors.Is(err, region.ErrPeerGone) {
					t.Errorf("style %d, %s, cut at %d: %v", style, kind, n, err)
				}
				cancel()
			}
		}
	}
}

// sessionMemory is what a client may have of a server's memory by default: half of its
// share, for requests that are carried out.
const sessionMemory = 12 << 20

// A client that asks for much and reads nothing is cut off, and costs little memory.
func TestClientStopsReading(t *testing.T) {
	for name, store := range map[string]region.Store{"viewed": viewed{newRAM(8<<20, 1)}, "buffered": newRAM(8<<20, 1)} {
		t.Run(name, func(t *testing.T) {
			tr := &Transport{StallTimeout: 300 * time.Millisecond}
			s := serve(t, tr, transport.One{Store: store})
			nc, err := s.Dial(testContext(t))
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			b := hello(simple)
			for i := range uint64(2000) {
				b = request{cmd: cmdRead, cookie: i, length: 8 << 20}.append(b, false)
			}
			go nc.Write(b)
			time.Sleep(200 * time.Millisecond)
			runtime.ReadMemStats(&after)
			if grown := int64(after.HeapInuse) - int64(before.HeapInuse); grown > sessionMemory+32<<20 {
				t.Errorf("heap grew by %d MiB for 16 GB of replies that nobody reads", grown>>20)
			}
			// Another client is served meanwhile.
			c := open(t, tr, s, transport.Options{})
			if err := c.ReadAt(testContext(t), make([]byte, 4096), 0); err != nil {
				t.Error(err)
			}
			if err := s.await(); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("server: %v", err)
			}
		})
	}
}

// Several bad clients at once, writers that stop in the middle of a payload and readers
// that read nothing: each costs at most sessionMemory, another client is served
// beside them, all are cut off, and their memory is free again.
func TestStalledClientsAtOnce(t *testing.T) {
	const clients = 8
	tr := &Transport{StallTimeout: 2 * time.Second}
	s := serve(t, tr, transport.One{Store: newRAM(32<<20, 1)})
	inUse := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapInuse)
	}
	payload := make([]byte, 32<<20-1) // of a write of 32 MiB
	before := inUse()
	var sending sync.WaitGroup
	defer sending.Wait()
	for i := range clients {
		nc, err := s.Dial(testContext(t))
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		b := hello(simple)
		for k := range uint64(500) {
			if i%2 == 0 {
				b = request{cmd: cmdRead, cookie: k, length: 32 << 20}.append(b, false)
			}
		}
		if i%2 == 1 {
			b = request{cmd: cmdWrite, length: 32 << 20}.append(b, false)
		}
		sending.Go(func() {
			if _, err := nc.Write(b); err == nil && i%2 == 1 {
				_, _ = nc.Write(payload) // may be cut off, too
			}
		})
	}
	c := open(t, tr, s, transport.Options{})
	most, ended := int64(0), 0
	for end := time.Now().Add(20 * time.Second); ended < clients; {
		if time.Now().After(end) {
			t.Fatalf("%d of %d clients were cut off", ended, clients)
		}
		most = max(most, inUse()-before)
		if err := c.ReadAt(testContext(t), make([]byte, 4096), 0); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-s.ended:
			if ended++; !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("server: %v", err)
			}
		default:
		}
	}
	t.Logf("heap grew by at most %d MiB", most>>20)
	if most > clients*(sessionMemory+4<<20) {
		t.Errorf("heap grew by %d MiB for %d clients, more than %d MiB each", most>>20, clients, sessionMemory>>20)
	}
	if most < sessionMemory/2 {
		t.Errorf("heap grew by %d KiB only: nothing was stalled", most>>10)
	}
	for end := time.Now().Add(10 * time.Second); ; { // the buffers may be kept for the next clients over one more collection
		left := inUse() - before
		if left < sessionMemory {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%d MiB are left of them", left>>20)
		}
	}
}

// A client that says nothing during the handshake, or half a message later, is cut off.
func TestClientStopsSending(t *testing.T) {
	tr := &Transport{StallTimeout: 100 * time.Millisecond, HandshakeTimeout: 100 * time.Millisecond}
	s := serve(t, tr, transport.One{Store: viewed{newRAM(1<<20, 1)}})
	w := request{cmd: cmdWrite, length: 1000}.append(hello(simple), false)
	for _, b := range [][]byte{nil, hello(simple)[:30], w[:len(w)-3], append(w, 1, 2, 3)} {
		nc, err := s.Dial(testContext(t))
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		if _, err := nc.Write(b); err != nil {
			t.Fatal(err)
		}
		if err := s.await(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("after %d bytes: %v", len(b), err)
		}
	}
}

// A server that stops reading holds up a write only until its context ends, and
// the connection is whole after that.
func TestServerStopsReading(t *testing.T) {
	for _, kind := range []string{"socket", "plain"} {
		t.Run(kind, func(t *testing.T) {
			a, b := socketpair(t)
			read := make(chan struct{})
			store := newRAM(32<<20, 1)
			done := make(chan error, 1)
			go func() {
				done <- (&Transport{}).Serve(testContext(t), &held{Conn: a, after: len(hello(structured)) + 100, read: read}, transport.One{Store: store})
			}()
			c := open(t, &Transport{}, transport.DialFunc(func(context.Context) (net.Conn, error) {
				if kind == "plain" {
					return plain{b}, nil
				}
				return b, nil
			}), transport.Options{Connections: 1})
			for range 3 { // the first is cut in the middle; the others must not pile up behind it
				ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
				start := time.Now()
				err := c.WriteAt(ctx, bytes.Repeat([]byte{1}, 1<<20), 0)
				cancel()
				if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 5*time.Second {
					t.Errorf("write to a server that does not read: %v after %v", err, time.Since(start))
				}
			}
			if n := len(c.conns[0].l.out.tail); n == 0 || n > 1<<20+100 {
				t.Errorf("%d bytes kept", n)
			}
			close(read)
			p := make([]byte, 4096)
			if err := c.ReadAt(testContext(t), p, 8<<20); err != nil {
				t.Error(err)
			} else if err := (region.Content{Seed: 1}).Check(p, 8<<20); err != nil {
				t.Error(err)
			}
			c.Close()
			// The replies to the abandoned writes may meet a client that has closed.
			if err := <-done; err != nil && !errors.Is(err, syscall.EPIPE) {
				t.Errorf("server: %v", err)
			}
		})
	}
}

// held is a connection that is not read beyond some bytes until read is closed.
type held struct {
	net.Conn
	after int
	read  chan struct{}
}

func (h *held) Read(p []byte) (int, error) {
	if h.after <= 0 {
		<-h.read
	}
	n, err := h.Conn.Read(p)
	h.after -= n
	return n, err
}

// The bytes that a fuzzer gives also choose, by two bits of their sum, what the session
// goes over (plain or a socket) and what the server does (leases or none).
func choose(b []byte) (kind string, leases bool) {
	sum := crc32.ChecksumIEEE(b)
	return kinds[sum&1], sum&2 != 0
}

// FuzzServer gives the server any bytes for a client's session.
func FuzzServer(f *testing.F) {
	for _, style := range []replyStyle{simple, structured, extended} {
		client, _, _ := wholeSession(f, style)
		f.Add(client)
		f.Add(hello(style))
	}
	// A writer with a lease, which is kept and given back.
	lease := be.AppendUint32(appendString(nil, ""), 1)
	b := append(be.AppendUint32(nil, flagFixedNewstyle|flagNoZeroes), appendOption(nil, optStructuredReply, nil)...)
	b = appendOption(b, optSetMetaContext, appendString(lease, leaseContext+"a"))
	b = appendOption(b, optGo, be.AppendUint16(appendString(nil, ""), 0))
	b = append(request{cmd: cmdWrite, cookie: 1, off: 5, length: 300}.append(b, false), make([]byte, 300)...)
	f.Add(request{cmd: cmdDisc}.append(b, false))
	store := newSparse(256<<10, 1)
	f.Fuzz(func(t *testing.T, b []byte) {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		kind, leases := choose(b)
		var e transport.Exports = exports{"": store, "b": blocky{store.slow, 4096}}
		if leases {
			e = transport.NewLeases(e)
		}
		err := (&Transport{}).Serve(ctx, play(t, kind, b).conn, e)
		if ctx.Err() != nil {
			t.Fatalf("server hangs: %v", err)
		}
	})
}

// FuzzClient gives the client any bytes for a server's session.
func FuzzClient(f *testing.F) {
	for _, style := range []replyStyle{simple, structured, extended} {
		g := greeting(f, style)
		r := reply{simple: true, cookie: 1}.append(nil, simple)
		if style != simple {
			r = be.AppendUint64(reply{flags: 1, typ: chunkOffsetData, cookie: 1, off: 0, length: 108}.append(nil, style), 0)
		}
		f.Add(slices.Concat(g, r, make([]byte, 100)))
		st := reply{flags: 1, typ: chunkBlockStatus, cookie: 2, length: 12}
		f.Add(slices.Concat(g, r, make([]byte, 100), st.append(nil, style), be.AppendUint32(nil, 5), be.AppendUint32(nil, 500), be.AppendUint32(nil, 3)))
		f.Add(slices.Concat(g, reply{flags: 1, typ: chunkOffsetHole, cookie: 1, length: 12}.append(nil, style), make([]byte, 12)))
		list := appendOptReply(slices.Clone(g[:18]), optList, repServer, appendString(nil, "one"))
		f.Add(appendOptReply(list, optList, repAck, nil))
		f.Add(slices.Concat(g, reply{flags: 1, typ: chunkError, cookie: 1, length: 8}.append(nil, style), []byte{0, 0, 0, 5, 0, 2, 'n', 'o'}))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		kind, _ := choose(b)
		if names, err := (&Transport{}).List(ctx, play(t, kind, b).conn); err == nil {
			for _, n := range names {
				if len(n) > maxString {
					t.Errorf("a name of %d bytes", len(n))
				}
			}
		}
		s, err := (&Transport{}).Open(ctx, dialPlayed(t, kind, b), transport.Options{Connections: 1})
		if err != nil {
			if ctx.Err() != nil {
				t.Fatalf("client hangs: %v", err)
			}
			return
		}
		c := s.(*Client)
		p := bytes.Repeat([]byte{0xa5}, int(min(100, c.Size())))
		c.ReadAt(ctx, p, 0)
		if ext, err := c.Extents(ctx, 0, min(1000, c.Size())); err == nil {
			var sum int64
			for _, e := range ext {
				if e.Length <= 0 {
					t.Errorf("extent %+v", e)
				}
				sum += e.Length
			}
			if sum > 1000 {
				t.Errorf("extents of %d bytes", sum)
			}
		}
		c.WriteAt(ctx, p, 0)
		c.Flush(ctx)
		c.Close()
		if ctx.Err() != nil {
			t.Fatal("client hangs")
		}
	})
}
