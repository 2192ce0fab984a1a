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
// What the reader chose outlives a reload of the page.
const PLACE = `pages ${location.pathname}`;
const kept = (() => { try { return JSON.parse(sessionStorage[PLACE]); } catch { return {}; } })();
function keep(name, value) {
  kept[name] = value;
  try { sessionStorage[PLACE] = JSON.stringify(kept); } catch { /* a browser that stores nothing */ }
}

function number(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return { inf: "∞", "-inf": "−∞", nan: "NaN" }[value] ?? value;
  if (Number.isNaN(value)) return "NaN";
  value += 0; // no minus before a zero
  for (const [size, prefix] of [[1e12, "T"], [1e9, "G"], [1e6, "M"]])
    if (Math.abs(value) >= size) return `${+(value / size).toPrecision(4)}${prefix}`;
  if (value && Math.abs(value) < 1e-4) return (+value.toPrecision(4)).toExponential().replaceAll("-", "−");
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
    const what = make("span", { class: colour }, row);
    if (colour) make("i", {}, what);
    what.append(name);
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

// One of several names: radio buttons, or a list where they are many. Gives the function that sets it.
let groups = 0;
function chooser(label, names, chosen, parent, choose) {
  if (names.length > 8) {
    const select = make("select", {}, make("label", { class: "switch" }, parent, `${label} `));
    for (const name of names) make("option", { value: name }, select, name);
    select.value = chosen;
    select.addEventListener("change", () => choose(select.value));
    return name => { select.value = name; };
  }
  const set = make("fieldset", { class: "switch" }, parent), group = `switch${groups++}`, inputs = new Map();
  make("legend", {}, set, label);
  for (const name of names) {
    const input = make("input", { type: "radio", name: group }, make("label", {}, set, name));
    input.checked = name === chosen;
    input.addEventListener("change", () => choose(name));
    inputs.set(name, input);
  }
  return name => { inputs.get(name).checked = true; };
}

const switches = document.querySelector(".switches");
const setTheme = theme => { document.documentElement.style.colorScheme = theme === "auto" ? "" : theme; keep("theme", theme); };
chooser("theme", ["auto", "light", "dark"], kept.theme || "auto", switches, setTheme);
setTheme(kept.theme || "auto");

// Panels of which one is seen; those of the same label and with a panel of that name move together.
const choosers = $$(".choose").map(box => {
  const { label } = box.dataset, panels = new Map($$(":scope > .panel", box).map(panel => [panel.dataset.name, panel]));
  const bar = make("div", { class: "bar" }), names = [...panels.keys()];
  box.prepend(bar);
  const set = chooser(label, names, names[0], bar, name => choosers.forEach(one => { if (one.label === label) one.see(name); }));
  const see = name => { if (panels.has(name)) { set(name); panels.forEach((panel, other) => { panel.hidden = other !== name; }); } };
  return { label, see };
});

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
      values.map(([name, list]) => ["", name || data.title, Number.isNaN(list[index]) ? "–" : number(list[index]) + data.unit]),
      box.left + left + (column + 1) * width, box.top + top + row * height);
  };
  readable(svg, (x, y) => { column = Math.floor((x - left) / width); row = Math.floor((y - top) / height); say(); },
    (dx, dy) => { column += dx; row += dy; say(); }, () => frame.setAttribute("visibility", "hidden"));
}

for (const event of ["pointerover", "focusin"])
  document.addEventListener(event, ({ target }) => {
    const said = target.dataset?.tip, box = target.getBoundingClientRect?.();
    if (said) show(said, [], box.left + Math.min(box.width / 2, 200), box.bottom);
  });
for (const event of ["pointerout", "focusout"]) document.addEventListener(event, ({ target }) => { if (target.dataset?.tip) hide(); });

for (const head of $$("table.sortable thead th")) {
  const sort = () => {
    const table = head.closest("table"), down = head.getAttribute("aria-sort") === "ascending", at = head.cellIndex;
    for (const other of $$("thead th", table)) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = $$("tbody tr", table), last = down ? -Infinity : Infinity, text = row => row.cells[at].textContent;
    const value = row => { const own = parseFloat(row.cells[at].dataset.value); return Number.isNaN(own) ? last : own; };
    const compare = rows.some(row => "value" in row.cells[at].dataset)
      ? (a, b) => value(a) - value(b) || 0 : (a, b) => text(a).localeCompare(text(b), "en", { numeric: true });
    rows.sort((a, b) => compare(a, b) * (down ? -1 : 1));
    table.tBodies[0].append(...rows);
  };
  head.tabIndex = 0;
  head.addEventListener("click", sort);
  head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
}
