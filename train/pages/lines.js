// Line charts: drawn from their data, so that the axis, the scale and what is seen can be switched.
const HIDDEN = new Set(kept.hidden || []), STYLES = new Map();
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
const kinds = Object.keys(Object.values(AXES)[0] || {});
let kind = kinds.includes(kept.kind) ? kept.kind : kinds[0];
const CHARTS = $$("figure.lines").map(figure => ({ figure, data: dataOf(figure) }));
// A name looks the same everywhere, and different from all that it shares a chart with.
for (const name of new Set(CHARTS.flatMap(({ data }) => data.series.map(one => one.name)))) {
  const beside = CHARTS.map(({ data }) => data.series.map(one => one.name)).filter(names => names.includes(name)).flat();
  const taken = new Set(beside.map(other => STYLES.get(other)?.index));
  let index = 0;
  while (taken.has(index)) index++;
  STYLES.set(name, { index, class: `c${index % 8}`, dash: DASHES[Math.floor(index / 8) % 4] });
}

function ticks(low, high, count, log = false, whole = false) {
  if (log) {
    const decades = Math.log10(high / low), found = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e += Math.max(1, Math.round(decades / count)))
      for (const m of decades > 3 ? [1] : decades > 1 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9])
        if (m * 10 ** e >= low * 0.999 && m * 10 ** e <= high * 1.001) found.push(m * 10 ** e);
    return found.length > 1 ? found : [low, high];
  }
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 2.5, 5, 10].find(m => m * power >= raw * 0.999 && (!whole || Number.isInteger(m * power))) || 1;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

// Math.min(...list) fails where a list is longer than a call has room for.
const extent = list => list.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);

