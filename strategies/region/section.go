package region

import "context"

// Section returns the part [off, off+n) of s, which must hold it. It offers views
// where s does. Its Close closes s.
func Section(s Store, off, n int64) Store {
	part := section{s, off, n}
	if _, ok := s.(Viewer); ok {
		return viewSection{part}
	}
	return part
}

type section struct {
	Store
	off, n int64
}

type viewSection struct{ section }

var _ Viewer = viewSection{}

// Size implements Store.
func (s section) Size() int64 { return s.n }

// ReadAt implements Store.
func (s section) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := CheckRange(off, int64(len(p)), s.n); err != nil {
		return err
	}
	return s.Store.ReadAt(ctx, p, s.off+off)
}

// WriteAt implements Store.
func (s section) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := CheckRange(off, int64(len(p)), s.n); err != nil {
		return err
	}
	return s.Store.WriteAt(ctx, p, s.off+off)
}

// View implements Viewer.
func (s viewSection) View(off, n int64) ([]byte, bool) {
	if CheckRange(off, n, s.n) != nil {
		return nil, false
	}
	return s.Store.(Viewer).View(s.off+off, n)
}
