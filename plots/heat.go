package plots

import (
	"cmp"
	"image/color"
	"math"
	"slices"
	"strings"

	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"

	"memsync/results"
)

// panel is one series of a heat map: its cells, by x and row.
type panel struct {
	name string
	style
	cells map[[2]string]results.Point
}

// makePanels sorts series, whose last key is the row, into the figure's panels.
// A panel without any value is left out: the caption names it.
func makePanels(series []results.Series, spec results.FigureSpec) []panel {
	byKey := map[string]panel{}
	var order []string
	for i, s := range spec.Series {
		order = append(order, s.Key)
		byKey[s.Key] = panel{cmp.Or(s.Label, s.Key), styleOf(i), map[[2]string]results.Point{}}
	}
	for _, s := range series {
		i := strings.LastIndex(s.Key, "/")
		key, row := s.Key[:i], s.Key[i+1:]
		if _, ok := byKey[key]; !ok {
			order = append(order, key)
			byKey[key] = panel{key, styleOf(len(order) - 1), map[[2]string]results.Point{}}
		}
		for _, p := range s.Points {
			if p.N > 0 {
				byKey[key].cells[[2]string{p.X, row}] = p
			}
		}
	}
	var out []panel
	for _, k := range order {
		if len(byKey[k].cells) > 0 {
			out = append(out, byKey[k])
		}
	}
	return out
}

// heatRows returns the texts of the rows, from the bottom up.
func (f *figure) heatRows() []string {
	var rows []string
	for _, p := range f.panels {
		for at := range p.cells {
			if !slices.Contains(rows, at[1]) {
				rows = append(rows, at[1])
			}
		}
	}
	slices.SortFunc(rows, func(a, b string) int {
		x, _ := results.Quantity(a)
		y, _ := results.Quantity(b)
		switch {
		case x < y:
			return -1
		case x > y:
			return 1
		}
		return strings.Compare(a, b)
	})
	return rows
}

// heatColumns returns the texts of x that a panel has a value for, in order.
func (f *figure) heatColumns() []string {
	return slices.DeleteFunc(slices.Clone(f.cats), func(x string) bool {
		return !slices.ContainsFunc(f.panels, func(p panel) bool {
			for at := range p.cells {
				if at[0] == x {
					return true
				}
			}
			return false
		})
	})
}

// Sizes within a heat map.
const (
	heatAbreast = 2 // panels side by side
	heatCell    = 13 * vg.Length(1)
	heatTitle   = 10 * vg.Length(1)
	heatTicks   = 9 * vg.Length(1)
	heatGap     = 7 * vg.Length(1)
	heatBar     = 6 * vg.Length(1)
)

func (f *figure) heatHeight() vg.Length {
	down := vg.Length((len(f.panels) + heatAbreast - 1) / heatAbreast)
	return down*(heatTitle+heatCell*vg.Length(len(f.heatRows()))+heatTicks) + (down-1)*3 + labelLine + heatGap + heatBar + heatTicks + labelLine
}

