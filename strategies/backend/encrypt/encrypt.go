// Package encrypt keeps the values of a keyed.Table encrypted in a store that is not
// trusted: AES-256-GCM (NIST SP 800-38D) with a key of the region's own, derived from the
// user's by HKDF (RFC 5869). The region, the chunk's number and its version are bound to
// the value as associated data, so that the store can neither change a chunk nor give
// another chunk's or another region's in its place. Which version is the last one is
// kept here and not in the store, so that it cannot give an older one either, nor none.
package encrypt

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"

	"memsync/strategies/backend/keyed"
	"memsync/strategies/region"
)

// Errors of values that a store gives back. All but ErrKey match region.ErrMismatch.
var (
	// ErrKey is of a value or record that another key has encrypted.
	ErrKey = errors.New("it is encrypted with another key")
	// ErrOld is of a chunk that was true once, and of one that is gone.
	ErrOld = fmt.Errorf("it is not the last version that was written: %w", region.ErrMismatch)
	// ErrForged is of bytes that nobody with the key has written, for this chunk of this region.
	ErrForged = fmt.Errorf("its bytes are not what was encrypted for this chunk: %w", region.ErrMismatch)
)

const (
	keySize   = 32
	idSize    = 8
	saltSize  = 16
	nonceSize = 12
	tagSize   = 16
	formatOne = 1

	headSize = 1 + idSize + 8 + nonceSize // format, key's id, version, nonce
	// Overhead is how many bytes a value is longer than without.
	Overhead = headSize + tagSize
)

// Key is a user's key. It is not printed.
type Key struct{ b [keySize]byte }

// String hides it.
func (Key) String() string { return "(key)" }

// GoString hides it.
func (Key) GoString() string { return "(key)" }

// KeyEnv is the environment variable that ReadKey reads where the path is "env".
const KeyEnv = "MEMSYNC_ENCRYPTION_KEY"

// ReadKey reads a key from a file of 32 bytes, or of 64 hexadecimal digits or base64; or
// such a text from KeyEnv where path is "env". Its errors say nothing of the content.
func ReadKey(path string) (k Key, err error) {
	b := []byte(os.Getenv(KeyEnv))
	from := KeyEnv
	if path != "env" {
		from = path
		f, err := os.Open(path)
		if err != nil {
			return k, err
		}
		defer f.Close()
		b = make([]byte, 4*keySize)
		n, err := f.Read(b)
		if err != nil {
			return k, fmt.Errorf("key %s: %w", path, err)
		}
		b = b[:n]
	}
	if k, err = parseKey(b); err != nil {
		return k, fmt.Errorf("key of %s: %w", from, err)
	}
	return k, nil
}

func parseKey(b []byte) (k Key, err error) {
	if len(b) == keySize {
		return Key{[keySize]byte(b)}, nil
	}
	text := strings.TrimSpace(string(b))
	for _, decode := range []func(string) ([]byte, error){hex.DecodeString, base64.StdEncoding.DecodeString} {
		if got, err := decode(text); err == nil && len(got) == keySize {
			return Key{[keySize]byte(got)}, nil
		}
	}
	return k, fmt.Errorf("want %d bytes, as they are, in hexadecimal or in base64", keySize)
}

// id tells keys apart, and says nothing else of them.
func (k Key) id() (id [idSize]byte, err error) {
	b, err := hkdf.Key(sha256.New, k.b[:], nil, "memsync key id", idSize)
	copy(id[:], b)
	return id, err
}

// Table is a keyed.Table over another one. Its Puts of one number come one after
// another, so that the version that is there last is the one that was given last.
type Table struct {
	inner keyed.Table
	aead  cipher.AEAD
	id    [idSize]byte
	salt  [saltSize]byte // of the region

	puts [64]chan struct{} // by number: held by a Put

	mu       sync.Mutex
	versions map[int64]*version
}

// version is of one chunk: the last one that the store has for sure, and the last that
// was sent. What is between may or may not be there.
type version struct{ sure, sent uint64 }

var _ keyed.Table = (*Table)(nil)

