package scenarios

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"

	"memsync/netem"
	"memsync/strategies/backend"
	"memsync/strategies/backend/services"
)

// servers are the programs that backends talk to: started once a sweep, in a
// network namespace of their own that only the roles reach. The zero value has none.
type servers struct {
	ns      *netem.Namespace
	running map[string]*server
}

// server is one that runs, or the reason why it does not.
type server struct {
	*services.Service
	err error
}

// For returns the server that a cell's backend needs: the one that its endpoint
// parameter names, or one of ours, which is started the first time. It is nil
// where the backend has none.
func (s *servers) For(ctx context.Context, c *Cell, scratch string, log func(string, ...any)) (*backend.Service, error) {
	if !backend.NeedsService(c.Backend) {
		return nil, nil
	}
	if ext, ok, err := backend.External(c.Backend, c.params, os.Getenv); ok || err != nil {
		return &ext, errors.Join(err, fromHere(ctx, &ext))
	}
	sv, ok := s.running[c.Backend]
	if !ok {
		sv = &server{}
		sv.Service, sv.err = s.start(ctx, c.Backend, scratch, log)
		if ctx.Err() != nil {
			return nil, sv.err // not the server's fault: try again
		}
		if s.running == nil {
			s.running = map[string]*server{}
		}
		s.running[c.Backend] = sv
	}
	if sv.err != nil {
		return nil, fmt.Errorf("backend %s: %w", c.Backend, sv.err)
	}
	return &backend.Service{Endpoint: sv.Endpoint, NetNS: s.ns.Path()}, nil
}

// fromHere makes an endpoint that was named to us one for the roles, which are in
// network namespaces of their own: they reach it through ours, and ask no name server.
func fromHere(ctx context.Context, e *backend.Service) error {
	host, port, err := net.SplitHostPort(e.Addr)
	if err != nil || host == "" {
		return err
	}
	if net.ParseIP(host) == nil {
		addrs, err := net.DefaultResolver.LookupHost(ctx, host)
		if err != nil {
			return fmt.Errorf("endpoint %s: %w", e.Addr, err)
		}
		e.Addr = net.JoinHostPort(addrs[0], port)
	}
	e.NetNS = fmt.Sprintf("/proc/%d/ns/net", os.Getpid())
	return nil
}

func (s *servers) start(ctx context.Context, name, scratch string, log func(string, ...any)) (sv *services.Service, err error) {
	if s.ns == nil {
		if s.ns, err = netem.Isolated("services"); err != nil {
			return nil, err
		}
	}
	dir, err := os.MkdirTemp(scratch, name+"-") // goes with the scratch folder
	if err != nil {
		return nil, err
	}
	inside := services.Net{
		Start: func(cmd *exec.Cmd) error { return s.ns.Start(cmd) },
		Dial:  s.ns.Dial, Listen: s.ns.Listen,
	}
	return services.Start(ctx, name, dir, inside, func(line string) {
		if log != nil {
			log("%s", line)
		}
	})
}

// Close ends all of them.
func (s *servers) Close() error {
	var errs []error
	for _, sv := range s.running {
		if sv.Service != nil {
			errs = append(errs, sv.Service.Close())
		}
	}
	if s.ns != nil {
		errs = append(errs, s.ns.Close())
	}
	*s = servers{}
	return errors.Join(errs...)
}
