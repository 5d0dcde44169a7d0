package strategies

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"memsync/strategies/region"
	"memsync/strategies/transport"
)

// MountParts mounts a region as k devices, of region.PartSize each, side by side,
// as k mounts of st; the workload maps them one behind the other. Each opens the
// region anew, and has its own window, workers and cache. Strategies that do not
// attach by a path, or that dial the source themselves, give region.ErrNotSupported.
func MountParts(ctx context.Context, st Strategy, r Remote, o Options, k int) (Mount, error) {
	p := &parts{mounts: make([]Mount, k)}
	errs := make([]error, k)
	var wg sync.WaitGroup
	for i := range k {
		wg.Go(func() {
			own := o
			own.Dir = filepath.Join(o.Dir, FolderOfPart(i))
			if errs[i] = os.Mkdir(own.Dir, 0o700); errs[i] == nil {
				p.mounts[i], errs[i] = st.Mount(ctx, partOf{r, i, k}, own)
			}
		})
	}
	wg.Wait()
	err := errors.Join(errs...)
	for _, m := range p.mounts {
		if err != nil {
			break
		}
		a := m.Attachment()
		if a.Kind != AttachPath {
			err = fmt.Errorf("%d mounts of attachment %q in place of one: %w", k, a.Kind, region.ErrNotSupported)
		}
		p.attachment.Kind, p.attachment.ReadOnly = a.Kind, a.ReadOnly
		p.attachment.Paths = append(p.attachment.Paths, a.Path)
		p.attachment.Size += a.Size
	}
	if err != nil {
		return nil, errors.Join(err, p.Close(ctx))
	}
	return p, nil
}

// FolderOfPart is the folder of the i-th mount below Options.Dir.
func FolderOfPart(i int) string { return "part-" + strconv.Itoa(i) }

type parts struct {
	mounts     []Mount // nil where it failed
	attachment Attachment
}

var _ Troubled = (*parts)(nil)

func (p *parts) Attachment() Attachment { return p.attachment }

// all does the same to all mounts at once.
func (p *parts) all(do func(Mount) error) error {
	errs := make([]error, len(p.mounts))
	var wg sync.WaitGroup
	for i, m := range p.mounts {
		if m != nil {
			wg.Go(func() { errs[i] = do(m) })
		}
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (p *parts) Sync(ctx context.Context) error {
	return p.all(func(m Mount) error { return m.Sync(ctx) })
}

func (p *parts) Close(ctx context.Context) error {
	return p.all(func(m Mount) error { return m.Close(ctx) })
}

// Stats is the sum.
func (p *parts) Stats() Stats {
	sum := Stats{Extra: map[string]int64{}}
	for _, m := range p.mounts {
		s := m.Stats()
		sum.DemandRequests += s.DemandRequests
		sum.DemandBytes += s.DemandBytes
		sum.PrefetchRequests += s.PrefetchRequests
		sum.PrefetchBytes += s.PrefetchBytes
		sum.PushRequests += s.PushRequests
		sum.PushBytes += s.PushBytes
		sum.LocalRequests += s.LocalRequests
		sum.LocalBytes += s.LocalBytes
		sum.Faults += s.Faults
		sum.PreemptiveBytes += s.PreemptiveBytes
		for name, n := range s.Extra {
			sum.Extra[name] += n
		}
	}
	return sum
}

// Err is the first mount's that has one.
func (p *parts) Err() error {
	for _, m := range p.mounts {
		if t, ok := m.(Troubled); ok && t.Err() != nil {
			return t.Err()
		}
	}
	return nil
}

var _ Beside = partOf{}

// partOf is the way to the i-th of k parts of a region.
type partOf struct {
	Remote
	i, k int
}

func (r partOf) Open(ctx context.Context) (region.Store, error) {
	s, err := r.Remote.Open(ctx)
	if err != nil {
		return nil, err
	}
	n := region.PartSize(s.Size(), r.k)
	if n == 0 {
		return nil, errors.Join(fmt.Errorf("%d bytes in %d parts: a part has at least a page: %w", s.Size(), r.k, region.ErrOutOfRange), s.Close())
	}
	off := int64(r.i) * n
	if r.i == r.k-1 {
		n = s.Size() - off
	}
	return region.Section(s, off, n), nil
}

// OpenBeside implements Beside for the region's version, which is that of each part too.
func (r partOf) OpenBeside(ctx context.Context, suffix string, writable bool) (region.Store, error) {
	b, ok := r.Remote.(Beside)
	if !ok || suffix != transport.VersionSuffix {
		return nil, fmt.Errorf("export %s of a part of a region: %w", suffix, region.ErrNotSupported)
	}
	return b.OpenBeside(ctx, suffix, writable)
}
