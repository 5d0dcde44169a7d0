// Package device opens local devices by kind: a path that a workload maps and
// whose requests end in a region.Store. The kinds live in packages of their own
// below this one. Kind uffd has no path and cannot be opened in front of a store:
// it is the cache itself (uffd.Memory), and OfMemory makes a Device of it.
package device

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"memsync/strategies/device/fuse"
	"memsync/strategies/device/nbdk"
	"memsync/strategies/device/uffd"
	"memsync/strategies/param"
	"memsync/strategies/region"
)

// Device is a live local device in front of a store. It owns its descriptors
// and goroutines until Close. All methods may be called concurrently.
type Device interface {
	// Path is the file or block device to open and map, of exactly the store's
	// size rounded up to the device's block; empty for OfMemory.
	Path() string
	Stats() Stats
	// Err is the store's latest error that the workload saw as EIO or SIGBUS,
	// or nil: the kernel passes a number only.
	Err() error
	// Close writes back what is dirty, removes the device and joins all
	// goroutines. It ends with ctx, may be called twice and returns the first
	// error. The workload should have let go before; later access fails. The store stays open.
	Close(ctx context.Context) error
}

// Cacher is what a device may also be: one that puts bytes into the kernel's
// page cache, or drops them, without being asked. See fuse.Device for the rules.
type Cacher interface {
	Store(off int64, p []byte) error
	Invalidate(off, n int64) error
}

// Stats counts the device's requests. Bytes are those moved without an error.
type Stats struct {
	ReadRequests, ReadBytes   int64
	WriteRequests, WriteBytes int64
	Flushes                   int64
	Interrupts                int64 // signals that reached a waiting thread of the workload
	Errors                    int64 // requests that the store failed
}

// Options say how to open a device.
type Options struct {
	Dir      string      // an existing scratch folder
	File     string      // absolute path of the file, where the kind makes one; empty is one in Dir
	Mode     os.FileMode // permission bits of the file; 0 is for its owner only
	Chunk    int64       // bytes; the largest read request, where the parameters set no other; 0 leaves it to the device
	ReadOnly bool
	// Front, unless nil, gets the store, and what is opened is nothing: see strategies.Options.
	Front  func(region.Store)
	Params param.Values // made with the Params of the kind
}

// Kind is one way of making a device.
type Kind struct {
	Name string
	Doc  string // one line
	// Params are its parameters.
	Params []param.Spec
	// Probe tries whether it works here: nil, region.ErrNotSupported (a certain
	// no, with the reason), or another error where it could not tell.
	Probe func() error
	open  func(ctx context.Context, s region.Store, o Options) (Device, error)
}

// Auto is the name that stands for the first kind whose probe says yes.
const Auto = "auto"

// Kinds returns all kinds, best first.
func Kinds() []Kind {
	return []Kind{
		{Name: "fuse", Doc: "a file served through /dev/fuse by our own server", Params: fuse.Params(),
			Probe: fuse.Probe, open: openFuse},
		{Name: "nbd", Doc: "a block device of the kernel's NBD client", Params: nbdk.Params(),
			Probe: nbdk.Probe, open: openNBD},
		missing("ublk", "userspace block device (io_uring)", "ublk needs the driver ublk_drv (Linux 6.0) and is not built in; use fuse or nbd"),
		{Name: "uffd", Doc: "a memfd that the workload maps, its faults served by userfaultfd", Params: uffd.Params(),
			Probe: uffd.ProbeMemory, open: cannotOpen("uffd", "userfaultfd serves a mapping and has no path; use managed-mount, or strategy userfaultfd")},
	}
}

// missing is a kind that cannot be opened, and why.
func missing(name, doc, why string) Kind {
	open := cannotOpen(name, why)
	return Kind{Name: name, Doc: doc, open: open, Probe: func() error {
		_, err := open(context.Background(), nil, Options{})
		return err
	}}
}

func cannotOpen(name, why string) func(context.Context, region.Store, Options) (Device, error) {
	return func(context.Context, region.Store, Options) (Device, error) {
		return nil, fmt.Errorf("device %s: %s: %w", name, why, region.ErrNotSupported)
	}
}

// Get returns the kind called name, which is not Auto, or an error that lists the valid names.
func Get(name string) (Kind, error) {
	names := []string{Auto}
	for _, k := range Kinds() {
		if k.Name == name {
			return k, nil
		}
		names = append(names, k.Name)
	}
	return Kind{}, fmt.Errorf("unknown device %q; valid: %s", name, strings.Join(names, ", "))
}

// Params returns the parameters of the named kinds together.
func Params(names ...string) []param.Spec {
	var specs []param.Spec
	for _, n := range names {
		if k, err := Get(n); err == nil {
			specs = append(specs, k.Params...)
		}
	}
	return specs
}

// Open makes a device of the given kind in front of s, which the device does
// not close. Auto, and "", take the first that works here. ctx bounds the opening.
func Open(ctx context.Context, kind string, s region.Store, o Options) (Device, error) {
	if o.Front != nil {
		o.Front(s)
		return nothing{}, nil
	}
	if kind != Auto && kind != "" {
		k, err := Get(kind)
		if err != nil {
			return nil, err
		}
		return k.open(ctx, s, o)
	}
	var why []error
	for _, k := range Kinds() {
		err := k.Probe()
		if err == nil {
			return k.open(ctx, s, o)
		}
		why = append(why, err)
	}
	return nil, fmt.Errorf("no device works here: %w", errors.Join(why...))
}

type fuseDevice struct{ *fuse.Device }

func (d fuseDevice) Stats() Stats { return Stats(d.Device.Stats()) }

func openFuse(ctx context.Context, s region.Store, o Options) (Device, error) {
	fo := fuse.Options{Dir: o.Dir, Chunk: o.Chunk, ReadOnly: o.ReadOnly, Mode: o.Mode, Params: o.Params}
	if o.File != "" {
		fo.Dir, fo.Name = filepath.Split(o.File)
	}
	d, err := fuse.Open(ctx, s, fo)
	if err != nil {
		return nil, err
	}
	return fuseDevice{d}, nil
}

var _ Cacher = fuseDevice{}

type nbdDevice struct{ *nbdk.Device }

func (d nbdDevice) Stats() Stats { return Stats(d.Device.Stats()) }

func openNBD(ctx context.Context, s region.Store, o Options) (Device, error) {
	d, err := nbdk.Open(ctx, s, nbdk.Options{ReadOnly: o.ReadOnly, Params: o.Params})
	if err != nil {
		return nil, err
	}
	return nbdDevice{d}, nil
}

type memoryDevice struct{ *uffd.Memory }

// OfMemory is the Device that m is. Its Close ends serving and leaves m open as
// a store, so that what is dirty can still be pushed from it. A fault counts as a
// read, the first store to a chunk since it was pushed as a write.
func OfMemory(m *uffd.Memory) Device { return memoryDevice{m} }

func (memoryDevice) Path() string { return "" }

func (d memoryDevice) Stats() Stats {
	s := d.Memory.Stats()
	return Stats{ReadRequests: s.Faults - s.Stores, ReadBytes: s.Bytes, WriteRequests: s.Stores, Errors: s.Errors}
}

func (d memoryDevice) Close(context.Context) error { return d.Stop() }

// nothing is the Device of a program that uses the store itself.
type nothing struct{}

func (nothing) Path() string                { return "" }
func (nothing) Stats() Stats                { return Stats{} }
func (nothing) Err() error                  { return nil }
func (nothing) Close(context.Context) error { return nil }
