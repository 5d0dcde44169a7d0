package format

import (
	"bytes"
	"encoding/binary"
)

// Zip archives: PKWARE's APPNOTE.TXT 6.3.10, 4.3. Little endian.

const (
	endRecord    = 22 // bytes, without the comment
	end64Locator = 20
	end64Record  = 56
	maxComment   = 1<<16 - 1
)

func isZip(head []byte) bool {
	return bytes.HasPrefix(head, []byte("PK\x03\x04")) || bytes.HasPrefix(head, []byte("PK\x05\x06"))
}

func planZip(s *scan) error {
	// Most archives have no comment: one small read at the end is enough.
	var tail []byte
	at := -1
	for _, n := range []int64{endRecord + end64Locator, endRecord + end64Locator + maxComment} {
		var err error
		n = min(n, s.size)
		if tail, err = s.read(s.size-n, n); err != nil {
			return err
		}
		if n < endRecord {
			return malformed("%d bytes", n)
		}
		for at = bytes.LastIndex(tail, []byte("PK\x05\x06")); at > len(tail)-endRecord; {
			at = bytes.LastIndex(tail[:at], []byte("PK\x05\x06"))
		}
		if at >= 0 {
			break
		}
	}
	if at < 0 {
		return malformed("no end-of-central-directory record")
	}
	end := s.size - int64(len(tail)) + int64(at) // where the record is
	r := tail[at:]
	length, off := int64(binary.LittleEndian.Uint32(r[12:])), int64(binary.LittleEndian.Uint32(r[16:]))
	last := end
	if l := at - end64Locator; l >= 0 && string(tail[l:l+4]) == "PK\x06\x07" {
		pos := binary.LittleEndian.Uint64(tail[l+8:])
		if pos > uint64(s.size) {
			return malformed("zip64 record at %d", pos)
		}
		b, err := s.read(int64(pos), end64Record)
		if err != nil {
			return err
		}
		n, o := binary.LittleEndian.Uint64(b[40:]), binary.LittleEndian.Uint64(b[48:])
		if string(b[:4]) != "PK\x06\x06" || n > uint64(s.size) || o > uint64(s.size) {
			return malformed("zip64 record at %d", pos)
		}
		length, off, last = int64(n), int64(o), int64(pos)
	}
	if off+length != last { // something stands before the archive: offsets count from its start
		off = last - length
	}
	if off < 0 || length < 0 {
		return malformed("central directory of %d bytes at %d", length, off)
	}
	if err := s.want(last, s.size-last); err != nil {
		return err
	}
	return s.want(off, length)
}
