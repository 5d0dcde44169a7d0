package handover

import (
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"

	"memsync/strategies/replay"
)

// The model: one source, one destination with the identity 1 and perhaps a second one
// (identity 2), the two applications, and a network that never forgets. A message that
// was sent once may be delivered at any time, any number of times, or never: that
// is loss, doubling, delay and reordering at once. Every process may be killed at every step and comes back
// with what it had made durable.
const (
	maxEpoch = 3  // explored: two hand-overs that fail, and one more
	epochs   = 64 // that healing may add
	stores   = 2  // of the application, to see that none is lost
)

// world is one state. It is comparable.
type world struct {
	src     Source
	srcKept Kept
	srcDead bool
	dst     [2]Destination
	kept    [2]KeptBy
	dstDead [2]bool
	kills   uint8  // that are left
	limit   uint64 // of epochs
	flaw    string // that the protocol is given

	appRuns  bool  // at the source
	stopping bool  // the application was told to stop, and has not yet
	wrote    uint8 // its stores
	stops    [epochs]uint8
	watched  bool                      // the source tracks
	snap     [epochs]int8              // what Finalize of an epoch returned; -1 none
	local    [2]bool                   // every byte is there
	died     [2]bool                   // it was killed once
	started  [2]int8                   // the value that the application at the destination began with; -1: it did not
	gone     bool                      // the source has exited
	requests [2]uint64                 // sent: bit verb*8+epoch
	replies  [2][lastResult + 1]uint64 // sent: [result], bit by request and epoch
}

func begin(kills uint8, strict bool, two bool) world {
	w := world{src: NewSource(), appRuns: true, kills: kills}
	w.srcKept = w.src.Kept()
	for i := range w.dst {
		w.dst[i] = Destination{ID: ID(i + 1), Strict: strict}
		w.started[i] = -1
		w.dstDead[i] = i == 1 && !two
	}
	if !two {
		w.dst[1].Stage = Aborted
	}
	for i := range w.snap {
		w.snap[i] = -1
	}
	return w
}

func bit(r Request) uint64 { return 1 << (uint64(r.Verb)*5 + r.Epoch) }

// step is a transition with its name.
type step struct {
	name  string
	fault bool // it leads away from a hand-over
	next  world
}

// act does what the source's driver does after a step.
func (w *world) act(s Source, a Action) {
	w.src = s
	w.srcKept = s.Kept() // durable first
	switch a {
	case Watch:
		w.watched = true
	case Unwatch:
		w.watched = false
	case Suspend:
		w.stopping = true
		w.stops[s.Epoch]++
	case Resume:
		w.stopping, w.appRuns = false, true
	case Exit:
		w.gone = true
	}
}

// put sets the destination's state as its driver does: durable, then the rest.
func (w *world) put(i int, d Destination) {
	if d.Stage == Committing && w.dst[i].Stage == Finalizing && w.flaw == "starts at the answer of finalize" {
		w.started[i] = w.snap[d.Epoch]
	}
	if d.Stage == Owning && w.dst[i].Stage != Owning {
		w.kept[i] = d.Kept()
		w.dst[i] = d
		w.started[i] = w.snap[d.Epoch]
		return
	}
	w.kept[i], w.dst[i] = d.Kept(), d
}

