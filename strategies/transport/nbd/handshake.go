package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"strings"
	"time"

	"memsync/strategies/region"
	"memsync/strategies/transport"
)

// Export is what a server says about an export when it is opened.
type Export struct {
	Name        string
	Description string
	Size        int64 // bytes
	Flags       Flags
	Blocks      region.Blocks // defaults (1, 4096, 32 MiB) where the server names none
	Structured  bool          // structured replies are in use
	Extended    bool          // extended headers are in use
	Allocation  bool          // block status with base:allocation is on offer
	TLS         bool

	meta  uint32
	lease uint32 // its epoch; 0 where the server grants none
}

func (e Export) style() replyStyle {
	switch {
	case e.Extended:
		return extended
	case e.Structured:
		return structured
	}
	return simple
}

// optReply is one reply to an option.
type optReply struct {
	typ  uint32
	data []byte
}

// err turns an error reply into an error.
func (r optReply) err(o option) error {
	kind, what := error(nil), fmt.Sprintf("error 0x%x", r.typ)
	switch r.typ {
	case repErrUnsup:
		kind, what = region.ErrNotSupported, "unsupported option"
	case repErrPolicy:
		kind, what = region.ErrNotPermitted, "forbidden by policy"
	case repErrInvalid:
		what = "invalid"
	case repErrPlatform:
		kind, what = region.ErrNotSupported, "not supported by its platform"
	case repErrTLSReqd:
		kind, what = region.ErrNotPermitted, "TLS required"
	case repErrUnknown:
		kind, what = region.ErrMissing, "no such export"
	case repErrShutdown:
		kind, what = region.ErrPeerGone, "shutting down"
	case repErrBlockSizeReqd:
		what = "block size required"
	case repErrTooBig:
		what = "too big"
	case repErrExtHeaderReqd:
		what = "extended headers required"
	}
	text := fmt.Sprintf("%v: server answers %s", o, what)
	if len(r.data) > 0 {
		text += fmt.Sprintf(" (%.200q)", r.data)
	}
	if kind == nil {
		return errors.New(text)
	}
	return fmt.Errorf("%s: %w", text, kind)
}

// readOptReply reads the next reply, which must be to o.
func (l *link) readOptReply(o option) (r optReply, err error) {
	var h [optReplySize]byte
	if err := l.readFull(h[:], 0); err != nil {
		return r, fmt.Errorf("reply to %v: %w", o, eof(err))
	}
	if m := be.Uint64(h[:]); m != magicOptReply {
		return r, protocolError("reply to %v: magic 0x%016x", o, m)
	}
	if got := option(be.Uint32(h[8:])); got != o {
		return r, protocolError("reply to %v where one to %v is due", got, o)
	}
	r.typ = be.Uint32(h[12:])
	n := be.Uint32(h[16:])
	if n > maxOptReply {
		return r, protocolError("reply to %v of %d bytes, the limit is %d", o, n, maxOptReply)
	}
	r.data = make([]byte, n)
	if err := l.readFull(r.data, 0); err != nil {
		return r, fmt.Errorf("reply to %v: %w", o, eof(err))
	}
	return r, nil
}

// replies reads the replies to o up to the one that ends them, which it
// returns; each gets the others.
func (l *link) replies(o option, each func(optReply) error) (optReply, error) {
	for range maxOptReplies {
		r, err := l.readOptReply(o)
		if err != nil || r.typ == repAck || r.typ&repErr != 0 {
			if err == nil && r.typ == repAck && len(r.data) > 0 {
				err = protocolError("acknowledgement of %v with %d bytes of data", o, len(r.data))
			}
			return r, err
		}
		if each == nil {
			return r, protocolError("reply of type %d to %v", r.typ, o)
		}
		if err := each(r); err != nil {
			return r, err
		}
	}
	return optReply{}, protocolError("more than %d replies to %v", maxOptReplies, o)
}

// eof makes the end of the stream in the middle of something an error that matches region.ErrPeerGone.
func eof(err error) error {
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return peerGone("connection", err)
}

// begin bounds a handshake on nc by ctx. end lifts the bound; its error is ctx's.
func begin(ctx context.Context, nc net.Conn) (end func() error) {
	if d, ok := ctx.Deadline(); ok {
		nc.SetDeadline(d)
	}
	stop := context.AfterFunc(ctx, func() { nc.SetDeadline(time.Unix(1, 0)) })
	return func() error {
		if !stop() {
			return ctx.Err()
		}
		return nc.SetDeadline(time.Time{})
	}
}

