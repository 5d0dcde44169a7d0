// Package kv keeps a region in an embedded, ordered key-value store: one file of
// bbolt, a copy-on-write B+tree. It needs no server and survives crashes.
package kv

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"memsync/strategies/backend/keyed"
	"memsync/strategies/region"
)

// Table is a database file. Each Put is one transaction: durable when it returns,
// and all or nothing after a crash.
type Table struct{ db *bbolt.DB }

var _ keyed.Table = (*Table)(nil)

var bucket = []byte("chunks")

// lockTimeout bounds the wait for another process that has the file open.
const lockTimeout = time.Second

// Open opens or makes the database file path. Where another process has it
// open, the error matches region.ErrNotPermitted after a second.
func Open(path string) (*Table, error) {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: lockTimeout, FreelistType: bbolt.FreelistMapType})
	if err == nil {
		err = db.Update(func(tx *bbolt.Tx) error { _, err := tx.CreateBucketIfNotExists(bucket); return err })
		if err != nil {
			err = errors.Join(err, db.Close())
		}
	}
	if errors.Is(err, berrors.ErrTimeout) {
		err = fmt.Errorf("another process has it open: %w", region.ErrNotPermitted)
	}
	if err != nil {
		return nil, fmt.Errorf("open key-value store %s: %w", path, err)
	}
	return &Table{db}, nil
}

func key(number int64) []byte { return binary.BigEndian.AppendUint64(nil, uint64(number)) }

// Get implements keyed.Table, in one transaction: values of one moment.
func (t *Table) Get(ctx context.Context, numbers []int64, use func(i int, value []byte)) error {
	return closed(t.db.View(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucket)
		for i, n := range numbers {
			if err := ctx.Err(); err != nil {
				return err
			}
			if v := b.Get(key(n)); v != nil {
				use(i, v)
			}
		}
		return nil
	}))
}

// Put implements keyed.Table.
func (t *Table) Put(ctx context.Context, numbers []int64, values [][]byte) error {
	return closed(t.db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucket)
		for i, n := range numbers {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := b.Put(key(n), values[i]); err != nil {
				return err
			}
		}
		return nil
	}))
}

func closed(err error) error {
	if errors.Is(err, berrors.ErrDatabaseNotOpen) {
		return region.ErrClosed
	}
	return err
}

// Flush implements keyed.Table: every Put is durable already.
func (t *Table) Flush(ctx context.Context) error { return ctx.Err() }

// Close implements keyed.Table.
func (t *Table) Close() error { return t.db.Close() }
