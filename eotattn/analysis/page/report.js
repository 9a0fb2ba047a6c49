"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = name => document.getElementById(name);
const SVG = "http://www.w3.org/2000/svg";
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"];
const CIVIDIS = ["#00224e", "#35456c", "#666970", "#948e77", "#c8b866", "#fee838"];
const DIVERGING = ["#2166ac", "#92c5de", "#ffffff", "#f4a582", "#b2182b"];
let chosen = firstHead();

function firstHead() {
  const grid = data.mean[data.quantities[0].name];
  let best = [0, 0, -Infinity];
  grid.forEach((row, a) => row.forEach((v, h) => { if (v !== null && v > best[2]) best = [a, h, v]; }));
  return {layer: best[0], head: best[1]};
}
function number(v) { return v === null || v === undefined ? "none" : String(Number(v.toPrecision(5))); }
function element(tag, attributes, parent, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.appendChild(node);
  return node;
}
function canvas(width, height, title) {
  const svg = element("svg", {width, height, role: "img"});
  if (title) { svg.setAttribute("aria-label", title); element("text", {x: 4, y: 14, class: "title"}, svg, title); }
  return svg;
}
function blend(stops, t) {
  const x = Math.min(Math.max(t, 0), 1) * (stops.length - 1), i = Math.min(Math.floor(x), stops.length - 2);
  const part = (colour, k) => parseInt(colour.slice(1 + 2 * k, 3 + 2 * k), 16);
  const mix = k => Math.round(part(stops[i], k) + (x - i) * (part(stops[i + 1], k) - part(stops[i], k)));
  return `rgb(${mix(0)},${mix(1)},${mix(2)})`;
}
function finite(values) { return values.filter(v => v !== null && Number.isFinite(v)); }
function ticks(low, high, count = 4) {
  const step = 10 ** Math.floor(Math.log10((high - low) / count || 1));
  const unit = [1, 2, 5, 10].map(k => k * step).find(k => (high - low) / k <= count + 1);
  const found = [];
  for (let v = Math.ceil(low / unit) * unit; v <= high + 1e-9 * unit; v += unit) found.push(Number(v.toPrecision(6)));
  return found;
}
function headName(a, h) { return `${data.layers[a]}, head ${data.heads[h]}`; }
function token(j) { return data.tokens.length > j ? `${j} "${data.tokens[j]}"` : String(j); }

function colourBar(svg, x, y, height, colour, low, high) {
  const step = height / 40;
  for (let i = 0; i < 40; i++)
    element("rect", {x, y: y + height - (i + 1) * step, width: 10, height: step + 0.5, fill: colour(i / 39)}, svg);
  element("text", {x: x + 14, y: y + 9}, svg, number(high));
  element("text", {x: x + 14, y: y + height}, svg, number(low));
}

function drawGrid() {
  const name = byId("quantity").value, grid = data.mean[name], low = data.low[name], high = data.high[name];
  const quantity = data.quantities.find(q => q.name === name);
  byId("formula").textContent = `${quantity.formula}  [${quantity.unit}]`;
  const heads = grid[0].length, size = Math.max(14, Math.min(34, 560 / heads)), left = 34, top = 24;
  const width = Math.max(320, left + heads * size + 90);
  const svg = canvas(width, top + grid.length * size + 36, `${name} by layer and head`);
  const all = finite(grid.flat()), least = Math.min(...all), most = Math.max(...all);
  grid.forEach((row, a) => {
    element("text", {x: left - 6, y: top + (a + 0.65) * size, "text-anchor": "end"}, svg, data.numbers[a]);
    row.forEach((value, h) => {
      if (value === null) return;
      const interval = low[a][h] === null ? "" : `\n95% interval ${number(low[a][h])} to ${number(high[a][h])}`;
      const kind = data.kinds[a][h] ? `\nsink: ${data.kinds[a][h]}` : "";
      const stroke = a === chosen.layer && h === chosen.head ? "#D55E00" : "none";
      const fill = blend(CIVIDIS, (value - least) / (most - least || 1));
      const text = `${headName(a, h)}\n${name}: ${number(value)}${interval}${kind}`;
      const cell = element("rect", {x: left + h * size + 1, y: top + a * size + 1, width: size - 2, height: size - 2,
        fill, stroke, "stroke-width": 3, class: "cell", "data-tip": text}, svg);
      cell.addEventListener("click", () => { chosen = {layer: a, head: h}; draw(); });
    });
  });
  for (let h = 0; h < heads; h += Math.max(1, Math.ceil(24 / size)))
    element("text", {x: left + (h + 0.5) * size, y: top + grid.length * size + 14, "text-anchor": "middle"}, svg,
      data.heads[h]);
  const middle = `translate(10,${top + grid.length * size / 2}) rotate(-90)`;
  element("text", {transform: middle, "text-anchor": "middle"}, svg, "layer");
  element("text", {x: left + heads * size / 2, y: top + grid.length * size + 30, "text-anchor": "middle"}, svg, "head");
  colourBar(svg, left + heads * size + 14, top, grid.length * size, t => blend(CIVIDIS, t), least, most);
  byId("grid").replaceChildren(svg);
}

