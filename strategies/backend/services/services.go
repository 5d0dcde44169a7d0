// Package services starts the real servers that backends talk to, on loopback of
// the network namespace that it is called in: Redis (Debian's redis-server), an
// S3 server (versitygw, built from Go modules) and Apache Cassandra (its Maven artifacts).
//
// A server dies with the process that started it, and its data are below a
// folder of the caller.
package services

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"memsync/strategies/region"
)

// Endpoint is how a client reaches a server. Credentials are made anew for each
// start; they must not enter a record.
type Endpoint struct {
	Kind     string `json:"kind"` // one of Kinds
	Addr     string `json:"addr"` // host:port
	User     string `json:"user"`
	Password string `json:"password"`
	Bucket   string `json:"bucket"` // of S3; keyspace of Cassandra
	Version  string `json:"version"`
}

// kind is one sort of server.
type kind struct {
	name string
	// find returns the program, or an error that matches region.ErrNotSupported
	// and names what would mend it. It may build or fetch it.
	find func(ctx context.Context, log func(string)) (program string, err error)
	// command makes the process that serves e below dir. ports are free ones; the
	// first is e's.
	command func(program, dir string, e Endpoint, ports []string) (*exec.Cmd, error)
	// ready returns nil once the server answers; it is asked again until then.
	ready   func(ctx context.Context, n Net, e Endpoint) error
	version func(ctx context.Context, program string) string
	start   time.Duration // how long it may take to be ready
	stop    time.Duration // how long it may take to end when asked to; 0 is 5 s
	ports   int           // that it listens on; 0 is 1
}

func kinds() []kind { return []kind{redisServer(), s3Server(), cassandraServer()} }

// Kinds lists the servers that Start knows.
func Kinds() []string {
	var names []string
	for _, k := range kinds() {
		names = append(names, k.name)
	}
	return names
}

func byName(name string) (kind, error) {
	i := slices.IndexFunc(kinds(), func(k kind) bool { return k.name == name })
	if i < 0 {
		return kind{}, fmt.Errorf("unknown service %q; valid: %s", name, strings.Join(Kinds(), ", "))
	}
	return kinds()[i], nil
}

// Service is a server that runs.
type Service struct {
	Endpoint
	kind   kind
	net    Net
	cmd    *exec.Cmd
	log    fmt.Stringer // its last words
	ended  chan struct{}
	err    error // of the process, once ended
	closed sync.Once
}

// Net is where a server runs and is asked whether it is ready.
type Net struct {
	Start  func(*exec.Cmd) error
	Dial   func(ctx context.Context, network, addr string) (net.Conn, error)
	Listen func(ctx context.Context, network, addr string) (net.Listener, error)
}

// Here is the process's own network.
func Here() Net {
	var d net.Dialer
	var l net.ListenConfig
	return Net{(*exec.Cmd).Start, d.DialContext, l.Listen}
}

// Start starts a server on loopback of n and waits until it answers. dir is an
// existing folder for its data, which the caller removes after Close. log, which
// may be nil, is told of what takes long. Where the server cannot be had the
// error matches region.ErrNotSupported.
//
// The server ends with the thread that called Start, so with the process at the latest.
func Start(ctx context.Context, name, dir string, n Net, log func(string)) (*Service, error) {
	s, err := prepare(ctx, name, dir, n, log)
	if err != nil {
		return nil, err
	}
	words := &tail{}
	s.log, s.cmd.Stdout, s.cmd.Stderr = words, words, words
	s.cmd.WaitDelay = time.Second
	s.cmd.SysProcAttr.Setpgid = true // a Ctrl-C is for memsync, which then ends it
	s.cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	return s, s.run(ctx)
}

// Again starts a server that has ended once more: the same data, address and
// credentials. It waits until the server answers. What the first one said is kept.
func (s *Service) Again(ctx context.Context) (*Service, error) {
	<-s.ended
	c := &exec.Cmd{Path: s.cmd.Path, Args: s.cmd.Args, Env: s.cmd.Env, Dir: s.cmd.Dir, Stdout: s.cmd.Stdout, Stderr: s.cmd.Stderr,
		WaitDelay: s.cmd.WaitDelay, SysProcAttr: s.cmd.SysProcAttr}
	next := &Service{Endpoint: s.Endpoint, kind: s.kind, net: s.net, cmd: c, log: s.log, ended: make(chan struct{})}
	return next, next.run(ctx)
}

