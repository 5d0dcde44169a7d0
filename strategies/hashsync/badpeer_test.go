package hashsync

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"memsync/strategies"
	"memsync/strategies/hash"
	"memsync/strategies/migration/handover"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/storetest"
)

// with changes a byte of an encoded frame.
func with(f frame, at int, b byte) []byte {
	p := f.encode(nil)
	p[at] = b
	return p
}

// A source is told by the error what a peer has sent wrong, and says so to it.
func TestBadDestination(t *testing.T) {
	m := newMemory(100_000)
	s := source(t, m, SourceOptions{Chunk: 4096})
	open := frame{kind: frameOpen, region: 3, body: []byte("region")}.encode(hello().encode(nil))
	after := func(f ...frame) []byte {
		b := bytes.Clone(open)
		for _, f := range f {
			b = f.encode(b)
		}
		return b
	}
	for _, c := range []struct {
		name string
		sent []byte
		want string
	}{
		{"magic", with(hello(), headerSize, 'M'), `magic "Memsync`},
		{"version", with(hello(), headerSize+len(magic)+1, 2), "version 2, want 1"},
		{"length of a hello", with(hello(), 7, 11), "length 11"},
		{"no hello", frame{kind: framePing}.encode(nil), "type 10 before hello"},
		{"a type that is none", after(frame{kind: 99}), "frame type 99"},
		{"a source's frame", after(frame{kind: frameStable, region: 3}), "type 8 from a destination"},
		{"another region", frame{kind: frameOpen, body: []byte("others")}.encode(hello().encode(nil)), `open "others"`},
		{"a region that is not open", after(frame{kind: frameAck, region: 4, body: []byte{0}}), "region 4, which is not open"},
		{"the same number again", after(frame{kind: frameOpen, region: 3, body: []byte("region")}), "region 3 is open already"},
		{"chunk size", frame{kind: frameOpen, round: math.MaxUint64, body: []byte("region")}.encode(hello().encode(nil)), "chunk size 18446744073709551615"},
		{"too few fingerprints", after(frame{kind: framePrints, region: 3, flags: flagLast, body: make([]byte, 16)}), "fingerprints of 16 bytes, want 400"},
		{"too many", after(frame{kind: framePrints, region: 3, body: make([]byte, 401)}), "fingerprints of 401 bytes, want 400"},
		{"a round that was not", after(frame{kind: frameAck, region: 3, round: 1 << 40, body: []byte{0}}), "round 1099511627776, the latest is"},
		{"an ack that is none", after(frame{kind: frameAck, region: 3, body: []byte{7}}), "ack 7"},
		{"a request that is none", after(frame{kind: frameTake, region: 3, body: encodeTake(nil, handover.Request{Verb: 9, From: 1})}), "request 9 of a hand-over"},
		{"nobody's request", after(frame{kind: frameTake, region: 3, body: encodeTake(nil, handover.Request{Verb: handover.Track})}), "destination 0"},
	} {
		var said bytes.Buffer
		err := s.Serve(within(t), &talk{script{in: bytes.NewReader(c.sent)}, &said})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
		if !strings.Contains(said.String(), c.want) {
			t.Errorf("%s: the peer was told %q, want %q", c.name, said.String(), c.want)
		}
	}
	// One that stops in the middle of a message is gone, which is no error of the source's.
	if err := s.Serve(within(t), script{in: bytes.NewReader(open[:len(open)-3])}); err != nil {
		t.Errorf("half a message: %v", err)
	}
	if _, err := s.Sync(within(t)); err != nil {
		t.Errorf("the source afterwards: %v", err)
	}
}

// talk keeps what is written to a peer that has said everything already.
type talk struct {
	script
	said *bytes.Buffer
}

func (t *talk) Write(p []byte) (int, error) { return t.said.Write(p) }

