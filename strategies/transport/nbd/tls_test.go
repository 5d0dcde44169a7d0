package nbd_test

import (
	"testing"

	"memsync/strategies/transport"
	"memsync/strategies/transport/nbd"
	"memsync/strategies/transport/transporttest"
)

func TestTLS(t *testing.T) {
	f := transporttest.Factory{Options: transport.Options{Connections: 2}, New: func(t transport.TLS) transport.Transport {
		return &nbd.Transport{ServerTLS: t.Server, RequireTLS: t.Server != nil, ClientTLS: t.Client}
	}}
	transporttest.TLS(t, f, transporttest.NewIdentities(t))
}
