// Package s3 keeps a region in a bucket of an S3 server: an object a chunk, or
// all of it in one object that is read by ranges.
package s3

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"golang.org/x/sync/errgroup"

	"memsync/strategies/backend/keyed"
	"memsync/strategies/region"
)

// Options of a connection.
type Options struct {
	Addr           string // host:port
	TLS            bool
	Access, Secret string // credentials; version 4 signatures
	Region         string // empty is us-east-1
	Bucket, Prefix string
	// Dial makes connections; nil is the process's own network.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// Parallel is how many requests of one call run at once; 0 is 16.
	Parallel int
}

// Table keeps an object a chunk. An object is durable and visible when Put returns.
type Table struct {
	c         *minio.Client
	transport *http.Transport
	o         Options
}

var _ keyed.Table = (*Table)(nil)

// connect makes a client and checks that the bucket is there.
func connect(ctx context.Context, o Options) (*Table, error) {
	if o.Parallel == 0 {
		o.Parallel = 16
	}
	if o.Region == "" {
		o.Region = "us-east-1"
	}
	tr := &http.Transport{DialContext: o.Dial, MaxIdleConnsPerHost: 4 * o.Parallel, DisableCompression: true}
	c, err := minio.New(o.Addr, &minio.Options{
		Creds: credentials.NewStaticV4(o.Access, o.Secret, ""), Secure: o.TLS, Transport: tr, Region: o.Region,
		BucketLookup: minio.BucketLookupPath, MaxRetries: 1, // keyed.Store repeats
	})
	if err != nil {
		return nil, fmt.Errorf("open s3 at %s: %w", o.Addr, err)
	}
	t := &Table{c, tr, o}
	ok, err := c.BucketExists(ctx, o.Bucket)
	if err == nil && !ok {
		err = fmt.Errorf("no bucket %s: %w", o.Bucket, region.ErrMissing)
	}
	if err != nil {
		tr.CloseIdleConnections()
		return nil, fmt.Errorf("open s3 at %s: %w", o.Addr, classify(err))
	}
	return t, nil
}

// MakeBucket makes the bucket of o where it is not there yet.
func MakeBucket(ctx context.Context, o Options) error {
	t, err := connect(ctx, o)
	switch {
	case err == nil:
		return t.Close()
	case !errors.Is(err, region.ErrMissing):
		return err
	}
	tr := &http.Transport{DialContext: o.Dial}
	defer tr.CloseIdleConnections()
	c, err := minio.New(o.Addr, &minio.Options{Creds: credentials.NewStaticV4(o.Access, o.Secret, ""), Secure: o.TLS, Transport: tr,
		Region: "us-east-1", BucketLookup: minio.BucketLookupPath})
	if err == nil {
		err = c.MakeBucket(ctx, o.Bucket, minio.MakeBucketOptions{})
	}
	if err != nil {
		return fmt.Errorf("make bucket %s: %w", o.Bucket, classify(err))
	}
	return nil
}

// OpenTable connects to an existing bucket. Wrong credentials match
// keyed.ErrPermanent, a bucket that is not there region.ErrMissing.
func OpenTable(ctx context.Context, o Options) (*Table, error) { return connect(ctx, o) }

// classify marks what another try does not mend.
func classify(err error) error {
	switch minio.ToErrorResponse(err).Code {
	case "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidBucketName":
		return fmt.Errorf("%w: %w", err, keyed.ErrPermanent)
	case "NoSuchBucket":
		return fmt.Errorf("%w: %w", err, region.ErrMissing)
	}
	return err
}

func absent(err error) bool { return minio.ToErrorResponse(err).Code == "NoSuchKey" }

func (t *Table) name(number int64) string { return fmt.Sprintf("%s%012x", t.o.Prefix, number) }

// Get implements keyed.Table: one GET a chunk, several at once.
func (t *Table) Get(ctx context.Context, numbers []int64, use func(i int, value []byte)) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	got := make([][]byte, len(numbers))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(t.o.Parallel)
	for i, n := range numbers {
		g.Go(func() error {
			b, err := t.object(gctx, t.name(n), 0, 0)
			if absent(err) {
				return nil
			}
			got[i] = b
			return classify(err)
		})
	}
	if err := g.Wait(); err != nil {
		return errors.Join(ctx.Err(), err)
	}
	for i, b := range got {
		if b != nil {
			use(i, b)
		}
	}
	return nil
}

// object reads an object, or n bytes of it from off on where n is not 0.
func (t *Table) object(ctx context.Context, name string, off, n int64) ([]byte, error) {
	var o minio.GetObjectOptions
	if n > 0 {
		if err := o.SetRange(off, off+n-1); err != nil {
			return nil, err
		}
	}
	body, info, _, err := minio.Core{Client: t.c}.GetObject(ctx, t.o.Bucket, name, o)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	const most = 64 << 20 // larger than any chunk; a server must not fill our memory
	if info.Size < 0 || info.Size > most {
		return nil, fmt.Errorf("object %s: the server announces %d bytes: %w", name, info.Size, region.ErrMismatch)
	}
	b := make([]byte, info.Size)
	if _, err := io.ReadFull(body, b); err != nil {
		return nil, fmt.Errorf("object %s: %d bytes announced: %w", name, info.Size, err)
	}
	return b, nil
}

// Put implements keyed.Table: one PUT a chunk, several at once.
func (t *Table) Put(ctx context.Context, numbers []int64, values [][]byte) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(t.o.Parallel)
	for i, n := range numbers {
		g.Go(func() error {
			return classify(t.put(gctx, t.name(n), bytes.NewReader(values[i]), int64(len(values[i]))))
		})
	}
	return errors.Join(ctx.Err(), g.Wait())
}

func (t *Table) put(ctx context.Context, name string, r io.Reader, size int64) error {
	_, err := t.c.PutObject(ctx, t.o.Bucket, name, r, size, minio.PutObjectOptions{ContentType: "application/octet-stream", DisableContentSha256: t.o.TLS})
	return err
}

// Flush implements keyed.Table.
func (t *Table) Flush(ctx context.Context) error { return ctx.Err() }

// Clear deletes all objects whose names begin with the table's prefix.
func (t *Table) Clear(ctx context.Context) error {
	objects := t.c.ListObjects(ctx, t.o.Bucket, minio.ListObjectsOptions{Prefix: t.o.Prefix, Recursive: true})
	for e := range t.c.RemoveObjects(ctx, t.o.Bucket, objects, minio.RemoveObjectsOptions{}) {
		return fmt.Errorf("delete objects of %s: %s: %w", t.o.Prefix, e.ObjectName, classify(e.Err))
	}
	return ctx.Err()
}

// Close implements keyed.Table.
func (t *Table) Close() error { t.transport.CloseIdleConnections(); return nil }
