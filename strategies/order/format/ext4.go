package format

import "encoding/binary"

// ext2, ext3 and ext4: Documentation/filesystems/ext4 of the kernel. Little endian.

const (
	extSuper     = 1024 // where the superblock is
	extMagic     = 0xEF53
	extRoot      = 2
	extJournal   = 8
	extMaxGroups = 1 << 16
	extMaxDirs   = 4096
	extMaxDir    = 4 << 20 // bytes of one directory
	extHead      = 64 << 10

	incompatExtents = 0x40
	incompat64bit   = 0x80
	incompatMetaBG  = 0x10
)

func isExt4(head []byte) bool {
	return len(head) >= 2*extSuper && binary.LittleEndian.Uint16(head[extSuper+0x38:]) == extMagic
}

// ext4 is a file system that is being looked at.
type ext4 struct {
	*scan
	block, perGroup, inodesPerGroup, inodeSize, inodes int64
	extents                                            bool
	tables                                             []int64 // first block of each group's inode table
}

func planExt4(s *scan) error {
	sb, err := s.read(extSuper, 1024)
	if err != nil {
		return err
	}
	le := binary.LittleEndian
	if le.Uint32(sb[0x18:]) > 6 {
		return malformed("block size 2^%d", 10+int64(le.Uint32(sb[0x18:])))
	}
	incompat := le.Uint32(sb[0x60:])
	e := &ext4{scan: s, block: 1024 << le.Uint32(sb[0x18:]), perGroup: int64(le.Uint32(sb[0x20:])),
		inodesPerGroup: int64(le.Uint32(sb[0x28:])), inodeSize: int64(le.Uint16(sb[0x58:])), inodes: int64(le.Uint32(sb)),
		extents: incompat&incompatExtents != 0}
	if le.Uint32(sb[0x4C:]) == 0 { // revision 0
		e.inodeSize = 128
	}
	blocks, descriptor := int64(le.Uint32(sb[4:])), int64(32)
	if incompat&incompat64bit != 0 {
		blocks |= int64(le.Uint32(sb[0x150:])) << 32
		descriptor = int64(le.Uint16(sb[0xFE:]))
	}
	first := int64(le.Uint32(sb[0x14:]))
	if e.perGroup == 0 || e.inodesPerGroup == 0 || e.inodeSize < 128 || e.inodeSize > e.block || descriptor < 32 || descriptor > 1024 || blocks < 1 {
		return malformed("superblock")
	}
	if err := s.want(0, 2*extSuper); err != nil {
		return err
	}
	if incompat&incompatMetaBG != 0 { // descriptors are all over the place
		return nil
	}
	groups := min((blocks-first+e.perGroup-1)/e.perGroup, extMaxGroups)
	table := (first + 1) * e.block
	if groups < 1 {
		return malformed("superblock")
	}
	gdt, err := s.read(table, groups*descriptor)
	if err != nil {
		return err
	}
	if err := s.want(table, groups*descriptor); err != nil {
		return err
	}
	var bitmaps, used [][2]int64
	for g := range groups {
		d := gdt[g*descriptor:][:descriptor]
		field := func(lo, hi int) int64 {
			v := int64(le.Uint32(d[lo:]))
			if descriptor >= 64 && hi > 0 {
				v |= int64(le.Uint32(d[hi:])) << 32
			}
			return v & (1<<44 - 1) // 2^44 blocks of 64 KiB are more than a region has
		}
		flags, unused := le.Uint16(d[0x12:]), int64(le.Uint16(d[0x1C:]))
		if descriptor >= 64 {
			unused |= int64(le.Uint16(d[0x32:])) << 16
		}
		e.tables = append(e.tables, field(8, 0x28))
		if flags&2 == 0 {
			bitmaps = append(bitmaps, [2]int64{field(0, 0x20) * e.block, e.block})
		}
		if flags&1 == 0 {
			bitmaps = append(bitmaps, [2]int64{field(4, 0x24) * e.block, e.block})
			if n := max(e.inodesPerGroup-unused, 0); n > 0 {
				used = append(used, [2]int64{field(8, 0x28) * e.block, n * e.inodeSize})
			}
		}
	}
	if err := e.journal(); err != nil {
		return err
	}
	if err := e.directories(); err != nil {
		return err
	}
	for _, list := range [][][2]int64{bitmaps, used} {
		for _, r := range list {
			if err := s.want(r[0], r[1]); err != nil {
				return err
			}
		}
	}
	return nil
}