// steps lists all that can happen next.
func (w world) steps() (out []step) {
	fault := false
	add := func(name string, f func(*world)) {
		n := w
		f(&n)
		if n.src.Epoch <= w.limit && n != w {
			out = append(out, step{name, fault, n})
		}
	}
	// The application at the source.
	if w.appRuns && w.wrote < stores {
		add("the application stores", func(n *world) { n.wrote++ })
	}
	if w.stopping && !w.srcDead {
		add("the application stops", func(n *world) {
			n.stopping, n.appRuns = false, false
			n.act(n.src.Stopped(n.src.Epoch), Nothing)
			if n.src.Phase == Suspended {
				n.snap[n.src.Epoch] = int8(n.wrote)
			}
		})
		fault = true
		add("the application refuses to stop", func(n *world) { n.act(n.src.Refuse(n.src.Epoch)) })
	}
	fault = true
	if !w.srcDead && !w.gone {
		add("time passes at the source", func(n *world) {
			if n.flaw == "goes on after released" && n.src.Phase == Released {
				n.act(n.src.back(Tracking))
			}
			if n.flaw == "stops twice" && n.src.Phase == Suspended {
				n.src.Phase = Tracking
			}
			n.act(n.src.Expire(n.src.Epoch))
		})
		add("the source forgets the destination", func(n *world) { n.act(n.src.Forget()) })
	}
	if w.kills > 0 && !w.srcDead && !w.gone {
		add("kill the source", func(n *world) { n.srcDead, n.stopping, n.watched = true, false, false; n.kills-- })
	}
	fault = false
	if w.srcDead {
		add("restart the source", func(n *world) { n.srcDead = false; n.act(Restart(n.srcKept)) })
	}
	for i := range w.dst {
		d, name := w.dst[i], fmt.Sprintf("destination %d ", i+1)
		if w.dstDead[i] {
			if w.kept[i].Started || d.Stage == Aborted {
				continue // the application's own crash, or nothing to come back for
			}
			add("restart "+name, func(n *world) {
				n.dstDead[i] = false
				again, _ := d.Again(n.kept[i])
				n.dst[i] = again
			})
			continue
		}
		fault = true
		if w.kills > 0 && d.Stage != Aborted && d.Stage != Finished {
			add("kill "+name, func(n *world) { n.dstDead[i], n.died[i], n.local[i] = true, true, false; n.kills-- })
		}
		add(name+"gives up", func(n *world) { n.put(i, d.GiveUp()) })
		fault = false
		add(name+"decides", func(n *world) { n.put(i, d.Decide()) })
		if !w.gone && (d.Stage == Filling || d.Stage == Owning) {
			add(name+"has all", func(n *world) { n.local[i] = true; n.put(i, d.Complete()) })
		}
		if r, ok := d.Want(); ok {
			add(name+"sends "+r.Verb.String(), func(n *world) { n.requests[i] |= bit(r) })
		}
		// The network delivers.
		for v := Track; v <= Done; v++ {
			for e := range uint64(maxEpoch + 1) {
				r := Request{v, d.ID, e}
				if w.requests[i]&bit(r) != 0 && !w.srcDead && !w.gone {
					add(fmt.Sprintf("the source gets %v(%d) of %s", v, e, name), func(n *world) {
						n.act(n.src.Handle(r))
						if a, ok := n.src.Answer(r); ok {
							n.reply(i, a)
						}
					})
				}
				for res := OK; res <= lastResult; res++ {
					for se := uint64(1); se <= maxEpoch; se++ {
						if w.replies[i][res]&replyBit(r, se) != 0 {
							add(fmt.Sprintf("%sgets %v(%d): %v, epoch %d", name, v, e, res, se), func(n *world) {
								n.put(i, d.Handle(Reply{r, res, se}))
							})
						}
					}
				}
			}
		}
	}
	return out
}

// What a destination does with a reply depends on the epoch only for Track.
func replyBit(r Request, epoch uint64) uint64 {
	if r.Verb == Track {
		return 1 << epoch
	}
	if epoch != 1 {
		return 0
	}
	return 1 << (5 + uint64(r.Verb)*5 + r.Epoch)
}

func (w *world) reply(i int, a Reply) {
	if a.Request.Verb != Track {
		a.Epoch = 1
	}
	w.replies[i][a.Result] |= replyBit(a.Request, a.Epoch)
}

