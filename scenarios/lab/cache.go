package lab

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"memsync/strategies/region"
)

// layout is raised when the contents of the cache change shape.
const layout = 1

// Package is a Debian package that the lab kernel is made from.
type Package struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	SHA256  string `json:"sha256"` // of the .deb
	Size    int64  `json:"size"`   // of the .deb, bytes
}

// Manifest says what a cached lab kernel is.
type Manifest struct {
	Layout   int               `json:"layout"`
	Release  string            `json:"release"` // as uname -r says in the guest
	Archive  string            `json:"archive"`
	Suite    string            `json:"suite"`
	Pinned   bool              `json:"pinned"` // exactly the packages that this project was tested with; Find asks anew
	Fetched  time.Time         `json:"fetched"`
	Packages []Package         `json:"packages"`
	Files    map[string]string `json:"files"` // SHA-256 of each file that runs on the host, by path in the cache
	Modules  string            `json:"modules"`
	Bytes    int64             `json:"bytes"` // of all files
}

// String names the packages, and says whether they are the pinned ones.
func (m Manifest) String() string {
	s := "not pinned"
	if m.Pinned {
		s = "pinned"
	}
	for i := len(m.Packages) - 1; i >= 0; i-- {
		p := m.Packages[i]
		s = fmt.Sprintf("%s %s (sha256 %s), %s", p.Name, p.Version, p.SHA256, s)
	}
	return s
}

// Kernel is a lab kernel in the cache, ready to run. It may be used concurrently.
type Kernel struct {
	Dir string // its folder: linux, lib/, modules/RELEASE/, manifest.json; it may be moved as a whole
	Manifest
}

// CacheDir returns the folder that holds lab kernels: $MEMSYNC_LAB_CACHE, or
// memsync-lab in the user's cache folder.
func CacheDir(env func(string) string) (string, error) {
	if dir := env("MEMSYNC_LAB_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	dir := env("XDG_CACHE_HOME")
	if !filepath.IsAbs(dir) {
		home := env("HOME")
		if !filepath.IsAbs(home) {
			return "", errors.New("neither MEMSYNC_LAB_CACHE, XDG_CACHE_HOME nor HOME names a folder for the lab kernel")
		}
		dir = filepath.Join(home, ".cache")
	}
	return filepath.Join(dir, "memsync-lab"), nil
}

// Find returns the kernel in the cache folder, without any network. It checks
// the files that run on the host against the manifest (10 ms): a difference
// gives region.ErrMismatch. An empty cache gives region.ErrMissing.
func Find(cache string) (*Kernel, error) {
	dir, err := filepath.EvalSymlinks(filepath.Join(cache, "kernel"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("no lab kernel in %s: %w", cache, region.ErrMissing)
	}
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(filepath.Join(dir, "manifest.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("no lab kernel in %s: %w", cache, region.ErrMissing)
	}
	if err != nil {
		return nil, err
	}
	k := &Kernel{Dir: dir}
	if err := json.Unmarshal(b, &k.Manifest); err != nil {
		return nil, fmt.Errorf("read %s/manifest.json: %w", dir, err)
	}
	if k.Layout != layout {
		return nil, fmt.Errorf("the lab kernel in %s has layout %d, not %d: %w", cache, k.Layout, layout, region.ErrMissing)
	}
	for _, name := range hostFiles() {
		sum, _, err := hashFile(filepath.Join(dir, name))
		if err != nil {
			return nil, err
		}
		if sum != k.Files[name] {
			return nil, fmt.Errorf("%s: SHA-256 %s, recorded %s: %w; mend it with memsync lab --refresh", filepath.Join(dir, name), sum, k.Files[name], region.ErrMismatch)
		}
	}
	k.Pinned = pinned(k.Packages) // the pins may be others than those of the program that fetched it
	return k, nil
}

// Ensure returns the kernel in the cache folder, and fetches it if there is
// none. words gets a line on what is done; nil discards. It blocks for some
// seconds when it fetches, until ctx ends.
func Ensure(ctx context.Context, cache string, words io.Writer) (*Kernel, error) {
	k, err := Find(cache)
	if errors.Is(err, region.ErrMissing) {
		return Fetch(ctx, cache, words)
	}
	return k, err
}

// Verify checks every file of the kernel against the manifest (about 0.2 s).
func (k *Kernel) Verify() error {
	sum, _, err := hashTree(filepath.Join(k.Dir, "modules"))
	if err != nil {
		return err
	}
	if sum != k.Modules {
		return fmt.Errorf("%s/modules: digest %s, recorded %s: %w", k.Dir, sum, k.Modules, region.ErrMismatch)
	}
	return nil
}

func hostFiles() []string { return []string{"linux", "lib/" + loader, "lib/libc.so.6"} }

const loader = "ld-linux-x86-64.so.2"

func hashFile(path string) (sum string, size int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	return hex.EncodeToString(h.Sum(nil)), n, err
}

// hashTree digests the names and contents of all files below dir.
func hashTree(dir string) (sum string, size int64, err error) {
	var paths []string
	err = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			paths = append(paths, p)
		}
		return err
	})
	if err != nil {
		return "", 0, err
	}
	slices.Sort(paths)
	h := sha256.New()
	for _, p := range paths {
		s, n, err := hashFile(p)
		if err != nil {
			return "", 0, err
		}
		rel, _ := filepath.Rel(dir, p)
		fmt.Fprintf(h, "%s  %s\n", s, rel)
		size += n
	}
	return hex.EncodeToString(h.Sum(nil)), size, nil
}
