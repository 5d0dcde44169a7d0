package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"memsync/strategies/region"
)

// pins are the packages that this project was tested with. An archive drops a
// version when the next one comes; Fetch then takes the next one and says so.
func pins() []Package {
	return []Package{
		{"user-mode-linux", "7.2um1", "f947c9244fd79d481299df2ad68961f6b3b7703bff38c4b0e726f861161da62c", 36430088},
		{"libc6", "2.43-7", "5c71715c51103beb4fbba9fe9f8dff604af6610dfa71c70bff342f54a7860803", 1866392},
	}
}

// pinned reports whether packages are the pins, all and no others.
func pinned(packages []Package) bool {
	for _, p := range pins() {
		if !slices.Contains(packages, p) {
			return false
		}
	}
	return len(packages) == len(pins())
}

// Fetch fills the cache folder (anew) from the Debian archive that the machine's
// apt uses, suite sid, and returns the kernel. Nothing is installed and apt's
// own state is left alone. apt verifies the archive's signature; what it gave is
// recorded with its SHA-256, and compared with the project's pins. Environment:
// MEMSYNC_LAB_SUITE, MEMSYNC_LAB_APT_URI choose another suite and archive.
// It blocks for some seconds, until ctx ends; two at once wait for each other.
// Without apt: region.ErrNotSupported.
func Fetch(ctx context.Context, cache string, words io.Writer) (*Kernel, error) {
	if words == nil {
		words = io.Discard
	}
	k, err := fetch(ctx, cache, words)
	if err != nil {
		return nil, fmt.Errorf("fetch the lab kernel into %s: %w", cache, err)
	}
	return k, nil
}

// CanFetch says whether Fetch could start: nil, or region.ErrNotSupported and why.
func CanFetch() error {
	if runtime.GOARCH != "amd64" {
		return fmt.Errorf("the User Mode Linux package of Debian is for amd64, this is %s: %w", runtime.GOARCH, region.ErrNotSupported)
	}
	for _, tool := range []string{"apt-get", "dpkg-deb"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%s is missing: this needs a Debian machine, or a cache folder filled on one and copied here (MEMSYNC_LAB_CACHE): %w", tool, region.ErrNotSupported)
		}
	}
	return nil
}

func fetch(ctx context.Context, cache string, words io.Writer) (*Kernel, error) {
	if err := CanFetch(); err != nil {
		return nil, err
	}
	if err := visible(cache); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}
	before, _ := os.Readlink(filepath.Join(cache, "kernel"))
	unlock, err := lockCache(ctx, cache)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if now, _ := os.Readlink(filepath.Join(cache, "kernel")); now != before {
		return Find(cache) // somebody else has just done it
	}
	work, err := os.MkdirTemp(cache, ".fetch-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(work)

	a, err := newApt(ctx, work)
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(words, "fetching the lab kernel from %s (%s) into %s\n", a.uri, a.suite, cache)
	if err := a.run(ctx, "update"); err != nil {
		return nil, err
	}
	packages, err := a.download(ctx, words)
	if err != nil {
		return nil, err
	}
	m := Manifest{Layout: layout, Archive: a.uri, Suite: a.suite, Pinned: pinned(packages), Fetched: time.Now().UTC().Truncate(time.Second), Packages: packages}
	built := filepath.Join(work, "built")
	if err := assemble(ctx, work, built, &m); err != nil {
		return nil, err
	}
	return install(cache, built, "kernel-"+m.Release+strings.TrimPrefix(filepath.Base(work), ".fetch"), m)
}

func lockCache(ctx context.Context, cache string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(cache, ".lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			_ = f.Close()
			return nil, err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			_ = f.Close()
			return nil, fmt.Errorf("another fetch is going on: %w", context.Cause(ctx))
		}
	}
}

// apt is apt-get with a state of its own in a folder.
type apt struct{ dir, conf, uri, suite string }

