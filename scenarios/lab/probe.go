package lab

import (
	"errors"
	"fmt"

	"memsync/strategies/probe"
	"memsync/strategies/region"
)

// Probe tells whether the lab kernel can be run here, without booting it or
// touching the network: it is cached and whole, or apt could fetch it.
func Probe(env func(string) string) probe.Probe {
	return probe.Probe{Name: "lab-kernel", Remedy: "memsync lab --refresh", Try: func() (string, error) {
		if env("MEMSYNC_LAB") == "1" {
			return "", probe.Mend(fmt.Errorf("this is the lab already: %w", region.ErrNotSupported), "")
		}
		dir, err := CacheDir(env)
		if err != nil {
			return "", err
		}
		k, err := Find(dir)
		switch {
		case err == nil:
			return fmt.Sprintf("%s in %s", k.Release, dir), nil
		case !errors.Is(err, region.ErrMissing):
			return "", err
		}
		if err := CanFetch(); err != nil {
			return "", probe.Mend(err, "")
		}
		return "", fmt.Errorf("not fetched yet, apt could: %w", err)
	}}
}
