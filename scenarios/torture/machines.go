package torture

import (
	"container/heap"
	"math/rand/v2"
	"time"

	"memsync/strategies/migration/handover"
)

// The level Machines: the source's and two destinations' state machines, each
// with a driver that keeps what must be durable, two applications, and a network that loses,
// doubles and reorders what they say. All processes may be killed at any moment. The
// clock is virtual; delays are up to minutes. The tests of package handover
// explore all short schedules; these are long ones.

// parties are what a schedule is about.
type parties struct {
	r      *rand.Rand
	trace  func(string, ...any)
	now    time.Duration
	queue  events
	events int // so far

	src     handover.Source
	srcKept handover.Kept
	srcDead bool
	runs    bool   // the application at the source
	stops   uint64 // of it that are under way, by epoch; 0 is none

	dst     [2]handover.Destination
	dstKept [2]handover.KeptBy
	dstDead [2]bool
	began   [2]bool // the application there

	healed  bool
	exited  bool // the source is no longer needed
	kills   int64
	dropped int64
	wrong   error
}

// event is something that will happen.
type event struct {
	at time.Duration
	n  int // of events at the same moment, the first comes first
	do func()
}

// events is a heap of them, the next first.
type events []event

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	return e[i].at < e[j].at || e[i].at == e[j].at && e[i].n < e[j].n
}
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)   { *e = append(*e, x.(event)) }
func (e *events) Pop() any {
	last := (*e)[len(*e)-1]
	*e = (*e)[:len(*e)-1]
	return last
}

func (p *parties) after(d time.Duration, do func()) {
	p.events++
	heap.Push(&p.queue, event{p.now + d, p.events, do})
}

// owners counts those who own the region now; applications those that may write.
func (p *parties) check(what string) {
	owners, applications := 0, 0
	if !p.srcKept.Released {
		owners++
	}
	if p.runs {
		applications++
	}
	for i := range p.dst {
		if p.began[i] {
			owners++
			applications++
		}
	}
	switch {
	case p.wrong != nil:
	case owners > 1:
		p.wrong = broken(oneOwner, "%d own the region after %s", owners, what)
	case applications > 1:
		p.wrong = broken(oneOwner, "%d applications run after %s", applications, what)
	case p.exited && !p.began[0] && !p.began[1]:
		p.wrong = broken(oneOwner, "the source has gone, and no application began anywhere, after %s", what)
	}
}

const oneOwner = "there is exactly one owner"

// act does what the source's driver does after a step: what must be kept, then the action.
func (p *parties) act(s handover.Source, a handover.Action) {
	p.src, p.srcKept = s, s.Kept()
	switch a {
	case handover.Suspend:
		epoch := s.Epoch
		p.stops = epoch
		p.after(p.some(), func() {
			if p.srcDead || p.stops != epoch {
				return
			}
			p.stops = 0
			if !p.healed && p.r.IntN(6) == 0 {
				p.act(p.src.Refuse(epoch))
				return
			}
			p.runs = false
			p.act(p.src.Stopped(epoch), handover.Nothing)
		})
	case handover.Resume:
		p.stops, p.runs = 0, true
	case handover.Exit:
		p.exited = true
	}
	p.check("a step of the source to " + s.Phase.String())
}

// put sets a destination's state: what must be kept first, then the rest.
func (p *parties) put(i int, d handover.Destination) {
	was := p.dst[i].Stage
	p.dst[i], p.dstKept[i] = d, d.Kept()
	if d.Stage == handover.Owning && was != handover.Owning {
		p.trace("%12v destination %d owns the region, epoch %d", p.now, i+1, d.Epoch)
		p.began[i] = true
	}
	p.check("a step of a destination")
}

// some is how long something takes: mostly little, now and then very long.
func (p *parties) some() time.Duration {
	ms := []int64{20, 500, 60000}[p.r.IntN(3)]
	if p.healed {
		ms = 20
	}
	return time.Duration(1+p.r.Int64N(ms)) * time.Millisecond
}

// send lets the network do with a message what it will.
func (p *parties) send(deliver func()) {
	copies := 1
	if !p.healed {
		copies = []int{0, 1, 1, 1, 2, 3}[p.r.IntN(6)]
	}
	if copies == 0 {
		p.dropped++
	}
	for range copies {
		p.after(p.some(), deliver)
	}
}