// post writes b without waiting for it, once for a handshake: a connection
// without buffers, such as net.Pipe, takes nothing while both sides write.
func (l *link) post(b []byte) {
	c := l.conn
	l.posted = make(chan error, 1)
	go func() {
		_, err := c.Write(b)
		l.posted <- err
	}()
}

// join waits for the end of post.
func (l *link) join() error {
	if l.posted == nil {
		return nil
	}
	err := <-l.posted
	if l.posted = nil; err != nil {
		return fmt.Errorf("send options: %w", eof(err))
	}
	return nil
}

// greet sends flags with more behind them, and checks the server's greeting.
// The caller must join.
//
// The client does not wait for the greeting before it sends: nothing that it
// sends depends on it (NBD_FLAG_C_NO_ZEROES is left out for that reason), and
// that saves a round trip.
func (l *link) greet(more []byte) error {
	l.post(append(be.AppendUint32(nil, flagFixedNewstyle), more...))
	var h [18]byte
	if err := l.readFull(h[:16], 0); err != nil {
		return fmt.Errorf("read greeting: %w", eof(err))
	}
	if m := be.Uint64(h[:]); m != magicInit {
		return protocolError("greeting 0x%016x is not NBD's", m)
	}
	switch m := be.Uint64(h[8:]); m {
	case magicOption:
	case magicOld:
		return fmt.Errorf("server speaks the oldstyle protocol: %w", region.ErrNotSupported)
	default:
		return protocolError("greeting with magic 0x%016x", m)
	}
	if err := l.readFull(h[16:], 0); err != nil {
		return fmt.Errorf("read greeting: %w", eof(err))
	}
	if f := be.Uint16(h[16:]); f&flagFixedNewstyle == 0 {
		return fmt.Errorf("server does not speak the fixed newstyle protocol (flags 0x%04x): %w", f, region.ErrNotSupported)
	}
	return nil
}

// startTLS upgrades a connection that has sent nothing yet.
func (l *link) startTLS(ctx context.Context, cfg *tls.Config) error {
	if err := l.greet(appendOption(nil, optStartTLS, nil)); err != nil {
		return err
	}
	r, err := l.replies(optStartTLS, nil)
	if err != nil {
		return err
	}
	if err := l.join(); err != nil {
		return err
	}
	if r.typ != repAck {
		return r.err(optStartTLS)
	}
	if len(l.buffered()) > 0 { // plaintext that an attacker put in front of the session
		return protocolError("%d bytes after the acknowledgement of %v", len(l.buffered()), optStartTLS)
	}
	t := tls.Client(l.out, cfg)
	if err := t.HandshakeContext(ctx); err != nil {
		return transport.TLSError("source", err)
	}
	l.conn = t
	return nil
}

// negotiate opens the export called name on nc. With compact it asks for
// nothing that a plain client, such as the kernel's, does not know. The last option,
// NBD_OPT_GO or NBD_OPT_INFO, says whether requests follow.
func (t *Transport) negotiate(ctx context.Context, nc net.Conn, name, writer string, compact bool, last option) (l *link, e Export, err error) {
	if len(name) > maxString {
		return nil, e, fmt.Errorf("export name of %d bytes, the limit is %d", len(name), maxString)
	}
	l = newLink(nc)
	end, join := begin(ctx, nc), l.join
	defer func() {
		if err != nil {
			nc.SetDeadline(time.Unix(1, 0))
		}
		if e := join(); e != nil && err == nil {
			err = e
		}
		if e := end(); e != nil {
			err = e
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = fmt.Errorf("NBD handshake: %w", context.DeadlineExceeded)
		}
	}()

	// All options go out at once: one round trip for all their answers.
	var b []byte
	if !compact {
		queries := []string{baseAllocation}
		if writer != "" {
			queries = append(queries, leaseContext+writer)
		}
		meta := be.AppendUint32(appendString(nil, name), uint32(len(queries)))
		for _, q := range queries {
			meta = appendString(meta, q)
		}
		b = appendOption(b, optStructuredReply, nil)
		b = appendOption(b, optExtendedHeaders, nil)
		b = appendOption(b, optSetMetaContext, meta)
	}
	goData := be.AppendUint16(appendString(nil, name), 2)
	goData = be.AppendUint16(be.AppendUint16(goData, infoBlockSize), infoDescription)
	b = appendOption(b, last, goData)
	if t.ClientTLS != nil {
		if err := l.startTLS(ctx, t.ClientTLS); err != nil {
			return nil, e, err
		}
		e.TLS = true
		l.post(b)
	} else if err := l.greet(b); err != nil {
		return nil, e, err
	}

	e.Name, e.Size = name, -1
	e.Blocks = region.Blocks{Minimum: 1, Preferred: 4096, Maximum: maxPayload}
	if !compact {
		for _, o := range []option{optStructuredReply, optExtendedHeaders} {
			r, err := l.replies(o, nil)
			if err != nil {
				return nil, e, err
			}
			switch ok := r.typ == repAck; o {
			case optStructuredReply:
				e.Structured = ok
			case optExtendedHeaders:
				e.Extended = ok
			}
		}
		if r, err := l.replies(optSetMetaContext, e.metaContext); err != nil {
			return nil, e, err
		} else if writer != "" && r.typ == repErrPolicy {
			return nil, e, r.err(optSetMetaContext)
		} else if r.typ != repAck {
			e.Allocation, e.lease = false, 0
		}
	}
	r, err := l.replies(last, e.info)
	switch {
	case err != nil:
		return nil, e, err
	case r.typ == repErrUnsup && !e.Extended && last == optGo:
		err = l.exportName(name, &e)
	case r.typ != repAck:
		err = r.err(last)
	case e.Size < 0:
		err = protocolError("%v is acknowledged without NBD_INFO_EXPORT", last)
	}
	if err == nil {
		err = e.validate()
	}
	return l, e, err
}

