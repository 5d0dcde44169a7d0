package migration

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"memsync/strategies/chunk"
	"memsync/strategies/migration/handover"
	"memsync/strategies/region"
)

func randomSet(r *rand.Rand, n int64) *chunk.Set {
	s := chunk.NewSet(n)
	density := r.Float64() * r.Float64()
	for i := range n {
		if r.Float64() < density {
			s.Mark(i, i+1)
		}
	}
	return s
}

func TestSet(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		n := 1 + r.Int64N(3000)
		s, got := randomSet(r, n), chunk.NewSet(n)
		b := encodeSet(s)
		if int64(len(b)) > 12+(n+7)/8+20 {
			t.Fatalf("%d pages, %d of them in the set: %d bytes", n, s.Count(), len(b))
		}
		if err := decodeSet(b, got); err != nil {
			t.Fatal(err)
		}
		for i := range n {
			if s.Has(i) != got.Has(i) {
				t.Fatalf("page %d of %d: %t, want %t", i, n, got.Has(i), s.Has(i))
			}
		}
		if err := decodeSet(b, chunk.NewSet(n+1)); err == nil {
			t.Fatal("a set of another region is taken")
		}
	}
}

func FuzzSet(f *testing.F) {
	r := rand.New(rand.NewPCG(3, 4))
	for _, n := range []int64{1, 100} {
		f.Add(encodeSet(randomSet(r, n)), n)
	}
	f.Add([]byte{100, setRuns, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 1}, int64(100))
	f.Add([]byte{9, setBitmap, 0xff, 0xff}, int64(9))
	f.Fuzz(func(t *testing.T, b []byte, n int64) {
		if n < 1 || n > 1<<16 {
			return
		}
		s, again := chunk.NewSet(n), chunk.NewSet(n)
		if decodeSet(b, s) != nil {
			return
		}
		if err := decodeSet(encodeSet(s), again); err != nil || again.Count() != s.Count() {
			t.Fatalf("%d pages of %d come back as %d: %v", s.Count(), n, again.Count(), err)
		}
	})
}

func FuzzReply(f *testing.F) {
	f.Add(reply{Reply: handover.Reply{Result: handover.OK, Epoch: 3}, Round: 7, Text: "why", Dirty: []byte{1, 2, 3}}.encode())
	f.Add([]byte("MSMG"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decodeReply(b)
		if err != nil {
			return
		}
		if len(b) > replySize+maxText+len(r.Dirty) {
			t.Fatalf("%d bytes with a text of %d and a set of %d", len(b), len(r.Text), len(r.Dirty))
		}
		if again, err := decodeReply(r.encode()); err != nil || again.Text != r.Text || !bytes.Equal(again.Dirty, r.Dirty) || again.Epoch != r.Epoch {
			t.Fatalf("%+v comes back as %+v: %v", r, again, err)
		}
	})
}

func FuzzRequest(f *testing.F) {
	f.Add(request{Request: handover.Request{Verb: handover.Track, From: 1}, Session: 2}.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decodeRequest(b)
		if err == nil && !bytes.Equal(r.encode()[8:], b[8:]) {
			t.Fatalf("%x comes back as %x", b, r.encode())
		}
	})
}

// TestMailbox: an answer is there for whoever reads it, before or after the call was written,
// again and again, and in parts; a call that comes twice is made once.
func TestMailbox(t *testing.T) {
	made := 0
	m := newMailbox(func(context.Context, request) reply {
		made++
		return reply{Reply: handover.Reply{Result: handover.OK}, Dirty: bytes.Repeat([]byte{7}, 3*firstRead)}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	r := request{Request: handover.Request{Verb: handover.Track, From: 1}}
	for n := int64(1); n <= 2*maxCalls; n++ {
		out, err := ask(ctx, m, n, r)
		if err != nil || len(out.Dirty) != 3*firstRead || out.Result != handover.OK {
			t.Fatalf("call %d: %+v, %v", n, out, err)
		}
		if err := m.WriteAt(ctx, r.encode(), n*slot); err != nil {
			t.Fatal(err)
		}
	}
	if made != 2*maxCalls || len(m.calls) > 2*maxCalls {
		t.Errorf("%d calls were made, want %d; %d are remembered", made, 2*maxCalls, len(m.calls))
	}
	// Bad ones.
	if err := m.WriteAt(ctx, r.encode(), slot/2); !errors.Is(err, region.ErrOutOfRange) {
		t.Errorf("a call between two: %v", err)
	}
	if err := m.WriteAt(ctx, r.encode()[:20], 17*slot); !errors.Is(err, region.ErrOutOfRange) {
		t.Errorf("half a call: %v", err)
	}
	if _, err := ask(ctx, m, 1000*maxCalls, r); !errors.Is(err, region.ErrOutOfRange) {
		t.Errorf("a call far ahead: %v", err)
	}
	short, stop := context.WithTimeout(ctx, 20*time.Millisecond)
	defer stop()
	if err := m.ReadAt(short, make([]byte, 8), 18*slot); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the answer of a call that nobody makes: %v", err)
	}
	old := r.encode()
	old[4] = version + 1
	if err := m.WriteAt(ctx, old, 19*slot); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, firstRead)
	if err := m.ReadAt(ctx, b, 19*slot); err != nil {
		t.Fatal(err)
	}
	n, err := replyLength(b)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := decodeReply(b[:n]); err != nil || out.Result != 0 || out.Text == "" {
		t.Errorf("another version: %+v, %v", out, err)
	}
}