// ask has a destination say what it wants, again and again.
func (p *parties) ask(i int) {
	d := p.dst[i]
	if !p.dstDead[i] {
		if d.Stage == handover.Filling || d.Stage == handover.Owning {
			if p.healed || p.r.IntN(3) == 0 {
				p.put(i, d.Complete())
			}
		}
		if p.healed || p.r.IntN(3) == 0 {
			p.put(i, p.dst[i].Decide())
		}
		if !p.healed && p.r.IntN(60) == 0 {
			p.put(i, p.dst[i].GiveUp())
		}
		if want, ok := p.dst[i].Want(); ok {
			p.send(func() { p.source(i, want) })
		}
	}
	p.after(p.some(), func() { p.ask(i) })
}

// source has the source get a request.
func (p *parties) source(i int, q handover.Request) {
	if p.srcDead || p.exited {
		return
	}
	p.act(p.src.Handle(q))
	if a, ok := p.src.Answer(q); ok {
		p.send(func() {
			if !p.dstDead[i] {
				p.put(i, p.dst[i].Handle(a))
			}
		})
	}
}

// trouble makes something go wrong now and then.
func (p *parties) trouble() {
	if p.healed {
		return
	}
	i := p.r.IntN(2)
	switch p.r.IntN(6) {
	case 0:
		if !p.srcDead && !p.exited {
			p.kills++
			p.trace("%12v the source is killed in phase %v, epoch %d", p.now, p.src.Phase, p.src.Epoch)
			p.srcDead, p.stops = true, 0
			p.after(p.some(), p.restartSource)
		}
	case 1, 2:
		if !p.dstDead[i] && !p.began[i] && p.dst[i].Stage != handover.Aborted {
			p.kills++
			p.trace("%12v destination %d is killed, epoch %d", p.now, i+1, p.dst[i].Epoch)
			p.dstDead[i] = true
			p.after(p.some(), func() { p.restartDestination(i) })
		}
	case 3:
		if !p.srcDead && !p.exited {
			p.act(p.src.Expire(p.src.Epoch))
		}
	case 4:
		if !p.srcDead && !p.exited {
			p.act(p.src.Forget())
		}
	}
	p.after(p.some(), p.trouble)
}

// patience is how long a source that has stopped its application, or is about to, waits for
// the next request before its driver takes it back.
const patience = time.Minute

// timer is the source's: it runs whether anything is at fault or not.
func (p *parties) timer(phase handover.Phase, epoch uint64) {
	if s := p.src; !p.srcDead && !p.exited && s.Phase == phase && s.Epoch == epoch && (phase == handover.Suspending || phase == handover.Suspended) {
		p.act(s.Expire(epoch))
	}
	phase, epoch = p.src.Phase, p.src.Epoch
	p.after(patience, func() { p.timer(phase, epoch) })
}

func (p *parties) restartSource() {
	if !p.srcDead {
		return
	}
	p.srcDead = false
	p.act(handover.Restart(p.srcKept))
}

func (p *parties) restartDestination(i int) {
	if !p.dstDead[i] {
		return
	}
	p.dstDead[i] = false
	again, _ := p.dst[i].Again(p.dstKept[i])
	p.put(i, again)
}

// run lets events happen until a moment.
func (p *parties) run(until time.Duration) {
	for p.wrong == nil && len(p.queue) > 0 {
		if p.queue[0].at > until {
			break
		}
		e := heap.Pop(&p.queue).(event)
		p.now = e.at
		e.do()
	}
	p.now = until
}

// machines runs a schedule.
func machines(seed uint64, c *Counts, trace func(string, ...any)) error {
	r := rand.New(rand.NewPCG(seed, 2))
	p := &parties{r: r, trace: trace, src: handover.NewSource(), runs: true}
	p.srcKept = p.src.Kept()
	strict := r.IntN(2) == 0
	for i := range p.dst {
		p.dst[i] = handover.Destination{ID: handover.ID(i + 1), Strict: strict}
	}
	n := 1 + r.IntN(2)
	for i := range n {
		p.ask(i)
	}
	p.after(p.some(), p.trouble)
	p.timer(p.src.Phase, p.src.Epoch)
	p.run(time.Duration(5+r.IntN(40)) * time.Minute)
	p.healed = true
	p.trace("%12v all faults end; the source is %v, epoch %d", p.now, p.src.Phase, p.src.Epoch)
	p.restartSource()
	for i := range n {
		p.restartDestination(i)
	}
	p.run(p.now + 10*time.Minute)
	c.Scheduled, c.Kills, c.Faults = p.now, p.kills, p.kills+p.dropped
	if p.wrong != nil {
		return p.wrong
	}
	// Somebody must have the region, and an application run.
	if !p.runs && !p.began[0] && !p.began[1] {
		return broken(oneOwner, "no application runs anywhere ten minutes after the last fault; the source is %v, epoch %d", p.src.Phase, p.src.Epoch)
	}
	return nil
}