// New makes a Table of inner, which it takes over. record is what Record returned for
// these values, nil for a region that has none yet.
func New(inner keyed.Table, k Key, record []byte) (*Table, error) {
	t := &Table{inner: inner, versions: map[int64]*version{}}
	for i := range t.puts {
		t.puts[i] = make(chan struct{}, 1)
	}
	var err error
	if t.id, err = k.id(); err != nil {
		return nil, err
	}
	if record == nil {
		if _, err := rand.Read(t.salt[:]); err != nil {
			return nil, err
		}
	} else if len(record) < recordHead+tagSize || record[0] != formatOne {
		return nil, fmt.Errorf("record of versions of %d bytes: %w", len(record), ErrForged)
	} else if [idSize]byte(record[1:]) != t.id {
		return nil, fmt.Errorf("record of versions: %w", ErrKey)
	} else {
		t.salt = [saltSize]byte(record[1+idSize:])
	}
	own, err := hkdf.Key(sha256.New, k.b[:], t.salt[:], "memsync chunks", keySize)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(own)
	if err != nil {
		return nil, err
	}
	if t.aead, err = cipher.NewGCM(block); err != nil {
		return nil, err
	}
	if record != nil {
		err = t.load(record)
	}
	return t, err
}

// bound is what a value is bound to.
func (t *Table) bound(what byte, number int64, v uint64) []byte {
	b := append([]byte("memsync"), formatOne, what)
	b = append(b, t.salt[:]...)
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(b, uint64(number)), v)
}

const (
	boundChunk  = 'c'
	boundRecord = 'r'
)

// seal makes the value of a chunk. A region's key seals less than 2^32 of them before two
// of the random nonces are likely to be the same (SP 800-38D, 8.3).
func (t *Table) seal(number int64, v uint64, chunk []byte) ([]byte, error) {
	b := make([]byte, headSize, headSize+len(chunk)+tagSize)
	b[0] = formatOne
	copy(b[1:], t.id[:])
	binary.BigEndian.PutUint64(b[1+idSize:], v)
	nonce := b[headSize-nonceSize : headSize]
	if _, err := rand.Read(nonce); err != nil {
		return nil, err
	}
	return t.aead.Seal(b, nonce, chunk, t.bound(boundChunk, number, v)), nil
}

// open undoes seal.
func (t *Table) open(number int64, b []byte) (chunk []byte, v uint64, err error) {
	if len(b) < Overhead || b[0] != formatOne {
		return nil, 0, fmt.Errorf("chunk %d of %d bytes: %w", number, len(b), ErrForged)
	}
	if [idSize]byte(b[1:]) != t.id {
		return nil, 0, fmt.Errorf("chunk %d: %w", number, ErrKey)
	}
	v = binary.BigEndian.Uint64(b[1+idSize:])
	chunk, err = t.aead.Open(nil, b[headSize-nonceSize:headSize], b[headSize:], t.bound(boundChunk, number, v))
	if err != nil {
		return nil, 0, fmt.Errorf("chunk %d: %w", number, ErrForged)
	}
	return chunk, v, nil
}

// now returns the versions of a chunk.
func (t *Table) now(number int64) version {
	t.mu.Lock()
	defer t.mu.Unlock()
	if v := t.versions[number]; v != nil {
		return *v
	}
	return version{}
}

// Get implements keyed.Table. A value that is not what was written last is an error.
func (t *Table) Get(ctx context.Context, numbers []int64, use func(i int, value []byte)) error {
	before := make([]version, len(numbers))
	for i, n := range numbers {
		before[i] = t.now(n)
	}
	found := make([]bool, len(numbers))
	var wrong error
	err := t.inner.Get(ctx, numbers, func(i int, b []byte) {
		chunk, v, err := t.open(numbers[i], b)
		if err == nil && (v < before[i].sure || v > t.now(numbers[i]).sent) {
			err = fmt.Errorf("chunk %d, version %d of %d: %w", numbers[i], v, before[i].sure, ErrOld)
		}
		found[i] = true
		if err != nil {
			wrong = errors.Join(wrong, permanent{err})
			return
		}
		use(i, chunk)
	})
	if err = errors.Join(err, wrong); err != nil {
		return err
	}
	for i, ok := range found {
		if !ok && before[i].sure > 0 {
			return permanent{fmt.Errorf("chunk %d is gone: %w", numbers[i], ErrOld)}
		}
	}
	return nil
}

// permanent is an error that no repetition mends.
type permanent struct{ error }

func (p permanent) Unwrap() []error { return []error{p.error, keyed.ErrPermanent} }

