package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"
	"storj.io/drpc/drpcwire"

	"memsync/strategies/all"
	"memsync/strategies/transport"
	"memsync/strategies/transport/rpc"
)

// abuse is how long each transport is attacked, by all that there is at once.
const abuse = 2500 * time.Millisecond

// TestServeAbuse attacks a server in all the ways of docs/security.md at once, from one
// address, while a client at another reads all of the region again and again and checks
// every byte. The server's memory grows by 64 MiB at most. With -v it prints how much.
func TestServeAbuse(t *testing.T) {
	for _, name := range all.TransportNames() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			want := image(t, filepath.Join(dir, "one"), 1, 8<<20)
			c := launch(t, dir, "serve", "one", "--transport", name, "--listen", "0.0.0.0:0", "--insecure")
			c.until("it serves", func() bool { return strings.Count(c.stdout.String(), "\n") == 1 })
			_, port, err := net.SplitHostPort(address(strings.Split(strings.TrimSpace(c.stdout.String()), "\t")[2]))
			if err != nil {
				t.Fatal(err)
			}
			// One honest round first, so that what any use takes is not counted.
			honest(t, name, port, want, time.Now())
			pid := c.cmd.Process.Pid
			if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0); err != nil { // the peak begins anew
				t.Fatal(err)
			}
			idle := rss(t, pid, "VmRSS")
			a := &attack{t: t, addr: "127.0.0.1:" + port, end: time.Now().Add(abuse)}
			a.by(name)
			rounds := honest(t, name, port, want, a.end)
			a.wg.Wait()
			grown := rss(t, pid, "VmHWM") - idle
			t.Logf("%s: idle %d MiB, grown by %d MiB at most, under %d connections and %d attacks' messages; the other client read the region %d times meanwhile",
				name, idle>>20, grown>>20, a.conns, a.messages, rounds)
			if grown > 64<<20 && !underRaceDetector() { // which keeps several bytes for each
				t.Errorf("the server's memory grew by %d MiB, more than 64", grown>>20)
			}
			honest(t, name, port, want, time.Now())
			c.signal(pid, unix.SIGTERM)
			c.exit(130, patience)
			if s := c.stderr.String(); strings.Contains(s, "panic") || strings.Contains(s, "goroutine ") {
				t.Error(s)
			}
		})
	}
}

// rss reads a line of /proc/PID/status, in bytes.
func rss(t *testing.T, pid int, field string) int64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, field+":"); ok {
			n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n << 10
		}
	}
	t.Fatalf("no %s of process %d", field, pid)
	return 0
}

