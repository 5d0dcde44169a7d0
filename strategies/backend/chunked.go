package backend

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"memsync/strategies/backend/cassandra"
	"memsync/strategies/backend/directory"
	"memsync/strategies/backend/encrypt"
	"memsync/strategies/backend/keyed"
	"memsync/strategies/backend/kv"
	"memsync/strategies/backend/redis"
	"memsync/strategies/backend/s3"
	"memsync/strategies/backend/services"
	"memsync/strategies/backend/tape"
	"memsync/strategies/param"
	"memsync/strategies/region"
)

// Service is a server that a backend talks to.
type Service struct {
	services.Endpoint
	// NetNS is the path of the network namespace that the server is in; empty is
	// the process's own.
	NetNS string `json:"netns,omitempty"`
}

// cleaner is a table that can delete all of its region's values.
type cleaner interface {
	Clear(ctx context.Context) error
}

// access is what a backend needs to reach its region.
type access struct {
	path, prefix string // of the file or folder to make; of keys
	service      Service
	params       param.Values
	dial         func(ctx context.Context, network, addr string) (net.Conn, error)
}

// chunkedBackend keeps a region chunk by chunk.
type chunkedBackend struct {
	server bool // a service of that name is needed
	params []param.Spec
	open   func(ctx context.Context, a access) (keyed.Table, error)
}

func chunked() map[string]chunkedBackend {
	return map[string]chunkedBackend{
		"cassandra": {server: true, open: func(ctx context.Context, a access) (keyed.Table, error) {
			o := cassandra.Options{Addr: a.service.Addr, User: a.service.User, Password: a.service.Password, Keyspace: a.service.Bucket, Dial: a.dial,
				Table: strings.ToLower(strings.NewReplacer("-", "_", "/", "").Replace(a.prefix))}
			if err := cassandra.MakeTable(ctx, o); err != nil {
				return nil, err
			}
			return cassandra.Open(ctx, o)
		}},
		"directory": {
			params: []param.Spec{{Name: "handles", Kind: param.KindInt, Default: "64", Min: 1, Max: 65536, Doc: "files that the directory backend has open at once"}},
			open: func(_ context.Context, a access) (keyed.Table, error) {
				if err := os.Mkdir(a.path, 0o700); err != nil {
					return nil, err
				}
				return directory.Open(a.path, a.params.Int("handles"))
			},
		},
		"kv": {open: func(_ context.Context, a access) (keyed.Table, error) {
			return kv.Open(a.path)
		}},
		"tape": {
			params: []param.Spec{
				{Name: "tape_turn", Kind: param.KindDuration, Default: "50ms", Max: int64(time.Hour), Doc: "how long the tape's head takes to stop and begin again at another record"},
				{Name: "tape_wind", Kind: param.KindSize, Default: "1GB", Doc: "bytes of tape that pass in a second while its head moves; 0 is any"},
				{Name: "tape_rate", Kind: param.KindSize, Default: "100MB", Doc: "bytes that the tape reads or writes in a second; 0 is any"},
			},
			open: func(_ context.Context, a access) (keyed.Table, error) {
				return tape.Open(a.path, tape.Options{Turn: a.params.Duration("tape_turn"), Wind: a.params.Size("tape_wind"), Rate: a.params.Size("tape_rate")})
			},
		},
		"redis": {server: true, open: func(ctx context.Context, a access) (keyed.Table, error) {
			return redis.Open(ctx, redis.Options{Addr: a.service.Addr, User: a.service.User, Password: a.service.Password, Prefix: a.prefix, Dial: a.dial})
		}},
		"s3": {server: true,
			params: []param.Spec{{Name: "s3_layout", Kind: param.KindEnum, Default: "chunks", Values: []string{"chunks", "object"},
				Doc: "an object a chunk, or one object read by ranges (read-only)"}},
			open: func(ctx context.Context, a access) (keyed.Table, error) {
				o := a.s3()
				if err := s3.MakeBucket(ctx, o); err != nil {
					return nil, err
				}
				return s3.OpenTable(ctx, o)
			}},
	}
}

func (a access) s3() s3.Options {
	return s3.Options{Addr: a.service.Addr, Access: a.service.User, Secret: a.service.Password, Bucket: a.service.Bucket, Prefix: a.prefix, Dial: a.dial}
}

func chunkedNames() []string { return slices.Sorted(maps.Keys(chunked())) }

// Chunked reports whether a backend keeps its region chunk by chunk.
func Chunked(name string) bool { _, ok := chunked()[name]; return ok }

// NeedsService reports whether a backend talks to a server, which package
// services can start under the same name.
func NeedsService(name string) bool { return chunked()[name].server }

// Params returns the parameters of a backend.
func Params(name string) []param.Spec {
	b, ok := chunked()[name]
	if !ok {
		return nil
	}
	specs := append([]param.Spec{
		{Name: "missing", Kind: param.KindEnum, Default: string(keyed.MissingError), Values: []string{string(keyed.MissingError), string(keyed.MissingZero)},
			Doc: "a chunk that the backend does not have: an error, or zeroes"},
		{Name: "encrypt", Kind: param.KindString, Check: checkKey,
			Doc: "file with the key that chunks are encrypted with before the backend has them, or env for " + encrypt.KeyEnv + " (default: none; docs/backends.md)"},
		{Name: "retry", Kind: param.KindDuration, Default: "10s", Doc: "how long the backend repeats a call that fails, with growing pauses; 0 is never"},
	}, b.params...)
	if b.server {
		specs = append(specs, param.Spec{Name: "endpoint", Kind: param.KindString, Check: checkEndpoint,
			Doc: "host:port of a server that runs already (default: one is started); credentials from the environment, docs/backends.md"})
	}
	return specs
}