function drawHead() {
  const {layer, head} = chosen, table = document.createElement("table");
  const caption = document.createElement("caption");
  const kind = data.kinds[layer][head];
  caption.textContent = headName(layer, head) + (kind ? `, sink: ${kind}` : "");
  table.append(caption);
  const line = (cells, tag) => {
    const row = document.createElement("tr");
    for (const text of cells) { const cell = document.createElement(tag); cell.textContent = text; row.append(cell); }
    table.append(row);
  };
  line(["quantity", "mean", "95% interval"], "th");
  for (const {name} of data.quantities) {
    const value = data.mean[name][layer][head];
    if (value === null) continue;
    const low = data.low[name][layer][head];
    line([name, number(value), low === null ? "" : `${number(low)} to ${number(data.high[name][layer][head])}`], "td");
  }
  byId("head").replaceChildren(table);
}

function drawTokens() {
  const {layer, head} = chosen, means = data.shares.map(heads => heads[0].map((_, j) => {
    const column = finite(heads.map(row => row[j]));
    return column.reduce((a, b) => a + b, 0) / column.length;
  }));
  const rows = means.map((values, a) => (
    {label: `layer ${data.numbers[a]}`, values, tip: `${data.layers[a]}, mean over heads`}));
  rows.push({label: "chosen", values: data.shares[layer][head], tip: headName(layer, head)});
  const count = Math.max(...rows.map(r => r.values.length)), size = 16, left = 52;
  const deepest = Math.max(1, ...data.tokens.map(t => t.length)), top = Math.min(110, 12 + 6.5 * deepest);
  const svg = canvas(left + count * size + 60, top + (rows.length + 0.5) * size + 20);
  for (let j = 0; j < count; j++) {
    const transform = `translate(${left + (j + 0.7) * size},${top - 5}) rotate(-90)`;
    element("text", {transform}, svg, data.tokens[j] ?? j);
  }
  rows.forEach((row, a) => {
    const y = top + a * size + (a === rows.length - 1 ? 8 : 0);
    element("text", {x: left - 6, y: y + 12, "text-anchor": "end"}, svg, row.label);
    row.values.forEach((value, j) => value !== null && element("rect", {x: left + j * size, y, width: size - 1,
      height: size - 1, fill: blend(["#eef2f7", "#0072B2"], Math.sqrt(value)), class: "token",
      "data-tip": `${row.tip}\ntoken ${token(j)}: mean weight ${number(value)}`}, svg));
  });
  byId("tokens").replaceChildren(svg);
}

function decades(low, high) {
  const found = [];
  for (let k = Math.floor(low); k <= high; k++)
    for (const m of [1, 2, 5]) if (k + Math.log10(m) >= low && k + Math.log10(m) <= high) found.push(k + Math.log10(m));
  return found;
}
function legend(svg, names, y = 26) {
  let x = 56;
  for (const [name, fill] of names) {
    element("rect", {x, y: y - 8, width: 10, height: 8, fill}, svg);
    element("text", {x: x + 14, y}, svg, name);
    x += 34 + 6.2 * name.length;
  }
}
function frame(width, height, title, xs, ys, labels) {
  const box = {left: 52, right: 12, top: 36, bottom: 38}, svg = canvas(width, height, title);
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)], [least, most] = [Math.min(...ys), Math.max(...ys)];
  const room = 0.04 * (most - least || 1), y0 = least === 0 ? 0 : least - room, y1 = most === 0 ? 0 : most + room;
  const x = v => box.left + (v - x0) / (x1 - x0 || 1) * (width - box.left - box.right);
  const y = v => height - box.bottom - (v - y0) / (y1 - y0 || 1) * (height - box.top - box.bottom);
  for (const v of labels.log ? decades(y0, y1) : ticks(y0, y1)) {
    const stroke = v === 0 && !labels.log ? "#999" : "#e5e5e5";
    element("line", {x1: box.left, x2: width - box.right, y1: y(v), y2: y(v), stroke}, svg);
    element("text", {x: box.left - 5, y: y(v) + 4, "text-anchor": "end"}, svg, labels.log ? number(10 ** v) : v);
  }
  for (const v of labels.x ? ticks(x0, x1, 6).filter(Number.isInteger) : [])
    element("text", {x: x(v), y: height - box.bottom + 14, "text-anchor": "middle"}, svg, labels.numbers?.[v] ?? v);
  element("text", {x: (box.left + width - box.right) / 2, y: height - 6, "text-anchor": "middle"}, svg, labels.x);
  element("text", {transform: `translate(11,${height / 2}) rotate(-90)`, "text-anchor": "middle"}, svg, labels.y);
  return {svg, x, y};
}
function line(plot, points, colour, tip, radius = 2.5) {
  const path = points.map(([u, v], i) => `${i ? "L" : "M"}${plot.x(u)} ${plot.y(v)}`).join("");
  element("path", {d: path, fill: "none", stroke: colour, "stroke-width": 1.5}, plot.svg);
  points.forEach(([u, v], i) => {
    element("circle", {cx: plot.x(u), cy: plot.y(v), r: radius, fill: colour}, plot.svg);
    element("circle", {cx: plot.x(u), cy: plot.y(v), r: 7, fill: "transparent", "data-tip": tip(u, v, i)}, plot.svg);
  });
}

