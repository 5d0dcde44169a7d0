package peers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/loopholelabs/userfaultfd-go/pkg/mapper"
	"golang.org/x/sys/unix"

	"memsync/strategies"
	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/transport"
)

// UserfaultfdGo is the strategy userfaultfd-go: the library's fault handler, which
// reads a page at a time from an io.ReaderAt. The library has no transport: the
// reader is memsync's client of the transport. The workload registers its mapping as the library would
// (anonymous, private, missing faults) and hands the userfaultfd over, as the
// library's package transfer does.
type UserfaultfdGo struct{}

var _ strategies.Strategy = UserfaultfdGo{}

// Info describes the strategy.
func (UserfaultfdGo) Info() strategies.Info {
	return strategies.Info{
		Name:         "userfaultfd-go",
		Doc:          "peer: fault handler of userfaultfd-go, the thesis's library; one page a fault, one fault at a time",
		Capabilities: []strategies.Capability{strategies.Reads},
		Devices:      []string{"uffd"},
		DefaultChunk: region.PageSize(),
		Consistency: "Readers share the workload's mapping. Stores stay in the workload. Pages that were read stay: later changes at the source are not seen. " +
			"A read that fails at the source ends the handler, and whoever touches a missing page from then on waits for good.",
	}
}

// Serve hands the connection to the transport.
func (UserfaultfdGo) Serve(ctx context.Context, t transport.Transport, conn net.Conn, e transport.Exports, _ param.Values) error {
	return t.Serve(ctx, conn, e)
}

// Mount opens the remote region.
func (UserfaultfdGo) Mount(ctx context.Context, r strategies.Remote, o strategies.Options) (strategies.Mount, error) {
	s, err := r.Open(ctx)
	if err != nil {
		return nil, fmt.Errorf("open the remote region: %w", err)
	}
	m := &uffdMount{store: s, readOnly: o.ReadOnly}
	m.ctx, m.cancel = context.WithCancel(context.WithoutCancel(ctx))
	return m, nil
}

type uffdMount struct {
	store    region.Store
	readOnly bool
	ctx      context.Context
	cancel   context.CancelFunc
	faults   atomic.Int64
	bytes    atomic.Int64

	mu     sync.Mutex
	file   *os.File
	thread atomic.Int64  // that serves
	ended  chan struct{} // closed when it has; nil before ServeFaults
	err    error         // why the handler ended, before Close
	closed bool
}

func (m *uffdMount) Attachment() strategies.Attachment {
	return strategies.Attachment{Kind: strategies.AttachFault, Size: m.store.Size(), ReadOnly: m.readOnly,
		Fault: &strategies.Fault{Memory: "anonymous", PageSize: region.PageSize(), Missing: true}}
}

// ReadAt is io.ReaderAt's, for the library: a page that the region's end cuts is
// short, with io.EOF.
func (m *uffdMount) ReadAt(p []byte, off int64) (int, error) {
	n := min(int64(len(p)), m.store.Size()-off)
	if err := m.store.ReadAt(m.ctx, p[:max(n, 0)], off); err != nil {
		return 0, err
	}
	m.faults.Add(1)
	m.bytes.Add(n)
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

// ServeFaults starts the library's handler on a thread of its own.
func (m *uffdMount) ServeFaults(f *os.File, base uintptr) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed || m.ended != nil {
		return errors.Join(errors.New("the mount is closed or serves a workload already"), f.Close())
	}
	m.file, m.ended = f, make(chan struct{})
	fd := mapper.UFFD(f.Fd()) // it is the library's until the handler ends
	// As the library's own: poll(2) returns at once then, and read(2) waits.
	// Non-blocking, a fault that is gone by the time of the read ends the handler.
	if err := unix.SetNonblock(int(fd), false); err != nil {
		return errors.Join(fmt.Errorf("userfaultfd: %w", err), f.Close())
	}
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		m.thread.Store(int64(unix.Gettid()))
		err := mapper.Handle(fd, base, m)
		m.thread.Store(0)
		m.mu.Lock()
		defer m.mu.Unlock()
		if !m.closed {
			m.err = fmt.Errorf("userfaultfd-go: the handler ended: %w", err)
		}
		close(m.ended)
	}()
	return nil
}

// Err is why the handler ended.
func (m *uffdMount) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

func (m *uffdMount) Sync(context.Context) error { return nil }

func (m *uffdMount) Stats() strategies.Stats {
	return strategies.Stats{Faults: m.faults.Load(), DemandRequests: m.faults.Load(), DemandBytes: m.bytes.Load()}
}

// Close ends the handler. The library has no call for that: it waits in read(2),
// which a signal interrupts and the kernel begins again; non-blocking by then, it
// returns, and the handler with it.
func (m *uffdMount) Close(context.Context) error {
	m.mu.Lock()
	if m.closed {
		defer m.mu.Unlock()
		return m.err
	}
	m.closed = true
	ended := m.ended
	m.mu.Unlock()
	m.cancel()
	if ended != nil {
		_ = unix.SetNonblock(int(m.file.Fd()), true)
	}
	for ended != nil {
		if tid := m.thread.Load(); tid != 0 {
			_ = unix.Tgkill(unix.Getpid(), int(tid), unix.SIGURG) // the Go runtime's own, harmless elsewhere
		}
		select {
		case <-ended:
			ended = nil
		case <-time.After(time.Millisecond):
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.file != nil {
		m.err = errors.Join(m.err, m.file.Close())
	}
	m.err = errors.Join(m.err, m.store.Close())
	return m.err
}
