package torture

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"memsync/strategies/region"
)

// The levels, and what a program of each is about.
const (
	Virtual   = "virtual"   // in one process, on a clock of its own
	Processes = "processes" // a source, a daemon and a workload, with real links and devices
	Machines  = "machines"  // the two state machines of a hand-over, and nothing else, on a clock of its own
)

// Program is a random program: what is built, and what happens to it, step by
// step. All of it follows from Seed and the Choices, so that a seed replays it.
type Program struct {
	Seed      uint64 `json:"seed"`
	Level     string `json:"level"`
	Strategy  string `json:"strategy"`
	Device    string `json:"device,omitempty"`
	Transport string `json:"transport,omitempty"`
	Backend   string `json:"backend,omitempty"`
	TLS       bool   `json:"tls,omitempty"`
	Size      int64  `json:"size"`  // bytes of the region
	Chunk     int64  `json:"chunk"` // bytes
	Pull      int    `json:"pull_workers"`
	Push      int    `json:"push_workers"`
	// Kept: what was answered outlives the daemon, and not only what was synced.
	Kept     bool `json:"kept,omitempty"`
	ReadOnly bool `json:"read_only,omitempty"`
	// Fragile: it does not come back by itself when its connection was lost.
	Fragile bool `json:"fragile,omitempty"`
	// Hostile: what the link corrupts no TLS finds. Then bytes may be anything, and calls may
	// fail, but each returns, nothing is left over, and nobody dies.
	Hostile  bool     `json:"hostile,omitempty"`
	Settings []string `json:"settings,omitempty"`
	Steps    []Step   `json:"steps"`
}

// The operations.
const (
	opRead   = "read"
	opWrite  = "write"
	opSync   = "sync"
	opJoin   = "join" // wait for the accesses under way
	opWait   = "wait"
	opReopen = "close and open again"
	opCheck  = "compare everything"

	opCut      = "cut the connections"
	opCutAfter = "cut in the middle of a message"
	opStall    = "stall the link"
	opRefuse   = "refuse connections"
	opDelay    = "delay the link"
	opCorrupt  = "corrupt bytes"
	opHeal     = "heal"

	opKillDaemon  = "kill the daemon"
	opKillSource  = "kill the source"
	opPauseSource = "pause the source"
	opPauseDaemon = "pause the daemon"

	opFail = "fail the backend"
)

// Step is one thing that a program does. Accesses go on beside what follows, at most
// three at a time, until a join.
type Step struct {
	Op  string        `json:"op"`
	Off int64         `json:"off,omitempty"`
	N   int64         `json:"n,omitempty"` // bytes; of fail: requests
	For time.Duration `json:"for,omitempty"`
	Way int           `json:"way,omitempty"` // 0: towards the source, 1: from it
	How string        `json:"how,omitempty"` // of fail: which requests, and what becomes of them
	Err string        `json:"error,omitempty"`
}

// String says it in a line.
func (s Step) String() string {
	var b strings.Builder
	b.WriteString(s.Op)
	switch s.Op {
	case opRead, opWrite:
		fmt.Fprintf(&b, " [%d, +%d)", s.Off, s.N)
	case opCutAfter:
		fmt.Fprintf(&b, " after %d bytes, %s; the source learns of it %v later", s.N, [...]string{"to the source", "from the source"}[s.Way], s.For)
	case opCut:
		fmt.Fprintf(&b, "; the source learns of it %v later", s.For)
	case opCorrupt:
		fmt.Fprintf(&b, " of %d pieces %s", s.N, [...]string{"to the source", "from the source"}[s.Way])
	case opFail:
		fmt.Fprintf(&b, ": %d requests to %s: %s", s.N, s.How, s.Err)
	default:
		if s.For > 0 {
			fmt.Fprintf(&b, " for %v", s.For)
		}
	}
	return b.String()
}

// fault reports whether requests may fail because of the step.
func (s Step) fault() bool {
	return !slices.Contains([]string{opRead, opWrite, opSync, opJoin, opWait, opReopen, opCheck, opDelay, opHeal}, s.Op)
}

// Choices are what a program may be drawn from.
type Choices struct {
	Level      string
	Transports []string // with level Virtual, all that need no socket
	Strategies []string
	Backends   []string
	Combos     []Combo // with level Processes, what works here
	Hostile    bool    // the link corrupts bytes, without TLS
}

// Combo is a strategy on a device, over a transport, from a backend.
type Combo struct{ Strategy, Device, Transport, Backend string }

// String names it.
func (c Combo) String() string {
	return strings.Join([]string{c.Strategy, c.Device, c.Transport, c.Backend}, "/")
}

func pick[T any](r *rand.Rand, from ...T) T { return from[r.IntN(len(from))] }

// Generate makes the program of a seed.
func Generate(seed uint64, c Choices) Program {
	r := rand.New(rand.NewPCG(seed, 0x746f7274757265))
	from := rand.New(rand.NewPCG(seed, 0x636f6d626f)) // of its own: a filter changes nothing else
	p := Program{Seed: seed, Level: c.Level, Chunk: 4096 << r.IntN(3)}
	chunks := 1 + r.Int64N(40)
	p.Size = chunks*p.Chunk - pick(r, 0, 0, r.Int64N(p.Chunk))
	p.Pull, p.Push = r.IntN(5), r.IntN(4)
	if c.Level == Processes {
		k := pick(from, c.Combos...)
		p.Strategy, p.Device, p.Transport, p.Backend = k.Strategy, k.Device, k.Transport, k.Backend
	} else {
		p.Strategy, p.Transport, p.Backend = pick(from, c.Strategies...), pick(from, c.Transports...), pick(from, c.Backends...)
	}
	p.TLS = r.IntN(4) == 0 && !c.Hostile
	p.Hostile = c.Hostile
	p.settings(r)
	p.steps(r)
	return p
}