// A destination's region is as it was whatever a source sends wrong; and the error names it, or the
// round's end asks for repair.
func TestBadSource(t *testing.T) {
	r, _, second, before, _ := fuzzReplica(t)
	defer func() { _ = errors.Join(r.Close(), r.file.Close()) }()
	open := func(o opened) []byte {
		return frame{kind: frameOpened, round: 1, body: o.encode()}.encode(hello().encode(nil))
	}
	right := opened{fuzzSize, fuzzChunk, "xxh3-64"}
	head := func(off uint64, n uint32) []byte { // of a piece, with the first delta's check and body
		b := bytes.Clone(second[0].body)
		binary.BigEndian.PutUint64(b, off)
		binary.BigEndian.PutUint32(b[8:], n)
		return frame{kind: frameDelta, round: 2, body: b}.encode(open(right))
	}
	for _, c := range []struct {
		name string
		sent []byte
		want string
	}{
		{"magic", with(hello(), headerSize, 'M'), `magic "Memsync`},
		{"version", with(hello(), headerSize+len(magic)+1, 2), "version 2, want 1"},
		{"size 0", open(opened{0, fuzzChunk, "xxh3-64"}), "size 0"},
		{"size", open(opened{1 << 50, fuzzChunk, "xxh3-64"}), "size 1125899906842624"},
		{"chunks", open(opened{1 << 46, fuzzChunk, "xxh3-64"}), "17179869184 chunks"},
		{"chunk size", open(opened{fuzzSize, 4097, "xxh3-64"}), "4097"},
		{"hash", open(opened{fuzzSize, fuzzChunk, "rot13"}), "by rot13"},
		{"another size than before", open(opened{fuzzSize + 1, fuzzChunk, "xxh3-64"}), "20581 bytes"},
		{"a region that is not open", frame{kind: frameEnd, region: 9}.encode(open(right)), "region 9"},
		{"offset", head(100, fuzzChunk), "offset 100 of a piece"},
		{"offset beyond", head(1<<63, fuzzChunk), "offset 9223372036854775808"},
		{"length", head(0, 77), "length 77 of a piece"},
		{"length of 0", head(0, 0), "length 0 of a piece"},
		{"length of 4 GiB", head(0, math.MaxUint32), "length 4294967295"},
		{"an old round", frame{kind: frameDelta, round: 0, body: second[0].body}.encode(open(right)), "round 0 after round 1"},
		{"a short digest", frame{kind: frameEnd, round: 1, body: make([]byte, 31)}.encode(open(right)), "digest of 31 bytes"},
		{"an answer that is none", frame{kind: frameTaken, body: make([]byte, takenSize)}.encode(open(right)), "request 0 of a hand-over"},
		{"a destination's frame", frame{kind: frameAck, body: []byte{0}}.encode(open(right)), "type 7 from a source"},
	} {
		err := follow(within(t), script{in: bytes.NewReader(c.sent)}, []*Replica{r})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
		if !bytes.Equal(r.mem, before) {
			t.Fatalf("%s: the region was changed", c.name)
		}
	}
	// A piece that does not decode to what its check says is left out, and the end asks again.
	zstdOf := func(content uint64) []byte { // single segment, 8 bytes of content size, then nothing
		return binary.LittleEndian.AppendUint64([]byte{1, 0x28, 0xb5, 0x2f, 0xfd, 0xe0}, content)
	}
	p, err := parsePiece(second[0].body, fuzzSize, fuzzChunk)
	if err != nil {
		t.Fatal(err)
	}
	check := p
	check.check[3] ^= 1
	bomb, huge, long := p, p, p
	bomb.body, huge.body = zstdOf(1<<40), zstdOf(1<<62)
	long.body = binary.AppendUvarint([]byte{0}, uint64(1<<40)<<2|3) // a terabyte of zeroes
	for name, p := range map[string]piece{"check": check, "delta bomb": bomb, "larger": huge, "long run": long} {
		var was, now runtime.MemStats
		runtime.ReadMemStats(&was)
		r.epoch(1)
		_, err := r.handle(context.Background(), frame{kind: frameDelta, round: 2, body: p.encode()})
		if err != nil || !r.damaged {
			t.Errorf("%s: %v, damaged: %t", name, err, r.damaged)
		}
		runtime.ReadMemStats(&now)
		if n := now.TotalAlloc - was.TotalAlloc; n > 16<<20 {
			t.Errorf("%s took %d bytes of memory", name, n)
		}
		if !bytes.Equal(r.mem, before) {
			t.Fatalf("%s: the region was changed", name)
		}
		answers, err := r.handle(context.Background(), second[len(second)-1])
		if err != nil || len(answers) != 2 || answers[0].body[0] != ackMismatch || answers[1].kind != framePrints {
			t.Errorf("%s: the end was answered by %d frames, %v", name, len(answers), err)
		}
	}
	err = follow(within(t), script{in: bytes.NewReader(open(right)[:headerSize+12])}, []*Replica{r})
	if !errors.Is(err, region.ErrPeerGone) || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("half a message: %v", err)
	}
}

// Where an adversary may choose the bytes, hashes of which collisions can be made are refused.
func TestHostileContent(t *testing.T) {
	for _, name := range hash.Names(true) {
		f, _ := hash.ByName(name)
		p, err := param.New(Strategy{}.Info().Params, []string{"content=hostile", "hash=" + name})
		if err != nil {
			t.Fatal(err)
		}
		_, _, err = options("region", 4096, p)
		if f.Strong != (err == nil) || err != nil && !(errors.Is(err, region.ErrNotSupported) && strings.Contains(err.Error(), "blake3")) {
			t.Errorf("%s (strong: %t): %v", name, f.Strong, err)
		}
	}
}

// Neither side keeps a second copy of the region: beside it a source and a destination have
// fingerprints, the pieces in hand, and what waits for the other.
func TestMemory(t *testing.T) {
	const size = 64 << 20
	ctx := within(t)
	p, err := param.New(Strategy{}.Info().Params, []string{"interval=1h"})
	if err != nil {
		t.Fatal(err)
	}
	heap := func() int64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	content := storetest.Seeded(region.Content{Seed: 1}, size)
	before := heap()
	pub, err := Strategy{}.Publish(ctx, content, strategies.PublishOptions{Chunk: 64 << 10, Dir: t.TempDir(), Params: p})
	if err != nil {
		t.Fatal(err)
	}
	d := follows(t, listen(t, pub.Serve), nil)
	if err := d.Wait(ctx, 1); err != nil {
		t.Fatal(err)
	}
	mem, err := unix.Mmap(int(pub.Attachment().File.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	var most int64
	for i := range 3 {
		region.Content{Seed: uint64(i + 2)}.Fill(mem, 0) // all of it
		if err := pub.Sync(ctx); err != nil {
			t.Fatal(err)
		}
		most = max(most, heap()-before)
	}
	const allowed = 4<<20 + 4*(1<<20) + size/4096*32 + 8<<20 // the queue, pieces at both sides, the index, and encoders
	if most > allowed {
		t.Errorf("%d bytes beside a region of %d, want at most %d", most, size, allowed)
	}
	if err := d.stop(); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := errors.Join(unix.Munmap(mem), pub.Close()); err != nil {
		t.Error(err)
	}
	runtime.KeepAlive(content)
}
