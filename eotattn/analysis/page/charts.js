"use strict";
// Drawing: elements, scales, frames and pictures; knows nothing of the page.
const byId = name => document.getElementById(name);
const SVG = "http://www.w3.org/2000/svg";
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"];
const CIVIDIS = ["#00224e", "#35456c", "#666970", "#948e77", "#c8b866", "#fee838"];
const DIVERGING = ["#2166ac", "#92c5de", "#ffffff", "#f4a582", "#b2182b"];

function number(v) { return v === null || v === undefined ? "none" : String(Number(v.toPrecision(4))); }
function element(tag, attributes, parent, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.appendChild(node);
  return node;
}
function part(tag, attributes, text) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}
function canvas(width, height, title) {
  const svg = element("svg", {width, height, viewBox: `0 0 ${width} ${height}`, role: "img"});
  if (title) { svg.setAttribute("aria-label", title); element("text", {x: 4, y: 14, class: "title"}, svg, title); }
  return svg;
}
function table(caption, rows) {
  const node = part("table", {});
  node.append(part("caption", {}, caption));
  rows.forEach((cells, i) => {
    const row = part("tr", {});
    for (const text of cells) row.append(part(i ? "td" : "th", {}, text));
    node.append(row);
  });
  return node;
}
function blend(stops, t) {
  const x = Math.min(Math.max(t, 0), 1) * (stops.length - 1), i = Math.min(Math.floor(x), stops.length - 2);
  const channel = (colour, k) => parseInt(colour.slice(1 + 2 * k, 3 + 2 * k), 16);
  const mix = k => Math.round(channel(stops[i], k) + (x - i) * (channel(stops[i + 1], k) - channel(stops[i], k)));
  return `rgb(${mix(0)},${mix(1)},${mix(2)})`;
}
function finite(values) { return values.filter(v => v !== null && Number.isFinite(v)); }
function quantile(values, q) { return [...values].sort((a, b) => a - b)[Math.round(q * (values.length - 1))]; }
// The ends of a scale that a few far values do not set.
function limits(values) {
  const [least, most] = values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
  const low = quantile(values, 0.02), high = quantile(values, 0.98), room = 1.5 * (high - low);
  return room > 0 ? [Math.max(least, low - room), Math.min(most, high + room)] : [least, most];
}
function ticks(low, high, count = 4) {
  const step = 10 ** Math.floor(Math.log10((high - low) / count || 1));
  const unit = [1, 2, 5, 10].map(k => k * step).find(k => (high - low) / k <= count + 1);
  const found = [];
  for (let v = Math.ceil(low / unit) * unit; v <= high + 1e-9 * unit; v += unit) found.push(Number(v.toPrecision(6)));
  return found;
}
function colourBar(svg, x, y, height, colour, low, high) {
  const step = height / 40;
  for (let i = 0; i < 40; i++)
    element("rect", {x, y: y + height - (i + 1) * step, width: 10, height: step + 0.5, fill: colour(i / 39)}, svg);
  element("text", {x: x + 14, y: y + 9}, svg, high);
  element("text", {x: x + 14, y: y + height}, svg, low);
}

// A square picture of pairs: one path for every shade.
function picture(rows, size) {
  const svg = element("svg", {viewBox: `0 0 ${size} ${size}`, "shape-rendering": "crispEdges", role: "img"});
  element("rect", {width: size, height: size, class: "field"}, svg);
  const shades = Array.from({length: 5}, () => []);
  rows.slice(0, size).forEach((row, i) => row.forEach(([j, percent]) => j < size &&
    shades[Math.min(4, Math.floor(percent / 20))].push(`M${j} ${i}h1v1h-1z`)));
  shades.forEach((path, k) => path.length &&
    element("path", {d: path.join(""), class: "ink", opacity: 0.3 + 0.175 * k}, svg));
  return svg;
}

function decades(low, high) {
  const found = [];
  for (let k = Math.floor(low); k <= high; k++)
    for (const m of [1, 2, 5]) if (k + Math.log10(m) >= low && k + Math.log10(m) <= high) found.push(k + Math.log10(m));
  return found.length > 6 ? found.filter(v => Math.abs(v - Math.round(v)) < 1e-9) : found;
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
  const box = {left: 56, right: 12, top: 36, bottom: 38}, svg = canvas(width, height, title);
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)], [least, most] = [Math.min(...ys), Math.max(...ys)];
  const room = 0.04 * (most - least || 1), y0 = least === 0 ? 0 : least - room, y1 = most === 0 ? 0 : most + room;
  const x = v => box.left + (v - x0) / (x1 - x0 || 1) * (width - box.left - box.right);
  const y = v => height - box.bottom - (v - y0) / (y1 - y0 || 1) * (height - box.top - box.bottom);
  for (const v of labels.log ? decades(y0, y1) : ticks(y0, y1)) {
    const kind = v === 0 && !labels.log ? "zero" : "rule";
    element("line", {x1: box.left, x2: width - box.right, y1: y(v), y2: y(v), class: kind}, svg);
    element("text", {x: box.left - 5, y: y(v) + 4, "text-anchor": "end"}, svg, labels.log ? number(10 ** v) : v);
  }
  for (const v of labels.x ? ticks(x0, x1, 6).filter(Number.isInteger) : [])
    element("text", {x: x(v), y: height - box.bottom + 14, "text-anchor": "middle"}, svg, labels.numbers?.[v] ?? v);
  element("text", {x: (box.left + width - box.right) / 2, y: height - 6, "text-anchor": "middle"}, svg, labels.x);
  element("text", {transform: `translate(11,${height / 2}) rotate(-90)`, "text-anchor": "middle"}, svg, labels.y);
  if (!labels.keepsWidth) svg.setAttribute("class", "fit");
  return {svg, x, y, y0, y1};
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
  const n = rows.length, size = Math.max(7, Math.floor(300 / n)), left = 40, top = 26, across = n * size;
  const svg = canvas(left + across + 96, top + Math.max(across, 60) + 36, title);
  svg.setAttribute("class", "fit");
  rows.forEach((row, i) => row.forEach((v, j) => v !== null && element("rect", {x: left + j * size, y: top + i * size,
    width: size, height: size, fill: colour(v), "data-tip": tip(i, j, v)}, svg)));
  for (let i = 0; i < n; i += Math.max(1, Math.ceil(n / 8))) {
    element("text", {x: left - 4, y: top + (i + 0.8) * size, "text-anchor": "end"}, svg, i);
    element("text", {x: left + (i + 0.5) * size, y: top + across + 13, "text-anchor": "middle"}, svg, i);
  }
  element("text", {x: left + across / 2, y: top + across + 29, "text-anchor": "middle"}, svg, "key position j");
  element("text", {transform: `translate(11,${top + across / 2}) rotate(-90)`, "text-anchor": "middle"}, svg,
    "query position i");
  colourBar(svg, left + across + 10, top, Math.max(across, 60), bar.colour, number(bar.low), number(bar.high));
  return svg;
}
