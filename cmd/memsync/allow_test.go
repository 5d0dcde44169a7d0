package main

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/all"
	"memsync/strategies/region"
	"memsync/strategies/transport"
	"memsync/strategies/transport/cert"
)

// TestServeAllow: memsync serve --allow on every transport: what the names in the
// certificates may do; certificates that are made anew while a client is connected.
func TestServeAllow(t *testing.T) {
	for _, name := range all.TransportNames() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			image(t, filepath.Join(dir, "one"), 1, 1<<20)
			image(t, filepath.Join(dir, "two"), 2, 1<<20)
			if err := os.WriteFile(filepath.Join(dir, "rules"), []byte("alice one read,write\nbob one read\n* two read\nmallory three read\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			tls := filepath.Join(dir, "tls")
			a, err := cert.OpenAuthority(tls, time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			issue := func(who string) {
				t.Helper()
				if who == cert.Server {
					_, err = a.Issue(cert.Server, []string{"127.0.0.1"}, time.Hour)
				} else {
					_, err = a.IssueClient(who, time.Hour)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			for _, who := range []string{cert.Server, "alice", "bob", "carol"} {
				issue(who)
			}
			c, uri := serving(t, dir, "one", "two", "--tls=tls", "--allow=rules", "--transport="+name)
			addr := address(uri["one"])
			open := func(who, export, writer string) (region.Store, error) {
				t.Helper()
				cfg, err := cert.ClientConfig(filepath.Join(tls, who), "127.0.0.1")
				if err != nil {
					t.Fatal(err)
				}
				tr, err := all.SecureTransport(name, transport.TLS{Client: cfg})
				if err != nil {
					t.Fatal(err)
				}
				return tr.Open(t.Context(), transport.DialerTo(tr, addr), transport.Options{Name: export, Connections: 1, Writer: writer})
			}
			p := make([]byte, 4096)
			alice, err := open("alice", "one", "alice's host")
			if err != nil {
				t.Fatal(err)
			}
			defer alice.Close()
			if err := alice.ReadAt(t.Context(), p, 0); err != nil {
				t.Error(err)
			}
			if err := alice.WriteAt(t.Context(), p, 0); err != nil {
				t.Error(err)
			}
			for _, who := range []string{"bob", "carol"} {
				s, err := open(who, "two", "")
				if err != nil {
					t.Errorf("%s: %v", who, err)
					continue
				}
				if err := s.ReadAt(t.Context(), p, 0); err != nil {
					t.Errorf("%s: %v", who, err)
				}
				if err := s.WriteAt(t.Context(), p, 0); !errors.Is(err, region.ErrReadOnly) && !errors.Is(err, region.ErrNotPermitted) {
					t.Errorf("%s writes: %v", who, err)
				}
				s.Close()
			}
			for who, o := range map[string][2]string{"bob": {"one", "bob's host"}, "carol": {"one", ""}} {
				if s, err := open(who, o[0], o[1]); !errors.Is(err, region.ErrNotPermitted) {
					t.Errorf("%s opens %q: %v", who, o, err)
					if err == nil {
						s.Close()
					}
				}
			}
			// Both sides' certificates are made anew: who is connected goes on, and who comes meets the new ones.
			issue(cert.Server)
			issue("alice")
			if err := alice.WriteAt(t.Context(), p, 0); err != nil {
				t.Errorf("after the certificates were made anew: %v", err)
			}
			alice.Close()
			if alice, err = open("alice", "one", "alice's host again"); err != nil {
				t.Fatal(err)
			}
			if err := alice.WriteAt(t.Context(), p, 0); err != nil {
				t.Error(err)
			}
			alice.Close()
			c.signal(c.cmd.Process.Pid, unix.SIGTERM)
			c.exit(130, patience)
		})
	}
}
