package cli

import (
	"fmt"
	"time"

	"github.com/schollz/progressbar/v3"

	"memsync/results"
	"memsync/scenarios"
)

// progress tells how far a sweep is: a bar with the remaining time on a
// terminal, now and then a plain line elsewhere. It writes to stderr only.
type progress struct {
	s         *state
	what      string
	bar       *progressbar.ProgressBar
	total     time.Duration // estimated
	done      time.Duration // estimated, of the runs that ended
	runs, n   int
	bad       int
	began     time.Time
	lastPlain time.Time
}

func newProgress(s *state, what string) *progress {
	return &progress{s: s, what: what, began: time.Now(), lastPlain: time.Now()}
}

// Plan takes the runs that are to come.
func (p *progress) Plan(items []scenarios.Item) {
	for _, it := range items {
		p.total += it.Cell.Estimate()
	}
	p.runs = len(items)
	if p.s.stderrTTY {
		p.bar = progressbar.NewOptions64(int64(p.total/time.Millisecond),
			progressbar.OptionSetWriter(p.s.stderr), progressbar.OptionSetDescription(p.what),
			progressbar.OptionSetPredictTime(true), progressbar.OptionSetElapsedTime(true),
			progressbar.OptionSetWidth(30), progressbar.OptionClearOnFinish()) // drawn twice a run: a throttle would hold back which one is next
	}
}

// Begin is called before a run.
func (p *progress) Begin(it scenarios.Item) {
	if p.bar != nil {
		c := it.Cell
		p.bar.Describe(fmt.Sprintf("%d/%d %s %s RTT %v", p.n+1, p.runs, c.Figure, c.Strategy, c.Link.RTT))
	}
}

// End is called after a run.
func (p *progress) End(o scenarios.Outcome) {
	p.n++
	p.done += o.Cell.Estimate()
	if o.Status != results.StatusOK && o.Status != results.StatusInterrupted {
		if p.bad++; p.bad <= 5 {
			p.Note("%s %s RTT %v run %d: %s: %v", o.Cell.Figure, o.Cell.Strategy, o.Cell.Link.RTT, o.Run, o.Status, o.Err)
		}
	}
	if p.bar != nil {
		_ = p.bar.Set64(int64(p.done / time.Millisecond))
		return
	}
	if time.Since(p.lastPlain) > 10*time.Second {
		p.lastPlain = time.Now()
		left := time.Duration(float64(time.Since(p.began)) * float64(p.total-p.done) / float64(max(p.done, 1)))
		fmt.Fprintf(p.s.stderr, "%s: %d of %d runs, about %v left\n", p.what, p.n, p.runs, left.Round(time.Second))
	}
}

// Note prints a line above the bar.
func (p *progress) Note(format string, args ...any) {
	if p.bar != nil {
		_ = p.bar.Clear()
	}
	fmt.Fprintf(p.s.stderr, format+"\n", args...)
}

// Close removes the bar.
func (p *progress) Close() {
	if p.bar != nil {
		_ = p.bar.Clear()
	}
	if p.bad > 5 {
		fmt.Fprintf(p.s.stderr, "%d more runs are not ok; see the records\n", p.bad-5)
	}
}
