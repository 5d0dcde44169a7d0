package lab

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// modules is what modules.dep of a kernel says.
type modules struct {
	dir  string
	file map[string]string   // module name -> path below dir
	deps map[string][]string // path -> paths that must be loaded before it, last first
}

func moduleName(path string) string {
	name, _, _ := strings.Cut(filepath.Base(path), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

func readModules(dir string) (*modules, error) {
	f, err := os.Open(filepath.Join(dir, "modules.dep"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	m := &modules{dir: dir, file: map[string]string{}, deps: map[string][]string{}}
	s := bufio.NewScanner(f)
	for s.Scan() {
		path, deps, ok := strings.Cut(s.Text(), ":")
		if ok {
			m.file[moduleName(path)] = path
			m.deps[path] = strings.Fields(deps)
		}
	}
	return m, s.Err()
}

// load loads a module and what it needs; one that is loaded is left alone.
// An unknown name gives region.ErrNotSupported. Linux 3.8 (finit_module).
func (m *modules) load(name, params string) error {
	path, ok := m.file[strings.ReplaceAll(name, "-", "_")]
	if !ok {
		return fmt.Errorf("load module %s: the kernel has none: %w", name, region.ErrNotSupported)
	}
	deps := m.deps[path]
	for i := len(deps) - 1; i >= 0; i-- {
		if err := m.insert(deps[i], ""); err != nil {
			return err
		}
	}
	return m.insert(path, params)
}

// defaults are parameters for modules that nobody gave any.
func defaults() map[string]string {
	return map[string]string{
		"ifb": "numifbs=0", // else it makes two links that nobody asked for
		// No search for partitions: each open of a device would begin with a
		// dozen small reads, one round trip after the other.
		"nbd": "max_part=0",
	}
}

func (m *modules) insert(path, params string) error {
	name := moduleName(path)
	if _, err := os.Stat("/sys/module/" + name); err == nil {
		return nil
	}
	if params == "" {
		params = defaults()[name]
	}
	f, err := os.Open(filepath.Join(m.dir, path))
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), params, 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load module %s: %w", path, err)
	}
	return nil
}

// aliases returns the modules that serve an alias as the kernel asks for it
// ("net-pf-16-proto-16-family-nbd", "rtnl-link-veth", "fs-xfs").
func (m *modules) aliases(alias string) (names []string, err error) {
	f, err := os.Open(filepath.Join(m.dir, "modules.alias"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		p := strings.Fields(s.Text())
		if len(p) != 3 || p[0] != "alias" {
			continue
		}
		if ok, _ := filepath.Match(p[1], alias); ok || p[1] == alias {
			names = append(names, p[2])
		}
	}
	return names, s.Err()
}

func (m *modules) builtin(name string) bool {
	b, err := os.ReadFile(filepath.Join(m.dir, "modules.builtin"))
	if err != nil {
		return false
	}
	for _, l := range strings.Fields(string(b)) {
		if moduleName(l) == strings.ReplaceAll(name, "-", "_") {
			return true
		}
	}
	return false
}

// modprobe is the command of that name in the guest: [-q] [-r] NAME [PARAM=VALUE...],
// called by the kernel as well.
func modprobe(args []string) error {
	dir, err := os.ReadFile(modulesFile)
	if err != nil {
		return err
	}
	remove, quiet := false, false
	if len(args) > 0 {
		args = args[1:] // the script's own path
	}
	for len(args) > 0 && strings.HasPrefix(args[0], "-") {
		switch args[0] {
		case "-r", "--remove":
			remove = true
		case "-q", "--quiet":
			quiet = true
		}
		args = args[1:]
	}
	if len(args) == 0 {
		return errors.New("no module named")
	}
	name := args[0]
	if remove {
		return unix.DeleteModule(strings.ReplaceAll(name, "-", "_"), unix.O_NONBLOCK)
	}
	m, err := readModules(string(dir))
	if err != nil {
		return err
	}
	err = m.load(name, strings.Join(args[1:], " "))
	if !errors.Is(err, region.ErrNotSupported) || m.builtin(name) {
		if errors.Is(err, region.ErrNotSupported) {
			return nil
		}
		return err
	}
	names, aliasErr := m.aliases(name)
	if aliasErr != nil && !errors.Is(aliasErr, fs.ErrNotExist) {
		return aliasErr
	}
	if len(names) == 0 {
		if quiet {
			return errors.New("no module " + name)
		}
		return err
	}
	var errs []error
	for _, n := range names {
		errs = append(errs, m.load(n, strings.Join(args[1:], " ")))
	}
	return errors.Join(errs...)
}