// lock keeps other Puts from numbers.
func (t *Table) lock(ctx context.Context, numbers []int64) (unlock func(), err error) {
	var which []uint64
	for _, n := range numbers {
		which = append(which, uint64(n)%uint64(len(t.puts)))
	}
	slices.Sort(which) // one order for all, so that no two wait for each other
	which = slices.Compact(which)
	free := func(which []uint64) {
		for _, w := range which {
			<-t.puts[w]
		}
	}
	for i, w := range which {
		select {
		case t.puts[w] <- struct{}{}:
		case <-ctx.Done():
			free(which[:i])
			return nil, ctx.Err()
		}
	}
	return func() { free(which) }, nil
}

// Put implements keyed.Table.
func (t *Table) Put(ctx context.Context, numbers []int64, values [][]byte) error {
	unlock, err := t.lock(ctx, numbers)
	if err != nil {
		return err
	}
	defer unlock()
	sealed, sent := make([][]byte, len(values)), make([]uint64, len(values))
	for i, n := range numbers {
		t.mu.Lock()
		v := t.versions[n]
		if v == nil {
			v = &version{}
			t.versions[n] = v
		}
		v.sent++
		sent[i] = v.sent
		t.mu.Unlock()
		var err error
		if sealed[i], err = t.seal(n, sent[i], values[i]); err != nil {
			return err
		}
	}
	if err := t.inner.Put(ctx, numbers, sealed); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, n := range numbers {
		t.versions[n].sure = max(t.versions[n].sure, sent[i])
	}
	return nil
}

// Flush implements keyed.Table.
func (t *Table) Flush(ctx context.Context) error { return t.inner.Flush(ctx) }

// Close implements keyed.Table.
func (t *Table) Close() error { return t.inner.Close() }

// Clear deletes the region's values, where the inner table can (see package backend).
func (t *Table) Clear(ctx context.Context) error {
	c, ok := t.inner.(interface{ Clear(context.Context) error })
	if !ok {
		return nil
	}
	return c.Clear(ctx)
}

const recordHead = 1 + idSize + saltSize + nonceSize

// Record returns the versions, for New to go on with the same values: encrypted, and as
// long as 24 bytes for each chunk that was written. It must be kept where who has the
// store cannot replace it: with an older record and the store of then, nobody can tell.
func (t *Table) Record() ([]byte, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	numbers := make([]int64, 0, len(t.versions))
	for n := range t.versions {
		numbers = append(numbers, n)
	}
	slices.Sort(numbers)
	plain := make([]byte, 0, 24*len(numbers))
	for _, n := range numbers {
		v := t.versions[n]
		plain = binary.BigEndian.AppendUint64(plain, uint64(n))
		plain = binary.BigEndian.AppendUint64(plain, v.sure)
		plain = binary.BigEndian.AppendUint64(plain, v.sent)
	}
	b := make([]byte, recordHead, recordHead+len(plain)+tagSize)
	b[0] = formatOne
	copy(b[1:], t.id[:])
	copy(b[1+idSize:], t.salt[:])
	nonce := b[recordHead-nonceSize:]
	if _, err := rand.Read(nonce); err != nil {
		return nil, err
	}
	return t.aead.Seal(b, nonce, plain, t.bound(boundRecord, 0, 0)), nil
}

func (t *Table) load(record []byte) error {
	plain, err := t.aead.Open(nil, record[recordHead-nonceSize:recordHead], record[recordHead:], t.bound(boundRecord, 0, 0))
	if err != nil {
		return fmt.Errorf("record of versions: %w", ErrForged)
	}
	return t.decode(plain)
}

// decode reads what Record wrote.
func (t *Table) decode(plain []byte) error {
	if len(plain)%24 != 0 {
		return fmt.Errorf("record of versions with %d bytes: %w", len(plain), ErrForged)
	}
	last := int64(-1)
	for ; len(plain) > 0; plain = plain[24:] {
		n := int64(binary.BigEndian.Uint64(plain))
		v := version{binary.BigEndian.Uint64(plain[8:]), binary.BigEndian.Uint64(plain[16:])}
		if n <= last || v.sure > v.sent || v.sent == 0 {
			return fmt.Errorf("record of versions, chunk %d: %w", n, ErrForged)
		}
		last = n
		t.versions[n] = &v
	}
	return nil
}
