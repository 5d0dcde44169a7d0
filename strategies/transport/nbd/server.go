package nbd

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"memsync/strategies/region"
	"memsync/strategies/transport"
)

const (
	requestMemory  = 64 << 10 // what a request counts for at least, which bounds their number
	requestPiece   = 4 << 20  // of a payload or a reply in memory; longer ones go through in pieces
	readPiece      = 1 << 20  // of a structured reply
	batchReplies   = 32       // replies that go out in one write
	batchBytes     = 256 << 10
	maxErrorString = 512

	maxStatusPayload = 64 << 10 // which names contexts
)

// session is the server's side of one connection.
type session struct {
	t       *Transport
	l       *link
	named   transport.Exports // as given; exports are as the client's certificate sees them
	exports transport.Exports
	stall   time.Duration

	// The handshake's outcome.
	style    replyStyle
	metaFor  *string // export that base:allocation was selected for
	tls      bool
	export   string
	hasStore bool
	store    region.Store
	traits   traits
	grant    *transport.Grant // nil where the exports have no leases

	place *transport.Place
	most  int64 // bytes of one read or write
	work  sync.WaitGroup
	busy  atomic.Int64 // requests that are carried out beside the reader
	fail  context.CancelCauseFunc

	w     sync.Mutex // the link's writing side
	batch [][]byte   // replies of the reader, which go out when it would wait
	arena []byte     // their headers
	bytes int
}

// traits is what a store offers beside region.Store.
type traits struct {
	viewer  region.Viewer
	extents region.Extenter
	zeroer  region.Zeroer
	trimmer region.Trimmer
	cacher  region.Cacher
	blocks  region.Blocks
	flags   Flags
	size    uint64
}

func traitsOf(s region.Store, most int64) (t traits, err error) {
	t.viewer, _ = s.(region.Viewer)
	t.extents, _ = s.(region.Extenter)
	t.zeroer, _ = s.(region.Zeroer)
	t.trimmer, _ = s.(region.Trimmer)
	t.cacher, _ = s.(region.Cacher)
	t.blocks = region.Blocks{Minimum: 1, Preferred: 4096, Maximum: most}
	if b, ok := s.(region.Blocker); ok {
		if t.blocks = b.Blocks(); t.blocks.Maximum == 0 || t.blocks.Maximum > most {
			t.blocks.Maximum = most
		}
		t.blocks.Preferred = max(t.blocks.Preferred, t.blocks.Minimum, 512)
	}
	e := Export{Size: s.Size(), Flags: FlagHasFlags, Blocks: t.blocks}
	if err := e.validate(); err != nil {
		return t, err
	}
	t.size = uint64(s.Size())
	t.flags = FlagHasFlags | FlagFlush | FlagFUA | FlagMultiConn | FlagWriteZeroes | FlagFastZero
	if t.trimmer != nil {
		t.flags |= FlagTrim
	}
	if r, ok := s.(region.ReadOnlyer); ok && r.ReadOnly() {
		t.flags = FlagHasFlags | FlagReadOnly | FlagFlush | FlagFUA | FlagMultiConn
	}
	if t.cacher != nil {
		t.flags |= FlagCache
	}
	return t, nil
}

func (t *Transport) serve(ctx context.Context, nc net.Conn, e transport.Exports) error {
	ctx, fail := context.WithCancelCause(ctx)
	place := transport.PlaceOf(ctx)
	s := &session{t: t, l: newLink(nc), named: e, exports: transport.As(e, ""), stall: cmp.Or(t.StallTimeout, place.Limits().Stall), fail: fail, place: place, most: place.Request(maxPayload)}
	closed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		s.l.close()
		close(closed)
	})
	err := s.run(ctx)
	ended := ctx.Err() != nil
	cause := context.Cause(ctx)
	fail(nil)
	if stop() {
		s.l.close()
	} else {
		<-closed
	}
	s.work.Wait()
	s.grant.End()
	switch {
	case err == nil:
		return nil
	case ended:
		err = cause // why the link was closed
	case errors.Is(err, ErrProtocol), errors.Is(err, os.ErrDeadlineExceeded):
	default:
		err = eof(err)
	}
	return fmt.Errorf("serve NBD connection: %w", err)
}

