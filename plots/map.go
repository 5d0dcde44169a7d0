package plots

import (
	"image/color"
	"math"
	"strings"

	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"

	"memsync/results"
)

// decision is the best at a cell of a map.
type decision struct {
	leaders []panel // the best, then those that are not told apart from it
	ratio   float64 // by how much the best is better than the next that is; 0 where there is none
}

// decide returns the decision at x and row; no leaders where nothing was measured.
func (f *figure) decide(x, row string) (d decision) {
	metric, _ := results.MetricByName(f.spec.Y.Column) // Check knows it
	byName := map[string]panel{}
	var all []results.Contender
	for _, p := range f.panels {
		if pt, ok := p.cells[[2]string{x, row}]; ok {
			all, byName[p.name] = append(all, results.Contender{Name: p.name, Summary: pt.Summary}), p
		}
	}
	lead := results.Best(all, metric.Better)
	for _, c := range all[:lead] {
		d.leaders = append(d.leaders, byName[c.Name])
	}
	if lead > 0 && lead < len(all) {
		if next, ok := all[lead].Median.Get(); ok && next > 0 && all[0].Median.Float() > 0 {
			d.ratio = all[0].Median.Float() / next
			if metric.Better == results.Lower {
				d.ratio = 1 / d.ratio
			}
		}
	}
	return d
}

var mapText = textStyle(5.9, false, ink)

const (
	mapLine = 7 * vg.Length(1)
	mapPad  = 3 * vg.Length(1)
)

// mapLines are the texts of a cell: its leaders, and by how much the first is better.
func (d decision) mapLines(w vg.Length) []string {
	var lines []string
	for i, p := range d.leaders {
		name := p.name
		if i+1 < len(d.leaders) {
			name += " or"
		}
		lines = append(lines, wrap(mapText, name, w)...)
	}
	if d.ratio > 0 {
		lines = append(lines, label(round(d.ratio, 2))+"×")
	}
	if len(lines) == 0 {
		return []string{"–"}
	}
	return lines
}

// mapGrid is where the map's cells lie below its left edge.
func (f *figure) mapGrid() (rows, columns []string, left, cellW, cellH vg.Length) {
	rows, columns = f.heatRows(), f.heatColumns()
	wide := vg.Length(0)
	for _, r := range rows {
		wide = max(wide, tickText.Width(f.axisText(f.spec.Rows, r)))
	}
	left = labelLine + 2 + wide + 3
	cellW = (width - 2*margin - left) / vg.Length(len(columns))
	most := 1
	for _, r := range rows {
		for _, x := range columns {
			most = max(most, len(f.decide(x, r).mapLines(cellW-2*mapPad)))
		}
	}
	return rows, columns, left, cellW, mapLine*vg.Length(most) + 2*mapPad
}

func (f *figure) mapHeight() vg.Length {
	rows, _, _, _, cellH := f.mapGrid()
	return cellH*vg.Length(len(rows)) + heatTicks + labelLine
}

// decisions draws the map: each cell in the pale colour of the best, or in stripes of
// those that are not told apart, with their names.
func (f *figure) decisions(c draw.Canvas, area vg.Rectangle) {
	rows, columns, left, cellW, cellH := f.mapGrid()
	left += area.Min.X
	bottom := area.Max.Y - cellH*vg.Length(len(rows))
	for r, row := range rows {
		y := bottom + cellH*vg.Length(r)
		s := tickText
		s.XAlign, s.YAlign = draw.XRight, draw.YCenter
		c.FillText(s, vg.Point{X: left - 3, Y: y + cellH/2}, f.axisText(f.spec.Rows, row))
		for k, column := range columns {
			box := rect(left+cellW*vg.Length(k)+0.5, y+0.5, left+cellW*vg.Length(k+1)-0.5, y+cellH-0.5)
			d := f.decide(column, row)
			fills := []color.Color{rule}
			for i, p := range d.leaders {
				fills = append(fills[:i], p.pale())
			}
			w := (box[2].X - box[0].X) / vg.Length(len(fills))
			for i, fill := range fills {
				x := box[0].X + w*vg.Length(i)
				c.FillPolygon(fill, rect(x, box[0].Y, x+w, box[2].Y))
			}
			lines := d.mapLines(cellW - 2*mapPad)
			s := mapText
			s.XAlign, s.YAlign = draw.XCenter, draw.YCenter
			for i, l := range lines {
				at := y + cellH/2 + mapLine*(vg.Length(len(lines)-1)/2-vg.Length(i))
				c.FillText(s, vg.Point{X: left + cellW*(vg.Length(k)+0.5), Y: at}, strings.TrimSpace(l))
			}
		}
	}
	for k, column := range columns {
		s := tickText
		s.XAlign = draw.XCenter
		c.FillText(s, vg.Point{X: left + cellW*(vg.Length(k)+0.5), Y: bottom - 1}, f.axisText(f.spec.X, column))
	}
	s := axisText
	s.XAlign, s.YAlign = draw.XCenter, draw.YBottom
	c.FillText(s, vg.Point{X: (left + area.Max.X) / 2, Y: area.Min.Y}, f.spec.X.String())
	s.Rotation, s.YAlign = math.Pi/2, draw.YTop
	c.FillText(s, vg.Point{X: area.Min.X, Y: (area.Max.Y + bottom) / 2}, f.spec.Rows.String())
}
