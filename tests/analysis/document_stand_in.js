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
      if (tag === "select" && this.value === "" && more.length) this.value = more[0].attributes.value;
    },
    replaceChildren(...others) { children.splice(0, children.length, ...others); },
    addEventListener(event, listener) { heard[event] = listener; },
    closest() { return attributes["data-tip"] === undefined ? null : this; },
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
names.get("order").value = "layer";
require("vm").runInThisContext(script, {filename: "report.js"});

function isOf(node, wanted) { return (node.attributes.class ?? "").split(" ").includes(wanted); }
function count(node, wanted) {
  return Number(isOf(node, wanted)) + node.children.reduce((sum, child) => sum + count(child, wanted), 0);
}
function text(node) { return [node.textContent, ...node.children.map(text)].join("\n"); }
function press(name, key) { names.get(name).heard.keydown({key, preventDefault() {}}); }
function look() {
  const found = {texts: {}, classes: {}};
  for (const [name, node] of names) {
    found.texts[name] = name === "data" ? "" : text(node);
    for (const wanted of ["cell", "token", "margin", "title", "thumb", "key", "hatch"])
      found.classes[wanted] = (found.classes[wanted] ?? 0) + count(node, wanted);
  }
  const cells = names.get("grid").children[0].children.filter(node => isOf(node, "cell"));
  cells.at(-1).heard.click();
  found.after_click = names.get("head-title").textContent;
  found.prior_after_click = text(names.get("prior"));
  press("grid", "ArrowUp");
  found.after_arrow = names.get("head-title").textContent;
  press("reading", "ArrowRight");
  found.said = names.get("said").textContent;
  names.get("kind").value = "induction";
  names.get("kind").heard.change();
  found.thumbs_of_kind = names.get("thumbs").children.length;
  names.get("kind").value = "";
  names.get("order").value = "down";
  names.get("order").heard.change();
  found.first_thumb = text(names.get("thumbs").children[0]).trim();
  const target = makeElement("rect");
  target.setAttribute("data-tip", "a value");
  document.heard.mousemove({target, clientX: 5, clientY: 5});
  found.tip = names.get("tip").textContent;
  return found;
}
// The script inflates its numbers first.
process.on("unhandledRejection", error => { console.error(error); process.exit(1); });
setTimeout(() => console.log(JSON.stringify(look())), 200);
