package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"memsync/strategies/region"
)

// transmission answers requests until the client disconnects.
func (s *session) transmission(ctx context.Context) error {
	ext := s.style == extended
	hlen := requestLen(ext)
	for {
		if len(s.l.buffered()) < hlen {
			// Something to send goes out before the reader waits.
			if err := s.flush(); err != nil {
				return err
			}
			if len(s.l.buffered()) == 0 {
				if err := s.await(); err != nil {
					if err == io.EOF { // between two requests: a hard but orderly end
						s.fail(nil)
						return nil
					}
					return err
				}
			}
			if err := s.l.need(hlen, s.stall); err != nil {
				return fmt.Errorf("request header: %w", eof(err))
			}
		}
		r, err := parseRequest(s.l.buffered(), ext)
		if err != nil {
			return err
		}
		s.l.consume(hlen)
		if r.cmd == cmdDisc {
			if err := s.flush(); err != nil {
				return err
			}
			s.work.Wait()
			s.w.Lock()
			defer s.w.Unlock()
			s.l.bye()
			return nil
		}
		if err := s.request(ctx, r); err != nil {
			return err
		}
	}
}

// await waits for the next request, as long as a client may ask for nothing.
func (s *session) await() error {
	idle := s.place.Limits().Idle
	if idle == 0 {
		return s.l.need(1, 0)
	}
	for {
		err := s.l.need(1, idle)
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		if s.busy.Load() == 0 { // else what it asked for takes long
			return fmt.Errorf("no request for %v: %w", idle, err)
		}
	}
}

// request takes one request's payload and answers it, or has it answered.
func (s *session) request(ctx context.Context, r request) (err error) {
	s.l.spin.soon = r.length < directLimit
	payload := r.payload(s.style == extended)
	if payload > maxPayload {
		return protocolError("%v with a payload of %d bytes, the limit is %d", r.cmd, payload, maxPayload)
	}
	if no, msg := s.check(&r); no != 0 {
		if err := s.l.skip(payload, s.stall); err != nil {
			return fmt.Errorf("payload: %w", eof(err))
		}
		return s.queueError(r, no, msg)
	}
	if r.cmd == cmdRead {
		if done, err := s.readNow(ctx, r); done || err != nil {
			return err
		}
	}

	// What is left needs memory or time.
	weight := int64(requestMemory)
	switch {
	case r.cmd == cmdRead && s.style != simple && r.flags&cmdFlagDF == 0:
		weight = max(weight, min(int64(r.length), readPiece))
	case r.cmd == cmdRead, r.cmd == cmdWrite:
		weight = max(weight, min(int64(r.length), requestPiece))
	case r.cmd == cmdWriteZeroes:
		weight = readPiece
	}
	free := s.place.TryWork(weight)
	if free == nil {
		if err := s.flush(); err != nil {
			return err
		}
		if free, err = s.place.Work(ctx, weight); err != nil {
			return err
		}
	}
	if payload > requestPiece {
		defer free()
		return s.writePieces(ctx, r)
	}
	var data *[]byte
	if payload > 0 {
		data = s.t.buffers.Get(int(payload))
		if err := s.l.readFull(*data, s.stall); err != nil {
			free()
			return fmt.Errorf("payload of %v: %w", r.cmd, eof(err))
		}
	}
	if r.cmd == cmdBlockStatus && data != nil {
		no, msg := s.statusPayload(&r, *data)
		s.t.buffers.Put(data)
		data = nil
		if no != 0 {
			free()
			return s.queueError(r, no, msg)
		}
	}
	if r.cmd == cmdWrite && data != nil && r.flags&cmdFlagFUA == 0 && s.traits.viewer != nil {
		if _, ok := s.traits.viewer.View(int64(r.off), int64(r.length)); ok { // in memory: as quick as a hand-over
			end, err := s.grant.Begin()
			if err == nil {
				err = s.store.WriteAt(ctx, *data, int64(r.off))
				end()
			}
			s.t.buffers.Put(data)
			free()
			if err != nil {
				return s.queueError(r, errnoOf(err, r.cmd), err.Error())
			}
			return s.queueDone(r)
		}
	}
	s.work.Add(1)
	s.busy.Add(1)
	go func() {
		defer s.work.Done()
		defer s.busy.Add(-1)
		err := s.perform(ctx, r, data)
		if data != nil {
			s.t.buffers.Put(data)
		}
		free()
		if err != nil {
			s.fail(err) // the link is broken: the reader must end too
		}
	}()
	return nil
}

