package role

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"memsync/strategies"
	"memsync/strategies/all"
	"memsync/strategies/backend"
	"memsync/strategies/chunk"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/transport"
	"memsync/strategies/transport/cert"
)

// Setup is what the roles must know of a cell.
type Setup struct {
	Strategy    string       `json:"strategy"`
	Device      string       `json:"device"`
	Transport   string       `json:"transport"` // "local": the daemon holds the region
	Backend     backend.Spec `json:"backend"`
	Chunk       int64        `json:"chunk"`
	PullWorkers int          `json:"pull_workers"`
	PushWorkers int          `json:"push_workers"`
	Settings    []string     `json:"settings"` // key=value, as set by the user
	ReadOnly    bool         `json:"read_only"`
	Pwrite      bool         `json:"pwrite"`           // op sync: the writer does not map
	Sleep       int64        `json:"sleep"`            // ns before each call of a local store (the sleep shaper)
	Migrate     bool         `json:"migrate"`          // the region is taken over later
	Reopen      bool         `json:"reopen,omitempty"` // a connection that is lost is made again (strategies.Options)
	Mode        os.FileMode  `json:"mode"`             // of the region's file, where it has one; 0 is for its owner only
	Dir         string       `json:"dir"`              // scratch, removed by the runner
}

// Resolve looks the cell's strategy up and validates its parameters.
func (s Setup) Resolve(known strategies.Registry) (strategies.Strategy, param.Values, error) {
	st, err := known.Get(s.Strategy)
	if err != nil {
		return nil, param.Values{}, err
	}
	v, err := param.New(all.Specs(st, s.Device, s.Transport, s.Backend.Backend), s.Settings)
	return st, v, err
}

// certificates makes those of the run, for a source at host, where the daemon finds its own.
func (s Setup) certificates(host string) (*tls.Config, error) {
	dir := s.certificateDir()
	a, err := cert.OpenAuthority(dir, certificateLife)
	if err != nil {
		return nil, err
	}
	for _, name := range []string{cert.Server, cert.Client} {
		if _, err := a.Issue(name, []string{host}, certificateLife); err != nil {
			return nil, err
		}
	}
	return cert.ServerConfig(dir)
}

// certificateLife is longer than any run.
const certificateLife = 24 * time.Hour

func (s Setup) certificateDir() string { return filepath.Join(s.Dir, "certificates") }

// Listening says where a source answers.
type Listening struct {
	Region string `json:"region"` // the strategy's protocol
	Yard   string `json:"yard"`   // the yardsticks floor_tcp and floor_rr
}

// source is the process that has the data and serves a transport.
type source struct {
	known strategies.Registry
	store region.Store
	setup Setup

	acceptor
	publication strategies.Publication // ops sync and migrate; nil else
	hook        *Conn                  // op migrate: to the application
	own         strategies.Server      // the strategy's own program; nil where it has none
	stop        context.CancelFunc
}

func (s *source) ops() map[string]handler {
	return map[string]handler{
		"open": on(s.open), "publish": s.publish, "track": s.track, "control": s.control, "released": on(s.released), "poll": on(s.poll), "bandwidth": on(s.bandwidth), "sync": on(s.sync), "stats": on(s.stats),
		"listen": on(s.listen), "verify": on(s.verify), "dump": on(s.dump), "close": on(s.close), "counters": on(counters), "settle": on(settle),
		"requests": on(func(context.Context, none) (Requests, error) { return requests(s.store) }),
	}
}

func (s *source) open(ctx context.Context, setup Setup) (_ none, err error) {
	s.setup = setup
	s.store, err = backend.Open(ctx, setup.Backend, setup.Dir)
	return none{}, err
}

// Requests is the histogram of the sizes of read requests, see backend.Sizes;
// empty where the backend does not count.
type Requests struct {
	Hist []byte `json:"hist"`
}

func requests(s region.Store) (r Requests, err error) {
	if c, ok := s.(backend.Counter); ok {
		r.Hist, err = c.ReadSizes()
	}
	return r, err
}

// listenArgs names the address (without a port) to listen on.
type listenArgs struct {
	Addr string `json:"addr"`
}