function draw(chart) {
  const { figure, data } = chart, width = Math.round(figure.clientWidth), height = 220;
  if (!width) return;
  const left = 54, right = width - 12, top = 10, bottom = height - 34;
  const seen = data.series.filter(one => !HIDDEN.has(one.name)).map(one => ({ ...one, ...STYLES.get(one.name), x: AXES[one.axis][kind] }));
  const good = v => typeof v === "number" && (!chart.log || v > 0);
  const all = seen.flatMap(one => [one.y, one.low || [], one.high || []].flat()).filter(good);
  const xs = seen.flatMap(one => one.x).filter(v => typeof v === "number");
  let [low, high] = extent(all), [first, last] = extent(xs);
  if (!all.length) [low, high] = [chart.log ? 0.1 : 0, 1];
  if (!xs.length) [first, last] = [0, 1];
  if (low === high) [low, high] = chart.log ? [low / 2, high * 2] : low ? [low - Math.abs(low) / 10, high + Math.abs(high) / 10] : [0, 1];
  else if (!chart.log) { const room = (high - low) / 40; [low, high] = [low < 0 ? low - room : Math.max(0, low - room), high + room]; }
  if (first === last) [first, last] = [first - 1, last + 1];
  const scale = chart.log ? Math.log : v => v;
  const px = x => left + (x - first) / (last - first) * (right - left);
  const py = y => bottom - (scale(y) - scale(low)) / (scale(high) - scale(low)) * (bottom - top);
  const svg = make("svg", { role: "img", tabindex: 0, viewBox: `0 0 ${width} ${height}`, width: "100%", "aria-label": `${data.title}, ${seen.map(one => one.name).join(", ")}; arrow keys read it` });
  for (const y of ticks(low, high, 5, chart.log)) {
    make("path", { class: "rule", d: `M${left} ${py(y).toFixed(1)}H${right}` }, svg);
    make("text", { x: left - 6, y: py(y) + 4, "text-anchor": "end" }, svg, number(y));
  }
  for (const x of ticks(first, last, Math.max(2, width / 85), false, xs.every(Number.isInteger)))
    make("text", { x: px(x), y: bottom + 15, "text-anchor": "middle" }, svg, number(x));
  make("text", { x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, svg, kind);
  const marks = data.marks.map(mark => ({ text: mark.text, x: mark.x[kind], until: mark.until?.[kind] })).filter(mark => mark.x >= first && mark.x <= last);
  for (const mark of marks)
    if (mark.until === undefined) make("path", { class: "mark", d: `M${px(mark.x)} ${top}V${bottom}` }, svg);
    else make("rect", { class: "span", x: px(mark.x), y: top, width: Math.max(1, px(Math.min(mark.until, last)) - px(mark.x)), height: bottom - top }, svg);
  const at = (x, y) => `${px(x).toFixed(1)} ${py(y).toFixed(1)}`;
  for (const one of seen) {
    const group = make("g", { class: one.class, "data-series": one.name }, svg);
    let line = "", run = [];
    const edge = (list, i) => good(list[i]) ? list[i] : typeof list[i] === "number" ? low : one.y[i];
    const close = () => {
      if (run.length && one.low) {
        const back = run.map(i => at(one.x[i], edge(one.low, i))).reverse();
        make("path", { class: "band", d: `M${[...run.map(i => at(one.x[i], edge(one.high, i))), ...back].join("L")}Z` }, group);
      }
      if (run.length === 1) make("circle", { class: "alone", cx: px(one.x[run[0]]), cy: py(one.y[run[0]]), r: 3 }, group);
      run = [];
    };
    one.y.forEach((y, i) => {
      const odd = [y, one.low?.[i], one.high?.[i]].find(v => typeof v === "string") ?? (y !== null && !good(y) ? "-inf" : null);
      if (odd) make("text", { class: "odd", x: px(one.x[i]), y: odd === "-inf" ? bottom : top + 8, "text-anchor": "middle" }, group, { nan: "×", inf: "▲" }[odd] ?? "▼");
      if (good(y)) { line += (run.length ? "L" : "M") + at(one.x[i], y); run.push(i); } else close();
    });
    close();
    make("path", { class: "line", d: line, "stroke-dasharray": one.dash }, group);
  }
  const cross = make("path", { class: "cross" }, svg), stops = [...new Set(xs)].sort((a, b) => a - b);
  const nearest = (list, x) => list.reduce((best, v, i) => Math.abs(v - x) < Math.abs(list[best] - x) ? i : best, 0);
  let here = 0;
  const say = () => {
    const x = stops[here], box = svg.getBoundingClientRect(), rows = [];
    cross.setAttribute("d", `M${px(x).toFixed(1)} ${top}V${bottom}`);
    for (const one of seen) {
      if (x < one.x[0] || x > one.x.at(-1)) continue;
      const i = nearest(one.x, x), band = one.low && one.low[i] !== one.high[i] ? ` (${number(one.low[i])} to ${number(one.high[i])})` : "";
      if (one.y[i] !== null) rows.push([one.class, one.name, number(one.y[i]) + data.unit + band]);
    }
    for (const mark of marks) if (mark.until === undefined ? Math.abs(px(mark.x) - px(x)) < 5 : mark.x <= x && x <= mark.until) rows.push(["", mark.text, ""]);
    show(`${kind} ${number(x)}`, rows, box.left + px(x) * box.width / width, box.top + 20);
  };
  if (stops.length) readable(svg, x => { here = nearest(stops, first + (x - left) / (right - left) * (last - first)); say(); },
    dx => { here = Math.max(0, Math.min(stops.length - 1, here + dx)); say(); }, () => cross.removeAttribute("d"));
  figure.querySelector(":scope > svg")?.remove();
  figure.append(svg);
  for (const button of $$(".legend button", figure)) button.setAttribute("aria-pressed", !HIDDEN.has(button.textContent));
}

const redraw = () => CHARTS.forEach(draw);
for (const chart of CHARTS) {
  const { figure, data } = chart;
  chart.log = data.log === true;
  if (data.series.length > 1) {
    const legend = make("ul", { class: "legend" }, figure);
    for (const { name } of data.series) {
      const { class: colour, dash } = STYLES.get(name), button = make("button", { type: "button" }, make("li", {}, legend));
      make("path", { class: "line", d: "M0 5h20", "stroke-dasharray": dash }, make("svg", { class: colour, width: 20, height: 10 }, button));
      button.append(name);
      button.addEventListener("click", () => { HIDDEN.delete(name) || HIDDEN.add(name); keep("hidden", [...HIDDEN]); redraw(); });
    }
  }
  if (data.log !== null) {
    const button = make("button", { type: "button", "aria-pressed": chart.log }, figure.querySelector("figcaption"), "log y");
    button.addEventListener("click", () => { chart.log = !chart.log; button.setAttribute("aria-pressed", chart.log); draw(chart); });
  }
  let width = 0;
  new ResizeObserver(() => { if (width !== figure.clientWidth) { width = figure.clientWidth; draw(chart); } }).observe(figure);
}
if (kinds.length > 1) chooser("x axis", kinds, kind, switches, name => { kind = name; keep("kind", name); redraw(); });
