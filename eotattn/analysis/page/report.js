"use strict";
// The page: what is chosen, and what is drawn of it with charts.js, which stands before it.
const THUMBS = 24, THUMB_TOKENS = 48;
let data, chosen, order = [], shownThumbs = THUMBS, query = 1;

async function unpack() {
  const letters = atob(byId("data").textContent), bytes = new Uint8Array(letters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = letters.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}
function headName(a, h) { return `Layer ${data.numbers[a]}, head ${data.heads[h]}`; }
function textName(text) { return `${text + 1}${data.named[text] ? `: ${data.named[text]}…` : ""}`; }
function tokensOf(text) { return data.texts[text] ?? []; }
function token(j, text = 0) { const name = tokensOf(text)[j]; return name ? `${j} "${name}"` : String(j); }
function chosenText() { return Number(byId("text").value || 0); }
function exists(a, h) { return data.kind[a] !== undefined && data.mean.entropy[a][h] !== null; }
function passes(a, h) { const kind = byId("kind").value; return !kind || data.kind[a][h].includes(kind); }

function choose(layer, head) { chosen = {layer, head}; draw(); }

function drawGrid() {
  const name = byId("quantity").value, grid = data.mean[name], low = data.low[name], high = data.high[name];
  const quantity = data.quantities.find(q => q.name === name);
  byId("formula").textContent = `${quantity.formula}  [${quantity.unit}]`;
  const heads = grid[0].length, size = Math.max(12, Math.min(30, 620 / heads, 620 / grid.length)), left = 40, top = 24;
  const across = heads * size, down = Math.max(grid.length * size, 60), width = Math.max(240, left + across + 86);
  const svg = canvas(width, top + down + 36, `${name} by layer and head`);
  const all = finite(grid.flat()), [least, most] = limits(all);
  grid.forEach((row, a) => {
    if (a % Math.ceil(14 / size) === 0)
      element("text", {x: left - 6, y: top + (a + 0.5) * size + 4, "text-anchor": "end"}, svg, data.numbers[a]);
    row.forEach((value, h) => {
      if (!exists(a, h)) return;
      const failed = value === null && name === "explained by position" && data.fails[a][h];
      const interval = low[a][h] === null ? "" : `\n95% interval ${number(low[a][h])} to ${number(high[a][h])}`;
      const kinds = data.kind[a][h].length ? `\n${data.kind[a][h].join(", ")}` : "";
      const stands = failed ? "no prior: not surely better than uniform on other texts" : `${name}: ${number(value)}`;
      const box = {x: left + h * size + 1, y: top + a * size + 1, width: size - 2, height: size - 2};
      const look = value === null ? {class: "cell field"} :
        {class: "cell", fill: blend(CIVIDIS, (value - least) / (most - least || 1))};
      const cell = element("rect", {...box, ...look, opacity: passes(a, h) ? 1 : 0.12,
        "data-tip": `${headName(a, h)} (${data.layers[a]})\n${stands}${interval}${kinds}`}, svg);
      if (failed)
        element("path", {d: `M${box.x} ${box.y + size - 2}L${box.x + size - 2} ${box.y}`, class: "hatch"}, svg);
      cell.addEventListener("click", () => choose(a, h));
    });
  });
  element("rect", {x: left + chosen.head * size, y: top + chosen.layer * size, width: size, height: size, fill: "none",
    class: "chosen", "stroke-width": 3}, svg);
  for (let h = 0; h < heads; h += Math.max(1, Math.ceil(20 / size)))
    element("text", {x: left + (h + 0.5) * size, y: top + grid.length * size + 14, "text-anchor": "middle"}, svg,
      data.heads[h]);
  const middle = `translate(12,${top + grid.length * size / 2}) rotate(-90)`;
  element("text", {transform: middle, "text-anchor": "middle"}, svg, "layer");
  element("text", {x: left + across / 2, y: top + grid.length * size + 30, "text-anchor": "middle"}, svg, "head");
  if (all.length) colourBar(svg, left + across + 14, top, down, t => blend(CIVIDIS, t),
    (all.some(v => v < least) ? "≤ " : "") + number(least), (all.some(v => v > most) ? "≥ " : "") + number(most));
  byId("grid").replaceChildren(svg);
}

// Of one head and text: a list [key, weight in percent] for every query.
function pairs(a, h, text = chosenText()) {
  const found = data.pairs[text]?.[a]?.[h];
  if (!found) return [];
  const [counts, keys, weights] = found;
  let at = 0;
  return counts.map(count => Array.from({length: count}, () => [keys[at], weights[at++]]));
}
function drawThumbs() {
  const name = byId("quantity").value, way = byId("order").value;
  order = [];
  data.layers.forEach((_, a) => data.heads.forEach((_, h) => exists(a, h) && passes(a, h) && order.push([a, h])));
  const value = ([a, h]) => data.mean[name][a][h] ?? -Infinity;
  if (way !== "layer") order.sort((x, y) => (way === "down" ? 1 : -1) * (value(y) - value(x)));
  byId("thumbs").replaceChildren(...order.slice(0, shownThumbs).map(([a, h]) => {
    const here = a === chosen.layer && h === chosen.head, box = part("button", {type: "button",
      class: here ? "thumb chosen" : "thumb", "data-tip": data.kind[a][h].join(", ") || "no kind of its own"});
    const rows = pairs(a, h);
    box.append(picture(rows, Math.min(THUMB_TOKENS, rows.length || 1)),
      part("span", {}, `${data.numbers[a]}.${data.heads[h]}: ${number(data.mean[name][a][h])}`));
    box.addEventListener("click", () => choose(a, h));
    return box;
  }));
  byId("more").style.display = order.length > shownThumbs ? "" : "none";
}

function drawHead() {
  const {layer, head} = chosen, kinds = data.kind[layer][head].join(", "), sink = data.sinks[layer][head];
  byId("head-title").textContent = headName(layer, head) + (kinds ? `: ${kinds}` : "");
  const rows = [["quantity", "mean", "95% interval"]];
  for (const {name} of data.quantities) {
    const value = data.mean[name][layer][head], low = data.low[name][layer][head];
    if (value === null) continue;
    const interval = low === null ? "" : `${number(low)} to ${number(data.high[name][layer][head])}`;
    rows.push([name, number(value), interval]);
  }
  byId("head").replaceChildren(table(`${data.layers[layer]}${sink ? `; sink by values: ${sink}` : ""}`, rows));
  const strongest = (data.strongest[layer][head] ?? []).map(([at, percent, name], text) =>
    [textName(text), `${at}`, name, `${percent}%`]);
  const found = part("div", {class: "scroll"});
  found.append(table("The strongest key of every text", [["text", "position", "token", "mean weight"], ...strongest]));
  byId("strongest").replaceChildren(found);
}

function drawReading() {
  const text = chosenText(), rows = pairs(chosen.layer, chosen.head), names = tokensOf(text);
  if (rows.length) query = Math.max(0, Math.min(query, rows.length - 1));
  const weight = new Map(rows[query] ?? []);
  byId("reading").replaceChildren(...names.slice(0, Math.max(rows.length, ...weight.keys(), 0)).map((name, j) => {
    const percent = weight.get(j), isKey = percent !== undefined;
    const look = isKey ? {style: `background: rgba(213,94,0,${percent / 125 + 0.12})`} : {};
    const key = part("span", {class: j === query ? "key query" : "key", ...look,
      "data-tip": `token ${token(j, text)}${isKey ? `\nweight ${percent}%` : ""}`}, readable(name || j));
    key.addEventListener("click", () => { if (j < rows.length) { query = j; drawReading(); } });
    return key;
  }));
  const said = [...weight].map(([j, percent]) => `${percent}% ${token(j, text)}`);
  const keys = said.join(", ") || "many keys, none above the least weight shown";
  byId("said").textContent =
    rows.length ? `Query ${token(query, text)} attends to ${keys}.` : "No pairs of tokens were kept.";
  drawMap(rows, text);
}
// Lines may break between tokens.
function readable(name) { return `${name}`.replace(/^##/, "") + "\u200b"; }
function drawMap(rows, text) {
  const size = Math.max(rows.length, 1), scale = Math.max(2, Math.min(12, Math.floor(420 / size)));
  const svg = picture(rows, size), box = part("div", {class: "scroll"});
  for (const side of ["width", "height"]) svg.setAttribute(side, size * scale);
  element("rect", {x: 0, y: query, width: size, height: 1, fill: "#D55E00", opacity: 0.25}, svg);
  const at = event => Math.floor(event.offsetY / scale);
  svg.addEventListener("mousemove", event => {
    const i = at(event), j = Math.floor(event.offsetX / scale), found = (rows[i] ?? []).find(([key]) => key === j);
    const stands = found ? `weight ${found[1]}%` : "not among those shown";
    svg.setAttribute("data-tip", `query ${token(i, text)}\nkey ${token(j, text)}\n${stands}`);
  });
  svg.addEventListener("click", event => { query = at(event); drawReading(); });
  box.append(svg);
  byId("map").replaceChildren(part("p", {class: "note"}, "queries down, keys across"), box);
}

function drawTokens() {
  const text = chosenText(), names = tokensOf(text);
  const rows = data.shares.map((texts, a) => ({label: data.numbers[a], values: texts[text] ?? []}));
  const count = Math.max(...rows.map(r => r.values.length)), size = 15, left = 52;
  const deepest = Math.max(1, ...names.slice(0, count).map(t => t.length)), top = Math.min(110, 12 + 6.5 * deepest);
  const svg = canvas(left + count * size + 60, top + rows.length * size + 20);
  for (let j = 0; j < count; j++) {
    const transform = `translate(${left + (j + 0.7) * size},${top - 5}) rotate(-90)`;
    element("text", {transform}, svg, names[j] || j);
  }
  rows.forEach(({label, values}, a) => {
    element("text", {x: left - 6, y: top + a * size + 11, "text-anchor": "end"}, svg, `layer ${label}`);
    values.forEach((value, j) => value !== null && element("rect", {x: left + j * size, y: top + a * size,
      width: size - 1, height: size - 1, class: "token ink", opacity: 0.06 + 0.94 * Math.sqrt(value),
      "data-tip": `layer ${label}, mean over heads\ntoken ${token(j, text)}: mean weight ${number(value)}`}, svg));
  });
  byId("tokens").replaceChildren(svg);
}

function drawPrior() {
  const priors = data.priors[chosen.layer], name = headName(chosen.layer, chosen.head), place = byId("prior");
  byId("prior-title").textContent = `The implicit prior of ${name}` + (priors?.inSample ? " (in sample)" : "");
  const prior = priors?.heads[chosen.head];
  if (!prior) {
    const why = priors ? "The fitted prior is not surely better than uniform attention on texts that it was not " +
      "fitted to, so it is not drawn; more or longer texts may carry it." : "No prior was fitted here; see below.";
    place.replaceChildren(part("p", {}, why));
    return;
  }
  const n = priors.size, {lag, key} = prior;
  const keys = key.map((v, j) => [j, v]).filter(p => p[1] !== null);
  const lags = lag.map((v, i) => [i - n + 1, v]).filter(p => p[1] !== null && (!priors.causal || p[0] >= 0));
  const line1 = frame(430, 260, "(a) key-only part", keys.map(p => p[0]), [0, ...keys.map(p => p[1])],
    {x: "key position j (tokens)", y: "u(j) (nats)"});
  line(line1, keys, COLOURS[0], (j, v) => `key ${token(j)}\nu(j) = ${number(v)} nats`);
  const line2 = frame(430, 260, "(b) relative part", lags.map(p => p[0]), [0, ...lags.map(p => p[1])],
    {x: "lag t = i - j (tokens)", y: "κ(t) (nats)"});
  line(line2, lags, COLOURS[0], (t, v) => `lag ${t}\nκ(t) = ${number(v)} nats`);
  const total = Array.from({length: n}, (_, i) => Array.from({length: n}, (_, j) => {
    const a = lag[i - j + n - 1], v = key[j];
    return a === null || v === null || (priors.causal && j > i) ? null : a + v;
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
  place.replaceChildren(line1.svg, line2.svg,
    heatMap("(c) row-centred log-prior (nats)", centred, red, (i, j, v) => `${pair(i, j)}${number(v)} nats`,
      {colour: t => blend(DIVERGING, t), low: -extreme, high: extreme}),
    heatMap("(d) induced prior", induced, dark, (i, j, v) => `${pair(i, j)}probability ${number(v)}`,
      {colour: t => blend(CIVIDIS, t), low: 1e-3, high: 1}));
}

function drawMargins() {
  const content = data.mean["content margin"], prior = data.mean["prior margin"], bars = [];
  content.forEach((row, a) => row.forEach((c, h) => c !== null && bars.push({a, h, c, p: prior[a][h]})));
  if (!bars.length) { byId("margins").textContent = "No row has a margin."; return; }
  const step = Math.max(4, Math.min(14, 1000 / bars.length)), width = 70 + bars.length * step;
  const sums = bars.flatMap(b => [Math.max(b.c, 0) + Math.max(b.p, 0), Math.min(b.c, 0) + Math.min(b.p, 0)]);
  const [low, high] = limits(sums), cut = v => Math.min(Math.max(v, low), high);
  const title = "Mean margin of the first token" + (sums.some(v => v !== cut(v)) ? "; bars that leave it are cut" : "");
  const plot = frame(width, 270, title, [0, bars.length], [0, low, high], {x: "", y: "nats", keepsWidth: true});
  const thick = Math.max(1, plot.x(1) - plot.x(0) - 1.5);
  bars.forEach((b, i) => {
    let above = 0, below = 0;
    const tip = `${headName(b.a, b.h)}\nmargin ${number(b.c + b.p)} nats\n` +
      `content ${number(b.c)}, prior ${number(b.p)}`;
    for (const [value, colour] of [[b.c, COLOURS[0]], [b.p, COLOURS[4]]]) {
      const base = value >= 0 ? above : below;
      const top = plot.y(cut(Math.max(base, base + value))), bottom = plot.y(cut(Math.min(base, base + value)));
      element("rect", {x: plot.x(i) + 1, y: top, width: thick, height: bottom - top, fill: colour, class: "margin",
        "data-tip": tip}, plot.svg);
      if (value >= 0) above += value; else below += value;
    }
    if (i === 0 || bars[i - 1].a !== b.a) {
      element("line", {x1: plot.x(i), x2: plot.x(i), y1: 36, y2: 232, class: "rule"}, plot.svg);
      element("text", {x: plot.x(i) + 3, y: 246}, plot.svg, data.numbers[b.a]);
    }
  });
  element("text", {x: 4, y: 262}, plot.svg, "layer");
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
function showTip(text, x, y) {
  tip.style.display = text ? "block" : "none";
  if (!text) return;
  tip.textContent = text;
  tip.style.left = `${Math.max(4, Math.min(x + 14, window.innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.max(4, Math.min(y + 14, window.innerHeight - tip.offsetHeight - 8))}px`;
}
document.addEventListener("mousemove", event => {
  const near = event.target instanceof Element ? event.target.closest("[data-tip]") : null;
  showTip(near ? near.getAttribute("data-tip") : null, event.clientX, event.clientY);
});
byId("grid").addEventListener("keydown", event => {
  const move = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
  if (!move) return;
  event.preventDefault();
  const [layer, head] = [chosen.layer + move[0], chosen.head + move[1]];
  if (layer >= 0 && layer < data.layers.length && head >= 0 && head < data.heads.length && exists(layer, head))
    choose(layer, head);
});
byId("reading").addEventListener("keydown", event => {
  const move = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10}[event.key];
  if (!move) return;
  event.preventDefault();
  query += move;
  drawReading();
});

function drawTop() { drawGrid(); drawThumbs(); drawHead(); drawReading(); }
function draw() { drawTop(); drawPrior(); }
function offer(name, entries, listener) {
  byId(name).append(...entries.map(([value, text]) => part("option", {value}, text)));
  byId(name).addEventListener("change", listener);
}
function start(found) {
  data = found;
  const first = data.mean[data.quantities[0].name].flatMap((row, a) => row.map((v, h) => [v ?? -Infinity, a, h]));
  const [, layer, head] = first.reduce((x, y) => (y[0] > x[0] ? y : x));
  chosen = {layer, head};
  const named = data.quantities.filter(({name}) => finite(data.mean[name].flat()).length);
  offer("quantity", named.map(({name}) => [name, name]), () => { drawGrid(); drawThumbs(); });
  const counts = Object.keys(data.kinds).map(kind => [kind, data.kind.flat().filter(k => k.includes(kind)).length]);
  const kinds = counts.filter(([, n]) => n).map(([kind, n]) => [kind, `${kind} (${n})`]);
  offer("kind", [["", "all"], ...kinds], () => { shownThumbs = THUMBS; drawGrid(); drawThumbs(); });
  offer("order", [], drawThumbs);
  const texts = data.texts.map((_, text) => [text, textName(text)]);
  offer("text", texts, () => { drawThumbs(); drawReading(); drawTokens(); });
  byId("more").addEventListener("click", () => { shownThumbs += 4 * THUMBS; drawThumbs(); });
  drawTop();
  for (const below of [drawPrior, drawTokens, drawMargins, drawLayers]) setTimeout(below);  // what is seen comes first
}
unpack().then(start).catch(error => {
  byId("failure").textContent =
    `The pictures could not be drawn (${error.message}). They need a browser of 2023 or newer.`;
  throw error;
});
