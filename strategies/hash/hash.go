// Package hash is the registry of hash algorithms that chunks are fingerprinted
// with, and the parallel hashing of a region.
//
// A fingerprint stands for a chunk's bytes: a change is missed where old and new
// bytes have the same digest. Func.Missed gives the odds of that by chance. Where
// an adversary may choose the bytes, odds mean nothing: use a strong algorithm.
package hash

import (
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	stdhash "hash"
	"hash/crc32"
	"hash/crc64"
	"hash/fnv"
	"hash/maphash"
	"math"
	"strings"

	"github.com/cespare/xxhash/v2"
	"github.com/zeebo/blake3"
	"github.com/zeebo/xxh3"
)

// Func is a hash algorithm. It is a value; all methods may be called concurrently.
type Func struct {
	Name string
	Doc  string // one line
	Size int    // bytes of a digest
	// Strong: nobody is known to be able to make two inputs with the same digest
	// for less work than 2^(4*Size) tries.
	Strong bool
	// Portable: the digest is the same in every process, so that it can be sent.
	Portable bool

	sum func(dst, p []byte)
	new func() stdhash.Hash
}

// Sum writes the digest of p to dst[:Size]. It allocates nothing.
func (f Func) Sum(dst, p []byte) { f.sum(dst[:f.Size:f.Size], p) }

// New returns the algorithm as a stream; its Sum gives the same digest.
func (f Func) New() stdhash.Hash { return f.new() }

// Bits is the digest's length in bits.
func (f Func) Bits() int { return 8 * f.Size }

// Missed is the chance that of n chunks with random changes at least one keeps
// its digest, so that its change is missed: 1 - (1 - 2^-b)^n for b bits.
func (f Func) Missed(n int64) float64 {
	return -math.Expm1(float64(n) * math.Log1p(-math.Exp2(-float64(f.Bits()))))
}

// Collides is the chance that any two of n different chunks have the same
// digest: 1 - exp(-n(n-1) / 2^(b+1)), the birthday bound. It is what counts where
// content is found by its digest (moved blocks).
func (f Func) Collides(n int64) float64 {
	return -math.Expm1(-float64(n) * float64(n-1) * math.Exp2(-float64(f.Bits()+1)))
}

// Funcs returns all algorithms.
func Funcs() []Func {
	castagnoli, ecma := crc32.MakeTable(crc32.Castagnoli), crc64.MakeTable(crc64.ECMA)
	seed := maphash.MakeSeed()
	return []Func{
		{Name: "xxh3-64", Doc: "XXH3 (github.com/zeebo/xxh3: AVX2, AVX-512)", Size: 8, Portable: true,
			sum: func(dst, p []byte) { binary.BigEndian.PutUint64(dst, xxh3.Hash(p)) },
			new: func() stdhash.Hash { return xxh3.New() }},
		{Name: "xxh3-128", Doc: "XXH3 with a digest of 128 bits", Size: 16, Portable: true,
			sum: func(dst, p []byte) { b := xxh3.Hash128(p).Bytes(); copy(dst, b[:]) },
			new: func() stdhash.Hash { return wide{xxh3.New()} }},
		{Name: "blake3", Doc: "BLAKE3 (github.com/zeebo/blake3: AVX2)", Size: 32, Strong: true, Portable: true,
			sum: func(dst, p []byte) { b := blake3.Sum256(p); copy(dst, b[:]) },
			new: func() stdhash.Hash { return blake3.New() }},
		{Name: "xxhash64", Doc: "XXH64 (github.com/cespare/xxhash)", Size: 8, Portable: true,
			sum: func(dst, p []byte) { binary.BigEndian.PutUint64(dst, xxhash.Sum64(p)) },
			new: func() stdhash.Hash { return xxhash.New() }},
		{Name: "crc32c", Doc: "CRC-32 with the Castagnoli polynomial (SSE 4.2)", Size: 4, Portable: true,
			sum: func(dst, p []byte) { binary.BigEndian.PutUint32(dst, crc32.Checksum(p, castagnoli)) },
			new: func() stdhash.Hash { return crc32.New(castagnoli) }},
		{Name: "crc64", Doc: "CRC-64 with the ECMA polynomial (tables)", Size: 8, Portable: true,
			sum: func(dst, p []byte) { binary.BigEndian.PutUint64(dst, crc64.Checksum(p, ecma)) },
			new: func() stdhash.Hash { return crc64.New(ecma) }},
		{Name: "sha256", Doc: "SHA-256 (SHA extensions)", Size: sha256.Size, Strong: true, Portable: true,
			sum: func(dst, p []byte) { b := sha256.Sum256(p); copy(dst, b[:]) },
			new: sha256.New},
		{Name: "sha1", Doc: "SHA-1 (SHA extensions); broken: collisions have been made", Size: sha1.Size, Portable: true,
			sum: func(dst, p []byte) { b := sha1.Sum(p); copy(dst, b[:]) },
			new: sha1.New},
		{Name: "md5", Doc: "MD5, rsync's before 3.2; broken: collisions take seconds", Size: md5.Size, Portable: true,
			sum: func(dst, p []byte) { b := md5.Sum(p); copy(dst, b[:]) },
			new: md5.New},
		{Name: "maphash", Doc: "hash/maphash (AES); its seed is random, so digests mean nothing in another process", Size: 8,
			sum: func(dst, p []byte) { binary.LittleEndian.PutUint64(dst, maphash.Bytes(seed, p)) },
			new: func() stdhash.Hash { h := new(maphash.Hash); h.SetSeed(seed); return h }},
		{Name: "fnv1a", Doc: "FNV-1a, a byte at a time: what a loop in plain code reaches", Size: 8, Portable: true,
			sum: func(dst, p []byte) { binary.BigEndian.PutUint64(dst, fnv1a(p)) },
			new: func() stdhash.Hash { return fnv.New64a() }},
	}
}

func fnv1a(p []byte) uint64 {
	h := uint64(14695981039346656037)
	for _, b := range p {
		h = (h ^ uint64(b)) * 1099511628211
	}
	return h
}

// wide is XXH3's stream with the 128-bit digest.
type wide struct{ *xxh3.Hasher }

func (wide) Size() int { return 16 }

func (w wide) Sum(b []byte) []byte { s := w.Sum128().Bytes(); return append(b, s[:]...) }

// Names lists the algorithms; with portable only those whose digests can be sent.
func Names(portable bool) []string {
	var names []string
	for _, f := range Funcs() {
		if f.Portable || !portable {
			names = append(names, f.Name)
		}
	}
	return names
}

// ByName returns an algorithm, or an error that lists the valid names.
func ByName(name string) (Func, error) {
	for _, f := range Funcs() {
		if f.Name == name {
			return f, nil
		}
	}
	return Func{}, fmt.Errorf("unknown hash %q; valid: %s", name, strings.Join(Names(false), ", "))
}