// honest reads all of the region once, and again until end, from another address than
// the attacks, and returns how often. A connection that was lost is an error.
func honest(t *testing.T, name, port string, want []byte, end time.Time) (rounds int) {
	t.Helper()
	tr, err := all.Transport(name)
	if err != nil {
		t.Fatal(err)
	}
	d := transport.DialerTo(tr, "127.0.0.2:"+port) // quic takes the address that it dials as its own
	if name != "quic" {
		from := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
		d = transport.DialFunc(func(ctx context.Context) (net.Conn, error) { return from.DialContext(ctx, "tcp", "127.0.0.2:"+port) })
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	s, err := tr.Open(ctx, d, transport.Options{Connections: 2})
	if err != nil {
		t.Fatalf("the other client: %v", err)
	}
	defer s.Close()
	got := make([]byte, len(want))
	for first := true; first || time.Now().Before(end); first = false {
		clear(got)
		for off := 0; off < len(got); off += 1 << 20 {
			if err := s.ReadAt(ctx, got[off:off+1<<20], int64(off)); err != nil {
				t.Fatalf("the other client: %v", err)
			}
		}
		if !bytes.Equal(got, want) {
			t.Fatal("the other client: bytes differ")
		}
		rounds++
	}
	return rounds
}

// attack is what one address does to a server until end. It does not look at answers:
// that it is cut off is as good as that it is not.
type attack struct {
	t    *testing.T
	addr string
	end  time.Time
	wg   sync.WaitGroup

	mu              sync.Mutex
	conns, messages int
}

func (a *attack) over() bool { return !time.Now().Before(a.end) }

// each makes n connections at once, and each of them again when f has ended with it.
func (a *attack) each(n int, dial func(context.Context) (net.Conn, error), f func(c net.Conn)) {
	for range n {
		a.wg.Go(func() {
			for !a.over() {
				ctx, cancel := context.WithDeadline(context.Background(), a.end)
				c, err := dial(ctx)
				cancel()
				if err != nil {
					time.Sleep(5 * time.Millisecond) // refused: try again
					continue
				}
				a.mu.Lock()
				a.conns++
				a.mu.Unlock()
				_ = c.SetDeadline(a.end)
				f(c)
				c.Close()
			}
		})
	}
}

// send writes b again and again, and reads nothing.
func (a *attack) send(c net.Conn, b []byte) {
	for !a.over() {
		if _, err := c.Write(b); err != nil {
			return
		}
		a.mu.Lock()
		a.messages++
		a.mu.Unlock()
	}
}

// hold writes b and keeps the connection, unless the server ends it.
func (a *attack) hold(c net.Conn, b ...[]byte) {
	for _, p := range b {
		if _, err := c.Write(p); err != nil {
			return
		}
	}
	a.mu.Lock()
	a.messages++
	a.mu.Unlock()
	_, _ = io.Copy(io.Discard, c)
}

// drip writes b a byte at a time: a slow-loris.
func (a *attack) drip(c net.Conn, b []byte) {
	for i := range b {
		if _, err := c.Write(b[i : i+1]); err != nil {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// by begins all attacks on a transport.
func (a *attack) by(name string) {
	dial := func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "tcp", a.addr) }
	if name == "quic" {
		tr, err := all.Transport("quic")
		if err != nil {
			a.t.Fatal(err)
		}
		dial = transport.DialerTo(tr, a.addr).Dial
	}
	const each = 12 // of five kinds, about as many as there may be
	big := make([]byte, 32<<20)
	switch name {
	case "nbd":
		a.nbd(dial, each, big)
	case "grpc":
		a.grpc(dial, each, big)
	case "drpc":
		a.drpc(dial, each, big)
	case "jsonrpc":
		a.json(dial, each, big)
	case "quic":
		a.quic(dial, each, big)
	}
}

func be32(n int) []byte { return binary.BigEndian.AppendUint32(nil, uint32(n)) }

func (a *attack) nbd(dial func(context.Context) (net.Conn, error), n int, big []byte) {
	option := func(kind, length int) []byte {
		return append(append([]byte("\x00\x00\x00\x03IHAVEOPT"), be32(kind)...), be32(length)...)
	}
	open := append(option(1, 0), []byte{}...) // EXPORT_NAME of the only region
	request := func(cmd uint16, off, length uint64) []byte {
		b := binary.BigEndian.AppendUint32(nil, 0x25609513)
		b = binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(b, 0), cmd)
		b = binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(b, 1), off)
		return binary.BigEndian.AppendUint32(b, uint32(length))
	}
	a.each(n, dial, func(c net.Conn) { a.drip(c, append([]byte("\x00\x00\x00\x03"), bytes.Repeat(option(3, 0), 100)...)) })
	a.each(n, dial, func(c net.Conn) { a.hold(c, []byte("\x00\x00\x00\x03"), option(7, 900<<10), big[:900<<10-1]) })
	a.each(n, dial, func(c net.Conn) { a.hold(c, []byte("\x00\x00\x00\x03"), option(7, 64<<20), big) })
	a.each(n, dial, func(c net.Conn) { // many of all the region, none of which is read
		if _, err := c.Write(open); err == nil {
			a.send(c, bytes.Repeat(request(0, 0, 8<<20), 100))
		}
	})
	a.each(n, dial, func(c net.Conn) { a.hold(c, open, request(1, 0, 32<<20), big[:len(big)-1]) }) // beyond the region, all but a byte of it
	a.each(n, dial, func(c net.Conn) { a.hold(c, open, request(1, 8<<20, 8<<20), big[:4<<20]) })
	a.each(2, dial, func(c net.Conn) { // a great many small ones, with what they say
		if _, err := c.Write(open); err == nil {
			a.wg.Go(func() { _, _ = io.Copy(io.Discard, c) })
			a.send(c, bytes.Repeat(request(0, 0, 1), 1000))
		}
	})
}

