package managed_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"memsync/netem"
	"memsync/strategies/managed"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/storetest"
	"memsync/strategies/transport"
	"memsync/strategies/transport/nbd"
)

// wired is a source across a link.
type wired struct{ link *netem.Link }

func (w wired) Dial(ctx context.Context) (net.Conn, error) {
	return w.link.Destination().Dial(ctx, "tcp", net.JoinHostPort(w.link.Source().Addr().String(), "10809"))
}

func (w wired) open(ctx context.Context, name, writer string) (region.Store, error) {
	return (&nbd.Transport{}).Open(ctx, transport.DialFunc(w.Dial), transport.Options{Name: name, Connections: 4, Writer: writer, ReadOnly: writer == ""})
}
func (w wired) Open(ctx context.Context) (region.Store, error) {
	return w.open(ctx, "region", "writer")
}
func (w wired) OpenBeside(ctx context.Context, suffix string, _ bool) (region.Store, error) {
	return w.open(ctx, "region"+suffix, "")
}

// TestLinkDown: all packets are lost for a while during pulls, pushes and Sync.
// Whoever waits goes on when the link is back, and nothing is lost. It takes 1 s
// each; MEMSYNC_LINK_DOWN=10s,60s says otherwise (TCP then needs up to as long
// again until it sends once more).
func TestLinkDown(t *testing.T) {
	times := "1s"
	if v := os.Getenv("MEMSYNC_LINK_DOWN"); v != "" {
		times = v
	}
	for _, text := range strings.Split(times, ",") {
		d, err := time.ParseDuration(text)
		if err != nil {
			t.Fatal(err)
		}
		t.Run(text, func(t *testing.T) { linkDown(t, d) })
	}
}

func linkDown(t *testing.T, down time.Duration) {
	shaper := netem.ShaperNetem
	if netem.Probe(shaper) != nil {
		shaper = netem.ShaperTun
	}
	if err := netem.Probe(shaper); errors.Is(err, netem.ErrNotSupported) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second+12*down)
	defer cancel()
	link, err := netem.Open(ctx, shaper, netem.Profile{RTT: 10 * time.Millisecond, Rate: 100e6}, netem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer link.Close()
	const size = 8 << 20
	source := storetest.Seeded(region.Content{Seed: 31}, size)
	exports := transport.NewLeases(transport.One{Name: "region", Store: source})
	l, err := link.Source().Listen(ctx, "tcp", ":10809")
	if err != nil {
		t.Fatal(err)
	}
	serving, stop := context.WithCancel(ctx)
	served := make(chan error, 1)
	go func() {
		served <- transport.Accept(serving, l, transport.Limits{}, nil, func(ctx context.Context, c net.Conn) {
			_ = managed.Strategy{}.Serve(ctx, &nbd.Transport{}, c, exports, param.Values{}) // ends with the link
		})
	}()
	defer func() {
		stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	o := options(t, "pull_first=0", "push_interval=20ms", "request_timeout=10m", "extent=64KiB")
	o.PullWorkers, o.PushWorkers = 4, 2
	m, err := managed.Strategy{}.Mount(ctx, wired{link}, o)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Close(ctx); err != nil {
			t.Errorf("Close: %v", err)
		}
	}()
	path := m.Attachment().Path
	// interrupted does f, takes the link down in the middle, and waits for f's end.
	interrupted := func(what string, after time.Duration, f func() error) {
		t.Helper()
		done := make(chan error, 1)
		go func() { done <- f() }()
		time.Sleep(after)
		select {
		case err := <-done:
			t.Fatalf("%s ended before the link was down: %v", what, err)
		default:
		}
		if err := link.SetLoss(1); err != nil {
			t.Fatal(err)
		}
		time.Sleep(down)
		if err := link.SetLoss(0); err != nil {
			t.Fatal(err)
		}
		up := time.Now()
		if err := <-done; err != nil {
			t.Fatalf("%s, with the link down for %v: %v (%v)", what, down, err, m.(interface{ Err() error }).Err())
		}
		t.Logf("%s went on %v after a link down for %v was back", what, time.Since(up).Round(time.Millisecond), down)
	}
	dd := func(in io.Reader, args ...string) ([]byte, error) {
		cmd := exec.CommandContext(ctx, "dd", append(args, "bs=64k", "iflag=fullblock", "status=none")...)
		cmd.Stdin = in
		return cmd.Output()
	}
	want := source.Snapshot()
	interrupted("pull", 100*time.Millisecond, func() error {
		got, err := dd(nil, "if="+path)
		if err == nil && !bytes.Equal(got, want) {
			err = region.ErrMismatch
		}
		return err
	})
	written := func() error {
		if !bytes.Equal(source.Snapshot(), want) {
			return region.ErrMismatch
		}
		return nil
	}
	_, _ = rand.Read(want[:size/2])
	interrupted("push", 100*time.Millisecond, func() error {
		if _, err := dd(bytes.NewReader(want[:size/2]), "of="+path, "conv=notrunc"); err != nil {
			return err
		}
		for written() != nil {
			select {
			case <-time.After(time.Millisecond):
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	_, _ = rand.Read(want)
	interrupted("Sync", 100*time.Millisecond, func() error { // 8 MiB take 0.7 s
		if _, err := dd(bytes.NewReader(want), "of="+path, "conv=notrunc"); err != nil {
			return err
		}
		return errors.Join(m.Sync(ctx), written())
	})
	// And all of it is still there to be read.
	if got, err := dd(nil, "if="+path); err != nil || !bytes.Equal(got, want) {
		t.Errorf("read afterwards: %v", err)
	}
}
