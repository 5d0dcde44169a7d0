package role

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"memsync/scenarios/program"
	"memsync/strategies"
	"memsync/strategies/region"
)

// programRun is what a workload knows of the program that works on the region in its
// place. It is a child of the workload, which does not touch the region itself.
type programRun struct {
	path      string // the region's
	here, ref string // folders: of the run, and of the same program on the local file
	result    program.Result
}

// prepareProgram runs the program on the local file, whose outputs are what it must say
// of the region, and which brings its own pages into memory.
func (w *workload) prepareProgram(ctx context.Context) error {
	if w.in == nil {
		return fmt.Errorf("program %s: there is no input to compare with", w.work.Program.Name)
	}
	g := &w.prog
	g.here, g.ref = filepath.Join(w.work.Dir, "program"), filepath.Join(w.work.Dir, "program-local")
	if err := errors.Join(os.Mkdir(g.here, 0o700), os.Mkdir(g.ref, 0o700)); err != nil {
		return err
	}
	local, err := executable(w.work.Input, filepath.Join(g.ref, "region"))
	if err != nil {
		return err
	}
	if _, err := runLocked(ctx, *w.work.Program, local, g.ref, 0); err != nil { // nothing is left out
		return fmt.Errorf("on the local file: %w", err)
	}
	return nil
}

// executable makes a copy of a file that may be executed.
func executable(from, to string) (string, error) {
	in, err := os.Open(from)
	if err != nil {
		return "", err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o700)
	if err != nil {
		return "", err
	}
	_, err = out.ReadFrom(in)
	return to, errors.Join(err, out.Close())
}

// runLocked runs a program from a thread that does not end before it.
func runLocked(ctx context.Context, p program.Program, path, dir string, budget time.Duration) (program.Result, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	return program.Run(ctx, p, path, dir, budget)
}

// attachProgram takes the path of the region, which the program opens itself.
func (w *workload) attachProgram(a strategies.Attachment) (Attached, error) {
	if a.Kind != strategies.AttachPath || len(a.Paths) > 0 {
		return Attached{}, fmt.Errorf("access program:%s: the region is no file that a program could open (%s): %w", w.work.Program.Name, a.Kind, region.ErrNotSupported)
	}
	w.prog.path = a.Path
	return Attached{Usable: monotonic(), PID: os.Getpid()}, nil
}

// runProgram runs it on the region.
func (w *workload) runProgram(ctx context.Context) (Touched, error) {
	t := Touched{Ops: make([]int64, w.work.Threads), Start: monotonic()}
	r, err := runLocked(ctx, *w.work.Program, w.prog.path, w.prog.here, w.work.Budget)
	t.End, t.Last = t.Start+int64(r.Took), r.All
	w.prog.result, t.Program = r, &r
	return t, err
}

// verifyProgram compares what the program said with what it said of the local file.
func (w *workload) verifyProgram() (Verified, error) {
	n, err := program.Compare(*w.work.Program, w.prog.result, w.prog.here, w.prog.ref)
	if err == nil && n == 0 {
		err = fmt.Errorf("program %s said nothing, so that nothing could be compared", w.work.Program.Name)
	}
	return Verified{Bytes: n}, err
}