function heatMap(title, rows, colour, tip, bar) {
  const n = rows.length, size = Math.max(7, Math.floor(300 / n)), left = 40, top = 26;
  const svg = canvas(left + n * size + 76, top + n * size + 36, title);
  rows.forEach((row, i) => row.forEach((v, j) => v !== null && element("rect", {x: left + j * size, y: top + i * size,
    width: size, height: size, fill: colour(v), "data-tip": tip(i, j, v)}, svg)));
  for (let i = 0; i < n; i += Math.max(1, Math.ceil(n / 8))) {
    element("text", {x: left - 4, y: top + (i + 0.8) * size, "text-anchor": "end"}, svg, i);
    element("text", {x: left + (i + 0.5) * size, y: top + n * size + 13, "text-anchor": "middle"}, svg, i);
  }
  element("text", {x: left + n * size / 2, y: top + n * size + 29, "text-anchor": "middle"}, svg, "key position j");
  element("text", {transform: `translate(11,${top + n * size / 2}) rotate(-90)`, "text-anchor": "middle"}, svg,
    "query position i");
  colourBar(svg, left + n * size + 10, top, n * size, bar.colour, bar.low, bar.high);
  return svg;
}

function drawPrior() {
  const prior = data.priors[chosen.layer], name = headName(chosen.layer, chosen.head);
  byId("prior-title").textContent = `The implicit prior of ${name}`;
  if (prior === null) { byId("prior").textContent = "No prior was fitted to this layer; see below."; return; }
  const n = prior.size, lag = prior.lag[chosen.head], key = prior.key[chosen.head];
  const keys = key.map((v, j) => [j, v]).filter(p => p[1] !== null);
  const lags = lag.map((v, i) => [i - n + 1, v]).filter(p => p[1] !== null && (!prior.causal || p[0] >= 0));
  const line1 = frame(430, 260, "(a) key-only part", keys.map(p => p[0]), [0, ...keys.map(p => p[1])],
    {x: "key position j (tokens)", y: "u(j) (nats)"});
  line(line1, keys, COLOURS[0], (j, v) => `key ${token(j)}\nu(j) = ${number(v)} nats`);
  const line2 = frame(430, 260, "(b) relative part", lags.map(p => p[0]), [0, ...lags.map(p => p[1])],
    {x: "lag t = i - j (tokens)", y: "κ(t) (nats)"});
  line(line2, lags, COLOURS[0], (t, v) => `lag ${t}\nκ(t) = ${number(v)} nats`);
  const total = Array.from({length: n}, (_, i) => Array.from({length: n}, (_, j) => {
    const a = lag[i - j + n - 1], v = key[j];
    return a === null || v === null || (prior.causal && j > i) ? null : a + v;
  }));
  const centred = total.map(row => {
    const seen = finite(row), mean = seen.reduce((a, b) => a + b, 0) / seen.length;
    return row.map(v => v === null ? null : v - mean);
  });
  const induced = total.map(row => {
    const peak = Math.max(...finite(row)), sum = finite(row).reduce((a, v) => a + Math.exp(v - peak), 0);
    return row.map(v => v === null ? null : Math.exp(v - peak) / sum);
  });
  const extreme = Math.max(...finite(centred.flat()).map(Math.abs), 1e-9);
  const red = v => blend(DIVERGING, 0.5 + v / extreme / 2);
  const dark = p => blend(CIVIDIS, 1 + Math.log10(Math.max(p, 1e-3)) / 3);
  const pair = (i, j) => `query ${i}, key ${token(j)}\n`;
  byId("prior").replaceChildren(line1.svg, line2.svg,
    heatMap("(c) row-centred log-prior (nats)", centred, red, (i, j, v) => `${pair(i, j)}${number(v)} nats`,
      {colour: t => blend(DIVERGING, t), low: -extreme, high: extreme}),
    heatMap("(d) induced prior", induced, dark, (i, j, v) => `${pair(i, j)}probability ${number(v)}`,
      {colour: t => blend(CIVIDIS, t), low: 1e-3, high: 1}));
}

