package lab

import (
	"context"
	"os"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	if code, ok := Main(os.Args[1:]); ok {
		os.Exit(code)
	}
	os.Exit(m.Run())
}

func TestX(t *testing.T) {
	dir, err := CacheDir(os.Getenv)
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	k, err := Ensure(context.Background(), dir, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	t.Log(time.Since(start), k)
	ctx, c := context.WithTimeout(context.Background(), 10*time.Second)
	defer c()
	for range 5 {
		start = time.Now()
		st, err := k.Run(ctx, Command{Args: []string{"uname", "-a"}, Stdout: os.Stdout, Stderr: os.Stderr})
		t.Log(st, err, time.Since(start))
	}
}
