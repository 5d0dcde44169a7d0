package transporttest

import (
	"context"
	"testing"

	"memsync/strategies/transport/rpc"
)

// Oversize reads and then writes n bytes in one request each, on connections that
// dial makes, and returns the first error.
func Oversize(t *testing.T, dial func(context.Context) (rpc.Conn, error), n int64) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for _, q := range []*rpc.Request{{Op: rpc.OpRead, Length: n}, {Op: rpc.OpWrite, Length: n, Data: make([]byte, n)}} {
		c, err := dial(ctx)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		var r rpc.Reply
		if err := c.Call(ctx, &rpc.Request{Op: rpc.OpOpen}, &r); err != nil {
			t.Fatal(err)
		}
		r = rpc.Reply{}
		if q.Op == rpc.OpRead {
			r.Into = make([]byte, n)
		}
		if err = c.Call(ctx, q, &r); err == nil {
			err = r.Err()
		}
		if ctx.Err() != nil {
			t.Fatalf("%v of %d bytes is not answered: %v", q.Op, n, err)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