// writePieces carries out a write whose payload is more than memory is taken for: a
// piece of it is written before the next one is received.
func (s *session) writePieces(ctx context.Context, r request) error {
	end, failed := s.grant.Begin()
	if failed == nil {
		defer end()
	}
	b := s.t.buffers.Get(requestPiece)
	defer s.t.buffers.Put(b)
	for off, left := int64(r.off), int64(r.length); left > 0; {
		p := (*b)[:min(left, requestPiece)]
		if err := s.l.readFull(p, s.stall); err != nil {
			return fmt.Errorf("payload of %v: %w", r.cmd, eof(err))
		}
		if failed == nil {
			failed = s.store.WriteAt(ctx, p, off)
		}
		off, left = off+int64(len(p)), left-int64(len(p))
	}
	if failed == nil && r.flags&cmdFlagFUA != 0 {
		failed = s.store.Flush(ctx)
	}
	if failed != nil {
		return s.queueError(r, errnoOf(failed, r.cmd), failed.Error())
	}
	return s.queueDone(r)
}

// fenced reports whether a write would be refused now.
func (s *session) fenced() bool {
	end, err := s.grant.Begin()
	if err != nil {
		return true
	}
	end()
	return false
}

// check returns what is wrong with a request, or 0.
func (s *session) check(r *request) (Errno, string) {
	tr := &s.traits
	allowed := uint16(cmdFlagFUA)
	switch r.cmd {
	case cmdRead, cmdWrite, cmdFlush, cmdTrim, cmdCache:
	case cmdWriteZeroes:
		allowed |= cmdFlagNoHole | cmdFlagFastZero
	case cmdBlockStatus:
		allowed |= cmdFlagReqOne
	default:
		return EINVAL, fmt.Sprintf("unknown %v", r.cmd)
	}
	if r.cmd == cmdRead && s.style != simple {
		allowed |= cmdFlagDF
	}
	status := s.metaFor != nil && *s.metaFor == s.export
	if s.style == extended {
		if r.cmd == cmdWrite {
			if r.flags&cmdFlagPayloadLen == 0 && r.length > 0 {
				return EINVAL, "write without NBD_CMD_FLAG_PAYLOAD_LEN"
			}
			allowed |= cmdFlagPayloadLen
		}
		if r.cmd == cmdBlockStatus && status {
			allowed |= cmdFlagPayloadLen
			if r.flags&cmdFlagPayloadLen != 0 && r.length > maxStatusPayload {
				return EINVAL, fmt.Sprintf("%v with a payload of %d bytes, the limit is %d", r.cmd, r.length, maxStatusPayload)
			}
		}
	}
	if bad := r.flags &^ allowed; bad != 0 {
		return EINVAL, fmt.Sprintf("flags 0x%x do not go with %v", bad, r.cmd)
	}
	write := r.cmd == cmdWrite || r.cmd == cmdTrim || r.cmd == cmdWriteZeroes
	switch {
	case r.cmd == cmdFlush:
		if r.off != 0 || r.length != 0 {
			return EINVAL, "flush of a range"
		}
		return 0, ""
	case write && s.fenced():
		return EPERM, "another host has the lease to write"
	case write && tr.flags&FlagReadOnly != 0:
		return EPERM, "export is read-only"
	case r.cmd == cmdTrim && tr.trimmer == nil, r.cmd == cmdCache && tr.cacher == nil:
		return EINVAL, fmt.Sprintf("%v is not offered", r.cmd)
	case r.cmd == cmdBlockStatus && !status:
		return EINVAL, "block status without a metadata context"
	case r.cmd == cmdBlockStatus && r.flags&cmdFlagPayloadLen != 0:
		return 0, "" // its range is in the payload
	}
	if r.off > tr.size || r.length > tr.size-r.off {
		msg := fmt.Sprintf("range [%d, +%d) of %d bytes", r.off, r.length, tr.size)
		if r.cmd == cmdWrite || r.cmd == cmdWriteZeroes {
			return ENOSPC, msg
		}
		return EINVAL, msg
	}
	if (r.off|r.length)&uint64(tr.blocks.Minimum-1) != 0 {
		return EINVAL, fmt.Sprintf("range [%d, +%d) is not made of blocks of %d bytes", r.off, r.length, tr.blocks.Minimum)
	}
	if (r.cmd == cmdRead || r.cmd == cmdWrite) && r.length > uint64(tr.blocks.Maximum) {
		return EINVAL, fmt.Sprintf("%v of %d bytes, the limit is %d", r.cmd, r.length, tr.blocks.Maximum)
	}
	return 0, ""
}

