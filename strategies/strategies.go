// Package strategies holds the one interface that every way of making a remote
// memory region available implements, its parameters, and the registry type.
// The list of all strategies is in strategies/all.
//
// Three roles, three processes: the source has the data; the daemon runs a
// strategy's destination side (Mount); the workload, another process again,
// attaches to what Mount offers (Attachment) and touches it. No process ever
// touches a mapping that it serves itself (docs/deadlocks.md).
package strategies

import (
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"memsync/strategies/param"
	"memsync/strategies/region"
	"memsync/strategies/transport"
)

// Capability is something that a strategy can do.
type Capability string

// The capabilities.
const (
	Reads     Capability = "read"     // the workload can read the region
	Writes    Capability = "write"    // the workload's writes reach the source by Sync
	Follows   Capability = "follow"   // later writes at the source become visible
	Migrates  Capability = "migrate"  // the destination can take the region over
	Snapshots Capability = "snapshot" // can take a consistent image of the region
	LocalOnly Capability = "local"    // a baseline: the data is on this host, no link
	Leases    Capability = "lease"    // a second writer is refused, where the source grants leases
	Prefetch  Capability = "prefetch" // moves bytes before they are asked for
	Copies    Capability = "copy"     // reads all of the source before a workload can attach
	Relays    Capability = "relay"    // a destination can serve others (Relay)
)

// Info describes a strategy. It is plain data, equal on every machine.
type Info struct {
	Name         string // as on the command line, for instance "managed-mount"
	Doc          string // one line: the mechanism
	Capabilities []Capability
	Devices      []string     // names of the devices it can use, best first; "" only for baselines
	Params       []param.Spec // its own parameters, for --set
	DefaultChunk int64        // bytes
	PullWorkers  int          // default number of background pulls in flight
	PushWorkers  int          // default number of background pushes in flight
	Consistency  string       // the contract: readers, writers, a source that changes
	Whole        int64        // bytes; a region must be a multiple of this; 0 is any size
	// Transports that it can use, where it speaks a protocol of its own and so not any.
	Transports []string `json:",omitempty"`
}

// Can reports whether the strategy has the capability.
func (i Info) Can(c Capability) bool { return slices.Contains(i.Capabilities, c) }

// Strategy is one way of making a remote region available as memory.
// Implementations are stateless values; all methods may be called concurrently.
type Strategy interface {
	Info() Info
	// Serve is the source's side: it answers one connection until the peer
	// leaves (nil), ctx ends or the protocol is broken. Strategies that only
	// read and write the region hand conn to t; others speak their own protocol.
	Serve(ctx context.Context, t transport.Transport, conn net.Conn, e transport.Exports, p param.Values) error
	// Mount is the daemon's side: it opens the remote region and returns once
	// a workload can attach. It never touches the attachment's memory itself.
	Mount(ctx context.Context, r Remote, o Options) (Mount, error)
}

// Defaulter is what a Strategy may also be: one with defaults that depend on what else
// is asked for. Defaults returns how many pulls in flight o gives, whose PullWorkers
// is -1 where none were asked for, and name=value of the parameters that stand for
// something else as they are in o; inMemory says that the daemon has all bytes in
// memory itself. What it returns has no further effect: it says what o means. It is
// the same on every machine. Its errors are of what was asked.
type Defaulter interface {
	Defaults(o Options, inMemory bool) (pullWorkers int, settings []string, err error)
}

// Remote is how the daemon reaches the source's region. With transport "local"
// the region is held by the daemon itself.
type Remote interface {
	// Open opens the region. Each call opens connections of its own; the
	// caller closes the Store.
	Open(ctx context.Context) (region.Store, error)
	// Dial makes a raw connection for a strategy's own protocol; it is answered
	// by Strategy.Serve. With transport "local" it gives region.ErrNotSupported.
	Dial(ctx context.Context) (net.Conn, error)
}

// Addressed is what a Remote may also be: one whose source answers at a TCP
// address, for programs that connect by themselves.
type Addressed interface{ Addr() string } // host:port; empty where there is none

