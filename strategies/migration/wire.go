package migration

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"sync"

	"golang.org/x/sync/errgroup"

	"memsync/strategies/chunk"
	"memsync/strategies/migration/handover"
	"memsync/strategies/region"
	"memsync/strategies/transport"
)

// The control connection is a region like any other, of a transport like any
// other, whose bytes are calls: call number n is written at n*slot and its answer is read from
// there, at the same time, so that a call takes one round trip. A read waits until
// its answer is there. So only the destination ever calls, whatever the transport.
const (
	controlSuffix = transport.MigrationSuffix // behind the region's name

	slot        = 1 << 26 // bytes of one call; an answer is no longer
	callNumbers = 1 << 24
	maxCalls    = 8 // of one connection that are remembered
	// The first read of an answer, which travels at this length. What is beyond takes another
	// round trip; so would a longer read on a connection that carries little else: TCP's first
	// window is 14 KB, and BBR spreads even that over the round trip (4 KiB: a tenth of it).
	firstRead = 4 << 10
)

const (
	magic       = 0x4d534d47 // "MSMG"
	version     = 2
	requestSize = 64
	replySize   = 88 // without the set
)

// verbRound asks for the pages written since the round before; it is no business of package handover.
const verbRound handover.Verb = 16

// request is a call to the source.
type request struct {
	handover.Request
	Session uint64 // of the tracking; another one than before begins anew
	Round   uint64 // the next one (verbRound), or the last that has come (Finalize)
	Size    int64  // of the destination's memory; 0 is not known yet
	// Wait, of a round: the source answers at a quiet point of its application, or so much later, ns.
	Wait int64
	// Throttle, of a round: the most that the application may store from now on, B/s; 0 is no limit.
	Throttle int64
}

func (r request) encode() []byte {
	b := make([]byte, requestSize)
	binary.BigEndian.PutUint32(b, magic)
	b[4], b[5] = version, byte(r.Verb)
	binary.BigEndian.PutUint64(b[8:], uint64(r.From))
	binary.BigEndian.PutUint64(b[16:], r.Epoch)
	binary.BigEndian.PutUint64(b[24:], r.Session)
	binary.BigEndian.PutUint64(b[32:], r.Round)
	binary.BigEndian.PutUint64(b[40:], uint64(r.Size))
	binary.BigEndian.PutUint64(b[48:], uint64(r.Wait))
	binary.BigEndian.PutUint64(b[56:], uint64(r.Throttle))
	return b
}

func decodeRequest(b []byte) (r request, err error) {
	switch {
	case len(b) < 8:
		return r, fmt.Errorf("migration request of %d bytes, want %d: %w", len(b), requestSize, region.ErrOutOfRange)
	case binary.BigEndian.Uint32(b) != magic:
		return r, fmt.Errorf("migration request begins with %#x, not %#x: %w", b[:4], uint32(magic), region.ErrMismatch)
	case b[4] != version:
		return r, fmt.Errorf("migration protocol version %d, this source speaks %d: both ends must be the same memsync: %w", b[4], version, region.ErrNotSupported)
	case len(b) != requestSize:
		return r, fmt.Errorf("migration request of %d bytes, want %d: %w", len(b), requestSize, region.ErrOutOfRange)
	}
	r = request{handover.Request{Verb: handover.Verb(b[5]), From: handover.ID(binary.BigEndian.Uint64(b[8:])), Epoch: binary.BigEndian.Uint64(b[16:])},
		binary.BigEndian.Uint64(b[24:]), binary.BigEndian.Uint64(b[32:]), int64(binary.BigEndian.Uint64(b[40:])),
		int64(binary.BigEndian.Uint64(b[48:])), int64(binary.BigEndian.Uint64(b[56:]))}
	if r.Wait < 0 || r.Throttle < 0 {
		return r, fmt.Errorf("migration request with a wait of %d and a rate of %d: %w", r.Wait, r.Throttle, region.ErrOutOfRange)
	}
	return r, nil
}

// reply is the answer. Times are CLOCK_MONOTONIC of the source's host, ns.
type reply struct {
	handover.Reply
	Phase   handover.Phase
	Session uint64
	Round   uint64
	Size    int64  // of the region
	Asked   int64  // Finalize: the suspend hook was called,
	Stopped int64  // returned,
	Flushed int64  // the flush hook returned,
	Scanned int64  // and the last dirty pages were known
	Quiet   bool   // a round that asked to wait: the application is at a quiet point
	Dirty   []byte // a set of pages, see encodeSet
	Text    string // of an error; then the result is 0
	Kind    byte   // of the error: its place in kinds
}

// kinds are the sentinels that an error can match across the link.
func kinds() []error {
	return []error{nil, region.ErrMismatch, region.ErrNotSupported, region.ErrOutOfRange, region.ErrClosed}
}

