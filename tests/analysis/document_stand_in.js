"use strict";
// What the page's script asks of a browser, without one: elements that remember what was put into them.
const names = new Map();
function makeElement(tag) {
  const attributes = {}, children = [], heard = {};
  return {
    tag, attributes, children, heard, style: {}, value: "", textContent: "", offsetWidth: 10, offsetHeight: 10,
    setAttribute(key, value) { attributes[key] = String(value); },
    getAttribute(key) { return attributes[key] ?? null; },
    appendChild(child) { children.push(child); },
    append(...more) {
      children.push(...more);
      if (tag === "select" && this.value === "") this.value = more[0].value;
    },
    replaceChildren(...others) { children.splice(0, children.length, ...others); },
    addEventListener(event, listener) { heard[event] = listener; },
  };
}
globalThis.Element = Object;
globalThis.window = {innerWidth: 1000, innerHeight: 800};
globalThis.document = {
  ...makeElement("document"),
  createElement: makeElement,
  createElementNS: (_, tag) => makeElement(tag),
  getElementById: name => names.get(name) ?? null,
};
const [script, ids, content] = JSON.parse(require("fs").readFileSync(0, "utf8"));
for (const [name, tag] of Object.entries(ids)) names.set(name, makeElement(tag));
names.get("data").textContent = content;
require("vm").runInThisContext(script, {filename: "report.js"});

function count(node, wanted) {
  return Number(node.attributes.class === wanted) + node.children.reduce((sum, child) => sum + count(child, wanted), 0);
}
function text(node) { return [node.textContent, ...node.children.map(text)].join("\n"); }
const found = {texts: {}, classes: {}};
for (const [name, node] of names) {
  found.texts[name] = name === "data" ? "" : text(node);
  for (const wanted of ["cell", "token", "margin", "title"])
    found.classes[wanted] = (found.classes[wanted] ?? 0) + count(node, wanted);
}
const grid = names.get("grid").children[0].children.filter(node => node.attributes.class === "cell");
grid.at(-1).heard.click();
found.after_click = names.get("prior-title").textContent;
const target = makeElement("rect");
target.setAttribute("data-tip", "a value");
document.heard.mousemove({target, clientX: 5, clientY: 5});
found.tip = names.get("tip").textContent;
console.log(JSON.stringify(found));