// statusPayload takes the effective range from a block status request's payload.
func (s *session) statusPayload(r *request, b []byte) (Errno, string) {
	if len(b) != 12 || be.Uint32(b[8:]) != baseAllocationID {
		return EINVAL, "payload does not name exactly the one metadata context"
	}
	n := be.Uint64(b)
	if r.off > s.traits.size || n > s.traits.size-r.off || (r.off|n)&uint64(s.traits.blocks.Minimum-1) != 0 {
		return EINVAL, fmt.Sprintf("range [%d, +%d) of %d bytes", r.off, n, s.traits.size)
	}
	r.length = n
	return 0, ""
}

// head appends a reply's header to b.
func (s *session) head(b []byte, r request, typ uint16, last bool, length uint64) []byte {
	h := reply{typ: typ, cookie: r.cookie, off: r.off, length: length}
	if last {
		h.flags = replyFlagDone
	}
	return h.append(b, s.style)
}

// done appends the reply to a request that succeeded without data.
func (s *session) done(b []byte, r request) []byte {
	if s.style == simple || s.style == structured && r.cmd != cmdRead {
		return reply{simple: true, cookie: r.cookie}.append(b, s.style)
	}
	return s.head(b, r, chunkNone, true, 0)
}

// refusal appends the reply to a request that failed.
func (s *session) refusal(b []byte, r request, no Errno, msg string) []byte {
	if s.style == simple {
		return reply{simple: true, errno: uint32(no), cookie: r.cookie}.append(b, s.style)
	}
	msg = msg[:min(len(msg), maxErrorString)]
	b = s.head(b, r, chunkError, true, uint64(6+len(msg)))
	b = be.AppendUint32(b, uint32(no))
	b = be.AppendUint16(b, uint16(len(msg)))
	return append(b, msg...)
}

// dataHead appends the header of a read's data.
func (s *session) dataHead(b []byte, r request, off uint64, n int, last bool) []byte {
	if s.style == simple {
		return reply{simple: true, cookie: r.cookie}.append(b, s.style)
	}
	return be.AppendUint64(s.head(b, r, chunkOffsetData, last, uint64(n)+8), off)
}

// holeChunk appends a chunk that says that a range reads as zeroes.
func (s *session) holeChunk(b []byte, r request, off, n uint64, last bool) []byte {
	b = s.head(b, r, chunkOffsetHole, last, 12)
	return be.AppendUint32(be.AppendUint64(b, off), uint32(n))
}

// The reader's replies are queued, and go out when it would wait or enough of
// them have come together.

// queueHeader queues what f appends.
func (s *session) queueHeader(f func(b []byte) []byte) {
	if s.arena == nil {
		s.arena = make([]byte, 0, 16<<10)
	}
	start := len(s.arena)
	s.arena = f(s.arena)
	s.batch = append(s.batch, s.arena[start:len(s.arena):len(s.arena)])
	s.bytes += len(s.arena) - start
}

func (s *session) queueDone(r request) error {
	s.queueHeader(func(b []byte) []byte { return s.done(b, r) })
	return s.flushFull()
}

func (s *session) queueError(r request, no Errno, msg string) error {
	s.queueHeader(func(b []byte) []byte { return s.refusal(b, r, no, msg) })
	return s.flushFull()
}

func (s *session) flushFull() error {
	if len(s.batch) >= batchReplies || s.bytes >= batchBytes {
		return s.flush()
	}
	return nil
}

// flush sends what is queued.
func (s *session) flush() error {
	if len(s.batch) == 0 {
		return nil
	}
	err := s.send(s.batch)
	clear(s.batch)
	s.batch, s.arena, s.bytes = s.batch[:0], s.arena[:0], 0
	return err
}

// send writes one or more whole replies.
func (s *session) send(bufs [][]byte) error {
	s.w.Lock()
	defer s.w.Unlock()
	if err := s.l.sendAll(bufs, s.stall); err != nil {
		return fmt.Errorf("send reply: %w", err)
	}
	return nil
}

// readNow queues the answer to a read of bytes that are in memory.
func (s *session) readNow(ctx context.Context, r request) (bool, error) {
	v := s.traits.viewer
	if v == nil || r.length == 0 {
		return false, nil
	}
	p, ok := v.View(int64(r.off), int64(r.length))
	if !ok {
		return false, nil
	}
	if s.traits.extents == nil || s.style == simple || r.flags&cmdFlagDF != 0 {
		s.queueHeader(func(b []byte) []byte { return s.dataHead(b, r, r.off, len(p), true) })
		s.batch = append(s.batch, p)
		s.bytes += len(p)
		return true, s.flushFull()
	}
	err := s.runs(ctx, r, func(off, n uint64, zero, last bool) error {
		if zero {
			s.queueHeader(func(b []byte) []byte { return s.holeChunk(b, r, off, n, last) })
		} else {
			s.queueHeader(func(b []byte) []byte { return s.dataHead(b, r, off, int(n), last) })
			s.batch = append(s.batch, p[off-r.off:][:n])
			s.bytes += int(n)
		}
		return s.flushFull()
	})
	return true, err
}