// Exported is what a Remote may also be: one that knows what the source calls the
// region, for strategies that ask for it on connections of their own. Without it the name is "region".
type Exported interface{ Export() string }

// Listener is what a Strategy may also be: one whose source's side is a program
// of its own, which serves a file. Its Serve is not called, and it has no
// transport local.
type Listener interface {
	// Listen starts the program on a free port of host, an IP address of this
	// machine, to serve the file at path as the export "region", and returns once
	// it accepts connections. It writes what it needs into dir, which the caller
	// removes. What it started ends by Close of the Server and with this process.
	Listen(ctx context.Context, host, path, dir string, p param.Values) (Server, error)
}

// Server is a program that a Listener started.
type Server interface {
	Addr() string // host:port
	// Close ends the program. It returns once it is gone, and may be called twice.
	Close() error
}

// Beside is what a Remote may also be: one whose source has regions beside the
// one that Open opens. OpenBeside opens the one whose name is that region's with
// suffix behind it, on one connection, read-only unless writable is set (no lease is
// asked for); region.ErrMissing where there is none. A request may wait at the source
// for another one (transport.Options.Together). The caller closes it.
type Beside interface {
	OpenBeside(ctx context.Context, suffix string, writable bool) (region.Store, error)
}

// Options say how to mount.
type Options struct {
	Device      string // one of Info.Devices
	Chunk       int64  // bytes; a power of two, at least a page
	PullWorkers int    // background pulls in flight; 0 means none
	PushWorkers int    // background pushes in flight; 0 means none
	ReadOnly    bool
	Migrate     bool   // the region is taken over later (Migrator)
	Dir         string // an existing scratch folder of the run; removed by the caller
	// File is the absolute path of a device's file, in an existing folder, where nothing
	// may be yet; empty is one in Dir. A block device has its path from the kernel.
	File string
	Mode os.FileMode // of a device's file: permission bits; 0 is for its owner only
	// Front, unless nil, gets the store that a device would serve, and no device is opened:
	// for a program that reads and writes the region by calls. It is called before Mount
	// returns, and the store is good until Close. Strategies without a device do not look at it.
	Front func(region.Store)
	// Reopen: where the connection is lost, the region is opened again, as long as
	// Remote.Open does not fail, and what was written and not flushed is written once
	// more. Strategies that always do so do not look at it.
	Reopen bool
	Params param.Values // validated against Info.Params and the device's
}

// AttachKind says how a workload attaches to a mount.
type AttachKind string

const (
	// AttachPath: open Path and map it shared (or read and write it).
	AttachPath AttachKind = "path"
	// AttachMemfd: map File, a memfd or a file without a name, shared. All its bytes are there.
	AttachMemfd AttachKind = "memfd"
	// AttachAnonymous: make a private anonymous mapping and fill it from File
	// before the clock starts (the "memory" baseline).
	AttachAnonymous AttachKind = "anonymous"
	// AttachFault: map as Fault says, register a userfaultfd on the mapping and
	// hand it to the daemon, which calls FaultServer.ServeFaults.
	AttachFault AttachKind = "fault"
)

// Attachment says how the workload attaches. All but File crosses the role
// protocol as JSON; File crosses by SCM_RIGHTS.
type Attachment struct {
	Kind AttachKind `json:"kind"`
	Path string     `json:"path,omitempty"`
	// Paths, in place of Path: parts of the region, region.PartSize each, one behind the other.
	Paths    []string `json:"paths,omitempty"`
	File     *os.File `json:"-"`
	Size     int64    `json:"size"` // bytes of the region; the mapping is rounded up to pages
	ReadOnly bool     `json:"read_only,omitempty"`
	Populate bool     `json:"populate,omitempty"` // map with MAP_POPULATE: page tables are warm
	Fault    *Fault   `json:"fault,omitempty"`
	// Track: the workload prepares its mapping for this way of finding dirty pages
	// (dirty.Arm) and hands what it gets to the source; empty is none.
	Track string `json:"track,omitempty"`
	// Versions: a reader takes each chunk whole, by its version.
	Versions *Versions `json:"versions,omitempty"`
	// Client: a client of snapshots gets File and then Beside, under these names
	// (package snapshot/client).
	Client []string   `json:"client,omitempty"`
	Beside []*os.File `json:"-"`
}

