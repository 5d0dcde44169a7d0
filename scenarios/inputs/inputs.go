// Package inputs makes files as real programs write them, traces of what
// real programs read of them, for figures about formats, and says what programs a
// user runs on them, for the case studies. A name such as
// "made:sqlite" stands for the file, "made:sqlite.trace" for what a program
// reads of it. They are made once and kept in the user's cache folder.
package inputs

import (
	"archive/zip"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"memsync/scenarios/program"
	"memsync/strategies/backend"
	"memsync/strategies/device"
	"memsync/strategies/order"
	"memsync/strategies/param"
	"memsync/strategies/region"
)

// Prefix begins the names.
const Prefix = "made:"

// version is raised when what is made changes.
const version = "1"

// Size is about how large the files are, bytes.
const Size = 64 << 20

// Input is a file that can be made, and programs that read it.
type Input struct {
	Name string
	Doc  string // one line: what it is and what the program does
	tool string // what must be installed, beside what the programs need
	pkg  string // Debian's package of it
	make func(ctx context.Context, dir, file string) error
	// read is the program that reads the file. The
	// variant 0 makes NAME.trace, 1 NAME.other: the same kind of work on other parts.
	read func(variant uint64) program.Step
	// use is what a user does with it, see Program; nil is nothing that is of interest.
	use func() []program.Step
}

// All lists the inputs.
func All() []Input {
	return []Input{
		{"sqlite", "a table of 180,000 rows with an index; sqlite3 looks up 20 of them by the index", "sqlite3", "sqlite3", makeSQLite, readSQLite, useSQLite},
		{"zip", "an archive of 16,000 members; unzip prints one", "unzip", "unzip", makeZip, readZip, nil},
		{"ext4", "a file system of 400 folders; debugfs lists 40 of them and reads a file in each", "debugfs", "e2fsprogs", makeExt4, readExt4, useExt4},
		{"mp4", "a film whose index is at the end; ffmpeg decodes its first second", "ffmpeg", "ffmpeg", makeMP4, readMP4, useMP4},
		{"game", "a game's assets in an archive, those of its 16 levels mixed; unzip reads those of a level", "unzip", "unzip", makeGame, readLevel, useGame},
		{"todo", "the state of a TODO list, a line an item; the first or last of them are shown", "head", "coreutils", makeTodo, readTodo, nil},
		{"app", "a program with its data in one file: sqlite3 with a database behind it; it executes, and looks up 20 rows", "sqlite3", "sqlite3", makeApp, readApp, useApp},
	}
}

// Program returns what a user does with the input called name (without Prefix). Errors
// are as Path's.
func Program(name string) (program.Program, error) {
	for _, in := range All() {
		if in.Name == name && in.use != nil {
			return program.Program{Name: name, Steps: in.use()}, nil
		}
	}
	return program.Program{}, fmt.Errorf("unknown program %q; valid: %s", name, strings.Join(Programs(), ", "))
}

// Programs lists the names that Program knows.
func Programs() []string {
	var names []string
	for _, in := range All() {
		if in.use != nil {
			names = append(names, in.Name)
		}
	}
	return names
}

// Names lists all names that Path knows.
func Names() []string {
	var names []string
	for _, in := range All() {
		names = append(names, Prefix+in.Name, Prefix+in.Name+".trace", Prefix+in.Name+".other")
	}
	return names
}

// Path returns the path of what name stands for, and makes it where it is not
// there yet, which takes seconds, and for traces a FUSE mount. A tool that is not
// installed gives region.ErrNotSupported, and an unknown name an error that lists the valid ones.
func Path(ctx context.Context, name string) (string, error) {
	base, suffix, _ := strings.Cut(strings.TrimPrefix(name, Prefix), ".")
	all := All()
	i := slices.IndexFunc(all, func(in Input) bool { return in.Name == base })
	if i < 0 || !slices.Contains(Names(), name) {
		return "", fmt.Errorf("unknown input %q; valid: %s", name, strings.Join(Names(), ", "))
	}
	in := all[i]
	dir, err := os.UserCacheDir()
	if err != nil {
		dir = os.TempDir()
	}
	dir = filepath.Join(dir, "memsync-inputs", version)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("input %s: %w", name, err)
	}
	path := filepath.Join(dir, strings.TrimPrefix(name, Prefix))
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	if _, err := exec.LookPath(in.tool); err != nil {
		return "", fmt.Errorf("input %s: %s is missing, apt-get install %s: %w", name, in.tool, in.pkg, region.ErrNotSupported)
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	scratch, err := os.MkdirTemp(dir, "new-")
	if err != nil {
		return "", fmt.Errorf("input %s: %w", name, err)
	}
	defer os.RemoveAll(scratch)
	aside := filepath.Join(scratch, "file")
	if suffix == "" {
		err = in.make(ctx, scratch, aside)
	} else {
		var file string
		if file, err = Path(ctx, Prefix+base); err == nil {
			err = record(ctx, in, file, scratch, aside, map[string]uint64{"trace": 0, "other": 1}[suffix])
		}
	}
	if err == nil {
		err = os.Rename(aside, path)
	}
	if err != nil {
		return "", fmt.Errorf("make input %s: %w", name, err)
	}
	return path, nil
}

