// Package cassandra keeps a region in a table of an Apache Cassandra cluster, a
// row a chunk.
//
// A row is a partition of its own, so every request goes to a node that has it
// (the driver's token-aware policy), and needs no batch: single-partition writes
// are atomic by themselves. Statements are prepared once.
package cassandra

import (
	"context"
	"errors"
	"fmt"
	"net"
	"regexp"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	gocql "github.com/apache/cassandra-gocql-driver/v2"
	"golang.org/x/sync/errgroup"

	"memsync/strategies/backend/keyed"
	"memsync/strategies/region"
)

// Options of a connection.
type Options struct {
	Addr            string // host:port of one node; the others are found from it
	User, Password  string // both empty where the cluster asks for none
	Keyspace, Table string // of letters, digits and _, at most 48 of them; case counts
	// Dial makes connections; nil is the process's own network.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// Parallel is how many requests of one call run at once; 0 is 32.
	Parallel int
}

// Consistency is of reads and writes alike: a majority of the replicas of the
// node's data centre, so that a read sees every write that was acknowledged.
const Consistency = gocql.LocalQuorum

// Times that the driver waits before it gives up one attempt; keyed.Store repeats.
const (
	connectTime = 10 * time.Second
	requestTime = 10 * time.Second
	downTime    = 200 * time.Millisecond // between attempts to reach a node that is down
)

// Table is a table of the cluster:
//
//	CREATE TABLE keyspace.table (number bigint PRIMARY KEY, value blob)
//
// A value is as durable when Put returns as the cluster's commit log makes it;
// there is no way to ask for more, so Flush does nothing.
type Table struct {
	s        *gocql.Session
	o        Options
	get, put string
	stamp    atomic.Int64 // of the last write, us since 1970
	closed   atomic.Bool
}

var _ keyed.Table = (*Table)(nil)

var name = regexp.MustCompile(`^[A-Za-z0-9_]{1,48}$`)

func (o Options) table() string { return fmt.Sprintf("%q.%q", o.Keyspace, o.Table) }

// connect makes a session. The driver takes no context for that and flattens its
// errors, so both come from its connections.
func connect(ctx context.Context, o Options) (*gocql.Session, error) {
	wrap := func(err error) error { return fmt.Errorf("open cassandra at %s: %w", o.Addr, err) }
	host, p, err := net.SplitHostPort(o.Addr)
	if err != nil {
		return nil, wrap(err)
	}
	port, err := strconv.Atoi(p)
	if err != nil {
		return nil, wrap(err)
	}
	for _, n := range []string{o.Keyspace, o.Table} {
		if n != "" && !name.MatchString(n) {
			return nil, wrap(fmt.Errorf("name %q: want 1 to 48 letters, digits and _: %w", n, keyed.ErrPermanent))
		}
	}
	d := &dialer{dial: o.Dial, open: map[net.Conn]bool{}}
	if d.dial == nil {
		d.dial = new(net.Dialer).DialContext
	}
	c := gocql.NewCluster(host)
	c.Port, c.Dialer, c.ConnectObserver = port, d, d
	c.ProtoVersion = 4 // every server from 3.0 on; asking for the highest costs a connection
	c.Timeout, c.ConnectTimeout, c.ReconnectInterval = requestTime, connectTime, downTime
	c.ReconnectionPolicy = &gocql.ConstantReconnectionPolicy{MaxRetries: 1}
	c.Consistency, c.DefaultIdempotence = Consistency, true
	c.PoolConfig.HostSelectionPolicy = gocql.TokenAwareHostPolicy(gocql.RoundRobinHostPolicy())
	c.Metadata.CacheMode = gocql.KeyspaceOnly
	c.Logger = gocql.NewLogger(gocql.LogLevelNone)
	if o.User != "" {
		c.Authenticator = gocql.PasswordAuthenticator{Username: o.User, Password: o.Password}
	}
	stop := context.AfterFunc(ctx, d.abandon)
	s, err := c.CreateSession()
	stop()
	if err == nil {
		err = ctx.Err()
		if err != nil {
			s.Close()
		}
	} else {
		err = errors.Join(ctx.Err(), err, d.last())
	}
	d.opened()
	if err != nil {
		return nil, wrap(classify(err))
	}
	return s, nil
}

// dialer makes the driver's connections. Until opened is called, abandon closes
// them and lets no more be made.
type dialer struct {
	dial func(ctx context.Context, network, addr string) (net.Conn, error)
	mu   sync.Mutex
	open map[net.Conn]bool // nil once opened
	gone bool
	err  error // of the last connection that could not be set up
}

