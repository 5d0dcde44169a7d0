package device

import (
	"context"
	"errors"
	"strings"
	"testing"

	"memsync/strategies/param"
	"memsync/strategies/region"
)

type empty struct{ region.Store }

func (empty) Size() int64 { return 4096 }

func TestKinds(t *testing.T) {
	var all []string
	for _, k := range Kinds() {
		all = append(all, k.Name)
		if _, err := param.New(k.Params, nil); err != nil {
			t.Errorf("%s: %v", k.Name, err)
		}
		err := k.Probe()
		t.Logf("%s: %v", k.Name, err)
		if k.Name == "fuse" && err != nil {
			t.Error(err)
		}
		if k.Name == "ublk" && !errors.Is(err, region.ErrNotSupported) {
			t.Errorf("%s: %v", k.Name, err)
		}
		if k.Name == "ublk" || k.Name == "uffd" { // not there, or no path
			if _, err := Open(context.Background(), k.Name, empty{}, Options{}); !errors.Is(err, region.ErrNotSupported) {
				t.Errorf("open %s: %v", k.Name, err)
			}
		}
	}
	if got := strings.Join(all, " "); got != "fuse nbd ublk uffd" {
		t.Errorf("kinds %s", got)
	}
	if _, err := Get("floppy"); err == nil || !strings.Contains(err.Error(), "auto, fuse, nbd, ublk, uffd") {
		t.Error(err)
	}
	if _, err := param.New(Params(all...), []string{"read_ahead=64KiB"}); err != nil {
		t.Error(err)
	}
}

func TestAuto(t *testing.T) {
	dir := t.TempDir()
	for _, kind := range []string{"auto", ""} {
		d, err := Open(context.Background(), kind, empty{}, Options{Dir: dir})
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(d.Path(), dir) {
			t.Errorf("auto is not FUSE: %s", d.Path())
		}
		if err := d.Close(context.Background()); err != nil {
			t.Error(err)
		}
	}
}
