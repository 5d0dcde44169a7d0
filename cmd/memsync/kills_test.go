package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/replay"
)

// TestKills: SIGKILL of a random process of measure, run, torture and mount, at a random moment,
// again and again: whatever was killed, the rest ends, and nothing is left. MEMSYNC_KILLS is how
// often: 4 by default, 200 is the long form; one kind of command after the other.
func TestKills(t *testing.T) {
	n := 4
	if v := os.Getenv("MEMSYNC_KILLS"); v != "" {
		var err error
		if n, err = strconv.Atoi(v); err != nil {
			t.Fatal(err)
		}
	}
	rng := rand.New(rand.NewPCG(replay.Seed(t), 4))
	ended := map[string]int{}
	for i := range n {
		var c *command
		what := []string{"measure", "mount", "torture", "run"}[i%4]
		t.Run(fmt.Sprintf("%d %s", i, what), func(t *testing.T) {
			dir := t.TempDir()
			switch what {
			case "measure":
				strategy := []string{"direct-mount", "managed-mount", "userfaultfd"}[rng.IntN(3)]
				args := measureArgs(strategy)
				if strategy != "userfaultfd" && rng.IntN(2) == 0 {
					args = append(args, "--op", "write")
				}
				c = launch(t, dir, args...)
			case "run":
				c = launch(t, dir, "run", "gc-tail", "--quick", "--runs", "3", "--budget", "50ms", "--out", "r")
			case "torture":
				c = launch(t, dir, "torture", "--time", "1m", "--seed", strconv.FormatUint(rng.Uint64N(1<<40), 10))
			case "mount":
				needFUSE(t)
				killMount(t, dir, rng)
				return
			}
			time.Sleep(time.Duration(rng.IntN(2500)) * time.Millisecond) // any moment will do
			var all []int
			for pid := range c.processes() {
				all = append(all, pid)
			}
			select {
			case <-c.done: // it was over before
			default:
				if len(all) == 0 {
					t.Fatal("the command has no processes")
				}
				victim := all[rng.IntN(len(all))]
				if rng.IntN(3) == 0 { // a process that is stopped cannot help
					c.signal(victim, unix.SIGSTOP)
				}
				ended[what+" "+strings.Join(strings.Fields(c.processes()[victim])[:min(3, len(strings.Fields(c.processes()[victim])))], " ")]++
				c.signal(victim, unix.SIGKILL)
				if what == "torture" || what == "run" { // they count it and go on
					time.Sleep(time.Duration(rng.IntN(500)) * time.Millisecond)
					c.signal(c.cmd.Process.Pid, unix.SIGKILL)
				}
				select {
				case <-c.done:
				case <-time.After(patience):
					t.Fatalf("the command still runs %v after its process %d was killed", patience, victim)
				}
			}
			c.gone()
		})
	}
	t.Logf("killed: %v", ended)
}

// killMount kills a mount, or its server and then the mount, while somebody reads.
func killMount(t *testing.T, dir string, rng *rand.Rand) {
	image(t, filepath.Join(dir, "one"), 1, 8<<20)
	s, uri := serving(t, dir, "one")
	strategy := []string{"direct-mount", "managed-mount"}[rng.IntN(2)]
	c := mounting(t, dir, 1, uri["one"], "here", "--strategy", strategy, "--reconnect", "1s")
	reader := make(chan error, 1)
	go func() {
		_, err := os.ReadFile(filepath.Join(dir, "here"))
		reader <- err
	}()
	time.Sleep(time.Duration(rng.IntN(50)) * time.Millisecond)
	if rng.IntN(2) == 0 {
		s.signal(s.cmd.Process.Pid, unix.SIGKILL)
		time.Sleep(time.Duration(rng.IntN(300)) * time.Millisecond)
	}
	c.signal(c.cmd.Process.Pid, unix.SIGKILL)
	<-c.done
	select {
	case <-reader: // it got all, or an error
	case <-time.After(patience):
		t.Errorf("who reads still waits %v after the mount was killed", patience)
	}
	if out, code := beside(t, c, "clean"); code != 0 {
		t.Errorf("clean: %d, %s", code, out)
	}
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(table), dir+"/") {
		t.Errorf("a mount is left below %s after memsync clean", dir)
	}
	c.gone()
}
