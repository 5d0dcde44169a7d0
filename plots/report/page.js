"use strict";
// Draws the figures of the page from its data. Colours: Okabe and Ito, as in the plots.
const palette = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000"];
const dashes = ["", "6 3", "2 3", "8 3 2 3"];
const colour = i => palette[i % palette.length];
const dash = i => dashes[Math.floor(i / palette.length) % dashes.length] || "";
const W = 520, H = 350, M = { l: 64, r: 14, t: 10, b: 66 };
const svgNS = "http://www.w3.org/2000/svg";
function el(name, attrs, ...children) {
  const e = document.createElementNS(svgNS, name);
  for (const k in attrs) e.setAttribute(k, attrs[k]);
  for (const c of children) e.append(c);
  return e;
}
const fmt = v => v === null || v === undefined ? "–" : Number(v.toPrecision(4)).toString();
const tip = document.getElementById("tip");
function says(target, text) {
  target.addEventListener("pointerenter", e => { tip.textContent = text; tip.hidden = false; place(e); });
  target.addEventListener("pointermove", place);
  target.addEventListener("pointerleave", () => { tip.hidden = true; });
  target.append(el("title", {}, text));
}
function place(e) {
  tip.style.left = Math.min(e.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = (e.clientY + 16) + "px";
}
// scale maps values to pixels; ticks are round numbers of it.
function scale(lo, hi, log, from, to) {
  if (log) { lo = Math.log10(lo); hi = Math.log10(hi); }
  if (!(hi > lo)) { const d = Math.abs(lo) * 0.1 || 1; lo -= d; hi += d; }
  const at = v => from + ((log ? Math.log10(v) : v) - lo) / (hi - lo) * (to - from);
  const ticks = [];
  if (log) {
    const few = hi - lo < 1.5;
    for (let e = Math.floor(lo); e <= Math.ceil(hi); e++) for (const m of few ? [1, 2, 5] : [1]) {
      const t = e + Math.log10(m);
      if (t >= lo - 1e-9 && t <= hi + 1e-9) ticks.push(m * Math.pow(10, e));
    }
  } else {
    const raw = (hi - lo) / 6, p = Math.pow(10, Math.floor(Math.log10(raw)));
    const step = [1, 2, 5, 10].map(m => m * p).find(s => s >= raw);
    for (let t = Math.ceil(lo / step) * step; t <= hi + step * 1e-9; t += step) ticks.push(Math.abs(t) < step * 1e-9 ? 0 : t);
  }
  return { at, ticks };
}
function quartiles(v) {
  v = [...v].sort((a, b) => a - b);
  const q = p => { const i = (v.length - 1) * p, k = Math.floor(i); return v[k] + (i - k) * ((v[k + 1] ?? v[k]) - v[k]); };
  return [q(0.25), q(0.5), q(0.75)];
}
class Plot {
  constructor(fig, variant) {
    this.fig = fig; this.variant = variant; this.hidden = new Set();
    this.log = fig.y.log; this.logX = fig.x.log;
    this.root = document.createElement("div"); this.root.className = "plot";
    const h = document.createElement("h4"); h.textContent = "variant " + variant.name;
    this.area = document.createElement("div"); this.keys = document.createElement("div"); this.keys.className = "keys";
    this.root.append(h, this.area, this.keys);
    this.legend(); this.draw();
  }
  legend() {
    if (this.fig.kind === "heat") return;
    this.variant.series.forEach((s, i) => {
      const b = document.createElement("button"); b.type = "button"; b.setAttribute("aria-pressed", "true");
      const k = document.createElement("i"); k.style.background = colour(s.style); b.append(k, s.label);
      b.onclick = () => { this.hidden.has(i) ? this.hidden.delete(i) : this.hidden.add(i); b.setAttribute("aria-pressed", !this.hidden.has(i)); this.draw(); };
      this.keys.append(b);
    });
    const horizontal = this.fig.kind === "density" || this.fig.kind === "cdf";
    const b = document.createElement("button"); b.type = "button"; b.className = "scale"; b.setAttribute("aria-pressed", this.log);
    b.textContent = "log scale"; b.style.textDecoration = "none";
    b.onclick = () => { this.log = !this.log; b.setAttribute("aria-pressed", this.log); b.textContent = this.log ? "linear scale" : "log scale"; this.draw(); };
    b.textContent = this.log ? "linear scale" : "log scale";
    this.keys.append(b);
    this.valuesAcross = horizontal;
  }
  shown() { return this.variant.series.map((s, i) => [s, i]).filter(([, i]) => !this.hidden.has(i)).map(([s]) => s); }
  draw() {
    this.area.replaceChildren();
    const f = this.fig;
    if (f.kind === "heat") { this.heat(); return; }
    const svg = el("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", tabindex: 0, "aria-label": `${f.title}, variant ${this.variant.name}; the table below has the data` });
    this.area.append(svg);
    ({ line: this.lines, bar: this.bars, box: this.boxes, density: this.densities, cdf: this.cdfs })[f.kind].call(this, svg);
  }
  range(values) {
    let v = values.filter(x => x !== null && isFinite(x));
    if (this.log) v = v.filter(x => x > 0);
    if (!v.length) return [1, 10];
    let lo = Math.min(...v), hi = Math.max(...v);
    if (this.log) return [lo * 0.9, hi * 1.1];
    if (lo > 0 && this.fig.kind !== "box" && !this.valuesAcross) lo = 0;
    return [lo, hi + (hi - lo) * 0.05];
  }
  axes(svg, x, y, names, ylabel, xlabel) {
    for (const t of y.ticks) {
      const py = y.at(t);
      svg.append(el("line", { x1: M.l, x2: W - M.r, y1: py, y2: py, stroke: "#e4e4e4" }), el("text", { x: M.l - 6, y: py + 4, "text-anchor": "end" }, fmt(t)));
    }
    const long = names && names.some(n => n.length * 6.5 > (W - M.l - M.r) / names.length);
    if (names) names.forEach((n, i) => {
      if (n.length > 22) n = n.slice(0, 21) + "…";
      svg.append(el("text", long ? { x: x.at(i), y: H - M.b + 14, "text-anchor": "end", transform: `rotate(-18 ${x.at(i)} ${H - M.b + 14})` } : { x: x.at(i), y: H - M.b + 16, "text-anchor": "middle" }, n));
    });
    else for (const t of x.ticks) svg.append(el("line", { x1: x.at(t), x2: x.at(t), y1: H - M.b, y2: H - M.b + 4, stroke: "#595959" }), el("text", { x: x.at(t), y: H - M.b + 16, "text-anchor": "middle" }, fmt(t)));
    svg.append(el("rect", { x: M.l, y: M.t, width: W - M.l - M.r, height: H - M.t - M.b, fill: "none", stroke: "#595959" }),
      el("text", { x: (M.l + W - M.r) / 2, y: H - 6, "text-anchor": "middle" }, xlabel ?? this.fig.x.label),
      el("text", { transform: `translate(13 ${(M.t + H - M.b) / 2}) rotate(-90)`, "text-anchor": "middle" }, ylabel ?? this.fig.y.label));
  }
  lines(svg) {
    const f = this.fig, names = f.x.category ? f.x.names : null, list = this.shown();
    const px = p => names ? names.indexOf(p.x) : p.pos;
    const flat = s => s.baseline || (s.points.length === 1 && !names);
    const xs = list.filter(s => !s.baseline).flatMap(s => [...s.points.map(px), ...(names ? [] : (s.thesis || []).map(t => t.x))]).filter(v => v !== null && (!this.logX || v > 0));
    const x = names ? scale(-0.5, names.length - 0.5, false, M.l, W - M.r) : scale(Math.min(...xs, Infinity), Math.max(...xs, -Infinity), this.logX, M.l + 8, W - M.r - 8);
    const [lo, hi] = this.range(list.flatMap(s => [...s.points.flatMap(p => [p.y, p.lo, p.hi]), ...(names ? [] : (s.thesis || []).map(t => t.y))]));
    const y = scale(lo, hi, this.log, H - M.b, M.t);
    this.axes(svg, x, y, names);
    const ok = p => p.y !== null && (!this.log || p.y > 0) && (names || (px(p) !== null && (!this.logX || px(p) > 0)));
    for (const s of list) if (s.thesis && !names) {
      const pts = s.thesis.filter(t => (!this.log || t.y > 0) && (!this.logX || t.x > 0));
      svg.append(el("polyline", { points: pts.map(t => `${x.at(t.x)},${y.at(t.y)}`).join(" "), fill: "none", stroke: colour(s.style), "stroke-opacity": 0.3, "stroke-width": 4 }));
      for (const t of pts) { const c = el("circle", { cx: x.at(t.x), cy: y.at(t.y), r: 4, fill: colour(s.style), "fill-opacity": 0.3 }); says(c, `thesis, ${s.label}, ${fmt(t.x)}: ${fmt(t.y)}`); svg.append(c); }
    }
    for (const s of list) {
      const c = colour(s.style), pts = s.points.filter(ok);
      if (s.baseline && pts.length) {
        const py = y.at(pts[0].y), l = el("line", { x1: M.l, x2: W - M.r, y1: py, y2: py, stroke: c, "stroke-dasharray": "3 4", "stroke-width": 2 });
        says(l, this.text(s, pts[0])); svg.append(l); continue;
      }
      const band = pts.filter(p => p.lo !== null && p.hi !== null && (!this.log || p.lo > 0));
      if (band.length > 1) svg.append(el("polygon", { points: [...band.map(p => `${x.at(px(p))},${y.at(p.hi)}`), ...band.reverse().map(p => `${x.at(px(p))},${y.at(p.lo)}`)].join(" "), fill: c, "fill-opacity": 0.18 }));
      svg.append(el("polyline", { points: pts.map(p => `${x.at(px(p))},${y.at(p.y)}`).join(" "), fill: "none", stroke: c, "stroke-width": 2, "stroke-dasharray": dash(s.style) }));
      for (const p of pts) { const m = el("circle", { cx: x.at(px(p)), cy: y.at(p.y), r: 4, fill: c, stroke: "#fff" }); says(m, this.text(s, p)); svg.append(m); }
    }
  }
  text(s, p) { return `${s.label}${p.x !== "" ? ", " + p.x : ""}: ${fmt(p.y)} (95 % ${fmt(p.lo)} to ${fmt(p.hi)}), n ${p.n}${p.failed ? `, ${p.failed} not ok` : ""}`; }
  slots() {
    const list = this.shown(), names = this.fig.x.names && this.fig.x.names.some(n => n !== "") ? this.fig.x.names : null;
    return { list, names: names ?? list.map(s => s.label), slot: (s, p) => names ? names.indexOf(p.x) : list.indexOf(s), side: names ? list.length : 1, of: s => names ? list.indexOf(s) : 0 };
  }
  bars(svg) {
    const { list, names, slot, side, of } = this.slots();
    const x = scale(-0.5, names.length - 0.5, false, M.l, W - M.r), unit = x.at(1) - x.at(0), w = Math.min(40, unit * 0.8 / side);
    const [lo, hi] = this.range(list.flatMap(s => [...s.points.flatMap(p => [p.y, p.lo, p.hi]), ...(s.thesis || []).map(t => t.y)]));
    const y = scale(this.log ? lo * 0.6 : lo, hi, this.log, H - M.b, M.t);
    this.axes(svg, x, y, names);
    for (const s of list) for (const p of s.points) {
      if (p.y === null || (this.log && p.y <= 0)) continue;
      const left = x.at(slot(s, p)) + (of(s) - side / 2) * w, c = colour(s.style), top = y.at(p.y);
      const r = el("rect", { x: left, y: top, width: w * 0.9, height: Math.max(0, H - M.b - top), fill: c });
      says(r, this.text(s, p)); svg.append(r);
      if (p.lo !== null && p.hi !== null && (!this.log || p.lo > 0)) svg.append(el("line", { x1: left + w * 0.45, x2: left + w * 0.45, y1: y.at(p.lo), y2: y.at(p.hi), stroke: "#000", "stroke-width": 1.5 }));
      for (const t of s.thesis || []) if (s.points.length === 1) { const l = el("line", { x1: left - w * 0.1, x2: left + w, y1: y.at(t.y), y2: y.at(t.y), stroke: c, "stroke-opacity": 0.45, "stroke-width": 5 }); says(l, `thesis, ${s.label}: ${fmt(t.y)}`); svg.append(l); }
    }
  }
  boxes(svg) {
    const { list, names, slot, side, of } = this.slots();
    const x = scale(-0.5, names.length - 0.5, false, M.l, W - M.r), unit = x.at(1) - x.at(0), w = Math.min(46, unit * 0.8 / side);
    const [lo, hi] = this.range(list.flatMap(s => s.points.flatMap(p => p.values || [])));
    const y = scale(lo, hi, this.log, H - M.b, M.t);
    this.axes(svg, x, y, names);
    for (const s of list) for (const p of s.points) {
      if (!p.values || !p.values.length) continue;
      const [a, m, b] = quartiles(p.values), reach = 1.5 * (b - a), inside = p.values.filter(v => v >= a - reach && v <= b + reach);
      const mid = x.at(slot(s, p)) + (of(s) - side / 2 + 0.5) * w, c = colour(s.style);
      svg.append(el("line", { x1: mid, x2: mid, y1: y.at(Math.min(...inside)), y2: y.at(Math.max(...inside)), stroke: c }));
      const r = el("rect", { x: mid - w * 0.4, y: y.at(b), width: w * 0.8, height: Math.max(1, y.at(a) - y.at(b)), fill: c, "fill-opacity": 0.35, stroke: c });
      says(r, `${s.label}: quartiles ${fmt(a)}, ${fmt(m)}, ${fmt(b)}, n ${p.n}`);
      svg.append(r, el("line", { x1: mid - w * 0.4, x2: mid + w * 0.4, y1: y.at(m), y2: y.at(m), stroke: c, "stroke-width": 3 }));
      for (const v of p.values) if (!inside.includes(v)) { const o = el("circle", { cx: mid, cy: y.at(v), r: 3, fill: "none", stroke: c }); says(o, `${s.label}: outlier ${fmt(v)}`); svg.append(o); }
    }
  }
  densities(svg) {
    const list = this.shown(), all = list.flatMap(s => s.points.flatMap(p => p.values || []));
    const [lo, hi] = this.range(all), t = v => this.log ? Math.log10(v) : v, back = v => this.log ? Math.pow(10, v) : v;
    const x = scale(lo, hi, this.log, M.l, W - M.r), curves = [];
    for (const s of list) {
      const v = s.points.flatMap(p => p.values || []).map(t);
      if (!v.length) continue;
      const mean = v.reduce((a, b) => a + b, 0) / v.length, sd = Math.sqrt(v.reduce((a, b) => a + (b - mean) ** 2, 0) / Math.max(1, v.length - 1)) || (t(hi) - t(lo)) / 50;
      const bw = 1.06 * sd * Math.pow(v.length, -0.2), pts = [];
      for (let i = 0; i <= 120; i++) { const g = t(lo) + (t(hi) - t(lo)) * i / 120; pts.push([back(g), v.reduce((a, b) => a + Math.exp(-0.5 * ((g - b) / bw) ** 2), 0) / (v.length * bw * Math.sqrt(2 * Math.PI))]); }
      curves.push([s, pts, v.length]);
    }
    const y = scale(0, Math.max(1e-12, ...curves.flatMap(([, p]) => p.map(q => q[1]))), false, H - M.b, M.t);
    this.axes(svg, x, y, null, "density", this.fig.y.label);
    for (const [s, pts, n] of curves) {
      const c = colour(s.style), d = el("polygon", { points: [[lo, 0], ...pts, [hi, 0]].map(q => `${x.at(q[0])},${y.at(q[1])}`).join(" "), fill: c, "fill-opacity": 0.25, stroke: c, "stroke-dasharray": dash(s.style) });
      says(d, `${s.label}: ${n} runs`); svg.append(d);
    }
  }
  cdfs(svg) {
    const list = this.shown(), curves = [];
    for (const s of list) {
      const counts = new Map();
      for (const p of s.points) {
        if (p.counts && p.counts.length) for (const b of p.counts) counts.set(b.v, (counts.get(b.v) || 0) + b.n);
        else for (const v of p.values || []) counts.set(v, (counts.get(v) || 0) + 1);
      }
      const vs = [...counts.keys()].filter(v => !this.log || v > 0).sort((a, b) => a - b), total = vs.reduce((a, v) => a + counts.get(v), 0);
      let sum = 0, before = 0; const pts = [];
      for (const v of vs) { sum += counts.get(v); pts.push([v, before], [v, sum / total]); before = sum / total; }
      if (pts.length) curves.push([s, pts]);
    }
    const [lo, hi] = this.range(curves.flatMap(([, p]) => p.map(q => q[0])));
    const x = scale(lo, hi, this.log, M.l, W - M.r), y = scale(0, 1, false, H - M.b, M.t);
    this.axes(svg, x, y, null, "share at or below", this.fig.y.label);
    for (const [s, pts] of curves) {
      const l = el("polyline", { points: pts.map(q => `${x.at(q[0])},${y.at(q[1])}`).join(" "), fill: "none", stroke: colour(s.style), "stroke-width": 2, "stroke-dasharray": dash(s.style) });
      says(l, s.label); svg.append(l);
    }
  }
  heat() {
    const all = this.variant.series.flatMap(s => s.points).map(p => p.y).filter(v => v !== null && (!this.log || v > 0));
    const t = v => this.log ? Math.log(v) : v, lo = Math.min(...all.map(t)), hi = Math.max(...all.map(t));
    const groups = new Map();
    for (const s of this.variant.series) { if (!groups.has(s.label)) groups.set(s.label, []); groups.get(s.label).push(...s.points); }
    for (const [label, points] of groups) {
      const table = document.createElement("table"), rows = [...new Set(points.map(p => p.row))].sort((a, b) => a - b), cols = this.fig.x.names.filter(n => points.some(p => p.x === n));
      const cap = table.createCaption(); cap.textContent = `${label}: ${this.fig.y.label}`;
      const head = table.insertRow(); for (const text of [`${this.fig.rows.label} \\ ${this.fig.x.label}`, ...cols]) { const th = document.createElement("th"); th.scope = "col"; th.textContent = text; head.append(th); }
      for (const r of rows) {
        const line = table.insertRow(), th = document.createElement("th"); th.scope = "row"; th.textContent = r; line.append(th);
        for (const c of cols) {
          const p = points.find(q => q.row === r && q.x === c), td = line.insertCell(); td.className = "n";
          if (!p || p.y === null) { td.textContent = "–"; continue; }
          const share = hi > lo ? (t(p.y) - lo) / (hi - lo) : 1;
          td.textContent = fmt(p.y); td.title = this.text({ label }, p);
          td.style.background = `hsl(205 75% ${95 - 50 * share}%)`; td.style.color = share > 0.75 ? "#fff" : "#1b1b1b";
        }
      }
      this.area.append(table);
    }
  }
}
const figures = JSON.parse(document.getElementById("data").textContent);
for (const article of document.querySelectorAll("[data-figure]")) {
  const fig = figures[article.dataset.figure], plots = article.querySelector(".plots");
  for (const v of fig.variants) plots.append(new Plot(fig, v).root);
}
document.body.dataset.drawn = document.querySelectorAll(".plot").length;
