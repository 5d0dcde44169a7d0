package report

import (
	"fmt"
	"slices"

	"memsync/results"
)

// decisionMap says which strategy is best at each RTT and rate, by one metric.
type decisionMap struct {
	Title string
	Note  string
	Rates []float64 // Mbit/s, columns
	Lines []mapLine
}

type mapLine struct {
	RTT   float64 // ms
	Cells []mapCell
}

// mapCell is the best at one link.
type mapCell struct {
	Best  []string // one, or those that the runs cannot tell apart
	Style int      // of the first
	Text  string   // its median, and by how much it is better than the next
}

// mapFigure is the figure that varies both.
const mapFigure = "rtt-and-rate"

// decisionMaps makes the maps from the runs of mapFigure; none where there are none.
func decisionMaps(rows []results.Row) []decisionMap {
	var out []decisionMap
	for _, m := range []struct{ metric, title string }{
		{"time_to_last_byte", "Soonest to have all of the region"},
		{"latency_first_chunk", "Soonest to have the first page"},
	} {
		if d, ok := newMap(rows, m.metric, m.title); ok {
			out = append(out, d)
		}
	}
	return out
}

func newMap(rows []results.Row, metric, title string) (decisionMap, bool) {
	def, _ := results.MetricByName(metric) // the list above names metrics
	type link struct{ rtt, rate float64 }
	values, runs := map[link]map[string][]float64{}, map[link]map[string]int{}
	var rtts, rates []float64
	var strategies []string
	var region int64
	add := func(list []float64, v float64) []float64 {
		if slices.Contains(list, v) {
			return list
		}
		return append(list, v)
	}
	for _, r := range rows {
		v, ok := r.Value.Get()
		if r.Figure != mapFigure || r.Status != results.StatusOK {
			continue
		}
		at := link{r.RTTms, r.RateMbit}
		if values[at] == nil {
			values[at], runs[at] = map[string][]float64{}, map[string]int{}
		}
		if r.Metric == results.RunMetric {
			runs[at][r.Strategy]++
		}
		if r.Metric != metric || !ok {
			continue
		}
		values[at][r.Strategy] = append(values[at][r.Strategy], v)
		rtts, rates, region = add(rtts, r.RTTms), add(rates, r.RateMbit), r.RegionBytes
		if !slices.Contains(strategies, r.Strategy) {
			strategies = append(strategies, r.Strategy)
		}
	}
	if len(strategies) == 0 {
		return decisionMap{}, false
	}
	slices.Sort(rtts)
	slices.Sort(rates)
	slices.Sort(strategies)
	d := decisionMap{Title: title, Rates: rates,
		Note: fmt.Sprintf("Median of the runs of %s, regions of %d MiB read in sequence. Where the 95 %% intervals of several overlap, all are named; a strategy of which a run's time was over first is left out.", mapFigure, region>>20)}
	for _, rtt := range rtts {
		line := mapLine{RTT: rtt}
		for _, rate := range rates {
			var all []results.Contender
			at := link{rtt, rate}
			for name, v := range values[at] {
				if len(v) < runs[at][name] { // the time of some was over first: the others alone would flatter it
					continue
				}
				all = append(all, results.Contender{Name: name, Summary: results.Summarize(v)})
			}
			line.Cells = append(line.Cells, best(all, def.Better, strategies))
		}
		d.Lines = append(d.Lines, line)
	}
	return d, true
}

// best names the winner, with those that are not told apart from it.
func best(all []results.Contender, better results.Better, strategies []string) mapCell {
	lead := results.Best(all, better)
	if lead == 0 {
		return mapCell{Text: "no runs that ended in time", Style: -1}
	}
	c := mapCell{Style: slices.Index(strategies, all[0].Name)}
	for _, o := range all[:lead] {
		c.Best = append(c.Best, o.Name)
	}
	if lead < len(all) {
		c.Text = fmt.Sprintf("%.3g times sooner than %s", all[lead].Median.Float()/all[0].Median.Float(), all[lead].Name)
	}
	return c
}