// Versions says where the versions of chunks lie in the attachment's file: 8 bytes
// each, from Offset on, native byte order. A version is odd while its chunk is being
// changed; it is even and another one afterwards.
type Versions struct {
	Offset int64 `json:"offset"` // bytes; a multiple of the page size
	Chunk  int64 `json:"chunk"`  // bytes
}

// Fault says how to map and register a region that is served by userfaultfd.
type Fault struct {
	Memory       string `json:"memory"`    // "anonymous" (private), "shared" (File, a memfd) or "huge" (File, a hugetlb memfd, or THP-aligned anonymous memory)
	PageSize     int64  `json:"page_size"` // of the mapping: 4096, or the huge page's size
	Missing      bool   `json:"missing"`   // UFFDIO_REGISTER_MODE_MISSING
	Minor        bool   `json:"minor"`     // UFFDIO_REGISTER_MODE_MINOR
	WriteProtect bool   `json:"write_protect"`
}

// Mount is a live mount in the daemon. It owns its descriptors and goroutines
// until Close. All methods may be called concurrently.
type Mount interface {
	Attachment() Attachment
	// Sync returns once all stores that the workload has flushed (msync; the
	// runner asks the workload first) are at the source.
	Sync(ctx context.Context) error
	Stats() Stats
	// Close stops background work, pushes what is dirty, and removes device
	// and mount point. The workload should have detached. It may be called
	// twice and returns the first error.
	Close(ctx context.Context) error
}

// Snapshotter is a Mount of a strategy with Snapshots: it takes images of the
// region while the workload, attached as a client, writes to it.
type Snapshotter interface {
	// Snapshot takes an image of one state of the region, and returns once it is durable.
	Snapshot(ctx context.Context) (Snapshot, error)
	// Restore calls put for each part of the last image that is not zeroes, in order.
	Restore(ctx context.Context, put func(p []byte, off int64) error) (Snapshot, error)
}

// Snapshot describes an image.
type Snapshot struct {
	Fresh    bool          // false: nothing was published since the last one, which stands
	Sequence uint64        // of the client's publication that it has
	Freeze   time.Duration // in which all of the region was protected at once; 0 where it was not
	Save     time.Duration // from the beginning until it was durable
	Written  int64         // bytes, to the image
	Changed  int64         // bytes of the region that were looked at
	Starved  int64         // so far: how often the client was too fast to be followed
}

// Publisher is a strategy whose region is written at the source, by a workload
// there, and whose source serves all connections from one state.
type Publisher interface {
	// Publish makes the region that the writer attaches to, with content in it.
	Publish(ctx context.Context, content region.Store, o PublishOptions) (Publication, error)
}

// PublishOptions say how to publish.
type PublishOptions struct {
	Chunk  int64  // bytes; a power of two, at least a page
	Dir    string // an existing scratch folder of the run
	Pwrite bool   // the writer uses pwrite, not a mapping
	Device string // one of Info.Devices: how the region is to be had at the source, where that makes a difference
	// Transport answers the connections of a strategy that has no protocol of its own.
	Transport transport.Transport
	Params    param.Values // validated against Info.Params
}

// Topologies of op sync: whom a destination follows.
const (
	TopologyDirect = "direct" // the source
	TopologyHub    = "hub"    // the first destination, which follows the source (star)
	TopologyChain  = "chain"  // the destination before it
)

// Events of op sync: what the last of several destinations does in the middle round.
const (
	EventNone    = "none"
	EventLate    = "late"    // opens then, and not at the beginning
	EventSlow    = "slow"    // is stopped four fifths of the time
	EventDies    = "dies"    // is killed
	EventReturns = "returns" // is killed, and opens again in the round after
)

