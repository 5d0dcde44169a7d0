package migration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies"
	"memsync/strategies/device/uffd"
	"memsync/strategies/region"
	"memsync/strategies/replay"
	"memsync/strategies/transport"
	"memsync/strategies/transport/nbd"
)

// The kill tests: an application in this process writes a memfd, and the source and the
// destination are processes, which are killed at random moments and started again
// with their journals.

const (
	killSize = 4 << 20
	childEnv = "MIGRATION_TEST_CHILD"
)

func TestMain(m *testing.M) {
	switch os.Getenv(childEnv) {
	case "":
	case "source":
		exit(childSource(os.Getenv("MIGRATION_TEST_DIR")))
	case "destination":
		exit(childDestination(os.Getenv("MIGRATION_TEST_DIR"), Mode(os.Getenv("MIGRATION_TEST_MODE"))))
	}
	verify(m)
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// everything is a tracker that reports every page each time.
type everything struct{ size int64 }

func (e everything) Collect(_ context.Context, found func(off, n int64)) error {
	found(0, e.size)
	return nil
}

// childSource serves the memfd that it finds as descriptor 3 until the destination has all.
func childSource(dir string) error {
	f := os.NewFile(3, "memfd")
	s := &shared{file: f, size: killSize}
	mem, err := unix.Mmap(3, 0, killSize, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	s.mem = mem
	app, err := net.Dial("unix", filepath.Join(dir, "app"))
	if err != nil {
		return err
	}
	tell := func(c byte) func(context.Context) error {
		return func(context.Context) error {
			b := []byte{c}
			if _, err := app.Write(b); err != nil {
				return err
			}
			_, err := io.ReadFull(app, b)
			return err
		}
	}
	seeder, err := NewSeeder(s, everything{killSize}, SeederOptions{Journal: filepath.Join(dir, "source.json"), CommitTimeout: 300 * time.Millisecond, Silence: 300 * time.Millisecond})
	if err != nil {
		return err
	}
	seeder.Control(strategies.Hooks{Suspend: tell('s'), Resume: tell('r')})
	path := filepath.Join(dir, "source")
	_ = os.Remove(path)
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { _ = (&nbd.Transport{}).Serve(context.Background(), c, seeder.Exports(regionName)) }()
		}
	}()
	<-seeder.Done()
	time.Sleep(50 * time.Millisecond) // the answer is on its way
	return nil
}

// childDestination takes the region over, and writes down what it found.
func childDestination(dir string, mode Mode) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	tr := &nbd.Transport{}
	dial := transport.DialFunc(func(ctx context.Context) (net.Conn, error) {
		c, err := new(net.Dialer).DialContext(ctx, "unix", filepath.Join(dir, "source"))
		if err != nil {
			err = errors.Join(err, region.ErrPeerGone)
		}
		return c, err
	})
	var l *leecher
	for { // the source may be down
		var err error
		l, err = openLeecher(ctx, func(ctx context.Context) (region.Store, error) {
			return tr.Open(ctx, dial, transport.Options{Name: regionName, Connections: 2, ReadOnly: true})
		}, func(ctx context.Context) (region.Store, error) {
			return tr.Open(ctx, dial, transport.Options{Name: regionName + controlSuffix, Connections: 1})
		}, leecherOptions{mode: mode, device: "uffd", chunk: 4096, extent: 256 << 10, workers: 4, around: 4096, interval: 5 * time.Millisecond,
			policy: policy{kind: policyPercent, share: 1}, patience: 10 * time.Second, journal: filepath.Join(dir, "destination.json"),
			params: uffd.MemoryOptions{Chunk: 4096, ReadOnly: true, Evicts: true}})
		if err == nil {
			break
		}
		if ctx.Err() != nil || errors.Is(err, region.ErrClosed) {
			return err
		}
		time.Sleep(5 * time.Millisecond)
	}
	started := func(context.Context) error { return os.WriteFile(filepath.Join(dir, "started"), []byte("x"), 0o600) }
	if _, err := l.Finalize(ctx, strategies.Hooks{Resume: started}); err != nil {
		return err
	}
	if _, err := l.Complete(ctx); err != nil {
		return err
	}
	got := make([]byte, killSize)
	if err := l.syncer.ReadAt(ctx, got, 0); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "found.tmp"), got, 0o600); err != nil {
		return err
	}
	return os.Rename(filepath.Join(dir, "found.tmp"), filepath.Join(dir, "found"))
}

// killApp is the application: it writes numbered words while it may.
type killApp struct {
	mem  []byte
	mu   sync.Mutex
	runs bool
	n    uint64
	last net.Conn // only the newest controller counts: what an old one sent may still come
}

func (a *killApp) step(r *rand.Rand) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.runs {
		a.n++
		off := r.IntN(killSize/8) * 8
		for i := range 8 {
			a.mem[off+i] = byte(a.n >> i)
		}
	}
}