// wrong returns what must never be so, or "".
func (w world) wrong() string {
	owners := 0
	if w.src.Phase.Owns() {
		owners++
	}
	running := 0
	if w.appRuns {
		running++
	}
	for i, d := range w.dst {
		if w.started[i] >= 0 {
			running++
			if owners++; w.started[i] != int8(w.wrote) {
				return fmt.Sprintf("destination %d began with %d stores, the application made %d", i+1, w.started[i], w.wrote)
			}
		}
		if d.Owns() && w.started[i] < 0 {
			return fmt.Sprintf("destination %d took over what it has no snapshot of", i+1)
		}
		if d.Strict && w.started[i] >= 0 && !w.local[i] && !w.died[i] {
			return "it began without every byte"
		}
	}
	for e, n := range w.stops {
		if n > 1 {
			return fmt.Sprintf("the application was stopped %d times in epoch %d", n, e)
		}
	}
	switch {
	case running > 1:
		return "two applications run"
	case owners > 1:
		return "two owners"
	case !w.src.Phase.Owns() && w.appRuns:
		return "the application runs at a source that handed the region over"
	case w.gone && running == 0:
		return "the source is gone and nobody runs"
	}
	return ""
}

// heal lets the link and all processes work from here on, and returns a
// world in which nothing is left to do.
func (w world) heal() (world, string) {
	w.kills = 0
	for range 200 {
		was := w
		if w.srcDead {
			w.srcDead = false
			w.act(Restart(w.srcKept))
		}
		if w.stopping {
			w.stopping, w.appRuns = false, false
			w.act(w.src.Stopped(w.src.Epoch), Nothing)
			w.snap[w.src.Epoch] = int8(w.wrote)
		}
		active := false
		for i := range w.dst {
			if w.dstDead[i] && !w.kept[i].Started && w.dst[i].Stage != Aborted {
				w.dstDead[i] = false
				w.dst[i], _ = w.dst[i].Again(w.kept[i])
			}
			if w.dstDead[i] {
				continue
			}
			w.put(i, w.dst[i].Decide())
			if s := w.dst[i].Stage; s == Filling || s == Owning {
				w.local[i] = true
				w.put(i, w.dst[i].Complete())
			}
			r, ok := w.dst[i].Want()
			if !ok {
				continue
			}
			active = true
			if w.gone { // an exited source answers nobody; Finishing has had its answer lost, and needs none
				if w.dst[i].Stage == Finishing {
					w.put(i, w.dst[i].Handle(Reply{r, OK, r.Epoch}))
				} else {
					d := w.dst[i]
					d.Stage = Aborted
					w.put(i, d)
				}
				continue
			}
			w.act(w.src.Handle(r))
			if a, ok := w.src.Answer(r); ok {
				w.put(i, w.dst[i].Handle(a))
			}
		}
		if why := w.wrong(); why != "" {
			return w, why
		}
		if !active {
			if w.src.Phase == Suspended || w.src.Phase == Suspending {
				w.act(w.src.Expire(w.src.Epoch))
			} else if w == was {
				break
			}
		}
	}
	running := 0
	if w.appRuns {
		running++
	}
	for i := range w.started {
		if w.started[i] >= 0 {
			running++
		}
	}
	if running != 1 {
		return w, fmt.Sprintf("the link has healed and %d applications run", running)
	}
	return w, ""
}

func describe(w world) string {
	return fmt.Sprintf("source %v epoch %d with %d (dead %t, gone %t), application runs %t; destinations %v/%d/started %d and %v/%d/started %d", w.src.Phase, w.src.Epoch, w.src.With,
		w.srcDead, w.gone, w.appRuns, w.dst[0].Stage, w.dst[0].Epoch, w.started[0], w.dst[1].Stage, w.dst[1].Epoch, w.started[1])
}