// settings draws the strategy's parameters.
func (p *Program) settings(r *rand.Rand) {
	set := func(format string, a ...any) { p.Settings = append(p.Settings, fmt.Sprintf(format, a...)) }
	if p.Strategy != "managed-mount" && p.Strategy != "direct-mount" {
		return
	}
	p.Kept = p.Strategy == "managed-mount" && p.Device != "uffd" && r.IntN(4) == 0
	// A source that is killed and started again is another one for on_change=fail, and
	// with restart for what a cache kept.
	if p.Kept {
		set("on_change=ignore")
	} else {
		set("on_change=%s", pick(r, "ignore", "restart"))
	}
	set("check_interval=%dms", pick(r, 1000, 60000))
	if p.Strategy == "direct-mount" {
		return
	}
	set("push_interval=%dms", pick(r, 50, 1000, 10000))
	set("extent=%d", p.Chunk<<r.IntN(4))
	set("pull_first=%d", r.Int64N(p.Size+1))
	set("order=%s", pick(r, "linear", "random", "reverse"))
	set("known=%s", pick(r, "none", "holes", "same"))
	set("dirty_limit=%d", pick(r, 0, 2*p.Chunk, 1<<20))
	switch limit := 16 * p.Chunk; {
	case p.Device == "uffd" || p.Kept:
	case r.IntN(3) == 0 && limit < p.Size:
		set("cache=%d", limit)
	case r.IntN(2) == 0:
		set("cache_kind=%s", pick(r, "memory", "memfd", "file"))
	}
}

// steps draws what happens.
func (p *Program) steps(r *rand.Rand) {
	virtual := p.Level == Virtual
	add := func(s Step) { p.Steps = append(p.Steps, s) }
	ms := func(atLeast, below int64) time.Duration {
		return time.Duration(atLeast+r.Int64N(below-atLeast)) * time.Millisecond
	}
	// How long something takes that is bad: on a virtual clock it may well be long.
	bad := func() time.Duration {
		if virtual {
			return pick(r, ms(1, 50), ms(50, 3000), ms(3000, 90000))
		}
		return ms(1, 1500)
	}
	half := func() time.Duration {
		return pick(r, 0, 0, bad())
	}
	// What this program has of faults; one in eight has none, and then nothing may fail.
	var faults []string
	if r.IntN(8) > 0 {
		all := []string{opCut, opCutAfter, opStall, opRefuse, opKillDaemon, opKillSource, opPauseSource, opFail}
		if p.TLS || p.Hostile {
			all = append(all, opCorrupt)
		}
		if !virtual {
			all = append(all, opPauseDaemon)
		}
		for _, f := range all {
			if r.IntN(2) == 0 {
				faults = append(faults, f)
			}
		}
	}
	n := 20 + r.IntN(80)
	if !virtual {
		n = 15 + r.IntN(25)
	}
	for range n {
		switch k := r.IntN(40); {
		case k < 9, k < 18:
			s := Step{Op: pick(r, opRead, opWrite), Off: r.Int64N(p.Size)}
			s.N = 1 + r.Int64N(min(p.Size-s.Off, pick(r, 64, p.Chunk, 8*p.Chunk)))
			if r.IntN(2) == 0 { // whole chunks
				s.Off &^= p.Chunk - 1
				s.N = min((1+r.Int64N(3))*p.Chunk, p.Size-s.Off)
			}
			add(s)
		case k < 22:
			add(Step{Op: opSync})
		case k < 24:
			add(Step{Op: opJoin})
		case k < 26:
			add(Step{Op: opWait, For: bad()})
		case k == 26:
			add(Step{Op: opReopen})
		case k == 27:
			add(Step{Op: opCheck})
		case k == 28:
			add(Step{Op: opDelay, For: pick(r, 0, ms(1, 20), ms(1, 200))})
		case k < 31:
			add(Step{Op: opHeal})
		default:
			if len(faults) == 0 {
				continue
			}
			s := Step{Op: pick(r, faults...), Way: r.IntN(2)}
			switch s.Op {
			case opCut:
				s.For = half()
			case opCutAfter:
				s.N, s.For = 1+r.Int64N(4*p.Chunk), half()
			case opStall, opRefuse, opPauseSource, opPauseDaemon, opKillSource:
				s.For = bad()
			case opCorrupt:
				if s.N = 1 + r.Int64N(3); p.Hostile {
					s.N *= 10
				}
			case opFail:
				s.N = 1 + r.Int64N(5)
				s.How = pick(r, "read", "write", "flush")
				s.Err = map[string]string{"read": pick(r, eio, eshort), "write": pick(r, eio, enospc), "flush": eio}[s.How]
			}
			add(s)
		}
	}
}

// What becomes of requests to a backend that fail.
const (
	eio    = "input/output error"
	eshort = "short read"
	enospc = "no space left"
)

// content is the region's first content.
func (p Program) content() region.Content { return region.Content{Seed: p.Seed} }
