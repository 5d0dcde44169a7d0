package role

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// pair returns both ends of a role socket.
func pair(t testing.TB) (runner, role *Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends []*Conn
	for _, fd := range fds {
		c, err := newConn(os.NewFile(uintptr(fd), "role"), "tester")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		ends = append(ends, c)
	}
	return ends[0], ends[1]
}

// serving answers with ops at the other end until the test ends.
func serving(t *testing.T, ops map[string]handler) *Conn {
	runner, role := pair(t)
	done := make(chan error, 1)
	go func() { done <- role.serve(ops) }()
	t.Cleanup(func() {
		runner.Close()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("serve: %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Error("serve does not return after its peer has gone")
		}
	})
	return runner
}

func short(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

type echo struct {
	Text string `json:"text"`
	N    int64  `json:"n"`
}

func TestRoundTrip(t *testing.T) {
	c := serving(t, map[string]handler{
		"echo": on(func(_ context.Context, e echo) (echo, error) { e.N++; return e, nil }),
		"files": func(_ context.Context, _ json.RawMessage, files []*os.File) (any, []*os.File, error) {
			defer closeAll(files[1:])
			_, err := files[0].WriteString("from the role")
			return len(files), files[:1], err
		},
	})
	for _, text := range []string{"", "häß\x00lich", strings.Repeat("long ", 1<<18)} {
		var got echo
		if _, err := c.Call(short(t), "echo", echo{text, 7}, &got); err != nil || got != (echo{text, 8}) {
			t.Fatalf("echo of %d bytes: %d bytes, %d: %v", len(text), len(got.Text), got.N, err)
		}
	}
	for n := 1; n <= maxFiles; n++ {
		var files []*os.File
		for range n {
			f, err := os.CreateTemp(t.TempDir(), "")
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			files = append(files, f)
		}
		var seen int
		back, err := c.Call(short(t), "files", none{}, &seen, files...)
		if err != nil || seen != n || len(back) != 1 {
			t.Fatalf("%d files: %d arrived, %d came back: %v", n, seen, len(back), err)
		}
		b := make([]byte, 13) // the same open file: one offset, so read at
		_, err = back[0].ReadAt(b, 0)
		if err != nil || string(b) != "from the role" {
			t.Errorf("the file that came back holds %q: %v", b, err)
		}
		back[0].Close()
	}
}

// TestErrorKinds: each sentinel can be told apart at the other end, and only it.
func TestErrorKinds(t *testing.T) {
	sentinels := []error{region.ErrMismatch, region.ErrNotSupported, region.ErrNotPermitted, region.ErrOutOfRange, region.ErrReadOnly,
		region.ErrPeerGone, region.ErrMissing, region.ErrClosed, context.DeadlineExceeded, context.Canceled, errors.New("of no kind")}
	c := serving(t, map[string]handler{"fail": on(func(_ context.Context, i int) (none, error) {
		return none{}, fmt.Errorf("chunk %d: %w", i, sentinels[i])
	})})
	for i, want := range sentinels {
		_, err := c.Call(short(t), "fail", i, nil)
		var remote *RemoteError
		if !errors.As(err, &remote) || remote.Op != "fail" || !strings.Contains(err.Error(), fmt.Sprintf("tester: fail: chunk %d: ", i)) {
			t.Errorf("%v became %v", want, err)
		}
		for j, s := range sentinels[:len(sentinels)-1] {
			if errors.Is(err, s) != (i == j) {
				t.Errorf("%v is %v: %t", err, s, errors.Is(err, s))
			}
		}
	}
	if _, err := c.Call(short(t), "dance", none{}, nil); err == nil || !strings.Contains(err.Error(), `unknown operation "dance"`) {
		t.Errorf("unknown operation: %v", err)
	}
	if _, err := c.Call(short(t), "fail", "no number", nil); err == nil || !strings.Contains(err.Error(), "arguments") {
		t.Errorf("wrong arguments: %v", err)
	}
}

func TestLimits(t *testing.T) {
	c, peer := pair(t)
	err := c.write(message{Op: "x", Body: json.RawMessage(`"` + strings.Repeat("x", maxMessage) + `"`)}, nil)
	if err == nil || !strings.Contains(err.Error(), "above the limit") {
		t.Errorf("a message that is too long: %v", err)
	}
	err = c.write(message{}, make([]*os.File, maxFiles+1))
	if err == nil || !strings.Contains(err.Error(), "above the limit") {
		t.Errorf("too many files: %v", err)
	}
	head := binary.BigEndian.AppendUint32(nil, maxMessage+1)
	if _, err := c.c.Write(head); err != nil {
		t.Fatal(err)
	}
	if _, _, err := peer.read(); err == nil || !strings.Contains(err.Error(), "above the limit") {
		t.Errorf("the length of a message that is too long: %v", err)
	}
}

// frame makes a frame of any text.
func frame(text string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...)
}