func (a *killApp) control(c net.Conn) {
	defer c.Close()
	a.mu.Lock()
	a.last = c
	a.mu.Unlock()
	b := []byte{0}
	for {
		if _, err := io.ReadFull(c, b); err != nil {
			return
		}
		a.mu.Lock()
		if a.last == c {
			a.runs = b[0] == 'r'
		}
		a.mu.Unlock()
		if _, err := c.Write(b); err != nil {
			return
		}
	}
}

// TestKill kills source and destination at random moments. TEST_SEED replays; MIGRATION_KILLS
// says how many migrations (12 by default).
func TestKill(t *testing.T) {
	s, migrations := replay.Seed(t), 12
	if v := os.Getenv("MIGRATION_KILLS"); v != "" {
		migrations, _ = strconv.Atoi(v)
	}
	kills, over, lost := 0, 0, 0
	for i := range migrations {
		r := rand.New(rand.NewPCG(s, uint64(i)))
		mode := Mode(Modes()[i%len(Modes())])
		k, done, crashed := killOnce(t, r, mode)
		kills += k
		if done {
			over++
		}
		if crashed {
			lost++
		}
		if t.Failed() {
			t.Fatalf("migration %d, %s", i, mode)
		}
	}
	t.Logf("%d migrations, %d kills; %d handed over with every byte, %d whose destination was killed after its application had started", migrations, kills, over, lost)
}

func mayHaveStarted(t *testing.T, dir string) bool {
	var j destinationJournal
	if _, err := readJournal(filepath.Join(dir, "destination.json"), &j); err != nil {
		t.Error(err)
	}
	return j.Kept.Started
}

func killOnce(t *testing.T, r *rand.Rand, mode Mode) (kills int, over, crashed bool) {
	dir := t.TempDir()
	fd, err := unix.MemfdCreate("app", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	memfd := os.NewFile(uintptr(fd), "app")
	defer memfd.Close()
	if err := memfd.Truncate(killSize); err != nil {
		t.Fatal(err)
	}
	mem, err := unix.Mmap(fd, 0, killSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(mem) }()
	region.Content{Seed: r.Uint64()}.Fill(mem, 0)
	app := &killApp{mem: mem, runs: true}
	l, err := net.Listen("unix", filepath.Join(dir, "app"))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	stop := make(chan struct{})
	defer close(stop)
	defer l.Close()
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { app.control(c) })
		}
	})
	wr := rand.New(rand.NewPCG(r.Uint64(), 0))
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(100 * time.Microsecond):
				app.step(wr)
			}
		}
	})

	const mayTake = 30 * time.Second
	exists := func(name string) bool { _, err := os.Stat(filepath.Join(dir, name)); return err == nil }
	procs := map[string]*exec.Cmd{}
	ended := make(chan string, 16)
	start := func(name string) {
		c := exec.Command("/proc/self/exe")
		c.Env = append(os.Environ(), childEnv+"="+name, "MIGRATION_TEST_DIR="+dir, "MIGRATION_TEST_MODE="+string(mode))
		c.ExtraFiles = []*os.File{memfd}
		c.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
		var out bytes.Buffer
		c.Stderr = &out
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		procs[name] = c
		wg.Go(func() {
			_ = c.Wait()
			if s := out.String(); s != "" && testing.Verbose() {
				t.Logf("%s: %s", name, s)
			}
			ended <- name
		})
	}
	start("source")
	start("destination")
	defer func() {
		for _, c := range procs {
			_ = c.Process.Kill()
		}
	}()
	budget := 2 + r.IntN(4)
	next := time.After(time.Duration(r.IntN(60)) * time.Millisecond)
	deadline := time.After(mayTake)
	for {
		select {
		case <-next:
			if budget--; budget < 0 {
				continue
			}
			names := []string{"source", "destination"}
			if p := procs[names[r.IntN(2)]]; p != nil {
				_ = p.Process.Kill()
				kills++
			}
			next = time.After(time.Duration(r.IntN(60)) * time.Millisecond)
		case name := <-ended:
			delete(procs, name)
			switch {
			case name == "destination" && exists("found"):
				over = true
			case name == "destination" && mayHaveStarted(t, dir):
				crashed = true // the application's own crash, as far as anybody can tell: it is not migrated any more
			default:
				start(name)
				continue
			}
			app.mu.Lock()
			defer app.mu.Unlock()
			if app.runs {
				t.Errorf("the application runs at both")
			}
			if over {
				found, err := os.ReadFile(filepath.Join(dir, "found"))
				if err != nil || !bytes.Equal(found, mem) {
					at := 0
					for at < len(found) && found[at] == mem[at] {
						at++
					}
					t.Errorf("the destination found something else than the application had stored, from byte %d on (%v)", at, err)
				}
			}
			return kills, over, crashed
		case <-deadline:
			app.mu.Lock()
			t.Errorf("nothing came of it in %v: the application runs %t, started %t", mayTake, app.runs, exists("started"))
			app.mu.Unlock()
			return kills, over, crashed
		}
	}
}