// metaContext takes a reply to NBD_OPT_SET_META_CONTEXT.
func (e *Export) metaContext(r optReply) error {
	if r.typ != repMetaContext || len(r.data) < 4 || len(r.data) > 4+maxString {
		return protocolError("reply of type %d and %d bytes to %v", r.typ, len(r.data), optSetMetaContext)
	}
	if strings.HasPrefix(string(r.data[4:]), leaseContext) && e.lease == 0 {
		e.lease = be.Uint32(r.data)
		return nil
	}
	if string(r.data[4:]) != baseAllocation || e.Allocation {
		return protocolError("metadata context %.200q, which was not asked for", r.data[4:])
	}
	e.Allocation, e.meta = true, be.Uint32(r.data)
	return nil
}

// info takes a reply to NBD_OPT_GO or NBD_OPT_INFO.
func (e *Export) info(r optReply) error {
	if r.typ != repInfo || len(r.data) < 2 {
		return protocolError("reply of type %d and %d bytes to %v", r.typ, len(r.data), optGo)
	}
	d := r.data[2:]
	bad := func(want int) error {
		return protocolError("NBD_REP_INFO of type %d has %d bytes, want %d", be.Uint16(r.data), len(r.data), want)
	}
	switch be.Uint16(r.data) {
	case infoExport:
		if len(d) != 10 {
			return bad(12)
		}
		return e.setSize(be.Uint64(d), be.Uint16(d[8:]))
	case infoName:
		if len(d) <= maxString && len(d) > 0 {
			e.Name = string(d)
		}
	case infoDescription:
		if len(d) <= maxString {
			e.Description = string(d)
		}
	case infoBlockSize:
		if len(d) != 12 {
			return bad(14)
		}
		e.Blocks = region.Blocks{Minimum: int64(be.Uint32(d)), Preferred: int64(be.Uint32(d[4:])), Maximum: int64(be.Uint32(d[8:]))}
	}
	return nil
}

func (e *Export) setSize(size uint64, flags uint16) error {
	if size > math.MaxInt64 {
		return protocolError("export of %d bytes", size)
	}
	e.Size, e.Flags = int64(size), Flags(flags)
	return nil
}

// validate checks what the server said once all is known.
func (e *Export) validate() error {
	b := &e.Blocks
	pow2 := func(n int64) bool { return n > 0 && n&(n-1) == 0 }
	if !pow2(b.Minimum) || b.Minimum > 1<<16 || !pow2(b.Preferred) || b.Preferred < b.Minimum || b.Maximum < b.Minimum {
		return protocolError("block sizes %d, %d, %d (minimum, preferred, maximum)", b.Minimum, b.Preferred, b.Maximum)
	}
	b.Maximum = min(b.Maximum, maxPayload)
	if e.Flags&FlagHasFlags == 0 {
		return protocolError("transmission flags 0x%04x lack NBD_FLAG_HAS_FLAGS", uint16(e.Flags))
	}
	if e.Size%b.Minimum != 0 {
		return fmt.Errorf("export of %d bytes is no multiple of its minimum block, %d: its end cannot be reached: %w", e.Size, b.Minimum, region.ErrNotSupported)
	}
	if e.style() == simple {
		e.Allocation = false
	}
	return nil
}

