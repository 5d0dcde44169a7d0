package snapshot

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/device/uffd"
	"memsync/strategies/region"
	"memsync/strategies/replay"
	"memsync/strategies/snapshot/image"
	"memsync/strategies/snapshot/shm"
)

var allModes = []shm.Mode{shm.OnExit, shm.Queue, shm.Triple, shm.Cow}

// need leaves a mode out that this kernel lacks.
func need(t *testing.T, m shm.Mode) {
	t.Helper()
	if m != shm.Cow {
		return
	}
	if err := uffd.ProbeWriteProtect(); errors.Is(err, region.ErrNotSupported) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
}

func newJob(t *testing.T, m shm.Mode) job {
	dir := t.TempDir()
	return job{Image: filepath.Join(dir, "image"), Log: filepath.Join(dir, "log"), Size: 64 * pg, Chunk: 2 * pg,
		Options: Options{Mode: m}, Interval: 2 * time.Millisecond, Seed: replay.Seed(t)}
}

func (j job) openImage(t *testing.T) *image.Image {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		img, err := image.Open(j.Image, j.Size, j.Chunk)
		if err == nil {
			return img
		}
		if !errors.Is(err, region.ErrNotPermitted) || time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

// restored returns the image's last state, after comparing it with what the client published.
func (j job) restored(t *testing.T) image.State {
	t.Helper()
	img := j.openImage(t)
	defer img.Close()
	return j.verify(t, img)
}

func (j job) verify(t *testing.T, img *image.Image) image.State {
	t.Helper()
	mem := make([]byte, img.Size())
	if err := img.Restore(t.Context(), func(p []byte, off int64) error { copy(mem[off:], p); return nil }); err != nil {
		t.Fatal(err)
	}
	s, ok := img.Latest()
	if err := newModel(j.Seed, j.Size, int64(s.Sequence)).check(mem, j.Options.Mode == shm.Cow); err != nil {
		t.Fatalf("TEST_SEED=%d: image %d of publication %d (%v): %v", j.Seed, s.Commit, s.Sequence, j.Options.Mode, err)
	}
	if want := strconv.AppendUint(nil, s.Sequence, 10); ok && s.Sequence > 0 && !bytes.Equal(s.Blob, want) {
		t.Fatalf("blob %q with publication %d", s.Blob, s.Sequence)
	}
	return s
}

// TestRun: the client publishes, ends, is started again and finds what it left.
func TestRun(t *testing.T) {
	for _, m := range allModes {
		t.Run(m.String(), func(t *testing.T) {
			need(t, m)
			j := newJob(t, m)
			for i, do := range []string{"", "ask", ""} {
				j.Do = do
				j.States = uint64(100 * (i + 1))
				img := j.openImage(t)
				e, err := j.command().Run(t.Context(), img, j.Options)
				if err != nil || e.Status != 0 {
					t.Fatalf("%+v, %v", e, err)
				}
				if s := j.verify(t, img); s.Sequence != j.States {
					t.Errorf("image of publication %d, the last was %d", s.Sequence, j.States)
				}
				if err := img.Close(); err != nil {
					t.Fatal(err)
				}
				t.Logf("%+v", e)
			}
		})
	}
}

// TestRestart: a client that is killed goes on from its last state; mode on-exit from
// that of the last exit.
func TestRestart(t *testing.T) {
	for _, m := range allModes {
		t.Run(m.String(), func(t *testing.T) {
			need(t, m)
			j := newJob(t, m)
			j.Do, j.States, j.Restarts = "kill-itself", 320, 20
			if m == shm.OnExit {
				j.Restarts = 2
			}
			img := j.openImage(t)
			e, err := j.command().Run(t.Context(), img, j.Options)
			s := j.verify(t, img)
			if cerr := img.Close(); cerr != nil {
				t.Fatal(cerr)
			}
			if m == shm.OnExit {
				if !errors.Is(err, region.ErrPeerGone) || e.Status != 128+9 || e.Restarts != 2 || s.Sequence != 0 {
					t.Errorf("%+v, %v, %+v", e, err, s)
				}
				return
			}
			// 50, 100, ... 300: killed after each of them had been published.
			if err != nil || e.Restarts != 6 || s.Sequence != 320 {
				t.Errorf("%+v, %v, %+v", e, err, s)
			}
		})
	}
}

// TestKill kills host and client together at random moments, again and again:
// what is restored is always a state that the client had published, and not an old one but for
// a queue that starves. MEMSYNC_KILLS=1000 makes it 1000 times in all.
func TestKill(t *testing.T) {
	kills := 120
	if v := os.Getenv("MEMSYNC_KILLS"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil {
			t.Fatal(err)
		}
		kills = n
	}
	if testing.Short() {
		kills = 30
	}
	for _, c := range []struct {
		name  string
		mode  shm.Mode
		do    string
		pause time.Duration
	}{{"queue", shm.Queue, "", 50 * time.Microsecond}, {"queue-starved", shm.Queue, "", 0}, {"triple", shm.Triple, "", 0}, {"cow", shm.Cow, "", 0}, {"cow-asked", shm.Cow, "ask", 0}} {
		t.Run(c.name, func(t *testing.T) {
			need(t, c.mode)
			j := newJob(t, c.mode)
			j.Do, j.Pause, j.Interval = c.do, c.pause, 5*time.Millisecond
			if c.mode == shm.Queue {
				j.Options.Stream = shm.MinStream
			}
			killLoop(t, j, max(kills/5, 1))
		})
	}
}

func killLoop(t *testing.T, j job, kills int) {
	log, err := openJournal(j.Log)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(log.mem)
	rng := rand.New(rand.NewPCG(j.Seed, 5))
	var last uint64
	var oldest time.Duration
	progress, starved := 0, uint64(0)
	for k := range kills {
		h := exec.Command("/proc/self/exe", "host", string(mustJSON(j)))
		h.Args[0] = os.Args[0]
		h.Stderr = os.Stderr
		h.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		if err := h.Start(); err != nil {
			t.Fatal(err)
		}
		starts := log.word(jStarts).Load()
		// From before the image is made to many images later.
		wait := time.Duration(rng.Int64N(int64(40 * time.Millisecond)))
		if rng.IntN(4) > 0 {
			for end := time.Now().Add(20 * time.Second); log.word(jStarts).Load() == starts; time.Sleep(100 * time.Microsecond) {
				if time.Now().After(end) {
					_ = unix.Kill(-h.Process.Pid, unix.SIGKILL)
					_ = h.Wait()
					t.Fatal("the client did not start")
				}
			}
		}
		time.Sleep(wait)
		at := monotonic()
		if err := unix.Kill(-h.Process.Pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		_ = h.Wait() // "signal: killed"
		if n := log.word(jWrong).Load(); n > 0 {
			t.Fatalf("kill %d: the client found a wrong region", k)
		}
		if _, err := os.Stat(j.Image); errors.Is(err, os.ErrNotExist) {
			continue // killed before it was made
		}
		s := j.restored(t)
		begun := log.word(jBegun).Load()
		if s.Sequence < last || s.Sequence > max(begun, last) {
			t.Fatalf("kill %d: restored publication %d; before it was %d, and %d was the last", k, s.Sequence, last, begun)
		}
		if s.Sequence > last {
			progress++
		}
		if begun > s.Sequence && begun-s.Sequence < jRing {
			oldest = max(oldest, time.Duration(at-log.time(s.Sequence+1).Load()))
		}
		starved += log.word(jStarved).Load()
		log.word(jStarved).Store(0)
		log.word(jBegun).Store(0)
		last = s.Sequence
	}
	t.Logf("%d kills, %d of them after a newer image, last publication %d; oldest image %v; starved %d times", kills, progress, last, oldest, starved)
	if progress == 0 {
		t.Error("no image was ever newer")
	}
	// An interval, the time of two images, and what a busy machine adds.
	if bound := j.Interval + 2*time.Second; oldest > bound && j.Options.Mode != shm.Queue {
		t.Errorf("an image was %v old, want at most %v", oldest, bound)
	}
}

// TestInterrupt: when ctx ends, the client is told, and its last state is saved.
func TestInterrupt(t *testing.T) {
	for _, m := range []shm.Mode{shm.Queue, shm.Triple, shm.Cow} {
		t.Run(m.String(), func(t *testing.T) {
			need(t, m)
			j := newJob(t, m)
			j.Pause = 100 * time.Microsecond
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			img := j.openImage(t)
			defer img.Close()
			e, err := j.command().Run(ctx, img, j.Options)
			if err != nil || e.Status != 128+int(unix.SIGTERM) {
				t.Fatalf("%+v, %v", e, err)
			}
			log, err := openJournal(j.Log)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Munmap(log.mem)
			s := j.verify(t, img)
			if done := log.word(jDone).Load(); s.Sequence < done || s.Sequence > done+1 {
				t.Errorf("image of publication %d, the last was %d", s.Sequence, done)
			}
		})
	}
}

// TestNeverOpens: a command that never opens its region is ended, with advice.
func TestNeverOpens(t *testing.T) {
	for _, m := range []shm.Mode{shm.Queue, shm.Triple, shm.Cow} {
		t.Run(m.String(), func(t *testing.T) {
			need(t, m)
			j := newJob(t, m)
			j.Do, j.Options.Register = "sleep", 100*time.Millisecond
			img := j.openImage(t)
			defer img.Close()
			began := time.Now()
			_, err := j.command().Run(t.Context(), img, j.Options)
			if !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > 5*time.Second {
				t.Errorf("%v after %v", err, time.Since(began))
			}
			if _, ok := img.Latest(); ok {
				t.Error("there is an image")
			}
		})
	}
}
