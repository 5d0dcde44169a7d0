package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"memsync/scenarios/mount"
	"memsync/strategies/transport"
	"memsync/strategies/transport/relay"
)

const (
	relayPort  = "10810"
	tokenEnv   = "MEMSYNC_RELAY_TOKEN"
	relayUsage = "reach the other side through the memsync relay at `ADDR`, to which both dial out; with --relay-token"
	tokenUsage = "`FILE` whose first line is the token of the meeting, 16 to 64 bytes that both sides know and nobody else (default: " + tokenEnv + ")"
)

type relayOptions struct {
	listen  string
	limits  relay.Limits
	metrics string
	asJSON  bool
}

func newRelayCmd(s *state) *cobra.Command {
	var o relayOptions
	c := &cobra.Command{
		Use:   "relay",
		Short: "Join servers and clients that cannot reach each other",
		Long: `Both sides dial out to the relay: memsync serve --relay offers connections under a token,
memsync mount --relay with the same token takes them. The relay joins each two as one
stream of bytes and knows nothing else of them: use --tls on both sides, and it can
neither read nor change what they say. It needs no certificate itself. Who knows a token
can take part in its meeting, and fails at TLS.

stdout has the address when it answers. Runs until SIGINT or SIGTERM, and then exits with 130.`,
		Example: `  memsync relay --listen 0.0.0.0:10810
  memsync serve disk.img --relay relay.example --relay-token token --tls tls
  memsync mount source.example/disk.img /mnt/disk.img --relay relay.example --relay-token token --tls tls`,
		RunE: func(_ *cobra.Command, args []string) error { return runRelay(s, o, args) },
	}
	f := c.Flags()
	f.StringVar(&o.listen, "listen", "127.0.0.1:"+relayPort, "`ADDR` to answer on: HOST:PORT (port 0: a free one) or unix:PATH")
	f.StringVar(&o.metrics, "metrics", "", "answer http://`ADDR`/metrics in the text format of Prometheus; a loopback address")
	f.BoolVar(&o.asJSON, "json", false, "print the address as a JSON object")
	f.IntVar(&o.limits.Sessions, "sessions", 256, "pairs that are joined at once, 1 to 2000")
	f.IntVar(&o.limits.Waiting, "waiting", 512, "connections that wait for their other side, 1 to 2000")
	f.IntVar(&o.limits.Meeting, "meeting", 64, "of those, of one token and side, 1 to 2000")
	sizeFlag(f, &o.limits.Buffer, "buffer", 64<<10, "bytes of each direction of a pair that are held, 4 KiB to 1 MiB")
	durationFlag(f, &o.limits.Want, "wait", 10*time.Second, "how long a client waits for a server")
	durationFlag(f, &o.limits.Offer, "offer", 10*time.Minute, "how long an offered connection of a server stands before it is made anew")
	durationFlag(f, &o.limits.Idle, "idle-timeout", 0, "how long a pair may be silent; 0: for ever")
	return c
}

func runRelay(s *state, o relayOptions, args []string) error {
	l := o.limits
	in := func(n int) bool { return n >= 1 && n <= 2000 }
	switch {
	case len(args) > 0:
		return exitWith(exitUsage, errors.New("relay: takes no arguments"))
	case !in(l.Sessions) || !in(l.Waiting) || !in(l.Meeting):
		return exitWith(exitUsage, fmt.Errorf("--sessions %d, --waiting %d, --meeting %d: want 1 to 2000", l.Sessions, l.Waiting, l.Meeting))
	case l.Buffer < 4<<10 || l.Buffer > 1<<20:
		return exitWith(exitUsage, fmt.Errorf("--buffer %d: want 4 KiB to 1 MiB", l.Buffer))
	case l.Want <= 0 || l.Offer <= 0 || l.Idle < 0:
		return exitWith(exitUsage, errors.New("--wait, --offer: want more than 0; --idle-timeout: 0 or more"))
	}
	network, addr, err := relayAddress(s.ctx, o.listen)
	if err != nil {
		return exitWith(exitUsage, fmt.Errorf("--listen %s: %w", o.listen, err))
	}
	publish, err := metrics(s, o.metrics)
	if err != nil {
		return err
	}
	ln, err := net.Listen(network, addr)
	if err != nil {
		return exitWith(exitFailed, err)
	}
	r := relay.New(l)
	began := time.Now()
	defer publish(func() mount.Status {
		return mount.Status{Kind: "relay", PID: os.Getpid(), Address: ln.Addr().String(), Seconds: time.Since(began).Seconds(),
			Regions: []mount.RegionStatus{{Name: "all", Counters: r.Counters()}}}
	})()
	if o.asJSON {
		line, err := json.Marshal(map[string]any{"address": ln.Addr().String()})
		if err != nil {
			return exitWith(exitFailed, err)
		}
		fmt.Fprintf(s.stdout, "%s\n", line)
	} else {
		fmt.Fprintf(s.stdout, "%s\n", ln.Addr())
	}
	notify(s, "READY=1", "STATUS=relay on "+ln.Addr().String())
	// All connections of a server have one address, and so may those of the clients. The
	// limits that count are those of the meetings.
	most := min(2*l.Sessions+l.Waiting+16, 4096)
	limits := transport.Limits{Connections: most, PeerConnections: most}
	err = transport.Accept(s.ctx, ln, limits, nil, func(ctx context.Context, c net.Conn) {
		peer := c.RemoteAddr()
		if err := r.Handle(ctx, c); err != nil && ctx.Err() == nil {
			fmt.Fprintf(s.stderr, "connection of %s: %v\n", peer, err)
		}
	})
	notify(s, "STOPPING=1")
	if err != nil {
		return exitWith(exitFailed, err)
	}
	return exitWith(exitInterrupted, nil)
}

