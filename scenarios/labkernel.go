package scenarios

import (
	"fmt"
	"os"

	"memsync/netem"
	"memsync/strategies/region"
)

func inLab() bool { return os.Getenv("MEMSYNC_LAB") == "1" }

// labRate is the fastest link that the lab kernel keeps up with, bit/s.
const labRate = 1_000_000_000

// LabDistorts returns why the resolved cell's numbers would say more of the lab
// kernel than of the strategy, if that is where it runs: only a delay, or a rate
// that the lab keeps up with, may bind it. It matches region.ErrNotSupported.
func (c *Cell) LabDistorts() error {
	var why string
	switch {
	case !inLab():
		return nil
	case c.Shaper == netem.ShaperNone || !shaped(c.Link):
		why = "no shaped link binds it"
	case c.Link.Rate > labRate:
		why = fmt.Sprintf("a link of %s is too fast", rateText(c.Link.Rate))
	default:
		return nil
	}
	return fmt.Errorf("the lab kernel distorts what CPU or page faults bind (%s; a system call costs about 8 us there, 0.1 us outside): run it on the machine's own kernel: %w", why, region.ErrNotSupported)
}
