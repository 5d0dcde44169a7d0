package download

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"

	"memsync/strategies"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/storetest"
	"memsync/strategies/transport"
)

// source is a Remote whose connections are answered by serve.
type source struct {
	addr  string
	serve func(net.Conn)
	wg    *sync.WaitGroup
}

func listen(t *testing.T, serve func(net.Conn)) source {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := source{l.Addr().String(), serve, &sync.WaitGroup{}}
	s.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.wg.Go(func() {
				defer c.Close()
				serve(c)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		s.wg.Wait()
	})
	return s
}

func (s source) Addr() string { return s.addr }
func (s source) Open(context.Context) (region.Store, error) {
	return nil, errors.New("download does not speak a transport's protocol")
}
func (s source) Dial(ctx context.Context) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "tcp", s.addr)
}

func options(t *testing.T, settings ...string) strategies.Options {
	t.Helper()
	p, err := param.New(Strategy{}.Info().Params, settings)
	if err != nil {
		t.Fatal(err)
	}
	return strategies.Options{Dir: t.TempDir(), Params: p}
}

// serveRegion answers with the strategy's own source side until the peer leaves.
func serveRegion(t *testing.T, size int64) source {
	e := transport.One{Name: "region", Store: storetest.Seeded(region.Content{Seed: 3}, size)}
	return listen(t, func(c net.Conn) {
		if err := (Strategy{}).Serve(t.Context(), nil, c, e, param.Values{}); err != nil && t.Context().Err() == nil {
			t.Errorf("serve: %v", err)
		}
	})
}

// TestRanges: with fetch=ranges nothing is copied, and who has the address gets what it asks for,
// on one connection after another.
func TestRanges(t *testing.T) {
	const size = 3<<20 + 5
	o := options(t, "fetch=ranges")
	m, err := Strategy{}.Mount(t.Context(), serveRegion(t, size), o)
	if err != nil {
		t.Fatal(err)
	}
	a := m.Attachment()
	if a.Size != size || !strings.HasPrefix(a.Path, "http://127.0.0.1:") || m.Stats().PrefetchBytes != 0 {
		t.Errorf("%+v, %+v", a, m.Stats())
	}
	for _, off := range []int64{0, 1<<20 - 3, size - 1000} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, a.Path, nil)
		if err != nil {
			t.Fatal(err)
		}
		want := make([]byte, 1000)
		region.Content{Seed: 3}.Fill(want, off)
		req.Header.Set("Range", "bytes="+itoa(off)+"-"+itoa(off+999))
		client := &http.Transport{DisableKeepAlives: true}
		got, err := client.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(got.Body)
		if err = errors.Join(err, got.Body.Close()); err != nil || got.StatusCode != http.StatusPartialContent || string(b) != string(want) {
			t.Errorf("1000 bytes at %d: %s, %d bytes, %v", off, got.Status, len(b), err)
		}
	}
	if err := errors.Join(m.Close(t.Context()), m.Close(t.Context())); err != nil {
		t.Error(err)
	}
	empty(t, o.Dir)
}

func itoa(n int64) string { return strconv.FormatInt(n, 10) }

func empty(t *testing.T, dir string) {
	t.Helper()
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
}

// TestBadSource: an answer that is none, or that ends early, is an error, and nothing is left of it.
func TestBadSource(t *testing.T) {
	for name, c := range map[string]struct {
		answer string
		want   error
	}{
		"missing":   {"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", region.ErrMissing},
		"empty":     {"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", region.ErrOutOfRange},
		"no length": {"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nbytes", region.ErrOutOfRange},
		"short":     {"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nbytes", io.ErrUnexpectedEOF},
		"garbage":   {"NBDMAGIC\x00\x01\x02", nil},
		"nothing":   {"", nil},
	} {
		t.Run(name, func(t *testing.T) {
			s := listen(t, func(conn net.Conn) {
				_, _ = conn.Read(make([]byte, 4096)) // the request
				_, _ = io.WriteString(conn, c.answer)
			})
			o := options(t)
			m, err := Strategy{}.Mount(t.Context(), s, o)
			if err == nil {
				t.Fatalf("a mount of %d bytes", m.Attachment().Size)
			}
			if c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
			empty(t, o.Dir)
		})
	}
}
