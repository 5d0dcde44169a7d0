package nbd

import (
	"testing"

	"memsync/strategies/region"
)

// A burst of demand requests is spread by what each connection can carry in a round trip;
// a single one takes the connection that is kept for them.
func TestPickWeighsByWindow(t *testing.T) {
	c := &Client{}
	for range 4 {
		cn := newConn(nil, structured, 0)
		c.conns = append(c.conns, cn)
	}
	for _, cn := range c.conns[1:] {
		cn.moved.Store(64 << 20) // the bulk went there
	}
	for range 3 {
		if cn := c.pick(region.Demand); cn != c.conns[0] {
			t.Fatal("a single demand request does not take the connection that is kept for them")
		}
	}
	const n = 4 << 10
	got := map[*conn]int64{}
	for range 512 {
		cn := c.pick(region.Demand)
		cn.load.Add(n)
		got[cn] += n
	}
	if first := got[c.conns[0]]; first == 0 || first > 16<<10 {
		t.Errorf("%d bytes of 2 MiB on the connection that has carried nothing: want some, and no more than its first window", first)
	}
	for i, cn := range c.conns[1:] {
		if share := got[cn]; share < 600<<10 {
			t.Errorf("connection %d: %d bytes, want about a third of 2 MiB", i+1, share)
		}
	}
}
