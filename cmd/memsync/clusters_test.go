package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"

	"memsync/results"
	"memsync/scenarios"
	"memsync/strategies/replay"
)

// slurm is a cluster of this host: munged, slurmctld and slurmd of its own, in a folder of
// its own, on ports of its own.
type slurm struct {
	t   *testing.T
	dir string
	env []string
}

// newSlurm starts the cluster; all of it ends with the test.
func newSlurm(t *testing.T) *slurm {
	t.Helper()
	missing := ""
	for _, name := range []string{"munged", "slurmctld", "slurmd", "sbatch", "scontrol"} {
		if _, err := exec.LookPath(name); err != nil {
			missing = fmt.Sprintf("%v: apt-get install slurmctld slurmd slurm-client munge", err)
		}
	}
	if os.Geteuid() != 0 {
		missing = "slurmd starts jobs as root only"
	}
	if missing != "" {
		replay.Missing(t, "slurm", missing)
	}
	dir, err := os.MkdirTemp("", "slurm") // t.TempDir is too long for a socket's name
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := &slurm{t: t, dir: dir, env: append(os.Environ(), "SLURM_CONF="+dir+"/slurm.conf")}
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	host, _, _ = strings.Cut(host, ".")
	key := make([]byte, 128)
	_, _ = rand.Read(key) // never fails
	for name, text := range map[string]string{"munge.key": string(key), "cgroup.conf": "", "state/x": "", "spool/x": "", "slurm.conf": fmt.Sprintf(`ClusterName=memsync
SlurmctldHost=%[2]s(127.0.0.1)
SlurmctldPort=%[3]d
SlurmdPort=%[4]d
SlurmUser=%[5]s
SlurmdUser=%[5]s
AuthType=auth/munge
AuthInfo=socket=%[1]s/munge.sock
CredType=cred/munge
StateSaveLocation=%[1]s/state
SlurmdSpoolDir=%[1]s/spool
SlurmctldPidFile=%[1]s/slurmctld.pid
SlurmdPidFile=%[1]s/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
NodeName=%[2]s NodeAddr=127.0.0.1 CPUs=1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
`, dir, host, freePort(t), freePort(t), me.Username)} {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	s.daemon("munged", "--foreground", "--force", "--key-file="+dir+"/munge.key", "--socket="+dir+"/munge.sock", "--pid-file="+dir+"/munged.pid",
		"--log-file="+dir+"/munged.log", "--seed-file="+dir+"/munged.seed")
	s.until("munged listens", func() bool { _, err := os.Stat(dir + "/munge.sock"); return err == nil })
	s.daemon("slurmctld", "-D", "-i", "-f", dir+"/slurm.conf")
	s.daemon("slurmd", "-D", "-f", dir+"/slurm.conf")
	t.Cleanup(func() { _, _ = s.run("scancel", "--user", me.Username) }) // before the daemons end
	s.until("the node is idle", func() bool {
		out, _ := s.run("scontrol", "show", "node", "-o")
		return strings.Contains(out, "State=IDLE")
	})
	return s
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// daemon starts a program that ends with the test, by its number, or with this process.
func (s *slurm) daemon(name string, args ...string) {
	s.t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env, cmd.Dir = s.env, s.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	cmd.WaitDelay = time.Second
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	s.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-done:
		case <-time.After(20 * time.Second):
			_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
			<-done
		}
		if s.t.Failed() {
			s.t.Logf("%s: %s", name, out.String()[max(out.Len()-4000, 0):])
		}
	})
}

func (s *slurm) run(name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.t.Context()), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env, cmd.Dir = s.env, s.dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out)), err
}

func (s *slurm) must(name string, args ...string) string {
	s.t.Helper()
	out, err := s.run(name, args...)
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

func (s *slurm) until(what string, done func() bool) {
	s.t.Helper()
	begin := time.Now()
	defer func() { s.t.Logf("%.1f s until %s", time.Since(begin).Seconds(), what) }()
	for end := begin.Add(5 * time.Minute); !done(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			s.t.Fatalf("not within five minutes: %s", what)
		}
	}
}

