package nbdk

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/replay"
)

const severalDevices = 4

// several is a role: it attaches devices all at once, with contents of its own,
// prints path and seed of each, and lets go at the end of its standard input.
func several() error {
	var seed uint64
	if _, err := fmt.Sscan(os.Getenv("NBDK_SEED"), &seed); err != nil {
		return err
	}
	p, err := param.New(Params(), strings.Fields(os.Getenv("NBDK_SET")))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	var group sync.WaitGroup
	devices, errs := make([]*Device, severalDevices), make([]error, severalDevices)
	for i := range devices {
		group.Go(func() {
			b := make([]byte, 8192)
			region.Content{Seed: seed + uint64(i)}.Fill(b, 0)
			devices[i], errs[i] = Open(ctx, &memory{b: b}, Options{Params: p})
		})
	}
	group.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for i, d := range devices {
		fmt.Println(d.Path(), seed+uint64(i))
	}
	_, _ = io.Copy(io.Discard, os.Stdin) // for as long as the test reads them all
	end, stop := context.WithTimeout(context.Background(), 15*time.Second)
	defer stop()
	for _, d := range devices {
		errs = append(errs, d.Close(end))
	}
	return errors.Join(errs...)
}

// TestClaims: two of our processes, one by netlink and one by ioctl, and a
// foreign nbd-client of either kind take devices at the same time. The client that
// uses netlink begins with the first, as we do. (The one that uses ioctl sets the
// size before it knows whether the device is its own, so it begins with the last.)
// Nobody gets a device of somebody else, and all are free in the end.
func TestClaims(t *testing.T) {
	need(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	s := newSource(t, nil, 8192) // of the foreign clients
	foreign := make([]byte, 8192)
	region.Content{Seed: 1000}.Fill(foreign, 0)
	if err := os.WriteFile(s.path, foreign, 0o600); err != nil {
		t.Fatal(err)
	}
	client, err := exec.LookPath("nbd-client")
	if err != nil {
		client, err = exec.LookPath("/usr/sbin/nbd-client")
	}
	if missing := err != nil; missing {
		// The rest is tested first.
		defer replay.Missing(t, "nbd-interop", "nbd-client is missing (apt-get install nbd-client): only our own processes compete")
	}

	owners := map[string]uint64{} // path to seed
	var mu sync.Mutex
	own := func(path string, seed uint64) {
		mu.Lock()
		defer mu.Unlock()
		if was, ok := owners[path]; ok {
			t.Errorf("%s was given to %d and to %d", path, was, seed)
		}
		owners[path] = seed
	}
	var group sync.WaitGroup
	for i, setup := range []string{"netlink", "ioctl"} {
		c := role(t, "several", "", "NBDK_SET=nbd_connections=1 nbd_setup="+setup, fmt.Sprintf("NBDK_SEED=%d", 100*(i+1)))
		in, err := c.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		group.Go(func() {
			r := bufio.NewReader(out)
			for range severalDevices {
				var path string
				var seed uint64
				if _, err := fmt.Fscanln(r, &path, &seed); err != nil {
					t.Errorf("%s: %v", setup, err)
					return
				}
				own(path, seed)
			}
		})
		defer func() {
			in.Close()
			if err := c.Wait(); err != nil {
				t.Errorf("%s: %v", setup, err)
			}
		}()
	}
	host, port, _ := strings.Cut(s.addr, ":")
	for _, foreigner := range []struct {
		how         []string
		first, step int // of the devices that it names itself
	}{{[]string{"-nonetlink"}, 15, -1}, {nil, 0, 1}} {
		if client == "" {
			break
		}
		how := foreigner.how
		group.Go(func() {
			taken := 0
			for n := foreigner.first; n >= 0 && n <= 15 && taken < 2; n += foreigner.step {
				path := fmt.Sprintf("/dev/nbd%d", n)
				args := append(append([]string{"-b", "512"}, how...), host, port, path)
				if out, err := exec.CommandContext(ctx, client, args...).CombinedOutput(); err == nil {
					own(path, 1000)
					taken++
				} else {
					t.Logf("nbd-client %v: %v: %.200s", args, err, out)
				}
			}
			if taken == 0 {
				t.Errorf("nbd-client %v could take no device", how)
			}
		})
	}
	group.Wait()
	for path, seed := range owners {
		want := make([]byte, 8192)
		region.Content{Seed: seed}.Fill(want, 0)
		if got, err := role(t, "read", path).Output(); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s does not have the content of %d: %d bytes, %v", path, seed, len(got), err)
		}
		if seed == 1000 {
			if out, err := exec.CommandContext(ctx, client, "-d", path).CombinedOutput(); err != nil {
				t.Errorf("nbd-client -d %s: %v: %s", path, err, out)
			}
			pid := filepath.Join("/sys/block", filepath.Base(path), "pid")
			for end := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
				if _, err := os.Stat(pid); err != nil {
					break
				}
				if time.Now().After(end) {
					t.Fatalf("%s is still attached", path)
				}
			}
		}
	}
	t.Logf("%d devices: %v", len(owners), owners)
}