// checkEndpoint wants host:port and nothing else: a record must not hold credentials.
func checkEndpoint(v string) error {
	if v == "" {
		return nil
	}
	if _, port, err := net.SplitHostPort(v); err != nil || port == "" || strings.ContainsAny(v, "@/") {
		return errors.New("want host:port, without credentials (those come from the environment)")
	}
	return nil
}

// checkKey wants a key that can be read: what is recorded is where it is.
func checkKey(path string) error {
	if path == "" {
		return nil
	}
	_, err := encrypt.ReadKey(path)
	return err
}

// External returns the server that the endpoint parameter names, with the
// credentials of the environment: MEMSYNC_REDIS_USER and MEMSYNC_REDIS_PASSWORD,
// say, or the file that MEMSYNC_REDIS_PASSWORD_FILE names. ok is false where the
// parameter is not set.
func External(name string, p param.Values, env func(string) string) (s Service, ok bool, err error) {
	if !NeedsService(name) || p.Text("endpoint") == "" {
		return s, false, nil
	}
	prefix := "MEMSYNC_" + strings.ToUpper(name) + "_"
	s.Kind, s.Addr, s.User, s.Password, s.Bucket = name, p.Text("endpoint"), env(prefix+"USER"), env(prefix+"PASSWORD"), env(prefix+"BUCKET")
	if s.Bucket == "" {
		s.Bucket = "memsync"
	}
	if file := env(prefix + "PASSWORD_FILE"); file != "" {
		b, err := os.ReadFile(file)
		if err != nil {
			return s, false, fmt.Errorf("%sPASSWORD_FILE: %w", prefix, err)
		}
		s.Password = strings.TrimSpace(string(b))
	}
	return s, true, nil
}

// openChunked opens a backend and fills it. What it put into a server goes when
// the store is closed.
func openChunked(ctx context.Context, b chunkedBackend, s Spec, dir string, fill func([]byte, int64) error) (region.Store, error) {
	params, err := param.New(Params(s.Backend), s.Settings)
	if err != nil {
		return nil, err
	}
	// Names in a server that others may use too.
	a := access{path: filepath.Join(dir, "region-"+rand.Text()), prefix: "memsync-" + rand.Text() + "/", params: params}
	if b.server {
		if s.Service == nil {
			return nil, fmt.Errorf("no server is given: %w", region.ErrMissing)
		}
		a.service = *s.Service
		if s.Service.NetNS != "" {
			a.dial = dialIn(s.Service.NetNS)
		}
	}
	if s.Backend == "s3" && params.Text("s3_layout") == "object" {
		if params.Text("encrypt") != "" {
			return nil, fmt.Errorf("encrypt with s3_layout=object: one object has no chunks of its own: %w", region.ErrNotSupported)
		}
		return openObject(ctx, a, s.Size, fill)
	}
	t, err := b.open(ctx, a)
	if err != nil {
		return nil, err
	}
	if path := params.Text("encrypt"); path != "" {
		k, err := encrypt.ReadKey(path)
		if err != nil {
			return nil, errors.Join(err, t.Close())
		}
		sealed, err := encrypt.New(t, k, nil) // a region of its own, which goes with this process
		if err != nil {
			return nil, errors.Join(err, t.Close())
		}
		t = sealed
	}
	retry := params.Duration("retry")
	if retry == 0 {
		retry = -1
	}
	store, err := keyed.New(t, keyed.Options{Size: s.Size, Chunk: s.Chunk, Missing: keyed.Missing(params.Text("missing")), Retry: retry})
	if err != nil {
		return nil, errors.Join(err, t.Close())
	}
	st := &owned{Store: store}
	if c, ok := t.(cleaner); ok {
		st.clear = c.Clear
	}
	if err := store.Fill(ctx, fill); err != nil {
		return nil, errors.Join(err, st.Close(), os.RemoveAll(a.path))
	}
	return st, nil
}

// owned is a backend's store that counts its reads and, where clear is set,
// deletes the region's values when it is closed.
type owned struct {
	region.Store
	Sizes
	clear func(context.Context) error
}

func (o *owned) ReadAt(ctx context.Context, p []byte, off int64) error {
	o.count(len(p))
	return o.Store.ReadAt(ctx, p, off)
}

// ReadOnly implements region.ReadOnlyer.
func (o *owned) ReadOnly() bool {
	r, ok := o.Store.(region.ReadOnlyer)
	return ok && r.ReadOnly()
}

// cleanTime bounds the deletion of a region's values.
const cleanTime = 20 * time.Second

func (o *owned) Close() error {
	var err error
	if o.clear != nil {
		ctx, cancel := context.WithTimeout(context.Background(), cleanTime)
		defer cancel()
		err = o.clear(ctx)
		o.clear = nil
	}
	return errors.Join(err, o.Store.Close())
}

// openObject uploads the content as one object and opens that.
func openObject(ctx context.Context, a access, size int64, fill func([]byte, int64) error) (region.Store, error) {
	o := a.s3()
	if err := s3.MakeBucket(ctx, o); err != nil {
		return nil, err
	}
	const name = "region"
	if err := s3.Upload(ctx, o, name, &filled{fill: fill, size: size}, size); err != nil {
		return nil, err
	}
	obj, err := s3.OpenObject(ctx, o, name)
	if err != nil {
		return nil, err
	}
	return &owned{Store: obj, clear: obj.Remove}, nil
}

// filled reads a region's content in order.
type filled struct {
	fill      func([]byte, int64) error
	off, size int64
}

func (f *filled) Read(p []byte) (int, error) {
	if f.off == f.size {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), f.size-f.off)]
	if err := f.fill(p, f.off); err != nil {
		return 0, err
	}
	f.off += int64(len(p))
	return len(p), nil
}