func (d *dialer) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTime)
	defer cancel()
	d.mu.Lock()
	gone := d.gone
	d.mu.Unlock()
	if gone {
		return nil, context.Canceled
	}
	c, err := d.dial(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.gone {
		c.Close()
		return nil, context.Canceled
	}
	if d.open != nil {
		d.open[c] = true
	}
	return c, nil
}

// ObserveConnect implements gocql.ConnectObserver.
func (d *dialer) ObserveConnect(o gocql.ObservedConnect) {
	if o.Err != nil {
		d.mu.Lock()
		d.err = o.Err
		d.mu.Unlock()
	}
}

func (d *dialer) last() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

func (d *dialer) abandon() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.gone = true
	for c := range d.open {
		c.Close()
	}
}

func (d *dialer) opened() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.open = nil
}

// classify marks what another try does not mend.
func classify(err error) error {
	var r gocql.RequestError
	switch {
	case err == nil:
	case errors.Is(err, gocql.ErrSessionClosed):
		return fmt.Errorf("%w: %w", err, region.ErrClosed)
	case errors.As(err, &r):
		switch r.Code() {
		case gocql.ErrCodeCredentials, gocql.ErrCodeUnauthorized, gocql.ErrCodeSyntax, gocql.ErrCodeConfig, gocql.ErrCodeInvalid:
			return fmt.Errorf("%w: %w", err, keyed.ErrPermanent)
		}
	}
	return err
}

// with runs a statement or more in a session of its own.
func with(ctx context.Context, o Options, do func(*gocql.Session) error) error {
	s, err := connect(ctx, o)
	if err != nil {
		return err
	}
	defer s.Close()
	return classify(do(s))
}

// MakeKeyspace makes the keyspace, unless it is there, with so many replicas of
// each row, whatever their data centres.
func MakeKeyspace(ctx context.Context, o Options, replicas int) error {
	return with(ctx, o, func(s *gocql.Session) error { return makeKeyspace(ctx, s, o, replicas) })
}

func makeKeyspace(ctx context.Context, s *gocql.Session, o Options, replicas int) error {
	err := s.Query(fmt.Sprintf("CREATE KEYSPACE IF NOT EXISTS %q WITH replication = {'class': 'SimpleStrategy', 'replication_factor': %d}", o.Keyspace, replicas)).ExecContext(ctx)
	if err != nil {
		return fmt.Errorf("make keyspace %s: %w", o.Keyspace, err)
	}
	return nil
}

// MakeTable makes the table, unless it is there, without compression: the values
// of a region are pages, and the server should not spend its time on them. A
// keyspace that is not there gives region.ErrMissing.
func MakeTable(ctx context.Context, o Options) error {
	return with(ctx, o, func(s *gocql.Session) error {
		if err := there(ctx, s, o, false); err != nil {
			return err
		}
		err := s.Query(fmt.Sprintf("CREATE TABLE IF NOT EXISTS %s (number bigint PRIMARY KEY, value blob) WITH compression = {'enabled': false}", o.table())).ExecContext(ctx)
		if err != nil {
			return fmt.Errorf("make table %s.%s: %w", o.Keyspace, o.Table, err)
		}
		return nil
	})
}

// there looks for the keyspace and, if asked, the table.
func there(ctx context.Context, s *gocql.Session, o Options, table bool) error {
	var found string
	err := s.Query("SELECT keyspace_name FROM system_schema.keyspaces WHERE keyspace_name = ?", o.Keyspace).ScanContext(ctx, &found)
	if errors.Is(err, gocql.ErrNotFound) {
		return fmt.Errorf("no keyspace %s (CREATE KEYSPACE makes one): %w", o.Keyspace, region.ErrMissing)
	}
	if err == nil && table {
		err = s.Query("SELECT table_name FROM system_schema.tables WHERE keyspace_name = ? AND table_name = ?", o.Keyspace, o.Table).ScanContext(ctx, &found)
		if errors.Is(err, gocql.ErrNotFound) {
			return fmt.Errorf("no table %s in keyspace %s: %w", o.Table, o.Keyspace, region.ErrMissing)
		}
	}
	return err
}

// The superuser of a new cluster with password authentication.
const defaultUser = "cassandra"

