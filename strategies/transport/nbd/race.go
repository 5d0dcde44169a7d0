//go:build race

package nbd

import "sync/atomic"

// What one end sent happened before what the other end does after it received
// that. The race detector does not see this through bare system calls (package
// syscall tells it in the same way), so with both ends in one process, as in
// tests, it has to be told.
var order atomic.Int64

func beforeSend()   { order.Add(1) }
func afterReceive() { order.Load() }
