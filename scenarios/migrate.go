package scenarios

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"memsync/scenarios/role"
	"memsync/strategies"
)

// OpMigrate: an application that writes at the source goes on at the destination.
const OpMigrate = "migrate"

// warmUp is how long the application runs at the source before anything else happens.
const warmUp = 500 * time.Millisecond

// measureMigrate is one run of op migrate. A strategy that migrates (strategies.Migrator) takes
// the region over; one that only writes is closed and reopened: the
// application stops, then the destination mounts, then it starts there.
// docs/role-protocol.md has the sequence.
func (r *run) measureMigrate(ctx context.Context, setup role.Setup) error {
	c, v := r.cell, r.out.Values
	if r.link == nil {
		return usage("op migrate needs a link: a transport other than local")
	}
	migrates := c.strategy.Info().Can(strategies.Migrates)
	setup.Migrate = migrates
	work := role.AppWork{Size: c.Size, Content: setup.Backend.Content, Input: setup.Backend.Input,
		Rate: c.params.Size("dirty_rate"), Writer: c.params.Text("writer")}
	place, err := ParsePlacement(c.CPUs)
	if err != nil {
		return err
	}
	if r.writer, err = role.Start(ctx, role.Workload, place[role.Workload], r.link.Source()); err != nil {
		return err
	}

	// Before any clock.
	var g errgroup.Group
	for _, p := range []*role.Process{r.writer, r.workload} {
		g.Go(func() error { _, err := p.Ask(ctx, "app", work, nil); return err })
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
	if migrates {
		if err := r.handHooks(ctx, r.writer, r.source, "control", nil); err != nil {
			return err
		}
	}
	if err := r.armWriter(ctx, a, files); err != nil {
		return err
	}
	var at role.Listening
	if _, err := r.source.Ask(ctx, "listen", map[string]string{"addr": r.link.Source().Addr().String()}, &at); err != nil {
		return err
	}
	if err := r.floorTCP(ctx, at.Yard); err != nil {
		return err
	}
	if err := r.touchMemory(); err != nil {
		return err
	}
	if _, err := r.writer.Ask(ctx, "app-start", struct{}{}, nil); err != nil {
		return err
	}
	if err := pause(ctx, warmUp); err != nil {
		return err
	}
	if err := r.settle(ctx); err != nil {
		return err
	}
	begin, err := r.link.Counters()
	if err != nil {
		return err
	}
	before, err := r.counters(ctx)
	if err != nil {
		return err
	}

	m := &migrated{run: r, setup: setup, addr: at.Region, command: monotonic()}
	if migrates {
		err = m.takeOver(ctx)
	} else {
		err = m.reopen(ctx)
	}
	if err != nil {
		return r.trouble(ctx, err)
	}
	if err := m.settle(ctx, c.params.Duration("settle")); err != nil {
		return r.trouble(ctx, err)
	}
	after, err := r.counters(ctx)
	if err != nil {
		return err
	}
	r.spent(before, after)
	r.measured(m.command, monotonic())

	// The clock stands still from here.
	if _, err := r.workload.Ask(ctx, "app-suspend", struct{}{}, &m.there); err != nil {
		return err
	}
	if m.there.Err != "" {
		return r.trouble(ctx, fmt.Errorf("the application at the destination: %s", m.there.Err))
	}
	if err := m.judge(); err != nil {
		return err
	}
	if _, err := r.workload.Ask(ctx, "app-equal", map[string]uint64{"seq": m.there.Seq}, nil); err != nil {
		return r.trouble(ctx, err)
	}
	r.out.Verified = true
	var s strategies.Stats
	if _, err := r.daemon.Ask(ctx, "stats", struct{}{}, &s); err != nil {
		return err
	}
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
	wired(v, begin, end)
	_, err = r.source.Ask(ctx, "close", struct{}{}, nil)
	return err
}

// pause waits, or returns why it could not.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// trouble adds what the daemon knows of an error.
func (r *run) trouble(ctx context.Context, err error) error {
	var why role.Trouble
	if _, askErr := r.daemon.Ask(ctx, "trouble", struct{}{}, &why); askErr == nil && why.Text != "" {
		return fmt.Errorf("%w; the daemon says: %s", err, why.Text)
	}
	return err
}

// handHooks lets one process control the application of another.
func (r *run) handHooks(ctx context.Context, app, to *role.Process, op string, reply any) error {
	hook, err := app.Ask(ctx, "app-hooks", struct{}{}, nil)
	if err != nil {
		return err
	}
	defer closeFiles(hook)
	if _, err := app.Ask(ctx, "handed-over", struct{}{}, nil); err != nil {
		return err
	}
	_, err = to.Ask(ctx, op, struct{}{}, reply, hook...)
	return err
}

// migrated is a run of op migrate under way.
type migrated struct {
	*run
	setup   role.Setup
	addr    string // of the region at the source
	command int64  // when it was told to begin
	here    role.AppReport
	there   role.AppReport
	h       strategies.Handover
	stopped int64 // close and reopen: the application has stopped
	flushed int64
	owned   int64
	total   int64
}

// mount mounts at the destination and attaches the workload.
func (m *migrated) mount(ctx context.Context) error {
	var mounted role.Mounted
	files, err := m.daemon.Ask(ctx, "mount", role.MountArgs{Setup: m.setup, Source: m.addr}, &mounted)
	if err != nil {
		return err
	}
	usable, err := attachTo(ctx, m.daemon, m.workload, mounted, files)
	if err != nil {
		return err
	}
	m.out.Values["open_latency"] = seconds(usable - mounted.Start)
	return nil
}

// takeOver lets the strategy migrate.
func (m *migrated) takeOver(ctx context.Context) error {
	if err := m.mount(ctx); err != nil {
		return err
	}
	return m.handHooks(ctx, m.workload, m.daemon, "finalize", &m.h)
}

// reopen stops the application, mounts, and starts it.
func (m *migrated) reopen(ctx context.Context) error {
	if _, err := m.writer.Ask(ctx, "app-suspend", struct{}{}, &m.here); err != nil {
		return err
	}
	m.stopped = monotonic()
	if _, err := m.writer.Ask(ctx, "app-flush", struct{}{}, nil); err != nil {
		return err
	}
	m.flushed = monotonic()
	if err := m.mount(ctx); err != nil {
		return err
	}
	m.owned = monotonic()
	_, err := m.workload.Ask(ctx, "app-resume", struct{}{}, nil)
	return err
}

// settle lets the application run at the destination until the source may exit, and for the given time.
func (m *migrated) settle(ctx context.Context, d time.Duration) error {
	until := time.Now().Add(d)
	if m.setup.Migrate {
		if _, err := m.daemon.Ask(ctx, "complete", struct{}{}, &m.h); err != nil {
			return err
		}
		m.total = monotonic()
		if _, err := m.source.Ask(ctx, "released", struct{}{}, nil); err != nil {
			return err
		}
		if _, err := m.writer.Ask(ctx, "app-suspend", struct{}{}, &m.here); err != nil {
			return err
		}
	}
	return pause(ctx, time.Until(until))
}

// judge turns what happened into metrics.
func (m *migrated) judge() error {
	v, c, h := m.out.Values, m.cell, m.h
	if m.here.Err != "" {
		return fmt.Errorf("the application at the source: %s", m.here.Err)
	}
	if m.there.First == 0 {
		return fmt.Errorf("the application did not write at the destination within settle=%v", c.params.Duration("settle"))
	}
	if m.setup.Migrate {
		m.stopped, m.flushed, m.owned = h.Stopped, h.Flushed, h.Owned
	} else {
		m.total = m.there.First
	}
	if first := m.there.Seq - uint64(m.there.Writes); first != m.here.Seq {
		return fmt.Errorf("the application went on after write %d at the destination, the last at the source was %d", first, m.here.Seq)
	}
	last := m.here.Last
	if last == 0 {
		last = m.stopped // it did not write
	}
	v["downtime"] = seconds(m.there.First - last)
	v["standstill"] = seconds(m.there.First - m.stopped)
	v["downtime_suspend"] = seconds(m.stopped - last)
	v["downtime_flush"] = seconds(m.flushed - m.stopped)
	v["downtime_handover"] = seconds(m.owned - m.flushed)
	v["downtime_pull"] = seconds(m.there.First - m.owned)
	v["total_time"] = seconds(m.total - m.command)
	v["blocktime"], v["blocktime_max"] = seconds(m.there.Wait), seconds(m.there.MaxWait)
	v["writes"] = float64(m.there.Seq)
	if m.here.Writes > 0 && m.here.Due > 0 {
		v["writer_slowdown"] = float64(m.here.Due) / float64(m.here.Writes)
	}
	if at, ok := recovery(m.here, m.there); ok {
		v["time_to_90"] = at
	}
	if !m.setup.Migrate {
		return nil
	}
	v["final_bytes"], v["needed_bytes"], v["dirtied_bytes"] = float64(h.FinalBytes), float64(h.NeededBytes), float64(h.DirtiedBytes)
	if h.Promised > 0 {
		v["downtime_foreseen"] = seconds(h.Promised)
	}
	v["postponed"], v["throttle_rate"] = seconds(h.Postponed), float64(h.Throttled)
	v["downtime_unmet"] = 0
	if h.Unmet != "" {
		v["downtime_unmet"] = 1
		m.logf("%s", h.Unmet)
	}
	for _, share := range []int64{25, 50, 75, 90, 100} {
		for _, p := range h.Local {
			if p.Bytes >= c.Size*share/100 {
				v[fmt.Sprintf("local_%d", share)] = seconds(p.At - m.command)
				break
			}
		}
	}
	if h.BulkTime > 0 {
		rate := float64(h.BulkBytes) / seconds(h.BulkTime)
		v["throughput"] = rate
		if f, ok := v["floor_tcp"]; ok && f > 0 {
			v["link_utilisation"] = rate / f
		}
		if c.Link.Rate > 0 {
			v["rate_utilisation"] = rate * 8 / float64(c.Link.Rate)
		}
	}
	return nil
}

// recovery is when, after it was started at the destination, the application has 90 % of
// the writes that it made in the second before it stopped, over 100 ms.
func recovery(here, there role.AppReport) (float64, bool) {
	const window, second = 10, 100 // bins
	sum := func(bins []int32) (n int64) {
		for _, b := range bins {
			n += int64(b)
		}
		return n
	}
	whole := here.Bins[:max(len(here.Bins)-1, 0)] // the last is not over
	if len(whole) < window {
		return 0, false
	}
	whole = whole[max(0, len(whole)-second):]
	per := float64(sum(whole)) / float64(len(whole)) * window
	if per < 1 {
		return 0, false
	}
	for i := 0; i+window <= len(there.Bins); i++ {
		if float64(sum(there.Bins[i:i+window])) >= 0.9*per {
			return float64(i) * 0.01, true
		}
	}
	return 0, false
}
