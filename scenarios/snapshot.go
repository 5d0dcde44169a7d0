package scenarios

import (
	"context"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"memsync/scenarios/role"
	"memsync/strategies"
)

// measureSnapshot is one run of op snapshot: the workload writes and publishes as a client does,
// the daemon takes images, and the last one is compared, every byte, with what the writer
// had when it was taken. Then fork of as much memory is timed.
func (r *run) measureSnapshot(ctx context.Context, setup role.Setup) error {
	c, v := r.cell, r.out.Values
	if c.Input != "" {
		return usage("op snapshot goes without --input")
	}
	work := role.SnapWork{Size: c.Size, Content: setup.Backend.Content, Publish: int64(c.params.Int("publish")), Rate: c.params.Size("dirty_rate"),
		Mode: c.params.Text("mode"), Huge: c.params.Text("pages") != "4KiB"}
	images, interval := c.params.Int("images"), c.params.Duration("interval")
	if _, err := r.daemon.Ask(ctx, "hold", setup, nil); err != nil {
		return err
	}
	if err := r.touchMemory(); err != nil {
		return err
	}
	if err := r.settle(ctx); err != nil {
		return err
	}
	var m role.Mounted
	files, err := r.daemon.Ask(ctx, "mount", role.MountArgs{Setup: setup}, &m)
	if err != nil {
		return err
	}
	_, err = r.workload.Ask(ctx, "client", map[string]any{"work": work, "attachment": m.Attachment, "baseline": min(c.Budget/4, time.Second)}, nil, files...)
	closeFiles(files)
	if err != nil {
		return r.trouble(ctx, err)
	}

	before, err := r.counters(ctx)
	if err != nil {
		return err
	}
	steal := stealTime()
	// The writer goes on behind the last image, and begins before the first.
	var wrote role.Wrote
	var taken []role.Taken
	var g errgroup.Group
	const lead = 50 * time.Millisecond
	length := lead + time.Duration(images)*interval
	g.Go(func() error {
		_, err := r.workload.Ask(ctx, "write", role.WriteArgs{For: length}, &wrote)
		return err
	})
	g.Go(func() error {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(lead):
		}
		_, err := r.daemon.Ask(ctx, "images", role.ImagesArgs{Images: images, Interval: interval}, &taken)
		return err
	})
	if err := g.Wait(); err != nil {
		return r.trouble(ctx, err)
	}
	r.measured(m.Start, monotonic())
	v["steal_time"] = stealTime() - steal
	after, err := r.counters(ctx)
	if err != nil {
		return err
	}
	r.spent(before, after)
	r.snapshots(wrote, taken)

	// The clock stands still from here.
	var s strategies.Stats
	if _, err := r.daemon.Ask(ctx, "stats", struct{}{}, &s); err != nil {
		return err
	}
	r.stats(s)
	var checked role.ImageChecked
	if _, err := r.daemon.Ask(ctx, "verify-image", work, &checked); err != nil {
		return err
	}
	if checked.Sequence > wrote.Publications || checked.Sequence == 0 && v["snapshots"] > 0 {
		return fmt.Errorf("the image says that it has publication %d; there were %d", checked.Sequence, wrote.Publications)
	}
	r.out.Verified = true
	var f role.Forked
	end := r.yardstick()
	_, err = r.workload.Ask(ctx, "fork", role.ForkArgs{Size: c.Size, Huge: work.Huge}, &f)
	end()
	if err != nil {
		return err
	}
	v["floor_fork"] = f.Fork
	if f.Fork > 0 {
		v["pause_by_fork"] = v["pause"] / f.Fork
	}
	_, err = r.daemon.Ask(ctx, "unmount", struct{}{}, nil)
	return err
}

// snapshots records what images cost.
func (r *run) snapshots(w role.Wrote, taken []role.Taken) {
	v := r.out.Values
	var took, written, pauses []float64
	freeze := 0.0
	for _, t := range taken {
		if t.Fresh {
			took, written = append(took, t.Save.Seconds()), append(written, float64(t.Written))
		}
		freeze = max(freeze, t.Freeze.Seconds())
		v["starved"] = float64(t.Starved)
		pause := 0.0
		for _, l := range w.Long {
			if l.At < t.End && l.At+l.Took > t.Begin {
				pause = max(pause, seconds(l.Took))
			}
		}
		pauses = append(pauses, pause)
	}
	v["snapshots"] = float64(len(took))
	if len(took) > 0 {
		v["snapshot_time"], v["snapshot_bytes"] = median(took), median(written)
	}
	if freeze > 0 {
		v["freeze"] = freeze
	}
	v["pause"], v["pause_max"] = median(pauses), slices.Max(pauses)
	v["bytes_done"] = float64(w.Bytes)
	v["writer_rate"] = float64(w.Bytes) / seconds(w.End-w.Begin)
	if w.Plain > 0 {
		v["writer_slowdown"] = w.Mean / w.Plain
	}
}
