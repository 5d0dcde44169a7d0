package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"memsync/strategies/device/uffd"
	"memsync/strategies/region"
	"memsync/strategies/snapshot/shm"
)

// What a chunk can be in mode cow. A protected chunk cannot be written to; the
// first store to it is an event, which unprotects it.
const (
	writable  = iota // not protected: may differ from the last state
	protected        // as in the last state that was held, and saved or being saved
	pending          // protected, belongs to the state that is held and was not copied yet
)

// cow is copy-on-write by userfaultfd write protection. To hold a state it protects what was written to
// since the last one, with events held off: a store that meets a protected page
// waits until all of it is, so what the memory has when the last system call returns is
// what it had at that instant. Then chunks are copied, by whoever comes first: the
// saver, in order, or the first store to it. A chunk stays protected until it is stored to, so
// that what is writable is what the next state must save.
type cow struct {
	h      *Host
	pool   []byte
	spare  chan []byte // its parts: buffers for chunks that are stored to while they are pending
	copied chan copied // such chunks

	mu      sync.Mutex // state, and protecting against events
	state   []uint8
	owed    []bool // held, but not known to be on the disk
	client  *peer  // nil until one has registered
	events  int64
	waits   int64 // stores that waited for a spare buffer
	stop    int   // eventfd: the threads end
	closing chan struct{}
	threads sync.WaitGroup
}

type copied struct {
	off int64
	p   []byte
}

// peer is the client's registered mapping.
type peer struct {
	pid  int
	uffd *os.File
	shm.Hello
}

func newCow(h *Host) (*cow, error) {
	if err := uffd.ProbeWriteProtect(); err != nil {
		return nil, err
	}
	n := region.Chunks(h.layout.Size, h.layout.Chunk)
	c := &cow{h: h, state: make([]uint8, n), owed: make([]bool, n), closing: make(chan struct{}), stop: -1}
	k := max(h.o.Spare/h.layout.Chunk, 2)
	c.spare, c.copied = make(chan []byte, k), make(chan copied, k)
	mem, err := unix.Mmap(-1, 0, int(k*h.layout.Chunk), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("spare memory of %d bytes: %w", k*h.layout.Chunk, err)
	}
	c.pool = mem
	for i := range k {
		c.spare <- mem[i*h.layout.Chunk : (i+1)*h.layout.Chunk : (i+1)*h.layout.Chunk]
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	h.socket, h.theirs = os.NewFile(uintptr(pair[0]), shm.SocketName), os.NewFile(uintptr(pair[1]), shm.SocketName)
	if err := unix.SetsockoptInt(pair[0], unix.SOL_SOCKET, unix.SO_PASSCRED, 1); err != nil {
		return nil, os.NewSyscallError("SO_PASSCRED", err)
	}
	if c.stop, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	c.threads.Go(c.listen)
	return c, nil
}

// await sleeps until fd can be read; false where it is time to end.
func (c *cow) await(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(c.stop), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(p, -1)
		if err == unix.EINTR {
			continue
		}
		return err == nil && p[1].Revents == 0
	}
}

// fail reports a client that broke the protocol; the first counts.
func (c *cow) fail(err error) {
	select {
	case c.h.broken <- err:
	default:
	}
}

