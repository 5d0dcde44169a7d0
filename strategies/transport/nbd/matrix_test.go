package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"memsync/strategies/region"
	"memsync/strategies/storetest"
	"memsync/strategies/transport"
)

// TestServerMatrix gives the server each command, known or not, with each odd
// offset and length, in one session. Each request gets exactly one answer, which
// is the model's, and the session goes on.
func TestServerMatrix(t *testing.T) {
	const size = 1 << 20
	lengths := []uint64{0, 1, 4096, size, size + 1, 32 << 20, 32<<20 + 1, 1 << 31, math.MaxUint32, 1 << 32, 1 << 63, math.MaxUint64}
	offsets := []uint64{0, 1, 4096, size - 4096, size - 1, size, size + 1, math.MaxUint32, 1 << 63, math.MaxUint64 - 4095, math.MaxUint64}
	stores := map[uint64]func() region.Store{
		1:    func() region.Store { return newSparse(size, 1) },
		4096: func() region.Store { return blocky{&slow{ram: newRAM(size, 1)}, 4096} },
	}
	for unit, store := range stores {
		for _, style := range []replyStyle{simple, structured, extended} {
			t.Run(fmt.Sprintf("style %d, blocks of %d", style, unit), func(t *testing.T) {
				ext := style == extended
				e := exports{"": store()}
				in := hello(style)
				requests := map[uint64]request{}
				add := func(r request) {
					r.cookie = uint64(len(requests)) + 1000
					requests[r.cookie] = r
					in = r.append(in, ext)
					if r.cmd == cmdWrite {
						in = append(in, make([]byte, r.length)...)
					}
				}
				for _, cmd := range []command{cmdRead, cmdWrite, cmdFlush, cmdTrim, cmdCache, cmdWriteZeroes, cmdBlockStatus, 8, 9, math.MaxUint16} {
					for _, off := range offsets {
						for _, n := range lengths {
							r := request{cmd: cmd, off: off, length: n}
							if n > math.MaxUint32 && !ext || cmd == cmdWrite && (n > 32<<20 || n > size+1 && off > 0) {
								continue // cannot be said; ends the session (TestServerRequestFields); once is enough
							}
							if cmd == cmdWrite && ext {
								r.flags = cmdFlagPayloadLen
							}
							add(r)
						}
					}
				}
				add(request{cmd: cmdRead, off: 4096, length: 4096}) // still served
				kind := kinds[min(int(unit), 2)]                    // each size of block over another one; all styles over both
				s := play(t, kind, request{cmd: cmdDisc}.append(in, ext))
				if err := (&Transport{}).Serve(testContext(t), s.conn, e); err != nil {
					t.Fatal(err)
				}
				got := map[uint64]Errno{}
				for out := s.heard()[afterHello(t, style, e):]; len(out) > 0; {
					r, n, err := parseReply(out, style)
					if err != nil || n == 0 {
						t.Fatalf("reply %.40x: %v", out, err)
					}
					out = out[n:]
					q, ok := requests[r.cookie]
					if _, twice := got[r.cookie]; twice || !ok {
						t.Fatalf("reply with cookie %d, to no request or once more", r.cookie)
					}
					no, length, done := Errno(r.errno), r.length, r.simple || r.flags&replyFlagDone != 0
					if r.simple && no == 0 && q.cmd == cmdRead {
						length = q.length
					}
					if !r.simple && r.typ&(1<<15) != 0 {
						no = Errno(be.Uint32(out))
					}
					out = out[length:]
					if done {
						got[r.cookie] = no
					}
				}
				for cookie, r := range requests {
					no, ok := got[cookie]
					if want := judgement(r, size, unit, style); !ok || no != want {
						t.Errorf("%v at %d, length %d: error %d (answered: %t), want %d", r.cmd, r.off, r.length, no, ok, want)
					}
				}
			})
		}
	}
}

// judgement is the answer that proto.md asks for.
func judgement(r request, size, unit uint64, style replyStyle) Errno {
	switch {
	case r.cmd > cmdBlockStatus, r.cmd == cmdBlockStatus && style == simple:
		return EINVAL
	case r.cmd == cmdFlush:
		if r.off|r.length != 0 {
			return EINVAL
		}
		return 0
	case r.off > size || r.length > size-r.off:
		if r.cmd == cmdWrite || r.cmd == cmdWriteZeroes {
			return ENOSPC
		}
		return EINVAL
	case r.off%unit != 0 || r.length%unit != 0, r.cmd == cmdBlockStatus && r.length == 0:
		return EINVAL
	}
	return 0
}

