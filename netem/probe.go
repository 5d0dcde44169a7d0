package netem

import (
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Probe makes, in a namespace that is gone when it returns, what the shaper needs.
// nil: it works. ErrNotSupported: this kernel cannot, for certain. Anything else,
// such as ErrNotPermitted, means that we could not tell. The message names the
// remedy. Probe loads no module itself and sets no sysctl, but the kernel may load
// sch_netem, veth or tun on its own when asked for them. It takes some milliseconds.
func Probe(shaper Shaper) (err error) {
	var try func() error
	switch shaper {
	case ShaperSleep:
		return nil // a pause needs no kernel
	case ShaperTun:
		try = func() error {
			fd, err := openTun(sourceDevice)
			if err == nil {
				err = unix.Close(fd)
			}
			return err
		}
	case ShaperNone, ShaperNetem:
		try = func() error {
			if err := addVeth(sourceDevice, destinationDevice, nil); err != nil || shaper == ShaperNone {
				return err
			}
			dev, err := netlink.LinkByName(sourceDevice)
			if err != nil {
				return fmt.Errorf("find device %s: %w", sourceDevice, err)
			}
			s := netemSettings(Profile{RTT: 2e6, Loss: 0.5, Rate: 1e9}, 1)
			if err := setNetem(dev.Attrs().Index, s, false); err != nil {
				return err
			}
			q, err := rootQdisc(dev.Attrs().Index)
			if err != nil {
				return err
			}
			return q.check(s)
		}
	default:
		return fmt.Errorf("probe shaper %q: %w: it is none of %v", shaper, ErrInvalid, Shapers())
	}
	n, err := newNamespace("probe")
	if err == nil {
		err = n.Do(try)
		_ = n.close()
	}
	if err != nil {
		return fmt.Errorf("probe shaper %s: %w", shaper, err)
	}
	return nil
}