// inodeAt returns where an inode is, or a negative offset.
func (e *ext4) inodeAt(n int64) int64 {
	if n < 1 || n > e.inodes || (n-1)/e.inodesPerGroup >= int64(len(e.tables)) {
		return -1
	}
	return e.tables[(n-1)/e.inodesPerGroup]*e.block + (n-1)%e.inodesPerGroup*e.inodeSize
}

// journal wants the journal's first blocks, which a mount reads.
func (e *ext4) journal() error {
	at := e.inodeAt(extJournal)
	if at < 0 {
		return nil
	}
	inode, err := e.read(at, 128)
	if err != nil {
		return err
	}
	blocks, err := e.blocks(inode, 1)
	if err != nil || len(blocks) == 0 {
		return err
	}
	return e.want(blocks[0]*e.block, extHead)
}

// directories wants the inodes and blocks of all directories, by depth.
func (e *ext4) directories() error {
	seen := map[int64]bool{extRoot: true}
	for level := []int64{extRoot}; len(level) > 0; {
		var at []int64
		for _, n := range level {
			if off := e.inodeAt(n); off >= 0 {
				at = append(at, off)
			}
		}
		inodes, err := e.readAll(at, 128)
		if err != nil {
			return err
		}
		var offs []int64
		for i, inode := range inodes {
			if err := e.want(at[i], 128); err != nil {
				return err
			}
			if binary.LittleEndian.Uint16(inode)>>12 != 4 || binary.LittleEndian.Uint32(inode[0x20:])&0x10000000 != 0 {
				continue // no directory, or its entries are in the inode
			}
			length := min(int64(binary.LittleEndian.Uint32(inode[4:])), extMaxDir)
			blocks, err := e.blocks(inode, (length+e.block-1)/e.block)
			if err != nil {
				return err
			}
			for _, b := range blocks {
				if err := e.want(b*e.block, e.block); err != nil {
					return err
				}
				offs = append(offs, b*e.block)
			}
		}
		bodies, err := e.readAll(offs, e.block)
		if err != nil {
			return err
		}
		level = nil
		for _, b := range bodies {
			for _, n := range subdirectories(b) {
				if !seen[n] && len(seen) < extMaxDirs {
					seen[n] = true
					level = append(level, n)
				}
			}
		}
	}
	return nil
}

// subdirectories returns the inodes of the directories that a block of entries names.
func subdirectories(b []byte) []int64 {
	var out []int64
	for len(b) >= 12 {
		n, length, name := int64(binary.LittleEndian.Uint32(b)), int(binary.LittleEndian.Uint16(b[4:])), int(b[6])
		if length < 8 || length > len(b) {
			break
		}
		self := name == 1 && b[8] == '.' || name == 2 && b[8] == '.' && b[9] == '.'
		if n != 0 && b[7] == 2 && !self && name > 0 {
			out = append(out, n)
		}
		b = b[length:]
	}
	return out
}

// block48 is a block number of 48 bits, of which 44 count, as above.
func block48(lo uint32, hi uint16) int64 { return (int64(lo) | int64(hi)<<32) & (1<<44 - 1) }

// blocks returns at most limit blocks of a file, in order.
func (e *ext4) blocks(inode []byte, limit int64) ([]int64, error) {
	le := binary.LittleEndian
	var out []int64
	if !e.extents || le.Uint32(inode[0x20:])&0x80000 == 0 { // direct blocks only
		for i := range min(limit, 12) {
			if b := int64(le.Uint32(inode[0x28+4*i:])); b != 0 {
				out = append(out, b)
			}
		}
		return out, nil
	}
	nodes := [][]byte{inode[0x28:0x64]}
	for depth := 0; len(nodes) > 0 && depth <= 5; depth++ {
		var next []int64
		for _, n := range nodes {
			if le.Uint16(n) != 0xF30A {
				return nil, malformed("extent tree")
			}
			entries, leaf := int(le.Uint16(n[2:])), le.Uint16(n[6:]) == 0
			for i := 0; i < entries && 24+12*i <= len(n); i++ {
				x := n[12+12*i:]
				if !leaf {
					next = append(next, block48(le.Uint32(x[4:]), le.Uint16(x[8:]))*e.block)
					continue
				}
				start, count := block48(le.Uint32(x[8:]), le.Uint16(x[6:])), int64(le.Uint16(x[4:]))
				if count > 32768 { // allocated, never written
					count -= 32768
				}
				for b := range count {
					if int64(len(out)) >= limit {
						return out, nil
					}
					out = append(out, start+b)
				}
			}
		}
		for _, off := range next {
			if err := e.want(off, e.block); err != nil {
				return nil, err
			}
		}
		var err error
		if nodes, err = e.readAll(next, e.block); err != nil {
			return nil, err
		}
	}
	return out, nil
}