func (s *session) run(ctx context.Context) error {
	tuneTCP(s.l.out.Conn)
	timeout := cmp.Or(s.t.HandshakeTimeout, s.place.Limits().Handshake)
	s.l.out.SetDeadline(time.Now().Add(timeout))
	proceed, err := s.handshake(ctx)
	if err != nil && errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("handshake not finished within %v: %w", timeout, err)
	}
	if err != nil || !proceed {
		return err
	}
	s.l.out.SetDeadline(time.Time{})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	// Each poll(2) holds a thread; a crowd of connections shares Go's poller.
	if s.t.polling.Add(1) <= maxPolling {
		if err := s.l.enterTransmission(false); err != nil {
			s.t.polling.Add(-1)
			return err
		}
	}
	defer s.t.polling.Add(-1)
	return s.transmission(ctx)
}

// handshake answers options until one of them enters transmission (true) or
// the client leaves (false).
func (s *session) handshake(ctx context.Context) (proceed bool, err error) {
	hello := be.AppendUint16(be.AppendUint64(be.AppendUint64(nil, magicInit), magicOption), flagFixedNewstyle|flagNoZeroes)
	_, err = s.l.conn.Write(hello)
	if err == nil {
		err = s.l.need(4, 0)
	}
	if err != nil {
		gone := err == io.EOF || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
		if gone && len(s.l.buffered()) == 0 {
			return false, nil // looked and left
		}
		return false, err
	}
	flags := be.Uint32(s.l.buffered())
	s.l.consume(4)
	if flags&^(flagFixedNewstyle|flagNoZeroes) != 0 {
		return false, protocolError("unknown client flags 0x%08x", flags)
	}
	fixed := flags&flagFixedNewstyle != 0
	var out []byte
	for range maxOptions {
		if len(out) > maxOption || len(out) > 0 && len(s.l.buffered()) < optionSize { // options may come in bulk; so do the answers
			if _, err := s.l.conn.Write(out); err != nil {
				return false, err
			}
			out = out[:0]
		}
		if err := s.l.need(optionSize, 0); err != nil {
			if err == io.EOF && len(s.l.buffered()) == 0 {
				return false, nil
			}
			return false, err
		}
		h := s.l.buffered()
		if m := be.Uint64(h); m != magicOption {
			return false, protocolError("option magic 0x%016x", m)
		}
		o, n := option(be.Uint32(h[8:])), be.Uint32(h[12:])
		s.l.consume(optionSize)
		if n > maxOptionSkip {
			return false, protocolError("%v with %d bytes of data, the limit is %d", o, n, maxOptionSkip)
		}
		if n > maxOption {
			if o == optExportName {
				return false, protocolError("%v with a name of %d bytes", o, n)
			}
			if err := s.l.skip(uint64(n), 0); err != nil {
				return false, err
			}
			out = appendOptReply(out, o, repErrTooBig, fmt.Appendf(nil, "%d bytes of option data, the limit is %d", n, maxOption))
			continue
		}
		data := make([]byte, n)
		if err := s.l.readFull(data, 0); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return false, err
		}
		if !fixed && o != optExportName {
			return false, protocolError("%v from a client that does not speak the fixed newstyle protocol", o)
		}
		done := false
		switch {
		case o == optAbort:
			s.l.conn.Write(appendOptReply(out, o, repAck, nil)) // it may be gone already
			s.l.bye()
			return false, nil
		case o == optExportName:
			proceed, done = true, true
			out, err = s.exportName(out, string(data), flags)
		case s.t.RequireTLS && !s.tls && o != optStartTLS:
			out = appendOptReply(out, o, repErrTLSReqd, nil)
		case o == optStartTLS:
			out, err = s.startTLS(ctx, out, data)
		default:
			out, proceed = s.option(out, o, data)
			done = proceed
		}
		if err != nil {
			return false, err
		}
		if done {
			_, err := s.l.conn.Write(out)
			return proceed, err
		}
	}
	return false, protocolError("more than %d options", maxOptions)
}