// relayAddress takes the address of a relay apart: it needs no TLS of its own.
func relayAddress(ctx context.Context, s string) (network, addr string, err error) {
	if _, _, err := net.SplitHostPort(s); err != nil && !strings.HasPrefix(s, "unix:") {
		s = net.JoinHostPort(strings.Trim(s, "[]"), relayPort)
	}
	return listenAddress(ctx, s, true)
}

// relayFlags are those of who uses a relay.
type relayFlags struct{ addr, token string }

func (r *relayFlags) add(f *pflag.FlagSet) {
	f.StringVar(&r.addr, "relay", "", relayUsage)
	f.StringVar(&r.token, "relay-token", "", tokenUsage)
}

// errNoRelay is of transports whose connections are not those of TCP.
func errNoRelay(t string) error {
	return fmt.Errorf("transport %s has connections of its own, not TCP's", t)
}

// open returns how the relay is reached, and the token; nil where none is wanted.
func (r relayFlags) open(s *state, t transport.Transport) (d transport.Dialer, at net.Addr, token string, err error) {
	if r.addr == "" {
		if r.token != "" {
			return nil, nil, "", errors.New("--relay-token without --relay")
		}
		return nil, nil, "", nil
	}
	if _, own := t.(transport.Network); own {
		return nil, nil, "", fmt.Errorf("--relay: %w", errNoRelay(t.Name()))
	}
	token = s.env(tokenEnv)
	if r.token != "" {
		if token, err = firstLine(r.token); err != nil {
			return nil, nil, "", fmt.Errorf("--relay-token: %w", err)
		}
	}
	if err := relay.CheckToken(token); err != nil {
		return nil, nil, "", fmt.Errorf("--relay-token FILE or %s: %w", tokenEnv, err)
	}
	network, addr, err := relayAddress(s.ctx, r.addr)
	if err != nil {
		return nil, nil, "", fmt.Errorf("--relay %s: %w", r.addr, err)
	}
	if network == "unix" {
		at = &net.UnixAddr{Name: addr, Net: network}
	} else if at, err = net.ResolveTCPAddr(network, addr); err != nil {
		return nil, nil, "", fmt.Errorf("--relay %s: %w", r.addr, err)
	}
	dial := net.Dialer{Control: transport.RetrySoon}
	return transport.DialFunc(func(ctx context.Context) (net.Conn, error) { return dial.DialContext(ctx, network, addr) }), at, token, nil
}

// dialer takes what is offered at the relay; nil where none is wanted.
func (r relayFlags) dialer(s *state, t transport.Transport) (transport.Dialer, error) {
	d, _, token, err := r.open(s, t)
	if err != nil || d == nil {
		return nil, err
	}
	return relay.Dialer(d, token), nil
}

// listener offers connections at the relay.
func (r relayFlags) listener(s *state, t transport.Transport, secure bool) (func() (net.Listener, error), error) {
	d, at, token, err := r.open(s, t)
	if err != nil {
		return nil, err
	}
	if a, ok := at.(*net.TCPAddr); ok && !a.IP.IsLoopback() && !secure {
		return nil, errors.New("--relay: without TLS the relay, and who is between, could read and write. Use --tls DIR or --insecure")
	}
	said := make(chan struct{}, 1) // of a relay that is gone it says so once for all offers
	return func() (net.Listener, error) {
		return relay.Listen(relay.ListenOptions{Dialer: d, Addr: at, Token: token, Log: func(err error) {
			if errors.Is(err, relay.ErrNobody) { // it stood long enough
				return
			}
			select {
			case said <- struct{}{}:
				fmt.Fprintf(s.stderr, "%v; it is tried for again\n", err)
				time.AfterFunc(10*time.Second, func() { <-said })
			default:
			}
		}}), nil
	}, nil
}

// firstLine reads the first line of a file that others should not read.
func firstLine(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	s.Buffer(nil, 4096)
	s.Scan()
	return strings.TrimSpace(s.Text()), s.Err()
}
