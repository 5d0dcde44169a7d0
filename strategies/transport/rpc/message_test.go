package rpc

import (
	"bytes"
	"os"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"

	"memsync/strategies/region"
)

// messages reads region.proto, as far as it goes: the fields of its two messages.
func messages(t testing.TB) protoreflect.FileDescriptor {
	b, err := os.ReadFile("region.proto")
	if err != nil {
		t.Fatal(err)
	}
	types := map[string]descriptorpb.FieldDescriptorProto_Type{
		"uint64": descriptorpb.FieldDescriptorProto_TYPE_UINT64, "uint32": descriptorpb.FieldDescriptorProto_TYPE_UINT32,
		"bool": descriptorpb.FieldDescriptorProto_TYPE_BOOL, "string": descriptorpb.FieldDescriptorProto_TYPE_STRING, "bytes": descriptorpb.FieldDescriptorProto_TYPE_BYTES,
	}
	file := &descriptorpb.FileDescriptorProto{Name: proto.String("region.proto"), Package: proto.String("memsync"), Syntax: proto.String("proto3")}
	for _, m := range regexp.MustCompile(`(?s)message (\w+) \{(.*?)\n\}`).FindAllStringSubmatch(string(b), -1) {
		d := &descriptorpb.DescriptorProto{Name: proto.String(m[1])}
		for _, f := range regexp.MustCompile(`(?m)^  (repeated )?(\w+) (\w+) = (\d+);`).FindAllStringSubmatch(m[2], -1) {
			n, _ := strconv.Atoi(f[4])
			label := descriptorpb.FieldDescriptorProto_LABEL_OPTIONAL
			if f[1] != "" {
				label = descriptorpb.FieldDescriptorProto_LABEL_REPEATED
			}
			typ, ok := types[f[2]]
			if !ok {
				t.Fatalf("type %s", f[2])
			}
			d.Field = append(d.Field, &descriptorpb.FieldDescriptorProto{Name: proto.String(f[3]), Number: proto.Int32(int32(n)), Type: &typ, Label: &label})
		}
		file.MessageType = append(file.MessageType, d)
	}
	d, err := protodesc.NewFile(file, nil)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

var (
	requests = []Request{{}, {ID: 7, Op: OpWrite, Off: 1 << 40, Length: 5, Data: []byte("hello")}, {Op: OpOpen, Name: "r", Writer: "w"}, {ID: 1 << 60, Op: OpZero, Off: 1, Length: 1<<63 - 1, Hole: true}}
	replies  = []Reply{{}, {ID: 9, Data: []byte("world")}, {Status: StatusMissing, Message: "no such"}, {Size: 1<<63 - 1, Epoch: 1<<32 - 1, Offers: 0x1f0, ReadOnly: true},
		{Extents: []region.Extent{{Length: 1}, {Length: 1 << 40, Hole: true}, {Length: 3, Hole: true, Zero: true}}}}
)

// TestProto: what we write the protocol buffers library reads by region.proto, and
// what it writes we read.
func TestProto(t *testing.T) {
	d := messages(t)
	if n := d.Messages().ByName("Request").Fields().Len() + d.Messages().ByName("Reply").Fields().Len(); n != 17 {
		t.Fatalf("region.proto has %d fields, the Go code 17", n)
	}
	through := func(name protoreflect.Name, b []byte) (*dynamicpb.Message, []byte) {
		m := dynamicpb.NewMessage(d.Messages().ByName(name))
		if err := proto.Unmarshal(b, m); err != nil {
			t.Fatal(err)
		}
		if len(m.GetUnknown()) > 0 {
			t.Errorf("fields that region.proto does not have: %x", m.GetUnknown())
		}
		out, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return m, out
	}
	for _, q := range requests {
		m, b := through("Request", append(q.AppendHead(nil), q.Data...))
		var back Request
		if err := back.Decode(b); err != nil || !reflect.DeepEqual(back, q) {
			t.Errorf("%+v came back as %+v, %v", q, back, err)
		}
		if got := m.Get(m.Descriptor().Fields().ByName("off")).Uint(); got != uint64(q.Off) {
			t.Errorf("off %d, want %d", got, q.Off)
		}
	}
	for _, r := range replies {
		m, b := through("Reply", append(r.AppendHead(nil), r.Data...))
		var back Reply
		if err := back.Decode(b); err != nil || !reflect.DeepEqual(back, r) {
			t.Errorf("%+v came back as %+v, %v", r, back, err)
		}
		if got := m.Get(m.Descriptor().Fields().ByName("message")).String(); got != r.Message {
			t.Errorf("message %q, want %q", got, r.Message)
		}
	}
}

// TestInto: data go into the buffer that waits for them, or are refused.
func TestInto(t *testing.T) {
	r := Reply{Data: []byte("12345")}
	b := append(r.AppendHead(nil), r.Data...)
	for n := range 8 {
		got := Reply{Into: make([]byte, n)}
		err := got.Decode(b)
		if n == 5 && (err != nil || string(got.Into) != "12345") {
			t.Errorf("%q, %v", got.Into, err)
		}
		if n != 5 && (err == nil || !bytes.Equal(got.Into, make([]byte, n))) {
			t.Errorf("5 bytes where %d are wanted: %q, no error", n, got.Into)
		}
	}
	none := Reply{Into: make([]byte, 3)}
	if err := none.Decode(nil); err == nil {
		t.Error("no data where 3 bytes are wanted: no error")
	}
}

func TestLimits(t *testing.T) {
	for what, q := range map[string]Request{"name": {Name: strings.Repeat("x", maxName+1)}, "data": {Data: make([]byte, MaxData+1)}, "offset": {Off: -1}, "length": {Length: -5}} {
		if err := new(Request).Decode(append(q.AppendHead(nil), q.Data...)); err == nil {
			t.Errorf("%s beyond its limit: no error", what)
		}
	}
	long := Reply{Extents: make([]region.Extent, maxRuns+1)}
	for i := range long.Extents {
		long.Extents[i].Length = 1
	}
	if err := new(Reply).Decode(long.AppendHead(nil)); err == nil {
		t.Error("too many extents: no error")
	}
}

func FuzzRequest(f *testing.F) {
	for _, q := range requests {
		f.Add(append(q.AppendHead(nil), q.Data...))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var q, again Request
		if q.Decode(b) != nil {
			return
		}
		if err := again.Decode(append(q.AppendHead(nil), q.Data...)); err != nil || again.Op != q.Op || again.Off != q.Off || again.Name != q.Name || !bytes.Equal(again.Data, q.Data) {
			t.Fatalf("%+v comes back as %+v, %v", q, again, err)
		}
	})
}

func FuzzReply(f *testing.F) {
	for _, r := range replies {
		f.Add(append(r.AppendHead(nil), r.Data...), 0)
		f.Add(append(r.AppendHead(nil), r.Data...), len(r.Data))
	}
	f.Fuzz(func(t *testing.T, b []byte, n int) {
		r := Reply{}
		if n > 0 && n < 1<<16 {
			r.Into = make([]byte, n)
		}
		if r.Decode(b) != nil {
			return
		}
		if r.Into != nil && r.Status == StatusOK && len(r.Data) != n {
			t.Fatalf("%d bytes where %d are wanted", len(r.Data), n)
		}
		for _, e := range r.Extents {
			if e.Length < 1 {
				t.Fatalf("extent of %d bytes", e.Length)
			}
		}
		again := Reply{}
		if err := again.Decode(append(r.AppendHead(nil), r.Data...)); err != nil || again.Size != r.Size || !bytes.Equal(again.Data, r.Data) {
			t.Fatalf("%+v comes back as %+v, %v", r, again, err)
		}
	})
}