// heat draws the panels, two abreast, and the scale of their colour below.
func (f *figure) heat(c draw.Canvas, area vg.Rectangle) {
	rows, columns := f.heatRows(), f.heatColumns()
	var vs []float64
	for _, p := range f.panels {
		for _, pt := range p.cells {
			if v, ok := f.shown(pt.Median); ok {
				vs = append(vs, v)
			}
		}
	}
	lo, hi := limits(vs, f.spec.Y.Log, true)
	if !f.spec.Y.Log {
		hi = slices.Max(append(vs, lo)) // no margin: the scale ends where the values do
	}
	share := func(v float64) float64 {
		if f.spec.Y.Log {
			return math.Log(v/lo) / math.Log(hi/lo)
		}
		return (v - lo) / (hi - lo)
	}
	small := textStyle(6.3, false, ink)
	wide := vg.Length(0)
	for _, r := range rows {
		wide = max(wide, tickText.Width(f.axisText(f.spec.Rows, r)))
	}
	left := area.Min.X + labelLine + 2 + wide + 3
	abreast := min(heatAbreast, len(f.panels))
	panelW := (area.Max.X - left - heatGap*vg.Length(abreast-1)) / vg.Length(abreast)
	cellW := panelW / vg.Length(len(columns))
	panelH := heatTitle + heatCell*vg.Length(len(rows)) + heatTicks + 3
	for i, p := range f.panels {
		x0 := left + (panelW+heatGap)*vg.Length(i%abreast)
		top := area.Max.Y - panelH*vg.Length(i/abreast)
		c.FillText(legendText, vg.Point{X: x0, Y: top}, p.name)
		top -= heatTitle
		bottom := top - heatCell*vg.Length(len(rows))
		for r, row := range rows {
			y := bottom + heatCell*vg.Length(r)
			if i%abreast == 0 {
				s := tickText
				s.XAlign, s.YAlign = draw.XRight, draw.YCenter
				c.FillText(s, vg.Point{X: x0 - 3, Y: y + heatCell/2}, f.axisText(f.spec.Rows, row))
			}
			for k, column := range columns {
				box := rect(x0+cellW*vg.Length(k)+0.4, y+0.4, x0+cellW*vg.Length(k+1)-0.4, y+heatCell-0.4)
				s, txt := small, "–"
				s.XAlign, s.YAlign = draw.XCenter, draw.YCenter
				if v, ok := f.shown(p.cells[[2]string{column, row}].Median); ok {
					fill := viridis(share(v))
					c.FillPolygon(fill, box)
					txt = label(round(v, 2))
					if v >= 100 {
						txt = label(round(v, 3))
					}
					if luminance(fill) < 0.5 {
						s.Color = color.White
					}
				} else {
					c.FillPolygon(rule, box)
				}
				c.FillText(s, vg.Point{X: x0 + cellW*(vg.Length(k)+0.5), Y: y + heatCell/2}, txt)
			}
		}
		for k, column := range columns {
			s := tickText
			s.XAlign = draw.XCenter
			c.FillText(s, vg.Point{X: x0 + cellW*(vg.Length(k)+0.5), Y: bottom - 1}, f.axisText(f.spec.X, column))
		}
	}
	scaleTop := area.Min.Y + labelLine + heatTicks + heatBar
	s := axisText
	s.XAlign, s.YAlign = draw.XCenter, draw.YBottom
	mid := (left + area.Max.X) / 2
	c.FillText(s, vg.Point{X: mid, Y: scaleTop + heatGap}, f.spec.X.String())
	c.FillText(s, vg.Point{X: mid, Y: area.Min.Y}, f.spec.Y.String())
	s.Rotation, s.YAlign = math.Pi/2, draw.YTop
	c.FillText(s, vg.Point{X: area.Min.X, Y: (area.Max.Y + scaleTop + heatGap + labelLine) / 2}, f.spec.Rows.String())

	const steps = 64
	w := (area.Max.X - left) / steps
	for i := range steps {
		c.FillPolygon(viridis((float64(i)+0.5)/steps), rect(left+w*vg.Length(i), scaleTop-heatBar, left+w*vg.Length(i+1)+0.2, scaleTop))
	}
	marks := linearTicks(5).Ticks(lo, hi)
	if f.spec.Y.Log {
		marks = logTicks{}.Ticks(lo, hi)
	}
	for _, m := range marks {
		if m.Label != "" {
			s := tickText
			s.XAlign = draw.XCenter
			x := left + (area.Max.X-left)*vg.Length(share(m.Value))
			c.FillText(s, vg.Point{X: min(x, area.Max.X-s.Width(m.Label)/2), Y: scaleTop - heatBar - 1}, m.Label)
		}
	}
}

// axisText is a text of x or of a row in the axis's unit.
func (f *figure) axisText(a results.Axis, text string) string {
	if v, ok := results.Quantity(text); ok {
		return label(round(a.Shown(v), 4))
	}
	return text
}

// viridisStops are equally spaced colours of viridis (van der Walt and Smith, 2015),
// whose lightness grows evenly also for those who see fewer colours.
var viridisStops = [...]color.RGBA{
	{0x44, 0x01, 0x54, 0xff}, {0x3b, 0x52, 0x8b, 0xff}, {0x21, 0x91, 0x8c, 0xff}, {0x5e, 0xc9, 0x62, 0xff}, {0xfd, 0xe7, 0x25, 0xff},
}

// viridis is the colour at a place of the scale, 0 to 1.
func viridis(at float64) color.RGBA {
	at = min(max(at, 0), 1) * float64(len(viridisStops)-1)
	i := min(int(at), len(viridisStops)-2)
	mix := func(a, b uint8) uint8 { return uint8(math.Round(float64(a) + (float64(b)-float64(a))*(at-float64(i)))) }
	a, b := viridisStops[i], viridisStops[i+1]
	return color.RGBA{mix(a.R, b.R), mix(a.G, b.G), mix(a.B, b.B), 0xff}
}

// luminance is how light a colour looks, 0 to 1.
func luminance(c color.RGBA) float64 {
	return (0.299*float64(c.R) + 0.587*float64(c.G) + 0.114*float64(c.B)) / 255
}
