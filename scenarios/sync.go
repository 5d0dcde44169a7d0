package scenarios

import (
	"context"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"memsync/results"
	"memsync/scenarios/role"
	"memsync/strategies"
)

// measureSync is one run of op sync: a writer at the source changes the region,
// the destination follows. First the whole region (open_latency), then rounds
// that are asked for (total_time), then pulses while the source polls (staleness).
// docs/role-protocol.md has the sequence.
func (r *run) measureSync(ctx context.Context, setup role.Setup) error {
	c, v := r.cell, r.out.Values
	if r.link == nil {
		return usage("op sync needs a link: a transport other than local")
	}
	work := role.SyncWork{Size: c.Size, Content: setup.Backend.Content, Input: setup.Backend.Input,
		Fraction: c.params.Float("dirty_fraction"), Pattern: c.params.Text("dirty_pattern"), Pulses: c.params.Int("pulses")}
	if work.Fraction > 1 {
		return usage("dirty_fraction=%g: want 0 to 1", work.Fraction)
	}
	interval := 100 * time.Millisecond
	if c.params.Has("interval") {
		interval = c.params.Duration("interval")
	}
	// Pulses fall on all phases of the interval.
	work.Gap = max(interval*3/7, time.Millisecond)
	if work.Pulses > 0 {
		work.Gap = max(min(work.Gap, c.Budget/time.Duration(work.Pulses)), time.Microsecond)
	}
	place, err := ParsePlacement(c.CPUs)
	if err != nil {
		return err
	}
	if r.writer, err = role.Start(ctx, role.Workload, place[role.Workload], r.link.Source()); err != nil {
		return err
	}

	// Before any clock.
	var at role.Listening
	var g errgroup.Group
	writes := work
	writes.Via = c.Via
	g.Go(func() error { _, err := r.writer.Ask(ctx, "ready", writes, nil); return err })
	g.Go(func() error { _, err := r.workload.Ask(ctx, "ready", work, nil); return err })
	g.Go(func() error { _, err := r.source.Ask(ctx, "open", setup, nil); return err })
	if err := g.Wait(); err != nil {
		return err
	}
	var a strategies.Attachment
	files, err := r.source.Ask(ctx, "publish", struct{}{}, &a)
	if err != nil {
		return err
	}
	if err := r.armWriter(ctx, a, files); err != nil {
		return err
	}
	if _, err := r.source.Ask(ctx, "listen", map[string]string{"addr": r.link.Source().Addr().String()}, &at); err != nil {
		return err
	}
	begin, err := r.link.Counters()
	if err != nil {
		return err
	}

	// Open: the whole region.
	var m role.Mounted
	files, err = r.daemon.Ask(ctx, "mount", role.MountArgs{Setup: setup, Source: at.Region}, &m)
	if err != nil {
		return err
	}
	var usable role.Attached
	_, err = r.workload.Ask(ctx, "attach", m.Attachment, &usable, files...)
	closeFiles(files)
	if err != nil {
		return err
	}
	v["open_latency"] = seconds(usable.Usable - m.Start)
	v["preemptive_pull_bytes"] = float64(m.Stats.PreemptiveBytes)

	// Rounds that are asked for: the source does not look by itself.
	if err := r.poll(ctx, false); err != nil {
		return err
	}
	before, err := r.counters(ctx)
	if err != nil {
		return err
	}
	rounds := c.params.Int("sync_rounds")
	var took, tx, rx, detection, stores []float64
	for n := 1; n <= rounds; n++ {
		var wrote role.Times
		if _, err := r.writer.Ask(ctx, "dirty", role.SyncArgs{Work: work, Round: uint64(n)}, &wrote); err != nil {
			return err
		}
		stores = append(stores, seconds(wrote.End-wrote.Begin))
		if err := r.drain(ctx); err != nil {
			return err
		}
		w0, err := r.link.Counters()
		if err != nil {
			return err
		}
		start := monotonic()
		if _, err := r.source.Ask(ctx, "sync", struct{}{}, nil); err != nil {
			return fmt.Errorf("round %d: %w", n, r.trouble(ctx, err))
		}
		if _, err := r.daemon.Ask(ctx, "sync", struct{}{}, nil); err != nil { // where the destination asks the source
			return fmt.Errorf("round %d: %w", n, err)
		}
		took = append(took, seconds(monotonic()-start))
		var s strategies.Stats
		if _, err := r.source.Ask(ctx, "stats", struct{}{}, &s); err != nil {
			return err
		}
		detection = append(detection, seconds(s.Extra["detection_ns"]))
		w1, err := r.link.Counters()
		if err != nil {
			return err
		}
		tx = append(tx, float64(w1.SourceTx.Bytes-w0.SourceTx.Bytes))
		rx = append(rx, float64(w1.DestinationTx.Bytes-w0.DestinationTx.Bytes))
	}
	v["total_time"], v["round_tx_bytes"], v["round_rx_bytes"] = median(took), median(tx), median(rx)
	after, err := r.counters(ctx)
	if err != nil {
		return err
	}
	r.spent(before, after)
	v["store_time"] = median(stores)
	if d := median(detection); d > 0 {
		v["detection_time"] = d
		var read role.Bandwidth
		if _, err := r.source.Ask(ctx, "bandwidth", struct{}{}, &read); err != nil {
			return err
		}
		if c.params.Has("dirty") && c.params.Text("dirty") == "hash" && read.Rate > 0 {
			v["hash_rate"], v["floor_read"] = float64(c.Size)/d, read.Rate
			v["hash_ratio"] = v["hash_rate"] / read.Rate
		}
	}

	if _, polls := c.strategy.(strategies.Publisher); !polls {
		work.Pulses = 0
	}
	if work.Pulses > 0 {
		if err := r.pulses(ctx, interval); err != nil {
			return r.trouble(ctx, err)
		}
	}

	// The clock stands still from here.
	if err := r.poll(ctx, false); err != nil {
		return err
	}
	if _, err := r.source.Ask(ctx, "sync", struct{}{}, nil); err != nil {
		return r.trouble(ctx, err)
	}
	if _, err := r.daemon.Ask(ctx, "sync", struct{}{}, nil); err != nil {
		return err
	}
	if _, err := r.workload.Ask(ctx, "equal", map[string]int{"rounds": rounds, "pulses": work.Pulses}, nil); err != nil {
		return err
	}
	r.out.Verified = true
	var s strategies.Stats
	if _, err := r.source.Ask(ctx, "stats", struct{}{}, &s); err != nil {
		return err
	}
	delete(s.Extra, "detection_ns")
	r.stats(s)
	for _, p := range []*role.Process{r.writer, r.workload} {
		if _, err := p.Ask(ctx, "detach", struct{}{}, nil); err != nil {
			return err
		}
	}
	if _, err := r.daemon.Ask(ctx, "unmount", struct{}{}, nil); err != nil {
		return err
	}
	end, err := r.link.Counters()
	if err != nil {
		return err
	}
	v["wire_tx_bytes"] = float64(end.SourceTx.Bytes - begin.SourceTx.Bytes)
	v["wire_rx_bytes"] = float64(end.DestinationTx.Bytes - begin.DestinationTx.Bytes)
	_, err = r.source.Ask(ctx, "close", struct{}{}, nil)
	return err
}