// failed is the answer that says err.
func failed(err error) reply {
	r := reply{Text: err.Error()}
	for i, k := range kinds() {
		if k != nil && errors.Is(err, k) {
			r.Kind = byte(i)
		}
	}
	return r
}

// err is the error that the answer says, or nil.
func (r reply) err() error {
	if r.Result != 0 || r.Text == "" {
		return nil
	}
	if k := kinds(); int(r.Kind) < len(k) && k[r.Kind] != nil {
		return fmt.Errorf("%s (%w)", r.Text, k[r.Kind])
	}
	return errors.New(r.Text)
}

const maxText = 512

func (r reply) encode() []byte {
	text := r.Text[:min(len(r.Text), maxText)]
	b := make([]byte, replySize, replySize+len(text)+len(r.Dirty))
	binary.BigEndian.PutUint32(b, magic)
	b[4], b[5], b[6], b[7] = version, byte(r.Result), byte(r.Phase), r.Kind
	for i, v := range []uint64{r.Epoch, r.Session, r.Round, uint64(r.Size), uint64(r.Asked), uint64(r.Stopped), uint64(r.Flushed), uint64(r.Scanned)} {
		binary.BigEndian.PutUint64(b[8+8*i:], v)
	}
	binary.BigEndian.PutUint32(b[72:], uint32(len(r.Dirty)))
	binary.BigEndian.PutUint32(b[76:], uint32(len(text)))
	if r.Quiet {
		b[80] = 1
	}
	return append(append(b, text...), r.Dirty...)
}

// replyLength returns how long the answer that begins with b is.
func replyLength(b []byte) (int64, error) {
	if len(b) < replySize || binary.BigEndian.Uint32(b) != magic {
		return 0, fmt.Errorf("this is no answer of a migration's source: %w", region.ErrMismatch)
	}
	if b[4] != version {
		return 0, fmt.Errorf("the source speaks migration protocol version %d, this destination %d: both ends must be the same memsync: %w", b[4], version, region.ErrNotSupported)
	}
	n := int64(replySize) + int64(binary.BigEndian.Uint32(b[72:])) + int64(binary.BigEndian.Uint32(b[76:]))
	if n > slot || binary.BigEndian.Uint32(b[76:]) > maxText {
		return 0, fmt.Errorf("answer of %d bytes: above the limit of %d: %w", n, slot, region.ErrOutOfRange)
	}
	return n, nil
}

func decodeReply(b []byte) (r reply, err error) {
	n, err := replyLength(b)
	if err != nil {
		return r, err
	}
	if n != int64(len(b)) {
		return r, fmt.Errorf("answer of %d bytes says %d: %w", len(b), n, region.ErrMismatch)
	}
	var v [8]uint64
	for i := range v {
		v[i] = binary.BigEndian.Uint64(b[8+8*i:])
	}
	text := replySize + int(binary.BigEndian.Uint32(b[76:]))
	return reply{Reply: handover.Reply{Result: handover.Result(b[5]), Epoch: v[0]}, Phase: handover.Phase(b[6]), Session: v[1], Round: v[2], Size: int64(v[3]),
		Asked: int64(v[4]), Stopped: int64(v[5]), Flushed: int64(v[6]), Scanned: int64(v[7]), Quiet: b[80] == 1, Text: string(b[replySize:text]), Kind: b[7], Dirty: b[text:]}, nil
}

// A set of pages on the wire is the number of pages of the region, then either runs
// (0, then pairs of uvarints: how many pages are not in it, then how many are)
// or a bitmap (1, then a bit for each page, lowest first), whichever is shorter.
const (
	setRuns   = 0
	setBitmap = 1
)

func encodeSet(s *chunk.Set) []byte {
	n := s.Len()
	bitmap := (n + 7) / 8
	b := binary.AppendUvarint(nil, uint64(n))
	head := len(b)
	b = append(b, setRuns)
	at := int64(0)
	for {
		lo, hi, ok := s.Next(at, n)
		if !ok {
			return b
		}
		b = binary.AppendUvarint(binary.AppendUvarint(b, uint64(lo-at)), uint64(hi-lo))
		if at = hi; int64(len(b)-head) > bitmap {
			break
		}
	}
	b = append(b[:head], setBitmap)
	b = append(b, make([]byte, bitmap)...)
	for at := int64(0); ; {
		lo, hi, ok := s.Next(at, n)
		if !ok {
			return b
		}
		for i := lo; i < hi; i++ {
			b[int64(head)+1+i/8] |= 1 << (i % 8)
		}
		at = hi
	}
}