// A wrong magic of a request ends its connection with its name.
func TestServerRequestMagic(t *testing.T) {
	e := exports{"": viewed{newRAM(1<<20, 1)}}
	for _, style := range []replyStyle{simple, structured, extended} {
		for _, magic := range []uint32{0, magicReply, magicStructuredReply, magicExtendedReply, magicRequest, magicExtendedRequest, math.MaxUint32} {
			if magic == magicRequest && style != extended || magic == magicExtendedRequest && style == extended {
				continue // the right one
			}
			b := request{cmd: cmdRead, length: 1}.append(nil, style == extended)
			be.PutUint32(b, magic)
			for _, kind := range kinds {
				err := (&Transport{}).Serve(testContext(t), play(t, kind, append(hello(style), b...)).conn, e)
				if !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), "request magic") {
					t.Errorf("style %d, %s, magic %#x: %v", style, kind, magic, err)
				}
			}
		}
	}
}

// The handshake for another client, and the list of exports, cut at every byte.
func TestCutNegotiateAndList(t *testing.T) {
	hello := be.AppendUint16(be.AppendUint64(be.AppendUint64(nil, magicInit), magicOption), flagFixedNewstyle)
	info := be.AppendUint16(be.AppendUint64(be.AppendUint16(nil, infoExport), 1<<20), uint16(FlagHasFlags))
	open := appendOptReply(appendOptReply(slices.Clone(hello), optGo, repInfo, info), optGo, repAck, nil)
	list := appendOptReply(appendOptReply(slices.Clone(hello), optList, repServer, appendString(nil, "one")), optList, repAck, nil)
	for _, kind := range kinds {
		for n := 0; n <= len(open); n++ {
			_, err := (&Transport{}).Negotiate(testContext(t), play(t, kind, open[:n]).conn, "")
			if n < len(open) && !errors.Is(err, region.ErrPeerGone) || n == len(open) && err != nil {
				t.Errorf("negotiate, %s, cut at %d of %d: %v", kind, n, len(open), err)
			}
		}
		told := appendOptReply(appendOptReply(slices.Clone(hello), optInfo, repInfo, info), optInfo, repAck, nil)
		for n := 0; n <= len(told); n++ {
			e, err := (&Transport{}).Info(testContext(t), play(t, kind, told[:n]).conn, "")
			if n < len(told) && !errors.Is(err, region.ErrPeerGone) || n == len(told) && (err != nil || e.Size != 1<<20) {
				t.Errorf("info, %s, cut at %d of %d: %v", kind, n, len(told), err)
			}
		}
		for n := 0; n <= len(list); n++ {
			names, err := (&Transport{}).List(testContext(t), play(t, kind, list[:n]).conn)
			if n < len(list) && !errors.Is(err, region.ErrPeerGone) || n == len(list) && (err != nil || len(names) != 1) {
				t.Errorf("list, %s, cut at %d of %d: %q, %v", kind, n, len(list), names, err)
			}
		}
	}
	// Nor may the kernel be handed a connection on which more has been said.
	if _, err := (&Transport{}).Negotiate(testContext(t), newScript(append(open, 0)), ""); !errors.Is(err, ErrProtocol) {
		t.Errorf("a byte too many: %v", err)
	}
}

// grown is by how much the heap grew during f, garbage left out.
func grown(f func()) int64 {
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	f()
	runtime.GC()
	runtime.ReadMemStats(&after)
	return int64(after.HeapInuse) - int64(before.HeapInuse)
}

// endless is a server that repeats something for ever after its greeting.
type endless struct {
	*script
	again []byte
	at    int
}

func (e *endless) Read(p []byte) (int, error) {
	if n, err := e.script.Read(p); err != io.EOF {
		return n, err
	}
	n := copy(p, e.again[e.at:])
	e.at = (e.at + n) % len(e.again)
	return n, nil
}

// A server whose answers never end is left, and costs little memory.
func TestServerNeverEnds(t *testing.T) {
	hello := be.AppendUint16(be.AppendUint64(be.AppendUint64(nil, magicInit), magicOption), flagFixedNewstyle)
	name := strings.Repeat("n", maxString)
	var err error
	n := grown(func() {
		_, err = (&Transport{}).List(testContext(t), &endless{script: newScript(hello), again: appendOptReply(nil, optList, repServer, appendString(nil, name))})
	})
	if !errors.Is(err, ErrProtocol) || n > 32<<20 {
		t.Errorf("list: heap grew by %d KiB: %v", n>>10, err)
	}
	n = grown(func() {
		_, err = (&Transport{}).Negotiate(testContext(t), &endless{script: newScript(hello), again: appendOptReply(nil, optGo, repInfo, append([]byte{0, infoDescription}, name...))}, "")
	})
	if !errors.Is(err, ErrProtocol) || n > 32<<20 {
		t.Errorf("go: heap grew by %d KiB: %v", n>>10, err)
	}
}

