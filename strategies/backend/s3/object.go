package s3

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/minio/minio-go/v7"

	"memsync/strategies/region"
)

// Object is a region that is one object, read by ranged GETs. An object cannot
// be written in part, so the region is read-only. It is pinned to the version
// (ETag) that it was opened with: a range of another one gives
// region.ErrMismatch, never a mixture.
type Object struct {
	t      *Table
	name   string
	etag   string
	size   int64
	closed atomic.Bool
}

var (
	_ region.Store      = (*Object)(nil)
	_ region.ReadOnlyer = (*Object)(nil)
)

// OpenObject opens the object Prefix + name of the bucket. One that is not there
// gives region.ErrMissing.
func OpenObject(ctx context.Context, o Options, name string) (*Object, error) {
	t, err := connect(ctx, o)
	if err != nil {
		return nil, err
	}
	name = o.Prefix + name
	info, err := t.c.StatObject(ctx, o.Bucket, name, minio.StatObjectOptions{})
	switch {
	case absent(err):
		err = fmt.Errorf("no object %s in bucket %s: %w", name, o.Bucket, region.ErrMissing)
	case err == nil && info.Size < 1:
		err = fmt.Errorf("object %s has %d bytes: %w", name, info.Size, region.ErrOutOfRange)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open object: %w", classify(err)), t.Close())
	}
	return &Object{t: t, name: name, etag: info.ETag, size: info.Size}, nil
}

// Upload makes the object Prefix + name of size bytes from r, in parts where it is large.
func Upload(ctx context.Context, o Options, name string, r io.Reader, size int64) error {
	t, err := connect(ctx, o)
	if err != nil {
		return err
	}
	if err := t.put(ctx, o.Prefix+name, r, size); err != nil {
		return errors.Join(fmt.Errorf("upload object %s: %w", o.Prefix+name, classify(err)), t.Close())
	}
	return t.Close()
}

// Size implements region.Store.
func (o *Object) Size() int64 { return o.size }

// ReadOnly implements region.ReadOnlyer.
func (o *Object) ReadOnly() bool { return true }

func (o *Object) check(ctx context.Context, n int, off int64) error {
	if o.closed.Load() {
		return region.ErrClosed
	}
	if err := region.CheckRange(off, int64(n), o.size); err != nil {
		return err
	}
	return ctx.Err()
}

// ReadAt implements region.Store: one ranged GET.
func (o *Object) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := o.check(ctx, len(p), off); err != nil || len(p) == 0 {
		return err
	}
	wrap := func(err error) error {
		return fmt.Errorf("read %d bytes at %d of object %s: %w", len(p), off, o.name, err)
	}
	var want minio.GetObjectOptions
	if err := errors.Join(want.SetRange(off, off+int64(len(p))-1), want.SetMatchETag(o.etag)); err != nil {
		return wrap(err)
	}
	body, info, _, err := minio.Core{Client: o.t.c}.GetObject(ctx, o.t.o.Bucket, o.name, want)
	if minio.ToErrorResponse(err).Code == "PreconditionFailed" {
		err = fmt.Errorf("it changed since it was opened: %w", region.ErrMismatch)
	}
	if err != nil {
		return wrap(classify(err))
	}
	defer body.Close()
	if info.Size != int64(len(p)) {
		return wrap(fmt.Errorf("the server announces %d bytes: %w", info.Size, region.ErrMismatch))
	}
	if _, err := io.ReadFull(body, p); err != nil {
		return wrap(err)
	}
	return nil
}

// WriteAt returns region.ErrReadOnly.
func (o *Object) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := o.check(ctx, len(p), off); err != nil {
		return err
	}
	return fmt.Errorf("write %d bytes at %d of object %s: %w", len(p), off, o.name, region.ErrReadOnly)
}

// Flush does nothing: nothing can have been written.
func (o *Object) Flush(ctx context.Context) error { return o.check(ctx, 0, 0) }

// Remove deletes the object.
func (o *Object) Remove(ctx context.Context) error {
	if err := o.t.c.RemoveObject(ctx, o.t.o.Bucket, o.name, minio.RemoveObjectOptions{}); err != nil {
		return fmt.Errorf("delete object %s: %w", o.name, classify(err))
	}
	return nil
}

// Close implements region.Store.
func (o *Object) Close() error {
	if o.closed.Swap(true) {
		return nil
	}
	return o.t.Close()
}
