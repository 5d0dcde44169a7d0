package scenarios

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"memsync/scenarios/role"
	"memsync/strategies/attach"
	"memsync/strategies/backend"
	"memsync/strategies/region"
)

// image makes the source hold an ext4 file system whose files, one behind the
// other, are the region: the device has the size of the image, the workload sees
// the files only.
func (r *run) image(ctx context.Context, setup *role.Setup, work role.Work) error {
	folder, path := filepath.Join(setup.Dir, "content"), filepath.Join(setup.Dir, "image")
	if err := os.Mkdir(folder, 0o700); err != nil {
		return err
	}
	part := region.PartSize(work.Size, work.Files)
	for i := range work.Files {
		off, n := int64(i)*part, part
		if i == work.Files-1 {
			n = work.Size - off
		}
		if err := writeContent(ctx, filepath.Join(folder, attach.FileName(i)), work.Content, off, n); err != nil {
			return fmt.Errorf("make the file system's files: %w", err)
		}
	}
	// Room for inodes, bitmaps and the tables of extents.
	size := region.RoundUp(work.Size+work.Size/16+8<<20, 1<<20)
	if err := attach.Format(path, size, folder); err != nil {
		return err
	}
	setup.Backend = backend.Spec{Backend: setup.Backend.Backend, Size: size, Input: path}
	return os.RemoveAll(folder)
}

func writeContent(ctx context.Context, path string, c region.Content, off, n int64) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	buf := make([]byte, 1<<20)
	for end := off + n; off < end && ctx.Err() == nil; {
		p := buf[:min(int64(len(buf)), end-off)]
		c.Fill(p, off)
		if _, err := f.Write(p); err != nil {
			return err
		}
		off += int64(len(p))
	}
	return ctx.Err()
}