// SyncParams are what a writer at the source does, for --op sync.
func SyncParams() []param.Spec {
	return []param.Spec{
		{Name: "dirty_fraction", Kind: param.KindFloat, Default: "0.01", Doc: "of the region that the writer changes between two rounds, 0 to 1"},
		{Name: "dirty_pattern", Kind: param.KindEnum, Default: "scattered", Values: []string{"scattered", "clustered", "insert"}, Doc: "pages anywhere, pages in one run, or bytes inserted, which move all behind them"},
		{Name: "sync_rounds", Kind: param.KindInt, Default: "3", Min: 1, Max: 1000, Doc: "rounds that are timed in one run; total_time is their median"},
		{Name: "destinations", Kind: param.KindInt, Default: "1", Min: 1, Max: 16, Doc: "hosts that follow the source, each with a link of its own"},
		{Name: "topology", Kind: param.KindEnum, Default: TopologyDirect, Values: []string{TopologyDirect, TopologyHub, TopologyChain}, Doc: "whom a destination follows: the source; the first destination; the one before it"},
		{Name: "event", Kind: param.KindEnum, Default: EventNone, Values: []string{EventNone, EventLate, EventSlow, EventDies, EventReturns}, Doc: "what the last destination does in the middle round: opens only then, gets a fifth of its CPU time, is killed, is killed and opens again a round later"},
		{Name: "pulses", Kind: param.KindInt, Default: "50", Max: 100000, Doc: "writes whose staleness is measured while the source polls; 0 is none"},
	}
}

// Writer is a writer's mapping that was armed as Attachment.Track said.
type Writer struct {
	PID    int
	Base   uintptr
	Length int64 // bytes, whole pages
	Uffd   *os.File
}

// Publication is a region that is written at the source. All methods may be
// called concurrently.
type Publication interface {
	Attachment() Attachment // for the writer
	Track(w Writer) error
	// Serve answers a connection, as Strategy.Serve.
	Serve(ctx context.Context, conn net.Conn) error
	// Poll says whether the source looks for changes by itself, as it does at first.
	Poll(on bool)
	// Sync looks now, whatever Poll said, and returns once all connected destinations
	// have what was written before.
	Sync(ctx context.Context) error
	Stats() Stats
	Close() error
}

// Hooks are what a migration asks of the application whose region moves; nil
// is nothing to do. Each returns once it is done, or an error.
type Hooks struct {
	// Prepare, at the destination, before the application stops at the source:
	// start-up that needs no state.
	Prepare func(context.Context) error
	// Suspend, at the source: no store is made any more once it returns. It is
	// called at most once for each try to hand over.
	Suspend func(context.Context) error
	// Flush, at the source, after Suspend: what was stored through a mapping is at its device (msync).
	Flush func(context.Context) error
	// Resume: the application may run, at the source again or now at the destination.
	Resume func(context.Context) error
	// Abort, at the destination: the migration did not come about.
	Abort func(context.Context) error
	// Quiet, at the source: it waits at most within for a point at which the application
	// writes little for a while and does not mind to be stopped, and says whether there is one.
	Quiet func(ctx context.Context, within time.Duration) (bool, error)
	// Throttle, at the source: from now on the application stores at most so many bytes a
	// second; 0 is as many as it likes, as at first.
	Throttle func(ctx context.Context, rate int64) error
}

// Seeder is what a Publication may also be: one whose region a destination can take over.
type Seeder interface {
	// Control says how the application is stopped. It is called once, before
	// any destination can ask.
	Control(h Hooks)
	// Done is closed once the destination has every byte: the source may exit.
	Done() <-chan struct{}
}

// Migrator is what a Mount may also be, where Options.Migrate was set: one that
// takes the region over.
type Migrator interface {
	// Finalize waits until it is time, by the parameters, and takes the region
	// over: the application is stopped at the source and started here (h.Resume), and nobody
	// else owns the region from then on. On an error the source goes on, or the error says
	// that it could not be found out.
	Finalize(ctx context.Context, h Hooks) (Handover, error)
	// Complete returns once every byte is here and the source may exit, with all that
	// is known of the migration by then.
	Complete(ctx context.Context) (Handover, error)
}

