package netem

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// offload is a command of include/uapi/linux/ethtool.h that reads one offload.
type offload struct {
	name string
	get  uint32
}

func offloads() []offload {
	return []offload{
		{"tx-checksum", 0x16},
		{"scatter-gather", 0x18},
		{"tso", 0x1e},
		{"gso", 0x23},
		{"gro", 0x2b},
	}
}

type ethtoolValue struct{ cmd, data uint32 }

// ethtool does one reading command on device, in the calling thread's network namespace.
func ethtool(device string, cmd uint32) (uint32, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("socket for ethtool: %w", err)
	}
	defer unix.Close(fd)
	value := &ethtoolValue{cmd: cmd}
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
		v, err := ethtool(device, o.get)
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
