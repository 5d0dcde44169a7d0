package kv_test

import (
	"errors"
	"path/filepath"
	"testing"

	"memsync/strategies/backend/keyed"
	"memsync/strategies/backend/keyed/keyedtest"
	"memsync/strategies/backend/kv"
	"memsync/strategies/region"
)

func TestTable(t *testing.T) {
	keyedtest.Run(t, func(t *testing.T) (keyed.Table, func() keyed.Table) {
		path := filepath.Join(t.TempDir(), "region.db")
		open := func() keyed.Table {
			d, err := kv.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			return d
		}
		return open(), open
	})
}

func TestOpenTwice(t *testing.T) {
	path := filepath.Join(t.TempDir(), "region.db")
	d, err := kv.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, err := kv.Open(path); !errors.Is(err, region.ErrNotPermitted) {
		t.Errorf("opened twice: %v", err)
	}
}
