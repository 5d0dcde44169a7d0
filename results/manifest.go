package results

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ManifestFile is the name of the manifest within a result folder.
const ManifestFile = "manifest.json"

// Manifest says where, when and how records were made. The raw fields are what
// their makers hand over: tables of probes, links as read back, calibrations.
type Manifest struct {
	Schema       int               `json:"schema"`
	Host         Host              `json:"host"`
	GoVersion    string            `json:"go_version"`
	Commit       string            `json:"commit"` // empty where the build did not know it
	Dirty        bool              `json:"dirty"`  // the working tree had changes
	CommandLine  []string          `json:"command_line"`
	Seed         uint64            `json:"seed"`
	Start        time.Time         `json:"start"`
	End          time.Time         `json:"end,omitzero"` // of the last sweep that ended
	Features     json.RawMessage   `json:"features,omitempty"`
	Links        []json.RawMessage `json:"links,omitempty"`        // qdiscs as read back
	Calibrations []json.RawMessage `json:"calibrations,omitempty"` // one for each distinct link and sweep that used it
	Parts        []Manifest        `json:"parts,omitempty"`        // of the folders that Merge joined, and of sweeps that went on under another kernel
}

// Host describes the machine. Text is empty where the kernel does not tell.
type Host struct {
	Name        string  `json:"name"`
	CPUModel    string  `json:"cpu_model"`
	CPUs        int     `json:"cpus"`         // that this process may use
	MemoryBytes int64   `json:"memory_bytes"` // MemTotal
	Arch        string  `json:"arch"`
	Kernel      string  `json:"kernel"`        // release
	Lab         string  `json:"lab,omitempty"` // in the lab kernel: the packages that it is made from
	OS          string  `json:"os"`            // distribution
	THP         string  `json:"thp"`           // always, madvise or never
	THPShmem    string  `json:"thp_shmem"`     // the same for tmpfs and memfd
	Governor    string  `json:"governor"`      // of CPU 0
	Clocksource string  `json:"clocksource"`
	Load1       float64 `json:"load1"` // one-minute load average at the start
}

// stamp is the commit that the Makefile has the linker set, "+dirty" behind it where
// files differ from it: the go command finds none in a work tree of git beside the
// repository, nor with -buildvcs=false in GOFLAGS. It never changes.
var stamp string

// NewManifest returns a manifest of this process on this machine, begun now.
// Seed, features and link evidence are the caller's to add.
func NewManifest() Manifest {
	m := Manifest{Schema: Schema, Host: ReadHost(), GoVersion: runtime.Version(), CommandLine: os.Args, Start: time.Now().UTC()}
	if stamp != "" {
		m.Commit, m.Dirty = strings.CutSuffix(stamp, "+dirty")
	} else if b, ok := debug.ReadBuildInfo(); ok {
		for _, s := range b.Settings {
			switch s.Key {
			case "vcs.revision":
				m.Commit = s.Value
			case "vcs.modified":
				m.Dirty = s.Value == "true"
			}
		}
	}
	return m
}

// ReadHost describes this machine from /proc and /sys. What cannot be read is left empty.
func ReadHost() Host {
	h := Host{
		CPUModel: keyed("/proc/cpuinfo", ":", "model name", "Model", "Processor"),
		CPUs:     runtime.NumCPU(),
		Arch:     runtime.GOARCH,
		Lab:      os.Getenv("MEMSYNC_LAB_KERNEL"),
		OS:       strings.Trim(keyed("/etc/os-release", "=", "PRETTY_NAME"), `"`),
		THP:      chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
		THPShmem: chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
		Governor: line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),

		Clocksource: line("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
	}
	h.Name, _ = os.Hostname()
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		h.Kernel = unix.ByteSliceToString(uts.Release[:])
	}
	kib, _ := strconv.ParseInt(strings.TrimSuffix(keyed("/proc/meminfo", ":", "MemTotal"), " kB"), 10, 64)
	h.MemoryBytes = kib << 10
	load, _, _ := strings.Cut(line("/proc/loadavg"), " ")
	h.Load1, _ = strconv.ParseFloat(load, 64)
	return h
}

// line returns the first line of a file.
func line(path string) string {
	b, _ := os.ReadFile(path)
	s, _, _ := strings.Cut(string(b), "\n")
	return s
}

// chosen returns the word in brackets of a file such as "always [madvise] never".
func chosen(path string) string {
	_, s, _ := strings.Cut(line(path), "[")
	s, _, _ = strings.Cut(s, "]")
	return s
}

// keyed returns the value of the first of keys in a file of "key SEP value" lines.
func keyed(path, sep string, keys ...string) string {
	b, _ := os.ReadFile(path)
	for _, key := range keys {
		for l := range strings.Lines(string(b)) {
			if k, v, _ := strings.Cut(l, sep); strings.TrimSpace(k) == key {
				return strings.TrimSpace(v)
			}
		}
	}
	return ""
}

// WriteManifest writes the manifest of a result folder: aside, synced and
// renamed, so that there is always a whole one.
func WriteManifest(dir string, m Manifest) error {
	m.Schema = Schema
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return fmt.Errorf("encode manifest: %w", err)
	}
	return WriteFile(filepath.Join(dir, ManifestFile), append(b, '\n'))
}

// WriteFile replaces a file by data: written aside, synced and renamed, so that
// a reader finds the old or the new content, whole, also after a power cut.
func WriteFile(path string, data []byte) (err error) {
	dir, base := filepath.Split(path)
	if dir == "" {
		dir = "."
	}
	f, err := os.CreateTemp(dir, "."+base+".*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("write %s: %w", path, errors.Join(err, os.Remove(f.Name())))
		}
	}()
	_, err = f.Write(data)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(dir)
}

// ReadManifest reads the manifest of a result folder.
func ReadManifest(dir string) (Manifest, error) {
	path := filepath.Join(dir, ManifestFile)
	b, err := os.ReadFile(path)
	if err != nil {
		return Manifest{}, fmt.Errorf("read manifest: %w", err)
	}
	var m Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return Manifest{}, fmt.Errorf("read manifest %s: %w", path, err)
	}
	if m.Schema != Schema {
		return Manifest{}, fmt.Errorf("read manifest %s: schema %s", path, otherSchema(m.Schema))
	}
	return m, nil
}
