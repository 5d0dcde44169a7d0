package nbdk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// udevMessage is what udevd sends to its listeners once its rules have run.
func udevMessage(properties ...string) []byte {
	const header = 40
	body := []byte(strings.Join(properties, "\x00") + "\x00")
	b := append([]byte("libudev\x00"), 0xfe, 0xed, 0xca, 0xfe)
	for _, n := range []int{header, header, len(body)} {
		b = binary.NativeEndian.AppendUint32(b, uint32(n))
	}
	return append(append(b, make([]byte, header-len(b))...), body...)
}

func TestParseUevent(t *testing.T) {
	for _, c := range []struct {
		in           []byte
		udev         bool
		action, path string
	}{
		{[]byte("change@/devices/virtual/block/nbd0\x00ACTION=change\x00"), false, "change", "/devices/virtual/block/nbd0"},
		{[]byte("libudev\x00"), false, "", ""},
		{udevMessage("ACTION=change", "DEVPATH=/devices/virtual/block/nbd1", "SUBSYSTEM=block"), true, "change", "/devices/virtual/block/nbd1"},
		{udevMessage("ACTION=change"), true, "change", ""},
		{[]byte("change@/devices/virtual/block/nbd0\x00"), true, "", ""},
		{udevMessage("ACTION=change")[:30], true, "", ""},
		{nil, true, "", ""},
	} {
		action, path, ok := parseUevent(c.in, c.udev)
		if want := c.action != "" && c.path != ""; ok != want || ok && (action != c.action || path != c.path) {
			t.Errorf("%q: %q, %q, %t", c.in, action, path, ok)
		}
	}
}

func FuzzParseUevent(f *testing.F) {
	f.Add(udevMessage("ACTION=change", "DEVPATH=/devices/virtual/block/nbd1"), true)
	f.Add([]byte("change@/devices/virtual/block/nbd0\x00ACTION=change\x00"), false)
	f.Fuzz(func(t *testing.T, b []byte, udev bool) {
		if action, path, ok := parseUevent(b, udev); ok && udev && (action == "" || path == "") {
			t.Errorf("%q, %q", action, path)
		}
	})
}

// TestUdev: with nbd_ready=udev the device is ready once udevd has said so. A
// udevd of the machine is used where one runs; else one that does what matters
// here stands in: it passes the kernel's events on, in udevd's format, later.
func TestUdev(t *testing.T) {
	need(t)
	if _, err := os.Stat(udevControl); err != nil {
		if _, err := Open(t.Context(), &memory{b: pattern(8192)}, Options{Params: params(t, "nbd_ready=udev")}); !errors.Is(err, region.ErrNotSupported) {
			t.Errorf("without a udevd: %v", err)
		}
		relay(t, 100*time.Millisecond)
	}
	for _, setup := range []string{"ioctl", "netlink"} { // ioctl first: its lock on the device must not keep udevd away
		start := time.Now()
		d := open(t, &memory{b: pattern(8192)}, "nbd_ready=udev", "nbd_setup="+setup)
		t.Logf("%s: open took %v", setup, time.Since(start))
		got, err := role(t, "read", d.Path()).Output()
		if err != nil || !bytes.Equal(got, pattern(8192)) {
			t.Errorf("%s: %d bytes, %v", setup, len(got), err)
		}
		shut(t, d)
	}
}

// relay stands in for udevd until the test ends.
func relay(t *testing.T, after time.Duration) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(udevControl), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(udevControl, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	from, err := listenUevents(false)
	if err != nil {
		t.Fatal(err)
	}
	to, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 16<<10)
		for {
			n, err := from.f.Read(buf)
			if err != nil {
				return
			}
			action, path, ok := parseUevent(buf[:n], false)
			if !ok {
				continue
			}
			time.Sleep(after)
			_ = unix.Sendto(to, udevMessage("ACTION="+action, "DEVPATH="+path), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groupUdev})
		}
	}()
	t.Cleanup(func() {
		_ = from.f.SetReadDeadline(time.Unix(1, 0))
		<-done
		from.Close()
		_ = unix.Close(to)
		_ = os.Remove(udevControl)
	})
}

// TestQueueSettings: what was asked for is what sysfs says.
func TestQueueSettings(t *testing.T) {
	need(t)
	d := open(t, &memory{b: pattern(1 << 20)}, "read_ahead=1MiB", "nbd_scheduler=none", "nbd_queue_depth=32", "nbd_max_request=64KiB")
	defer shut(t, d)
	for name, want := range map[string]string{"read_ahead_kb": "1024", "nr_requests": "32", "max_sectors_kb": "64"} {
		b, err := os.ReadFile(d.sysfs(filepath.Join("queue", name)))
		if got := strings.TrimSpace(string(b)); err != nil || got != want {
			t.Errorf("%s is %s, want %s, %v", name, got, want, err)
		}
	}
	if b, err := os.ReadFile(d.sysfs("queue/scheduler")); err != nil || !strings.Contains(string(b), "[none]") {
		t.Errorf("scheduler is %s, %v", b, err)
	}
	if _, err := Open(t.Context(), &memory{b: pattern(8192)}, Options{Params: params(t, "nbd_max_request=1KiB")}); err == nil {
		t.Error("requests of less than a page were taken")
	}
	attached, err := filepath.Glob("/sys/block/nbd*/pid")
	if err != nil || len(attached) != 1 {
		t.Errorf("attached after an Open that failed: %v, %v", attached, err)
	}
}
