package hashsync

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies"
	"memsync/strategies/dirty"
	"memsync/strategies/hash"
	"memsync/strategies/region"
)

// Publish copies the region's first content into a file that a writer at the
// source maps, and begins to look for changes in it. With dirty=mtime and
// dirty=inotify the file has a name in dir, else it is a memfd.
func (Strategy) Publish(ctx context.Context, content region.Store, o strategies.PublishOptions) (_ strategies.Publication, err error) {
	so, method, err := options("region", o.Chunk, o.Params)
	if err != nil {
		return nil, err
	}
	writes := dirty.Store
	if o.Pwrite {
		writes = dirty.Pwrite
	}
	if err := method.Check(writes); err != nil {
		return nil, err
	}
	p := &publication{method: method}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Close())
		}
	}()
	size := content.Size()
	named := method.Name == "mtime" || method.Name == "inotify"
	if named {
		p.file, err = os.CreateTemp(o.Dir, "published-*")
	} else {
		var fd int
		if fd, err = unix.MemfdCreate("published", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING); err == nil {
			p.file = os.NewFile(uintptr(fd), "published")
		}
	}
	if err != nil {
		return nil, err
	}
	if err := p.file.Truncate(size); err != nil {
		return nil, err
	}
	if p.mem, err = unix.Mmap(int(p.file.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return nil, fmt.Errorf("map %d bytes: %w", size, err)
	}
	const block = 1 << 20
	for off := int64(0); off < size; off += block {
		if err := content.ReadAt(ctx, p.mem[off:min(off+block, size)], off); err != nil {
			return nil, err
		}
	}
	d, err := method.Open(dirty.Region{File: p.file, Mem: p.mem, Unit: region.PageSize()})
	if err != nil {
		return nil, err
	}
	p.detector = d
	so.Detector, so.Pages = d, method.Unit == "page"
	so.Check = func() error {
		fi, err := p.file.Stat()
		if err == nil && fi.Size() != size {
			err = fmt.Errorf("%d bytes now, %d when it was published: %w", fi.Size(), size, errResized)
		}
		return err
	}
	p.attachment = strategies.Attachment{Kind: strategies.AttachMemfd, File: p.file, Size: size}
	if method.Arms {
		p.attachment.Track = method.Name
	}
	var b hash.Bytes = hash.Mapped(p.mem)
	if how := hash.Handle(o.Params.Text("handle")); how != hash.MappedBytes {
		p.read = &hash.File{Path: fmt.Sprintf("/proc/self/fd/%d", p.file.Fd()), Length: size, How: how}
		b = p.read
	}
	p.source, err = NewSource(ctx, b, func(_ context.Context, b []byte, off int64) error { copy(b, p.mem[off:]); return nil }, so)
	return p, err
}

type publication struct {
	method     dirty.Method
	file       *os.File
	mem        []byte
	detector   dirty.Detector
	attachment strategies.Attachment
	source     *Source
	read       *hash.File // where it is not hashed through the mapping
}

func (p *publication) Attachment() strategies.Attachment { return p.attachment }

// Track registers the writer's armed mapping.
func (p *publication) Track(w strategies.Writer) error {
	p.source.own.Lock() // not in the middle of a Collect
	defer p.source.own.Unlock()
	begin := time.Now()
	err := p.detector.Add(dirty.Writer{PID: w.PID, Base: w.Base, Length: w.Length, Uffd: w.Uffd})
	p.source.mu.Lock()
	p.source.stats.Arming += time.Since(begin)
	p.source.mu.Unlock()
	return err
}

// Control implements strategies.Seeder.
func (p *publication) Control(h strategies.Hooks) { p.source.owner.control(h) }

// Done implements strategies.Seeder.
func (p *publication) Done() <-chan struct{} { return p.source.owner.gone }

func (p *publication) Serve(ctx context.Context, conn net.Conn) error {
	return p.source.Serve(ctx, conn)
}

func (p *publication) Poll(on bool) { p.source.idle.Store(!on) }

// Sync returns once all destinations have what was written before.
func (p *publication) Sync(ctx context.Context) error {
	_, err := p.source.Sync(ctx)
	return err
}

func (p *publication) Stats() strategies.Stats {
	s := p.source.statistics()
	return strategies.Stats{PushRequests: s.Rounds, PushBytes: s.DeltaBytes, Extra: map[string]int64{
		"rounds": s.Rounds, "candidate_bytes": s.Candidates, "changed_bytes": s.Changed, "delta_bytes": s.DeltaBytes, "sent_bytes": s.SentBytes, "filled_bytes": s.FilledBytes, "digest_mismatches": s.Mismatches, "detection_ns": int64(s.Detection), "msync_ns": int64(s.Flushing), "arm_ns": int64(s.Arming)}}
}

// Bandwidth reads the whole region with the workers that hash and returns bytes a second.
func (p *publication) Bandwidth(ctx context.Context) (float64, error) {
	best := 0.0
	for range 3 {
		begin := time.Now()
		if _, err := hash.Scan(ctx, p.mem, p.source.o.Workers); err != nil {
			return 0, err
		}
		best = max(best, float64(len(p.mem))/time.Since(begin).Seconds())
	}
	return best, nil
}

func (p *publication) Close() (err error) {
	if p.source != nil {
		err = p.source.Close() // and the detector
	} else if p.detector != nil {
		err = p.detector.Close()
	}
	if p.read != nil {
		err = errors.Join(err, p.read.Close())
	}
	if p.mem != nil {
		err = errors.Join(err, unix.Munmap(p.mem))
		p.mem = nil
	}
	if p.file != nil {
		err = errors.Join(err, p.file.Close())
	}
	return err
}