// prepare finds the program and makes all that run needs but where the server's words go.
func prepare(ctx context.Context, name, dir string, n Net, log func(string)) (*Service, error) {
	k, err := byName(name)
	if err != nil {
		return nil, err
	}
	if log == nil {
		log = func(string) {}
	}
	wrap := func(err error) error { return fmt.Errorf("start %s: %w", name, err) }
	program, err := k.find(ctx, log)
	if err != nil {
		return nil, wrap(err)
	}
	ports, err := freePorts(ctx, n, max(1, k.ports))
	if err != nil {
		return nil, wrap(err)
	}
	e := Endpoint{Kind: name, Addr: net.JoinHostPort("127.0.0.1", ports[0]), User: "memsync", Password: secret(), Bucket: "memsync",
		Version: k.version(ctx, program)}
	cmd, err := k.command(program, dir, e, ports)
	if err != nil {
		return nil, wrap(err)
	}
	cmd.Dir = dir
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	return &Service{Endpoint: e, kind: k, net: n, cmd: cmd, ended: make(chan struct{})}, nil
}

// run starts the process and waits until it is ready; else it ends it.
func (s *Service) run(ctx context.Context) error {
	wrap := func(err error) error { return fmt.Errorf("start %s: %w", s.Kind, err) }
	if err := s.net.Start(s.cmd); err != nil {
		return wrap(err)
	}
	go func() {
		s.err = s.cmd.Wait()
		close(s.ended)
	}()
	if err := s.wait(ctx); err != nil {
		return errors.Join(wrap(err), s.Close())
	}
	return nil
}

func (s *Service) wait(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.kind.start)
	defer cancel()
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, 250*time.Millisecond) {
		err := s.kind.ready(ctx, s.net, s.Endpoint)
		if err == nil {
			return nil
		}
		select {
		case <-s.ended:
			return fmt.Errorf("it ended: %w: %s", s.err, s.log)
		case <-ctx.Done():
			return fmt.Errorf("not ready after %v: %w: %s", s.kind.start, err, s.log)
		case <-time.After(pause):
		}
	}
}

// PID returns the server's process.
func (s *Service) PID() int { return s.cmd.Process.Pid }

// Kill ends the server at once, as a crash would. Close must still be called.
func (s *Service) Kill() error {
	err := s.cmd.Process.Kill()
	<-s.ended
	return err
}

// stopTime is how long a server may take to end when asked to.
func (k kind) stopTime() time.Duration { return cmp.Or(k.stop, 5*time.Second) }

// Close ends the server: politely, and after a while (5 s; Cassandra 20 s) by
// SIGKILL. It may be called twice.
func (s *Service) Close() error {
	s.closed.Do(func() {
		_ = s.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-s.ended:
		case <-time.After(s.kind.stopTime()):
			_ = s.cmd.Process.Kill()
			<-s.ended
		}
	})
	return nil
}

