package client_test

import (
	"encoding/binary"
	"fmt"
	"log"

	"memsync/strategies/snapshot/client"
)

// A counter that goes on where it was, in whatever way it ended:
//
//	memsync snapshot --image counter.img --size 4KiB --chunk 4KiB --mode triple -- ./counter
func Example() {
	r, err := client.Open()
	if err != nil {
		log.Print(err)
		return
	}
	defer r.Close()
	n := binary.LittleEndian.Uint64(r.Mem())
	for range 1000 {
		n++
		if err := r.Write(binary.LittleEndian.AppendUint64(nil, n), 0); err != nil {
			log.Fatal(err)
		}
		if _, err := r.Publish(fmt.Append(nil, "count ", n)); err != nil {
			log.Fatal(err)
		}
	}
	if s := r.Status(); s.Starved > 0 {
		log.Printf("the images are %d publications behind", n-s.Sequence)
	}
}
