package plots

import (
	"image/color"
	"math"
	"slices"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

// Sizes for one column of a two-column paper, drawn 1:1.
const (
	width      = 3.5 * vg.Inch
	plotHeight = 2.15 * vg.Inch
	margin     = 3 * vg.Length(1)
	dpi        = 300
)

var (
	ink  = color.RGBA{0x22, 0x22, 0x22, 0xff}
	grey = color.RGBA{0x60, 0x60, 0x60, 0xff}
	rule = color.RGBA{0xe2, 0xe2, 0xe2, 0xff}
)

// okabeIto is the palette of Okabe and Ito (Color Universal Design, 2008) in an
// order that keeps neighbours apart; its yellow is too pale on white for lines.
var okabeIto = [...]color.RGBA{
	{0x00, 0x72, 0xb2, 0xff}, // blue
	{0xd5, 0x5e, 0x00, 0xff}, // vermilion
	{0x00, 0x9e, 0x73, 0xff}, // bluish green
	{0xcc, 0x79, 0xa7, 0xff}, // reddish purple
	{0xe6, 0x9f, 0x00, 0xff}, // orange
	{0x56, 0xb4, 0xe9, 0xff}, // sky blue
	{0x22, 0x22, 0x22, 0xff}, // black
}

var dashes = [...][]vg.Length{
	nil, {5, 2}, {1.2, 1.6}, {6, 1.8, 1.2, 1.8}, {2.6, 1.6}, {8, 2.5}, {6, 1.5, 1.2, 1.5, 1.2, 1.5},
}

// style tells a series apart three times over: by colour, dash and marker.
type style struct {
	color  color.RGBA
	dash   []vg.Length
	marker int
	lab    bool // made in the lab kernel: its markers and bars are hollow
}

// styleOf gives the i-th series its style; colours repeat before pairs of colour and dash do.
func styleOf(i int) style {
	n := len(okabeIto)
	return style{color: okabeIto[i%n], dash: dashes[(i+i/n)%len(dashes)], marker: (i + 2*(i/n)) % markers}
}

// pale is the colour mixed with white, for the thesis's layer.
func (s style) pale() color.RGBA {
	mix := func(c uint8) uint8 { return uint8((int(c)*38 + 255*62) / 100) }
	return color.RGBA{mix(s.color.R), mix(s.color.G), mix(s.color.B), 0xff}
}

// band is the colour of an interval, through which other lines show.
func (s style) band() color.Color { return color.NRGBA{s.color.R, s.color.G, s.color.B, 0x33} }

func (s style) line() draw.LineStyle {
	return draw.LineStyle{Color: s.color, Width: 1.1, Dashes: s.dash}
}

func (s style) thesisLine() draw.LineStyle { return draw.LineStyle{Color: s.pale(), Width: 2.4} }

// markers is the number of forms of drawMarker.
const markers = 7

// drawMarker draws the style's marker, scaled, filled, with a thin white edge that
// keeps it apart from lines and other markers.
func (s style) drawMarker(c *draw.Canvas, at vg.Point, scale float64) {
	r := 2.4 * scale
	polygon := func(n int, start, r float64) []vg.Point {
		pts := make([]vg.Point, n)
		for i := range pts {
			sin, cos := math.Sincos((start + float64(i)/float64(n)) * 2 * math.Pi)
			pts[i] = vg.Point{X: at.X + vg.Length(r*cos), Y: at.Y + vg.Length(r*sin)}
		}
		return pts
	}
	cross := func(turn float64) []vg.Point { // a thick cross of 12 corners
		arm, half := r*1.2, r*0.35
		var pts []vg.Point
		for q := range 4 {
			sin, cos := math.Sincos((turn + float64(q)/4) * 2 * math.Pi)
			for _, p := range [][2]float64{{arm, -half}, {arm, half}, {half, half}} {
				pts = append(pts, vg.Point{X: at.X + vg.Length(p[0]*cos-p[1]*sin), Y: at.Y + vg.Length(p[0]*sin+p[1]*cos)})
			}
		}
		return pts
	}
	var pts []vg.Point
	switch s.marker % markers {
	case 0:
		pts = polygon(32, 0, r)
	case 1:
		pts = polygon(4, 0.125, r*1.2)
	case 2:
		pts = polygon(3, 0.25, r*1.3)
	case 3:
		pts = polygon(4, 0, r*1.25)
	case 4:
		pts = polygon(3, 0.75, r*1.3)
	case 5:
		pts = cross(0)
	case 6:
		pts = cross(0.125)
	}
	s.fill(c, pts)
	if s.lab {
		return
	}
	c.StrokeLines(draw.LineStyle{Color: color.White, Width: 0.45}, append(pts, pts[0]))
}

// fill fills a polygon in the series's colour; one of the lab kernel is hollow.
func (s style) fill(c *draw.Canvas, pts []vg.Point) {
	if !s.lab {
		c.FillPolygon(s.color, pts)
		return
	}
	c.FillPolygon(color.White, pts)
	c.StrokeLines(draw.LineStyle{Color: s.color, Width: 0.8}, append(slices.Clone(pts), pts[0]))
}

// textStyle is a text in the figures' face.
func textStyle(size vg.Length, bold bool, col color.Color) text.Style {
	f := font.From(plot.DefaultFont, size)
	f.Variant = "Sans"
	if bold {
		f.Weight = 3 // WeightBold of golang.org/x/image/font
	}
	return text.Style{Color: col, Font: f, Handler: plot.DefaultTextHandler, XAlign: draw.XLeft, YAlign: draw.YTop}
}
