// Text by expert: the tokens of a document on the colours of their first experts, for any layer.
for (const figure of $$("figure.texts")) {
  const { layers, experts, k, texts } = dataOf(figure);
  const decode = code => new Uint16Array(Uint8Array.from(atob(code), c => c.charCodeAt(0)).buffer);
  for (const text of texts) { text.expert = decode(text.expert); text.gate = decode(text.gate); }
  const domains = [...new Set(texts.map(text => text.domain))], names = layers.map(String);
  let layer = Math.floor(layers.length / 2), alone = null, shown = [];
  const bar = make("div", { class: "bar" }, figure);
  chooser("domain", domains, domains[0], bar, open);
  const chooseLayer = chooser("layer", names, names[layer], bar, name => { layer = names.indexOf(name); paint(); });
  const legend = make("div", { class: "experts", role: "group", "aria-label": "experts" }, bar);
  const buttons = Array.from({ length: experts }, (_, expert) => {
    const button = make("button", { type: "button" }, legend, expert);
    button.addEventListener("click", () => { alone = alone === expert ? null : expert; paint(); });
    return button;
  });
  const body = make("div", {}, figure);

  // Hue by number, and from the ninth expert on a line under the token too.
  function colour(element, expert) {
    element.className = `c${expert % 8}`;
    element.style.textDecoration = ["none", "underline", "underline dotted", "underline wavy"][Math.floor(expert / 8) % 4];
  }

  function paint() {
    for (const { block, text, pieces } of shown) {
      block.setAttribute("aria-label", `${text.domain}, experts of layer ${names[layer]}`);
      pieces.forEach((element, i) => {
        const expert = text.expert[(layer * pieces.length + i) * k];
        colour(element, expert);
        element.classList.toggle("control", !text.pieces[i] || text.control.includes(i));
        element.classList.toggle("dim", alone !== null && alone !== expert);
      });
    }
    buttons.forEach((button, expert) => { colour(button, expert); button.setAttribute("aria-pressed", alone === expert); });
  }

  function tell({ text, pieces }, i) {
    const at = (layer * pieces.length + i) * k, box = pieces[i].getBoundingClientRect();
    const rows = Array.from(text.expert.slice(at, at + k), (expert, c) => [`c${expert % 8}`, `expert ${expert}`, (text.gate[at + c] / 1000).toFixed(3)]);
    show(`${JSON.stringify(text.pieces[i])}, layer ${names[layer]}`, rows, box.left, box.bottom);
  }

  function open(domain) {
    body.replaceChildren();
    shown = texts.filter(text => text.domain === domain).map(text => {
      const block = make("div", { class: "tokens", tabindex: 0, role: "group" }, body);
      const pieces = text.pieces.map(piece => make("b", {}, block, piece.replaceAll("\n", "↵\n") || "·"));
      const one = { block, text, pieces };
      let here = -1;
      const mark = i => { pieces[here]?.removeAttribute("data-here"); here = i; pieces[here]?.setAttribute("data-here", ""); };
      pieces.forEach((element, i) => {
        element.addEventListener("pointerenter", () => tell(one, i));
        element.addEventListener("pointerleave", hide);
      });
      block.addEventListener("blur", () => { hide(); mark(-1); });
      block.addEventListener("keydown", event => {
        const along = { ArrowLeft: -1, ArrowRight: 1 }[event.key] ?? 0, up = { ArrowUp: -1, ArrowDown: 1 }[event.key] ?? 0;
        if (!along && !up) return;
        event.preventDefault();
        mark(Math.max(0, Math.min(pieces.length - 1, here + along)));
        layer = Math.max(0, Math.min(layers.length - 1, layer + up));
        chooseLayer(names[layer]);
        paint();
        tell(one, here);
      });
      return one;
    });
    paint();
  }
  open(domains[0]);
}
