// Package mountinfo reads the mounts that the calling thread sees.
package mountinfo

import (
	"os"
	"slices"
	"strconv"
	"strings"
)

// Mount is one line of mountinfo.
type Mount struct {
	Point string // where it is mounted, unescaped
	Minor int    // of its device number
	Type  string // of the file system
}

// Read returns the mounts of the calling thread's mount namespace, in the order
// in which they were made. It touches none of them. Source: proc_pid_mountinfo(5).
func Read() ([]Mount, error) {
	b, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return nil, err
	}
	var mounts []Mount
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line) // id parent major:minor root mountpoint ...
		if len(f) < 5 {
			continue
		}
		_, minor, _ := strings.Cut(f[2], ":")
		n, err := strconv.Atoi(minor)
		if err != nil {
			continue
		}
		m := Mount{Point: unescape(f[4]), Minor: n}
		if i := slices.Index(f, "-"); i > 4 && i+1 < len(f) { // after fields whose number varies
			m.Type = f[i+1]
		}
		mounts = append(mounts, m)
	}
	return mounts, nil
}

// unescape undoes the octal escapes \ooo.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
