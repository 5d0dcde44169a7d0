package scenarios

import (
	"context"
	"errors"
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
//
// ended is told when a process that it starts ends too early.
func (r *run) measureSync(ctx context.Context, setup role.Setup, ended func(error)) error {
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
	r.writer.Watch(ctx, ended)

	// Before any clock.
	var at role.Listening
	var g errgroup.Group
	writes := work
	writes.Via = c.Via
	g.Go(func() error { _, err := r.writer.Ask(ctx, "ready", writes, nil); return err })
	for _, p := range r.workloads() {
		g.Go(func() error { _, err := p.Ask(ctx, "ready", work, nil); return err })
	}
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
	if err := r.settle(ctx); err != nil {
		return err
	}
	begin, err := r.link.Counters()
	if err != nil {
		return err
	}

	// Open: the whole region.
	f := r.fan(setup, at.Region)
	n := len(f.all)
	if c.params.Text("event") == strategies.EventLate {
		n--
	}
	if err := f.openFirst(ctx, n); err != nil {
		return err
	}
	from, to := f.all[0].start, f.all[0].usable
	for _, d := range f.all[:n] {
		from, to = min(from, d.start), max(to, d.usable)
	}
	v["open_latency"] = seconds(to - from)
	r.measured(from, to)
	v["preemptive_pull_bytes"] = float64(f.all[0].stats.PreemptiveBytes)

	// Rounds that are asked for: the source does not look by itself.
	if err := r.poll(ctx, false); err != nil {
		return err
	}
	before, err := r.counters(ctx)
	if err != nil {
		return err
	}
	rounds := c.params.Int("sync_rounds")
	var t syncTimes
	for n := 1; n <= rounds; n++ {
		if err := f.round(ctx, work, n, &t); err != nil {
			return fmt.Errorf("round %d: %w", n, err)
		}
	}
	t.record(v)
	after, err := r.counters(ctx)
	if err != nil {
		return err
	}
	r.spent(before, after)
	v["store_time"] = median(t.stores)
	if d := median(t.detection); d > 0 {
		v["detection_time"] = d
		if d := median(t.msync); d > 0 {
			v["msync_time"] = d
		}
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
		if err := f.pulses(ctx, interval); err != nil {
			return f.trouble(ctx, err)
		}
	}

	// The clock stands still from here.
	if err := r.poll(ctx, false); err != nil {
		return err
	}
	if _, _, err := f.sync(ctx); err != nil {
		return err
	}
	err = f.each(func(d *destination) error {
		_, err := d.workload.Ask(ctx, "equal", map[string]int{"rounds": rounds, "pulses": work.Pulses}, nil)
		return err
	})
	if err != nil {
		return err
	}
	r.out.Verified = true
	var s strategies.Stats
	if _, err := r.source.Ask(ctx, "stats", struct{}{}, &s); err != nil {
		return err
	}
	if d := s.Extra["arm_ns"]; d > 0 {
		v["arm_time"] = seconds(d)
	}
	for _, ns := range []string{"detection_ns", "msync_ns", "arm_ns"} {
		delete(s.Extra, ns)
	}
	r.stats(s)
	if _, err := r.writer.Ask(ctx, "detach", struct{}{}, nil); err != nil {
		return err
	}
	if err := f.close(ctx); err != nil {
		return err
	}
	end, err := r.link.Counters()
	if err != nil {
		return err
	}
	wired(v, begin, end)
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

// syncTimes are what the rounds of a run took and sent.
type syncTimes struct {
	took, first, last       []float64 // s
	tx, rx, busiest, others []float64 // B
	detection, stores       []float64 // s
	msync                   []float64 // s, of detection
	event, eventOthers      []float64 // s, of rounds in which something happened
}

// round has the writer change the region, and measures until all destinations have it.
func (f *fan) round(ctx context.Context, work role.SyncWork, n int, t *syncTimes) error {
	var wrote role.Times
	if _, err := f.writer.Ask(ctx, "dirty", role.SyncArgs{Work: work, Round: uint64(n)}, &wrote); err != nil {
		return err
	}
	t.stores = append(t.stores, seconds(wrote.End-wrote.Begin))
	if err := f.drain(ctx); err != nil {
		return err
	}
	w0, err := f.link.Counters()
	if err != nil {
		return err
	}
	s0, err := f.sent()
	if err != nil {
		return err
	}
	end, happened := f.happens(ctx, n)
	start, took, err := f.sync(ctx)
	if err := errors.Join(err, end()); err != nil {
		return err
	}
	f.measured(start, monotonic())
	w1, err := f.link.Counters()
	if err != nil {
		return err
	}
	s1, err := f.sent()
	if err != nil {
		return err
	}
	var s strategies.Stats
	if _, err := f.run.source.Ask(ctx, "stats", struct{}{}, &s); err != nil {
		return err
	}
	t.detection, t.msync = append(t.detection, seconds(s.Extra["detection_ns"])), append(t.msync, seconds(s.Extra["msync_ns"]))
	if happened {
		_, others := f.spread(start, f.last())
		t.event, t.eventOthers = append(t.event, took), append(t.eventOthers, others)
		return nil
	}
	first, last := f.spread(start)
	t.took, t.first, t.last = append(t.took, took), append(t.first, first), append(t.last, last)
	tx := float64(w1.SourceTx.Bytes - w0.SourceTx.Bytes)
	busiest, others := tx, 0.0
	for i := range s1 {
		b := float64(s1[i] - s0[i])
		busiest, others = max(busiest, b), others+b
	}
	t.tx, t.rx = append(t.tx, tx), append(t.rx, float64(w1.DestinationTx.Bytes-w0.DestinationTx.Bytes))
	t.busiest, t.others = append(t.busiest, busiest), append(t.others, others)
	return nil
}

// record writes the medians over the rounds.
func (t *syncTimes) record(v map[string]float64) {
	v["total_time"], v["round_tx_bytes"], v["round_rx_bytes"] = median(t.took), median(t.tx), median(t.rx)
	v["first_equal_time"], v["last_equal_time"] = median(t.first), median(t.last)
	v["round_tx_bytes_max"], v["round_tx_bytes_others"] = median(t.busiest), median(t.others)
	if len(t.event) > 0 {
		v["event_round_time"], v["event_others_time"] = slices.Max(t.event), slices.Max(t.eventOthers)
	}
}

// pulses measures staleness at the last destination, and what polling costs.
func (f *fan) pulses(ctx context.Context, interval time.Duration) error {
	v, at := f.out.Values, f.all[0]
	for _, d := range f.all {
		if d.open {
			at = d
		}
	}
	before, err := f.counters(ctx)
	if err != nil {
		return err
	}
	if err := f.poll(ctx, true); err != nil {
		return err
	}
	var wrote, saw role.Times
	var g errgroup.Group
	start := monotonic()
	g.Go(func() error { _, err := f.writer.Ask(ctx, "pulse", struct{}{}, &wrote); return err })
	g.Go(func() error {
		patience := f.cell.Budget + 20*interval + 20*f.cell.Link.RTT + 5*time.Second
		_, err := at.workload.Ask(ctx, "watch", map[string]time.Duration{"patience": patience}, &saw)
		return err
	})
	if err := g.Wait(); err != nil {
		return err
	}
	length := seconds(monotonic() - start)
	f.measured(start, monotonic())
	after, err := f.counters(ctx)
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