// runs calls f for each run of data or zeroes of a read.
func (s *session) runs(ctx context.Context, r request, f func(off, n uint64, zero, last bool) error) error {
	off, end := r.off, r.off+r.length
	for off < end {
		var ext []region.Extent
		if s.traits.extents != nil {
			var err error
			if ext, err = s.traits.extents.Extents(ctx, int64(off), int64(end-off)); err != nil {
				ext = nil // as data it can be read, or gives the error
			}
		}
		if len(ext) == 0 {
			ext = []region.Extent{{Length: int64(end - off)}}
		}
		for i := 0; i < len(ext) && off < end; {
			zero, n := ext[i].Zero, uint64(0)
			for ; i < len(ext) && ext[i].Zero == zero; i++ {
				if ext[i].Length <= 0 {
					return fmt.Errorf("store gives an extent of %d bytes at %d", ext[i].Length, off+n)
				}
				n = min(n+uint64(ext[i].Length), end-off)
			}
			if err := f(off, n, zero, off+n == end); err != nil {
				return err
			}
			off += n
		}
	}
	return nil
}

// perform carries out a request on its own goroutine and sends the answer. Its
// error is the link's.
func (s *session) perform(ctx context.Context, r request, data *[]byte) error {
	off, n := int64(r.off), int64(r.length)
	var err error
	if r.cmd == cmdWrite || r.cmd == cmdTrim || r.cmd == cmdWriteZeroes {
		end, err := s.grant.Begin()
		if err != nil {
			return s.send([][]byte{s.refusal(nil, r, EPERM, err.Error())})
		}
		defer end()
	}
	switch r.cmd {
	case cmdRead:
		return s.read(ctx, r)
	case cmdBlockStatus:
		return s.status(ctx, r)
	case cmdWrite:
		if n > 0 {
			err = s.store.WriteAt(ctx, *data, off)
		}
	case cmdWriteZeroes:
		if err = s.zero(ctx, off, n, r.flags); errors.Is(err, errSlowZero) {
			return s.send([][]byte{s.refusal(nil, r, ENOTSUP, err.Error())})
		}
	case cmdTrim:
		err = s.traits.trimmer.Trim(ctx, off, n)
	case cmdCache:
		err = s.traits.cacher.Cache(ctx, off, n)
	case cmdFlush:
		err = s.store.Flush(ctx)
	}
	if err == nil && r.flags&cmdFlagFUA != 0 && (r.cmd == cmdWrite || r.cmd == cmdWriteZeroes || r.cmd == cmdTrim) {
		err = s.store.Flush(ctx)
	}
	if err != nil {
		return s.send([][]byte{s.refusal(nil, r, errnoOf(err, r.cmd), err.Error())})
	}
	return s.send([][]byte{s.done(nil, r)})
}

var errSlowZero = errors.New("not faster than a write")

