package hashsync

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"memsync/strategies/delta"
	"memsync/strategies/hash"
	"memsync/strategies/migration/handover"
	"memsync/strategies/region"
)

// FuzzFrame: whatever comes in, no more memory is taken than a frame of its type may have.
func FuzzFrame(f *testing.F) {
	f.Add(hello().encode(nil))
	f.Add(frame{kind: frameOpened, body: opened{1 << 20, 4096, "blake3"}.encode()}.encode(nil))
	f.Add(frame{kind: frameDelta, round: 7, body: piece{off: 4096, n: 100, body: []byte{0, 7}}.encode()}.encode(nil))
	f.Add(errorFrame(3, errResized).encode(nil))
	f.Add(frame{kind: frameTake, body: encodeTake(nil, handover.Request{Verb: handover.Track, From: 1})}.encode(nil))
	answer := taken{Reply: handover.Reply{Request: handover.Request{Verb: handover.Commit, From: 1, Epoch: 2}, Result: handover.OK, Epoch: 2}, Text: "why"}
	f.Add(frame{kind: frameTaken, round: 7, body: answer.encode()}.encode(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		var buf []byte
		for {
			fr, next, err := readFrame(r, buf)
			if buf = next; cap(buf) > maxBody {
				t.Fatalf("%d bytes for a frame", cap(buf))
			}
			if err != nil {
				if !errors.Is(err, errProtocol) && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Error(err)
				}
				return
			}
			switch fr.kind {
			case frameHello:
				_ = fr.checkHello()
			case frameOpened:
				if o, err := parseOpened(fr.body); err == nil && (o.size < 1 || o.size > maxSize || region.Chunks(o.size, o.chunk) > maxChunks) {
					t.Errorf("opened %+v", o)
				}
			case frameDelta:
				const size, chunk = 1<<20 + 77, 8192
				if p, err := parsePiece(fr.body, size, chunk); err == nil && (p.off%chunk != 0 || p.off+int64(p.n) > size || p.n < 1 || p.n > delta.MaxPiece) {
					t.Errorf("piece at %d of %d bytes", p.off, p.n)
				}
			case frameError:
				_ = fr.remoteError().Error()
			case frameTake:
				if q, err := parseTake(fr.body); err == nil && !bytes.Equal(encodeTake(nil, q), fr.body) {
					t.Errorf("request %+v of %x", q, fr.body)
				}
			case frameTaken:
				if a, err := parseTaken(fr.body); err == nil && !bytes.Equal(a.encode(), fr.body) {
					t.Errorf("answer %+v of %x", a, fr.body)
				}
			}
		}
	})
}

const fuzzSize, fuzzChunk = 5*4096 + 100, 4096

// fuzzReplica is a replica with content, and frames of a round that makes next of it.
func fuzzReplica(tb testing.TB) (r *Replica, first, second []frame, before, after []byte) {
	h, _ := hash.ByName("xxh3-64")
	before, after = make([]byte, fuzzSize), make([]byte, fuzzSize)
	region.Content{Seed: 1}.Fill(before, 0)
	region.Content{Seed: 2}.Fill(after, 0)
	copy(after[fuzzChunk:], before[2*fuzzChunk:3*fuzzChunk]) // something moves
	x := delta.NewIndex(fuzzSize)
	e, err := delta.NewEncoder(delta.Moved)
	if err != nil {
		tb.Fatal(err)
	}
	defer e.Close()
	n, err := newNode("region", fuzzSize, fuzzChunk, h)
	if err != nil {
		tb.Fatal(err)
	}
	defer n.whole.Close()
	make1 := func(round uint64, content []byte, usable func(off, n int64) bool) (fs []frame) {
		for lo := int64(0); lo < n.chunks(); lo += 2 {
			off, length := n.extent(lo, min(lo+2, n.chunks()))
			p := content[off : off+length]
			d := n.sum(p)
			body := e.Encode(delta.Piece{New: p, Off: off, Index: x, Usable: func(o, k int64) bool { return o >= off && usable(o, k) }}, 0)
			fs = append(fs, frame{kind: frameDelta, round: round, body: piece{off, int(length), n.check(off, d), body}.encode()})
			copy(n.entry(lo, min(lo+2, n.chunks())), d)
			x.Update(off, p)
		}
		d := n.digest()
		return append(fs, frame{kind: frameEnd, round: round, body: d[:]})
	}
	first = make1(1, before, func(int64, int64) bool { return false })
	second = make1(2, after, func(int64, int64) bool { return true })
	r = NewReplica("region", 0, memfd)
	if err := r.open(opened{fuzzSize, fuzzChunk, "xxh3-64"}); err != nil {
		tb.Fatal(err)
	}
	for _, f := range first {
		if _, err := r.handle(context.Background(), f); err != nil {
			tb.Fatal(err)
		}
	}
	return r, first, second, before, after
}