// body is a request as a message, whose data may say another length than they have.
func body(q rpc.Request) []byte { return append(q.AppendHead(nil), q.Data...) }

func (a *attack) grpc(dial func(context.Context) (net.Conn, error), n int, big []byte) {
	// An HTTP/2 connection without a library: what the peer may send of it is not asked.
	begin := func(c net.Conn) (*http2.Framer, func(stream uint32, encoding string)) {
		_, _ = io.WriteString(c, http2.ClientPreface)
		f := http2.NewFramer(c, c)
		_ = f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}) // no reply may be sent
		var b bytes.Buffer
		e := hpack.NewEncoder(&b)
		return f, func(stream uint32, encoding string) {
			b.Reset()
			for _, h := range [][2]string{{":method", "POST"}, {":scheme", "http"}, {":path", "/memsync.Region/Call"}, {":authority", "x"}, {"content-type", "application/grpc+proto"}, {"te", "trailers"}} {
				_ = e.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]})
			}
			if encoding != "" {
				_ = e.WriteField(hpack.HeaderField{Name: "grpc-encoding", Value: encoding})
			}
			_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: b.Bytes(), EndHeaders: true})
		}
	}
	message := func(flag byte, length int, p []byte) []byte {
		return append(append([]byte{flag}, be32(length)...), p...)
	}
	data := func(f *http2.Framer, stream uint32, end bool, p []byte) error {
		for len(p) > 0 {
			k := min(len(p), 16<<10)
			if err := f.WriteData(stream, end && k == len(p), p[:k]); err != nil {
				return err
			}
			p = p[k:]
		}
		return nil
	}
	open := message(0, len(body(rpc.Request{Op: rpc.OpOpen})), body(rpc.Request{Op: rpc.OpOpen}))
	read := message(0, len(body(rpc.Request{Op: rpc.OpRead, Length: 1 << 20})), body(rpc.Request{Op: rpc.OpRead, Length: 1 << 20}))
	// streams opens as many as it can, each with p, and the region first.
	streams := func(c net.Conn, encoding string, end bool, p []byte) {
		f, headers := begin(c)
		headers(1, "")
		_ = data(f, 1, true, open)
		for s := uint32(3); !a.over(); s += 2 {
			headers(s, encoding)
			if data(f, s, end, p) != nil {
				return
			}
			a.mu.Lock()
			a.messages++
			a.mu.Unlock()
			if s > 200 && !end {
				a.hold(c)
				return
			}
		}
	}
	var bomb bytes.Buffer
	z := gzip.NewWriter(&bomb)
	_, _ = z.Write(big)
	_, _ = z.Write(big)
	_ = z.Close()
	a.each(n, dial, func(c net.Conn) { a.drip(c, []byte(http2.ClientPreface+strings.Repeat("\x00", 500))) })
	a.each(n, dial, func(c net.Conn) { streams(c, "", false, message(0, 1<<20, big[:70<<10])) })              // never ended
	a.each(n, dial, func(c net.Conn) { streams(c, "", true, read) })                                          // never read
	a.each(n, dial, func(c net.Conn) { streams(c, "", false, message(0, 32<<20, big[:60<<10])) })             // 32 MiB
	a.each(n, dial, func(c net.Conn) { streams(c, "gzip", true, message(1, bomb.Len(), bomb.Bytes())) })      // a bomb
	a.each(2, dial, func(c net.Conn) { a.send(c, []byte(http2.ClientPreface+strings.Repeat("PING", 1000))) }) // and what is no protocol
}

