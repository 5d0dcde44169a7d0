package uffd

import (
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// baton is a mutex of threads. Whoever holds it reads the next event. All
// handlers in read(2) at once would be woken by every fault, of which one is
// wanted; a sync.Mutex would wake goroutines, which is a switch more for a
// locked thread. Source: Drepper, Futexes Are Tricky, mutex 2.
type baton struct{ state uint32 } // 0 free, 1 held, 2 held and waited for

const (
	futexWait = 0x80 // FUTEX_WAIT | FUTEX_PRIVATE_FLAG
	futexWake = 0x81
)

func (b *baton) lock() {
	if atomic.CompareAndSwapUint32(&b.state, 0, 1) {
		return
	}
	for atomic.SwapUint32(&b.state, 2) != 0 {
		_, _, _ = unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(&b.state)), futexWait, 2, 0, 0, 0)
	}
}

func (b *baton) unlock() {
	if atomic.SwapUint32(&b.state, 0) == 2 {
		_, _, _ = unix.RawSyscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(&b.state)), futexWake, 1, 0, 0, 0)
	}
}