// record runs the program on the file behind a FUSE mount, and saves what it
// reads. The program is another process: this one does not touch the mount.
func record(ctx context.Context, in Input, file, dir, out string, variant uint64) (err error) {
	fi, err := os.Stat(file)
	if err != nil {
		return err
	}
	store, err := backend.Open(ctx, backend.Spec{Backend: "memory", Size: fi.Size(), Input: file}, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	recorder := order.NewRecorder(store)
	// Without read-ahead a trace has what the program asked for.
	p, err := param.New(device.Params("fuse"), []string{"read_ahead=0"})
	if err != nil {
		return err
	}
	dev, err := device.Open(ctx, "fuse", recorder, device.Options{Dir: dir, Chunk: 4096, ReadOnly: true, Mode: 0o500, Params: p})
	if err != nil {
		return err
	}
	_, err = program.Run(ctx, program.Program{Name: in.Name, Steps: []program.Step{in.read(variant)}}, dev.Path(), dir, 0)
	if err = errors.Join(err, dev.Close(ctx)); err != nil {
		return err
	}
	return recorder.Save(out)
}

// run runs a program in dir and returns its standard output.
func run(ctx context.Context, dir, stdin string, argv ...string) (string, error) {
	c := exec.CommandContext(ctx, argv[0], argv[1:]...)
	c.Dir, c.Stdin, c.WaitDelay = dir, strings.NewReader(stdin), time.Second
	var stderr strings.Builder
	c.Stderr = &stderr
	out, err := c.Output()
	if errors.Is(err, exec.ErrNotFound) {
		return "", fmt.Errorf("%s is missing: %w", argv[0], region.ErrNotSupported)
	}
	if err != nil {
		return "", fmt.Errorf("%s: %w: %.500s", argv[0], err, stderr.String())
	}
	return string(out), nil
}

const sqliteRows = 180_000

// sqliteKey scatters the rows over the index, as the SQL does.
func sqliteKey(id uint64) string { return fmt.Sprintf("%08x", id*2654435761%4294967296) }

func makeSQLite(ctx context.Context, dir, file string) error {
	_, err := run(ctx, dir, sqliteContent, "sqlite3", file)
	return err
}

// sqliteContent makes a table of sqliteRows rows with an index.
var sqliteContent = fmt.Sprintf(`pragma journal_mode=off; pragma synchronous=off;
create table t(id integer primary key, k text, v text);
with recursive c(x) as (select 1 union all select x+1 from c where x<%d)
insert into t select x, printf('%%08x', x*2654435761 %% 4294967296), printf('%%0300d', x) from c;
create index tk on t(k);`, sqliteRows)

// lookUps are statements that find 20 rows by the index, others with each variant.
func lookUps(variant uint64) string {
	r := rand.New(rand.NewPCG(variant, 1))
	var sql strings.Builder
	for range 20 {
		fmt.Fprintf(&sql, "select v from t where k='%s';\n", sqliteKey(1+r.Uint64N(sqliteRows)))
	}
	return sql.String()
}

func readSQLite(variant uint64) program.Step {
	return program.Step{Argv: []string{"sqlite3", "file:" + program.Path + "?immutable=1"}, Stdin: lookUps(variant)}
}

// useSQLite looks rows up, and then goes through all of them.
func useSQLite() []program.Step {
	scan := readSQLite(0)
	scan.Stdin = "select count(*), sum(length(v)), max(k) from t not indexed;\n"
	return []program.Step{readSQLite(0), scan}
}

// makeApp makes one file that is a program and its data: sqlite3 finds a database
// that was appended to an executable.
func makeApp(ctx context.Context, dir, file string) error {
	exe, err := exec.LookPath("sqlite3")
	if err != nil {
		return err
	}
	b, err := os.ReadFile(exe)
	if err != nil {
		return err
	}
	if err := os.WriteFile(file, b, 0o600); err != nil {
		return err
	}
	_, err = run(ctx, dir, sqliteContent, "sqlite3", "-append", file)
	return err
}

// readApp executes the file itself.
func readApp(variant uint64) program.Step {
	return program.Step{Argv: []string{program.Path, "-readonly", "-append", program.Path}, Stdin: lookUps(variant)}
}

func useApp() []program.Step { return []program.Step{readApp(0), readApp(1)} }

const zipMembers = 16_000

func makeZip(_ context.Context, _, file string) (err error) {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := zip.NewWriter(f)
	r := rand.NewChaCha8([32]byte{1}) // does not compress
	for i := range zipMembers {
		e, err := w.Create(fmt.Sprintf("library/part%03d/file%05d.dat", i/100, i))
		if err != nil {
			return err
		}
		if _, err := io.CopyN(e, r, Size/zipMembers); err != nil {
			return err
		}
	}
	return w.Close()
}

func readZip(variant uint64) program.Step {
	i := 9000 + 3000*variant
	return program.Step{Argv: []string{"unzip", "-p", program.Path, fmt.Sprintf("library/part%03d/file%05d.dat", i/100, i)}}
}

const (
	gameLevels = 16
	gameAssets = 256 // of 256 KiB each, a sixteenth of them each level's
)

// makeGame makes an archive as game engines read them (PK3 files are zip archives):
// textures, models and sounds of all levels, in the order in which tools packed them.
func makeGame(_ context.Context, _, file string) (err error) {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := zip.NewWriter(f)
	data := rand.NewChaCha8([32]byte{2}) // does not compress
	for _, i := range rand.New(rand.NewPCG(2, 2)).Perm(gameAssets) {
		e, err := w.CreateHeader(&zip.FileHeader{Name: fmt.Sprintf("level%02d/asset%03d.dat", 1+i%gameLevels, i), Method: zip.Store})
		if err != nil {
			return err
		}
		if _, err := io.CopyN(e, data, Size/gameAssets); err != nil {
			return err
		}
	}
	return w.Close()
}

// readLevel loads a level: what must be read before it can be played.
func readLevel(variant uint64) program.Step {
	return program.Step{Argv: []string{"unzip", "-p", program.Path, fmt.Sprintf("level%02d/*", 1+variant)}}
}

func useGame() []program.Step { return []program.Step{readLevel(0), readLevel(1), readLevel(2)} }

const (
	ext4Folders = 400
	ext4Files   = 30
)

func makeExt4(ctx context.Context, dir, file string) error {
	for i := range ext4Folders {
		folder := filepath.Join(dir, "tree", fmt.Sprintf("folder%03d", i))
		if err := os.MkdirAll(folder, 0o755); err != nil {
			return err
		}
		for j := range ext4Files {
			if err := os.WriteFile(filepath.Join(folder, fmt.Sprintf("file%02d", j)), make([]byte, 4000), 0o644); err != nil {
				return err
			}
		}
	}
	_, err := run(ctx, dir, "", "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-d", filepath.Join(dir, "tree"), file, "96m")
	return err
}

func readExt4(variant uint64) program.Step {
	r := rand.New(rand.NewPCG(variant, 2))
	var commands strings.Builder
	for range 40 {
		f := r.IntN(ext4Folders)
		fmt.Fprintf(&commands, "ls -l /folder%03d\ncat /folder%03d/file%02d\n", f, f, r.IntN(ext4Files))
	}
	return program.Step{Argv: []string{"debugfs", "-f", "-", program.Path}, Stdin: commands.String()}
}

// useExt4 is somebody who looks around in a folder of another host: listings, and what
// is in some files.
func useExt4() []program.Step { return []program.Step{readExt4(0), readExt4(1)} }

// todoItem is how long the line of an item is, bytes; op migrate's writer=todo changes items.
const todoItem = 512

func makeTodo(_ context.Context, _, file string) (err error) {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := bufio.NewWriter(f)
	for i := range Size / todoItem {
		fmt.Fprintf(w, "%-*s\n", todoItem-1, fmt.Sprintf("[ ] item %d", i))
	}
	return w.Flush()
}

func readTodo(variant uint64) program.Step {
	return program.Step{Argv: []string{[]string{"head", "tail"}[variant%2], "-n", "200", program.Path}}
}

func makeMP4(ctx context.Context, dir, file string) error {
	made := filepath.Join(dir, "film.mp4")
	if _, err := run(ctx, dir, "", "ffmpeg", "-v", "error", "-f", "lavfi", "-i", "testsrc2=duration=40:size=1280x720",
		"-c:v", "mpeg4", "-b:v", "13M", "-minrate", "13M", "-maxrate", "13M", "-bufsize", "2M", made); err != nil {
		return err
	}
	return os.Rename(made, file)
}

func readMP4(variant uint64) program.Step {
	return program.Step{Argv: []string{"ffmpeg", "-v", "error", "-f", "mp4", "-ss", fmt.Sprint(15 * variant), "-i", program.Path, "-t", "1", "-f", "null", "-"}}
}

// useMP4 shows the first frame, and then plays 10 seconds: a line with a hash of each
// frame is what is seen.
func useMP4() []program.Step {
	show := func(args ...string) program.Step {
		argv := append([]string{"ffmpeg", "-v", "error", "-f", "mp4", "-i", program.Path}, args...)
		return program.Step{Argv: append(argv, "-an", "-f", "framecrc", "-flush_packets", "1", "-")}
	}
	play := show("-t", "10")
	play.Rate = 25 // testsrc2's frames a second
	return []program.Step{show("-frames:v", "1"), play}
}
