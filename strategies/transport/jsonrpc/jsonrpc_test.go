package jsonrpc

import (
	"context"
	"testing"

	"memsync/strategies/transport"
	"memsync/strategies/transport/rpc"
	"memsync/strategies/transport/transporttest"
)

func factory(o transport.Options) transporttest.Factory {
	return transporttest.Factory{
		New: func(t transport.TLS) transport.Transport { return &Transport{TLS: t} }, Options: o, MaxRequest: rpc.MaxData,
		Oversize: func(t *testing.T, d transport.Dialer, n int64) error {
			return transporttest.Oversize(t, func(ctx context.Context) (rpc.Conn, error) { return (&Transport{}).dial(ctx, d) }, n)
		},
	}
}

func TestSuite(t *testing.T) {
	for name, o := range map[string]transport.Options{
		"default": {}, "more connections, one at a time": {Connections: 3, Calls: 1}, "small messages": {Message: 8 << 10, Window: 64 << 10},
	} {
		t.Run(name, func(t *testing.T) { transporttest.Run(t, factory(o)) })
	}
}

func TestTLS(t *testing.T) {
	transporttest.TLS(t, factory(transport.Options{Connections: 2}), transporttest.NewIdentities(t))
}
