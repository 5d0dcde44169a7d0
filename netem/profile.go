package netem

import (
	"fmt"
	"math"
	"strings"
	"time"
)

// Limits of a Profile. MaxRate is what 64-bit nanosecond arithmetic and sch_netem
// both represent without loss.
const (
	MaxRTT    = 10 * time.Second
	MinRate   = 64_000          // bit/s
	MaxRate   = 100_000_000_000 // bit/s
	MaxQueue  = 1 << 30         // bytes
	minQueue  = 64 << 10        // of the default queue
	l2Header  = 14              // an Ethernet header; the checksum is not counted
	mtu       = 1500
	linkFrame = mtu + l2Header
	// Large segments (GSO) pass whole where they take no longer than this at the
	// link's rate: 8 packets at 1 Gbit/s. One CPU of the lab kernel needs that to carry
	// 1 Gbit/s; the error in time is at most this.
	pieceTime   = 95 * time.Microsecond
	maxSegments = 44 // of 1472 bytes in the longest UDP datagram
)

// Profile describes a symmetric link: every field but RTT applies to each
// direction alone. The zero value is an unshaped link.
type Profile struct {
	Name string `json:"name"`
	Doc  string `json:"doc,omitempty"`
	// RTT is both ways; half of it is applied at each end. 0..MaxRTT.
	RTT time.Duration `json:"rtt_ns"`
	// Jitter is the standard deviation of one direction's delay: normal, cut where
	// the delay would be negative, never reordering. 0..MaxRTT.
	Jitter time.Duration `json:"jitter_ns"`
	// Loss is the probability that a packet is lost in one direction, 0..1.
	Loss float64 `json:"loss"`
	// Rate is bit/s of L2 frames in each direction, MinRate..MaxRate; 0 is unlimited.
	Rate int64 `json:"rate_bits_per_second"`
	// QueueBytes bounds the queue before the bottleneck; 0 is 1 BDP, at least 64 KiB.
	// It means nothing where Rate is 0.
	QueueBytes int64 `json:"queue_bytes"`
}

// Profiles returns the named profiles, nearest first. The values are round numbers
// typical for such a path, chosen so that every shaper can reach them.
func Profiles() []Profile {
	const mbit = 1_000_000
	return []Profile{
		{Name: "loopback", Doc: "the two namespaces, unshaped"},
		{Name: "lan", Doc: "one switch", RTT: 500 * time.Microsecond, Rate: 1000 * mbit},
		{Name: "metro", Doc: "two sites of one city", RTT: 2 * time.Millisecond, Rate: 1000 * mbit},
		{Name: "regional", Doc: "two sites of one country", RTT: 20 * time.Millisecond, Rate: 1000 * mbit},
		{Name: "continental", Doc: "across a continent", RTT: 40 * time.Millisecond, Rate: 500 * mbit},
		{Name: "transatlantic", Doc: "Europe to the east of North America", RTT: 80 * time.Millisecond, Rate: 200 * mbit},
		{Name: "lte", Doc: "a mobile network in fair conditions", RTT: 50 * time.Millisecond, Jitter: 5 * time.Millisecond, Loss: 0.001, Rate: 40 * mbit},
		{Name: "satellite", Doc: "geostationary", RTT: 600 * time.Millisecond, Rate: 20 * mbit},
		{Name: "lossy", Doc: "long and damaged: 1 % lost each way", RTT: 100 * time.Millisecond, Loss: 0.01, Rate: 100 * mbit},
	}
}

// ProfileByName finds a named profile; the error of an unknown name lists the valid ones.
func ProfileByName(name string) (Profile, error) {
	var names []string
	for _, p := range Profiles() {
		if p.Name == name {
			return p, nil
		}
		names = append(names, p.Name)
	}
	return Profile{}, fmt.Errorf("profile %q: %w: it is none of %s", name, ErrInvalid, strings.Join(names, ", "))
}

// Validate returns ErrInvalid with the field and its range, or nil.
func (p Profile) Validate() error {
	switch {
	case p.RTT < 0 || p.RTT > MaxRTT:
		return fmt.Errorf("RTT %v: %w: must be 0 to %v", p.RTT, ErrInvalid, MaxRTT)
	case p.Jitter < 0 || p.Jitter > MaxRTT:
		return fmt.Errorf("jitter %v: %w: must be 0 to %v", p.Jitter, ErrInvalid, MaxRTT)
	case math.IsNaN(p.Loss) || p.Loss < 0 || p.Loss > 1:
		return fmt.Errorf("loss %v: %w: must be 0 to 1", p.Loss, ErrInvalid)
	case p.Rate != 0 && (p.Rate < MinRate || p.Rate > MaxRate):
		return fmt.Errorf("rate %d bit/s: %w: must be 0 (unlimited) or %d to %d", p.Rate, ErrInvalid, int64(MinRate), int64(MaxRate))
	case p.QueueBytes != 0 && (p.QueueBytes < linkFrame || p.QueueBytes > MaxQueue):
		return fmt.Errorf("queue of %d bytes: %w: must be 0 (1 BDP) or %d to %d", p.QueueBytes, ErrInvalid, linkFrame, MaxQueue)
	}
	return nil
}

// BDP is rate times RTT in bytes; 0 where either is.
func (p Profile) BDP() int64 {
	return int64(math.Round(float64(p.Rate) / 8 * p.RTT.Seconds()))
}

// segments is how many packets a large segment may stand for before it is shaped, so
// that its first packet does not wait for its last longer than pieceTime.
func (p Profile) segments() int {
	if p.Rate == 0 {
		return maxSegments
	}
	return int(min(max(1, math.Ceil(float64(p.Rate)/8*pieceTime.Seconds()/linkFrame)), maxSegments))
}

// Queue is the size of the bottleneck's queue in bytes that QueueBytes asks for; 0,
// no queue at all, where Rate is 0.
func (p Profile) Queue() int64 {
	switch {
	case p.Rate == 0:
		return 0
	case p.QueueBytes != 0:
		return p.QueueBytes
	}
	return min(max(p.BDP(), minQueue), MaxQueue)
}
