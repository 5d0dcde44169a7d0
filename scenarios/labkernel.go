package scenarios

import (
	"fmt"
	"os"
	"time"

	"memsync/netem"
	"memsync/strategies/region"
)

func inLab() bool { return os.Getenv("MEMSYNC_LAB") == "1" }

// What binds a cell rather than the lab kernel, in which entering the kernel costs
// about 8 us and the first touch of a page 20 us.
const (
	labRate  = 1_000_000_000    // bit/s: the fastest link that it keeps up with
	labAlone = 100_000_000      // bit/s: the fastest that binds by itself, where no delay does: 4 KiB take 330 us
	labDelay = time.Millisecond // the shortest RTT that binds: some tens of entries make less than half of it
)

// LabDistorts returns why the resolved cell's numbers would say more of the lab
// kernel than of the strategy, if that is where it runs: only a delay, or a rate
// that the lab keeps up with, may bind it. It matches region.ErrNotSupported.
func (c *Cell) LabDistorts() error {
	var why string
	rate := c.Link.Rate
	switch {
	case !inLab():
		return nil
	case c.Shaper == netem.ShaperNone || !shaped(c.Link):
		why = "no shaped link binds it"
	case rate > labRate:
		why = fmt.Sprintf("a link of %s is too fast", rateText(rate))
	case c.Link.RTT < labDelay && (rate == 0 || rate > labAlone):
		why = fmt.Sprintf("neither an RTT of %v nor the rate binds it: want %v or more, or at most %s", c.Link.RTT, labDelay, rateText(labAlone))
	case c.Device == "uffd" && c.Limit != 0:
		why = "each page that is read faults"
	default:
		return nil
	}
	return fmt.Errorf("the lab kernel distorts what CPU or page faults bind (%s; a system call costs about 8 us there, 0.1 us outside): run it on the machine's own kernel: %w", why, region.ErrNotSupported)
}
