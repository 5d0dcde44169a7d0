package cli

import (
	"bytes"
	"context"
	"errors"
	"regexp"
	"strings"
	"testing"
	"time"

	"memsync/results"
	"memsync/scenarios"
)

func progressItems(n int) []scenarios.Item {
	var items []scenarios.Item
	for i := range n {
		c := &scenarios.Cell{Figure: "f", Strategy: "direct-mount", Size: 1 << 20, Limit: scenarios.WholeRegion, Budget: 2 * time.Second}
		c.Link.RTT = 20 * time.Millisecond
		items = append(items, scenarios.Item{Cell: c, Run: i + 1})
	}
	return items
}

func outcome(it scenarios.Item, status results.Status, err error) scenarios.Outcome {
	return scenarios.Outcome{Item: it, Status: status, Err: err}
}

// TestProgressTerminal: on a terminal there is a bar with the run under way, the share
// done, and the time it took and still takes.
func TestProgressTerminal(t *testing.T) {
	var out, words bytes.Buffer
	s := &state{ctx: context.Background(), stdout: &out, stderr: &words, stderrTTY: true}
	p := newProgress(s, "run")
	items := progressItems(4)
	p.Plan(items)
	shows := func(want ...string) {
		t.Helper()
		for _, w := range want {
			if !regexp.MustCompile(w).MatchString(words.String()) {
				t.Errorf("the bar does not show %q: %q", w, &words)
			}
		}
		words.Reset()
	}
	p.Begin(items[0])
	shows(`\r`, `1/4 f direct-mount RTT 20ms`, ` 0%`)
	p.End(outcome(items[0], results.StatusOK, nil))
	words.Reset()
	p.Begin(items[1])
	shows(`2/4 f direct-mount RTT 20ms`, ` 2[45]%`, `\[[\dhms]+:[\dhms]+\]`)
	p.End(outcome(items[1], results.StatusOK, nil))
	words.Reset()
	// The second half takes as long as the first did: so the remaining time grows while
	// this test waits.
	left := regexp.MustCompile(`\[(\d+m)?\d+s:(\d+m)?[1-9]\d*s\]`)
	for end := time.Now().Add(30 * time.Second); !left.Match(words.Bytes()); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no remaining time after 30 s: %q", &words)
		}
		words.Reset()
		p.Begin(items[2])
	}
	shows(`3/4 f direct-mount RTT 20ms`, ` (49|50)%`)
	p.End(outcome(items[2], results.StatusOK, nil))
	words.Reset()
	p.Begin(items[3])
	shows(`4/4 f direct-mount RTT 20ms`, ` 7[45]%`)
	words.Reset()
	p.Note("calibrating the link")
	if got := words.String(); !strings.HasSuffix(got, "calibrating the link\n") {
		t.Errorf("a note: %q", got)
	}
	p.Close()
	if out.Len() > 0 {
		t.Errorf("progress on stdout: %q", &out)
	}
}

// TestProgressPlain: elsewhere there are plain lines, now and then, with the time left.
func TestProgressPlain(t *testing.T) {
	var out, words bytes.Buffer
	s := &state{ctx: context.Background(), stdout: &out, stderr: &words}
	p := newProgress(s, "run")
	items := progressItems(8)
	p.Plan(items)
	p.Begin(items[0])
	p.End(outcome(items[0], results.StatusOK, nil))
	if words.Len() > 0 {
		t.Errorf("a line at once: %q", &words)
	}
	// As if the first two of eight equal runs had taken 30 s.
	p.began, p.lastPlain = p.began.Add(-30*time.Second), p.lastPlain.Add(-30*time.Second)
	p.Begin(items[1])
	p.End(outcome(items[1], results.StatusOK, nil))
	if got := words.String(); !regexp.MustCompile(`^run: 2 of 8 runs, about 1m(29|30|31)s left\n$`).MatchString(got) {
		t.Errorf("after 30 s: %q", got)
	}
	words.Reset()
	// What went wrong is said at once, five times, then counted; what was interrupted is not.
	p.End(outcome(items[2], results.StatusInterrupted, errors.New("interrupted")))
	for _, it := range items[2:] {
		p.End(outcome(it, results.StatusFailed, errors.New("the source is gone")))
	}
	p.End(outcome(items[7], results.StatusUnsupported, errors.New("no device")))
	p.Close()
	got := words.String()
	if n := strings.Count(got, "failed: the source is gone\n"); n != 5 || strings.Contains(got, "interrupted") {
		t.Errorf("%d failures are told: %q", n, got)
	}
	if !strings.HasSuffix(got, "2 more runs are not ok; see the records\n") || strings.ContainsAny(got, "\r\x1b") {
		t.Errorf("at the end: %q", got)
	}
	if out.Len() > 0 {
		t.Errorf("progress on stdout: %q", &out)
	}
}
