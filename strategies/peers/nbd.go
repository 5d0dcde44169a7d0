package peers

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"memsync/strategies"
	"memsync/strategies/direct"
	"memsync/strategies/nbddirect"
	"memsync/strategies/param"
)

// served is a strategy of memsync's whose source's side is another server.
type served struct {
	strategies.Strategy // the daemon's side
	info                func(*strategies.Info)
	listen              func(ctx context.Context, host, path, dir string) (*server, error)
}

var _ strategies.Listener = served{}

// Info describes the strategy.
func (s served) Info() strategies.Info {
	i := s.Strategy.Info()
	s.info(&i)
	return i
}

// Listen starts the server.
func (s served) Listen(ctx context.Context, host, path, dir string, _ param.Values) (strategies.Server, error) {
	srv, err := s.listen(ctx, host, path, dir)
	if err != nil {
		return nil, err
	}
	return srv, nil
}

// NBDKit is the strategy nbdkit: nbdkit and the kernel's client.
func NBDKit() strategies.Strategy { return kernel("nbdkit", nbdkit) }

// NBDServer is the strategy nbd-server: nbd-server and the kernel's client.
func NBDServer() strategies.Strategy { return kernel("nbd-server", nbdServer) }

// DirectNBDKit is direct-mount-nbdkit: nbdkit and memsync's direct mount.
func DirectNBDKit() strategies.Strategy { return mounted("nbdkit", nbdkit) }

// DirectNBDServer is direct-mount-nbd-server: nbd-server and memsync's direct mount.
func DirectNBDServer() strategies.Strategy { return mounted("nbd-server", nbdServer) }

type starter = func(ctx context.Context, host, path, dir string) (*server, error)

func kernel(name string, listen starter) strategies.Strategy {
	return served{nbddirect.Strategy{}, func(i *strategies.Info) {
		i.Name, i.Doc = name, "peer: "+name+" and the kernel's NBD client"
		i.Whole = 512 // it exports the file as it is, and a block device is whole sectors
	}, listen}
}

func mounted(name string, listen starter) strategies.Strategy {
	return served{direct.Strategy{}, func(i *strategies.Info) {
		i.Name, i.Doc = "direct-mount-"+name, "direct-mount of memsync on a region that the peer "+name+" serves"
		i.Devices = []string{"fuse"} // on the kernel's client it would be the peer itself
	}, listen}
}

// nbdkit serves a file with nbdkit's plugin of that name and nbdkit's defaults.
func nbdkit(ctx context.Context, host, path, _ string) (*server, error) {
	tool, err := find("nbdkit", "nbdkit")
	if err != nil {
		return nil, err
	}
	return listen(ctx, host, tool, func(port int) ([]string, error) {
		return []string{"--foreground", "--ipaddr", host, "--port", fmt.Sprint(port), "file", path}, nil
	})
}

// nbdServer serves a file with nbd-server and its defaults, but for flush, without
// which nobody could know when writes have reached the file's disk.
func nbdServer(ctx context.Context, host, path, dir string) (*server, error) {
	tool, err := find("nbd-server", "nbd-server")
	if err != nil {
		return nil, err
	}
	// It goes into the background, so something must stay in front for it to end with.
	const stay = `"$@" && exec sleep infinity`
	return listen(ctx, host, "/bin/sh", func(port int) ([]string, error) {
		conf := filepath.Join(dir, "nbd-server.conf")
		err := os.WriteFile(conf, fmt.Appendf(nil, "[generic]\n\tlistenaddr = %s\n\tport = %d\n[region]\n\texportname = %s\n\tflush = true\n", host, port, path), 0o600)
		return []string{"-c", stay, "sh", tool, "-C", conf, "-p", filepath.Join(dir, "nbd-server.pid")}, err
	})
}