// zero writes zeroes, by a write where the store has no better way; if that may
// not be (NBD_CMD_FLAG_FAST_ZERO) it returns errSlowZero.
func (s *session) zero(ctx context.Context, off, n int64, flags uint16) error {
	if s.traits.zeroer != nil {
		err := s.traits.zeroer.WriteZeroes(ctx, off, n, flags&cmdFlagNoHole == 0)
		if !errors.Is(err, region.ErrNotSupported) {
			return err
		}
	}
	if flags&cmdFlagFastZero != 0 {
		return errSlowZero
	}
	if n == 0 {
		return nil
	}
	b := s.t.buffers.Get(int(min(n, readPiece)))
	defer s.t.buffers.Put(b)
	clear(*b)
	for n > 0 {
		k := min(n, int64(len(*b)))
		if err := s.store.WriteAt(ctx, (*b)[:k], off); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

// read answers a read through a buffer, a structured one in pieces.
func (s *session) read(ctx context.Context, r request) error {
	if r.length == 0 {
		return s.send([][]byte{s.done(nil, r)})
	}
	whole := s.style == simple || r.flags&cmdFlagDF != 0
	size := min(r.length, requestPiece)
	if !whole {
		size = min(size, readPiece)
	}
	b := s.t.buffers.Get(int(size))
	defer s.t.buffers.Put(b)
	if whole && r.length > size {
		return s.readPieces(ctx, r, *b)
	}
	if whole {
		if err := s.store.ReadAt(ctx, *b, int64(r.off)); err != nil {
			return s.send([][]byte{s.refusal(nil, r, errnoOf(err, r.cmd), err.Error())})
		}
		return s.send([][]byte{s.dataHead(nil, r, r.off, len(*b), true), *b})
	}
	var broken error
	err := s.runs(ctx, r, func(off, n uint64, zero, last bool) error {
		if zero {
			broken = s.send([][]byte{s.holeChunk(nil, r, off, n, last)})
			return broken
		}
		for n > 0 {
			p := (*b)[:min(n, size)]
			if err := s.store.ReadAt(ctx, p, int64(off)); err != nil {
				return err
			}
			k := uint64(len(p))
			if broken = s.send([][]byte{s.dataHead(nil, r, off, len(p), last && k == n), p}); broken != nil {
				return broken
			}
			off, n = off+k, n-k
		}
		return nil
	})
	if err != nil && broken == nil {
		return s.send([][]byte{s.refusal(nil, r, errnoOf(err, r.cmd), err.Error())})
	}
	return broken
}

// readPieces answers with one message that is longer than what memory is taken for. Once
// it has begun there is no way to tell an error but to hang up (proto.md, "Simple reply message").
func (s *session) readPieces(ctx context.Context, r request, b []byte) error {
	if err := s.store.ReadAt(ctx, b, int64(r.off)); err != nil {
		return s.send([][]byte{s.refusal(nil, r, errnoOf(err, r.cmd), err.Error())})
	}
	s.w.Lock()
	defer s.w.Unlock()
	bufs := [][]byte{s.dataHead(nil, r, r.off, int(r.length), true), b}
	for off, left := r.off, r.length; ; bufs = [][]byte{b} {
		if err := s.l.sendAll(bufs, s.stall); err != nil {
			return fmt.Errorf("send reply: %w", err)
		}
		off, left = off+uint64(len(b)), left-uint64(len(b))
		if left == 0 {
			return nil
		}
		b = b[:min(uint64(len(b)), left)]
		if err := s.store.ReadAt(ctx, b, int64(off)); err != nil {
			return fmt.Errorf("read %d bytes at %d, in a reply that has begun: %w", len(b), off, err)
		}
	}
}

// status answers block status for base:allocation.
func (s *session) status(ctx context.Context, r request) error {
	if r.length == 0 {
		return s.send([][]byte{s.refusal(nil, r, EINVAL, "block status of no bytes")})
	}
	ext := []region.Extent{{Length: int64(r.length)}}
	if s.traits.extents != nil {
		// A failure is no reason to fail: as data everything can be read.
		if e, err := s.traits.extents.Extents(ctx, int64(r.off), int64(r.length)); err == nil && len(e) > 0 {
			ext = e
		}
	}
	ext = ext[:min(len(ext), maxExtents)]
	var body []byte
	for i, left := 0, int64(r.length); i < len(ext) && left > 0; {
		e := ext[i]
		for i++; i < len(ext) && ext[i].Hole == e.Hole && ext[i].Zero == e.Zero; i++ {
			e.Length += ext[i].Length
		}
		n := min(e.Length, left)
		if s.style != extended {
			n = min(n, 1<<32-1<<16) // whole blocks that 32 bits can hold
		}
		if n <= 0 {
			break
		}
		flags := uint64(0)
		if e.Hole {
			flags |= stateHole
		}
		if e.Zero {
			flags |= stateZero
		}
		if s.style == extended {
			body = be.AppendUint64(be.AppendUint64(body, uint64(n)), flags)
		} else {
			body = be.AppendUint32(be.AppendUint32(body, uint32(n)), uint32(flags))
		}
		if left -= n; n < e.Length || r.flags&cmdFlagReqOne != 0 {
			break
		}
	}
	if len(body) == 0 {
		return s.send([][]byte{s.refusal(nil, r, EIO, "store gives an empty extent")})
	}
	typ, prefix := uint16(chunkBlockStatus), be.AppendUint32(nil, baseAllocationID)
	if s.style == extended {
		typ, prefix = chunkBlockStatusExt, be.AppendUint32(prefix, uint32(len(body)/16))
	}
	return s.send([][]byte{s.head(nil, r, typ, true, uint64(len(prefix)+len(body))), prefix, body})
}