// exportName opens an export on a server that does not know NBD_OPT_GO.
func (l *link) exportName(name string, e *Export) error {
	if _, err := l.conn.Write(appendOption(nil, optExportName, []byte(name))); err != nil {
		return fmt.Errorf("send %v: %w", optExportName, eof(err))
	}
	var d [10 + exportNameZeroes]byte
	if err := l.readFull(d[:], 0); err != nil {
		return fmt.Errorf("%v %q (a server without it hangs up): %w", optExportName, name, eof(err))
	}
	return e.setSize(be.Uint64(d[:]), be.Uint16(d[8:]))
}

// Negotiate opens the export called name on conn and leaves conn at the start
// of the transmission phase, for a client that only knows simple replies: the
// kernel's. It blocks until then, at most for the handshake's timeout. conn is
// the caller's also after an error.
func (t *Transport) Negotiate(ctx context.Context, conn net.Conn, name string) (Export, error) {
	if t.ClientTLS != nil {
		return Export{}, fmt.Errorf("negotiate NBD export %q for another client: TLS: %w", name, region.ErrNotSupported)
	}
	ctx, cancel := context.WithTimeout(ctx, t.handshakeTimeout())
	defer cancel()
	l, e, err := t.negotiate(ctx, conn, name, "", true, optGo)
	if err == nil && len(l.buffered()) > 0 {
		err = protocolError("%d bytes after the handshake, before any request", len(l.buffered()))
	}
	if err != nil {
		return Export{}, fmt.Errorf("negotiate NBD export %q: %w", name, err)
	}
	return e, nil
}

// Info asks the server on conn about an export by NBD_OPT_INFO, without opening
// it, and disconnects; conn is of no use afterwards. It blocks at most for the
// handshake's timeout. A missing export gives region.ErrMissing; a server that does
// not know the option region.ErrNotSupported.
func (t *Transport) Info(ctx context.Context, conn net.Conn, name string) (Export, error) {
	ctx, cancel := context.WithTimeout(ctx, t.handshakeTimeout())
	defer cancel()
	defer conn.Close()
	l, e, err := t.negotiate(ctx, conn, name, "", true, optInfo)
	if err != nil {
		return Export{}, fmt.Errorf("ask about NBD export %q: %w", name, err)
	}
	conn.SetWriteDeadline(time.Now().Add(time.Second)) // of a courtesy
	l.conn.Write(appendOption(nil, optAbort, nil))
	return e, nil
}

// List asks the server on conn for the names of its exports, and disconnects;
// conn is of no use afterwards. It blocks at most for the handshake's timeout.
func (t *Transport) List(ctx context.Context, conn net.Conn) (names []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, t.handshakeTimeout())
	defer cancel()
	l := newLink(conn)
	end := begin(ctx, conn)
	defer func() {
		conn.Close()
		l.join()
		end()
	}()
	opts := appendOption(nil, optList, nil)
	if t.ClientTLS != nil {
		if err := l.startTLS(ctx, t.ClientTLS); err != nil {
			return nil, fmt.Errorf("list NBD exports: %w", err)
		}
		l.post(opts)
	} else {
		err = l.greet(opts)
	}
	if err != nil {
		return nil, fmt.Errorf("list NBD exports: %w", err)
	}
	total := 0
	r, err := l.replies(optList, func(r optReply) error {
		name, _, ok := takeString(r.data)
		if r.typ != repServer || !ok {
			return protocolError("reply of type %d and %d bytes to %v", r.typ, len(r.data), optList)
		}
		if total += len(name); total > maxListed {
			return protocolError("names of more than %d bytes in reply to %v", maxListed, optList)
		}
		names = append(names, name)
		return nil
	})
	if err == nil && r.typ != repAck {
		err = r.err(optList)
	}
	if err == nil {
		err = l.join()
	}
	if err != nil {
		return nil, fmt.Errorf("list NBD exports: %w", err)
	}
	// Not together with the list: nbd-server then resets the connection before
	// its answer is read.
	l.conn.Write(appendOption(nil, optAbort, nil))
	return names, nil
}