func newApt(ctx context.Context, work string) (*apt, error) {
	a := &apt{dir: filepath.Join(work, "debs"), conf: filepath.Join(work, "apt.conf"), uri: os.Getenv("MEMSYNC_LAB_APT_URI"), suite: os.Getenv("MEMSYNC_LAB_SUITE")}
	if a.suite == "" {
		a.suite = "sid"
	}
	if a.uri == "" {
		out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages").Output()
		if err != nil {
			return nil, fmt.Errorf("ask apt for its archives: %w", err)
		}
		if a.uri = debianArchive(string(out)); a.uri == "" {
			return nil, errors.New("apt's sources name no Debian archive: name one in MEMSYNC_LAB_APT_URI")
		}
	}
	for _, d := range []string{"lists/partial", "cache/archives/partial", "debs"} {
		if err := os.MkdirAll(filepath.Join(work, d), 0o755); err != nil {
			return nil, err
		}
	}
	source := fmt.Sprintf("Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nTargets: Packages\n", a.uri, a.suite)
	// Without the file, the keys that the machine's apt trusts.
	for _, key := range []string{"/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp"} {
		if _, err := os.Stat(key); err == nil {
			source += "Signed-By: " + key + "\n"
			break
		}
	}
	if err := os.WriteFile(filepath.Join(work, "lab.sources"), []byte(source), 0o644); err != nil {
		return nil, err
	}
	me := "root"
	if u, err := user.Current(); err == nil {
		me = u.Username
	}
	conf := fmt.Sprintf(`#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
Dir::Etc::SourceList "%[1]s/lab.sources";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
Dir::State::Lists "%[1]s/lists";
Dir::Cache "%[1]s/cache";
Acquire::Retries "2";
Acquire::http::Timeout "20";
Acquire::https::Timeout "20";
APT::Update::Error-Mode "any";
APT::Sandbox::User "%[2]s";
`, work, me)
	return a, os.WriteFile(a.conf, []byte(conf), 0o644)
}

// debianArchive picks the archive from lines "URI RELEASE COMPONENT".
func debianArchive(targets string) string {
	releases := []string{"bullseye", "bookworm", "trixie", "forky", "duke", "sid", "oldoldstable", "oldstable", "stable", "testing", "unstable"}
	for _, l := range strings.Split(targets, "\n") {
		if f := strings.Fields(l); len(f) == 3 && f[2] == "main" && slices.Contains(releases, f[1]) {
			return strings.TrimSuffix(f[0], "/")
		}
	}
	return ""
}

func (a *apt) run(ctx context.Context, args ...string) error {
	c := exec.CommandContext(ctx, "apt-get", append([]string{"-q", "-c", a.conf}, args...)...)
	c.Dir = a.dir
	c.Env = append(os.Environ(), "LC_ALL=C")
	c.WaitDelay = 2 * time.Second
	out, err := c.CombinedOutput()
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("apt-get %s: %w", args[0], context.Cause(ctx))
	}
	var why []string
	for _, l := range strings.Split(string(out), "\n") {
		if strings.HasPrefix(l, "E:") || strings.HasPrefix(l, "Err:") || strings.HasPrefix(l, "W:") {
			why = append(why, l)
		}
	}
	if len(why) > 4 {
		why = why[len(why)-4:]
	}
	return fmt.Errorf("apt-get %s from %s (%s): %w: %s; is the network there? a cache folder filled elsewhere will do too: copy it here and name it in MEMSYNC_LAB_CACHE",
		args[0], a.uri, a.suite, err, strings.Join(why, "; "))
}

// download gets the pinned packages, or else the archive's newest.
func (a *apt) download(ctx context.Context, words io.Writer) (got []Package, err error) {
	var exact, newest []string
	for _, p := range pins() {
		exact = append(exact, p.Name+"="+p.Version)
		newest = append(newest, p.Name)
	}
	err = a.run(ctx, append([]string{"download"}, exact...)...)
	if err != nil && ctx.Err() == nil {
		fmt.Fprintf(words, "the archive does not have %s: taking its newest, which this memsync was not tested with\n", strings.Join(exact, " "))
		err = a.run(ctx, append([]string{"download"}, newest...)...)
	}
	if err != nil {
		return nil, err
	}
	debs, err := filepath.Glob(filepath.Join(a.dir, "*.deb"))
	if err != nil {
		return nil, err
	}
	for _, deb := range debs {
		out, err := exec.CommandContext(ctx, "dpkg-deb", "-W", "--showformat=${Package} ${Version}", deb).Output()
		name, version, ok := strings.Cut(string(out), " ")
		if err != nil || !ok {
			return nil, fmt.Errorf("read %s: %w", filepath.Base(deb), err)
		}
		sum, size, err := hashFile(deb)
		if err != nil {
			return nil, err
		}
		p := Package{name, version, sum, size}
		for _, want := range pins() {
			if want.Name == name && want.Version == version && want != p {
				return nil, fmt.Errorf("%s %s: SHA-256 %s of %d bytes, want %s of %d: %w", name, version, sum, size, want.SHA256, want.Size, region.ErrMismatch)
			}
		}
		got = append(got, p)
	}
	if len(got) != len(pins()) {
		return nil, fmt.Errorf("apt-get download left %d packages, want %d", len(got), len(pins()))
	}
	return got, nil
}