// decodeSet adds the pages of b to s, which must be of as many pages.
func decodeSet(b []byte, s *chunk.Set) error {
	bad := func(why string) error { return fmt.Errorf("set of pages: %s: %w", why, region.ErrMismatch) }
	n, k := binary.Uvarint(b)
	if k <= 0 || n != uint64(s.Len()) || len(b) == k {
		return bad(fmt.Sprintf("of %d pages, the region has %d", n, s.Len()))
	}
	kind, b := b[k], b[k+1:]
	switch kind {
	case setRuns:
		for at := uint64(0); len(b) > 0; {
			gap, k := binary.Uvarint(b)
			if k <= 0 || gap > n-at {
				return bad("a gap leads beyond the end")
			}
			at, b = at+gap, b[k:]
			run, k := binary.Uvarint(b)
			if k <= 0 || run > n-at {
				return bad("a run leads beyond the end")
			}
			s.Mark(int64(at), int64(at+run))
			at, b = at+run, b[k:]
		}
	case setBitmap:
		if uint64(len(b)) != (n+7)/8 {
			return bad(fmt.Sprintf("bitmap of %d bytes", len(b)))
		}
		for i, v := range b {
			for ; v != 0; v &= v - 1 {
				p := int64(i)*8 + int64(bits.TrailingZeros8(v))
				if p >= s.Len() {
					return bad("a page beyond the end")
				}
				s.Mark(p, p+1)
			}
		}
	default:
		return bad(fmt.Sprintf("kind %d", kind))
	}
	return nil
}

// mailbox is the source's end of one control connection, as a region.
type mailbox struct {
	handle func(context.Context, request) reply
	mu     sync.Mutex
	calls  map[int64]*call
	latest int64
}

type call struct {
	once   sync.Once
	done   chan struct{}
	answer []byte
}

func newMailbox(handle func(context.Context, request) reply) *mailbox {
	return &mailbox{handle: handle, calls: map[int64]*call{}}
}

var _ region.Store = (*mailbox)(nil)

// get returns the call with this number, and forgets those long ago.
func (m *mailbox) get(n int64) (*call, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if c := m.calls[n]; c != nil {
		return c, nil
	}
	if n <= m.latest-maxCalls || n > m.latest+maxCalls {
		return nil, fmt.Errorf("call %d after call %d: %w", n, m.latest, region.ErrOutOfRange)
	}
	m.latest = max(m.latest, n)
	for old := range m.calls {
		if old <= m.latest-maxCalls {
			delete(m.calls, old)
		}
	}
	c := &call{done: make(chan struct{})}
	m.calls[n] = c
	return c, nil
}

// Size implements region.Store.
func (m *mailbox) Size() int64 { return slot * callNumbers }

// WriteAt makes a call and returns when it has been answered.
func (m *mailbox) WriteAt(ctx context.Context, p []byte, off int64) error {
	if off%slot != 0 {
		return fmt.Errorf("call at %d, not a multiple of %d: %w", off, slot, region.ErrOutOfRange)
	}
	r, err := decodeRequest(p)
	if err != nil && len(p) != requestSize {
		return err
	}
	c, cerr := m.get(off / slot)
	if cerr != nil {
		return cerr
	}
	c.once.Do(func() {
		if err != nil {
			c.answer = failed(err).encode()
		} else {
			c.answer = m.handle(ctx, r).encode()
		}
		close(c.done)
	})
	return nil
}

// ReadAt waits for an answer.
func (m *mailbox) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := region.CheckRange(off%slot, int64(len(p)), slot); err != nil {
		return err
	}
	c, err := m.get(off / slot)
	if err != nil {
		return err
	}
	select {
	case <-c.done:
	case <-ctx.Done():
		return ctx.Err()
	}
	n := 0
	if at := off % slot; at < int64(len(c.answer)) {
		n = copy(p, c.answer[at:])
	}
	clear(p[n:])
	return nil
}

// Flush implements region.Store.
func (m *mailbox) Flush(context.Context) error { return nil }

// Close implements region.Store.
func (m *mailbox) Close() error { return nil }

// ask makes call n on a control connection.
func ask(ctx context.Context, s region.Store, n int64, r request) (out reply, err error) {
	const first = firstRead
	b := make([]byte, first)
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.WriteAt(gctx, r.encode(), n*slot) })
	g.Go(func() error { return s.ReadAt(gctx, b, n*slot) })
	if err := g.Wait(); err != nil {
		return out, err
	}
	length, err := replyLength(b)
	if err != nil {
		return out, err
	}
	if length > first {
		b = append(b, make([]byte, length-first)...)
		if err := s.ReadAt(ctx, b[first:], n*slot+first); err != nil {
			return out, err
		}
	}
	if out, err = decodeReply(b[:length]); err != nil {
		return out, err
	}
	out.Request = r.Request
	return out, nil
}