// open finds the export called name, once for the connection.
func (s *session) open(name string) error {
	if s.hasStore && s.export == name {
		return nil
	}
	if len(name) > maxString {
		return fmt.Errorf("export name of %d bytes: %w", len(name), region.ErrMissing)
	}
	store, err := s.exports.Open(name)
	if err != nil {
		return err
	}
	var grant *transport.Grant
	if l, ok := s.exports.(transport.Leaser); ok {
		if grant, err = l.Lease(name, ""); err != nil {
			return err
		}
	}
	tr, err := traitsOf(store, s.most)
	if err != nil {
		return fmt.Errorf("export %q: %w", name, err)
	}
	s.grant.End() // of another export
	s.store, s.traits, s.export, s.hasStore = store, tr, name, true
	s.grant = grant
	return nil
}

// lease makes the client the only writer of the export that is open, and returns
// its epoch; 0 where there are no leases.
func (s *session) lease(writer string) (uint32, error) {
	l, ok := s.exports.(transport.Leaser)
	if !ok || writer == "" || len(writer) > maxString {
		return 0, nil
	}
	grant, err := l.Lease(s.export, writer)
	if err != nil {
		return 0, err
	}
	s.grant.End()
	s.grant = grant
	return grant.Epoch(), nil
}

// transmissionFlags are the export's, for what was negotiated.
func (s *session) transmissionFlags() Flags {
	f := s.traits.flags
	if s.style != simple {
		f |= FlagDF
	}
	if s.style == extended && s.metaFor != nil && *s.metaFor == s.export {
		f |= flagStatusPayload
	}
	return f
}

func (s *session) exportName(out []byte, name string, clientFlags uint32) ([]byte, error) {
	if s.t.RequireTLS && !s.tls {
		return nil, protocolError("%v without TLS", optExportName)
	}
	if s.style == extended {
		return nil, protocolError("%v after %v", optExportName, optExtendedHeaders)
	}
	if err := s.open(name); err != nil {
		return nil, fmt.Errorf("%v %q: %w", optExportName, name, err)
	}
	out = be.AppendUint64(out, s.traits.size)
	out = be.AppendUint16(out, uint16(s.transmissionFlags()))
	if clientFlags&flagNoZeroes == 0 {
		out = append(out, make([]byte, exportNameZeroes)...)
	}
	return out, nil
}

func (s *session) startTLS(ctx context.Context, out, data []byte) ([]byte, error) {
	switch {
	case s.t.ServerTLS == nil:
		return appendOptReply(out, optStartTLS, repErrPolicy, []byte("no TLS here")), nil
	case s.tls || len(data) > 0:
		return appendOptReply(out, optStartTLS, repErrInvalid, nil), nil
	}
	if _, err := s.l.conn.Write(appendOptReply(out, optStartTLS, repAck, nil)); err != nil {
		return nil, err
	}
	// What is already there must be the TLS session's: as TLS it is checked.
	early := slices.Clone(s.l.buffered())
	s.l.consume(len(early))
	t := tls.Server(&earlyConn{s.l.out, early}, s.t.ServerTLS)
	if err := t.HandshakeContext(ctx); err != nil {
		return nil, transport.TLSError("client", err)
	}
	s.l.conn = t
	s.exports = transport.As(s.named, transport.Identity(t.ConnectionState()))
	s.tls, s.style, s.metaFor, s.hasStore = true, simple, nil, false
	return nil, nil
}

// earlyConn is a net.Conn of which some bytes are already read.
type earlyConn struct {
	net.Conn
	early []byte
}

func (e *earlyConn) Read(p []byte) (int, error) {
	if len(e.early) > 0 {
		n := copy(p, e.early)
		e.early = e.early[n:]
		return n, nil
	}
	return e.Conn.Read(p)
}

