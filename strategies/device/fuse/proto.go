package fuse

import (
	"encoding/binary"
	"fmt"
	"syscall"
	"unsafe"
)

// The part of the kernel's FUSE protocol that one regular file needs.
// Source: include/uapi/linux/fuse.h, version 7.31 and later; names as there.
const (
	opForget        = 2
	opGetattr       = 3
	opSetattr       = 4
	opOpen          = 14
	opRead          = 15
	opWrite         = 16
	opStatfs        = 17
	opRelease       = 18
	opFsync         = 20
	opInit          = 26
	opInterrupt     = 36
	opDestroy       = 38
	opNotifyReply   = 41
	opBatchForget   = 42
	opLseek         = 46
	opSyncfs        = 50
	protoMajor      = 7
	protoMinor      = 38 // what we speak; the kernel adapts to the lower of both
	protoMinorLeast = 31 // Linux 5.4

	rootID        = 1
	inHeaderSize  = 40
	outHeaderSize = 16
	rwInSize      = 40 // fuse_read_in and fuse_write_in
	attrSize      = 88
	attrOutSize   = 16 + attrSize
	openOutSize   = 16
	statfsOutSize = 80
	initInLeast   = 16
	initOutSize   = 64

	flagAsyncRead      = 1 << 0
	flagBigWrites      = 1 << 5
	flagWritebackCache = 1 << 16
	flagMaxPages       = 1 << 22
	flagExplicitInval  = 1 << 25

	fattrSize     = 1 << 3
	writeCache    = 1 << 0 // FUSE_WRITE_CACHE: pages of the page cache, not of one write(2)
	openKeepCache = 1 << 1

	notifyInvalInode = 2
	notifyStore      = 4

	iocClone = 0x8004e500 // FUSE_DEV_IOC_CLONE = _IOR(229, 0, uint32_t)
)

var le = binary.NativeEndian // the protocol uses the host's byte order

// header is fuse_in_header.
type header struct {
	length uint32
	opcode uint32
	unique uint64
	nodeid uint64
	pid    uint32 // of the thread that waits; 0 if it is not in our PID namespace
}

// parseHeader reads the header of the request b, as one read(2) of the device
// returned it, and checks the length in it.
func parseHeader(b []byte) (h header, body []byte, err error) {
	if len(b) < inHeaderSize {
		return h, nil, fmt.Errorf("FUSE request of %d bytes is shorter than its header", len(b))
	}
	h = header{le.Uint32(b), le.Uint32(b[4:]), le.Uint64(b[8:]), le.Uint64(b[16:]), le.Uint32(b[32:])}
	if int64(h.length) != int64(len(b)) {
		return h, nil, fmt.Errorf("FUSE request %d says %d bytes and has %d", h.unique, h.length, len(b))
	}
	return h, b[inHeaderSize:], nil
}

// rw is what fuse_read_in and fuse_write_in share.
type rw struct {
	off   int64
	n     int64
	flags uint32
}

func parseRW(body []byte) (r rw, data []byte, err syscall.Errno) {
	if len(body) < rwInSize {
		return r, nil, syscall.EINVAL
	}
	r = rw{int64(le.Uint64(body[8:])), int64(le.Uint32(body[16:])), le.Uint32(body[20:])}
	if r.off < 0 {
		return r, nil, syscall.EINVAL
	}
	return r, body[rwInSize:], 0
}

// initIn is fuse_init_in.
type initIn struct {
	major, minor, maxReadahead, flags uint32
}

func parseInit(body []byte) (in initIn, err error) {
	if len(body) < initInLeast {
		return in, fmt.Errorf("FUSE_INIT of %d bytes", len(body))
	}
	in = initIn{le.Uint32(body), le.Uint32(body[4:]), le.Uint32(body[8:]), le.Uint32(body[12:])}
	if in.major != protoMajor || in.minor < protoMinorLeast {
		return in, fmt.Errorf("kernel speaks FUSE %d.%d, we need %d.%d (Linux 5.4)", in.major, in.minor, protoMajor, protoMinorLeast)
	}
	return in, nil
}

// initOut is fuse_init_out.
type initOut struct {
	maxReadahead, flags, maxWrite       uint32
	maxBackground, congestion, maxPages uint16
}

func (o initOut) encode() []byte {
	b := make([]byte, initOutSize)
	le.PutUint32(b, protoMajor)
	le.PutUint32(b[4:], protoMinor)
	le.PutUint32(b[8:], o.maxReadahead)
	le.PutUint32(b[12:], o.flags)
	le.PutUint16(b[16:], o.maxBackground)
	le.PutUint16(b[18:], o.congestion)
	le.PutUint32(b[20:], o.maxWrite)
	le.PutUint32(b[24:], 1) // time_gran, ns
	le.PutUint16(b[28:], o.maxPages)
	return b
}

// attr is what fuse_attr says of our file.
type attr struct {
	size     int64
	mode     uint32
	uid, gid uint32
	time     int64 // seconds; the file has one time
}

// encode returns fuse_attr_out, valid for as long as the mount lives: the size never changes.
func (a attr) encode() []byte {
	b := make([]byte, attrOutSize)
	le.PutUint64(b, 1<<31) // attr_valid, seconds
	f := b[16:]
	le.PutUint64(f, rootID)
	le.PutUint64(f[8:], uint64(a.size))
	le.PutUint64(f[16:], uint64(a.size+511)/512)
	for _, at := range []int{24, 32, 40} {
		le.PutUint64(f[at:], uint64(a.time))
	}
	le.PutUint32(f[60:], a.mode)
	le.PutUint32(f[64:], 1) // nlink
	le.PutUint32(f[68:], a.uid)
	le.PutUint32(f[72:], a.gid)
	le.PutUint32(f[80:], 4096) // blksize: the kernel writes back whole pages
	return b
}

// iovec makes the vector of a reply or a notification; base of an empty p is nil.
func iovec(p []byte) syscall.Iovec {
	v := syscall.Iovec{Base: unsafe.SliceData(p)}
	v.SetLen(len(p))
	return v
}
