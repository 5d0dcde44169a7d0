// Package redis keeps a region in a Redis server, one key a chunk.
package redis

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"

	goredis "github.com/redis/go-redis/v9"

	"memsync/strategies/backend/keyed"
	"memsync/strategies/region"
)

// Options of a table.
type Options struct {
	Addr     string // host:port
	User     string
	Password string // both empty where the server asks for none
	Prefix   string // of the keys; a region's own
	// Dial makes connections; nil is the process's own network.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
}

// Table is a set of keys of one server. One call is one pipeline: MGET for Get,
// MSET for Put, both atomic in the server. Chunks are read whole, not by
// GETRANGE: a part of a value cannot be checked against its seal.
//
// Durability is the server's: Flush does nothing, since Redis 7.0 has no way to
// ask (WAITAOF came with 7.2).
type Table struct {
	c      *goredis.Client
	prefix string
}

var _ keyed.Table = (*Table)(nil)

// perCommand bounds the bytes that one command asks of the server, which
// gathers the whole reply in memory.
const perCommand = 16

// Open connects to the server. Wrong credentials match keyed.ErrPermanent.
func Open(ctx context.Context, o Options) (*Table, error) {
	c := goredis.NewClient(&goredis.Options{
		Addr: o.Addr, Username: o.User, Password: o.Password, Dialer: o.Dial,
		MaxRetries:            -1, // keyed.Store repeats
		DisableIdentity:       true,
		ContextTimeoutEnabled: true,
	})
	t := &Table{c, o.Prefix}
	if err := c.Ping(ctx).Err(); err != nil {
		return nil, errors.Join(fmt.Errorf("open redis at %s: %w", o.Addr, classify(err)), c.Close())
	}
	return t, nil
}

// classify marks what another try does not mend.
func classify(err error) error {
	if err == nil {
		return nil
	}
	for _, code := range []string{"NOAUTH", "WRONGPASS", "NOPERM", "WRONGTYPE"} {
		if strings.HasPrefix(err.Error(), code) {
			return fmt.Errorf("%w: %w", err, keyed.ErrPermanent)
		}
	}
	if errors.Is(err, goredis.ErrClosed) {
		return region.ErrClosed
	}
	return err
}

func (t *Table) key(number int64) string { return t.prefix + strconv.FormatInt(number, 16) }

// Get implements keyed.Table.
func (t *Table) Get(ctx context.Context, numbers []int64, use func(i int, value []byte)) error {
	if len(numbers) == 0 {
		return ctx.Err()
	}
	p := t.c.Pipeline()
	var cmds []*goredis.SliceCmd
	for from := 0; from < len(numbers); from += perCommand {
		var keys []string
		for _, n := range numbers[from:min(from+perCommand, len(numbers))] {
			keys = append(keys, t.key(n))
		}
		cmds = append(cmds, p.MGet(ctx, keys...))
	}
	if _, err := p.Exec(ctx); err != nil {
		return classify(err)
	}
	i := 0
	for _, cmd := range cmds {
		for _, v := range cmd.Val() {
			if s, ok := v.(string); ok {
				use(i, []byte(s))
			}
			i++
		}
	}
	return nil
}

// Put implements keyed.Table.
func (t *Table) Put(ctx context.Context, numbers []int64, values [][]byte) error {
	p := t.c.Pipeline()
	for from := 0; from < len(numbers); from += perCommand {
		var pairs []any
		for i := from; i < min(from+perCommand, len(numbers)); i++ {
			pairs = append(pairs, t.key(numbers[i]), values[i])
		}
		p.MSet(ctx, pairs...)
	}
	_, err := p.Exec(ctx)
	return classify(err)
}

// Flush implements keyed.Table.
func (t *Table) Flush(ctx context.Context) error { return classify(t.c.Ping(ctx).Err()) }

// Clear deletes all keys that begin with the table's prefix.
func (t *Table) Clear(ctx context.Context) error {
	if t.prefix == "" {
		return errors.New("clear a table without a prefix: that would be the whole server")
	}
	keys := t.c.Scan(ctx, 0, globEscape.Replace(t.prefix)+"*", 1000).Iterator()
	var batch []string
	unlink := func() error {
		if len(batch) == 0 {
			return nil
		}
		defer func() { batch = batch[:0] }()
		return t.c.Unlink(ctx, batch...).Err()
	}
	for keys.Next(ctx) {
		if batch = append(batch, keys.Val()); len(batch) == 1000 {
			if err := unlink(); err != nil {
				return classify(err)
			}
		}
	}
	if err := errors.Join(keys.Err(), unlink()); err != nil {
		return fmt.Errorf("delete keys of %s: %w", t.prefix, classify(err))
	}
	return nil
}

// globEscape makes a pattern of SCAN match its text.
var globEscape = strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`)

// Close implements keyed.Table.
func (t *Table) Close() error { return t.c.Close() }