// listen answers the client's messages.
func (c *cow) listen() {
	fd := int(c.h.socket.Fd())
	buf, oob := make([]byte, shm.MaxMessage), make([]byte, unix.CmsgSpace(4*4)+unix.CmsgSpace(unix.SizeofUcred))
	answer := func(err error) {
		// The client may be gone, or not listen; then nobody waits.
		_ = unix.Sendmsg(fd, shm.EncodeAnswer(err), nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	}
	for c.await(fd) {
		n, oobn, _, _, err := unix.Recvmsg(fd, buf, oob, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return // the client has ended, or closed the region
		}
		pid, files := ancillary(oob[:oobn])
		hello, err := shm.Decode(buf[:n])
		switch {
		case err != nil:
			closeFiles(files)
			answer(err)
			c.fail(fmt.Errorf("the client's message: %w", err))
		case hello != nil:
			err := c.register(pid, files, *hello)
			if answer(err); err != nil {
				c.fail(fmt.Errorf("the client's mapping: %w", err))
			}
		default:
			closeFiles(files)
			select {
			case c.h.asks <- answer:
			case <-c.closing:
				answer(region.ErrClosed)
			}
		}
	}
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// ancillary returns the sender's process, as the kernel says, and the descriptors.
func ancillary(oob []byte) (pid int, files []*os.File) {
	ms, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return 0, nil
	}
	for i := range ms {
		if cred, err := unix.ParseUnixCredentials(&ms[i]); err == nil {
			pid = int(cred.Pid)
		}
		if fds, err := unix.ParseUnixRights(&ms[i]); err == nil {
			for _, fd := range fds {
				files = append(files, os.NewFile(uintptr(fd), "userfaultfd"))
			}
		}
	}
	return pid, files
}

// register takes a client's mapping over, after looking that there is no other one
// through which the region could be written to unseen.
func (c *cow) register(pid int, files []*os.File, h shm.Hello) (err error) {
	defer func() {
		if err != nil {
			closeFiles(files)
		}
	}()
	off, n := shm.ProtectedControl()
	page := uintptr(c.h.layout.Page)
	switch {
	case len(files) != 1:
		return fmt.Errorf("want its userfaultfd, got %d descriptors: %w", len(files), region.ErrMismatch)
	case pid <= 0:
		return fmt.Errorf("the process is in a PID namespace from where it cannot be seen: %w", region.ErrNotSupported)
	case h.Length != c.h.layout.Stride() || h.ControlLength != n || h.Base == 0 || h.Base%page != 0 || h.ControlBase == 0 || h.ControlBase%uintptr(off) != 0:
		return fmt.Errorf("%d bytes at %#x and %d at %#x, want %d and %d: %w", h.Length, h.Base, h.ControlLength, h.ControlBase, c.h.layout.Stride(), n, region.ErrMismatch)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.client != nil {
		return fmt.Errorf("process %d has registered a mapping already; a region has one: %w", c.client.pid, region.ErrNotPermitted)
	}
	// From here on nobody can map it to be written, pwrite or punch holes.
	if _, err := unix.FcntlInt(c.h.region.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_FUTURE_WRITE); err != nil {
		return fmt.Errorf("seal the region: %w", err)
	}
	p := &peer{pid: pid, uffd: files[0], Hello: h}
	if err := c.onlyMapping(p, true); err != nil {
		return err
	}
	if err := unix.SetNonblock(int(p.uffd.Fd()), true); err != nil {
		return os.NewSyscallError("fcntl", err)
	}
	// Nothing was written to yet that the image lacks, or it was, before the
	// mapping was registered: the first state saves all that differs.
	c.client = p
	c.threads.Go(c.serve)
	return nil
}

// onlyMapping looks whether the client's registered mapping is there and the
// only one, of the client or (all) of any process that may be looked at.
func (c *cow) onlyMapping(p *peer, all bool) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(c.h.region.Fd()), &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	id := fmt.Sprintf(" %02x:%02x %d ", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	own, err := mappings(p.pid, id)
	if err != nil {
		return err
	}
	if len(own) == 0 && !all {
		return fmt.Errorf("process %d has unmapped the region: %w", p.pid, region.ErrPeerGone)
	}
	want := fmt.Sprintf("%x-%x", p.Base, p.Base+uintptr(p.Length))
	if len(own) != 1 || own[0] != want {
		return fmt.Errorf("process %d has the region mapped at %v, and registered %s: stores through another mapping are not seen: %w", p.pid, own, want, region.ErrNotPermitted)
	}
	if !all {
		return nil
	}
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return err
	}
	for _, dir := range procs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil || pid == p.pid || pid == os.Getpid() {
			continue
		}
		// A process that has ended, or that is another user's, has nothing here.
		if found, err := mappings(pid, id); err == nil && len(found) > 0 {
			return fmt.Errorf("process %d has the region mapped, too, at %v: its stores would not be seen: %w", pid, found, region.ErrNotPermitted)
		}
	}
	return nil
}

// mappings returns the address ranges at which a process has the file mapped.
func mappings(pid int, id string) (found []string, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, fmt.Errorf("mappings of process %d: %w: %w", pid, err, region.ErrPeerGone)
	}
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, id) {
			addr, _, _ := strings.Cut(line, " ")
			found = append(found, addr)
		}
	}
	return found, nil
}

// serve answers events of the client's mapping.
func (c *cow) serve() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	fd := int(c.client.uffd.Fd())
	var msgs [16]uffd.Msg
	buf := unsafe.Slice((*byte)(unsafe.Pointer(&msgs[0])), unsafe.Sizeof(msgs))
	for c.await(fd) {
		n, err := unix.Read(fd, buf)
		if err == unix.EAGAIN || err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			return // the client has ended
		}
		for _, m := range msgs[:n/int(unsafe.Sizeof(msgs[0]))] {
			if m.Event != uffd.UFFD_EVENT_PAGEFAULT {
				c.fail(fmt.Errorf("userfaultfd event %#x: %w", m.Event, region.ErrMismatch))
				return
			}
			if err := c.event(uintptr(m.Address)); err != nil && !isGone(err) {
				c.fail(err)
				return
			}
		}
	}
}

// isGone: the client has ended or unmapped.
func isGone(err error) bool { return errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) }

// event lets a store to addr go on.
func (c *cow) event(addr uintptr) error {
	p := c.client
	if at := addr - p.ControlBase; at < uintptr(p.ControlLength) {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.protect(p.ControlBase, p.ControlLength, false)
	}
	off := int64(addr - p.Base)
	if addr < p.Base || off >= p.Length {
		return fmt.Errorf("event at %#x, and the mapping is [%#x, +%d): %w", addr, p.Base, p.Length, region.ErrMismatch)
	}
	idx := off / c.h.layout.Chunk
	lo, hi := c.extent(idx)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.events++
	for c.state[idx] == pending {
		select {
		case b := <-c.spare:
			c.copied <- copied{lo, b[:copy(b, c.h.mem[lo:hi])]}
			c.state[idx] = protected
			continue
		default:
		}
		// The saver makes room, or copies this very chunk.
		c.waits++
		c.mu.Unlock()
		select {
		case b := <-c.spare:
			c.spare <- b
		case <-c.closing:
		}
		c.mu.Lock()
		select {
		case <-c.closing:
			c.state[idx] = protected
		default:
		}
	}
	c.state[idx] = writable
	return c.protect(p.Base+uintptr(lo), c.length(idx), false)
}