func (s *source) listen(_ context.Context, a listenArgs) (l Listening, err error) {
	st, params, err := s.setup.Resolve(s.known)
	if err != nil {
		return l, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.stop = cancel
	if l.Region, err = s.serve(ctx, st, a.Addr, params); err != nil {
		return l, err
	}
	l.Yard, err = s.accept(ctx, Source, a.Addr, serveYard)
	return l, err
}

// serve starts what answers for the region and returns its address.
func (s *source) serve(ctx context.Context, st strategies.Strategy, host string, params param.Values) (addr string, err error) {
	if own, ok := st.(strategies.Listener); ok {
		f, ok := s.store.(interface{ Path() string })
		if !ok {
			return "", fmt.Errorf("backend %s has no file that %s could serve; use --backend file: %w", s.setup.Backend.Backend, s.setup.Strategy, region.ErrNotSupported)
		}
		if s.own, err = own.Listen(ctx, host, f.Path(), s.setup.Dir, params); err != nil {
			return "", err
		}
		return s.own.Addr(), nil
	}
	var security transport.TLS
	if params.Bool("tls") {
		if security.Server, err = s.setup.certificates(host); err != nil {
			return "", err
		}
	}
	tr, err := all.SecureTransport(s.setup.Transport, security)
	if err != nil {
		return "", err
	}
	if p := s.publication; p != nil {
		return s.acceptBy(ctx, tr, Source, host, func(ctx context.Context, c net.Conn) {
			if err := p.Serve(ctx, c); err != nil && ctx.Err() == nil {
				fmt.Fprintln(os.Stderr, "source: serve:", err)
			}
		})
	}
	store := chunk.Split(s.store, chunk.SplitSource, params)
	exports := transport.NewLeases(transport.One{Name: "region", Store: store})
	return s.acceptBy(ctx, tr, Source, host, func(ctx context.Context, c net.Conn) {
		if err := st.Serve(ctx, tr, c, exports, params); err != nil && ctx.Err() == nil {
			fmt.Fprintln(os.Stderr, "source: serve:", err)
		}
	})
}

// verifyArgs is what the workload did, for the source to check its own content.
type verifyArgs struct {
	Work    Work    `json:"work"`
	Touched Touched `json:"touched"`
}

// verifyStore compares a store with the first content, changed by what the
// workload says it wrote.
func verifyStore(ctx context.Context, s region.Store, a verifyArgs) (v Verified, err error) {
	k := a.Work
	var in *os.File
	if k.Input != "" {
		if in, err = os.Open(k.Input); err != nil {
			return v, err
		}
		defer in.Close()
	}
	wrote := make([]bool, region.Chunks(k.Size, page))
	seqs, err := k.sequences()
	if err != nil {
		return v, err
	}
	for t, seq := range seqs {
		for i := int64(0); i < a.Touched.Ops[t]; i++ {
			p, _ := seq.next()
			wrote[p] = wrote[p] || k.writes(i)
		}
	}
	got, want := make([]byte, page), make([]byte, page)
	for p := range wrote {
		off, n := k.pageRange(int64(p))
		if err := s.ReadAt(ctx, got[:n], off); err != nil {
			return v, err
		}
		if wrote[p] {
			k.written().Fill(want[:n], off)
		} else if err := k.expect(in, want[:n], off); err != nil {
			return v, err
		}
		if !bytes.Equal(got[:n], want[:n]) {
			return v, fmt.Errorf("verify the source: page at offset %d (written: %t): %w", off, wrote[p], region.ErrMismatch)
		}
		v.Bytes += n
	}
	return v, nil
}

func (s *source) verify(ctx context.Context, a verifyArgs) (Verified, error) {
	return verifyStore(ctx, s.store, a)
}

func (s *source) close(context.Context, none) (_ none, err error) {
	if s.stop != nil {
		s.stop()
		if s.own != nil {
			err = s.own.Close()
		}
		err = errors.Join(err, s.acceptor.close())
		s.stop = nil
	}
	if s.publication != nil {
		err = errors.Join(err, s.publication.Close())
		s.publication = nil
	}
	if s.hook != nil {
		err = errors.Join(err, s.hook.Close())
		s.hook = nil
	}
	if s.store != nil {
		err = errors.Join(err, s.store.Close())
	}
	return none{}, err
}
