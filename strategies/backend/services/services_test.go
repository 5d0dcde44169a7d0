package services_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"memsync/strategies/backend/cassandra"
	"memsync/strategies/backend/keyed"
	"memsync/strategies/backend/keyed/keyedtest"
	"memsync/strategies/backend/redis"
	"memsync/strategies/backend/s3"
	"memsync/strategies/backend/services"
	"memsync/strategies/region"
)

// start starts a server for a test. It skips the test where the server cannot be
// had, unless MEMSYNC_MUST_RUN says that it must.
func start(t *testing.T, name string) *services.Service {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute) // it may be built first
	defer cancel()
	s, err := services.Start(ctx, name, t.TempDir(), services.Here(), func(line string) { t.Log(line) })
	if errors.Is(err, region.ErrNotSupported) && !strings.Contains(os.Getenv("MEMSYNC_MUST_RUN"), "services") {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if err := syscall.Kill(s.PID(), 0); !errors.Is(err, syscall.ESRCH) {
			t.Errorf("%s still runs after Close: %v", name, err)
		}
	})
	return s
}

func redisOptions(e services.Endpoint) redis.Options {
	return redis.Options{Addr: e.Addr, User: e.User, Password: e.Password, Prefix: "region:"}
}

func s3Options(e services.Endpoint) s3.Options {
	return s3.Options{Addr: e.Addr, Access: e.User, Secret: e.Password, Bucket: e.Bucket, Prefix: "region/"}
}

func TestRedis(t *testing.T) {
	s := start(t, "redis")
	ctx := context.Background()
	var n atomic.Int64
	keyedtest.Run(t, func(t *testing.T) (keyed.Table, func() keyed.Table) {
		o := redisOptions(s.Endpoint)
		o.Prefix = fmt.Sprintf("%d:", n.Add(1))
		open := func() keyed.Table {
			table, err := redis.Open(ctx, o)
			if err != nil {
				t.Fatal(err)
			}
			return table
		}
		return open(), open
	})
	t.Run("WrongPassword", func(t *testing.T) {
		o := redisOptions(s.Endpoint)
		o.Password = "wrong"
		if _, err := redis.Open(ctx, o); !errors.Is(err, keyed.ErrPermanent) {
			t.Error(err)
		}
	})
	t.Run("OtherType", func(t *testing.T) {
		o := redisOptions(s.Endpoint)
		o.Addr = "127.0.0.1:1"
		if _, err := redis.Open(ctx, o); err == nil || !strings.Contains(err.Error(), o.Addr) {
			t.Errorf("nobody listens there: %v", err)
		}
	})
}

func TestS3(t *testing.T) {
	s := start(t, "s3")
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	o := s3Options(s.Endpoint)
	if _, err := s3.OpenTable(ctx, o); !errors.Is(err, region.ErrMissing) {
		t.Errorf("a bucket that is not there: %v", err)
	}
	for range 2 {
		if err := s3.MakeBucket(ctx, o); err != nil {
			t.Fatal(err)
		}
	}
	var n atomic.Int64
	keyedtest.Run(t, func(t *testing.T) (keyed.Table, func() keyed.Table) {
		o := o
		o.Prefix = fmt.Sprintf("%d/", n.Add(1))
		open := func() keyed.Table {
			table, err := s3.OpenTable(ctx, o)
			if err != nil {
				t.Fatal(err)
			}
			return table
		}
		return open(), open
	})
	t.Run("WrongSecret", func(t *testing.T) {
		o := o
		o.Secret = "wrong"
		if _, err := s3.OpenTable(ctx, o); !errors.Is(err, keyed.ErrPermanent) {
			t.Error(err)
		}
	})
	t.Run("Object", func(t *testing.T) {
		want := make([]byte, 12<<20+5)
		region.Content{Seed: 9}.Fill(want, 0)
		if _, err := s3.OpenObject(ctx, o, "image"); !errors.Is(err, region.ErrMissing) {
			t.Errorf("an object that is not there: %v", err)
		}
		if err := s3.Upload(ctx, o, "image", bytes.NewReader(want), int64(len(want))); err != nil {
			t.Fatal(err)
		}
		obj, err := s3.OpenObject(ctx, o, "image")
		if err != nil {
			t.Fatal(err)
		}
		defer obj.Close()
		for _, r := range [][2]int64{{0, 1}, {4095, 2}, {1 << 20, 1 << 20}, {int64(len(want)) - 3, 3}, {7, 0}} {
			p := make([]byte, r[1])
			if err := obj.ReadAt(ctx, p, r[0]); err != nil || !bytes.Equal(p, want[r[0]:r[0]+r[1]]) {
				t.Errorf("range %v: %v", r, err)
			}
		}
		if err := obj.ReadAt(ctx, make([]byte, 2), int64(len(want))-1); !errors.Is(err, region.ErrOutOfRange) {
			t.Errorf("past the end: %v", err)
		}
		if err := obj.WriteAt(ctx, []byte{1}, 0); !errors.Is(err, region.ErrReadOnly) {
			t.Errorf("write: %v", err)
		}
		// Another version is never mixed in.
		want[0]++
		if err := s3.Upload(ctx, o, "image", bytes.NewReader(want), int64(len(want))); err != nil {
			t.Fatal(err)
		}
		if err := obj.ReadAt(ctx, make([]byte, 2), 0); !errors.Is(err, region.ErrMismatch) {
			t.Errorf("of an object that changed: %v", err)
		}
	})
}

