package rpc

import "memsync/strategies/param"

// Params are the parameters of transport.Options that users of the transport called name may set.
func Params(name string) []param.Spec {
	chosen := map[string]string{"grpc": "2", "drpc": "16 with a call at a time on each, 2 with rpc=stream", "quic": "1", "jsonrpc": "2"}[name]
	specs := []param.Spec{
		{Name: "connections", Kind: param.KindInt, Default: "0", Max: maxConnections, Doc: "connections that are opened together; 0 is " + chosen},
		{Name: "window", Kind: param.KindSize, Default: "0", Max: 1 << 30, Doc: "bytes of background requests in flight; 0 follows the path by itself"},
		{Name: "calls", Kind: param.KindInt, Default: "0", Max: SessionCalls, Doc: "requests in flight on one connection; 1 is one at a time, 0 as many as the library can"},
		{Name: "message", Kind: param.KindSize, Default: "1MiB", Min: minMessage, Max: MaxData, Doc: "bytes of data in one request; longer ones are cut"},
	}
	if name == "grpc" || name == "drpc" {
		specs = append(specs, param.Spec{Name: "rpc", Kind: param.KindEnum, Default: "unary", Values: []string{"unary", "stream"},
			Doc: "each request a call of its own, or all of a connection on one stream"})
	}
	return specs
}