// TakeOver makes a cluster that was just made the caller's: o.User becomes its
// only superuser, in the place of the default one, and o.Keyspace is there, with
// one replica. Called again it does nothing more.
func TakeOver(ctx context.Context, o Options) error {
	own := func() error {
		return with(ctx, o, func(s *gocql.Session) error {
			if err := s.Query(fmt.Sprintf("DROP ROLE IF EXISTS %q", defaultUser)).ExecContext(ctx); err != nil {
				return err
			}
			return makeKeyspace(ctx, s, o, 1)
		})
	}
	if err := own(); !errors.Is(err, keyed.ErrPermanent) {
		return err
	}
	if !name.MatchString(o.User) || !name.MatchString(o.Password) { // they stand in a statement: roles take no bound values
		return fmt.Errorf("user %q and its password: want letters, digits and _: %w", o.User, keyed.ErrPermanent)
	}
	first := o
	first.User, first.Password = defaultUser, defaultUser
	if err := with(ctx, first, func(s *gocql.Session) error {
		return s.Query(fmt.Sprintf("CREATE ROLE IF NOT EXISTS %q WITH SUPERUSER = true AND LOGIN = true AND PASSWORD = '%s'", o.User, o.Password)).ExecContext(ctx)
	}); err != nil {
		return err
	}
	return own()
}

// Open connects to the cluster. Wrong credentials match keyed.ErrPermanent, a
// keyspace or table that is not there region.ErrMissing.
func Open(ctx context.Context, o Options) (*Table, error) {
	if o.Parallel == 0 {
		o.Parallel = 32
	}
	s, err := connect(ctx, o)
	if err != nil {
		return nil, err
	}
	if err := there(ctx, s, o, true); err != nil {
		s.Close()
		return nil, fmt.Errorf("open cassandra at %s: %w", o.Addr, classify(err))
	}
	return &Table{s: s, o: o,
		get: fmt.Sprintf("SELECT value FROM %s WHERE number = ?", o.table()),
		put: fmt.Sprintf("INSERT INTO %s (number, value) VALUES (?, ?)", o.table()),
	}, nil
}

// each calls do for every place of numbers, some at once.
func (t *Table) each(ctx context.Context, numbers []int64, do func(ctx context.Context, i int) error) error {
	if t.closed.Load() {
		return region.ErrClosed
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(t.o.Parallel)
	for i := range numbers {
		g.Go(func() error { return classify(do(gctx, i)) })
	}
	if err := g.Wait(); err != nil {
		return errors.Join(ctx.Err(), err)
	}
	return nil
}

// Get implements keyed.Table: one SELECT a chunk, several at once.
func (t *Table) Get(ctx context.Context, numbers []int64, use func(i int, value []byte)) error {
	got, found := make([][]byte, len(numbers)), make([]bool, len(numbers))
	err := t.each(ctx, numbers, func(ctx context.Context, i int) error {
		err := t.s.Query(t.get, numbers[i]).ScanContext(ctx, &got[i])
		found[i] = err == nil
		if errors.Is(err, gocql.ErrNotFound) {
			return nil
		}
		return err
	})
	if err != nil {
		return err
	}
	for i := range numbers {
		if found[i] {
			use(i, got[i])
		}
	}
	return nil
}

// Put implements keyed.Table: one INSERT a chunk, several at once. Each call has
// a later timestamp than the one before, so that a write that was given up and
// arrives late never undoes a newer one, nor do two of the same microsecond.
func (t *Table) Put(ctx context.Context, numbers []int64, values [][]byte) error {
	stamp := t.next()
	return t.each(ctx, numbers, func(ctx context.Context, i int) error {
		return t.s.Query(t.put, numbers[i], values[i]).WithTimestamp(stamp).ExecContext(ctx)
	})
}

// next returns a timestamp that is later than all before: now, or just after the last.
func (t *Table) next() int64 {
	for {
		last := t.stamp.Load()
		now := max(time.Now().UnixMicro(), last+1)
		if t.stamp.CompareAndSwap(last, now) {
			return now
		}
	}
}

// Flush implements keyed.Table.
func (t *Table) Flush(ctx context.Context) error {
	if t.closed.Load() {
		return region.ErrClosed
	}
	return ctx.Err()
}

// Clear drops the table.
func (t *Table) Clear(ctx context.Context) error {
	if err := t.s.Query("DROP TABLE IF EXISTS " + t.o.table()).ExecContext(ctx); err != nil {
		return fmt.Errorf("drop table %s.%s: %w", t.o.Keyspace, t.o.Table, classify(err))
	}
	return nil
}

// Close implements keyed.Table.
func (t *Table) Close() error {
	if !t.closed.Swap(true) {
		t.s.Close()
	}
	return nil
}
