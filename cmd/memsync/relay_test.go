package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/transport/cert"
)

// TestRelay: a mount whose only way to its server is a relay, under TLS; the relay is
// killed in the middle, and when there is one again the mount goes on with nothing lost.
func TestRelay(t *testing.T) {
	needFUSE(t)
	dir := t.TempDir()
	want := image(t, filepath.Join(dir, "one"), 1, 4<<20)
	a, err := cert.OpenAuthority(filepath.Join(dir, "tls"), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for _, side := range []string{cert.Server, cert.Client} {
		if _, err := a.Issue(side, []string{"source.example"}, time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "token"), []byte("a token of the test\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "r")
	relaying := func() *command {
		t.Helper()
		r := launch(t, dir, "relay", "--listen", "unix:r")
		r.until("it relays", func() bool { return r.stdout.String() != "" })
		return r
	}
	r := relaying()
	meet := []string{"--relay=unix:r", "--relay-token=token", "--tls=tls"}
	serve := launch(t, dir, append([]string{"serve", "one"}, meet...)...)
	serve.until("it serves", func() bool { return strings.Contains(serve.stdout.String(), "one\t") })
	m := mounting(t, dir, 1, append([]string{"source.example/one", "file", "--reconnect=10m", "--strategy=direct-mount"}, meet...)...)
	at := func(off int64, n int) error {
		f, err := os.Open(filepath.Join(dir, "file"))
		if err != nil {
			return err
		}
		defer f.Close()
		p := make([]byte, n)
		if _, err := f.ReadAt(p, off); err != nil || !bytes.Equal(p, want[off:off+int64(n)]) {
			return fmt.Errorf("%d bytes at %d differ, or %w", n, off, err)
		}
		return nil
	}
	if err := at(0, 1<<20); err != nil {
		t.Fatal(err)
	}
	r.signal(r.cmd.Process.Pid, unix.SIGKILL)
	<-r.done
	if err := os.Remove(socket); err != nil {
		t.Fatal(err)
	}
	read := make(chan error, 1)
	go func() { read <- at(2<<20, 1<<20) }() // while there is no relay
	serve.until("the server says so", func() bool { return strings.Contains(serve.stderr.String(), "tried for again") })
	r = relaying()
	select {
	case err := <-read:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatal("the mount does not go on")
	}
	if err := at(3<<20, 1<<20); err != nil {
		t.Error(err)
	}
	for _, c := range []*command{m, serve, r} {
		c.signal(c.cmd.Process.Pid, unix.SIGTERM)
		<-c.done
	}
	if got, err := os.ReadFile(filepath.Join(dir, "one")); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the server's file differs, %v", err)
	}
}