// freePorts returns ports that were free a moment ago. A server that finds one
// taken ends, and Start says so.
func freePorts(ctx context.Context, n Net, count int) (ports []string, err error) {
	for range count {
		l, err := n.Listen(ctx, "tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close() // not before all are had
		_, port, err := net.SplitHostPort(l.Addr().String())
		if err != nil {
			return nil, err
		}
		ports = append(ports, port)
	}
	return ports, nil
}

func secret() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// tail keeps the last lines that a server wrote.
type tail struct {
	mu sync.Mutex
	b  []byte
}

func (t *tail) Write(p []byte) (int, error) {
	const keep = 4 << 10
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	if len(t.b) > keep {
		t.b = append([]byte(nil), t.b[len(t.b)-keep:]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var lines []string
	sc := bufio.NewScanner(bytes.NewReader(t.b))
	for sc.Scan() {
		if l := strings.TrimSpace(sc.Text()); l != "" {
			lines = append(lines, l)
		}
	}
	return strings.Join(lines[max(0, len(lines)-6):], " | ")
}

// redisServer is Debian's redis-server, without persistence.
func redisServer() kind {
	return kind{
		name: "redis", start: 10 * time.Second,
		find: func(context.Context, func(string)) (string, error) {
			p, err := exec.LookPath("redis-server")
			if err != nil {
				return "", fmt.Errorf("%w (apt-get install redis-server): %w", err, region.ErrNotSupported)
			}
			return p, nil
		},
		version: func(ctx context.Context, program string) string {
			out, _ := exec.CommandContext(ctx, program, "--version").Output()
			for f := range strings.FieldsSeq(string(out)) {
				if v, ok := strings.CutPrefix(f, "v="); ok {
					return "redis " + v
				}
			}
			return "redis"
		},
		command: func(program, dir string, e Endpoint, _ []string) (*exec.Cmd, error) {
			host, port, err := net.SplitHostPort(e.Addr)
			if err != nil {
				return nil, err
			}
			// The password stands in a file, not in the command line, which others can read.
			conf := fmt.Sprintf("bind %s\nport %s\ndir %s\nsave \"\"\nappendonly no\nuser default off\nuser %s on >%s ~* &* +@all\n", host, port, dir, e.User, e.Password)
			file := filepath.Join(dir, "redis.conf")
			if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
				return nil, err
			}
			return exec.Command(program, file), nil
		},
		ready: answers("PING\r\n", "-NOAUTH", "+PONG"),
	}
}

// answers makes a check that a server's first line begins with one of the given texts.
func answers(question string, want ...string) func(context.Context, Net, Endpoint) error {
	return func(ctx context.Context, n Net, e Endpoint) error {
		c, err := n.Dial(ctx, "tcp", e.Addr)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(time.Second))
		if _, err := c.Write([]byte(question)); err != nil {
			return err
		}
		line, err := bufio.NewReader(c).ReadString('\n')
		if err != nil {
			return err
		}
		for _, w := range want {
			if strings.HasPrefix(line, w) {
				return nil
			}
		}
		return fmt.Errorf("it answers %q", line)
	}
}

// gateway is the S3 server's module and version.
const gateway = "github.com/versity/versitygw/cmd/versitygw@v1.8.0"

// s3Server is versitygw over a folder.
func s3Server() kind {
	return kind{
		name: "s3", start: 15 * time.Second,
		find: func(ctx context.Context, log func(string)) (string, error) { return build(ctx, gateway, log) },
		version: func(context.Context, string) string {
			_, v, _ := strings.Cut(gateway, "@")
			return "versitygw " + v
		},
		command: func(program, dir string, e Endpoint, _ []string) (*exec.Cmd, error) {
			data := filepath.Join(dir, "data")
			if err := os.MkdirAll(data, 0o700); err != nil {
				return nil, err
			}
			c := exec.Command(program, "--port", e.Addr, "--keep-alive", "--quiet", "posix", data)
			c.Env = append(os.Environ(), "ROOT_ACCESS_KEY="+e.User, "ROOT_SECRET_KEY="+e.Password)
			return c, nil
		},
		ready: answers("GET / HTTP/1.0\r\n\r\n", "HTTP/1."),
	}
}

// buildTime bounds fetching and building a server; on two cores it takes 2 to 3 minutes.
const buildTime = 15 * time.Minute

// cached returns where a server's program is, or will be, in the user's cache.
func cached(name string) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(cache, "memsync-services", name), nil
}

// into makes path, whole or not at all: make gets an empty folder beside it and
// returns what shall be moved there.
func into(path string, make func(tmp string) (string, error)) error {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(dir, "new-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	made, err := make(tmp)
	if err != nil {
		return err
	}
	if err := os.Rename(made, path); err != nil && !errors.Is(err, fs.ErrExist) && !errors.Is(err, syscall.ENOTEMPTY) {
		return err // else somebody else was faster
	}
	return nil
}

// build returns the program that a Go package is, built once into the user's cache.
func build(ctx context.Context, pkg string, log func(string)) (string, error) {
	path, version, _ := strings.Cut(pkg, "@")
	program, err := cached(filepath.Join(version, filepath.Base(path)))
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(program); err == nil {
		return program, nil
	}
	goTool, err := exec.LookPath("go")
	if err != nil {
		return "", fmt.Errorf("%s is not built yet, and there is no Go to build it (go install %s): %w", program, pkg, region.ErrNotSupported)
	}
	log("building " + pkg + " into the user cache (once)")
	return program, into(program, func(tmp string) (string, error) {
		ctx, cancel := context.WithTimeout(ctx, buildTime)
		defer cancel()
		c := exec.CommandContext(ctx, goTool, "install", pkg)
		c.WaitDelay = time.Second // what it started may hold its output
		c.Dir = tmp               // outside of any module
		c.Env = append(os.Environ(), "GOBIN="+tmp, "CGO_ENABLED=0", "GOFLAGS=-trimpath")
		if out, err := c.CombinedOutput(); err != nil {
			return "", fmt.Errorf("go install %s: %w: %s: %w", pkg, err, bytes.TrimSpace(out), region.ErrNotSupported)
		}
		return filepath.Join(tmp, filepath.Base(path)), nil
	})
}