// FuzzReplica: frames from a source that is broken or hostile. Each chunk stays
// what it was or becomes, by a piece whose check agrees, what the source once
// made of it; nothing in between, and no crash.
func FuzzReplica(f *testing.F) {
	r, first, second, before, after := fuzzReplica(f)
	defer func() { _ = errors.Join(r.Close(), r.file.Close()) }()
	var all []byte
	for _, fr := range second {
		all = fr.encode(all)
		f.Add(fr.encode(nil))
		bad := fr.encode(nil)
		bad[len(bad)-1] ^= 1
		f.Add(bad)
		if fr.kind == frameDelta { // the right bytes in the wrong place
			elsewhere := fr.encode(nil)
			off := elsewhere[headerSize : headerSize+8]
			binary.BigEndian.PutUint64(off, binary.BigEndian.Uint64(off)+fuzzChunk)
			f.Add(elsewhere)
		}
	}
	f.Add(all)
	f.Add(frame{kind: frameStable, round: 9}.encode(nil))
	// An answer to what nobody asked changes nothing, nor who owns the region.
	answer := taken{Reply: handover.Reply{Request: handover.Request{Verb: handover.Commit, From: 1, Epoch: 1}, Result: handover.OK, Epoch: 1}}
	f.Add(frame{kind: frameTaken, body: answer.encode()}.encode(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		in := bytes.NewReader(b)
		for {
			fr, _, err := readFrame(in, nil)
			if err != nil {
				break
			}
			answers, err := r.handle(context.Background(), fr)
			if err != nil && !errors.Is(err, errProtocol) {
				t.Errorf("frame of type %d: %v", fr.kind, err)
			}
			for _, a := range answers {
				if a.kind != frameAck && a.kind != framePrints {
					t.Errorf("answer of type %d", a.kind)
				}
			}
		}
		for i := range r.node.chunks() {
			off, n := r.node.extent(i, i+1)
			now := r.mem[off : off+n]
			if !bytes.Equal(now, before[off:off+n]) && !bytes.Equal(now, after[off:off+n]) {
				t.Errorf("chunk %d is neither the old nor the new version", i)
			}
			if r.versions[i]&1 != 0 {
				t.Errorf("chunk %d is left as being changed", i)
			}
		}
		if r.owned {
			t.Fatal("it owns the region, which it never asked for")
		}
		r.epoch(0) // back to the first version
		for _, fr := range first {
			if _, err := r.handle(context.Background(), fr); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(r.mem, before) {
			t.Fatal("it does not recover")
		}
	})
}

// script is a connection whose peer has said everything already.
type script struct {
	net.Conn
	in io.Reader
}

func (s script) Read(p []byte) (int, error)     { return s.in.Read(p) }
func (script) Write(p []byte) (int, error)      { return len(p), nil }
func (script) Close() error                     { return nil }
func (script) SetDeadline(time.Time) error      { return nil }
func (script) SetReadDeadline(time.Time) error  { return nil }
func (script) SetWriteDeadline(time.Time) error { return nil }

// FuzzServe: whatever a destination says, the source goes on and says why it hangs up.
func FuzzServe(f *testing.F) {
	m := newMemory(fuzzSize)
	h, _ := hash.ByName("xxh3-64")
	s, err := NewSource(context.Background(), m, m.read, SourceOptions{Name: "region", Chunk: fuzzChunk, Hash: h, Interval: time.Millisecond, Delta: delta.Auto})
	if err != nil {
		f.Fatal(err)
	}
	defer s.Close()
	talk := hello().encode(nil)
	f.Add(talk)
	talk = frame{kind: frameOpen, body: []byte("region")}.encode(talk)
	f.Add(talk)
	f.Add(frame{kind: framePrints, flags: flagLast, body: s.table}.encode(bytes.Clone(talk)))
	talk = frame{kind: framePrints, flags: flagLast | flagEmpty}.encode(talk)
	f.Add(frame{kind: frameAck, round: 1 << 60, body: []byte{0}}.encode(bytes.Clone(talk)))
	f.Add(frame{kind: frameOpen, region: 1, body: []byte("another")}.encode(bytes.Clone(talk)))
	for _, v := range []handover.Verb{handover.Track, handover.Finalize, handover.Commit, handover.Done} { // epochs 0 and 1: track has none
		f.Add(frame{kind: frameTake, body: encodeTake(nil, handover.Request{Verb: v, From: 1, Epoch: uint64(min(v-1, 1))})}.encode(bytes.Clone(talk)))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		err := s.Serve(ctx, script{in: bytes.NewReader(b)})
		if err != nil && !errors.Is(err, errProtocol) && !errors.Is(err, region.ErrMissing) {
			var said *remoteError
			if !errors.As(err, &said) {
				t.Error(err)
			}
		}
		if ctx.Err() != nil {
			t.Fatal("it hangs")
		}
		if _, err := s.Sync(ctx); err != nil {
			t.Fatalf("the source does not go on: %v", err)
		}
	})
}