// extent is the bytes of a chunk.
func (c *cow) extent(idx int64) (lo, hi int64) {
	l := c.h.layout
	return idx * l.Chunk, min((idx+1)*l.Chunk, l.Size)
}

// length is the bytes of a chunk in whole pages.
func (c *cow) length(idx int64) int64 {
	l := c.h.layout
	return min((idx+1)*l.Chunk, l.Stride()) - idx*l.Chunk
}

func (c *cow) protect(base uintptr, n int64, on bool) error {
	return uffd.WriteProtect(int(c.client.uffd.Fd()), base, n, on)
}

func (c *cow) follow() (bool, error) { return false, nil }

// gapBytes is how much that is protected already is protected again, so that two
// runs are one system call: a call, with its TLB flush, costs as much as some hundred pages.
const gapBytes = 1 << 20

// hold protects all that is writable and makes it pending, with what is owed.
func (c *cow) hold(last bool) (s taken, err error) {
	c.mu.Lock()
	p := c.client
	c.mu.Unlock()
	if !last {
		if p == nil {
			return s, fmt.Errorf("the client has registered no mapping: %w", region.ErrMissing)
		}
		if err := c.onlyMapping(p, false); err != nil {
			return s, err
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.h.layout
	var runs [][2]int64 // chunks
	for idx := int64(0); idx < int64(len(c.state)); idx++ {
		if c.state[idx] != writable && !c.h.o.Full {
			continue
		}
		if k := len(runs) - 1; k >= 0 && (idx-runs[k][1])*l.Chunk < gapBytes {
			runs[k][1] = idx + 1
		} else {
			runs = append(runs, [2]int64{idx, idx + 1})
		}
	}
	if !last {
		began := time.Now()
		err := c.protect(p.ControlBase, p.ControlLength, true)
		for _, r := range runs {
			if err == nil {
				err = c.protect(p.Base+uintptr(r[0]*l.Chunk), min(r[1]*l.Chunk, l.Stride())-r[0]*l.Chunk, true)
			}
		}
		s.freeze = time.Since(began)
		defer func() {
			if uerr := c.protect(p.ControlBase, p.ControlLength, false); uerr != nil && !isGone(uerr) {
				err = errors.Join(err, uerr)
			}
		}()
		if err != nil {
			if isGone(err) { // it has ended meanwhile: Final has what it left
				err = fmt.Errorf("%w: %w", err, region.ErrPeerGone)
			}
			return s, fmt.Errorf("protect the client's mapping: %w", err)
		}
	}
	s.at = time.Now()
	if s.sequence, s.blob, err = shm.Noted(c.h.ctl); err != nil {
		return s, err
	}
	s.fresh = true
	for idx := range c.state {
		if c.state[idx] == writable || c.owed[idx] || c.h.o.Full {
			c.state[idx], c.owed[idx] = pending, true
		}
	}
	return s, nil
}

func (c *cow) take(ctx context.Context, last bool, held func(error), save func(p []byte, off int64) error) (taken, error) {
	s, err := c.hold(last)
	if held(err); err != nil {
		return s, err
	}
	var saveErr error
	put := func(p []byte, off int64) {
		if saveErr == nil {
			saveErr = save(p, off)
		}
	}
	// Also where an image cannot be saved, all chunks are to be let go.
	drain := func() {
		for {
			select {
			case k := <-c.copied:
				put(k.p, k.off)
				c.spare <- k.p[:c.h.layout.Chunk]
				continue
			default:
			}
			return
		}
	}
	buf := make([]byte, c.h.layout.Chunk)
	for idx := range c.state {
		lo, hi := c.extent(int64(idx))
		c.mu.Lock()
		mine := c.state[idx] == pending
		if mine {
			copy(buf, c.h.mem[lo:hi])
			c.state[idx] = protected
		}
		c.mu.Unlock()
		if mine {
			put(buf[:hi-lo], lo)
		}
		drain()
	}
	drain() // nothing is pending, so nothing comes any more
	return s, ctx.Err()
}

func (c *cow) saved(ok bool) {
	if ok {
		clear(c.owed)
	}
}

func (c *cow) close() (err error) {
	if c.stop >= 0 {
		close(c.closing)
		_, err = unix.Write(c.stop, []byte{1, 0, 0, 0, 0, 0, 0, 0})
		c.threads.Wait()
		err = errors.Join(err, unix.Close(c.stop))
		c.stop = -1
	}
	if c.client != nil {
		err = errors.Join(err, c.client.uffd.Close()) // nobody waits any more
	}
	err = errors.Join(err, c.h.socket.Close())
	if c.pool != nil {
		err = errors.Join(err, unix.Munmap(c.pool))
		c.pool = nil
	}
	return err
}
