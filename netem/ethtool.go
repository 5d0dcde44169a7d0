package netem

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Commands of include/uapi/linux/ethtool.h that get and set one offload.
type offload struct {
	name     string
	get, set uint32
}

func offloads() []offload {
	return []offload{
		{"tx-checksum", 0x16, 0x17},
		{"scatter-gather", 0x18, 0x19},
		{"tso", 0x1e, 0x1f},
		{"gso", 0x23, 0x24},
		{"gro", 0x2b, 0x2c},
	}
}

type ethtoolValue struct{ cmd, data uint32 }

// ethtool does one command on device, in the calling thread's network namespace.
func ethtool(device string, cmd, data uint32) (uint32, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("socket for ethtool: %w", err)
	}
	defer unix.Close(fd)
	value := &ethtoolValue{cmd, data}
	var req struct { // struct ifreq
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}
	copy(req.name[:unix.IFNAMSIZ-1], device)
	req.data = unsafe.Pointer(value)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return 0, fmt.Errorf("ethtool command %#x on %s: %w", cmd, device, errno)
	}
	return value.data, nil
}

// readOffloads reads what the device does; what it does not know is left out.
func readOffloads(device string) (map[string]bool, error) {
	m := make(map[string]bool)
	for _, o := range offloads() {
		v, err := ethtool(device, o.get, 0)
		if errors.Is(err, unix.EOPNOTSUPP) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read offload %s: %w", o.name, err)
		}
		m[o.name] = v != 0
	}
	return m, nil
}

// dropOffload turns the named offloads off.
func dropOffload(device string, names ...string) error {
	for _, name := range names {
		for _, o := range offloads() {
			if o.name != name {
				continue
			}
			if _, err := ethtool(device, o.set, 0); err != nil {
				return fmt.Errorf("turn offload %s off: %w", name, err)
			}
		}
	}
	return nil
}