// A client that asks for the list again and again and reads nothing is cut off
// at the handshake's deadline; the others are served meanwhile.
func TestClientStopsReadingHandshake(t *testing.T) {
	var many transport.Named
	for i := range 200 {
		many = append(many, transport.Export{Name: fmt.Sprintf("%d%s", i, strings.Repeat("x", 4000)), Store: storetest.New(make([]byte, 4096))})
	}
	tr := &Transport{HandshakeTimeout: 500 * time.Millisecond}
	s := serve(t, tr, many)
	nc, err := s.Dial(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if n := grown(func() {
		b := be.AppendUint32(nil, flagFixedNewstyle|flagNoZeroes)
		for range 1000 {
			b = appendOption(b, optList, nil)
		}
		if _, err := nc.Write(b); err != nil {
			t.Fatal(err)
		}
		time.Sleep(200 * time.Millisecond)
	}); n > 32<<20 {
		t.Errorf("heap grew by %d KiB for 800 MB of names that nobody reads", n>>10)
	}
	c := open(t, tr, s, transport.Options{Name: many[7].Name})
	if err := c.ReadAt(testContext(t), make([]byte, 4096), 0); err != nil {
		t.Error(err)
	}
	if err := s.await(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("server: %v", err)
	}
}

// Holes never cross the wire: a read of a sparse export costs its data and
// little more, whole or through the client's pieces, and they are zeroes.
func TestHolesStayHome(t *testing.T) {
	for _, style := range []replyStyle{structured, extended} {
		const size = 8 << 20
		store := newSparse(size, 1) // half of it holes
		in := hello(style)
		for off := uint64(0); off < size; off += 1 << 20 {
			in = request{cmd: cmdRead, cookie: off + 1, off: off, length: 1 << 20}.append(in, style == extended)
		}
		s := newScript(request{cmd: cmdDisc}.append(in, style == extended))
		if err := (&Transport{}).Serve(testContext(t), s, exports{"": store}); err != nil {
			t.Fatal(err)
		}
		if n := s.out.Len(); n < size/2 || n > size/2+size/100 {
			t.Errorf("style %d: %d bytes on the wire for %d of data and as many of holes", style, n, size/2)
		}
	}
	// End to end: the client's bytes, and its extents.
	store := newSparse(8<<20, 1)
	var counted *counter
	srv := serve(t, &Transport{}, exports{"": store})
	c := open(t, &Transport{}, transport.DialFunc(func(ctx context.Context) (net.Conn, error) {
		nc, err := srv.Dial(ctx)
		counted = &counter{Conn: nc}
		return counted, err
	}), transport.Options{Connections: 1})
	got := make([]byte, c.Size())
	if err := c.ReadAt(testContext(t), got, 0); err != nil || !slices.Equal(got, store.b) {
		t.Errorf("content differs: %v", err)
	}
	if n := counted.n; n > c.Size()/2+c.Size()/50 {
		t.Errorf("%d bytes received for %d of data", n, c.Size()/2)
	}
	ext, err := c.Extents(testContext(t), 0, c.Size())
	if err != nil || len(ext) < 2 || ext[0].Hole || !ext[1].Hole || ext[1].Length != hole {
		t.Errorf("extents %v, %v", ext[:min(len(ext), 3)], err)
	}
}

// counter counts what is received.
type counter struct {
	net.Conn
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.n += int64(n)
	return n, err
}

// A store that cannot zero quickly says so, and changes nothing; without the
// flag the zeroes are written.
func TestFastZeroFallback(t *testing.T) {
	ram := newRAM(1<<20, 1)
	want := slices.Clone(ram.b)
	for _, flags := range []uint16{cmdFlagFastZero, cmdFlagFastZero | cmdFlagNoHole, 0, cmdFlagNoHole, cmdFlagFUA} {
		in := request{flags: flags, cmd: cmdWriteZeroes, cookie: 1, off: 4096, length: 8192}.append(hello(structured), false)
		s := newScript(request{cmd: cmdDisc}.append(in, false))
		e := exports{"": slowZero{viewed{ram}}}
		if err := (&Transport{}).Serve(testContext(t), s, e); err != nil {
			t.Fatal(err)
		}
		out := s.out.Bytes()[afterHello(t, structured, e):]
		no := uint32(0)
		if r, n, err := parseReply(out, structured); err != nil || n == 0 {
			t.Fatal(n, err)
		} else if !r.simple && r.typ == chunkError {
			no = be.Uint32(out[n:])
		}
		if flags&cmdFlagFastZero != 0 {
			if Errno(no) != ENOTSUP || !slices.Equal(ram.b, want) {
				t.Errorf("flags %#x: error %d", flags, no)
			}
		} else if clear(want[4096 : 4096+8192]); no != 0 || !slices.Equal(ram.b, want) {
			t.Errorf("flags %#x: error %d, or other bytes", flags, no)
		}
	}
	if ram.flushed != 1 {
		t.Errorf("%d flushes for one FUA", ram.flushed)
	}
}

// slowZero offers zeroes but finds that it cannot.
type slowZero struct{ viewed }

func (slowZero) WriteZeroes(context.Context, int64, int64, bool) error { return region.ErrNotSupported }
