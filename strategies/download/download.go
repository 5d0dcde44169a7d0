// Package download is the strategy download: what is done today where nothing better is
// at hand. The source serves the region by HTTP; it is copied to a local file, whole,
// before a workload may attach. It is what the other strategies are compared with.
package download

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"memsync/strategies"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/transport"
)

// Strategy is download.
type Strategy struct{}

var _ strategies.Strategy = Strategy{}

// The values of the parameter fetch.
const (
	Whole  = "whole"
	Ranges = "ranges"
)

// step is how many bytes are read from the store or written to the file at once.
const step = 1 << 20

// Info describes the strategy.
func (Strategy) Info() strategies.Info {
	return strategies.Info{
		Name:         "download",
		Doc:          "the whole region by HTTP into a local file, before it is used",
		Capabilities: []strategies.Capability{strategies.Reads, strategies.Copies, strategies.Prefetch},
		Devices:      []string{""},
		Transports:   []string{"nbd"}, // the default; the protocol is HTTP
		Params: []param.Spec{{Name: "fetch", Kind: param.KindEnum, Default: Whole, Values: []string{Whole, Ranges},
			Doc: "whole: the region is downloaded; ranges: nothing is, and the program gets the address, to ask for ranges itself (--access program:NAME, for programs that speak HTTP)"}},
		DefaultChunk: 64 << 10,
		Consistency:  "A copy, made while it is mounted. Stores stay in the workload's host; later changes at the source are not seen.",
	}
}

// Serve answers HTTP on one connection: GET of the region at any path, whole or by ranges.
func (Strategy) Serve(ctx context.Context, _ transport.Transport, conn net.Conn, e transport.Exports, _ param.Values) error {
	store, err := e.Open("region")
	if err != nil {
		return err
	}
	one := &single{conn: conn, done: make(chan struct{})}
	server := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			// Without a type the first bytes would be read to guess one.
			w.Header().Set("Content-Type", "application/octet-stream")
			http.ServeContent(w, r, "", time.Time{}, io.NewSectionReader(readerAt{r.Context(), store}, 0, store.Size()))
		}),
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ReadHeaderTimeout: headerTimeout,
		ConnState: func(_ net.Conn, s http.ConnState) {
			if s == http.StateClosed || s == http.StateHijacked {
				one.close()
			}
		},
	}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(one); !errors.Is(err, net.ErrClosed) && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve HTTP: %w", err)
	}
	return nil
}

// headerTimeout is how long a peer may take for the head of a request, or be idle.
const headerTimeout = time.Minute

// single is a listener that gives one connection, and then waits until it is closed.
type single struct {
	conn  net.Conn
	given bool
	once  sync.Once
	done  chan struct{}
}

func (l *single) Accept() (net.Conn, error) {
	if !l.given {
		l.given = true
		return l.conn, nil
	}
	<-l.done
	return nil, net.ErrClosed
}

func (l *single) close()         { l.once.Do(func() { close(l.done) }) }
func (l *single) Close() error   { l.close(); return nil }
func (l *single) Addr() net.Addr { return l.conn.LocalAddr() }

// readerAt is a store as an io.ReaderAt.
type readerAt struct {
	ctx   context.Context
	store region.Store
}

func (r readerAt) ReadAt(p []byte, off int64) (int, error) {
	if err := r.store.ReadAt(r.ctx, p, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Mount downloads the region, or with fetch=ranges only asks for its size.
func (Strategy) Mount(ctx context.Context, r strategies.Remote, o strategies.Options) (strategies.Mount, error) {
	dir, err := os.MkdirTemp(o.Dir, "download-")
	if err != nil {
		return nil, err
	}
	m := &mount{dir: dir, a: strategies.Attachment{Kind: strategies.AttachPath, Path: filepath.Join(dir, "region")}}
	if o.File != "" {
		m.a.Path = o.File
	}
	if err := m.open(ctx, r, o); err != nil {
		return nil, fmt.Errorf("download: %w", errors.Join(err, m.Close(ctx)))
	}
	return m, nil
}

func (m *mount) open(ctx context.Context, r strategies.Remote, o strategies.Options) error {
	first, err := r.Dial(ctx)
	if errors.Is(err, region.ErrNotSupported) { // the region is the daemon's own: transport local
		return m.copy(ctx, r, o)
	}
	if err != nil {
		return fmt.Errorf("connect to the source: %w", err)
	}
	address := "source"
	if a, ok := r.(strategies.Addressed); ok {
		if _, _, err := net.SplitHostPort(a.Addr()); err == nil { // not a Unix socket's path
			address = a.Addr()
		}
	}
	method := http.MethodGet
	if o.Params.Text("fetch") == Ranges {
		method = http.MethodHead
	}
	client := &http.Transport{DisableCompression: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		if c := first; c != nil {
			first = nil
			return c, nil
		}
		return r.Dial(ctx)
	}}
	defer func() {
		client.CloseIdleConnections()
		if first != nil {
			_ = first.Close() // the request could not even be begun
		}
	}()
	url := "http://" + address + "/region"
	req, err := http.NewRequestWithContext(ctx, method, url, nil)
	if err != nil {
		return err
	}
	got, err := client.RoundTrip(req)
	if err != nil {
		return err
	}
	defer got.Body.Close()
	switch {
	case got.StatusCode != http.StatusOK:
		return fmt.Errorf("%s %s: %s: %w", method, url, got.Status, region.ErrMissing)
	case got.ContentLength <= 0:
		return fmt.Errorf("%s %s: a region of %d bytes: %w", method, url, got.ContentLength, region.ErrOutOfRange)
	case method == http.MethodHead:
		m.a.Path, m.a.Size = url, got.ContentLength
		return nil
	}
	return m.save(got.Body, got.ContentLength, o)
}

// copy is what is done where there is no link.
func (m *mount) copy(ctx context.Context, r strategies.Remote, o strategies.Options) error {
	if o.Params.Text("fetch") == Ranges {
		return fmt.Errorf("fetch=ranges without a source to ask: %w", region.ErrNotSupported)
	}
	s, err := r.Open(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	return m.save(io.NewSectionReader(readerAt{ctx, s}, 0, s.Size()), s.Size(), o)
}

// save writes size bytes of body to the file.
func (m *mount) save(body io.Reader, size int64, o strategies.Options) (err error) {
	f, err := os.OpenFile(m.a.Path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	m.made = true
	defer func() { err = errors.Join(err, f.Close()) }()
	n, err := io.CopyBuffer(struct{ io.Writer }{f}, body, make([]byte, step))
	if err != nil {
		return err
	}
	if n != size {
		return fmt.Errorf("%d bytes of %d: %w", n, size, io.ErrUnexpectedEOF)
	}
	m.a.Size = size
	if o.Mode != 0 {
		return f.Chmod(o.Mode.Perm())
	}
	return nil
}

// mount is a downloaded region. Only open writes its fields.
type mount struct {
	a    strategies.Attachment
	dir  string
	made bool // the file at a.Path
}

func (m *mount) Attachment() strategies.Attachment { return m.a }
func (m *mount) Sync(context.Context) error        { return nil }

func (m *mount) Stats() strategies.Stats {
	if !m.made {
		return strategies.Stats{}
	}
	return strategies.Stats{PrefetchRequests: 1, PrefetchBytes: m.a.Size, PreemptiveBytes: m.a.Size}
}

// Close removes the copy.
func (m *mount) Close(context.Context) error {
	var err error
	if m.made {
		if err = os.Remove(m.a.Path); errors.Is(err, os.ErrNotExist) {
			err = nil
		}
	}
	return errors.Join(err, os.RemoveAll(m.dir))
}
