package plots

import (
	"image/color"

	"golang.org/x/image/font/sfnt"
	"golang.org/x/image/math/fixed"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/vg"
)

// outlined draws text as the outlines of its letters. A PDF of text holds the whole
// font, 150 kB a figure; the outlines of a figure's few words are a tenth of that.
type outlined struct{ vg.Canvas }

// SetColor hands the colour on without its alpha multiplied in: vgpdf takes what RGBA
// returns for the plain colour, and would draw what is translucent darker than it is.
func (o outlined) SetColor(c color.Color) {
	o.Canvas.SetColor(straight(color.NRGBAModel.Convert(c).(color.NRGBA)))
}

// straight is a colour whose RGBA is not multiplied by alpha.
type straight color.NRGBA

func (s straight) RGBA() (r, g, b, a uint32) {
	return uint32(s.R) * 0x101, uint32(s.G) * 0x101, uint32(s.B) * 0x101, uint32(s.A) * 0x101
}

// FillString fills text with its lower left at pt. A font that cannot be read, which
// the fonts of this package are not, is drawn as text.
func (o outlined) FillString(f font.Face, pt vg.Point, text string) {
	size := fixed.Int26_6(f.Font.Size.Points() * 64 * outlineScale)
	var buf sfnt.Buffer
	at := func(p fixed.Point26_6) vg.Point {
		return vg.Point{X: pt.X + vg.Length(p.X)/64/outlineScale, Y: pt.Y - vg.Length(p.Y)/64/outlineScale} // y of fonts points down
	}
	last := sfnt.GlyphIndex(0)
	for i, r := range []rune(text) {
		glyph, err := f.Face.GlyphIndex(&buf, r)
		if err != nil {
			o.Canvas.FillString(f, pt, string([]rune(text)[i:]))
			return
		}
		if kern, err := f.Face.Kern(&buf, last, glyph, size, 0); err == nil && i > 0 {
			pt.X += vg.Length(kern) / 64 / outlineScale
		}
		segments, err := f.Face.LoadGlyph(&buf, glyph, size, nil)
		if err != nil {
			o.Canvas.FillString(f, pt, string([]rune(text)[i:]))
			return
		}
		var path vg.Path
		for _, s := range segments {
			switch s.Op {
			case sfnt.SegmentOpMoveTo:
				if len(path) > 0 {
					path.Close()
				}
				path.Move(at(s.Args[0]))
			case sfnt.SegmentOpLineTo:
				path.Line(at(s.Args[0]))
			case sfnt.SegmentOpQuadTo:
				path.QuadTo(at(s.Args[0]), at(s.Args[1]))
			case sfnt.SegmentOpCubeTo:
				path.CubeTo(at(s.Args[0]), at(s.Args[1]), at(s.Args[2]))
			}
		}
		if len(path) > 0 {
			path.Close()
			o.Canvas.Fill(path)
		}
		advance, err := f.Face.GlyphAdvance(&buf, glyph, size, 0)
		if err != nil {
			return
		}
		pt.X += vg.Length(advance) / 64 / outlineScale
		last = glyph
	}
}

// outlineScale keeps what rounding to 1/64 point would lose of small letters.
const outlineScale = 16
