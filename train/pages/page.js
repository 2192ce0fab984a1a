"use strict";
// What all of a page uses: reading values under the pointer or by arrow keys, switches, heat maps, tables.
const $$ = (query, root = document) => [...root.querySelectorAll(query)];
const DRAWN = new Set(["svg", "path", "text", "rect", "g", "circle"]);

function make(tag, attributes = {}, parent = null, text = null) {
  const element = DRAWN.has(tag)
    ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== null) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

const dataOf = element => JSON.parse(element.querySelector("script[type='application/json']").textContent);
const AXES = JSON.parse(document.getElementById("axes").textContent);
const kept = (() => { try { return JSON.parse(sessionStorage.pages || "{}"); } catch { return {}; } })();
const keep = (name, value) => { kept[name] = value; try { sessionStorage.pages = JSON.stringify(kept); } catch { /* a page of its own origin */ } };

function number(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return { inf: "∞", "-inf": "−∞", nan: "NaN" }[value] ?? value;
  if (Number.isNaN(value)) return "NaN";
  value += 0; // no minus before a zero
  for (const [size, prefix] of [[1e12, "T"], [1e9, "G"], [1e6, "M"]])
    if (Math.abs(value) >= size) return `${+(value / size).toPrecision(4)}${prefix}`;
  const whole = Number.isInteger(value) || Math.abs(value) >= 1e4;
  return (whole ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(4))).replace("-", "−");
}

// The one box that says what is under the pointer: rows of [class of its colour, name, value].
const tip = make("div", { id: "tip", role: "status" }, document.body);
const hide = () => tip.replaceChildren();
function show(heading, rows, x, y) {
  tip.replaceChildren(make("strong", {}, null, heading));
  for (const [colour, name, value] of rows) {
    const row = make("div", {}, tip);
    make("span", { class: colour }, row, (colour ? "● " : "") + name);
    make("span", {}, row, value);
  }
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, x + 16 + width > innerWidth ? x - width - 12 : x + 16)}px`;
  tip.style.top = `${Math.max(4, Math.min(y + 12, innerHeight - height - 4))}px`;
}

// `read(x, y)` and `step(dx, dy)` choose what is read; both show it.
function readable(svg, read, step, leave) {
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    read((event.clientX - box.left) * scale, (event.clientY - box.top) * scale);
  });
  const away = () => { hide(); leave(); };
  svg.addEventListener("pointerleave", away);
  svg.addEventListener("blur", away);
  svg.addEventListener("keydown", event => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.key === "Escape") away();
    if (move) { event.preventDefault(); step(...move); }
  });
}

let groups = 0;
function switcher(label, names, chosen, parent, choose) {
  const set = make("fieldset", {}, parent);
  make("legend", {}, set, label);
  const group = `switch${groups++}`;
  for (const name of names) {
    const input = make("input", { type: "radio", name: group }, make("label", {}, set, name));
    input.checked = name === chosen;
    input.addEventListener("change", () => choose(name));
  }
  return set;
}

const switches = document.querySelector(".switches");
const setTheme = theme => { document.documentElement.style.colorScheme = theme === "auto" ? "" : theme; keep("theme", theme); };
switcher("theme", ["auto", "light", "dark"], kept.theme || "auto", switches, setTheme);
setTheme(kept.theme || "auto");

// Panels of which one is seen; those of the same label and with a panel of that name move together.
function choosePanel(label, name) {
  for (const box of $$(".choose").filter(one => one.dataset.label === label)) {
    const panels = $$(":scope > .panel", box);
    if (!panels.some(panel => panel.dataset.name === name)) continue;
    for (const panel of panels) panel.hidden = panel.dataset.name !== name;
    for (const input of $$(":scope > .bar input", box)) input.checked = input.parentElement.textContent === name;
    for (const select of $$(":scope > .bar select", box)) select.value = name;
  }
}
for (const box of $$(".choose")) {
  const { label } = box.dataset, names = $$(":scope > .panel", box).map(panel => panel.dataset.name);
  const bar = make("div", { class: "bar" });
  if (names.length <= 8) switcher(label, names, names[0], bar, name => choosePanel(label, name));
  else {
    const select = make("select", {}, make("label", {}, bar, `${label} `));
    for (const name of names) make("option", { value: name }, select, name);
    select.addEventListener("change", () => choosePanel(label, select.value));
  }
  box.prepend(bar);
}

for (const figure of $$("figure.heat")) {
  const svg = figure.querySelector("svg"), data = dataOf(figure), [left, top, width, height] = data.box;
  const values = Object.entries(data.values).map(([name, text]) => [name, text.split(" ").map(Number)]);
  const frame = make("rect", { class: "here", width, height, visibility: "hidden" }, svg);
  let row = 0, column = 0;
  const say = () => {
    row = Math.max(0, Math.min(data.rows.length - 1, row));
    column = Math.max(0, Math.min(data.columns.length - 1, column));
    frame.setAttribute("x", left + column * width);
    frame.setAttribute("y", top + row * height);
    frame.setAttribute("visibility", "visible");
    const box = svg.getBoundingClientRect(), index = row * data.columns.length + column;
    show(`${data.names[0]} ${data.rows[row]}, ${data.names[1]} ${data.columns[column]}`,
      values.map(([name, list]) => ["", name || data.title, number(list[index]) + data.unit]),
      box.left + left + (column + 1) * width, box.top + top + row * height);
  };
  readable(svg, (x, y) => { column = Math.floor((x - left) / width); row = Math.floor((y - top) / height); say(); },
    (dx, dy) => { column += dx; row += dy; say(); }, () => frame.setAttribute("visibility", "hidden"));
}

for (const element of $$("[data-tip]")) {
  const say = () => { const box = element.getBoundingClientRect(); show(element.dataset.tip, [], box.left + box.width / 2, box.bottom); };
  for (const event of ["pointerenter", "focus"]) element.addEventListener(event, say);
  for (const event of ["pointerleave", "blur"]) element.addEventListener(event, hide);
}

for (const head of $$("table.sortable thead th")) {
  const sort = () => {
    const table = head.closest("table"), down = head.getAttribute("aria-sort") === "ascending", at = head.cellIndex;
    for (const other of $$("thead th", table)) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => row.cells[at].dataset.value ?? row.cells[at].textContent;
    const rows = $$("tbody tr", table).sort((a, b) => value(a).localeCompare(value(b), "en", { numeric: true }) * (down ? -1 : 1));
    table.tBodies[0].append(...rows);
  };
  head.tabIndex = 0;
  head.addEventListener("click", sort);
  head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
}