// armWriter attaches the writer at the source and has the source watch it.
func (r *run) armWriter(ctx context.Context, a strategies.Attachment, files []*os.File) error {
	var w role.Attached
	uffd, err := r.writer.Ask(ctx, "attach", a, &w, files...)
	closeFiles(files)
	if err != nil || !w.Armed {
		return err
	}
	_, err = r.source.Ask(ctx, "track", role.TrackArgs{PID: w.PID, Base: w.Base, Length: w.Length}, nil, uffd...)
	closeFiles(uffd)
	if err != nil {
		return err
	}
	_, err = r.writer.Ask(ctx, "handed-over", struct{}{}, nil)
	return err
}

func (r *run) poll(ctx context.Context, on bool) error {
	_, err := r.source.Ask(ctx, "poll", map[string]bool{"on": on}, nil)
	return err
}

// trouble adds what the daemon knows of an error.
func (r *run) trouble(ctx context.Context, err error) error {
	var why role.Trouble
	if _, askErr := r.daemon.Ask(ctx, "trouble", struct{}{}, &why); askErr == nil && why.Text != "" {
		return fmt.Errorf("%w; the daemon says: %s", err, why.Text)
	}
	return err
}

// pulses measures staleness, and what polling costs.
func (r *run) pulses(ctx context.Context, interval time.Duration) error {
	v := r.out.Values
	before, err := r.counters(ctx)
	if err != nil {
		return err
	}
	if err := r.poll(ctx, true); err != nil {
		return err
	}
	var wrote, saw role.Times
	var g errgroup.Group
	start := time.Now()
	g.Go(func() error { _, err := r.writer.Ask(ctx, "pulse", struct{}{}, &wrote); return err })
	g.Go(func() error {
		patience := r.cell.Budget + 20*interval + 20*r.cell.Link.RTT + 5*time.Second
		_, err := r.workload.Ask(ctx, "watch", map[string]time.Duration{"patience": patience}, &saw)
		return err
	})
	if err := g.Wait(); err != nil {
		return err
	}
	length := time.Since(start).Seconds()
	after, err := r.counters(ctx)
	if err != nil {
		return err
	}
	var ages []float64
	for i, at := range saw.At {
		if at == 0 {
			return fmt.Errorf("pulse %d of %d was never seen at the destination: %w", i, len(saw.At), context.DeadlineExceeded)
		}
		ages = append(ages, seconds(at-wrote.At[i]))
	}
	slices.Sort(ages)
	v["staleness"], v["staleness_max"] = median(ages), ages[len(ages)-1]
	v["staleness_p99"] = ages[min(len(ages)*99/100, len(ages)-1)]
	v["poll_load"] = (after[role.Source].CPU - before[role.Source].CPU) / length
	return nil
}

func median(xs []float64) float64 { return results.Summarize(xs).Median.Float() }