// TestSlurm runs docs/clusters/slurm-array.sh on a real Slurm of this host, and the merge as
// a job that depends on it, as docs/clusters.md has it: all cells, each once.
func TestSlurm(t *testing.T) {
	s := newSlurm(t)
	memsync, err := exec.LookPath("memsync") // in PATH by testscript
	if err != nil {
		t.Fatal(err)
	}
	script, err := filepath.Abs("../../docs/clusters/slurm-array.sh")
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(s.dir, "study")
	s.env = append(s.env, "MEMSYNC="+memsync, "OUT="+out, "TMPDIR="+t.TempDir())
	job := s.must("sbatch", "--parsable", "--array=3-4", script, "gc-tail", "--quick", "--runs", "1", "--budget", "5ms")
	merge := s.must("sbatch", "--parsable", "--dependency=afterany:"+job, "--output=merge.log", "--wrap", "$MEMSYNC merge $OUT.* --out $OUT")
	show := func(id string) string { out, _ := s.run("scontrol", "show", "job", "-o", id); return out }
	s.until("the merge is over", func() bool {
		return strings.Contains(show(merge), "JobState=COMPLETED") || strings.Contains(show(merge), "JobState=FAILED")
	})
	if t.Failed() || !strings.Contains(show(merge), "JobState=COMPLETED") {
		logs, _ := filepath.Glob(filepath.Join(s.dir, "*.log"))
		for _, l := range logs {
			b, _ := os.ReadFile(l)
			t.Logf("%s: %s", filepath.Base(l), b)
		}
		t.Fatal(show(merge))
	}
	shards := [2]int{closed(t, out+".1"), closed(t, out+".2")}
	figure, err := scenarios.FigureByName(program().Figures, "gc-tail")
	if err != nil {
		t.Fatal(err)
	}
	if want := len(figure.Cells(scenarios.Network, true)); shards[0] == 0 || shards[1] == 0 || shards[0]+shards[1] != want || closed(t, out) != want {
		t.Errorf("shards of %v runs make %d; the sweep has %d", shards, closed(t, out), want)
	}
}

// closed counts the runs of a result folder.
func closed(t *testing.T, dir string) int {
	t.Helper()
	rows, err := results.Read(filepath.Join(dir, results.RunsFile))
	if err != nil {
		t.Fatal(err)
	}
	return len(results.ClosedRuns(rows))
}

// TestIndexedJob: the manifest's numbers fit each other, and its script runs the shards that
// Kubernetes numbers; after which exit status an index is done.
func TestIndexedJob(t *testing.T) {
	b, err := os.ReadFile("../../docs/clusters/indexed-job.yaml")
	if err != nil {
		t.Fatal(err)
	}
	d := yaml.NewDecoder(bytes.NewReader(b))
	var claim struct {
		Kind     string
		Metadata struct{ Name string }
	}
	var job struct {
		Kind string
		Spec struct {
			CompletionMode           string `yaml:"completionMode"`
			Completions, Parallelism int
			Template                 struct {
				Spec struct {
					Containers []struct {
						Command, Args []string
						Env           []struct{ Name, Value string }
						VolumeMounts  []struct{ Name string } `yaml:"volumeMounts"`
					}
					Volumes []struct {
						Name                  string
						PersistentVolumeClaim struct {
							ClaimName string `yaml:"claimName"`
						} `yaml:"persistentVolumeClaim"`
					}
				}
			}
		}
	}
	if err := errors.Join(d.Decode(&claim), d.Decode(&job)); err != nil {
		t.Fatal(err)
	}
	pod := job.Spec.Template.Spec
	if job.Kind != "Job" || job.Spec.CompletionMode != "Indexed" || len(pod.Containers) != 1 || job.Spec.Parallelism > job.Spec.Completions {
		t.Fatalf("not an indexed job: %+v", job)
	}
	c := pod.Containers[0]
	env := map[string]string{}
	for _, e := range c.Env {
		env[e.Name] = e.Value
	}
	if env["SHARDS"] != strconv.Itoa(job.Spec.Completions) {
		t.Errorf("%d completions of %s shards", job.Spec.Completions, env["SHARDS"])
	}
	var volumes, mounts []string
	for _, v := range pod.Volumes {
		volumes = append(volumes, v.Name)
		if n := v.PersistentVolumeClaim.ClaimName; n != "" && (n != claim.Metadata.Name || claim.Kind != "PersistentVolumeClaim") {
			t.Errorf("the claim is %q, not %q", claim.Metadata.Name, n)
		}
	}
	for _, m := range c.VolumeMounts {
		mounts = append(mounts, m.Name)
	}
	if !slices.Equal(volumes, mounts) {
		t.Errorf("volumes %v, mounts %v", volumes, mounts)
	}
	// The script itself, with a program that writes down how it was called.
	dir := t.TempDir()
	for _, status := range []int{0, 1, 3, 4, 5, 6, 130} {
		fake := filepath.Join(dir, "memsync")
		if err := os.WriteFile(fake, []byte(fmt.Sprintf("#!/bin/sh\necho \"$@\"\nexit %d\n", status)), 0o755); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(c.Command[0], append(c.Command[1:], c.Args...)...)
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "JOB_COMPLETION_INDEX=2", "SHARDS=" + env["SHARDS"], "MEMSYNC=" + fake, "OUT=" + dir + "/study"}
		out, err := cmd.Output()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		if want := fmt.Sprintf("run --all --variant both --shard 3/%s --out %s/study.3\n", env["SHARDS"], dir); string(out) != want {
			t.Errorf("called with %q, want %q", out, want)
		}
		again := err != nil // the index is not done
		if want := slices.Contains([]int{3, 6, 130}, status); again != want {
			t.Errorf("exit status %d: done %v, want %v", status, !again, !want)
		}
	}
}