function drawMargins() {
  const content = data.mean["content margin"], prior = data.mean["prior margin"], bars = [];
  content.forEach((row, a) => row.forEach((c, h) => c !== null && bars.push({a, h, c, p: prior[a][h]})));
  if (!bars.length) { byId("margins").textContent = "No row has a margin."; return; }
  const step = Math.max(6, Math.min(14, 1000 / bars.length)), width = 70 + bars.length * step;
  const sums = bars.flatMap(b => [Math.max(b.c, 0) + Math.max(b.p, 0), Math.min(b.c, 0) + Math.min(b.p, 0)]);
  const plot = frame(width, 270, "Mean margin of the first token", [0, bars.length], [0, ...sums], {x: "", y: "nats"});
  const thick = Math.max(1, plot.x(1) - plot.x(0) - 1.5);
  bars.forEach((b, i) => {
    let above = 0, below = 0;
    const tip = `${headName(b.a, b.h)}\nmargin ${number(b.c + b.p)} nats\n` +
      `content ${number(b.c)}, prior ${number(b.p)}`;
    for (const [value, colour] of [[b.c, COLOURS[0]], [b.p, COLOURS[4]]]) {
      const base = value >= 0 ? above : below;
      const top = plot.y(Math.max(base, base + value)), bottom = plot.y(Math.min(base, base + value));
      element("rect", {x: plot.x(i) + 1, y: top, width: thick, height: bottom - top, fill: colour, class: "margin",
        "data-tip": tip}, plot.svg);
      if (value >= 0) above += value; else below += value;
    }
    if (i === 0 || bars[i - 1].a !== b.a) {
      element("line", {x1: plot.x(i), x2: plot.x(i), y1: 36, y2: 232, stroke: "#ccc"}, plot.svg);
      element("text", {x: plot.x(i) + 3, y: 246}, plot.svg, `layer ${data.numbers[b.a]}`);
    }
  });
  legend(plot.svg, [["content", COLOURS[0]], ["prior", COLOURS[4]]], 28);
  byId("margins").replaceChildren(plot.svg);
}

function drawLayers() {
  byId("layers").replaceChildren(...data.curves.map(panel => {
    const value = v => panel.log ? Math.log10(Math.max(v, 1e-9)) : v, entries = Object.entries(panel.curves);
    const ys = entries.flatMap(([, c]) => finite([...c.mean, ...(c.low ?? []), ...(c.high ?? [])])).map(value);
    const plot = frame(520, 300, panel.title, panel.names.map((_, a) => a), panel.log ? ys : [0, ...ys],
      {x: panel.log ? "block" : "layer", y: "", log: panel.log, numbers: panel.numbers});
    entries.forEach(([name, c], k) => {
      const colour = COLOURS[k], has = a => c.low && c.low[a] !== null && c.mean[a] !== null;
      c.mean.forEach((_, a) => has(a) && element("line", {x1: plot.x(a), x2: plot.x(a), y1: plot.y(value(c.low[a])),
        y2: plot.y(value(c.high[a])), stroke: colour, "stroke-width": 4, opacity: 0.3}, plot.svg));
      const points = c.mean.map((v, a) => [a, v]).filter(p => p[1] !== null);
      line(plot, points.map(([a, v]) => [a, value(v)]), colour, (a, _, i) => `${panel.names[a]}\n${name}: ` +
        number(points[i][1]) + (has(a) ? `\n95% interval ${number(c.low[a])} to ${number(c.high[a])}` : ""));
    });
    legend(plot.svg, entries.map(([name], k) => [name, COLOURS[k]]), 30);
    return plot.svg;
  }));
}

const tip = byId("tip");
document.addEventListener("mousemove", event => {
  const text = event.target instanceof Element ? event.target.getAttribute("data-tip") : null;
  tip.style.display = text ? "block" : "none";
  if (!text) return;
  tip.textContent = text;
  tip.style.left = `${Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${Math.min(event.clientY + 14, window.innerHeight - tip.offsetHeight - 8)}px`;
});
function draw() { drawGrid(); drawHead(); drawTokens(); drawPrior(); }
for (const {name} of data.quantities) {
  if (!finite(data.mean[name].flat()).length) continue;
  const option = document.createElement("option");
  option.textContent = option.value = name;
  byId("quantity").append(option);
}
byId("quantity").addEventListener("change", drawGrid);
draw(); drawMargins(); drawLayers();
