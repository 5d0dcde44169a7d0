package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"memsync/results"
	"memsync/strategies/backend/services"
	"memsync/strategies/region"
)

type servicesOptions struct{ asJSON bool }

func newServicesCmd(s *state) *cobra.Command {
	var o servicesOptions
	c := &cobra.Command{
		Use:   "services up|status|down",
		Short: "Start, show and end the servers that backends talk to",
		Long: `Redis, an S3 server and Apache Cassandra, as the tests and figures start them, for people:
on loopback, with passwords of their own, each below a folder of its own in $TMPDIR. They
stay until services down. stdout says for each how to use it.`,
		Example: `  memsync services up
  memsync services up redis s3 --json
  memsync services down`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return errors.New("services: want one of up, status, down")
			}
			return fmt.Errorf("services: unknown command %q; valid: up, status, down", args[0])
		},
		RunE: func(*cobra.Command, []string) error { return nil }, // never: Args refuses
	}
	sub := func(use, short, long, example string, do func(s *state, o servicesOptions, names []string) error) {
		x := &cobra.Command{Use: use + " [NAME...]", Short: short, Long: long, Example: example,
			ValidArgs: services.Kinds(),
			RunE: func(_ *cobra.Command, names []string) error {
				for _, n := range names {
					if !slices.Contains(services.Kinds(), n) {
						return exitWith(exitUsage, fmt.Errorf("unknown service %q; valid: %s", n, strings.Join(services.Kinds(), ", ")))
					}
				}
				return do(s, o, names)
			}}
		c.AddCommand(x)
	}
	sub("up", "Start servers, or those that are named", `Starts all servers that can be had here, or those that are named, and waits until each
answers; one that runs already is shown as it is. One that cannot be had is said to be
unsupported, with the reason and what would mend it.`, "  memsync services up\n  memsync services up cassandra", servicesUp)
	sub("status", "Show the servers that services up started", `Asks each server, or those that are named, whether it answers: running, mute (its process
runs, but does not answer) or gone (its process has ended).`, "  memsync services status --json", servicesStatus)
	sub("down", "End the servers that services up started", `Ends all servers, or those that are named, and removes their data.`, "  memsync services down\n  memsync services down redis", servicesDown)
	c.PersistentFlags().BoolVar(&o.asJSON, "json", false, "print a JSON array of objects")
	return c
}

// serviceView is what is said of a server; its password is only named by its file.
type serviceView struct {
	Kind         string            `json:"kind"`
	State        string            `json:"state"` // of services.State, or unsupported, failed, stopped
	Reason       string            `json:"reason,omitempty"`
	Version      string            `json:"version,omitempty"`
	Address      string            `json:"address,omitempty"`
	PID          int               `json:"pid,omitempty"`
	Since        string            `json:"since,omitempty"`
	Folder       string            `json:"folder,omitempty"`
	BackendFlags []string          `json:"backend_flags,omitempty"` // of memsync measure
	Environment  map[string]string `json:"environment,omitempty"`   // that those flags need
}

func viewOf(st services.Standing) serviceView {
	v := serviceView{Kind: st.Kind, State: string(st.State), Version: st.Version, Address: st.Addr, PID: st.ID.PID,
		Since: st.Since.Format(time.RFC3339), Folder: st.Dir}
	if st.State != services.Gone {
		prefix := "MEMSYNC_" + strings.ToUpper(st.Kind) + "_"
		v.BackendFlags = []string{"--backend", st.Kind, "--set", "endpoint=" + st.Addr}
		v.Environment = map[string]string{prefix + "USER": st.User, prefix + "PASSWORD_FILE": st.PasswordFile()}
	}
	return v
}

// print writes what is said of servers: a paragraph each, whose lines can be run.
func (v serviceView) print(s *state) {
	switch {
	case v.Address == "":
		fmt.Fprintf(s.stdout, "%s: %s: %s\n", v.Kind, v.State, v.Reason)
		return
	case v.Environment == nil:
		fmt.Fprintf(s.stdout, "%s: %s, process %d, folder %s\n", v.Kind, v.State, v.PID, v.Folder)
		return
	}
	fmt.Fprintf(s.stdout, "%s: %s, %s at %s, process %d since %s, folder %s\n", v.Kind, v.State, v.Version, v.Address, v.PID, v.Since, v.Folder)
	var env []string
	for k, e := range v.Environment {
		env = append(env, k+"="+shellQuote(e))
	}
	slices.Sort(env)
	fmt.Fprintf(s.stdout, "  export %s\n", strings.Join(env, " "))
	fmt.Fprintf(s.stdout, "  %s measure --strategy managed-mount %s\n", s.program.Name, strings.Join(v.BackendFlags, " "))
}

