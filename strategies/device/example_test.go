package device_test

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"

	"memsync/strategies/backend"
	"memsync/strategies/device"
	"memsync/strategies/region"
)

// TestMain leaves the examples out, and says so, where FUSE cannot be had.
func TestMain(m *testing.M) {
	if k, err := device.Get("fuse"); err == nil {
		if err := k.Probe(); err != nil {
			fmt.Fprintln(os.Stderr, "no examples:", err)
			_ = flag.Set("test.skip", "^Example")
		}
	}
	os.Exit(m.Run())
}

// show makes a store a file and has another program read it: no process may touch
// a file that it serves itself (docs/deadlocks.md).
func show(s region.Store, program string, args ...string) {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "example-")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	d, err := device.Open(ctx, "fuse", s, device.Options{Dir: dir, ReadOnly: true})
	if err != nil {
		panic(err)
	}
	defer d.Close(ctx)
	out, err := exec.Command(program, append(args, d.Path())...).CombinedOutput()
	fmt.Printf("%s%v\n", out, err)
}

// squares is a region without bytes: each is computed when it is read.
type squares struct{ region.Store }

func (squares) Size() int64                 { return 1 << 40 }
func (squares) Flush(context.Context) error { return nil }
func (squares) Close() error                { return nil }
func (squares) ReadAt(_ context.Context, p []byte, off int64) error {
	for i := range p {
		n := off + int64(i)
		p[i] = byte('0' + n*n%10)
	}
	return nil
}

// A computed pattern of 1 TiB as a file: a Store is four methods of a reader.
func Example_computed() {
	show(squares{}, "head", "-c", "10")
	// Output: 0149656941<nil>
}

// readerAt is any io.ReaderAt (an open file, a zip entry, an S3 object) as a region.
type readerAt struct {
	region.Store
	io.ReaderAt
	size int64
}

func (r readerAt) Size() int64               { return r.size }
func (readerAt) Flush(context.Context) error { return nil }
func (readerAt) Close() error                { return nil }
func (r readerAt) ReadAt(_ context.Context, p []byte, off int64) error {
	n, err := r.ReaderAt.ReadAt(p, off)
	if n == len(p) { // io.EOF may come with the last bytes
		return nil
	}
	return err
}

// Any io.ReaderAt as a file.
func Example_readerAt() {
	text := "to be mapped by any program\n"
	show(readerAt{ReaderAt: strings.NewReader(text), size: int64(len(text))}, "grep", "-o", "m[a-z]*d")
	// Output:
	// mapped
	// <nil>
}

// A file or block device that is there, as another file.
func Example_file() {
	f, err := os.CreateTemp("", "example-")
	if err != nil {
		panic(err)
	}
	defer os.Remove(f.Name())
	_, _ = f.WriteString("kept on disk\n")
	_ = f.Close()
	s, err := backend.OpenLocation(context.Background(), f.Name(), true)
	if err != nil {
		panic(err)
	}
	defer s.Close()
	show(s, "cat")
	// Output:
	// kept on disk
	// <nil>
}
