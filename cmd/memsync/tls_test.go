package main

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/transport"
	"memsync/strategies/transport/cert"
	"memsync/strategies/transport/nbd"
)

// TestServeTLS: memsync serve with the certificates of memsync certs, and libnbd,
// QEMU and our client on the other end, with and without certificates; renewal
// while it runs; our client against QEMU's server.
func TestServeTLS(t *testing.T) {
	dir := t.TempDir()
	const size = 1 << 20
	want := image(t, filepath.Join(dir, "one"), 1, size)
	tls := filepath.Join(dir, "tls")
	authority := func(dir string, valid time.Duration) {
		t.Helper()
		a, err := cert.OpenAuthority(dir, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{cert.Server, cert.Client} {
			if _, err := a.Issue(name, []string{"127.0.0.1", "localhost"}, valid); err != nil {
				t.Fatal(err)
			}
		}
	}
	authority(tls, 30*time.Minute)
	other := filepath.Join(dir, "other")
	authority(other, 30*time.Minute)
	c, uri := serving(t, dir, "one", "--tls="+tls)
	addr := address(uri["one"])
	with := func(certificates string) string {
		return "nbds://" + addr + "/one?tls-hostname=localhost&tls-certificates=" + certificates
	}
	open := func(certificates string) error {
		cfg, err := cert.ClientConfig(certificates, "127.0.0.1")
		if err != nil {
			t.Fatal(err)
		}
		s, err := (&nbd.Transport{ClientTLS: cfg}).Open(t.Context(), transport.DialFunc(nbdDial(addr)), transport.Options{Name: "one", Connections: 2})
		if err != nil {
			return err
		}
		defer s.Close()
		p := make([]byte, size)
		if err = s.ReadAt(t.Context(), p, 0); err == nil && !bytes.Equal(p, want) {
			t.Error("bytes differ")
		}
		return err
	}
	if err := open(tls); err != nil {
		t.Error(err)
	}
	if err := open(other); err == nil {
		t.Error("a client of another CA was served")
	}
	t.Run("nbdcopy", func(t *testing.T) {
		down := filepath.Join(dir, "down")
		must(t, "nbdcopy", "libnbd-bin", with(tls), down)
		if got, err := os.ReadFile(down); err != nil || !bytes.Equal(got, want) {
			t.Errorf("copy differs, %v", err)
		}
		must(t, "nbdinfo", "libnbd-bin", with(tls))
		for _, u := range []string{with(other), "nbd://" + addr + "/one"} {
			if _, err := foreign(t, "nbdinfo", "libnbd-bin", u); err == nil {
				t.Errorf("%s was served", u)
			}
		}
	})
	t.Run("qemu-img", func(t *testing.T) {
		host, port, err := net.SplitHostPort(addr)
		if err != nil {
			t.Fatal(err)
		}
		args := func(certificates string) []string {
			return []string{"info", "--object", "tls-creds-x509,id=t,endpoint=client,dir=" + certificates, "--image-opts",
				"driver=nbd,host=" + host + ",port=" + port + ",export=one,tls-creds=t"}
		}
		must(t, "qemu-img", "qemu-utils", args(tls)...)
		if _, err := foreign(t, "qemu-img", "qemu-utils", args(other)...); err == nil {
			t.Error("a client of another CA was served")
		}
	})
	t.Run("renewal", func(t *testing.T) {
		authority(tls, -time.Second) // expired: only new connections meet it
		if err := open(tls); err == nil {
			t.Error("an expired certificate was accepted")
		}
		authority(tls, 30*time.Minute)
		if err := open(tls); err != nil {
			t.Error(err)
		}
	})
	t.Run("qemu-nbd", func(t *testing.T) {
		if _, err := exec.LookPath("qemu-nbd"); err != nil {
			foreign(t, "qemu-nbd", "qemu-utils") // says what to do
		}
		sock := filepath.Join(dir, "q.sock")
		cmd := exec.CommandContext(t.Context(), "qemu-nbd", "--object", "tls-creds-x509,id=t,endpoint=server,verify-peer=on,dir="+tls, "--tls-creds", "t",
			"-k", sock, "-x", "one", "-f", "raw", "-r", "-e", "4", "-t", filepath.Join(dir, "down"))
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
		for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
			if _, err := os.Stat(sock); err == nil {
				break
			} else if time.Now().After(end) {
				t.Fatal(err)
			}
		}
		cfg, err := cert.ClientConfig(tls, "localhost")
		if err != nil {
			t.Fatal(err)
		}
		s, err := (&nbd.Transport{ClientTLS: cfg}).Open(t.Context(), transport.DialFunc(func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "unix", sock) }), transport.Options{Name: "one", Connections: 1})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		p := make([]byte, size)
		if err := s.ReadAt(t.Context(), p, 0); err != nil || !bytes.Equal(p, want) {
			t.Errorf("bytes differ, %v", err)
		}
	})
	c.signal(c.cmd.Process.Pid, unix.SIGTERM)
	c.exit(130, patience)
}
