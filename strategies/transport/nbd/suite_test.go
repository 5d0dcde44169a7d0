package nbd

import (
	"fmt"
	"io"
	"testing"
	"time"

	"memsync/strategies/region"
	"memsync/strategies/storetest"
	"memsync/strategies/transport"
	"memsync/strategies/transport/transporttest"
)

func factory(o transport.Options) transporttest.Factory {
	return transporttest.Factory{
		New: func(t transport.TLS) transport.Transport {
			return &Transport{ServerTLS: t.Server, RequireTLS: t.Server != nil, ClientTLS: t.Client}
		},
		Options: o, MaxRequest: maxPayload, Oversize: oversize, Blurred: []error{region.ErrNotSupported}, Extents: true,
	}
}

// oversize sends a read and a write of n bytes that our client would divide.
func oversize(t *testing.T, d transport.Dialer, n int64) error {
	t.Helper()
	for _, r := range []request{{cmd: cmdRead, length: uint64(n)}, {cmd: cmdWrite, length: uint64(n)}} {
		c, err := d.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(hello(simple)); err != nil {
			t.Fatal(err)
		}
		greeting := afterHello(t, simple, transport.One{Store: storetest.New(make([]byte, 4096))})
		if _, err := io.CopyN(io.Discard, c, int64(greeting)); err != nil {
			t.Fatal(err)
		}
		b := r.append(nil, false)
		if r.cmd == cmdWrite {
			b = append(b, make([]byte, n)...)
		}
		if _, err := c.Write(b); err != nil {
			return err
		}
		head := make([]byte, 16) // magic, error, cookie
		if _, err := io.ReadFull(c, head); err != nil {
			return err
		}
		if no := Errno(be.Uint32(head[4:])); be.Uint32(head) != magicReply || no != 0 {
			return fmt.Errorf("%v of %d bytes is answered by %x: %w", r.cmd, n, head, region.ErrOutOfRange)
		}
		if r.cmd == cmdRead {
			if _, err := io.CopyN(io.Discard, c, n); err != nil {
				t.Fatal(err)
			}
		}
	}
	return nil
}

func TestSuite(t *testing.T) {
	for name, o := range map[string]transport.Options{
		"default": {}, "more connections, small window": {Connections: 3, Window: 64 << 10},
	} {
		t.Run(name, func(t *testing.T) { transporttest.Run(t, factory(o)) })
	}
}

func TestTLS(t *testing.T) {
	transporttest.TLS(t, factory(transport.Options{Connections: 2}), transporttest.NewIdentities(t))
}