func (a *attack) drpc(dial func(context.Context) (net.Conn, error), n int, big []byte) {
	frames := func(stream uint64, done bool, message []byte) (b []byte) {
		id := drpcwire.ID{Stream: stream, Message: 1}
		b = drpcwire.AppendFrame(b, drpcwire.Frame{ID: id, Kind: drpcwire.KindInvoke, Done: true, Data: []byte("/memsync.Region/Call")})
		id.Message++
		for len(message) > 0 {
			k := min(len(message), 64<<10)
			b = drpcwire.AppendFrame(b, drpcwire.Frame{ID: id, Kind: drpcwire.KindMessage, Done: done && k == len(message), Data: message[:k]})
			message = message[k:]
		}
		if done {
			id.Message++
			b = drpcwire.AppendFrame(b, drpcwire.Frame{ID: id, Kind: drpcwire.KindCloseSend, Done: true})
		}
		return b
	}
	open := frames(1, true, body(rpc.Request{Op: rpc.OpOpen}))
	a.each(n, dial, func(c net.Conn) { a.drip(c, open) })
	a.each(n, dial, func(c net.Conn) { a.hold(c, open, frames(2, false, big[:1<<20])) }) // never ended
	a.each(n, dial, func(c net.Conn) { a.hold(c, open, frames(2, false, big)) })         // 32 MiB
	a.each(n, dial, func(c net.Conn) {                                                   // never read
		if _, err := c.Write(open); err == nil {
			for s := uint64(2); !a.over(); s++ {
				if _, err := c.Write(frames(s, true, body(rpc.Request{Op: rpc.OpRead, Length: 1 << 20}))); err != nil {
					return
				}
			}
		}
	})
	a.each(2, dial, func(c net.Conn) { // a great many small ones
		a.wg.Go(func() { _, _ = io.Copy(io.Discard, c) })
		for s := uint64(1); !a.over(); s++ {
			if _, err := c.Write(frames(s, true, body(rpc.Request{Op: rpc.OpRead, Length: 1}))); err != nil {
				return
			}
		}
	})
}

func (a *attack) json(dial func(context.Context) (net.Conn, error), n int, big []byte) {
	open := []byte(`{"method":"Region.Call","params":[{"op":1}],"id":1}`)
	read := bytes.Repeat([]byte(`{"method":"Region.Call","params":[{"op":2,"length":1048576}],"id":2}`), 100)
	write := []byte(`{"method":"Region.Call","params":[{"op":3,"length":1000000,"data":"`)
	text := bytes.Repeat([]byte("A"), len(big))
	a.each(n, dial, func(c net.Conn) { a.drip(c, append(open, write...)) })
	a.each(n, dial, func(c net.Conn) { a.hold(c, open, write, text[:1<<20]) }) // never ended
	a.each(n, dial, func(c net.Conn) { a.hold(c, open, write, text) })         // 32 MiB
	a.each(n, dial, func(c net.Conn) { a.hold(c, bytes.Repeat([]byte("["), 1<<20)) })
	a.each(n, dial, func(c net.Conn) { // never read
		if _, err := c.Write(open); err == nil {
			a.send(c, read)
		}
	})
	a.each(2, dial, func(c net.Conn) { // a great many small ones
		a.wg.Go(func() { _, _ = io.Copy(io.Discard, c) })
		a.send(c, bytes.Repeat([]byte(`{"method":"Region.Call","params":[{"op":2}],"id":3}`), 100))
	})
}

func (a *attack) quic(dial func(context.Context) (net.Conn, error), n int, big []byte) {
	head := func(q rpc.Request) []byte {
		h := q.AppendHead(nil)
		return append(be32(len(h)), h...)
	}
	a.each(n, dial, func(c net.Conn) { a.drip(c, head(rpc.Request{Op: rpc.OpOpen, Name: strings.Repeat("x", 200)})) })
	a.each(n, dial, func(c net.Conn) { a.hold(c, be32(64<<10), big[:60<<10]) }) // never ended
	a.each(n, dial, func(c net.Conn) { a.hold(c, head(rpc.Request{Op: rpc.OpOpen}), big) })
	a.each(n, dial, func(c net.Conn) { a.hold(c, be32(32<<20), big) })
	a.each(n, dial, func(c net.Conn) { a.send(c, big[:1<<10]) })
}