// assemble unpacks the packages and puts a kernel together in the folder built.
func assemble(ctx context.Context, work, built string, m *Manifest) error {
	root := filepath.Join(work, "root")
	debs, _ := filepath.Glob(filepath.Join(work, "debs", "*.deb"))
	for _, deb := range debs {
		if out, err := exec.CommandContext(ctx, "dpkg-deb", "-x", deb, root).CombinedOutput(); err != nil {
			return fmt.Errorf("unpack %s: %w: %s", filepath.Base(deb), err, bytes.TrimSpace(out))
		}
	}
	if err := os.MkdirAll(filepath.Join(built, "lib"), 0o755); err != nil {
		return err
	}
	libs := filepath.Join(root, "usr/lib/x86_64-linux-gnu")
	if _, err := os.Stat(libs); errors.Is(err, fs.ErrNotExist) {
		libs = filepath.Join(root, "lib/x86_64-linux-gnu") // before Debian 13
	}
	for _, name := range []string{loader, "libc.so.6"} {
		if err := copyFile(filepath.Join(built, "lib", name), filepath.Join(libs, name)); err != nil {
			return err
		}
	}
	program, err := os.ReadFile(filepath.Join(root, "usr/bin/linux.uml"))
	if err != nil {
		return err
	}
	if program, err = relocatable(program); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(built, "linux"), program, 0o755); err != nil {
		return err
	}
	if err := os.Rename(filepath.Join(root, "usr/lib/uml/modules"), filepath.Join(built, "modules")); err != nil {
		return err
	}

	c := exec.CommandContext(ctx, filepath.Join(built, "linux"), "--version")
	c.Dir, c.Env = built, []string{"LD_LIBRARY_PATH=lib"}
	out, err := c.Output()
	if err != nil {
		return fmt.Errorf("the fetched kernel does not start: %w", err)
	}
	m.Release = strings.TrimSpace(string(out))
	if _, err := os.Stat(filepath.Join(built, "modules", m.Release, "modules.dep")); err != nil {
		return fmt.Errorf("kernel %q has no modules: %w", m.Release, err)
	}
	m.Files = map[string]string{}
	for _, name := range hostFiles() {
		sum, size, err := hashFile(filepath.Join(built, name))
		if err != nil {
			return err
		}
		m.Files[name] = sum
		m.Bytes += size
	}
	sum, size, err := hashTree(filepath.Join(built, "modules"))
	m.Modules, m.Bytes = sum, m.Bytes+size
	return err
}

// relocatable makes the program take its loader from lib/ below its working
// folder: the kernel resolves PT_INTERP like any path, so a relative one works,
// and the machine's own C library may be too old for it.
func relocatable(program []byte) ([]byte, error) {
	old, own := []byte("\x00/lib64/"+loader+"\x00"), []byte("\x00lib/"+loader+"\x00\x00\x00\x00")
	if n := bytes.Count(program, old); n != 1 || len(old) != len(own) {
		return nil, fmt.Errorf("the kernel names its loader %s %d times, want once", loader, n)
	}
	return bytes.Replace(program, old, own, 1), nil
}

// install moves a built kernel into the cache under a name of its own and then
// switches the link "kernel" to it, so that a reader sees the old or the new one.
func install(cache, built, name string, m Manifest) (*Kernel, error) {
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(built, "manifest.json"), append(b, '\n'), 0o644); err != nil {
		return nil, err
	}
	if err := os.Chmod(built, 0o755); err != nil {
		return nil, err
	}
	if err := os.Rename(built, filepath.Join(cache, name)); err != nil {
		return nil, err
	}
	link := filepath.Join(cache, "kernel")
	old, _ := os.Readlink(link)
	if err := os.Symlink(name, link+".new"); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	if err := os.Rename(link+".new", link); err != nil {
		return nil, err
	}
	if old != "" && old != name && filepath.Base(old) == old {
		_ = os.RemoveAll(filepath.Join(cache, old))
	}
	return Find(cache)
}
