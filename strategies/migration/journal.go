package migration

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"memsync/strategies/migration/handover"
)

// The journals are small JSON files, written aside, synced and renamed, so that
// a crash leaves the old one or the new one.

func writeJournal(path string, v any) (err error) {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("journal of the migration: %w", err)
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("journal of the migration: %w", errors.Join(err, os.Remove(f.Name())))
	}
	d, err := os.Open(filepath.Dir(path))
	if err == nil {
		err = errors.Join(d.Sync(), d.Close())
	}
	if err != nil {
		return fmt.Errorf("journal of the migration: %w", err)
	}
	return nil
}

func readJournal(path string, v any) (ok bool, err error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err == nil {
		err = json.Unmarshal(b, v)
	}
	if err != nil {
		return false, fmt.Errorf("journal of the migration %s: %w", path, err)
	}
	return true, nil
}

func writeSource(path string, k handover.Kept) error { return writeJournal(path, k) }

func readSource(path string) (k handover.Kept, ok bool, err error) {
	ok, err = readJournal(path, &k)
	return k, ok, err
}

// destinationJournal is what a destination remembers.
type destinationJournal struct {
	ID   handover.ID
	Kept handover.KeptBy
}