func TestBadFrames(t *testing.T) {
	for name, c := range map[string]struct {
		bytes []byte
		want  string
	}{
		"other version": {frame(`{"v":2,"id":1,"op":"hello"}`), "role protocol version 2, want 1: both ends must be the same memsync"},
		"no version":    {frame(`{}`), "role protocol version 0"},
		"not JSON":      {frame("hello"), "role message: "},
		"empty":         {frame(""), "role message: "},
		"wrong types":   {frame(`{"v":1,"id":"x"}`), "role message: "},
		"cut in length": {[]byte{0, 0}, "EOF"},
		"cut in body":   {frame(`{"v":1}`)[:8], "EOF"},
	} {
		runner, role := pair(t)
		if _, err := runner.c.Write(c.bytes); err != nil {
			t.Fatal(err)
		}
		runner.Close()
		if _, _, err := role.read(); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// TestServeEnds: a frame that makes no sense ends the role, with an error.
func TestServeEnds(t *testing.T) {
	runner, role := pair(t)
	done := make(chan error, 1)
	go func() { done <- role.serve(nil) }()
	if _, err := runner.c.Write(frame("nonsense")); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-done:
		if err == nil {
			t.Error("nonsense is taken for a good end")
		}
	case <-time.After(10 * time.Second):
		t.Fatal("serve goes on")
	}
}

// TestPeerLeaves: a runner that goes away cancels what its role is doing.
func TestPeerLeaves(t *testing.T) {
	runner, role := pair(t)
	canceled, done := make(chan struct{}), make(chan struct{})
	began := make(chan struct{})
	go func() {
		defer close(done)
		_ = role.serve(map[string]handler{"wait": on(func(ctx context.Context, _ none) (none, error) {
			close(began)
			<-ctx.Done()
			close(canceled)
			return none{}, ctx.Err()
		})})
	}()
	if err := runner.write(message{ID: 1, Op: "wait", Body: []byte("{}")}, nil); err != nil {
		t.Fatal(err)
	}
	<-began
	runner.Close()
	for _, c := range []chan struct{}{canceled, done} {
		select {
		case <-c:
		case <-time.After(10 * time.Second):
			t.Fatal("the role did not notice that its peer has gone")
		}
	}
}

func TestCallEnds(t *testing.T) {
	// Its role is gone.
	c, peer := pair(t)
	peer.Close()
	if _, err := c.Call(short(t), "x", none{}, nil); !errors.Is(err, region.ErrPeerGone) {
		t.Errorf("call of a role that has gone: %v", err)
	}
	// Its role does not answer; the context's cause is the error.
	c, _ = pair(t)
	cause := errors.New("daemon ended")
	ctx, cancel := context.WithCancelCause(context.Background())
	time.AfterFunc(10*time.Millisecond, func() { cancel(cause) })
	if _, err := c.Call(ctx, "x", none{}, nil); !errors.Is(err, cause) || !strings.Contains(err.Error(), "tester: x: ") {
		t.Errorf("call whose context was cancelled with a cause: %v", err)
	}
	// Its role answers another question.
	c, peer = pair(t)
	if err := peer.write(message{ID: 99}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Call(short(t), "x", none{}, nil); err == nil || !strings.Contains(err.Error(), "reply to request 99, want 1") {
		t.Errorf("reply to another request: %v", err)
	}
	// It answers what cannot be decoded.
	c, peer = pair(t)
	if err := peer.write(message{ID: 1, Body: []byte(`"text"`)}, nil); err != nil {
		t.Fatal(err)
	}
	var e echo
	if _, err := c.Call(short(t), "x", none{}, &e); err == nil {
		t.Error("a reply of another type is taken")
	}
}

// FuzzRead: no bytes make read panic, hang or return a message of another version.
func FuzzRead(f *testing.F) {
	f.Add(frame(`{"v":1,"id":7,"op":"mount","body":{"a":1}}`), false)
	f.Add(frame(`{"v":2}`), true)
	f.Add([]byte{0xFF, 0xFF, 0xFF, 0xFF}, false)
	f.Add(append(frame(`{"v":1}`), frame(`{"v":1,"error":"x","kind":"mismatch"}`)...), true)
	f.Add([]byte{0, 0, 0}, true)
	f.Fuzz(func(t *testing.T, b []byte, withFile bool) {
		if len(b) == 0 || len(b) > 1<<16 {
			return
		}
		runner, role := pair(t)
		var oob []byte
		if withFile {
			null, err := os.Open(os.DevNull)
			if err != nil {
				t.Fatal(err)
			}
			defer null.Close()
			oob = unix.UnixRights(int(null.Fd()))
		}
		if _, _, err := runner.c.WriteMsgUnix(b, oob, nil); err != nil {
			t.Fatal(err)
		}
		runner.Close()
		_ = role.c.SetDeadline(time.Now().Add(5 * time.Second))
		for i := 0; ; i++ {
			m, files, err := role.read()
			if err != nil {
				if errors.Is(err, os.ErrDeadlineExceeded) {
					t.Fatalf("read hangs after %q", b)
				}
				if len(files) > 0 {
					t.Fatal("files beside an error: nobody will close them")
				}
				if i == 0 && len(b) < 4 && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
					t.Fatalf("%d bytes: %v", len(b), err)
				}
				return
			}
			if m.Version != Version || (len(files) > 0) != (withFile && i == 0) {
				t.Fatalf("message %+v with %d files from %q", m, len(files), b)
			}
			closeAll(files)
			var again bytes.Buffer
			if err := json.NewEncoder(&again).Encode(m); err != nil {
				t.Fatalf("what was read cannot be written: %v", err)
			}
		}
	})
}
