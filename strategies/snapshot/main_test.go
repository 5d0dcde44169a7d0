package snapshot

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"memsync/strategies/region"
	"memsync/strategies/snapshot/client"
	"memsync/strategies/snapshot/image"
)

// The host and its client are processes of their own (docs/deadlocks.md, case 1): this
// test binary with an argument.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "exec" {
		fmt.Fprintln(os.Stderr, Exec(os.Args[2:]))
		os.Exit(126)
	}
	if len(os.Args) == 3 && (os.Args[1] == "client" || os.Args[1] == "host") {
		var j job
		err := json.Unmarshal([]byte(os.Args[2]), &j)
		if err == nil {
			err = map[string]func(job) error{"client": runClient, "host": runHost}[os.Args[1]](j)
		}
		if err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[1], err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// job is what a host and its client do.
type job struct {
	Image, Log  string
	Options     Options
	Size, Chunk int64
	Interval    time.Duration
	Restarts    int
	Do          string // what the client does
	States      uint64 // that it publishes; 0 is for ever
	Pause       time.Duration
	Seed        uint64
}

func (j job) command() Command {
	self, err := os.Executable()
	if err != nil {
		panic(err)
	}
	b, err := json.Marshal(j)
	if err != nil {
		panic(err)
	}
	return Command{Args: []string{self, "client", string(b)}, Shim: []string{self, "exec"}, Stdout: os.Stdout, Stderr: os.Stderr,
		Interval: j.Interval, Restarts: j.Restarts, Grace: 5 * time.Second}
}

// runHost is what memsync snapshot does.
func runHost(j job) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	img, err := image.Open(j.Image, j.Size, j.Chunk)
	if err != nil {
		return err
	}
	_, err = j.command().Run(ctx, img, j.Options)
	return errors.Join(err, img.Close())
}

const pg = 4096

// model says which publication wrote each page last.
type model struct {
	seed  uint64
	pages int64
	gen   []uint64
}

func newModel(seed uint64, size, until int64) *model {
	m := &model{seed: seed, pages: size / pg, gen: make([]uint64, size/pg)}
	for n := uint64(1); n <= uint64(until); n++ {
		m.apply(n)
	}
	return m
}

// changes are the pages that publication n writes, in order.
func (m *model) changes(n uint64) []int64 {
	r := rand.New(rand.NewPCG(m.seed, n))
	pages := make([]int64, 4)
	for i := range pages {
		pages[i] = r.Int64N(m.pages)
	}
	return pages
}

func (m *model) apply(n uint64) {
	for _, p := range m.changes(n) {
		m.gen[p] = n
	}
}

func (m *model) content(n uint64) region.Content { return region.Content{Seed: m.seed, Generation: n} }

func (m *model) fill(p []byte, page int64) {
	if g := m.gen[page]; g == 0 {
		clear(p)
	} else {
		m.content(g).Fill(p, page*pg)
	}
}

// check compares a region with the state. partly allows that the next publication was being
// written: a prefix of its bytes (where the race detector watches, a word is stored byte by byte).
func (m *model) check(mem []byte, partly bool) error {
	sequence := uint64(0)
	for _, g := range m.gen {
		sequence = max(sequence, g)
	}
	want := make([]byte, len(mem))
	for p := range m.gen {
		m.fill(want[int64(p)*pg:int64(p+1)*pg], int64(p))
	}
	for _, p := range m.changes(sequence + 1) {
		var fresh [pg]byte
		m.content(sequence+1).Fill(fresh[:], p*pg)
		w := int64(0)
		for ; partly && w < pg && mem[p*pg+w] == fresh[w]; w++ {
		}
		if copy(want[p*pg:], fresh[:w]); w < pg {
			break // what comes later must not have begun
		}
	}
	return differ(mem, want)
}

func differ(got, want []byte) error {
	if bytes.Equal(got, want) {
		return nil
	}
	for i := range got {
		if got[i] != want[i] {
			return fmt.Errorf("byte at %d is %#x, want %#x: %w", i, got[i], want[i], region.ErrMismatch)
		}
	}
	return nil
}

// journal is what a client tells of itself in a file, which outlives it.
type journal struct{ mem []byte }

const (
	jBegun, jDone, jStarved, jWrong, jStarts = 0, 8, 16, 24, 32
	jTimes, jRing                            = 4096, 1 << 16 // when publication n was begun
)

func openJournal(path string) (journal, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return journal{}, err
	}
	defer f.Close()
	if err := f.Truncate(jTimes + 8*jRing); err != nil {
		return journal{}, err
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, jTimes+8*jRing, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	return journal{mem}, err
}

func (j journal) word(at int) *atomic.Uint64 { return (*atomic.Uint64)(unsafe.Pointer(&j.mem[at])) }
func (j journal) time(n uint64) *atomic.Uint64 {
	return j.word(jTimes + int(n%jRing)*8)
}

func monotonic() uint64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return uint64(ts.Nano())
}

// runClient publishes states.
func runClient(j job) error {
	if j.Do == "sleep" {
		time.Sleep(time.Hour)
	}
	if how, ok := strings.CutPrefix(j.Do, "misuse:"); ok {
		return misuse(how)
	}
	r, err := client.Open()
	if err != nil {
		return err
	}
	defer r.Close()
	log, err := openJournal(j.Log)
	if err != nil {
		return err
	}
	sequence, blob, err := r.Restored()
	if err != nil {
		return err
	}
	m := newModel(j.Seed, r.Size(), int64(sequence))
	mem := append([]byte{}, r.Mem()...)
	if err := m.check(mem, r.Mode() == "cow" || r.Mode() == "on-exit"); err != nil || sequence > 0 && string(blob) != strconv.FormatUint(sequence, 10) {
		log.word(jWrong).Add(1)
		return fmt.Errorf("restored publication %d with blob %q: %w", sequence, blob, err)
	}
	log.word(jStarts).Add(1)
	buf := make([]byte, pg)
	for n := sequence + 1; j.States == 0 || n <= j.States; n++ {
		log.time(n).Store(monotonic())
		log.word(jBegun).Store(n)
		for _, p := range m.changes(n) {
			if r.Mode() == "cow" || r.Mode() == "on-exit" {
				m.content(n).Fill(r.Mem()[p*pg:(p+1)*pg], p*pg) // in place, so that the order is known
				continue
			}
			m.content(n).Fill(buf, p*pg)
			if err := r.Write(buf, p*pg); err != nil {
				return err
			}
		}
		publish := r.Publish
		if r.Mode() == "cow" && j.Do != "ask" {
			publish = r.Note
		}
		got, err := publish(strconv.AppendUint(nil, n, 10))
		if err != nil || got != n {
			return fmt.Errorf("publication %d is %d: %w", n, got, err)
		}
		log.word(jDone).Store(n)
		log.word(jStarved).Store(r.Status().Starved)
		if j.Do == "kill-itself" && n%50 == 0 {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		}
		if j.Pause > 0 {
			time.Sleep(j.Pause)
		}
	}
	return nil
}

func mustJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}