// shellQuote makes a shell take a text as it is.
func shellQuote(t string) string {
	if strings.IndexFunc(t, func(r rune) bool {
		return !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./:", r)
	}) < 0 {
		return t
	}
	return "'" + strings.ReplaceAll(t, "'", `'\''`) + "'"
}

func printServices(s *state, o servicesOptions, views []serviceView) error {
	if !o.asJSON {
		for _, v := range views {
			v.print(s)
		}
		return nil
	}
	if views == nil {
		views = []serviceView{}
	}
	enc := json.NewEncoder(s.stdout)
	enc.SetIndent("", "  ")
	return enc.Encode(views)
}

func servicesUp(s *state, o servicesOptions, names []string) error {
	asked := len(names) > 0
	if !asked {
		names = services.Kinds()
	}
	var views []serviceView
	var started []services.Standing
	missing, failed, running := 0, 0, 0
	for _, name := range names {
		st, fresh, err := services.Stand(s.ctx, name, func(line string) { fmt.Fprintln(s.stderr, line) })
		if fresh {
			started = append(started, st)
		}
		switch {
		case s.ctx.Err() != nil: // nobody will want them
			for _, st := range started {
				err = errors.Join(err, st.Down())
			}
			return exitWith(exitInterrupted, err)
		case errors.Is(err, region.ErrNotSupported):
			missing++
			views = append(views, serviceView{Kind: name, State: string(results.StatusUnsupported), Reason: err.Error()})
		case err != nil:
			failed++
			views = append(views, serviceView{Kind: name, State: string(results.StatusFailed), Reason: err.Error()})
		default:
			running++
			views = append(views, viewOf(st))
		}
	}
	if err := printServices(s, o, views); err != nil {
		return err
	}
	switch {
	case failed > 0:
		return exitWith(exitFailed, fmt.Errorf("%d of %d services did not start", failed, len(names)))
	case missing > 0 && (asked || running == 0):
		return exitWith(exitUnsupported, fmt.Errorf("%d of %d services cannot be had here", missing, len(names)))
	}
	return nil
}

// standing returns the standing servers of those names; all where there are none.
func standing(ctx context.Context, names []string) ([]services.Standing, error) {
	all, err := services.Standings(ctx)
	if err != nil {
		return nil, exitWith(exitFailed, err)
	}
	return slices.DeleteFunc(all, func(st services.Standing) bool { return len(names) > 0 && !slices.Contains(names, st.Kind) }), nil
}

func servicesStatus(s *state, o servicesOptions, names []string) error {
	found, err := standing(s.ctx, names)
	if err != nil {
		return err
	}
	var views []serviceView
	bad := 0
	for _, st := range found {
		views = append(views, viewOf(st))
		if st.State != services.Running {
			bad++
		}
	}
	if err := printServices(s, o, views); err != nil {
		return err
	}
	if len(found) == 0 {
		fmt.Fprintln(s.stderr, "no service runs")
	}
	if bad > 0 {
		return exitWith(exitFailed, fmt.Errorf("%d of %d services do not answer", bad, len(found)))
	}
	return nil
}

func servicesDown(s *state, o servicesOptions, names []string) error {
	found, err := standing(s.ctx, names)
	if err != nil {
		return err
	}
	var views []serviceView
	var errs []error
	for _, st := range found {
		if err := st.Down(); err != nil {
			errs = append(errs, err)
			continue
		}
		views = append(views, serviceView{Kind: st.Kind, State: "stopped", Address: st.Addr, PID: st.ID.PID, Folder: st.Dir})
	}
	if err := printServices(s, o, views); err != nil {
		return err
	}
	if len(found) == 0 {
		fmt.Fprintln(s.stderr, "no service runs")
	}
	if err := errors.Join(errs...); err != nil {
		return exitWith(exitFailed, err)
	}
	return nil
}