// option answers an option that changes nothing below it. proceed tells that
// transmission begins.
func (s *session) option(out []byte, o option, data []byte) (_ []byte, proceed bool) {
	refuse := func(typ uint32, format string, a ...any) ([]byte, bool) {
		msg := fmt.Sprintf(format, a...)
		return appendOptReply(out, o, typ, []byte(msg[:min(len(msg), maxErrorString)])), false
	}
	switch o {
	case optList:
		if len(data) > 0 {
			return refuse(repErrInvalid, "option with data")
		}
		for _, name := range s.exports.List() {
			if len(name) <= maxString {
				out = appendOptReply(out, o, repServer, appendString(nil, name))
			}
		}
		return appendOptReply(out, o, repAck, nil), false

	case optStructuredReply, optExtendedHeaders:
		if len(data) > 0 {
			return refuse(repErrInvalid, "option with data")
		}
		if o == optExtendedHeaders {
			s.style = extended
		} else if s.style == extended {
			return refuse(repErrExtHeaderReqd, "extended headers are in use")
		} else {
			s.style = structured
		}
		return appendOptReply(out, o, repAck, nil), false

	case optInfo, optGo:
		name, infos, ok := parseGo(data)
		if !ok {
			return refuse(repErrInvalid, "malformed request")
		}
		if err := s.open(name); err != nil {
			if errors.Is(err, region.ErrMissing) {
				return refuse(repErrUnknown, "export %q: %v", name, err)
			}
			return refuse(repErrPolicy, "export %q: %v", name, err)
		}
		info := be.AppendUint64(be.AppendUint16(nil, infoExport), s.traits.size)
		out = appendOptReply(out, o, repInfo, be.AppendUint16(info, uint16(s.transmissionFlags())))
		if slices.Contains(infos, infoName) {
			out = appendOptReply(out, o, repInfo, append(be.AppendUint16(nil, infoName), name...))
		}
		b := s.traits.blocks
		asked := slices.Contains(infos, infoBlockSize)
		if asked || b.Minimum > 1 {
			info := be.AppendUint16(nil, infoBlockSize)
			for _, n := range []int64{b.Minimum, b.Preferred, b.Maximum} {
				info = be.AppendUint32(info, uint32(n))
			}
			out = appendOptReply(out, o, repInfo, info)
		}
		if !asked && b.Minimum > 1 {
			return refuse(repErrBlockSizeReqd, "requests must be multiples of %d bytes", b.Minimum)
		}
		return appendOptReply(out, o, repAck, nil), o == optGo

	case optListMetaContext, optSetMetaContext:
		if o == optSetMetaContext {
			s.metaFor = nil
		}
		name, queries, ok := parseMeta(data)
		if !ok {
			return refuse(repErrInvalid, "malformed request")
		}
		if s.style == simple {
			return refuse(repErrInvalid, "structured replies come first")
		}
		if err := s.open(name); err != nil {
			return refuse(repErrUnknown, "export %q: %v", name, err)
		}
		found := o == optListMetaContext && len(queries) == 0
		for _, q := range queries {
			if writer, ok := strings.CutPrefix(q, leaseContext); ok && o == optSetMetaContext {
				epoch, err := s.lease(writer)
				if err != nil {
					return refuse(repErrPolicy, "%v", err)
				}
				if epoch != 0 {
					out = appendOptReply(out, o, repMetaContext, append(be.AppendUint32(nil, epoch), q...))
				}
			}
			if !strings.Contains(q, ":") {
				return refuse(repErrInvalid, "query %.100q has no namespace", q)
			}
			found = found || q == baseAllocation || o == optListMetaContext && q == "base:"
		}
		if found {
			id := uint32(0)
			if o == optSetMetaContext {
				id, s.metaFor = baseAllocationID, &name
			}
			out = appendOptReply(out, o, repMetaContext, append(be.AppendUint32(nil, id), baseAllocation...))
		}
		return appendOptReply(out, o, repAck, nil), false
	}
	return refuse(repErrUnsup, "%v is not known here", o)
}