// Handover says how a migration went. Times are CLOCK_MONOTONIC, ns.
type Handover struct {
	Epoch                     uint64
	Asked                     int64 // the source was asked to stop its application
	Stopped, Flushed, Scanned int64 // at the source: it has stopped, is flushed, its last dirty pages are known
	Owned                     int64 // the region is ours
	Resumed                   int64 // Hooks.Resume has returned
	FinalBytes                int64 // written since the last look before it stopped
	NeededBytes               int64 // to be pulled after it stopped
	DirtiedBytes              int64 // distinct bytes that were written after they were pulled
	Rounds                    int64 // looks for dirty pages
	BulkBytes                 int64 // pulled before Finalize
	BulkTime                  int64 // in which they were pulled, ns
	// Promised is the downtime that was foreseen, ns; 0 where it was not asked for.
	Promised int64
	Unmet    string `json:",omitempty"` // why max_downtime could not be kept to, or no quiet phase found; empty where it could
	// Postponed is how long the application was left alone for a quiet phase, ns.
	Postponed int64
	// Throttled is the lowest rate that the application was held down to, B/s; 0 is never.
	Throttled int64
	// Local is when so many bytes were here, ascending.
	Local []LocalAt `json:",omitempty"`
}

// LocalAt is a point of local availability over time.
type LocalAt struct{ At, Bytes int64 }

// MigrateParams are what the application that migrates does, for --op migrate.
func MigrateParams() []param.Spec {
	return []param.Spec{
		{Name: "dirty_rate", Kind: param.KindSize, Default: "20MB", Doc: "bytes a second that the application writes, one aligned 4 KiB page a write; 0 is none"},
		{Name: "writer", Kind: param.KindEnum, Default: "random", Values: []string{"random", "zipf", "burst", "log", "kv", "todo"},
			Doc: "where: distinct pages in random order, a hot set, random pages in bursts of a fifth of each second, one page after the other, the slots of a key-value store with hot keys, or the lines of a TODO list, so that the region is text"},
		{Name: "settle", Kind: param.KindDuration, Default: "1s", Max: int64(time.Minute), Doc: "how long the application runs at the destination, at least, before it is stopped and everything compared"},
	}
}

// FaultServer is what a Mount with AttachFault implements. ServeFaults takes
// over uffd, which the workload registered for its mapping at base, and
// returns once faults are being served; Mount.Close ends that.
type FaultServer interface {
	ServeFaults(uffd *os.File, base uintptr) error
}

// Relay is what a Mount may also be: a destination that hands the region on to
// others, in place of the source (topologies hub and chain). Serve answers a
// connection of one, as Strategy.Serve; the mount outlives it.
type Relay interface {
	Serve(ctx context.Context, conn net.Conn) error
}

// Troubled is what a Mount may also be: one that knows the latest error behind
// an EIO or SIGBUS, of which the workload only got a number. It is nil where
// there was none.
type Troubled interface{ Err() error }

// Stats counts what a mount has moved since it was opened.
type Stats struct {
	DemandRequests, DemandBytes     int64            // pulled because the workload waited
	PrefetchRequests, PrefetchBytes int64            // pulled ahead
	PushRequests, PushBytes         int64            // written back
	LocalRequests, LocalBytes       int64            // answered without the remote
	Faults                          int64            // userfaultfd events answered
	PreemptiveBytes                 int64            // local when Mount returned
	Extra                           map[string]int64 `json:",omitempty"` // a strategy's own counters, by metric name
}

// EqualAt is the name in Stats.Extra of when a destination became equal to the
// source last: CLOCK_MONOTONIC, ns.
const EqualAt = "equal_at_ns"

// Registry is a set of strategies by name, in a fixed order.
type Registry []Strategy

// Get returns the strategy called name, or an error that lists the valid names.
func (r Registry) Get(name string) (Strategy, error) {
	for _, s := range r {
		if s.Info().Name == name {
			return s, nil
		}
	}
	return nil, fmt.Errorf("unknown strategy %q; valid: %s", name, strings.Join(r.Names(), ", "))
}

// Names returns the names in order.
func (r Registry) Names() []string {
	var names []string
	for _, s := range r {
		names = append(names, s.Info().Name)
	}
	return names
}
