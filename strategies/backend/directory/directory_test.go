package directory_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"memsync/strategies/backend/directory"
	"memsync/strategies/backend/keyed"
	"memsync/strategies/backend/keyed/keyedtest"
)

func TestTable(t *testing.T) {
	keyedtest.Run(t, func(t *testing.T) (keyed.Table, func() keyed.Table) {
		dir := t.TempDir()
		open := func() keyed.Table {
			d, err := directory.Open(dir, 2)
			if err != nil {
				t.Fatal(err)
			}
			return d
		}
		return open(), open
	})
}

// A Put that fails leaves the old value and no half file.
func TestFailedPut(t *testing.T) {
	dir := t.TempDir()
	d, err := directory.Open(dir, 4)
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	if err := os.MkdirAll(filepath.Join(d.Path(1), "in the way"), 0o777); err != nil {
		t.Fatal(err)
	}
	if err := d.Put(ctx, []int64{1}, [][]byte{[]byte("new")}); err == nil {
		t.Error("a file that cannot be replaced gave no error")
	}
	err = filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if strings.Contains(path, ".new-") {
			t.Errorf("left behind: %s", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func TestOpen(t *testing.T) {
	if _, err := directory.Open(filepath.Join(t.TempDir(), "none"), 1); err == nil {
		t.Error("a folder that is not there gave no error")
	}
	f := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(f, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := directory.Open(f, 1); err == nil {
		t.Error("a file gave no error")
	}
}