// explore visits all worlds that can come of w, and heals each.
func explore(w world, limit int) (states, transitions, over int, wrong string) {
	seed := maphash.MakeSeed()
	seen := map[uint64]bool{maphash.Comparable(seed, w): true}
	queue := []world{w}
	for len(queue) > 0 {
		w, queue = queue[len(queue)-1], queue[:len(queue)-1]
		if states++; states > limit {
			return states, transitions, over, fmt.Sprintf("more than %d states", limit)
		}
		if w.started[0] >= 0 || w.started[1] >= 0 {
			over++
		}
		for _, s := range w.steps() {
			transitions++
			if why := s.next.wrong(); why != "" {
				return states, transitions, over, fmt.Sprintf("after %q: %s\nfrom %s\nto   %s", s.name, why, describe(w), describe(s.next))
			}
			if h := maphash.Comparable(seed, s.next); !seen[h] {
				seen[h] = true
				queue = append(queue, s.next)
			}
		}
		if end, why := w.heal(); why != "" {
			return states, transitions, over, fmt.Sprintf("%s\nfrom %s\nto   %s", why, describe(w), describe(end))
		}
	}
	return states, transitions, over, ""
}

// TestExhaustive visits every state of a few small configurations. HANDOVER_ALL=1
// visits larger ones (minutes, and gigabytes).
func TestExhaustive(t *testing.T) {
	type config struct {
		kills       uint8
		strict, two bool
		epochs      uint64
	}
	configs := []config{{0, false, false, 3}, {0, true, false, 3}, {1, false, false, 2}, {1, true, false, 2}, {0, false, true, 1}}
	if os.Getenv("HANDOVER_ALL") != "" {
		configs = append(configs, config{1, false, false, 3}, config{2, false, false, 2}, config{2, true, false, 2}, config{1, false, true, 1}, config{0, false, true, 2})
	}
	for _, c := range configs {
		t.Run(fmt.Sprintf("kills=%d,strict=%t,two=%t,epochs=%d", c.kills, c.strict, c.two, c.epochs), func(t *testing.T) {
			w := begin(c.kills, c.strict, c.two)
			w.limit = c.epochs
			states, transitions, over, wrong := explore(w, 20_000_000)
			if wrong != "" {
				t.Fatal(wrong)
			}
			t.Logf("%d states, %d of them after a hand-over, %d transitions, each state healed", states, over, transitions)
			if over == 0 {
				t.Error("no hand-over was reached")
			}
		})
	}
}

// TestFinds: the model finds what is wrong with protocols that differ in one place.
func TestFinds(t *testing.T) {
	for _, flaw := range []string{"starts at the answer of finalize", "goes on after released", "stops twice"} {
		w := begin(0, false, false)
		w.limit, w.flaw = 2, flaw
		if _, _, _, wrong := explore(w, 1_000_000); wrong == "" {
			t.Errorf("a protocol that %s passes", flaw)
		} else {
			t.Logf("%s: %s", flaw, strings.SplitN(wrong, "\n", 2)[0])
		}
	}
}

// TestRandom walks at random, further than can be visited. TEST_SEED replays;
// HANDOVER_WALKS sets how many.
func TestRandom(t *testing.T) {
	seed, walks := replay.Seed(t), 2000
	if v := os.Getenv("HANDOVER_WALKS"); v != "" {
		walks, _ = strconv.Atoi(v)
	}
	taken, over := 0, 0
	for i := range walks {
		r := rand.New(rand.NewPCG(seed, uint64(i)))
		w := begin(uint8(r.IntN(4)), r.IntN(2) == 0, r.IntN(2) == 0)
		w.limit = maxEpoch
		var trail []string
		for range 60 {
			steps := w.steps()
			if len(steps) == 0 {
				break
			}
			s := steps[r.IntN(len(steps))]
			if s.fault && r.IntN(12) > 0 {
				continue // else hardly any walk gets far
			}
			trail = append(trail, s.name)
			why := s.next.wrong()
			if why == "" {
				_, why = s.next.heal()
			}
			if why != "" {
				t.Fatalf("walk %d: %s\n%s\n%s", i, why, strings.Join(trail, "\n"), describe(s.next))
			}
			w = s.next
			taken++
		}
		if w.started[0] >= 0 || w.started[1] >= 0 {
			over++
		}
	}
	if over == 0 || over == walks {
		t.Errorf("%d of %d walks handed over: the walks do not mix", over, walks)
	}
	t.Logf("%d walks, %d steps, %d hand-overs", walks, taken, over)
}
