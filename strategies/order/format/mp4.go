package format

import "encoding/binary"

// ISO base media files (ISO/IEC 14496-12, 4.2): boxes, each with a 32-bit length
// and a type; length 1 means that 64 bits follow, 0 that the box goes to the end.

const (
	maxBoxes = 256
	maxIndex = 64 << 20 // bytes of one index box that are pulled first
)

func isMP4(head []byte) bool { return len(head) >= 12 && string(head[4:8]) == "ftyp" }

func planMP4(s *scan) error {
	var media int64 = -1 // where the first samples are
	for off, n := int64(0), 0; off < s.size && n < maxBoxes; n++ {
		h, err := s.read(off, min(16, s.size-off))
		if err != nil {
			return err
		}
		if len(h) < 8 {
			return malformed("box at %d", off)
		}
		length, header := int64(binary.BigEndian.Uint32(h)), int64(8)
		switch {
		case length == 0:
			length = s.size - off
		case length == 1 && len(h) == 16 && binary.BigEndian.Uint64(h[8:]) <= uint64(s.size):
			length, header = int64(binary.BigEndian.Uint64(h[8:])), 16
		}
		if length < header || length > s.size-off {
			return malformed("box at %d of %d bytes", off, length)
		}
		switch string(h[4:8]) {
		case "ftyp", "moov", "sidx", "moof", "mfra", "meta", "styp", "ssix", "pdin":
			err = s.want(off, min(length, maxIndex))
		default:
			err = s.want(off, header)
			if string(h[4:8]) == "mdat" && media < 0 {
				media = off
			}
		}
		if err != nil {
			return err
		}
		off += length
	}
	if media >= 0 {
		return s.want(media, 1<<20)
	}
	return nil
}