// TestCassandra starts the server once: that takes most of its time. Under the race
// detector it runs with MEMSYNC_CASSANDRA=race only.
func TestCassandra(t *testing.T) {
	if raceDetector && os.Getenv("MEMSYNC_CASSANDRA") != "race" {
		t.Skip("the server takes long to start: one run of it, without the race detector, is enough (MEMSYNC_CASSANDRA=race)")
	}
	s := start(t, "cassandra")
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	options := cassandra.Options{Addr: s.Addr, User: s.User, Password: s.Password, Keyspace: s.Bucket, Table: "first"}
	if _, err := cassandra.Open(ctx, options); !errors.Is(err, region.ErrMissing) || !strings.Contains(fmt.Sprint(err), "no table first in keyspace memsync") {
		t.Errorf("a table that is not there: %v", err)
	}
	nowhere := options
	nowhere.Keyspace = "nowhere"
	if err := cassandra.MakeTable(ctx, nowhere); !errors.Is(err, region.ErrMissing) || !strings.Contains(err.Error(), "no keyspace nowhere") {
		t.Errorf("a keyspace that is not there: %v", err)
	}
	var n atomic.Int64
	keyedtest.Run(t, func(t *testing.T) (keyed.Table, func() keyed.Table) {
		o := options
		o.Table = fmt.Sprintf("Region_%d", n.Add(1))
		if err := cassandra.MakeTable(ctx, o); err != nil {
			t.Fatal(err)
		}
		open := func() keyed.Table {
			table, err := cassandra.Open(ctx, o)
			if err != nil {
				t.Fatal(err)
			}
			return table
		}
		return open(), open
	})
	anonymous := options
	anonymous.User = ""
	if _, err := cassandra.Open(ctx, anonymous); err == nil || !strings.Contains(err.Error(), "authentication required") {
		t.Errorf("without credentials: %v", err)
	}
	for _, wrong := range [][2]string{{s.User, "wrong"}, {"cassandra", "cassandra"}} {
		o := options
		o.User, o.Password = wrong[0], wrong[1]
		if _, err := cassandra.Open(ctx, o); !errors.Is(err, keyed.ErrPermanent) {
			t.Errorf("as %q: %v", wrong[0], err)
		}
	}
	t.Run("Dropped", func(t *testing.T) {
		o := options
		o.Table = "dropped"
		if err := cassandra.MakeTable(ctx, o); err != nil {
			t.Fatal(err)
		}
		table, err := cassandra.Open(ctx, o)
		if err != nil {
			t.Fatal(err)
		}
		defer table.Close()
		if err := table.Put(ctx, []int64{1}, [][]byte{{1}}); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(table.Clear(ctx), table.Clear(ctx)); err != nil {
			t.Fatal(err)
		}
		if err := table.Get(ctx, []int64{1}, func(int, []byte) { t.Error("a value of a table that was dropped") }); !errors.Is(err, keyed.ErrPermanent) {
			t.Errorf("of a table that was dropped: %v", err)
		}
	})
	t.Run("Stopped", func(t *testing.T) {
		o := options
		o.Table = "stopped"
		if err := cassandra.MakeTable(ctx, o); err != nil {
			t.Fatal(err)
		}
		table, err := cassandra.Open(ctx, o)
		if err != nil {
			t.Fatal(err)
		}
		stopped(t, ctx, s, table, false)
	})
}

// A server that is gone for a while: reads, writes and Flush go on when it is back.
func TestRedisRestart(t *testing.T) {
	s := start(t, "redis")
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	table, err := redis.Open(ctx, redisOptions(s.Endpoint))
	if err != nil {
		t.Fatal(err)
	}
	stopped(t, ctx, s, table, true)
}

// stopped stops a server during a write, a read and, where that asks the server, a
// Flush: each waits for it. Then it kills it: the deadline holds. It closes the table.
func stopped(t *testing.T, ctx context.Context, s *services.Service, table keyed.Table, flushAsks bool) {
	store, err := keyed.New(table, keyed.Options{Size: 1 << 20, Chunk: 1 << 16, Missing: keyed.MissingZero})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	ops := []func() error{
		func() error { return store.WriteAt(ctx, make([]byte, 1<<20), 0) },
		func() error { return store.ReadAt(ctx, make([]byte, 1<<20), 0) },
	}
	if flushAsks {
		ops = append(ops, func() error { return store.Flush(ctx) })
	}
	for _, op := range ops {
		if err := syscall.Kill(s.PID(), syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- op() }()
		select {
		case err := <-done:
			t.Fatalf("a stopped server answered: %v", err)
		case <-time.After(100 * time.Millisecond):
		}
		if err := syscall.Kill(s.PID(), syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Errorf("after it went on: %v", err)
		}
	}
	if err := s.Kill(); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	if err := store.ReadAt(short, make([]byte, 10), 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("from a killed server: %v", err)
	}
}

func TestUnknown(t *testing.T) {
	if _, err := services.Start(context.Background(), "nonsense", t.TempDir(), services.Here(), nil); err == nil || !strings.Contains(err.Error(), "redis") {
		t.Error(err)
	}
}

// A server that cannot be had is named with what would mend it, and leaves nothing.
func TestMissing(t *testing.T) {
	tmp, empty := t.TempDir(), t.TempDir()
	t.Setenv("TMPDIR", tmp)
	t.Setenv("PATH", empty)
	t.Setenv("JAVA_HOME", "")
	t.Setenv("XDG_CACHE_HOME", empty)
	for name, mend := range map[string]string{"redis": "apt-get install redis-server", "s3": "go install ", "cassandra": "apt-get install "} {
		if _, _, err := services.Stand(context.Background(), name, nil); !errors.Is(err, region.ErrNotSupported) || !strings.Contains(err.Error(), mend) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if left, err := os.ReadDir(tmp); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// standings are the standing servers in the temporary directory.
func standings(t *testing.T) []services.Standing {
	t.Helper()
	all, err := services.Standings(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestStanding(t *testing.T) {
	start(t, "redis") // or skip
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	t.Cleanup(func() {
		for _, st := range standings(t) {
			if err := st.Down(); err != nil {
				t.Error(err)
			}
		}
	})
	st, fresh, err := services.Stand(ctx, "redis", nil)
	if err != nil || !fresh {
		t.Fatal(fresh, err)
	}
	table, err := redis.Open(ctx, redisOptions(st.Endpoint))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(table.Put(ctx, []int64{1}, [][]byte{{1}}), table.Close()); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(st.PasswordFile()); err != nil || strings.TrimSpace(string(b)) != st.Password {
		t.Errorf("password file: %v", err)
	}
	if again, fresh, err := services.Stand(ctx, "redis", nil); err != nil || fresh || again.ID != st.ID || again.Password != st.Password {
		t.Errorf("asked for again: %v, started %v: %v", again.ID, fresh, err)
	}
	if removed, err := services.Clean(); len(removed) > 0 || err != nil {
		t.Errorf("clean took a server that runs: %v, %v", removed, err)
	}
	// A record of another process with that number, as after a restart of the machine.
	for _, other := range []func(*services.Standing){
		func(st *services.Standing) { st.ID.Start++ },
		func(st *services.Standing) { st.ID.Boot = "another" },
	} {
		wrong := st
		other(&wrong)
		wrong.Dir = t.TempDir()
		if err := wrong.Down(); err != nil {
			t.Error(err)
		}
		if all := standings(t); len(all) != 1 || all[0].State != services.Running {
			t.Fatalf("a process that only had the number was ended: %v", all)
		}
	}
	// It stands still, then it dies.
	if err := syscall.Kill(st.ID.PID, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if all := standings(t); len(all) != 1 || all[0].State != services.Mute {
		t.Errorf("stopped: %v", all)
	}
	if err := syscall.Kill(st.ID.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for standings(t)[0].State != services.Gone {
		if ctx.Err() != nil {
			t.Fatal("killed, but not gone")
		}
	}
	// Another one takes its place.
	next, fresh, err := services.Stand(ctx, "redis", nil)
	if err != nil || !fresh || len(standings(t)) != 1 {
		t.Fatalf("in the place of a dead one: started %v: %v", fresh, err)
	}
	if err := syscall.Kill(next.ID.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	var removed []string
	for len(removed) == 0 && ctx.Err() == nil {
		if removed, err = services.Clean(); err != nil {
			t.Fatal(err)
		}
	}
	if left, err := os.ReadDir(tmp); err != nil || len(left) > 0 || len(removed) != 1 || removed[0] != next.Dir {
		t.Errorf("removed %v, left %v: %v", removed, left, err)
	}
}
